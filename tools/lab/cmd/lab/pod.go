package main

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/tools/lab"
)

func newPodCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "pod", Short: "Add and remove pods"}
	cmd.AddCommand(newPodAddCommand(), newPodDelCommand())
	return cmd
}

type podAddOptions struct {
	lab       string
	ips       []string
	labels    []string
	namespace string
}

func newPodAddCommand() *cobra.Command {
	var o podAddOptions
	cmd := &cobra.Command{
		Use:     "add HOST POD",
		Short:   "Make a pod's namespace and call ADD",
		Example: "  lab pod add h1 web\n  lab pod add h1 db --ip 10.244.0.9 --label app=db",
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			opts, err := o.podOptions()
			if err != nil {
				return err
			}
			h, err := openHost(o.lab, args[0])
			if err != nil {
				return err
			}
			p, err := h.AddPod(cmd.Context(), args[1], opts)
			if err != nil {
				return err
			}
			var addrs []string
			for _, a := range p.Addrs() {
				addrs = append(addrs, a.String())
			}
			fmt.Fprintln(cmd.OutOrStdout(), strings.Join(addrs, " "))
			return nil
		},
	}
	nameFlag(cmd, &o.lab)
	cmd.Flags().StringSliceVar(&o.ips, "ip", nil, "address that the pod asks for, repeatable")
	cmd.Flags().StringSliceVar(&o.labels, "label", nil, "label as key=value, repeatable")
	cmd.Flags().StringVar(&o.namespace, "namespace", "default", "Kubernetes namespace that the plugin is told")
	return cmd
}

func (o *podAddOptions) podOptions() (lab.PodOptions, error) {
	opts := lab.PodOptions{Namespace: o.namespace}
	for _, s := range o.ips {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return opts, fmt.Errorf("--ip: %w", err)
		}
		opts.IPs = append(opts.IPs, a)
	}
	for _, s := range o.labels {
		k, v, ok := strings.Cut(s, "=")
		if !ok || k == "" {
			return opts, fmt.Errorf("--label %q: want key=value", s)
		}
		if opts.Labels == nil {
			opts.Labels = map[string]string{}
		}
		opts.Labels[k] = v
	}
	return opts, nil
}

func newPodDelCommand() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "del HOST POD",
		Short: "Call DEL and remove the pod's namespace",
		Args:  cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			h, err := openHost(name, args[0])
			if err != nil {
				return err
			}
			return h.DelPod(cmd.Context(), args[1])
		},
	}
	nameFlag(cmd, &name)
	return cmd
}

func openHost(labName, host string) (*lab.Host, error) {
	l, err := lab.Open(labName)
	if err != nil {
		return nil, err
	}
	return l.HostByName(host)
}
