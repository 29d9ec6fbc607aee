package docker

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	helper "github.com/docker/go-plugins-helpers/ipam"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/ipam"
	"github.com/caracal-net/caracal/node"
)

// space is how an IPAM driver's address spaces and pools are called.
type space struct{ local, global, pool4, pool6 string }

// spaces are those of the drivers, by the network driver's name. Calico's are as in its libnetwork plugin.
var spaces = map[string]space{
	"caracal": {"CaracalLocalAddressSpace", "CaracalGlobalAddressSpace", "CaracalPoolIPv4", "CaracalPoolIPv6"},
	"calico":  {"CalicoLocalAddressSpace", "CalicoGlobalAddressSpace", "CalicoPoolIPv4", "CalicoPoolIPv6"},
}

func isSpace(name string) bool {
	for _, s := range spaces {
		if name == s.local || name == s.global {
			return true
		}
	}
	return false
}

// What a pool's gateway is said to be: none, so that Docker requests no address for it.
const (
	noGateway4 = "0.0.0.0/0"
	noGateway6 = "::/0"
)

// gatewayData is the key under which a pool's gateway stands, and the type of a request for one.
const gatewayData = "com.docker.network.gateway"

// ipamDriver gives Docker addresses of this node's blocks.
type ipamDriver struct {
	*Drivers
	name string
}

func (i *ipamDriver) GetCapabilities() (*helper.CapabilitiesResponse, error) {
	return &helper.CapabilitiesResponse{}, nil
}

func (i *ipamDriver) GetDefaultAddressSpaces() (*helper.AddressSpacesResponse, error) {
	return &helper.AddressSpacesResponse{LocalDefaultAddressSpace: spaces[i.name].local, GlobalDefaultAddressSpace: spaces[i.name].global}, nil
}

// RequestPool finds a pool for a network, or says that it may have addresses of all.
func (i *ipamDriver) RequestPool(r *helper.RequestPoolRequest) (_ *helper.RequestPoolResponse, err error) {
	defer i.answer("RequestPool", time.Now(), &err, "pool", r.Pool)
	ctx, cancel := i.request()
	defer cancel()
	if r.SubPool != "" {
		return nil, fmt.Errorf("--ip-range %.80q: %w; each host gives out addresses of its own blocks", r.SubPool, errUnsupported)
	}
	for key := range r.Options {
		return nil, fmt.Errorf("--ipam-opt %.80q: %w", key, errUnsupported)
	}
	pools, err := i.pools(ctx)
	if err != nil {
		return nil, err
	}
	id, answer, err := choosePool(spaces[i.name], pools, r.Pool, r.V6)
	if err != nil {
		return nil, err
	}
	gateway := noGateway4
	if r.V6 {
		gateway = noGateway6
	}
	return &helper.RequestPoolResponse{PoolID: id, Pool: answer, Data: map[string]string{gatewayData: gateway}}, nil
}

// choosePool finds the pool that --subnet names; without one it is any of its family.
func choosePool(s space, pools []api.IPPool, subnet string, v6 bool) (id, pool string, err error) {
	var known []string
	found := false
	for _, p := range pools {
		known = append(known, p.CIDR.String())
		found = found || p.CIDR.Addr().Is6() == v6 && !p.Disabled
	}
	list := "they are " + strings.Join(known, ", ")
	if len(known) == 0 {
		list = "there are none"
	}
	if subnet == "" {
		switch {
		case !found && v6:
			return "", "", fmt.Errorf("no IPv6 pool is enabled; %s; make one (caracalctl apply)", list)
		case !found:
			return "", "", fmt.Errorf("no IPv4 pool is enabled; %s; make one (caracalctl apply)", list)
		case v6:
			return s.pool6, "::/0", nil
		}
		return s.pool4, "0.0.0.0/0", nil
	}
	cidr, err := netip.ParsePrefix(subnet)
	if err != nil {
		return "", "", fmt.Errorf("--subnet %.80q: write it as 10.244.0.0/16", subnet)
	}
	for _, p := range pools {
		if p.CIDR == cidr.Masked() && p.Disabled {
			return "", "", fmt.Errorf("--subnet %s: this pool is disabled", cidr)
		}
		if p.CIDR == cidr.Masked() {
			return p.CIDR.String(), p.CIDR.String(), nil
		}
	}
	return "", "", fmt.Errorf("--subnet %s is none of the pools; %s (caracalctl get ippools). Name one of them, or leave --subnet out to have addresses of any", cidr, list)
}

const (
	claims = 5 * time.Second // how long an agent that begins, or needs another block, is waited for
	again  = 100 * time.Millisecond
)

// pools are the cluster's, as this node's agent recorded them.
func (d *Drivers) pools(ctx context.Context) (pools []api.IPPool, err error) {
	err = d.patiently(ctx, func() error {
		pools, err = nil, ipam.ErrNoCluster // of a node without a database
		verr := d.attacher.View(ctx, func(tx *node.Tx) error {
			pools, _, err = ipam.Pools(tx, ipam.Config{Cluster: true})
			return nil
		})
		return errors.Join(verr, err)
	})
	return pools, err
}

// patiently waits for what the agent will have in a moment.
func (d *Drivers) patiently(ctx context.Context, do func() error) error {
	deadline := time.Now().Add(claims)
	for {
		err := do()
		if !errors.Is(err, ipam.ErrNoCluster) && !errors.Is(err, ipam.ErrExhausted) || time.Now().After(deadline) {
			return err
		}
		select {
		case <-time.After(again):
		case <-ctx.Done():
			return err
		}
	}
}

// ReleasePool has nothing to do: a pool is not a network's alone.
func (i *ipamDriver) ReleasePool(*helper.ReleasePoolRequest) error { return nil }

// RequestAddress gives out an address. Docker holds it until CreateEndpoint says for whom.
func (i *ipamDriver) RequestAddress(r *helper.RequestAddressRequest) (_ *helper.RequestAddressResponse, err error) {
	var got netip.Addr
	defer func(begin time.Time) {
		i.answer("RequestAddress", begin, &err, "pool", r.PoolID, "requested", r.Address, "address", got)
	}(time.Now())
	ctx, cancel := i.request()
	defer cancel()
	if r.Options["RequestAddressType"] == gatewayData {
		if r.Address != "" {
			return nil, fmt.Errorf("--gateway %.80q: %w; every container's gateway is 169.254.1.1", r.Address, errUnsupported)
		}
		return &helper.RequestAddressResponse{Address: noGateway4}, nil
	}
	cfg, want, err := readRequest(r.PoolID, r.Address)
	if err != nil {
		return nil, err
	}
	err = i.patiently(ctx, func() error {
		return i.attacher.Update(ctx, func(tx *node.Tx) error {
			addrs, err := ipam.Assign(tx, cfg, want)
			if err != nil {
				return err
			}
			if got = addrs[0]; got.Is4() == want.V6 { // what was requested decides
				return fmt.Errorf("%s is of the other family than pool %s", got, r.PoolID)
			}
			return tx.Transfer(got, requested(got))
		})
	})
	if errors.Is(err, ipam.ErrTaken) {
		err = i.named(ctx, want.Want[0], err)
	}
	if err != nil {
		return nil, err
	}
	if err := i.step("docker-requested"); err != nil {
		return nil, err
	}
	return &helper.RequestAddressResponse{Address: netip.PrefixFrom(got, got.BitLen()).String()}, nil
}

// named is the error that an address is taken, with the name of the container that has it.
func (d *Drivers) named(ctx context.Context, a netip.Addr, err error) error {
	all, _ := d.attacher.Endpoints(ctx)
	for _, e := range all {
		if slices.Contains(e.Addrs, a) && e.PodName != "" {
			return fmt.Errorf("%s: %w by container %s", a, ipam.ErrTaken, e.PodName)
		}
	}
	return err
}

// assigning is the key under which an address is given out before it is known which.
var assigning = node.Key{Network: keyNetwork + "assigning", ContainerID: "address", IfName: keyIfName}

// readRequest reads the pool and the address of a RequestAddress. Any daemon may have requested the pool.
func readRequest(poolID, address string) (cfg ipam.Config, want ipam.Request, err error) {
	cfg.Cluster, want.Key = true, assigning
	switch {
	case slices.ContainsFunc([]string{"caracal", "calico"}, func(n string) bool { return spaces[n].pool4 == poolID }):
		want.V4 = true
	case slices.ContainsFunc([]string{"caracal", "calico"}, func(n string) bool { return spaces[n].pool6 == poolID }):
		want.V6 = true
	default:
		p, err := netip.ParsePrefix(poolID)
		if err != nil || p != p.Masked() {
			return cfg, want, fmt.Errorf("pool id %.80q is none of ours", poolID)
		}
		cfg.Pools = []api.IPPool{{CIDR: p}}
		want.V4, want.V6 = p.Addr().Is4(), p.Addr().Is6()
	}
	if address == "" {
		return cfg, want, nil
	}
	a, err := netip.ParseAddr(address)
	if err != nil {
		return cfg, want, fmt.Errorf("address %.80q: it is none", address)
	}
	want.Want = []netip.Addr{a.Unmap()}
	return cfg, want, nil
}

// ReleaseAddress takes an address back, unless a container has it: then Docker speaks of an earlier one, late.
func (i *ipamDriver) ReleaseAddress(r *helper.ReleaseAddressRequest) (err error) {
	defer i.answer("ReleaseAddress", time.Now(), &err, "address", r.Address)
	ctx, cancel := i.request()
	defer cancel()
	a, err := netip.ParseAddr(r.Address)
	if err != nil {
		p, perr := netip.ParsePrefix(r.Address)
		if perr != nil {
			return fmt.Errorf("address %.80q: it is none", r.Address)
		}
		a = p.Addr()
	}
	if a = a.Unmap(); a.IsUnspecified() {
		return nil // a gateway's
	}
	return i.attacher.Update(ctx, func(tx *node.Tx) error { return release(tx, a) })
}

// release frees an address that Docker holds and no container has.
func release(tx *node.Tx, a netip.Addr) error {
	owner, err := tx.Owner(a)
	if errors.Is(err, node.ErrNotFound) || err == nil && !ours(owner) {
		return nil
	}
	if err != nil {
		return err
	}
	if _, err := tx.Endpoint(owner); !errors.Is(err, node.ErrNotFound) {
		return err
	}
	if err := tx.Transfer(a, assigning); err != nil {
		return err
	}
	_, err = tx.Release(assigning)
	return err
}
