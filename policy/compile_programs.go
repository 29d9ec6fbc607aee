package policy

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
)

// Families of addresses, as bits.
const (
	family4 = 1 << iota
	family6
	bothFamilies = family4 | family6
)

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return family4
	}
	return family6
}

// part is a list of rules that applies to an endpoint.
type part struct {
	list     *ruleList
	families map[int]int // of the rules in list.local: with which families the local side matches; bothFamilies: whatever it is
	ends     bool        // the tier, or the profiles, with a Deny
	last     bool        // of its tier
}

// spec is what makes an endpoint's policy id for a direction. Endpoints with the same hash share it.
type spec struct {
	hash  hash
	dir   Direction
	parts []part // none: policy id 0
	ports []NamedPort
}

// resolve says what applies to an endpoint. It changes nothing that is in force.
func (c *Compiler) resolve(e *endpoint) (specs [2]spec, err error) {
	var applied []*policyState
	c.selectors.candidates(e.Labels, func(p *policyState) {
		if p.Selector.Matches(e.Labels) {
			applied = append(applied, p)
		}
	})
	slices.SortFunc(applied, func(a, b *policyState) int { return a.place.compare(b.place) })
	e.sets = false
	for _, dir := range []Direction{Ingress, Egress} {
		s := spec{dir: dir}
		for _, p := range applied {
			l := c.policyList(p, dir)
			if l == nil {
				continue
			}
			if n := len(s.parts); n > 0 && s.parts[n-1].list.tier != l.tier {
				s.parts[n-1].last = true
			}
			s.parts = append(s.parts, part{list: l})
		}
		if n := len(s.parts); n > 0 {
			s.parts[n-1].last = true
		}
		for i := range s.parts {
			if p := &s.parts[i]; p.last {
				p.ends = c.tiers[p.list.tier].Default == Deny
			}
		}
		for i, name := range e.Profiles {
			last := i == len(e.Profiles)-1
			s.parts = append(s.parts, part{list: c.profileList(name, dir), ends: last, last: last})
		}
		if len(s.parts) == 0 {
			specs[dir] = s
			continue
		}
		hashes := []string{strconv.Itoa(int(dir))}
		var names []string
		for i := range s.parts {
			p := &s.parts[i]
			hashes = append(hashes, string(p.list.hash[:]), strconv.FormatBool(p.last), strconv.FormatBool(p.ends))
			if p.families, err = c.localSide(e, p.list); err != nil {
				return specs, err
			}
			for _, r := range p.list.local {
				hashes = append(hashes, strconv.Itoa(p.families[r]))
			}
			names = append(names, p.list.names...)
			e.sets = e.sets || p.list.sets
		}
		slices.Sort(names)
		for _, p := range e.Ports {
			if _, asked := slices.BinarySearch(names, p.Name); asked {
				s.ports = append(s.ports, p)
			}
		}
		slices.SortFunc(s.ports, func(a, b NamedPort) int {
			return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Port, b.Port))
		})
		s.ports = slices.Compact(s.ports)
		for _, p := range s.ports {
			hashes = append(hashes, p.Name, strconv.Itoa(int(p.Protocol)), strconv.Itoa(int(p.Port)))
		}
		s.hash = hashOf(hashes...)
		specs[dir] = s
	}
	return specs, nil
}

// localSide tells which of a list's rules are for an endpoint at all, by the address that a packet has at its end.
func (c *Compiler) localSide(e *endpoint, l *ruleList) (map[int]int, error) {
	if len(l.local) == 0 {
		return nil, nil
	}
	has := 0
	for _, a := range e.Addresses {
		has |= familyOf(a)
	}
	out := make(map[int]int, len(l.local))
	for _, i := range l.local {
		r := l.rules[i]
		version := [...]int{0: bothFamilies, 4: family4, 6: family6}[r.IPVersion]
		yes, no := 0, 0
		for _, a := range e.Addresses {
			if c.localMatches(e, a, r) {
				yes |= familyOf(a)
			} else {
				no |= familyOf(a)
			}
		}
		if both := yes & no & version; both != 0 {
			return nil, fmt.Errorf("%s, rule %d: it tells apart two addresses of %s that are of one family (%v): "+
				"give the endpoint one address of each, or have the rule name all or none of them", l.policy, r.index, e.ID, e.Addresses)
		}
		if has == 0 { // until it has an address no packet is its own
			yes = bothFamilies
		}
		switch yes &= version; yes {
		case has:
			out[i] = bothFamilies
		default:
			out[i] = yes
		}
	}
	return out, nil
}

// localMatches tells whether a rule's own side matches one of the endpoint's addresses.
func (c *Compiler) localMatches(e *endpoint, a netip.Addr, r *rule) bool {
	p := r.local
	selected := func(s interface {
		Matches(map[string]string) bool
	}) bool {
		if s.Matches(e.Labels) {
			return true
		}
		for _, set := range c.sets {
			if s.Matches(set.Labels) && set.contains(a) {
				return true
			}
		}
		return false
	}
	if r.localNets == nil && p.Nets != nil {
		r.localNets = newNetSet(p.Nets)
	}
	if r.localNotNets == nil && p.NotNets != nil {
		r.localNotNets = newNetSet(p.NotNets)
	}
	return (p.Selector == nil || selected(p.Selector)) && (p.NotSelector == nil || !selected(p.NotSelector)) &&
		(p.Nets == nil || r.localNets.contains(a)) && (p.NotNets == nil || !r.localNotNets.contains(a))
}

// step is a rule in a program, or the end of a list.
type step struct {
	rule       *rule // nil: an end, which matches everything
	action     Action
	id         uint32
	at         int // in the program
	next       int // where Pass leads
	families   int // with which the local side matches
	dst, src   ports
	dynamicDst bool // the identity's ports are asked for
	dynamicSrc bool
}

// endStep is a step that matches everything.
func endStep(action Action, id uint32) step {
	return step{action: action, id: id, families: bothFamilies, dst: ports{all: true}, src: ports{all: true}}
}

// meets tells whether an identity, whose atoms are marked, satisfies what the step asks of the remote address.
func (s *step) meets(c *Compiler) bool {
	if s.families != bothFamilies && (c.v4.mark == c.mark) != (s.families == family4) {
		return false
	}
	if s.rule == nil {
		return true
	}
	for _, a := range s.rule.pos {
		if a.mark != c.mark {
			return false
		}
	}
	for _, a := range s.rule.neg {
		if a.mark == c.mark {
			return false
		}
	}
	return true
}

// program is a policy id: the steps of all that applies.
type program struct {
	table
	hash   hash
	refs   int // endpoints, once a direction
	steps  []step
	ports  []NamedPort // of the endpoint, that rules ask for
	lists  []*ruleList
	uses   map[*atom]int
	always []int           // steps that ask for no atom
	byAtom map[*atom][]int // others, by one that they ask for
	base   *block          // for identity 0
	met    bool            // all identities; new ones it meets as they come
}

// program is that of a spec, made if it is new. The caller counts it in refs.
func (c *Compiler) program(s *spec) *program {
	if p := c.programs[s.hash]; p != nil {
		return p
	}
	p := &program{hash: s.hash, ports: s.ports, uses: make(map[*atom]int), byAtom: make(map[*atom][]int),
		table: table{number: c.policyIDs.take(s.hash), blocks: make(map[uint32]*block), fresh: true}}
	c.programs[s.hash] = p
	c.tables.policies[p.number] = &p.table
	c.changed(&p.table)
	c.newPrograms = append(c.newPrograms, p)
	first := 0
	for i := range s.parts {
		part := &s.parts[i]
		part.list.refs++
		p.lists = append(p.lists, part.list)
		if part.list.uses++; part.list.uses == 1 {
			c.nameRules(part.list)
		}
		for j, r := range part.list.rules {
			families, asked := part.families[j]
			if !asked {
				families = bothFamilies
			}
			if families != 0 {
				p.addRule(part.list, r, families)
			}
		}
		if part.ends {
			p.steps = append(p.steps, endStep(Deny, part.list.end))
		}
		if part.last {
			for j := first; j < len(p.steps); j++ {
				p.steps[j].next = len(p.steps)
			}
			first = len(p.steps)
		}
	}
	p.steps = append(p.steps, endStep(Allow, 0))
	for i := range p.steps {
		s := &p.steps[i]
		s.at = i
		by := (*atom)(nil)
		if s.families == family4 {
			by = c.v4
		}
		if s.families != bothFamilies {
			p.uses[c.v4]++
		}
		if s.rule != nil {
			for _, a := range s.rule.atoms() {
				p.uses[a]++
			}
			if len(s.rule.pos) > 0 {
				by = s.rule.pos[0]
			}
		}
		if by == nil {
			p.always = append(p.always, i)
		} else {
			p.byAtom[by] = append(p.byAtom[by], i)
		}
	}
	for a := range p.uses {
		a.uses++
		a.programs[p] = struct{}{}
		c.touchAtom(a)
	}
	p.base = c.flatten(p, nil)
	c.setBlock(&p.table, 0, p.base)
	return p
}

func (p *program) addRule(l *ruleList, r *rule, families int) {
	s := step{rule: r, action: r.Action, id: r.id, families: families, dynamicDst: r.dst.remote(), dynamicSrc: r.src.remote()}
	if s.action == Pass && l.tier == "" { // there is nothing left that could allow it
		s.action = Deny
	}
	if !s.dynamicDst {
		s.dst = r.dst.resolve(r.protocol, p.ports, nil)
	}
	if !s.dynamicSrc {
		s.src = r.src.resolve(r.protocol, p.ports, nil)
	}
	if !s.dynamicDst && s.dst.none() || !s.dynamicSrc && s.src.none() {
		return
	}
	p.steps = append(p.steps, s)
}

// dropProgram takes away a policy id that no endpoint has.
func (c *Compiler) dropProgram(p *program) {
	delete(c.programs, p.hash)
	c.policyIDs.release(p.hash)
	c.dropTable(&p.table)
	for a := range p.uses {
		a.uses--
		delete(a.programs, p)
		c.touchAtom(a)
	}
	for _, l := range p.lists {
		if l.uses--; l.uses == 0 {
			c.forgetRules(l)
		}
		c.releaseList(l)
	}
}

// meet gives a policy id its rows for an identity, if they say something else than those for anybody.
func (c *Compiler) meet(p *program, g *group) {
	var atoms []*atom
	for _, a := range g.atoms {
		if _, used := p.uses[a.of]; used {
			atoms = append(atoms, a)
		}
	}
	if len(atoms) == 0 {
		return
	}
	known := c.blocks[p]
	if known == nil {
		known = make(map[string]*block)
		c.blocks[p] = known
	}
	key := groupKey(atoms)
	b, done := known[key]
	if !done {
		b = c.flatten(p, atoms)
		if slices.Equal(b.rows, p.base.rows) {
			b = nil
		}
		known[key] = b
	}
	if b != nil {
		c.setBlock(&p.table, g.id, b)
	}
}
