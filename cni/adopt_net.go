package cni

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/internal/nl"
	"github.com/caracal-net/caracal/ipam"
	"github.com/caracal-net/caracal/node"
)

// CalicoTunnels are the interfaces that Calico's agent makes on a host.
var CalicoTunnels = []string{"tunl0", "vxlan.calico", "vxlan-v6.calico", "wireguard.cali", "wg-v6.cali", "bpfin.cali"}

func tunnelKey(name string) node.Key {
	return node.Key{Network: ipam.HostNetwork, ContainerID: "calico", IfName: name}
}

// HoldTunnels keeps the addresses that Calico's tunnels have in this node's blocks from being given to pods, until ReleaseTunnels.
func (a *Adoption) HoldTunnels(ctx context.Context) error {
	type held struct {
		key  node.Key
		addr netip.Addr
	}
	var todo []held
	for _, name := range CalicoTunnels {
		l, err := netlink.LinkByName(name)
		if nl.IsNotFound(err) {
			continue
		}
		if err != nil {
			return fmt.Errorf("look for %s: %w", name, err)
		}
		addrs, err := nl.Dump(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_ALL) })
		if err != nil {
			return fmt.Errorf("list addresses of %s: %w", name, err)
		}
		for _, x := range addrs {
			addr, _ := netip.AddrFromSlice(x.IP)
			addr = addr.Unmap()
			block, _, err := blockIn(a.Pools, addr)
			if owner, claimed := a.Claims[block]; err == nil && (!claimed || owner == a.Node) {
				todo = append(todo, held{tunnelKey(name), addr})
			}
		}
	}
	if len(todo) == 0 {
		return nil
	}
	return a.update(ctx, func(tx *node.Tx) error {
		for _, h := range todo {
			if _, err := hold(tx, h.key, a.Pools, h.addr); err != nil {
				return err
			}
		}
		return nil
	})
}

// ReleaseTunnels is for when Calico's tunnels are gone.
func (a *Adoption) ReleaseTunnels(ctx context.Context) error {
	return a.update(ctx, func(tx *node.Tx) error {
		for _, name := range CalicoTunnels {
			if _, err := tx.Release(tunnelKey(name)); err != nil {
				return err
			}
		}
		return nil
	})
}

// calicoProtocol is what BIRD, and so Calico, marks its routes with (rtm_protocol, rtnetlink(7)).
const calicoProtocol = unix.RTPROT_BIRD

// TakeRoutes makes the routes to other hosts' blocks that Calico has learned Caracal's, so that the agent may write its own in their
// place: none is missing meanwhile. It returns their prefixes, and changes nothing when dry.
func (a *Adoption) TakeRoutes(dry bool) ([]netip.Prefix, error) {
	return a.moveRoutes(calicoProtocol, RouteProtocol, dry)
}

// ReturnRoutes is the inverse of TakeRoutes.
func (a *Adoption) ReturnRoutes() ([]netip.Prefix, error) {
	return a.moveRoutes(RouteProtocol, calicoProtocol, false)
}

// moveRoutes gives the routes of a protocol to blocks of the pools, by other hosts or to nowhere, to another one.
func (a *Adoption) moveRoutes(from, to int, dry bool) (moved []netip.Prefix, err error) {
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		filter := &netlink.Route{Protocol: netlink.RouteProtocol(from), Table: unix.RT_TABLE_MAIN}
		routes, err := nl.Dump(func() ([]netlink.Route, error) {
			return netlink.RouteListFiltered(family, filter, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return moved, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			prefix, ok := a.movable(r)
			if !ok {
				continue
			}
			moved = append(moved, prefix)
			if dry {
				continue
			}
			old := r
			r.Protocol, r.Priority = netlink.RouteProtocol(to), 0
			if err := netlink.RouteReplace(&r); err != nil {
				return moved, fmt.Errorf("route to %s: %w", prefix, err)
			}
			if old.Priority != r.Priority { // it stands beside the new one, which is the better of the two
				if err := netlink.RouteDel(&old); err != nil && !errors.Is(err, unix.ESRCH) {
					return moved, fmt.Errorf("remove route to %s: %w", prefix, err)
				}
			}
		}
	}
	return moved, nil
}

// movable tells whether a route leads to blocks without a tunnel, and to which.
func (a *Adoption) movable(r netlink.Route) (netip.Prefix, bool) {
	if r.Dst == nil || r.Type != unix.RTN_BLACKHOLE && (r.Type != unix.RTN_UNICAST || r.Gw == nil || r.Encap != nil) {
		return netip.Prefix{}, false
	}
	addr, _ := netip.AddrFromSlice(r.Dst.IP)
	bits, _ := r.Dst.Mask.Size()
	prefix := netip.PrefixFrom(addr.Unmap(), bits)
	if !slices.ContainsFunc(a.Pools, func(p api.IPPool) bool { return p.CIDR.Bits() <= bits && p.CIDR.Contains(prefix.Addr()) }) {
		return prefix, false
	}
	if r.Type == unix.RTN_UNICAST {
		l, err := netlink.LinkByIndex(r.LinkIndex)
		if err != nil || l.Type() == "ipip" || l.Type() == "vxlan" {
			return prefix, false
		}
	}
	return prefix, true
}
