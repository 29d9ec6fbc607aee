package bgp

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/caracal-net/caracal/bgp"
)

// meshPeers are the peers of router n in a full mesh of count: of two, the one with the larger number dials.
func meshPeers(n, count int) []bgp.Peer {
	var all []bgp.Peer
	for i := 1; i <= count; i++ {
		if i != n {
			p := to(i, ourAS)
			p.Passive = n < i
			all = append(all, p)
		}
	}
	return all
}

func TestMesh(t *testing.T) {
	t.Parallel()
	w, routers := newNetwork(t, 3)
	var speakers []*speaker
	join := func(r *router, count int) {
		s := r.speak(ourAS)
		s.setPeers(meshPeers(r.n, count)...)
		s.announce(block4(r.n), block6(r.n))
		speakers = append(speakers, s)
	}
	for _, r := range routers {
		join(r, len(routers))
	}
	all := func(count int) func() bool {
		return func() bool {
			for i, s := range speakers {
				for n := 1; n <= count; n++ {
					if n != i+1 && !s.has(block4(n), block6(n)) {
						return false
					}
				}
			}
			return true
		}
	}
	eventually(t, "all to know all", all(3))
	for _, s := range speakers {
		eventually(t, "everything from everybody", s.isSynced)
	}
	if got := speakers[0].route(block6(3)); got.NextHop != v6(3) || got.From != v4(3) {
		t.Errorf("learned %+v", got)
	}

	since, told := map[string]any{}, map[int]int{}
	for i, s := range speakers {
		told[i] = s.told()
		for _, p := range s.status().Peers {
			since[fmt.Sprint(i, p.Address)] = p.Since
		}
	}
	unchanged := func() {
		t.Helper()
		for i, s := range speakers[:3] {
			for _, p := range s.status().Peers {
				if at, old := since[fmt.Sprint(i, p.Address)]; old && fmt.Sprint(at) != fmt.Sprint(p.Since) {
					t.Errorf("speaker %d: the session with %s changed at %s", i+1, p.Address, p.Since)
				}
			}
		}
	}

	for i, s := range speakers {
		s.setPeers(meshPeers(i+1, 3)...)
		s.announce(block4(i+1), block6(i+1))
	}
	unchanged()

	// A fourth joins. It starts first, as a node does before the others hear of it.
	join(w.add(4), 4)
	for i, s := range speakers[:3] {
		s.setPeers(meshPeers(i+1, 4)...)
	}
	eventually(t, "all to know all four", all(4))
	unchanged()
	for i, s := range speakers[:3] {
		if got := s.told() - told[i]; got != 2 {
			t.Errorf("speaker %d: the Sink was called %d times for the fourth's two blocks", i+1, got)
		}
	}
}

// TestReflector: router 1 reflects between 2 and 3, which have no session with each other.
func TestReflector(t *testing.T) {
	t.Parallel()
	_, r := newNetwork(t, 3)
	reflector := r[0].speak(ourAS)
	clients := []bgp.Peer{to(2, ourAS), to(3, ourAS)}
	for i := range clients {
		clients[i].RouteReflectorClient, clients[i].ClusterID, clients[i].Kind = true, v4(1), bgp.Node
	}
	reflector.setPeers(clients...)
	reflector.announce(block4(1))
	var speakers []*speaker
	for _, router := range r[1:] {
		s := router.speak(ourAS)
		p := to(1, ourAS)
		p.Kind, p.Passive = bgp.Global, true
		s.setPeers(p)
		s.announce(block4(router.n), block6(router.n))
		speakers = append(speakers, s)
	}
	eventually(t, "reflected routes", func() bool {
		return speakers[0].has(block4(1), block4(3), block6(3)) && speakers[1].has(block4(1), block4(2), block6(2))
	})
	if got := speakers[0].route(block4(3)); got.From != v4(1) || got.NextHop != v4(3) {
		t.Errorf("learned %+v", got)
	}
	if got := speakers[0].route(block6(3)); got.NextHop != v6(3) {
		t.Errorf("learned %+v", got)
	}
	if got := speakers[0].status(); len(got.Routes) != 3 || len(got.Peers) != 1 || got.Peers[0].Kind.String() != "global" {
		t.Errorf("client: %+v", got)
	}
	// What a client announces comes back to nobody as a foreign route.
	for _, s := range append(speakers, reflector) {
		if s.alarmed(bgp.ForeignOrigin) {
			t.Error("an alarm about an own block")
		}
	}

	// As the next hop of all that it passes on.
	for i := range clients {
		clients[i].NextHopSelf = true
	}
	reflector.setPeers(clients...)
	eventually(t, "the reflector as next hop", func() bool {
		return speakers[0].route(block4(3)).NextHop == v4(1) && speakers[0].route(block6(3)).NextHop == v6(1)
	})

	// A client dies for good: its routes go everywhere after its restart time, and not before.
	speakers[1].kill()
	eventually(t, "the session to break", func() bool { return !reflector.up(v4(3)) })
	if !speakers[0].has(block4(3)) {
		t.Error("a route was withdrawn at once")
	}
	eventually(t, "the withdrawals", func() bool { return !speakers[0].has(block4(3)) && !speakers[0].has(block6(3)) })
}

// TestTransit: 2 and 3 are in other systems and hear of each other through 1.
func TestTransit(t *testing.T) {
	t.Parallel()
	_, r := newNetwork(t, 3)
	s := r[0].speak(ourAS)
	three := to(3, theirAS+1)
	three.Export = []bgp.Filter{{Prefix: netip.MustParsePrefix("10.10.0.0/16"), Min: 26, Max: 26, Action: bgp.Accept}, {Prefix: netip.MustParsePrefix("2001:db8::/32"), Min: 32, Max: 128}}
	s.setPeers(to(2, theirAS), three)
	s.announce(block4(1))
	var speakers []*speaker
	for _, router := range r[1:] {
		s := router.speak(theirAS + uint32(router.n) - 2)
		p := to(1, ourAS)
		p.Passive = true
		s.setPeers(p)
		s.announce(block4(router.n), block6(router.n))
		speakers = append(speakers, s)
	}
	eventually(t, "routes of the others", func() bool {
		return speakers[0].has(block4(1), block4(3), block6(3)) && speakers[1].has(block4(1), block4(2))
	})
	if got := speakers[0].route(block4(3)); fmt.Sprint(got.ASPath) != "[64512 64514]" || got.NextHop != v4(1) {
		t.Errorf("learned %+v", got)
	}
	if got := speakers[0].route(block6(3)); got.NextHop != v6(1) {
		t.Errorf("learned %+v", got)
	}
	if speakers[1].has(block6(2)) {
		t.Error("the export filter let something through")
	}

	// What others told us is taken back, and our own stays.
	three.Export = []bgp.Filter{with(in("0.0.0.0/0"), func(f *bgp.Filter) { f.FromPeers = true })}
	since := s.peer(v4(3)).Since
	s.setPeers(to(2, theirAS), three)
	eventually(t, "the filter's work", func() bool { return speakers[1].has(block4(1), block6(2)) && !speakers[1].has(block4(2)) })
	if !speakers[0].has(block4(1), block4(3), block6(3)) || s.peer(v4(3)).Since != since {
		t.Error("another peer's routes, or the session, were lost")
	}
}
