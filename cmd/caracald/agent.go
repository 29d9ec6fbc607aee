package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/api/selector"
	"github.com/caracal-net/caracal/cmd/caracald/ctl"
	"github.com/caracal-net/caracal/cni"
	"github.com/caracal-net/caracal/docker"
	"github.com/caracal-net/caracal/internal/fault"
	"github.com/caracal-net/caracal/kube"
	"github.com/caracal-net/caracal/maps"
)

// runAgent runs the node's agent until ctx ends.
func runAgent(ctx context.Context, args []string) int {
	c := agent.Config{Step: fault.Step}
	var config string
	var log logFlags
	var ip4, ip6, ports, ipam string
	var labels []string
	d := docker.Config{Step: fault.Step}
	cmd := &cobra.Command{
		Use:   "caracald",
		Short: "Caracal's agent on a node",
		Long: `caracald makes this node equal to what the cluster's store says: it claims address blocks, peers with the other nodes over
BGP, and writes the routes that it learns into the kernel maps and the kernel's own table. Pods run, and new ones start,
while it is away. Called as caracalctl it is the operator's tool.

Where the store is: ETCD_ENDPOINTS, DATASTORE_TYPE=kubernetes and the other variables of calicoctl, or a file shaped like calicoctl.cfg;
with neither the store is a file of this machine alone.

CALICO_IPV4POOL_CIDR, CALICO_IPV6POOL_CIDR and the variables beside them (BLOCK_SIZE, NAT_OUTGOING, VXLAN, NODE_SELECTOR) say which
pools to make where the store has none of that family; NO_DEFAULT_POOLS=true: none.`,
		Example: `  caracald
  ETCD_ENDPOINTS=http://10.0.0.1:2379 caracald --node-name h1 --label rack=1
  caracald -c /etc/calico/calicoctl.cfg --ip 10.0.0.1/24 --uplink 'eth*'`,
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var errLog, err4, err6 error
			c.Log, errLog = log.logger()
			c.IPv4, err4 = hostPrefix("--ip", ip4)
			c.IPv6, err6 = hostPrefix("--ip6", ip6)
			var errLabels, errPorts error
			c.Labels, errLabels = parseLabels(labels)
			if c.NATPorts, errPorts = maps.ParsePorts(ports); errPorts != nil {
				errPorts = fmt.Errorf("--masquerade-ports: %w", errPorts)
			}
			var errPools, errIPAM error
			c.Pools, errPools = defaultPools(os.Getenv)
			c.PodCIDRs, errIPAM = podCIDRs(ipam, os.Getenv)
			var errVXLAN error
			if c.VXLANPort < 1 || c.VXLANPort > 65535 || c.VXLANVNI < 1 || c.VXLANVNI >= 1<<24 {
				errVXLAN = fmt.Errorf("--vxlan-port %d, --vxlan-vni %d: a port, and a number of 24 bits", c.VXLANPort, c.VXLANVNI)
			}
			var errWait error
			if c.PodWait < 0 || c.PodWait > agent.MaxPodWait {
				errWait = fmt.Errorf("--pod-wait %s: between 0 and %s, since the plugin does not wait longer", c.PodWait, agent.MaxPodWait)
			}
			if c.PodWait == 0 {
				c.PodWait = -1
			}
			if err := errors.Join(errWait, errLog, err4, err6, errLabels, errPorts, errPools, errIPAM, errVXLAN, d.Check()); err != nil {
				return err
			}
			debug.SetMemoryLimit(256 << 20) // soft: above it garbage is collected sooner, with many routes
			c.Log.Info("begins", "version", ctl.Version, "node", c.Node)
			if err := serveStore(cmd.Context(), config, c, d); err != nil {
				c.Log.Error("ends", "error", err)
				return errLogged
			}
			c.Log.Info("ends")
			return nil
		},
	}
	host, _ := os.Hostname()
	f := cmd.Flags()
	f.StringVar(&c.Node, "node-name", ctl.FromEnv("CARACAL_NODENAME", ctl.FromEnv("NODENAME", host)), "this node's `NAME` in the cluster (env CARACAL_NODENAME, NODENAME)")
	f.StringVar(&ip4, "ip", ctl.FromEnv("IP", ""), "this node's `ADDRESS/BITS` for its peers (env IP); none: that of the interface with the default route")
	f.StringVar(&ip6, "ip6", ctl.FromEnv("IP6", ""), "likewise, IPv6 (env IP6)")
	f.StringSliceVar(&labels, "label", splitList(os.Getenv("CARACAL_LABELS")), "`KEY=VALUE` of a label of this node, for selectors (repeatable; env CARACAL_LABELS, with commas between)")
	f.StringVar(&ipam, "ipam", os.Getenv("CARACAL_IPAM"), "where this node's blocks come from: `MODE` pools, of which it claims some, or podcidr, those that Kubernetes gives it (env CARACAL_IPAM, USE_POD_CIDR)")
	f.DurationVar(&c.PodWait, "pod-wait", agent.DefaultPodWait, "for how `LONG` a new pod waits for Kubernetes to tell of it, until it gets what policy.unknown says")
	f.DurationVar(&c.LeakedAfter, "leaked-after", agent.DefaultLeakedAfter, "for how `LONG` a pod of Kubernetes's must be gone until its address is taken back that no DEL released")
	f.StringSliceVar(&c.Uplinks, "uplink", nil, "`PATTERN` of interfaces that other hosts are behind (repeatable); none: found by the routes to the peers")
	f.StringVar(&ports, "masquerade-ports", ctl.FromEnv("CARACAL_MASQUERADE_PORTS", cni.MasqueradePorts.String()), "`PORTS` that pods' packets to the outside leave from; none that the host's own connections get (env CARACAL_MASQUERADE_PORTS)")
	f.IntVar(&c.VXLANPort, "vxlan-port", 4789, "UDP `PORT` for pools with a vxlanMode, the same on all nodes")
	f.IntVar(&c.VXLANVNI, "vxlan-vni", 4096, "VXLAN network `ID`, likewise")
	f.IntVar(&c.BGPPort, "bgp-port", 0, "where BGP listens; 0: the BGPConfiguration's or 179; -1: nowhere")
	f.StringVarP(&config, "config", "c", os.Getenv("CARACAL_CONFIG"), "`FILE` that says where the store is, shaped like calicoctl.cfg (env CARACAL_CONFIG)")
	f.StringVar(&c.StateDir, "state-dir", ctl.FromEnv("CARACAL_STATE_DIR", cni.DefaultStateDir), "`DIR` that holds node.db (env CARACAL_STATE_DIR)")
	f.StringVar(&c.BPFFSDir, "bpffs-dir", ctl.FromEnv("CARACAL_BPFFS_DIR", cni.DefaultBPFFSDir), "`DIR` that holds the pinned maps and programs (env CARACAL_BPFFS_DIR)")
	f.StringVar(&c.BootIDFile, "boot-id-file", os.Getenv("CARACAL_BOOT_ID_FILE"), "`FILE` with the boot id of a simulated node (env CARACAL_BOOT_ID_FILE)")
	f.StringVar(&c.Socket, "socket", ctl.FromEnv("CARACAL_SOCKET", cni.DefaultSocket), "`SOCKET` on which caracalctl asks (env CARACAL_SOCKET)")
	f.StringVar(&c.Health, "health", agent.DefaultHealth, "`ADDRESS` of /health, /liveness and /readiness; empty: nowhere")
	f.StringVar(&c.Metrics, "metrics", agent.DefaultMetrics, "`ADDRESS` of /metrics; empty: nowhere")
	f.StringVar(&c.Network, "network", os.Getenv("CARACAL_NETWORK"), "`FILE` that the network which \"install --defer-network\" has left is put into, once pods can be added (env CARACAL_NETWORK)")
	log.add(f)
	addDockerFlags(f, &d)
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(ctx)
	if err == nil {
		return ctl.ExitOK
	}
	if !errors.Is(err, errLogged) {
		fmt.Fprintln(os.Stderr, "caracald:", err)
	}
	return ctl.ExitError
}

// errLogged says that the log has the error.
var errLogged = errors.New("see the log")

// serveStore is serve with the store that there is.
func serveStore(ctx context.Context, config string, c agent.Config, d docker.Config) error {
	s, err := ctl.OpenStore(ctx, config, c.StateDir)
	if err != nil {
		return err
	}
	if k, is := s.(*kube.Store); is {
		k.SetNode(c.Node)
		c.Kubernetes = k
	}
	return errors.Join(serve(ctx, c, d, s), s.Close())
}

func splitList(s string) []string {
	if s == "" {
		return nil
	}
	return strings.Split(s, ",")
}

func parseLabels(all []string) (map[string]string, error) {
	labels := make(map[string]string, len(all))
	for _, l := range all {
		key, value, ok := strings.Cut(l, "=")
		if !ok || !selector.ValidKey(key) {
			return nil, fmt.Errorf("--label %q: write it as KEY=VALUE; KEY has letters, digits and \"_./-\"", l)
		}
		labels[key] = value
	}
	return labels, nil
}

func hostPrefix(flag, s string) (netip.Prefix, error) {
	if s == "" || s == "autodetect" {
		return netip.Prefix{}, nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return p, fmt.Errorf("%s %q: write it as 10.0.0.1/24", flag, s)
	}
	return p, nil
}
