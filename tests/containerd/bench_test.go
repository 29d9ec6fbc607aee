package containerd

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const benchPods = 100

// BenchmarkPods starts and removes 100 pods with a container each on one machine, ten at a time in turn with as many whose network
// Debian's bridge and host-local make, everything else being the same, and then 100 that are alive at once. It reports
//
//	x/bridge-start, x/bridge-stop   what containerd waits for the network, as a ratio to bridge (its own metrics, medians of the tens)
//	%start, %stop                   that time's share of what a pod with its container takes
//	add-ms, del-ms                  the plugin's own time, from its log (medians)
//
// and fails if anything of a pod is left. It is the share of all plugins that containerd calls, loopback, portmap and bandwidth too.
//
//	go test -run '^$' -bench Pods ./tests/containerd
func BenchmarkPods(b *testing.B) {
	m := newMachine(b)
	must(b, m.Signal(b.Context(), "containerd", unix.SIGTERM))
	m.write("/etc/containerd/config.toml", config+"[metrics]\n  address = \"127.0.0.1:1338\"\n")
	m.start()
	text, err := os.ReadFile(m.Path(confFile))
	must(b, err)
	networks := map[string]string{"caracal": string(text), "bridge": bridged(b, text)}
	use := func(network string) {
		b.Helper()
		m.write(confFile, networks[network])
		m.loaded(networks[network])
	}
	for name := range networks { // the first pod of a network takes longer
		use(name)
		m.run("warm-up").remove()
	}
	for range b.N {
		took := map[string][]costs{}
		for range benchPods / 10 {
			for _, name := range []string{"caracal", "bridge"} {
				use(name)
				took[name] = append(took[name], m.batch(10))
			}
		}
		ours, theirs := took["caracal"], took["bridge"]
		for _, side := range []struct {
			name        string
			of, network func(costs) time.Duration
		}{
			{"start", func(c costs) time.Duration { return c.start }, func(c costs) time.Duration { return c.setUp }},
			{"stop", func(c costs) time.Duration { return c.stop }, func(c costs) time.Duration { return c.tearDown }},
		} {
			network := median(ours, side.network)
			b.ReportMetric(ratio(network, median(theirs, side.network)), "x/bridge-"+side.name)
			b.ReportMetric(100*ratio(network, median(ours, side.of)), "%"+side.name)
			b.Logf("%s of ten pods, medians: network %s of %s; with bridge %s of %s", side.name, network, median(ours, side.of),
				median(theirs, side.network), median(theirs, side.of))
		}
		use("caracal")
		m.sh(": >/var/log/caracal/cni.log")
		all := m.batch(benchPods)
		b.Logf("%d pods at once: network %s of %s to start, %s of %s to stop", benchPods, all.setUp, all.start, all.tearDown, all.stop)
		b.ReportMetric(m.logged("ADD"), "add-ms")
		b.ReportMetric(m.logged("DEL"), "del-ms")
		m.sh("ip link del bench0")
		m.clean()
	}
	b.ReportMetric(0, "ns/op") // of no meaning
}

// bridged is a network with bridge and host-local in Caracal's place.
func bridged(t testing.TB, list []byte) string {
	t.Helper()
	var network map[string]any
	must(t, json.Unmarshal(list, &network))
	network["plugins"].([]any)[0] = map[string]any{
		"type": "bridge", "bridge": "bench0", "isGateway": true, "ipMasq": true,
		"ipam": map[string]any{"type": "host-local", "ranges": [][]any{{map[string]string{"subnet": "10.9.0.0/16"}}}, "routes": []any{map[string]string{"dst": "0.0.0.0/0"}}},
	}
	text, err := json.Marshal(network)
	must(t, err)
	return string(text)
}

// costs is what some pods took, and what of that containerd waited for their network.
type costs struct{ start, setUp, stop, tearDown time.Duration }

// batch starts so many pods, one after the other, and removes them.
func (m *machine) batch(n int) (c costs) {
	m.t.Helper()
	setUp, tearDown := m.waited()
	begin := time.Now()
	var pods []*pod
	for i := range n {
		pods = append(pods, m.run(fmt.Sprintf("pod-%d", i)))
	}
	c.start = time.Since(begin)
	begin = time.Now()
	for _, p := range pods {
		p.remove()
	}
	c.stop = time.Since(begin)
	c.setUp, c.tearDown = m.waited()
	c.setUp -= setUp
	c.tearDown -= tearDown
	return c
}

// waited is how long containerd has waited for networks so far.
func (m *machine) waited() (setUp, tearDown time.Duration) {
	m.t.Helper()
	for line := range strings.Lines(m.sh(`printf 'GET /v1/metrics HTTP/1.0\r\n\r\n' | busybox nc -w 9 127.0.0.1 1338`)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		seconds, _ := strconv.ParseFloat(value, 64)
		switch name {
		case "containerd_cri_sandbox_create_network_seconds_sum":
			setUp = time.Duration(seconds * float64(time.Second))
		case "containerd_cri_sandbox_delete_network_seconds_sum":
			tearDown = time.Duration(seconds * float64(time.Second))
		}
	}
	return setUp, tearDown
}

// logged is the median of what commands took that did something, as the plugin's log says, milliseconds.
func (m *machine) logged(command string) float64 {
	m.t.Helper()
	var all []float64
	for line := range strings.Lines(m.sh("cat /var/log/caracal/cni.log")) {
		_, after, found := strings.Cut(strings.TrimSpace(line), " duration_ms=")
		ms, err := strconv.ParseFloat(after, 64)
		if found && err == nil && strings.Contains(line, "command="+command+" ") && strings.Contains(line, " addresses=") {
			all = append(all, ms)
		}
	}
	if len(all) != benchPods {
		m.t.Fatalf("the log has %d lines of %s, want %d", len(all), command, benchPods)
	}
	slices.Sort(all)
	return all[len(all)/2]
}

func median(all []costs, of func(costs) time.Duration) time.Duration {
	var d []time.Duration
	for _, c := range all {
		d = append(d, of(c))
	}
	slices.Sort(d)
	return d[len(d)/2]
}

func ratio(a, b time.Duration) float64 { return float64(a) / float64(b) }
