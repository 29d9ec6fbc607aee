package containerd

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caracal-net/caracal/tests/testenv"
)

// TestCRI: what a kubelet asks of one machine.
func TestCRI(t *testing.T) {
	m := newMachine(t)
	for _, c := range []struct {
		name string
		test func(*testing.T, *machine)
	}{
		{"pods", testPods}, {"restart", testRestart}, {"calls", testCalls}, {"shaped", testShaped}, {"requested", testRequested},
		{"reboot", testReboot},
	} {
		if !m.subtest(c.name, c.test) {
			return
		}
	}
}

// subtest runs a test that begins and ends with no pod on the machine.
func (m *machine) subtest(name string, test func(*testing.T, *machine)) bool {
	outer := m.t
	defer func() { m.t = outer }()
	return outer.(*testing.T).Run(name, func(t *testing.T) {
		m.t = t
		test(t, m)
		m.clean()
	})
}

// live makes sure that three pods reach each other, and the first one's published port is reached from everywhere.
func live(m *machine, web, client, other *pod) {
	m.t.Helper()
	web.reached(web.addr.String(), 80, client, other, m)
	client.reached(client.addr.String(), 80, web, m)
	web.reached(m.Addr().String(), 8080, client, web, m, m.Lab().Outside())
}

func testPods(t *testing.T, m *machine) {
	web, client, other := m.run("web", published(8080, 80)), m.run("client"), m.run("other", annotation("kubernetes.io/egress-bandwidth", "1G"))
	live(m, web, client, other)
	pods := m.recorded()
	for _, p := range []*pod{web, client, other} {
		i := slices.IndexFunc(pods, func(r recorded) bool { return r.ContainerID == p.id })
		if i < 0 || pods[i].PodName != p.config.Metadata.Name || !slices.Equal(pods[i].Addresses, []string{p.addr.String()}) || pods[i].State != "ready" {
			t.Errorf("%s with address %s is not among caracalctl's pods: %+v", p.name(), p.addr, pods)
		}
	}
	// What clean looks for is there.
	seen, err := m.left()
	must(t, err)
	for what := range traces {
		if seen[what] == "" && what != "problems" {
			t.Errorf("with pods alive nothing is seen of their %s", what)
		}
	}
	for _, p := range []*pod{web, client, other} {
		p.remove()
	}
	if out, err := m.Lab().Outside().Exec(t.Context(), "sh", "-c", fetch(m.Addr().String(), 8080)); err == nil && out != "" {
		t.Errorf("after its removal the pod's port answers %q", out)
	}
}

// testRestart: pods live on while containerd is away, and it knows them when it is back.
func testRestart(t *testing.T, m *machine) {
	web, client, other := m.run("web", published(8080, 80)), m.run("client"), m.run("other")
	m.kill()
	web.reached(web.addr.String(), 80, inside{client}, inside{other}, m)
	web.reached(m.Addr().String(), 8080, inside{client}, m, m.Lab().Outside())
	m.start()
	live(m, web, client, other)
	for _, p := range []*pod{web, client, other} {
		p.remove()
	}
}

// testCalls: one ADD a pod; DEL with the namespace, again without it at each further Stop and at Remove, all of which go well; and
// a DEL after an ADD that failed.
func testCalls(t *testing.T, m *machine) {
	m.plugin("", "")
	defer m.unwrap()
	p := m.run("web", published(8080, 80))
	p.stop()
	p.stop()
	p.remove()
	var got []string
	for _, c := range m.calls() {
		if c.container != p.id || !strings.Contains(c.args, "K8S_POD_NAMESPACE=default") {
			t.Errorf("%+v", c)
		}
		s := c.command
		if c.netns == "" {
			s += " without namespace"
		}
		got = append(got, s)
	}
	if n := len(got); n < 3 || got[0] != "ADD" || got[1] != "DEL" || slices.Index(got[2:], "DEL without namespace") < 0 || slices.Contains(got[1:], "ADD") {
		t.Errorf("calls: %v", got)
	}
	m.clean()

	m.plugin("", `[ $CNI_COMMAND = ADD ] && kill -9 $$`)
	if _, err := m.tries("web"); err == nil {
		t.Error("a plugin that is killed does not fail the pod")
	}
	if c := m.calls(); len(c) < 2 || c[0].command != "ADD" || c[1].command != "DEL" || c[1].container != c[0].container {
		t.Errorf("calls: %v", c)
	}
}

// testShaped: a pod's annotations arrive as the capability "bandwidth", and what they say is kept.
func testShaped(t *testing.T, m *machine) {
	m.plugin("", "")
	defer m.unwrap()
	const (
		rate  = 200_000_000 // bits per second
		burst = 1<<32 - 1   // bits: containerd says the most that there is, and does not let one choose
		bytes = 580_000_000
	)
	shaped := m.run("shaped", annotation("kubernetes.io/ingress-bandwidth", "200M"), annotation("kubernetes.io/egress-bandwidth", "200M"))
	free := m.run("free")
	var sent struct {
		RuntimeConfig struct{ Bandwidth json.RawMessage }
	}
	must(t, json.Unmarshal([]byte(m.calls()[0].stdin), &sent))
	if want := `{"IngressRate":200000000,"IngressBurst":4294967295,"EgressRate":200000000,"EgressBurst":4294967295}`; string(sent.RuntimeConfig.Bandwidth) != want {
		t.Errorf("containerd sends bandwidth %s, want %s", sent.RuntimeConfig.Bandwidth, want)
	}
	for _, r := range m.recorded() {
		if r.Shaped != (r.ContainerID == shaped.id) {
			t.Errorf("%s: shaped %t", r.PodName, r.Shaped)
		}
	}
	// A lower bound of the time: what noise can only make longer.
	const least = (bytes*8 - burst) * 1000 / rate * 9 / 10 * time.Millisecond
	for _, way := range []struct {
		name     string
		from, to *pod
	}{{"out of the pod", shaped, free}, {"into the pod", free, shaped}} {
		took := testenv.Stream(t, m.Path(way.from.netns()), m.Path(way.to.netns()), way.to.addr, bytes)
		t.Logf("%s: %d bytes in %s", way.name, bytes, took)
		if took < least {
			t.Errorf("%s: %d bytes in %s, shaped it takes %s at least", way.name, bytes, took, least)
		}
	}
	shaped.remove()
	free.remove()
}

const (
	wantIPs = "cni.projectcalico.org/ipAddrs"
	wantMAC = "cni.projectcalico.org/hwAddr"
)

// testRequested: annotations ask for an address and a MAC address.
func testRequested(t *testing.T, m *machine) {
	for range 2 { // the second time proves that the first was given back
		p := m.run("fixed", annotation(wantIPs, `["10.244.7.7"]`), annotation(wantMAC, "02:00:5e:00:53:07"))
		out, err := p.exec("ip -o addr show dev eth0; ip -o link show dev eth0")
		if err != nil || !strings.Contains(out, "10.244.7.7/32") || !strings.Contains(out, "02:00:5e:00:53:07") {
			t.Errorf("a pod that asked for 10.244.7.7 and 02:00:5e:00:53:07 has %s, %v", out, err)
		}
		p.reached("10.244.7.7", 80, m)
		p.remove()
	}
}

// testReboot: the power fails with pods alive. Their addresses are free afterwards, and they can be started again.
func testReboot(t *testing.T, m *machine) {
	fixed := []option{annotation(wantIPs, `["10.244.7.7"]`), published(8080, 80)}
	old := []*pod{m.run("web", fixed...), m.run("client"), m.run("other")}
	m.reboot()
	// A kubelet finds pods that are not ready, and makes them anew before it removes the old ones.
	web, client := m.run("web", fixed...), m.run("client")
	for _, p := range old {
		p.remove()
	}
	other := m.run("other")
	live(m, web, client, other)
	if n := len(m.recorded()); n != 3 {
		t.Errorf("%d pods are recorded: %+v", n, m.recorded())
	}
	for _, p := range []*pod{web, client, other} {
		p.remove()
	}
}
