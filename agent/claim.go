package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/ipam"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/store"
)

// surplusAfter is for how long a block must have been without pods before it is given up: pods come and go, and an address
// that one has just let go of is not to be another's at once.
const surplusAfter = 30 * time.Second

// claim gives this node the blocks that it needs, before it needs them: as long as less than half a block's addresses are
// free in a pool, another is claimed in the store and recorded in node.db, where ADD finds it. What it does not need any
// more it takes out of node.db, and returns as surplus, to be released when nothing of this node speaks of it.
//
// own are the blocks that are to be announced; nil when node.db can't be read and they are not known.
func (a *Agent) claim(ctx context.Context, v *view) (own []netip.Prefix, surplus []Claim, err error) {
	here, err := a.local(ctx)
	if err != nil {
		return a.own, nil, err // as announced
	}
	var errs []error
	note := func(err error) { errs = append(errs, err) }
	mine := a.mine(ctx, v, here, note)
	surplus = a.surplus(v.usable, mine, here)
	mine = slices.DeleteFunc(mine, func(c Claim) bool {
		if slices.Contains(surplus, c) {
			return true
		}
		if here.has(c.CIDR) {
			return false
		}
		// It was claimed, or was to be released, when an agent ended. That it is this node's may not be so any more.
		err := a.claimOne(ctx, c.Block)
		note(err)
		return err != nil
	})
	free := here.free(mine)
	for _, p := range v.usable {
		size := 1 << (p.CIDR.Addr().BitLen() - p.BlockSize)
		if p.Disabled || free[p.CIDR]*2 >= size {
			continue
		}
		b, err := a.claimNext(ctx, v, p)
		if err != nil {
			note(err)
			continue
		}
		mine = append(mine, Claim{Block: b})
	}
	if len(surplus) > 0 {
		if err := a.step("forget"); err != nil {
			return a.own, nil, err
		}
	}
	now, err := a.record(ctx, here, v.usable, mine)
	note(err)
	if len(surplus) > 0 {
		note(a.step("withdraw"))
	}
	own = make([]netip.Prefix, 0, len(mine))
	for _, c := range mine {
		if now.has(c.CIDR) {
			own = append(own, c.CIDR)
		}
	}
	surplus = slices.DeleteFunc(surplus, func(c Claim) bool {
		still := now.has(c.CIDR) // a pod was given an address of it meanwhile, or it could not be written
		if still {
			own = append(own, c.CIDR)
		}
		return still
	})
	slices.SortFunc(own, func(x, y netip.Prefix) int { return x.Addr().Compare(y.Addr()) })
	return own, surplus, errors.Join(errs...)
}

// mine are the claims of this node, by address. What its pods use and nobody has claimed is claimed: it was alone before.
func (a *Agent) mine(ctx context.Context, v *view, here local, note func(error)) []Claim {
	var mine []Claim
	for _, c := range v.blocks {
		if c.Node == a.Node {
			mine = append(mine, c)
		}
	}
	for _, b := range here.blocks {
		other, taken := v.blocks[b.CIDR]
		if b.Used == 0 || taken && other.Node == a.Node {
			continue
		}
		switch {
		case !slices.ContainsFunc(v.pools, func(p api.IPPool) bool { return p.CIDR == b.Pool }):
			note(fmt.Errorf("block %s has addresses of pods, but its pool %s is none of the cluster's; apply it, or restart these pods", b.CIDR, b.Pool))
		case taken:
			note(fmt.Errorf("block %s has addresses of pods here, but belongs to node %s; restart the pods on it", b.CIDR, other.Node))
		default:
			c := Claim{Block: Block{b.CIDR, b.Pool, a.Node}}
			if err := a.claimOne(ctx, c.Block); err != nil {
				note(err)
				continue
			}
			mine = append(mine, c)
		}
	}
	slices.SortFunc(mine, func(x, y Claim) int { return x.CIDR.Addr().Compare(y.CIDR.Addr()) })
	return mine
}

// surplus are the claims that this node can do without: they have had no pod for a while, and without them a whole block's
// addresses stay free in their pool, twice as many as make it claim another; or the pool is disabled or gone, or has blocks
// of another size now. What node.db does not know any more goes first, then the highest address.
func (a *Agent) surplus(pools []api.IPPool, mine []Claim, here local) []Claim {
	now, idle := time.Now(), make(map[netip.Prefix]time.Time)
	free := here.free(mine)
	var all []Claim
	for _, recorded := range []bool{false, true} {
		for _, c := range slices.Backward(mine) {
			if here.has(c.CIDR) != recorded || here.used(c.CIDR) > 0 {
				continue
			}
			since, ok := a.idle[c.CIDR]
			if !ok {
				since = now
			}
			idle[c.CIDR] = since
			size := node.Block{CIDR: c.CIDR}.Size()
			wanted := slices.ContainsFunc(pools, func(p api.IPPool) bool { return p.CIDR == c.Pool && p.BlockSize == c.CIDR.Bits() && !p.Disabled })
			if wanted && free[c.Pool] < 2*size || recorded && now.Sub(since) < surplusAfter {
				continue
			}
			free[c.Pool] -= size
			all = append(all, c)
		}
	}
	a.idle = idle
	return all
}

// release gives back what claim took out of node.db, and what is neither in the kernel's tables nor announced any more.
// Only the very claim that was looked at is deleted. When it can't be told whether that happened nothing is lost: the block
// is not in node.db, and comes back there only after its claim was written anew, which a late deletion does not survive.
func (a *Agent) release(ctx context.Context, surplus []Claim) error {
	var errs []error
	for _, c := range surplus {
		if err := a.step("release"); err != nil {
			return err
		}
		key := BlockKey(c.CIDR)
		if err := a.store.Delete(ctx, key, c.Revision); err != nil && !errors.Is(err, store.ErrNotFound) {
			errs = append(errs, err)
			continue
		}
		a.cluster.deleted(key, c.Revision)
		a.Log.Info("released", "block", c.CIDR)
		if err := a.step("released"); err != nil {
			return err
		}
	}
	return errors.Join(errs...)
}

// local is what node.db says of this node's blocks.
type local struct {
	blocks []node.Block
	pools  []api.IPPool // the cluster's; nil: none were recorded yet
}

func (l local) has(cidr netip.Prefix) bool {
	return slices.ContainsFunc(l.blocks, func(b node.Block) bool { return b.CIDR == cidr })
}

// used is how many of a block's addresses are held.
func (l local) used(cidr netip.Prefix) int {
	for _, b := range l.blocks {
		if b.CIDR == cidr {
			return b.Used
		}
	}
	return 0
}

// free are the addresses of this node's claims that nobody holds, by pool.
func (l local) free(mine []Claim) map[netip.Prefix]int {
	free := make(map[netip.Prefix]int)
	for _, c := range mine {
		free[c.Pool] += node.Block{CIDR: c.CIDR}.Size()
	}
	for _, b := range l.blocks {
		free[b.Pool] -= b.Used
	}
	return free
}

// differs tells which claims are not recorded, and which recorded blocks without pods are no claims.
func (l local) differs(mine []Claim) (missing []Claim, extra []node.Block) {
	for _, c := range mine {
		if !l.has(c.CIDR) {
			missing = append(missing, c)
		}
	}
	for _, b := range l.blocks {
		if b.Used == 0 && !slices.ContainsFunc(mine, func(c Claim) bool { return c.CIDR == b.CIDR }) {
			extra = append(extra, b)
		}
	}
	return missing, extra
}

// local reads node.db beside ADDs and DELs: instance has opened it for writing before, and so released what an earlier boot
// left.
func (a *Agent) local(ctx context.Context) (l local, err error) {
	db, err := node.OpenReadOnly(ctx, a.StateDir, a.nodeOptions())
	if errors.Is(err, node.ErrNoDatabase) {
		return local{}, nil // somebody removed it; record makes it again
	}
	if err != nil {
		return local{}, err
	}
	defer db.Close()
	err = db.View(func(tx *node.Tx) error { return l.read(tx) })
	return l, err
}

func (l *local) read(tx *node.Tx) (err error) {
	if l.blocks, err = tx.Blocks(); err == nil {
		l.pools, _, err = ipam.ClusterPools(tx)
	}
	return err
}

// recorded are the blocks in node.db.
func (a *Agent) recorded(ctx context.Context) ([]node.Block, error) {
	l, err := a.local(ctx)
	return l.blocks, err
}

// claimOne claims a block. One that the store says is this node's already is claimed anew: what an earlier attempt to
// release it may still bring about must not find it as it was.
func (a *Agent) claimOne(ctx context.Context, b Block) error {
	text, err := json.Marshal(b)
	if err != nil {
		return err
	}
	key := BlockKey(b.CIDR)
	revision, err := a.store.Create(ctx, key, text)
	if errors.Is(err, store.ErrExists) {
		kv, gerr := a.store.Get(ctx, key)
		if gerr != nil {
			return gerr
		}
		var there Block
		if json.Unmarshal(kv.Value, &there) != nil || there != b {
			return err
		}
		revision, err = a.store.Update(ctx, key, text, kv.Revision)
	}
	if err != nil {
		return err
	}
	a.cluster.wrote(store.KV{Key: key, Value: text, Revision: revision})
	a.Log.Info("claimed", "block", b.CIDR)
	return nil
}

// claimNext claims a pool's first block that nobody has any part of: blocks of another size are there when the pool's block
// size was changed.
func (a *Agent) claimNext(ctx context.Context, v *view, p api.IPPool) (Block, error) {
	taken := make(map[netip.Prefix]bool)
	var wider []netip.Prefix
	for cidr := range v.blocks {
		if cidr.Bits() < p.BlockSize {
			wider = append(wider, cidr)
		} else {
			taken[netip.PrefixFrom(cidr.Addr(), p.BlockSize).Masked()] = true
		}
	}
	for cidr := range ipam.Blocks(p) {
		if taken[cidr] || slices.ContainsFunc(wider, cidr.Overlaps) {
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

// record makes node.db, which says was, say what the store says: the pools, and the blocks of this node. A block that pods
// use is kept. It returns what node.db says then. When there is nothing to write it is not opened for writing, and keeps no
// ADD waiting.
func (a *Agent) record(ctx context.Context, was local, pools []api.IPPool, mine []Claim) (now local, err error) {
	if pools == nil {
		pools = []api.IPPool{}
	}
	if missing, extra := was.differs(mine); len(missing)+len(extra) == 0 && samePools(was.pools, pools) {
		return was, nil
	}
	lock, err := node.LockNode(ctx, a.StateDir) // before the database, as ADD does
	if err != nil {
		return was, err
	}
	defer lock.Unlock()
	db, err := node.Open(ctx, a.StateDir, a.nodeOptions())
	if err != nil {
		return was, err
	}
	defer db.Close()
	var inUse []error
	err = db.Update(func(tx *node.Tx) error {
		if err := now.read(tx); err != nil {
			return err
		}
		missing, extra := now.differs(mine)
		for _, b := range extra {
			// The maps first: what a crash leaves is then a block that node.db has, and setNode puts back.
			if err := commit.RemoveBlock(a.maps, b.CIDR); errors.Is(err, commit.ErrInUse) {
				inUse = append(inUse, err)
				continue
			} else if err != nil {
				return err
			}
			if err := tx.DeleteBlock(b.CIDR); err != nil {
				return err
			}
		}
		for _, c := range missing {
			if err := tx.PutBlock(node.Block{CIDR: c.CIDR, Pool: c.Pool}); err != nil {
				return err
			}
		}
		if err := ipam.SetClusterPools(tx, pools); err != nil {
			return err
		}
		return now.read(tx)
	})
	if err != nil {
		return was, err
	}
	return now, errors.Join(inUse...)
}

func samePools(a, b []api.IPPool) bool {
	x, _ := json.Marshal(a)
	y, _ := json.Marshal(b)
	return string(x) == string(y)
}
