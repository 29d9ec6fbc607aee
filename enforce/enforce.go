// Package enforce keeps a node's kernel maps equal to policy: the resources that people wrote, the pods of all nodes, and this
// node's own. It remembers what it was told last in policy.db, so that policy stays in force, and new pods get it, whoever is
// away. The agent uses it as long as it runs, the plugin for one pod when there is no agent.
package enforce

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	stdmaps "maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/policy"
)

var (
	// ErrHeld says that another process keeps the node's policy: the agent, or another ADD.
	ErrHeld = errors.New("another process keeps this node's policy")
	// ErrUnknown says that nothing is known of policy yet: there is no policy.db, and nobody has told what there is; or nobody
	// has told which pods there are.
	ErrUnknown = errors.New("policy is not known yet")
	// ErrRefused says that something can't be put in force. What was in force of it stays; all else is in force.
	ErrRefused = errors.New("not in force")
)

var errMiscompiled = errors.New("this is a mistake of Caracal's, please report it: the tables compiled from it are wrong")

// Config says which node's policy it is.
type Config struct {
	Dir  string // the node's state directory
	Maps *maps.Maps
	Node string // the node's name in the store; "": as policy.db has it
	// Kubernetes says that it has the Pods that this node's pods are of: these have no policy before that is heard of. It is so
	// anyhow once one was, also as policy.db has it.
	Kubernetes bool
	Log        *slog.Logger // nil: nowhere
}

// Policy is a node's policy. It is safe for concurrent use.
type Policy struct {
	Config
	lock *node.Lock

	mu      sync.Mutex
	model   *model
	pending map[string]thing   // told since the last Commit
	refused map[string]refusal // what people want, and can't be put in force
	retry   time.Time          // when to try these again
	known   bool
	local   bool // SetLocal was called
	unsure  bool // the maps may hold something else than what the compiler thinks
	room    struct{ rows, peers int }
	filed   bool // policy.db is there
	untidy  bool // Tidy has something to do
	state   State
	wrong   []*policy.Disagreement // packets that gave away mistakes of the compiler's
	proof   func(*policy.Model, *policy.Tables, *policy.Delta, time.Duration) (int, error)
}

type refusal struct {
	thing
	err error
}

// State is what is in force.
type State struct {
	Epoch      uint32    `json:"epoch"`      // in which it came into force
	Since      time.Time `json:"since"`      // when
	Resources  int       `json:"resources"`  // about policy, pods' endpoints too
	Policies   int       `json:"policies"`   // resources that have rules
	PolicyIDs  int       `json:"policyIDs"`  // that this node's pods have
	Rows       int       `json:"rows"`       // of caracal_policy
	Prefixes   int       `json:"prefixes"`   // of caracal_peers
	Identities int       `json:"identities"` // that these have
	Rules      int       `json:"rules"`
	Pods       int       `json:"pods"` // of this node
	Commits    int       `json:"commits"`
	Took       float64   `json:"tookSeconds"` // the last one, until it was in force
	Refused    []string  `json:"refused"`     // what can't be put in force, and why
}

// Result is what a Commit did.
type Result struct {
	Changed                bool      // something was written
	InForce                time.Time // when it was in force
	Epoch                  uint32    // of the node afterwards
	RowsPut, RowsDeleted   int
	PeersPut, PeersDeleted int
	Pods                   int // that have other policies now
}

// Load takes policy.lock and reads the last known policy. Nothing is written before the first Commit, which puts in force what
// differs from what is in the maps. A policy.db that can't be read is moved to policy.broken, and counts as none. ErrHeld.
func Load(ctx context.Context, c Config) (*Policy, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	lock, err := node.TryLock(c.Dir, lockName)
	if errors.Is(err, node.ErrLocked) {
		return nil, fmt.Errorf("%s: %w", filepath.Join(c.Dir, lockName), ErrHeld)
	}
	if err != nil {
		return nil, err
	}
	p := &Policy{
		Config: c, lock: lock, pending: make(map[string]thing), refused: make(map[string]refusal), unsure: true,
		state: State{Refused: []string{}}, proof: policy.Prove,
	}
	if err := p.load(ctx); err != nil {
		lock.Unlock()
		return nil, err
	}
	return p, nil
}

func (p *Policy) load(ctx context.Context) error {
	s, err := read(ctx, p.Dir)
	switch {
	case err == nil:
		p.known, p.filed = true, true
	case errors.Is(err, ErrNoDatabase):
	case errors.Is(err, ErrCorrupt):
		p.Log.Warn("last known policy", "error", err, "moved to", brokenName)
		if err := os.Rename(filepath.Join(p.Dir, fileName), filepath.Join(p.Dir, brokenName)); err != nil {
			return err
		}
	default:
		return err
	}
	if p.Node == "" {
		p.Node = s.node
	}
	k, err := readKernel(p.Maps)
	if err != nil {
		return err
	}
	if p.room.rows, p.room.peers, err = p.Maps.PolicyRoom(); err != nil {
		return err
	}
	if err := p.compile(s.resources, k.beyond(s.numbers)); err != nil {
		return err
	}
	// A row means the same as long as its key is there. If ids are not of one line with those in the maps, all get new ones.
	if k.clash(p.model.compiler.Tables()) {
		return p.compile(s.resources, k.beyond(policy.Numbers{}))
	}
	return nil
}

// compile begins anew with these resources.
func (p *Policy) compile(resources []api.Resource, numbers policy.Numbers) error {
	p.model = newModel(p.Node, p.Kubernetes, numbers)
	var all []change
	for _, r := range resources {
		all = append(all, change{key: r.Key(), now: thing{resource: &r}})
	}
	_, _, err := p.try(all)
	return err
}

// Close writes what is left to write, and lets others keep the policy, which stays in force.
func (p *Policy) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return errors.Join(p.tidy(), p.lock.Unlock())
}

// Put notes a resource, as it is from the next Commit on. One that is not about policy is passed over.
func (p *Policy) Put(r api.Resource) {
	if Concerns(r.Kind) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.note(r.Key(), thing{resource: &r})
	}
}

// Delete notes that a resource is gone, from the next Commit on.
func (p *Policy) Delete(kind api.Kind, namespace, name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.note(kind.Key(namespace, name), thing{})
}

// Replace notes that these are all resources that there are, from the next Commit on.
func (p *Policy) Replace(resources []api.Resource) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.known = true
	there := make(map[string]bool, len(resources))
	for _, r := range resources {
		if Concerns(r.Kind) {
			there[r.Key()] = true
			p.note(r.Key(), thing{resource: &r})
		}
	}
	for _, keys := range []map[string]bool{keysOf(p.model.inForce), keysOf(p.pending), keysOf(p.refused)} {
		for key := range keys {
			if !there[key] && !strings.HasPrefix(key, localPrefix) {
				p.note(key, thing{})
			}
		}
	}
}

func keysOf[V any](m map[string]V) map[string]bool {
	keys := make(map[string]bool, len(m))
	for k := range m {
		keys[k] = true
	}
	return keys
}

// SetLocal notes which pods this node has, as node.db has them, from the next Commit on.
func (p *Policy) SetLocal(endpoints []node.Endpoint) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.local = true
	there := make(map[string]bool, len(endpoints))
	for _, e := range endpoints {
		key := localPrefix + EndpointID(p.Node, e)
		there[key] = true
		p.note(key, thing{pod: &e})
	}
	for _, keys := range []map[string]bool{keysOf(p.model.inForce), keysOf(p.pending), keysOf(p.refused)} {
		for key := range keys {
			if !there[key] && strings.HasPrefix(key, localPrefix) {
				p.note(key, thing{})
			}
		}
	}
}

// PutLocal notes a pod of this node, beside the others, from the next Commit on. Others that had an address of it are gone: it
// would not have been given to two.
func (p *Policy) PutLocal(e node.Endpoint) {
	p.mu.Lock()
	defer p.mu.Unlock()
	key := localPrefix + EndpointID(p.Node, e)
	var gone []string
	look := func(other string, pod *node.Endpoint) {
		if other != key && pod != nil && slices.ContainsFunc(pod.Addrs, func(a netip.Addr) bool { return slices.Contains(e.Addrs, a) }) {
			gone = append(gone, other)
		}
	}
	for id, pod := range p.model.local {
		look(localPrefix+id, pod)
	}
	for other, t := range p.pending {
		look(other, t.pod)
	}
	for other, r := range p.refused {
		look(other, r.pod)
	}
	for _, other := range gone {
		p.note(other, thing{})
	}
	p.note(key, thing{pod: &e})
}

func (p *Policy) note(key string, t thing) {
	if r, is := p.refused[key]; is && r.equal(t) {
		return
	}
	delete(p.refused, key)
	delete(p.pending, key)
	if !p.model.inForce[key].equal(t) {
		p.pending[key] = t
	}
}

// change is a thing that becomes another.
type change struct {
	key      string
	was, now thing
}

// name is what the thing is called, for people.
func (c change) name() string {
	for _, t := range []thing{c.now, c.was} {
		if t.resource != nil {
			return t.resource.String()
		}
		if t.pod != nil {
			return "pod " + t.pod.Key.String()
		}
	}
	return c.key
}

// order is when it is its turn: tiers come before what is in them, and go after it.
func (c change) order() int {
	for i, t := range []thing{c.now, c.was} {
		if t.resource != nil {
			if _, is := t.resource.Spec.(*api.Tier); is {
				return []int{0, 2}[i]
			}
			break
		}
	}
	return 1
}

// What can't be put in force is tried again with whatever else changes, but when that takes long not each time: it is left
// alone for so many times what the last attempt took, and at most so long.
const (
	retryShare   = 20
	retryRefused = 10 * time.Second
)

// Commit puts in force what was noted: it compiles, saves what changed, and writes the differences to the maps under the node
// lock, all in force at once. What can't be converted, compiled or does not fit is left as it was and named by the error,
// ErrRefused; the rest is in force. Any other error: what was in force stays, also for pods that came if it is only policy.db that
// can't be written, and the next Commit tries again. ErrUnknown.
func (p *Policy) Commit(ctx context.Context) (Result, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.known || !p.local {
		return Result{}, ErrUnknown
	}
	began := time.Now()
	if len(p.refused) > 0 && !began.Before(p.retry) {
		defer func() { p.retry = time.Now().Add(min(retryShare*time.Since(began), retryRefused)) }()
		for key, r := range p.refused {
			if _, newer := p.pending[key]; !newer {
				p.pending[key] = r.thing // where it stays if this Commit fails
			}
		}
		clear(p.refused)
	}
	var changes []change
	for key, t := range p.pending {
		changes = append(changes, change{key, p.model.inForce[key], t})
	}
	slices.SortFunc(changes, func(a, b change) int {
		if o := a.order() - b.order(); o != 0 {
			return o
		}
		return strings.Compare(a.key, b.key)
	})
	result, err := p.enact(ctx, changes)
	var unsaved error
	if errors.Is(err, errUnsaved) { // pods need no saving: a full disk leaves none without the policy that is in force
		unsaved = err
		changes = slices.DeleteFunc(changes, func(c change) bool { return !strings.HasPrefix(c.key, localPrefix) })
		result, err = p.enact(ctx, changes)
	}
	if err != nil {
		return Result{}, errors.Join(unsaved, err)
	}
	for _, c := range changes {
		delete(p.pending, c.key)
	}
	p.model.compiler.Accept()
	errs := []error{p.record(&result, began), unsaved}
	for _, c := range changes {
		if r, is := p.refused[c.key]; is && unsaved == nil {
			errs = append(errs, fmt.Errorf("%w: %w", ErrRefused, r.err))
		}
	}
	return result, errors.Join(errs...)
}

// errUnsaved says that policy.db could not be written.
var errUnsaved = errors.New("not saved, and so not in force")

// enact puts changes in force, as many as can be. On an error nothing has changed.
func (p *Policy) enact(ctx context.Context, changes []change) (Result, error) {
	delta, done, err := p.try(changes)
	if err == nil {
		if err = p.save(ctx, done, false); err != nil {
			err = fmt.Errorf("%w: %w", errUnsaved, err)
		}
	}
	var result Result
	if err == nil {
		result, err = p.write(ctx, delta, done)
	}
	if err != nil {
		p.undo(done)
		_, err1 := p.model.update()
		return Result{}, errors.Join(about(done, err), err1, p.save(ctx, done, true))
	}
	return result, nil
}

// try puts changes into the model, as many of them as it takes, notes the others as refused, and returns those it took with
// what they make of the tables.
func (p *Policy) try(changes []change) (*policy.Delta, []change, error) {
	var done []change
	for _, c := range changes {
		if err := p.model.set(c.key, c.now); err != nil {
			p.refused[c.key] = refusal{c.now, named(c, err)}
			continue
		}
		done = append(done, c)
	}
	delta, err := p.model.update()
	if err == nil {
		err = p.fits(delta)
	}
	if err == nil {
		err = p.prove(delta)
	}
	if err == nil || len(done) == 0 {
		return delta, done, err
	}
	p.undo(done)
	if len(done) == 1 {
		p.refused[done[0].key] = refusal{done[0].now, named(done[0], err)}
		delta, err = p.model.update()
		return delta, nil, err
	}
	// One of them is to blame. The halves are apart only until all that can be is in force at once.
	_, first, err := p.try(done[:len(done)/2])
	if err != nil {
		return nil, first, err
	}
	delta, second, err := p.try(done[len(done)/2:])
	return delta, append(first, second...), err
}

// undo makes things again what they were, the last one first.
func (p *Policy) undo(changes []change) {
	for _, c := range slices.Backward(changes) {
		if err := p.model.set(c.key, c.was); err != nil {
			p.Log.Error("take back", "resource", c.name(), "error", err) // it was taken before
		}
	}
}

// named makes sure that an error names what it is about.
func named(c change, err error) error {
	if name := c.name(); !strings.Contains(err.Error(), name) {
		return fmt.Errorf("%s: %w", name, err)
	}
	return err
}

// about says which changes are not in force because of an error: a few of them, by name.
func about(changes []change, err error) error {
	if len(changes) == 0 {
		return err
	}
	var names []string
	for _, c := range changes[:min(len(changes), 3)] {
		names = append(names, c.name())
	}
	if more := len(changes) - len(names); more > 0 {
		names = append(names, fmt.Sprintf("%d more", more))
	}
	return fmt.Errorf("%s: %w", strings.Join(names, ", "), err)
}

// How long new tables are held against the rules themselves, and how many packets that gave a mistake away are kept.
const (
	proveFor  = 2 * time.Millisecond
	keptWrong = 16
)

// prove finds out whether new tables say what the rules themselves do, before they are in force: by random packets, and by those
// that gave a mistake away before, so that what was refused is not let through by luck.
func (p *Policy) prove(d *policy.Delta) error {
	if d.Empty() {
		return nil
	}
	m, tables := p.model.compiler.Model(), p.model.compiler.Tables()
	for _, w := range p.wrong {
		if again := tables.Check(m, w.Endpoint, w.Direction, w.Packet); again != nil {
			return fmt.Errorf("%w: %w", errMiscompiled, again)
		}
	}
	_, err := p.proof(m, tables, d, proveFor)
	if err == nil {
		return nil
	}
	var w *policy.Disagreement
	if errors.As(err, &w) {
		p.wrong = append(p.wrong[max(0, len(p.wrong)-keptWrong+1):], w)
	}
	return fmt.Errorf("%w: %w", errMiscompiled, err)
}

// fits tells whether there is room for what is put, beside all that is there until it is deleted.
func (p *Policy) fits(d *policy.Delta) error {
	size := p.model.compiler.Tables().Size()
	rows, peers := size.Rows, size.Peers
	if !p.unsure {
		_, deleted := d.Rows()
		rows, peers = rows+deleted, peers+len(d.DeletePeers)
	}
	switch {
	case rows > p.room.rows:
		return fmt.Errorf("%w: with it, and until it is in force, caracal_policy would have %d rows; there is room for %d", maps.ErrFull, rows, p.room.rows)
	case peers > p.room.peers:
		return fmt.Errorf("%w: with it, and until it is in force, caracal_peers would have %d prefixes; there is room for %d", maps.ErrFull, peers, p.room.peers)
	}
	return nil
}

// save writes what of the changes is about resources to policy.db, as it is now, or with back as it was. Where there never was
// a policy, none is made of pods alone.
func (p *Policy) save(ctx context.Context, changes []change, back bool) error {
	values := make(map[string][]byte)
	put := func(key string, r *api.Resource) error {
		values[key] = nil
		if r == nil {
			return nil
		}
		text, err := json.Marshal(r)
		values[key] = text
		return err
	}
	if !p.filed {
		if len(p.model.placed)+len(p.model.profiles) == 0 || back {
			return nil
		}
		for key, t := range p.model.inForce {
			if t.resource != nil {
				if err := put(key, t.resource); err != nil {
					return err
				}
			}
		}
	}
	for _, c := range changes {
		if strings.HasPrefix(c.key, localPrefix) {
			continue
		}
		t := c.now
		if back {
			t = c.was
		}
		if err := put(c.key, t.resource); err != nil {
			return err
		}
	}
	for key := range p.refused {
		if !p.model.inForce[key].exists() { // what policy.db has of it can't be put in force any more
			values[key] = nil
		}
	}
	if len(values) == 0 {
		return nil
	}
	err := save(ctx, p.Dir, p.Node, values, nil, writing)
	p.filed = p.filed || err == nil
	p.untidy = true
	return err
}

// write puts a delta in force, with what else differs in the maps.
func (p *Policy) write(ctx context.Context, d *policy.Delta, changes []change) (Result, error) {
	if put, deleted := d.Rows(); !p.unsure && put+deleted+len(d.PutPeers)+len(d.DeletePeers) == 0 { // nobody need wait for nothing
		whole, _, err := p.complete(d, changes)
		if err != nil || whole.Empty() {
			return Result{}, err
		}
	}
	lock, err := node.LockNode(ctx, p.Dir)
	if err != nil {
		return Result{}, err
	}
	defer lock.Unlock()
	whole, at, err := p.complete(d, changes)
	if err != nil {
		return Result{}, err
	}
	inForce, err := p.put(whole, at)
	if err != nil {
		p.unsure = true
		return Result{}, err
	}
	p.unsure = false
	r := Result{Changed: !whole.Empty(), InForce: inForce, PeersPut: len(whole.PutPeers), PeersDeleted: len(whole.DeletePeers), Pods: len(whole.PutPods)}
	r.RowsPut, r.RowsDeleted = whole.Rows()
	return r, nil
}

// put writes a delta to the maps, and tells since when it is in force.
func (p *Policy) put(d *policy.Delta, at map[string]maps.Pod) (time.Time, error) {
	ifindex := func(id string) (uint32, bool) { pod, ok := at[id]; return pod.IfIndex, ok }
	if p.onlyNew(d, at) {
		err := commit.AddPolicy(p.Maps, d, ifindex)
		return time.Now(), err
	}
	settle, err := commit.PutPolicy(p.Maps, d, ifindex)
	if err != nil {
		return time.Time{}, err
	}
	inForce := time.Now()
	return inForce, settle()
}

// onlyNew tells whether a delta is only about pods that are cut off until it is in force, or not in the maps yet.
func (p *Policy) onlyNew(d *policy.Delta, at map[string]maps.Pod) bool {
	if d.Empty() || len(d.DeletePeers)+len(d.DeleteRows) > 0 {
		return false
	}
	cutOff := func(id string) bool {
		pod, there := at[id]
		return !there || pod.PolicyEgress == maps.PolicyUnknown && pod.PolicyIngress == maps.PolicyUnknown
	}
	for id := range d.PutPods {
		if !cutOff(id) {
			return false
		}
	}
	for _, c := range d.PutPeers {
		id := ""
		if c.Prefix.IsSingleIP() && len(p.model.holders[c.Prefix.Addr()]) > 0 {
			id = p.model.holder(c.Prefix.Addr())
		}
		if p.model.local[id] == nil || !cutOff(id) {
			return false
		}
	}
	return true
}

// complete is a delta for the maps as they are: with the policy ids of all pods that have others, where the compiler knows only
// what it changed itself; the same of the addresses of pods that changed; and when it is not sure what the maps hold, of all. at are the pods in the maps.
func (p *Policy) complete(d *policy.Delta, changes []change) (whole *policy.Delta, at map[string]maps.Pod, err error) {
	tables := p.model.compiler.Tables()
	if p.unsure {
		k, err := readKernel(p.Maps)
		if err != nil {
			return nil, nil, err
		}
		whole = policy.Diff(k.tables(), tables)
	} else {
		copied := *d
		whole = &copied
		if whole.PutPeers, err = p.mendPeers(d.PutPeers, changes); err != nil {
			return nil, nil, err
		}
	}
	pods, err := p.Maps.Pods()
	if err != nil {
		return nil, nil, err
	}
	having := make(map[netip.Addr]maps.Pod)
	for _, pod := range pods {
		for _, a := range pod.Addresses {
			having[a] = pod
		}
	}
	at = make(map[string]maps.Pod)
	whole.PutPods, whole.DeletePods = make(map[string]policy.PodPolicies), nil
	for id, want := range tables.Pods {
		for _, a := range p.model.endpoints[id].Addresses {
			pod, there := having[a]
			if there {
				at[id] = pod
			}
			if there && want != (policy.PodPolicies{Ingress: pod.PolicyIngress, Egress: pod.PolicyEgress}) {
				whole.PutPods[id] = want
			}
		}
	}
	return whole, at, nil
}

// mendPeers adds the addresses of pods that came, went or are others now which have another identity in the maps: who removes a
// pod removes that of its addresses, and somebody may have got them since: the same pod again, or one of another node.
func (p *Policy) mendPeers(put []policy.PeerChange, changes []change) ([]policy.PeerChange, error) {
	tables := p.model.compiler.Tables()
	for _, c := range changes {
		var addrs []netip.Addr
		for _, pod := range []*node.Endpoint{c.was.pod, c.now.pod} {
			if pod != nil {
				addrs = append(addrs, pod.Addrs...)
			}
		}
		for _, a := range addrs {
			single := netip.PrefixFrom(a, a.BitLen())
			want, is := tables.Peers[single]
			if !is || slices.ContainsFunc(put, func(c policy.PeerChange) bool { return c.Prefix == single }) {
				continue
			}
			have, err := p.Maps.Peer(a)
			if err != nil {
				return nil, err
			}
			if have.Identity != want {
				put = append(slices.Clip(put), policy.PeerChange{Prefix: single, Before: have.Identity, After: want})
			}
		}
	}
	return put, nil
}

// record notes what a commit did.
func (p *Policy) record(r *Result, began time.Time) error {
	epoch, err := p.Maps.State()
	if err != nil {
		return err
	}
	r.Epoch = epoch.Epoch
	tables := p.model.compiler.Tables()
	size := tables.Size()
	s := &p.state
	if r.Changed {
		s.Epoch, s.Since, s.Took = r.Epoch, r.InForce, r.InForce.Sub(began).Seconds()
		s.Commits++
		p.untidy = p.untidy || p.filed
	}
	identities := make(map[uint32]struct{})
	for _, id := range tables.Peers {
		identities[id] = struct{}{}
	}
	s.Resources, s.Policies = len(p.model.inForce)-len(p.model.local), len(p.model.placed)
	s.PolicyIDs, s.Rows, s.Prefixes, s.Identities, s.Rules, s.Pods = size.Policies, size.Rows, size.Peers, len(identities), len(tables.Rules), size.Pods
	return nil
}

// State is what is in force.
func (p *Policy) State() State {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.state
	s.Refused = []string{}
	for _, err := range p.troubles() {
		s.Refused = append(s.Refused, err.Error())
	}
	return s
}

// Trouble names everything that is not in force as people want it. nil: all is.
func (p *Policy) Trouble() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return errors.Join(p.troubles()...)
}

// Refused says of each resource that can't be put in force as people want it why, by its key.
func (p *Policy) Refused() map[string]error {
	p.mu.Lock()
	defer p.mu.Unlock()
	errs := make(map[string]error)
	for key, r := range p.refused {
		if !strings.HasPrefix(key, localPrefix) {
			errs[key] = r.err
		}
	}
	return errs
}

func (p *Policy) troubles() []error {
	var errs []error
	for _, key := range slices.Sorted(stdmaps.Keys(p.refused)) {
		errs = append(errs, p.refused[key].err)
	}
	return append(errs, p.model.conflicts()...)
}

// Known tells whether anything was ever known of policy: policy.db was there, or somebody has said what there is.
func (p *Policy) Known() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.known
}

// Pod is the policy ids of a pod of this node since the last Commit. false: it is not known, or has been refused.
func (p *Policy) Pod(e node.Endpoint) (policy.PodPolicies, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	ids, ok := p.model.compiler.Tables().Pods[EndpointID(p.Node, e)]
	return ids, ok
}

// Resource is what is in force of a resource about policy. false: nothing.
func (p *Policy) Resource(kind api.Kind, namespace, name string) (api.Resource, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if r := p.model.inForce[kind.Key(namespace, name)].resource; r != nil {
		return *r, true
	}
	return api.Resource{}, false
}

// Rule is what a rule id stands for.
type Rule struct {
	Tier      string `json:"tier,omitempty"` // none: a profile's
	Policy    string `json:"policy"`         // kind, namespace and name
	Direction string `json:"direction"`
	Index     int    `json:"index"`           // in its policy's list from 0; policy.NoRule: the end of the tier or of the profiles
	Place     string `json:"place,omitempty"` // where the resource says it: "ingress[0].from[1]"
	Text      string `json:"text,omitempty"`  // the rule in words
}

// RuleOf describes a rule.
func RuleOf(info policy.RuleInfo) Rule {
	r := Rule{Tier: info.Tier, Policy: info.Policy, Direction: info.Direction.String(), Index: info.Index}
	if info.Rule != nil {
		r.Place, r.Text = info.Rule.Place, info.Rule.String()
	}
	return r
}

// Rules are what the rule ids stand for that are in force.
func (p *Policy) Rules() map[uint32]Rule {
	p.mu.Lock()
	infos := stdmaps.Clone(p.model.compiler.Tables().Rules)
	p.mu.Unlock()
	rules := make(map[uint32]Rule, len(infos))
	for id, info := range infos {
		rules[id] = RuleOf(info)
	}
	return rules
}

// Tidy does what need not be done at once after a Commit: it saves the ids that were given out, and forgets what rules have
// counted that are gone. A late copy of the ids is as good: Load gives out none that is in the maps.
func (p *Policy) Tidy() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.tidy()
}

func (p *Policy) tidy() error {
	if !p.untidy {
		return nil
	}
	counted, err := p.Maps.RuleIDs()
	if err != nil {
		return err
	}
	rules := p.model.compiler.Tables().Rules
	gone := slices.DeleteFunc(counted, func(id uint32) bool { _, is := rules[id]; return is })
	numbers := p.model.compiler.Numbers()
	if err := errors.Join(p.Maps.RemoveRules(gone), save(context.Background(), p.Dir, p.Node, nil, &numbers, syncing)); err != nil {
		return err
	}
	p.untidy = false
	return nil
}
