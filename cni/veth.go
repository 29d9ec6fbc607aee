package cni

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/internal/nl"
)

// RouteProtocol marks the kernel routes that are Caracal's (rtm_protocol, rtnetlink(7)): `ip route` shows "proto 202".
const RouteProtocol = 202

// LinkGroup marks the host ends that are Caracal's (ip-link(8)): `ip link show group 202` lists them.
const LinkGroup = RouteProtocol

// ours tells whether an interface is the host end of a pair that Caracal made.
func ours(l netlink.Link) bool { return l.Type() == "veth" && l.Attrs().Group == LinkGroup }

// TunnelName is the VXLAN interface's, which an agent makes.
const TunnelName = "vxlan.caracal"

// The gateway that every pod has. It exists nowhere: from_pod answers for it.
var (
	Gateway4 = netip.MustParseAddr("169.254.1.1")
	Gateway6 = netip.MustParseAddr("fe80::1")
)

// hostMAC is the address of the host ends of CNI's attachments, as on a Calico node; from_pod answers for it.
var hostMAC = net.HardwareAddr{0xee, 0xee, 0xee, 0xee, 0xee, 0xee}

// minMTU6 is the least MTU that IPv6 works on, bytes (RFC 8200, section 5).
const minMTU6 = 1280

// veth is the pair of one attachment.
type veth struct {
	hostName, podName string
	mac               net.HardwareAddr // of the pod's end
	hostMAC           net.HardwareAddr // of the host's end
	mtu               int
	addrs             []netip.Addr
	pools             []netip.Prefix // what a pod's second interface is for
	hostIndex         int            // set by create
	podIndex          int            // set by create
	routes            []netip.Prefix // in the pod, by its gateways; set by configurePod
}

// sides are rtnetlink sockets in the host's and in the pod's namespace. Of a pod whose end somebody else moves there, later,
// there is no namespace and no socket in it.
type sides struct {
	host, pod *netlink.Handle
	ns        *netns.NS
}

func openSides(ns *netns.NS) (*sides, error) {
	host, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open rtnetlink: %w", err)
	}
	if ns == nil {
		return &sides{host: host}, nil
	}
	pod, err := netlink.NewHandleAt(vnetns.NsHandle(ns.FD()), unix.NETLINK_ROUTE)
	if err != nil {
		host.Close()
		return nil, fmt.Errorf("open rtnetlink in the pod's namespace: %w", err)
	}
	return &sides{host, pod, ns}, nil
}

func (s *sides) Close() {
	s.host.Close()
	if s.pod != nil {
		s.pod.Close()
	}
}

// create makes the pair in one request, with the pod's end in its namespace, if that is known, under its final name: moving an
// interface between namespaces later waits for an RCU grace period. os.ErrExist when the host has such an interface.
func (v *veth) create(s *sides) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr, attrs.MTU, attrs.TxQLen, attrs.Group = v.hostName, v.hostMAC, v.mtu, 1000, LinkGroup
	// One queue: a veth takes no lock to send, and each queue more, by default one for each CPU, is files in sysfs.
	attrs.NumTxQueues, attrs.NumRxQueues = 1, 1
	pair := &netlink.Veth{
		LinkAttrs: attrs, PeerName: v.podName, PeerHardwareAddr: v.mac, PeerMTU: uint32(v.mtu),
		PeerTxQLen: 1000, PeerNumTxQueues: 1, PeerNumRxQueues: 1,
	}
	if s.ns != nil {
		pair.PeerNamespace = netlink.NsFd(s.ns.FD())
	}
	if err := s.host.LinkAdd(pair); err != nil {
		return fmt.Errorf("create veth pair %s and %s: %w", v.hostName, v.podName, err)
	}
	host, err := s.host.LinkByName(v.hostName)
	if err != nil {
		return fmt.Errorf("find %s: %w", v.hostName, err)
	}
	v.hostIndex, v.podIndex = host.Attrs().Index, host.Attrs().ParentIndex // of its peer
	return nil
}

// link is the least that netlink's functions want of an interface.
func link(index int) netlink.Link {
	return &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: index}}
}

// configurePod gives the pod's end its addresses, its gateway and the gateway's permanent neighbour entries, so that
// neither ARP nor neighbour discovery is ever waited for.
func (v *veth) configurePod(s *sides) error {
	if hasV6(v.addrs) {
		err := s.ns.Do(func() error { return writeSysctl("ipv6/conf/"+v.podName+"/disable_ipv6", "0") })
		if err != nil {
			return err
		}
	}
	if err := s.pod.LinkSetUp(link(v.podIndex)); err != nil {
		return fmt.Errorf("set %s up in the pod: %w", v.podName, err)
	}
	for _, a := range v.addrs {
		addr := &netlink.Addr{IPNet: hostNet(a)}
		if a.Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := s.pod.AddrAdd(link(v.podIndex), addr); err != nil {
			return fmt.Errorf("add address %s in the pod: %w", a, err)
		}
	}
	for _, gw := range gateways(v.addrs) {
		if err := setNeighbour(s.pod, v.podIndex, gw, v.hostMAC); err != nil {
			return fmt.Errorf("in the pod: %w", err)
		}
		if err := v.routePod(s.pod, gw); err != nil {
			return err
		}
	}
	// The host's end was up first, without a carrier; asking for it makes the kernel notice that it has one now.
	if _, err := s.host.LinkByIndex(v.hostIndex); err != nil {
		return fmt.Errorf("find %s: %w", v.hostName, err)
	}
	return v.awaitAddresses(s.pod)
}

// routePod makes the pod's routes of one family. The first interface carries everything; one that finds a default route
// there carries its own network's pools, because its address is good for nothing else.
func (v *veth) routePod(pod *netlink.Handle, gw netip.Addr) error {
	first := true
	routes, err := nl.Dump(func() ([]netlink.Route, error) { return pod.RouteList(nil, family(gw)) })
	if err != nil {
		return fmt.Errorf("list routes in the pod: %w", err)
	}
	for _, r := range routes {
		first = first && !(isDefault(r) && r.LinkIndex != v.podIndex)
	}
	onLink := &netlink.Route{LinkIndex: v.podIndex, Dst: hostNet(gw), Scope: netlink.SCOPE_LINK}
	if !first {
		onLink.Priority = 1000 + v.podIndex // beside the first interface's route to the same gateway
	}
	if err := pod.RouteReplace(onLink); err != nil {
		return fmt.Errorf("add route to %s in the pod: %w", gw, err)
	}
	if first {
		v.routes = append(v.routes, netip.PrefixFrom(unspecified(gw), 0))
		if err := pod.RouteAdd(&netlink.Route{LinkIndex: v.podIndex, Gw: gw.AsSlice()}); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add default route by %s in the pod: %w", gw, err)
		}
		return nil
	}
	for _, p := range v.pools {
		if p.Addr().BitLen() != gw.BitLen() {
			continue
		}
		v.routes = append(v.routes, p)
		r := &netlink.Route{LinkIndex: v.podIndex, Dst: network(p), Gw: gw.AsSlice(), Flags: int(netlink.FLAG_ONLINK)}
		if err := pod.RouteReplace(r); err != nil {
			return fmt.Errorf("add route to %s by %s in the pod: %w", p, gw, err)
		}
	}
	return nil
}

func isDefault(r netlink.Route) bool {
	return r.Gw != nil && (r.Dst == nil || r.Dst.IP.IsUnspecified())
}

func unspecified(a netip.Addr) netip.Addr {
	if a.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// awaitAddresses waits until the pod takes packets for its IPv6 addresses: the kernel makes them local a moment after they
// were added, also without duplicate address detection.
func (v *veth) awaitAddresses(pod *netlink.Handle) error {
	const within = 5 * time.Second // a loaded machine takes its time
	deadline := time.Now().Add(within)
	for _, a := range v.addrs {
		for a.Is6() {
			routes, err := pod.RouteGet(a.AsSlice())
			if err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL {
				break
			}
			if time.Now().After(deadline) {
				return errors.Join(fmt.Errorf("address %s does not become the pod's within %s", a, within), err)
			}
			time.Sleep(50 * time.Microsecond)
		}
	}
	return nil
}

// configureHost sets the host's end up and routes the pod's addresses to it.
func (v *veth) configureHost(s *sides) error {
	if err := s.host.LinkSetUp(link(v.hostIndex)); err != nil {
		return fmt.Errorf("set %s up: %w", v.hostName, err)
	}
	if err := writeSysctl("ipv4/conf/"+v.hostName+"/forwarding", "1"); err != nil {
		return err
	}
	for _, a := range v.addrs {
		if err := setNeighbour(s.host, v.hostIndex, a, v.mac); err != nil {
			return err
		}
		r := &netlink.Route{LinkIndex: v.hostIndex, Dst: hostNet(a), Scope: netlink.SCOPE_LINK, Protocol: RouteProtocol}
		if err := s.host.RouteReplace(r); err != nil {
			return fmt.Errorf("add route to %s: %w", a, err)
		}
	}
	return nil
}

func setNeighbour(h *netlink.Handle, ifindex int, a netip.Addr, mac net.HardwareAddr) error {
	n := &netlink.Neigh{LinkIndex: ifindex, IP: a.AsSlice(), HardwareAddr: mac, State: netlink.NUD_PERMANENT, Family: family(a)}
	if err := h.NeighSet(n); err != nil {
		return fmt.Errorf("set neighbour %s: %w", a, err)
	}
	return nil
}

// Blackhole routes a block of this node to nowhere, for the addresses that no pod holds.
func Blackhole(h *netlink.Handle, block netip.Prefix) error {
	if block.IsSingleIP() {
		return nil // its route is its pod's
	}
	r := &netlink.Route{Dst: network(block), Type: unix.RTN_BLACKHOLE, Protocol: RouteProtocol}
	if err := h.RouteAdd(r); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add blackhole route for %s: %w", block, err)
	}
	return nil
}

// randomMAC is a locally administered unicast address.
func randomMAC() net.HardwareAddr {
	m := binary.BigEndian.AppendUint64(nil, rand.Uint64())[:6]
	m[0] = m[0]&^1 | 2
	return m
}

// beyond are addresses outside every pool (RFC 5737, RFC 3849): the route to them is the one to the outside.
var beyond = []netip.Addr{netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("2001:db8:ffff:ffff::1")}

// pathMTU is the MTU of the interface by which packets leave for the outside, 1500 when none does. It asks for one route,
// not for all: a node has one for each pod.
func pathMTU(h *netlink.Handle) int {
	for _, a := range beyond {
		routes, err := h.RouteGet(a.AsSlice())
		if err != nil || len(routes) == 0 || routes[0].Type != unix.RTN_UNICAST {
			continue
		}
		if l, err := h.LinkByIndex(routes[0].LinkIndex); err == nil && l.Attrs().MTU >= 68 {
			return l.Attrs().MTU
		}
	}
	return 1500
}

// tunnelMTU is what fits the tunnel to other hosts; no limit as long as no agent has made it.
func tunnelMTU(h *netlink.Handle) int {
	l, err := h.LinkByName(TunnelName)
	if err != nil {
		return 65535
	}
	return l.Attrs().MTU
}

// HostAddresses are the addresses of this host that a packet may be for.
func HostAddresses(h *netlink.Handle) ([]netip.Addr, error) {
	list, err := nl.Dump(func() ([]netlink.Addr, error) { return h.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list this host's addresses: %w", err)
	}
	var addrs []netip.Addr
	for _, l := range list {
		a, ok := netip.AddrFromSlice(l.IP)
		if a = a.Unmap(); ok && !a.IsLoopback() && !a.IsLinkLocalUnicast() {
			addrs = append(addrs, a)
		}
	}
	return addrs, nil
}

func hasV6(addrs []netip.Addr) bool {
	for _, a := range addrs {
		if a.Is6() {
			return true
		}
	}
	return false
}

// gateways are the gateways of the families that the addresses have.
func gateways(addrs []netip.Addr) []netip.Addr {
	var g []netip.Addr
	for _, a := range addrs {
		if a.Is4() && len(g) == 0 {
			g = append(g, Gateway4)
		}
	}
	if hasV6(addrs) {
		g = append(g, Gateway6)
	}
	return g
}

func family(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// hostNet is the prefix of one address.
func hostNet(a netip.Addr) *net.IPNet { return network(netip.PrefixFrom(a, a.BitLen())) }

func network(p netip.Prefix) *net.IPNet { return nl.Net(p) }

// A sysctl's name here is its path below /proc/sys/net, which shows the calling thread's network namespace.
func sysctlPath(name string) string { return "/proc/sys/net/" + name }

// hostSysctls is where a container that is not privileged, and can't write its own /proc/sys, has the host's mounted: what is below it
// shows the calling thread's network namespace too.
const hostSysctls = "/host/proc/sys/net/"

func writeSysctl(name, value string) error {
	err := os.WriteFile(sysctlPath(name), []byte(value), 0)
	if errors.Is(err, unix.EROFS) {
		if _, there := os.Stat(hostSysctls); there == nil {
			err = os.WriteFile(hostSysctls+name, []byte(value), 0)
		}
	}
	if err != nil {
		return fmt.Errorf("set sysctl net/%s: %w", name, err)
	}
	return nil
}

func readSysctl(name string) (string, error) {
	b, err := os.ReadFile(sysctlPath(name))
	if err != nil {
		return "", fmt.Errorf("read sysctl net/%s: %w", name, err)
	}
	return strings.TrimSpace(string(b)), nil
}
