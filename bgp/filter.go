package bgp

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	apipb "github.com/osrg/gobgp/v3/api"
)

// Filter accepts or refuses prefixes that are Prefix, or inside it, and whose mask is Min to Max bits long.
type Filter struct {
	Prefix   netip.Prefix
	Min, Max int // 0: Prefix's own length, and 32 or 128: Prefix and all that is inside it
	Accept   bool
}

func (f Filter) check(field string) error {
	if err := checkPrefix(field+".Prefix", f.Prefix); err != nil {
		return err
	}
	low, high := f.lengths()
	if f.Min < 0 || f.Max < 0 || low < f.Prefix.Bits() || high < low || high > f.Prefix.Addr().BitLen() {
		return invalid("%s: Min %d, Max %d: want %d <= Min <= Max <= %d", field, f.Min, f.Max, f.Prefix.Bits(), f.Prefix.Addr().BitLen())
	}
	return nil
}

func (f Filter) lengths() (low, high int) {
	low, high = f.Min, f.Max
	if low == 0 {
		low = f.Prefix.Bits()
	}
	if high == 0 {
		high = f.Prefix.Addr().BitLen()
	}
	return low, high
}

func (f Filter) matches(p netip.Prefix) bool {
	low, high := f.lengths()
	return low <= p.Bits() && p.Bits() <= high && inside(p, f.Prefix)
}

// inside tells whether p is b or a part of it.
func inside(p, b netip.Prefix) bool { return p.Bits() >= b.Bits() && b.Contains(p.Addr()) }

// accepts tells whether p's prefix is taken from the peer: what the policies made of it make GoBGP do.
func (p Peer) accepts(prefix netip.Prefix) bool {
	if prefix.Bits() == 0 && !p.AllowDefault {
		return false
	}
	for _, f := range p.Import {
		if f.matches(prefix) {
			return f.Accept
		}
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
	named      map[string]string // names of prefix sets by what is in them
	serial     int
}

// setPolicies puts the filters of all peers in force, for what is heard and told from now on.
func (s *Speaker) setPolicies(peers []Peer) error {
	peers = slices.Clone(peers)
	slices.SortFunc(peers, func(a, b Peer) int { return a.Address.Compare(b.Address) })
	ps := &policies{named: map[string]string{}}

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
		low, high := f.lengths()
		ps.add(neighbors, ps.prefixes(apiPrefix(f.Prefix, low, high)), decide(f.Accept))
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
		low, high := f.lengths()
		ps.add(neighbors, ps.prefixes(apiPrefix(f.Prefix, low, high)), decide(f.Accept))
	}
	ps.add(neighbors, "", decide(true))
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
	key := fmt.Sprint(members)
	if ps.named[key] == "" {
		set := &apipb.DefinedSet{DefinedType: apipb.DefinedType_PREFIX, Name: ps.name("prefixes"), Prefixes: members}
		ps.sets = append(ps.sets, set)
		ps.named[key] = set.Name
	}
	return ps.named[key]
}

func (ps *policies) add(neighbors, prefixes string, do *apipb.Actions) {
	st := &apipb.Statement{Name: ps.name("statement"), Actions: do, Conditions: &apipb.Conditions{}}
	if neighbors != "" {
		st.Conditions.NeighborSet = &apipb.MatchSet{Type: apipb.MatchSet_ANY, Name: neighbors}
	}
	if prefixes != "" {
		st.Conditions.PrefixSet = &apipb.MatchSet{Type: apipb.MatchSet_ANY, Name: prefixes}
	}
	ps.statements = append(ps.statements, st)
}

func (ps *policies) finish(direction apipb.PolicyDirection) {
	ps.result = append(ps.result, &apipb.Policy{Name: policyNames[direction], Statements: ps.statements})
	ps.statements = nil
}

func apiPrefix(p netip.Prefix, low, high int) *apipb.Prefix {
	return &apipb.Prefix{IpPrefix: p.String(), MaskLengthMin: uint32(low), MaskLengthMax: uint32(high)}
}

func decide(accept bool) *apipb.Actions {
	if accept {
		return &apipb.Actions{RouteAction: apipb.RouteAction_ACCEPT}
	}
	return &apipb.Actions{RouteAction: apipb.RouteAction_REJECT}
}
