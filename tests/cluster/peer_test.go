package cluster

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

const birdConf = `router id 192.0.2.254;
protocol device {}
protocol kernel { ipv4 { import none; export none; }; }
protocol static {
  ipv4;
  route 172.20.0.0/16 blackhole;
  route 192.0.2.0/24 blackhole;
  route 192.0.2.1/32 blackhole;
  route 10.244.0.0/26 blackhole;
  route 10.244.0.4/32 blackhole;
  route 0.0.0.0/0 blackhole;
}
protocol bgp h1 {
  local 192.0.2.254 as 64999;
  neighbor 192.0.2.1 as 64512;
  ipv4 { import all; export all; next hop self; };
}
`

const tor = "apiVersion: projectcalico.org/v3\nkind: BGPPeer\nmetadata: {name: tor}\nspec: {peerIP: 192.0.2.254, asNumber: 64999}\n"

// startBIRD runs BIRD in the outside world until the test ends, and returns its control program.
func startBIRD(t *testing.T, l *lab.Lab, conf string) (birdc func(arg ...string) (string, error)) {
	t.Helper()
	bird := testenv.NeedProgram(t, "bird", "bird2")
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "bird.conf"), []byte(conf), 0o600))
	socket := filepath.Join(dir, "bird.ctl")
	cmd := exec.Command(bird, "-f", "-c", filepath.Join(dir, "bird.conf"), "-s", socket, "-P", filepath.Join(dir, "bird.pid"))
	must(t, l.Outside().Start(cmd))
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return func(arg ...string) (string, error) {
		return l.Outside().Exec(t.Context(), append([]string{"birdc", "-s", socket}, arg...)...)
	}
}

// TestForeignPeer: a router beside the mesh, BIRD. What it has is learned and it learns our blocks; it takes over neither
// our blocks nor the host's own routes, whatever it announces.
func TestForeignPeer(t *testing.T) {
	l := newHosts(t, 2)
	ctx := t.Context()
	h := l.Host(1)
	birdc := startBIRD(t, l, birdConf)
	before, err := h.Exec(ctx, "ip", "route", "show", "proto", "kernel")
	must(t, err)
	ctl(t, h, tor, "apply", "-f", "-")
	eventually(t, "its route is learned", func() error {
		routes, err := h.Exec(ctx, "ip", "route")
		if err == nil && !strings.Contains(routes, "172.20.0.0/16 via 192.0.2.254") {
			err = fmt.Errorf("%s", routes)
		}
		return err
	})
	eventually(t, "it learns our block", func() error {
		out, err := birdc("show", "route", "10.244.0.0/26", "all")
		if err == nil && !strings.Contains(out, "via 192.0.2.1") {
			err = fmt.Errorf("%s", out)
		}
		return err
	})
	eventually(t, "what it must not announce is said", func() error {
		s, err := status(t, h)
		if err != nil {
			return err
		}
		text := fmt.Sprint(s.Alarms, s.Problems)
		for _, want := range []string{"10.244.0.0/26", "10.244.0.4/32", "0.0.0.0/0", "192.0.2.0/24"} {
			if !strings.Contains(text, want) {
				return fmt.Errorf("nothing of %s: %s", want, text)
			}
		}
		return nil
	})
	after, err := h.Exec(ctx, "ip", "route", "show", "proto", "kernel")
	must(t, err)
	if after != before {
		t.Errorf("the host's own routes were\n%s\nand are\n%s", before, after)
	}
	routes, err := h.Exec(ctx, "ip", "route")
	must(t, err)
	for _, never := range []string{"192.0.2.0/24 via", "192.0.2.1 via", "10.244.0.4 via", "10.244.0.0/26 via", "default via 192.0.2.254 dev eth0 proto 202"} {
		if strings.Contains(routes, never) {
			t.Errorf("%s", routes)
		}
	}
	if table := ctl(t, h, "", "node", "status"); !strings.Contains(table, "| global            | up    |") {
		t.Errorf("%s", table)
	}
}

// TestManyRoutes learns 100,000 blocks from BIRD, loses them and learns them again, and logs what that costs.
func TestManyRoutes(t *testing.T) {
	const routes = 100000
	var conf strings.Builder
	conf.WriteString("router id 192.0.2.254;\nprotocol device {}\nprotocol static {\n  ipv4;\n")
	for i := range routes {
		fmt.Fprintf(&conf, "  route %s blackhole;\n", block(i))
	}
	conf.WriteString("}\nprotocol bgp h1 {\n  local 192.0.2.254 as 64999;\n  neighbor 192.0.2.1 as 64512;\n  ipv4 { import all; export all; next hop self; };\n}\n")
	l := newHosts(t, 1)
	h := l.Host(1)
	before := rss(t, h)
	startBIRD(t, l, conf.String())
	begin := time.Now()
	ctl(t, h, tor, "apply", "-f", "-")
	learned := func(n int) {
		t.Helper()
		eventually(t, fmt.Sprint(n, " routes"), func() error {
			s, err := status(t, h)
			if err == nil && (s.Learned != n || s.Written != n || !s.Ready || len(s.Problems) > 0) {
				err = fmt.Errorf("%d learned, %d written, ready %t, %v", s.Learned, s.Written, s.Ready, s.Problems)
			}
			return err
		})
	}
	learned(routes)
	t.Logf("learned, in the maps and in the kernel %s after the peer was named; RSS %d MB, %d before", time.Since(begin).Round(100*time.Millisecond), rss(t, h), before)
	for _, i := range []int{0, 1, routes / 2, routes - 1} {
		to := block(i).Addr().Next().String()
		if out := ctl(t, h, "", "routes", to); !strings.Contains(out, block(i).String()) || !strings.Contains(out, "192.0.2.254") {
			t.Errorf("route to %s: %s", to, out)
		}
		if out, err := h.Exec(t.Context(), "ip", "route", "get", to); err != nil || !strings.Contains(out, "via 192.0.2.254") {
			t.Errorf("kernel's route to %s: %s %v", to, out, err)
		}
	}
	begin = time.Now()
	must(t, h.Signal(t.Context(), "caracald", 9))
	must(t, h.StartAgent(t.Context()))
	learned(routes)
	t.Logf("killed, started and learned again in %s; RSS %d MB", time.Since(begin).Round(100*time.Millisecond), rss(t, h))
	begin = time.Now()
	ctl(t, h, "", "delete", "bgppeer", "tor")
	learned(0)
	eventually(t, "the kernel's table is empty again", func() error {
		out, err := h.Exec(t.Context(), "sh", "-c", "ip route | wc -l")
		if err == nil && len(strings.TrimSpace(out)) > 1 {
			err = fmt.Errorf("%s routes", out)
		}
		return err
	})
	t.Logf("forgotten in %s", time.Since(begin).Round(100*time.Millisecond))
}

// block is the i-th /26 from 20.0.0.0 on.
func block(i int) netip.Prefix {
	n := uint32(20)<<24 + uint32(i)<<6
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}), 26)
}

// rss is the resident memory of a host's agent, MB.
func rss(t *testing.T, h *lab.Host) int {
	t.Helper()
	pid, err := os.ReadFile(filepath.Join(h.Dir(), "caracald.pid"))
	must(t, err)
	text, err := os.ReadFile("/proc/" + string(pid) + "/status")
	must(t, err)
	var kb int
	_, after, _ := strings.Cut(string(text), "VmRSS:")
	_, err = fmt.Sscan(after, &kb)
	must(t, err)
	return kb >> 10
}
