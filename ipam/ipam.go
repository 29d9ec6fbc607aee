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
	// ErrNotClaimed says that a requested address is in a block that another node has, or nobody.
	ErrNotClaimed = errors.New("address is in no block of this node")
	// ErrNoCluster says that this node's agent has not recorded the cluster's pools yet.
	ErrNoCluster = errors.New("this node's agent has not said yet which pools the cluster has; start caracald, or look at it (caracalctl node status)")
	// ErrPool says that a pool can't be used as it is written.
	ErrPool = errors.New("unusable pool")
)

// Config is what addresses are given out from.
type Config struct {
	Pools        []api.IPPool   // as written; both families; none: DefaultPool
	Reservations []netip.Prefix // never given out, also not on request
	Cluster      bool           // true: ErrNoCluster until the agent has recorded the cluster's pools
	Only         Only           // what somebody asked for
}

// Request is what an attachment wants.
type Request struct {
	Key  node.Key
	Want []netip.Addr // these addresses, of any family
	Had  []netip.Addr // what it had before: it gets it again where it can, unless Want has one of that family
	V4   bool         // an IPv4 address, unless Want has one
	V6   bool         // an IPv6 address, unless Want has one
}

// pools validates the configured pools and puts the default in their place when there are none.
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

// reservations validates the reservations; IPv4 ones written in IPv6 become IPv4.
func (c Config) reservations() ([]netip.Prefix, error) {
	var all []netip.Prefix
	for _, r := range c.Reservations {
		if a := r.Addr(); a.Is4In6() && r.Bits() >= 96 {
			r = netip.PrefixFrom(a.Unmap(), r.Bits()-96)
		}
		if !r.IsValid() {
			return nil, fmt.Errorf("%w: reservation %q is not a prefix", ErrPool, r)
		}
		all = append(all, r.Masked())
	}
	return all, nil
}

// Effective are the pools that the configuration means by itself, complete.
func (c Config) Effective() ([]api.IPPool, error) { return c.pools() }

// Validate checks the configuration without a database.
func (c Config) Validate() error {
	_, err := c.pools()
	if err == nil {
		_, err = c.reservations()
	}
	return err
}

// Assign gives the attachment its addresses, IPv4 first. Repeated for an attachment that holds some already it returns
// those. On an error the caller's transaction must be given up. Errors: ErrExhausted, ErrTaken, ErrOutsidePool,
// ErrReserved, ErrPool.
func Assign(tx *node.Tx, cfg Config, r Request) ([]netip.Addr, error) {
	a, empty, err := begin(tx, cfg)
	if err != nil {
		return nil, err
	}
	a.key = r.Key
	held, err := tx.Held(r.Key)
	if err != nil {
		return nil, err
	}
	if len(held) > 0 {
		for _, h := range held {
			a.got = append(a.got, h.Addr)
		}
		return a.sorted(), nil
	}
	for _, b := range empty {
		if err := tx.DeleteBlock(b.CIDR); err != nil {
			return nil, err
		}
	}
	want4, want6 := r.V4, r.V6
	for i, w := range r.Want {
		w = w.Unmap()
		if slices.ContainsFunc(r.Want[:i], func(other netip.Addr) bool { return other.Unmap() == w }) {
			continue
		}
		c, err := a.requested(w)
		if err == nil {
			err = a.give(c)
		}
		if err != nil {
			return nil, err
		}
		want4 = want4 && !w.Is4()
		want6 = want6 && w.Is4()
	}
	for _, had := range r.Had {
		wanted := &want4
		if had.Is6() {
			wanted = &want6
		}
		c, err := a.requested(had)
		if err != nil || !*wanted {
			continue
		}
		if err := a.give(c); err != nil {
			return nil, err
		}
		*wanted = false
	}
	if want4 {
		if err := a.any(false); err != nil {
			return nil, err
		}
	}
	if want6 {
		if err := a.any(true); err != nil {
			return nil, err
		}
	}
	return a.sorted(), nil
}

// sorted are the addresses that the attachment holds, IPv4 first.
func (a *assignment) sorted() []netip.Addr {
	slices.SortStableFunc(a.got, func(x, y netip.Addr) int { return x.BitLen() - y.BitLen() })
	return a.got
}

// Status tells whether one more attachment would get its addresses: nil, or the error that Assign would return. It
// changes nothing.
func Status(tx *node.Tx, cfg Config, v4, v6 bool) error {
	a, empty, err := begin(tx, cfg)
	if err != nil {
		return err
	}
	blocks, err := tx.Blocks()
	if err != nil {
		return err
	}
	blocks = slices.DeleteFunc(blocks, func(b node.Block) bool { return slices.Contains(empty, b) })
	if v4 {
		if _, err := a.find(blocks, false); err != nil {
			return err
		}
	}
	if v6 {
		if _, err := a.find(blocks, true); err != nil {
			return err
		}
	}
	return nil
}

// Release takes back what an attachment holds and returns it. Nothing held is not an error.
func Release(tx *node.Tx, key node.Key) ([]netip.Addr, error) { return tx.Release(key) }

// begin checks the configuration, also against the blocks that this node has: no pool may overlap a block of another
// one, or cut its blocks in another size, as long as they hold addresses. Those that hold none are returned: they give
// way.
func begin(tx *node.Tx, cfg Config) (*assignment, []node.Block, error) {
	pools, claimed, err := Pools(tx, cfg)
	if err != nil {
		return nil, nil, err
	}
	reserved, err := cfg.reservations()
	if err != nil {
		return nil, nil, err
	}
	a := &assignment{tx: tx, pools: pools, reserved: reserved, claimed: claimed}
	if claimed {
		return a, nil, nil // who claims the blocks sees to that
	}
	blocks, err := tx.Blocks()
	if err != nil {
		return nil, nil, err
	}
	var empty []node.Block
	for _, b := range blocks {
		for _, p := range pools {
			switch {
			case b.Pool == p.CIDR && b.CIDR.Bits() == p.BlockSize, b.Pool != p.CIDR && !b.Pool.Overlaps(p.CIDR):
				continue
			case b.Used == 0:
				empty = append(empty, b)
			case b.Pool == p.CIDR:
				return nil, nil, fmt.Errorf("%w: %s has blocks of /%d on this node, not /%d; the block size of a pool in use can't change", ErrPool, p.CIDR, b.CIDR.Bits(), p.BlockSize)
			default:
				return nil, nil, fmt.Errorf("%w: %s overlaps %s, which this node has blocks of; use the same pool, or release its addresses first", ErrPool, p.CIDR, b.Pool)
			}
			break
		}
	}
	return a, empty, nil
}
