package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

func hasTypes(protocol uint8) bool { return protocol == protocolICMP || protocol == protocolICMPv6 }

// validateRules refuses what tables cannot say.
func validateRules(rules []Rule) error {
	for i, r := range rules {
		if err := validateRule(&r); err != nil {
			return fmt.Errorf("rule %d: %w", i, err)
		}
	}
	return nil
}

func validateRule(r *Rule) error {
	if r.Action < Allow || r.Action > Log {
		return fmt.Errorf("%s is none: they are allow, deny, pass and log", r.Action)
	}
	if r.IPVersion != 0 && r.IPVersion != 4 && r.IPVersion != 6 {
		return fmt.Errorf("%d is no IP version: it is 4 or 6", r.IPVersion)
	}
	if (r.ICMP != nil || r.NotICMP != nil) && (r.Protocol == nil || !hasTypes(*r.Protocol)) {
		return fmt.Errorf("a type of ICMP needs the protocol ICMP or ICMPv6")
	}
	for _, p := range []*Peer{&r.Source, &r.Destination} {
		for _, ports := range slices.Concat(p.Ports, p.NotPorts) {
			if ports.Name == "" && ports.First > ports.Last {
				return fmt.Errorf("ports %d-%d end before they begin", ports.First, ports.Last)
			}
		}
		for _, nets := range [][]netip.Prefix{p.Nets, p.NotNets} {
			if err := validateNets(nets); err != nil {
				return err
			}
		}
	}
	return nil
}

func validateNets(nets []netip.Prefix) error {
	for _, n := range nets {
		if !n.IsValid() || n != n.Masked() {
			return fmt.Errorf("net %v is not %v: bits of it lie beyond its length", n, n.Masked())
		}
	}
	return nil
}

// rule is a Rule for one direction and for protocols that have ports or for such as have none, with its remote peer as atoms.
type rule struct {
	*Rule
	protocol *uint8  // nil: any
	not      []uint8 // but none of these
	id       uint32
	hash     hash
	index    int
	pos, neg []*atom // what the remote address must satisfy, and must not
	dst, src match

	local                   *Peer
	localNets, localNotNets *netSet // of local, when they were first asked for
}

// variants are the rule for each protocol that has ports, where it asks for them without saying a protocol, and for the others.
func variants(r *Rule) []*rule {
	any := rule{Rule: r, protocol: r.Protocol, src: match{any: true}, dst: match{any: true}}
	if r.NotProtocol != nil {
		any.not = []uint8{*r.NotProtocol}
	}
	needs := r.Source.Ports != nil || r.Destination.Ports != nil
	switch {
	case !needs && len(r.Source.NotPorts)+len(r.Destination.NotPorts) == 0:
		return []*rule{&any}
	case r.Protocol != nil && hasPorts(*r.Protocol):
		any.src, any.dst = match{}, match{}
		return []*rule{&any}
	case r.Protocol != nil && needs:
		return nil
	case r.Protocol != nil:
		return []*rule{&any}
	}
	var all []*rule
	for _, protocol := range []uint8{protocolTCP, protocolUDP, protocolSCTP} {
		if !slices.Contains(any.not, protocol) {
			all = append(all, &rule{Rule: r, protocol: &protocol})
		}
	}
	if !needs {
		any.not = append(any.not, protocolTCP, protocolUDP, protocolSCTP)
		all = append(all, &any)
	}
	return all
}

// is tells whether the rule is about a protocol.
func (r *rule) is(protocol uint8) bool {
	return (r.protocol == nil || *r.protocol == protocol) && !slices.Contains(r.not, protocol)
}

// asksLocal tells whether it depends on the endpoint whether the rule is for it at all.
func (r *rule) asksLocal() bool {
	l := r.local
	return r.IPVersion != 0 || l.Selector != nil || l.NotSelector != nil || l.Nets != nil || l.NotNets != nil
}

// match is what a rule asks of a port, or of an ICMP type and code.
type match struct {
	any      bool // asks for none of a list
	pos, neg []portRange
	posNames []name
	negNames []name
}

// name is a port's: among an endpoint's own, or with an atom the other end's.
type name struct {
	name string
	atom *atom
}

func (m *match) remote() bool {
	remote := func(n name) bool { return n.atom != nil }
	return slices.ContainsFunc(m.posNames, remote) || slices.ContainsFunc(m.negNames, remote)
}

// resolve is what is left when all names are known.
func (m *match) resolve(protocol *uint8, own []NamedPort, others []*atom) ports {
	add := func(list []portRange, names []name) []portRange {
		for _, n := range names {
			if n.atom == nil {
				for _, p := range own {
					if p.Name == n.name && p.Protocol == *protocol {
						list = append(list, portRange{p.Port, p.Port})
					}
				}
				continue
			}
			for _, a := range others {
				if a.of == n.atom {
					list = append(list, portRange{a.number, a.number})
				}
			}
		}
		return list
	}
	if m.any && m.neg == nil && m.negNames == nil {
		return ports{all: true}
	}
	pos := []portRange{{0, 65535}}
	if !m.any {
		pos = joinRanges(add(slices.Clone(m.pos), m.posNames))
	}
	return newPorts(subtract(pos, joinRanges(add(slices.Clone(m.neg), m.negNames))))
}

// ruleList is what a policy or profile has for one direction, compiled; shared by all programs with it.
type ruleList struct {
	hash    hash
	refs    int // the policy, and programs
	uses    int // programs
	tier    string
	policy  string
	dir     Direction
	rules   []*rule
	local   []int    // indexes of rules that ask about the endpoint
	names   []string // of its ports that rules ask for
	sets    bool     // a rule asks whether the endpoint is selected; a set may have it
	end     uint32   // rule id of the end of a list that it is the last of
	endHash hash
}

// listHash is that of a list's content.
func listHash(tier, policy string, dir Direction, rules []Rule) hash {
	parts := []string{tier, policy, strconv.Itoa(int(dir))}
	for i := range rules {
		parts = append(parts, ruleText(&rules[i]))
	}
	return hashOf(parts...)
}

// compileList names what rules ask for; the caller holds one reference. Rules were validated; h is their listHash.
func (c *Compiler) compileList(tier, policy string, dir Direction, h hash, rules []Rule) *ruleList {
	where := []string{tier, policy, strconv.Itoa(int(dir))}
	l := &ruleList{hash: h, refs: 1, tier: tier, policy: policy, dir: dir}
	for i := range rules {
		h := hashOf(append(where, strconv.Itoa(i), ruleText(&rules[i]))...)
		for _, r := range variants(&rules[i]) {
			r.hash, r.id, r.index = h, c.rules.take(h), i
			c.compileRule(l, r)
			if r.asksLocal() {
				l.local = append(l.local, len(l.rules))
			}
			l.sets = l.sets || r.local.Selector != nil || r.local.NotSelector != nil
			l.rules = append(l.rules, r)
		}
	}
	l.endHash = hashOf(append(where, strconv.Itoa(NoRule))...)
	l.end = c.rules.take(l.endHash)
	return l
}

func (c *Compiler) compileRule(l *ruleList, r *rule) {
	remote := &r.Source
	r.local = &r.Destination
	if l.dir == Egress {
		remote, r.local = r.local, remote
	}
	if remote.Selector != nil {
		r.pos = append(r.pos, c.selectorAtom(*remote.Selector))
	}
	if remote.Nets != nil {
		r.pos = append(r.pos, c.netsAtom(remote.Nets))
	}
	if remote.NotSelector != nil {
		r.neg = append(r.neg, c.selectorAtom(*remote.NotSelector))
	}
	if len(remote.NotNets) > 0 {
		r.neg = append(r.neg, c.netsAtom(remote.NotNets))
	}
	compile := func(m *match, p *Peer) {
		if m.any {
			return
		}
		m.any = p.Ports == nil
		split := func(list []Ports) (ranges []portRange, names []name) {
			for _, ports := range list {
				switch {
				case ports.Name == "":
					ranges = append(ranges, portRange{ports.First, ports.Last})
				case p == r.local:
					names = append(names, name{name: ports.Name})
					l.names = append(l.names, ports.Name)
				default:
					names = append(names, name{ports.Name, c.portAtom(ports.Name, *r.protocol)})
				}
			}
			return ranges, names
		}
		m.pos, m.posNames = split(p.Ports)
		m.neg, m.negNames = split(p.NotPorts)
	}
	compile(&r.src, &r.Source)
	compile(&r.dst, &r.Destination)
	if r.ICMP != nil {
		r.dst.any, r.dst.pos = false, []portRange{r.ICMP.ports()}
	}
	if r.NotICMP != nil {
		r.dst.neg = []portRange{r.NotICMP.ports()}
	}
	for _, a := range r.atoms() {
		a.refs++
	}
}

// ports are the numbers that stand for a type and code where others have a port.
func (i *ICMP) ports() portRange {
	first := uint16(i.Type) << 8
	if i.Code != nil {
		return portRange{first | uint16(*i.Code), first | uint16(*i.Code)}
	}
	return portRange{first, first | 0xff}
}

// atoms are all that the rule asks of the remote address.
func (r *rule) atoms() []*atom {
	all := slices.Concat(r.pos, r.neg)
	for _, names := range [][]name{r.src.posNames, r.src.negNames, r.dst.posNames, r.dst.negNames} {
		for _, n := range names {
			if n.atom != nil {
				all = append(all, n.atom)
			}
		}
	}
	return all
}

func (c *Compiler) releaseList(l *ruleList) {
	if l.refs--; l.refs > 0 {
		return
	}
	for _, r := range l.rules {
		c.rules.release(r.hash)
		for _, a := range r.atoms() {
			c.releaseAtom(a)
		}
	}
	c.rules.release(l.endHash)
}

// ruleText is the content of a rule: no two rules that differ have the same.
func ruleText(r *Rule) string {
	var b strings.Builder
	b.WriteString(r.Action.String())
	if r.IPVersion != 0 {
		fmt.Fprintf(&b, " ipv%d", r.IPVersion)
	}
	if r.Protocol != nil {
		fmt.Fprintf(&b, " protocol %d", *r.Protocol)
	}
	if r.NotProtocol != nil {
		fmt.Fprintf(&b, " not protocol %d", *r.NotProtocol)
	}
	icmp := func(word string, i *ICMP) {
		if i != nil {
			fmt.Fprintf(&b, " %s %d", word, i.Type)
			if i.Code != nil {
				fmt.Fprintf(&b, "/%d", *i.Code)
			}
		}
	}
	icmp("icmp", r.ICMP)
	icmp("not icmp", r.NotICMP)
	peer := func(word string, p *Peer) {
		if p.Selector == nil && p.NotSelector == nil && p.Nets == nil && len(p.NotNets) == 0 && p.Ports == nil && len(p.NotPorts) == 0 {
			return
		}
		b.WriteString(" " + word)
		if p.Selector != nil {
			b.WriteString(" (" + p.Selector.String() + ")")
		}
		if p.NotSelector != nil {
			b.WriteString(" not (" + p.NotSelector.String() + ")")
		}
		writeNets := func(word string, list []netip.Prefix) {
			b.WriteString(word + " {")
			for _, n := range list {
				b.WriteString(" " + n.String())
			}
			b.WriteString(" }")
		}
		if p.Nets != nil {
			writeNets(" nets", p.Nets)
		}
		if len(p.NotNets) > 0 {
			writeNets(" not nets", p.NotNets)
		}
		writePorts := func(word string, list []Ports) {
			b.WriteString(word + " {")
			for _, p := range list {
				switch {
				case p.Name != "":
					b.WriteString(" " + strconv.Quote(p.Name))
				case p.First == p.Last:
					fmt.Fprintf(&b, " %d", p.First)
				default:
					fmt.Fprintf(&b, " %d-%d", p.First, p.Last)
				}
			}
			b.WriteString(" }")
		}
		if p.Ports != nil {
			writePorts(" ports", p.Ports)
		}
		if len(p.NotPorts) > 0 {
			writePorts(" not ports", p.NotPorts)
		}
	}
	peer("from", &r.Source)
	peer("to", &r.Destination)
	return b.String()
}
