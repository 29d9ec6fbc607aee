package policy

import (
	"net/netip"
	"slices"

	"github.com/caracal-net/caracal/api/selector"
)

// Protocols that the model knows more of than their number (IANA).
const (
	protocolICMP   = 1
	protocolTCP    = 6
	protocolUDP    = 17
	protocolICMPv6 = 58
	protocolSCTP   = 132
)

// Verdict is what befalls a packet at one of its ends.
type Verdict struct {
	Action Action  // Allow or Deny
	Rule   RuleRef // what decided. No Policy: nothing was to decide, so Allow
	Logged bool    // a Log rule matched before that
	Trace  []Look  // the rules that were looked at, in their order
}

// Look is a rule held against a packet.
type Look struct {
	Ref    RuleRef
	Rule   *Rule
	Missed []Term // the conditions that do not hold, in the order of Rule's and Peer's fields; none: it matches
}

// Term is one condition of a rule.
type Term struct {
	End   string // "source" or "destination"; "": of the packet as a whole
	Field string // of Rule, or of Peer for an end: "Protocol", "NotNets"
}

// The ends of a packet, as a Term names them.
const (
	source      = "source"
	destination = "destination"
)

// Evaluate says what the policies and profiles of an endpoint do with a packet that it receives (Ingress) or sends (Egress).
// An endpoint that is not in the model has none. It goes through the rules one by one, and costs as much.
func (m *Model) Evaluate(endpoint string, d Direction, p Packet) Verdict {
	v := Verdict{Action: Allow, Rule: RuleRef{Index: NoRule}}
	e := m.Endpoints[endpoint]
	if e == nil {
		return v
	}
	from, to := m.end(p.Source, p.SourcePort), m.end(p.Destination, p.TargetPort)

	// first is the action of the first rule that matches; whether there is one or not, v.Rule says where it ended.
	first := func(tier, id string, rules []Rule) (Action, bool) {
		for i := range rules {
			v.Rule = RuleRef{tier, id, i}
			l := Look{v.Rule, &rules[i], rules[i].missed(p, from, to)}
			v.Trace = append(v.Trace, l)
			switch {
			case len(l.Missed) > 0:
			case l.Rule.Action == Log:
				v.Logged = true
			default:
				return l.Rule.Action, true
			}
		}
		v.Rule = RuleRef{tier, id, NoRule}
		return 0, false
	}

	for _, tier := range m.Tiers {
		action := Pass // of a tier in which nothing selects the endpoint
		for _, pol := range tier.Policies {
			rules := pol.Rules(d)
			if rules == nil || !pol.Selector.Matches(e.Labels) {
				continue
			}
			var matched bool
			if action, matched = first(tier.Name, pol.ID, rules.Rules); matched {
				break
			}
			action = tier.Default
		}
		if action != Pass {
			v.Action = action
			return v
		}
	}

	if len(e.Profiles) == 0 {
		v.Rule = RuleRef{Index: NoRule}
		return v
	}
	for _, name := range e.Profiles {
		id, rules := name, []Rule(nil)
		if profile := m.Profiles[name]; profile != nil {
			id, rules = profile.ID, profile.Rules(d)
		}
		if action, matched := first("", id, rules); matched {
			v.Action = action
			if action == Pass { // there is nothing left that could allow it
				v.Action = Deny
			}
			return v
		}
	}
	v.Action = Deny
	return v
}

// Rules are the policy's for a direction; nil: it is not about it.
func (p *Policy) Rules(d Direction) *Rules {
	if d == Ingress {
		return p.Ingress
	}
	return p.Egress
}

// Rules are the profile's for a direction.
func (p *Profile) Rules(d Direction) []Rule {
	if d == Ingress {
		return p.Ingress
	}
	return p.Egress
}

// Nearest is the rule that would have turned the verdict and of which the fewest conditions do not hold, the first of such;
// false if there is none.
func (v Verdict) Nearest() (Look, bool) {
	var nearest Look
	for _, l := range v.Trace {
		turns := l.Rule.Action == Allow && v.Action == Deny || l.Rule.Action == Deny && v.Action == Allow
		if turns && len(l.Missed) > 0 && (nearest.Rule == nil || len(l.Missed) < len(nearest.Missed)) {
			nearest = l
		}
	}
	return nearest, nearest.Rule != nil
}

// FlowVerdict is what befalls a packet at both of its ends. nil: no endpoint has that address.
type FlowVerdict struct {
	Egress, Ingress *Verdict // of the source and of the destination
}

// Flow says what befalls a packet from its source's policies to its destination's.
func (m *Model) Flow(p Packet) FlowVerdict {
	var f FlowVerdict
	if e := m.At(p.Source); e != nil {
		v := m.Evaluate(e.ID, Egress, p)
		f.Egress = &v
	}
	if e := m.At(p.Destination); e != nil {
		v := m.Evaluate(e.ID, Ingress, p)
		f.Ingress = &v
	}
	return f
}

// Action is Allow if both ends do, otherwise Deny.
func (f FlowVerdict) Action() Action {
	for _, v := range []*Verdict{f.Egress, f.Ingress} {
		if v != nil && v.Action == Deny {
			return Deny
		}
	}
	return Allow
}

// At is the endpoint that has an address, nil if none.
func (m *Model) At(a netip.Addr) *Endpoint {
	for _, e := range m.Endpoints {
		if slices.Contains(e.Addresses, a) {
			return e
		}
	}
	return nil
}

// end is what rules see of one end of a packet.
type end struct {
	addr     netip.Addr
	port     uint16
	endpoint *Endpoint           // that has the address, or nil
	labels   []map[string]string // of the endpoint, and of the sets that the address is in
}

func (m *Model) end(a netip.Addr, port uint16) end {
	e := end{addr: a, port: port, endpoint: m.At(a)}
	if e.endpoint != nil {
		e.labels = append(e.labels, e.endpoint.Labels)
	}
	for _, s := range m.Sets {
		if inside(s.Nets, a) {
			e.labels = append(e.labels, s.Labels)
		}
	}
	return e
}

// missed are the rule's conditions that do not hold.
func (r *Rule) missed(p Packet, from, to end) []Term {
	var missed []Term
	needs := func(end, field string, holds bool) {
		if !holds {
			missed = append(missed, Term{end, field})
		}
	}
	needs("", "IPVersion", r.IPVersion == 0 || r.IPVersion == version(p.Source))
	needs("", "Protocol", r.Protocol == nil || *r.Protocol == p.Protocol)
	needs("", "NotProtocol", r.NotProtocol == nil || *r.NotProtocol != p.Protocol)
	needs("", "ICMP", r.ICMP == nil || r.ICMP.is(p))
	needs("", "NotICMP", r.NotICMP == nil || !r.NotICMP.is(p))
	for _, side := range []struct {
		name string
		peer *Peer
		end  end
	}{{source, &r.Source, from}, {destination, &r.Destination, to}} {
		peer, e := side.peer, side.end
		needs(side.name, "Selector", peer.Selector == nil || e.selected(*peer.Selector))
		needs(side.name, "NotSelector", peer.NotSelector == nil || !e.selected(*peer.NotSelector))
		needs(side.name, "Nets", peer.Nets == nil || inside(peer.Nets, e.addr))
		needs(side.name, "NotNets", !inside(peer.NotNets, e.addr))
		needs(side.name, "Ports", peer.Ports == nil || e.portIn(peer.Ports, p.Protocol))
		needs(side.name, "NotPorts", !e.portIn(peer.NotPorts, p.Protocol))
	}
	return missed
}

// is tells whether a packet is ICMP, of this type and code.
func (i *ICMP) is(p Packet) bool {
	return (p.Protocol == protocolICMP || p.Protocol == protocolICMPv6) && p.ICMPType == i.Type && (i.Code == nil || *i.Code == p.ICMPCode)
}

func (e end) selected(s selector.Selector) bool {
	return slices.ContainsFunc(e.labels, s.Matches)
}

// portIn tells whether the end's port is one of ports. What has no ports is in no range of them.
func (e end) portIn(ports []Ports, protocol uint8) bool {
	return hasPorts(protocol) && slices.ContainsFunc(ports, func(p Ports) bool {
		if p.Name != "" {
			return e.endpoint != nil && slices.Contains(e.endpoint.Ports, NamedPort{p.Name, protocol, e.port})
		}
		return p.First <= e.port && e.port <= p.Last
	})
}

func hasPorts(protocol uint8) bool {
	return protocol == protocolTCP || protocol == protocolUDP || protocol == protocolSCTP
}

// inside tells whether an address is in one of nets; one of the other IP version is not.
func inside(nets []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(nets, func(n netip.Prefix) bool { return n.Contains(a) })
}

func version(a netip.Addr) int {
	if a.Is4() {
		return 4
	}
	return 6
}
