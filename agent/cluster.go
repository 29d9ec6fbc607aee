package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/store"
)

// Keys of the store, below its prefix.
const (
	blocksPrefix = "/blocks/"
)

// Block is a claim: which node has a block. A node advertises a block only when the store says that it is its own.
type Block struct {
	CIDR netip.Prefix `json:"cidr"`
	Pool netip.Prefix `json:"pool"`
	Node string       `json:"node"`
}

// valid: a part of its pool that node.db takes.
func (b Block) valid() bool {
	return b.CIDR.IsValid() && b.CIDR == b.CIDR.Masked() && b.Pool.Overlaps(b.CIDR) && b.Pool.Bits() <= b.CIDR.Bits() &&
		b.CIDR.Addr().BitLen()-b.CIDR.Bits() <= node.MaxBlockBits
}

// BlockKey is where a block's claim lies in the store.
func BlockKey(cidr netip.Prefix) string {
	return blocksPrefix + strings.NewReplacer("/", "-", ":", ".").Replace(cidr.String())
}

// view is the cluster as the store said last. It is not changed any more.
type view struct {
	nodes   map[string]*api.Node
	meta    map[string]api.Metadata // of nodes
	pools   []api.IPPool
	usable  []api.IPPool            // that this node may claim blocks of
	bgp     api.BGPConfiguration    // the cluster's, or this node's own
	peers   map[string]*api.BGPPeer // that this node has
	others  map[string]*api.BGPPeer // that other nodes have: they may name this one as theirs
	filters map[string]*api.BGPFilter
	blocks  map[netip.Prefix]Claim
}

// cluster follows the store and keeps the last that it said, but for what is about policy, which policies has.
type cluster struct {
	a *Agent

	mu    sync.Mutex
	kvs   map[string]store.KV
	known bool
}

func newCluster(a *Agent) *cluster { return &cluster{a: a, kvs: make(map[string]store.KV)} }

// follow keeps the picture up to date until ctx ends. While the store is away the last picture stays.
func (c *cluster) follow(ctx context.Context) {
	for wait := retryFrom; ctx.Err() == nil; {
		err := c.watch(ctx, &wait)
		if ctx.Err() != nil {
			return
		}
		if errors.Is(err, store.ErrCompacted) {
			wait = retryFrom
			continue
		}
		c.a.problem("store", err)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
		wait = min(2*wait, retryTo)
	}
}

// watch lists everything once and then takes changes until something fails.
func (c *cluster) watch(ctx context.Context, wait *time.Duration) error {
	all, revision, err := c.a.store.List(ctx, "/")
	if err != nil {
		return err
	}
	kvs := make(map[string]store.KV)
	var policy []store.KV
	for _, kv := range all {
		if _, _, _, is := policyKey(kv.Key); is {
			policy = append(policy, kv)
			continue
		}
		kvs[kv.Key] = kv
	}
	c.a.policies.list(policy)
	c.mu.Lock()
	c.kvs, c.known = kvs, true
	c.mu.Unlock()
	c.a.problem("store", nil)
	c.a.changed()
	w, err := c.a.store.Watch(ctx, "/", revision)
	if err != nil {
		return err
	}
	defer w.Close()
	for {
		e, err := w.Next(ctx)
		if err != nil {
			return err
		}
		*wait = retryFrom
		if _, _, _, is := policyKey(e.Key); is {
			c.a.policies.hear(e)
			continue
		}
		c.mu.Lock()
		switch {
		case e.Revision < c.kvs[e.Key].Revision: // older than what this agent has written since
		case e.Deleted:
			delete(c.kvs, e.Key)
		default:
			c.kvs[e.Key] = e.KV
		}
		c.mu.Unlock()
		c.a.changed()
	}
}

// wrote notes what this agent wrote itself, so that it need not wait to hear of it.
func (c *cluster) wrote(kv store.KV) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if old, ok := c.kvs[kv.Key]; !ok || old.Revision < kv.Revision {
		c.kvs[kv.Key] = kv
	}
}

// deleted notes that this agent deleted a key that was at a revision, or found it gone.
func (c *cluster) deleted(key string, was store.Revision) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.kvs[key].Revision <= was {
		delete(c.kvs, key)
	}
}

func (c *cluster) get(key string) (store.KV, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	kv, ok := c.kvs[key]
	return kv, ok
}

// view reads the picture; false when the store was never heard. What can't be read is a problem and counts as not there.
func (c *cluster) view() (*view, bool) {
	c.mu.Lock()
	kvs, known := maps.Clone(c.kvs), c.known
	c.mu.Unlock()
	if !known {
		return nil, false
	}
	v := &view{
		nodes: make(map[string]*api.Node), meta: make(map[string]api.Metadata),
		peers: make(map[string]*api.BGPPeer), others: make(map[string]*api.BGPPeer), filters: make(map[string]*api.BGPFilter), blocks: make(map[netip.Prefix]Claim),
	}
	_ = v.bgp.Complete("default") // which is valid as it is
	var bad []string
	for _, key := range slices.Sorted(maps.Keys(kvs)) {
		if err := v.take(kvs[key], c.a.Node); err != nil {
			bad = append(bad, fmt.Sprintf("%s: %s", key, err))
		}
	}
	v.narrow(c.a.Node)
	var err error
	if len(bad) > 0 {
		err = errors.New(strings.Join(bad, "; "))
	}
	c.a.problem("resources", err)
	return v, true
}

func (v *view) take(kv store.KV, self string) error {
	if name, ok := strings.CutPrefix(kv.Key, blocksPrefix); ok {
		var b Block
		if err := api.Strict(kv.Value, &b); err != nil {
			return err
		}
		if BlockKey(b.CIDR) != blocksPrefix+name || b.Node == "" || !b.valid() {
			return fmt.Errorf("%w: it says %+v", api.ErrInvalid, b)
		}
		v.blocks[b.CIDR] = Claim{b, kv.Revision}
		return nil
	}
	var r api.Resource
	if err := json.Unmarshal(kv.Value, &r); err != nil {
		return err
	}
	if r.Key() != kv.Key {
		return fmt.Errorf("%w: it is %s", api.ErrInvalid, r)
	}
	switch spec := r.Spec.(type) {
	case *api.Node:
		v.nodes[r.Metadata.Name], v.meta[r.Metadata.Name] = spec, r.Metadata
	case *api.IPPool:
		for _, p := range v.pools {
			if p.CIDR.Overlaps(spec.CIDR) {
				return fmt.Errorf("%w: %s overlaps pool %s, which counts", api.ErrInvalid, spec.CIDR, p.CIDR)
			}
		}
		v.pools = append(v.pools, *spec)
	case *api.BGPPeer:
		v.peers[r.Metadata.Name] = spec
	case *api.BGPFilter:
		v.filters[r.Metadata.Name] = spec
	case *api.BGPConfiguration: // "default" sorts before "node.NAME", which wins
		if r.Metadata.Name == "default" || r.Metadata.Name == "node."+self {
			v.bgp = *spec
		}
	}
	return nil
}

// narrow sorts out what is for this node, when the labels of all nodes are known.
func (v *view) narrow(self string) {
	labels := v.meta[self].Labels
	for _, p := range v.pools {
		if api.Selects(p.NodeSelector, labels) {
			v.usable = append(v.usable, p)
		}
	}
	for name, p := range v.peers {
		if !p.Has(self, labels) {
			delete(v.peers, name)
			v.others[name] = p
		}
	}
}

// Claim is a block as it lies in the store.
type Claim struct {
	Block
	Revision store.Revision `json:"-"`
}

// Blocks lists the claims in a store, by address.
func Blocks(ctx context.Context, s store.Store) ([]Claim, error) {
	kvs, _, err := s.List(ctx, blocksPrefix)
	if err != nil {
		return nil, err
	}
	claims := []Claim{}
	for _, kv := range kvs {
		c := Claim{Revision: kv.Revision}
		if err := json.Unmarshal(kv.Value, &c.Block); err != nil {
			return nil, fmt.Errorf("%s in the store: %w: %w", kv.Key, api.ErrInvalid, err)
		}
		claims = append(claims, c)
	}
	slices.SortFunc(claims, func(a, b Claim) int { return a.CIDR.Addr().Compare(b.CIDR.Addr()) })
	return claims, nil
}
