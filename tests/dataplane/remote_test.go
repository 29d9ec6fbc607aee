package dataplane

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"testing"

	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
)

func remoteRoute(prefix, hop string) maps.Route {
	return maps.Route{Prefix: netip.MustParsePrefix(prefix), Kind: maps.RouteRemote, IfIndex: 1, NextHop: netip.MustParseAddr(hop), MTU: 1400}
}

// remotes are the routes to other nodes in the map.
func (n *node) remotes() []string {
	n.t.Helper()
	all, err := n.maps.Routes()
	if err != nil {
		n.t.Fatal(err)
	}
	var out []string
	for _, r := range all {
		if r.Kind == maps.RouteRemote || r.Kind == maps.RouteTunnel || r.Kind == maps.RoutePool {
			out = append(out, r.Kind.String()+" "+r.Prefix.String()+" "+r.NextHop.String())
		}
	}
	return out
}

func TestRemoteRoutes(t *testing.T) {
	n := newNode(t, loader.Config{})
	a := n.quietPod("a", 1)
	own := netip.MustParsePrefix("10.65.0.0/26")
	node := func(blocks ...netip.Prefix) {
		t.Helper()
		if err := commit.SetNode(n.maps, []netip.Addr{outside}, blocks); err != nil {
			t.Fatal(err)
		}
	}
	node(own)
	// raises fails unless fn raises the epoch so often and returns this error.
	raises := func(times uint32, want error, fn func() error) {
		t.Helper()
		before := n.state().Epoch
		if err := fn(); !errors.Is(err, want) || want == nil && err != nil {
			t.Errorf("error %v, want %v", err, want)
		}
		if got := n.state().Epoch - before; got != times {
			t.Errorf("the epoch was raised %d times, want %d", got, times)
		}
	}
	want := func(routes ...string) {
		t.Helper()
		if got := n.remotes(); !slices.Equal(got, routes) {
			t.Errorf("routes %q, want %q", got, routes)
		}
		if r, err := n.maps.Route(netip.PrefixFrom(a.v4, 32)); err != nil || r.Kind != maps.RouteLocalPod {
			t.Errorf("the pod's route is %+v (%v)", r, err)
		}
		if r, err := n.maps.Route(own); err != nil || r.Kind != maps.RouteBlackhole {
			t.Errorf("the block's route is %+v (%v)", r, err)
		}
	}
	set := func(routes ...maps.Route) func() error {
		return func() error { return commit.SetRemote(n.maps, routes) }
	}
	put := func(r maps.Route) func() error { return func() error { return commit.PutRemote(n.maps, r) } }
	remove := func(p string) func() error {
		return func() error { return commit.RemoveRemote(n.maps, netip.MustParsePrefix(p)) }
	}
	two, six := remoteRoute("10.65.2.0/26", "198.51.100.2"), remoteRoute("2001:db8:0:2::/122", "fe80::2")
	three := remoteRoute("10.65.3.0/26", "198.51.100.3")
	wide := remoteRoute("10.65.0.0/25", "198.51.100.2")
	pool := maps.Route{Prefix: netip.MustParsePrefix("10.65.0.0/16"), Kind: maps.RoutePool}

	raises(0, nil, set())
	raises(1, nil, set(two, six, pool))
	want("pool 10.65.0.0/16 invalid IP", "remote 10.65.2.0/26 198.51.100.2", "remote 2001:db8:0:2::/122 fe80::2")
	raises(0, nil, set(pool, six, two))
	moved := two
	moved.NextHop = three.NextHop
	raises(1, nil, set(moved, three, pool))
	want("pool 10.65.0.0/16 invalid IP", "remote 10.65.2.0/26 198.51.100.3", "remote 10.65.3.0/26 198.51.100.3")
	wider := remoteRoute("10.65.2.0/23", "198.51.100.3")
	raises(1, nil, set(wider))
	want("remote 10.65.2.0/23 198.51.100.3")

	// The node's own.
	raises(1, commit.ErrOwn, set(two, remoteRoute("10.65.0.0/26", "198.51.100.2"), remoteRoute("10.65.0.1/32", "198.51.100.2"), remoteRoute("192.0.2.1/32", "198.51.100.2")))
	want("remote 10.65.2.0/26 198.51.100.2")
	for _, p := range []string{"10.65.0.0/26", "10.65.0.1/32", "192.0.2.1/32"} {
		raises(0, commit.ErrOwn, put(remoteRoute(p, "198.51.100.2")))
		raises(0, nil, remove(p))
	}
	want("remote 10.65.2.0/26 198.51.100.2")
	raises(1, nil, put(remoteRoute("10.65.0.60/32", "198.51.100.2"))) // an address of the block that another node has borrowed
	raises(1, nil, remove("10.65.0.60/32"))

	raises(1, nil, put(remoteRoute("10.65.0.32/27", "198.51.100.2"))) // half of the block
	raises(1, nil, remove("10.65.0.32/27"))
	node(own, netip.MustParsePrefix("10.65.0.64/26")) // its neighbour in the tree
	raises(0, commit.ErrOwn, put(remoteRoute("10.65.0.64/26", "198.51.100.2")))
	raises(1, nil, set(two, wide))
	raises(0, commit.ErrOwn, put(remoteRoute("10.65.0.0/26", "198.51.100.2")))
	raises(1, nil, set(two))

	// A block that is given up can be another node's then.
	raises(0, commit.ErrInUse, func() error { return commit.RemoveBlock(n.maps, own) })
	raises(1, nil, func() error { return commit.RemoveBlock(n.maps, netip.MustParsePrefix("10.65.0.64/26")) })
	raises(0, nil, func() error { return commit.RemoveBlock(n.maps, netip.MustParsePrefix("10.65.0.64/26")) })
	raises(1, nil, put(remoteRoute("10.65.0.64/26", "198.51.100.2")))
	raises(1, nil, remove("10.65.0.64/26"))
	want("remote 10.65.2.0/26 198.51.100.2")

	// One by one.
	raises(0, nil, put(two))
	raises(1, nil, put(moved))
	raises(1, nil, put(wider)) // covers moved and says the same
	raises(1, nil, remove("10.65.2.0/26"))
	want("remote 10.65.2.0/23 198.51.100.3")
	raises(0, nil, put(moved)) // the same as what covers it
	want("remote 10.65.2.0/23 198.51.100.3", "remote 10.65.2.0/26 198.51.100.3")
	raises(0, nil, put(moved))
	raises(0, nil, remove("10.99.0.0/16"))

	// SetNode and pods leave them alone.
	node(own, netip.MustParsePrefix("10.65.1.0/26"))
	node(own)
	c := n.quietPod("c", 3)
	if err := commit.RemovePod(n.maps, c.commit); err != nil {
		t.Fatal(err)
	}
	want("remote 10.65.2.0/23 198.51.100.3", "remote 10.65.2.0/26 198.51.100.3")

	for _, bad := range []maps.Route{
		{Prefix: two.Prefix, Kind: maps.RouteLocalPod}, {Prefix: two.Prefix}, {Kind: maps.RouteRemote}, {Prefix: two.Prefix, Kind: maps.RouteHost},
		remoteRoute("::ffff:10.65.2.0/122", "198.51.100.2"), remoteRoute("2001:db8:0:2::/122", "fe80::2%up0"),
	} {
		raises(0, commit.ErrNotRemote, set(two, bad))
		raises(0, commit.ErrNotRemote, put(bad))
	}
	want("remote 10.65.2.0/23 198.51.100.3", "remote 10.65.2.0/26 198.51.100.3")
	raises(1, nil, set())
	want()
}

// A table that is full keeps what it has, says so, and makes room by what is no longer wanted.
func TestRemoteRoutesFull(t *testing.T) {
	n := newNode(t, loader.Config{})
	many := func(first, count uint32) []maps.Route {
		routes := make([]maps.Route, count)
		for i := range routes {
			var b [4]byte
			binary.BigEndian.PutUint32(b[:], 10<<24+(first+uint32(i))<<2)
			routes[i] = maps.Route{Prefix: netip.PrefixFrom(netip.AddrFrom4(b), 30), Kind: maps.RouteRemote, IfIndex: 1, NextHop: outside}
		}
		return routes
	}
	const size = 262144
	if err := commit.SetRemote(n.maps, many(0, size)); err != nil {
		t.Fatal(err)
	}
	before := n.state().Epoch
	if err := commit.PutRemote(n.maps, many(size, 1)[0]); !errors.Is(err, maps.ErrFull) {
		t.Errorf("one more: %v", err)
	}
	if err := commit.SetRemote(n.maps, many(0, size+1)); !errors.Is(err, maps.ErrFull) {
		t.Errorf("one more of all: %v", err)
	}
	if got := n.state().Epoch; got != before {
		t.Errorf("the epoch went from %d to %d", before, got)
	}
	if got := len(n.remotes()); got != size {
		t.Errorf("%d routes, want %d", got, size)
	}
	if err := commit.SetRemote(n.maps, many(1000, size)); err != nil {
		t.Errorf("others instead of some: %v", err)
	}
	if r, err := n.maps.Route(many(size+999, 1)[0].Prefix); err != nil || r.NextHop != outside {
		t.Errorf("the last is %+v (%v)", r, err)
	}
}
