package ipam

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/node"
)

// assignment is one Assign or Status at work.
type assignment struct {
	tx       *node.Tx
	pools    []api.IPPool
	reserved []netip.Prefix
	claimed  bool // out of the blocks that this node has
	key      node.Key
	got      []netip.Addr
}

// choice is an address that may be given out, and what is to be recorded with it.
type choice struct {
	addr    netip.Addr
	block   node.Block   // as it is recorded before the address is held
	skipped []netip.Addr // reserved ones before it; not reserved for ever or for every network, so they go in line
	waited  bool         // it was in line to be given out again
}

// requested chooses this very address. Its block must be this node's, or free to be claimed. It writes nothing.
func (a *assignment) requested(addr netip.Addr) (choice, error) {
	if a.isReserved(addr) {
		return choice{}, fmt.Errorf("%s: %w", addr, ErrReserved)
	}
	owner, err := a.tx.Owner(addr)
	if err == nil {
		return choice{}, fmt.Errorf("%s: %w by %s", addr, ErrTaken, owner)
	}
	if !errors.Is(err, node.ErrNotFound) {
		return choice{}, err
	}
	p, ok := within(a.pools, addr)
	if !ok {
		return choice{}, fmt.Errorf("%s: %w; the pools are %s", addr, ErrOutsidePool, list(a.pools))
	}
	if p.Disabled {
		return choice{}, fmt.Errorf("%s: %w: pool %s is disabled", addr, ErrPool, p.CIDR)
	}
	cidr := netip.PrefixFrom(addr, p.BlockSize).Masked()
	b, err := a.tx.Block(cidr)
	if b.Closed || errors.Is(err, node.ErrNotFound) && a.claimed {
		return choice{}, fmt.Errorf("%s: %w; ask for it on the node that has %s (caracalctl ipam show --show-blocks)", addr, ErrNotClaimed, cidr)
	}
	if errors.Is(err, node.ErrNotFound) {
		b, err = node.Block{CIDR: cidr, Pool: p.CIDR}, nil
	}
	if err != nil {
		return choice{}, err
	}
	return choice{addr: addr, block: b, waited: true}, nil
}

// any gives out an address of a family.
func (a *assignment) any(v6 bool) error {
	blocks, err := a.tx.Blocks()
	if err != nil {
		return err
	}
	c, err := a.find(blocks, v6)
	if err != nil {
		return err
	}
	return a.give(c)
}

// give records a choice. Its block becomes this node's own if it was not: a store shared by nodes decides here which
// node gets it.
func (a *assignment) give(c choice) error {
	if c.waited {
		if _, err := a.tx.TakeFreed(func(f netip.Addr) bool { return f == c.addr }); err != nil && !errors.Is(err, node.ErrNotFound) {
			return err
		}
	}
	if err := a.tx.PutBlock(c.block); err != nil {
		return err
	}
	for _, s := range c.skipped {
		if err := a.tx.Free(s); err != nil {
			return err
		}
	}
	if err := a.tx.Hold(a.key, c.addr, c.block.CIDR); err != nil {
		return err
	}
	a.got = append(a.got, c.addr)
	return nil
}

// find chooses an address of a family: one that was never used, then the one that has been free the longest, both out
// of blocks that the node has, then one of a new block. It writes nothing.
func (a *assignment) find(blocks []node.Block, v6 bool) (choice, error) {
	var line []netip.Addr
	waits := make(map[netip.Addr]bool)
	err := a.tx.Freed(func(f netip.Addr) error {
		line = append(line, f)
		waits[f] = true
		return nil
	})
	if err != nil {
		return choice{}, err
	}
	claimed := make(map[netip.Prefix]node.Block)
	for _, b := range blocks {
		claimed[b.CIDR] = b
	}
	enabled := a.enabled(v6)
	for _, p := range enabled {
		for _, b := range blocks {
			if b.Pool != p.CIDR || b.Closed {
				continue
			}
			if c, ok, err := a.next(b, waits); ok || err != nil {
				return c, err
			}
		}
	}
	for _, f := range line {
		p, ok := within(enabled, f)
		if !ok || a.isReserved(f) {
			continue
		}
		if b, ok := claimed[netip.PrefixFrom(f, p.BlockSize).Masked()]; ok && !b.Closed {
			return choice{addr: f, block: b, waited: true}, nil
		}
	}
	if a.claimed {
		return choice{}, fmt.Errorf("%w; or this node's agent has not claimed another block yet (caracalctl node status)", exhausted(enabled, blocks, v6))
	}
	for _, p := range enabled {
		for cidr, ok := netip.PrefixFrom(p.CIDR.Addr(), p.BlockSize), true; ok; {
			behind := cidr
			if r, ok := a.reservation(cidr); ok {
				behind = r // one step, however large it is
			} else if _, ok := claimed[cidr]; !ok {
				if c, ok, err := a.next(node.Block{CIDR: cidr, Pool: p.CIDR}, nil); ok || err != nil {
					return c, err
				}
			}
			cidr, ok = nextBlock(p, behind)
		}
	}
	return choice{}, exhausted(enabled, blocks, v6)
}

// next chooses the first never-used address of a block; false when there is none, or the rest of them is reserved.
func (a *assignment) next(b node.Block, waits map[netip.Addr]bool) (choice, bool, error) {
	var skipped []netip.Addr
	for ; b.Next < b.Size(); b.Next++ {
		addr := b.At(b.Next)
		if waits[addr] {
			continue // it was requested and released before its turn
		}
		if _, err := a.tx.Owner(addr); err == nil {
			continue // it was requested before its turn
		} else if !errors.Is(err, node.ErrNotFound) {
			return choice{}, false, err
		}
		if a.isReserved(addr) {
			skipped = append(skipped, addr)
			continue
		}
		b.Next++
		return choice{addr: addr, block: b, skipped: skipped}, true, nil
	}
	return choice{}, false, nil
}

func (a *assignment) isReserved(addr netip.Addr) bool {
	for _, r := range a.reserved {
		if r.Contains(addr) {
			return true
		}
	}
	return false
}

// reservation is one that has the whole of a block.
func (a *assignment) reservation(cidr netip.Prefix) (netip.Prefix, bool) {
	for _, r := range a.reserved {
		if r.Bits() <= cidr.Bits() && r.Contains(cidr.Addr()) {
			return r, true
		}
	}
	return netip.Prefix{}, false
}

// enabled are the pools of a family that new addresses may come out of.
func (a *assignment) enabled(v6 bool) []api.IPPool {
	var pools []api.IPPool
	for _, p := range a.pools {
		if p.CIDR.Addr().Is6() == v6 && !p.Disabled {
			pools = append(pools, p)
		}
	}
	return pools
}

func within(pools []api.IPPool, addr netip.Addr) (api.IPPool, bool) {
	for _, p := range pools {
		if p.CIDR.Contains(addr) {
			return p, true
		}
	}
	return api.IPPool{}, false
}

func exhausted(pools []api.IPPool, blocks []node.Block, v6 bool) error {
	family := "IPv4"
	if v6 {
		family = "IPv6"
	}
	if len(pools) == 0 {
		return fmt.Errorf("%s: %w: no pool of that family is configured and enabled", family, ErrExhausted)
	}
	var usage []string
	for _, p := range pools {
		used := 0 // what is not held is reserved
		for _, b := range blocks {
			if p.CIDR.Contains(b.CIDR.Addr()) {
				used += b.Used
			}
		}
		usage = append(usage, fmt.Sprintf("%s (%d of %s addresses held)", p.CIDR, used, size(p.CIDR)))
	}
	return fmt.Errorf("%s: %w in %s; add a pool, or look for leaks with caracalctl ipam check",
		family, ErrExhausted, strings.Join(usage, ", "))
}

// size is a prefix's number of addresses in words.
func size(p netip.Prefix) string {
	bits := p.Addr().BitLen() - p.Bits()
	if bits > 32 {
		return fmt.Sprintf("2^%d", bits)
	}
	return strconv.FormatInt(1<<bits, 10)
}

func list(pools []api.IPPool) string {
	var all []string
	for _, p := range pools {
		all = append(all, p.CIDR.String())
	}
	return strings.Join(all, ", ")
}

// nextBlock is a pool's first block behind cidr, which is one of its blocks or larger; false when there is none.
func nextBlock(p api.IPPool, cidr netip.Prefix) (netip.Prefix, bool) {
	last := cidr.Masked().Addr().AsSlice()
	for bit := cidr.Bits(); bit < len(last)*8; bit++ {
		last[bit/8] |= 0x80 >> (bit % 8)
	}
	a, _ := netip.AddrFromSlice(last)
	a = a.Next()
	if !a.IsValid() || !p.CIDR.Contains(a) {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(a, p.BlockSize), true
}
