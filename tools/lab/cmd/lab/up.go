package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/tools/lab"
)

type upOptions struct {
	config   lab.Config
	pools    []string
	conflist string
	chain    []string
}

func newUpCommand() *cobra.Command {
	var o upOptions
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Build a lab",
		Example: `  lab up
  lab up --hosts 3 --outside --name three
  lab up --pool 10.1.0.0/24 --chain '{"type":"portmap","capabilities":{"portMappings":true}}'
  lab up --conflist bridge.conflist.tmpl      # another plugin; a text/template`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.complete(); err != nil {
				return err
			}
			l, err := lab.Up(cmd.Context(), o.config)
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s is up\n", l)
			return nil
		},
	}
	nameFlag(cmd, &o.config.Name)
	f := cmd.Flags()
	f.IntVar(&o.config.Hosts, "hosts", 1, "number of hosts")
	f.BoolVar(&o.config.Outside, "outside", false, "add a namespace that stands for the outside world, and default routes to it")
	f.BoolVar(&o.config.StaticRoutes, "static-routes", false, "give each host kernel routes to the pods of the others")
	f.BoolVar(&o.config.SharedPools, "shared-pools", false, "give every host the whole pools (for hosts with a store)")
	f.IntVar(&o.config.MTU, "mtu", 1500, "MTU of the uplinks")
	f.StringSliceVar(&o.pools, "pool", nil, "address pool, repeatable (default 10.244.0.0/16, 2001:db8:244::/64)")
	f.StringVar(&o.config.CNIVersion, "cni-version", "1.1.0", "cniVersion of the configuration list")
	f.StringArrayVar(&o.chain, "chain", nil, "configuration of a plugin that follows caracal (JSON), repeatable")
	f.StringVar(&o.conflist, "conflist", "", "file with a template for the configuration list")
	f.StringSliceVar(&o.config.CNIPath, "cni-path", nil, "directories with other plugins (default /usr/lib/cni,/opt/cni/bin)")
	f.StringVar(&o.config.Caracal, "caracal", "", "the caracal plugin (default $CARACAL_BIN, or next to this program)")
	return cmd
}

func (o *upOptions) complete() error {
	if len(o.pools) > 0 {
		o.config.IPv4Pools, o.config.IPv6Pools = []netip.Prefix{}, []netip.Prefix{}
	}
	for _, s := range o.pools {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return fmt.Errorf("--pool: %w", err)
		}
		if p.Addr().Is4() {
			o.config.IPv4Pools = append(o.config.IPv4Pools, p)
		} else {
			o.config.IPv6Pools = append(o.config.IPv6Pools, p)
		}
	}
	for _, s := range o.chain {
		var plugin map[string]any
		if err := json.Unmarshal([]byte(s), &plugin); err != nil {
			return fmt.Errorf("--chain: %w", err)
		}
		o.config.Chain = append(o.config.Chain, plugin)
	}
	if o.conflist != "" {
		data, err := os.ReadFile(o.conflist)
		if err != nil {
			return fmt.Errorf("--conflist: %w", err)
		}
		o.config.Conflist = string(data)
	}
	return nil
}
