package ctl

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/enforce"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/store"
	"github.com/caracal-net/caracal/whatif"
)

// whatIfReport is what would become of a node's flows.
type whatIfReport struct {
	Flows    int            `json:"flows"`
	Cut      []cutFlow      `json:"cut"`
	Denied   int            `json:"denied"` // as it is
	Unjudged []unjudgedFlow `json:"unjudged"`
}

type cutFlow struct {
	flow
	By ruleName `json:"by"`
}

type unjudgedFlow struct {
	flow
	Why string `json:"why"`
}

type whatIfOptions struct {
	*globals
	file   string
	remove bool
	limit  int
}

func newWhatIfCommand(g *globals) *cobra.Command {
	o := &whatIfOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "what-if -f FILE",
		Short: "Say which live flows of this node a change of policy would cut",
		Long: `what-if reads resources as apply does, "-" is stdin, and says which flows of this node's pods would be cut if they were
applied, or with --delete if they were deleted, beside what is in force on the node; and by which rule.

The node's own programs say so, loaded a second time, with a copy of its maps: they are shown a packet of each direction of
every flow, where its packets come by. Nothing on the node changes, and nothing is written to the store. Flows that are over, or
that policy cuts already, are not counted as cut. What other nodes would cut is for what-if on those to say.

BY is the rule that would deny the flow; IN whose: the opener's egress or the responder's ingress.`,
		Example: `  caracalctl what-if -f deny-all.yaml
  caracalctl what-if -f allow-http.yaml --delete
  caracalctl what-if -f - -o json < policy.yaml | jq '.cut | length'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.limit < 0 {
				return usagef("--limit %d: must be 0 or more", o.limit)
			}
			return o.run(cmd)
		},
	}
	fileFlag(cmd, &o.file)
	cmd.Flags().BoolVar(&o.remove, "delete", false, "if the resources of FILE were deleted")
	cmd.Flags().IntVar(&o.limit, "limit", 0, "at most `N` flows in each table; 0: all")
	return cmd
}

func (o *whatIfOptions) run(cmd *cobra.Command) error {
	change, err := readManifest(cmd, o.file)
	if err != nil {
		return err
	}
	m, err := o.maps()
	if err != nil {
		return err
	}
	defer m.Close()
	state, err := m.State()
	if err != nil {
		return err
	}
	if state.Build != build() {
		warn(cmd, "this node runs other programs than this caracalctl has, which may judge otherwise; caracalctl upgrade puts these in their place")
	}
	cfg, err := o.models(cmd, state.Node, change)
	if err != nil {
		return err
	}
	cfg.Maps = m
	p := &progress{out: cmd.ErrOrStderr(), what: "what is in force"}
	cfg.Progress = p.at
	defer time.AfterFunc(slow, p.begin).Stop()
	r, err := whatif.Run(cmd.Context(), cfg)
	p.end()
	if errors.Is(err, context.Canceled) {
		return fmt.Errorf("interrupted: nothing was changed")
	}
	if err != nil {
		return err
	}
	_, names := o.podNames(cmd.Context())
	return o.show(cmd, r, names)
}

// models makes the policy that is in force on this node and the one that would be. name is the node's, if policy.db does not say it.
func (o *whatIfOptions) models(cmd *cobra.Command, name string, change []api.Resource) (cfg whatif.Config, err error) {
	t, err := o.told(cmd)
	if err != nil {
		return cfg, err
	}
	if t.node == "" {
		warn(cmd, "no policy is in force on this node yet; what the store has is taken for the other part of what would be")
		t.node = name
		if t.resources, err = o.fromStore(cmd.Context()); err != nil {
			return cfg, err
		}
		if t.model, t.leftOut = enforce.Model(t.node, t.resources, t.local); t.leftOut != nil {
			warn(cmd, "left out, as the node would: %v", t.leftOut)
		}
	}
	cfg.InForce, cfg.Numbers = t.model, t.numbers
	wanted, err := merge(t.resources, change, o.remove)
	if err != nil {
		return cfg, err
	}
	var leftOut error
	cfg.Candidate, leftOut = enforce.Model(t.node, wanted, t.local)
	return cfg, onlyIn(leftOut, t.leftOut)
}

// fromStore is what the store has about policy.
func (o *whatIfOptions) fromStore(ctx context.Context) (resources []api.Resource, err error) {
	err = o.withStore(ctx, func(s store.Store) error {
		for _, kind := range api.Kinds {
			if !enforce.Concerns(kind) {
				continue
			}
			found, err := list(ctx, s, kind, "", nil)
			if err != nil {
				return err
			}
			resources = append(resources, found...)
		}
		return nil
	})
	return resources, err
}

// merge is what would be in force: all with the change in it, or without it.
func merge(all, change []api.Resource, remove bool) ([]api.Resource, error) {
	changed := make(map[string]*api.Resource)
	for _, r := range change {
		if !enforce.Concerns(r.Kind) {
			return nil, fmt.Errorf("%s: it is not about policy; leave it out", r)
		}
		changed[r.Key()] = &r
	}
	var merged []api.Resource
	there := make(map[string]bool)
	for _, r := range all {
		if there[r.Key()] = true; changed[r.Key()] == nil {
			merged = append(merged, r)
		}
	}
	for _, r := range changed {
		if remove && !there[r.Key()] {
			return nil, fmt.Errorf("%s: there is none in force on this node that could be deleted", r)
		}
		if !remove {
			merged = append(merged, *r)
		}
	}
	return merged, nil
}

// onlyIn is what an error names, a line each, that the other does not.
func onlyIn(err, other error) error {
	if err == nil || other == nil {
		return err
	}
	known := make(map[string]bool)
	for _, line := range strings.Split(other.Error(), "\n") {
		known[line] = true
	}
	var errs []error
	for _, line := range strings.Split(err.Error(), "\n") {
		if !known[line] {
			errs = append(errs, errors.New(line))
		}
	}
	return errors.Join(errs...)
}

func (o *whatIfOptions) show(cmd *cobra.Command, r *whatif.Report, names map[netip.Addr]string) error {
	named := func(f maps.Flow) flow {
		return flow{Flow: f, OpenerPod: names[f.Opener.Addr()], ResponderPod: names[f.Responder.Addr()]}
	}
	out := whatIfReport{Flows: r.Flows, Denied: r.Denied, Cut: []cutFlow{}, Unjudged: []unjudgedFlow{}}
	t := newTable("PROTOCOL", "STATE", "OPENER", "RESPONDER", "SENT", "RECEIVED", "IDLE", "OPENER-POD", "RESPONDER-POD", "IN", "BY")
	for i, c := range r.Cut {
		f, by := named(c.Flow), ruleName{c.RuleID, enforce.RuleOf(c.Rule)}
		out.Cut = append(out.Cut, cutFlow{f, by})
		if o.limit == 0 || i < o.limit {
			rule := by.String()
			if by.Text != "" {
				rule += ": " + by.Text
			}
			t.add(f.Protocol, f.State, f.Opener, f.Responder, f.Sent.Packets, f.Received.Packets, brief(f.Idle), f.OpenerPod, f.ResponderPod, by.Direction, rule)
		}
	}
	unjudged := newTable("PROTOCOL", "STATE", "OPENER", "RESPONDER", "WHY")
	for i, u := range r.Unjudged {
		f := named(u.Flow)
		out.Unjudged = append(out.Unjudged, unjudgedFlow{f, u.Why})
		if o.limit == 0 || i < o.limit {
			unjudged.add(f.Protocol, f.State, f.Opener, f.Responder, u.Why)
		}
	}
	if o.output != formatTable {
		return o.print(cmd, out, nil)
	}
	w := cmd.OutOrStdout()
	fmt.Fprintf(w, "would cut %d of %d flows\n", len(r.Cut), r.Flows)
	if r.Denied > 0 {
		fmt.Fprintf(w, "%d more are cut already\n", r.Denied)
	}
	if len(t.rows) > 0 {
		fmt.Fprintln(w)
		if err := t.write(w); err != nil {
			return err
		}
	}
	if len(unjudged.rows) > 0 {
		fmt.Fprintf(w, "\nof %d it can't be told\n\n", len(r.Unjudged))
		if err := unjudged.write(w); err != nil {
			return err
		}
	}
	if hidden := len(r.Cut) + len(r.Unjudged) - len(t.rows) - len(unjudged.rows); hidden > 0 {
		warn(cmd, "%d flows are not shown", hidden)
	}
	return nil
}
