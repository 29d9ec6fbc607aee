package cni

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/nl"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
)

// MasqueradePorts are the ports that masqueraded flows leave from unless an agent is told others: behind those that Linux
// gives to the host's own connections (ip_local_port_range).
var MasqueradePorts = maps.Ports{First: 61000, Last: 65535}

// openOutside makes the node masquerade, unless it does: a pod that wants it puts the programs onto the interfaces with a
// default route. What changes there later the settler of a later ADD follows, or an agent does at once.
func (a *adding) openOutside(m *maps.Maps) error {
	state, err := m.State()
	if err != nil {
		return err
	}
	uplinks, err := m.Uplinks()
	if err != nil || state.NATPorts != (maps.Ports{}) && len(uplinks) > 0 {
		return err
	}
	if err := followOutside(a.sides.host, m, a.c.BPFFSDir, uplinks); err != nil || state.NATPorts != (maps.Ports{}) {
		return err
	}
	return m.SetNATPorts(MasqueradePorts)
}

// followOutside puts the programs onto the interfaces with a default route that are not among the uplinks there yet,
// replaces addresses that an interface has lost, and forgets interfaces that are gone. Others without a default route stay:
// they may be an agent's. Callers hold the node lock.
func followOutside(h *netlink.Handle, m *maps.Maps, bpffs string, there map[uint32]maps.Uplink) error {
	defaults, err := DefaultUplinks(h)
	if err != nil {
		return err
	}
	for name, index := range defaults {
		old, attached := there[uint32(index)]
		u, err := UplinkAddresses(h, index, old.IPv4, old.IPv6)
		if err != nil {
			return err
		}
		if !attached { // before the entry, which says that it is done
			if err := loader.AttachNet(bpffs, name, index); err != nil {
				return err
			}
		}
		if !attached || u != old {
			if err := m.PutUplink(uint32(index), u); err != nil {
				return err
			}
		}
	}
	for index := range there {
		if _, err := nl.Name(int(index)); !errors.Is(err, unix.ENODEV) {
			continue
		}
		if err := m.RemoveUplink(index); err != nil {
			return err
		}
	}
	names, err := loader.Uplinks(bpffs)
	if err != nil {
		return err
	}
	for _, name := range names {
		if !gone(name) {
			continue
		}
		if err := loader.DetachNet(bpffs, name); err != nil {
			return err
		}
	}
	return nil
}

// WaysOut finds, by name, the interfaces that carry Ethernet frames out of the pools: those that routes of the main table lead to, but
// for routes into a pool. Others names those that carry none, such as tunnels of the network layer, since the programs can't read what
// leaves by them, and those without an address of the route's family, which masqueraded packets would need.
func WaysOut(h *netlink.Handle, pools []netip.Prefix) (found map[string]int, others []string, err error) {
	links, err := nl.Dump(h.LinkList)
	if err != nil {
		return nil, nil, fmt.Errorf("list interfaces: %w", err)
	}
	found = make(map[string]int)
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		addrs, err := nl.Dump(func() ([]netlink.Addr, error) { return h.AddrList(nil, family) })
		if err != nil {
			return nil, nil, fmt.Errorf("list addresses: %w", err)
		}
		addressed := make(map[int]bool)
		for _, a := range addrs {
			addressed[a.LinkIndex] = addressed[a.LinkIndex] || !a.IP.IsLinkLocalUnicast()
		}
		routes, err := nl.Dump(func() ([]netlink.Route, error) {
			return h.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return nil, nil, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			to, _ := nl.Prefix(r.Dst)
			if r.Type != unix.RTN_UNICAST || r.Protocol == RouteProtocol || to.Addr().IsLinkLocalUnicast() || to.Addr().IsMulticast() ||
				slices.ContainsFunc(pools, func(p netip.Prefix) bool { return p.Bits() <= to.Bits() && p.Contains(to.Addr()) }) {
				continue
			}
			for _, hop := range append(r.MultiPath, &netlink.NexthopInfo{LinkIndex: r.LinkIndex}) {
				for _, l := range links {
					switch at := l.Attrs(); {
					case at.Index != hop.LinkIndex || at.Group == LinkGroup || at.Flags&net.FlagLoopback != 0:
					case at.EncapType == "ether" && addressed[at.Index]:
						found[at.Name] = at.Index
					case !slices.Contains(others, at.Name):
						others = append(others, at.Name)
					}
				}
			}
		}
	}
	others = slices.DeleteFunc(others, func(name string) bool { _, is := found[name]; return is })
	return found, others, nil
}

// DefaultUplinks finds the interfaces with a default route in the main table: name -> ifindex. families are netlink.FAMILY_V4
// and FAMILY_V6; none: both.
func DefaultUplinks(h *netlink.Handle, families ...int) (map[string]int, error) {
	if len(families) == 0 {
		families = []int{netlink.FAMILY_V4, netlink.FAMILY_V6}
	}
	found := make(map[string]int)
	for _, family := range families {
		routes, err := nl.Dump(func() ([]netlink.Route, error) {
			return h.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST)
		})
		if err != nil {
			return nil, fmt.Errorf("list default routes: %w", err)
		}
		for _, r := range routes {
			indexes := []int{r.LinkIndex}
			for _, hop := range r.MultiPath {
				indexes = append(indexes, hop.LinkIndex)
			}
			for _, index := range indexes {
				if index == 0 || r.Type != unix.RTN_UNICAST {
					continue
				}
				l, err := h.LinkByIndex(index)
				if nl.IsNotFound(err) {
					continue
				}
				if err != nil {
					return nil, fmt.Errorf("interface of the default route: %w", err)
				}
				found[l.Attrs().Name] = index
			}
		}
	}
	return found, nil
}

// UplinkAddresses are the addresses that masqueraded packets leave an interface with: the preferred ones where it has them,
// else its first of global scope that is not to be given up.
func UplinkAddresses(h *netlink.Handle, index int, prefer4, prefer6 netip.Addr) (u maps.Uplink, err error) {
	list, err := nl.Dump(func() ([]netlink.Addr, error) {
		return h.AddrList(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: index}}, netlink.FAMILY_ALL)
	})
	if err != nil {
		return u, fmt.Errorf("list addresses of interface %d: %w", index, err)
	}
	const passing = unix.IFA_F_DEPRECATED | unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED | unix.IFA_F_TEMPORARY
	for _, x := range list {
		a, ok := netip.AddrFromSlice(x.IP)
		a = a.Unmap()
		into, prefer := &u.IPv4, prefer4
		if a.Is6() {
			into, prefer = &u.IPv6, prefer6
		}
		if ok && x.Scope == unix.RT_SCOPE_UNIVERSE && (a == prefer || !into.IsValid() && x.Flags&passing == 0) {
			*into = a
		}
	}
	return u, nil
}
