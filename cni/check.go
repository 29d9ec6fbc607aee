package cni

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/internal/nl"
	"github.com/caracal-net/caracal/ipam"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
)

// differs is CHECK's answer when something is not as it was made.
func differs(format string, args ...any) error { return fail(codeInconsistent, format, args...) }

// check compares an attachment with its record: interfaces, addresses, routes, neighbours, programs, maps, addresses
// held. What later plugins of the chain add is no difference, nor is a MAC address they changed.
func (p *Plugin) check(ctx context.Context, env *Env, c *Config) error {
	if c.prev == nil {
		return fail(codeConfig, "CHECK needs prevResult, what ADD answered")
	}
	e, err := p.checkRecord(ctx, env, c)
	p.about = e
	if err != nil {
		return err
	}
	ns, err := netns.Open(env.Netns)
	if err != nil {
		return fail(codeUnknown, "CNI_NETNS: %s", err)
	}
	defer ns.Close()
	s, err := openSides(ns)
	if err != nil {
		return err
	}
	defer s.Close()
	if err := checkPrev(env, c, e); err != nil {
		return err
	}
	if err := checkPod(s, e); err != nil {
		return err
	}
	host, err := checkHost(s, e)
	if err != nil {
		return err
	}
	if _, err := loader.Attached(c.BPFFSDir, e.HostIfName, host); err != nil {
		return differs("%s", err)
	}
	m, err := maps.Open(c.BPFFSDir)
	if err != nil {
		return err
	}
	defer m.Close()
	if err := commit.CheckPod(m, commit.PodOf(e, host)); err != nil {
		return differs("%s", err)
	}
	if !c.ownIPAM() {
		if err := invoke.DelegateCheck(ctx, c.IPAM.Type, c.raw, p.delegate()); err != nil {
			return fmt.Errorf("ipam %s: %w", c.IPAM.Type, err)
		}
	}
	return nil
}

// checkRecord reads the record, and that its addresses are held.
func (p *Plugin) checkRecord(ctx context.Context, env *Env, c *Config) (node.Endpoint, error) {
	var e node.Endpoint
	db, err := node.OpenReadOnly(ctx, c.StateDir, c.nodeOptions())
	if errors.Is(err, node.ErrNoDatabase) {
		return e, fail(codeUnknown, "container %s is not attached to %s by %s", env.ContainerID, c.Name, env.IfName)
	}
	if err != nil {
		return e, err
	}
	defer db.Close()
	err = db.View(func(tx *node.Tx) (err error) {
		if e, err = tx.Endpoint(env.key(c)); err != nil {
			return err
		}
		if e.IPAM != ipam.Name {
			return nil
		}
		for _, a := range e.Addrs {
			if owner, err := tx.Owner(a); err != nil || owner != e.Key {
				return differs("address %s is not held by this attachment", a)
			}
		}
		return nil
	})
	if errors.Is(err, node.ErrNotFound) {
		err = fail(codeUnknown, "container %s is not attached to %s by %s", env.ContainerID, c.Name, env.IfName)
	}
	return e, err
}

// checkPrev compares the record with what ADD had answered. Calico's plugin, as which an adopted pod's ADD was answered, used to
// name the host's end alone.
func checkPrev(env *Env, c *Config, e node.Endpoint) error {
	found := false
	for _, i := range c.prev.Interfaces {
		found = found || i.Name == env.IfName && i.Sandbox != "" || e.Adopted && i.Name == e.HostIfName
	}
	if !found {
		return differs("prevResult has no interface %s in the container", env.IfName)
	}
	for _, a := range e.Addrs {
		ok := false
		for _, ip := range c.prev.IPs {
			ok = ok || ip.Address.IP.Equal(net.IP(a.AsSlice()))
		}
		if !ok {
			return differs("prevResult lacks address %s", a)
		}
	}
	return nil
}

func checkPod(s *sides, e node.Endpoint) error {
	l, err := s.pod.LinkByName(e.IfName)
	if err != nil {
		return differs("interface %s is not in the container: %s", e.IfName, err)
	}
	switch attrs := l.Attrs(); {
	case l.Type() != "veth":
		return differs("interface %s in the container is a %s, not a veth", e.IfName, l.Type())
	case attrs.Flags&net.FlagUp == 0:
		return differs("interface %s in the container is down", e.IfName)
	case attrs.MTU != e.MTU:
		return differs("interface %s in the container has MTU %d, not %d", e.IfName, attrs.MTU, e.MTU)
	}
	addrs, err := nl.Dump(func() ([]netlink.Addr, error) { return s.pod.AddrList(l, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("list addresses in the container: %w", err)
	}
	for _, a := range e.Addrs {
		if !slices.ContainsFunc(addrs, func(x netlink.Addr) bool { return x.IP.Equal(net.IP(a.AsSlice())) }) {
			return differs("interface %s in the container lacks address %s", e.IfName, a)
		}
	}
	// The kernel drops an interface's neighbour entries when its MAC address changes; until they are there again the gateway
	// answers ARP.
	same := l.Attrs().HardwareAddr.String() == e.MAC
	for _, gw := range gateways(e.Addrs) {
		if err := checkGateway(s.pod, l.Attrs().Index, gw, same); err != nil {
			return err
		}
	}
	return nil
}

// checkGateway wants a route to the gateway by this interface, and a default route by it from some interface of the pod:
// the first one has it.
func checkGateway(h *netlink.Handle, index int, gw netip.Addr, neighbour bool) error {
	routes, err := nl.Dump(func() ([]netlink.Route, error) { return h.RouteList(nil, family(gw)) })
	if err != nil {
		return fmt.Errorf("list routes in the container: %w", err)
	}
	if !slices.ContainsFunc(routes, func(r netlink.Route) bool {
		return r.LinkIndex == index && r.Dst != nil && r.Dst.IP.Equal(net.IP(gw.AsSlice()))
	}) {
		return differs("the container has no route to %s by this interface", gw)
	}
	if !slices.ContainsFunc(routes, isDefault) {
		return differs("the container has no default route by %s", gw)
	}
	if !neighbour {
		return nil
	}
	neighbours, err := nl.Dump(func() ([]netlink.Neigh, error) { return h.NeighList(index, family(gw)) })
	if err != nil {
		return fmt.Errorf("list neighbours in the container: %w", err)
	}
	if !slices.ContainsFunc(neighbours, func(n netlink.Neigh) bool {
		return n.IP.Equal(net.IP(gw.AsSlice())) && n.State&netlink.NUD_PERMANENT != 0
	}) {
		return differs("the container has no permanent neighbour entry for %s", gw)
	}
	return nil
}

// checkHost checks the host's end and returns its ifindex.
func checkHost(s *sides, e node.Endpoint) (int, error) {
	l, err := s.host.LinkByName(e.HostIfName)
	if err != nil {
		return 0, differs("interface %s is not on the host: %s", e.HostIfName, err)
	}
	if l.Attrs().Flags&net.FlagUp == 0 {
		return 0, differs("interface %s on the host is down", e.HostIfName)
	}
	for _, a := range e.Addrs {
		routes, err := s.host.RouteGetWithOptions(a.AsSlice(), nil)
		if err != nil || len(routes) == 0 || routes[0].LinkIndex != l.Attrs().Index || routes[0].Type != unix.RTN_UNICAST {
			return 0, differs("the host does not route %s to %s", a, e.HostIfName)
		}
	}
	return l.Attrs().Index, nil
}
