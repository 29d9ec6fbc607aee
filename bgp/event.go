package bgp

import (
	"maps"
	"net/netip"
	"slices"
	"time"

	apipb "github.com/osrg/gobgp/v3/api"
)

// setPeers is SetPeers' part of run.
func (s *Speaker) setPeers(want map[netip.Addr]Peer, removed []Peer) {
	for _, p := range removed {
		s.mu.Lock()
		delete(s.peers, p.Address)
		s.mu.Unlock()
		s.forget(p.Address)
	}
	s.mu.Lock()
	for a, p := range want {
		if n := s.peers[a]; n != nil {
			n.Peer = p
			n.status.Kind = p.Kind
			continue
		}
		s.peers[a] = &peer{
			Peer:   p,
			status: PeerStatus{Address: a, Kind: p.Kind, ASN: p.ASN, State: "down", Since: time.Now(), Info: "Idle"},
			taken:  map[netip.Prefix]bool{}, over: map[netip.Prefix]bool{}, told: map[Alarm]time.Time{},
		}
	}
	s.mu.Unlock()
	s.configured = true
	s.checkSynced()
}

// event takes in one of GoBGP's events.
func (s *Speaker) event(e *apipb.WatchEventResponse) {
	if p := e.GetPeer(); p != nil {
		s.sessionEvent(addr(p.GetPeer().GetConf().GetNeighborAddress()), p.GetPeer().GetState().GetSessionState())
		return
	}
	for _, p := range e.GetTable().GetPaths() {
		n := s.peers[pathFrom(p)]
		if n == nil {
			continue // removed; what it had was forgotten then
		}
		if p.Nlri == nil {
			s.endOfRIB(n, p.GetFamily())
			continue
		}
		prefix, ok := pathPrefix(p)
		if !ok {
			continue
		}
		if p.IsWithdraw {
			// What policies reject comes as a withdrawal too, but with its attributes.
			if len(p.Pattrs) > 0 && !n.expects(prefix) {
				s.refuse(n, prefix)
			}
			s.heard(n, &path{Route: Route{Prefix: prefix}}, true)
			continue
		}
		s.heard(n, s.readPath(prefix, p), false)
	}
}

// sessionEvent takes in that a session is in another state.
func (s *Speaker) sessionEvent(a netip.Addr, state apipb.PeerState_SessionState) {
	n := s.peers[a]
	if n == nil {
		return
	}
	up := state == apipb.PeerState_ESTABLISHED
	word := "start"
	if up {
		word = "up"
	}
	s.mu.Lock()
	n.status.Info = sessionInfo(state, n.Passive)
	if n.status.State != word {
		n.status.State, n.status.Since = word, time.Now()
	}
	if up {
		n.status.LastError = ""
	}
	was := n.established
	if was && !up && n.status.LastError == "" {
		n.status.LastError = formatf("session with %s: the connection broke", a)
	}
	n.established = up
	s.mu.Unlock()
	switch {
	case up && !was:
		s.log.Info("BGP session is up", "peer", a, "as", n.ASN, "kind", n.Kind)
		n.pending = s.negotiated(a)
		s.checkSynced()
	case was && !up:
		s.log.Warn("BGP session is down", "peer", a, "as", n.ASN, "kind", n.Kind, "why", n.status.LastError)
	}
}

// negotiated are the families that both sides of a session carry and for which the peer sends End-of-RIB.
func (s *Speaker) negotiated(a netip.Addr) []*apipb.Family {
	var families []*apipb.Family
	_ = s.server.ListPeer(s.ctx, &apipb.ListPeerRequest{Address: a.String()}, func(p *apipb.Peer) {
		for _, c := range p.GetState().GetRemoteCap() {
			var m apipb.MultiProtocolCapability
			if c.UnmarshalTo(&m) != nil {
				continue
			}
			if slices.ContainsFunc(p.GetAfiSafis(), func(f *apipb.AfiSafi) bool { return sameFamily(f.GetConfig().GetFamily(), m.Family) }) {
				families = append(families, m.Family)
			}
		}
	})
	if families == nil {
		families = []*apipb.Family{family4} // a peer without the capability speaks IPv4
	}
	return families
}

func sameFamily(a, b *apipb.Family) bool {
	return a.GetAfi() == b.GetAfi() && a.GetSafi() == b.GetSafi()
}

// endOfRIB takes in that a peer has told all that it has of a family.
func (s *Speaker) endOfRIB(n *peer, f *apipb.Family) {
	before := len(n.pending)
	n.pending = slices.DeleteFunc(n.pending, func(p *apipb.Family) bool { return sameFamily(p, f) })
	if before > 0 && len(n.pending) == 0 {
		n.synced = true
		s.checkSynced()
	}
}

// checkSynced looks whether all peers have told everything once.
func (s *Speaker) checkSynced() {
	if s.configured && !slices.ContainsFunc(slices.Collect(maps.Values(s.peers)), func(n *peer) bool { return !n.synced }) {
		s.setSynced()
	}
}
