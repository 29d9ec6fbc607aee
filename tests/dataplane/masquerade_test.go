package dataplane

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
)

func masqueraded() podOption {
	return func(p *commit.Pod) { p.Masquerade4, p.Masquerade6 = true, true }
}

// newOutside makes a host, a router, and a world that knows neither the host's pods nor the way to them. The world's link is
// narrower than the others.
//
//	[one] 198.51.100.1 --1500-- .2 [router] 203.0.113.1 --1400-- .2 [world]
func newOutside(t testing.TB, mode loader.Mode) (one, router *node, world *pod) {
	t.Helper()
	one, router = newHost(t, 1), newRouter(t)
	far := newRouter(t)
	join(one, uplink, end1, router.ns.FD(), router, "west", end2, 1500)
	join(router, "east", router2, far.ns.FD(), far, "east", far2, 1400)
	for n, via := range map[*node]end{one: end2, far: router2} {
		n.do(func() error {
			for _, a := range []netip.Addr{via.v4.Addr(), via.v6.Addr()} {
				if err := netlink.RouteAdd(&netlink.Route{Gw: a.AsSlice()}); err != nil {
					return err
				}
			}
			return nil
		})
	}
	one.attachNet(mode)
	if err := commit.SetNode(one.maps, []netip.Addr{outside, end1.v4.Addr(), end1.v6.Addr()}, one.blocks()); err != nil {
		t.Fatal(err)
	}
	one.masquerade(maps.Ports{First: 61000, Last: 65535})
	return one, router, &pod{name: "world", ns: far.ns, v4: far2.v4.Addr(), v6: far2.v6.Addr()}
}

func (n *node) masquerade(ports maps.Ports) {
	n.t.Helper()
	if err := errors.Join(
		n.maps.PutUplink(uint32(n.up), maps.Uplink{IPv4: end1.v4.Addr(), IPv6: end1.v6.Addr()}), n.maps.SetNATPorts(ports),
	); err != nil {
		n.t.Fatal(err)
	}
}

func hostAddr(v6 bool) netip.Addr {
	if v6 {
		return end1.v6.Addr()
	}
	return end1.v4.Addr()
}

// ask sends a datagram to port 7 of the world, which sees the host's address, and answers.
func ask(t testing.TB, p *pod, fd int, world *pod, wfd int, v6 bool, payload string) netip.AddrPort {
	t.Helper()
	send(t, fd, payload, world.addr(v6), 7)
	got, ttl, from := receive(t, wfd)
	if got != payload || from.Addr() != hostAddr(v6) || from.Port() < 61000 || ttl != 62 && ttl != -1 {
		t.Fatalf("%s received %d bytes with TTL %d from %s", world.name, len(got), ttl, from)
	}
	send(t, wfd, "re: "+payload, from.Addr(), int(from.Port()))
	got, ttl, back := receive(t, fd)
	if got != "re: "+payload || back != at(world.addr(v6), 7) || ttl != 62 && ttl != -1 {
		t.Fatalf("%s received %d bytes with TTL %d from %s", p.name, len(got), ttl, back)
	}
	return from
}

// Two pods that use one port are two to the world; each flow keeps its port, and each answer finds its pod.
func TestMasqueradeUDP(t *testing.T) {
	modes(t, func(t *testing.T, mode loader.Mode, v6 bool) {
		one, _, world := newOutside(t, mode)
		a, b := one.addPod("a", 1, mode, masqueraded()), one.addPod("b", 2, mode, masqueraded())
		afd, bfd := a.socket(t, unix.SOCK_DGRAM, 5000, v6), b.socket(t, unix.SOCK_DGRAM, 5000, v6)
		wfd := world.socket(t, unix.SOCK_DGRAM, 7, v6)
		for _, fd := range []int{afd, bfd, wfd} {
			wantTTL(t, fd, v6)
		}
		before := one.counts()
		a0, b0 := ask(t, a, afd, world, wfd, v6, "first of a"), ask(t, b, bfd, world, wfd, v6, "first of b")
		if a0 == b0 {
			t.Fatalf("both pods are %s to the world", a0)
		}
		for i := range 50 {
			if i == 25 {
				if _, err := one.maps.RaiseEpoch(); err != nil {
					t.Fatal(err)
				}
			}
			if got := ask(t, a, afd, world, wfd, v6, fmt.Sprint("a ", i)); got != a0 {
				t.Fatalf("packet %d of a leaves from %s, the first left from %s", i, got, a0)
			}
			if got := ask(t, b, bfd, world, wfd, v6, fmt.Sprint("b ", i)); got != b0 {
				t.Fatalf("packet %d of b leaves from %s, the first left from %s", i, got, b0)
			}
		}
		one.onlyThese(before, map[string]uint64{
			"from_pod stack_routed": 102, "to_net forward_masqueraded": 102, "from_net stack_answer": 102, "to_pod forward_from_stack": 102,
		})
		if f := one.wantFlow("udp", at(a.addr(v6), 5000), at(world.addr(v6), 7)); f.Masquerade != a0 || !f.Confirmed {
			t.Errorf("flow %+v, want it masqueraded as %s", f, a0)
		}
		// What it carries in fragments goes the same way.
		big := make([]byte, 4000)
		for i := range big {
			big[i] = byte(i)
		}
		if v6 { // a router fragments nothing: the first is lost, and the pod learns
			before := one.counts()
			send(t, afd, string(big), world.addr(v6), 7)
			until(t, "the router's error to arrive", func() bool { return one.since(before)["to_pod forward_from_stack"] > 0 })
		}
		for range 3 {
			if got := ask(t, a, afd, world, wfd, v6, string(big)); got != a0 {
				t.Errorf("fragments leave from %s, want %s", got, a0)
			}
		}
	})
}

// A megabyte each way, segmented by the sender's kernel.
func TestMasqueradeTCP(t *testing.T) {
	modes(t, func(t *testing.T, mode loader.Mode, v6 bool) {
		one, _, world := newOutside(t, mode)
		a := one.addPod("a", 1, mode, masqueraded())
		client, server := connect(t, a, world, v6)
		transfer(t, client, server, 1<<20)
		unix.Close(client)
		if n, err := readFrom(server, make([]byte, 1)); n != 0 || err != nil {
			t.Errorf("the end of the connection: %d, %v", n, err)
		}
	})
}

// Errors cross the translation both ways: about what a pod sent, and about what a pod was sent.
func TestMasqueradeErrors(t *testing.T) {
	modes(t, func(t *testing.T, mode loader.Mode, v6 bool) {
		one, _, world := newOutside(t, mode)
		a := one.addPod("a", 1, mode, masqueraded())
		fd := a.socket(t, unix.SOCK_DGRAM, 0, v6)
		if err := connectTo(fd, sockaddr(world.addr(v6), 9)); err != nil {
			t.Fatal(err)
		}
		if _, err := writeTo(fd, []byte("anyone?")); err != nil {
			t.Fatal(err)
		}
		if _, err := readFrom(fd, make([]byte, 10)); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("read: %v, want connection refused; counts %v", err, one.counts())
		}
		want := []netip.Addr{outside, end2.v4.Addr(), {}}
		if v6 {
			want = []netip.Addr{end1.v6.Addr(), end2.v6.Addr(), {}}
		}
		for i, w := range want {
			if got := offender(t, a, world.addr(v6), i+1); got != w {
				t.Errorf("hop %d is %s, want %s; counts %v", i+1, got, w, one.counts())
			}
		}

		// The pod closes its socket; the world's next datagram is refused.
		wfd := world.socket(t, unix.SOCK_DGRAM, 7, v6)
		afd := a.socket(t, unix.SOCK_DGRAM, 5000, v6)
		from := ask(t, a, afd, world, wfd, v6, "about to close")
		unix.Close(afd)
		if err := connectTo(wfd, sockaddr(from.Addr(), int(from.Port()))); err != nil {
			t.Fatal(err)
		}
		if _, err := writeTo(wfd, []byte("still there?")); err != nil {
			t.Fatal(err)
		}
		if _, err := readFrom(wfd, make([]byte, 10)); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("the world reads %v, want connection refused; counts %v", err, one.counts())
		}
	})
}

// A pod learns from a router behind the host how much the path to the world carries.
func TestMasqueradeMTU(t *testing.T) {
	modes(t, func(t *testing.T, mode loader.Mode, v6 bool) {
		one, _, world := newOutside(t, mode)
		a := one.addPod("a", 1, mode, masqueraded())
		fd := a.socket(t, unix.SOCK_DGRAM, 0, v6)
		level, discover, option, do := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_MTU, unix.IP_PMTUDISC_DO
		if v6 {
			level, discover, option, do = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_MTU, unix.IPV6_PMTUDISC_DO
		}
		if err := errors.Join(unix.SetsockoptInt(fd, level, discover, do), connectTo(fd, sockaddr(world.addr(v6), 7))); err != nil {
			t.Fatal(err)
		}
		if _, err := writeTo(fd, make([]byte, 1450)); err != nil {
			t.Fatal(err)
		}
		until(t, "the pod to learn an MTU of 1400", func() bool {
			mtu, err := unix.GetsockoptInt(fd, level, option)
			return err == nil && mtu == 1400
		})
	})
}

// ICMP echo, by sockets that let the kernel choose the identifier.
func TestMasqueradePing(t *testing.T) {
	modes(t, func(t *testing.T, mode loader.Mode, v6 bool) {
		one, _, world := newOutside(t, mode)
		for i, p := range []*pod{one.addPod("a", 1, mode, masqueraded()), one.addPod("b", 2, mode, masqueraded())} {
			for range 3 {
				if err := p.ping(world.addr(v6), 77); err != nil {
					t.Fatalf("pod %d: %v; counts %v", i, err, one.counts())
				}
			}
		}
	})
}

// ping sends an echo request with an identifier and waits for its answer.
func (p *pod) ping(to netip.Addr, id byte) error {
	return p.ns.Do(func() error {
		family, protocol, request, reply := unix.AF_INET, unix.IPPROTO_ICMP, byte(8), byte(0)
		if to.Is6() {
			family, protocol, request, reply = unix.AF_INET6, unix.IPPROTO_ICMPV6, 128, 129
		}
		fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		tv := unix.NsecToTimeval(int64(patience))
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
			return err
		}
		m := []byte{request, 0, 0, 0, 0, id, 0, 1, 'p', 'i', 'n', 'g'}
		if to.Is4() { // the kernel sums ICMPv6 itself
			var sum uint32
			for i := 0; i < len(m); i += 2 {
				sum += uint32(m[i])<<8 | uint32(m[i+1])
			}
			sum = sum&0xffff + sum>>16
			m[2], m[3] = byte(^sum>>8), byte(^sum)
		}
		if err := unix.Sendto(fd, m, 0, sockaddr(to, 0)); err != nil {
			return err
		}
		deadline := time.Now().Add(patience)
		for time.Now().Before(deadline) {
			b := make([]byte, 200)
			n, err := readFrom(fd, b)
			if err != nil {
				return fmt.Errorf("no answer: %w", err)
			}
			b = b[:n]
			if to.Is4() {
				b = b[20:]
			}
			if b[0] == reply && b[5] == id && string(b[8:12]) == "ping" {
				return nil
			}
		}
		return errors.New("no answer in time")
	})
}

// A range of four ports carries four flows to one destination, and another four to another; the fifth is refused and counted.
// A pod that goes gives its ports back, and what still comes for it reaches nobody.
func TestMasqueradePorts(t *testing.T) {
	modes(t, func(t *testing.T, mode loader.Mode, v6 bool) {
		one, _, world := newOutside(t, mode)
		one.masquerade(maps.Ports{First: 61000, Last: 61003})
		a := one.addPod("a", 1, mode, masqueraded())
		w7, w8 := world.socket(t, unix.SOCK_DGRAM, 7, v6), world.socket(t, unix.SOCK_DGRAM, 8, v6)
		seen := make(map[netip.AddrPort]bool)
		var fds []int
		for i := range 4 {
			fd := a.socket(t, unix.SOCK_DGRAM, 5000+i, v6)
			fds = append(fds, fd)
			seen[ask(t, a, fd, world, w7, v6, "mine")] = true
		}
		if len(seen) != 4 {
			t.Fatalf("four flows leave from %v", seen)
		}
		// Asked again: answered questions that go on are no idle ones.
		for _, fd := range fds {
			ask(t, a, fd, world, w7, v6, "mine still")
		}
		before := one.counts()
		fifth := a.socket(t, unix.SOCK_DGRAM, 6000, v6)
		send(t, fifth, "one too many", world.addr(v6), 7)
		until(t, "the fifth flow to be refused", func() bool { return one.since(before)["to_net drop_nat_ports"] == 1 })
		send(t, fifth, "elsewhere", world.addr(v6), 8)
		if got, _, _ := receive(t, w8); got != "elsewhere" {
			t.Errorf("received %q", got)
		}
		for _, fd := range fds {
			ask(t, a, fd, world, w7, v6, "none was cut")
		}

		late := ask(t, a, fds[0], world, w7, v6, "the last")
		if err := commit.RemovePod(one.maps, a.commit); err != nil {
			t.Fatal(err)
		}
		one.unwire(a)
		b := one.addPod("b", 1, mode, masqueraded()) // the same address
		bfd := b.socket(t, unix.SOCK_DGRAM, 5000, v6)
		send(t, w7, "for a", late.Addr(), int(late.Port()))
		silent(t, bfd)
		seen = make(map[netip.AddrPort]bool)
		for i := range 4 {
			seen[ask(t, b, b.socket(t, unix.SOCK_DGRAM, 7000+i, v6), world, w7, v6, "mine now")] = true
		}
		if len(seen) != 4 {
			t.Errorf("four flows leave from %v", seen)
		}
	})
}

// Half-open flows to one destination can't keep a new one out, and a port at which the host itself talks to the destination is
// not taken.
func TestMasqueradeHalfOpen(t *testing.T) {
	modes(t, func(t *testing.T, mode loader.Mode, v6 bool) {
		one, _, world := newOutside(t, mode)
		one.masquerade(maps.Ports{First: 61000, Last: 61003})
		a := one.addPod("a", 1, mode, masqueraded())
		wfd := world.socket(t, unix.SOCK_DGRAM, 7, v6)
		hostSelf := &pod{name: "host", ns: one.ns, v4: end1.v4.Addr(), v6: end1.v6.Addr()}
		hfd := hostSelf.socket(t, unix.SOCK_DGRAM, 61002, v6)
		for i := range 8 {
			send(t, a.socket(t, unix.SOCK_DGRAM, 5000+i, v6), "unanswered", world.addr(v6), 7)
			if _, _, from := receive(t, wfd); from.Port() == 61002 {
				t.Fatal("the host's own port was taken")
			}
		}
		fd := a.socket(t, unix.SOCK_DGRAM, 6000, v6)
		if from := ask(t, a, fd, world, wfd, v6, "answered"); from.Port() == 61002 {
			t.Error("the host's own port was taken")
		}
		send(t, hfd, "from the host", world.addr(v6), 7)
		if _, _, from := receive(t, wfd); from != at(hostAddr(v6), 61002) {
			t.Errorf("the host's own datagram leaves from %s", from)
		}
		send(t, wfd, "to the host", hostAddr(v6), 61002)
		if got, _, _ := receive(t, hfd); got != "to the host" {
			t.Errorf("the host received %q", got)
		}
	})
}

// What is not masqueraded: pods that don't want it, what stays in the pools, what others open to a pod, and protocols that
// have no ports to tell flows apart, which are dropped by name.
func TestNotMasqueraded(t *testing.T) {
	modes(t, func(t *testing.T, mode loader.Mode, v6 bool) {
		one, router, world := newOutside(t, mode)
		router.do(func() error { // the world can answer pods for once
			for _, b := range one.blocks() {
				via := end1.v4.Addr()
				if b.Addr().Is6() {
					via = end1.v6.Addr()
				}
				if err := netlink.RouteAdd(&netlink.Route{Dst: &net.IPNet{IP: b.Addr().AsSlice(), Mask: net.CIDRMask(b.Bits(), b.Addr().BitLen())}, Gw: via.AsSlice()}); err != nil {
					return err
				}
			}
			return nil
		})
		plain, a := one.addPod("plain", 1, mode), one.addPod("a", 2, mode, masqueraded())
		wfd := world.socket(t, unix.SOCK_DGRAM, 7, v6)
		pfd, afd := plain.socket(t, unix.SOCK_DGRAM, 5000, v6), a.socket(t, unix.SOCK_DGRAM, 5000, v6)
		exchange(t, plain, world, pfd, wfd, v6, "plain")

		bfd := a.socket(t, unix.SOCK_DGRAM, 7, v6)
		exchange(t, world, a, world.socket(t, unix.SOCK_DGRAM, 5000, v6), bfd, v6, "opened by the world")

		// Inside a pool, as a route says.
		p := netip.PrefixFrom(world.addr(v6), world.addr(v6).BitLen())
		if err := commit.PutRemote(one.maps, maps.Route{Prefix: p, Kind: maps.RouteRemote, NextHop: end2.v4.Addr(), InPool: true}); err != nil {
			t.Fatal(err)
		}
		exchange(t, a, world, afd, wfd, v6, "inside")
		if err := commit.RemoveRemote(one.maps, p); err != nil {
			t.Fatal(err)
		}
		ask(t, a, a.socket(t, unix.SOCK_DGRAM, 5001, v6), world, wfd, v6, "outside")

		before := one.counts()
		if err := a.ns.Do(func() error {
			family := unix.AF_INET
			if v6 {
				family = unix.AF_INET6
			}
			fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 47 /* GRE */)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			return unix.Sendto(fd, []byte("no ports"), 0, sockaddr(world.addr(v6), 0))
		}); err != nil {
			t.Fatal(err)
		}
		until(t, "the packet without ports to be dropped", func() bool { return one.since(before)["to_net drop_nat_protocol"] == 1 })

		// Without an address on the uplink.
		if err := one.maps.PutUplink(uint32(one.up), maps.Uplink{}); err != nil {
			t.Fatal(err)
		}
		send(t, a.socket(t, unix.SOCK_DGRAM, 5002, v6), "no address", world.addr(v6), 7)
		until(t, "the packet to be dropped", func() bool { return one.since(before)["to_net drop_nat_address"] == 1 })
	})
}

// The host's stack translates beside: a Service whose backend is outside, and a port of the host that leads to a pod. It sees
// whole flows, and its connection tracking finds nothing invalid.
//
//	a -> 192.0.2.1:8080 => DNAT => world:7, seen from 198.51.100.1
//	world -> 198.51.100.1:8081 => DNAT => a:7
func TestMasqueradeTranslatedByStack(t *testing.T) {
	modes(t, func(t *testing.T, mode loader.Mode, v6 bool) {
		if v6 {
			t.Skip("the node has no IPv6 address for the Service")
		}
		one, _, world := newOutside(t, mode)
		a := one.addPod("a", 1, mode, masqueraded())
		one.nft(`table ip cdp { chain pre { type nat hook prerouting priority dstnat; policy accept;
			ip daddr 192.0.2.1 udp dport 8080 dnat to 203.0.113.2:7
			ip daddr 198.51.100.1 udp dport 8081 dnat to 10.65.1.1:7
			ip daddr 198.51.100.1 tcp dport 8081 dnat to 10.65.1.1:7
		}
		chain forwarding { type filter hook forward priority filter; policy accept; ct state invalid counter drop; }
		}`)
		one.do(func() error {
			for _, name := range []string{"all", uplink, a.hostIf} {
				if err := os.WriteFile("/proc/sys/net/ipv4/conf/"+name+"/rp_filter", []byte("1"), 0); err != nil {
					return err
				}
			}
			return nil
		})
		afd, wfd := a.socket(t, unix.SOCK_DGRAM, 5000, false), world.socket(t, unix.SOCK_DGRAM, 7, false)
		var from netip.AddrPort
		for i := range 4 {
			send(t, afd, "to the service", outside, 8080)
			got, _, src := receive(t, wfd)
			if got != "to the service" || src.Addr() != end1.v4.Addr() || i > 0 && src != from {
				t.Fatalf("the world received %q from %s, before from %s", got, src, from)
			}
			from = src
			send(t, wfd, "from the service", from.Addr(), int(from.Port()))
			if got, _, src := receive(t, afd); got != "from the service" || src != at(outside, 8080) {
				t.Fatalf("a received %q from %s", got, src)
			}
		}
		// The same from outside, while it has flows of its own to there.
		ask(t, a, a.socket(t, unix.SOCK_DGRAM, 5001, false), world, wfd, false, "straight")
		sfd := a.socket(t, unix.SOCK_DGRAM, 7, false)
		cfd := world.socket(t, unix.SOCK_DGRAM, 6000, false)
		for range 3 {
			send(t, cfd, "to the port", end1.v4.Addr(), 8081)
			got, _, src := receive(t, sfd)
			if got != "to the port" || src != at(world.v4, 6000) {
				t.Fatalf("a received %q from %s", got, src)
			}
			send(t, sfd, "from the port", src.Addr(), int(src.Port()))
			if got, _, src := receive(t, cfd); got != "from the port" || src != at(end1.v4.Addr(), 8081) {
				t.Fatalf("the world received %q from %s", got, src)
			}
		}
		listener := a.socket(t, unix.SOCK_STREAM, 7, false)
		if err := unix.Listen(listener, 1); err != nil {
			t.Fatal(err)
		}
		client := world.socket(t, unix.SOCK_STREAM, 0, false)
		if err := connectTo(client, sockaddr(end1.v4.Addr(), 8081)); err != nil {
			t.Fatal(err)
		}
		server, err := acceptFrom(listener)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(server)
		transfer(t, client, server, 1<<18)
		if f := one.wantFlow("udp", at(a.v4, 7), at(world.v4, 6000)); f.Masquerade.IsValid() {
			t.Errorf("what the world opened is masqueraded: %+v", f)
		}
	})
}
