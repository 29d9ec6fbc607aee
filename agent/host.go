package agent

import (
	"context"
	"errors"
	"fmt"
	stdmaps "maps"
	"net/netip"
	"path"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/cni"
	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/internal/nl"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
)

// ErrUplink says that it can't be told which interface other hosts are behind.
var ErrUplink = errors.New("uplink")

// attachUplinks puts the programs for packets from and to other hosts onto the interfaces that they are behind. One that
// is no uplink any more loses them.
func (a *Agent) attachUplinks(v *view, self *api.Node) error {
	want, err := a.findUplinks(v, self)
	if err != nil {
		return err
	}
	var errs []error
	for name, index := range want {
		if a.uplinks[name] == index {
			continue
		}
		if err := loader.AttachNet(a.BPFFSDir, name, index); err != nil {
			errs = append(errs, err)
			continue
		}
		if was, ok := a.uplinks[name]; ok { // another interface of that name
			errs = append(errs, a.maps.RemoveUplink(uint32(was)))
		}
		a.Log.Info("uplink", "interface", name)
		a.uplinks[name] = index
	}
	if !a.inherited {
		err := a.dropInherited(want)
		a.inherited = err == nil
		errs = append(errs, err)
	}
	for name := range a.uplinks {
		if _, ok := want[name]; !ok {
			errs = append(errs, loader.DetachNet(a.BPFFSDir, name), a.maps.RemoveUplink(uint32(a.uplinks[name])))
			delete(a.uplinks, name)
		}
	}
	return errors.Join(errs...)
}

// dropInherited takes off what an earlier agent left on interfaces that are no uplinks now. The tunnel's is setTunnel's.
func (a *Agent) dropInherited(want map[string]int) error {
	names, err := loader.Uplinks(a.BPFFSDir) // also of interfaces that are gone
	if err != nil {
		return err
	}
	there, err := a.maps.Uplinks()
	if err != nil {
		return err
	}
	links, err := nl.Dump(netlink.LinkList)
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	want = stdmaps.Clone(want)
	if state, err := a.maps.State(); err != nil {
		return err
	} else if state.NATPorts != (maps.Ports{}) { // the plugin's own, whatever --uplink says
		outside, err := cni.DefaultUplinks(&netlink.Handle{})
		if err != nil {
			return err
		}
		stdmaps.Copy(want, outside)
	}
	keep := slices.Collect(stdmaps.Values(want))
	for _, l := range links { // programs that are attached by clsact have no pins
		switch at := l.Attrs(); {
		case at.Name == cni.TunnelName:
			keep = append(keep, at.Index)
		case at.Group != cni.LinkGroup && !slices.Contains(names, at.Name):
			names = append(names, at.Name)
		}
	}
	var errs []error
	for _, name := range names {
		if _, ok := want[name]; !ok && name != cni.TunnelName {
			errs = append(errs, loader.DetachNet(a.BPFFSDir, name))
		}
	}
	for index := range there {
		if !slices.Contains(keep, int(index)) {
			errs = append(errs, a.maps.RemoveUplink(index))
		}
	}
	return errors.Join(errs...)
}

// findUplinks finds the uplinks: the underlay, and what else packets leave the pools by.
func (a *Agent) findUplinks(v *view, self *api.Node) (map[string]int, error) {
	underlay, err := a.findUnderlay(v, self)
	if err != nil {
		return nil, err
	}
	a.underlay = underlay
	found := stdmaps.Clone(underlay)
	if a.Kubernetes != nil && len(a.Uplinks) == 0 { // what pods send to a Service leaves by whatever interface its backend is behind
		var pools []netip.Prefix
		for _, p := range v.pools {
			pools = append(pools, p.CIDR)
		}
		ways, _, err := cni.WaysOut(&netlink.Handle{}, pools)
		if err != nil {
			return nil, err
		}
		stdmaps.Copy(found, ways)
	}
	if a.tunnel.index != 0 {
		found[cni.TunnelName] = a.tunnel.index
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("%w: no interface has this node's address or a route to a peer; name it (--uplink eth1)", ErrUplink)
	}
	return found, nil
}

// findUnderlay finds the interfaces that other hosts are behind, and those with a default route when pods leave by them: by rule, or by
// the routes to the peers.
func (a *Agent) findUnderlay(v *view, self *api.Node) (map[string]int, error) {
	links, err := nl.Dump(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	found := make(map[string]int)
	if len(a.Uplinks) > 0 {
		for _, l := range links {
			name := l.Attrs().Name
			if slices.ContainsFunc(a.Uplinks, func(p string) bool { ok, _ := path.Match(p, name); return ok }) {
				found[name] = l.Attrs().Index
			}
		}
		if len(found) == 0 {
			return nil, fmt.Errorf("%w: no interface is called like %q; name one that other hosts are behind (--uplink)", ErrUplink, a.Uplinks)
		}
		return found, nil
	}
	var to []netip.Addr
	for name, n := range v.nodes {
		if name != a.Node && n.BGP != nil {
			to = append(to, n.BGP.IPv4Address.Addr(), n.BGP.IPv6Address.Addr())
		}
	}
	for _, p := range v.peers {
		if at, err := p.Peer(); err == nil && (p.Node == "" || p.Node == a.Node) {
			to = append(to, at.Addr())
		}
	}
	// A node that knows of no other yet: the interface that has its own address.
	for _, l := range links {
		addrs, err := nl.Dump(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_ALL) })
		if err != nil {
			return nil, fmt.Errorf("list addresses of %s: %w", l.Attrs().Name, err)
		}
		for _, x := range addrs {
			if p, ok := prefixOf(x); ok && (p.Addr() == self.BGP.IPv4Address.Addr() || p.Addr() == self.BGP.IPv6Address.Addr()) {
				found[l.Attrs().Name] = l.Attrs().Index
			}
		}
	}
	for _, t := range to {
		if !t.IsValid() {
			continue
		}
		routes, err := netlink.RouteGet(t.AsSlice())
		if err != nil || len(routes) == 0 || routes[0].Type != unix.RTN_UNICAST {
			continue // unreachable now; BGP says so
		}
		for _, l := range links {
			if l.Attrs().Index == routes[0].LinkIndex {
				found[l.Attrs().Name] = l.Attrs().Index
			}
		}
	}
	if state, err := a.maps.State(); err != nil {
		return nil, err
	} else if masquerades(v) || state.NATPorts != (maps.Ports{}) {
		outside, err := cni.DefaultUplinks(&netlink.Handle{})
		if err != nil {
			return nil, err
		}
		stdmaps.Copy(found, outside)
	}
	delete(found, "lo")
	return found, nil
}

// setNode brings the node's own addresses and blocks up to date, in the maps and as blackhole routes in the kernel's table,
// so that what no pod holds goes nowhere.
func (a *Agent) setNode(ctx context.Context) error {
	lock, err := node.LockNode(ctx, a.StateDir)
	if err != nil {
		return err
	}
	defer lock.Unlock()
	recorded, err := a.recorded(ctx)
	if err != nil {
		return err
	}
	var blocks []netip.Prefix
	var errs []error
	for _, b := range recorded {
		blocks = append(blocks, b.CIDR)
		errs = append(errs, cni.Blackhole(&netlink.Handle{}, b.CIDR))
	}
	errs = append(errs, removeBlackholes(blocks))
	host, err := cni.HostAddresses(&netlink.Handle{})
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	return errors.Join(append(errs, commit.SetNode(a.maps, host, blocks))...)
}

// removeBlackholes removes those of blocks that this node has given up.
func removeBlackholes(blocks []netip.Prefix) error {
	var errs []error
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		filter := &netlink.Route{Protocol: cni.RouteProtocol, Type: unix.RTN_BLACKHOLE, Table: unix.RT_TABLE_MAIN}
		list, err := nl.Dump(func() ([]netlink.Route, error) {
			return netlink.RouteListFiltered(family, filter, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TYPE|netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return fmt.Errorf("list blackhole routes: %w", err)
		}
		for _, k := range list {
			if p, ok := nl.Prefix(k.Dst); ok && !slices.Contains(blocks, p) {
				errs = append(errs, netlink.RouteDel(&k))
			}
		}
	}
	return errors.Join(errs...)
}
