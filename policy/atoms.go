package policy

import (
	"cmp"
	"encoding/binary"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/caracal-net/caracal/api/selector"
)

// atom is one thing that rules ask of an address. All are positive: what is inside a prefix satisfies whatever the
// prefix does, and "not" is asked of the set of atoms.
type atom struct {
	seq  uint32
	hash hash
	key  string
	refs int // lists of rules that name it

	// It is selected, or in one of nets, or calls a port of a protocol so. What that port's number is are atoms of their own,
	// made on sight.
	selector *selector.Selector
	nets     []netip.Prefix
	port     string
	protocol uint8
	number   uint16
	numbers  map[uint16]*atom
	of       *atom // itself, or of a number its name

	uses     int // steps of programs that ask for it
	active   bool
	touched  bool
	single   *group                // of nets: itself
	programs map[*program]struct{} // that ask for it
	groups   map[*group]struct{}   // identities that it is in
	mark     uint64                // see flatten
}

// atom is the one for a key, made if it is new. The caller counts it in refs.
func (c *Compiler) atom(key string, fill func(*atom)) *atom {
	if a := c.atoms[key]; a != nil {
		return a
	}
	c.seq++
	a := &atom{seq: c.seq, hash: hashOf(key), key: key, programs: make(map[*program]struct{}), groups: make(map[*group]struct{})}
	a.of = a
	fill(a)
	c.atoms[key] = a
	return a
}

func (c *Compiler) selectorAtom(s selector.Selector) *atom {
	return c.atom("selector "+s.String(), func(a *atom) { a.selector = &s })
}

func (c *Compiler) netsAtom(nets []netip.Prefix) *atom {
	nets = sortedNets(nets)
	var key strings.Builder
	key.WriteString("nets")
	for _, n := range nets {
		key.WriteByte(' ')
		key.WriteString(n.String())
	}
	return c.atom(key.String(), func(a *atom) { a.nets = nets })
}

func (c *Compiler) portAtom(name string, protocol uint8) *atom {
	return c.atom("port "+strconv.Itoa(int(protocol))+" "+name, func(a *atom) {
		a.port, a.protocol, a.numbers = name, protocol, make(map[uint16]*atom)
	})
}

// numberOf is the atom of addresses at which a port's name stands for a number.
func (c *Compiler) numberOf(a *atom, number uint16) *atom {
	n := a.numbers[number]
	if n == nil {
		c.seq++
		n = &atom{seq: c.seq, hash: hashOf(a.key, strconv.Itoa(int(number))), number: number, of: a}
		a.numbers[number] = n
	}
	return n
}

func (c *Compiler) releaseAtom(a *atom) {
	if a.refs--; a.refs == 0 {
		delete(c.atoms, a.key)
	}
}

// group is a set of atoms, made once: equal sets are one pointer. Those that an address has are its identity.
type group struct {
	atoms   []*atom // by seq
	key     string
	refs    int // nodes of the trie, and what is contributed to them
	entries int // prefixes in the peers table: it is an identity while there are any
	id      uint32
	hash    hash
	live    bool // it is one with rows
	loose   bool
}

func groupKey(atoms []*atom) string {
	b := make([]byte, 0, 4*len(atoms))
	for _, a := range atoms {
		b = binary.LittleEndian.AppendUint32(b, a.seq)
	}
	return string(b)
}

// intern is the group of atoms, which it sorts and may keep.
func (c *Compiler) intern(atoms []*atom) *group {
	slices.SortFunc(atoms, func(a, b *atom) int { return cmp.Compare(a.seq, b.seq) })
	atoms = slices.Compact(atoms)
	key := groupKey(atoms)
	g := c.groups[key]
	if g == nil {
		g = &group{atoms: atoms, key: key}
		c.groups[key] = g
		c.loosen(g)
	}
	return g
}

// loosen has Update look whether anything still uses g.
func (c *Compiler) loosen(g *group) {
	if !g.loose {
		g.loose = true
		c.loose = append(c.loose, g)
	}
}

func (c *Compiler) ref(g *group) *group {
	g.refs++
	return g
}

func (c *Compiler) unref(g *group) {
	if g.refs--; g.refs == 0 {
		c.loosen(g)
	}
}

func (c *Compiler) union(a, b *group) *group {
	if a == b || len(b.atoms) == 0 {
		return a
	}
	if len(a.atoms) == 0 {
		return b
	}
	pair := [2]*group{a, b}
	u := c.unions[pair]
	if u == nil {
		u = c.intern(slices.Concat(a.atoms, b.atoms))
		c.unions[pair] = u
	}
	return u
}

// identityHash says the same of a group in every process.
func (g *group) identityHash() hash {
	parts := make([]string, len(g.atoms))
	for i, a := range g.atoms {
		parts[i] = string(a.hash[:])
	}
	slices.Sort(parts)
	return hashOf(parts...)
}

// label is one that something has, or must have.
type label struct{ key, value string }

// selectorIndex finds the selectors that may match labels, without asking all of them.
type selectorIndex[T comparable] struct {
	byValue map[label][]T
	byKey   map[string][]T
	rest    []T
	where   map[T][]label // with an empty value: byKey
}

func newSelectorIndex[T comparable]() *selectorIndex[T] {
	return &selectorIndex[T]{byValue: make(map[label][]T), byKey: make(map[string][]T), where: make(map[T][]label)}
}

// add files item under the label that the selector needs and the fewest others are under.
func (x *selectorIndex[T]) add(item T, s selector.Selector) {
	var best []label
	least, byKey := 0, ""
	for key, values := range s.Needs() {
		if len(values) == 0 {
			if byKey == "" || len(x.byKey[key]) < len(x.byKey[byKey]) {
				byKey = key
			}
			continue
		}
		n := 0
		labels := make([]label, 0, len(values))
		for _, v := range values {
			labels = append(labels, label{key, v})
			n += len(x.byValue[label{key, v}])
		}
		if best == nil || n < least {
			best, least = labels, n
		}
	}
	slices.SortFunc(best, func(a, b label) int { return strings.Compare(a.value, b.value) })
	best = slices.Compact(best)
	switch {
	case best != nil:
		for _, l := range best {
			x.byValue[l] = append(x.byValue[l], item)
		}
		x.where[item] = best
	case byKey != "":
		x.byKey[byKey] = append(x.byKey[byKey], item)
		x.where[item] = []label{{key: byKey}}
	default:
		x.rest = append(x.rest, item)
	}
}

func (x *selectorIndex[T]) remove(item T) {
	labels, filed := x.where[item]
	delete(x.where, item)
	for _, l := range labels {
		removeFrom(x.byValue, l, item)
		removeFrom(x.byKey, l.key, item)
	}
	if !filed {
		x.rest = without(x.rest, item)
	}
}

// candidates calls f for every item whose selector may match labels, once each.
func (x *selectorIndex[T]) candidates(labels map[string]string, f func(T)) {
	for key, value := range labels {
		for _, item := range x.byValue[label{key, value}] {
			f(item)
		}
		for _, item := range x.byKey[key] {
			f(item)
		}
	}
	for _, item := range x.rest {
		f(item)
	}
}

// without takes one item away; the order does not stay.
func without[T comparable](list []T, item T) []T {
	if i := slices.Index(list, item); i >= 0 {
		list[i] = list[len(list)-1]
		list = slices.Delete(list, len(list)-1, len(list))
	}
	return list
}

func removeFrom[K, T comparable](m map[K][]T, key K, item T) {
	list := without(m[key], item)
	if len(list) == 0 {
		delete(m, key)
	} else {
		m[key] = list
	}
}

// netSet tells quickly whether an address is in one of many nets.
type netSet struct{ from, to []netip.Addr }

func newNetSet(nets []netip.Prefix) *netSet {
	s := &netSet{}
	for _, n := range sortedNets(nets) {
		if len(s.to) > 0 && n.Addr().Compare(s.to[len(s.to)-1]) <= 0 {
			continue // nets overlap only one inside the other, and the wider comes first
		}
		s.from, s.to = append(s.from, n.Addr()), append(s.to, lastOf(n))
	}
	return s
}

func (s *netSet) contains(a netip.Addr) bool {
	i, found := slices.BinarySearchFunc(s.from, a, netip.Addr.Compare)
	return found || i > 0 && a.Compare(s.to[i-1]) <= 0
}

// lastOf is a net's highest address.
func lastOf(n netip.Prefix) netip.Addr {
	b := n.Addr().AsSlice()
	for i := n.Bits(); i < 8*len(b); i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// sortedNets are nets in order, each once, the wider before what is in it. IPv4-mapped ones hold no packet's address.
func sortedNets(nets []netip.Prefix) []netip.Prefix {
	nets = slices.Clone(nets)
	nets = slices.DeleteFunc(nets, func(n netip.Prefix) bool { return n.Addr().Is4In6() && n.Bits() >= 96 })
	slices.SortFunc(nets, comparePrefixes)
	return slices.Compact(nets)
}

func comparePrefixes(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}
