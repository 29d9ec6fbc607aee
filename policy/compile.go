package policy

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/caracal-net/caracal/api/selector"
)

// Options of a Compiler.
type Options struct {
	// Local tells whether an endpoint is one of this node: only these have policy ids. It is asked when an endpoint is put.
	Local func(id string) bool
	// Numbers are the ids that an earlier compiler gave out.
	Numbers Numbers
}

// Compiler holds a model, is told what changes in it and keeps Tables of it. A change costs what depends on it: a pod on
// another node its own entries, a policy the policy ids that have it. What it is given stays the giver's, and must not change. A Compiler
// is not for concurrent use.
//
// Ids mean content: a policy id its rules, an identity what it satisfies. What means something else has another id, so rows
// of the old and of the new tables can be in the maps together.
//
// An endpoint's rules are compiled for its own addresses: if an endpoint has several of one family and a rule tells them
// apart on the endpoint's own side, Update refuses the model.
type Compiler struct {
	local      func(string) bool
	policyIDs  *numbering
	identities *numbering
	rules      *numbering
	tables     *Tables

	// The model.
	endpoints map[string]*endpoint
	locals    map[string]*endpoint
	byLabel   map[label][]*endpoint
	sets      map[string]*setState
	profiles  map[string]*profileState
	tiers     map[string]Tier // by name
	arranged  []Tier          // the same, in order
	policies  map[policyKey]*policyState
	selectors *selectorIndex[*policyState]

	// What became of it.
	seq      uint32
	atoms    map[string]*atom
	asked    *selectorIndex[*atom] // the active ones of selectors
	names    map[string][]*atom    // the active ones of ports' names
	v4       *atom                 // is an IPv4 address
	groups   map[string]*group
	nobody   *group // no atoms: identity 0
	trie     *node
	programs map[hash]*program
	sources  map[hash]*sourceTable
	named    map[uint32]int // rule ids: lists in force that have them

	// Since the last Update.
	moved         []*endpoint // labels, addresses or ports
	stale         []*endpoint // perhaps other policies
	movedSets     []*setState
	touchedAtoms  []*atom
	regrouped     []*member
	dirtyNodes    []*node
	touchedGroups []*group
	loose         []*group
	unions        map[[2]*group]*group
	newPrograms   []*program
	mayGo         []*program
	idle          []*sourceTable
	blocks        map[*program]map[string]*block
	mark          uint64

	// Since the last Accept.
	wasPeers map[netip.Prefix]wasPeer
	wasPods  map[string]wasPod
	altered  []*table
	gone     []*table
	accepted bool // ever
}

type wasPeer struct {
	identity uint32
	had      bool
}

type wasPod struct {
	PodPolicies
	had bool
}

// member is what has atoms by its labels: an endpoint or a set.
type member struct {
	group *group         // what it contributes to each of its prefixes
	at    []netip.Prefix // where it does
	adds  []*atom        // that became active
	queue bool
}

type endpoint struct {
	*Endpoint
	member
	local        bool
	gone         bool
	moved, stale bool // queued
	sets         bool // a rule asks whether its address is in sets
	specs        [2]spec
	programs     [2]*program
}

type setState struct {
	*Set
	member
	gone, moved bool
	ranges      *netSet // made when first asked for
}

func (s *setState) contains(a netip.Addr) bool {
	if s.ranges == nil {
		s.ranges = newNetSet(s.Nets)
	}
	return s.ranges.contains(a)
}

type profileState struct {
	*Profile
	lists  [2]*ruleList
	absent bool // an endpoint names it, but there is none
}

type policyKey struct{ tier, id string }

// place is where a policy stands.
type place struct{ tier, policy int }

func (p place) compare(o place) int {
	return cmp.Or(cmp.Compare(p.tier, o.tier), cmp.Compare(p.policy, o.policy))
}

type policyState struct {
	*Policy
	tier   string
	place  place
	hashes [2]hash
	lists  [2]*ruleList // made when first an endpoint of this node has it
}

// NewCompiler is one with an empty model.
func NewCompiler(o Options) *Compiler {
	c := &Compiler{
		local: o.Local, policyIDs: newNumbering(o.Numbers.Policies), identities: newNumbering(o.Numbers.Identities), rules: newNumbering(o.Numbers.Rules),
		tables: newTables(), endpoints: make(map[string]*endpoint), locals: make(map[string]*endpoint), byLabel: make(map[label][]*endpoint),
		sets: make(map[string]*setState), profiles: make(map[string]*profileState), tiers: make(map[string]Tier), policies: make(map[policyKey]*policyState),
		selectors: newSelectorIndex[*policyState](), atoms: make(map[string]*atom), asked: newSelectorIndex[*atom](), names: make(map[string][]*atom),
		groups: make(map[string]*group), programs: make(map[hash]*program), sources: make(map[hash]*sourceTable), named: make(map[uint32]int), unions: make(map[[2]*group]*group),
		blocks: make(map[*program]map[string]*block), wasPeers: make(map[netip.Prefix]wasPeer), wasPods: make(map[string]wasPod),
	}
	c.nobody = c.ref(c.intern(nil))
	c.trie = &node{root: true, identity: c.ref(c.nobody)}
	c.node(v4Root).root = true
	c.v4 = c.netsAtom([]netip.Prefix{v4Root.prefix()})
	c.v4.refs++
	return c
}

// Compile makes the tables of a model at once.
func Compile(m *Model, o Options) (*Tables, error) {
	c := NewCompiler(o)
	if err := c.SetModel(m); err != nil {
		return nil, err
	}
	if _, err := c.Update(); err != nil {
		return nil, err
	}
	return c.Tables(), nil
}

// Tables are those of the last Update that succeeded.
func (c *Compiler) Tables() *Tables { return c.tables }

// Model is what the compiler was given. It takes some tens of nanoseconds for each endpoint to put together.
func (c *Compiler) Model() *Model {
	m := &Model{
		Tiers: c.arranged, Profiles: make(map[string]*Profile, len(c.profiles)),
		Endpoints: make(map[string]*Endpoint, len(c.endpoints)), Sets: make(map[string]*Set, len(c.sets)),
	}
	for name, p := range c.profiles {
		if !p.absent {
			m.Profiles[name] = p.Profile
		}
	}
	for id, e := range c.endpoints {
		m.Endpoints[id] = e.Endpoint
	}
	for id, s := range c.sets {
		m.Sets[id] = s.Set
	}
	return m
}

// Numbers are all ids in use, for the next compiler.
func (c *Compiler) Numbers() Numbers {
	return Numbers{c.policyIDs.export(), c.identities.export(), c.rules.export()}
}

// SetModel makes the model another one: what is the same pointer in both costs a comparison, the rest what changed. An
// error names the first thing that is refused; what was put before it stays.
func (c *Compiler) SetModel(m *Model) error {
	for id := range c.endpoints {
		if m.Endpoints[id] == nil {
			c.DeleteEndpoint(id)
		}
	}
	for id := range c.sets {
		if m.Sets[id] == nil {
			c.DeleteSet(id)
		}
	}
	for name := range c.profiles {
		if m.Profiles[name] == nil {
			c.DeleteProfile(name)
		}
	}
	if err := c.SetTiers(m.Tiers); err != nil {
		return err
	}
	for _, id := range slices.Sorted(maps.Keys(m.Endpoints)) {
		if err := c.PutEndpoint(m.Endpoints[id]); err != nil {
			return err
		}
	}
	for _, id := range slices.Sorted(maps.Keys(m.Sets)) {
		if err := c.PutSet(m.Sets[id]); err != nil {
			return err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(m.Profiles)) {
		if err := c.PutProfile(name, m.Profiles[name]); err != nil {
			return err
		}
	}
	return nil
}

// PutEndpoint adds an endpoint or replaces that of its ID.
func (c *Compiler) PutEndpoint(e *Endpoint) error {
	for _, a := range e.Addresses {
		if !a.IsValid() || a.Is4In6() || a.Zone() != "" {
			return fmt.Errorf("endpoint %s: %v is no plain IPv4 or IPv6 address", e.ID, a)
		}
	}
	have := c.endpoints[e.ID]
	if have == nil {
		have = &endpoint{Endpoint: &Endpoint{ID: e.ID}, member: member{group: c.nobody}, local: c.local != nil && c.local(e.ID)}
		c.endpoints[e.ID] = have
		if have.local {
			c.locals[e.ID] = have
		}
		c.stale = append(c.stale, have)
		have.stale = true
	}
	old := have.Endpoint
	have.Endpoint = e
	if local := c.local != nil && c.local(e.ID); local != have.local {
		have.local = local
		delete(c.locals, e.ID)
		if local {
			c.locals[e.ID] = have
		}
		c.stalePolicies(have)
	}
	labels, addresses, ports := maps.Equal(old.Labels, e.Labels), slices.Equal(old.Addresses, e.Addresses), slices.Equal(old.Ports, e.Ports)
	if !labels {
		c.unlabel(have, old.Labels, e.Labels)
		for key, value := range e.Labels {
			if before, had := old.Labels[key]; !had || before != value {
				c.byLabel[label{key, value}] = append(c.byLabel[label{key, value}], have)
			}
		}
	}
	if !labels || !addresses || !ports {
		c.move(have)
	}
	if have.local && !(labels && addresses && ports && slices.Equal(old.Profiles, e.Profiles)) {
		c.stalePolicies(have)
	}
	return nil
}

// unlabel takes an endpoint out of the index, for labels that it has no more.
func (c *Compiler) unlabel(e *endpoint, labels, now map[string]string) {
	for key, value := range labels {
		if v, has := now[key]; !has || v != value {
			removeFrom(c.byLabel, label{key, value}, e)
		}
	}
}

// DeleteEndpoint takes an endpoint away, if there is one of that ID.
func (c *Compiler) DeleteEndpoint(id string) {
	e := c.endpoints[id]
	if e == nil {
		return
	}
	c.unlabel(e, e.Labels, nil)
	delete(c.endpoints, id)
	delete(c.locals, id)
	e.gone = true
	c.move(e)
	c.stalePolicies(e)
}

func (c *Compiler) move(e *endpoint) {
	if !e.moved {
		e.moved = true
		c.moved = append(c.moved, e)
	}
}

func (c *Compiler) stalePolicies(e *endpoint) {
	if !e.stale {
		e.stale = true
		c.stale = append(c.stale, e)
	}
}

// PutSet adds a network set or replaces that of its ID.
func (c *Compiler) PutSet(s *Set) error {
	if have := c.sets[s.ID]; have != nil && have.Set == s {
		return nil
	}
	if err := validateNets(s.Nets); err != nil {
		return fmt.Errorf("network set %s: %w", s.ID, err)
	}
	have := c.sets[s.ID]
	if have == nil {
		have = &setState{member: member{group: c.nobody}}
		c.sets[s.ID] = have
	}
	have.Set, have.ranges = s, nil
	c.moveSet(have)
	return nil
}

// DeleteSet takes a network set away, if there is one of that ID.
func (c *Compiler) DeleteSet(id string) {
	if s := c.sets[id]; s != nil {
		delete(c.sets, id)
		s.gone = true
		c.moveSet(s)
	}
}

func (c *Compiler) moveSet(s *setState) {
	if !s.moved {
		s.moved = true
		c.movedSets = append(c.movedSets, s)
	}
	for _, e := range c.locals {
		if e.sets {
			c.stalePolicies(e)
		}
	}
}

// PutProfile adds a profile or replaces that of its name.
func (c *Compiler) PutProfile(name string, p *Profile) error {
	have := c.profiles[name]
	if have != nil && have.Profile == p {
		return nil
	}
	for _, dir := range []Direction{Ingress, Egress} {
		if err := validateRules(p.Rules(dir)); err != nil {
			return fmt.Errorf("%s, %s: %w", p.ID, dir, err)
		}
	}
	c.setProfile(name, &profileState{Profile: p})
	return nil
}

// DeleteProfile takes a profile away, if there is one of that name.
func (c *Compiler) DeleteProfile(name string) {
	if p := c.profiles[name]; p != nil && !p.absent {
		c.setProfile(name, nil)
	}
}

// setProfile replaces a profile; nil: there is none.
func (c *Compiler) setProfile(name string, p *profileState) {
	if old := c.profiles[name]; old != nil {
		c.releaseLists(&old.lists)
	}
	delete(c.profiles, name)
	if p != nil {
		c.profiles[name] = p
	}
	for _, e := range c.locals {
		if slices.Contains(e.Profiles, name) {
			c.stalePolicies(e)
		}
	}
}

func (c *Compiler) releaseLists(lists *[2]*ruleList) {
	for i, l := range lists {
		if l != nil {
			c.releaseList(l)
			lists[i] = nil
		}
	}
}

// SetTiers says which tiers there are, with what policies, all in order. A policy that is the same pointer as before costs
// a comparison. On an error nothing has changed.
func (c *Compiler) SetTiers(tiers []Tier) error {
	type found struct {
		key    policyKey
		policy *Policy
		place  place
		state  *policyState // as it was
		hashes [2]hash
	}
	var all []found
	seen := make(map[policyKey]bool)
	names := make(map[string]Tier, len(tiers))
	for i, t := range tiers {
		if _, twice := names[t.Name]; twice || t.Name == "" {
			return fmt.Errorf("tier %q: there is another of that name, or it has none", t.Name)
		}
		if t.Default != Deny && t.Default != Pass {
			return fmt.Errorf("tier %s: the default is Deny or Pass, not %s", t.Name, t.Default)
		}
		names[t.Name] = t
		for j, p := range t.Policies {
			f := found{key: policyKey{t.Name, p.ID}, policy: p, place: place{i, j}}
			if seen[f.key] {
				return fmt.Errorf("%s: it is in tier %s twice", p.ID, t.Name)
			}
			seen[f.key] = true
			f.state = c.policies[f.key]
			if f.state != nil && f.state.Policy == p {
				f.hashes = f.state.hashes
			} else {
				for _, dir := range []Direction{Ingress, Egress} {
					if r := p.Rules(dir); r != nil {
						if err := validateRules(r.Rules); err != nil {
							return fmt.Errorf("%s, %s: %w", p.ID, dir, err)
						}
						f.hashes[dir] = listHash(t.Name, p.ID, dir, r.Rules)
					}
				}
			}
			all = append(all, f)
		}
	}

	everybody := false
	for _, t := range tiers {
		everybody = everybody || c.tiers[t.Name].Default != t.Default
	}
	var changed []*Policy
	last := place{-1, -1}
	for _, f := range all {
		s := f.state
		if s != nil { // do those that stay stand in the order in which they stood?
			everybody = everybody || s.place.compare(last) < 0
			last = s.place
			if s.hashes == f.hashes && s.Selector.String() == f.policy.Selector.String() {
				s.Policy, s.place = f.policy, f.place
				continue
			}
			c.removePolicy(s)
			changed = append(changed, s.Policy)
		}
		s = &policyState{Policy: f.policy, tier: f.key.tier, place: f.place, hashes: f.hashes}
		c.policies[f.key] = s
		c.selectors.add(s, s.Selector)
		changed = append(changed, s.Policy)
	}
	if len(c.policies) > len(all) {
		for key, s := range c.policies {
			if !seen[key] {
				c.removePolicy(s)
				delete(c.policies, key)
				changed = append(changed, s.Policy)
			}
		}
	}
	c.tiers, c.arranged = names, tiers
	for _, e := range c.locals {
		if everybody || !e.stale && slices.ContainsFunc(changed, func(p *Policy) bool { return p.Selector.Matches(e.Labels) }) {
			c.stalePolicies(e)
		}
	}
	return nil
}

func (c *Compiler) removePolicy(s *policyState) {
	c.selectors.remove(s)
	c.releaseLists(&s.lists)
}

// policyList is what a policy has for a direction, nil if nothing.
func (c *Compiler) policyList(p *policyState, dir Direction) *ruleList {
	r := p.Rules(dir)
	if p.lists[dir] == nil && r != nil {
		p.lists[dir] = c.compileList(p.tier, p.ID, dir, p.hashes[dir], r.Rules)
	}
	return p.lists[dir]
}

// profileList is what a profile has for a direction; one that does not exist has no rules.
func (c *Compiler) profileList(name string, dir Direction) *ruleList {
	p := c.profiles[name]
	if p == nil {
		p = &profileState{Profile: &Profile{ID: name}, absent: true}
		c.profiles[name] = p
	}
	if p.lists[dir] == nil {
		p.lists[dir] = c.compileList("", p.ID, dir, listHash("", p.ID, dir, p.Rules(dir)), p.Rules(dir))
	}
	return p.lists[dir]
}

// Update brings the tables up to date and says what changed since the last Accept. On an error, which names what cannot be
// compiled, the tables stay as they are until an Update after the model has been mended.
func (c *Compiler) Update() (*Delta, error) {
	for _, e := range c.stale {
		if e.local && !e.gone {
			specs, err := c.resolve(e)
			if err != nil {
				return nil, err
			}
			e.specs = specs
		} else {
			e.specs = [2]spec{}
		}
	}

	for _, e := range c.moved {
		e.moved = false
		c.place(&e.member, c.atomsOf(e), e.prefixes())
	}
	for _, s := range c.movedSets {
		s.moved = false
		if s.gone {
			c.place(&s.member, nil, nil)
		} else {
			c.place(&s.member, c.selecting(s.Labels), sortedNets(s.Nets))
		}
	}
	c.moved, c.movedSets = c.moved[:0], c.movedSets[:0]

	for _, e := range c.stale {
		e.stale = false
		c.applySpecs(e)
	}
	c.stale = c.stale[:0]
	for _, p := range c.mayGo {
		if p.refs == 0 && c.programs[p.hash] == p {
			c.dropProgram(p)
		}
	}
	c.mayGo = c.mayGo[:0]

	for _, a := range c.touchedAtoms {
		a.touched = false
		switch {
		case a.uses > 0 && !a.active:
			c.activate(a)
		case a.uses == 0 && a.active:
			c.deactivate(a)
		}
	}
	c.touchedAtoms = c.touchedAtoms[:0]
	for _, m := range c.regrouped {
		m.queue = false
		kept := slices.DeleteFunc(slices.Clone(m.group.atoms), func(a *atom) bool { return !a.of.active })
		c.place(m, append(kept, m.adds...), m.at)
		m.adds = nil
	}
	c.regrouped = c.regrouped[:0]

	c.updatePeers()
	c.updateRows()
	c.sweepGroups()
	return c.delta(), nil
}

// applySpecs gives an endpoint the policy ids that it resolved to.
func (c *Compiler) applySpecs(e *endpoint) {
	before, had := c.tables.Pods[e.ID]
	if other := c.endpoints[e.ID]; other != nil && other != e { // it went and came again
		had = false
	}
	var now PodPolicies
	for dir, s := range e.specs {
		var p *program
		if len(s.parts) > 0 {
			p = c.program(&e.specs[dir])
			p.refs++
			*[2]*uint32{&now.Ingress, &now.Egress}[dir] = p.number
		}
		if old := e.programs[dir]; old != nil {
			if old.refs--; old.refs == 0 {
				c.mayGo = append(c.mayGo, old)
			}
		}
		e.programs[dir] = p
	}
	e.specs = [2]spec{}
	isLocal := e.local && !e.gone
	if isLocal == had && now == before || !isLocal && !had {
		return
	}
	if _, touched := c.wasPods[e.ID]; !touched {
		c.wasPods[e.ID] = wasPod{before, had}
	}
	if isLocal {
		c.tables.Pods[e.ID] = now
	} else {
		delete(c.tables.Pods, e.ID)
	}
}

// prefixes are where an endpoint's atoms are.
func (e *endpoint) prefixes() []netip.Prefix {
	if e.gone {
		return nil
	}
	all := make([]netip.Prefix, 0, len(e.Addresses))
	for _, a := range e.Addresses {
		all = append(all, netip.PrefixFrom(a, a.BitLen()))
	}
	return sortedNets(all)
}

// place says that a member has these atoms, at these prefixes, in order.
func (c *Compiler) place(m *member, atoms []*atom, at []netip.Prefix) {
	g := c.nobody
	if len(atoms) > 0 && len(at) > 0 {
		g = c.intern(atoms)
	}
	if g == m.group {
		if slices.Equal(m.at, at) {
			return
		}
		for p, sign := range mergeSorted(m.at, at) {
			if sign < 0 {
				c.detach(p, g)
			} else if sign > 0 {
				c.attach(p, g)
			}
		}
	} else {
		for _, p := range m.at {
			c.detach(p, m.group)
		}
		for _, p := range at {
			c.attach(p, g)
		}
	}
	m.group, m.at = g, at
}

// mergeSorted yields what is in one list only: with -1 of old, with 1 of now.
func mergeSorted(old, now []netip.Prefix) func(func(netip.Prefix, int) bool) {
	return func(yield func(netip.Prefix, int) bool) {
		for len(old) > 0 || len(now) > 0 {
			sign := 0
			switch {
			case len(now) == 0:
				sign = -1
			case len(old) == 0:
				sign = 1
			default:
				sign = comparePrefixes(old[0], now[0])
			}
			switch {
			case sign < 0:
				if !yield(old[0], -1) {
					return
				}
				old = old[1:]
			case sign > 0:
				if !yield(now[0], 1) {
					return
				}
				now = now[1:]
			default:
				old, now = old[1:], now[1:]
			}
		}
	}
}

// selecting are the active atoms of selectors that match labels.
func (c *Compiler) selecting(labels map[string]string) []*atom {
	var atoms []*atom
	c.asked.candidates(labels, func(a *atom) {
		if a.selector.Matches(labels) {
			atoms = append(atoms, a)
		}
	})
	return atoms
}

// atomsOf are the active atoms that an endpoint's labels and ports satisfy.
func (c *Compiler) atomsOf(e *endpoint) []*atom {
	if e.gone {
		return nil
	}
	atoms := c.selecting(e.Labels)
	for _, p := range e.Ports {
		for _, a := range c.names[p.Name] {
			if a.protocol == p.Protocol {
				atoms = append(atoms, c.numberOf(a, p.Port))
			}
		}
	}
	return atoms
}

func (c *Compiler) touchAtom(a *atom) {
	if !a.touched {
		a.touched = true
		c.touchedAtoms = append(c.touchedAtoms, a)
	}
}

func (c *Compiler) activate(a *atom) {
	a.active = true
	switch {
	case a.selector != nil:
		c.asked.add(a, *a.selector)
		c.eachSatisfying(a, func(m *member) { m.adds = append(m.adds, a) })
	case a.port != "":
		c.names[a.port] = append(c.names[a.port], a)
		for _, e := range c.endpoints {
			for _, p := range e.Ports {
				if p.Name == a.port && p.Protocol == a.protocol {
					c.regroup(&e.member)
					e.adds = append(e.adds, c.numberOf(a, p.Port))
				}
			}
		}
	default:
		if a.single == nil {
			a.single = c.ref(c.intern([]*atom{a}))
		}
		for _, n := range a.nets {
			c.attach(n, a.single)
		}
	}
}

func (c *Compiler) deactivate(a *atom) {
	a.active = false
	switch {
	case a.selector != nil:
		c.asked.remove(a)
		c.eachSatisfying(a, func(*member) {})
	case a.port != "":
		removeFrom(c.names, a.port, a)
		for _, e := range c.endpoints {
			if slices.ContainsFunc(e.Ports, func(p NamedPort) bool { return p.Name == a.port && p.Protocol == a.protocol }) {
				c.regroup(&e.member)
			}
		}
	default:
		for _, n := range a.nets {
			c.detach(n, a.single)
		}
		c.unref(a.single)
		a.single = nil
	}
}

// regroup has Update look at a member's atoms again: some are active no more, some are in adds.
func (c *Compiler) regroup(m *member) {
	if !m.queue {
		m.queue = true
		c.regrouped = append(c.regrouped, m)
	}
}

// eachSatisfying calls f for, and regroups, whom a selector's atom matches.
func (c *Compiler) eachSatisfying(a *atom, f func(*member)) {
	found := func(m *member, labels map[string]string) {
		if a.selector.Matches(labels) {
			c.regroup(m)
			f(m)
		}
	}
	for _, s := range c.sets {
		found(&s.member, s.Labels)
	}
	if key, values := c.fewest(*a.selector); values != nil {
		for _, v := range values {
			for _, e := range c.byLabel[label{key, v}] {
				found(&e.member, e.Labels)
			}
		}
		return
	}
	for _, e := range c.endpoints {
		found(&e.member, e.Labels)
	}
}

// fewest is the label that a selector needs, and its values, that the fewest endpoints have.
func (c *Compiler) fewest(s selector.Selector) (key string, values []string) {
	least := 0
	for k, vs := range s.Needs() {
		if len(vs) == 0 {
			continue
		}
		slices.Sort(vs)
		vs = slices.Compact(vs)
		n := 0
		for _, v := range vs {
			n += len(c.byLabel[label{k, v}])
		}
		if values == nil || n < least {
			key, values, least = k, vs, n
		}
	}
	return key, values
}

// touchGroup has updateRows look whether a group has become an identity, or is one no more.
func (c *Compiler) touchGroup(g *group) { c.touchedGroups = append(c.touchedGroups, g) }

// updateRows gives new identities and new policy ids their rows, and takes away those of identities that are gone.
func (c *Compiler) updateRows() {
	for _, g := range c.touchedGroups {
		switch live := g.entries > 0; {
		case live && !g.live:
			g.live = true
			for _, a := range g.atoms {
				a.of.groups[g] = struct{}{}
			}
			for _, p := range programsOf(g) {
				if p.met {
					c.meet(p, g)
				}
			}
		case !live && g.id != 0:
			if g.live {
				for _, p := range programsOf(g) {
					c.setBlock(&p.table, g.id, nil)
				}
				for _, a := range g.atoms {
					delete(a.of.groups, g)
				}
			}
			g.live = false
			c.identities.release(g.hash)
			g.id = 0
		}
	}
	c.touchedGroups = c.touchedGroups[:0]
	for _, p := range c.newPrograms {
		if c.programs[p.hash] != p {
			continue
		}
		var groups []*group
		for a := range p.uses {
			for g := range a.groups {
				groups = append(groups, g)
			}
		}
		slices.SortFunc(groups, func(a, b *group) int { return cmp.Compare(a.id, b.id) })
		for _, g := range slices.Compact(groups) {
			c.meet(p, g)
		}
		p.met = true
		delete(c.blocks, p)
	}
	c.newPrograms = c.newPrograms[:0]
	c.dropIdle()
	clear(c.blocks)
}

// programsOf are those that ask for an atom of a group, in the order of their numbers.
func programsOf(g *group) []*program {
	var all []*program
	for _, a := range g.atoms {
		for p := range a.of.programs {
			all = append(all, p)
		}
	}
	slices.SortFunc(all, func(a, b *program) int { return cmp.Compare(a.number, b.number) })
	return slices.Compact(all)
}

// sweepGroups forgets groups that nothing has.
func (c *Compiler) sweepGroups() {
	for _, g := range c.loose {
		g.loose = false
		if g.refs == 0 && c.groups[g.key] == g {
			delete(c.groups, g.key)
		}
	}
	c.loose = c.loose[:0]
	clear(c.unions)
}

// setBlock gives an identity its rows in a table; nil takes them.
func (c *Compiler) setBlock(t *table, identity uint32, b *block) {
	old := t.blocks[identity]
	if old == b {
		return
	}
	if !t.fresh {
		if t.was == nil {
			t.was = make(map[uint32]*block)
			c.changed(t)
		}
		if _, touched := t.was[identity]; !touched {
			t.was[identity] = old
		}
	}
	if b != nil {
		t.blocks[identity] = b
		c.hold(b)
		c.tables.rows += len(b.rows)
	} else {
		delete(t.blocks, identity)
	}
	if old != nil {
		c.tables.rows -= len(old.rows)
		c.release(old)
	}
}

func (c *Compiler) changed(t *table) { c.altered = append(c.altered, t) }

// dropTable takes all rows of a policy id away.
func (c *Compiler) dropTable(t *table) {
	delete(c.tables.policies, t.number)
	if !t.fresh {
		c.gone = append(c.gone, t)
	}
	for _, b := range t.blocks {
		c.tables.rows -= len(b.rows)
		if b.refs > 0 { // those of tables of source ports are not counted
			c.release(b)
		}
	}
}

// nameRules lists the rules of a policy or profile that has come into force; forgetRules takes them off again. Versions of
// one share those that are alike.
func (c *Compiler) nameRules(l *ruleList) {
	name := func(id uint32, index int, r *Rule) {
		c.named[id]++
		c.tables.Rules[id] = RuleInfo{RuleRef{l.tier, l.policy, index}, l.dir, r}
	}
	for _, r := range l.rules {
		name(r.id, r.index, r.Rule)
	}
	name(l.end, NoRule, nil)
}

func (c *Compiler) forgetRules(l *ruleList) {
	forget := func(id uint32) {
		if c.named[id]--; c.named[id] == 0 {
			delete(c.named, id)
			delete(c.tables.Rules, id)
		}
	}
	for _, r := range l.rules {
		forget(r.id)
	}
	forget(l.end)
}

// delta is what changed since Accept.
func (c *Compiler) delta() *Delta {
	d := &Delta{PutPods: make(map[string]PodPolicies)}
	before := func(p netip.Prefix) uint32 { // what the longest prefix said that was there and contains p
		k := keyOf(p)
		for n := int(k.bits); n >= 0; n-- {
			around := k.cut(uint8(n)).prefix()
			if was, touched := c.wasPeers[around]; touched {
				if was.had {
					return was.identity
				}
				continue
			}
			if c.tables.lengths[n] == 0 {
				continue
			}
			if id, has := c.tables.Peers[around]; has {
				return id
			}
		}
		return 0
	}
	for p, was := range c.wasPeers {
		now, has := c.tables.Peers[p]
		switch {
		case has && (!was.had || was.identity != now):
			change := PeerChange{p, was.identity, now}
			if !was.had && c.accepted {
				change.Before = before(p)
			}
			d.PutPeers = append(d.PutPeers, change)
		case !has && was.had:
			after, _ := c.tables.covering(p, 128)
			d.DeletePeers = append(d.DeletePeers, PeerChange{p, was.identity, after})
		}
	}
	for _, t := range c.altered {
		if c.tables.policies[t.number] != t {
			continue
		}
		if t.fresh {
			for identity, b := range t.blocks {
				d.addRows(t.number, identity, nil, b)
			}
			continue
		}
		for identity, old := range t.was {
			if now := t.blocks[identity]; now != old {
				d.addRows(t.number, identity, old, now)
			}
		}
	}
	for _, t := range c.gone {
		for identity, old := range t.was {
			if old != nil {
				d.addRows(t.number, identity, old, nil)
			}
		}
		for identity, b := range t.blocks {
			if _, touched := t.was[identity]; !touched {
				d.addRows(t.number, identity, b, nil)
			}
		}
	}
	for id, was := range c.wasPods {
		now, has := c.tables.Pods[id]
		switch {
		case has && (!was.had || was.PodPolicies != now):
			d.PutPods[id] = now
		case !has && was.had:
			d.DeletePods = append(d.DeletePods, id)
		}
	}
	d.sort()
	return d
}

// Accept says that the last Delta is in force: the next one begins from there. Without, the next includes it.
func (c *Compiler) Accept() {
	clear(c.wasPeers)
	clear(c.wasPods)
	for _, t := range c.altered {
		t.fresh, t.was = false, nil
	}
	c.altered, c.gone = c.altered[:0], c.gone[:0]
	c.accepted = true
	for _, n := range []*numbering{c.policyIDs, c.identities, c.rules} {
		n.settle()
	}
}
