package bgp

import (
	"net/netip"
	"slices"
	"time"

	apipb "github.com/osrg/gobgp/v3/api"
	"google.golang.org/protobuf/types/known/anypb"
)

// Counts are numbers of prefixes of one address family.
type Counts struct {
	Received  int // by us, before filters
	Accepted  int // of these
	Announced int // to the peer; 0 while there is no session
}

// PeerStatus is how a session does.
type PeerStatus struct {
	Address    netip.Addr
	Kind       PeerKind
	ASN        uint32
	State      string    // as BIRD and calicoctl print it: "up", "start" while there is no session, "down" before SetPeers and Announce were both called
	Since      time.Time // when State became that
	Info       string    // "Established", "OpenConfirm", "OpenSent", "Active", "Connect", "Passive" or "Idle"
	LastError  string    // a sentence; "" since the session is up
	IPv4, IPv6 Counts
}

// peer is what is known of a configured peer.
type peer struct {
	Peer
	status      PeerStatus
	established bool
	pending     []*apipb.Family // End-of-RIB still to come in this session; nil and not synced: not known
	synced      bool            // all of it came once
	taken, over map[netip.Prefix]bool
	told        map[Alarm]time.Time
}

// Peers tells how all sessions do, sorted by address.
func (s *Speaker) Peers() []PeerStatus {
	neighbors := map[netip.Addr]*apipb.Peer{}
	_ = s.server.ListPeer(s.ctx, &apipb.ListPeerRequest{EnableAdvertised: true}, func(p *apipb.Peer) {
		neighbors[addr(p.GetConf().GetNeighborAddress())] = p
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []PeerStatus
	for a, n := range s.peers {
		st := n.status
		for _, f := range neighbors[a].GetAfiSafis() {
			counts, got := &st.IPv4, f.GetState()
			if got.GetFamily().GetAfi() == apipb.Family_AFI_IP6 {
				counts = &st.IPv6
			}
			counts.Received = int(got.GetReceived())
			if n.established {
				counts.Announced = int(got.GetAdvertised())
				if counts.Announced > 0 && sendsEndOfRIB(neighbors[a]) {
					counts.Announced-- // GoBGP counts it as a prefix
				}
			}
		}
		for prefix := range n.taken {
			if prefix.Addr().Is4() {
				st.IPv4.Accepted++
			} else {
				st.IPv6.Accepted++
			}
		}
		all = append(all, st)
	}
	slices.SortFunc(all, func(a, b PeerStatus) int { return a.Address.Compare(b.Address) })
	return all
}

// sendsEndOfRIB tells whether p takes part in graceful restart, and so is sent End-of-RIB.
func sendsEndOfRIB(p *apipb.Peer) bool {
	return slices.ContainsFunc(p.GetState().GetRemoteCap(), func(c *anypb.Any) bool {
		return c.MessageIs(&apipb.GracefulRestartCapability{})
	})
}

// sessionInfo is BIRD's word for a state of a session.
func sessionInfo(s apipb.PeerState_SessionState, passive bool) string {
	switch s {
	case apipb.PeerState_CONNECT:
		return "Connect"
	case apipb.PeerState_ACTIVE:
		if passive {
			return "Passive"
		}
		return "Active"
	case apipb.PeerState_OPENSENT:
		return "OpenSent"
	case apipb.PeerState_OPENCONFIRM:
		return "OpenConfirm"
	case apipb.PeerState_ESTABLISHED:
		return "Established"
	}
	return "Idle"
}
