// Package policytest makes random models and packets to test what decides about them, and makes what fails small enough
// to read.
package policytest

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"

	"github.com/caracal-net/caracal/api/selector"
	"github.com/caracal-net/caracal/policy"
)

// Protocols that random rules and packets have.
const (
	icmp, tcp, udp, gre, icmpv6, sctp = 1, 6, 17, 47, 58, 132
)

// Random makes models and packets. The same seed makes the same ones.
type Random struct{ r *rand.Rand }

// New is a Random of a seed.
func New(seed uint64) *Random { return &Random{rand.New(rand.NewPCG(seed, 0))} }

// one is any of several.
func one[T any](g *Random, all ...T) T { return all[g.r.IntN(len(all))] }

// chance is true in so many of a hundred cases.
func (g *Random) chance(percent int) bool { return g.r.IntN(100) < percent }

var (
	namespaces = []string{"web", "db", "ops"}
	teams      = map[string]string{"web": "red", "db": "blue", "ops": "red"}
	roles      = []string{"frontend", "backend", "cache"}
	portNames  = []string{"http", "dns", "metrics"}

	// nets hold pods' addresses and each other, or nobody's.
	nets = prefixes("10.65.0.0/16", "10.65.0.0/24", "10.65.0.0/26", "10.65.0.4/30", "10.65.0.8/29", "10.65.0.5/32", "10.65.1.0/24", "10.0.0.0/8",
		"0.0.0.0/0", "0.0.0.0/1", "192.0.2.0/24", "192.0.2.128/25", "192.0.2.77/32", "198.51.100.0/24",
		"fd00:65::/32", "fd00:65::/112", "fd00:65::8/125", "fd00:65::5/128", "::/0", "2001:db8::/32", "2001:db8:0:1::/64", "2001:db8:0:1::7/128")
)

func prefixes(texts ...string) []netip.Prefix {
	var all []netip.Prefix
	for _, text := range texts {
		all = append(all, netip.MustParsePrefix(text))
	}
	return all
}

// Model is a random model of a few namespaces: small, but with everything that a model can hold.
func (g *Random) Model() *policy.Model {
	m := &policy.Model{Profiles: make(map[string]*policy.Profile), Endpoints: make(map[string]*policy.Endpoint), Sets: make(map[string]*policy.Set)}
	for n := 2 + g.r.IntN(9); len(m.Endpoints) < n; {
		e := g.endpoint(m)
		m.Endpoints[e.ID] = e
	}
	for i := range g.r.IntN(4) {
		s := g.set(fmt.Sprintf("set%d", i))
		m.Sets[s.ID] = s
	}
	for _, ns := range namespaces { // as Kubernetes' namespaces have; "missing" has none
		if g.chance(80) {
			name := "kns." + ns
			m.Profiles[name] = &policy.Profile{ID: "Profile " + name, Ingress: g.rules(0), Egress: g.rules(0)}
			if g.chance(50) {
				m.Profiles[name].Ingress = append(m.Profiles[name].Ingress, policy.Rule{Action: policy.Allow})
			}
		}
	}
	for i := range g.r.IntN(4) {
		t := policy.Tier{Name: fmt.Sprintf("tier%d", i), Default: one(g, policy.Deny, policy.Pass)}
		for j := range g.r.IntN(5) {
			t.Policies = append(t.Policies, g.policy(fmt.Sprintf("p%d.%d", i, j)))
		}
		m.Tiers = append(m.Tiers, t)
	}
	return m
}

// endpoint has addresses and an ID that nobody in the model has.
func (g *Random) endpoint(m *policy.Model) *policy.Endpoint {
	for {
		low := byte(g.r.IntN(20))
		ns := one(g, namespaces...)
		e := &policy.Endpoint{
			ID:     fmt.Sprintf("%s/pod%d", ns, low),
			Labels: g.labels(ns),
			// A name may stand for ports of several protocols, and for others at other endpoints.
			Ports: []policy.NamedPort{{Name: one(g, portNames...), Protocol: one[uint8](g, tcp, udp, sctp), Port: g.port()}},
		}
		if g.chance(50) {
			e.Ports = append(e.Ports, policy.NamedPort{Name: e.Ports[0].Name, Protocol: one[uint8](g, tcp, udp), Port: g.port()})
		}
		v4, v6 := netip.AddrFrom4([4]byte{10, 65, 0, low}), netip.MustParseAddr("fd00:65::").As16()
		v6[15] = low
		e.Addresses = one(g, []netip.Addr{v4}, []netip.Addr{netip.AddrFrom16(v6)}, []netip.Addr{v4, netip.AddrFrom16(v6)}, []netip.Addr{v4, netip.AddrFrom16(v6)})
		switch {
		case g.chance(25):
		case g.chance(10):
			e.Profiles = []string{"missing"}
		default:
			e.Profiles = []string{"kns." + ns}
			if g.chance(30) {
				e.Profiles = append(e.Profiles, "kns."+one(g, namespaces...))
			}
		}
		taken := func(a netip.Addr) bool { return m.At(a) != nil }
		if m.Endpoints[e.ID] == nil && !slices.ContainsFunc(e.Addresses, taken) {
			return e
		}
	}
}

func (g *Random) labels(ns string) map[string]string {
	labels := map[string]string{"projectcalico.org/namespace": ns, "projectcalico.org/orchestrator": "k8s", "pcns.team": teams[ns], "pcns.projectcalico.org/name": ns}
	if g.chance(85) {
		labels["role"] = one(g, roles...)
	}
	if g.chance(50) {
		labels["env"] = one(g, "prod", "dev")
	}
	return labels
}

func (g *Random) set(id string) *policy.Set {
	s := &policy.Set{ID: id, Labels: map[string]string{"role": one(g, append(roles, "partner")...)}}
	for range g.r.IntN(4) {
		s.Nets = append(s.Nets, one(g, nets...))
	}
	return s
}

func (g *Random) policy(id string) *policy.Policy {
	p := &policy.Policy{ID: id, Selector: g.selector()}
	if g.chance(40) {
		p.Selector = selector.Selector{}
	}
	if g.chance(75) {
		p.Ingress = &policy.Rules{Rules: g.rules(policy.Pass)}
	}
	if g.chance(60) || p.Ingress == nil {
		p.Egress = &policy.Rules{Rules: g.rules(policy.Pass)}
	}
	return p
}

// rules may have some of the action also.
func (g *Random) rules(also policy.Action) []policy.Rule {
	var all []policy.Rule
	for range g.r.IntN(5) {
		r := g.rule()
		if g.chance(25) && also != 0 {
			r.Action = also
		}
		all = append(all, r)
	}
	return all
}

func (g *Random) rule() policy.Rule {
	r := policy.Rule{Action: one(g, policy.Allow, policy.Allow, policy.Allow, policy.Allow, policy.Deny, policy.Deny, policy.Deny, policy.Log)}
	if g.chance(8) {
		r.IPVersion = one(g, 4, 6)
	}
	switch g.r.IntN(10) {
	case 0, 1, 2, 3, 4:
		r.Protocol = pointer(one[uint8](g, tcp, tcp, udp, udp, sctp))
		r.Source, r.Destination = g.ports(18), g.ports(70)
	case 5, 6:
		r.Protocol = pointer(one[uint8](g, icmp, icmpv6))
		if r.IPVersion != 0 {
			r.Protocol = pointer(map[int]uint8{4: icmp, 6: icmpv6}[r.IPVersion])
		}
		if g.chance(60) {
			r.ICMP = g.icmp()
		}
		if g.chance(25) {
			r.NotICMP = g.icmp()
		}
	case 7:
		r.NotProtocol = pointer(one[uint8](g, tcp, udp, sctp, icmp, icmpv6, gre))
		if g.chance(30) {
			r.Source, r.Destination = g.ports(10), g.ports(80)
		}
	case 8:
		switch {
		case g.chance(40): // a name knows its protocols; a range is one of each protocol that has ports
			r.Source, r.Destination = g.ports(10), g.ports(80)
		case g.chance(20):
			r.Protocol = pointer(uint8(gre))
		}
	}
	g.who(&r.Source)
	g.who(&r.Destination)
	return r
}

func (g *Random) icmp() *policy.ICMP {
	i := &policy.ICMP{Type: g.icmpType()}
	if g.chance(50) {
		i.Code = pointer(uint8(g.r.IntN(3)))
	}
	return i
}

func (g *Random) icmpType() uint8 { return one[uint8](g, 0, 3, 8, 128, 129, 255) }

// ports are a peer's, in so many of a hundred cases.
func (g *Random) ports(percent int) policy.Peer {
	var p policy.Peer
	if g.chance(percent) {
		for range 1 + g.r.IntN(3) {
			p.Ports = append(p.Ports, g.rangeOfPorts())
		}
	}
	if g.chance(5 + percent/8) {
		p.NotPorts = append(p.NotPorts, g.rangeOfPorts())
	}
	return p
}

func (g *Random) rangeOfPorts() policy.Ports {
	if g.chance(30) {
		return policy.Ports{Name: one(g, portNames...)}
	}
	first, last := g.port(), g.port()
	switch {
	case g.chance(50):
		last = first
	case first > last:
		first, last = last, first
	}
	return policy.Ports{First: first, Last: last}
}

// port is one that ranges begin or end with.
func (g *Random) port() uint16 {
	return one[uint16](g, 53, 80, 81, 443, 1023, 1024, 8080, 8090, 32768, 65535)
}

// who asks for an end of a packet, the source or destination, of about every other rule.
func (g *Random) who(p *policy.Peer) {
	switch g.r.IntN(8) {
	case 0, 1:
		p.Selector = pointer(g.selector())
	case 2:
		p.Nets = g.nets()
	case 3:
		if g.chance(50) {
			p.Selector = pointer(g.selector())
		}
		if g.chance(50) {
			p.Nets = g.nets()
		}
	default:
		return
	}
	if g.chance(20) {
		p.NotSelector = pointer(g.selector())
	}
	if g.chance(20) {
		p.NotNets = g.nets()
	}
}

func (g *Random) nets() []netip.Prefix {
	all := []netip.Prefix{one(g, nets...)}
	for g.chance(40) {
		all = append(all, one(g, nets...))
	}
	return all
}

func (g *Random) selector() selector.Selector {
	term := func() string {
		role, ns := one(g, roles...), one(g, namespaces...)
		return one(g, "all()", "has(env)", "!has(role)", "env != 'prod'", "env == 'prod'", "pcns.team == 'red'", "has(projectcalico.org/namespace)", "role starts with 'b'",
			"role == '"+role+"'", "role == '"+role+"'", "role in {'"+role+"', 'partner'}", "role != '"+role+"'",
			"projectcalico.org/namespace == '"+ns+"'", "projectcalico.org/namespace == '"+ns+"'", "pcns.projectcalico.org/name in {'"+ns+"', 'db'}")
	}
	text := term()
	switch {
	case g.chance(25):
		text += " && " + term()
	case g.chance(10):
		text += " || " + term()
	case g.chance(10):
		text = "!(" + text + " || " + term() + ")"
	}
	s, err := selector.Parse(text)
	if err != nil {
		panic(err) // the grammar above is wrong
	}
	return s
}

// Packet is a random packet. Most are made for a rule of the model: they meet its conditions, or are just beside them.
func (g *Random) Packet(m *policy.Model) policy.Packet {
	p := policy.Packet{Protocol: one[uint8](g, tcp, tcp, udp, sctp, icmp, gre), SourcePort: one(g, 40000, g.port()), TargetPort: g.near(g.port()), ICMPType: g.icmpType(), ICMPCode: uint8(g.r.IntN(3))}
	v6 := g.chance(35)
	var r policy.Rule
	if all := rulesOf(m); len(all) > 0 && g.chance(80) {
		r = one(g, all...)
	}
	switch { // the rule says which version, or it does not matter
	case r.IPVersion != 0 && g.chance(90):
		v6 = r.IPVersion == 6
	case r.Protocol != nil && *r.Protocol == icmpv6:
		v6 = true
	case r.Protocol != nil && *r.Protocol == icmp:
		v6 = false
	case r.Source.Nets != nil && g.chance(90):
		v6 = r.Source.Nets[0].Addr().Is6()
	case r.Destination.Nets != nil && g.chance(90):
		v6 = r.Destination.Nets[0].Addr().Is6()
	}
	if r.Protocol != nil && g.chance(90) {
		p.Protocol = *r.Protocol
	}
	if i := one(g, r.ICMP, r.ICMP, r.NotICMP); i != nil {
		p.ICMPType = i.Type
		if i.Code != nil && g.chance(80) {
			p.ICMPCode = *i.Code
		}
	}
	for p.Source == p.Destination { // both are the zero Addr at first
		p.Source, p.Destination = g.address(m, r.Source, v6, 70), g.address(m, r.Destination, v6, 85)
	}
	p.SourcePort, p.TargetPort = g.portFor(m, r.Source, p.Source, p.Protocol, p.SourcePort), g.portFor(m, r.Destination, p.Destination, p.Protocol, p.TargetPort)

	if p.Protocol == icmp && v6 {
		p.Protocol = icmpv6
	} else if p.Protocol == icmpv6 && !v6 {
		p.Protocol = icmp
	}
	if p.Protocol != tcp && p.Protocol != udp && p.Protocol != sctp {
		p.SourcePort, p.TargetPort = 0, 0
	}
	if p.Protocol != icmp && p.Protocol != icmpv6 {
		p.ICMPType, p.ICMPCode = 0, 0
	}
	return p
}

// rulesOf are all rules of a model, those of its profiles too.
func rulesOf(m *policy.Model) []policy.Rule {
	var all []policy.Rule
	for _, t := range m.Tiers {
		for _, p := range t.Policies {
			for _, rules := range []*policy.Rules{p.Ingress, p.Egress} {
				if rules != nil {
					all = append(all, rules.Rules...)
				}
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(m.Profiles)) {
		all = append(all, m.Profiles[name].Ingress...)
		all = append(all, m.Profiles[name].Egress...)
	}
	return all
}

// address is an endpoint's in so many of a hundred cases, otherwise one at the edge of a net.
func (g *Random) address(m *policy.Model, peer policy.Peer, v6 bool, percent int) netip.Addr {
	var pods, selected []netip.Addr
	for _, id := range slices.Sorted(maps.Keys(m.Endpoints)) {
		e := m.Endpoints[id]
		for _, a := range e.Addresses {
			if a.Is6() != v6 {
				continue
			}
			pods = append(pods, a)
			if (peer.Selector == nil || peer.Selector.Matches(e.Labels)) && (peer.Nets == nil || slices.ContainsFunc(peer.Nets, func(n netip.Prefix) bool { return n.Contains(a) })) {
				selected = append(selected, a)
			}
		}
	}
	if g.chance(percent) {
		switch {
		case len(selected) > 0 && g.chance(80):
			return one(g, selected...)
		case len(pods) > 0:
			return one(g, pods...)
		}
	}
	candidates := slices.Clone(nets)
	switch all := slices.Concat(peer.Nets, peer.NotNets); {
	case len(all) > 0 && g.chance(80):
		candidates = append(all, all...)
	case len(m.Sets) > 0 && g.chance(50):
		if s := m.Sets[one(g, slices.Sorted(maps.Keys(m.Sets))...)]; len(s.Nets) > 0 {
			candidates = s.Nets
		}
	}
	candidates = slices.DeleteFunc(slices.Clone(candidates), func(n netip.Prefix) bool { return n.Addr().Is6() != v6 })
	if len(candidates) == 0 {
		candidates = slices.DeleteFunc(slices.Clone(nets), func(n netip.Prefix) bool { return n.Addr().Is6() != v6 })
	}
	if a := g.edge(one(g, candidates...)); routable(a) {
		return a
	}
	if v6 {
		return netip.MustParseAddr("2001:db8:ffff::1")
	}
	return netip.MustParseAddr("203.0.113.9")
}

// routable addresses are those that a packet can be from or to.
func routable(a netip.Addr) bool {
	return a.IsValid() && a.IsGlobalUnicast() && !(a.Is4() && (a.As4()[0] == 0 || a.As4()[0] >= 224))
}

// edge is the first or last address of a net, or the one before or behind them.
func (g *Random) edge(n netip.Prefix) netip.Addr {
	first := n.Masked().Addr()
	last := lastOf(n)
	return one(g, first, last, first.Prev(), last.Next(), first.Next())
}

func lastOf(n netip.Prefix) netip.Addr {
	bytes := n.Masked().Addr().AsSlice()
	for bit := n.Bits(); bit < len(bytes)*8; bit++ {
		bytes[bit/8] |= 0x80 >> (bit % 8)
	}
	a, _ := netip.AddrFromSlice(bytes)
	return a
}

// portFor is one that the peer asks for, or that is just beside it.
func (g *Random) portFor(m *policy.Model, peer policy.Peer, a netip.Addr, protocol uint8, otherwise uint16) uint16 {
	all := slices.Concat(peer.Ports, peer.NotPorts)
	if len(all) == 0 || g.chance(10) {
		return otherwise
	}
	ports := one(g, all...)
	if ports.Name == "" {
		return g.near(one(g, ports.First, ports.Last))
	}
	if e := m.At(a); e != nil {
		for _, n := range e.Ports {
			if n.Name == ports.Name && (n.Protocol == protocol || g.chance(30)) {
				return g.near(n.Port)
			}
		}
	}
	return otherwise
}

// near is a port, or the one before or behind it.
func (g *Random) near(port uint16) uint16 {
	switch {
	case g.chance(15) && port > 1:
		return port - 1
	case g.chance(15) && port < 65535:
		return port + 1
	}
	return port
}

func pointer[T any](v T) *T { return &v }

// Change is a copy of a model in which one or a few things are others: a pod came, went or has other labels; a policy, a set
// or a profile came, went, changed or changed its place.
func (g *Random) Change(m *policy.Model) *policy.Model {
	m = Clone(m)
	for again := true; again; again = g.chance(30) {
		switch g.r.IntN(6) {
		case 0:
			if len(m.Endpoints) < 15 {
				e := g.endpoint(m)
				m.Endpoints[e.ID] = e
			}
		case 1:
			if len(m.Endpoints) > 1 {
				delete(m.Endpoints, one(g, slices.Sorted(maps.Keys(m.Endpoints))...))
			}
		case 2:
			if len(m.Endpoints) > 0 {
				id := one(g, slices.Sorted(maps.Keys(m.Endpoints))...)
				e := *m.Endpoints[id]
				e.Labels = g.labels(e.Labels["projectcalico.org/namespace"])
				m.Endpoints[id] = &e
			}
		case 3:
			id := fmt.Sprintf("set%d", g.r.IntN(4))
			if m.Sets[id] != nil && g.chance(50) {
				delete(m.Sets, id)
			} else {
				m.Sets[id] = g.set(id)
			}
		case 4:
			name := "kns." + one(g, namespaces...)
			if m.Profiles[name] != nil && g.chance(30) {
				delete(m.Profiles, name)
			} else {
				m.Profiles[name] = &policy.Profile{ID: "Profile " + name, Ingress: g.rules(0), Egress: g.rules(0)}
			}
		case 5:
			if len(m.Tiers) == 0 {
				m.Tiers = []policy.Tier{{Name: "tier0", Default: policy.Deny}}
			}
			i := g.r.IntN(len(m.Tiers))
			t := &m.Tiers[i]
			switch n := len(t.Policies); {
			case n > 1 && g.chance(30):
				a, b := g.r.IntN(n), g.r.IntN(n)
				t.Policies[a], t.Policies[b] = t.Policies[b], t.Policies[a]
			case n > 0 && g.chance(60):
				j := g.r.IntN(n)
				t.Policies[j] = g.policy(t.Policies[j].ID)
			case n > 0 && g.chance(40):
				j := g.r.IntN(n)
				t.Policies = slices.Delete(t.Policies, j, j+1)
			default:
				id := fmt.Sprintf("p%d.%d", i, g.r.IntN(8))
				if !slices.ContainsFunc(t.Policies, func(p *policy.Policy) bool { return p.ID == id }) {
					t.Policies = append(t.Policies, g.policy(id))
				}
			}
		}
	}
	return m
}

// Clone is a copy whose tiers, lists of policies and maps can be changed; what they hold is shared, and must not be.
func Clone(m *policy.Model) *policy.Model {
	c := &policy.Model{Tiers: slices.Clone(m.Tiers), Profiles: maps.Clone(m.Profiles), Endpoints: maps.Clone(m.Endpoints), Sets: maps.Clone(m.Sets)}
	for i := range c.Tiers {
		c.Tiers[i].Policies = slices.Clone(c.Tiers[i].Policies)
	}
	return c
}
