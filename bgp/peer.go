package bgp

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"time"

	apipb "github.com/osrg/gobgp/v3/api"
)

// PeerKind says by which rule a node has a peer.
type PeerKind int

// The kinds of peers.
const (
	Mesh   PeerKind = iota // every node peers with every other
	Global                 // all nodes have this peer
	Node                   // this node has this peer
)

// String gives calicoctl's words.
func (k PeerKind) String() string {
	switch k {
	case Mesh:
		return "node-to-node mesh"
	case Global:
		return "global"
	case Node:
		return "node specific"
	}
	return fmt.Sprintf("kind %d", int(k))
}

// maxPassword is TCP_MD5SIG_MAXKEYLEN.
const maxPassword = 80

// Peer is a router to speak with. An IPv4 session carries IPv4 prefixes, and IPv6 ones when Config.NextHop6 is set; an
// IPv6 session carries IPv6 prefixes.
type Peer struct {
	Address netip.Addr
	Port    int    // that we dial; 0: DefaultPort
	ASN     uint32 // equal to ours: iBGP
	Kind    PeerKind
	Source  netip.Addr // our address of the session; zero: chosen by the kernel

	Password string // TCP MD5 (RFC 2385), at most 80 bytes; "": none
	Passive  bool   // the other side dials: of two mesh nodes only one does, so that sessions don't collide and flap

	RouteReflectorClient bool       // iBGP only: what other iBGP peers tell us is told to it, and the other way round
	ClusterID            netip.Addr // of the reflector; IPv4; zero: our router ID

	// Import and Export: the first filter that matches and does not continue decides. On import nothing but AllowedPrefixes and
	// what is inside them is accepted when no filter does, unless there are none; on export everything is.
	Import, Export  []Filter
	AllowedPrefixes []netip.Prefix

	Communities []string // added to all that we announce to it: "65001:100", or large ones "65001:1:2" (RFC 8092)
	TTLSecurity int      // at most so many hops away (RFC 5082), 1: a neighbour; 0: not checked
	MultiHop    int      // eBGP over so many hops; 0: neighbours only. iBGP has no such limit
	NextHopSelf bool     // we are the next hop also of what we pass on to an iBGP peer

	// MaxPrefixes limits how many prefixes we take from it, of both families together; 0: no limit. The ones that came first
	// are kept. One above the limit is not told to the Sink, not even when another peer has a worse path to it.
	MaxPrefixes  int
	AllowDefault bool // take 0.0.0.0/0 and ::/0 from it, if filters do

	KeepaliveTime time.Duration // 0: a third of the hold time
	HoldTime      time.Duration // 0: Config's
	RestartTime   time.Duration // 0: Config's
}

func (p Peer) port() int {
	if p.Port == 0 {
		return DefaultPort
	}
	return p.Port
}

// check validates p for a speaker of configuration c.
func (p Peer) check(c *Config) error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("peer %v: %w", p.Address, invalid(format, a...))
	}
	a := p.Address
	switch {
	case !a.IsValid() || a.Is4In6() || a.IsUnspecified() || a.IsMulticast():
		return bad("Address: want the IPv4 or IPv6 address of a router")
	case a.Zone() != "" || a.Is6() && a.IsLinkLocalUnicast():
		return bad("Address is of one link only; give the peer's global address")
	case p.Port < 0 || p.Port > 65535:
		return bad("Port %d: want 1 to 65535, or 0 for %d", p.Port, DefaultPort)
	case p.Kind < Mesh || p.Kind > Node:
		return bad("Kind %d: want Mesh, Global or Node", int(p.Kind))
	case p.Source.IsValid() && (p.Source.Is4() != a.Is4() || p.Source.Zone() != ""):
		return bad("Source %s: want an address of the same family as the peer's", p.Source)
	case p.Source == a:
		return bad("Source %s is the peer's own address", p.Source)
	case len(p.Password) > maxPassword:
		return bad("Password has %d bytes; TCP MD5 takes %d at most", len(p.Password), maxPassword)
	case p.Passive && c.ListenPort < 0:
		return bad("Passive while ListenPort is -1: nobody would ever dial; listen, or dial from here")
	case p.RouteReflectorClient && p.ASN != c.ASN:
		return bad("RouteReflectorClient of AS %d: only iBGP peers (AS %d) are reflected to", p.ASN, c.ASN)
	case p.ClusterID.IsValid() && !p.ClusterID.Is4():
		return bad("ClusterID %s: want it written as an IPv4 address", p.ClusterID)
	case p.TTLSecurity < 0 || p.TTLSecurity > 254:
		return bad("TTLSecurity %d: want 1 to 254 hops, or 0 for none", p.TTLSecurity)
	case p.MultiHop < 0 || p.MultiHop > 255:
		return bad("MultiHop %d: want 1 to 255 hops, or 0 for none", p.MultiHop)
	case p.TTLSecurity > 0 && p.MultiHop > 0:
		return bad("TTLSecurity and MultiHop exclude each other; TTLSecurity takes the number of hops too")
	case p.MaxPrefixes < 0:
		return bad("MaxPrefixes %d: want a positive number, or 0 for no limit", p.MaxPrefixes)
	}
	within := func(err error) error {
		if err == nil {
			return nil
		}
		return fmt.Errorf("peer %v: %w", p.Address, err)
	}
	if err := checkASN("ASN", p.ASN); err != nil {
		return within(err)
	}
	for i, f := range p.Import {
		if err := f.check(fmt.Sprintf("Import[%d]", i)); err != nil {
			return within(err)
		}
		if f.FromPeers {
			return bad("Import[%d]: FromPeers is for Export", i)
		}
	}
	for i, f := range p.Export {
		field := fmt.Sprintf("Export[%d]", i)
		if err := f.check(field); err != nil {
			return within(err)
		}
		// GoBGP would put it before our own, and peers in another AS want that first.
		if p.ASN != c.ASN && slices.ContainsFunc(f.Prepend, func(n uint32) bool { return n != c.ASN }) {
			return bad("%s: Prepend %d: to a peer in another AS only our own, %d, can be prepended", field, f.Prepend, c.ASN)
		}
	}
	for _, allowed := range p.AllowedPrefixes {
		if err := checkPrefix("AllowedPrefixes:", allowed); err != nil {
			return within(err)
		}
	}
	if _, _, err := parseCommunities(p.Communities); err != nil {
		return within(err)
	}
	hold := c.HoldTime
	if p.HoldTime != 0 {
		hold = p.HoldTime
	}
	if err := checkHoldTime(hold); err != nil {
		return within(err)
	}
	if k := p.KeepaliveTime; k != 0 && (k < time.Second || k%time.Second != 0 || k >= hold) {
		return bad("KeepaliveTime %s: want whole seconds, less than the hold time of %s", k, hold)
	}
	if p.RestartTime != 0 {
		return within(checkRestartTime(p.RestartTime))
	}
	return nil
}

// sameSession tells whether going from p to q leaves the session as it is.
func (p Peer) sameSession(q Peer) bool {
	for _, x := range []*Peer{&p, &q} {
		x.Kind, x.Import, x.Export, x.AllowedPrefixes, x.Communities = 0, nil, nil, nil, nil
		x.NextHopSelf, x.MaxPrefixes, x.AllowDefault = false, 0, false
		x.Port = x.port()
	}
	return reflect.DeepEqual(p, q)
}

// samePolicy tells whether routes to and from p and q are treated alike.
func (p Peer) samePolicy(q Peer) bool {
	return reflect.DeepEqual(p.Import, q.Import) && reflect.DeepEqual(p.Export, q.Export) && slices.Equal(p.AllowedPrefixes, q.AllowedPrefixes) &&
		slices.Equal(p.Communities, q.Communities) && p.NextHopSelf == q.NextHopSelf && p.AllowDefault == q.AllowDefault
}

// clone makes p independent of the caller's slices, but for those within filters, which nobody changes.
func (p Peer) clone() Peer {
	p.Import, p.Export = slices.Clone(p.Import), slices.Clone(p.Export)
	p.AllowedPrefixes, p.Communities = slices.Clone(p.AllowedPrefixes), slices.Clone(p.Communities)
	return p
}

// Check says what is wrong with a peer for this speaker. ErrInvalid.
func (s *Speaker) Check(p Peer) error { return p.check(&s.config) }

// SetPeers makes the set of peers equal to the given one: it adds, changes and removes only what differs. Sessions of
// unchanged peers stay up, and so do those of which only filters, limits, communities or the next hop change.
// Nothing is changed when a peer is invalid. Peers shows the new set a moment later.
func (s *Speaker) SetPeers(peers []Peer) error {
	want := map[netip.Addr]Peer{}
	for _, p := range peers {
		if err := p.check(&s.config); err != nil {
			return err
		}
		if _, twice := want[p.Address]; twice {
			return fmt.Errorf("peer %s: %w", p.Address, invalid("Address is there twice; a peer has one session"))
		}
		want[p.Address] = p.clone()
	}
	s.admin.Lock()
	defer s.admin.Unlock()
	if s.closed {
		return ErrClosed
	}
	before := s.wanted
	var add, reset, remove []Peer
	for a, p := range before {
		if q, stays := want[a]; !stays || !p.sameSession(q) {
			remove = append(remove, p)
		}
	}
	for a, p := range want {
		q, was := before[a]
		switch {
		case !was || !p.sameSession(q):
			add = append(add, p)
		case !p.samePolicy(q):
			reset = append(reset, p)
		}
	}
	s.wanted = want
	asked := maps.Clone(want)
	s.do(func() { s.setPeers(asked, remove) })
	if s.announced == nil {
		return nil // Announce begins the sessions
	}
	for _, p := range remove {
		if err := s.removePeer(p); err != nil {
			return err
		}
	}
	if len(reset) > 0 {
		if err := s.setPolicies(slices.Collect(maps.Values(want)), true); err != nil {
			return err
		}
	}
	for _, p := range reset {
		// Softly: the session stays, what it told and was told is looked at again.
		err := s.server.ResetPeer(s.ctx, &apipb.ResetPeerRequest{Address: p.Address.String(), Soft: true, Direction: apipb.ResetPeerRequest_BOTH})
		if err != nil {
			return fmt.Errorf("refresh routes of peer %s: %w", p.Address, err)
		}
	}
	if len(add)+len(remove)+len(reset) > 0 {
		if err := s.setPolicies(slices.Collect(maps.Values(want)), false); err != nil {
			return err
		}
	}
	return s.begin(add)
}

// begin begins sessions. A peer that GoBGP does not take is not wanted any more, so the next SetPeers tries it again. Called
// with admin held.
func (s *Speaker) begin(peers []Peer) error {
	var errs []error
	for _, p := range peers {
		if err := s.server.AddPeer(s.ctx, &apipb.AddPeerRequest{Peer: s.neighbor(p)}); err != nil {
			delete(s.wanted, p.Address)
			errs = append(errs, fmt.Errorf("add peer %s: %w", p.Address, err))
		}
	}
	return errors.Join(errs...)
}

func (s *Speaker) removePeer(p Peer) error {
	if p.Password != "" {
		// DeletePeer leaves the password in the listening sockets. A change of password takes it out.
		n := s.neighbor(p)
		n.Conf.AuthPassword, n.Conf.AdminDown = "", true
		if _, err := s.server.UpdatePeer(s.ctx, &apipb.UpdatePeerRequest{Peer: n}); err != nil {
			return fmt.Errorf("forget password of peer %s: %w", p.Address, err)
		}
	}
	if err := s.server.DeletePeer(s.ctx, &apipb.DeletePeerRequest{Address: p.Address.String()}); err != nil {
		return fmt.Errorf("remove peer %s: %w", p.Address, err)
	}
	return nil
}

// neighbor is p in GoBGP's words.
func (s *Speaker) neighbor(p Peer) *apipb.Peer {
	hold, restart, keepalive := s.config.HoldTime, s.config.RestartTime, p.KeepaliveTime
	if p.HoldTime != 0 {
		hold = p.HoldTime
	}
	if p.RestartTime != 0 {
		restart = p.RestartTime
	}
	if keepalive == 0 {
		keepalive = hold / 3
	}
	n := &apipb.Peer{
		Conf: &apipb.PeerConf{NeighborAddress: p.Address.String(), PeerAsn: p.ASN, AuthPassword: p.Password},
		// GoBGP's own default for the first is two minutes; a peer that starts a moment later than we should not wait so long.
		Timers: &apipb.Timers{Config: &apipb.TimersConfig{
			ConnectRetry: 1, IdleHoldTimeAfterReset: 1, HoldTime: uint64(seconds(hold)), KeepaliveInterval: uint64(seconds(keepalive)),
		}},
		Transport: &apipb.Transport{PassiveMode: p.Passive, RemotePort: uint32(p.port())},
		GracefulRestart: &apipb.GracefulRestart{
			Enabled: true, RestartTime: seconds(restart),
			// For how long our routes wait for peers that were there but have not finished telling theirs.
			DeferralTime: max(1, seconds(restart)/4),
			// We may have lived before: peers that still have our routes must keep them. Later on they have none from before.
			LocalRestarting: !s.IsSynced(),
		},
	}
	if p.Source.IsValid() {
		n.Transport.LocalAddress = p.Source.String()
	}
	for _, f := range s.families(p) {
		n.AfiSafis = append(n.AfiSafis, &apipb.AfiSafi{
			Config:            &apipb.AfiSafiConfig{Family: f, Enabled: true},
			MpGracefulRestart: &apipb.MpGracefulRestart{Config: &apipb.MpGracefulRestartConfig{Enabled: true}},
		})
	}
	if p.RouteReflectorClient {
		n.RouteReflector = &apipb.RouteReflector{RouteReflectorClient: true}
		if p.ClusterID.IsValid() {
			n.RouteReflector.RouteReflectorClusterId = p.ClusterID.String()
		}
	}
	if p.TTLSecurity > 0 {
		n.TtlSecurity = &apipb.TtlSecurity{Enabled: true, TtlMin: uint32(256 - p.TTLSecurity)}
	}
	if p.MultiHop > 0 {
		n.EbgpMultihop = &apipb.EbgpMultihop{Enabled: true, MultihopTtl: uint32(p.MultiHop)}
	}
	return n
}

// families are the address families that a session with p carries.
func (s *Speaker) families(p Peer) []*apipb.Family {
	switch {
	case p.Address.Is6():
		return []*apipb.Family{family6}
	case s.config.NextHop6.IsValid():
		return []*apipb.Family{family4, family6}
	}
	return []*apipb.Family{family4}
}

func seconds(d time.Duration) uint32 { return uint32(d / time.Second) }
