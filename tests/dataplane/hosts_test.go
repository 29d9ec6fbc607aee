package dataplane

import (
	"fmt"
	"net"
	"net/netip"
	"testing"

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

// onlyThese fails when another counter gained anything than the named ones, and what hosts say to each other.
func (n *node) onlyThese(before map[string]uint64, want map[string]uint64) {
	n.t.Helper()
	got := n.since(before)
	for _, k := range []string{"from_net stack_other", "to_net stack_other", "from_pod control", "from_pod answer_arp", "from_pod answer_nd", "to_pod stack_arp", "from_pod stack_arp"} {
		delete(got, k)
	}
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
