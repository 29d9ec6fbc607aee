package ctl

import (
	"cmp"
	"errors"
	"fmt"
	stdmaps "maps"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/cni"
	"github.com/caracal-net/caracal/internal/nl"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
)

// remotes are the routes to other nodes.
func (d *doctor) remotes() []maps.Route {
	var remote []maps.Route
	for _, r := range d.routes {
		if r.Kind == maps.RouteRemote || r.Kind == maps.RouteTunnel {
			remote = append(remote, r)
		}
	}
	return remote
}

// uplinks names the interfaces that carry, or should carry, the programs for other nodes' packets and masqueraded ones: those
// with pinned links, those that the agent says, and those by which routes to other nodes, or masqueraded packets, leave.
func (d *doctor) uplinks() []string {
	names, _ := loader.Uplinks(d.bpffsDir)    // what can't be listed is checkKernel's to tell
	names = append(names, d.agent.Uplinks...) // one that is attached by clsact has no pins
	for _, r := range d.remotes() {
		name, err := nl.Name(int(r.IfIndex))
		if errors.Is(err, unix.ENODEV) {
			continue // checkRoutes tells
		}
		names = append(names, name)
	}
	names = append(names, d.waysOut()...)
	slices.Sort(names)
	return slices.Compact(names)
}

// checkUplinks: the interfaces to other nodes, and to the outside of masqueraded pods, are up and carry from_net and to_net.
func (d *doctor) checkUplinks() error {
	names := d.uplinks()
	for _, name := range names {
		l, err := netlink.LinkByName(name)
		if err != nil {
			d.found(statusFail, name, "the agent attaches to it when it comes back", "%v", err)
			continue
		}
		if l.Attrs().Flags&net.FlagUp == 0 {
			d.found(statusFail, name, "ip link set "+name+" up", "it is down")
		}
		if _, err := loader.AttachedNet(d.bpffsDir, name, l.Attrs().Index); err != nil {
			d.found(statusFail, name, "restart the agent (systemctl restart caracald), which attaches them; --uplink names it",
				"%v, though other nodes, or the outside of masqueraded pods, are behind it", err)
		}
	}
	if err := d.wantWaysOut(names); err != nil {
		return err
	}
	switch {
	case len(names) == 0:
		d.skipped("this node knows of no other node, and masquerades no pod")
	case d.silent():
		d.ok("up, with the programs attached: %s", strings.Join(names, ", "))
	}
	return nil
}

// wantWaysOut names the interfaces by which what pods send to Services may leave that do not carry the programs.
func (d *doctor) wantWaysOut(carry []string) error {
	if d.maps == nil || d.mapsErr != nil {
		return nil
	}
	services, err := d.maps.Services()
	if errors.Is(err, maps.ErrNotLoaded) || err == nil && len(services) == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	var pools []netip.Prefix
	for _, r := range d.routes {
		if r.Kind == maps.RoutePool {
			pools = append(pools, r.Prefix)
		}
	}
	ways, others, err := cni.WaysOut(&netlink.Handle{}, pools)
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(stdmaps.Keys(ways)) {
		if !slices.Contains(carry, name) {
			d.found(statusWarn, name, "caracald --uplink leaves it out: add it, or give no --uplink; an interface that is new the agent takes in a moment",
				"what pods send to Services and a route leads out of it is not judged by policy")
		}
	}
	for _, name := range others {
		if !slices.Contains(carry, name) {
			d.found(statusWarn, name, fmt.Sprintf("where backends of Services are behind it and policy is to keep pods from them, drop such packets: nft add rule inet filter forward oifname %s meta mark and 0x200000 != 0 drop", name),
				"it carries no Ethernet frames, or has no address: what pods send to Services and a route leads out of it is not judged by policy")
		}
	}
	return nil
}

// checkRoutes: the kernel's table says the same of other nodes' blocks as the maps do, and the next hops answer.
func (d *doctor) checkRoutes() error {
	if d.mapsErr != nil {
		d.skipped("the kernel maps can't be read")
		return nil
	}
	differ, err := d.differences()
	if err != nil {
		return err
	}
	if len(differ) > 0 { // unless the agent was at work
		again, err := d.differences()
		if err != nil {
			return err
		}
		stdmaps.DeleteFunc(differ, func(p netip.Prefix, what string) bool { return again[p] != what })
	}
	for _, p := range slices.SortedFunc(stdmaps.Keys(differ), byPrefix) {
		d.found(statusFail, p.String(), "restart the agent (systemctl restart caracald), which writes both", "%s", differ[p])
	}
	neighbours, err := listNeighbours()
	if err != nil {
		return err
	}
	remote := d.remotes()
	hops := make(map[neighbour]bool)
	for _, r := range remote {
		hop := neighbour{int(r.IfIndex), r.NextHop}
		if n := neighbours[hop]; n.State&netlink.NUD_FAILED != 0 && !hops[hop] {
			d.found(statusFail, r.NextHop.String(), "is that node up, and on the same network?", "the next hop does not answer ARP or neighbour discovery")
		}
		hops[hop] = true
	}
	switch {
	case len(remote) == 0 && d.silent():
		d.skipped("this node has no routes to other nodes")
	case d.silent():
		d.ok("%d to other nodes by %d next hops, the same in caracal_routes and in the kernel's table", len(remote), len(hops))
	}
	return nil
}

func byPrefix(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

// differences says of each prefix how the kernel's table differs from the maps, both as they are now.
func (d *doctor) differences() (map[netip.Prefix]string, error) {
	var err error
	if d.routes, err = d.maps.Routes(); err != nil {
		return nil, err
	}
	state, err := d.maps.State()
	if err != nil {
		return nil, err
	}
	kernel, err := kernelRoutes(int(state.Tunnel))
	if err != nil {
		return nil, err
	}
	differ := make(map[netip.Prefix]string)
	for _, r := range d.remotes() {
		k, ok := kernel[r.Prefix]
		delete(kernel, r.Prefix)
		if r.Kind == maps.RouteTunnel {
			k.addr = r.NextHop // which host is in the encapsulation, which is not read
		}
		switch {
		case !ok:
			differ[r.Prefix] = fmt.Sprintf("caracal_routes has it by %s, the kernel's table (ip route show proto %d) has not", r.NextHop, cni.RouteProtocol)
		case k != (neighbour{int(r.IfIndex), r.NextHop}):
			differ[r.Prefix] = fmt.Sprintf("caracal_routes has it by %s on interface %d, the kernel's table by %s on %d", r.NextHop, r.IfIndex, k.addr, k.ifindex)
		}
	}
	for p, k := range kernel {
		differ[p] = fmt.Sprintf("the kernel's table has it by %s, caracal_routes has not", k.addr)
	}
	return differ, nil
}

// kernelRoutes lists Caracal's routes by a next hop, or into the tunnel, in the kernel's main table.
func kernelRoutes(tunnel int) (map[netip.Prefix]neighbour, error) {
	all := make(map[netip.Prefix]neighbour)
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := nl.Dump(func() ([]netlink.Route, error) {
			return netlink.RouteListFiltered(family, &netlink.Route{Protocol: cni.RouteProtocol}, netlink.RT_FILTER_PROTOCOL)
		})
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range list {
			via := r.Gw
			if v, ok := r.Via.(*netlink.Via); ok { // an IPv4 route by an IPv6 next hop
				via = v.Addr
			}
			hop, ok := netip.AddrFromSlice(via)
			if p, isPrefix := nl.Prefix(r.Dst); isPrefix && (ok || tunnel != 0 && r.LinkIndex == tunnel) {
				all[p] = neighbour{r.LinkIndex, hop.Unmap()}
			}
		}
	}
	return all, nil
}
