// Package dataplane tests the eBPF programs themselves: packets through BPF_PROG_TEST_RUN, and small topologies.
//
//	      the node's namespace
//	cali-a                  cali-b
//	  |  from_pod, to_pod     |
//	eth0 10.65.0.1          eth0 10.65.0.2
//	pod a, 2001:db8::1      pod b, 2001:db8::2
package dataplane

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/internal/tc"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/tests/bpffs"
)

var (
	gatewayMAC = net.HardwareAddr{0xee, 0xee, 0xee, 0xee, 0xee, 0xee}
	gateway4   = netip.MustParseAddr("169.254.1.1")
	gateway6   = netip.MustParseAddr("fe80::1")
	outside    = netip.MustParseAddr("192.0.2.1")
)

// node is one host's namespace with its programs loaded.
type node struct {
	t    testing.TB
	name string
	ns   *netns.NS
	dir  string
	maps *maps.Maps
	net  byte // its pods are 10.65.<net>.<index> and 2001:db8:0:<net>::<index>
	up   int  // ifindex of its uplink
}

// pod is a namespace behind a veth of the node.
type pod struct {
	name    string
	ns      *netns.NS
	commit  commit.Pod
	hostIf  string
	v4, v6  netip.Addr
	ifindex int // of the pod's own end
}

func newNS(t testing.TB, name string) *netns.NS {
	t.Helper()
	if err := netns.Create(name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := netns.Delete(name); err != nil {
			t.Error(err)
		}
	})
	ns, err := netns.Open(netns.Path(name))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

func newNode(t testing.TB, cfg loader.Config) *node {
	t.Helper()
	if cfg.Dir == "" {
		cfg.Dir = filepath.Join(bpffs.Mount(t), "node")
	}
	n := newRouter(t)
	n.dir = cfg.Dir
	if cfg.MaxFlows == 0 {
		cfg.MaxFlows = 4096
	}
	if err := loader.Ensure(cfg); err != nil {
		t.Fatal(err)
	}
	var err error
	if n.maps, err = maps.Open(cfg.Dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.maps.Close() })
	n.rows(maps.PolicyRow{PolicyKey: maps.PolicyKey{Policy: 9, Bits: maps.BitsAny}, Action: maps.PolicyDeny})
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("counts at the end: %v", n.counts())
		}
	})
	return n
}

// newRouter makes a host without programs.
func newRouter(t testing.TB) *node {
	t.Helper()
	name := fmt.Sprintf("cdp-%d-%d", os.Getpid(), serial.Add(1))
	n := &node{t: t, name: name, ns: newNS(t, name)}
	n.do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(lo); err != nil {
			return err
		}
		// An address of the host, so that the host's stack can send and answer ICMP.
		a, _ := netlink.ParseAddr("192.0.2.1/32")
		if err := netlink.AddrAdd(lo, a); err != nil {
			return err
		}
		// Without waiting for duplicate addresses: as long as its link-local one is tentative a host asks for no neighbour.
		for s, v := range map[string]string{"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1", "ipv6/conf/default/accept_dad": "0"} {
			if err := os.WriteFile("/proc/sys/net/"+s, []byte(v), 0); err != nil {
				return err
			}
		}
		return nil
	})
	return n
}

// rows writes rows of policy. Every node has policy 9, which denies.
func (n *node) rows(rows ...maps.PolicyRow) {
	n.t.Helper()
	if err := n.maps.PutPolicy(rows); err != nil {
		n.t.Fatal(err)
	}
}

// do runs fn in the node's namespace and fails the test on its error.
func (n *node) do(fn func() error) {
	n.t.Helper()
	if err := n.ns.Do(fn); err != nil {
		n.t.Fatal(err)
	}
}

// podOption changes a pod before it is wired.
type podOption func(*commit.Pod)

func withMTU(mtu int) podOption { return func(p *commit.Pod) { p.MTU = mtu } }
func shaped() podOption         { return func(p *commit.Pod) { p.Shaped = true } }

// unwire takes the routes to a pod off the host, as its removal does, and leaves its interface.
func (n *node) unwire(p *pod) {
	n.t.Helper()
	n.do(func() error {
		for _, a := range p.commit.Addrs {
			if err := netlink.RouteDel(&netlink.Route{LinkIndex: p.commit.IfIndex, Dst: host(a), Scope: netlink.SCOPE_LINK}); err != nil {
				return fmt.Errorf("remove route: %w", err)
			}
		}
		return nil
	})
}

func (n *node) podAddrs(index int) (v4, v6 netip.Addr) {
	return netip.MustParseAddr(fmt.Sprintf("10.65.%d.%d", n.net, index)), netip.MustParseAddr(fmt.Sprintf("2001:db8:0:%x::%d", n.net, index))
}

// addPod wires a pod as the plugin does, without the plugin.
func (n *node) addPod(name string, index int, mode loader.Mode, opts ...podOption) *pod {
	n.t.Helper()
	p := &pod{
		name: name, hostIf: "cali-" + name, ns: newNS(n.t, n.name+"-"+name),
	}
	p.v4, p.v6 = n.podAddrs(index)
	p.commit = commit.Pod{
		Addrs: []netip.Addr{p.v4, p.v6}, MAC: net.HardwareAddr{2, 0, 0, 0, 0, byte(index)}, HostMAC: gatewayMAC,
		MTU: 1500, Network: "test",
	}
	for _, o := range opts {
		o(&p.commit)
	}
	n.do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.HardwareAddr, attrs.MTU = p.hostIf, gatewayMAC, p.commit.MTU
		veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerHardwareAddr: p.commit.MAC, PeerNamespace: netlink.NsFd(p.ns.FD())}
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("add veth: %w", err)
		}
		link, err := netlink.LinkByName(p.hostIf)
		if err != nil {
			return err
		}
		p.commit.IfIndex = link.Attrs().Index
		if err := loader.Attach(tc.Here(), n.dir, p.hostIf, p.commit.IfIndex, mode); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		for _, a := range p.commit.Addrs {
			if err := netlink.NeighAdd(&netlink.Neigh{LinkIndex: p.commit.IfIndex, IP: a.AsSlice(), HardwareAddr: p.commit.MAC, State: netlink.NUD_PERMANENT}); err != nil {
				return fmt.Errorf("add neighbour: %w", err)
			}
			if err := netlink.RouteAdd(&netlink.Route{LinkIndex: p.commit.IfIndex, Dst: host(a), Scope: netlink.SCOPE_LINK}); err != nil {
				return fmt.Errorf("add route: %w", err)
			}
		}
		return commit.AddPod(n.maps, p.commit)
	})
	if err := p.ns.Do(func() error { return p.configure() }); err != nil {
		n.t.Fatal(err)
	}
	// The host's end was up first and sends nothing until the kernel has noticed its carrier; asking for the link makes it.
	n.do(func() error {
		_, err := netlink.LinkByIndex(p.commit.IfIndex)
		return err
	})
	return p
}

func host(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

func (p *pod) configure() error {
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	p.ifindex = link.Attrs().Index
	for _, a := range p.commit.Addrs {
		addr := &netlink.Addr{IPNet: host(a)}
		if a.Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("add address: %w", err)
		}
	}
	if lo, err := netlink.LinkByName("lo"); err == nil {
		if err := netlink.LinkSetUp(lo); err != nil {
			return err
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return err
	}
	for _, gw := range []netip.Addr{gateway4, gateway6} {
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: p.ifindex, Dst: host(gw), Scope: netlink.SCOPE_LINK}); err != nil {
			return fmt.Errorf("add gateway route: %w", err)
		}
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: p.ifindex, Gw: gw.AsSlice()}); err != nil {
			return fmt.Errorf("add default route: %w", err)
		}
	}
	return p.receives()
}

func (p *pod) receives() error { return local(p.commit.Addrs...) }

// local waits until the kernel's address worker has made addresses the namespace's own, which it does behind the back of
// who adds an IPv6 address, without duplicate address detection too.
func local(addrs ...netip.Addr) error {
	for _, a := range addrs {
		for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
			routes, err := netlink.RouteGet(a.AsSlice())
			if err == nil && len(routes) == 1 && routes[0].Type == unix.RTN_LOCAL {
				break
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("%s did not become local: %v, %w", a, routes, err)
			}
		}
	}
	return nil
}

// counts reads the counters that are not zero, "hook verdict" -> packets.
func (n *node) counts() map[string]uint64 {
	n.t.Helper()
	all, err := n.maps.Counts()
	if err != nil {
		n.t.Fatal(err)
	}
	out := make(map[string]uint64)
	for _, c := range all {
		if c.Packets > 0 {
			out[c.Hook+" "+c.Verdict] = c.Packets
		}
	}
	return out
}

// since is what the counters gained over before.
func (n *node) since(before map[string]uint64) map[string]uint64 {
	n.t.Helper()
	gained := n.counts()
	for k, v := range before {
		if gained[k] -= v; gained[k] == 0 {
			delete(gained, k)
		}
	}
	return gained
}

// flow finds the flow between two ends, in either direction.
func (n *node) flow(protocol string, a, b netip.AddrPort) (maps.Flow, bool) {
	n.t.Helper()
	flows, err := n.maps.Flows()
	if err != nil {
		n.t.Fatal(err)
	}
	for _, f := range flows {
		if f.Protocol == protocol && (f.Opener == a && f.Responder == b || f.Opener == b && f.Responder == a) {
			return f, true
		}
	}
	return maps.Flow{}, false
}

func TestMain(m *testing.M) {
	runtime.LockOSThread() // the tests' own thread stays in the namespace it came from
	os.Exit(m.Run())
}
