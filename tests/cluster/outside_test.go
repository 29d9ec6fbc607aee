package cluster

import (
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

// seenBy asks port 7 of the outside world from a pod, and returns who the world takes the pod for.
func seenBy(t *testing.T, l *lab.Lab, p *lab.Pod, to netip.Addr) (seen netip.AddrPort, err error) {
	t.Helper()
	var world, pod *net.UDPConn
	must(t, l.Outside().Do(func() (err error) {
		world, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, 7)))
		return err
	}))
	defer world.Close()
	must(t, p.Namespace().Do(func() (err error) {
		pod, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, 7)))
		return err
	}))
	defer pod.Close()
	for _, c := range []*net.UDPConn{world, pod} {
		if err := c.SetDeadline(time.Now().Add(time.Second)); err != nil {
			return seen, err
		}
	}
	if _, err := pod.Write([]byte("who am I?")); err != nil {
		return seen, err
	}
	buf := make([]byte, 100)
	if _, seen, err = world.ReadFromUDPAddrPort(buf); err != nil {
		return seen, fmt.Errorf("the world hears nothing: %w", err)
	}
	seen = netip.AddrPortFrom(seen.Addr().Unmap(), seen.Port())
	if _, err := world.WriteToUDPAddrPort([]byte(seen.String()), seen); err != nil {
		return seen, err
	}
	n, err := pod.Read(buf)
	if err != nil {
		return seen, fmt.Errorf("the pod, %s outside, hears nothing: %w", seen, err)
	}
	if got := string(buf[:n]); got != seen.String() {
		return seen, fmt.Errorf("the pod hears %q", got)
	}
	return seen, nil
}

// TestOutside: pods of a pool with natOutgoing reach the world by their host's address, between pods nothing is translated, and
// pods that are there follow when the pool changes.
func TestOutside(t *testing.T) {
	l := newCluster(t, 2)
	ctx := t.Context()
	a, b := l.Host(1).TestPod(t, "a", lab.PodOptions{}), l.Host(2).TestPod(t, "b", lab.PodOptions{})
	for p, h := range map[*lab.Pod]*lab.Host{a: l.Host(1), b: l.Host(2)} {
		seen, err := seenBy(t, l, p, lab.Outside4)
		must(t, err)
		if seen.Addr() != h.Addr() || seen.Port() < 61000 {
			t.Errorf("%s: the world sees %s, want %s and a port from 61000 on", p.Name, seen, h.Addr())
		}
		if _, err := p.Exec(ctx, "ping", "-c", "3", "-i", "0.05", "-W", "1", lab.Outside4.String()); err != nil {
			t.Errorf("%s: %v", p.Name, err)
		}
		t.Logf("%s# caracalctl flows --pod %s\n%s", h.Name, p.Name, ctl(t, h, "", "flows", "--pod", p.Name))
	}
	eventually(t, "a reaches b", func() error {
		_, err := a.Exec(ctx, "ping", "-c", "1", "-W", "1", b.Addr().String())
		return err
	})
	// The IPv6 pool does not ask for it: the world can't answer.
	if seen, err := seenBy(t, l, a, lab.Outside6); err == nil || seen.Addr() != a.Addr6() {
		t.Errorf("IPv6: the world sees %s (%v), want %s", seen, err, a.Addr6())
	}
	ctl(t, l.Host(1), `apiVersion: projectcalico.org/v3
kind: IPPool
metadata: {name: v6}
spec: {cidr: "2001:db8:244::/64", natOutgoing: true}
`, "apply", "-f", "-")
	eventually(t, "a reaches the world over IPv6", func() error {
		seen, err := seenBy(t, l, a, lab.Outside6)
		if err == nil && seen.Addr() != l.Host(1).Addr6() {
			err = fmt.Errorf("the world sees %s", seen)
		}
		return err
	})
	ctl(t, l.Host(1), `apiVersion: projectcalico.org/v3
kind: IPPool
metadata: {name: v6}
spec: {cidr: "2001:db8:244::/64"}
`, "apply", "-f", "-")
	eventually(t, "the world to see the pod again", func() error {
		if seen, _ := seenBy(t, l, a, lab.Outside6); seen.Addr() != a.Addr6() {
			return fmt.Errorf("the world sees %s", seen)
		}
		return nil
	})
	must(t, a.Check(ctx))
}

// TestOutsideAlone: without an agent, a pod whose configuration says ipMasq reaches the world.
func TestOutsideAlone(t *testing.T) {
	testenv.NeedRoot(t)
	l := lab.New(t, lab.Config{Hosts: 1, Outside: true, Caracal: testenv.Bin(t, "caracal"), Plugin: map[string]any{"ipMasq": true}})
	a := l.Host(1).TestPod(t, "a", lab.PodOptions{})
	for to, want := range map[netip.Addr]netip.Addr{lab.Outside4: l.Host(1).Addr(), lab.Outside6: l.Host(1).Addr6()} {
		if seen, err := seenBy(t, l, a, to); err != nil || seen.Addr() != want {
			t.Errorf("the world sees %s (%v), want %s", seen, err, want)
		}
	}
}

// TestOutsideMoves: without an agent, pods that were added when there was no default route reach the world when a later pod
// is added, and follow the default route to another interface.
func TestOutsideMoves(t *testing.T) {
	testenv.NeedRoot(t)
	l := lab.New(t, lab.Config{Hosts: 1, Outside: true, Caracal: testenv.Bin(t, "caracal"), Plugin: map[string]any{"ipMasq": true}})
	h := l.Host(1)
	ip := func(n lab.Namespace, arg ...string) string {
		t.Helper()
		out, err := n.Exec(t.Context(), append([]string{"ip"}, arg...)...)
		must(t, err)
		return out
	}
	way := strings.Fields(ip(h.Namespace(), "-4", "route", "show", "default")) // default via ...
	ip(h.Namespace(), "route", "del", "default")
	ip(h.Namespace(), "-6", "route", "del", "default")
	a := h.TestPod(t, "a", lab.PodOptions{})
	if seen, err := seenBy(t, l, a, lab.Outside4); err == nil {
		t.Errorf("without a way out, the world sees %s", seen)
	}

	ip(h.Namespace(), append([]string{"route", "add"}, way...)...)
	b := h.TestPod(t, "b", lab.PodOptions{})
	for _, p := range []*lab.Pod{b, a} {
		if seen, err := seenBy(t, l, p, lab.Outside4); err != nil || seen.Addr() != h.Addr() {
			t.Errorf("with a way out, the world sees %s (%v), want %s", seen, err, h.Addr())
		}
	}

	ip(h.Namespace(), "link", "add", "second", "type", "veth", "peer", "name", "second", "netns", filepath.Base(l.Outside().Netns))
	for addr, n := range map[string]lab.Namespace{"192.0.2.129/30": h.Namespace(), "192.0.2.130/30": l.Outside()} {
		ip(n, "addr", "add", addr, "dev", "second")
		ip(n, "link", "set", "second", "up")
	}
	ip(h.Namespace(), "route", "replace", "default", "via", "192.0.2.130")
	h.TestPod(t, "c", lab.PodOptions{})
	eventually(t, "the pods to leave by the other interface", func() error {
		if seen, err := seenBy(t, l, a, lab.Outside4); err != nil || seen.Addr() != netip.MustParseAddr("192.0.2.129") {
			return fmt.Errorf("the world sees %s (%v)", seen, err)
		}
		return nil
	})

	ip(h.Namespace(), "link", "del", "second")
	h.TestPod(t, "d", lab.PodOptions{})
	eventually(t, "the interface that is gone to be forgotten", func() error {
		if names, err := loader.Uplinks(h.BPFDir()); err != nil || len(names) != 1 || names[0] != "eth0" {
			return fmt.Errorf("programs are pinned for %q (%v)", names, err)
		}
		return nil
	})
}
