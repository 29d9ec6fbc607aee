package cni

import (
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/caracal-net/caracal/internal/netns"
	"github.com/caracal-net/caracal/node"
)

// A Docker container on two networks has a MAC address for each, and that of the one is not taken for a change of the other's.
func TestMACOfSecondNetwork(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	name := fmt.Sprintf("cni-%d", os.Getpid())
	if err := netns.Create(name); err != nil {
		t.Fatal(err)
	}
	defer netns.Delete(name)
	ns, err := netns.Open(netns.Path(name))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	inode, err := ns.Inode()
	if err != nil {
		t.Fatal(err)
	}
	sides, err := openSides(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer sides.Close()
	for i, ifName := range []string{"cali0", "cali1"} {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.HardwareAddr = ifName, net.HardwareAddr{2, 0, 0, 0, 0, byte(i)}
		if err := sides.pod.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "peer" + ifName}); err != nil {
			t.Fatal(err)
		}
	}
	e := node.Endpoint{
		Key: node.Key{Network: "docker-2", ContainerID: "two", IfName: "cali0"}, Netns: netns.Path(name), NetnsID: fmt.Sprint(inode),
		MAC: "02:00:00:00:00:01", HostMAC: "02:00:00:00:00:02", Addrs: []netip.Addr{netip.MustParseAddr("10.244.0.1")},
		Docker: &node.Docker{Interface: "cali1", Gateway: Gateway4.Next()},
	}
	s := &settler{p: &Plugin{log: slog.New(slog.DiscardHandler)}, c: &Config{StateDir: t.TempDir(), BPFFSDir: t.TempDir()}}
	if err := s.pickUpMAC(t.Context(), e, 1); err != nil {
		t.Errorf("nothing has changed, but: %v", err)
	}
	if all, err := sides.pod.NeighList(0, netlink.FAMILY_V4); err != nil || len(all) > 0 {
		t.Errorf("neighbours in the container: %v, %v", all, err)
	}
}
