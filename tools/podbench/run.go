package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/tools/podbench/datapath"
	"github.com/caracal-net/caracal/tools/podbench/measure"
	"github.com/caracal-net/caracal/tools/podbench/report"
	"github.com/caracal-net/caracal/tools/podbench/stats"
)

type runOptions struct {
	choice
	mode       string
	protocols  []string
	size       int
	rounds     int
	batch      int
	duration   time.Duration
	cpu        int
	raise      float64
	raiseOf    []string
	during     string
	duringRate float64
}

func newRunCommand() *cobra.Command {
	o := &runOptions{}
	c := &cobra.Command{
		Use:   "run",
		Short: "Measure round trips between two pods",
		Long: `run measures round trips between two pods of each datapath.

inline: one thread holds a socket in each pod and plays both sides, so a round trip is the kernel's
path and nothing else. The ratio to the bare veth pair is the figure to quote. Of Caracal it also tells what its programs
themselves take in a round trip, by the kernel's statistics: that hardly depends on what else the machine does.
twoproc: a server and a client process, as users see it: udp, tcp, crr (connect, request, close), bulk.`,
		Example: `  podbench run
  podbench run -d veth,caracal --protocol udp --rounds 400
  podbench run -d veth,caracal,caracal+500
  podbench run -d ptp/2,caracal/2
  podbench run -d veth,caracal@10000,ptp-iptables@10000,ptp-nft@10000 --protocol crr
  podbench run -d caracal,caracal@10000 --raise-epoch 10 --raise-epoch-of caracal@10000 -o json > changing.json
  podbench run --mode twoproc --protocol tcp,crr,bulk
  podbench run --conflist mine=/etc/cni/net.d/10-mine.conflist --cni-path /opt/cni/bin`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return o.run(c) },
	}
	o.flags(c, []string{"veth", "redirect", "bridge", "ptp", "caracal"})
	f := c.Flags()
	f.StringVar(&o.mode, "mode", "inline", "inline or twoproc")
	f.StringSliceVar(&o.protocols, "protocol", nil, "udp, tcp, crr; inline also first (a new flow each time), twoproc bulk (default udp,tcp)")
	f.IntVar(&o.size, "size", 64, "payload, bytes")
	f.IntVar(&o.rounds, "rounds", 0, "how often each datapath is visited (default 200 inline, 3 twoproc)")
	f.IntVar(&o.batch, "batch", 500, "round trips in one inline visit")
	f.DurationVar(&o.duration, "duration", 2*time.Second, "of one twoproc visit")
	f.IntVar(&o.cpu, "cpu", -1, "CPU for inline; -1: the last one allowed")
	f.Float64Var(&o.raise, "raise-epoch", 0, "raise the epoch of Caracal's datapaths so many times a second meanwhile")
	f.StringSliceVar(&o.raiseOf, "raise-epoch-of", nil, "only of these (default all of Caracal's)")
	f.StringVar(&o.during, "during", "", "a shell command to run again and again meanwhile")
	f.Float64Var(&o.duringRate, "during-rate", 10, "how often a second")
	return c
}

func (o *runOptions) run(c *cobra.Command) (err error) {
	specs, err := o.specs()
	if err != nil {
		return err
	}
	if o.mode != "inline" && o.mode != "twoproc" {
		return fmt.Errorf("--mode %q: neither inline nor twoproc", o.mode)
	}
	if len(o.raiseOf) > 0 && o.raise == 0 {
		return errors.New("--raise-epoch-of: --raise-epoch says how often")
	}
	if len(o.protocols) == 0 {
		o.protocols = []string{measure.UDP, measure.TCP}
	}
	if o.rounds == 0 {
		o.rounds = map[string]int{"inline": 200, "twoproc": 3}[o.mode]
	}
	ctx := c.Context()
	session, err := datapath.NewSession()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, session.Close(context.WithoutCancel(c.Context()))) }()
	r := &report.Report{Schema: report.Schema, Machine: report.Here()}
	show, clear := progress()
	defer clear()
	paths, nodes, err := build(ctx, session, specs, r, show)
	if err != nil {
		return err
	}
	stop, err := o.disturb(ctx, nodes)
	if err != nil {
		return err
	}
	if o.mode == "inline" {
		err = inline(ctx, paths, measure.InlineOptions{
			Protocols: o.protocols, Size: o.size, Rounds: o.rounds, Batch: o.batch, CPU: o.cpu, Progress: show,
		}, func(string) string { return paths[0].Name }, r)
	} else {
		err = o.twoproc(ctx, paths, r, show)
	}
	if stop != nil {
		d := stop()
		r.During = &d
	}
	clear()
	if err != nil {
		return err
	}
	return o.write(c.OutOrStdout(), r)
}

// build makes the pods of all datapaths and waits until each is as it will stay.
func build(ctx context.Context, session *datapath.Session, specs []datapath.Spec, r *report.Report, show func(int, int, string)) ([]measure.Path, []*datapath.Node, error) {
	var paths []measure.Path
	var nodes []*datapath.Node
	for i, s := range specs {
		if show != nil {
			show(i, len(specs), "build "+s.Name)
		}
		n, err := s.Start(session)
		if err != nil {
			return nil, nil, err
		}
		if err := n.Fill(ctx, show); err != nil {
			return nil, nil, err
		}
		a, b, err := n.Pair(ctx)
		if err != nil {
			return nil, nil, err
		}
		attach, err := n.Settle(ctx, a, b)
		if err != nil {
			return nil, nil, err
		}
		if show != nil && s.Rules > 0 {
			show(i, len(specs), "rules of "+s.Name)
		}
		filter, err := n.Enforce(ctx, a, b)
		if err != nil {
			return nil, nil, err
		}
		plugins, err := n.Plugins(ctx)
		if err != nil {
			return nil, nil, err
		}
		programs, err := n.Programs()
		if err != nil {
			return nil, nil, err
		}
		r.Datapaths = append(r.Datapaths, report.Datapath{Name: s.Name, Attach: attach, Plugins: plugins, Rules: s.Rules, Filter: filter})
		paths = append(paths, measure.Path{
			Name: s.Name, A: measure.End{NS: a.NS, Addr: a.Addr}, B: measure.End{NS: b.NS, Addr: b.Addr}, Programs: programs, Forget: n.Forget,
		})
		nodes = append(nodes, n)
	}
	return paths, nodes, nil
}

// disturb starts what goes on beside the measurement; nil when nothing does.
func (o *runOptions) disturb(ctx context.Context, nodes []*datapath.Node) (func() measure.Disturbance, error) {
	cpu := o.cpu
	if cpu < 0 {
		last, err := measure.LastCPU()
		if err != nil {
			return nil, err
		}
		cpu = last
	}
	switch {
	case o.raise > 0:
		raised, err := o.raised(nodes)
		if err != nil {
			return nil, err
		}
		raise := func(context.Context) error {
			for _, n := range raised {
				if err := n.RaiseEpoch(); err != nil {
					return err
				}
			}
			return nil
		}
		if err := raise(ctx); err != nil { // what cannot be done is said before anything is measured
			return nil, err
		}
		return measure.During(ctx, "raise the epoch of "+names(raised), o.raise, cpu, raise)
	case o.during != "":
		return measure.During(ctx, o.during, o.duringRate, cpu, func(ctx context.Context) error {
			return exec.CommandContext(ctx, "/bin/sh", "-c", o.during).Run()
		})
	}
	return nil, nil
}

// raised are the datapaths whose epoch is raised: those of --raise-epoch-of, or all of Caracal's.
func (o *runOptions) raised(nodes []*datapath.Node) ([]*datapath.Node, error) {
	var out []*datapath.Node
	for _, n := range nodes {
		if n.UsesCaracal() && (len(o.raiseOf) == 0 || slices.Contains(o.raiseOf, n.Spec.Name)) {
			out = append(out, n)
		}
	}
	for _, name := range o.raiseOf {
		if !slices.ContainsFunc(out, func(n *datapath.Node) bool { return n.Spec.Name == name }) {
			return nil, fmt.Errorf("--raise-epoch-of %s: no datapath of Caracal that is measured", name)
		}
	}
	if len(out) == 0 {
		return nil, errors.New("--raise-epoch: no Caracal datapath is measured")
	}
	return out, nil
}

func names(nodes []*datapath.Node) string {
	var out []string
	for _, n := range nodes {
		out = append(out, n.Spec.Name)
	}
	return strings.Join(out, ", ")
}

// inline measures round trips into the report, with ratios to the path that base names.
func inline(ctx context.Context, paths []measure.Path, opts measure.InlineOptions, base func(name string) string, r *report.Report) error {
	all, err := measure.Inline(ctx, paths, opts)
	if err != nil {
		return err
	}
	for _, s := range all {
		to := s
		for _, b := range all {
			if b.Path == base(s.Path) && b.Protocol == s.Protocol {
				to = b
			}
		}
		l := report.Latency{
			Datapath: s.Path, Protocol: s.Protocol, NS: stats.Summarize(s.Medians),
			Ratio: stats.Summarize(stats.Ratios(s.Medians, to.Medians)), RatioTo: to.Path, Trips: s.Trips, Waits: s.Waits,
		}
		if len(s.Programs) > 0 {
			l.Programs = &report.Programs{
				NS: stats.Summarize(s.Programs), Ratio: stats.Summarize(stats.Ratios(s.Programs, to.Programs)), Runs: s.Runs,
			}
		}
		r.Latency = append(r.Latency, l)
	}
	return nil
}

func (o *runOptions) twoproc(ctx context.Context, paths []measure.Path, r *report.Report, show func(int, int, string)) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	all, err := measure.TwoProc(ctx, paths, measure.TwoProcOptions{
		Protocols: o.protocols, Size: o.size, Rounds: o.rounds, Duration: o.duration, Progress: show,
		Command: func(ctx context.Context, args ...string) *exec.Cmd { return exec.CommandContext(ctx, self, args...) },
	})
	if err != nil {
		return err
	}
	rates := make(map[string][]float64)
	for _, s := range all {
		for _, v := range s.Visits {
			rates[s.Path+" "+s.Protocol] = append(rates[s.Path+" "+s.Protocol], float64(v.Count)/v.Seconds)
		}
	}
	for _, s := range all {
		own := rates[s.Path+" "+s.Protocol]
		out := report.Visits{
			Datapath: s.Path, Protocol: s.Protocol, PerSec: stats.Summarize(own), NS: make(map[string]float64),
			Ratio: stats.Summarize(stats.Ratios(own, rates[paths[0].Name+" "+s.Protocol])),
		}
		percentiles := make(map[string][]float64)
		for _, v := range s.Visits {
			out.Lost += v.Lost
			for name, ns := range v.Percentiles {
				percentiles[name] = append(percentiles[name], ns)
			}
		}
		for name, ns := range percentiles {
			out.NS[name] = stats.Median(ns)
		}
		r.Visits = append(r.Visits, out)
	}
	return nil
}
