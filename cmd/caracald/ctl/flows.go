package ctl

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/maps"
)

// flow is a flow with the names of its ends.
type flow struct {
	maps.Flow
	OpenerPod    string `json:"openerPod,omitempty"`
	ResponderPod string `json:"responderPod,omitempty"`
}

var (
	flowStates    = []string{"opening", "answered", "open", "closing", "closed"}
	flowProtocols = []string{"tcp", "udp", "icmp", "icmpv6", "sctp"}
	flowOrders    = []string{"address", "packets", "bytes", "age", "idle"}
)

type flowsOptions struct {
	*globals
	pod, address, protocol, order string
	states                        []string
	limit                         int

	prefix netip.Prefix // address, parsed
}

func newFlowsCommand(g *globals) *cobra.Command {
	o := &flowsOptions{globals: g}
	cmd := &cobra.Command{
		Use:     "flows",
		Aliases: []string{"flow"},
		Short:   "List the flows of this node's pods",
		Long: `flows lists caracal_flows, and caracal_opens for flows that only one side has confirmed.

Packets and bytes are approximate; SENT is by the opener, RECEIVED by the opener. For ICMP the port is the echo
identifier. Flows change while they are listed: one that comes or goes meanwhile may be missing.`,
		Example: `  caracalctl flows
  caracalctl flows --pod default/web --state open
  caracalctl flows --address 10.244.0.0/26 --protocol tcp
  caracalctl flows --sort bytes --limit 10 -o json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.check(); err != nil {
				return err
			}
			return o.run(cmd)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.pod, "pod", "", "only flows of this `POD`: its name, namespace/name, container id, address or host interface")
	f.StringVar(&o.address, "address", "", "only flows with an end in this `ADDRESS` or prefix")
	f.StringVar(&o.protocol, "protocol", "", "only flows of this `PROTOCOL`: tcp, udp, icmp, icmpv6, sctp or a number")
	f.StringSliceVar(&o.states, "state", nil, "only flows in these `STATES`: opening, answered, open, closing, closed")
	f.IntVar(&o.limit, "limit", 0, "at most `N` flows; 0: all")
	f.StringVar(&o.order, "sort", "address", "`ORDER`: address, packets, bytes, age or idle; the largest first")
	complete(cmd, "protocol", flowProtocols...)
	complete(cmd, "state", flowStates...)
	complete(cmd, "sort", flowOrders...)
	return cmd
}

func (o *flowsOptions) check() error {
	if o.address != "" {
		a, err := netip.ParseAddr(o.address)
		if err == nil {
			a = a.Unmap().WithZone("")
			o.prefix = netip.PrefixFrom(a, a.BitLen())
		} else if o.prefix, err = netip.ParsePrefix(o.address); err != nil {
			return usagef("--address %q: neither an address nor a prefix", o.address)
		}
	}
	for _, s := range o.states {
		if !slices.Contains(flowStates, s) {
			return usagef("--state %q: must be %s", s, oneOf(flowStates))
		}
	}
	if !slices.Contains(flowOrders, o.order) {
		return usagef("--sort %q: must be %s", o.order, oneOf(flowOrders))
	}
	if o.limit < 0 {
		return usagef("--limit %d: must be 0 or more", o.limit)
	}
	o.protocol = strings.ToLower(o.protocol)
	if o.protocol != "" && !slices.Contains(flowProtocols, o.protocol) && !isNumber(o.protocol) {
		return usagef("--protocol %q: must be %s or a number", o.protocol, strings.Join(flowProtocols, ", "))
	}
	return nil
}

func (o *flowsOptions) run(cmd *cobra.Command) error {
	m, err := o.maps()
	if err != nil {
		return err
	}
	defer m.Close()
	pods, names := o.podNames(cmd.Context())
	own, err := o.podAddresses(pods)
	if err != nil {
		return err
	}
	all, err := m.Flows()
	if err != nil {
		return err
	}
	shown := []flow{}
	for _, f := range all {
		if o.wants(f, own) {
			shown = append(shown, flow{Flow: f, OpenerPod: names[f.Opener.Addr()], ResponderPod: names[f.Responder.Addr()]})
		}
	}
	o.sort(shown)
	total := len(shown)
	if o.limit > 0 && total > o.limit {
		shown = shown[:o.limit]
	}
	t := newTable("PROTOCOL", "STATE", "OPENER", "RESPONDER", "MASQUERADE", "ENTERED", "SENT", "RECEIVED", "AGE", "IDLE", "OPENER-POD", "RESPONDER-POD")
	for _, f := range shown {
		outside := ""
		if f.Masquerade.IsValid() {
			outside = f.Masquerade.String()
		}
		t.add(f.Protocol, f.State, f.Opener, f.Responder, outside, f.Entered, f.Sent.Packets, f.Received.Packets,
			brief(f.Age), brief(f.Idle), f.OpenerPod, f.ResponderPod)
	}
	if err := o.print(cmd, shown, t); err != nil {
		return err
	}
	if total > len(shown) {
		warn(cmd, "%d of %d flows shown", len(shown), total)
	}
	return nil
}

// podAddresses are the addresses of the pod that was asked for; nil when none was.
func (o *flowsOptions) podAddresses(pods []pod) ([]netip.Addr, error) {
	if o.pod == "" {
		return nil, nil
	}
	var own []netip.Addr
	for _, p := range pods {
		if p.matches(o.pod) {
			own = append(own, p.Addresses...)
		}
	}
	if len(own) == 0 {
		return nil, fmt.Errorf("--pod %q: no pod of this node has that name, container id, address or host interface; see caracalctl pods", o.pod)
	}
	return own, nil
}

func (o *flowsOptions) wants(f maps.Flow, own []netip.Addr) bool {
	ends := []netip.Addr{f.Opener.Addr(), f.Responder.Addr()}
	has := func(in func(netip.Addr) bool) bool { return slices.ContainsFunc(ends, in) }
	switch {
	case own != nil && !has(func(a netip.Addr) bool { return slices.Contains(own, a) }):
	case o.prefix.IsValid() && !has(o.prefix.Contains):
	case o.protocol != "" && f.Protocol != o.protocol:
	case len(o.states) > 0 && !slices.Contains(o.states, f.State):
	default:
		return true
	}
	return false
}

// sort orders flows by the wanted measure, the largest first, then by protocol and ends.
func (o *flowsOptions) sort(flows []flow) {
	measure := func(f flow) uint64 {
		switch o.order {
		case "packets":
			return f.Sent.Packets + f.Received.Packets
		case "bytes":
			return f.Sent.Bytes + f.Received.Bytes
		case "age":
			return uint64(f.Age)
		case "idle":
			return uint64(f.Idle)
		}
		return 0
	}
	slices.SortStableFunc(flows, func(a, b flow) int {
		return cmp.Or(cmp.Compare(measure(b), measure(a)), cmp.Compare(a.Protocol, b.Protocol),
			a.Opener.Compare(b.Opener), a.Responder.Compare(b.Responder))
	})
}

func isNumber(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}

// brief is a duration to two or three digits.
func brief(d time.Duration) string {
	switch {
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	case d < time.Minute:
		return d.Round(100 * time.Millisecond).String()
	}
	return d.Round(time.Second).String()
}
