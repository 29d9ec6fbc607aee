// Package tc puts eBPF programs onto interfaces by clsact filters, as every kernel can.
package tc

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/nl"
)

// Direction is the side of an interface.
type Direction uint32

const (
	Ingress Direction = netlink.HANDLE_MIN_INGRESS
	Egress  Direction = netlink.HANDLE_MIN_EGRESS
)

// priority of our filters: ahead of what others put on the same interface by default.
const priority = 1

// handle identifies our filter at that priority.
const handle = 0xca

// Conn talks to the kernel about the interfaces of one network namespace.
type Conn struct {
	rtnl *netlink.Handle
}

// Here opens a socket for each question, in the calling thread's network namespace.
func Here() Conn { return Conn{&netlink.Handle{}} }

// On uses a handle that is open.
func On(rtnl *netlink.Handle) Conn { return Conn{rtnl} }

// AddClsact gives an interface the clsact qdisc that filters hang on. One that is there already is kept.
func (c Conn) AddClsact(ifindex int) error {
	err := c.rtnl.QdiscAdd(clsact(ifindex))
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add clsact qdisc to interface %d: %w", ifindex, err)
	}
	return nil
}

// RemoveClsact removes the clsact qdisc when no filter of anybody hangs on it any more.
func (c Conn) RemoveClsact(ifindex int) error {
	for _, d := range []Direction{Ingress, Egress} {
		all, err := c.filters(ifindex, d)
		if err != nil {
			return err
		}
		if len(all) > 0 {
			return nil
		}
	}
	if err := c.rtnl.QdiscDel(clsact(ifindex)); err != nil && !gone(err) {
		return fmt.Errorf("remove clsact qdisc from interface %d: %w", ifindex, err)
	}
	return nil
}

// Attach puts a program, by its descriptor, onto one side of an interface, or replaces the one that is there in one
// step. The interface needs a clsact qdisc.
func (c Conn) Attach(ifindex int, d Direction, name string, fd int) error {
	f := filter(ifindex, d)
	f.Name, f.Fd, f.DirectAction = name, fd, true
	if err := c.rtnl.FilterReplace(f); err != nil {
		return fmt.Errorf("attach %s to interface %d by clsact: %w", name, ifindex, err)
	}
	return nil
}

// Detach removes our program from one side of an interface. None there is not an error.
func (c Conn) Detach(ifindex int, d Direction) error {
	if err := c.rtnl.FilterDel(filter(ifindex, d)); err != nil && !gone(err) {
		return fmt.Errorf("detach from interface %d by clsact: %w", ifindex, err)
	}
	return nil
}

// Attached returns the kernel's id of our program on one side of an interface, 0 when there is none.
func (c Conn) Attached(ifindex int, d Direction) (int, error) {
	id, _, err := c.Named(ifindex, d)
	return id, err
}

// Named is Attached with the name that Attach was given.
func (c Conn) Named(ifindex int, d Direction) (id int, name string, err error) {
	all, err := c.filters(ifindex, d)
	if err != nil {
		return 0, "", err
	}
	for _, f := range all {
		if b, ok := f.(*netlink.BpfFilter); ok && b.Handle == handle && b.Priority == priority {
			return b.Id, b.Name, nil
		}
	}
	return 0, "", nil
}

func (c Conn) filters(ifindex int, d Direction) ([]netlink.Filter, error) {
	link := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: ifindex}}
	all, err := nl.Dump(func() ([]netlink.Filter, error) { return c.rtnl.FilterList(link, uint32(d)) })
	if err != nil && !gone(err) {
		return nil, fmt.Errorf("list filters of interface %d: %w", ifindex, err)
	}
	return all, nil
}

func filter(ifindex int, d Direction) *netlink.BpfFilter {
	return &netlink.BpfFilter{FilterAttrs: netlink.FilterAttrs{
		LinkIndex: ifindex,
		Parent:    uint32(d),
		Handle:    handle,
		Protocol:  unix.ETH_P_ALL,
		Priority:  priority,
	}}
}

func clsact(ifindex int) *netlink.GenericQdisc {
	return &netlink.GenericQdisc{
		QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: ifindex,
			Handle:    netlink.MakeHandle(0xffff, 0),
			Parent:    netlink.HANDLE_CLSACT,
		},
		QdiscType: "clsact",
	}
}

// gone tells the errors with which the kernel says that there is nothing to remove or list.
func gone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV)
}
