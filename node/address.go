package node

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	bolterrors "go.etcd.io/bbolt/errors"
)

// Block is a part of a pool that this node has claimed.
type Block struct {
	CIDR netip.Prefix `json:"cidr"`
	Pool netip.Prefix `json:"pool"`
	Next int          `json:"next"` // addresses from this ordinal on were never given out in turn
	Used int          `json:"used"` // addresses held now

	Closed bool `json:"closed,omitempty"` // true: no more of them are given out, because the block is another's, or not to be used any more
}

// MaxBlockBits is how many addresses of a block are given out in turn at most, as a power of two: what a cluster gives a node by
// itself may be an IPv6 /64.
const MaxBlockBits = 16

// Size is how many addresses of the block are given out in turn: all, or the first 65536.
func (b Block) Size() int { return 1 << min(b.CIDR.Addr().BitLen()-b.CIDR.Bits(), MaxBlockBits) }

// At is the block's address of an ordinal, from 0.
func (b Block) At(ordinal int) netip.Addr {
	a := b.CIDR.Masked().Addr().AsSlice()
	for i := len(a) - 1; ordinal > 0; i-- {
		sum := int(a[i]) + ordinal&0xff
		a[i] = byte(sum)
		ordinal = ordinal>>8 + sum>>8
	}
	addr, _ := netip.AddrFromSlice(a)
	return addr
}

// Holding is an address that an attachment holds.
type Holding struct {
	Addr  netip.Addr   `json:"address"`
	Block netip.Prefix `json:"block"`
}

// PutBlock records a claimed block, or what changed in it.
func (tx *Tx) PutBlock(b Block) error { return put(tx, bucketBlocks, b.CIDR.String(), b) }

// Block reads a claimed block. ErrNotFound when this node has not claimed it.
func (tx *Tx) Block(cidr netip.Prefix) (Block, error) {
	var b Block
	if err := get(tx, bucketBlocks, cidr.String(), &b); err != nil {
		return Block{}, fmt.Errorf("block %s: %w", cidr, err)
	}
	return b, b.check(cidr.String())
}

// check makes sure that a record can be counted with.
func (b Block) check(name string) error {
	if !b.CIDR.IsValid() || b.CIDR != b.CIDR.Masked() || b.CIDR.String() != name ||
		b.Next < 0 || b.Next > b.Size() {
		return invalid("block %s is recorded as %+v", name, b)
	}
	return nil
}

// Blocks lists the claimed blocks by address.
func (tx *Tx) Blocks() ([]Block, error) {
	var blocks []Block
	err := each(tx, bucketBlocks, func(k, v []byte) error {
		var b Block
		if err := decode(v, &b); err != nil {
			return fmt.Errorf("block %s: %w", k, err)
		}
		if err := b.check(string(k)); err != nil {
			return err
		}
		blocks = append(blocks, b)
		return nil
	})
	slices.SortFunc(blocks, func(a, b Block) int { return a.CIDR.Addr().Compare(b.CIDR.Addr()) })
	return blocks, err
}

// DeleteBlock gives a block up. It must hold no address.
func (tx *Tx) DeleteBlock(cidr netip.Prefix) error {
	b, err := tx.Block(cidr)
	if err != nil {
		return err
	}
	if b.Used > 0 {
		return fmt.Errorf("block %s: %d of its addresses are held", cidr, b.Used)
	}
	var gone [][]byte
	err = each(tx, bucketFreed, func(k, v []byte) error {
		if a, err := netip.ParseAddr(string(v)); err == nil && cidr.Contains(a) {
			gone = append(gone, slices.Clone(k))
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, k := range gone {
		if err := tx.bolt.Bucket(bucketFreed).Delete(k); err != nil {
			return err
		}
	}
	return tx.bolt.Bucket(bucketBlocks).Delete([]byte(cidr.String()))
}

// Owner tells which attachment holds an address. ErrNotFound when none does.
func (tx *Tx) Owner(a netip.Addr) (Key, error) {
	v := tx.bolt.Bucket(bucketOwners).Get([]byte(a.String()))
	if v == nil {
		return Key{}, fmt.Errorf("owner of %s: %w", a, ErrNotFound)
	}
	k, err := ParseKey(string(v))
	if err != nil {
		return Key{}, fmt.Errorf("owner of %s: %w", a, errors.Join(bolterrors.ErrInvalid, err))
	}
	return k, nil
}

// Held lists the addresses that an attachment holds, in the order it got them.
func (tx *Tx) Held(k Key) ([]Holding, error) {
	var held []Holding
	if err := get(tx, bucketHoldings, k.String(), &held); err != nil && !errors.Is(err, ErrNotFound) {
		return nil, fmt.Errorf("addresses of %s: %w", k, err)
	}
	return held, nil
}

// Holdings calls fn for every attachment that holds addresses, sorted by key. fn must not write.
func (tx *Tx) Holdings(fn func(Key, []Holding) error) error {
	return each(tx, bucketHoldings, func(k, v []byte) error {
		key, err := ParseKey(string(k))
		if err != nil {
			return errors.Join(bolterrors.ErrInvalid, err)
		}
		var held []Holding
		if err := decode(v, &held); err != nil {
			return fmt.Errorf("addresses of %s: %w", k, err)
		}
		return fn(key, held)
	})
}

// Owners calls fn for every address that is held, sorted as text. fn must not write.
func (tx *Tx) Owners(fn func(netip.Addr, Key) error) error {
	return each(tx, bucketOwners, func(k, v []byte) error {
		a, err := netip.ParseAddr(string(k))
		if err != nil {
			return errors.Join(bolterrors.ErrInvalid, err)
		}
		key, err := ParseKey(string(v))
		if err != nil {
			return errors.Join(bolterrors.ErrInvalid, err)
		}
		return fn(a, key)
	})
}

// Hold gives address a of a claimed block to k. The caller has made sure that nobody holds it.
func (tx *Tx) Hold(k Key, a netip.Addr, block netip.Prefix) error {
	if err := k.check(); err != nil {
		return err
	}
	if owner, err := tx.Owner(a); err == nil {
		return fmt.Errorf("%s is held by %s", a, owner)
	} else if !errors.Is(err, ErrNotFound) {
		return err
	}
	b, err := tx.Block(block)
	if err != nil {
		return err
	}
	b.Used++
	if err := tx.PutBlock(b); err != nil {
		return err
	}
	if err := tx.bolt.Bucket(bucketOwners).Put([]byte(a.String()), []byte(k.String())); err != nil {
		return err
	}
	held, err := tx.Held(k)
	if err != nil {
		return err
	}
	return put(tx, bucketHoldings, k.String(), append(held, Holding{Addr: a, Block: block}))
}

// Transfer makes k the holder of an address that another attachment holds. ErrNotFound when none does.
func (tx *Tx) Transfer(a netip.Addr, k Key) error {
	owner, err := tx.Owner(a)
	if err != nil || owner == k {
		return err
	}
	if err := k.check(); err != nil {
		return err
	}
	from, err := tx.Held(owner)
	if err != nil {
		return err
	}
	at := slices.IndexFunc(from, func(h Holding) bool { return h.Addr == a })
	if at < 0 {
		return invalid("%s is held by %s, which does not know of it", a, owner)
	}
	to, err := tx.Held(k)
	if err != nil {
		return err
	}
	if err := put(tx, bucketHoldings, k.String(), append(to, from[at])); err != nil {
		return err
	}
	if from = slices.Delete(from, at, at+1); len(from) == 0 {
		err = tx.bolt.Bucket(bucketHoldings).Delete([]byte(owner.String()))
	} else {
		err = put(tx, bucketHoldings, owner.String(), from)
	}
	if err != nil {
		return err
	}
	return tx.bolt.Bucket(bucketOwners).Put([]byte(a.String()), []byte(k.String()))
}

// Release takes back all addresses of k and returns them. None held is not an error.
func (tx *Tx) Release(k Key) ([]netip.Addr, error) {
	held, err := tx.Held(k)
	if err != nil || len(held) == 0 {
		return nil, err
	}
	var addrs []netip.Addr
	for _, h := range held {
		if err := tx.free(k, h); err != nil {
			return nil, err
		}
		addrs = append(addrs, h.Addr)
	}
	return addrs, tx.bolt.Bucket(bucketHoldings).Delete([]byte(k.String()))
}

// free makes one address the last in line to be given out again.
func (tx *Tx) free(k Key, h Holding) error {
	owners := tx.bolt.Bucket(bucketOwners)
	if string(owners.Get([]byte(h.Addr.String()))) != k.String() {
		return nil // somebody else's by now: never touch it
	}
	if err := owners.Delete([]byte(h.Addr.String())); err != nil {
		return err
	}
	b, err := tx.Block(h.Block)
	if errors.Is(err, ErrNotFound) {
		return nil // not ours to give out again
	}
	if err != nil {
		return err
	}
	b.Used--
	if err := tx.PutBlock(b); err != nil {
		return err
	}
	return tx.Free(h.Addr)
}

// Free makes an address of a claimed block, which nobody holds, the last in line to be given out.
func (tx *Tx) Free(a netip.Addr) error {
	freed := tx.bolt.Bucket(bucketFreed)
	seq, err := freed.NextSequence()
	if err != nil {
		return err
	}
	return freed.Put(fmt.Appendf(nil, "%020d", seq), []byte(a.String()))
}

// Freed calls fn for every address that waits to be given out again, the one that has been free the longest first. fn
// must not write.
func (tx *Tx) Freed(fn func(netip.Addr) error) error {
	return each(tx, bucketFreed, func(_, v []byte) error {
		a, err := netip.ParseAddr(string(v))
		if err != nil {
			return errors.Join(bolterrors.ErrInvalid, err)
		}
		return fn(a)
	})
}

// TakeFreed removes and returns the address that has been free the longest of those that want says yes to.
// ErrNotFound when there is none.
func (tx *Tx) TakeFreed(want func(netip.Addr) bool) (netip.Addr, error) {
	c := tx.bolt.Bucket(bucketFreed).Cursor()
	for k, v := c.First(); k != nil; k, v = c.Next() {
		a, err := netip.ParseAddr(string(v))
		if err != nil {
			return netip.Addr{}, errors.Join(bolterrors.ErrInvalid, err)
		}
		if want(a) {
			return a, c.Delete()
		}
	}
	return netip.Addr{}, fmt.Errorf("free address: %w", ErrNotFound)
}
