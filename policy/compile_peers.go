package policy

import (
	"cmp"
	"encoding/binary"
	"math/bits"
	"net/netip"
	"slices"
)

// key is a prefix as the kernel has it: IPv4 as v4-mapped IPv6.
type key struct {
	hi, lo uint64
	bits   uint8
}

func keyOf(p netip.Prefix) key {
	a := p.Addr().As16()
	k := key{binary.BigEndian.Uint64(a[:8]), binary.BigEndian.Uint64(a[8:]), uint8(p.Bits())}
	if p.Addr().Is4() {
		k.bits += 96
	}
	return k
}

func (k key) prefix() netip.Prefix {
	var a [16]byte
	binary.BigEndian.PutUint64(a[:8], k.hi)
	binary.BigEndian.PutUint64(a[8:], k.lo)
	addr := netip.AddrFrom16(a)
	if k.bits >= 96 && addr.Is4In6() {
		return netip.PrefixFrom(addr.Unmap(), int(k.bits)-96)
	}
	return netip.PrefixFrom(addr, int(k.bits))
}

// cut is the prefix of k that is n bits long.
func (k key) cut(n uint8) key {
	switch {
	case n >= 128:
		return key{k.hi, k.lo, n}
	case n > 64:
		return key{k.hi, k.lo &^ (1<<(128-n) - 1), n}
	default:
		return key{k.hi &^ (1<<(64-n) - 1), 0, n}
	}
}

// bit is that after the first n.
func (k key) bit(n uint8) int {
	if n < 64 {
		return int(k.hi >> (63 - n) & 1)
	}
	return int(k.lo >> (127 - n) & 1)
}

// common is the length of the longest prefix of both.
func (k key) common(o key) uint8 {
	n := bits.LeadingZeros64(k.hi ^ o.hi)
	if n == 64 {
		n += bits.LeadingZeros64(k.lo ^ o.lo)
	}
	return min(uint8(n), k.bits, o.bits)
}

// node is a prefix of a path-compressed binary trie. What has nothing of its own joins others.
type node struct {
	key
	root     bool // stays; inherits nothing: that of all, and that of IPv4, which is inside of IPv6 in the map only
	dirty    bool
	child    [2]*node
	parent   *node
	own      []*group // of what is at this prefix: an endpoint, nets, sets
	identity *group   // atoms of own and of all prefixes that contain it
	entry    *group   // what the peers table has for it; nil: what its parent has
}

var v4Root = keyOf(netip.PrefixFrom(netip.IPv4Unspecified(), 0))

func (c *Compiler) newNode(k key, parent *node) *node {
	n := &node{key: k, parent: parent, identity: c.ref(parent.identity)}
	parent.child[k.bit(parent.bits)] = n
	return n
}

// node is that of a prefix, made if it is not there.
func (c *Compiler) node(k key) *node {
	n := c.trie
	for n.bits != k.bits {
		child := n.child[k.bit(n.bits)]
		if child == nil {
			return c.newNode(k, n)
		}
		common := k.common(child.key)
		if common == child.bits {
			n = child
			continue
		}
		between := c.newNode(k.cut(common), n)
		between.child[child.bit(common)], child.parent = child, between
		n = between
	}
	return n
}

// attach says that what is at a prefix has the atoms of a group; detach, that it no more has.
func (c *Compiler) attach(p netip.Prefix, g *group) {
	if len(g.atoms) > 0 {
		n := c.node(keyOf(p))
		n.own = append(n.own, c.ref(g))
		c.dirty(n)
	}
}

func (c *Compiler) detach(p netip.Prefix, g *group) {
	if len(g.atoms) > 0 {
		n := c.node(keyOf(p))
		n.own = without(n.own, g)
		c.unref(g)
		c.dirty(n)
	}
}

func (c *Compiler) dirty(n *node) {
	if !n.dirty {
		n.dirty = true
		c.dirtyNodes = append(c.dirtyNodes, n)
	}
}

// updatePeers brings identities up to date, from the widest prefix that changed down to what is inside.
func (c *Compiler) updatePeers() {
	slices.SortFunc(c.dirtyNodes, func(a, b *node) int {
		return cmp.Or(cmp.Compare(a.bits, b.bits), cmp.Compare(a.hi, b.hi), cmp.Compare(a.lo, b.lo))
	})
	for _, n := range c.dirtyNodes {
		if n.dirty {
			c.visit(n)
		}
	}
	for _, n := range c.dirtyNodes {
		c.trim(n)
	}
	c.dirtyNodes = c.dirtyNodes[:0]
}

func (c *Compiler) visit(n *node) {
	n.dirty = false
	above := c.nobody
	if n.parent != nil {
		above = n.parent.identity
	}
	identity := above
	if n.root {
		identity = c.nobody
	}
	for _, g := range n.own {
		identity = c.union(identity, g)
	}
	changed := identity != n.identity
	if changed {
		c.ref(identity)
		c.unref(n.identity)
		n.identity = identity
	}
	entry := identity
	if identity == above {
		entry = nil
	}
	if entry != n.entry {
		c.enter(n, entry)
	}
	if changed {
		for _, child := range n.child {
			if child != nil {
				c.visit(child)
			}
		}
	}
}

// enter writes what the peers table has for a prefix.
func (c *Compiler) enter(n *node, entry *group) {
	p := n.prefix()
	if _, touched := c.wasPeers[p]; !touched {
		before, had := c.tables.Peers[p]
		c.wasPeers[p] = wasPeer{before, had}
	}
	old := n.entry
	n.entry = entry
	if entry != nil {
		if entry.entries++; entry.entries == 1 && entry != c.nobody {
			c.touchGroup(entry)
			if entry.id == 0 {
				entry.hash = entry.identityHash()
				entry.id = c.identities.take(entry.hash)
			}
		}
		c.tables.setPeer(p, entry.id)
	} else {
		c.tables.deletePeer(p)
	}
	if old != nil {
		if old.entries--; old.entries == 0 && old != c.nobody {
			c.touchGroup(old)
		}
	}
}

// trim takes away a node that holds nothing and joins nothing.
func (c *Compiler) trim(n *node) {
	for n.parent != nil && !n.root && len(n.own) == 0 {
		parent := n.parent
		only := n.child[0]
		if only == nil {
			only = n.child[1]
		} else if n.child[1] != nil {
			return
		}
		parent.child[n.bit(parent.bits)] = only
		if only != nil {
			only.parent = parent
		}
		n.parent, n.child = nil, [2]*node{}
		c.unref(n.identity)
		if only != nil {
			return
		}
		n = parent
	}
}
