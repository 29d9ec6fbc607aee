package dataplane

import (
	"bytes"
	"net"
	"net/netip"
	"testing"

	"github.com/gopacket/gopacket/layers"

	"github.com/caracal-net/caracal/loader"
)

// netCases are frames that come in by the uplink.
func netCases(b *bench) []packetCase {
	var (
		a, r           = b.a, b.r
		a4, r4, a6, r6 = at(a.v4, 4000), at(r.v4, 80), at(a.v6, 4000), at(r.v6, 80)
		udp4, udp6     = udp(r, r4, a4, 32), udp(r, r6, a6, 32)
		linkLocal      = netip.MustParseAddr("fe80::9")
		mapped         = bytes.Clone(udp6)
	)
	v4in6 := r.v4.As16()
	copy(mapped[22:], v4in6[:])
	return []packetCase{
		{"tcp", tcp(r, r4, a4, "S", 0), "forward_pod"}, {"tcp6", tcp(r, r6, a6, "S", 0), "forward_pod"},
		{"udp", udp4, "forward_pod"}, {"udp6", udp6, "forward_pod"},
		{"echo", echo(r, r.v4, a.v4, 9, false), "forward_pod"}, {"echo6", echo(r, r.v6, a.v6, 9, false), "forward_pod"},
		{"sctp", sctp(r, r4, a4, 1), "forward_pod"},
		{"gre", raw(r, r.v4, a.v4, layers.IPProtocolGRE, make([]byte, 8)), "stack_protocol"},
		{"options", options4(udp4), "stack_options"},
		{"first fragment", part4(r, r.v4, a.v4, 17, 73, 0, true, patch(udp4[34:], 4, 2, 0)), "forward_pod"},
		{"ttl 1", checksum4(patch(udp4, 22, 1)), "stack_ttl"}, {"hop limit 1", patch(udp6, 21, 1), "stack_ttl"},
		{"mtu and one", udp(r, r4, a4, 1473), "stack_mtu"},

		{"from a stranger", udp(r, at(stranger4, 1), a4, 1), "stack_routed"}, {"from a stranger 6", udp(r, at(stranger6, 1), a6, 1), "stack_routed"},
		{"as the host", udp(r, at(outside, 1), a4, 1), "stack_routed"}, {"from link-local", udp(r, at(linkLocal, 1), a6, 1), "stack_routed"},
		{"to the host", udp(r, r4, at(outside, 53), 1), "stack_other"}, {"to the world", udp(r, r4, at(stranger4, 53), 1), "stack_other"},
		{"to the other host", udp(r, at(stranger4, 1), r4, 1), "stack_other"},
		{"to nobody", udp(r, r4, at(nobody4, 53), 1), "drop_no_pod"}, {"to nobody 6", udp(r, r6, at(nobody6, 53), 1), "drop_no_pod"},
		{"as the pod", udp(r, a4, a4, 1), "drop_spoof_net"}, {"as the pod 6", udp(r, at(b.b.v6, 1), a6, 1), "drop_spoof_net"},
		{"as the pod to the host", udp(r, a4, at(outside, 53), 1), "drop_spoof_net"},
		{"as nobody", udp(r, at(nobody4, 1), a4, 1), "drop_spoof_net"}, {"as nobody 6", udp(r, at(nobody6, 1), a6, 1), "drop_spoof_net"},
		{"v4-mapped", mapped, "stack_other"},
		{"error about nothing", unreachable(r, r.v4, a.v4, udp(a, at(a.v4, 9), r4, 1)), "drop_icmp_error"},
		{"error about nothing 6", unreachable(r, r.v6, a.v6, udp(a, at(a.v6, 9), r6, 1)), "drop_icmp_error"},

		{"broadcast frame", to(layers.EthernetBroadcast, udp4), "stack_other"},
		{"frame to another", to(net.HardwareAddr{2, 9, 9, 9, 9, 9}, udp4), "stack_other"},
		{"multicast", udp(r, r4, at(netip.MustParseAddr("224.0.0.251"), 5353), 1), "stack_other"},
		{"later fragment first", part4(r, r.v4, a.v4, 17, 70, 1480, false, make([]byte, 100)), "stack_other"},
		{"tiny first", part4(r, r.v4, a.v4, 6, 71, 0, true, make([]byte, 8)), "stack_other"},
		{"truncated", patch(udp4, 17, udp4[17]+1), "stack_other"}, {"tcp offset 4", patch(tcp(r, r4, a4, "S", 0), 46, 0x40), "stack_other"},
		{"vlan", tagged(udp4), "stack_other"}, {"lldp", patch(udp4, 12, 0x88, 0xcc), "stack_other"},
		{"arp", arp(r, 1, r.v4, outside), "stack_other"}, {"ns", ns(r, r.v6, gateway6), "stack_other"},
		{"router advertisement", icmp6(r, linkLocal, netip.MustParseAddr("ff02::1"), 134, 0, 255, make([]byte, 12)), "stack_other"},
	}
}

// Every packet from the net on a node that knows no flow, then again, when it may know one.
func TestNetPackets(t *testing.T) {
	b := newBench(t, loader.Config{})
	for _, c := range netCases(b) {
		t.Run(c.name, func(t *testing.T) {
			b.purge(t)
			for range 2 {
				check(t, c.frame, b.fromNet(c.frame), c.verdict)
			}
		})
	}
}

// Every packet of a pod to the other host's block, and what leaves by the stack.
func TestNetLeaves(t *testing.T) {
	b := newBench(t, loader.Config{})
	up := skb{ifindex: uint32(b.up), ingress: uint32(b.a.commit.IfIndex)}
	for _, c := range []packetCase{
		{"udp", udp(b.a, at(b.a.v4, 1), at(b.r.v4, 2), 9), "forward_net"}, {"udp6", udp(b.a, at(b.a.v6, 1), at(b.r.v6, 2), 9), "forward_net"},
		{"tcp", tcp(b.a, at(b.a.v4, 1), at(b.r.v4, 2), "S", 0), "forward_net"}, {"tcp6", tcp(b.a, at(b.a.v6, 1), at(b.r.v6, 2), "S", 0), "forward_net"},
		{"mtu", udp(b.a, at(b.a.v4, 1), at(b.r.v4, 2), 1472), "forward_net"}, {"mtu and one", udp(b.a, at(b.a.v4, 1), at(b.r.v4, 2), 1473), "stack_mtu"},
		{"ttl 1", checksum4(patch(udp(b.a, at(b.a.v4, 1), at(b.r.v4, 2), 9), 22, 1)), "stack_ttl"},
		{"gre", raw(b.a, b.a.v4, b.r.v4, layers.IPProtocolGRE, make([]byte, 8)), "stack_protocol"},
		{"world", udp(b.a, at(b.a.v4, 1), at(stranger4, 2), 9), "stack_routed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b.purge(t)
			for range 3 {
				r := b.fromA(c.frame)
				check(t, c.frame, r, c.verdict)
				if (r.mark != 0) != (c.verdict != "stack_routed") {
					t.Errorf("mark %#x", r.mark)
				}
				s := up
				s.mark = r.mark
				check(t, c.frame, b.run("to_net", c.frame, s), "forward_judged")
			}
			// Unmarked, it would be one that the stack has translated.
			if c.verdict == "forward_net" {
				check(t, c.frame, b.run("to_net", c.frame, up), "forward_from_stack")
			}
		})
	}
	for _, c := range []struct {
		name, verdict string
		frame         []byte
		s             skb
	}{
		{"a process's", "stack_other", udp(b.a, at(b.a.v4, 1), at(b.r.v4, 2), 9), skb{ifindex: up.ifindex}},
		{"the host's", "stack_other", udp(b.a, at(outside, 1), at(b.r.v4, 2), 9), up},
		{"arp", "stack_other", arp(b.a, 1, outside, b.r.v4), up},
		{"truncated", "stack_other", patch(udp(b.a, at(b.a.v4, 1), at(b.r.v4, 2), 9), 17, 200), up},
	} {
		t.Run(c.name, func(t *testing.T) { check(t, c.frame, b.run("to_net", c.frame, c.s), c.verdict) })
	}
	b.policy(b.a, 9, 0)
	f := udp(b.a, at(b.a.v4, 77), at(b.r.v4, 2), 9)
	check(t, f, b.run("to_net", f, up), "drop_policy_egress")
}
