package cni

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/internal/nl"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
)

const (
	quiet  = time.Second     // no ADD or DEL for so long: settling, which holds up the kernel's network lock, disturbs nobody
	gaveUp = 2 * time.Minute // settle anyhow, pods keep coming
)

// settler is the detached process that ADD leaves behind: it moves pods from clsact to TCX, picks up what later plugins of
// the chain changed, and collects what pods without a DEL left. At most one runs for a state directory.
type settler struct {
	p      *Plugin
	c      *Config
	shaped map[int]bool // interfaces whose bandwidth another plugin of the chain shapes
}

// Settle runs a settler; arguments are --state-dir, --bpffs-dir and --boot-id-file.
func Settle(ctx context.Context, args []string) error {
	c := &Config{}
	flags := flag.NewFlagSet("settle", flag.ContinueOnError)
	flags.StringVar(&c.StateDir, "state-dir", DefaultStateDir, "where node.db is")
	flags.StringVar(&c.BPFFSDir, "bpffs-dir", DefaultBPFFSDir, "where the programs are pinned")
	flags.StringVar(&c.BootIDFile, "boot-id-file", "", "where the boot id is read")
	if err := flags.Parse(args); err != nil {
		return err
	}
	s := &settler{p: &Plugin{log: slog.New(slog.DiscardHandler)}, c: c}
	ctx, cancel := context.WithTimeout(ctx, 2*gaveUp)
	defer cancel()
	for {
		lock, err := node.TryLock(c.StateDir, "settle.lock")
		if err != nil {
			return nil // another one is at it
		}
		err = s.run(ctx)
		lock.Unlock()
		// An ADD may have found the lock taken and left its pod to us, just when we had finished.
		if more, merr := s.unsettled(ctx); err != nil || merr != nil || !more {
			return errors.Join(err, merr)
		}
	}
}

func (s *settler) run(ctx context.Context) error {
	anyhow := time.Now().Add(gaveUp)
	if err := s.waitQuiet(ctx, anyhow); err != nil {
		return err
	}
	endpoints, err := s.endpoints(ctx)
	errs := []error{err}
	if s.shaped, err = shapers(); err != nil {
		errs = append(errs, err)
	}
	for _, e := range endpoints {
		if err := s.waitQuiet(ctx, anyhow); err != nil { // an ADD that came meanwhile has waited for one pod, not for all
			errs = append(errs, err)
			break
		}
		if err := s.settle(ctx, e); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", e.Key, err))
		}
	}
	return errors.Join(append(errs, s.setNode(ctx), s.p.sweepPins(ctx, s.c))...)
}

// setNode follows the host's addresses, and the way out that masqueraded pods take.
func (s *settler) setNode(ctx context.Context) error {
	m, err := maps.Open(s.c.BPFFSDir)
	if errors.Is(err, maps.ErrNotLoaded) {
		return nil
	}
	if err != nil {
		return err
	}
	defer m.Close()
	lock, err := node.LockNode(ctx, s.c.StateDir)
	if err != nil {
		return err
	}
	defer lock.Unlock()
	host := &netlink.Handle{}
	if err := s.p.setNode(ctx, s.c, host, m); err != nil {
		return err
	}
	state, err := m.State()
	if err != nil || state.NATPorts == (maps.Ports{}) {
		return err
	}
	uplinks, err := m.Uplinks()
	if err != nil {
		return err
	}
	return followOutside(host, m, s.c.BPFFSDir, uplinks)
}

// waitQuiet waits until the last ADD or DEL is a second old, but not beyond a time.
func (s *settler) waitQuiet(ctx context.Context, anyhow time.Time) error {
	for time.Now().Before(anyhow) {
		last, err := node.Changed(s.c.StateDir)
		if err != nil {
			return err
		}
		age := time.Since(last)
		if age > quiet || age < 0 {
			return nil
		}
		select {
		case <-time.After(quiet - age + time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (s *settler) endpoints(ctx context.Context) ([]node.Endpoint, error) {
	var all []node.Endpoint
	err := s.p.read(ctx, s.c, func(tx *node.Tx) (err error) {
		all, err = tx.AllEndpoints()
		return err
	})
	if errors.Is(err, node.ErrNoDatabase) {
		return nil, nil
	}
	return all, err
}

// unsettled tells whether a pod is still on clsact that could be moved.
func (s *settler) unsettled(ctx context.Context) (bool, error) {
	if !loader.HasTCX() || ctx.Err() != nil {
		return false, nil
	}
	endpoints, err := s.endpoints(ctx)
	for _, e := range endpoints {
		if l, lerr := netlink.LinkByName(e.HostIfName); lerr == nil {
			if by, aerr := loader.Attached(s.c.BPFFSDir, e.HostIfName, l.Attrs().Index); aerr == nil && by == loader.ByClsact {
				return true, err
			}
		}
	}
	return false, err
}

// settle brings one pod up to date. The pod may go meanwhile: then there is nothing to do.
func (s *settler) settle(ctx context.Context, e node.Endpoint) error {
	l, err := netlink.LinkByName(e.HostIfName)
	if nl.IsNotFound(err) {
		if !alive(e) {
			return s.p.teardown(ctx, s.c, e.Key) // its namespace is gone, and with it the pair: no DEL came
		}
		return nil
	}
	if err != nil {
		return err
	}
	ifindex := l.Attrs().Index
	if by, err := loader.Attached(s.c.BPFFSDir, e.HostIfName, ifindex); err == nil && by == loader.ByClsact {
		if err := loader.Settle(s.c.BPFFSDir, e.HostIfName, ifindex); err != nil && !gone(e.HostIfName) {
			return err
		}
	}
	if s.shaped[ifindex] && !e.Shaped {
		if err := s.amend(ctx, e, func(now *node.Endpoint) error {
			now.Shaped = true
			return nil
		}, ifindex); err != nil {
			return err
		}
		e.Shaped = true
	}
	return s.pickUpMAC(ctx, e, ifindex)
}

// shapers are the interfaces of this host with the qdiscs that the bandwidth plugin makes: tbf for what goes to the pod, ingress for
// what comes from it.
func shapers() (map[int]bool, error) {
	qdiscs, err := nl.Dump(func() ([]netlink.Qdisc, error) { return netlink.QdiscList(nil) })
	if err != nil {
		return nil, fmt.Errorf("list qdiscs: %w", err)
	}
	found := make(map[int]bool)
	for _, q := range qdiscs {
		if q.Type() == "tbf" || q.Type() == "ingress" {
			found[q.Attrs().LinkIndex] = true
		}
	}
	return found, nil
}

// pickUpMAC follows a MAC address that was changed in the pod: in the host's permanent neighbour entries, in the maps
// and in the record.
func (s *settler) pickUpMAC(ctx context.Context, e node.Endpoint, ifindex int) error {
	if !alive(e) {
		return nil
	}
	ns, err := netns.Open(e.Netns)
	if err != nil {
		return nil
	}
	defer ns.Close()
	sides, err := openSides(ns)
	if err != nil {
		return err
	}
	defer sides.Close()
	l, err := sides.pod.LinkByName(e.Interface())
	if err != nil {
		return nil
	}
	mac := l.Attrs().HardwareAddr
	if mac.String() == e.MAC {
		return nil
	}
	gateway, err := net.ParseMAC(e.HostMAC)
	if err != nil {
		return fmt.Errorf("%s: MAC address of its host's end: %w", e.Key, err)
	}
	// With its old address the interface lost its permanent neighbours.
	for _, gw := range gateways(e.Addrs) {
		if err := setNeighbour(sides.pod, l.Attrs().Index, gw, gateway); err != nil {
			return err
		}
	}
	return s.changeMAC(ctx, sides.host, e, ifindex, mac)
}

// alive tells whether the namespace that ADD was given is still what lies at its path. One that is not known yet is.
func alive(e node.Endpoint) bool {
	if e.NetnsID == "" {
		return true
	}
	ns, err := netns.Open(e.Netns)
	if err != nil {
		return false
	}
	defer ns.Close()
	inode, err := ns.Inode()
	return err == nil && fmt.Sprint(inode) == e.NetnsID
}

// settling tells whether a settler is at work for a state directory; it will see what was recorded by now.
func settling(dir string) bool {
	lock, err := node.TryLock(dir, "settle.lock")
	if err != nil {
		return errors.Is(err, node.ErrLocked)
	}
	lock.Unlock()
	return false
}

func (s *settler) changeMAC(ctx context.Context, host *netlink.Handle, e node.Endpoint, ifindex int, mac net.HardwareAddr) error {
	return s.amend(ctx, e, func(now *node.Endpoint) error {
		for _, a := range e.Addrs {
			if err := setNeighbour(host, ifindex, a, mac); err != nil {
				return err
			}
		}
		now.MAC = mac.String()
		return nil
	}, ifindex)
}

// amend changes the record of a pod, and what the maps have of it, unless it was removed or replaced since we looked.
func (s *settler) amend(ctx context.Context, e node.Endpoint, change func(now *node.Endpoint) error, ifindex int) error {
	lock, err := node.LockNode(ctx, s.c.StateDir)
	if err != nil {
		return err
	}
	defer lock.Unlock()
	db, err := node.Open(ctx, s.c.StateDir, s.c.nodeOptions())
	if err != nil {
		return err
	}
	defer db.Close()
	return db.Update(func(tx *node.Tx) error {
		now, err := tx.Endpoint(e.Key)
		if err != nil || now.MAC != e.MAC {
			return nil
		}
		m, err := maps.Open(s.c.BPFFSDir)
		if err != nil {
			return err
		}
		defer m.Close()
		if _, err := m.Pod(uint32(ifindex)); errors.Is(err, maps.ErrNotFound) {
			return nil // a DEL is at it; put back, it would be judged by no policy
		}
		if err := change(&now); err != nil {
			return err
		}
		if err := commit.AddPod(m, commit.PodOf(now, ifindex)); err != nil {
			return err
		}
		return tx.PutEndpoint(now)
	})
}

// gone tells whether the host has no interface of that name.
func gone(ifname string) bool {
	_, err := nl.Index(ifname)
	return errors.Is(err, unix.ENODEV)
}
