package maps

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/caracal-net/caracal/bpf"
)

// RouteKind is how a prefix is reached.
type RouteKind uint8

const (
	RouteLocalPod  = RouteKind(bpf.DataplaneRouteKindROUTE_LOCAL_POD)
	RouteHost      = RouteKind(bpf.DataplaneRouteKindROUTE_HOST)
	RouteRemote    = RouteKind(bpf.DataplaneRouteKindROUTE_REMOTE)
	RouteTunnel    = RouteKind(bpf.DataplaneRouteKindROUTE_TUNNEL)
	RoutePool      = RouteKind(bpf.DataplaneRouteKindROUTE_POOL)
	RouteStack     = RouteKind(bpf.DataplaneRouteKindROUTE_STACK)
	RouteBlackhole = RouteKind(bpf.DataplaneRouteKindROUTE_BLACKHOLE)
)

var routeKinds = map[RouteKind]string{
	RouteLocalPod: "local-pod", RouteHost: "host", RouteRemote: "remote", RouteTunnel: "tunnel",
	RoutePool: "pool", RouteStack: "stack", RouteBlackhole: "blackhole",
}

// String is the kind's word.
func (k RouteKind) String() string {
	if s, ok := routeKinds[k]; ok {
		return s
	}
	return fmt.Sprintf("kind-%d", uint8(k))
}

// MarshalText writes the kind's word.
func (k RouteKind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// Route is an entry of caracal_routes.
type Route struct {
	Prefix  netip.Prefix `json:"prefix"`
	Kind    RouteKind    `json:"kind"`
	IfIndex uint32       `json:"ifindex,omitempty"` // 0: none
	NextHop netip.Addr   `json:"nextHop,omitzero"`  // zero: none
	MTU     uint16       `json:"mtu,omitempty"`     // bytes; 0, or more than it: the interface's when a flow is judged
	InPool  bool         `json:"inPool,omitempty"`  // a remote prefix inside the pools: never masqueraded
	Node    bool         `json:"node,omitempty"`    // another host's own address: it may speak for itself in the tunnel
}

const ( // ROUTE_*
	flagInPool = 1
	flagNode   = 2
)

// PutRoute writes a route, over one that the prefix has.
func (m *Maps) PutRoute(r Route) error {
	value := bpf.DataplaneRoute{Kind: bpf.DataplaneRouteKind(r.Kind), Ifindex: r.IfIndex, Mtu: r.MTU}
	if r.InPool {
		value.Flags |= flagInPool
	}
	if r.Node {
		value.Flags |= flagNode
	}
	if r.NextHop.IsValid() {
		value.NextHop = Address(r.NextHop)
	}
	if err := m.routes.Put(prefixKey(r.Prefix), &value); err != nil {
		return fmt.Errorf("write route %s: %w", r.Prefix, full(err))
	}
	return nil
}

// Route finds the longest prefix that covers all of p, and returns its route as one of p: an LPM lookup does not say
// which prefix matched. ErrNotFound when there is none.
func (m *Maps) Route(p netip.Prefix) (Route, error) {
	var value bpf.DataplaneRoute
	if err := m.routes.Lookup(prefixKey(p), &value); err != nil {
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return Route{}, fmt.Errorf("route to %s: %w", p, ErrNotFound)
		}
		return Route{}, fmt.Errorf("read route to %s: %w", p, err)
	}
	return decodeRoute(p, &value), nil
}

// RemoveRoute removes the route of exactly this prefix. None there is not an error.
func (m *Maps) RemoveRoute(p netip.Prefix) error {
	if err := remove(m.routes, prefixKey(p)); err != nil {
		return fmt.Errorf("remove route %s: %w", p, err)
	}
	return nil
}

// Routes lists all routes, IPv4 first, by prefix.
func (m *Maps) Routes() ([]Route, error) {
	var (
		routes []Route
		key    bpf.DataplanePrefix
		value  bpf.DataplaneRoute
	)
	entries := m.routes.Iterate()
	for entries.Next(&key, &value) {
		routes = append(routes, decodeRoute(prefix(key), &value))
	}
	if err := entries.Err(); err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	slices.SortFunc(routes, func(a, b Route) int {
		return cmp.Or(a.Prefix.Addr().Compare(b.Prefix.Addr()), cmp.Compare(a.Prefix.Bits(), b.Prefix.Bits()))
	})
	return routes, nil
}

// ParseRouteKind is the inverse of String.
func ParseRouteKind(s string) (RouteKind, error) {
	for k, name := range routeKinds {
		if strings.EqualFold(name, s) {
			return k, nil
		}
	}
	return 0, fmt.Errorf("route kind %q: not one of them", s)
}

// prefixKey and prefix turn a prefix into the key of an LPM trie, and back.
func prefixKey(p netip.Prefix) bpf.DataplanePrefix {
	bits := p.Bits()
	if p.Addr().Is4() {
		bits += 96
	}
	return bpf.DataplanePrefix{Prefixlen: uint32(bits), Address: Address(p.Addr())}
}

func prefix(k bpf.DataplanePrefix) netip.Prefix {
	a, bits := netip.AddrFrom16(k.Address), int(k.Prefixlen)
	if a.Is4In6() && bits >= 96 {
		return netip.PrefixFrom(a.Unmap(), bits-96)
	}
	return netip.PrefixFrom(a, bits)
}

func decodeRoute(p netip.Prefix, v *bpf.DataplaneRoute) Route {
	return Route{
		Prefix: p, Kind: RouteKind(v.Kind), IfIndex: v.Ifindex, NextHop: FromAddress(v.NextHop), MTU: v.Mtu,
		InPool: v.Flags&flagInPool != 0, Node: v.Flags&flagNode != 0,
	}
}
