package cni

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/containernetworking/cni/pkg/invoke"
	types100 "github.com/containernetworking/cni/pkg/types/100"
)

// foreignAddress asks another IPAM plugin for the addresses. Only they are taken from its answer: the pod's routes are
// always ours.
func (a *adding) foreignAddress(ctx context.Context) error {
	if a.c.ownIPAM() {
		return nil
	}
	a.foreign = true
	raw, err := invoke.DelegateAdd(ctx, a.c.IPAM.Type, a.c.raw, a.delegate())
	if err != nil {
		return fmt.Errorf("ipam %s: %w", a.c.IPAM.Type, err)
	}
	r, err := types100.NewResultFromResult(raw)
	if err != nil {
		return fail(codeDecode, "ipam %s: %s", a.c.IPAM.Type, err)
	}
	for _, ip := range r.IPs {
		addr, ok := netip.AddrFromSlice(ip.Address.IP)
		if !ok {
			return fail(codeDecode, "ipam %s: illegal address %s", a.c.IPAM.Type, ip.Address.String())
		}
		a.veth.addrs = append(a.veth.addrs, addr.Unmap())
	}
	if len(a.c.DNS.Nameservers) == 0 {
		a.c.DNS = r.DNS
	}
	return nil
}

// foreignRelease gives the addresses back to another IPAM plugin.
func (p *Plugin) foreignRelease(ctx context.Context, c *Config) error {
	if err := invoke.DelegateDel(ctx, c.IPAM.Type, c.raw, p.delegate()); err != nil {
		return fmt.Errorf("ipam %s: %w", c.IPAM.Type, err)
	}
	return nil
}
