package cni

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/caracal-net/caracal/internal/netns"
)

// The interfaces by which packets leave the pools are those that routes lead to, whatever they are; those into a pool don't count.
func TestWaysOut(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	name := fmt.Sprintf("cwo-%d", os.Getpid())
	if err := netns.Create(name); err != nil {
		t.Fatal(err)
	}
	defer netns.Delete(name)
	const script = `set -e
ip link set lo up
for i in eth0 second idle pods other bare; do ip link add $i type veth peer name peer-$i; ip link set $i up; done
ip link set pods group 202
ip tuntap add dev third mode tun; ip link set third up
ip addr add 192.0.2.1/24 dev eth0; ip route add default via 192.0.2.254; ip -6 route add default dev eth0
ip addr add 2001:db8:1::1/64 dev second nodad
ip route add 10.244.0.5/32 dev pods; ip route add 203.0.113.0/24 dev pods
ip route add 10.244.7.0/24 dev other
ip route add 10.0.0.0/8 dev third; ip route add 203.0.113.7/32 dev bare
ip route add 198.51.100.0/24 dev idle table 7`
	err := netns.Do(netns.Path(name), func() error {
		if out, err := exec.Command("sh", "-c", script).CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		found, others, err := WaysOut(&netlink.Handle{}, []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")})
		if err != nil {
			return err
		}
		if len(found) != 2 || found["eth0"] == 0 || found["second"] == 0 || !slices.Equal(others, []string{"third", "bare"}) {
			t.Errorf("found %v and others %v", found, others)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
