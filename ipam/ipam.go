// Package ipam gives attachments their addresses: out of blocks that this node claims from pools, in the caller's
// transaction on node.db.
package ipam

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/node"
)

// DefaultPool is used for IPv4 when no pool of either family is configured.
var DefaultPool = netip.MustParsePrefix("10.244.0.0/16")

var (
	// ErrExhausted says that a family's pools have no address left that this node may give out.
	ErrExhausted = errors.New("no address left")
	// ErrTaken says that a requested address is held by another attachment.
	ErrTaken = errors.New("address is taken")
	// ErrOutsidePool says that a requested address is in none of the pools.
	ErrOutsidePool = errors.New("address is in no pool")
	// ErrReserved says that a requested address is reserved.
	ErrReserved = errors.New("address is reserved")
	// ErrPool says that a pool can't be used as it is written.
	ErrPool = errors.New("unusable pool")
)

// Config is what addresses are given out from.
type Config struct {
	Pools        []api.IPPool   // as written; both families; none: DefaultPool
	Reservations []netip.Prefix // never given out, also not on request
}

// Request is what an attachment wants.
type Request struct {
	Key  node.Key
	Want []netip.Addr // these addresses, of any family
	V4   bool         // an IPv4 address, unless Want has one
	V6   bool         // an IPv6 address, unless Want has one
}

// Pools validates the configured pools and puts the default in their place when there are none.
func (c Config) pools() ([]api.IPPool, error) {
	if len(c.Pools) == 0 {
		p, err := api.IPPool{CIDR: DefaultPool}.Defaulted()
		return []api.IPPool{p}, err
	}
	var pools []api.IPPool
	for _, p := range c.Pools {
		p, err := p.Defaulted()
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrPool, err)
		}
		for _, other := range pools {
			if p.CIDR.Overlaps(other.CIDR) {
				return nil, fmt.Errorf("%w: %s overlaps %s", ErrPool, p.CIDR, other.CIDR)
			}
		}
		pools = append(pools, p)
	}
	return pools, nil
}

// Validate checks the configuration without a database.
func (c Config) Validate() error {
	_, err := c.pools()
	return err
}

// Families tells which families the pools have.
func (c Config) Families() (v4, v6 bool) {
	pools, _ := c.pools()
	for _, p := range pools {
		v4 = v4 || p.CIDR.Addr().Is4()
		v6 = v6 || p.CIDR.Addr().Is6()
	}
	return v4, v6
}

// Assign gives the attachment its addresses, IPv4 first. Repeated for an attachment that holds some already it returns
// those. On an error the caller's transaction must be given up. Errors: ErrExhausted, ErrTaken, ErrOutsidePool,
// ErrReserved, ErrPool.
func Assign(tx *node.Tx, cfg Config, r Request) ([]netip.Addr, error) {
	pools, err := cfg.pools()
	if err != nil {
		return nil, err
	}
	if err := disjoint(tx, pools); err != nil {
		return nil, err
	}
	held, err := tx.Held(r.Key)
	if err != nil {
		return nil, err
	}
	if len(held) > 0 {
		var addrs []netip.Addr
		for _, h := range held {
			addrs = append(addrs, h.Addr)
		}
		return addrs, nil
	}
	a := assignment{tx: tx, pools: pools, reserved: cfg.Reservations, key: r.Key}
	want4, want6 := r.V4, r.V6
	for _, w := range r.Want {
		if err := a.take(w.Unmap()); err != nil {
			return nil, err
		}
		want4 = want4 && !w.Unmap().Is4()
		want6 = want6 && w.Unmap().Is4()
	}
	for _, family := range []struct {
		want, v6 bool
	}{{want4, false}, {want6, true}} {
		if family.want {
			if err := a.any(family.v6); err != nil {
				return nil, err
			}
		}
	}
	slices.SortStableFunc(a.got, func(x, y netip.Addr) int { return x.BitLen() - y.BitLen() })
	return a.got, nil
}

// Status tells whether one more attachment would get its addresses: nil, ErrExhausted or ErrPool. It changes nothing.
func Status(tx *node.Tx, cfg Config, v4, v6 bool) error {
	pools, err := cfg.pools()
	if err != nil {
		return err
	}
	if err := disjoint(tx, pools); err != nil {
		return err
	}
	blocks, err := tx.Blocks()
	if err != nil {
		return err
	}
	a := assignment{tx: tx, pools: pools, reserved: cfg.Reservations}
	for _, family := range []struct {
		want, v6 bool
	}{{v4, false}, {v6, true}} {
		if !family.want {
			continue
		}
		if !a.room(blocks, family.v6) {
			return a.exhausted(blocks, family.v6)
		}
	}
	return nil
}

// Release takes back what an attachment holds and returns it. Nothing held is not an error.
func Release(tx *node.Tx, key node.Key) ([]netip.Addr, error) { return tx.Release(key) }

// disjoint makes sure that no pool overlaps a claimed block of another pool.
func disjoint(tx *node.Tx, pools []api.IPPool) error {
	blocks, err := tx.Blocks()
	if err != nil {
		return err
	}
	for _, p := range pools {
		for _, b := range blocks {
			if b.Pool != p.CIDR && p.CIDR.Overlaps(b.Pool) {
				return fmt.Errorf("%w: %s overlaps %s, which this node has blocks of; use the same pool, or release its addresses first", ErrPool, p.CIDR, b.Pool)
			}
			if b.Pool == p.CIDR && b.CIDR.Bits() != p.BlockSize {
				return fmt.Errorf("%w: %s has blocks of /%d on this node, not /%d; the block size of a pool in use can't change", ErrPool, p.CIDR, b.CIDR.Bits(), p.BlockSize)
			}
		}
	}
	return nil
}
