package cni

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/internal/nl"
	"github.com/caracal-net/caracal/ipam"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
)

// del detaches a container. Repeating it is fine, and so is a namespace that is gone: it goes by the record alone.
func (p *Plugin) del(ctx context.Context, env *Env, c *Config) error {
	if err := p.teardown(ctx, c, env.key(c)); err != nil {
		return err
	}
	if !c.ownIPAM() {
		return p.foreignRelease(ctx, c)
	}
	return nil
}

// teardown removes all that the record of one attachment names, and then the record. No record: nothing to do.
//
// The record and the interface that it names are looked at under one lock, and again before the record goes: so a late
// DEL never meets the interface that a successor made under the name, and leaves none that an ADD made meanwhile.
func (p *Plugin) teardown(ctx context.Context, c *Config, key node.Key) error {
	for range rivals {
		again, err := p.teardownOnce(ctx, c, key)
		if err != nil || !again {
			return err
		}
	}
	return fail(codeTryAgain, "%s is being added and removed at once", key)
}

// teardownOnce tells to do it again when an ADD made the interface while it was at work.
func (p *Plugin) teardownOnce(ctx context.Context, c *Config, key node.Key) (again bool, err error) {
	if err := p.step("unmap"); err != nil {
		return false, err
	}
	e, ifindex, err := p.unmap(ctx, c, key)
	if errors.Is(err, node.ErrNotFound) || errors.Is(err, node.ErrNoDatabase) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	p.about = e
	if err := p.step("unlink"); err != nil {
		return false, err
	}
	if ifindex != 0 {
		if err := p.removeVeth(c, ifindex, e); err != nil {
			return false, err
		}
	}
	if err := p.step("forget"); err != nil {
		return false, err
	}
	return p.forget(ctx, c, e)
}

// unmap takes the attachment out of the maps and returns its record and the ifindex of its host interface, 0 when that
// is gone.
func (p *Plugin) unmap(ctx context.Context, c *Config, key node.Key) (node.Endpoint, int, error) {
	var e node.Endpoint
	// Most late DELs find nothing: tell without writing anything, not even a lock file.
	owner := false
	look := func() error {
		return p.read(ctx, c, func(tx *node.Tx) (err error) {
			e, err = tx.Endpoint(key)
			owner = err == nil && owns(tx, e)
			return err
		})
	}
	if err := look(); err != nil {
		return e, 0, err
	}
	lock, err := node.LockNode(ctx, c.StateDir)
	if err != nil {
		return e, 0, err
	}
	defer lock.Unlock()
	if err := look(); err != nil {
		return e, 0, err
	}
	ifindex := 0
	if owner {
		l, err := netlink.LinkByName(e.HostIfName)
		if err == nil {
			ifindex = l.Attrs().Index
		} else if !nl.IsNotFound(err) {
			return e, 0, fmt.Errorf("look for %s: %w", e.HostIfName, err)
		}
	}
	if p.spare && ifindex != 0 {
		return e, 0, errAlive
	}
	m, err := maps.Open(c.BPFFSDir)
	if errors.Is(err, maps.ErrNotLoaded) {
		return e, ifindex, nil // nothing was ever in the maps, or they went with a reboot
	}
	if err != nil {
		return e, ifindex, err
	}
	defer m.Close()
	mapped := ifindex
	if mapped == 0 {
		mapped = mappedTo(m, e)
	}
	return e, ifindex, commit.RemovePod(m, commit.PodOf(e, mapped))
}

// mappedTo is the ifindex that the maps have for an attachment whose interface is gone, 0 when they have none.
func mappedTo(m *maps.Maps, e node.Endpoint) int {
	pods, err := m.Pods()
	if err != nil {
		return 0
	}
	for _, p := range pods {
		if slices.Equal(p.Addresses, e.Addrs) && !isOthers(int(p.IfIndex), e) {
			return int(p.IfIndex)
		}
	}
	return 0
}

// isOthers tells whether an interface that the maps have for an attachment's address is another's: its ADD was refused
// because a pod that the database knows nothing of has the address.
func isOthers(ifindex int, e node.Endpoint) bool {
	name, err := nl.Name(ifindex)
	return err == nil && name != e.HostIfName
}

// owns tells whether the host interface that a record names is still the record's, not a successor's.
func owns(tx *node.Tx, e node.Endpoint) bool {
	owner, err := tx.EndpointByHostIfName(e.HostIfName)
	return err == nil && owner.Key == e.Key
}

// forget removes the pins of the interface's links, releases the addresses and removes the record, if it is still the one
// that was torn down. While the transaction is open no ADD can record, so none attaches under the name.
func (p *Plugin) forget(ctx context.Context, c *Config, e node.Endpoint) (again bool, err error) {
	lock, err := node.LockNode(ctx, c.StateDir)
	if err != nil {
		return false, err
	}
	defer lock.Unlock()
	db, err := node.Open(ctx, c.StateDir, c.nodeOptions())
	if err != nil {
		return false, err
	}
	defer db.Close()
	err = db.Update(func(tx *node.Tx) error {
		now, err := tx.Endpoint(e.Key)
		if errors.Is(err, node.ErrNotFound) || err == nil && now.MAC != e.MAC {
			return nil // another DEL was faster
		}
		if err != nil {
			return err
		}
		if err := unmapLate(c, e); err != nil {
			return err
		}
		if owns(tx, e) {
			if again = !gone(e.HostIfName); again {
				return nil
			}
			if err := loader.Detach(c.BPFFSDir, e.HostIfName); err != nil {
				return err
			}
		}
		if e.IPAM != ipam.Docker {
			if _, err := tx.Release(e.Key); err != nil {
				return err
			}
		}
		return tx.DeleteEndpoint(e.Key)
	})
	return again, err
}

// unmapLate takes out of the maps what an ADD of this attachment put there since unmap: it saw the record.
func unmapLate(c *Config, e node.Endpoint) error {
	m, err := maps.Open(c.BPFFSDir)
	if errors.Is(err, maps.ErrNotLoaded) {
		return nil
	}
	if err != nil {
		return err
	}
	defer m.Close()
	for _, a := range e.Addrs {
		if r, err := m.Route(netip.PrefixFrom(a, a.BitLen())); err == nil && r.Kind == maps.RouteLocalPod && !isOthers(int(r.IfIndex), e) {
			return commit.RemovePod(m, commit.PodOf(e, int(r.IfIndex)))
		}
	}
	return nil
}

// unlisted is how long removeVeth waits for its helper before it does the work itself.
const unlisted = 2 * time.Second

// removeVeth removes the pair by the index of its host's end. The interfaces are gone from both namespaces within a
// millisecond; after that the kernel waits for RCU grace periods, 20 to 50 ms. A detached process sits that out.
func (p *Plugin) removeVeth(c *Config, ifindex int, e node.Endpoint) error {
	addrs, err := unheld(c, e)
	if err != nil {
		return err
	}
	if p.Spawn != nil {
		if err := p.Spawn("reap", strconv.Itoa(ifindex), joinAddrs(addrs)); err == nil && waitGone(ifindex) {
			return nil
		}
	}
	return reap(ifindex, addrs)
}

// unheld are those of an attachment's addresses that the maps have for no other pod: what the host's own connection tracking
// knows of the others is the other pod's.
func unheld(c *Config, e node.Endpoint) ([]netip.Addr, error) {
	m, err := maps.Open(c.BPFFSDir)
	if errors.Is(err, maps.ErrNotLoaded) {
		return e.Addrs, nil
	}
	if err != nil {
		return nil, err
	}
	defer m.Close()
	return slices.DeleteFunc(slices.Clone(e.Addrs), func(a netip.Addr) bool {
		r, err := m.Route(netip.PrefixFrom(a, a.BitLen()))
		return err == nil && r.Kind == maps.RouteLocalPod && isOthers(int(r.IfIndex), e)
	}), nil
}

// waitGone waits until an interface is off this namespace's list.
func waitGone(ifindex int) bool {
	deadline := time.Now().Add(unlisted)
	for pause := 200 * time.Microsecond; time.Now().Before(deadline); pause = min(2*pause, 5*time.Millisecond) {
		if _, err := nl.Name(ifindex); errors.Is(err, unix.ENODEV) {
			return true
		}
		time.Sleep(pause)
	}
	return false
}

// Reap is the detached process of removeVeth: arguments are the ifindex and the pod's addresses.
func Reap(args []string) error {
	if len(args) != 2 {
		return errors.New("reap: wants an ifindex and addresses")
	}
	ifindex, err := strconv.Atoi(args[0])
	if err != nil {
		return fmt.Errorf("reap: %w", err)
	}
	var addrs []netip.Addr
	for s := range strings.SplitSeq(args[1], ",") {
		if a, err := netip.ParseAddr(s); err == nil {
			addrs = append(addrs, a)
		}
	}
	return reap(ifindex, addrs)
}

func reap(ifindex int, addrs []netip.Addr) error {
	if err := netlink.LinkDel(link(ifindex)); err != nil && !nl.IsNotFound(err) && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("remove interface %d: %w", ifindex, err)
	}
	forgetConnections(addrs)
	return nil
}

// forgetConnections removes what the host's own connection tracking knows of the addresses, so that their next pod
// inherits no translation. A kernel without it knows nothing; a look through its table, however empty, takes the kernel
// tens of milliseconds, so the count comes first.
func forgetConnections(addrs []netip.Addr) {
	if n, err := readSysctl("netfilter/nf_conntrack_count"); err == nil && n == "0" {
		return
	}
	for _, a := range addrs {
		var filters []netlink.CustomConntrackFilter
		for _, t := range []netlink.ConntrackFilterType{netlink.ConntrackOrigSrcIP, netlink.ConntrackReplySrcIP} {
			f := &netlink.ConntrackFilter{}
			if f.AddIP(t, a.AsSlice()) == nil {
				filters = append(filters, f)
			}
		}
		_, _ = netlink.ConntrackDeleteFilters(netlink.ConntrackTable, netlink.InetFamily(family(a)), filters...)
	}
}

func joinAddrs(addrs []netip.Addr) string {
	var s []string
	for _, a := range addrs {
		s = append(s, a.String())
	}
	return strings.Join(s, ",")
}
