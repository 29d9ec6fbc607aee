package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
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

// reuseAfter is for how long a block that somebody has lost is claimed only when there is no other. With a Node of Kubernetes its
// claims go at once, and its pods when their kubelet hears of it; its agent claims again what they use.
const reuseAfter = time.Minute

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
	var errs, written []error
	note := func(err error) {
		if errors.As(err, new(inputError)) {
			written = append(written, err)
		} else {
			errs = append(errs, err)
		}
	}
	mine := a.mine(ctx, v, here, note)
	pools, closed := v.usable, a.closed(v, here)
	if a.PodCIDRs {
		wanted, err := a.podBlocks(v)
		note(err)
		mine, surplus, pools = a.claimGiven(ctx, v, mine, wanted, here, note)
		for _, c := range mine {
			if !slices.Contains(wanted, c.Block) {
				closed = append(closed, c.CIDR)
			}
		}
	} else {
		surplus = a.surplus(v.usable, mine, here, a.holds)
	}
	mine = slices.DeleteFunc(mine, func(c Claim) bool {
		if slices.Contains(surplus, c) {
			return true
		}
		if here.has(c.CIDR) {
			return false
		}
		// Given by Kubernetes, it was claimed when an agent ended. That it is this node's may not be so any more.
		err := a.claimOne(ctx, c.Block)
		note(err)
		return err != nil
	})
	free := here.free(mine)
	for _, p := range pools {
		size := node.Block{CIDR: netip.PrefixFrom(p.CIDR.Addr(), p.BlockSize)}.Size()
		if a.PodCIDRs || p.Disabled || free[p.CIDR]*2 >= size {
			continue
		}
		b, err := a.claimNext(ctx, v, p)
		if err != nil {
			note(err)
			continue
		}
		a.fresh[b.CIDR] = true
		mine = append(mine, Claim{Block: b})
	}
	if len(surplus) > 0 {
		if err := a.step("forget"); err != nil {
			return a.own, nil, err
		}
	}
	now, err := a.record(ctx, here, recorded{pools, v.named, v.namespaces}, mine, closed)
	note(err)
	maps.DeleteFunc(a.fresh, func(b netip.Prefix, _ bool) bool { return now.has(b) })
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
	return own, surplus, hard(errors.Join(errs...), written)
}

// suspend has no new pod get an address here while this host is not the node that the store knows: its blocks may be others' by now.
// What its pods have stays.
func (a *Agent) suspend(ctx context.Context) error {
	here, err := a.local(ctx)
	if err != nil || here.pools == nil {
		return err
	}
	var kept []Claim
	var closed []netip.Prefix
	for _, b := range here.blocks {
		if kept = append(kept, Claim{Block: Block{b.CIDR, b.Pool, a.Node}}); b.Closed {
			closed = append(closed, b.CIDR)
		}
	}
	_, err = a.record(ctx, here, recorded{nil, here.named, here.namespaces}, kept, closed)
	return err
}

// mine are the claims of this node, by address. What its pods use and nobody has claimed is claimed: it was alone before.
func (a *Agent) mine(ctx context.Context, v *view, here local, note func(error)) []Claim {
	mine := v.claims(a.Node)
	for _, b := range here.blocks {
		other, taken := v.rival(a.Node, b.CIDR)
		ours := v.blocks[b.CIDR].Node == a.Node
		switch {
		case ours && taken:
			note(inputError{fmt.Errorf("block %s is this node's, and node %s has claimed %s of it: no pod here gets more of its addresses; remove that claim%s", b.CIDR, other.Node, other.CIDR, a.byHand("delete", other.CIDR))})
		case b.Used == 0:
		case !slices.ContainsFunc(v.pools, func(p api.IPPool) bool { return p.CIDR == b.Pool }):
			note(fmt.Errorf("block %s has addresses of pods, but its pool %s is none of the cluster's; apply it, or restart these pods", b.CIDR, b.Pool))
		case ours:
		case taken:
			note(fmt.Errorf("block %s has addresses of pods here, but belongs to node %s; restart these pods, or if its claim was edited, put that right%s", b.CIDR, other.Node, a.byHand("edit", other.CIDR)))
		default:
			c := Claim{Block: Block{b.CIDR, b.Pool, a.Node}}
			if err := a.claimHeld(ctx, c.Block, true); err != nil {
				note(err)
				if errors.Is(err, store.ErrExists) {
					continue
				}
			}
			mine = append(mine, c) // also while it can't be written: nobody else has it, as far as it was heard
		}
	}
	slices.SortFunc(mine, func(x, y Claim) int { return x.CIDR.Addr().Compare(y.CIDR.Addr()) })
	return mine
}

// closed are the blocks in node.db that are another node's by now: no pod here gets more of their addresses.
func (a *Agent) closed(v *view, here local) []netip.Prefix {
	var closed []netip.Prefix
	for _, b := range here.blocks {
		if _, taken := v.rival(a.Node, b.CIDR); taken {
			closed = append(closed, b.CIDR)
		}
	}
	return closed
}

// podBlocks are the blocks that Kubernetes has given this node, in pools of the cluster.
func (a *Agent) podBlocks(v *view) ([]Block, error) {
	core, err := a.core()
	if err != nil {
		return nil, nil // the node's problem
	}
	if core == nil {
		return nil, errors.New("blocks are to be the node's podCIDRs, and the store is not that of a cluster of Kubernetes; leave --ipam podcidr out")
	}
	if len(core.PodCIDRs) == 0 {
		return nil, fmt.Errorf("Kubernetes has given node %s no podCIDR: kube-controller-manager does with --allocate-node-cidrs and --cluster-cidr; or have Caracal claim blocks itself (--ipam pools)", a.Node)
	}
	var all []Block
	var errs []error
	for _, cidr := range core.PodCIDRs {
		p, ok := poolOf(v.usable, cidr)
		if !ok || p.Disabled {
			errs = append(errs, fmt.Errorf("podCIDR %s is in no pool that this node may use; make one of the cluster's CIDR (CALICO_IPV4POOL_CIDR, CALICO_IPV6POOL_CIDR, or kubectl apply)", cidr))
			continue
		}
		all = append(all, Block{cidr, p.CIDR, a.Node})
	}
	return all, errors.Join(errs...)
}

// claimGiven claims the blocks that Kubernetes has given this node, which then nobody else gets while pods have addresses of
// them, and no others. What it has had of others is closed, and surplus when it has no pod any more. pools are those of the
// wanted blocks, as if they were cut in such.
func (a *Agent) claimGiven(ctx context.Context, v *view, mine []Claim, wanted []Block, here local, note func(error)) (_, surplus []Claim, pools []api.IPPool) {
	var kept []Claim
	for _, c := range mine {
		switch {
		case slices.Contains(wanted, c.Block):
			kept = append(kept, c)
		case here.used(c.CIDR) == 0:
			surplus = append(surplus, c)
		default:
			kept = append(kept, c)
			note(fmt.Errorf("block %s has addresses of pods, and is none of the podCIDRs that Kubernetes has given node %s: no pod gets more of it; restart those that have (kubectl drain %s)", c.CIDR, a.Node, a.Node))
		}
	}
	for _, b := range wanted {
		if p, ok := poolOf(v.usable, b.CIDR); ok {
			p.BlockSize = b.CIDR.Bits()
			pools = append(pools, p)
		}
		if slices.ContainsFunc(kept, func(c Claim) bool { return c.Block == b }) {
			continue
		}
		if other, taken := v.rival(a.Node, b.CIDR); taken {
			note(fmt.Errorf("podCIDR %s: node %s has %s of it, maybe with pods; if that node is gone, remove it (%s), and if only its claim is left, do (kubectl delete %s)", b.CIDR, other.Node, other.CIDR, a.removal(other.Node), blockObject(other.CIDR)))
			continue
		}
		if err := a.claimOne(ctx, b); err != nil {
			note(err)
			continue
		}
		kept = append(kept, Claim{Block: b})
	}
	return kept, surplus, pools
}

// surplus are the claims that this node can do without: they have had no pod for a while, and without them a whole block's
// addresses stay free in their pool, twice as many as make it claim another; or the pool is disabled or gone, or has blocks
// of another size now. What node.db does not know goes first, unless it is held nevertheless, then the highest address. An agent ended
// before it recorded that or after it forgot it; or somebody has written the claim, and the addresses may be those of another node's pods.
func (a *Agent) surplus(pools []api.IPPool, mine []Claim, here local, holds func(netip.Prefix) bool) []Claim {
	now, idle := time.Now(), make(map[netip.Prefix]time.Time)
	free := here.free(mine)
	var all []Claim
	for _, recorded := range []bool{false, true} {
		for _, c := range slices.Backward(mine) {
			if here.has(c.CIDR) != recorded || here.used(c.CIDR) > 0 {
				continue
			}
			size := node.Block{CIDR: c.CIDR}.Size()
			if !recorded && !here.overlaps(c.CIDR) && holds(c.CIDR) {
				continue
			}
			if recorded {
				since, ok := a.idle[c.CIDR]
				if !ok {
					since = now
				}
				idle[c.CIDR] = since
				wanted := slices.ContainsFunc(pools, func(p api.IPPool) bool { return p.CIDR == c.Pool && p.BlockSize == c.CIDR.Bits() && !p.Disabled })
				if wanted && free[c.Pool] < 2*size || now.Sub(since) < surplusAfter {
					continue
				}
			}
			free[c.Pool] -= size
			all = append(all, c)
		}
	}
	a.idle = idle
	return all
}

// holds tells whether a block of which node.db knows nothing is this node's all the same: this agent has claimed it and could not record
// that, or pods have addresses of it, and node.db was lost.
func (a *Agent) holds(block netip.Prefix) bool {
	used, err := commit.BlockInUse(a.maps, block)
	return used || err != nil || a.fresh[block]
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
		key := api.BlockKey(c.CIDR)
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
	recorded
}

// recorded is what node.db knows of the cluster's pools.
type recorded struct {
	pools []api.IPPool // nil: none were recorded yet
	named ipam.Names

	namespaces map[string]ipam.Only // see view
}

func (r recorded) equal(o recorded) bool {
	x, _ := json.Marshal([]any{r.pools, r.named, r.namespaces})
	y, _ := json.Marshal([]any{o.pools, o.named, o.namespaces})
	return string(x) == string(y)
}

func (l local) has(cidr netip.Prefix) bool {
	return slices.ContainsFunc(l.blocks, func(b node.Block) bool { return b.CIDR == cidr })
}

// overlaps tells whether some of a block's addresses are another block's that node.db has.
func (l local) overlaps(cidr netip.Prefix) bool {
	return slices.ContainsFunc(l.blocks, func(b node.Block) bool { return b.CIDR != cidr && b.CIDR.Overlaps(cidr) })
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

// differs tells which claims are not recorded, which recorded blocks without pods are no claims, and which others are to be closed,
// or not to be.
func (l local) differs(mine []Claim, closed []netip.Prefix) (missing []Claim, extra, turned []node.Block) {
	for _, c := range mine {
		if !l.has(c.CIDR) {
			missing = append(missing, c)
		}
	}
	for _, b := range l.blocks {
		switch {
		case b.Used == 0 && !slices.ContainsFunc(mine, func(c Claim) bool { return c.CIDR == b.CIDR }):
			extra = append(extra, b)
		case b.Closed != slices.Contains(closed, b.CIDR):
			turned = append(turned, b)
		}
	}
	return missing, extra, turned
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
	if err == nil {
		l.named, err = ipam.PoolNames(tx)
	}
	if err == nil {
		l.namespaces, err = ipam.AllNamespacePools(tx)
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
func (a *Agent) claimOne(ctx context.Context, b Block) error { return a.claimHeld(ctx, b, false) }

// claimHeld is claimOne of a block that pods here have addresses of, if held: then a claim that says nothing which could be so, as one
// that was edited badly, is written anew.
func (a *Agent) claimHeld(ctx context.Context, b Block, held bool) error {
	text, err := json.Marshal(b)
	if err != nil {
		return err
	}
	key := api.BlockKey(b.CIDR)
	revision, err := a.store.Create(ctx, key, text)
	if errors.Is(err, store.ErrExists) {
		kv, gerr := a.store.Get(ctx, key)
		if gerr != nil {
			return gerr
		}
		there, wrong := readClaim(key, kv.Value)
		switch {
		case wrong != nil && !held:
			return fmt.Errorf("%w: %w", err, wrong)
		case wrong == nil && there != b:
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
	for _, lately := range []bool{false, true} {
		for cidr := range ipam.Blocks(p) {
			if taken[cidr] || slices.ContainsFunc(wider, cidr.Overlaps) || lately != (a.Kubernetes != nil && a.cluster.recently(cidr)) {
				continue
			}
			b := Block{cidr, p.CIDR, a.Node}
			err := a.claimOne(ctx, b)
			if errors.Is(err, store.ErrExists) {
				continue // another node was faster
			}
			return b, err
		}
	}
	return Block{}, fmt.Errorf("pool %s: %w: every block has a node; add a pool, or remove nodes that are gone (caracalctl ipam show --show-blocks)", p.CIDR, ipam.ErrExhausted)
}

// record makes node.db, which says was, say what the store says: the pools, and the blocks of this node. A block that pods
// use is kept. It returns what node.db says then. When there is nothing to write it is not opened for writing, and keeps no
// ADD waiting.
func (a *Agent) record(ctx context.Context, was local, r recorded, mine []Claim, closed []netip.Prefix) (now local, err error) {
	if r.pools == nil {
		r.pools = []api.IPPool{}
	}
	if missing, extra, turned := was.differs(mine, closed); len(missing)+len(extra)+len(turned) == 0 && was.equal(r) {
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
		missing, extra, turned := now.differs(mine, closed)
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
		for _, b := range turned {
			b.Closed = !b.Closed
			if err := tx.PutBlock(b); err != nil {
				return err
			}
		}
		for _, c := range missing {
			if err := tx.PutBlock(node.Block{CIDR: c.CIDR, Pool: c.Pool}); err != nil {
				return err
			}
		}
		if err := errors.Join(ipam.SetClusterPools(tx, r.pools), ipam.SetPoolNames(tx, r.named), ipam.SetNamespacePools(tx, r.namespaces)); err != nil {
			return err
		}
		return now.read(tx)
	})
	if err != nil {
		return was, err
	}
	return now, errors.Join(inUse...)
}
