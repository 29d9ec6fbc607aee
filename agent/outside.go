package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/cni"
	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/internal/nl"
	"github.com/caracal-net/caracal/ipam"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
)

// masquerades tells whether pods of some pool leave with their host's address.
func masquerades(v *view) bool {
	return slices.ContainsFunc(v.pools, func(p api.IPPool) bool { return p.NATOutgoing })
}

// masquerade keeps what the programs masquerade by: the addresses of the uplinks, the ports, and which pods it is for.
func (a *Agent) masquerade(ctx context.Context, v *view, self *api.Node) error {
	state, err := a.maps.State()
	if err != nil {
		return err
	}
	if !masquerades(v) && state.NATPorts == (maps.Ports{}) { // nor does a pod with ipMasq
		return nil
	}
	there, err := a.maps.Uplinks()
	if err != nil {
		return err
	}
	var errs []error
	for name, index := range a.uplinks {
		if index == a.tunnel.index {
			continue // nothing leaves the pools by it
		}
		u, err := cni.UplinkAddresses(&netlink.Handle{}, index, self.BGP.IPv4Address.Addr(), self.BGP.IPv6Address.Addr())
		switch {
		case err != nil:
			errs = append(errs, err)
		case u != there[uint32(index)]:
			errs = append(errs, a.maps.PutUplink(uint32(index), u))
			a.Log.Info("masquerade", "interface", name, "ipv4", u.IPv4, "ipv6", u.IPv6)
		}
	}
	ports := a.NATPorts
	if ports == (maps.Ports{}) {
		ports = cni.MasqueradePorts
	}
	if state.NATPorts != ports {
		errs = append(errs, a.maps.SetNATPorts(ports))
	}
	return errors.Join(append(errs, a.masqueradePods(ctx, v))...)
}

// masqueradePods makes the pods that are there follow their pools.
func (a *Agent) masqueradePods(ctx context.Context, v *view) error {
	db, err := node.OpenReadOnly(ctx, a.StateDir, a.nodeOptions())
	if errors.Is(err, node.ErrNoDatabase) {
		return nil
	}
	if err != nil {
		return err
	}
	defer db.Close()
	var others []node.Endpoint
	err = db.View(func(tx *node.Tx) error {
		return tx.Endpoints(func(e node.Endpoint) error {
			if want := follow(e, v.pools); want.Masquerade4 != e.Masquerade4 || want.Masquerade6 != e.Masquerade6 {
				others = append(others, e)
			}
			return nil
		})
	})
	if err := errors.Join(err, db.Close()); err != nil || len(others) == 0 {
		return err
	}
	lock, err := node.LockNode(ctx, a.StateDir)
	if err != nil {
		return err
	}
	defer lock.Unlock()
	db, err = node.Open(ctx, a.StateDir, a.nodeOptions())
	if err != nil {
		return err
	}
	defer db.Close()
	var changed []node.Endpoint
	err = db.Update(func(tx *node.Tx) error {
		changed = nil
		for _, o := range others {
			e, err := tx.Endpoint(o.Key) // again: a DEL may have come between
			if errors.Is(err, node.ErrNotFound) {
				continue
			}
			if err != nil {
				return err
			}
			e = follow(e, v.pools)
			if err := tx.PutEndpoint(e); err != nil {
				return err
			}
			changed = append(changed, e)
		}
		return nil
	})
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range changed {
		index, err := nl.Index(e.HostIfName)
		if err != nil {
			continue // it is gone, or its ADD comes to it
		}
		if _, err := a.maps.Pod(uint32(index)); errors.Is(err, maps.ErrNotFound) {
			continue // likewise
		}
		if err := commit.AddPod(a.maps, commit.PodOf(e, index)); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", e.Key, err))
		}
	}
	return errors.Join(errs...)
}

// follow is an endpoint masqueraded as its configuration and its pools say.
func follow(e node.Endpoint, pools []api.IPPool) node.Endpoint {
	e.Masquerade4, e.Masquerade6 = ipam.NATOutgoing(pools, e.Addrs)
	e.Masquerade4, e.Masquerade6 = e.Masquerade4 || e.IPMasq, e.Masquerade6 || e.IPMasq
	return e
}

// poolOf is the pool that a prefix lies in.
func poolOf(pools []api.IPPool, p netip.Prefix) (api.IPPool, bool) {
	for _, pool := range pools {
		if pool.CIDR.Bits() <= p.Bits() && pool.CIDR.Contains(p.Addr()) {
			return pool, true
		}
	}
	return api.IPPool{}, false
}
