package ctl

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/cni"
	"github.com/caracal-net/caracal/enforce"
	"github.com/caracal-net/caracal/internal/fault"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/store"
)

// States of a pod in adopt's report.
const (
	podCalico  = "Calico's"  // it can be adopted
	podAdopted = "Caracal's" // it is, by now
	podBlocked = "can't be"
)

// adoptReport is what adopt says.
type adoptReport struct {
	DryRun   bool           `json:"dryRun"`
	Pods     []adoptedPod   `json:"pods"`
	Routes   []netip.Prefix `json:"routes"`   // to other hosts' blocks, made Caracal's, or to be
	Problems []string       `json:"problems"` // in the way of all
	Left     []leftover     `json:"left"`     // of Calico's on this host
}

type adoptedPod struct {
	Pod       string       `json:"pod"`
	Interface string       `json:"interface"`
	Addresses []netip.Addr `json:"addresses"`
	State     string       `json:"state"`
	Why       string       `json:"why,omitempty"`
}

func newAdoptCommand(g *globals) *cobra.Command {
	o := &adoptOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "adopt",
		Short: "Take over the pods that Calico's plugin has attached on this host, running",
		Long: `adopt makes the pods that Calico's plugin has attached on this host Caracal's. It finds them in libcni's cache and by their
interfaces; checks all before it changes anything; and then records each, puts it into the maps, puts its policy in force, and
attaches the programs to the interface that it has. Addresses, interfaces and connections stay. Routes that Calico had to other
hosts become Caracal's too. Interrupted, it can be repeated.

Stop Calico's agent on this host first, and import what the datastore has, so that the store says which blocks are this host's.

What is left of Calico is listed; --clean removes it, once all pods are Caracal's. Until then --undo gives the pods back.

Exit code 1: a pod can't be adopted, and nothing was changed.`,
		Example: `  caracalctl adopt --dry-run
  caracalctl adopt
  caracalctl adopt --clean
  caracalctl adopt --undo`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return o.run(cmd) },
	}
	f := cmd.Flags()
	f.BoolVar(&o.dryRun, "dry-run", false, "change nothing, only say what would be")
	f.BoolVar(&o.clean, "clean", false, "remove what is left of Calico on this host")
	f.BoolVar(&o.undo, "undo", false, "give the adopted pods back")
	f.StringVar(&o.cache, "cache-dir", cni.DefaultCacheDir, "`DIR` of libcni's cache")
	f.StringVar(&o.node, "node-name", "", "this node's `NAME` in the store; none: what Calico called it, else the host's name")
	return cmd
}

type adoptOptions struct {
	*globals
	dryRun, clean, undo bool
	cache, node         string

	resources []api.Resource // what the store says that is about policy
}

func (o *adoptOptions) run(cmd *cobra.Command) error {
	switch {
	case o.clean && o.undo:
		return usagef("--clean and --undo exclude each other")
	case os.Geteuid() != 0:
		return errors.New("adopt takes root")
	}
	a, err := o.adoption(cmd.Context())
	if err != nil {
		return err
	}
	if !o.dryRun {
		if err := os.MkdirAll(o.stateDir, 0o700); err != nil {
			return err
		}
		lock, err := a.Lock()
		if err != nil {
			return err
		}
		defer lock.Unlock()
	}
	if o.undo {
		return o.giveBack(cmd, a)
	}
	pods, stray, err := a.Find(cmd.Context())
	if err != nil {
		return o.explainDB(err)
	}
	report := adoptReport{DryRun: o.dryRun, Pods: []adoptedPod{}, Routes: []netip.Prefix{}, Problems: []string{}}
	for _, name := range stray {
		report.Problems = append(report.Problems, fmt.Sprintf("interface %s looks like Calico's, and no runtime's cache in %s has it: remove its pod, or the interface (ip link del %s)", name, o.cache, name))
	}
	running, err := calicoProcesses()
	if err != nil {
		return err
	}
	for _, name := range running {
		report.Problems = append(report.Problems, fmt.Sprintf("%s runs on this host and would put back what is changed here: stop it first", name))
	}
	blocked := len(report.Problems)
	for _, p := range pods {
		if p.Problem != "" {
			blocked++
		}
	}
	var failed error
	if blocked == 0 {
		failed = o.take(cmd.Context(), a, pods, &report)
	}
	for _, p := range pods {
		report.Pods = append(report.Pods, adoptedRow(p))
	}
	pending, err := a.TakeRoutes(true)
	if err == nil {
		report.Left, err = o.left(cmd.Context(), a.Pools, pending)
	}
	if err != nil {
		return errors.Join(failed, err)
	}
	if o.clean && blocked == 0 && failed == nil && !o.dryRun {
		if failed = o.cleanUp(cmd.Context(), report.Left); failed == nil {
			failed = a.ReleaseTunnels(cmd.Context())
		}
	}
	if err := o.printAdopted(cmd, report); err != nil {
		return errors.Join(failed, err)
	}
	switch {
	case failed != nil:
		return failed
	case blocked > 0:
		fmt.Fprintf(cmd.ErrOrStderr(), "caracalctl: nothing was changed: %d things are in the way\n", blocked)
		return errFound
	}
	return nil
}

// take adopts what Find found.
func (o *adoptOptions) take(ctx context.Context, a *cni.Adoption, pods []*cni.CalicoPod, report *adoptReport) error {
	if !o.dryRun && slices.ContainsFunc(pods, func(p *cni.CalicoPod) bool { return !p.Adopted }) {
		if err := o.rename(ctx, a.Node, pods); err != nil {
			return err
		}
		if err := a.LearnPolicy(ctx, o.resources); err != nil {
			return err
		}
	}
	for _, p := range pods {
		if p.Adopted || o.dryRun {
			continue
		}
		if err := a.Take(ctx, p); err != nil {
			return fmt.Errorf("%s: %w; repeat adopt", p.Endpoint.Key, err)
		}
	}
	if !o.dryRun {
		if err := a.HoldTunnels(ctx); err != nil {
			return err
		}
	}
	moved, err := a.TakeRoutes(o.dryRun)
	report.Routes = append(report.Routes, moved...)
	return err
}

// rename gives the pods' endpoints, which Calico has published, the names that this node's agent will publish them under: so labels,
// ports, profiles and service accounts stay with the pods.
func (o *adoptOptions) rename(ctx context.Context, nodeName string, pods []*cni.CalicoPod) error {
	var renamed []api.Resource
	for _, p := range pods {
		for _, r := range o.resources {
			spec, ok := r.Spec.(*api.WorkloadEndpoint)
			if !ok || p.Adopted || spec.Node != nodeName || spec.InterfaceName != p.Endpoint.HostIfName {
				continue
			}
			r.Metadata.Namespace, r.Metadata.Name, _ = strings.Cut(enforce.EndpointID(nodeName, p.Endpoint), "/")
			r.Metadata.Revision, r.Metadata.Created, r.Metadata.UID = "", "", ""
			renamed = append(renamed, r)
			break
		}
	}
	if len(renamed) == 0 {
		return nil
	}
	o.resources = append(o.resources, renamed...)
	return o.withStore(ctx, func(s store.Store) error {
		for _, r := range renamed {
			if _, err := apply(ctx, s, r); err != nil {
				return fmt.Errorf("%s: %w", r, err)
			}
		}
		return nil
	})
}

func adoptedRow(p *cni.CalicoPod) adoptedPod {
	row := adoptedPod{Pod: recorded(p.Endpoint).title(), Interface: p.Endpoint.HostIfName, Addresses: p.Endpoint.Addrs, State: podCalico, Why: p.Problem}
	switch {
	case p.Problem != "":
		row.State = podBlocked
	case p.Adopted:
		row.State = podAdopted
	}
	return row
}

func (o *adoptOptions) printAdopted(cmd *cobra.Command, r adoptReport) error {
	t := newTable("POD", "INTERFACE", "ADDRESS", "STATE", "WHY")
	for _, p := range r.Pods {
		t.add(p.Pod, p.Interface, join(p.Addresses), p.State, p.Why)
	}
	if err := o.print(cmd, r, t); err != nil || o.output != formatTable {
		return err
	}
	out := cmd.OutOrStdout()
	if len(r.Routes) > 0 {
		fmt.Fprintf(out, "\nRoutes to blocks: %s\n", join(r.Routes))
	}
	for _, p := range r.Problems {
		fmt.Fprintf(out, "\nProblem: %s\n", printable(p))
	}
	if len(r.Left) == 0 {
		return nil
	}
	fmt.Fprintln(out, "\nLeft of Calico:")
	t = newTable("KIND", "NAME", "STATE", "WHY")
	for _, l := range r.Left {
		t.add(l.Kind, l.Name, l.State, l.Why)
	}
	return t.write(out)
}

// adoption is what adopt works with: the node, and what the store says of pools and blocks.
func (o *adoptOptions) adoption(ctx context.Context) (*cni.Adoption, error) {
	a := &cni.Adoption{
		CacheDir: o.cache, StateDir: o.stateDir, BPFFSDir: o.bpffsDir, BootIDFile: o.bootIDFile, AgentSocket: o.socket, Node: o.node,
		Claims: make(map[netip.Prefix]string), Step: fault.Step, Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
	}
	if a.Node == "" {
		name, err := calicoNodeName()
		if err != nil {
			return nil, err
		}
		a.Node = name
	}
	err := o.withStore(ctx, func(s store.Store) error {
		kind, err := api.FindKind("IPPool")
		if err != nil {
			return err
		}
		pools, err := list(ctx, s, kind, "", nil)
		if err != nil {
			return err
		}
		for _, r := range pools {
			if p, ok := r.Spec.(*api.IPPool); ok {
				a.Pools = append(a.Pools, *p)
			}
		}
		if o.resources, err = policyResources(ctx, s); err != nil {
			return err
		}
		claims, err := agent.Blocks(ctx, s)
		for _, c := range claims {
			a.Claims[c.CIDR] = c.Node
		}
		return err
	})
	return a, err
}

// calicoNodeName is what Calico called this node, else the host's name.
func calicoNodeName() (string, error) {
	text, err := os.ReadFile("/var/lib/calico/nodename")
	if name := strings.TrimSpace(string(text)); err == nil && name != "" {
		return name, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	name, err := os.Hostname()
	return strings.ToLower(name), err
}

// giveBack undoes adopt. Pods that Caracal's plugin has added can't be given back.
func (o *adoptOptions) giveBack(cmd *cobra.Command, a *cni.Adoption) error {
	var pods []node.Endpoint
	err := o.view(cmd.Context(), func(tx *node.Tx) (err error) {
		pods, err = tx.AllEndpoints()
		return err
	})
	if err != nil && !errors.Is(err, node.ErrNoDatabase) {
		return err
	}
	if _, err := agentStatus(cmd.Context(), o.socket); err == nil {
		return errors.New("caracald runs: stop it first")
	}
	for _, e := range pods {
		if !e.Adopted {
			return fmt.Errorf("pod %s was added by Caracal, Calico knows nothing of its address: remove it first", recorded(e).title())
		}
	}
	report := adoptReport{DryRun: o.dryRun, Pods: []adoptedPod{}, Routes: []netip.Prefix{}, Problems: []string{}, Left: []leftover{}}
	for _, e := range pods {
		row := adoptedPod{Pod: recorded(e).title(), Interface: e.HostIfName, Addresses: e.Addrs, State: podAdopted}
		if !o.dryRun {
			if err := a.Return(cmd.Context(), e); err != nil {
				return fmt.Errorf("%s: %w; repeat adopt --undo", e.Key, err)
			}
			row.State = podCalico
		}
		report.Pods = append(report.Pods, row)
	}
	if !o.dryRun {
		if report.Routes, err = a.ReturnRoutes(); err == nil {
			err = a.ReleaseTunnels(cmd.Context())
		}
		if err != nil {
			return err
		}
	}
	return o.printAdopted(cmd, report)
}
