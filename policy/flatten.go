package policy

import (
	"cmp"
	"math/bits"
	"slices"
	"strconv"
)

// portRange is from a port to one, both included.
type portRange struct{ lo, hi uint16 }

// ports are disjoint ranges in order, or all.
type ports struct {
	all    bool
	ranges []portRange
}

func newPorts(ranges []portRange) ports {
	if len(ranges) == 1 && ranges[0] == (portRange{0, 65535}) {
		return ports{all: true}
	}
	return ports{ranges: ranges}
}

func (p ports) none() bool { return !p.all && len(p.ranges) == 0 }

// joinRanges sorts ranges and joins what overlaps or touches.
func joinRanges(list []portRange) []portRange {
	slices.SortFunc(list, func(a, b portRange) int { return cmp.Compare(a.lo, b.lo) })
	out := list[:0]
	for _, r := range list {
		if n := len(out); n > 0 && int(r.lo) <= int(out[n-1].hi)+1 {
			out[n-1].hi = max(out[n-1].hi, r.hi)
		} else {
			out = append(out, r)
		}
	}
	return out
}

// subtract takes minus from list, both in order and disjoint.
func subtract(list, minus []portRange) []portRange {
	var out []portRange
	for _, r := range list {
		lo := int(r.lo)
		for _, m := range minus {
			if int(m.hi) < lo || m.lo > r.hi {
				continue
			}
			if int(m.lo) > lo {
				out = append(out, portRange{uint16(lo), m.lo - 1})
			}
			lo = int(m.hi) + 1
		}
		if lo <= int(r.hi) {
			out = append(out, portRange{uint16(lo), r.hi})
		}
	}
	return out
}

// decision is what befalls packets: an action, or a table of source ports.
type decision struct {
	Row
	table *sourceTable
}

// segment is a range of ports with one decision.
type segment struct {
	portRange
	decision
}

// flatRule is a rule of a program that one identity may meet.
type flatRule struct {
	*step
	dst, src ports
}

// flatten is what a program says to an identity whose atoms are these.
func (c *Compiler) flatten(p *program, atoms []*atom) *block {
	c.mark++
	for _, a := range atoms {
		a.mark = c.mark
	}
	at := slices.Clone(p.always)
	for _, a := range atoms {
		at = append(at, p.byAtom[a]...)
	}
	slices.Sort(at)
	var list []flatRule
	var protocols []uint8
	skip, passes := 0, 0 // where what is reached begins; where a Pass leads that some packets take
	for _, i := range at {
		s := &p.steps[i]
		if i < skip || !s.meets(c) {
			continue
		}
		r := flatRule{s, s.dst, s.src}
		if s.rule != nil && s.dynamicDst {
			r.dst = s.rule.dst.resolve(s.rule.protocol, p.ports, atoms)
		}
		if s.rule != nil && s.dynamicSrc {
			r.src = s.rule.src.resolve(s.rule.protocol, p.ports, atoms)
		}
		if r.dst.none() || r.src.none() {
			continue
		}
		list = append(list, r)
		if s.rule != nil {
			protocols = append(protocols, s.rule.not...)
			if s.rule.protocol != nil {
				protocols = append(protocols, *s.rule.protocol)
			}
			if s.rule.protocol != nil || len(s.rule.not) > 0 {
				if s.action == Pass {
					passes = s.next
				}
				continue
			}
		}
		if s.action == Pass || s.action != Log && passes > i { // none of the tier's others is reached
			skip = s.next
		} else if s.action != Log {
			break
		}
	}
	slices.Sort(protocols)
	protocols = slices.Compact(protocols)

	b := &block{}
	some := make([]flatRule, 0, len(list))
	for _, r := range list {
		if r.rule == nil || r.rule.protocol == nil {
			some = append(some, r)
		}
	}
	rest := c.decide(some, nil, 0)
	b.add(0, 0, 0, rest)
	for _, protocol := range protocols {
		some = some[:0]
		for _, r := range list {
			if r.rule == nil || r.rule.is(protocol) {
				some = append(some, r)
			}
		}
		b.addSegments(protocol, c.sweep(some, protocol, false), rest)
	}
	return b
}

// decide is the first match among rules, of those in the set (nil: all); source ports, where rules ask for them, follow in a
// table of their own, unless inTable: then all of the rules have matched them.
func (c *Compiler) decide(rules []flatRule, set []uint64, protocol uint8) decision {
	d, asks := firstMatch(rules, set, false)
	if !asks {
		return d
	}
	var some []flatRule
	for i, r := range rules {
		if set == nil || set[i/64]>>(i%64)&1 != 0 {
			some = append(some, r)
		}
	}
	segments := c.sweep(some, protocol, true)
	if len(segments) == 1 {
		return segments[0].decision
	}
	t := c.sourceTable(protocol, segments)
	return decision{Row{Flags: FlagSource, Rule: t.number}, t}
}

// firstMatch is the decision of rules that match whatever is open; asks tells that some ask for a source port, which here
// did not match.
func firstMatch(rules []flatRule, set []uint64, inTable bool) (d decision, asks bool) {
	skip := 0
	consider := func(r *flatRule) (done bool) {
		switch {
		case r.at < skip:
		case !inTable && !r.src.all:
			asks = true
		case r.action == Log:
			d.Flags |= FlagLog
		case r.action == Pass:
			skip = r.next
		default:
			d.Action, d.Rule = r.action, r.id
			return true
		}
		return false
	}
	if set == nil {
		for i := range rules {
			if consider(&rules[i]) {
				break
			}
		}
		return d, asks
	}
	for w, word := range set {
		for ; word != 0; word &= word - 1 {
			if consider(&rules[w*64+bits.TrailingZeros64(word)]) {
				return d, asks
			}
		}
	}
	return d, asks
}

// sweep is the decisions for all ports of a protocol, in order: of the packet's destination, or in a table its source.
func (c *Compiler) sweep(rules []flatRule, protocol uint8, inTable bool) []segment {
	type event struct {
		port int
		rule int
	}
	var events []event
	set := make([]uint64, (len(rules)+63)/64)
	for i := range rules {
		p := rules[i].dst
		if inTable {
			p = rules[i].src
		}
		if p.all {
			set[i/64] |= 1 << (i % 64)
			continue
		}
		for _, r := range p.ranges {
			events = append(events, event{int(r.lo), i}, event{int(r.hi) + 1, i})
		}
	}
	slices.SortFunc(events, func(a, b event) int { return cmp.Compare(a.port, b.port) })
	var segments []segment
	for port := 0; port <= 65535; {
		for len(events) > 0 && events[0].port == port {
			set[events[0].rule/64] ^= 1 << (events[0].rule % 64)
			events = events[1:]
		}
		next := 65536
		if len(events) > 0 {
			next = events[0].port
		}
		var d decision
		if inTable {
			d, _ = firstMatch(rules, set, true)
		} else {
			d = c.decide(rules, set, protocol)
		}
		if n := len(segments); n > 0 && segments[n-1].decision == d {
			segments[n-1].hi = uint16(next - 1)
		} else {
			segments = append(segments, segment{portRange{uint16(port), uint16(next - 1)}, d})
		}
		port = next
	}
	return segments
}

// block is the rows of a policy id and an identity, in order; the same content has the same rows.
type block struct {
	rows   []blockRow
	tables []*sourceTable // that rows lead to
	refs   int            // pairs that have it
}

// blockRow is a row without the policy id and the identity.
type blockRow struct {
	protocol uint8
	bits     uint8 // as Key.Bits
	port     uint16
	Row
}

func (b *block) add(protocol, bits uint8, port uint16, d decision) {
	b.rows = append(b.rows, blockRow{protocol, bits + keyBits, port, d.Row})
	if d.table != nil && !slices.Contains(b.tables, d.table) {
		b.tables = append(b.tables, d.table)
	}
}

// addSegments writes a protocol's: what takes most prefixes as the protocol's row, others as prefixes of it.
func (b *block) addSegments(protocol uint8, segments []segment, rest decision) {
	most := segments[0].decision
	if len(segments) > 1 {
		count := make(map[decision]int, len(segments))
		for _, s := range segments {
			count[s.decision] += s.prefixes(func(uint16, uint8) {})
		}
		for _, s := range segments {
			if count[s.decision] > count[most] {
				most = s.decision
			}
		}
	}
	if most != rest {
		b.add(protocol, protocolBits, 0, most)
	}
	for _, s := range segments {
		if s.decision != most {
			s.prefixes(func(port uint16, bits uint8) { b.add(protocol, protocolBits+bits, port, s.decision) })
		}
	}
}

// prefixes calls f for the fewest prefixes that make up the range, and tells how many they are.
func (r portRange) prefixes(f func(port uint16, bits uint8)) (n int) {
	for lo := int(r.lo); lo <= int(r.hi); n++ {
		size := 16
		if lo > 0 {
			size = bits.TrailingZeros(uint(lo))
		}
		for lo+1<<size-1 > int(r.hi) {
			size--
		}
		f(uint16(lo), uint8(16-size))
		lo += 1 << size
	}
	return n
}

// sourceTable is a verdict by source port, shared by all rows that lead to the same.
type sourceTable struct {
	table
	hash hash
	refs int // blocks
}

func (c *Compiler) sourceTable(protocol uint8, segments []segment) *sourceTable {
	parts := []string{"source ports", strconv.Itoa(int(protocol))}
	for _, s := range segments {
		parts = append(parts, strconv.Itoa(int(s.lo)), strconv.Itoa(int(s.Action)), strconv.Itoa(int(s.Flags)), strconv.FormatUint(uint64(s.Rule), 10))
	}
	h := hashOf(parts...)
	t := c.sources[h]
	if t == nil {
		b := &block{}
		// Other protocols never come here; a table that answers them too has no way of saying nothing.
		b.add(0, 0, 0, segments[0].decision)
		b.addSegments(protocol, segments, segments[0].decision)
		t = &sourceTable{hash: h, table: table{number: c.policyIDs.take(h), blocks: map[uint32]*block{SourceIdentity: b}, fresh: true}}
		c.sources[h] = t
		c.tables.policies[t.number] = &t.table
		c.tables.rows += len(b.rows)
		c.changed(&t.table)
		c.idle = append(c.idle, t) // until a block holds it
	}
	return t
}

// hold and release count the pairs that have a block, and the blocks that lead to a table of source ports.
func (c *Compiler) hold(b *block) {
	if b.refs++; b.refs == 1 {
		for _, t := range b.tables {
			t.refs++
		}
	}
}

func (c *Compiler) release(b *block) {
	if b.refs--; b.refs == 0 {
		for _, t := range b.tables {
			if t.refs--; t.refs == 0 {
				c.idle = append(c.idle, t)
			}
		}
	}
}

// dropIdle takes away tables of source ports that nothing leads to.
func (c *Compiler) dropIdle() {
	for _, t := range c.idle {
		if t.refs == 0 && c.sources[t.hash] == t {
			delete(c.sources, t.hash)
			c.policyIDs.release(t.hash)
			c.dropTable(&t.table)
		}
	}
	c.idle = c.idle[:0]
}
