package ctl

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/policy"
)

// countedRule is a rule in force on this node with what it decided.
type countedRule struct {
	ruleName
	Packets uint64 `json:"packets"` // wire segments, in both directions of what it allowed
	Bytes   uint64 `json:"bytes"`   // of frames
}

var ruleOrders = []string{"order", "packets", "bytes"}

type rulesOptions struct {
	*globals
	order string
	hit   bool
	limit int
}

func newRulesCommand(g *globals) *cobra.Command {
	o := &rulesOptions{globals: g}
	cmd := &cobra.Command{
		Use:     "rules [POD|POLICY]",
		Aliases: []string{"rule"},
		Short:   "List the rules in force with what they decided",
		Long: `rules lists the rules of the policies that this node's pods have, with their ids in the kernel maps, and how many packets each
has allowed or denied: of a flow that it allowed all packets, in both directions. The end of a tier or of the profiles, which denies
what no rule matches, counts as a rule. What is denied is counted exactly, what is allowed as well as flows count.

With POD only the rules of what applies to it; with POLICY only those of one policy: its kind and name, namespace/name, or name.

A rule that is changed is another one, and counts from nothing. Ids whose rule is not in force any more are at the end, while
there are flows that it let in.`,
		Example: `  caracalctl rules
  caracalctl rules default/db
  caracalctl rules 'NetworkPolicy default/db'
  caracalctl rules --sort packets --limit 10
  caracalctl rules -o json | jq '.[] | select(.packets == 0)'`,
		Args: atMostOneArg,
		RunE: func(cmd *cobra.Command, args []string) error {
			if !slices.Contains(ruleOrders, o.order) {
				return usagef("--sort %q: must be %s", o.order, oneOf(ruleOrders))
			}
			if o.limit < 0 {
				return usagef("--limit %d: must be 0 or more", o.limit)
			}
			return o.run(cmd, args)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.order, "sort", "order", "`ORDER`: order (in which they are asked), packets or bytes; the largest first")
	f.BoolVar(&o.hit, "hit", false, "only rules that decided something")
	f.IntVar(&o.limit, "limit", 0, "at most `N` rules; 0: all")
	complete(cmd, "sort", ruleOrders...)
	return cmd
}

func (o *rulesOptions) run(cmd *cobra.Command, args []string) error {
	e, err := o.enforced(cmd)
	if err != nil {
		return err
	}
	wanted := func(ruleName) bool { return true }
	if len(args) > 0 {
		if wanted, err = e.wantedRules(args[0]); err != nil {
			return err
		}
	}
	counts, err := o.ruleCounts(cmd)
	if err != nil {
		return err
	}
	shown := []countedRule{}
	add := func(r ruleName) {
		c := countedRule{r, counts[r.ID].Packets, counts[r.ID].Bytes}
		if wanted(r) && (!o.hit || c.Packets > 0) {
			shown = append(shown, c)
		}
	}
	for id := range e.rules {
		add(e.rule(id))
	}
	for id := range counts {
		if _, known := e.rules[id]; !known {
			add(e.rule(id))
		}
	}
	o.sort(shown, e.model)
	total := len(shown)
	if o.limit > 0 && total > o.limit {
		shown = shown[:o.limit]
	}
	t := newTable("ID", "PACKETS", "BYTES", "TIER", "POLICY", "DIRECTION", "PLACE", "RULE")
	for _, r := range shown {
		text := r.Text
		switch {
		case r.Policy == "":
			text = "not in force any more"
		case r.Index == policy.NoRule:
			text = "deny everything else"
		}
		t.add(r.ID, r.Packets, r.Bytes, r.Tier, r.Policy, r.Direction, r.Place, text)
	}
	if err := o.print(cmd, shown, t); err != nil {
		return err
	}
	if total > len(shown) {
		warn(cmd, "%d of %d rules shown", len(shown), total)
	}
	return nil
}

type ruleCount struct{ Packets, Bytes uint64 }

// ruleCounts are what rules decided, by their ids. Where nothing is loaded, nothing did.
func (o *rulesOptions) ruleCounts(cmd *cobra.Command) (map[uint32]ruleCount, error) {
	m, err := o.maps()
	if errors.Is(err, errNotLoaded) {
		warn(cmd, "%v", err)
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer m.Close()
	all, err := m.Rules()
	counts := make(map[uint32]ruleCount, len(all))
	for _, r := range all {
		counts[r.Rule] = ruleCount{r.Packets, r.Bytes}
	}
	return counts, err
}

// sort orders rules by the wanted measure, the largest first, and else as they are asked: by tier, policy, direction and place.
func (o *rulesOptions) sort(rules []countedRule, m *policy.Model) {
	place := make(map[string]int)
	for _, t := range m.Tiers {
		for _, p := range t.Policies {
			place[p.ID] = len(place)
		}
	}
	measure := func(r countedRule) uint64 {
		switch o.order {
		case "packets":
			return r.Packets
		case "bytes":
			return r.Bytes
		}
		return 0
	}
	at := func(r countedRule) int {
		switch n, has := place[r.Policy]; {
		case has:
			return n
		case r.Policy != "": // a profile's
			return math.MaxInt - 1
		}
		return math.MaxInt
	}
	index := func(r countedRule) int {
		if r.Index == policy.NoRule {
			return math.MaxInt
		}
		return r.Index
	}
	slices.SortFunc(rules, func(a, b countedRule) int {
		return cmp.Or(cmp.Compare(measure(b), measure(a)), cmp.Compare(at(a), at(b)), strings.Compare(a.Policy, b.Policy),
			strings.Compare(a.Direction, b.Direction), cmp.Compare(index(a), index(b)), cmp.Compare(a.ID, b.ID))
	})
}

// wantedRules are those of what applies to a pod, or of a policy, whichever the argument names.
func (e *enforced) wantedRules(arg string) (func(ruleName) bool, error) {
	pods := e.parties(arg)
	policies := e.policiesNamed(arg)
	switch {
	case len(pods) > 0 && len(policies) > 0:
		return nil, fmt.Errorf("%q is a pod and a policy: name the policy by its kind too (%q), the pod by its address or container id", arg, policies[0])
	case len(policies) > 0:
		return func(r ruleName) bool { return slices.Contains(policies, r.Policy) }, nil
	}
	if len(pods) == 0 {
		if a, err := netip.ParseAddr(arg); err == nil {
			return nil, fmt.Errorf("%s: no pod of this node has that address", a)
		}
		return nil, fmt.Errorf("%q: neither a pod nor a policy that this node knows; see caracalctl pods, and caracalctl rules for all", arg)
	}
	type part struct{ policy, direction string }
	applies := make(map[part]bool)
	for _, p := range pods {
		if p.Node != "" {
			return nil, fmt.Errorf("%s is on node %s: ask there", p.Name, p.Node)
		}
		for _, a := range p.Addresses {
			endpoint := e.model.At(a)
			if endpoint == nil {
				continue
			}
			for _, d := range []policy.Direction{policy.Ingress, policy.Egress} {
				for _, t := range e.model.Tiers {
					for _, pol := range t.Policies {
						if pol.Rules(d) != nil && pol.Selector.Matches(endpoint.Labels) {
							applies[part{pol.ID, d.String()}] = true
						}
					}
				}
				for _, name := range endpoint.Profiles {
					id := name
					if profile := e.model.Profiles[name]; profile != nil {
						id = profile.ID
					}
					applies[part{id, d.String()}] = true
				}
			}
		}
	}
	return func(r ruleName) bool { return applies[part{r.Policy, r.Direction}] }, nil
}

// policiesNamed are the policies and profiles that an argument names: by kind and name, or by either part of the name's end.
func (e *enforced) policiesNamed(arg string) []string {
	var found []string
	look := func(id string) {
		_, name, _ := strings.Cut(id, " ")
		_, short, namespaced := strings.Cut(name, "/")
		if arg == id || arg == name || namespaced && arg == short {
			found = append(found, id)
		}
	}
	for _, t := range e.model.Tiers {
		for _, p := range t.Policies {
			look(p.ID)
		}
	}
	for _, p := range e.model.Profiles {
		look(p.ID)
	}
	slices.Sort(found)
	return found
}
