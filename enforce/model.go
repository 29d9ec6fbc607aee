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

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/policy"
)

// Concerns tells whether resources of a kind are about policy.
func Concerns(k api.Kind) bool {
	switch k.Name {
	case "NetworkPolicy", "GlobalNetworkPolicy", "AdminNetworkPolicy", "BaselineAdminNetworkPolicy", "ClusterNetworkPolicy",
		"Tier", "Profile", "NetworkSet", "GlobalNetworkSet", "WorkloadEndpoint", "Namespace", "ServiceAccount":
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

	published map[string]*api.Resource // WorkloadEndpoints by id
	local     map[string]*node.Endpoint
	endpoints map[string]*endpoint
	holders   map[netip.Addr][]string // who say that they have an address, by id
	contested map[netip.Addr]bool
}

// endpoint is one as it was converted.
type endpoint struct {
	*policy.Endpoint
	created string // RFC 3339
}

func newModel(nodeName string, numbers policy.Numbers) *model {
	m := &model{
		node: nodeName, inForce: make(map[string]thing), context: policy.NewContext(), tiers: make(map[string]api.Tier),
		placed: make(map[string]policy.Placed), profiles: make(map[string]bool), published: make(map[string]*api.Resource), local: make(map[string]*node.Endpoint),
		endpoints: make(map[string]*endpoint), holders: make(map[netip.Addr][]string), contested: make(map[netip.Addr]bool),
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
		m.local[id] = now.pod
		if now.pod == nil {
			delete(m.local, id)
		}
		err = m.place(id)
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
		return m.again("", func(e *policy.Endpoint) bool { return slices.Contains(e.Profiles, name) })
	case *api.NetworkSet:
		if now == nil {
			m.compiler.DeleteSet(r.String())
			return nil
		}
		return m.putSet(*now)
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

// again converts the endpoints of a namespace that concerned tells, and the namespace's sets; "": of all namespaces.
func (m *model) again(namespace string, concerned func(*policy.Endpoint) bool) error {
	var errs []error
	for id, e := range m.endpoints {
		if (namespace == "" || strings.HasPrefix(id, namespace+"/")) && concerned(e.Endpoint) {
			errs = append(errs, m.place(id))
		}
	}
	for _, t := range m.inForce {
		if r := t.resource; r != nil && namespace != "" && r.Metadata.Namespace == namespace {
			if _, is := r.Spec.(*api.NetworkSet); is {
				errs = append(errs, m.putSet(*r))
			}
		}
	}
	return errors.Join(errs...)
}

// place converts an endpoint: a pod of this node, as node.db has it; or one of another, as the store has it.
func (m *model) place(id string) error {
	r, pod := m.published[id], m.local[id]
	spec, is := specOf(r)
	own := is && spec.Node == m.node
	switch {
	case pod != nil && own:
		merged := Endpoint(m.node, *pod, r)
		r = &merged
	case pod != nil:
		merged := Endpoint(m.node, *pod, nil)
		r = &merged
	case own: // its pod is gone
		r = nil
	}
	var now *endpoint
	if r != nil {
		e, err := policy.FromEndpoint(*r, m.context)
		if err != nil {
			return err
		}
		now = &endpoint{e, r.Metadata.Created}
	}
	return m.hold(id, now)
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
			m.contested[a] = true
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

// holder is who has an address: a pod of this node; else the youngest, since the older one may be gone by now.
func (m *model) holder(a netip.Addr) string {
	all := m.holders[a]
	if len(all) == 1 {
		return all[0]
	}
	return slices.MaxFunc(all, func(x, y string) int {
		if lx, ly := m.local[x] != nil, m.local[y] != nil; lx != ly {
			if lx {
				return 1
			}
			return -1
		}
		return cmp.Or(cmp.Compare(m.endpoints[x].created, m.endpoints[y].created), strings.Compare(x, y))
	})
}

// conflicts names addresses that several endpoints have.
func (m *model) conflicts() []error {
	var errs []error
	for _, a := range slices.SortedFunc(maps.Keys(m.contested), netip.Addr.Compare) {
		for _, id := range m.holders[a] {
			if winner := m.holder(a); id != winner {
				errs = append(errs, fmt.Errorf("WorkloadEndpoint %s: %s is WorkloadEndpoint %s's; delete the one whose pod is gone", id, a, winner))
			}
		}
	}
	return errs
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

// Model is the model of a node: what the store says, with the node's own pods as node.db has them. The error is
// policy.FromResources'.
func Model(nodeName string, resources []api.Resource, local []node.Endpoint) (*policy.Model, error) {
	published := make(map[string]*api.Resource)
	var all []api.Resource
	for _, r := range resources {
		if spec, is := specOf(&r); is && spec.Node == nodeName {
			published[r.Metadata.FullName()] = &r
			continue
		}
		all = append(all, r)
	}
	taken := make(map[netip.Addr]bool)
	for _, e := range local {
		for _, a := range e.Addrs {
			taken[a] = true
		}
	}
	for i, r := range all { // what this node knows itself counts
		if spec, is := specOf(&r); is {
			other := *spec
			other.IPNetworks = slices.DeleteFunc(slices.Clone(spec.IPNetworks), func(n api.Net) bool { return taken[n.Addr()] })
			all[i].Spec = &other
		}
	}
	for _, e := range local {
		all = append(all, Endpoint(nodeName, e, published[EndpointID(nodeName, e)]))
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
