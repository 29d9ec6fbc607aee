// Package fib lists and removes the kernel routes of one routing protocol (rtm_protocol, rtnetlink(7)).
package fib

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/nl"
)

// Routes lists the prefixes that have a route of the protocol in any table, of both families, sorted.
func Routes(protocol int) ([]netip.Prefix, error) {
	routes, err := list(protocol)
	var prefixes []netip.Prefix
	for _, r := range routes {
		prefixes = append(prefixes, prefix(r))
	}
	slices.SortFunc(prefixes, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
	return slices.Compact(prefixes), err
}

// Remove removes all routes of the protocol, of both families, in all tables. It goes on after an error and returns all.
func Remove(protocol int) error {
	routes, err := list(protocol)
	errs := []error{err}
	for _, r := range routes {
		if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("remove route to %s: %w", prefix(r), err))
		}
	}
	return errors.Join(errs...)
}

func list(protocol int) ([]netlink.Route, error) {
	want := &netlink.Route{Protocol: netlink.RouteProtocol(protocol), Table: unix.RT_TABLE_UNSPEC}
	var all []netlink.Route
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		routes, err := nl.Dump(func() ([]netlink.Route, error) {
			return netlink.RouteListFiltered(family, want, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return all, fmt.Errorf("list routes: %w", err)
		}
		all = append(all, routes...)
	}
	return all, nil
}

func prefix(r netlink.Route) netip.Prefix {
	if r.Dst == nil {
		if r.Family == unix.AF_INET6 {
			return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	a, _ := netip.AddrFromSlice(r.Dst.IP)
	bits, _ := r.Dst.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), bits)
}
