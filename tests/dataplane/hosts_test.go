package dataplane

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/bpf"
	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/internal/tc"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
)

// uplink is every host's interface to the others: a name that pins must cope with.
const uplink = "up.*[0~1"

// end is one end of a link between hosts.
type end struct {
	v4, v6 netip.Prefix
}

var (
	end1 = end{netip.MustParsePrefix("198.51.100.1/24"), netip.MustParsePrefix("2001:db8:ff::1/64")}
	end2 = end{netip.MustParsePrefix("198.51.100.2/24"), netip.MustParsePrefix("2001:db8:ff::2/64")}
	// With a router between the hosts, its end towards the first is end2.
	router2 = end{netip.MustParsePrefix("203.0.113.1/24"), netip.MustParsePrefix("2001:db8:fe::1/64")}
	far2    = end{netip.MustParsePrefix("203.0.113.2/24"), netip.MustParsePrefix("2001:db8:fe::2/64")}
)

// newHosts makes two hosts whose programs know each other's blocks.
//
//	 pods 10.65.1.0/24        pods 10.65.2.0/24
//	cali-*                           cali-*
//	[one] up ------------------------ up [two]
//	 198.51.100.1                198.51.100.2
func newHosts(t testing.TB, mode loader.Mode, mtu int) (one, two *node) {
	t.Helper()
	one, two = newHost(t, 1), newHost(t, 2)
	join(one, uplink, end1, two.ns.FD(), two, uplink, end2, mtu)
	one.attachNet(mode)
	two.attachNet(mode)
	one.reach(two, end2, 0)
	two.reach(one, end1, 0)
	return one, two
}

// newHost makes a host with blocks of its own.
func newHost(t testing.TB, number byte) *node {
	t.Helper()
	n := newNode(t, loader.Config{})
	n.net = number
	if err := commit.SetNode(n.maps, []netip.Addr{outside}, n.blocks()); err != nil {
		t.Fatal(err)
	}
	return n
}

func (n *node) blocks() []netip.Prefix {
	v4, v6 := n.podAddrs(0)
	return []netip.Prefix{netip.PrefixFrom(v4, 24), netip.PrefixFrom(v6, 64)}
}

// join makes a link between two namespaces, up and with addresses that answer.
func join(x *node, xname string, xend end, yfd int, y *node, yname string, yend end, mtu int) {
	x.t.Helper()
	x.do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = xname, mtu
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: yname, PeerMTU: uint32(mtu), PeerNamespace: netlink.NsFd(yfd)})
	})
	for _, s := range []struct {
		n    *node
		name string
		end  end
	}{{x, xname, xend}, {y, yname, yend}} {
		s.n.do(func() error {
			l, err := netlink.LinkByName(s.name)
			if err != nil {
				return err
			}
			s.n.up = l.Attrs().Index
			for _, p := range []netip.Prefix{s.end.v4, s.end.v6} {
				a := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
				if p.Addr().Is6() {
					a.Flags = unix.IFA_F_NODAD
				}
				if err := netlink.AddrAdd(l, a); err != nil {
					return err
				}
			}
			return netlink.LinkSetUp(l)
		})
	}
	for _, s := range []struct {
		n   *node
		end end
	}{{x, xend}, {y, yend}} {
		s.n.do(func() error { return local(s.end.v4.Addr(), s.end.v6.Addr()) })
	}
}

// attachNet puts the programs onto the uplink.
func (n *node) attachNet(mode loader.Mode) {
	n.t.Helper()
	n.do(func() error {
		if mode == loader.TCX {
			return loader.AttachNet(n.dir, uplink, n.up)
		}
		if err := tc.Here().AddClsact(n.up); err != nil {
			return err
		}
		for program, d := range map[string]tc.Direction{bpf.DataplaneProgFromNet: tc.Ingress, bpf.DataplaneProgToNet: tc.Egress} {
			p, err := ebpf.LoadPinnedProgram(bpf.ProgramPath(n.dir, program), nil)
			if err != nil {
				return err
			}
			defer p.Close()
			if err := tc.Here().Attach(n.up, d, program, p.FD()); err != nil {
				return err
			}
		}
		return nil
	})
}

// reach gives a host the routes to another's blocks, in its maps and in its kernel.
func (n *node) reach(other *node, by end, mtu uint16) {
	n.t.Helper()
	var routes []maps.Route
	n.do(func() error {
		for _, b := range other.blocks() {
			hop := by.v4.Addr()
			if b.Addr().Is6() {
				hop = by.v6.Addr()
			}
			routes = append(routes, maps.Route{Prefix: b, Kind: maps.RouteRemote, IfIndex: uint32(n.up), NextHop: hop, MTU: mtu})
			dst := &net.IPNet{IP: b.Addr().AsSlice(), Mask: net.CIDRMask(b.Bits(), b.Addr().BitLen())}
			if err := netlink.RouteReplace(&netlink.Route{Dst: dst, Gw: hop.AsSlice(), LinkIndex: n.up}); err != nil {
				return fmt.Errorf("add route: %w", err)
			}
		}
		return nil
	})
	if err := commit.SetRemote(n.maps, routes); err != nil {
		n.t.Fatal(err)
	}
}

// nft gives the host's stack rules.
func (n *node) nft(rules string) {
	n.t.Helper()
	n.do(func() error {
		cmd := exec.Command("nft", "-f", "-")
		cmd.Stdin = strings.NewReader(rules)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("nft: %w: %s", err, out)
		}
		return nil
	})
}

// payload is what the counters gained over before, without what hosts and pods say to each other of their own accord.
func (n *node) payload(before map[string]uint64) map[string]uint64 {
	n.t.Helper()
	got := n.since(before)
	for _, k := range []string{"from_net stack_other", "to_net stack_other", "from_pod control", "from_pod answer_arp", "from_pod answer_nd", "to_pod stack_arp", "from_pod stack_arp"} {
		delete(got, k)
	}
	return got
}

// onlyThese fails when another counter gained anything than the named ones.
func (n *node) onlyThese(before map[string]uint64, want map[string]uint64) {
	n.t.Helper()
	got := n.payload(before)
	for k, v := range want {
		if got[k] != v {
			n.t.Errorf("%s: %d %s, want %d", n.name, got[k], k, v)
		}
		delete(got, k)
	}
	if len(got) > 0 {
		n.t.Errorf("%s: unexpected counts %v", n.name, got)
	}
}

// Two hosts take two hops off, on the first packet and on the hundredth; no packet sees the host's stack.
func TestHostsUDP(t *testing.T) {
	modes(t, func(t *testing.T, mode loader.Mode, v6 bool) {
		one, two := newHosts(t, mode, 1500)
		a, b := one.addPod("a", 1, mode), two.addPod("b", 1, mode)
		afd, bfd := a.socket(t, unix.SOCK_DGRAM, 5000, v6), b.socket(t, unix.SOCK_DGRAM, 7, v6)
		wantTTL(t, afd, v6)
		wantTTL(t, bfd, v6)
		before := [2]map[string]uint64{one.counts(), two.counts()}
		for i := range 100 {
			there, back := exchange(t, a, b, afd, bfd, v6, fmt.Sprint("packet ", i))
			if there != 62 || back != 62 {
				t.Fatalf("packet %d: TTL %d there, %d back, want 62", i, there, back)
			}
		}
		for i, n := range []*node{one, two} {
			n.onlyThese(before[i], map[string]uint64{"from_pod forward_net": 100, "to_net forward_judged": 100, "from_net forward_pod": 100})
			f := n.wantFlow("udp", at(a.addr(v6), 5000), at(b.addr(v6), 7))
			if f.Entered != []string{"pod", "net"}[i] || !f.Confirmed || f.Opener.Addr() != a.addr(v6) || f.Sent.Packets != 100 || f.Received.Packets != 100 {
				t.Errorf("flow at host %d: %+v", i+1, f)
			}
		}

		// Established: the legs alone lead the packets, until the epoch is raised.
		for _, n := range []*node{one, two} {
			for _, r := range append(one.blocks(), two.blocks()...) {
				if err := n.maps.RemoveRoute(r); err != nil {
					t.Fatal(err)
				}
			}
			for _, p := range []*pod{a, b} {
				if err := n.maps.RemoveRoute(netip.PrefixFrom(p.addr(v6), p.addr(v6).BitLen())); err != nil {
					t.Fatal(err)
				}
			}
		}
		if there, back := exchange(t, a, b, afd, bfd, v6, "by the legs"); there != 62 || back != 62 {
			t.Errorf("TTL %d there, %d back, want 62", there, back)
		}
		for _, n := range []*node{one, two} {
			if _, err := n.maps.RaiseEpoch(); err != nil {
				t.Fatal(err)
			}
		}
		middle := one.counts()
		send(t, afd, "by the stack", b.addr(v6), 7)
		until(t, "the packet to be left to the stack", func() bool { return one.since(middle)["from_pod stack_routed"] == 1 })
	})
}

// transfer sends many bytes each way over one connection and compares them.
func transfer(t testing.TB, client, server, size int) {
	t.Helper()
	for _, way := range [][2]int{{client, server}, {server, client}} {
		payload := make([]byte, size)
		for i := range payload {
			payload[i] = byte(i*7 + i>>11)
		}
		go writeAll(way[0], payload)
		got := make([]byte, 0, size)
		buf := make([]byte, 1<<16)
		for len(got) < size {
			k, err := readFrom(way[1], buf)
			if err != nil || k == 0 {
				t.Fatalf("read after %d bytes: %d, %v", len(got), k, err)
			}
			got = append(got, buf[:k]...)
		}
		if !bytes.Equal(got, payload) {
			t.Fatal("other bytes arrived than were sent")
		}
	}
}

// offload switches one of an interface's offloads by its ethtool command (linux/ethtool.h).
func offload(name string, command uint32, on uint32) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	value := struct{ command, data uint32 }{command, on}
	req, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	raw := struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		pad  [16]byte
	}{data: unsafe.Pointer(&value)}
	copy(raw.name[:], req.Name())
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&raw))); errno != 0 {
		return fmt.Errorf("ethtool command %#x: %w", command, errno)
	}
	return nil
}

// A large transfer each way: with packets as hosts of one kernel hand them on, large and without checksums, and as they
// come from a wire: small, with checksums, merged by the receiver (GRO).
func TestHostsTCP(t *testing.T) {
	for _, wire := range []bool{false, true} {
		t.Run(fmt.Sprintf("wire=%t", wire), func(t *testing.T) {
			modes(t, func(t *testing.T, mode loader.Mode, v6 bool) {
				one, two := newHosts(t, mode, 1500)
				for _, n := range []*node{one, two} {
					n.do(func() error {
						if !wire {
							return nil
						}
						return errors.Join(offload(uplink, 0x1f /* TSO */, 0), offload(uplink, 0x17 /* TX checksums */, 0), offload(uplink, 0x2c /* GRO */, 1))
					})
				}
				a, b := one.addPod("a", 1, mode), two.addPod("b", 1, mode)
				client, server := connect(t, a, b, v6)
				before := [2]map[string]uint64{one.counts(), two.counts()}
				transfer(t, client, server, 16<<20)
				for i, n := range []*node{one, two} {
					got := n.payload(before[i])
					for k := range got {
						switch k {
						case "from_pod forward_net", "to_net forward_judged", "from_net forward_pod":
						default:
							t.Errorf("%s: %d %s", n.name, got[k], k)
						}
					}
					if got["from_net forward_pod"] < 10000 {
						t.Errorf("%s: counts %v, want wire segments", n.name, got)
					}
				}
			})
		})
	}
}

// Fragments, a port that nobody listens on, and the raising of the epoch, between hosts.
func TestHostsUncommon(t *testing.T) {
	modes(t, func(t *testing.T, mode loader.Mode, v6 bool) {
		one, two := newHosts(t, mode, 1500)
		a, b := one.addPod("a", 1, mode), two.addPod("b", 1, mode)
		afd, bfd := a.socket(t, unix.SOCK_DGRAM, 5000, v6), b.socket(t, unix.SOCK_DGRAM, 7, v6)
		big := make([]byte, 6000)
		for i := range big {
			big[i] = byte(i)
		}
		for range 3 {
			exchange(t, a, b, afd, bfd, v6, string(big))
		}
		wantTTL(t, afd, v6)
		wantTTL(t, bfd, v6)
		before := [2]map[string]uint64{one.counts(), two.counts()}
		for i := range 20 {
			for _, n := range []*node{one, two}[:1+i%2] {
				if _, err := n.maps.RaiseEpoch(); err != nil {
					t.Fatal(err)
				}
			}
			if there, back := exchange(t, a, b, afd, bfd, v6, "x"); there != 62 || back != 62 {
				t.Fatalf("TTL %d there, %d back, want 62", there, back)
			}
		}
		for i, n := range []*node{one, two} {
			n.onlyThese(before[i], map[string]uint64{"from_pod forward_net": 20, "to_net forward_judged": 20, "from_net forward_pod": 20})
		}

		cfd := a.socket(t, unix.SOCK_DGRAM, 0, v6)
		if err := connectTo(cfd, sockaddr(b.addr(v6), 9)); err != nil {
			t.Fatal(err)
		}
		if _, err := writeTo(cfd, []byte("anyone?")); err != nil {
			t.Fatal(err)
		}
		if _, err := readFrom(cfd, make([]byte, 10)); !errors.Is(err, unix.ECONNREFUSED) {
			t.Fatalf("read: %v, want connection refused; counts %v and %v", err, one.since(before[0]), two.since(before[1]))
		}
	})
}

// Next hops are link-local, and IPv6 for IPv4 too (RFC 8950). IPv4 for IPv6 can't be: such a packet goes by the stack.
func TestHostsNextHop(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		t.Run(fmt.Sprintf("v6=%t", v6), func(t *testing.T) {
			one, two := newHosts(t, loader.TCX, 1500)
			a, b := one.addPod("a", 1, loader.TCX), two.addPod("b", 1, loader.TCX)
			hosts, hops := []*node{one, two}, []netip.Addr{netip.MustParseAddr("fe80::1:1"), netip.MustParseAddr("fe80::1:2")}
			for i, n := range hosts {
				n.do(func() error {
					l, err := netlink.LinkByIndex(n.up)
					if err != nil {
						return err
					}
					return netlink.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: hops[i].AsSlice(), Mask: net.CIDRMask(64, 128)}, Flags: unix.IFA_F_NODAD})
				})
			}
			hop := func(n, other *node, hop netip.Addr) {
				t.Helper()
				var routes []maps.Route
				for _, p := range other.blocks() {
					routes = append(routes, maps.Route{Prefix: p, Kind: maps.RouteRemote, IfIndex: uint32(n.up), NextHop: hop, MTU: 9000})
				}
				if err := commit.SetRemote(n.maps, routes); err != nil {
					t.Fatal(err)
				}
			}
			hop(one, two, hops[1])
			hop(two, one, hops[0])
			afd, bfd := a.socket(t, unix.SOCK_DGRAM, 5000, v6), b.socket(t, unix.SOCK_DGRAM, 7, v6)
			before := one.counts()
			for range 10 {
				exchange(t, a, b, afd, bfd, v6, "hello")
			}
			one.onlyThese(before, map[string]uint64{"from_pod forward_net": 10, "to_net forward_judged": 10, "from_net forward_pod": 10})
			send(t, afd, string(make([]byte, 1473)), b.addr(v6), 7) // more than the interface's MTU, whatever the route says
			if got, _, _ := receive(t, bfd); len(got) != 1473 {
				t.Errorf("received %d bytes", len(got))
			}

			hop(one, two, end2.v4.Addr())
			hop(two, one, end1.v4.Addr())
			before = one.counts()
			exchange(t, a, b, afd, bfd, v6, "hello again")
			if v6 {
				if got := one.payload(before); got["from_pod stack_routed"] != 1 || got["from_net stack_routed"] != 1 {
					t.Errorf("counts %v", got)
				}
			} else {
				one.onlyThese(before, map[string]uint64{"from_pod forward_net": 1, "to_net forward_judged": 1, "from_net forward_pod": 1})
			}
		})
	}
}

// A smaller MTU between the hosts: the interface's, the route's, or one that only a router knows.
func TestHostsMTU(t *testing.T) {
	modes(t, func(t *testing.T, mode loader.Mode, v6 bool) {
		one, two := newHosts(t, mode, 1400)
		a, b := one.addPod("a", 1, mode), two.addPod("b", 1, mode)
		client, server := connect(t, a, b, v6)
		before := one.counts()
		transfer(t, client, server, 1<<20)
		if got := one.since(before); got["from_pod stack_mtu"] == 0 || got["from_pod forward_net"] == 0 {
			t.Errorf("counts %v, want some stack_mtu and forward_net", got)
		}
		level, option := unix.IPPROTO_IP, unix.IP_MTU
		if v6 {
			level, option = unix.IPPROTO_IPV6, unix.IPV6_MTU
		}
		if mtu, err := unix.GetsockoptInt(client, level, option); err != nil || mtu != 1400 {
			t.Errorf("the pod has learned an MTU of %d (%v), want 1400", mtu, err)
		}
	})
}

// routed puts a router between two hosts, whose far link has a smaller MTU.
//
//	[one] 198.51.100.1 --1500-- .2 [router] 203.0.113.1 --1400-- .2 [two]
func routed(t testing.TB, mode loader.Mode) (one, two, router *node) {
	t.Helper()
	one, two, router = newHost(t, 1), newHost(t, 2), newHost(t, 3)
	join(one, uplink, end1, router.ns.FD(), router, "west", end2, 1500)
	join(router, "east", router2, two.ns.FD(), two, uplink, far2, 1400)
	east := router.up
	router.do(func() error {
		l, err := netlink.LinkByName("east")
		if err != nil {
			return err
		}
		east = l.Attrs().Index
		return nil
	})
	one.attachNet(mode)
	two.attachNet(mode)
	one.reach(two, end2, 0)
	two.reach(one, router2, 0)
	router.up = east
	router.reach(two, far2, 0)
	router.do(func() error {
		l, err := netlink.LinkByName("west")
		if err != nil {
			return err
		}
		router.up = l.Attrs().Index
		return nil
	})
	router.reach(one, end1, 0)
	return one, two, router
}

// An ICMP error of a router in between reaches the pod whose packet it quotes.
func TestHostsRouterMTU(t *testing.T) {
	modes(t, func(t *testing.T, mode loader.Mode, v6 bool) {
		one, two, _ := routed(t, mode)
		a, b := one.addPod("a", 1, mode), two.addPod("b", 1, mode)
		client, server := connect(t, a, b, v6)
		before := one.counts()
		transfer(t, client, server, 1<<20)
		if got := one.since(before); got["from_pod stack_mtu"] != 0 || got["from_net drop_icmp_error"] != 0 {
			t.Errorf("counts %v", got)
		}
		level, option := unix.IPPROTO_IP, unix.IP_MTU
		if v6 {
			level, option = unix.IPPROTO_IPV6, unix.IPV6_MTU
		}
		if mtu, err := unix.GetsockoptInt(client, level, option); err != nil || mtu != 1400 {
			t.Errorf("the pod has learned an MTU of %d (%v), want 1400", mtu, err)
		}
	})
}

// offender sends a datagram with a TTL and returns who says that it ended there; no address when it arrived.
func offender(t testing.TB, p *pod, to netip.Addr, ttl int) netip.Addr {
	t.Helper()
	v6 := to.Is6()
	fd := p.socket(t, unix.SOCK_DGRAM, 0, v6)
	level, options, place := unix.IPPROTO_IP, []int{unix.IP_TTL, unix.IP_RECVERR}, 20
	if v6 {
		level, options, place = unix.IPPROTO_IPV6, []int{unix.IPV6_UNICAST_HOPS, unix.IPV6_RECVERR}, 24
	}
	for i, o := range options {
		if err := unix.SetsockoptInt(fd, level, o, []int{ttl, 1}[i]); err != nil {
			t.Fatal(err)
		}
	}
	send(t, fd, "how far?", to, 33434)
	if _, err := readFrom(fd, make([]byte, 10)); errors.Is(err, unix.ECONNREFUSED) {
		return netip.Addr{}
	} else if !errors.Is(err, unix.EHOSTUNREACH) {
		t.Fatalf("read: %v, want no route to host (time exceeded)", err)
	}
	oob := make([]byte, 512)
	_, on, _, _, err := unix.Recvmsg(fd, make([]byte, 100), oob, unix.MSG_ERRQUEUE)
	if err != nil {
		t.Fatal(err)
	}
	// struct sock_extended_err, then the offender's struct sockaddr_in or sockaddr_in6.
	messages, err := unix.ParseSocketControlMessage(oob[:on])
	if err != nil || len(messages) != 1 {
		t.Fatalf("%d control messages: %v", len(messages), err)
	}
	a, _ := netip.AddrFromSlice(messages[0].Data[place : place+to.BitLen()/8])
	return a
}

// A pod that traces its way sees both hosts, and then arrives.
func TestHostsTraceroute(t *testing.T) {
	modes(t, func(t *testing.T, mode loader.Mode, v6 bool) {
		one, two := newHosts(t, mode, 1500)
		a, b := one.addPod("a", 1, mode), two.addPod("b", 1, mode)
		want := []netip.Addr{outside, end2.v4.Addr(), {}}
		if v6 {
			want = []netip.Addr{end1.v6.Addr(), end2.v6.Addr(), {}}
		}
		for range 2 {
			for i, w := range want {
				if got := offender(t, a, b.addr(v6), i+1); got != w {
					t.Errorf("hop %d is %s, want %s; counts %v and %v", i+1, got, w, one.counts(), two.counts())
				}
			}
		}
	})
}

// inject sends a frame out of the uplink as the other host could.
func (n *node) inject(frame []byte) {
	n.t.Helper()
	n.do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: n.up})
	})
}

// mac is the uplink's MAC address.
func (n *node) mac() (mac net.HardwareAddr) {
	n.t.Helper()
	n.do(func() error {
		l, err := netlink.LinkByIndex(n.up)
		if err != nil {
			return err
		}
		mac = l.Attrs().HardwareAddr
		return nil
	})
	return mac
}

// What the net sends in the name of this node's pods, to nobody, or in frames for others does not reach a pod.
func TestHostsForged(t *testing.T) {
	modes(t, func(t *testing.T, mode loader.Mode, v6 bool) {
		one, two := newHosts(t, mode, 1500)
		a, other := one.addPod("a", 1, mode), one.addPod("c", 2, mode)
		b := two.addPod("b", 1, mode)
		afd, bfd := a.socket(t, unix.SOCK_DGRAM, 5000, v6), b.socket(t, unix.SOCK_DGRAM, 7, v6)
		exchange(t, a, b, afd, bfd, v6, "hello")
		n4, n6 := one.podAddrs(60)
		nobody := n4
		if v6 {
			nobody = n6
		}
		target := at(a.addr(v6), 5000)
		for _, c := range []struct {
			name, verdict string
			frame         []byte
		}{
			{"as the pod itself", "drop_spoof_net", udp(b, at(a.addr(v6), 7), target, 9)},
			{"as another pod", "drop_spoof_net", udp(b, at(other.addr(v6), 7), target, 9)},
			{"as nobody of the block", "drop_spoof_net", udp(b, at(nobody, 7), target, 9)},
			{"to nobody", "drop_no_pod", udp(b, at(b.addr(v6), 7), at(nobody, 7), 9)},
		} {
			before := one.counts()
			two.inject(to(one.mac(), c.frame))
			until(t, c.name, func() bool { return one.since(before)["from_net "+c.verdict] == 1 })
			silent(t, afd)
		}
		before := one.counts()
		for _, mac := range []net.HardwareAddr{{2, 9, 9, 9, 9, 9}, {255, 255, 255, 255, 255, 255}} {
			two.inject(to(mac, udp(b, at(b.addr(v6), 7), target, 9)))
		}
		until(t, "frames for others", func() bool { return one.since(before)["from_net stack_other"] >= 2 })
		silent(t, afd)
		if got := one.since(before); got["from_net forward_pod"] != 0 {
			t.Errorf("counts %v", got)
		}
		exchange(t, a, b, afd, bfd, v6, "hello again")
	})
}

// Each end's host judges its own side.
func TestHostsPolicy(t *testing.T) {
	one, two := newHosts(t, loader.TCX, 1500)
	a, b := one.addPod("a", 1, loader.TCX), two.addPod("b", 1, loader.TCX)
	afd, bfd := a.socket(t, unix.SOCK_DGRAM, 5000, false), b.socket(t, unix.SOCK_DGRAM, 7, false)
	exchange(t, a, b, afd, bfd, false, "hello")
	two.policy(b, 9, 0) // b may open nothing, and answers
	one.policy(a, 0, 9) // nothing may be opened to a, which hears answers
	exchange(t, a, b, afd, bfd, false, "hello")
	two.policy(b, 0, 9)
	before := two.counts()
	send(t, afd, "let me in", b.v4, 7)
	until(t, "the responder's host to deny", func() bool { return two.since(before)["from_net drop_policy_ingress"] == 1 })
	silent(t, bfd)
	two.policy(b, 0, 0)
	one.policy(a, 9, 0)
	before = one.counts()
	send(t, afd, "let me out", b.v4, 7)
	until(t, "the opener's host to deny", func() bool { return one.since(before)["from_pod drop_policy_egress"] == 1 })
	silent(t, bfd)
}

// A pod's address moves from one host to the other, and back.
func TestHostsAddressMoves(t *testing.T) {
	modes(t, func(t *testing.T, mode loader.Mode, v6 bool) {
		one, two := newHosts(t, mode, 1500)
		a, b := one.addPod("a", 1, mode), two.addPod("b", 2, mode)
		afd, bfd := a.socket(t, unix.SOCK_DGRAM, 5000, v6), b.socket(t, unix.SOCK_DGRAM, 7, v6)
		for range 3 {
			exchange(t, a, b, afd, bfd, v6, "to b")
		}
		// c takes b's address over, at host one; b does not know.
		one.net = two.net
		c := one.addPod("c", 2, mode)
		one.net = 1
		single := netip.PrefixFrom(c.addr(v6), c.addr(v6).BitLen())
		hop := end1.v4.Addr()
		if v6 {
			hop = end1.v6.Addr()
		}
		cfd := c.socket(t, unix.SOCK_DGRAM, 7, v6)
		for range 3 {
			exchange(t, a, c, afd, cfd, v6, "to c")
		}
		before := one.counts()
		send(t, bfd, "from the grave", a.addr(v6), 5000)
		until(t, "the former holder's packet to be dropped", func() bool { return one.since(before)["from_net drop_spoof_net"] == 1 })
		silent(t, afd)
		silent(t, bfd)

		// Host two learns it: what d, a pod of its own, sends goes to c.
		if err := commit.RemovePod(two.maps, b.commit); err != nil {
			t.Fatal(err)
		}
		if err := commit.PutRemote(two.maps, maps.Route{Prefix: single, Kind: maps.RouteRemote, IfIndex: uint32(two.up), NextHop: hop}); err != nil {
			t.Fatal(err)
		}
		d := two.addPod("d", 1, mode)
		dfd := d.socket(t, unix.SOCK_DGRAM, 5000, v6)
		exchange(t, d, c, dfd, cfd, v6, "from d")

		// And back: c goes, b is there again.
		if err := commit.RemovePod(one.maps, c.commit); err != nil {
			t.Fatal(err)
		}
		if err := commit.RemoveRemote(two.maps, single); err != nil {
			t.Fatal(err)
		}
		if err := commit.AddPod(two.maps, b.commit); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			exchange(t, a, b, afd, bfd, v6, "to b again")
			exchange(t, d, b, dfd, bfd, v6, "to b from d")
		}
		silent(t, cfd)
	})
}

// A shaped pod's packets go through both of its host's queues, judged once.
func TestHostsShaped(t *testing.T) {
	modes(t, func(t *testing.T, mode loader.Mode, v6 bool) {
		one, two := newHosts(t, mode, 1500)
		a, b := one.addPod("a", 1, mode), two.addPod("b", 1, mode, shaped())
		afd, bfd := a.socket(t, unix.SOCK_DGRAM, 5000, v6), b.socket(t, unix.SOCK_DGRAM, 7, v6)
		wantTTL(t, afd, v6)
		wantTTL(t, bfd, v6)
		before := two.counts()
		for range 10 {
			if there, back := exchange(t, a, b, afd, bfd, v6, "slowly"); there != 62 || back != 62 {
				t.Fatalf("TTL %d there, %d back, want 62", there, back)
			}
		}
		two.onlyThese(before, map[string]uint64{"from_net stack_shaped": 10, "to_pod forward_judged": 10, "from_pod stack_shaped": 10, "to_net forward_judged": 10})
	})
}

// A pod speaks to a Service that its host's stack translates to a pod of the other host, and is answered through the stack.
//
//	a -> 192.0.2.1:8080 => from_pod | DNAT | to_net => ... => b:7
func TestHostsTranslated(t *testing.T) {
	modes(t, func(t *testing.T, mode loader.Mode, v6 bool) {
		if v6 {
			t.Skip("the node has no IPv6 address for the Service")
		}
		one, two := newHosts(t, mode, 1500)
		a, b := one.addPod("a", 1, mode), two.addPod("b", 1, mode)
		one.nft(`table ip cdp { chain pre { type nat hook prerouting priority dstnat; policy accept;
			ip daddr 192.0.2.1 udp dport 8080 dnat to 10.65.2.1:7
			ip daddr 192.0.2.1 tcp dport 8080 dnat to 10.65.2.1:7
		}
		chain forwarding { type filter hook forward priority filter; policy accept; ct state invalid counter drop; }
		}`)
		afd, bfd := a.socket(t, unix.SOCK_DGRAM, 5000, false), b.socket(t, unix.SOCK_DGRAM, 7, false)
		before := one.counts()
		for range 5 {
			send(t, afd, "hello", outside, 8080)
			if got, _, from := receive(t, bfd); got != "hello" || from != at(a.v4, 5000) {
				t.Fatalf("b received %q from %s", got, from)
			}
			send(t, bfd, "hello yourself", a.v4, 5000)
			if got, _, from := receive(t, afd); got != "hello yourself" || from != at(outside, 8080) {
				t.Fatalf("a received %q from %s", got, from)
			}
		}
		if f := one.wantFlow("udp", at(a.v4, 5000), at(b.v4, 7)); f.Entered != "stack" || f.Opener.Addr() != a.v4 || f.Received.Forward != "reply" || !f.Confirmed {
			t.Errorf("flow behind the translation: %+v", f)
		}
		one.onlyThese(before, map[string]uint64{"from_pod stack_routed": 5, "to_net forward_from_stack": 5, "from_net stack_reply": 5, "to_pod forward_from_stack": 5})

		// Judged after translation too: a may open nothing.
		one.policy(a, 9, 0)
		denied := one.counts()
		send(t, afd, "hello?", outside, 8080)
		until(t, "a denied packet", func() bool { return one.since(denied)["from_pod drop_policy_egress"] == 1 })
		one.policy(a, 0, 0)

		// TCP, and straight in turn from the same port.
		listener := b.socket(t, unix.SOCK_STREAM, 7, false)
		if err := unix.Listen(listener, 8); err != nil {
			t.Fatal(err)
		}
		for i := range 4 {
			fd := a.socket(t, unix.SOCK_STREAM, 5001, false)
			if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
				t.Fatal(err)
			}
			tv := unix.NsecToTimeval(int64(patience))
			if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv); err != nil {
				t.Fatal(err)
			}
			to := []unix.Sockaddr{sockaddr(outside, 8080), sockaddr(b.v4, 7)}[i%2]
			if err := connectTo(fd, to); err != nil {
				t.Fatalf("connection %d: %v; counts %v", i, err, one.since(before))
			}
			server, err := acceptFrom(listener)
			if err != nil {
				t.Fatal(err)
			}
			transfer(t, fd, server, 1<<18)
			unix.Close(server)
			unix.Close(fd)
		}
	})
}

// What no pod of another host sends, and what goes to the world, goes through the stack in both directions: a firewall
// there sees whole connections.
func TestHostsStrangers(t *testing.T) {
	modes(t, func(t *testing.T, mode loader.Mode, v6 bool) {
		one, two := newHosts(t, mode, 1500)
		a := one.addPod("a", 1, mode)
		two.reach(one, end1, 0)
		for _, n := range []*node{one, two} {
			n.nft(`table inet cdp { chain forwarding { type filter hook forward priority filter; policy accept; ct state invalid counter drop; }; }`)
		}
		stranger := end2.v4.Addr()
		if v6 {
			stranger = end2.v6.Addr()
		}
		before := one.counts()
		// A process of host two is a stranger to host one.
		listener := a.socket(t, unix.SOCK_STREAM, 7, v6)
		if err := unix.Listen(listener, 8); err != nil {
			t.Fatal(err)
		}
		var conn net.Conn
		two.do(func() (err error) {
			conn, err = (&net.Dialer{Timeout: patience}).Dial("tcp", at(a.addr(v6), 7).String())
			return err
		})
		defer conn.Close()
		server, err := acceptFrom(listener)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(server)
		go writeAll(server, make([]byte, 1<<20))
		if _, err := io.ReadFull(conn, make([]byte, 1<<20)); err != nil {
			t.Fatalf("%v; counts %v", err, one.since(before))
		}
		if f := one.wantFlow("tcp", netip.MustParseAddrPort(conn.LocalAddr().String()), at(a.addr(v6), 7)); f.Entered != "stack" || !f.Confirmed {
			t.Errorf("flow %+v", f)
		}

		// The pod opens a connection to it.
		var world net.Listener
		two.do(func() (err error) {
			world, err = net.Listen("tcp", at(stranger, 8080).String())
			return err
		})
		defer world.Close()
		fd := a.socket(t, unix.SOCK_STREAM, 5000, v6)
		if err := connectTo(fd, sockaddr(stranger, 8080)); err != nil {
			t.Fatalf("connect: %v; counts %v", err, one.since(before))
		}
		peer, err := world.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer peer.Close()
		go writeAll(fd, make([]byte, 1<<20))
		if _, err := io.ReadFull(peer, make([]byte, 1<<20)); err != nil {
			t.Fatalf("%v; counts %v", err, one.since(before))
		}
		if f := one.wantFlow("tcp", at(a.addr(v6), 5000), at(stranger, 8080)); f.Entered != "pod" || !f.Confirmed {
			t.Errorf("flow %+v", f)
		}
		got := one.since(before)
		for _, k := range []string{"from_net stack_routed", "from_pod stack_reply", "from_pod stack_routed", "to_net forward_judged", "to_pod forward_from_stack"} {
			if got[k] == 0 {
				t.Errorf("no %s in %v", k, got)
			}
		}
		for k := range got {
			if strings.Contains(k, "drop") || k == "from_net forward_pod" || k == "from_pod forward_net" {
				t.Errorf("%d %s", got[k], k)
			}
		}
	})
}

// Other programs take the places of these while packets go both ways, and none is lost; and the uplink's may be put on again.
func TestHostsUpgrade(t *testing.T) {
	for name, mode := range map[string]loader.Mode{"clsact": loader.Quick, "tcx": loader.TCX} {
		t.Run(name, func(t *testing.T) {
			one, two := newHosts(t, mode, 1500)
			a, b := one.addPod("a", 1, mode), two.addPod("b", 1, mode)
			lossless(t, one, a, b, 4000, func() {
				for i := range 3 {
					for _, n := range []*node{one, two} {
						n.do(func() error {
							return loader.Upgrade(loader.Config{Dir: n.dir, Timeouts: loader.Timeouts{UDP: time.Minute + time.Duration(i)}})
						})
					}
				}
				for _, n := range []*node{one, two} { // from clsact it moves to TCX
					for range 2 {
						n.do(func() error { return loader.AttachNet(n.dir, uplink, n.up) })
					}
				}
			})
			for _, n := range []*node{one, two} {
				n.do(func() error {
					if how, err := loader.AttachedNet(n.dir, uplink, n.up); how != loader.ByTCX {
						return fmt.Errorf("attached by %q: %w", how, err)
					}
					return nil
				})
			}
			if f := one.wantFlow("udp", at(a.v4, 4000), at(b.v4, 4000)); !f.Confirmed || f.Sent.Packets < 100 {
				t.Errorf("flow %+v", f)
			}
			// Without the programs the stacks carry on.
			for _, n := range []*node{one, two} {
				for range 2 {
					n.do(func() error { return loader.DetachNet(n.dir, uplink) })
				}
			}
			before := two.counts()
			afd, bfd := a.socket(t, unix.SOCK_DGRAM, 5000, false), b.socket(t, unix.SOCK_DGRAM, 7, false)
			send(t, afd, "by the stack", b.v4, 7)
			if got, _, _ := receive(t, bfd); got != "by the stack" {
				t.Errorf("received %q", got)
			}
			if got := two.since(before); got["from_net forward_pod"] != 0 || got["to_pod forward_from_stack"] != 1 {
				t.Errorf("counts %v", got)
			}
		})
	}
}
