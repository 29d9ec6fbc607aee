package agent

import (
	"context"
	"fmt"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/cni"
)

// watchLinks asks for a look whenever an interface of the host, or an address of one, changes: uplinks, routes and what pods are
// masqueraded by follow them. Pods' interfaces are left out: node.db tells of them.
func (a *Agent) watchLinks(ctx context.Context) {
	for ctx.Err() == nil {
		if err := a.followLinks(ctx); err != nil {
			a.problem("links", err)
		}
		a.routes.lookAgain() // for what was not heard
		a.changed()
		select {
		case <-time.After(retryFrom):
		case <-ctx.Done():
		}
	}
}

// followLinks listens until ctx ends, or until rtnetlink has lost some of it (ENOBUFS, netlink(7)).
func (a *Agent) followLinks(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	links, addrs := make(chan netlink.LinkUpdate), make(chan netlink.AddrUpdate)
	defer func() {
		cancel()
		go drain(links)
		go drain(addrs)
	}()
	if err := netlink.LinkSubscribe(links, ctx.Done()); err != nil {
		close(links)
		close(addrs)
		return fmt.Errorf("listen for changes of interfaces: %w", err)
	}
	if err := netlink.AddrSubscribe(addrs, ctx.Done()); err != nil {
		close(addrs)
		return fmt.Errorf("listen for changes of addresses: %w", err)
	}
	a.problem("links", nil)
	for {
		select {
		case l, ok := <-links:
			if !ok {
				return nil
			}
			if at := l.Attrs(); at.Group == cni.LinkGroup && at.Name != cni.TunnelName {
				continue
			}
		case x, ok := <-addrs:
			if !ok {
				return nil
			}
			if x.Scope != unix.RT_SCOPE_UNIVERSE {
				continue
			}
		case <-ctx.Done():
			return nil
		}
		a.routes.lookAgain()
		a.changed()
	}
}

// drain lets who sends come to its end.
func drain[T any](c <-chan T) {
	for range c {
	}
}
