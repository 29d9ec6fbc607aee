package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/enforce"
	"github.com/caracal-net/caracal/internal/tc"
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

func (a *Adoption) update(ctx context.Context, fn func(*node.Tx) error) error {
	return (&Plugin{}).update(ctx, &Config{StateDir: a.StateDir, BootIDFile: a.BootIDFile}, fn)
}
