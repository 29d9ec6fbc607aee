package agent

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/cni"
	"github.com/caracal-net/caracal/internal/nl"
	"github.com/caracal-net/caracal/ipam"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/node"
)

// ErrTunnel says that there can't be the VXLAN interface that some pool wants.
var ErrTunnel = errors.New("VXLAN")

// tunnel is the VXLAN interface of this node; zero: there is none.
type tunnel struct {
	index, mtu int
	vni        uint32
	v4, v6     netip.Addr // this host's own, out of its blocks: what it sends to pods of other hosts comes from them
}

// source is the host's address in the tunnel for a family.
func (t tunnel) source(v6 bool) netip.Addr {
	if v6 {
		return t.v6
	}
	return t.v4
}

// setTunnel makes the VXLAN interface when a pool wants one, and removes it when none does.
func (a *Agent) setTunnel(ctx context.Context, v *view, self *api.Node) error {
	var v4, v6 bool
	for _, p := range v.pools {
		if p.Encapsulates() {
			v4, v6 = v4 || p.CIDR.Addr().Is4(), v6 || p.CIDR.Addr().Is6()
		}
	}
	if !v4 && !v6 {
		return a.removeTunnel(ctx)
	}
	outer, err := a.outerMTU(self)
	if err != nil {
		return err
	}
	// RFC 7348 section 5: the inner Ethernet, VXLAN, UDP and outer IP headers. Blocks of a family are behind hosts' addresses of
	// that family.
	t := tunnel{vni: uint32(a.VXLANVNI), mtu: outer - 50}
	if v6 {
		t.mtu = outer - 70
	}
	if t.index, err = a.tunnelLink(t.mtu); err != nil {
		return err
	}
	// A node that no such pool is for has no address in the tunnel, and no pod that would want one.
	usable := func(v6 bool) bool {
		return slices.ContainsFunc(v.usable, func(p api.IPPool) bool {
			return p.Encapsulates() && !p.Disabled && p.CIDR.Addr().Is6() == v6
		})
	}
	if t.v4, t.v6, err = a.tunnelAddresses(ctx, usable(false), usable(true)); err != nil {
		return err
	}
	if err := giveAddresses(t); err != nil {
		return fmt.Errorf("%w: give %s its addresses: %w", ErrTunnel, cni.TunnelName, err)
	}
	if a.tunnel == t {
		return nil
	}
	if err := errors.Join(a.maps.PutUplink(uint32(t.index), maps.Uplink{VNI: t.vni}), a.maps.SetTunnel(uint32(t.index))); err != nil {
		return err
	}
	a.tunnel = t
	a.Log.Info("tunnel", "interface", cni.TunnelName, "mtu", t.mtu, "vni", t.vni, "ipv4", t.v4, "ipv6", t.v6)
	return nil
}

// giveAddresses makes the interface's addresses those of the tunnel and no other: one that it had may be a pod's now.
func giveAddresses(t tunnel) error {
	link := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: t.index}}
	there, err := nl.Dump(func() ([]netlink.Addr, error) { return netlink.AddrList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return err
	}
	var errs []error
	has := make(map[netip.Addr]bool)
	for _, x := range there {
		p, ok := prefixOf(x)
		if has[p.Addr()] = true; ok && p.Addr() != t.v4 && p.Addr() != t.v6 {
			errs = append(errs, netlink.AddrDel(link, &x))
		}
	}
	for _, addr := range []netip.Addr{t.v4, t.v6} {
		if addr.IsValid() && !has[addr] {
			x := &netlink.Addr{IPNet: nl.Net(netip.PrefixFrom(addr, addr.BitLen())), Flags: unix.IFA_F_NODAD}
			errs = append(errs, netlink.AddrReplace(link, x))
		}
	}
	return errors.Join(errs...)
}

// outerMTU is the smallest MTU of the interfaces that other hosts are behind.
func (a *Agent) outerMTU(self *api.Node) (int, error) {
	links, err := nl.Dump(netlink.LinkList)
	if err != nil {
		return 0, fmt.Errorf("list interfaces: %w", err)
	}
	mtu := 0
	for _, l := range links {
		at := l.Attrs()
		if at.Name == cni.TunnelName {
			continue
		}
		_, uplink := a.underlay[at.Name]
		if len(a.underlay) == 0 { // none yet: the one that has this node's address
			addrs, err := nl.Dump(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_ALL) })
			if err != nil {
				return 0, fmt.Errorf("list addresses of %s: %w", at.Name, err)
			}
			uplink = slices.ContainsFunc(addrs, func(x netlink.Addr) bool {
				p, ok := prefixOf(x)
				return ok && (p.Addr() == self.BGP.IPv4Address.Addr() || p.Addr() == self.BGP.IPv6Address.Addr())
			})
		}
		if uplink && (mtu == 0 || at.MTU < mtu) {
			mtu = at.MTU
		}
	}
	if mtu == 0 {
		mtu = 1500
	}
	if mtu < 1280+70 {
		return 0, fmt.Errorf("%w: an MTU of %d leaves pods less than IPv6 needs (1280)", ErrTunnel, mtu)
	}
	return mtu, nil
}

// tunnelLink makes the interface, or makes it again when it is not as it should be. One of that name that is not ours stays,
// and so does one of anybody's that has the port.
func (a *Agent) tunnelLink(mtu int) (int, error) {
	there, err := netlink.LinkByName(cni.TunnelName)
	if err != nil && !nl.IsNotFound(err) {
		return 0, fmt.Errorf("%w: look for %s: %w", ErrTunnel, cni.TunnelName, err)
	}
	exists := err == nil
	if exists {
		x, ok := there.(*netlink.Vxlan)
		if !ok || x.Attrs().Group != cni.LinkGroup {
			return 0, fmt.Errorf("%w: an interface %s exists and is not Caracal's; remove it (ip link del %s)", ErrTunnel, cni.TunnelName, cni.TunnelName)
		}
		if x.Port != a.VXLANPort || !x.FlowBased {
			if err := netlink.LinkDel(there); err != nil {
				return 0, fmt.Errorf("%w: remove %s to make it again: %w", ErrTunnel, cni.TunnelName, err)
			}
			exists = false
		}
	}
	if !exists {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU, attrs.Group = cni.TunnelName, mtu, cni.LinkGroup
		if err := netlink.LinkAdd(&netlink.Vxlan{LinkAttrs: attrs, FlowBased: true, Port: a.VXLANPort}); err != nil {
			return 0, fmt.Errorf("%w: make %s: %w", ErrTunnel, cni.TunnelName, err)
		}
		if there, err = netlink.LinkByName(cni.TunnelName); err != nil {
			return 0, fmt.Errorf("%w: look for %s: %w", ErrTunnel, cni.TunnelName, err)
		}
	}
	if there.Attrs().RawFlags&unix.IFF_NOARP == 0 {
		// Neighbours need no asking: from_net takes what comes in for this host's, whatever its MAC address.
		if err := errors.Join(netlink.LinkSetIP6AddrGenMode(there, 1 /* none */), netlink.LinkSetARPOff(there)); err != nil {
			return 0, fmt.Errorf("%w: set up %s: %w", ErrTunnel, cni.TunnelName, err)
		}
	}
	if there.Attrs().MTU != mtu {
		if err := netlink.LinkSetMTU(there, mtu); err != nil {
			return 0, fmt.Errorf("%w: set the MTU of %s to %d: %w", ErrTunnel, cni.TunnelName, mtu, err)
		}
	}
	if there.Attrs().Flags&net.FlagUp == 0 {
		err := netlink.LinkSetUp(there)
		if errors.Is(err, unix.EADDRINUSE) {
			return 0, fmt.Errorf("%w: UDP port %d is in use on this host by something else (ss -lnup; ip -d link show type vxlan); give all nodes another (--vxlan-port)", ErrTunnel, a.VXLANPort)
		}
		if err != nil {
			return 0, fmt.Errorf("%w: set %s up: %w", ErrTunnel, cni.TunnelName, err)
		}
	}
	return there.Attrs().Index, nil
}

// tunnelAddresses are the host's own addresses in the tunnel, held in node.db like a pod's.
func (a *Agent) tunnelAddresses(ctx context.Context, want4, want6 bool) (v4, v6 netip.Addr, err error) {
	sort := func(x netip.Addr) {
		if x.Is4() {
			v4 = x
		} else {
			v6 = x
		}
	}
	db, err := node.OpenReadOnly(ctx, a.StateDir, a.nodeOptions())
	if err != nil {
		return v4, v6, err
	}
	err = db.View(func(tx *node.Tx) error {
		held, err := tx.Held(ipam.TunnelKey)
		for _, h := range held {
			if b, err := tx.Block(h.Block); err != nil || !b.Closed { // else it may be another node's, and is exchanged
				sort(h.Addr)
			}
		}
		return err
	})
	if err := errors.Join(err, db.Close()); err != nil || v4.IsValid() == want4 && v6.IsValid() == want6 {
		return v4, v6, err
	}
	if db, err = node.Open(ctx, a.StateDir, a.nodeOptions()); err != nil {
		return v4, v6, err
	}
	defer db.Close()
	err = db.Update(func(tx *node.Tx) error {
		had := slices.DeleteFunc([]netip.Addr{v4, v6}, func(x netip.Addr) bool { return !x.IsValid() })
		if _, err := ipam.Release(tx, ipam.TunnelKey); err != nil { // who holds an address is given no other
			return err
		}
		v4, v6 = netip.Addr{}, netip.Addr{}
		got, err := ipam.Assign(tx, ipam.Config{Cluster: true}, ipam.Request{Key: ipam.TunnelKey, Had: had, V4: want4, V6: want6})
		for _, x := range got {
			sort(x)
		}
		return err
	})
	if err != nil {
		return v4, v6, fmt.Errorf("%w: an address for %s: %w", ErrTunnel, cni.TunnelName, err)
	}
	return v4, v6, nil
}

// removeTunnel takes the interface away, and what an agent before this one left of it.
func (a *Agent) removeTunnel(ctx context.Context) error {
	there, err := netlink.LinkByName(cni.TunnelName)
	if err != nil && !nl.IsNotFound(err) {
		return fmt.Errorf("%w: look for %s: %w", ErrTunnel, cni.TunnelName, err)
	}
	link := err == nil && there.Attrs().Group == cni.LinkGroup
	state, err := a.maps.State()
	if err != nil {
		return err
	}
	v4, v6, err := a.tunnelAddresses(ctx, false, false)
	if err != nil {
		return err
	}
	if !link && state.Tunnel == 0 && !v4.IsValid() && !v6.IsValid() {
		return nil
	}
	errs := []error{a.maps.SetTunnel(0), a.maps.RemoveUplink(state.Tunnel)}
	if link {
		errs = append(errs, netlink.LinkDel(there))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("%w: remove %s: %w", ErrTunnel, cni.TunnelName, err)
	}
	a.tunnel = tunnel{}
	a.Log.Info("tunnel removed", "interface", cni.TunnelName)
	return nil
}

// ipEncap is the encapsulation of a route (LWTUNNEL_ENCAP_IP and _IP6 of linux/lwtunnel.h): what the host's stack sends by it
// goes to a host in the tunnel.
type ipEncap struct {
	vni uint32
	to  netip.Addr
}

// Type is the kernel's number of this encapsulation.
func (e *ipEncap) Type() int {
	if e.to.Is4() {
		return 2
	}
	return 4
}

// Encode writes the attributes: the id, 64 bits in network order, and the destination.
func (e *ipEncap) Encode() ([]byte, error) {
	const id, dst, flags = 1, 2, 6
	to := e.to.AsSlice()
	b := binary.NativeEndian.AppendUint16(nil, 4+8)
	b = binary.NativeEndian.AppendUint16(b, id)
	b = binary.BigEndian.AppendUint64(b, uint64(e.vni))
	b = binary.NativeEndian.AppendUint16(b, uint16(4+len(to)))
	b = binary.NativeEndian.AppendUint16(b, dst)
	b = append(b, to...)
	if e.to.Is6() { // UDP over IPv6 has a checksum (RFC 8200 section 8.1): TUNNEL_CSUM, padded
		b = append(binary.NativeEndian.AppendUint16(binary.NativeEndian.AppendUint16(b, 4+2), flags), 0, 1, 0, 0)
	}
	return b, nil
}

// Decode is asked by nobody: the library decodes only encapsulations that it knows.
func (e *ipEncap) Decode([]byte) error { return errors.ErrUnsupported }

// String is what ip-route(8) writes.
func (e *ipEncap) String() string { return fmt.Sprintf("ip id %d dst %s", e.vni, e.to) }

// Equal compares two encapsulations.
func (e *ipEncap) Equal(o netlink.Encap) bool {
	x, ok := o.(*ipEncap)
	return ok && *x == *e
}
