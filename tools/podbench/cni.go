package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/tools/podbench/datapath"
	"github.com/caracal-net/caracal/tools/podbench/lifecycle"
	"github.com/caracal-net/caracal/tools/podbench/report"
)

func newCNICommand() *cobra.Command {
	o := &choice{}
	l := lifecycle.Options{}
	c := &cobra.Command{
		Use:   "cni",
		Short: "Measure ADD and DEL, and the time from the call of ADD to the first answered packet",
		Long: `cni calls ADD and DEL of each plugin in turns, as a runtime does, through libcni: a few pods one after the other, as
when a deployment starts, or with --burst 1 single ones. The first ADD of a node is reported apart. From the moment ADD returns, as a container could, the new pod asks an existing pod every 0.2 ms; a
second pod asks from the call of ADD on. With --pods of 30 and more the ADDs of these are compared: the tenth, the last.

With --parallel it is a storm: as many ADDs and DELs at a time, datapath by datapath; errors, addresses
given out twice and interfaces left behind are reported.`,
		Example: `  podbench cni
  podbench cni -d bridge,caracal --count 40 --burst 1
  podbench cni -d caracal --pods 490 --count 20
  podbench cni -d caracal --parallel 64 --count 1000`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) (err error) {
			specs, err := o.specs()
			if err != nil {
				return err
			}
			if l.Count < 1 || l.Burst < 1 || l.Pods < 0 || l.Parallel < 1 {
				return fmt.Errorf("--count %d --burst %d --pods %d --parallel %d: at least 1, 1, 0 and 1", l.Count, l.Burst, l.Pods, l.Parallel)
			}
			session, err := datapath.NewSession()
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, session.Close(context.WithoutCancel(c.Context()))) }()
			show, clear := progress()
			l.Progress = show
			r := &report.Report{Schema: report.Schema, Machine: report.Here()}
			for _, s := range specs {
				r.Datapaths = append(r.Datapaths, report.Datapath{Name: s.Name})
			}
			r.Lifecycle, err = lifecycle.Measure(c.Context(), session, specs, l)
			clear()
			if err != nil {
				return err
			}
			return o.write(c.OutOrStdout(), r)
		},
	}
	o.flags(c, []string{"bridge", "ptp", "caracal"})
	f := c.Flags()
	f.IntVar(&l.Count, "count", 100, "pods added and removed on each datapath")
	f.IntVar(&l.Burst, "burst", 10, "of them, one after the other in one turn")
	f.IntVar(&l.Pods, "pods", 0, "pods that exist beside")
	f.DurationVar(&l.Pause, "pause", 200*time.Millisecond, "between turns")
	f.IntVar(&l.Parallel, "parallel", 1, "ADDs and DELs at a time")
	return c
}
