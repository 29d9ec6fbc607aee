package ipam

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/node"
)

// assignment is one Assign at work.
type assignment struct {
	tx       *node.Tx
	pools    []api.IPPool
	reserved []netip.Prefix
	key      node.Key
	got      []netip.Addr
}

// take gives out one requested address. Its block must be this node's, or free to be claimed.
func (a *assignment) take(addr netip.Addr) error {
	if a.isReserved(addr) {
		return fmt.Errorf("%s: %w", addr, ErrReserved)
	}
	if owner, err := a.tx.Owner(addr); err == nil {
		return fmt.Errorf("%s: %w by %s", addr, ErrTaken, owner)
	}
	for _, p := range a.pools {
		if !p.CIDR.Contains(addr) {
			continue
		}
		cidr := netip.PrefixFrom(addr, p.BlockSize).Masked()
		if _, err := a.tx.Block(cidr); errors.Is(err, node.ErrNotFound) {
			if p.Disabled {
				return fmt.Errorf("%s: %w: pool %s is disabled", addr, ErrPool, p.CIDR)
			}
			if err := a.claim(cidr, p.CIDR); err != nil {
				return err
			}
		} else if err != nil {
			return err
		}
		if _, err := a.tx.TakeFreed(func(f netip.Addr) bool { return f == addr }); err != nil && !errors.Is(err, node.ErrNotFound) {
			return err
		}
		return a.hold(addr, cidr)
	}
	return fmt.Errorf("%s: %w; the pools are %s", addr, ErrOutsidePool, a.names())
}

// any gives out an address of a family: one that was never used, then the one that has been free the longest, both out of
// blocks that the node has, then one of a new block.
func (a *assignment) any(v6 bool) error {
	blocks, err := a.tx.Blocks()
	if err != nil {
		return err
	}
	for _, p := range a.enabled(v6) {
		for _, b := range blocks {
			if b.Pool != p.CIDR || b.Next >= b.Size() {
				continue
			}
			if done, err := a.next(b); done || err != nil {
				return err
			}
		}
	}
	enabled := a.enabled(v6)
	freed, err := a.tx.TakeFreed(func(f netip.Addr) bool {
		_, ok := within(enabled, f)
		return ok && !a.isReserved(f)
	})
	if err == nil {
		p, _ := within(enabled, freed)
		return a.hold(freed, netip.PrefixFrom(freed, p.BlockSize).Masked())
	}
	if !errors.Is(err, node.ErrNotFound) {
		return err
	}
	for _, p := range enabled {
		for cidr, ok := firstBlock(p), true; ok; cidr, ok = nextBlock(p, cidr) {
			if _, err := a.tx.Block(cidr); err == nil {
				continue
			}
			if err := a.claim(cidr, p.CIDR); err != nil {
				return err
			}
			b, err := a.tx.Block(cidr)
			if err != nil {
				return err
			}
			if done, err := a.next(b); done || err != nil {
				return err
			}
		}
	}
	return a.exhausted(blocks, v6)
}

// next gives out the first never-used address of a block; false when the rest of it is reserved or was requested.
func (a *assignment) next(b node.Block) (bool, error) {
	for b.Next < b.Size() {
		addr := b.At(b.Next)
		b.Next++
		if a.isReserved(addr) {
			continue
		}
		if _, err := a.tx.Owner(addr); err == nil {
			continue
		}
		// An address that was requested and released before its turn waits in the line of the freed ones.
		if _, err := a.tx.TakeFreed(func(f netip.Addr) bool { return f == addr }); err != nil && !errors.Is(err, node.ErrNotFound) {
			return false, err
		}
		if err := a.tx.PutBlock(b); err != nil {
			return false, err
		}
		return true, a.hold(addr, b.CIDR)
	}
	return false, a.tx.PutBlock(b)
}

// claim makes a block of a pool this node's own. A store shared by nodes decides here which node gets it.
func (a *assignment) claim(cidr, pool netip.Prefix) error {
	return a.tx.PutBlock(node.Block{CIDR: cidr, Pool: pool})
}

func (a *assignment) hold(addr netip.Addr, block netip.Prefix) error {
	if err := a.tx.Hold(a.key, addr, block); err != nil {
		return err
	}
	a.got = append(a.got, addr)
	return nil
}

func (a *assignment) isReserved(addr netip.Addr) bool {
	for _, r := range a.reserved {
		if r.Contains(addr) {
			return true
		}
	}
	return false
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

// room tells whether one more address of a family could be given out, as far as counting tells.
func (a *assignment) room(blocks []node.Block, v6 bool) bool {
	for _, p := range a.enabled(v6) {
		claimed := 0
		for _, b := range blocks {
			if b.Pool != p.CIDR {
				continue
			}
			claimed++
			if b.Used < b.Size()-a.reservedIn(b.CIDR) {
				return true
			}
		}
		if count := p.BlockSize - p.CIDR.Bits(); count > 30 || claimed < 1<<count {
			return true
		}
	}
	return false
}

// reservedIn counts the reserved addresses of a block.
func (a *assignment) reservedIn(cidr netip.Prefix) int {
	n := 0
	for _, r := range a.reserved {
		if r.Overlaps(cidr) {
			n += 1 << (cidr.Addr().BitLen() - max(r.Bits(), cidr.Bits()))
		}
	}
	return n
}

func (a *assignment) exhausted(blocks []node.Block, v6 bool) error {
	family := "IPv4"
	if v6 {
		family = "IPv6"
	}
	pools := a.enabled(v6)
	if len(pools) == 0 {
		return fmt.Errorf("%s: %w: no pool of that family is configured", family, ErrExhausted)
	}
	used := 0
	for _, b := range blocks {
		if b.CIDR.Addr().Is6() == v6 {
			used += b.Used
		}
	}
	return fmt.Errorf("%s: %w in %s: %d addresses are held; add a pool, or look for leaks with caracalctl ipam check", family, ErrExhausted, names(pools), used)
}

func (a *assignment) names() string { return names(a.pools) }

func names(pools []api.IPPool) string {
	s := ""
	for i, p := range pools {
		if i > 0 {
			s += ", "
		}
		s += p.CIDR.String()
	}
	return s
}

// firstBlock is a pool's first block.
func firstBlock(p api.IPPool) netip.Prefix {
	return netip.PrefixFrom(p.CIDR.Addr(), p.BlockSize).Masked()
}

// nextBlock is the block behind cidr, false when that was the pool's last.
func nextBlock(p api.IPPool, cidr netip.Prefix) (netip.Prefix, bool) {
	a := (node.Block{CIDR: cidr}).At(1<<(cidr.Addr().BitLen()-cidr.Bits()) - 1).Next()
	if !a.IsValid() || !p.CIDR.Contains(a) {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(a, p.BlockSize), true
}
