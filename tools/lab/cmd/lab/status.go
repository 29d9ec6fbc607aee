package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/tools/lab"
)

type statusOptions struct {
	lab    string
	output string
}

func newStatusCommand() *cobra.Command {
	var o statusOptions
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show labs, hosts and pods",
		Long:  "Show the lab that --name says, or all labs of this machine.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.output != "table" && o.output != "json" {
				return fmt.Errorf("--output %q: want table or json", o.output)
			}
			labs, err := readLabs(o.lab)
			if err != nil {
				return err
			}
			if o.output == "json" {
				e := json.NewEncoder(cmd.OutOrStdout())
				e.SetIndent("", "  ")
				return e.Encode(labs)
			}
			return printLabs(cmd.OutOrStdout(), labs)
		},
	}
	cmd.Flags().StringVar(&o.lab, "name", "", "name of the lab (default: all)")
	cmd.Flags().StringVarP(&o.output, "output", "o", "table", "table or json")
	return cmd
}

func readLabs(name string) ([]lab.Status, error) {
	if name != "" {
		s, err := lab.ReadStatus(name)
		return []lab.Status{s}, err
	}
	names, err := lab.Names()
	if err != nil {
		return nil, err
	}
	labs := []lab.Status{}
	for _, n := range names {
		s, err := lab.ReadStatus(n)
		if errors.Is(err, lab.ErrNotFound) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		labs = append(labs, s)
	}
	return labs, nil
}

func printLabs(w io.Writer, labs []lab.Status) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "LAB\tHOST\tPOD\tSTATE\tADDRESSES\tHOST INTERFACE\tNETNS")
	for _, l := range labs {
		if !l.Up {
			fmt.Fprintf(t, "%s\t\t\tinterrupted (lab down --name %s)\t\t\t\n", l.Name, l.Name)
		}
		for _, h := range l.Hosts {
			fmt.Fprintf(t, "%s\t%s\t\tup\t%s\t\t%s\n", l.Name, h.Name, join(h.Addrs), h.Netns)
			for _, p := range h.Pods {
				fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", l.Name, h.Name, p.Name, p.State, join(p.Addrs), p.HostIfName, p.Netns)
			}
		}
	}
	return t.Flush()
}

func join(addrs []netip.Addr) string {
	var s []string
	for _, a := range addrs {
		s = append(s, a.String())
	}
	return strings.Join(s, ",")
}
