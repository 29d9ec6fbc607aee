package ctl

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/bpf"
	"github.com/caracal-net/caracal/cni"
	"github.com/caracal-net/caracal/docker"
	"github.com/caracal-net/caracal/internal/atomicfile"
	"github.com/caracal-net/caracal/internal/fib"
	"github.com/caracal-net/caracal/internal/nl"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
)

// stateFiles are what Caracal keeps in its state directory.
var stateFiles = []string{
	"node.db", "node.db.new", "node.boot", "node.boot.new", "node.broken", "node.db.lock", "settle.lock", "agent.lock", "lock", cni.AdoptLock,
	"store.db", "store.db.new", "store.db.lock", "policy.db", "policy.db.new", "policy.db.lock", "policy.broken", "policy.lock", agent.DeferredNetwork, agent.Picture, agent.PictureNew,
}

// removal is one thing that uninstall removed, or would.
type removal struct {
	Kind string `json:"kind"` // pod, interface, route, firewall, pins, sysctl, file, directory, network, plugin, agent, unit
	Name string `json:"name"`
}

// uninstalled is what uninstall did.
type uninstalled struct {
	DryRun  bool      `json:"dryRun"`
	Removed []removal `json:"removed"`
}

func newUninstallCommand(g *globals) *cobra.Command {
	o := &uninstallOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Remove everything that Caracal has made on this node",
		Long: `uninstall removes what Caracal has made on this node: the pods' interfaces, kernel routes, its rules in the firewall for Docker, pinned programs, links and
maps, and the state directory's files; and it puts the recorded sysctls back. Of what install has put in place it removes the
network first, so that runtimes start no more pods with it, and the plugins, the agent and its unit last. A file of one of
these names that is not Caracal's stays, and is named, and so does a network under another name than --conf-name. Log files, /etc/caracal and what the datastore holds stay.

It refuses while pods are attached (they would lose their network) or an agent runs (it would make all again), unless --force is
given. What is gone already is no error, so it can be repeated.`,
		Example: `  caracalctl uninstall --dry-run
  caracalctl uninstall
  caracalctl uninstall --force`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return o.run(cmd) },
	}
	cmd.Flags().BoolVar(&o.force, "force", false, "also while pods are attached or an agent runs, or when node.db can't be read")
	cmd.Flags().StringVar(&o.binDir, "bin-dir", FromEnv("CNI_BIN_DIR", defaultBinDir), "`DIR` that holds the plugins (env CNI_BIN_DIR)")
	cmd.Flags().StringVar(&o.confDir, "conf-dir", FromEnv("CNI_NET_DIR", defaultConfDir), "`DIR` that holds the network (env CNI_NET_DIR)")
	cmd.Flags().StringVar(&o.confName, "conf-name", FromEnv("CNI_CONF_NAME", defaultConfName), "`NAME` of the network's file (env CNI_CONF_NAME)")
	cmd.Flags().BoolVar(&o.dryRun, "dry-run", false, "only say what would be removed")
	return cmd
}

type uninstallOptions struct {
	*globals
	force, dryRun             bool
	binDir, confDir, confName string

	pods    []node.Endpoint
	sysctls []string
	removed []removal
}

func (o *uninstallOptions) run(cmd *cobra.Command) error {
	if os.Geteuid() != 0 {
		return errors.New("uninstall takes root")
	}
	if err := o.plan(cmd); err != nil {
		return err
	}
	err := o.remove(cmd)
	t := newTable("KIND", "NAME")
	for _, r := range o.removed {
		t.add(r.Kind, r.Name)
	}
	if o.removed == nil {
		o.removed = []removal{}
	}
	if o.output == formatTable {
		switch {
		case len(o.removed) == 0 && err == nil:
			fmt.Fprintln(cmd.OutOrStdout(), "nothing of Caracal is on this node")
			return nil
		case o.dryRun:
			fmt.Fprintln(cmd.OutOrStdout(), "would remove:")
		default:
			fmt.Fprintln(cmd.OutOrStdout(), "removed:")
		}
	}
	return errors.Join(err, o.print(cmd, uninstalled{o.dryRun, o.removed}, t))
}

// plan reads what node.db records, and refuses.
func (o *uninstallOptions) plan(cmd *cobra.Command) error {
	if err := o.ownPins(); err != nil {
		return err
	}
	err := o.view(cmd.Context(), func(tx *node.Tx) error {
		other, err := o.otherBoot(tx)
		if err != nil {
			return err
		}
		if other {
			if o.pinned() {
				return o.sameBoot(tx)
			}
			return nil // records, sysctls and interfaces of an earlier boot are gone
		}
		err = tx.Settings(cni.SysctlSetting, func(name, value string) error {
			o.sysctls = append(o.sysctls, strings.TrimPrefix(name, cni.SysctlSetting)+" = "+value)
			return nil
		})
		if err != nil {
			return err
		}
		o.pods, err = tx.AllEndpoints()
		return err
	})
	switch {
	case errors.Is(err, node.ErrNoDatabase):
	case errors.Is(err, node.ErrCorrupt) && o.force:
		warn(cmd, "%v; going by the kernel maps alone, and sysctls stay as they are", err)
	case errors.Is(err, node.ErrCorrupt):
		return fmt.Errorf("%w; with --force uninstall goes by the kernel maps alone", err)
	case err != nil:
		return err
	}
	if err := o.atHome(); err != nil {
		return err
	}
	if _, err := agentStatus(cmd.Context(), o.socket); err == nil && !o.force && !o.dryRun {
		return errors.New("an agent runs here, which would make it all again: stop it first (systemctl disable --now caracald), or use --force")
	}
	if len(o.pods) > 0 && !o.force && !o.dryRun {
		names := make([]string, 0, 4)
		for _, e := range o.pods {
			if names = append(names, recorded(e).title()); len(names) == 4 && len(o.pods) > 4 {
				names[3] = "..."
				break
			}
		}
		out := "remove them first"
		if slices.ContainsFunc(o.pods, func(e node.Endpoint) bool { return e.Adopted }) {
			out += ", give Calico's back (caracalctl adopt --undo)"
		}
		return fmt.Errorf("%d pods are attached (%s): %s, or take their network away with --force", len(o.pods), strings.Join(names, ", "), out)
	}
	return nil
}

// atHome refuses where no living pod's interface is: uninstall would leave the interfaces behind, without programs.
func (o *uninstallOptions) atHome() error {
	ifs, err := openInterfaces()
	if err != nil {
		return err
	}
	defer ifs.close()
	away := ""
	for _, e := range o.pods {
		if dead(e) != "" {
			continue
		}
		index, err := ifs.index(e.HostIfName)
		if err != nil || index != 0 {
			return err
		}
		away = e.HostIfName
	}
	if away != "" {
		return fmt.Errorf("interface %s is not in this network namespace, nor is another one of a living pod: run caracalctl in the node's (nsenter --net), or remove the pods with their runtime", away)
	}
	return nil
}

// ownPins refuses a bpffs directory that holds anything but our own.
func (o *uninstallOptions) ownPins() error {
	entries, err := os.ReadDir(o.bpffsDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list pins: %w", err)
	}
	if err := loader.CheckBPFFS(o.bpffsDir); err != nil {
		return fmt.Errorf("--bpffs-dir: %w", err)
	}
	own := map[string]bool{bpf.ProgramsDir(o.bpffsDir): true, bpf.LinksDir(o.bpffsDir): true}
	for name := range bpf.Maps(&bpf.DataplaneObjects{}) {
		own[bpf.MapPath(o.bpffsDir, name)] = true
	}
	for _, e := range entries {
		if path := filepath.Join(o.bpffsDir, e.Name()); !own[path] {
			return fmt.Errorf("%s is not Caracal's: is --bpffs-dir another one? Otherwise remove it, then repeat uninstall", path)
		}
	}
	return nil
}

// remove goes on after an error and returns all, but keeps the records while anything that they name may be left.
func (o *uninstallOptions) remove(cmd *cobra.Command) error {
	installed := o.installed()
	o.warnOfNetworks(cmd)
	if err := o.removeFiles(cmd, installed, "network"); err != nil {
		return err
	}
	errs := []error{o.removePods(cmd), o.removeStrays(), o.removeTunnel()}
	errs = append(errs, o.removeRoutes(), o.removeFirewall(cmd.Context()))
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if err := o.restoreSysctls(cmd.Context()); err != nil {
		return err
	}
	unlock, err := o.alone(cmd.Context())
	if err != nil {
		return err
	}
	defer unlock()
	if err := o.removePins(); err != nil {
		return err
	}
	if err := o.removeState(cmd); err != nil {
		return err
	}
	return o.removeFiles(cmd, installed, "plugin", "unit", "agent")
}

// removeFirewall removes the rules that the agent has added for Docker's containers.
func (o *uninstallOptions) removeFirewall(ctx context.Context) error {
	rules, err := docker.RemoveForwarding(ctx, o.dryRun)
	for _, r := range rules {
		o.did("firewall", r)
	}
	return err
}

// installed are the files that install may have put in place: links before what they link to.
func (o *uninstallOptions) installed() []item {
	all := []item{{Kind: "network", Name: filepath.Join(o.confDir, o.confName)}}
	for _, name := range append(slices.Clone(calicoNames), "caracal-ipam", "caracal") {
		all = append(all, item{Kind: "plugin", Name: filepath.Join(o.binDir, name)})
	}
	if ownUnit(unitFile) { // else whoever put the agent there has other plans with it
		all = append(all, item{Kind: "unit", Name: unitFile})
		for _, name := range []string{"caracalctl", "caracald"} {
			all = append(all, item{Kind: "agent", Name: filepath.Join(agentDir, name)})
		}
	}
	// Now, while the plugins are there to tell whose a network of Calico's is.
	for n := range all {
		if _, err := os.Lstat(all[n].Name); err == nil && !ours(all[n], o.binDir) {
			all[n].Done = doneKept
		}
	}
	return all
}

// warnOfNetworks tells of networks that stay under other names and call the plugins that go.
func (o *uninstallOptions) warnOfNetworks(cmd *cobra.Command) {
	entries, err := os.ReadDir(o.confDir)
	if err != nil {
		return // none is there
	}
	for _, e := range entries {
		path := filepath.Join(o.confDir, e.Name())
		if e.Name() != o.confName && slices.Contains(networkExtensions, filepath.Ext(e.Name())) && ownNetwork(path, o.binDir) {
			warn(cmd, "%s stays, and calls plugins that go: remove it too (rm %s)", path, path)
		}
	}
}

// removeFiles removes what install has put in place, of some kinds.
func (o *uninstallOptions) removeFiles(cmd *cobra.Command, files []item, kinds ...string) error {
	for _, i := range files {
		if !slices.Contains(kinds, i.Kind) {
			continue
		}
		if _, err := os.Lstat(i.Name); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if i.Done == doneKept {
			warn(cmd, "%s stays: it is not Caracal's", i.Name)
			continue
		}
		if !o.dryRun {
			if err := os.Remove(i.Name); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("remove what was installed: %w", err)
			}
		}
		o.did(i.Kind, i.Name)
	}
	if !o.dryRun {
		return o.sweep()
	}
	return nil
}

// sweep removes what an install that was killed has left.
func (o *uninstallOptions) sweep() error {
	for _, dir := range []string{o.confDir, o.binDir} {
		d, err := atomicfile.Open(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = d.Close()
		}
		if err != nil {
			return fmt.Errorf("remove what was installed: %w", err)
		}
	}
	return nil
}

// alone takes the node lock and makes sure that no pod came meanwhile. An ADD that has not recorded its pod yet fails
// when the programs are gone, and leaves nothing.
func (o *uninstallOptions) alone(ctx context.Context) (unlock func(), err error) {
	if _, err := os.Stat(o.stateDir); o.dryRun || errors.Is(err, fs.ErrNotExist) {
		return func() {}, nil
	}
	lock, err := o.lock(ctx)
	if err != nil {
		return nil, err
	}
	err = o.view(ctx, func(tx *node.Tx) error {
		if other, err := o.otherBoot(tx); err != nil || other {
			return err
		}
		all, err := tx.AllEndpoints()
		if err == nil && len(all) > 0 {
			err = fmt.Errorf("pod %s was added meanwhile: stop the runtime, then repeat uninstall", recorded(all[0]).title())
		}
		return err
	})
	if err != nil && !errors.Is(err, node.ErrNoDatabase) && !errors.Is(err, node.ErrCorrupt) {
		lock.Unlock()
		return nil, err
	}
	return func() { lock.Unlock() }, nil
}

// did notes a removal.
func (o *uninstallOptions) did(kind, name string) { o.removed = append(o.removed, removal{kind, name}) }

func (o *uninstallOptions) removePods(cmd *cobra.Command) error {
	var errs []error
	for _, e := range o.pods {
		if !o.dryRun {
			if err := o.removePod(cmd.Context(), e); err != nil {
				errs = append(errs, err)
				continue
			}
			if left := foreignIPAM(e); left != "" {
				warn(cmd, "%s", left)
			}
		}
		o.did("pod", fmt.Sprintf("%s (%s, %s)", recorded(e).title(), e.HostIfName, join(e.Addrs)))
	}
	return errors.Join(errs...)
}

// removeStrays removes the interfaces that the maps know and that carry our programs, but that no record names.
func (o *uninstallOptions) removeStrays() error {
	m, err := maps.Open(o.bpffsDir)
	if errors.Is(err, maps.ErrNotLoaded) {
		return nil
	}
	if err != nil {
		return o.explainBPF(err)
	}
	defer m.Close()
	pods, err := m.Pods()
	if err != nil {
		return err
	}
	ifs, err := openInterfaces()
	if err != nil {
		return err
	}
	defer ifs.close()
	recorded := make(map[string]bool)
	for _, e := range o.pods {
		recorded[e.HostIfName] = true
	}
	var errs []error
	for _, p := range pods {
		name, err := ifs.name(p.IfIndex)
		if err != nil || name == "" || recorded[name] {
			errs = append(errs, err)
			continue
		}
		if _, err := loader.Attached(o.bpffsDir, name, int(p.IfIndex)); err != nil {
			continue // not ours
		}
		if !o.dryRun {
			if err := cni.Reap([]string{strconv.Itoa(int(p.IfIndex)), join(p.Addresses)}); err != nil {
				errs = append(errs, err)
				continue
			}
		}
		o.did("interface", name)
	}
	return errors.Join(errs...)
}

// removeTunnel removes the VXLAN interface that an agent has made.
func (o *uninstallOptions) removeTunnel() error {
	l, err := netlink.LinkByName(cni.TunnelName)
	if nl.IsNotFound(err) || err == nil && l.Attrs().Group != cni.LinkGroup {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for %s: %w", cni.TunnelName, err)
	}
	if !o.dryRun {
		if err := netlink.LinkDel(l); err != nil {
			return fmt.Errorf("remove %s: %w", cni.TunnelName, err)
		}
	}
	o.did("interface", cni.TunnelName)
	return nil
}

func (o *uninstallOptions) removeRoutes() error {
	routes, err := fib.Routes(cni.RouteProtocol)
	if err != nil {
		return err
	}
	own := make(map[netip.Addr]bool) // those go with the pods
	for _, e := range o.pods {
		for _, a := range e.Addrs {
			own[a] = true
		}
	}
	if !o.dryRun {
		if err := fib.Remove(cni.RouteProtocol); err != nil {
			return err
		}
	}
	for _, r := range routes {
		if !r.IsSingleIP() || !own[r.Addr()] {
			o.did("route", r.String())
		}
	}
	return nil
}

func (o *uninstallOptions) restoreSysctls(ctx context.Context) error {
	if !o.dryRun && len(o.sysctls) > 0 {
		err := o.view(ctx, func(tx *node.Tx) error {
			_, err := cni.RestoreSysctls(tx)
			return err
		})
		if err != nil {
			return err
		}
	}
	for _, s := range o.sysctls {
		o.did("sysctl", s)
	}
	return nil
}

// removePins removes the node's directory in bpffs, and what loading left beside it when it was killed.
func (o *uninstallOptions) removePins() error {
	if loader.CheckBPFFS(filepath.Dir(o.bpffsDir)) != nil {
		return nil // then nothing was ever pinned there
	}
	there := o.pinned()
	if !o.dryRun {
		if err := loader.Unload(o.bpffsDir); err != nil {
			return err
		}
	}
	if there {
		o.did("pins", o.bpffsDir)
	}
	return nil
}

func (o *uninstallOptions) removeState(cmd *cobra.Command) error {
	for _, name := range stateFiles {
		path := filepath.Join(o.stateDir, name)
		if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if !o.dryRun {
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("remove state: %w", err)
			}
		}
		o.did("file", path)
	}
	entries, err := os.ReadDir(o.stateDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove state: %w", err)
	}
	for _, e := range entries {
		if !o.dryRun || !slices.Contains(stateFiles, e.Name()) {
			warn(cmd, "%s stays: %s is not Caracal's", o.stateDir, e.Name())
			return nil
		}
	}
	if !o.dryRun {
		err := os.Remove(o.stateDir)
		if errors.Is(err, unix.EBUSY) {
			warn(cmd, "%s stays: something is mounted there", o.stateDir)
			return nil
		}
		if err != nil {
			return fmt.Errorf("remove state: %w", err)
		}
	}
	o.did("directory", o.stateDir)
	return nil
}
