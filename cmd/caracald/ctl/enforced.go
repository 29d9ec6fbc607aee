package ctl

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/enforce"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/policy"
	"github.com/caracal-net/caracal/store"
)

// told is what this node was told of policy last, as policy.db has it.
type told struct {
	node      string // this node's name in the store; "": nothing was ever told
	model     *policy.Model
	leftOut   error           // what of resources is not in model, a line each
	local     []node.Endpoint // its pods, as node.db has them
	resources []api.Resource
	numbers   policy.Numbers
}

// told reads what this node was told last, agent or not. Where that is nothing there is the model of its pods alone.
func (g *globals) told(cmd *cobra.Command) (*told, error) {
	t, ctx := &told{}, cmd.Context()
	err := g.view(ctx, func(tx *node.Tx) (err error) {
		t.local, err = tx.AllEndpoints()
		return err
	})
	if err != nil {
		return nil, err
	}
	t.resources, t.numbers, err = enforce.Resources(ctx, g.stateDir)
	if err == nil {
		t.node, err = enforce.NodeName(ctx, g.stateDir)
	}
	switch {
	case errors.Is(err, enforce.ErrCorrupt):
		return nil, fmt.Errorf("%w; caracald moves it away when it is started, and asks the store again", err)
	case err != nil && !errors.Is(err, enforce.ErrNoDatabase):
		return nil, err
	}
	if t.model, t.leftOut = enforce.Model(t.node, t.resources, t.local); t.leftOut != nil {
		warn(cmd, "left out, as the node does: %v", t.leftOut)
	}
	return t, nil
}

// enforced is what this node was told, with what the maps call it.
type enforced struct {
	*told
	pods   []pod                   // of this node
	remote []remotePod             // of all nodes
	rules  map[uint32]enforce.Rule // by their ids in the maps
	hosts  map[netip.Addr]string   // nodes by their addresses, where all is from the store
}

func (g *globals) enforced(cmd *cobra.Command) (*enforced, error) {
	t, err := g.told(cmd)
	if err != nil {
		return nil, err
	}
	e := &enforced{told: t}
	for _, l := range t.local {
		e.pods = append(e.pods, recorded(l))
	}
	e.findRemote()
	e.rules, err = g.ruleNames(cmd, t)
	return e, err
}

// findRemote finds the pods of all nodes in the resources.
func (e *enforced) findRemote() {
	for _, r := range e.resources {
		switch spec := r.Spec.(type) {
		case *api.WorkloadEndpoint:
			e.remote = append(e.remote, remotePod{pod{PodName: spec.Pod, PodNamespace: r.Metadata.Namespace, ContainerID: spec.ContainerID, IfName: spec.Endpoint}, spec.Node, r.Metadata.Name})
			for _, n := range spec.IPNetworks {
				p := &e.remote[len(e.remote)-1]
				p.Addresses = append(p.Addresses, n.Addr())
			}
		case *api.Pod:
			e.remote = append(e.remote, remotePod{pod{PodName: r.Metadata.Name, PodNamespace: r.Metadata.Namespace, Addresses: spec.IPs}, spec.Node, r.Metadata.Name})
		}
	}
}

// ofStore is what the store says, of which no node was told here.
func (g *globals) ofStore(cmd *cobra.Command) (*enforced, error) {
	ctx := cmd.Context()
	e := &enforced{told: &told{}, hosts: make(map[netip.Addr]string)}
	err := g.withStore(ctx, func(s store.Store) (err error) {
		if e.resources, err = policyResources(ctx, s); err != nil {
			return err
		}
		kind, err := api.FindKind("Node")
		if err != nil {
			return err
		}
		nodes, err := list(ctx, s, kind, "", nil)
		for _, r := range nodes {
			if n, is := r.Spec.(*api.Node); is {
				for _, a := range n.Addresses {
					if at, err := netip.ParseAddr(a.Address); err == nil {
						e.hosts[at.Unmap()] = r.Metadata.Name
					}
				}
			}
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	if e.model, e.leftOut = enforce.Model("", e.resources, nil); e.leftOut != nil {
		warn(cmd, "left out, as nodes do: %v", e.leftOut)
	}
	e.findRemote()
	return e, nil
}

// policyResources are all resources in the store that are about policy.
func policyResources(ctx context.Context, s store.Store) ([]api.Resource, error) {
	var all []api.Resource
	for _, kind := range api.Kinds {
		if !enforce.Concerns(kind) {
			continue
		}
		of, err := list(ctx, s, kind, "", nil)
		if err != nil {
			return nil, err
		}
		all = append(all, of...)
	}
	return all, nil
}

// remotePod is a pod as the store has it: a WorkloadEndpoint, or a Pod of Kubernetes.
type remotePod struct {
	pod
	node, name string // name of the resource
}

// ruleNames says what the rule ids in the maps stand for: the agent knows; without one the same policy is compiled again.
func (g *globals) ruleNames(cmd *cobra.Command, t *told) (map[uint32]enforce.Rule, error) {
	var rules map[uint32]enforce.Rule
	err := askAgent(cmd.Context(), g.socket, "/v1/policy/rules", &rules)
	if err == nil && len(rules) > 0 { // else it has not read policy yet, or there is none
		return rules, nil
	}
	own := make(map[string]bool)
	for _, l := range t.local {
		own[enforce.EndpointID(t.node, l)] = true
	}
	tables, err := policy.Compile(t.model, policy.Options{Local: func(id string) bool { return own[id] }, Numbers: t.numbers})
	if err != nil {
		return nil, fmt.Errorf("compile the policy that this node was told: %w", err)
	}
	rules = make(map[uint32]enforce.Rule, len(tables.Rules))
	for id, info := range tables.Rules {
		if id < t.numbers.Rules.Next { // else it is a number that this compiler gave, and nobody has seen
			rules[id] = enforce.RuleOf(info)
		}
	}
	return rules, nil
}

// ruleName is a rule, and how the maps call it.
type ruleName struct {
	ID uint32 `json:"id,omitempty"` // 0: there is none, or it is not known
	enforce.Rule
}

// nameOf names a rule. rule is nil where a list ends.
func (e *enforced) nameOf(ref policy.RuleRef, d policy.Direction, rule *policy.Rule) ruleName {
	n := ruleName{Rule: enforce.RuleOf(policy.RuleInfo{RuleRef: ref, Direction: d, Rule: rule})}
	for id, r := range e.rules {
		if r == n.Rule {
			n.ID = id
		}
	}
	return n
}

// String says where the rule stands.
func (n ruleName) String() string {
	if n.Policy == "" && n.ID != 0 {
		return fmt.Sprintf("rule id %d, which is not in force any more", n.ID)
	}
	return n.Rule.String()
}

// rule names a rule by its id in the maps.
func (e *enforced) rule(id uint32) ruleName {
	r, known := e.rules[id]
	if !known {
		r.Index = policy.NoRule
	}
	return ruleName{id, r}
}

// party is who has addresses: a pod of this node or of another.
type party struct {
	Name      string       `json:"name,omitempty"` // namespace and name; "": nobody that this node knows
	Node      string       `json:"node,omitempty"` // of the other node that it is on
	Addresses []netip.Addr `json:"-"`
}

// parties finds the pods that an argument names, of this node and of others.
func (e *enforced) parties(arg string) []party {
	var found []party
	for _, p := range e.pods {
		if arg != "" && p.matches(arg) {
			found = append(found, party{Name: p.title(), Addresses: p.Addresses})
		}
	}
	for _, p := range e.remote {
		if p.node == e.node && e.node != "" {
			continue
		}
		if arg != "" && (p.matches(arg) || arg == p.name || arg == p.PodNamespace+"/"+p.name) {
			found = append(found, party{Name: p.title(), Node: p.node, Addresses: p.Addresses})
		}
	}
	return found
}

// knows and lists say of whom pods are known, and what lists them.
func (e *enforced) knows() string {
	if e.hosts != nil {
		return "the store knows"
	}
	return "this node knows"
}

func (e *enforced) lists() string {
	if e.hosts != nil {
		return "caracalctl get pods -A or get workloadendpoints -A"
	}
	return "caracalctl pods"
}

// party finds the one pod that an argument names, or the address that it is.
func (e *enforced) party(arg string) (party, error) {
	found := e.parties(arg)
	if a, err := netip.ParseAddr(arg); err == nil {
		if a.Zone() != "" {
			return party{}, usagef("%q: an address of one link; policy is about addresses that are routed", arg)
		}
		p := party{}
		if len(found) > 0 {
			p = found[0]
		}
		p.Addresses = []netip.Addr{a.Unmap()}
		return p, nil
	}
	switch len(found) {
	case 0:
		return party{}, fmt.Errorf("%q: no pod that %s has that name or container id, and it is no address; see %s", arg, e.knows(), e.lists())
	case 1:
		return found[0], nil
	}
	var names []string
	for _, p := range found {
		names = append(names, fmt.Sprintf("%s (%s)", p.Name, join(p.Addresses)))
	}
	slices.Sort(names)
	return party{}, fmt.Errorf("%q may be any of %s; say which, by namespace/name or by address", arg, strings.Join(names, ", "))
}

// holding is the pod in caracal_pods that has an address, nil if none has.
func holding(pods []maps.Pod, a netip.Addr) *maps.Pod {
	for i := range pods {
		if slices.Contains(pods[i].Addresses, a) {
			return &pods[i]
		}
	}
	return nil
}
