package cni

import (
	"context"
	"errors"
	"net"
	"net/netip"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/caracal-net/caracal/ipam"
	"github.com/caracal-net/caracal/node"
)

// runIPAM serves another main plugin, bridge say: addresses and nothing else.
func (p *Plugin) runIPAM(ctx context.Context, env *Env, c *Config) (any, error) {
	if !c.ownIPAM() {
		return nil, fail(codeConfig, "ipam.type %q: this program is caracal-ipam", c.IPAM.Type)
	}
	switch env.Command {
	case "ADD":
		return p.ipamAdd(ctx, env, c)
	case "DEL":
		return nil, p.ipamDel(ctx, env, c)
	case "CHECK":
		return nil, p.ipamCheck(ctx, env, c)
	case "GC":
		valid, ok := c.valid()
		if !ok {
			return nil, nil
		}
		return nil, p.releaseStale(ctx, c, valid)
	default:
		return nil, p.ipamStatus(ctx, c)
	}
}

// ipamAdd answers with the pool's prefix length, because a bridge routes by it, and with the gateway and routes of the
// ipam object: by default the pool's first address as gateway, which is reserved then, and a default route.
func (p *Plugin) ipamAdd(ctx context.Context, env *Env, c *Config) (any, error) {
	cfg, err := c.pools()
	if err != nil {
		return nil, err
	}
	gateways, err := c.bridgeGateways(&cfg)
	if err != nil {
		return nil, err
	}
	want, err := c.requested(env)
	if err != nil {
		return nil, err
	}
	db, err := node.Open(ctx, c.StateDir, c.nodeOptions())
	if err != nil {
		return nil, err
	}
	defer db.Close()
	r := &types100.Result{CNIVersion: types100.ImplementedSpecVersion, DNS: c.DNS}
	err = db.Update(func(tx *node.Tx) error {
		v4, v6, err := c.families(tx, cfg)
		if err != nil {
			return err
		}
		addrs, err := ipam.Assign(tx, cfg, ipam.Request{Key: env.key(c), Want: want, V4: v4, V6: v6})
		p.about.Addrs = addrs
		for _, a := range addrs {
			ip := &types100.IPConfig{}
			for pool, gw := range gateways {
				if pool.Contains(a) {
					ip.Address = net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(pool.Bits(), a.BitLen())}
					ip.Gateway = gw.AsSlice()
				}
			}
			r.IPs = append(r.IPs, ip)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	if r.Routes, err = c.routes(); err != nil {
		return nil, err
	}
	return r.GetAsVersion(c.CNIVersion)
}

// routes are those that the answer to another main plugin names.
func (c *Config) routes() ([]*types.Route, error) {
	var routes []*types.Route
	for _, route := range c.IPAM.Routes {
		dst, err := netip.ParsePrefix(route.Dst)
		if err != nil {
			return nil, fail(codeConfig, "ipam.routes: %q is not a prefix", route.Dst)
		}
		gw := net.ParseIP(route.GW)
		if gw == nil && route.GW != "" {
			return nil, fail(codeConfig, "ipam.routes: gateway %q is not an address", route.GW)
		}
		routes = append(routes, &types.Route{Dst: *network(dst), GW: gw})
	}
	return routes, nil
}

// gateway is the one that the configuration names, the zero Addr when it names none.
func (c *Config) gateway() (netip.Addr, error) {
	if c.IPAM.Gateway == "" {
		return netip.Addr{}, nil
	}
	a, err := netip.ParseAddr(c.IPAM.Gateway)
	if err != nil {
		return a, fail(codeConfig, "ipam.gateway: %q is not an address", c.IPAM.Gateway)
	}
	return a, nil
}

// bridgeGateways is the gateway of every pool, reserved in cfg.
func (c *Config) bridgeGateways(cfg *ipam.Config) (map[netip.Prefix]netip.Addr, error) {
	gateways := make(map[netip.Prefix]netip.Addr)
	own, err := c.gateway()
	if err != nil {
		return nil, err
	}
	pools := []netip.Prefix{}
	for _, p := range cfg.Pools {
		pools = append(pools, p.CIDR)
	}
	if len(pools) == 0 {
		pools = append(pools, ipam.DefaultPool)
	}
	for _, p := range pools {
		gw := p.Addr().Next()
		if own.IsValid() && p.Contains(own) {
			gw = own
		}
		gateways[p] = gw
		// The network's own and its broadcast address are none that a host on a bridge can have.
		for _, a := range []netip.Addr{gw, p.Addr(), last(p)} {
			cfg.Reservations = append(cfg.Reservations, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	return gateways, nil
}

func (p *Plugin) ipamDel(ctx context.Context, env *Env, c *Config) error {
	held, err := p.held(ctx, env, c)
	if err != nil || len(held) == 0 {
		return err
	}
	for _, h := range held {
		p.about.Addrs = append(p.about.Addrs, h.Addr)
	}
	return p.update(ctx, c, func(tx *node.Tx) error {
		_, err := ipam.Release(tx, env.key(c))
		return err
	})
}

func (p *Plugin) ipamCheck(ctx context.Context, env *Env, c *Config) error {
	held, err := p.held(ctx, env, c)
	if err == nil && len(held) == 0 {
		err = differs("%s holds no address", env.key(c))
	}
	return err
}

// held looks without writing: most DELs that come late find nothing.
func (p *Plugin) held(ctx context.Context, env *Env, c *Config) (held []node.Holding, err error) {
	err = p.read(ctx, c, func(tx *node.Tx) (err error) {
		held, err = tx.Held(env.key(c))
		return err
	})
	if errors.Is(err, node.ErrNoDatabase) {
		return nil, nil
	}
	return held, err
}

// last is the highest address of a prefix.
func last(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
