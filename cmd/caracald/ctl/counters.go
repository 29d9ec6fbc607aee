package ctl

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/maps"
)

// rate is what a counter gained in one interval, per second.
type rate struct {
	Hook             string  `json:"hook"`
	Verdict          string  `json:"verdict"`
	Meaning          string  `json:"meaning"`
	PacketsPerSecond float64 `json:"packetsPerSecond"`
	BytesPerSecond   float64 `json:"bytesPerSecond"`
}

type countersOptions struct {
	*globals
	all, drops bool
	watch      time.Duration
	times      int
}

func newCountersCommand(g *globals) *cobra.Command {
	o := &countersOptions{globals: g}
	cmd := &cobra.Command{
		Use:     "counters",
		Aliases: []string{"counter"},
		Short:   "Show what happened to packets, by hook and verdict",
		Long: `counters shows caracal_counts: at each hook every packet is counted once, with what happened to it. Verdicts that
begin with drop_ are drops. Counters that are zero are left out.

With --watch it prints rates per second at every interval until it is interrupted.`,
		Example: `  caracalctl counters
  caracalctl counters --drops
  caracalctl counters --all -o json
  caracalctl counters --watch 1s`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if cmd.Flags().Changed("watch") && o.watch <= 0 {
				return usagef("--watch %v: must be more than 0, as in 1s", o.watch)
			}
			if o.times < 0 || o.times > 0 && o.watch == 0 {
				return usagef("--times: a number of intervals, together with --watch")
			}
			return o.run(cmd)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&o.all, "all", false, "also counters that are zero")
	f.BoolVar(&o.drops, "drops", false, "only drops")
	f.DurationVar(&o.watch, "watch", 0, "show rates every `INTERVAL`, as in 1s")
	f.IntVar(&o.times, "times", 0, "with --watch: end after `N` intervals; 0: never")
	return cmd
}

func (o *countersOptions) run(cmd *cobra.Command) error {
	m, err := o.maps()
	if err != nil {
		return err
	}
	defer m.Close()
	if o.watch > 0 {
		return o.rates(cmd, m)
	}
	counts, err := o.counts(m)
	if err != nil {
		return err
	}
	shown := []maps.Count{}
	t := newTable("HOOK", "VERDICT", "PACKETS", "BYTES", "MEANING")
	for _, c := range counts {
		if o.all || c.Packets > 0 {
			shown = append(shown, c)
			t.add(c.Hook, c.Verdict, c.Packets, c.Bytes, c.Meaning)
		}
	}
	return o.print(cmd, shown, t)
}

// counts reads the counters that the flags leave, zeros included.
func (o *countersOptions) counts(m *maps.Maps) ([]maps.Count, error) {
	all, err := m.Counts()
	if err != nil || !o.drops {
		return all, err
	}
	drops := all[:0]
	for _, c := range all {
		if c.Dropped() {
			drops = append(drops, c)
		}
	}
	return drops, nil
}

func (o *countersOptions) rates(cmd *cobra.Command, m *maps.Maps) error {
	before, err := o.counts(m)
	if err != nil {
		return err
	}
	at := time.Now()
	tick := time.NewTicker(o.watch)
	defer tick.Stop()
	for n := 1; ; n++ {
		select {
		case <-cmd.Context().Done():
			return nil
		case <-tick.C:
		}
		now, err := o.counts(m)
		if err != nil {
			return err
		}
		seconds := time.Since(at).Seconds()
		at = time.Now()
		if err := o.printRates(cmd, before, now, seconds); err != nil {
			return err
		}
		if n == o.times {
			return nil
		}
		before = now
	}
}

func (o *countersOptions) printRates(cmd *cobra.Command, before, now []maps.Count, seconds float64) error {
	shown := []rate{}
	t := newTable("HOOK", "VERDICT", "PACKETS/S", "BYTES/S", "MEANING")
	for i, c := range now {
		packets, bytes := c.Packets-before[i].Packets, c.Bytes-before[i].Bytes
		if packets == 0 && !o.all {
			continue
		}
		r := rate{c.Hook, c.Verdict, c.Meaning, float64(packets) / seconds, float64(bytes) / seconds}
		shown = append(shown, r)
		t.add(r.Hook, r.Verdict, fmt.Sprintf("%.0f", r.PacketsPerSecond), fmt.Sprintf("%.0f", r.BytesPerSecond), r.Meaning)
	}
	if o.output == formatYAML {
		fmt.Fprintln(cmd.OutOrStdout(), "---")
	}
	return o.print(cmd, shown, t)
}
