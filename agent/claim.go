package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/ipam"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/store"
)

// claim gives this node the blocks that it needs, before it needs them: as long as less than half a block's addresses are
// free in a pool, another is claimed in the store and recorded in node.db, where ADD finds it. It returns the blocks that
// the store says are this node's.
func (a *Agent) claim(ctx context.Context, v *view) ([]netip.Prefix, error) {
	here, err := a.recorded(ctx)
	if err != nil {
		return nil, err
	}
	var errs []error
	var own []Block
	for _, b := range v.blocks {
		if b.Node == a.Node {
			own = append(own, b)
		}
	}
	// What pods of this node use and nobody has claimed is this node's: it was alone before.
	for _, b := range here {
		if slices.ContainsFunc(own, func(o Block) bool { return o.CIDR == b.CIDR }) || b.Used == 0 {
			continue
		}
		claim := Block{b.CIDR, b.Pool, a.Node}
		switch other, taken := v.blocks[b.CIDR]; {
		case !slices.ContainsFunc(v.pools, func(p api.IPPool) bool { return p.CIDR == b.Pool }):
			errs = append(errs, fmt.Errorf("block %s has addresses of pods, but its pool %s is none of the cluster's; apply it, or restart these pods", b.CIDR, b.Pool))
		case taken:
			errs = append(errs, fmt.Errorf("block %s has addresses of pods here, but belongs to node %s; restart the pods on it", b.CIDR, other.Node))
		default:
			if err := a.claimOne(ctx, claim); err != nil {
				errs = append(errs, err)
				continue
			}
			own = append(own, claim)
		}
	}
	free := make(map[netip.Prefix]int) // addresses, by pool
	for _, o := range own {
		free[o.Pool] += node.Block{CIDR: o.CIDR}.Size()
	}
	for _, b := range here {
		free[b.Pool] -= b.Used
	}
	for _, p := range v.usable {
		size := 1 << (p.CIDR.Addr().BitLen() - p.BlockSize)
		if p.Disabled || free[p.CIDR]*2 >= size {
			continue
		}
		b, err := a.claimNext(ctx, v, p)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		own = append(own, b)
	}
	if err := a.record(ctx, v.usable, own); err != nil {
		return nil, errors.Join(append(errs, err)...)
	}
	prefixes := make([]netip.Prefix, 0, len(own))
	for _, o := range own {
		prefixes = append(prefixes, o.CIDR)
	}
	slices.SortFunc(prefixes, func(x, y netip.Prefix) int { return x.Addr().Compare(y.Addr()) })
	return prefixes, errors.Join(errs...)
}

// recorded are the blocks in node.db, read beside ADDs and DELs: instance has opened it for writing before, and so released
// what an earlier boot left.
func (a *Agent) recorded(ctx context.Context) (blocks []node.Block, err error) {
	db, err := node.OpenReadOnly(ctx, a.StateDir, a.nodeOptions())
	if errors.Is(err, node.ErrNoDatabase) {
		return nil, nil // somebody removed it; record makes it again
	}
	if err != nil {
		return nil, err
	}
	defer db.Close()
	return blocks, db.View(func(tx *node.Tx) (err error) { blocks, err = tx.Blocks(); return err })
}

// claimOne claims a block, or finds that it has it already.
func (a *Agent) claimOne(ctx context.Context, b Block) error {
	text, err := json.Marshal(b)
	if err != nil {
		return err
	}
	revision, err := a.store.Create(ctx, BlockKey(b.CIDR), text)
	if errors.Is(err, store.ErrExists) {
		kv, gerr := a.store.Get(ctx, BlockKey(b.CIDR))
		if gerr != nil {
			return gerr
		}
		var there Block
		if json.Unmarshal(kv.Value, &there) != nil || there != b {
			return err
		}
		text, revision, err = kv.Value, kv.Revision, nil
	}
	if err != nil {
		return err
	}
	a.cluster.wrote(store.KV{Key: BlockKey(b.CIDR), Value: text, Revision: revision})
	a.Log.Info("claimed", "block", b.CIDR)
	return nil
}

// claimNext claims a pool's first block that nobody has.
func (a *Agent) claimNext(ctx context.Context, v *view, p api.IPPool) (Block, error) {
	for cidr := range ipam.Blocks(p) {
		if _, taken := v.blocks[cidr]; taken {
			continue
		}
		b := Block{cidr, p.CIDR, a.Node}
		err := a.claimOne(ctx, b)
		if errors.Is(err, store.ErrExists) {
			continue // another node was faster
		}
		return b, err
	}
	return Block{}, fmt.Errorf("pool %s: %w: every block has a node; add a pool, or remove nodes that are gone (caracalctl ipam show --show-blocks)", p.CIDR, ipam.ErrExhausted)
}

// record makes node.db say what the store says: the pools, and the blocks of this node. A block that pods use is kept.
func (a *Agent) record(ctx context.Context, pools []api.IPPool, own []Block) error {
	if pools == nil {
		pools = []api.IPPool{}
	}
	db, err := node.Open(ctx, a.StateDir, a.nodeOptions())
	if err != nil {
		return err
	}
	defer db.Close()
	errSame := errors.New("nothing to write")
	err = db.Update(func(tx *node.Tx) error {
		blocks, err := tx.Blocks()
		if err != nil {
			return err
		}
		changed := false
		for _, b := range blocks {
			if b.Used == 0 && !slices.ContainsFunc(own, func(o Block) bool { return o.CIDR == b.CIDR }) {
				changed = true
				if err := tx.DeleteBlock(b.CIDR); err != nil {
					return err
				}
			}
		}
		for _, o := range own {
			if !slices.ContainsFunc(blocks, func(b node.Block) bool { return b.CIDR == o.CIDR }) {
				changed = true
				if err := tx.PutBlock(node.Block{CIDR: o.CIDR, Pool: o.Pool}); err != nil {
					return err
				}
			}
		}
		old, in, err := ipam.ClusterPools(tx)
		if err != nil {
			return err
		}
		if !changed && in && samePools(old, pools) {
			return errSame
		}
		return ipam.SetClusterPools(tx, pools)
	})
	if errors.Is(err, errSame) {
		return nil
	}
	return err
}

func samePools(a, b []api.IPPool) bool {
	x, _ := json.Marshal(a)
	y, _ := json.Marshal(b)
	return string(x) == string(y)
}
