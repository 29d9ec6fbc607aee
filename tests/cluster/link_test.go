package cluster

import (
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/tools/lab"
)

// kernelRoutes are a host's own routes to other hosts' blocks, as ip-route(8) shows them.
func kernelRoutes(t *testing.T, h *lab.Host) (all []string) {
	t.Helper()
	for _, family := range []string{"-4", "-6"} {
		out := must1(h.Exec(t.Context(), "ip", family, "-d", "route", "show", "proto", "202"))(t)
		for line := range strings.Lines(out) {
			if strings.Contains(line, " via ") || strings.Contains(line, " encap ") {
				all = append(all, strings.Join(strings.Fields(line), " "))
			}
		}
	}
	return all
}

// TestLinkDown: the kernel's routes come back after an interface was down, though no peer tells them again.
func TestLinkDown(t *testing.T) {
	l := newCluster(t, 2)
	ctx := t.Context()
	h, b := l.Host(1), l.Host(2).TestPod(t, "b", lab.PodOptions{})
	must1(h.Exec(ctx, "sysctl", "-qw", "net.ipv6.conf.all.keep_addr_on_down=1", "net.ipv6.conf.eth0.keep_addr_on_down=1"))(t)
	sessions := func() (since []time.Time) {
		s, err := status(t, h)
		must(t, err)
		for _, p := range s.Peers {
			since = append(since, p.Since)
		}
		return since
	}
	began := sessions()
	flap := func(device string, whileDown func()) {
		t.Helper()
		before := kernelRoutes(t, h)
		if len(before) != 2 {
			t.Fatalf("%q", before)
		}
		must1(h.Exec(ctx, "ip", "link", "set", device, "down"))(t)
		whileDown()
		must1(h.Exec(ctx, "ip", "link", "set", device, "up"))(t)
		begin := time.Now()
		eventually(t, "the routes by "+device+" to be back", func() error {
			if now := kernelRoutes(t, h); !slices.Equal(now, before) {
				return fmt.Errorf("%q, were %q", now, before)
			}
			return nil
		})
		t.Logf("back %s after %s was up", time.Since(begin).Round(time.Millisecond), device)
		pings(t, h.Namespace(), b.Addr(), 63)
		pings(t, h.Namespace(), b.Addr6(), 63)
	}
	flap("eth0", func() {
		if left := kernelRoutes(t, h); len(left) > 0 {
			t.Errorf("the kernel has kept %q", left)
		}
		eventually(t, "the status to tell of it", func() error { return hasProblem(t, h, "routes", "next hop") })
	})
	ready(t, h, 1)
	if now := sessions(); !slices.EqualFunc(now, began, time.Time.Equal) {
		t.Errorf("BGP sessions began at %s, before at %s", now, began)
	}

	// One that somebody has removed is seen by the next look at everything.
	must1(h.Exec(ctx, "ip", "route", "flush", "proto", "202", "via", l.Host(2).Addr().String()))(t)
	pings(t, h.Namespace(), b.Addr(), 63)

	ctl(t, h, vxlan("Always"), "apply", "-f", "-")
	for _, h := range l.Hosts() {
		eventually(t, h.Name+" has tunnel routes", func() error {
			if now := kernelRoutes(t, h); len(now) != 2 || strings.Count(strings.Join(now, " "), " encap ") != 2 {
				return fmt.Errorf("%q", now)
			}
			return nil
		})
	}
	// A look, after a change of links, writes only what is not as it should be.
	before, monitor := kernelRoutes(t, h), follow(t, h, "ip", "monitor", "route")
	must1(h.Exec(ctx, "ip", "-4", "route", "flush", "proto", "202", "dev", "vxlan.caracal"))(t)
	must1(h.Exec(ctx, "ip", "link", "add", "another", "type", "veth", "peer", "name", "other"))(t)
	eventually(t, "the route by the tunnel to be back", func() error {
		if now := kernelRoutes(t, h); !slices.Equal(now, before) {
			return fmt.Errorf("%q, were %q", now, before)
		}
		return nil
	})
	pings(t, h.Namespace(), b.Addr(), 63)
	if out := monitor(); strings.Contains(out, "2001:db8:244:") {
		t.Errorf("the kernel tells of %s", out)
	}
	flap("vxlan.caracal", func() {}) // the agent has it up again at once
	flap("eth0", func() {})
	ready(t, h, 1)
}

// TestUplinkChanged: an agent takes off what an earlier one left on interfaces that are no uplinks any more, and nothing else.
func TestUplinkChanged(t *testing.T) {
	l := newCluster(t, 2)
	ctx := t.Context()
	h, b := l.Host(1), l.Host(2).TestPod(t, "b", lab.PodOptions{})
	a := h.TestPod(t, "a", lab.PodOptions{})
	for i, name := range []string{"second", "third.7"} {
		must1(h.Exec(ctx, "ip", "link", "add", name, "up", "type", "veth", "peer", "name", fmt.Sprint("peer", i)))(t)
		must1(h.Exec(ctx, "ip", "addr", "add", fmt.Sprintf("203.0.113.%d/25", 1+128*i), "dev", name))(t)
	}
	uplinks := func(want ...string) {
		t.Helper()
		eventually(t, fmt.Sprintf("the uplinks to be %q", want), func() error {
			names, err := loader.Uplinks(h.BPFDir())
			must(t, err)
			m, err := maps.Open(h.BPFDir())
			must(t, err)
			defer m.Close()
			entries, err := m.Uplinks()
			must(t, err)
			if s, err := status(t, h); err != nil || !slices.Equal(names, want) || len(entries) != len(want) || !s.Ready {
				return fmt.Errorf("programs on %q, addresses of %v, status %+v (%v)", names, entries, s, err)
			}
			return nil
		})
	}
	again := func(arg ...string) {
		t.Helper()
		must(t, h.Signal(ctx, "caracald", unix.SIGTERM))
		must(t, h.StartAgent(ctx, arg...))
	}
	again("--uplink", "eth0,second,third.*")
	uplinks("eth0", "second", "third.7")
	must(t, h.Signal(ctx, "caracald", unix.SIGTERM))
	must1(h.Exec(ctx, "ip", "link", "del", "third.7"))(t)
	must(t, h.StartAgent(ctx))
	uplinks("eth0")
	must(t, h.Do(func() error {
		i, err := net.InterfaceByName("second")
		if err != nil {
			return err
		}
		if by, err := loader.AttachedNet(h.BPFDir(), "second", i.Index); err == nil {
			t.Errorf("second has programs still, by %s", by)
		}
		return nil
	}))
	if _, err := seenBy(t, l, a, lab.Outside4); err != nil {
		t.Error(err)
	}

	// A VXLAN pool needs no --uplink of its own, and the tunnel's programs and network id are there for every agent.
	again("--uplink", "second")
	uplinks("eth0", "second") // eth0 has the default route: what is masqueraded leaves by it
	ctl(t, h, vxlan("Always"), "apply", "-f", "-")
	uplinks("eth0", "second", "vxlan.caracal")
	pings(t, a.Namespace(), b.Addr(), 62)
	again("--uplink", "eth0")
	uplinks("eth0", "vxlan.caracal")
	pings(t, a.Namespace(), b.Addr(), 62)
	if counted(t, h, "from_net", "forward_pod") == 0 {
		t.Error("nothing came to the pod by the programs of an uplink")
	}
	pings(t, b.Namespace(), a.Addr6(), 62)
}
