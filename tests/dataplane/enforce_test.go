package dataplane

import (
	"testing"

	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/policy"
)

// enforcer keeps the maps of a node as models say, one after the other.
type enforcer struct {
	t        testing.TB
	maps     *maps.Maps
	compiler *policy.Compiler
	ifindex  map[string]uint32 // of the node's own endpoints
}

// enforce makes a node, of which nobody else writes the policy, follow models in which its pods are endpoints by their names.
func (n *node) enforce(pods ...*pod) *enforcer {
	n.t.Helper()
	e := newEnforcer(n.t, n.maps, func(id string) bool {
		for _, p := range pods {
			if p.name == id {
				return true
			}
		}
		return false
	})
	for _, p := range pods {
		e.ifindex[p.name] = uint32(p.commit.IfIndex)
	}
	return e
}

func newEnforcer(t testing.TB, m *maps.Maps, local func(id string) bool) *enforcer {
	t.Helper()
	rows, err := m.Policy()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rows { // the compiler numbers what it makes by itself
		if err := m.RemovePolicy([]maps.PolicyKey{r.PolicyKey}); err != nil {
			t.Fatal(err)
		}
	}
	return &enforcer{t: t, maps: m, compiler: policy.NewCompiler(policy.Options{Local: local}), ifindex: make(map[string]uint32)}
}

// compile is what a model changes.
func (e *enforcer) compile(m *policy.Model) (*policy.Delta, error) {
	if err := e.compiler.SetModel(m); err != nil {
		return nil, err
	}
	return e.compiler.Update()
}

// put puts a change in force. On an error what was before stays.
func (e *enforcer) put(d *policy.Delta) error {
	err := commit.SetPolicy(e.maps, d, func(id string) (uint32, bool) {
		i, ok := e.ifindex[id]
		return i, ok
	})
	if err == nil {
		e.compiler.Accept()
	}
	return err
}

// set puts a model in force.
func (e *enforcer) set(m *policy.Model) {
	e.t.Helper()
	d, err := e.compile(m)
	if err == nil {
		err = e.put(d)
	}
	if err != nil {
		e.t.Fatal(err)
	}
}

// endpointOf is a pod as a model has it. Labels are pairs of key and value.
func endpointOf(p *pod, labels ...string) *policy.Endpoint {
	e := &policy.Endpoint{ID: p.name, Addresses: p.commit.Addrs, Labels: map[string]string{"name": p.name}}
	for i := 0; i < len(labels); i += 2 {
		e.Labels[labels[i]] = labels[i+1]
	}
	return e
}
