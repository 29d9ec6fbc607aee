package agent

import (
	"bytes"
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
	"github.com/caracal-net/caracal/cni"
	"github.com/caracal-net/caracal/ipam"
	"github.com/caracal-net/caracal/store"
)

// Keys of the store, below its prefix.
const (
	blocksPrefix     = api.BlocksPrefix
	namespacesPrefix = "/namespaces/"
	poolsPrefix      = "/ippools/"
)

// Block is a claim: which node has a block. A node advertises a block only when the store says that it is its own.
type Block struct {
	CIDR netip.Prefix `json:"cidr"`
	Pool netip.Prefix `json:"pool"`
	Node string       `json:"node"`
}

// valid: a part of its pool.
func (b Block) valid() bool {
	return b.CIDR.IsValid() && b.CIDR == b.CIDR.Masked() && b.Pool.Overlaps(b.CIDR) && b.Pool.Bits() <= b.CIDR.Bits()
}

// readClaim reads the claim of a key. ErrInvalid.
func readClaim(key string, value []byte) (b Block, err error) {
	if err := api.Strict(value, &b); err != nil {
		return b, err
	}
	if api.BlockKey(b.CIDR) != key || b.Node == "" || !b.valid() {
		return b, fmt.Errorf("%w: it says %+v", api.ErrInvalid, b)
	}
	return b, nil
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
	named   ipam.Names // what people call pools

	namespaces map[string]ipam.Only // from which pools Kubernetes's pods of a namespace get their addresses, where one says so
}

// claims are those of a node, by address.
func (v *view) claims(node string) []Claim {
	var all []Claim
	for _, c := range v.blocks {
		if c.Node == node {
			all = append(all, c)
		}
	}
	slices.SortFunc(all, func(x, y Claim) int { return x.CIDR.Addr().Compare(y.CIDR.Addr()) })
	return all
}

// rival finds a claim of another node that has some of a block's addresses.
func (v *view) rival(node string, cidr netip.Prefix) (Claim, bool) {
	if c, ok := v.blocks[cidr]; ok && c.Node != node {
		return c, true
	}
	for _, c := range v.blocks {
		if c.Node != node && c.CIDR.Overlaps(cidr) {
			return c, true
		}
	}
	return Claim{}, false
}

// cluster follows the store and keeps the last that it said, but for what is about policy and Services, which
// policies and services have.
type cluster struct {
	a *Agent

	mu    sync.Mutex
	kvs   map[string]store.KV
	known bool
	keep  chan struct{}        // that the picture is to be kept
	given map[string]time.Time // when a claim went that was there
	own   map[string]store.KV  // what this agent has written since a list was asked for, which may be older

	namespaces map[string]ipam.Only // by name, those that name pools
	unreadable map[string]error     // of these, by key
}

// hearNamespace notes which pools the annotations of a namespace of Kubernetes's name. It tells whether that is something new.
// Callers hold mu.
func (c *cluster) hearNamespace(e store.Event) bool {
	name, is := strings.CutPrefix(e.Key, namespacesPrefix)
	if !is {
		return false
	}
	var only ipam.Only
	var err error
	if !e.Deleted && bytes.Contains(e.Value, []byte(cni.AnnotationPrefix)) {
		var r api.Resource
		if err = json.Unmarshal(e.Value, &r); err == nil { // else policy's trouble too
			only, err = cni.AnnotatedPools(r.Metadata.Annotations)
		}
	}
	was, had := c.namespaces[name]
	_, wasBad := c.unreadable[e.Key]
	delete(c.unreadable, e.Key)
	delete(c.namespaces, name)
	switch {
	case err != nil:
		c.unreadable[e.Key] = err
		if had { // what it said last stays
			c.namespaces[name] = was
		}
		return true
	case !only.Empty():
		c.namespaces[name] = only
	}
	return wasBad || !slices.Equal(was.V4, only.V4) || !slices.Equal(was.V6, only.V6)
}

// recently tells whether a block was somebody's not long ago.
func (c *cluster) recently(cidr netip.Prefix) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	when, ok := c.given[api.BlockKey(cidr)]
	return ok && time.Since(when) < reuseAfter
}

// gone notes that a claim is not there any more. Callers hold mu.
func (c *cluster) gone(key string) {
	if !strings.HasPrefix(key, blocksPrefix) {
		return
	}
	now := time.Now()
	maps.DeleteFunc(c.given, func(_ string, when time.Time) bool { return now.Sub(when) > reuseAfter })
	c.given[key] = now
}

func newCluster(a *Agent) *cluster {
	return &cluster{a: a, keep: make(chan struct{}, 1), kvs: make(map[string]store.KV), given: make(map[string]time.Time), namespaces: make(map[string]ipam.Only), unreadable: make(map[string]error)}
}

// follow keeps the picture up to date until ctx ends. While the store is away the last picture stays.
func (c *cluster) follow(ctx context.Context) {
	for wait := retryFrom; ctx.Err() == nil; {
		err := c.watch(ctx, &wait)
		if ctx.Err() != nil {
			return
		}
		if errors.Is(err, store.ErrCompacted) || errors.Is(err, errPools) {
			wait = retryFrom
			continue
		}
		c.a.problem("store", err)
		c.a.changed() // it may have to go by what an earlier agent has heard
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
		wait = min(2*wait, retryTo)
	}
}

// errPools says that pools have changed, and so which addresses of Pods count: all is listed again, which is seldom.
var errPools = errors.New("pools have changed")

// pooled are those addresses that are in one of the cluster's pools.
func (c *cluster) pooled(addrs []netip.Addr) []netip.Addr {
	c.mu.Lock()
	defer c.mu.Unlock()
	var pools []netip.Prefix
	for key, kv := range c.kvs {
		var r api.Resource
		if strings.HasPrefix(key, poolsPrefix) && json.Unmarshal(kv.Value, &r) == nil {
			if pool, is := r.Spec.(*api.IPPool); is {
				pools = append(pools, pool.CIDR)
			}
		}
	}
	return slices.DeleteFunc(slices.Clone(addrs), func(a netip.Addr) bool {
		return !slices.ContainsFunc(pools, func(p netip.Prefix) bool { return p.Contains(a) })
	})
}

// watch lists everything once and then takes changes until something fails.
func (c *cluster) watch(ctx context.Context, wait *time.Duration) error {
	c.mu.Lock()
	c.own = make(map[string]store.KV)
	c.mu.Unlock()
	all, revision, err := c.a.store.List(ctx, "/")
	if err != nil {
		return err
	}
	kvs := make(map[string]store.KV)
	var policy, services []store.KV
	for _, kv := range all {
		if _, _, _, is := policyKey(kv.Key); is {
			policy = append(policy, kv)
			continue
		}
		if serviceKey(kv.Key) {
			services = append(services, kv)
			continue
		}
		kvs[kv.Key] = kv
	}
	c.mu.Lock()
	before := c.namespaces
	c.namespaces, c.unreadable = make(map[string]ipam.Only), make(map[string]error)
	for _, kv := range policy {
		if name, is := strings.CutPrefix(kv.Key, namespacesPrefix); is {
			if only, had := before[name]; had { // stays if the new one can't be read
				c.namespaces[name] = only
			}
			c.hearNamespace(store.Event{KV: kv})
		}
	}
	for key, kv := range c.own {
		if kv.Revision > revision { // else the list has it, or it was deleted since
			kvs[key] = kv
		}
	}
	for key := range c.kvs {
		if _, there := kvs[key]; !there {
			c.gone(key)
		}
	}
	c.kvs, c.known, c.own = kvs, true, nil
	c.mu.Unlock()
	signal(c.keep)
	c.a.policies.list(policy) // knows the pools now
	c.a.services.list(services)
	c.a.problem("store", nil)
	c.a.changed()
	w, err := c.a.store.Watch(ctx, "/", revision)
	if err != nil {
		return err
	}
	defer w.Close()
	var denied time.Time // last; zero: not
	again := false       // list again when nothing is denied any more: what is denied can't be listed
	for {
		e, err := next(ctx, w, denied)
		switch {
		case errors.Is(err, store.ErrDenied) && c.a.Kubernetes != nil: // of one kind, while the watch goes on with the others
			denied = time.Now()
			c.a.problem("store", fmt.Errorf("%w; what was heard last of it stays in force", err))
			continue
		case !denied.IsZero() && errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil:
			denied = time.Time{}
			c.a.problem("store", nil)
			if again {
				return errPools
			}
			continue
		case err != nil:
			return err
		}
		*wait = retryFrom
		if _, _, _, is := policyKey(e.Key); is {
			c.a.policies.hear(e)
			c.mu.Lock()
			news := c.hearNamespace(e)
			c.mu.Unlock()
			if news {
				c.a.changed()
			}
			continue
		}
		if serviceKey(e.Key) {
			c.a.services.hear(e)
			continue
		}
		c.mu.Lock()
		switch {
		case e.Revision < c.kvs[e.Key].Revision: // older than what this agent has written since
		case e.Deleted:
			delete(c.kvs, e.Key)
			c.gone(e.Key)
		default:
			c.kvs[e.Key] = e.KV
		}
		c.mu.Unlock()
		signal(c.keep)
		c.a.changed()
		if strings.HasPrefix(e.Key, poolsPrefix) && c.a.Kubernetes != nil {
			if again = !denied.IsZero(); !again {
				return errPools
			}
		}
	}
}

// deniedFor is how long nothing must be heard of a right that lacks until it is there again: a watch tries each some seconds, and says
// so each time.
const deniedFor = 15 * time.Second

// next is a watch's Next; DeadlineExceeded when it was denied something and has not said so for long.
func next(ctx context.Context, w store.Watch, denied time.Time) (store.Event, error) {
	if !denied.IsZero() {
		bounded, cancel := context.WithDeadline(ctx, denied.Add(deniedFor))
		defer cancel()
		ctx = bounded
	}
	return w.Next(ctx)
}

// wrote notes what this agent wrote itself, so that it need not wait to hear of it.
func (c *cluster) wrote(kv store.KV) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if old, ok := c.kvs[kv.Key]; !ok || old.Revision < kv.Revision {
		c.kvs[kv.Key] = kv
		if c.own != nil {
			c.own[kv.Key] = kv
		}
		signal(c.keep)
	}
}

// deleted notes that this agent deleted a key that was at a revision, or found it gone.
func (c *cluster) deleted(key string, was store.Revision) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.kvs[key].Revision <= was {
		delete(c.kvs, key)
		delete(c.own, key)
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
	kvs, known, namespaces, unreadable := maps.Clone(c.kvs), c.known, maps.Clone(c.namespaces), maps.Clone(c.unreadable)
	c.mu.Unlock()
	if !known {
		return nil, false
	}
	v, bad := c.read(kvs)
	v.namespaces = namespaces
	for _, key := range slices.Sorted(maps.Keys(unreadable)) {
		bad = append(bad, fmt.Sprintf("%s: %s", key, unreadable[key]))
	}
	var err error
	if len(bad) > 0 {
		err = inputError{errors.New(strings.Join(bad, "; "))}
	}
	c.a.problem("resources", err)
	return v, true
}

// read makes a view of a picture, and says what of it can't be read.
func (c *cluster) read(kvs map[string]store.KV) (v *view, bad []string) {
	v = &view{
		nodes: make(map[string]*api.Node), meta: make(map[string]api.Metadata),
		peers: make(map[string]*api.BGPPeer), others: make(map[string]*api.BGPPeer), filters: make(map[string]*api.BGPFilter), blocks: make(map[netip.Prefix]Claim),
		named: make(ipam.Names),
	}
	_ = v.bgp.Complete("default") // which is valid as it is
	for _, key := range slices.Sorted(maps.Keys(kvs)) {
		if err := v.take(kvs[key], c.a.Node); err != nil {
			bad = append(bad, fmt.Sprintf("%s: %s", key, err))
		}
	}
	v.narrow(c.a.Node)
	return v, bad
}

func (v *view) take(kv store.KV, self string) error {
	if strings.HasPrefix(kv.Key, blocksPrefix) {
		b, err := readClaim(kv.Key, kv.Value)
		if err == nil {
			v.blocks[b.CIDR] = Claim{b, kv.Revision}
		}
		return err
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
		v.named[r.Metadata.Name] = spec.CIDR
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
