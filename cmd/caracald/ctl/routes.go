package ctl

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/maps"
)

// route is an entry of caracal_routes with names in place of numbers.
type route struct {
	maps.Route
	Interface string `json:"interface,omitempty"`
	Pod       string `json:"pod,omitempty"`
}

type routesOptions struct {
	*globals
	kind string
}

func newRoutesCommand(g *globals) *cobra.Command {
	o := &routesOptions{globals: g}
	cmd := &cobra.Command{
		Use:     "routes [ADDRESS]",
		Aliases: []string{"route"},
		Short:   "List the dataplane's routes",
		Long: `routes lists caracal_routes: how the dataplane reaches each prefix. What no prefix covers goes to the host's stack.

With ADDRESS it shows the one route that a packet to that address takes.`,
		Example: `  caracalctl routes
  caracalctl routes --kind local-pod
  caracalctl routes 10.244.0.7`,
		Args: atMostOneArg,
		RunE: func(cmd *cobra.Command, args []string) error { return o.run(cmd, args) },
	}
	cmd.Flags().StringVar(&o.kind, "kind", "", "only routes of this `KIND`: local-pod, host, remote, tunnel, pool, stack, blackhole")
	complete(cmd, "kind", "local-pod", "host", "remote", "tunnel", "pool", "stack", "blackhole")
	return cmd
}

func (o *routesOptions) run(cmd *cobra.Command, args []string) error {
	var to netip.Addr
	if len(args) > 0 {
		var err error
		if to, err = netip.ParseAddr(args[0]); err != nil {
			return usagef("%q is not an address", args[0])
		}
		to = to.Unmap().WithZone("")
	}
	var kind maps.RouteKind
	if o.kind != "" {
		var err error
		if kind, err = maps.ParseRouteKind(o.kind); err != nil {
			return usagef("--kind: %w", err)
		}
	}
	all, err := o.routes(cmd)
	if err != nil {
		return err
	}
	shown := []route{}
	for _, r := range all {
		if o.kind != "" && r.Kind != kind {
			continue
		}
		if to.IsValid() {
			if !r.Prefix.Contains(to) {
				continue
			}
			if len(shown) > 0 && shown[0].Prefix.Bits() >= r.Prefix.Bits() {
				continue
			}
			shown = shown[:0]
		}
		shown = append(shown, r)
	}
	if to.IsValid() && len(shown) == 0 {
		return fmt.Errorf("%s: no prefix covers it, so it goes to the host's stack (ip route get %s)", to, to)
	}
	t := newTable("PREFIX", "KIND", "INTERFACE", "NEXT-HOP", "MTU", "POD")
	for _, r := range shown {
		hop, mtu := "", ""
		if r.NextHop.IsValid() {
			hop = r.NextHop.String()
		}
		if r.MTU > 0 {
			mtu = fmt.Sprint(r.MTU)
		}
		name := r.Interface
		if name == "" && r.IfIndex > 0 {
			name = fmt.Sprintf("if%d", r.IfIndex)
		}
		t.add(r.Prefix, r.Kind, name, hop, mtu, r.Pod)
	}
	return o.print(cmd, shown, t)
}

// routes reads caracal_routes and names what it can.
func (o *routesOptions) routes(cmd *cobra.Command) ([]route, error) {
	m, err := o.maps()
	if err != nil {
		return nil, err
	}
	defer m.Close()
	all, err := m.Routes()
	if err != nil {
		return nil, err
	}
	ifs, err := openInterfaces()
	if err != nil {
		return nil, err
	}
	defer ifs.close()
	_, pods := o.podNames(cmd.Context())
	named := make([]route, 0, len(all))
	for _, r := range all {
		name, err := ifs.name(r.IfIndex)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("route %s", r.Prefix), err)
		}
		n := route{Route: r, Interface: name}
		if r.Kind == maps.RouteLocalPod {
			n.Pod = pods[r.Prefix.Addr()]
		}
		named = append(named, n)
	}
	return named, nil
}
