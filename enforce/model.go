package enforce

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/policy"
)

// Concerns tells whether resources of a kind are about policy.
func Concerns(k api.Kind) bool {
	switch k.Name {
	case "NetworkPolicy", "GlobalNetworkPolicy", "AdminNetworkPolicy", "BaselineAdminNetworkPolicy", "ClusterNetworkPolicy",
		"Tier", "Profile", "NetworkSet", "GlobalNetworkSet", "WorkloadEndpoint", "Pod", "Namespace", "ServiceAccount":
		return true
	}
	return false
}

// thing is what the model is made of: a resource, or a pod of this node. Neither: it is not there.
type thing struct {
	resource *api.Resource
	pod      *node.Endpoint
}

func (t thing) exists() bool { return t.resource != nil || t.pod != nil }

func (t thing) equal(o thing) bool { return reflect.DeepEqual(t, o) }

// localPrefix is before the keys of pods of this node, which are their endpoints' ids; resources' begin with a slash.
const localPrefix = "local:"

// model turns things into what a compiler is told, one by one: what a thing concerns is converted again, nothing else.
type model struct {
	node     string
	compiler *policy.Compiler
	inForce  map[string]thing // by key

	context  *policy.Context
	tiers    map[string]api.Tier
	placed   map[string]policy.Placed // by key
	profiles map[string]bool          // by name
	order    bool                     // tiers or placed are not what the compiler has

	kubernetes bool                      // it has the Pods that this node's are of
	published  map[string]*api.Resource  // WorkloadEndpoints by id
	pods       map[string]*api.Resource  // Pods by full name
	ofPod      map[string][]string       // ids of this node's pods, by the full names of their Pods
	left       map[string]*api.Resource  // Pods that Kubernetes has no more, by the ids of this node's that are here still
	local      map[string]*node.Endpoint // this node's, by id
	endpoints  map[string]*endpoint
	within     map[string]map[string]struct{} // endpoints' ids, and keys of sets, by namespace
	holders    map[netip.Addr][]string        // who say that they have an address, by id
	contested  map[netip.Addr]time.Time       // since when several do
}

// endpoint is one as it was converted.
type endpoint struct {
	*policy.Endpoint
	created string // RFC 3339
}

func newModel(nodeName string, kubernetes bool, numbers policy.Numbers) *model {
	m := &model{
		node: nodeName, kubernetes: kubernetes, inForce: make(map[string]thing), context: policy.NewContext(), tiers: make(map[string]api.Tier),
		placed: make(map[string]policy.Placed), profiles: make(map[string]bool), published: make(map[string]*api.Resource),
		pods: make(map[string]*api.Resource), ofPod: make(map[string][]string), left: make(map[string]*api.Resource), local: make(map[string]*node.Endpoint),
		endpoints: make(map[string]*endpoint), within: make(map[string]map[string]struct{}), holders: make(map[netip.Addr][]string), contested: make(map[netip.Addr]time.Time),
	}
	m.compiler = policy.NewCompiler(policy.Options{Local: func(id string) bool { return m.local[id] != nil }, Numbers: numbers})
	return m
}

// set makes a thing another one. On an error, which names it, it stays what it was.
func (m *model) set(key string, now thing) error {
	was := m.inForce[key]
	if !now.exists() && !was.exists() {
		return nil
	}
	var err error
	if id, is := strings.CutPrefix(key, localPrefix); is {
		err = m.setLocal(id, now.pod)
	} else {
		err = m.setResource(key, was.resource, now.resource)
	}
	if err != nil {
		return err
	}
	m.inForce[key] = now
	if !now.exists() {
		delete(m.inForce, key)
	}
	return nil
}

func (m *model) setResource(key string, was, now *api.Resource) error {
	r := now
	if r == nil {
		r = was
	}
	name := r.Metadata.Name
	switch spec := r.Spec.(type) {
	case *api.WorkloadEndpoint:
		id := r.Metadata.FullName()
		m.published[id] = now
		if now == nil {
			delete(m.published, id)
		}
		return m.place(id)
	case *api.Pod:
		return m.setPod(was, now)
	case *api.Namespace, *api.ServiceAccount:
		gives := api.Resource{Kind: r.Kind, Metadata: api.Metadata{Name: name, Namespace: r.Metadata.Namespace}, Spec: r.Spec}
		if now != nil {
			gives = *now
		}
		m.context.Add(gives)
		if _, is := spec.(*api.Namespace); is {
			return m.again(name, func(*policy.Endpoint) bool { return true })
		}
		return m.again(r.Metadata.Namespace, func(e *policy.Endpoint) bool { return e.Labels["projectcalico.org/serviceaccount"] == name })
	case *api.Profile:
		if now == nil {
			m.context.Add(api.Resource{Kind: r.Kind, Metadata: r.Metadata, Spec: &api.Profile{}})
			m.compiler.DeleteProfile(name)
			delete(m.profiles, name)
		} else {
			p, err := policy.FromProfile(*now)
			if err == nil {
				err = m.compiler.PutProfile(name, p)
			}
			if err != nil {
				return err
			}
			m.context.Add(*now)
			m.profiles[name] = true
		}
		var errs []error
		for id, e := range m.endpoints {
			if slices.Contains(e.Profiles, name) {
				errs = append(errs, m.place(id))
			}
		}
		return errors.Join(errs...)
	case *api.NetworkSet:
		if now == nil {
			m.compiler.DeleteSet(r.String())
		} else if err := m.putSet(*now); err != nil {
			return err
		}
		m.note(r.Metadata.Namespace, key, now != nil)
	case *api.Tier:
		delete(m.tiers, name)
		if now != nil {
			m.tiers[name] = *spec
		}
		m.order = true
	default:
		var p policy.Placed
		if now != nil {
			var err error
			if p, err = policy.FromPolicy(*now); err != nil {
				return err
			}
		}
		delete(m.placed, key)
		if p.Policy != nil {
			m.placed[key] = p
		}
		m.order = true
	}
	return nil
}

func (m *model) putSet(r api.Resource) error {
	s, err := policy.FromSet(r, m.context)
	if err != nil {
		return err
	}
	return m.compiler.PutSet(s)
}

// note keeps which endpoints and sets a namespace has: ids of the former, keys of the latter.
func (m *model) note(namespace, name string, there bool) {
	if there {
		if m.within[namespace] == nil {
			m.within[namespace] = make(map[string]struct{})
		}
		m.within[namespace][name] = struct{}{}
		return
	}
	if delete(m.within[namespace], name); len(m.within[namespace]) == 0 {
		delete(m.within, namespace)
	}
}

// again converts the endpoints of a namespace that concerned tells, and the namespace's sets.
func (m *model) again(namespace string, concerned func(*policy.Endpoint) bool) error {
	var errs []error
	for _, name := range slices.Collect(maps.Keys(m.within[namespace])) {
		if e := m.endpoints[name]; e != nil && concerned(e.Endpoint) {
			errs = append(errs, m.place(name))
		}
		if r := m.inForce[name].resource; r != nil {
			errs = append(errs, m.putSet(*r))
		}
	}
	return errors.Join(errs...)
}

// place converts an endpoint.
func (m *model) place(id string) error {
	r, is := m.resource(id)
	if !is {
		return m.hold(id, nil)
	}
	e, err := policy.FromEndpoint(r, m.context)
	if err != nil {
		return err
	}
	return m.hold(id, &endpoint{e, r.Metadata.Created})
}

// resource is what an endpoint is: a pod of this node as node.db has it, with what the store says of it; one of another as the store
// has it. false: there is none, or nothing can be said of it yet.
func (m *model) resource(id string) (api.Resource, bool) {
	if pod := m.local[id]; pod != nil {
		if m.awaits(*pod) {
			return api.Resource{}, false
		}
		said := m.podOf(id, *pod)
		if r := m.published[id]; said == nil && nodeOf(r) == m.node {
			said = r
		}
		return Endpoint(m.node, *pod, said), true
	}
	if r := m.published[id]; r != nil && nodeOf(r) != m.node { // else its pod is gone
		return *r, true
	}
	if full, is := cutPodID(id); is {
		if r := m.pods[full]; r != nil && nodeOf(r) != m.node {
			return PodEndpoint(*r)
		}
	}
	return api.Resource{}, false
}

// hold makes an endpoint another one, and gives each address to one of those who say that they have it.
func (m *model) hold(id string, now *endpoint) error {
	affected := []string{id}
	touch := func(e *endpoint, has bool) {
		for _, a := range e.Addresses {
			all := slices.DeleteFunc(m.holders[a], func(other string) bool { return other == id })
			affected = append(affected, all...)
			if has {
				all = append(all, id)
			}
			m.holders[a] = all
			if m.contested[a].IsZero() {
				m.contested[a] = time.Now()
			}
			if len(all) < 2 {
				delete(m.contested, a)
			}
			if len(all) == 0 {
				delete(m.holders, a)
			}
		}
	}
	if was := m.endpoints[id]; was != nil {
		touch(was, false)
	}
	m.endpoints[id] = now
	if now == nil {
		delete(m.endpoints, id)
	} else {
		touch(now, true)
	}
	namespace, _, _ := strings.Cut(id, "/")
	m.note(namespace, id, now != nil)
	slices.Sort(affected)
	var errs []error
	for _, id := range slices.Compact(affected) {
		e := m.endpoints[id]
		if e == nil {
			m.compiler.DeleteEndpoint(id)
			continue
		}
		held := e.Endpoint
		if slices.ContainsFunc(e.Addresses, func(a netip.Addr) bool { return m.holder(a) != id }) {
			part := *e.Endpoint
			part.Addresses = slices.DeleteFunc(slices.Clone(e.Addresses), func(a netip.Addr) bool { return m.holder(a) != id })
			held = &part
		}
		errs = append(errs, m.compiler.PutEndpoint(held))
	}
	return errors.Join(errs...)
}

// holder is who has an address: a pod of this node; else one of whom a kubelet says so, which not everybody who makes pods can; else
// the youngest, since the older one may be gone by now.
func (m *model) holder(a netip.Addr) string {
	all := m.holders[a]
	if len(all) == 1 {
		return all[0]
	}
	return slices.MaxFunc(all, func(x, y string) int {
		return cmp.Or(first(m.local[x] != nil, m.local[y] != nil), first(!announced(x, m.pods), !announced(y, m.pods)),
			cmp.Compare(m.endpoints[x].created, m.endpoints[y].created), strings.Compare(x, y))
	})
}

// first compares two of which one has what the other has not.
func first(x, y bool) int {
	switch {
	case x && !y:
		return 1
	case y && !x:
		return -1
	}
	return 0
}

// announced tells whether an endpoint is a Pod of another node whose addresses an annotation says, and no kubelet yet.
func announced(id string, pods map[string]*api.Resource) bool {
	full, is := cutPodID(id)
	pod, _ := podSpec(pods[full])
	return is && pod != nil && pod.Announced
}

// contestedFor is how long Kubernetes may say that a Pod has an address after it has become another one's: until its kubelet has
// told that it is gone.
const contestedFor = time.Minute

// conflicts names addresses that several endpoints have.
func (m *model) conflicts() []error {
	var errs []error
	for _, a := range slices.SortedFunc(maps.Keys(m.contested), netip.Addr.Compare) {
		for _, id := range m.holders[a] {
			_, pod := cutPodID(id)
			soon := pod && time.Since(m.contested[a]) < contestedFor
			if winner := m.holder(a); id != winner && !soon {
				errs = append(errs, fmt.Errorf("%s: %s is %s's; delete the one whose pod is gone", nameOf(id), a, nameOf(winner)))
			}
		}
	}
	return errs
}

// nameOf is what an endpoint is called, for people.
func nameOf(id string) string {
	if full, is := cutPodID(id); is {
		return "Pod " + full
	}
	return "WorkloadEndpoint " + id
}

// update has the compiler bring its tables up to date. On an error they are what they were.
func (m *model) update() (*policy.Delta, error) {
	if m.order {
		tiers, err := policy.Arrange(m.tiers, slices.Collect(maps.Values(m.placed)))
		if err != nil {
			return nil, err
		}
		if err := m.compiler.SetTiers(tiers); err != nil {
			return nil, err
		}
		m.order = false
	}
	return m.compiler.Update()
}

// Model is the model of a node: what the store says, with the node's own pods as node.db has them. An address of two is given to
// one as on the node. The error is policy.FromResources'.
func Model(nodeName string, resources []api.Resource, local []node.Endpoint) (*policy.Model, error) {
	published, pods := make(map[string]*api.Resource), make(map[string]*api.Resource)
	var all, remote []api.Resource
	for _, r := range resources {
		switch r.Spec.(type) {
		case *api.Pod:
			pods[r.Metadata.FullName()] = &r
			if e, is := PodEndpoint(r); is && nodeOf(&r) != nodeName {
				remote = append(remote, e)
			}
		case *api.WorkloadEndpoint:
			if nodeOf(&r) == nodeName {
				published[r.Metadata.FullName()] = &r
			} else {
				remote = append(remote, r)
			}
		default:
			all = append(all, r)
		}
	}
	taken := make(map[netip.Addr]bool)
	for _, e := range local {
		said := published[EndpointID(nodeName, e)]
		if r := pods[podName(e)]; IsPod(r, e) {
			said = r
		}
		for _, a := range e.Addrs {
			taken[a] = true
		}
		all = append(all, Endpoint(nodeName, e, said))
	}
	slices.SortFunc(remote, func(a, b api.Resource) int { // as holder has it, who gets an address first
		x, y := a.Metadata.FullName(), b.Metadata.FullName()
		return cmp.Or(first(!announced(y, pods), !announced(x, pods)), cmp.Compare(b.Metadata.Created, a.Metadata.Created), strings.Compare(y, x))
	})
	for _, r := range remote {
		spec := *r.Spec.(*api.WorkloadEndpoint)
		spec.IPNetworks = slices.DeleteFunc(slices.Clone(spec.IPNetworks), func(n api.Net) bool { return taken[n.Addr()] })
		for _, n := range spec.IPNetworks {
			taken[n.Addr()] = true
		}
		r.Spec = &spec
		all = append(all, r)
	}
	return policy.FromResources(all)
}

// Selects tells whether the policy of policy.db has something to say about a pod of this node. It changes nothing and needs no
// policy.lock. An error, but for ErrNoDatabase and ErrCorrupt, says that it may have.
func Selects(ctx context.Context, dir string, e node.Endpoint) (bool, error) {
	s, err := read(ctx, dir)
	if err != nil {
		return false, err
	}
	m, unread := Model(s.node, s.resources, []node.Endpoint{e})
	id := EndpointID(s.node, e)
	tables, err := policy.Compile(m, policy.Options{Local: func(other string) bool { return other == id }})
	if err != nil || unread != nil {
		return true, errors.Join(err, unread)
	}
	return tables.Pods[id] != (policy.PodPolicies{}), nil
}
