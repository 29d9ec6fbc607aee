package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/tools/podbench/datapath"
	"github.com/caracal-net/caracal/tools/podbench/measure"
	"github.com/caracal-net/caracal/tools/podbench/report"
)

type policyOptions struct {
	choice
	rules     []int
	protocols []string
	size      int
	rounds    int
	batch     int
	cpu       int
}

func newPolicyCommand() *cobra.Command {
	o := &policyOptions{}
	c := &cobra.Command{
		Use:   "policy",
		Short: "Measure round trips against the number of policy rules",
		Long: `policy builds each datapath once for each number of rules and measures all of them in turns: first is what the first two
packets of a new flow take, udp those of an established one. Ratios are to the same datapath with 10 rules (without these:
with the fewest).

Of the N rules only the last matches, and allows. The others are about addresses like the pods', or deny the pods ports
near the server's. caracal has them as a policy of both pods, for both directions. ptp-iptables and ptp-nft have them in the
FORWARD chain of the pods' host, once, behind a rule that passes what is established.`,
		Example: `  podbench policy --svg rules.svg
  podbench policy -o json > rules.json && podbench plot rules.json --svg rules.svg
  podbench policy -d caracal --rules 10,10000 --protocol first --rounds 200
  podbench policy -d caracal,ptp-nft --rules 1,100,10000 --protocol crr`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return o.run(c) },
	}
	o.flags(c, []string{"caracal", "ptp-iptables", "ptp-nft"})
	f := c.Flags()
	f.Lookup("datapath").Usage = "of caracal, ptp-iptables, ptp-nft"
	f.Lookup("conflist").Hidden = true
	f.IntSliceVar(&o.rules, "rules", []int{1, 10, 100, 1000, 10_000, 100_000}, fmt.Sprintf("numbers of rules, 1 to %d", datapath.MaxRules))
	f.StringSliceVar(&o.protocols, "protocol", []string{measure.First, measure.UDP}, "udp, tcp, first, crr")
	f.IntVar(&o.size, "size", 64, "payload, bytes")
	f.IntVar(&o.rounds, "rounds", 60, "how often each datapath is visited with each number")
	f.IntVar(&o.batch, "batch", 100, "round trips in one visit")
	f.IntVar(&o.cpu, "cpu", -1, "CPU to measure on; -1: the last one allowed")
	return c
}

func (o *policyOptions) run(c *cobra.Command) (err error) {
	if len(o.conflists) > 0 {
		return errors.New("--conflist: podbench does not know how to put rules in force there")
	}
	slices.Sort(o.rules)
	o.rules = slices.Compact(o.rules)
	base := 10
	if len(o.rules) > 0 && !slices.Contains(o.rules, base) {
		base = o.rules[0]
	}
	var each []string
	for _, d := range o.datapaths {
		for _, n := range o.rules {
			each = append(each, fmt.Sprintf("%s@%d", d, n))
		}
	}
	o.datapaths = each
	specs, err := o.specs()
	if err != nil {
		return err
	}
	session, err := datapath.NewSession()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, session.Close(context.WithoutCancel(c.Context()))) }()
	r := &report.Report{Schema: report.Schema, Machine: report.Here()}
	show, clear := progress()
	defer clear()
	paths, _, err := build(c.Context(), session, specs, r, show)
	if err != nil {
		return err
	}
	err = inline(c.Context(), paths, measure.InlineOptions{
		Protocols: o.protocols, Size: o.size, Rounds: o.rounds, Batch: o.batch, CPU: o.cpu, Progress: show,
	}, func(name string) string {
		kind, _, _ := strings.Cut(name, "@")
		return fmt.Sprintf("%s@%d", kind, base)
	}, r)
	clear()
	if err != nil {
		return err
	}
	return o.write(c.OutOrStdout(), r)
}
