package cni

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/internal/nl"
	"github.com/caracal-net/caracal/ipam"
	"github.com/caracal-net/caracal/node"
)

// Attacher attaches containers for Docker, which configures their end of a pair itself: it moves the end into the container's
// namespace, and gives it addresses and routes. All else is as in ADD and DEL. It is safe for concurrent use.
type Attacher struct {
	c    *Config
	log  *slog.Logger
	step func(string) error
}

// NewAttacher makes an Attacher for the node of a configuration, of which StateDir, BPFFSDir and AgentSocket must be set. step is
// called as Plugin.Step is; nil: nothing is.
func NewAttacher(c Config, log *slog.Logger, step func(string) error) *Attacher {
	c.IPAM.Cluster = true
	return &Attacher{&c, log, step}
}

// plugin is one for one command.
func (t *Attacher) plugin() *Plugin { return &Plugin{Step: t.step, Spawn: beside(t.log), log: t.log} }

// beside does what ADD and DEL have detached processes do in goroutines: who attaches lives on.
func beside(log *slog.Logger) func(args ...string) error {
	return func(args ...string) error {
		go func() {
			var err error
			switch args[0] {
			case "settle":
				err = Settle(context.Background(), args[1:])
			case "reap":
				err = Reap(args[1:])
			}
			if err != nil {
				log.Warn(args[0], "error", err)
			}
		}()
		return nil
	}
}

// Outline is the attachment that Docker asks for.
type Outline struct {
	Key        node.Key // it holds its addresses by now
	HostIfName string
	PodIfName  string           // of the container's end, in this host's namespace until it is moved
	Netns      string           // path of the namespace that it will be moved to, which need not be there yet
	MAC        net.HardwareAddr // of the container's end
	Profile    string           // of its network
	NetworkID  string
}

// Attach makes what ADD makes, less what is in the container's namespace. A container with several networks is one of each, and
// what may enter by one of its interfaces may by all: each has the profiles of all.
func (t *Attacher) Attach(ctx context.Context, o Outline) (node.Endpoint, error) {
	sides, err := openSides(nil)
	if err != nil {
		return node.Endpoint{}, err
	}
	a := &adding{Plugin: t.plugin(), c: t.c, key: o.Key, sides: sides}
	defer a.close()
	if a.pools, err = t.c.pools(); err != nil {
		return node.Endpoint{}, err
	}
	if err := prepareBPFFS(t.c.BPFFSDir); err != nil {
		return node.Endpoint{}, err
	}
	a.veth = &veth{hostName: o.HostIfName, podName: o.PodIfName, mac: o.MAC, hostMAC: randomMAC(), mtu: t.c.mtu(sides.host)}
	a.record = node.Endpoint{
		Key: o.Key, Netns: o.Netns, IPAM: ipam.Docker, Profiles: []string{o.Profile}, Docker: &node.Docker{NetworkID: o.NetworkID, Gateway: Gateway4},
	}
	others, err := t.siblings(ctx, a.record)
	if err != nil {
		return node.Endpoint{}, err
	}
	for _, e := range others {
		a.record.Profiles = append(a.record.Profiles, e.Profiles[0])
		for a.record.Docker.Gateway == e.Docker.Gateway { // they are sorted by it
			a.record.Docker.Gateway = a.record.Docker.Gateway.Next()
		}
	}
	if err := a.attach(ctx); err != nil {
		return node.Endpoint{}, err
	}
	return a.record, t.shareProfiles(ctx, a.record, false)
}

// siblings are the other endpoints of an endpoint's container, by gateway.
func (t *Attacher) siblings(ctx context.Context, e node.Endpoint) ([]node.Endpoint, error) {
	all, err := t.Endpoints(ctx)
	all = slices.DeleteFunc(all, func(o node.Endpoint) bool { return o.Key == e.Key || o.Netns != e.Netns })
	slices.SortFunc(all, func(x, y node.Endpoint) int { return x.Docker.Gateway.Compare(y.Docker.Gateway) })
	return all, err
}

// Endpoints are Docker's of this node, as recorded.
func (t *Attacher) Endpoints(ctx context.Context) ([]node.Endpoint, error) {
	var all []node.Endpoint
	err := t.View(ctx, func(tx *node.Tx) (err error) {
		all, err = tx.AllEndpoints()
		return err
	})
	return slices.DeleteFunc(all, func(e node.Endpoint) bool { return e.Docker == nil || len(e.Profiles) == 0 }), err
}

// shareProfiles gives each endpoint of one's container the profiles of all, its own network's first. When one leaves it gives the
// others none of its.
func (t *Attacher) shareProfiles(ctx context.Context, one node.Endpoint, leaves bool) error {
	members, err := t.siblings(ctx, one)
	if err != nil || len(members) == 0 && (leaves || len(one.Profiles) == 1) {
		return err
	}
	if !leaves {
		members = append(members, one)
	}
	return t.Update(ctx, func(tx *node.Tx) error {
		var all []node.Endpoint
		for _, e := range members {
			if now, err := tx.Endpoint(e.Key); err == nil {
				all = append(all, now)
			} else if !errors.Is(err, node.ErrNotFound) {
				return err
			}
		}
		for _, e := range all {
			e.Profiles = e.Profiles[:1]
			for _, o := range all {
				if !slices.Contains(e.Profiles, o.Profiles[0]) {
					e.Profiles = append(e.Profiles, o.Profiles[0])
				}
			}
			if err := tx.PutEndpoint(e); err != nil {
				return err
			}
		}
		return nil
	})
}

// Update changes node.db in one transaction.
func (t *Attacher) Update(ctx context.Context, fn func(*node.Tx) error) error {
	return t.plugin().update(ctx, t.c, fn)
}

// View reads node.db. One that is not there yet has nothing.
func (t *Attacher) View(ctx context.Context, fn func(*node.Tx) error) error {
	err := t.plugin().read(ctx, t.c, fn)
	if errors.Is(err, node.ErrNoDatabase) {
		return nil
	}
	return err
}

// Detach removes all of an attachment but its hold on its addresses. One that is not there is not an error.
func (t *Attacher) Detach(ctx context.Context, key node.Key) error {
	var e node.Endpoint
	err := t.plugin().read(ctx, t.c, func(tx *node.Tx) (err error) {
		e, err = tx.Endpoint(key)
		return err
	})
	if errors.Is(err, node.ErrNotFound) || errors.Is(err, node.ErrNoDatabase) {
		return nil
	}
	if err != nil {
		return err
	}
	// Before the record goes: whoever is asked again after that finds none, and does nothing.
	if err := t.shareProfiles(ctx, e, true); err != nil {
		return err
	}
	return t.plugin().teardown(ctx, t.c, key)
}

// Exists tells whether an attachment's pair is there: with either end's network namespace both go.
func Exists(e node.Endpoint) (bool, error) {
	if _, err := nl.Index(e.HostIfName); errors.Is(err, unix.ENODEV) {
		return false, nil
	} else if err != nil {
		return false, fmt.Errorf("look for %s: %w", e.HostIfName, err)
	}
	return true, nil
}

// Alive tells whether something has the container's end of an attachment up: the namespace, and with it the pair, is there.
func (t *Attacher) Alive(e node.Endpoint) (bool, error) {
	l, err := netlink.LinkByName(e.HostIfName)
	if nl.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look for %s: %w", e.HostIfName, err)
	}
	return carries(l), nil
}

// carries tells whether the other end of a pair is up.
func carries(l netlink.Link) bool { return l.Attrs().OperState == netlink.OperUp }

const (
	arrival = 2 * time.Minute // from Join until the container's end is where it belongs, and up
	arrives = 10 * time.Millisecond
)

// Complete waits until Docker has moved an attachment's end into its namespace, and then records which namespace that is and what
// the interface is called there. To a container with several networks it gives rules by which each answer leaves as its
// question came. An attachment that goes meanwhile is not an error.
func (t *Attacher) Complete(ctx context.Context, e node.Endpoint) error {
	ctx, cancel := context.WithTimeout(ctx, arrival)
	defer cancel()
	for {
		l, err := netlink.LinkByName(e.HostIfName)
		if nl.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("look for %s: %w", e.HostIfName, err)
		}
		if carries(l) {
			return t.complete(ctx, e, l.Attrs())
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: its container's end is not up: %w", e.HostIfName, ctx.Err())
		case <-time.After(arrives):
		}
	}
}

func (t *Attacher) complete(ctx context.Context, e node.Endpoint, host *netlink.LinkAttrs) error {
	ns, err := netns.Open(e.Netns)
	if err != nil {
		return fmt.Errorf("%s: %w", e.Key, err)
	}
	defer ns.Close()
	inode, err := ns.Inode()
	if err != nil {
		return err
	}
	sides, err := openSides(ns)
	if err != nil {
		return err
	}
	defer sides.Close()
	l, err := sides.pod.LinkByIndex(host.ParentIndex)
	if err != nil {
		return fmt.Errorf("%s: find its interface in %s: %w", e.Key, e.Netns, err)
	}
	err = t.Update(ctx, func(tx *node.Tx) error {
		now, err := tx.Endpoint(e.Key)
		if err != nil {
			return err
		}
		now.NetnsID, now.Docker.Interface = fmt.Sprint(inode), l.Attrs().Name
		e = now
		return tx.PutEndpoint(now)
	})
	if errors.Is(err, node.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	others, err := t.siblings(ctx, e)
	if err != nil || len(others) == 0 {
		return err
	}
	for _, e := range append(others, e) {
		if e.NetnsID != fmt.Sprint(inode) {
			continue // it will see to that itself
		}
		if err := routeBySource(sides.pod, e); err != nil {
			return fmt.Errorf("%s: %w", e.Key, err)
		}
	}
	return nil
}

// sourceTables is where the routing tables begin of containers' interfaces, by ifindex.
const sourceTables = 0x0ca0000

// routeBySource has what a container sends from an interface's address leave by the interface.
func routeBySource(pod *netlink.Handle, e node.Endpoint) error {
	l, err := pod.LinkByName(e.Interface())
	if err != nil {
		return fmt.Errorf("find %s: %w", e.Interface(), err)
	}
	index := l.Attrs().Index
	gateway, err := net.ParseMAC(e.HostMAC)
	if err != nil {
		return fmt.Errorf("MAC address of its host's end: %w", err)
	}
	for _, a := range e.Addrs {
		gw := e.Docker.Gateway
		if a.Is6() {
			gw = Gateway6
		}
		if err := setNeighbour(pod, index, gw, gateway); err != nil { // from_pod answers for the first one only
			return err
		}
		r := &netlink.Route{LinkIndex: index, Gw: gw.AsSlice(), Flags: int(netlink.FLAG_ONLINK), Table: sourceTables + index}
		if err := pod.RouteReplace(r); err != nil {
			return fmt.Errorf("add default route by %s: %w", gw, err)
		}
		rule := netlink.NewRule()
		rule.Src, rule.Table, rule.Priority, rule.Family = hostNet(a), sourceTables+index, 1000, family(a)
		if err := pod.RuleAdd(rule); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add rule for %s: %w", a, err)
		}
	}
	return nil
}

// Forget removes what a crash left of an attachment: all, and its hold on its addresses, which are returned.
func (t *Attacher) Forget(ctx context.Context, key node.Key) (freed []netip.Addr, err error) {
	if err := t.Detach(ctx, key); err != nil {
		return nil, err
	}
	err = t.Update(ctx, func(tx *node.Tx) error {
		if _, err := tx.Endpoint(key); !errors.Is(err, node.ErrNotFound) {
			return err // it was made again
		}
		freed, err = tx.Release(key)
		return err
	})
	return freed, err
}
