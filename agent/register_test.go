package agent

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestAddresses: the node's address of a family outlasts a moment in which the interface has lost it, and no more.
func TestAddresses(t *testing.T) {
	onHost(t, func(a *Agent) error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		ip4, ip6 := netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("2001:db8::1/64")
		addr6, err := netlink.ParseAddr(ip6.String())
		if err != nil {
			return err
		}
		addr6.Flags = unix.IFA_F_NODAD
		want := func(when string, want4, want6 netip.Prefix) {
			t.Helper()
			got4, got6, err := a.addresses(nil)
			if err != nil || got4 != want4 || got6 != want6 {
				t.Errorf("%s: %s and %s (%v), want %s and %s", when, got4, got6, err, want4, want6)
			}
		}
		if _, _, err := a.addresses(nil); err == nil {
			t.Error("addresses without a default route")
		}
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: eth0.Attrs().Index, Gw: net.ParseIP("192.0.2.254")}); err != nil {
			return err
		}
		want("at first", ip4, netip.Prefix{})
		for range 2 {
			if err := netlink.AddrAdd(eth0, addr6); err != nil {
				return err
			}
			want("with both", ip4, ip6)
			if err := netlink.AddrDel(eth0, addr6); err != nil {
				return err
			}
			want("a moment after one went", ip4, ip6)
		}
		a.missing = time.Now().Add(-missingFor)
		want("some time after", ip4, netip.Prefix{})
		want("and later", ip4, netip.Prefix{})
		return nil
	})
}
