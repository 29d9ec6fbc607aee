package ctl

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/ipam"
	"github.com/caracal-net/caracal/kube"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
	"github.com/caracal-net/caracal/store/config"
)

// underway is how long an ADD or DEL may take before what it has not done yet counts as missing.
const underway = 10 * time.Second

// report is what ipam check found.
type report struct {
	Endpoints int            `json:"endpoints"`
	Blocks    int            `json:"blocks"`
	Addresses int            `json:"addresses"`
	Problems  []ipam.Problem `json:"problems"`
}

type ipamCheckOptions struct {
	*globals
	cache string
}

func newIPAMCheckCommand(g *globals) *cobra.Command {
	o := &ipamCheckOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Compare addresses, records, interfaces, maps and pins with one another",
		Long: `check compares what node.db records with what there is, and exits with 1 when something is wrong:

  leaked       an address is held, but no endpoint is recorded and the runtime's cache does not know of it
  unrecorded   an endpoint uses an address that it does not hold
  double       an address has two holders
  stray        an address or block belongs to no pool or block
  miscounted   a block counts other addresses than are held
  dead         an endpoint's network namespace is gone and no DEL came
  podless      an endpoint is of a pod that Kubernetes has no more, where the store is its API
  interface    an endpoint's interface is missing on the host or in the container
  map          the kernel maps lack an entry, or hold one that belongs to nobody
  program      the programs are not attached to an endpoint's host interface
  pin          a pinned link belongs to no endpoint

Endpoints younger than 10 s may still be in the making and are not judged by what is missing. Attachments of other main
plugins that use caracal-ipam have no endpoint; the runtime's cache (libcni's) tells whether they live.`,
		Example: `  caracalctl ipam check
  caracalctl ipam check -o json | jq '.problems[] | select(.kind == "leaked")'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return o.run(cmd) },
	}
	cacheFlag(cmd, &o.cache)
	return cmd
}

func cacheFlag(cmd *cobra.Command, dir *string) {
	cmd.Flags().StringVar(dir, "cni-cache-dir", "/var/lib/cni", "`DIR` in which the runtime's libcni keeps its results")
}

// cached tells whether libcni's cache knows an attachment: its runtime has not removed it yet.
func cached(dir string, k node.Key) bool {
	_, err := os.Lstat(filepath.Join(dir, "results", strings.Join([]string{k.Network, k.ContainerID, k.IfName}, "-")))
	return err == nil
}

func (o *ipamCheckOptions) run(cmd *cobra.Command) error {
	r, err := o.check(cmd)
	if err != nil {
		return err
	}
	t := newTable("KIND", "ADDRESS", "HOLDER", "DETAIL")
	for _, p := range r.Problems {
		addr := ""
		if p.Addr.IsValid() {
			addr = p.Addr.String()
		}
		t.add(p.Kind, addr, p.Holder, p.Detail)
	}
	if o.output == formatTable && len(r.Problems) == 0 {
		fmt.Fprintf(cmd.OutOrStdout(), "nothing wrong: %d endpoints, %d addresses in %d blocks\n", r.Endpoints, r.Addresses, r.Blocks)
		return nil
	}
	if err := o.print(cmd, r, t); err != nil {
		return err
	}
	if len(r.Problems) > 0 {
		return errFound
	}
	return nil
}

// check reads the maps before the database and after it: ADD records before it makes anything, and DEL forgets last, so
// an entry that is there both times and has no record in between is nobody's.
func (o *ipamCheckOptions) check(cmd *cobra.Command) (report, error) {
	c := &checking{dir: o.bpffsDir}
	m, err := o.maps()
	switch {
	case errors.Is(err, errNotLoaded):
	case err != nil:
		return report{}, err
	default:
		defer m.Close()
		c.maps = m
		if err := c.read(); err != nil {
			return report{}, err
		}
	}
	if c.ifs, err = openInterfaces(); err != nil {
		return report{}, err
	}
	defer c.ifs.close()
	var all []node.Endpoint
	var blocks []node.Block
	err = o.view(cmd.Context(), func(tx *node.Tx) error {
		if err := o.warnBoot(cmd, tx); err != nil {
			return err
		}
		r, err := ipam.Check(tx, func(k node.Key) bool { return cached(o.cache, k) })
		if err != nil {
			return err
		}
		c.report = report{Blocks: r.Blocks, Addresses: r.Addresses, Problems: r.Problems}
		if all, err = tx.AllEndpoints(); err != nil {
			return err
		}
		blocks, err = tx.Blocks()
		return err
	})
	if err != nil {
		return report{}, err
	}
	c.report.Endpoints = len(all)
	for _, e := range all {
		if err := c.endpoint(e); err != nil {
			return report{}, err
		}
	}
	o.checkPods(cmd, c, all)
	if c.maps == nil && len(all) > 0 {
		c.add("map", netip.Addr{}, "", "no programs are pinned in %s", o.bpffsDir)
	}
	if c.maps != nil {
		if err := c.reread(); err != nil {
			return report{}, err
		}
		if err := c.strays(all, blocks); err != nil {
			return report{}, err
		}
	}
	slices.SortStableFunc(c.report.Problems, func(a, b ipam.Problem) int {
		return cmp.Or(cmp.Compare(a.Holder, b.Holder), cmp.Compare(a.Kind, b.Kind), a.Addr.Compare(b.Addr), cmp.Compare(a.Detail, b.Detail))
	})
	return c.report, nil
}

// checkPods asks Kubernetes for the pods of endpoints, if the store is its API.
func (o *ipamCheckOptions) checkPods(cmd *cobra.Command, c *checking, all []node.Endpoint) {
	cfg, err := storeConfig(o.config, o.stateDir)
	if err != nil || cfg.Type != config.Kubernetes || len(all) == 0 {
		return
	}
	s, err := kube.Open(cfg.Kubernetes)
	if err != nil {
		warn(cmd, "pods are not compared with Kubernetes's: %v", err)
		return
	}
	defer s.Close()
	for _, e := range all {
		if e.PodUID == "" || e.Docker != nil || time.Since(e.Created).Abs() < underway {
			continue
		}
		exists, err := s.PodExists(cmd.Context(), e.PodNamespace, e.PodName, e.PodUID)
		if err != nil {
			warn(cmd, "pods are not compared with Kubernetes's: %v", err)
			return
		}
		if !exists {
			c.add("podless", netip.Addr{}, e.Key.String(), "Kubernetes has no pod %s/%s with uid %s", e.PodNamespace, e.PodName, e.PodUID)
		}
	}
}

// checking is one check at work.
type checking struct {
	dir    string
	ifs    *interfaces
	report report

	maps   *maps.Maps // nil: nothing is pinned
	pods   []maps.Pod
	routes []maps.Route
	links  []string
}

func (c *checking) read() (err error) {
	if c.pods, err = c.maps.Pods(); err != nil {
		return err
	}
	if c.routes, err = c.maps.Routes(); err != nil {
		return err
	}
	c.links, err = loader.Links(c.dir)
	return err
}

// reread keeps what is still there.
func (c *checking) reread() error {
	before := *c
	if err := c.read(); err != nil {
		return err
	}
	c.pods = slices.DeleteFunc(c.pods, func(p maps.Pod) bool {
		return !slices.ContainsFunc(before.pods, func(o maps.Pod) bool { return o.IfIndex == p.IfIndex })
	})
	c.routes = slices.DeleteFunc(c.routes, func(r maps.Route) bool { return !slices.Contains(before.routes, r) })
	c.links = slices.DeleteFunc(c.links, func(l string) bool { return !slices.Contains(before.links, l) })
	return nil
}

func (c *checking) add(kind string, a netip.Addr, holder, format string, args ...any) {
	c.report.Problems = append(c.report.Problems, ipam.Problem{Kind: kind, Addr: a, Holder: holder, Detail: fmt.Sprintf(format, args...)})
}

// endpoint compares a record with what there is of it.
func (c *checking) endpoint(e node.Endpoint) error {
	if time.Since(e.Created).Abs() < underway {
		return nil
	}
	holder := e.Key.String()
	if why := dead(e); why != "" {
		c.add("dead", netip.Addr{}, holder, "%s and no DEL came", why)
		return nil
	}
	if e.NetnsID == "" {
		c.add("interface", netip.Addr{}, holder, "%s", notInContainer)
		return nil
	}
	err := netns.Do(e.Netns, func() error {
		inside, err := openInterfaces()
		if err != nil {
			return err
		}
		defer inside.close()
		index, err := inside.index(e.Interface())
		if err == nil && index == 0 {
			c.add("interface", netip.Addr{}, holder, "%s is not in the container", e.Interface())
		}
		return err
	})
	if err != nil {
		return err
	}
	index, err := c.ifs.index(e.HostIfName)
	if err != nil {
		return err
	}
	if index == 0 {
		c.add("interface", netip.Addr{}, holder, "%s is not on the host", e.HostIfName)
		return nil
	}
	if c.maps == nil {
		return nil
	}
	if err := commit.CheckPod(c.maps, commit.PodOf(e, index)); err != nil {
		c.add("map", netip.Addr{}, holder, "%v", err)
	}
	if _, err := loader.Attached(c.dir, e.HostIfName, index); err != nil {
		c.add("program", netip.Addr{}, holder, "%v", err)
	}
	return nil
}

// strays finds what the kernel holds without a record, and blocks that the dataplane does not know.
func (c *checking) strays(all []node.Endpoint, blocks []node.Block) error {
	names := make(map[string]bool)
	addrs := make(map[netip.Addr]bool)
	for _, e := range all {
		names[e.HostIfName] = true
		for _, a := range e.Addrs {
			addrs[a] = true
		}
	}
	for _, p := range c.pods {
		name, err := c.ifs.name(p.IfIndex)
		switch {
		case err != nil:
			return err
		case name == "" && slices.ContainsFunc(p.Addresses, func(a netip.Addr) bool { return addrs[a] }):
			// Its endpoint was found dead, or without its interface.
		case name == "":
			c.add("map", netip.Addr{}, "", "caracal_pods has interface %d (%s), which is gone", p.IfIndex, join(p.Addresses))
		case !names[name]:
			c.add("map", netip.Addr{}, "", "caracal_pods has %s (%s), which no endpoint is recorded for", name, join(p.Addresses))
		}
	}
	holes := make(map[netip.Prefix]bool)
	for _, r := range c.routes {
		holes[r.Prefix] = r.Kind == maps.RouteBlackhole
		if r.Kind == maps.RouteLocalPod && !addrs[r.Prefix.Addr()] {
			c.add("map", r.Prefix.Addr(), "", "caracal_routes sends it to interface %d, but no endpoint has it", r.IfIndex)
		}
	}
	// The first ADD in a block makes its route; a block of other main plugins has none.
	for _, b := range blocks {
		has := slices.ContainsFunc(all, func(e node.Endpoint) bool {
			return time.Since(e.Created).Abs() > underway && slices.ContainsFunc(e.Addrs, b.CIDR.Contains)
		})
		if has && !holes[b.CIDR] {
			c.add("map", netip.Addr{}, "", "caracal_routes has no blackhole for block %s", b.CIDR)
		}
	}
	for _, name := range c.links {
		if !names[name] {
			c.add("pin", netip.Addr{}, "", "a link to %s is pinned, which no endpoint is recorded for", name)
		}
	}
	return nil
}
