package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/enforce"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/policy"
	"github.com/caracal-net/caracal/store"
)

const (
	tidyAfter   = time.Second           // how long ids that were given out are not saved, at most
	maxTroubles = 10                    // that a problem's text lists
	maxEndpoint = 1 << 20               // bytes of an endpoint that is asked about
	fileTick    = 20 * time.Millisecond // writes of a file within less may bear the same time: a tick, 10 ms at most
)

// policies keeps policy in force, on a goroutine of its own: what is heard of the store is in force before anything is waited
// for that the rest of the agent does.
type policies struct {
	a    *Agent
	wake chan struct{}
	asks chan ask
	over chan struct{} // closed: the goroutine has ended, and policy.lock is free
	tell chan struct{} // there may be something to publish

	mu        sync.Mutex
	loaded    *enforce.Policy         // nil: not yet
	heard     map[string]store.Event  // by key, since the goroutine looked
	all       bool                    // heard is all that there is
	published map[string]Published    // this node's endpoints in the store, by key
	listed    bool                    // published and mine are what the store has
	mine      map[string]api.Resource // this node's Pods in Kubernetes, by key
	announced map[string]string       // what was, by the Pods' uids
	pods      []node.Endpoint         // of this node
	podsKnown bool
	named     bool             // the store says that this node's name is this host's
	stale     bool             // published may not be what pods are
	wrong     map[string]error // what is not in force as people want it, by key of the store
}

// Published is a WorkloadEndpoint as it lies in the store.
type Published struct {
	store.KV
	Resource api.Resource
}

// Endpoints are a node's endpoints in a store.
func Endpoints(ctx context.Context, s store.Store, nodeName string) ([]Published, error) {
	kvs, _, err := s.List(ctx, policyKinds["workloadendpoints"].Prefix(""))
	if err != nil {
		return nil, err
	}
	var all []Published
	for _, kv := range kvs {
		var r api.Resource
		if err := json.Unmarshal(kv.Value, &r); err != nil {
			return nil, fmt.Errorf("%s in the store: %w", kv.Key, err)
		}
		if spec, is := r.Spec.(*api.WorkloadEndpoint); is && spec.Node == nodeName {
			all = append(all, Published{kv, r})
		}
	}
	return all, nil
}

// ask is a pod whose policy somebody waits for.
type ask struct {
	pod    node.Endpoint
	until  time.Time     // when it is not waited for any more that its Pod is heard of
	answer chan<- answer // has room for one
}

var (
	// errNotKept says that this agent does not keep the node's policy: not yet, or no more.
	errNotKept = errors.New("this agent does not keep policy")
	// errUnheard says that a pod can't be judged, since Kubernetes has not told of it.
	errUnheard = errors.New("Kubernetes has not told of it")
)

type answer struct {
	ids policy.PodPolicies
	err error
}

func newPolicies(a *Agent) *policies {
	return &policies{a: a, wake: make(chan struct{}, 1), asks: make(chan ask), over: make(chan struct{}), tell: make(chan struct{}, 1), heard: make(map[string]store.Event), published: make(map[string]Published), announced: make(map[string]string)}
}

// policyKinds are the kinds that are about policy, by the word that their keys begin with.
var policyKinds = func() map[string]api.Kind {
	kinds := make(map[string]api.Kind)
	for _, k := range api.Kinds {
		if enforce.Concerns(k) {
			kinds[k.Word()] = k
		}
	}
	return kinds
}()

// policyKey splits the key of a resource that is about policy.
func policyKey(key string) (kind api.Kind, namespace, name string, ok bool) {
	word, rest, _ := strings.Cut(strings.TrimPrefix(key, "/"), "/")
	kind, ok = policyKinds[word]
	if kind.Namespaced {
		namespace, name, _ = strings.Cut(rest, "/")
		return kind, namespace, name, ok
	}
	return kind, "", rest, ok
}

// list takes all that the store holds about policy.
func (s *policies) list(kvs []store.KV) {
	s.mu.Lock()
	s.heard, s.all = make(map[string]store.Event, len(kvs)), true
	for _, kv := range kvs {
		s.heard[kv.Key] = store.Event{KV: kv}
	}
	s.mu.Unlock()
	s.look()
}

// hear takes a change of something that is about policy.
func (s *policies) hear(e store.Event) {
	s.mu.Lock()
	s.heard[e.Key] = e
	s.mu.Unlock()
	s.look()
}

func (s *policies) look() { signal(s.wake) }

// run keeps policy in force until ctx ends; it stays in force then.
func (s *policies) run(ctx context.Context) {
	defer close(s.over)
	k := &keeper{policies: s, unreadable: make(map[string]error), retry: retryFrom, again: time.Now(), tidied: time.Now()}
	if !k.load(ctx) {
		return
	}
	defer func() {
		if err := k.p.Close(); err != nil {
			s.a.Log.Warn("save policy", "error", err)
		}
	}()
	tick := time.NewTicker(localLook)
	defer tick.Stop()
	for {
		var asked []ask
		read := false
		select {
		case <-ctx.Done():
			return
		case <-s.wake:
		case q := <-s.asks:
			asked = append(asked, q)
			read = k.read.IsZero() // of one pod alone nothing can be said
		case now := <-tick.C:
			k.tidy(now)
			if !k.due(now) {
				continue
			}
			read = true
		}
		k.keep(ctx, asked, read)
	}
}

// keeper is what the goroutine knows for itself.
type keeper struct {
	*policies
	p          *enforce.Policy
	waiting    []ask            // for Pods to be heard of
	unreadable map[string]error // by key of the store
	read       time.Time        // when node.db was written that was read last
	epoch      uint32           // that was the last one
	again      time.Time        // when to try again; zero: not
	retry      time.Duration
	tidied     time.Time
}

// load waits for its turn: an ADD that came while there was no agent may be at it. false: ctx ended.
func (k *keeper) load(ctx context.Context) bool {
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, retryFrom) {
		p, err := enforce.Load(ctx, enforce.Config{Dir: k.a.StateDir, Maps: k.a.maps, Node: k.a.Node, Kubernetes: k.a.Kubernetes != nil, Log: k.a.Log})
		if ctx.Err() == nil && wait == retryFrom || err == nil {
			k.a.problem("policy", err)
		}
		if err == nil {
			k.p = p
			k.mu.Lock()
			k.loaded = p
			k.mu.Unlock()
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(wait):
		}
	}
}

// due tells whether there is something to do that nobody has told of.
func (k *keeper) due(now time.Time) bool {
	if !k.again.IsZero() && !now.Before(k.again) || slices.ContainsFunc(k.waiting, func(q ask) bool { return !now.Before(q.until) }) {
		return true
	}
	if written, err := node.Changed(k.a.StateDir); err != nil || !written.Equal(k.read) {
		return true
	}
	state, err := k.a.maps.State()
	return err != nil || state.Epoch != k.epoch // a pod came or went: what was written for it may be older than what it is to be
}

func (k *keeper) tidy(now time.Time) {
	if now.Sub(k.tidied) < tidyAfter {
		return
	}
	k.tidied = now
	if err := k.p.Tidy(); err != nil {
		k.a.Log.Warn("save policy", "error", err)
	}
}

// keep puts in force what changed, and answers who asked. read: node.db may have changed.
func (k *keeper) keep(ctx context.Context, asked []ask, read bool) {
	for more := true; more; { // what comes together is done together
		select {
		case q := <-k.asks:
			asked = append(asked, q)
		default:
			more = false
		}
	}
	k.take()
	var err error
	if read {
		err = k.readPods(ctx)
	}
	for _, q := range asked {
		k.p.PutLocal(q.pod)
	}
	refused := false
	if err == nil {
		_, err = k.p.Commit(ctx)
		switch {
		case errors.Is(err, enforce.ErrRefused): // what, the problem says
			refused, err = true, nil
		case errors.Is(err, enforce.ErrUnknown): // the store will say
		}
	}
	waited := k.waiting
	k.waiting = nil
	for _, q := range slices.Concat(waited, asked) {
		switch {
		case err != nil && ctx.Err() != nil: // it was given up, not refused
			q.answer <- answer{err: errNotKept}
		case k.unheard(q.pod, err) && time.Now().Before(q.until):
			k.waiting = append(k.waiting, q)
		default:
			q.answer <- k.answer(q.pod, err)
		}
	}
	if len(asked) > 0 {
		k.publishAsked(asked)
	}
	if errors.Is(err, enforce.ErrUnknown) {
		err = nil
	}
	k.again = time.Time{}
	switch {
	case err != nil:
		k.again, k.retry = time.Now().Add(k.retry), min(2*k.retry, retryTo)
	case refused || k.p.Trouble() != nil:
		k.again = time.Now().Add(rescan)
	default:
		k.retry = retryFrom
	}
	if state, serr := k.a.maps.State(); serr == nil {
		k.epoch = state.Epoch
	}
	if ctx.Err() == nil {
		k.a.problem("policy", k.trouble(err))
	}
	wrong := k.p.Refused()
	maps.Copy(wrong, k.unreadable)
	k.mu.Lock()
	k.wrong = wrong
	k.mu.Unlock()
}

// publishAsked has pods published before node.db is read again.
func (k *keeper) publishAsked(asked []ask) {
	k.mu.Lock()
	pods := slices.Clone(k.pods)
	for _, q := range asked {
		pods = append(slices.DeleteFunc(pods, func(e node.Endpoint) bool { return e.Key == q.pod.Key }), q.pod)
	}
	k.pods, k.stale = pods, true
	k.mu.Unlock()
	signal(k.tell)
}

// unheard tells whether a pod's policy will be known when Kubernetes was heard.
func (k *keeper) unheard(pod node.Endpoint, err error) bool {
	return k.a.Kubernetes != nil && enforce.OfKubernetes(pod) && (errors.Is(err, enforce.ErrUnknown) || err == nil && k.p.Awaits(pod))
}

func (k *keeper) answer(pod node.Endpoint, err error) answer {
	if err == nil && k.p.Awaits(pod) {
		err = fmt.Errorf("Pod %s/%s with uid %s: %w", pod.PodNamespace, pod.PodName, pod.PodUID, errUnheard)
	}
	if err != nil {
		return answer{err: err}
	}
	ids, ok := k.p.Pod(pod)
	if !ok {
		return answer{err: errors.Join(fmt.Errorf("policy of pod %s: %w", pod.Key, enforce.ErrRefused), k.p.Trouble())}
	}
	return answer{ids: ids}
}

// trouble is all that keeps policy from being what people want.
func (k *keeper) trouble(err error) error {
	var texts []string
	if err != nil {
		texts = append(texts, err.Error())
	}
	for _, key := range slices.Sorted(maps.Keys(k.unreadable)) {
		texts = append(texts, fmt.Sprintf("%s: %s", key, k.unreadable[key]))
	}
	texts = append(texts, k.p.State().Refused...)
	if len(texts) == 0 {
		return nil
	}
	if more := len(texts) - maxTroubles; more > 0 {
		texts = append(texts[:maxTroubles], fmt.Sprintf("and %d more", more))
	}
	all := errors.New(strings.Join(texts, "; "))
	if err == nil {
		return inputError{all}
	}
	return all
}

// take notes what was heard of the store.
func (k *keeper) take() {
	k.mu.Lock()
	heard, all := k.heard, k.all
	k.heard, k.all = make(map[string]store.Event), false
	k.mu.Unlock()
	var resources []api.Resource
	published, pods := make(map[string]Published), make(map[string]api.Resource)
	if all {
		clear(k.unreadable)
	}
	var keys []string
	var texts [][]byte
	for key, e := range heard {
		delete(k.unreadable, key)
		if e.Deleted {
			kind, namespace, name, _ := policyKey(key)
			k.p.Delete(kind, namespace, name)
			k.unpublished(e)
			continue
		}
		keys, texts = append(keys, key), append(texts, e.Value)
	}
	read, errs := enforce.Decode(texts)
	for i, key := range keys {
		e, r, err := heard[key], read[i], errs[i]
		if err == nil && r.Key() != key {
			err = fmt.Errorf("%w: it is %s", api.ErrInvalid, r)
		}
		if err != nil {
			k.unreadable[key] = err
			kind, namespace, name, _ := policyKey(key)
			if have, ok := k.p.Resource(kind, namespace, name); all && ok { // what was in force of it stays
				resources = append(resources, have)
			}
			continue
		}
		switch spec := r.Spec.(type) {
		case *api.WorkloadEndpoint:
			if spec.Node == k.a.Node {
				published[key] = Published{e.KV, r}
			}
		case *api.Pod:
			pods[key] = r
			if spec.Announced { // which whoever makes pods can write too: nobody outside becomes a pod by that
				spec.IPs = k.a.cluster.pooled(spec.IPs)
			}
		}
		if all {
			resources = append(resources, r)
		} else {
			k.p.Put(r)
		}
	}
	if all {
		k.p.Replace(resources)
	}
	k.mu.Lock()
	changed := false
	if all {
		k.published, k.mine, k.listed, changed = make(map[string]Published), make(map[string]api.Resource), true, true
	}
	for key, r := range pods {
		if r.Spec.(*api.Pod).Node == k.a.Node {
			k.mine[key], changed = r, true
		} else { // a StatefulSet's may have come again elsewhere, and its end not been heard by itself
			delete(k.mine, key)
		}
	}
	for key, e := range published {
		if e.Revision > k.published[key].Revision { // not what this agent wrote itself
			k.published[key], changed = e, true
		}
	}
	k.stale = k.stale || changed
	k.mu.Unlock()
	signal(k.tell)
}

// unpublished notes that an endpoint of this node is gone from the store.
func (k *keeper) unpublished(e store.Event) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.mine, e.Key)
	if was, ours := k.published[e.Key]; ours && was.Revision < e.Revision {
		delete(k.published, e.Key)
		k.stale = true
	}
}

// readPods reads which pods this node has, if that has changed. On an error those that were known stay.
func (k *keeper) readPods(ctx context.Context) error {
	now := time.Now()
	written, err := node.Changed(k.a.StateDir)
	if err != nil || written.Equal(k.read) && !written.IsZero() {
		return err
	}
	pods, err := k.a.pods(ctx)
	if err != nil {
		return err
	}
	k.p.SetLocal(pods)
	if k.read = written; now.Sub(written) < fileTick {
		k.read = written.Add(-1) // look again: it may be written again without bearing another time
	}
	k.mu.Lock()
	k.pods, k.podsKnown, k.stale = pods, true, true
	k.mu.Unlock()
	signal(k.tell)
	return nil
}

// pods are those in node.db. None there while pods are attached is an error: somebody has taken the file away.
func (a *Agent) pods(ctx context.Context) ([]node.Endpoint, error) {
	pods := []node.Endpoint{}
	db, err := node.OpenReadOnly(ctx, a.StateDir, a.nodeOptions())
	if errors.Is(err, node.ErrNoDatabase) {
		attached, merr := a.maps.Pods()
		if merr == nil && len(attached) > 0 {
			return nil, fmt.Errorf("%d pods are attached: %w", len(attached), err)
		}
		return pods, merr
	}
	if err != nil {
		return nil, err
	}
	defer db.Close()
	err = db.View(func(tx *node.Tx) error {
		pods, err = tx.AllEndpoints()
		return err
	})
	return pods, err
}

// claimed says whether the store has this node's name as this host's: else nothing is published under it.
func (s *policies) claimed(named bool) {
	s.mu.Lock()
	s.named = named
	s.mu.Unlock()
	signal(s.tell)
}

// publisher keeps what the store says of this node's pods up to date until ctx ends.
func (s *policies) publisher(ctx context.Context) {
	retry := retryFrom
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-s.tell:
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		err := s.publish(ctx)
		if ctx.Err() != nil {
			return
		}
		s.a.problem("endpoints", err)
		if err == nil {
			retry = retryFrom
			continue
		}
		timer.Reset(retry)
		retry = min(2*retry, retryTo)
	}
}

// publish makes the store say which pods this node has: what differs is written, and what is gone deleted. Only endpoints
// that say to be this node's are touched.
func (s *policies) publish(ctx context.Context) error {
	s.mu.Lock()
	ready, pods, published, mine := s.named && s.podsKnown && s.listed && s.stale, s.pods, maps.Clone(s.published), maps.Clone(s.mine)
	s.stale = s.stale && !ready
	s.mu.Unlock()
	if !ready {
		return nil
	}
	var errs []error
	defer func() {
		if len(errs) > 0 {
			s.mu.Lock()
			s.stale = true
			s.mu.Unlock()
		}
	}()
	if s.a.Kubernetes != nil {
		var own []node.Endpoint
		own, pods = split(pods)
		if err := s.announce(ctx, own, mine); err != nil {
			if errs = append(errs, err); errors.Is(err, store.ErrUnavailable) {
				return err
			}
		}
	}
	for _, pod := range pods {
		id := enforce.EndpointID(s.a.Node, pod)
		namespace, name, _ := strings.Cut(id, "/")
		key := policyKinds["workloadendpoints"].Key(namespace, name)
		was, exists := published[key]
		delete(published, key)
		var have *api.Resource
		if exists {
			have = &was.Resource
		}
		want := enforce.Endpoint(s.a.Node, pod, have)
		text, err := json.Marshal(want)
		if err == nil && exists && bytes.Equal(text, was.Value) {
			continue
		}
		var revision store.Revision
		if err == nil {
			revision, err = s.a.put(ctx, key, text, was.KV, exists)
		}
		if err != nil {
			if errs = append(errs, fmt.Errorf("publish pod %s: %w", pod.Key, err)); errors.Is(err, store.ErrUnavailable) {
				return errs[0] // it will not be there for the next one
			}
			continue
		}
		s.mu.Lock()
		if revision > s.published[key].Revision { // else it was changed again, and heard of already
			s.published[key] = Published{store.KV{Key: key, Value: text, Revision: revision}, want}
		}
		s.mu.Unlock()
	}
	for key, was := range published {
		if err := s.a.store.Delete(ctx, key, was.Revision); err != nil && !errors.Is(err, store.ErrNotFound) {
			errs = append(errs, fmt.Errorf("take back %s: %w", was.Resource, err))
			continue
		}
		s.mu.Lock()
		if s.published[key].Revision == was.Revision {
			delete(s.published, key)
		}
		s.mu.Unlock()
	}
	return errors.Join(errs...)
}

// PolicyStatus is what an agent says of policy, on its socket at /v1/policy.
type PolicyStatus struct {
	Known bool `json:"known"` // false: nothing is, and what is in the maps stays
	enforce.State
}

func (s *policies) status() PolicyStatus {
	if p := s.policy(); p != nil {
		return PolicyStatus{p.Known(), p.State()}
	}
	return PolicyStatus{State: enforce.State{Refused: []string{}}}
}

// handle answers what is asked about policy.
func (s *policies) handle(mux *http.ServeMux) {
	answer := func(w http.ResponseWriter, v any, err error) {
		if err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(v) // who asks may be gone
	}
	mux.HandleFunc("GET /v1/policy", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, s.status(), nil)
	})
	mux.HandleFunc("GET /v1/policy/rules", func(w http.ResponseWriter, _ *http.Request) {
		rules := make(map[uint32]enforce.Rule)
		if p := s.policy(); p != nil {
			rules = p.Rules()
		}
		answer(w, rules, nil)
	})
	mux.HandleFunc("POST /v1/policy/endpoint", func(w http.ResponseWriter, r *http.Request) {
		var pod node.Endpoint
		err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxEndpoint)).Decode(&pod)
		if err == nil {
			_, err = node.ParseKey(pod.Key.String())
		}
		if err != nil {
			http.Error(w, "an endpoint of node.db is expected: "+err.Error(), http.StatusBadRequest)
			return
		}
		begin := time.Now()
		wait := s.a.podWait()
		if r.URL.Query().Has("waited") { // for the pod's annotations
			wait = 0
		}
		ids, err := s.ask(r.Context(), pod, wait)
		s.a.traced(r, "policy of a new pod", begin, err, "endpoint", pod.Key.String())
		if errors.Is(err, errNotKept) {
			panic(http.ErrAbortHandler) // no answer: ADD takes it that there is no agent, and keeps policy itself
		}
		if errors.Is(err, errUnheard) {
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		}
		if errors.Is(err, enforce.ErrRefused) {
			http.Error(w, strings.ReplaceAll(err.Error(), "\n", "; "), http.StatusConflict) // ADD reads a line
			return
		}
		answer(w, ids, err)
	})
}

// ask makes a pod's policy what it is to be, and returns its ids when it is in force. Kubernetes has so long to tell of the pod.
// errNotKept, errUnheard.
func (s *policies) ask(ctx context.Context, pod node.Endpoint, wait time.Duration) (policy.PodPolicies, error) {
	if s.policy() == nil {
		return policy.PodPolicies{}, errNotKept
	}
	reply := make(chan answer, 1)
	select {
	case s.asks <- ask{pod, time.Now().Add(wait), reply}:
	case <-s.over:
		return policy.PodPolicies{}, errNotKept
	case <-ctx.Done():
		return policy.PodPolicies{}, ctx.Err()
	}
	select {
	case got := <-reply:
		return got.ids, got.err
	case <-s.over: // while it waited for Kubernetes
		return policy.PodPolicies{}, errNotKept
	case <-ctx.Done():
		return policy.PodPolicies{}, ctx.Err()
	}
}

func (s *policies) policy() *enforce.Policy {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.loaded
}
