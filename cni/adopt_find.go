package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/internal/nl"
	"github.com/caracal-net/caracal/ipam"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
)

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
