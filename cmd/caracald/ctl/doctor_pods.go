package ctl

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/cni"
	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/internal/nl"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/node"
)

// checkPods: of every recorded pod all is there that ADD made.
func (d *doctor) checkPods() error {
	if errors.Is(d.dbErr, node.ErrNoDatabase) || d.dbErr == nil && len(d.endpoints) == 0 {
		d.skipped("no pod is recorded in %s", d.stateDir)
		return nil
	}
	if d.dbErr != nil {
		return d.dbErr
	}
	found, err := d.troubles(d.endpoints)
	if err != nil {
		return err
	}
	if len(found) > 0 { // unless a DEL was at work
		if found, err = d.lookAgain(found); err != nil {
			return err
		}
	}
	for _, t := range found {
		title := recorded(t.Endpoint).title()
		switch {
		case t.dead:
			d.found(statusFail, title, fmt.Sprintf("the runtime's next GC removes it, or caracalctl ipam release %s", t.Addrs[0]), "%s and no DEL came", t.wrong[0])
		case time.Since(t.Created).Abs() < underway:
			d.found(statusWarn, title, "look again in a few seconds", "%s; its ADD may still be at work", strings.Join(t.wrong, ", "))
		default:
			d.found(statusFail, title, "put back what was taken away, or have the runtime make the pod anew", "%s", strings.Join(t.wrong, ", "))
		}
	}
	switch {
	case !d.silent():
	case slices.ContainsFunc(d.endpoints, closed):
		d.ok("%d: on the host's side interfaces, programs, maps, routes and neighbour entries are as recorded; %s", len(d.endpoints), toEnter)
	default:
		d.ok("%d: namespaces, interfaces, programs, maps, routes and neighbour entries are as recorded", len(d.endpoints))
	}
	return nil
}

// toEnter says what is not looked at when pods are closed.
const toEnter = "to enter pods' networks takes CAP_SYS_ADMIN, which we have not: run it on the node itself, as root"

// closed tells whether we may not enter a pod's network.
func closed(e node.Endpoint) bool {
	return errors.Is(netns.Do(e.Netns, func() error { return nil }), unix.EPERM)
}

// trouble is what is wrong with a pod.
type trouble struct {
	node.Endpoint
	dead  bool
	wrong []string
}

// troubles finds the pods that something is wrong with.
func (d *doctor) troubles(all []node.Endpoint) ([]trouble, error) {
	neighbours, err := listNeighbours()
	if err != nil {
		return nil, err
	}
	var found []trouble
	for _, e := range all {
		if why := dead(e); why != "" {
			found = append(found, trouble{e, true, []string{why}})
		} else if wrong := append(d.hostSide(e, neighbours), podSide(e)...); len(wrong) > 0 {
			found = append(found, trouble{e, false, wrong})
		}
	}
	return found, nil
}

// delTakes is longer than a DEL needs from taking the first thing away to forgetting the record.
const delTakes = 300 * time.Millisecond

// pause waits for what a DEL or the agent may be doing.
func (d *doctor) pause() {
	select {
	case <-time.After(delTakes):
	case <-d.cmd.Context().Done():
	}
}

// lookAgain keeps what is wrong still, with pods that are recorded still.
func (d *doctor) lookAgain(found []trouble) ([]trouble, error) {
	d.pause()
	var again []node.Endpoint
	err := d.view(d.cmd.Context(), func(tx *node.Tx) error {
		for _, t := range found {
			e, err := tx.Endpoint(t.Key)
			if errors.Is(err, node.ErrNotFound) {
				continue
			}
			if err != nil {
				return err
			}
			again = append(again, e)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return d.troubles(again)
}

// hostSide is what is wrong with a pod's host interface, its programs, map entries, routes and neighbour entries.
func (d *doctor) hostSide(e node.Endpoint, neighbours map[neighbour]netlink.Neigh) (wrong []string) {
	add := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	l, err := netlink.LinkByName(e.HostIfName)
	if err != nil {
		add("host interface %s: %v", e.HostIfName, err)
		return wrong
	}
	index := l.Attrs().Index
	if l.Attrs().Flags&net.FlagUp == 0 {
		add("host interface %s is down", e.HostIfName)
	}
	if _, err := loader.Attached(d.bpffsDir, e.HostIfName, index); err != nil {
		add("%v", err)
	}
	if d.maps != nil {
		if err := commit.CheckPod(d.maps, commit.PodOf(e, index)); err != nil {
			add("%v", err)
		}
	}
	for _, a := range e.Addrs {
		if by, err := wayTo(a); err != nil || by != e.HostIfName {
			add("the host does not route %s to %s", a, e.HostIfName)
		}
		if n := neighbours[neighbour{index, a}]; n.State&netlink.NUD_PERMANENT == 0 {
			add("the host has no permanent neighbour entry for %s on %s", a, e.HostIfName)
		}
	}
	return wrong
}

// notInContainer is what is wrong with an endpoint of Docker's of which only the host's side is known.
const notInContainer = "Docker has not put its interface into the container yet"

// podSide is what is wrong inside a pod: its interface, addresses, and the way to its gateways.
func podSide(e node.Endpoint) (wrong []string) {
	add := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	if e.NetnsID == "" {
		add(notInContainer)
		return wrong
	}
	gateway4, ifName := cni.Gateway4, e.Interface()
	if e.Docker != nil {
		gateway4 = e.Docker.Gateway
	}
	err := netns.Do(e.Netns, func() error {
		l, err := netlink.LinkByName(ifName)
		if err != nil {
			add("interface %s in the pod: %v", ifName, err)
			return nil
		}
		switch attrs := l.Attrs(); {
		case attrs.Flags&net.FlagUp == 0:
			add("interface %s in the pod is down", ifName)
		case attrs.MTU != e.MTU:
			add("interface %s in the pod has MTU %d, not %d", ifName, attrs.MTU, e.MTU)
		}
		addrs, err := nl.Dump(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_ALL) })
		if err != nil {
			return fmt.Errorf("list addresses in the pod: %w", err)
		}
		for _, a := range e.Addrs {
			if !slices.ContainsFunc(addrs, func(x netlink.Addr) bool { return x.IP.Equal(a.AsSlice()) }) {
				add("interface %s in the pod lacks address %s", ifName, a)
			}
		}
		for _, gw := range []netip.Addr{gateway4, cni.Gateway6} {
			if slices.ContainsFunc(e.Addrs, func(a netip.Addr) bool { return a.Is4() == gw.Is4() }) {
				missing, err := gatewayLacks(l.Attrs().Index, gw)
				if err != nil {
					return err
				}
				wrong = append(wrong, missing...)
			}
		}
		return nil
	})
	if err != nil && !closed(e) {
		add("%v", err)
	}
	return wrong
}

// gatewayLacks is what is missing on the way from the pod, in whose namespace it is called, to a gateway. Neighbour
// entries are not: the dataplane answers for the gateway.
func gatewayLacks(index int, gw netip.Addr) (missing []string, err error) {
	family := netlink.FAMILY_V6
	if gw.Is4() {
		family = netlink.FAMILY_V4
	}
	routes, err := nl.Dump(func() ([]netlink.Route, error) { return netlink.RouteList(nil, family) })
	if err != nil {
		return nil, fmt.Errorf("list routes in the pod: %w", err)
	}
	if !slices.ContainsFunc(routes, func(r netlink.Route) bool {
		return r.LinkIndex == index && r.Dst != nil && r.Dst.IP.Equal(gw.AsSlice())
	}) {
		missing = append(missing, fmt.Sprintf("the pod has no route to its gateway %s", gw))
	}
	// It may be by another interface of the pod: the first one has it.
	if !slices.ContainsFunc(routes, func(r netlink.Route) bool {
		return r.Dst == nil || r.Dst.IP.IsUnspecified() && len(r.Dst.Mask) > 0 && r.Dst.Mask[0] == 0
	}) {
		missing = append(missing, fmt.Sprintf("the pod has no default route by %s", gw))
	}
	return missing, nil
}

// neighbour names an entry of the kernel's neighbour table.
type neighbour struct {
	ifindex int
	addr    netip.Addr
}

// listNeighbours reads the table of the calling thread's network namespace, of both families.
func listNeighbours() (map[neighbour]netlink.Neigh, error) {
	all := make(map[neighbour]netlink.Neigh)
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		list, err := nl.Dump(func() ([]netlink.Neigh, error) { return netlink.NeighList(0, family) })
		if err != nil {
			return nil, fmt.Errorf("list neighbours: %w", err)
		}
		for _, n := range list {
			if a, ok := netip.AddrFromSlice(n.IP); ok {
				all[neighbour{n.LinkIndex, a.Unmap()}] = n
			}
		}
	}
	return all, nil
}
