package bgp

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	apipb "github.com/osrg/gobgp/v3/api"
)

// Action is what a filter does with what it matches.
type Action int

// The actions.
const (
	Reject   Action = iota
	Accept          // at once: no later filter is asked
	Continue        // with the next filter
)

// Filter matches paths by all that it says. What it does not reject it may change.
type Filter struct {
	Prefix   netip.Prefix // paths to it or to a part of it, of its family,
	Min, Max int          // whose mask has so many bits, at least Prefix's own
	Outside  bool         // the others of that family instead

	Communities []string // that the path has: "65001:100", large ones "65001:1:2"
	ASPath      []uint32 // that its AS path begins with, nearest first; our own is not yet in it when it is told to another AS
	FromPeers   bool     // Export: that a peer told us, in contrast to our own

	Action         Action
	AddCommunities []string
	Prepend        []uint32 // before the AS path, as they will stand there
}

const maxPrepend = 10 // as Calico

func (f Filter) check(field string) error {
	if err := checkPrefix(field+".Prefix", f.Prefix); err != nil {
		return err
	}
	if f.Min < f.Prefix.Bits() || f.Max < f.Min || f.Max > f.Prefix.Addr().BitLen() {
		return invalid("%s: Min %d, Max %d: want %d <= Min <= Max <= %d", field, f.Min, f.Max, f.Prefix.Bits(), f.Prefix.Addr().BitLen())
	}
	if f.Action < Reject || f.Action > Continue {
		return invalid("%s.Action %d: want Reject, Accept or Continue", field, int(f.Action))
	}
	if f.Action == Reject && len(f.AddCommunities)+len(f.Prepend) > 0 {
		return invalid("%s changes what it rejects", field)
	}
	for _, n := range slices.Concat(f.ASPath, f.Prepend) {
		if err := checkASN(field+": AS", n); err != nil {
			return err
		}
	}
	if len(f.Prepend) > maxPrepend {
		return invalid("%s.Prepend has %d ASs, more than %d", field, len(f.Prepend), maxPrepend)
	}
	if len(f.ASPath) > 0 && len(slices.Compact(slices.Clone(f.Prepend))) > 1 {
		return invalid("%s: what asks for an AS path can prepend one AS only, any number of times", field)
	}
	if _, _, err := parseCommunities(slices.Concat(f.Communities, f.AddCommunities)); err != nil {
		return fmt.Errorf("%s: %w", field, err)
	}
	return nil
}

// inside tells whether p is b or a part of it.
func inside(p, b netip.Prefix) bool { return p.Bits() >= b.Bits() && b.Contains(p.Addr()) }

// expects tells whether a prefix is one that the peer may tell us. What a filter rejects beside that is the operator's wish.
func (p Peer) expects(prefix netip.Prefix) bool {
	if prefix.Bits() == 0 && !p.AllowDefault {
		return false
	}
	return len(p.AllowedPrefixes) == 0 || slices.ContainsFunc(p.AllowedPrefixes, func(b netip.Prefix) bool { return inside(prefix, b) })
}

var policyNames = map[apipb.PolicyDirection]string{
	apipb.PolicyDirection_IMPORT: "caracal-import",
	apipb.PolicyDirection_EXPORT: "caracal-export",
}

var (
	default4 = netip.MustParsePrefix("0.0.0.0/0")
	default6 = netip.MustParsePrefix("::/0")
)

// policies are all peers' filters in GoBGP's words: one list of statements for each direction. Peers that are treated
// alike share theirs, or a mesh's every path would be held against every node.
type policies struct {
	sets       []*apipb.DefinedSet
	statements []*apipb.Statement // of the direction being made
	result     []*apipb.Policy
	named      map[string]string // names of sets by what is in them
	serial     int
	takeBack   bool
}

// llgrStale is LLGR_STALE (RFC 9494). GoBGP withdraws a path with it from a peer that does not know long-lived graceful
// restart, and none of ours does.
const llgrStale = "65535:6"

// setPolicies puts the filters of all peers in force, for what is heard and told from now on. With takeBack, what export
// filters reject is withdrawn when it is looked at again: GoBGP does not remember what it told to whom, and leaves with the
// peer what a filter came to reject.
func (s *Speaker) setPolicies(peers []Peer, takeBack bool) error {
	peers = slices.Clone(peers)
	slices.SortFunc(peers, func(a, b Peer) int { return a.Address.Compare(b.Address) })
	ps := &policies{named: map[string]string{}, takeBack: takeBack}

	imports := group(peers, func(p Peer) string { return fmt.Sprint(p.Import, p.AllowedPrefixes, p.AllowDefault) })
	// Import filters are for what peers say.
	ps.statements = append(ps.statements, &apipb.Statement{
		Name: ps.name("statement"), Conditions: &apipb.Conditions{RouteType: apipb.Conditions_ROUTE_TYPE_LOCAL}, Actions: decide(true),
	})
	for i, g := range imports {
		ps.addImport(g, i == len(imports)-1)
	}
	ps.finish(apipb.PolicyDirection_IMPORT)

	exports := group(peers, func(p Peer) string {
		return fmt.Sprint(p.Export, p.Communities, p.NextHopSelf, p.Address.Is4(), p.ASN == s.config.ASN)
	})
	for i, g := range exports {
		ps.addExport(g, i == len(exports)-1, &s.config)
	}
	ps.finish(apipb.PolicyDirection_EXPORT)

	if err := s.server.SetPolicies(s.ctx, &apipb.SetPoliciesRequest{DefinedSets: ps.sets, Policies: ps.result}); err != nil {
		return fmt.Errorf("set filters: %w", err)
	}
	return nil
}

// group puts peers with the same key together, the smallest groups first.
func group(peers []Peer, key func(Peer) string) [][]Peer {
	groups := map[string][]Peer{}
	for _, p := range peers {
		groups[key(p)] = append(groups[key(p)], p)
	}
	sorted := slices.Collect(maps.Values(groups))
	slices.SortFunc(sorted, func(a, b []Peer) int {
		if len(a) != len(b) {
			return len(a) - len(b)
		}
		return a[0].Address.Compare(b[0].Address)
	})
	return sorted
}

func (ps *policies) addImport(g []Peer, last bool) {
	p, neighbors := g[0], ps.neighbors(g, last)
	if !p.AllowDefault {
		for _, all := range []netip.Prefix{default4, default6} {
			ps.add(neighbors, ps.prefixes(apiPrefix(all, 0, 0)), decide(false))
		}
	}
	for _, f := range p.Import {
		ps.addFilter(neighbors, f)
	}
	for _, v4 := range []bool{true, false} {
		var allowed []*apipb.Prefix
		for _, a := range p.AllowedPrefixes {
			// GoBGP looks at the longest member only, so one inside another would hide it.
			covered := slices.ContainsFunc(p.AllowedPrefixes, func(b netip.Prefix) bool { return a != b && inside(a, b) })
			if a.Addr().Is4() == v4 && !covered {
				allowed = append(allowed, apiPrefix(a, a.Bits(), a.Addr().BitLen()))
			}
		}
		if len(allowed) > 0 {
			ps.add(neighbors, ps.prefixes(allowed...), decide(true))
		}
	}
	ps.add(neighbors, "", decide(len(p.AllowedPrefixes) == 0))
}

func (ps *policies) addExport(g []Peer, last bool, c *Config) {
	p, neighbors := g[0], ps.neighbors(g, last)
	standard, large, _ := parseCommunities(p.Communities) // checked before
	if len(standard) > 0 {
		ps.add(neighbors, "", &apipb.Actions{Community: &apipb.CommunityAction{Communities: standard}})
	}
	if len(large) > 0 {
		ps.add(neighbors, "", &apipb.Actions{LargeCommunity: &apipb.CommunityAction{Communities: large}})
	}
	over4 := p.Address.Is4()
	if p.NextHopSelf {
		ps.addNextHop(neighbors, over4, &apipb.NexthopAction{Self: true})
	}
	if over4 && c.NextHop6.IsValid() && (p.NextHopSelf || p.ASN != c.ASN) {
		// GoBGP would make the session's IPv4 address the next hop.
		ps.addNextHop(neighbors, false, &apipb.NexthopAction{Address: c.NextHop6.String()})
	}
	for _, f := range p.Export {
		if p.ASN != c.ASN && len(f.ASPath) > 0 {
			f.ASPath = slices.Concat([]uint32{c.ASN}, f.ASPath) // GoBGP asks filters when it has put ours before it
		}
		ps.addFilter(neighbors, f)
	}
	ps.add(neighbors, "", decide(true))
}

// addFilter adds a filter's statements: GoBGP asks for one type of route, and prepends one AS, in each.
func (ps *policies) addFilter(neighbors string, f Filter) {
	standard, large, _ := parseCommunities(f.Communities) // checked before
	addStandard, addLarge, _ := parseCommunities(f.AddCommunities)
	types := []apipb.Conditions_RouteType{apipb.Conditions_ROUTE_TYPE_NONE}
	if f.FromPeers {
		types = []apipb.Conditions_RouteType{apipb.Conditions_ROUTE_TYPE_INTERNAL, apipb.Conditions_ROUTE_TYPE_EXTERNAL}
	}
	for _, t := range types {
		conditions := func() *apipb.Conditions {
			c := &apipb.Conditions{RouteType: t, PrefixSet: &apipb.MatchSet{Name: ps.prefixes(apiPrefix(f.Prefix, f.Min, f.Max))}}
			if f.Outside {
				c.PrefixSet.Type = apipb.MatchSet_INVERT
			}
			c.CommunitySet = ps.words(apipb.DefinedType_COMMUNITY, standard)
			c.LargeCommunitySet = ps.words(apipb.DefinedType_LARGE_COMMUNITY, large)
			if len(f.ASPath) > 0 {
				c.AsPathSet = ps.words(apipb.DefinedType_AS_PATH, []string{asPathPrefix(f.ASPath)})
			}
			return c
		}
		do := ps.decide(f.Action)
		if len(addStandard) > 0 {
			do.Community = &apipb.CommunityAction{Communities: addStandard}
		}
		if len(addLarge) > 0 {
			do.LargeCommunity = &apipb.CommunityAction{Communities: addLarge}
		}
		if all := prepends(f.Prepend); len(all) > 0 {
			do.AsPrepend = all[len(all)-1]
			for _, p := range all[:len(all)-1] {
				ps.addStatement(neighbors, conditions(), &apipb.Actions{AsPrepend: p})
			}
		}
		ps.addStatement(neighbors, conditions(), do)
	}
}

// prepends are GoBGP's actions that put ASs before a path, the last first.
func prepends(all []uint32) (do []*apipb.AsPrependAction) {
	for _, n := range slices.Backward(all) {
		if last := len(do) - 1; last >= 0 && do[last].Asn == n {
			do[last].Repeat++
		} else {
			do = append(do, &apipb.AsPrependAction{Asn: n, Repeat: 1})
		}
	}
	return do
}

// asPathPrefix is a regular expression in which GoBGP reads "_" as what separates ASs.
func asPathPrefix(all []uint32) string {
	text := "^"
	for _, n := range all {
		text += fmt.Sprint(n) + "_"
	}
	return text
}

// addNextHop sets the next hop of one family's prefixes.
func (ps *policies) addNextHop(neighbors string, v4 bool, next *apipb.NexthopAction) {
	all := default6
	if v4 {
		all = default4
	}
	ps.add(neighbors, ps.prefixes(apiPrefix(all, 0, all.Addr().BitLen())), &apipb.Actions{Nexthop: next})
}

func (ps *policies) name(kind string) string {
	ps.serial++
	return fmt.Sprintf("caracal-%s-%d", kind, ps.serial)
}

// neighbors names the set of a group's peers. The last group needs none: each group's statements end in a decision, so
// only its own peers get that far. It is the largest, and GoBGP searches a set from end to end for every path.
func (ps *policies) neighbors(g []Peer, last bool) string {
	if last {
		return ""
	}
	set := &apipb.DefinedSet{DefinedType: apipb.DefinedType_NEIGHBOR, Name: ps.name("neighbors")}
	for _, p := range g {
		set.List = append(set.List, netip.PrefixFrom(p.Address, p.Address.BitLen()).String())
	}
	ps.sets = append(ps.sets, set)
	return set.Name
}

func (ps *policies) prefixes(members ...*apipb.Prefix) string {
	return ps.set(&apipb.DefinedSet{DefinedType: apipb.DefinedType_PREFIX, Prefixes: members})
}

// words is the condition that a path has all that a set of words stands for; nil: none.
func (ps *policies) words(t apipb.DefinedType, members []string) *apipb.MatchSet {
	if len(members) == 0 {
		return nil
	}
	return &apipb.MatchSet{Type: apipb.MatchSet_ALL, Name: ps.set(&apipb.DefinedSet{DefinedType: t, List: members})}
}

// set names a set, the same one for the same members.
func (ps *policies) set(set *apipb.DefinedSet) string {
	key := fmt.Sprint(set.DefinedType, set.Prefixes, set.List)
	if ps.named[key] == "" {
		set.Name = ps.name("set")
		ps.sets = append(ps.sets, set)
		ps.named[key] = set.Name
	}
	return ps.named[key]
}

func (ps *policies) add(neighbors, prefixes string, do *apipb.Actions) {
	c := &apipb.Conditions{}
	if prefixes != "" {
		c.PrefixSet = &apipb.MatchSet{Type: apipb.MatchSet_ANY, Name: prefixes}
	}
	ps.addStatement(neighbors, c, do)
}

func (ps *policies) addStatement(neighbors string, c *apipb.Conditions, do *apipb.Actions) {
	if neighbors != "" {
		c.NeighborSet = &apipb.MatchSet{Type: apipb.MatchSet_ANY, Name: neighbors}
	}
	ps.statements = append(ps.statements, &apipb.Statement{Name: ps.name("statement"), Conditions: c, Actions: do})
}

func (ps *policies) finish(direction apipb.PolicyDirection) {
	ps.result = append(ps.result, &apipb.Policy{Name: policyNames[direction], Statements: ps.statements})
	ps.statements = nil
}

func apiPrefix(p netip.Prefix, low, high int) *apipb.Prefix {
	return &apipb.Prefix{IpPrefix: p.String(), MaskLengthMin: uint32(low), MaskLengthMax: uint32(high)}
}

// decide is a filter's action.
func (ps *policies) decide(a Action) *apipb.Actions {
	if a == Continue {
		return &apipb.Actions{}
	}
	if a == Reject && ps.takeBack && ps.result != nil { // import comes first
		return &apipb.Actions{Community: &apipb.CommunityAction{Communities: []string{llgrStale}}, RouteAction: apipb.RouteAction_ACCEPT}
	}
	return decide(a == Accept)
}

func decide(accept bool) *apipb.Actions {
	if accept {
		return &apipb.Actions{RouteAction: apipb.RouteAction_ACCEPT}
	}
	return &apipb.Actions{RouteAction: apipb.RouteAction_REJECT}
}
