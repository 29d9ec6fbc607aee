package agent

import (
	"context"
	"errors"
	"fmt"
	stdmaps "maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/bgp"
	"github.com/caracal-net/caracal/cni"
	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/internal/nl"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
)

// routes takes what BGP learns to the kernel maps and to the kernel's own table, which mirrors them. A route that an
// earlier agent of this node left stays until every peer has said what it has; one to a block of a node that is no peer yet, because its
// first agent has still to begin, until that one has had the time to.
type routes struct {
	a    *Agent
	rtnl *netlink.Handle

	mu      sync.Mutex
	written map[netip.Prefix]maps.Route // what is in the maps; nil: not read yet
	learned map[netip.Prefix]bgp.Route
	dirty   map[netip.Prefix]bool       // to be written, or to be taken away
	stale   map[netip.Prefix]bool       // written, but the kernel's table has it otherwise, or not at all
	whole   bool                        // every peer was heard, what is not learned goes
	look    bool                        // the kernel's table may have changed
	left    map[netip.Prefix]bool       // written by an earlier agent, and not learned; nobody was asked yet who may know
	begun   map[string]time.Time        // when a node was first seen to speak BGP; zero: this agent has found it so
	pools   []api.IPPool                // as they were when routes were written
	tunnel  tunnel                      // likewise
	pooled  map[netip.Prefix]maps.Route // what putPools has written
	alarms  map[bgp.Alarm]Alarm
}

// Alarm is something that a peer did and that an operator must see. It is forgotten when it was not repeated for alarmFor.
type Alarm struct {
	Kind  string    `json:"kind"`
	Peer  string    `json:"peer,omitempty"`
	Text  string    `json:"text"`
	Since time.Time `json:"since"`
	Last  time.Time `json:"last"`
}

const alarmFor = 3 * time.Minute

func newRoutes(a *Agent) *routes {
	return &routes{
		a: a, rtnl: &netlink.Handle{},
		learned: make(map[netip.Prefix]bgp.Route), dirty: make(map[netip.Prefix]bool), stale: make(map[netip.Prefix]bool),
		left: make(map[netip.Prefix]bool), begun: make(map[string]time.Time),
		alarms: make(map[bgp.Alarm]Alarm), look: true,
	}
}

// Learned is called by the speaker.
func (r *routes) Learned(route bgp.Route) {
	r.mu.Lock()
	r.learned[route.Prefix] = route
	r.dirty[route.Prefix] = true
	r.mu.Unlock()
	r.a.changed()
}

// Withdrawn is called by the speaker.
func (r *routes) Withdrawn(p netip.Prefix) {
	r.mu.Lock()
	delete(r.learned, p)
	r.dirty[p] = true
	r.mu.Unlock()
	r.a.changed()
}

// Alarm is called by the speaker.
func (r *routes) Alarm(al bgp.Alarm) {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	known, ok := r.alarms[al]
	if !ok {
		known = Alarm{Kind: al.Kind.String(), Text: al.Text, Since: now}
		if al.Peer.IsValid() {
			known.Peer = al.Peer.String()
		}
		r.a.Log.Warn("alarm", "kind", al.Kind, "peer", al.Peer, "text", al.Text)
	}
	known.Last = now
	r.alarms[al] = known
}

// recent are the alarms of the last minutes, the oldest first.
func (r *routes) recent() []Alarm {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := []Alarm{}
	for key, al := range r.alarms {
		if time.Since(al.Last) > alarmFor {
			delete(r.alarms, key)
			continue
		}
		all = append(all, al)
	}
	slices.SortFunc(all, func(x, y Alarm) int { return x.Since.Compare(y.Since) })
	return all
}

// heardAll lets go of what no peer has any more.
func (r *routes) heardAll() {
	r.mu.Lock()
	r.whole = true
	r.mu.Unlock()
	r.a.changed()
}

// lookAgain has the next sync compare the kernel's table: with a link that goes down, or an address that goes, it loses routes.
func (r *routes) lookAgain() {
	r.mu.Lock()
	r.look = true
	r.mu.Unlock()
}

// sync writes what changed. What can't be written is tried again the next time.
func (r *routes) sync(ctx context.Context, v *view, own []netip.Prefix, t tunnel) error {
	r.mu.Lock()
	whole, look := r.whole, r.look
	r.whole, r.look = false, false
	r.mu.Unlock()
	var errs []error
	first := r.written == nil
	if err := r.read(); err != nil {
		return err
	}
	same := slices.EqualFunc(v.pools, r.pools, func(x, y api.IPPool) bool { return x.CIDR == y.CIDR && x.VXLANMode == y.VXLANMode })
	if !same || t != r.tunnel {
		r.mu.Lock()
		if t != r.tunnel { // what the kernel has of such a route beside the map may differ
			for p, m := range r.written {
				if m.Kind == maps.RouteTunnel {
					r.stale[p] = true
				}
			}
		}
		r.pools, r.tunnel = v.pools, t
		for p := range r.learned {
			r.dirty[p] = true
		}
		r.mu.Unlock()
	}
	var kernel map[netip.Prefix]netlink.Route
	if whole || look {
		var err error
		if kernel, err = r.listKernel(); err != nil { // both the next time
			r.mu.Lock()
			r.whole, r.look = r.whole || whole, r.look || look
			r.mu.Unlock()
			return err
		}
	}
	if look {
		r.compare(kernel)
	}
	if first {
		errs = append(errs, r.adopt()...)
	}
	r.note(v, first)
	if whole {
		r.findOld(kernel)
	}
	r.mu.Lock()
	r.forgetOld(v)
	todo := r.dirty
	r.dirty = make(map[netip.Prefix]bool)
	want := make(map[netip.Prefix]bgp.Route, len(todo))
	for p := range todo {
		if route, ok := r.learned[p]; ok {
			want[p] = route
		}
	}
	r.mu.Unlock()
	for batch := range slices.Chunk(slices.Collect(stdmaps.Keys(todo)), batchSize) {
		errs = append(errs, r.write(ctx, batch, want)...)
	}
	errs = append(errs, r.putPools(ctx, v.nodes, own))
	if len(errs) > 3 {
		errs = append(errs[:3], fmt.Errorf("and %d more", len(errs)-3))
	}
	return errors.Join(errs...)
}

// batchSize is how many routes are written before ADD and DEL get their turn.
const batchSize = 256

// write writes some prefixes, under the node lock.
func (r *routes) write(ctx context.Context, batch []netip.Prefix, want map[netip.Prefix]bgp.Route) (errs []error) {
	lock, err := node.LockNode(ctx, r.a.StateDir)
	if err == nil {
		defer lock.Unlock()
	}
	hops := make(map[netip.Addr]hop)
	for _, p := range batch {
		failed := err
		if route, ok := want[p]; failed == nil && ok {
			failed = r.put(route, hops)
		} else if failed == nil {
			failed = r.remove(p)
		}
		if failed != nil {
			errs = append(errs, failed)
			r.mu.Lock()
			r.dirty[p] = true
			r.mu.Unlock()
		}
	}
	return errs
}

// hop is how a next hop is reached.
type hop struct {
	ifindex, mtu int
	far          bool // a router lies in between
	err          error
}

func (r *routes) hop(to netip.Addr, known map[netip.Addr]hop) hop {
	if h, ok := known[to]; ok {
		return h
	}
	h := hop{}
	found, err := r.rtnl.RouteGet(to.AsSlice())
	if err != nil || len(found) == 0 {
		h.err = fmt.Errorf("next hop %s is unreachable: %w", to, err)
	} else {
		h.ifindex, h.far = found[0].LinkIndex, found[0].Gw != nil
		l, err := r.rtnl.LinkByIndex(h.ifindex)
		if err != nil {
			h.err = fmt.Errorf("interface to next hop %s: %w", to, err)
		} else {
			h.mtu = l.Attrs().MTU
		}
	}
	known[to] = h
	return h
}

// put writes a learned route: the kernel's table first, because packets that need the host's stack find it there.
func (r *routes) put(route bgp.Route, hops map[netip.Addr]hop) error {
	h := r.hop(route.NextHop, hops)
	if h.err != nil {
		return fmt.Errorf("route to %s: %w", route.Prefix, h.err)
	}
	k := &netlink.Route{Dst: nl.Net(route.Prefix), Protocol: cni.RouteProtocol}
	m := maps.Route{Prefix: route.Prefix, NextHop: route.NextHop}
	var pool api.IPPool
	pool, m.InPool = poolOf(r.pools, route.Prefix)
	switch {
	case pool.VXLANMode == "Always" || pool.VXLANMode == "CrossSubnet" && h.far:
		if r.tunnel.index == 0 {
			return fmt.Errorf("route to %s: %w: there is no %s", route.Prefix, ErrTunnel, cni.TunnelName)
		}
		k.LinkIndex, k.Encap, k.Scope = r.tunnel.index, &ipEncap{r.tunnel.vni, route.NextHop}, netlink.SCOPE_LINK
		if src := r.tunnel.source(route.Prefix.Addr().Is6()); src.IsValid() {
			k.Src = src.AsSlice()
		}
		m.Kind, m.IfIndex, m.MTU = maps.RouteTunnel, uint32(r.tunnel.index), uint16(min(r.tunnel.mtu, 65535))
	case h.far:
		return fmt.Errorf("route to %s: next hop %s is on no network of this host: a router lies in between; give the pool vxlanMode CrossSubnet", route.Prefix, route.NextHop)
	default:
		k.LinkIndex, k.Gw = h.ifindex, route.NextHop.AsSlice()
		m.Kind, m.IfIndex, m.MTU = maps.RouteRemote, uint32(h.ifindex), uint16(min(h.mtu, 65535))
	}
	r.mu.Lock()
	same := r.written[route.Prefix] == m && !r.stale[route.Prefix]
	r.mu.Unlock()
	if same {
		return nil
	}
	if own, err := r.a.maps.Route(m.Prefix); err == nil && m.Prefix.IsSingleIP() && (own.Kind == maps.RouteHost || own.Kind == maps.RouteLocalPod) {
		return fmt.Errorf("route to %s by %s: %w", route.Prefix, route.NextHop, commit.ErrOwn)
	}
	if err := r.putKernel(k); err != nil {
		return fmt.Errorf("add route to %s by %s: %w", route.Prefix, route.NextHop, err)
	}
	if err := commit.PutRemote(r.a.maps, m); err != nil {
		return err
	}
	r.mu.Lock()
	r.written[route.Prefix] = m
	delete(r.stale, route.Prefix)
	r.mu.Unlock()
	return nil
}

// putPools keeps a route for each whole pool, so that what goes to an address in no known block is neither masqueraded nor
// sent out; unless a wider learned route says who knows those blocks. With a tunnel it also keeps one for each other host's
// address, which may come out of it.
func (r *routes) putPools(ctx context.Context, nodes map[string]*api.Node, own []netip.Prefix) error {
	want := make(map[netip.Prefix]maps.Route, len(r.pools))
	r.mu.Lock()
	for _, p := range r.pools {
		if _, learned := r.learned[p.CIDR]; learned || slices.Contains(own, p.CIDR) {
			continue // which is its route, or its blackhole is
		}
		m := maps.Route{Kind: maps.RoutePool}
		if p.Disabled { // it may name what others have, which the host's routes lead to
			m.Kind = maps.RouteStack
		}
		for bits := range p.CIDR.Bits() {
			wider, _ := p.CIDR.Addr().Prefix(bits)
			if w, ok := r.written[wider]; ok {
				m = w
			}
		}
		m.Prefix, m.InPool = p.CIDR, true
		want[p.CIDR] = m
	}
	for name, n := range nodes {
		if r.tunnel.index == 0 || name == r.a.Node || n.BGP == nil {
			continue
		}
		for _, p := range []netip.Prefix{n.BGP.IPv4Address, n.BGP.IPv6Address} {
			if p = netip.PrefixFrom(p.Addr(), p.Addr().BitLen()); p.IsValid() && r.written[p].Kind == 0 {
				want[p] = maps.Route{Prefix: p, Kind: maps.RouteStack, Node: true}
			}
		}
	}
	r.mu.Unlock()
	if stdmaps.Equal(want, r.pooled) {
		return nil
	}
	lock, err := node.LockNode(ctx, r.a.StateDir)
	if err != nil {
		return err
	}
	defer lock.Unlock()
	var errs []error
	for p, m := range want {
		if r.pooled[p] != m {
			errs = append(errs, commit.PutRemote(r.a.maps, m))
		}
	}
	for p := range r.pooled {
		if _, ok := want[p]; !ok && r.written[p].Kind == 0 {
			errs = append(errs, commit.RemoveRemote(r.a.maps, p))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err // all of it again the next time
	}
	r.pooled = want
	return nil
}

// putKernel puts a route into the kernel's table, in place of one of ours. Somebody else's route is never replaced: it may be
// the one that this host is reached by.
func (r *routes) putKernel(k *netlink.Route) error {
	err := r.rtnl.RouteAdd(k)
	if !errors.Is(err, unix.EEXIST) {
		return err
	}
	family := netlink.FAMILY_V4
	if k.Dst.IP.To4() == nil {
		family = netlink.FAMILY_V6
	}
	filter := &netlink.Route{Dst: k.Dst, Table: unix.RT_TABLE_MAIN}
	there, err := nl.Dump(func() ([]netlink.Route, error) {
		return r.rtnl.RouteListFiltered(family, filter, netlink.RT_FILTER_DST|netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return err
	}
	for _, o := range there {
		if o.Protocol != cni.RouteProtocol {
			return fmt.Errorf("the host has another route to it, of protocol %s: %w", o.Protocol, unix.EEXIST)
		}
	}
	return r.rtnl.RouteReplace(k)
}

// restart forgets what was learned: a new speaker tells it all again, and until it has, what is written stays.
func (r *routes) restart() {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.learned)
	clear(r.dirty)
}

// read reads what an earlier agent has left in the maps.
func (r *routes) read() error {
	if r.written != nil {
		return nil
	}
	list, err := r.a.maps.Routes()
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.written, r.pooled = make(map[netip.Prefix]maps.Route), make(map[netip.Prefix]maps.Route)
	for _, m := range list {
		if m.Kind == maps.RoutePool || m.Kind == maps.RouteStack {
			r.pooled[m.Prefix] = m
		}
		if m.Kind == maps.RouteRemote || m.Kind == maps.RouteTunnel {
			r.written[m.Prefix] = m
		}
	}
	return nil
}

// adopt puts into the maps what only the kernel has of our routes to other hosts: those that Calico had learned on a host that was
// its. They stay, as what an earlier agent had learned does, until the peers have told theirs.
func (r *routes) adopt() (errs []error) {
	kernel, err := r.listKernel()
	if err != nil {
		return []error{err}
	}
	lock, err := node.LockNode(context.Background(), r.a.StateDir)
	if err != nil {
		return []error{err}
	}
	defer lock.Unlock()
	hops := make(map[netip.Addr]hop)
	for p, k := range kernel {
		via, ok := netip.AddrFromSlice(k.Gw)
		if _, in := poolOf(r.pools, p); ok && in && r.written[p].Kind == 0 {
			if err := r.put(bgp.Route{Prefix: p, NextHop: via.Unmap()}, hops); err != nil {
				errs = append(errs, err)
			}
		}
	}
	return errs
}

func (r *routes) remove(p netip.Prefix) error {
	delete(r.pooled, p) // a pool's own route of that prefix would go with it
	if err := commit.RemoveRemote(r.a.maps, p); err != nil {
		return err
	}
	r.mu.Lock()
	delete(r.written, p)
	delete(r.stale, p)
	r.mu.Unlock()
	err := r.rtnl.RouteDel(&netlink.Route{Dst: nl.Net(p), Protocol: cni.RouteProtocol, Table: unix.RT_TABLE_MAIN})
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("remove route to %s: %w", p, err)
	}
	return nil
}

// listKernel lists the routes to other hosts' blocks in the kernel's table.
func (r *routes) listKernel() (map[netip.Prefix]netlink.Route, error) {
	all := make(map[netip.Prefix]netlink.Route)
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		filter := &netlink.Route{Protocol: cni.RouteProtocol, Table: unix.RT_TABLE_MAIN}
		list, err := nl.Dump(func() ([]netlink.Route, error) {
			return r.rtnl.RouteListFiltered(family, filter, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		for _, k := range list {
			if p, ok := nl.Prefix(k.Dst); ok && (k.Gw != nil || r.tunnel.index != 0 && k.LinkIndex == r.tunnel.index) {
				all[p] = k
			}
		}
	}
	return all, nil
}

// compare marks what is to be written again: what the kernel has otherwise than the maps have it, or not at all. A next hop
// may be reached in another way now, so all that is learned is looked at.
func (r *routes) compare(kernel map[netip.Prefix]netlink.Route) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for p, m := range r.written {
		k, ok := kernel[p]
		same := ok && k.LinkIndex == int(m.IfIndex)
		switch m.Kind {
		case maps.RouteRemote:
			same = same && k.Gw.Equal(m.NextHop.AsSlice())
		case maps.RouteTunnel: // that it has an address for what leaves by it depends on the node's pools
			same = same && k.Src.Equal(r.tunnel.source(p.Addr().Is6()).AsSlice())
		}
		if !same {
			r.stale[p] = true
		}
	}
	for p := range r.learned {
		r.dirty[p] = true
	}
}

// note keeps when nodes were first seen to speak BGP.
func (r *routes) note(v *view, first bool) {
	now := time.Now()
	if first {
		now = time.Time{} // peers from the start: the speaker waits for what they tell
	}
	for name, n := range v.nodes {
		if _, known := r.begun[name]; !known && n.BGP != nil {
			r.begun[name] = now
		}
	}
}

// findOld finds what the kernel and the maps have of an earlier agent and no peer has said again.
func (r *routes) findOld(kernel map[netip.Prefix]netlink.Route) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for p := range r.written {
		r.left[p] = true
	}
	for p := range kernel {
		r.left[p] = true
	}
}

// forgetOld has such routes taken away, but for those that a node's first agent may still tell. Callers hold mu.
func (r *routes) forgetOld(v *view) {
	for p := range r.left {
		if _, learned := r.learned[p]; !learned {
			if c, claimed := v.blocks[p]; claimed && c.Node != r.a.Node {
				begun, has := r.begun[c.Node]
				if !has || time.Since(begun) < bgp.DefaultRestartTime {
					continue
				}
			}
			r.dirty[p] = true
		}
		delete(r.left, p)
	}
}
