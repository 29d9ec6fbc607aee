package ctl

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/enforce"
	"github.com/caracal-net/caracal/policy"
)

func newPolicyCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "policy",
		Short: "What policy makes of this node's pods",
		Args:  noArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newPolicyShowCommand(g))
	return cmd
}

func newPolicyShowCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "show [POD]",
		Short: "Show the rules that apply to a pod",
		Long: `show lists the rules that apply to a pod of this node, for what is opened to it (ingress) and for what it opens (egress), in
the order in which they are asked: the first one that matches decides. Behind each tier, and at the very end, stands what becomes of
a connection that none of them matches. A rule that passes leads to the next tier.

POD is a name, namespace/name, container id or address. Without it, all pods of this node are listed, with the policies that apply.

It goes by what this node was told last (policy.db), with an agent and without. What can't be put in force, and so is not
among it, the agent says: caracalctl node status.`,
		Example: `  caracalctl policy show
  caracalctl policy show default/web
  caracalctl policy show 10.244.0.7 -o yaml`,
		Args: atMostOneArg,
		RunE: func(cmd *cobra.Command, args []string) error { return g.policyShow(cmd, args) },
	}
}

// podRules are the rules that apply to a pod.
type podRules struct {
	Pod       string         `json:"pod"`
	Endpoint  string         `json:"endpoint"` // its WorkloadEndpoint's namespace and name
	Addresses []netip.Addr   `json:"addresses"`
	Ingress   []enforce.Rule `json:"ingress"` // in the order in which they are asked
	Egress    []enforce.Rule `json:"egress"`
}

func (g *globals) policyShow(cmd *cobra.Command, args []string) error {
	last, err := g.told(cmd)
	if err != nil {
		return err
	}
	if last.node == "" {
		warn(cmd, "no policy was ever known on this node")
	}
	all := []podRules{}
	for _, l := range last.local {
		p, id := recorded(l), enforce.EndpointID(last.node, l)
		e := last.model.Endpoints[id]
		if e == nil || len(args) > 0 && !p.matches(args[0]) {
			continue
		}
		all = append(all, podRules{p.title(), id, p.Addresses, asked(last.model, e, policy.Ingress), asked(last.model, e, policy.Egress)})
	}
	if len(args) > 0 && len(all) == 0 {
		return fmt.Errorf("no pod of this node is %q by name, container id or address; see caracalctl pods", args[0])
	}
	if len(args) == 0 {
		t := newTable("POD", "ADDRESSES", "INGRESS", "EGRESS")
		for _, p := range all {
			t.add(p.Pod, join(p.Addresses), policiesOf(p.Ingress), policiesOf(p.Egress))
		}
		return g.print(cmd, all, t)
	}
	t := newTable("POD", "DIRECTION", "TIER", "POLICY", "PLACE", "RULE")
	for _, p := range all {
		for _, r := range slices.Concat(p.Ingress, p.Egress) {
			if r.Place == "" && r.Text != noRules {
				r.Policy = "" // it is the end of all
			}
			t.add(p.Pod, r.Direction, r.Tier, r.Policy, r.Place, r.Text)
		}
	}
	return g.print(cmd, all, t)
}

// policiesOf names the policies that rules are of.
func policiesOf(rules []enforce.Rule) string {
	var names []string
	for _, r := range rules {
		if r.Policy != "" && !slices.Contains(names, r.Policy) {
			names = append(names, r.Policy)
		}
	}
	if names == nil {
		return "all is allowed"
	}
	return strings.Join(names, ", ")
}

// noRules stands for a policy that has none, and so allows nothing.
const noRules = "no rules"

// asked lists what is asked about a connection of an endpoint, in order, as far as it can come to it.
func asked(m *policy.Model, e *policy.Endpoint, d policy.Direction) []enforce.Rule {
	all := []enforce.Rule{}
	list := func(tier, id string, rules []policy.Rule) (passes bool) {
		for i := range rules {
			all = append(all, enforce.RuleOf(policy.RuleInfo{RuleRef: policy.RuleRef{Tier: tier, Policy: id, Index: i}, Direction: d, Rule: &rules[i]}))
			passes = passes || rules[i].Action == policy.Pass
		}
		return passes
	}
	end := func(tier, id, text string) {
		r := enforce.RuleOf(policy.RuleInfo{RuleRef: policy.RuleRef{Tier: tier, Policy: id, Index: policy.NoRule}, Direction: d})
		r.Text = text
		all = append(all, r)
	}
	for _, t := range m.Tiers {
		last, passes := "", t.Default == policy.Pass
		for _, p := range t.Policies {
			if rules := p.Rules(d); rules != nil && p.Selector.Matches(e.Labels) {
				passes = list(t.Name, p.ID, rules.Rules) || passes
				if last = p.ID; len(rules.Rules) == 0 {
					end(t.Name, p.ID, noRules)
				}
			}
		}
		if last == "" {
			continue
		}
		if t.Default == policy.Pass {
			end(t.Name, last, "pass everything else")
		} else {
			end(t.Name, last, "deny everything else")
		}
		if !passes {
			return all
		}
	}
	if len(e.Profiles) == 0 {
		end("", "", "allow everything else: no profile")
		return all
	}
	for _, name := range e.Profiles {
		if p := m.Profiles[name]; p != nil {
			list("", p.ID, p.Rules(d))
		}
	}
	end("", "", "deny everything else")
	return all
}
