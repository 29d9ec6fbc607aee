package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/enforce"
	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/internal/nl"
	"github.com/caracal-net/caracal/internal/tc"
	"github.com/caracal-net/caracal/ipam"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
)

// DefaultCacheDir is where runtimes' libcni remembers what it has added (libcni.CacheDir).
const DefaultCacheDir = "/var/lib/cni"

// ErrAdopting says that another process adopts pods on this node.
var ErrAdopting = errors.New("another adopt is at work on this node")

// Adoption takes over the pods that Calico's plugin has attached on this host, as they are: the veth pair, its addresses and the
// pod's routes stay, and so do its connections.
type Adoption struct {
	CacheDir    string // libcni's
	StateDir    string
	BPFFSDir    string
	BootIDFile  string
	AgentSocket string
	Node        string                  // the node's name in the store
	Pools       []api.IPPool            // the cluster's; none: those of each pod's configuration
	Claims      map[netip.Prefix]string // who has which block, as the store says
	Step        func(name string) error // as Plugin.Step
	Log         *slog.Logger

	left []netip.Addr // of the pods that Find has found and that are not adopted
}

// CalicoPod is one attachment that Calico's plugin has made.
type CalicoPod struct {
	Endpoint node.Endpoint
	Adopted  bool   // it is Caracal's already, and complete
	Problem  string // why it can't be adopted; "": it can

	c     *Config
	env   *Env
	pools []api.IPPool
}

// cached is an entry of libcni's cache (libcni/api.go, cachedInfo).
type cached struct {
	Kind           string                     `json:"kind"`
	ContainerID    string                     `json:"containerId"`
	Config         []byte                     `json:"config"`
	IfName         string                     `json:"ifName"`
	NetworkName    string                     `json:"networkName"`
	CNIArgs        [][2]string                `json:"cniArgs"`
	CapabilityArgs map[string]json.RawMessage `json:"capabilityArgs"`
	Result         json.RawMessage            `json:"result"`
}

// Find lists Calico's pods, sorted by key, and says what stands in the way of each. It changes nothing. stray are interfaces that
// look like Calico's, of which no runtime knows.
func (a *Adoption) Find(ctx context.Context) (pods []*CalicoPod, stray []string, err error) {
	entries, err := a.cache()
	if err != nil {
		return nil, nil, err
	}
	host, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, nil, fmt.Errorf("open rtnetlink: %w", err)
	}
	defer host.Close()
	spaces, err := namespaces()
	if err != nil {
		return nil, nil, err
	}
	known := make(map[string]bool)
	for _, entry := range entries {
		conf, ok := calicoConfig(entry)
		if !ok {
			continue
		}
		p := &CalicoPod{Endpoint: node.Endpoint{Key: node.Key{Network: entry.NetworkName, ContainerID: entry.ContainerID, IfName: entry.IfName}}}
		if err := a.look(host, spaces, p, entry, conf); err != nil {
			p.Problem = err.Error()
		}
		known[p.Endpoint.HostIfName] = true
		pods = append(pods, p)
	}
	if err := a.compare(ctx, pods); err != nil {
		return nil, nil, err
	}
	for _, p := range pods {
		if !p.Adopted {
			a.left = append(a.left, p.Endpoint.Addrs...)
		}
	}
	links, err := nl.Dump(host.LinkList)
	if err != nil {
		return nil, nil, fmt.Errorf("list interfaces: %w", err)
	}
	for _, l := range links {
		if name := l.Attrs().Name; l.Type() == "veth" && strings.HasPrefix(name, "cali") && !ours(l) && !known[name] {
			stray = append(stray, name)
		}
	}
	slices.Sort(stray)
	slices.SortFunc(pods, func(x, y *CalicoPod) int {
		return strings.Compare(x.Endpoint.Key.String(), y.Endpoint.Key.String())
	})
	return pods, stray, nil
}

// Unadopted lists the interfaces of Calico's pods that Caracal has not taken over: pairs of its name to which a host route leads.
func Unadopted() ([]string, error) {
	links, err := nl.Dump(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	names := make(map[int]string)
	for _, l := range links {
		if name := l.Attrs().Name; l.Type() == "veth" && strings.HasPrefix(name, "cali") && !ours(l) {
			names[l.Attrs().Index] = name
		}
	}
	if len(names) == 0 {
		return nil, nil
	}
	routes, err := nl.Dump(func() ([]netlink.Route, error) { return netlink.RouteList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	var found []string
	for _, r := range routes {
		name := names[r.LinkIndex]
		if name == "" || r.Dst == nil || slices.Contains(found, name) {
			continue
		}
		if ones, bits := r.Dst.Mask.Size(); ones == bits {
			found = append(found, name)
		}
	}
	slices.Sort(found)
	return found, nil
}

// cache reads what libcni remembers.
func (a *Adoption) cache() ([]cached, error) {
	dir := filepath.Join(a.CacheDir, "results")
	files, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list libcni's cache: %w", err)
	}
	var entries []cached
	for _, f := range files {
		text, err := os.ReadFile(filepath.Join(dir, f.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // its pod was just removed
		}
		if err != nil {
			return nil, fmt.Errorf("read libcni's cache: %w", err)
		}
		if entry, ok := parseCached(text); ok {
			entries = append(entries, entry)
		}
	}
	return entries, nil
}

// parseCached reads an entry; false: it is none of a libcni since 0.7.2, which say whose they are.
func parseCached(text []byte) (cached, bool) {
	var entry cached
	if json.Unmarshal(text, &entry) != nil || entry.Kind != "cniCacheV1" {
		return entry, false
	}
	return entry, validName(entry.NetworkName) && validName(entry.ContainerID) && validIfName(entry.IfName)
}

// calicoConfig is the configuration of Calico's plugin with which an entry was added, as the plugin got it; false: it was another one.
func calicoConfig(entry cached) (json.RawMessage, bool) {
	var list struct {
		CNIVersion string                       `json:"cniVersion"`
		Plugins    []map[string]json.RawMessage `json:"plugins"`
	}
	var single map[string]json.RawMessage
	if json.Unmarshal(entry.Config, &list) != nil {
		return nil, false
	}
	if list.Plugins == nil && json.Unmarshal(entry.Config, &single) == nil {
		list.Plugins = append(list.Plugins, single)
	}
	for _, plugin := range list.Plugins {
		if string(plugin["type"]) != `"calico"` {
			continue
		}
		plugin["name"], _ = json.Marshal(entry.NetworkName) // of strings, and of what was JSON
		plugin["cniVersion"], _ = json.Marshal(list.CNIVersion)
		runtimeConfig := make(map[string]json.RawMessage)
		var declared map[string]bool
		_ = json.Unmarshal(plugin["capabilities"], &declared)
		for name, value := range entry.CapabilityArgs {
			if declared[name] || name == "bandwidth" { // Calico's pods are shaped by a later plugin without its knowing
				runtimeConfig[name] = value
			}
		}
		plugin["runtimeConfig"], _ = json.Marshal(runtimeConfig)
		conf, err := json.Marshal(plugin)
		return conf, err == nil
	}
	return nil, false
}

// look completes what an entry of the cache says by what is on the host. The error says why it can't be adopted.
func (a *Adoption) look(host *netlink.Handle, spaces map[int]string, p *CalicoPod, entry cached, conf json.RawMessage) error {
	e := &p.Endpoint
	c, err := ParseConfig(conf)
	if err != nil {
		return fmt.Errorf("the configuration that it was added with: %w", err)
	}
	c.StateDir, c.BPFFSDir, c.BootIDFile, c.AgentSocket = a.StateDir, a.BPFFSDir, a.BootIDFile, a.AgentSocket
	if c.NodeName = a.Node; a.Node == "" {
		c.NodeName = hostname()
	}
	p.c, p.env = c, &Env{Command: "ADD", ContainerID: entry.ContainerID, IfName: entry.IfName, Args: make(map[string]string)}
	for _, pair := range entry.CNIArgs {
		p.env.Args[pair[0]] = pair[1]
	}
	result, err := version.NewResult(c.CNIVersion, entry.Result)
	if err != nil {
		return fmt.Errorf("the result in libcni's cache: %w", err)
	}
	r, err := types100.NewResultFromResult(result)
	if err != nil {
		return fmt.Errorf("the result in libcni's cache: %w", err)
	}
	*e = node.Endpoint{
		Key: e.Key, Shaped: c.shaped(), PodName: p.env.Args["K8S_POD_NAME"], PodNamespace: p.env.Args["K8S_POD_NAMESPACE"], PodUID: p.env.Args["K8S_POD_UID"],
		Labels: c.labels(), IPAM: ipam.Name, IPMasq: bool(c.IPMasq), Adopted: true,
	}
	if !c.ownIPAM() {
		e.IPAM = c.IPAM.Type
	}
	for _, ip := range r.IPs {
		if addr, ok := netip.AddrFromSlice(ip.Address.IP); ok {
			e.Addrs = append(e.Addrs, addr.Unmap())
		}
	}
	if len(e.Addrs) == 0 || len(e.Addrs) > maps.PodAddresses {
		return fmt.Errorf("it has %d addresses: between 1 and %d are possible", len(e.Addrs), maps.PodAddresses)
	}
	slices.SortStableFunc(e.Addrs, func(x, y netip.Addr) int { return x.BitLen() - y.BitLen() })
	l, err := hostEnd(host, r, e.Addrs[0])
	if err != nil {
		return err
	}
	e.HostIfName, e.HostMAC = l.Attrs().Name, l.Attrs().HardwareAddr.String()
	if err := a.lookInside(host, spaces, p, l); err != nil {
		return err
	}
	return a.assignable(p)
}

// hostEnd finds the host's end of a pod's pair: as the result names it, else by the pod's route.
func hostEnd(host *netlink.Handle, r *types100.Result, addr netip.Addr) (netlink.Link, error) {
	name := ""
	for _, i := range r.Interfaces {
		if i.Sandbox == "" && strings.HasPrefix(i.Name, "cali") {
			name = i.Name
		}
	}
	var l netlink.Link
	var err error
	if name != "" {
		l, err = host.LinkByName(name)
	} else {
		routes, rerr := host.RouteGet(addr.AsSlice())
		if rerr != nil || len(routes) == 0 || routes[0].Gw != nil {
			return nil, fmt.Errorf("the host has no route to %s, nor does the result name its interface: its pod is gone; remove it by its runtime", addr)
		}
		l, err = host.LinkByIndex(routes[0].LinkIndex)
	}
	if nl.IsNotFound(err) {
		return nil, fmt.Errorf("interface %s is not there: its pod is gone; remove it by its runtime", name)
	}
	if err != nil {
		return nil, fmt.Errorf("look for the interface: %w", err)
	}
	if l.Type() != "veth" || !strings.HasPrefix(l.Attrs().Name, "cali") {
		return nil, fmt.Errorf("interface %s is a %s, not a veth of Calico's", l.Attrs().Name, l.Type())
	}
	if l.Attrs().Flags&net.FlagUp == 0 {
		return nil, fmt.Errorf("interface %s is down", l.Attrs().Name)
	}
	filters, err := nl.Dump(func() ([]netlink.Filter, error) { return host.FilterList(l, netlink.HANDLE_MIN_INGRESS) })
	if err != nil {
		return nil, fmt.Errorf("list filters of %s: %w", l.Attrs().Name, err)
	}
	for _, f := range filters {
		if b, ok := f.(*netlink.BpfFilter); ok && strings.HasPrefix(b.Name, "cali") {
			return nil, fmt.Errorf("%s has programs of Calico's eBPF dataplane: switch it off first (bpfEnabled: false in its FelixConfiguration)", l.Attrs().Name)
		}
	}
	return l, nil
}

// namespaces are paths of the network namespaces in use, by the number that this one has for them.
func namespaces() (map[int]string, error) {
	var paths []string
	for _, pattern := range []string{"/run/netns/*", "/var/run/netns/*", "/run/docker/netns/*", "/proc/[0-9]*/ns/net"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			return nil, err
		}
		paths = append(paths, found...)
	}
	spaces := make(map[int]string)
	seen := make(map[uint64]bool)
	for _, path := range paths {
		ns, err := netns.Open(path)
		if err != nil {
			continue // its process has ended, or it is none
		}
		inode, err := ns.Inode()
		if err == nil && !seen[inode] {
			seen[inode] = true
			if id, err := netlink.GetNetNsIdByFd(ns.FD()); err == nil && id >= 0 {
				spaces[id] = path
			}
		}
		ns.Close()
	}
	return spaces, nil
}

// lookInside compares the pod's end with what the runtime was told.
func (a *Adoption) lookInside(host *netlink.Handle, spaces map[int]string, p *CalicoPod, l netlink.Link) error {
	e := &p.Endpoint
	path, ok := spaces[l.Attrs().NetNsID]
	if !ok {
		return fmt.Errorf("the namespace behind %s is neither in /run/netns nor a process's", l.Attrs().Name)
	}
	p.env.Netns, e.Netns = path, path
	ns, err := netns.Open(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	inode, err := ns.Inode()
	if err != nil {
		return err
	}
	e.NetnsID = fmt.Sprint(inode)
	sides, err := openSides(ns)
	if err != nil {
		return err
	}
	defer sides.Close()
	pod, err := sides.pod.LinkByName(e.IfName)
	if err != nil {
		return fmt.Errorf("the pod's %s: %w", e.IfName, err)
	}
	if pod.Attrs().Index != l.Attrs().ParentIndex || pod.Attrs().Flags&net.FlagUp == 0 {
		return fmt.Errorf("%s in the pod is down, or not the other end of %s", e.IfName, l.Attrs().Name)
	}
	e.MAC, e.MTU = pod.Attrs().HardwareAddr.String(), pod.Attrs().MTU
	addrs, err := nl.Dump(func() ([]netlink.Addr, error) { return sides.pod.AddrList(pod, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("list addresses in the pod: %w", err)
	}
	for _, want := range e.Addrs {
		if !slices.ContainsFunc(addrs, func(x netlink.Addr) bool { return x.IP.Equal(net.IP(want.AsSlice())) }) {
			return fmt.Errorf("the pod does not have address %s", want)
		}
		routes, err := host.RouteGet(want.AsSlice())
		if err != nil || len(routes) == 0 || routes[0].LinkIndex != l.Attrs().Index {
			return fmt.Errorf("the host does not route %s to %s", want, l.Attrs().Name)
		}
	}
	return nil
}

// assignable finds the pool and the block of each address, and that the block is this node's or nobody's.
func (a *Adoption) assignable(p *CalicoPod) error {
	if !p.c.ownIPAM() {
		return nil
	}
	p.pools = a.Pools
	if len(p.pools) == 0 {
		cfg, err := p.c.pools()
		if err != nil {
			return err
		}
		if cfg.Cluster {
			return errors.New("the store has no pools: import Calico's first (caracalctl import)")
		}
		if p.pools, err = cfg.Effective(); err != nil {
			return err
		}
	}
	e := &p.Endpoint
	for _, addr := range e.Addrs {
		block, pool, err := blockIn(p.pools, addr)
		if err != nil {
			return err
		}
		if owner, claimed := a.Claims[block]; claimed && owner != p.c.NodeName {
			return fmt.Errorf("address %s is of a block of node %s, not of %s: recreate the pod", addr, owner, p.c.NodeName)
		}
		e.Masquerade4 = e.Masquerade4 || addr.Is4() && (pool.NATOutgoing || e.IPMasq)
		e.Masquerade6 = e.Masquerade6 || addr.Is6() && (pool.NATOutgoing || e.IPMasq)
	}
	return nil
}

func blockIn(pools []api.IPPool, addr netip.Addr) (netip.Prefix, api.IPPool, error) {
	for _, pool := range pools {
		if pool.CIDR.Contains(addr) {
			return netip.PrefixFrom(addr, pool.BlockSize).Masked(), pool, nil
		}
	}
	return netip.Prefix{}, api.IPPool{}, fmt.Errorf("address %s is in no pool: import Calico's pools first (caracalctl import)", addr)
}

// compare finds what node.db and the maps have of the pods, and what contradicts.
func (a *Adoption) compare(ctx context.Context, pods []*CalicoPod) error {
	db, err := node.OpenReadOnly(ctx, a.StateDir, node.Options{BootIDFile: a.BootIDFile})
	if errors.Is(err, node.ErrNoDatabase) {
		return nil
	}
	if err != nil {
		return err
	}
	defer db.Close()
	boot, err := node.Options{BootIDFile: a.BootIDFile}.BootID()
	if err != nil {
		return err
	}
	return db.View(func(tx *node.Tx) error {
		if tx.Boot() != boot {
			return nil // all that it records is gone
		}
		for _, p := range pods {
			if p.Problem != "" {
				continue
			}
			if err := a.recorded(tx, p); err != nil {
				p.Problem = err.Error()
			}
		}
		return nil
	})
}

// recorded compares one pod with the record. A problem is an error.
func (a *Adoption) recorded(tx *node.Tx, p *CalicoPod) error {
	e := &p.Endpoint
	for _, addr := range e.Addrs {
		owner, err := tx.Owner(addr)
		if errors.Is(err, node.ErrNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		if owner != e.Key {
			return fmt.Errorf("address %s is held by %s here: one of the two must be recreated", addr, owner)
		}
	}
	if other, err := tx.EndpointByHostIfName(e.HostIfName); err == nil && other.Key != e.Key {
		return fmt.Errorf("interface %s is %s's here", e.HostIfName, other.Key)
	}
	old, err := tx.Endpoint(e.Key)
	if errors.Is(err, node.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if !old.Adopted {
		p.Adopted = true // it was added with Caracal's plugin under Calico's name
		*e = old
		return nil
	}
	e.Created, e.Labels = old.Created, old.Labels
	p.Adopted = a.complete(p)
	return nil
}

// complete tells whether all that Take makes is there.
func (a *Adoption) complete(p *CalicoPod) bool {
	e := p.Endpoint
	l, err := netlink.LinkByName(e.HostIfName)
	if err != nil || !ours(l) {
		return false
	}
	if _, err := loader.Attached(a.BPFFSDir, e.HostIfName, l.Attrs().Index); err != nil {
		return false
	}
	m, err := maps.Open(a.BPFFSDir)
	if err != nil {
		return false
	}
	defer m.Close()
	return commit.CheckPod(m, commit.PodOf(e, l.Attrs().Index)) == nil
}

// Lock keeps other adoptions of the node away. ErrAdopting when there is one.
func (a *Adoption) Lock() (*node.Lock, error) {
	lock, err := node.TryLock(a.StateDir, AdoptLock)
	if errors.Is(err, node.ErrLocked) {
		return nil, ErrAdopting
	}
	return lock, err
}

// AdoptLock is the file in the state directory that an adoption locks.
const AdoptLock = "adopt.lock"

// LearnPolicy puts policy in force as these resources say, so that adopted pods are under it from the beginning. It leaves that to an
// agent that runs, and has nothing to do where nothing is said.
func (a *Adoption) LearnPolicy(ctx context.Context, resources []api.Resource) error {
	if len(resources) == 0 {
		return nil
	}
	if err := prepareBPFFS(a.BPFFSDir); err != nil {
		return err
	}
	c := &Config{StateDir: a.StateDir, BPFFSDir: a.BPFFSDir, BootIDFile: a.BootIDFile, NodeName: a.Node}
	if err := loader.Ensure(c.loaderConfig()); err != nil {
		return err
	}
	m, err := maps.Open(a.BPFFSDir)
	if err != nil {
		return err
	}
	defer m.Close()
	p, err := enforce.Load(ctx, enforce.Config{Dir: a.StateDir, Maps: m, Node: a.Node, Log: a.Log})
	if errors.Is(err, enforce.ErrHeld) {
		return nil
	}
	if err != nil {
		return err
	}
	var local []node.Endpoint
	err = (&Plugin{}).read(ctx, c, func(tx *node.Tx) (err error) {
		local, err = tx.AllEndpoints()
		return err
	})
	if err == nil || errors.Is(err, node.ErrNoDatabase) {
		p.Replace(resources)
		p.SetLocal(local)
		_, err = p.Commit(ctx)
	}
	return errors.Join(err, p.Close())
}

// Take makes Calico's pod Caracal's. It can be repeated after it was interrupted, at any step: until the programs are attached the
// kernel routes the pod's packets as before, and by then they find the pod in the maps.
func (a *Adoption) Take(ctx context.Context, p *CalicoPod) (err error) {
	plugin := &Plugin{Step: a.Step, Stderr: os.Stderr, log: a.Log}
	t := &adding{Plugin: plugin, env: p.env, c: p.c, key: p.Endpoint.Key}
	defer t.close()
	if err := t.openNamespace(); err != nil {
		return err
	}
	host, err := t.sides.host.LinkByName(p.Endpoint.HostIfName)
	if err != nil {
		return fmt.Errorf("look for %s: %w", p.Endpoint.HostIfName, err)
	}
	mac, err := net.ParseMAC(p.Endpoint.MAC)
	if err != nil {
		return err
	}
	t.veth = &veth{
		hostName: p.Endpoint.HostIfName, podName: p.env.IfName, mac: mac, mtu: p.Endpoint.MTU, addrs: p.Endpoint.Addrs,
		hostIndex: host.Attrs().Index, podIndex: host.Attrs().ParentIndex,
	}
	if err := prepareBPFFS(a.BPFFSDir); err != nil {
		return err
	}
	if t.sysctls, err = forwarding(hasV6(t.veth.addrs)); err != nil {
		return err
	}
	for _, s := range []struct {
		name string
		run  func(context.Context) error
	}{
		{"adopt-load", t.load},
		{"adopt-record", func(ctx context.Context) error { return a.record(ctx, t, p) }},
		{"adopt-sysctl", func(context.Context) error { return writeSysctls(t.sysctls) }},
		{"adopt-lead", func(ctx context.Context) error { return a.lead(ctx, p.pools) }},
		{"adopt-commit", t.commit},
		{"adopt-policy", t.enforce},
		{"adopt-attach", func(context.Context) error {
			return loader.Attach(tc.On(t.sides.host), a.BPFFSDir, t.veth.hostName, t.veth.hostIndex, loader.TCX)
		}},
		{"adopt-pod", t.adoptPod},
		{"adopt-host", t.adoptHost},
		{"adopt-done", func(context.Context) error { return nil }},
	} {
		if err := t.timed(s.name, func() error { return s.run(ctx) }); err != nil {
			return err
		}
	}
	p.Adopted = true
	return nil
}

// record writes the pod's record, with its addresses and their blocks, in one transaction.
func (a *Adoption) record(ctx context.Context, t *adding, p *CalicoPod) error {
	return t.update(ctx, t.c, func(tx *node.Tx) error {
		if err := a.recorded(tx, p); err != nil { // since Find
			return err
		}
		if err := recordSysctls(tx, t.sysctls); err != nil {
			return err
		}
		if p.Endpoint.Created.IsZero() {
			p.Endpoint.Created = time.Now().UTC()
		}
		t.record = p.Endpoint
		t.blocks = nil
		if t.c.ownIPAM() {
			for _, addr := range p.Endpoint.Addrs {
				block, err := hold(tx, p.Endpoint.Key, p.pools, addr) // recorded has seen that nobody else does
				if err != nil {
					return err
				}
				t.blocks = append(t.blocks, block)
			}
		}
		return tx.PutEndpoint(p.Endpoint)
	})
}

// lead says in the maps where the host's own routes lead until somebody knows better: to all of the pools, so that nothing is
// masqueraded on its way to another host's pods, which an agent will know more of, and to Calico's other pods of this host.
func (a *Adoption) lead(ctx context.Context, pools []api.IPPool) error {
	m, err := maps.Open(a.BPFFSDir)
	if err != nil {
		return err
	}
	defer m.Close()
	lock, err := node.LockNode(ctx, a.StateDir)
	if err != nil {
		return err
	}
	defer lock.Unlock()
	for _, pool := range pools {
		if _, err := m.Route(pool.CIDR); err == nil {
			continue // an agent's
		} else if !errors.Is(err, maps.ErrNotFound) {
			return err
		}
		if err := commit.PutRemote(m, toStack(pool.CIDR)); err != nil {
			return err
		}
	}
	for _, addr := range a.left {
		if err := commit.PutRemote(m, toStack(netip.PrefixFrom(addr, addr.BitLen()))); err != nil && !errors.Is(err, commit.ErrOwn) {
			return err
		}
	}
	return nil
}

func toStack(p netip.Prefix) maps.Route {
	return maps.Route{Prefix: p, Kind: maps.RouteStack, InPool: true}
}

// hold gives an attachment the address that it has, and returns the address's block. Whoever else holds it keeps it.
func hold(tx *node.Tx, key node.Key, pools []api.IPPool, addr netip.Addr) (netip.Prefix, error) {
	block, pool, err := blockIn(pools, addr)
	if err != nil {
		return block, err
	}
	if _, err := tx.Owner(addr); err == nil {
		return block, nil
	}
	if _, err := tx.Block(block); errors.Is(err, node.ErrNotFound) {
		err = tx.PutBlock(node.Block{CIDR: block, Pool: pool.CIDR})
		if err != nil {
			return block, err
		}
	} else if err != nil {
		return block, err
	}
	if _, err := tx.TakeFreed(func(f netip.Addr) bool { return f == addr }); err != nil && !errors.Is(err, node.ErrNotFound) {
		return block, err
	}
	return block, tx.Hold(key, addr, block)
}

// adoptPod gives the pod permanent neighbour entries of its gateways. Calico's pods have IPv4's already, as a gateway; IPv6's
// they have under the host end's link-local address, for which nobody answers any more.
func (t *adding) adoptPod(context.Context) error {
	mac, err := net.ParseMAC(t.record.HostMAC)
	if err != nil {
		return err
	}
	for _, gw := range gateways(t.veth.addrs) {
		if err := setNeighbour(t.sides.pod, t.veth.podIndex, gw, mac); err != nil {
			return fmt.Errorf("in the pod: %w", err)
		}
		if gw.Is4() {
			if err := t.veth.routePod(t.sides.pod, gw); err != nil {
				return err
			}
			continue
		}
		for _, r := range []*netlink.Route{
			{LinkIndex: t.veth.podIndex, Dst: hostNet(gw), Scope: netlink.SCOPE_LINK},
			{LinkIndex: t.veth.podIndex, Dst: network(netip.PrefixFrom(unspecified(gw), 0)), Gw: gw.AsSlice()},
		} {
			if err := t.sides.pod.RouteReplace(r); err != nil {
				return fmt.Errorf("route by %s in the pod: %w", gw, err)
			}
		}
	}
	return nil
}

// adoptHost makes the host's side as ADD makes it: routes of Caracal's protocol in the place of Calico's, and the mark of its pairs,
// last: who finds that finds all.
func (t *adding) adoptHost(context.Context) error {
	if err := t.veth.configureHost(t.sides); err != nil {
		return err
	}
	for _, b := range t.blocks {
		if b.IsSingleIP() {
			continue
		}
		r := &netlink.Route{Dst: network(b), Type: unix.RTN_BLACKHOLE, Protocol: RouteProtocol}
		if err := t.sides.host.RouteReplace(r); err != nil {
			return fmt.Errorf("add blackhole route for %s: %w", b, err)
		}
	}
	if err := t.sides.host.LinkSetGroup(link(t.veth.hostIndex), LinkGroup); err != nil {
		return fmt.Errorf("set group of %s: %w", t.veth.hostName, err)
	}
	return nil
}

// Return gives an adopted pod back as Calico's plugin had made it: its interface, addresses and routes stay, programs, maps and record
// go. From then on the kernel routes its packets, and nothing keeps it under policy.
func (a *Adoption) Return(ctx context.Context, e node.Endpoint) error {
	c := &Config{StateDir: a.StateDir, BPFFSDir: a.BPFFSDir, BootIDFile: a.BootIDFile, Name: e.Network}
	p := &Plugin{Step: a.Step, Stderr: os.Stderr, log: a.Log}
	l, err := netlink.LinkByName(e.HostIfName)
	if err != nil {
		return fmt.Errorf("look for %s: %w", e.HostIfName, err)
	}
	if err := p.step("return-detach"); err != nil {
		return err
	}
	if err := loader.Detach(a.BPFFSDir, e.HostIfName); err != nil {
		return err
	}
	for _, direction := range []tc.Direction{tc.Ingress, tc.Egress} {
		if err := tc.Here().Detach(l.Attrs().Index, direction); err != nil {
			return err
		}
	}
	if err := p.step("return-unmap"); err != nil {
		return err
	}
	lock, err := node.LockNode(ctx, a.StateDir)
	if err != nil {
		return err
	}
	defer lock.Unlock()
	m, err := maps.Open(a.BPFFSDir)
	if err != nil && !errors.Is(err, maps.ErrNotLoaded) {
		return err
	}
	if err == nil {
		defer m.Close()
		if err := commit.RemovePod(m, commit.PodOf(e, l.Attrs().Index)); err != nil {
			return err
		}
		for _, addr := range e.Addrs { // for the pods that are still here
			if err := commit.PutRemote(m, toStack(netip.PrefixFrom(addr, addr.BitLen()))); err != nil {
				return err
			}
		}
	}
	for _, addr := range e.Addrs {
		r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: hostNet(addr), Scope: netlink.SCOPE_LINK, Protocol: unix.RTPROT_BOOT}
		if err := netlink.RouteReplace(r); err != nil {
			return fmt.Errorf("route to %s: %w", addr, err)
		}
	}
	if err := netlink.LinkSetGroup(l, 0); err != nil {
		return fmt.Errorf("set group of %s: %w", e.HostIfName, err)
	}
	forgetUntranslated(e.Addrs)
	if err := p.step("return-forget"); err != nil {
		return err
	}
	return p.update(ctx, c, func(tx *node.Tx) error {
		if _, err := tx.Release(e.Key); err != nil {
			return err
		}
		return tx.DeleteEndpoint(e.Key)
	})
}

// forgetUntranslated removes what the host's own connection tracking knows of addresses, but for what it translates: it has not seen
// what went by the programs, and Calico's firewall would drop what comes now as invalid.
func forgetUntranslated(addrs []netip.Addr) {
	for _, a := range addrs {
		_, _ = netlink.ConntrackDeleteFilters(netlink.ConntrackTable, netlink.InetFamily(family(a)), untranslated(a))
	}
}

// untranslated are the connections of an address in which neither side is translated.
type untranslated netip.Addr

// MatchConntrackFlow tells whether a connection is one.
func (u untranslated) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	there, back, own := flow.Forward, flow.Reverse, net.IP(netip.Addr(u).AsSlice())
	return (there.SrcIP.Equal(own) || there.DstIP.Equal(own)) && there.SrcIP.Equal(back.DstIP) && there.DstIP.Equal(back.SrcIP)
}

// CalicoTunnels are the interfaces that Calico's agent makes on a host.
var CalicoTunnels = []string{"tunl0", "vxlan.calico", "vxlan-v6.calico", "wireguard.cali", "wg-v6.cali", "bpfin.cali"}

func tunnelKey(name string) node.Key {
	return node.Key{Network: ipam.HostNetwork, ContainerID: "calico", IfName: name}
}

// HoldTunnels keeps the addresses that Calico's tunnels have in this node's blocks from being given to pods, until ReleaseTunnels.
func (a *Adoption) HoldTunnels(ctx context.Context) error {
	type held struct {
		key  node.Key
		addr netip.Addr
	}
	var todo []held
	for _, name := range CalicoTunnels {
		l, err := netlink.LinkByName(name)
		if nl.IsNotFound(err) {
			continue
		}
		if err != nil {
			return fmt.Errorf("look for %s: %w", name, err)
		}
		addrs, err := nl.Dump(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_ALL) })
		if err != nil {
			return fmt.Errorf("list addresses of %s: %w", name, err)
		}
		for _, x := range addrs {
			addr, _ := netip.AddrFromSlice(x.IP)
			addr = addr.Unmap()
			block, _, err := blockIn(a.Pools, addr)
			if owner, claimed := a.Claims[block]; err == nil && (!claimed || owner == a.Node) {
				todo = append(todo, held{tunnelKey(name), addr})
			}
		}
	}
	if len(todo) == 0 {
		return nil
	}
	return a.update(ctx, func(tx *node.Tx) error {
		for _, h := range todo {
			if _, err := hold(tx, h.key, a.Pools, h.addr); err != nil {
				return err
			}
		}
		return nil
	})
}

// ReleaseTunnels is for when Calico's tunnels are gone.
func (a *Adoption) ReleaseTunnels(ctx context.Context) error {
	return a.update(ctx, func(tx *node.Tx) error {
		for _, name := range CalicoTunnels {
			if _, err := tx.Release(tunnelKey(name)); err != nil {
				return err
			}
		}
		return nil
	})
}

func (a *Adoption) update(ctx context.Context, fn func(*node.Tx) error) error {
	return (&Plugin{}).update(ctx, &Config{StateDir: a.StateDir, BootIDFile: a.BootIDFile}, fn)
}

// calicoProtocol is what BIRD, and so Calico, marks its routes with (rtm_protocol, rtnetlink(7)).
const calicoProtocol = unix.RTPROT_BIRD

// TakeRoutes makes the routes to other hosts' blocks that Calico has learned Caracal's, so that the agent may write its own in their
// place: none is missing meanwhile. It returns their prefixes, and changes nothing when dry.
func (a *Adoption) TakeRoutes(dry bool) ([]netip.Prefix, error) {
	return a.moveRoutes(calicoProtocol, RouteProtocol, dry)
}

// ReturnRoutes is the inverse of TakeRoutes.
func (a *Adoption) ReturnRoutes() ([]netip.Prefix, error) {
	return a.moveRoutes(RouteProtocol, calicoProtocol, false)
}

// moveRoutes gives the routes of a protocol to blocks of the pools, by other hosts or to nowhere, to another one.
func (a *Adoption) moveRoutes(from, to int, dry bool) (moved []netip.Prefix, err error) {
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		filter := &netlink.Route{Protocol: netlink.RouteProtocol(from), Table: unix.RT_TABLE_MAIN}
		routes, err := nl.Dump(func() ([]netlink.Route, error) {
			return netlink.RouteListFiltered(family, filter, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return moved, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			prefix, ok := a.movable(r)
			if !ok {
				continue
			}
			moved = append(moved, prefix)
			if dry {
				continue
			}
			old := r
			r.Protocol, r.Priority = netlink.RouteProtocol(to), 0
			if err := netlink.RouteReplace(&r); err != nil {
				return moved, fmt.Errorf("route to %s: %w", prefix, err)
			}
			if old.Priority != r.Priority { // it stands beside the new one, which is the better of the two
				if err := netlink.RouteDel(&old); err != nil && !errors.Is(err, unix.ESRCH) {
					return moved, fmt.Errorf("remove route to %s: %w", prefix, err)
				}
			}
		}
	}
	return moved, nil
}

// movable tells whether a route leads to blocks without a tunnel, and to which.
func (a *Adoption) movable(r netlink.Route) (netip.Prefix, bool) {
	if r.Dst == nil || r.Type != unix.RTN_BLACKHOLE && (r.Type != unix.RTN_UNICAST || r.Gw == nil || r.Encap != nil) {
		return netip.Prefix{}, false
	}
	addr, _ := netip.AddrFromSlice(r.Dst.IP)
	bits, _ := r.Dst.Mask.Size()
	prefix := netip.PrefixFrom(addr.Unmap(), bits)
	if !slices.ContainsFunc(a.Pools, func(p api.IPPool) bool { return p.CIDR.Bits() <= bits && p.CIDR.Contains(prefix.Addr()) }) {
		return prefix, false
	}
	if r.Type == unix.RTN_UNICAST {
		l, err := netlink.LinkByIndex(r.LinkIndex)
		if err != nil || l.Type() == "ipip" || l.Type() == "vxlan" {
			return prefix, false
		}
	}
	return prefix, true
}
