package cluster

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caracal-net/caracal/agent"
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

const plainBIRD = `router id 192.0.2.254;
protocol device {}
protocol static { ipv4; route 172.20.0.0/16 blackhole; route 172.21.0.0/16 blackhole; }
protocol bgp h1 {
  local 192.0.2.254 as 64999;
  neighbor 192.0.2.1 as 64512;
  connect retry time 1; connect delay time 1; error wait time 1, 2;
  ipv4 { import all; export where source = RTS_STATIC; next hop self; };
}
`

const filter = `apiVersion: projectcalico.org/v3
kind: BGPFilter
metadata: {name: tor}
spec:
  exportV4: [{action: Reject, source: RemotePeers}]
  importV4: [{action: Accept, matchOperator: Equal, cidr: 172.20.0.0/16}, {action: Reject}]
`

// TestBGPFilter: a peer whose filter is not there has no session; then its filter counts, a change of it too, without a
// new session.
func TestBGPFilter(t *testing.T) {
	l := newHosts(t, 2)
	h := l.Host(1)
	birdc := startBIRD(t, l, plainBIRD)
	own, others := h.Pools()[0], l.Host(2).Pools()[0]
	route := func(p netip.Prefix, words ...string) bool {
		out, err := birdc("show", "route", "in", p.String(), "all")
		for _, w := range append(words, "via 192.0.2.1") {
			if !strings.Contains(out, w) {
				return false
			}
		}
		return err == nil
	}
	learned := func(want ...string) bool {
		routes, err := h.Exec(t.Context(), "ip", "route")
		must(t, err)
		for _, p := range []string{"172.20.0.0/16", "172.21.0.0/16"} {
			if strings.Contains(routes, p+" via 192.0.2.254") != slices.Contains(want, p) {
				return false
			}
		}
		return true
	}
	check := func(what string, ok func() bool) {
		t.Helper()
		eventually(t, what, func() error {
			if ok() {
				return nil
			}
			out, err := birdc("show", "route")
			s, _ := status(t, h)
			return fmt.Errorf("%s %w, %+v", out, err, s)
		})
	}
	since := func() (at time.Time) {
		s, err := status(t, h)
		must(t, err)
		for _, p := range s.Peers {
			if p.Address.String() == "192.0.2.254" && p.Info == "Established" {
				at = p.Since
			}
		}
		return at
	}

	out, err := h.Namespace().ExecInput(t.Context(), strings.Replace(tor, "asNumber: 64999", "asNumber: 64999, filters: [tor]", 1), "caracalctl", "apply", "-f", "-")
	must(t, err)
	if !strings.Contains(out, "BGPPeer tor created") {
		t.Errorf("%s", out)
	}
	eventually(t, "the missing filter is said", func() error { return hasProblem(t, h, "bgp", "peer tor: there is no BGPFilter tor") })
	is(t, h, "it has no such peer", func(s agent.Status) bool { return !slices.Contains(peersWith(s, false), "192.0.2.254") })
	if s, err := status(t, h); err != nil || len(peersWith(s, true)) != 2 {
		t.Errorf("the others' sessions: %+v, %v", s, err)
	}

	ctl(t, h, filter, "apply", "-f", "-")
	check("the filter counts", func() bool { return route(own) && !route(others) && learned("172.20.0.0/16") })
	begin := since()

	ctl(t, h, strings.Replace(strings.Replace(filter, "{action: Reject, source: RemotePeers}", fmt.Sprintf("{action: Reject, matchOperator: In, cidr: %s}", own), 1), "172.20", "172.21", 1), "apply", "-f", "-")
	check("the changed filter counts", func() bool { return !route(own) && route(others) && learned("172.21.0.0/16") })

	ctl(t, h, `apiVersion: projectcalico.org/v3
kind: BGPConfiguration
metadata: {name: default}
spec: {communities: [{name: pods, value: "65001:44"}], prefixAdvertisements: [{cidr: 10.244.0.0/16, communities: [pods]}]}
---
`+tor, "apply", "-f", "-")
	check("no filter is named any more", func() bool {
		return route(own, "(65001,44)") && route(others, "(65001,44)") && learned("172.20.0.0/16", "172.21.0.0/16")
	})
	if at := since(); at != begin || at.IsZero() {
		t.Errorf("the session began at %s and at %s", begin, at)
	}

	// A filter that goes takes the session with it: it is never open.
	ctl(t, h, strings.Replace(tor, "asNumber: 64999", "asNumber: 64999, filters: [tor]", 1), "apply", "-f", "-")
	check("the filter counts again", func() bool { return !route(own) })
	ctl(t, h, "", "delete", "bgpfilter", "tor")
	check("the session ends", func() bool { return since().IsZero() && !route(own) && !route(others) && learned() })
	eventually(t, "the missing filter is said", func() error { return hasProblem(t, h, "bgp", "peer tor: there is no BGPFilter tor") })
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
