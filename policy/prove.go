package policy

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"
)

// Disagreement is a packet of which tables say something else than the model that they were compiled from.
type Disagreement struct {
	Endpoint  string
	Direction Direction
	Packet    Packet
	Tables    Row     // what they say
	Rule      RuleRef // of Tables.Rule
	Model     Verdict // what is right
}

// Error says all of it, for a report.
func (d *Disagreement) Error() string {
	said := func(a Action, r RuleRef, logged bool) string {
		text := fmt.Sprintf("%s by %s", a, r)
		if a == 0 {
			text = "nothing"
		}
		if logged {
			text += ", logged"
		}
		return text
	}
	return fmt.Sprintf("%s of %s, %s: the tables say %s; the rules %s", d.Direction, d.Endpoint, d.Packet,
		said(d.Tables.Action, d.Rule, d.Tables.Flags&FlagLog != 0), said(d.Model.Action, d.Model.Rule, d.Model.Logged))
}

// Check holds tables against their model, for a packet that a local endpoint receives (Ingress) or sends. nil: they agree, or
// the endpoint is not local.
func (t *Tables) Check(m *Model, endpoint string, dir Direction, p Packet) *Disagreement {
	pod, local := t.Pods[endpoint]
	if !local {
		return nil
	}
	id, remote := pod.Ingress, p.Source
	if dir == Egress {
		id, remote = pod.Egress, p.Destination
	}
	d := &Disagreement{Endpoint: endpoint, Direction: dir, Packet: p, Tables: t.Lookup(id, remote, p), Rule: RuleRef{Index: NoRule}, Model: m.Evaluate(endpoint, dir, p)}
	known := true
	if d.Tables.Rule != 0 {
		var info RuleInfo
		info, known = t.Rules[d.Tables.Rule]
		known = known && info.Direction == dir
		d.Rule = info.RuleRef
	}
	if known && d.Tables.Action == d.Model.Action && d.Rule == d.Model.Rule && (d.Tables.Flags&FlagLog != 0) == d.Model.Logged {
		return nil
	}
	return d
}

// How much Prove looks at: few endpoints with many packets each, because to find out which policies an endpoint has costs more than
// to judge a packet.
const (
	provedEndpoints = 8
	provedPackets   = 64 // of each
	provedPeers     = 64 // endpoints, changed prefixes
	provedAtLeast   = 32 // packets, however long it takes
)

// Prove tries whether what a Delta changes in tables says what the model does. It makes random packets about the rules of
// endpoints that the change is about, at the edges of their ports and nets, from and to other endpoints and what has another
// identity now. It returns how many it judged, and the first Disagreement. Once limit is over it judges no more than a few, and of one
// endpoint; it looks at all endpoints in any case, which takes a tenth of a microsecond each.
func Prove(m *Model, t *Tables, d *Delta, limit time.Duration) (packets int, err error) {
	deadline := time.Now().Add(limit)
	p := &prover{model: m, remotes: changedAddresses(d)}
	for _, e := range m.Endpoints { // in no order, so these are others each time
		if len(p.endpoints) == provedPeers {
			break
		}
		p.endpoints = append(p.endpoints, e)
	}
	var all []proof
	for _, id := range subjects(t, d) {
		e := m.Endpoints[id]
		if e == nil || len(e.Addresses) == 0 {
			continue
		}
		all = p.about(all, e)
		if time.Now().After(deadline) {
			break
		}
	}
	holders := p.holders(all)
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	for _, x := range all {
		remote := x.packet.Source
		if x.dir == Egress {
			remote = x.packet.Destination
		}
		h := holders[remote]
		if h.several {
			continue
		}
		x.model.Endpoints = map[string]*Endpoint{x.subject.ID: x.subject}
		if h.endpoint != nil {
			x.model.Endpoints[h.endpoint.ID] = h.endpoint
		}
		packets++
		if d := t.Check(&x.model, x.subject.ID, x.dir, x.packet); d != nil {
			return packets, d
		}
		if packets >= provedAtLeast && time.Now().After(deadline) {
			break
		}
	}
	return packets, nil
}

// proof is a packet that is to be judged at one end. The model has the policies of that end alone.
type proof struct {
	subject *Endpoint
	dir     Direction
	packet  Packet
	model   Model
}

type prover struct {
	model     *Model
	endpoints []*Endpoint  // some of all
	remotes   []netip.Addr // of which something else is known now
}

// holder is who has an address.
type holder struct {
	endpoint *Endpoint
	several  bool // which a model must not have: then nothing is proved about it
}

// subjects are some of the local endpoints that a change is about: whose policies are others, or what these say, or of whose peers
// something else is known.
func subjects(t *Tables, d *Delta) []string {
	var all []string
	rows := make(map[uint32]bool)
	for _, s := range d.PutRows {
		rows[s.Policy] = true
	}
	peers := len(d.PutPeers)+len(d.DeletePeers) > 0
	for id, pod := range t.Pods {
		_, put := d.PutPods[id]
		if put || rows[pod.Ingress] || rows[pod.Egress] || peers {
			all = append(all, id)
		}
	}
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all[:min(len(all), provedEndpoints)]
}

// changedAddresses are at the edges of prefixes whose identities change.
func changedAddresses(d *Delta) []netip.Addr {
	changes := slices.Concat(d.PutPeers, d.DeletePeers)
	rand.Shuffle(len(changes), func(i, j int) { changes[i], changes[j] = changes[j], changes[i] })
	var all []netip.Addr
	for _, c := range changes[:min(len(changes), provedPeers)] {
		first, last := c.Prefix.Addr(), lastAddress(c.Prefix)
		all = append(all, first, last, first.Prev(), last.Next())
	}
	return slices.DeleteFunc(all, func(a netip.Addr) bool { return !a.IsValid() })
}

func lastAddress(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for bit := p.Bits(); bit < 8*len(b); bit++ {
		b[bit/8] |= 0x80 >> (bit % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// about adds packets about an endpoint.
func (p *prover) about(all []proof, e *Endpoint) []proof {
	var models [2]Model
	var rules [2][]*Rule
	for _, t := range p.model.Tiers {
		own := [2]Tier{{Name: t.Name, Default: t.Default}, {Name: t.Name, Default: t.Default}}
		for _, pol := range t.Policies {
			if !pol.Selector.Matches(e.Labels) {
				continue
			}
			for dir := range own {
				if r := pol.Rules(Direction(dir)); r != nil {
					own[dir].Policies = append(own[dir].Policies, pol)
					for i := range r.Rules {
						rules[dir] = append(rules[dir], &r.Rules[i])
					}
				}
			}
		}
		for dir := range models {
			models[dir].Tiers = append(models[dir].Tiers, own[dir])
		}
	}
	for dir := range models {
		models[dir].Profiles, models[dir].Sets = p.model.Profiles, p.model.Sets
		for _, name := range e.Profiles {
			if profile := p.model.Profiles[name]; profile != nil {
				all := profile.Rules(Direction(dir))
				for i := range all {
					rules[dir] = append(rules[dir], &all[i])
				}
			}
		}
	}
	for range provedPackets {
		dir := Direction(rand.IntN(2))
		var r Rule
		if n := len(rules[dir]); n > 0 && rand.IntN(8) > 0 {
			r = *rules[dir][rand.IntN(n)]
		}
		if packet, ok := p.packet(e, dir, &r); ok {
			all = append(all, proof{e, dir, packet, models[dir]})
		}
	}
	return all
}

// packet is one that a rule is about, or nearly. False: none comes to mind.
func (p *prover) packet(e *Endpoint, dir Direction, r *Rule) (Packet, bool) {
	out := Packet{Protocol: oneOf[uint8](protocolTCP, protocolUDP, protocolSCTP, protocolICMP, 47), SourcePort: 40000, TargetPort: uint16(rand.Uint32())}
	if r.Protocol != nil && rand.IntN(10) > 0 {
		out.Protocol = *r.Protocol
	}
	peer := &r.Source
	if dir == Egress {
		peer = &r.Destination
	}
	remote, holder := p.remote(peer)
	if !remote.IsValid() || slices.Contains(e.Addresses, remote) {
		return out, false
	}
	i := slices.IndexFunc(e.Addresses, func(a netip.Addr) bool { return a.Is4() == remote.Is4() })
	if i < 0 {
		return out, false
	}
	out.Source, out.Destination = remote, e.Addresses[i]
	from, to := holder, e
	if dir == Egress {
		out.Source, out.Destination, from, to = out.Destination, out.Source, e, holder
	}
	switch {
	case hasTypes(out.Protocol):
		out.Protocol = protocolICMP
		if remote.Is6() {
			out.Protocol = protocolICMPv6
		}
		out.SourcePort, out.TargetPort, out.ICMPType = 0, 0, oneOf[uint8](0, 8, 128, 129)
		for _, i := range []*ICMP{r.ICMP, r.NotICMP} {
			if i == nil {
				continue
			}
			out.ICMPType, out.ICMPCode = i.Type, oneOf[uint8](0, 1)
			if i.Code != nil {
				out.ICMPCode = *i.Code + oneOf[uint8](0, 0, 1)
			}
		}
	case hasPorts(out.Protocol):
		out.SourcePort = edgeOf(&r.Source, from, out.Protocol, out.SourcePort)
		out.TargetPort = edgeOf(&r.Destination, to, out.Protocol, out.TargetPort)
	default:
		out.SourcePort, out.TargetPort = 0, 0
	}
	return out, true
}

// remote is an address for the other end, and who has it, if that is known.
func (p *prover) remote(peer *Peer) (netip.Addr, *Endpoint) {
	nets := peer.Nets
	if len(peer.NotNets) > 0 && (nets == nil || rand.IntN(2) == 0) {
		nets = peer.NotNets
	}
	switch {
	case len(nets) > 0 && rand.IntN(4) > 0:
		n := nets[rand.IntN(len(nets))]
		first, last := n.Addr(), lastAddress(n)
		return oneOf(first, last, first.Prev(), last.Next()), nil
	case len(p.remotes) > 0 && rand.IntN(2) > 0:
		return p.remotes[rand.IntN(len(p.remotes))], nil
	case len(p.endpoints) == 0:
		return netip.Addr{}, nil
	}
	start := rand.IntN(len(p.endpoints))
	e := p.endpoints[start]
	if peer.Selector != nil && rand.IntN(4) > 0 {
		for i := range p.endpoints {
			if x := p.endpoints[(start+i)%len(p.endpoints)]; peer.Selector.Matches(x.Labels) {
				e = x
				break
			}
		}
	}
	if len(e.Addresses) == 0 {
		return netip.Addr{}, nil
	}
	return e.Addresses[rand.IntN(len(e.Addresses))], e
}

// edgeOf is a port at the edge of those that a rule asks of one end, which e is.
func edgeOf(peer *Peer, e *Endpoint, protocol uint8, otherwise uint16) uint16 {
	all := peer.Ports
	if len(peer.NotPorts) > 0 && (all == nil || rand.IntN(2) == 0) {
		all = peer.NotPorts
	}
	if len(all) == 0 {
		return otherwise
	}
	ports := all[rand.IntN(len(all))]
	if ports.Name == "" {
		return oneOf(ports.First, ports.Last, ports.First-1, ports.Last+1)
	}
	if e != nil {
		for _, n := range e.Ports {
			if n.Name == ports.Name && n.Protocol == protocol {
				return oneOf(n.Port, n.Port, n.Port-1, n.Port+1)
			}
		}
	}
	return otherwise
}

// holders are those of the packets' remote addresses.
func (p *prover) holders(all []proof) map[netip.Addr]holder {
	found := make(map[netip.Addr]holder)
	for _, x := range all {
		if x.dir == Egress {
			found[x.packet.Destination] = holder{}
		} else {
			found[x.packet.Source] = holder{}
		}
	}
	for _, e := range p.model.Endpoints {
		for _, a := range e.Addresses {
			if h, asked := found[a]; asked {
				found[a] = holder{e, h.endpoint != nil && h.endpoint != e}
			}
		}
	}
	return found
}

// oneOf is any of several.
func oneOf[T any](all ...T) T { return all[rand.IntN(len(all))] }
