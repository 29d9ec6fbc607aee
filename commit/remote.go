package commit

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/caracal-net/caracal/maps"
)

var (
	// ErrOwn says that a prefix is one of this node's own: a pod's address, the host's, or a block.
	ErrOwn = errors.New("prefix is this node's own")
	// ErrNotRemote says that a route is not one to other nodes.
	ErrNotRemote = errors.New("not a route to other nodes")
)

// SetRemote makes the routes to other nodes (kinds remote, tunnel, pool, stack) equal to what is given, writing differences only,
// and raises the epoch once if that changed any. Of two routes with one prefix the last counts. What this node has of its
// own is never replaced: such routes are left out and reported as ErrOwn, the others written. maps.ErrFull when they don't
// fit; then those that are in the map stay. ErrNotRemote: nothing was changed.
func SetRemote(m *maps.Maps, remote []maps.Route) (err error) {
	wanted := make(map[netip.Prefix]maps.Route, len(remote))
	for _, r := range remote {
		r, err := normal(r)
		if err != nil {
			return err
		}
		wanted[r.Prefix] = r
	}
	present, err := m.Routes()
	if err != nil {
		return err
	}
	var errs []error
	var unwanted []netip.Prefix
	for _, r := range present {
		w, want := wanted[r.Prefix]
		switch {
		case !isRemote(r.Kind):
			if want {
				errs = append(errs, fmt.Errorf("route %s: %w", r.Prefix, ErrOwn))
				delete(wanted, r.Prefix)
			}
		case !want:
			unwanted = append(unwanted, r.Prefix)
		case r == w:
			delete(wanted, r.Prefix)
		}
	}
	if len(wanted) == 0 && len(unwanted) == 0 {
		return errors.Join(errs...)
	}
	// New ones first, so that a prefix that is split or joined is never without a route; unless that takes too much room.
	missing := len(wanted)
	err = putAll(m, wanted)
	for _, p := range unwanted {
		errs = append(errs, m.RemoveRoute(p))
	}
	if errors.Is(err, maps.ErrFull) && len(unwanted) > 0 {
		err = putAll(m, wanted)
	}
	errs = append(errs, err)
	if len(wanted) < missing || len(unwanted) > 0 {
		_, err := m.RaiseEpoch()
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// putAll writes routes and takes those that it wrote out of the set.
func putAll(m *maps.Maps, routes map[netip.Prefix]maps.Route) error {
	for p, r := range routes {
		if err := m.PutRoute(r); err != nil {
			return err
		}
		delete(routes, p)
	}
	return nil
}

// PutRemote writes one route to other nodes, and raises the epoch if that changes where any packet goes. ErrOwn,
// ErrNotRemote, maps.ErrFull: nothing was changed.
func PutRemote(m *maps.Maps, r maps.Route) error {
	r, err := normal(r)
	if err != nil {
		return err
	}
	got, err := m.Route(r.Prefix)
	if err != nil && !errors.Is(err, maps.ErrNotFound) {
		return err
	}
	if err == nil {
		own, err := isOwn(m, got)
		if err != nil {
			return err
		}
		if own {
			return fmt.Errorf("route %s: %w", r.Prefix, ErrOwn)
		}
	}
	if err := m.PutRoute(r); err != nil {
		return err
	}
	if got == r {
		return nil // it was there, or what covers it says the same
	}
	_, err = m.RaiseEpoch()
	return err
}

// isOwn tells whether what Route has found for a prefix is the node's own route of just that prefix. A lookup answers with
// whatever covers the prefix; but only single addresses are of the host or of pods, and no block lies in another.
func isOwn(m *maps.Maps, got maps.Route) (bool, error) {
	switch got.Kind {
	case maps.RouteHost, maps.RouteLocalPod:
		return true, nil
	case maps.RouteBlackhole:
		wider, err := got.Prefix.Addr().Prefix(got.Prefix.Bits() - 1)
		if err != nil {
			return true, nil // a block of all addresses
		}
		around, err := m.Route(wider)
		if errors.Is(err, maps.ErrNotFound) {
			return true, nil
		}
		return around.Kind != maps.RouteBlackhole, err
	}
	return false, nil
}

// RemoveRemote removes the route to other nodes of exactly this prefix, and raises the epoch if there was one. What this
// node has of its own stays.
func RemoveRemote(m *maps.Maps, p netip.Prefix) error {
	got, err := m.Route(p.Masked())
	if errors.Is(err, maps.ErrNotFound) {
		return nil
	}
	if err != nil || !isRemote(got.Kind) {
		return err
	}
	if err := m.RemoveRoute(p.Masked()); err != nil {
		return err
	}
	_, err = m.RaiseEpoch()
	return err
}

// normal checks a route to other nodes and returns it as the map would.
func normal(r maps.Route) (maps.Route, error) {
	if !isRemote(r.Kind) || !r.Prefix.IsValid() || r.Prefix.Addr().Is4In6() || r.NextHop.Zone() != "" {
		return r, fmt.Errorf("route %s of kind %s by %s: %w", r.Prefix, r.Kind, r.NextHop, ErrNotRemote)
	}
	r.Prefix, r.NextHop = r.Prefix.Masked(), r.NextHop.Unmap()
	return r, nil
}

func isRemote(k maps.RouteKind) bool {
	return k == maps.RouteRemote || k == maps.RouteTunnel || k == maps.RoutePool || k == maps.RouteStack
}
