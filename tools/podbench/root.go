package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/tools/podbench/datapath"
	"github.com/caracal-net/caracal/tools/podbench/measure"
	"github.com/caracal-net/caracal/tools/podbench/report"
)

func newRootCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "podbench",
		Short: "Compare pod-to-pod datapaths",
		Long: `podbench builds several datapaths side by side, each in a network namespace of its own,
and measures them in turns, so that ratios hold on a noisy machine too. Nothing stays behind.`,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	c.AddCommand(newRunCommand(), newPolicyCommand(), newCNICommand(), newPlotCommand(), newCleanCommand(), newServeCommand(), newAskCommand())
	return c
}

// choice is the flags that select datapaths and output; every measuring command has them.
type choice struct {
	datapaths, conflists []string
	cniPath, caracal     string
	output, svg          string
}

func (o *choice) flags(c *cobra.Command, datapaths []string) {
	self, _ := os.Executable()
	f := c.Flags()
	f.StringSliceVarP(&o.datapaths, "datapath", "d", datapaths, "built-in datapaths; ratios are to the first; NAME+500 has 500 more pods, ptp/2 and caracal/2 two hosts, caracal@1000, ptp-iptables@1000 and ptp-nft@1000 have 1000 policy rules of which the last allows the traffic")
	f.StringArrayVar(&o.conflists, "conflist", nil, "also the CNI configuration NAME=FILE (repeatable)")
	f.StringVar(&o.cniPath, "cni-path", datapath.DefaultCNIPath, "directories with CNI plugins")
	f.StringVar(&o.caracal, "caracal", filepath.Join(filepath.Dir(self), "caracal"), "the caracal plugin")
	f.StringVarP(&o.output, "output", "o", "table", "table or json")
	f.StringVar(&o.svg, "svg", "", "also plot into this file")
}

func (o *choice) specs() ([]datapath.Spec, error) {
	if o.output != "table" && o.output != "json" {
		return nil, fmt.Errorf("--output %q: neither table nor json", o.output)
	}
	return datapath.Select(o.datapaths, o.conflists, datapath.Options{CNIPath: o.cniPath, Caracal: o.caracal})
}

func (o *choice) write(w io.Writer, r *report.Report) error {
	if o.svg != "" {
		if err := report.Plot(o.svg, r); err != nil {
			return err
		}
	}
	if o.output == "json" {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(r)
	}
	return r.Table(w)
}

// progress writes where a measurement is, to a terminal only, and returns a function that clears the line.
func progress() (show func(done, total int, what string), clear func()) {
	if _, err := unix.IoctlGetTermios(2, unix.TCGETS); err != nil {
		return nil, func() {}
	}
	last := time.Time{}
	show = func(done, total int, what string) {
		if time.Since(last) < 200*time.Millisecond {
			return
		}
		last = time.Now()
		fmt.Fprintf(os.Stderr, "\r\033[K%3d %% %s", 100*done/max(total, 1), what)
	}
	return show, func() { fmt.Fprint(os.Stderr, "\r\033[K") }
}

func newPlotCommand() *cobra.Command {
	var out string
	c := &cobra.Command{
		Use:     "plot FILE.json...",
		Short:   "Plot what run or policy -o json wrote",
		Example: "  podbench run -o json > a.json\n  podbench plot a.json --svg a.svg",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			var all []*report.Report
			for _, file := range args {
				b, err := os.ReadFile(file)
				if err != nil {
					return err
				}
				r := &report.Report{}
				if err := json.Unmarshal(b, r); err != nil {
					return fmt.Errorf("%s: %w", file, err)
				}
				if r.Schema != report.Schema {
					return fmt.Errorf("%s: schema %d, this podbench reads %d", file, r.Schema, report.Schema)
				}
				all = append(all, r)
			}
			return report.Plot(out, all...)
		},
	}
	c.Flags().StringVar(&out, "svg", "podbench.svg", "file to write")
	return c
}

func newCleanCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "clean",
		Short: "Remove what killed podbench processes left",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			namespaces, dirs, err := datapath.Stale()
			if err != nil {
				return err
			}
			for _, what := range append(namespaces, dirs...) {
				fmt.Fprintln(c.OutOrStdout(), "remove", what)
			}
			return datapath.RemoveStale(namespaces, dirs)
		},
	}
}

// serve and ask are the two processes of run --mode twoproc.
func newServeCommand() *cobra.Command {
	return &cobra.Command{
		Use: "serve ADDRESS SIZE", Hidden: true, Args: cobra.ExactArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			addr, err := netip.ParseAddr(args[0])
			size, serr := strconv.Atoi(args[1])
			if err := errors.Join(err, serr); err != nil {
				return err
			}
			return measure.Serve(addr, size, c.InOrStdin(), c.OutOrStdout())
		},
	}
}

func newAskCommand() *cobra.Command {
	return &cobra.Command{
		Use: "ask PROTOCOL ADDRESS:PORT SIZE DURATION", Hidden: true, Args: cobra.ExactArgs(4),
		RunE: func(c *cobra.Command, args []string) error {
			to, err := netip.ParseAddrPort(args[1])
			size, serr := strconv.Atoi(args[2])
			duration, derr := time.ParseDuration(args[3])
			if err := errors.Join(err, serr, derr); err != nil {
				return err
			}
			return measure.Ask(args[0], to, size, duration, c.OutOrStdout())
		},
	}
}
