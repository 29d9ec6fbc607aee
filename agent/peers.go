package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	stdmaps "maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/bgp"
	"github.com/caracal-net/caracal/internal/holder"
)

// peer makes the BGP speaker's peers and announcements equal to what the cluster says. announced: exactly own are, whatever the
// trouble with a peer is.
func (a *Agent) peer(ctx context.Context, v *view, self *api.Node, own []netip.Prefix) (announced bool, err error) {
	if err := a.speak(ctx, v, self); err != nil {
		return false, err
	}
	peers, err := a.peers(v, self)
	// Announced first: a new peer then hears everything before its end-of-RIB.
	failed := a.speaker.Announce(own)
	return failed == nil, errors.Join(err, failed, a.speaker.SetPeers(peers))
}

// speak starts the speaker, again when what it is to its peers has changed.
func (a *Agent) speak(ctx context.Context, v *view, self *api.Node) error {
	c := bgp.Config{ASN: uint32(asNumber(v, self)), RouterID: routerID(self), ListenPort: a.BGPPort, Log: a.Log}
	if c.ListenPort == 0 {
		c.ListenPort = v.bgp.ListenPort
	}
	for _, p := range []netip.Prefix{self.BGP.IPv4Address, self.BGP.IPv6Address} {
		if p.IsValid() {
			c.ListenAddresses = append(c.ListenAddresses, p.Addr())
		}
	}
	if a.speaker != nil && fmt.Sprint(c) == fmt.Sprint(a.spoken) {
		return nil
	}
	if a.speaker != nil {
		a.Log.Info("BGP starts again", "as", c.ASN, "router id", c.RouterID, "port", c.ListenPort)
		err := a.speaker.Close(true)
		a.speaker = nil
		if err != nil {
			return err
		}
		a.routes.restart()
	}
	if err := a.freePort(c); err != nil {
		return err
	}
	speaker, err := bgp.Start(context.WithoutCancel(ctx), c, a.routes)
	if err != nil {
		return err
	}
	a.speaker, a.spoken = speaker, c
	go func() {
		select {
		case <-speaker.Synced():
			a.routes.heardAll()
		case <-ctx.Done():
		}
	}()
	return nil
}

// freePort makes sure that nobody else has the speaker's port: what the library tries to start and can't is never freed.
func (a *Agent) freePort(c bgp.Config) error {
	port := c.ListenPort
	if port == 0 {
		port = bgp.DefaultPort
	}
	if port < 0 {
		return nil
	}
	for _, at := range c.ListenAddresses {
		l, err := net.Listen("tcp", netip.AddrPortFrom(at, uint16(port)).String())
		if errors.Is(err, unix.EADDRINUSE) {
			return fmt.Errorf("%s: end that, or give the agent another (--bgp-port, or listenPort of the BGPConfiguration)", a.taken.by(port))
		}
		if err != nil {
			return fmt.Errorf("listen for BGP: %w", err)
		}
		l.Close()
	}
	return nil
}

// takenPort is a port that another process has. To find out which one is to look at all that all processes have open, so it is found
// out now and then, not with each pod that begins or ends.
type takenPort struct {
	port  int
	text  string
	asked time.Time
}

// by says that a port is taken, and by whom.
func (t *takenPort) by(port int) string {
	if t.port != port || time.Since(t.asked) > rescan {
		*t = takenPort{port, holder.Taken("tcp", port), time.Now()}
	}
	return t.text
}

func asNumber(v *view, n *api.Node) api.ASNumber {
	if n.BGP != nil && n.BGP.ASNumber != 0 {
		return n.BGP.ASNumber
	}
	return v.bgp.ASNumber
}

// routerID is the node's IPv4 address; one without is given a number made of its IPv6 address.
func routerID(n *api.Node) netip.Addr {
	if a := n.BGP.IPv4Address.Addr(); a.IsValid() {
		return a
	}
	b := n.BGP.IPv6Address.Addr().As16()
	return netip.AddrFrom4([4]byte{b[12] | 1, b[13], b[14], b[15]})
}

// peers are the configured ones and the mesh's. A router is peered with once: as a peer of all nodes before one of some, as
// one that this node names before one that names this node, and only then as one of the mesh. What is wrong with one of
// them keeps its address out: a mesh without its password or filters must not take its place.
func (a *Agent) peers(v *view, self *api.Node) ([]bgp.Peer, error) {
	var all []bgp.Peer
	var errs []error
	taken := make(map[netip.Addr]bool)
	for _, c := range a.configured(v, self) {
		if taken[c.at.Addr()] {
			continue
		}
		taken[c.at.Addr()] = true
		peer, err := c.peer(v, self)
		if err == nil {
			err = a.speaker.Check(peer)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("peer %s: %w", c.name, err))
			continue
		}
		all = append(all, peer)
	}
	mesh, err := a.mesh(v, self)
	errs = append(errs, err)
	for _, p := range mesh {
		if !taken[p.Address] {
			all = append(all, p)
		}
	}
	advertised := advertised(v)
	for i := range all {
		all[i].Export = slices.Concat(advertised, all[i].Export)
	}
	slices.SortFunc(all, func(x, y bgp.Peer) int { return x.Address.Compare(y.Address) })
	return all, errors.Join(errs...)
}

// mesh are all other nodes, but for route reflectors: they have peers that name them, and are themselves in no mesh.
func (a *Agent) mesh(v *view, self *api.Node) ([]bgp.Peer, error) {
	if !v.bgp.Mesh() || self.BGP.ClusterID != "" {
		return nil, nil
	}
	password, err := secret(v.bgp.NodeMeshPassword)
	if err != nil {
		return nil, err
	}
	var all []bgp.Peer
	for name, n := range v.nodes {
		if name == a.Node || n.BGP == nil || n.BGP.ClusterID != "" {
			continue
		}
		for _, pair := range links(self, n) {
			all = append(all, bgp.Peer{
				Address: pair.theirs, Port: v.bgp.ListenPort, ASN: uint32(asNumber(v, n)), Kind: bgp.Mesh, Source: pair.ours, Password: password,
				Passive: pair.passive(), RestartTime: time.Duration(v.bgp.NodeMeshMaxRestartTime),
			})
		}
	}
	return all, nil
}

// link is how two nodes reach each other in one family.
type link struct{ ours, theirs netip.Addr }

// passive tells whether the other node dials: one of the two does, so that no two connections meet. The addresses are compared as
// text, as Calico does: in a mesh with hosts of both they must agree on 10.0.0.9 and 10.0.0.10.
func (l link) passive() bool { return l.ours.String() < l.theirs.String() }

// links are those of the families that both nodes have.
func links(self, other *api.Node) (both []link) {
	for _, l := range []link{
		{self.BGP.IPv4Address.Addr(), other.BGP.IPv4Address.Addr()}, {self.BGP.IPv6Address.Addr(), other.BGP.IPv6Address.Addr()},
	} {
		if l.ours.IsValid() && l.theirs.IsValid() {
			both = append(both, l)
		}
	}
	return both
}

// configured is one session that a BGPPeer asks for.
type configured struct {
	*api.BGPPeer
	name string // the resource's
	kind bgp.PeerKind
	at   netip.AddrPort
	asn  api.ASNumber
	node *api.Node // that the peer is; nil: none of the cluster
}

// configured are the sessions that BGPPeers ask for, in the order in which they count. As in Calico one that names nodes is
// those nodes' as well.
func (a *Agent) configured(v *view, self *api.Node) []configured {
	var global, some, back []configured
	for _, name := range slices.Sorted(stdmaps.Keys(v.peers)) {
		p := v.peers[name]
		if p.Global() {
			global = append(global, a.named(v, self, configured{BGPPeer: p, name: name, kind: bgp.Global})...)
		} else {
			some = append(some, a.named(v, self, configured{BGPPeer: p, name: name, kind: bgp.Node})...)
		}
	}
	for _, peers := range []map[string]*api.BGPPeer{v.peers, v.others} {
		for _, name := range slices.Sorted(stdmaps.Keys(peers)) {
			back = append(back, a.naming(v, self, configured{BGPPeer: peers[name], name: name, kind: bgp.Node})...)
		}
	}
	return slices.Concat(global, some, back)
}

// named are the sessions with what a BGPPeer of this node names.
func (a *Agent) named(v *view, self *api.Node, c configured) (all []configured) {
	if c.PeerSelector != "" {
		return a.nodes(v, self, c, func(_ string, labels map[string]string) bool { return api.Selects(c.PeerSelector, labels) })
	}
	c.at, _ = c.Peer() // checked when it was read
	c.asn = c.ASNumber
	if c.at.Addr() == self.BGP.IPv4Address.Addr() || c.at.Addr() == self.BGP.IPv6Address.Addr() {
		return nil // every node's peer is one of the nodes: this one
	}
	for _, n := range v.nodes {
		if v.is(n, c) {
			c.node, c.at = n, netip.AddrPortFrom(c.at.Addr(), uint16(v.bgp.ListenPort))
			break
		}
	}
	return []configured{c}
}

// naming are the sessions with the nodes that have a BGPPeer which names this node.
func (a *Agent) naming(v *view, self *api.Node, c configured) []configured {
	has := func(name string, labels map[string]string) bool { return c.Has(name, labels) }
	if c.PeerSelector != "" {
		if !api.Selects(c.PeerSelector, v.meta[a.Node].Labels) {
			return nil
		}
		return a.nodes(v, self, c, has)
	}
	c.at, _ = c.Peer()
	if !v.is(self, c) {
		return nil
	}
	family := c.at.Addr().Is4()
	return slices.DeleteFunc(a.nodes(v, self, c, has), func(o configured) bool { return o.at.Addr().Is4() != family })
}

// is tells whether a node is what a BGPPeer names by its address: another router may live there, on another port.
func (v *view) is(n *api.Node, c configured) bool {
	at, err := c.Peer()
	port := cmp.Or(v.bgp.ListenPort, bgp.DefaultPort)
	return err == nil && n.BGP != nil && (n.BGP.IPv4Address.Addr() == at.Addr() || n.BGP.IPv6Address.Addr() == at.Addr()) &&
		asNumber(v, n) == c.ASNumber && (at.Port() == 0 || int(at.Port()) == port)
}

// nodes are the sessions with other nodes.
func (a *Agent) nodes(v *view, self *api.Node, c configured, want func(name string, labels map[string]string) bool) (all []configured) {
	for _, name := range slices.Sorted(stdmaps.Keys(v.nodes)) {
		n := v.nodes[name]
		if name == a.Node || n.BGP == nil || !want(name, v.meta[name].Labels) {
			continue
		}
		for _, l := range links(self, n) {
			c.at, c.asn, c.node = netip.AddrPortFrom(l.theirs, uint16(v.bgp.ListenPort)), asNumber(v, n), n
			all = append(all, c)
		}
	}
	return all
}

// peer is the session for the speaker.
func (c configured) peer(v *view, self *api.Node) (bgp.Peer, error) {
	p := bgp.Peer{
		Address: c.at.Addr(), Port: int(c.at.Port()), ASN: uint32(c.asn), Kind: c.kind, Communities: c.Communities,
		TTLSecurity: c.TTLSecurity, AllowDefault: c.AllowDefault, RestartTime: time.Duration(c.MaxRestartTime),
		// What a reflector passes on keeps its next hop, or all packets would go through the reflector.
		NextHopSelf: !c.KeepOriginalNextHop && self.BGP.ClusterID == "",
	}
	ours := self.BGP.IPv4Address.Addr()
	if c.at.Addr().Is6() {
		ours = self.BGP.IPv6Address.Addr()
	}
	if c.SourceAddress == "UseNodeIP" {
		p.Source = ours
	}
	p.Passive = c.node != nil && ours.IsValid() && link{ours, p.Address}.passive()
	if self.BGP.ClusterID != "" && c.asn == asNumber(v, self) && (c.node == nil || c.node.BGP.ClusterID != self.BGP.ClusterID) {
		p.RouteReflectorClient = true
		p.ClusterID, _ = netip.ParseAddr(self.BGP.ClusterID) // checked when it was read
	}
	var err, filters error
	p.Password, err = secret(c.Password)
	p.Import, p.Export, filters = v.filter(c.Filters, c.asn == asNumber(v, self))
	return p, errors.Join(err, filters)
}

func secret(s *api.Secret) (string, error) {
	if s == nil || s.File == "" {
		if s == nil {
			return "", nil
		}
		return s.Value, nil
	}
	b, err := os.ReadFile(s.File)
	if err != nil {
		return "", fmt.Errorf("password: %w", err)
	}
	return strings.TrimRight(string(b), "\r\n"), nil
}
