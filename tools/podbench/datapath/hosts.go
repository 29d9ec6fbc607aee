package datapath

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"

	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
)

const uplink = "up0" // the hosts' interface to each other

// pairOfHosts makes the two pods on two hosts, each of which has a route to the other's subnet:
//
//	[a eth0] --- [one up0 198.18.1.1] ---------- [198.18.1.2 up0 two] --- [eth0 b]
//
// Caracal's routes are in its maps as well, as its agent would write them.
func (n *Node) pairOfHosts(ctx context.Context) (a, b *Pod, err error) {
	spec := n.Spec
	spec.host = 1
	if n.far, err = spec.Start(n.session); err != nil {
		return nil, nil, err
	}
	hosts, pods := [2]*Node{n, n.far}, [2]*Pod{}
	for i, h := range hosts {
		if pods[i], err = h.NewPod(); err != nil {
			return nil, nil, err
		}
		if err := h.Add(ctx, pods[i]); err != nil {
			return nil, nil, err
		}
	}
	if err := n.host.Do(func() error { return addVeth(uplink, uplink, n.far.host) }); err != nil {
		return nil, nil, err
	}
	var macs [2]net.HardwareAddr
	for i, h := range hosts {
		if macs[i], err = h.addUplink(hopOf(i)); err != nil {
			return nil, nil, err
		}
	}
	for i, h := range hosts {
		if err := h.reach(hosts[1-i].Spec.subnet(), hopOf(1-i), macs[1-i]); err != nil {
			return nil, nil, err
		}
	}
	return pods[0], pods[1], nil
}

func hopOf(host int) netip.Addr { return netip.AddrFrom4([4]byte{198, 18, 1, byte(host) + 1}) }

// addUplink configures the host's uplink and returns its MAC address.
func (n *Node) addUplink(addr netip.Addr) (mac net.HardwareAddr, err error) {
	err = n.host.Do(func() error {
		l, err := netlink.LinkByName(uplink)
		if err != nil {
			return fmt.Errorf("find %s: %w", uplink, err)
		}
		mac = l.Attrs().HardwareAddr
		if err := netlink.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(24, 32)}}); err != nil {
			return fmt.Errorf("add address %s: %w", addr, err)
		}
		return up(uplink)
	})
	return mac, err
}

// reach gives the host its route to the other's pods.
func (n *Node) reach(subnet netip.Prefix, hop netip.Addr, mac net.HardwareAddr) error {
	return n.host.Do(func() error {
		l, err := netlink.LinkByName(uplink)
		if err != nil {
			return fmt.Errorf("find %s: %w", uplink, err)
		}
		index := l.Attrs().Index
		neigh := &netlink.Neigh{LinkIndex: index, State: netlink.NUD_PERMANENT, IP: hop.AsSlice(), HardwareAddr: mac}
		if err := netlink.NeighSet(neigh); err != nil {
			return fmt.Errorf("set neighbour %s: %w", hop, err)
		}
		dst := &net.IPNet{IP: subnet.Addr().AsSlice(), Mask: net.CIDRMask(subnet.Bits(), 32)}
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: index, Dst: dst, Gw: hop.AsSlice()}); err != nil {
			return fmt.Errorf("add route to %s: %w", subnet, err)
		}
		if !n.UsesCaracal() {
			return nil
		}
		if err := loader.AttachNet(n.BPFDir(), uplink, index); err != nil {
			return err
		}
		m, err := maps.Open(n.BPFDir())
		if err != nil {
			return err
		}
		route := maps.Route{Prefix: subnet, Kind: maps.RouteRemote, IfIndex: uint32(index), NextHop: hop}
		return errors.Join(commit.SetRemote(m, []maps.Route{route}), m.Close())
	})
}
