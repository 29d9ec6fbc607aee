package dataplane

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/maps"
)

// packetCase is a packet of pod a on a fresh node, and what becomes of it.
type packetCase struct {
	name    string
	frame   []byte
	verdict string
}

var (
	stranger4 = netip.MustParseAddr("203.0.113.9")
	stranger6 = netip.MustParseAddr("2001:db8:ffff::9")
	nobody4   = netip.MustParseAddr("10.65.0.60")
	nobody6   = netip.MustParseAddr("2001:db8::3c")
)

const (
	protoFragment    = 44
	protoDestination = 60
	protoRouting     = 43
	protoNone        = 59
)

// header6 is an IPv6 extension header of 8 bytes with padding; for a fragment header use fragment6.
func header6(next byte) []byte { return []byte{next, 0, 1, 4, 0, 0, 0, 0} }

// fragment6 is an IPv6 fragment header; the offset is in bytes.
func fragment6(next byte, offset int, more bool, id uint32) []byte {
	h := make([]byte, 8)
	h[0] = next
	binary.BigEndian.PutUint16(h[2:], uint16(offset))
	if more {
		h[3] |= 1
	}
	binary.BigEndian.PutUint32(h[4:], id)
	return h
}

// chain6 puts extension headers, given by their numbers, before a transport header.
func chain6(sender *pod, src, dst netip.Addr, transport []byte, protocol byte, kinds ...byte) []byte {
	var payload []byte
	for i := range kinds {
		next := protocol
		if i+1 < len(kinds) {
			next = kinds[i+1]
		}
		h := header6(next)
		if kinds[i] == protoFragment {
			h = fragment6(next, 0, false, 1)
		}
		payload = append(payload, h...)
	}
	return raw(sender, src, dst, layers.IPProtocol(kinds[0]), append(payload, transport...))
}

// part4 is an IPv4 fragment of a payload.
func part4(sender *pod, src, dst netip.Addr, protocol layers.IPProtocol, id uint16, offset int, more bool, payload []byte) []byte {
	f := raw(sender, src, dst, protocol, payload)
	binary.BigEndian.PutUint16(f[18:], id)
	off := uint16(offset / 8)
	if more {
		off |= 0x2000
	}
	binary.BigEndian.PutUint16(f[20:], off)
	return checksum4(f)
}

// part6 is an IPv6 fragment of a payload.
func part6(sender *pod, src, dst netip.Addr, next byte, id uint32, offset int, more bool, payload []byte) []byte {
	return raw(sender, src, dst, protoFragment, append(fragment6(next, offset, more, id), payload...))
}

// checksum4 sets the IPv4 header checksum.
func checksum4(frame []byte) []byte {
	ip := frame[14 : 14+int(frame[14]&15)*4]
	ip[10], ip[11] = 0, 0
	binary.BigEndian.PutUint16(ip[10:], ^sum16(0, ip))
	return frame
}

// sum16 adds up 16-bit words (RFC 1071).
func sum16(start uint32, b []byte) uint16 {
	for i := 0; i+1 < len(b); i += 2 {
		start += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		start += uint32(b[len(b)-1]) << 8
	}
	for start > 0xffff {
		start = start&0xffff + start>>16
	}
	return uint16(start)
}

// options4 is an IPv4 packet with a router alert option.
func options4(frame []byte) []byte {
	out := append(bytes.Clone(frame[:34]), 0x94, 4, 0, 0)
	out = append(out, frame[34:]...)
	out[14] = 0x46
	binary.BigEndian.PutUint16(out[16:], binary.BigEndian.Uint16(out[16:])+4)
	return checksum4(out)
}

// to gives a frame another destination MAC.
func to(mac net.HardwareAddr, frame []byte) []byte { return patch(frame, 0, mac...) }

// tagged gives a frame a VLAN tag.
func tagged(frame []byte) []byte {
	return append(append(bytes.Clone(frame[:12]), 0x81, 0, 0, 5), frame[12:]...)
}

// arp builds an ARP packet of pod p.
func arp(p *pod, op uint16, sender, target netip.Addr) []byte {
	return build(&layers.Ethernet{SrcMAC: p.commit.MAC, DstMAC: layers.EthernetBroadcast, EthernetType: layers.EthernetTypeARP},
		&layers.ARP{AddrType: 1, Protocol: layers.EthernetTypeIPv4, HwAddressSize: 6, ProtAddressSize: 4, Operation: op,
			SourceHwAddress: p.commit.MAC, SourceProtAddress: sender.AsSlice(), DstHwAddress: make([]byte, 6), DstProtAddress: target.AsSlice()})
}

// icmp6 builds an ICMPv6 message with a body after its checksum, sent with a hop limit.
func icmp6(p *pod, src, dst netip.Addr, kind, code, hops byte, body []byte) []byte {
	all := network(p, src, dst, layers.IPProtocolICMPv6)
	all[1].(*layers.IPv6).HopLimit = hops
	return build(append(all, &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(kind, code)}, gopacket.Payload(body))...)
}

// ns is a neighbour solicitation, na an advertisement, each with a link-layer address option unless src is unspecified.
func ns(p *pod, src, target netip.Addr) []byte {
	dst := target.As16()
	group := netip.AddrFrom16([16]byte{0xff, 2, 11: 1, 12: 0xff, 13: dst[13], 14: dst[14], 15: dst[15]})
	body := append(make([]byte, 4), dst[:]...)
	if !src.IsUnspecified() {
		body = append(append(body, 1, 1), p.commit.MAC...)
	}
	return to(net.HardwareAddr{0x33, 0x33, 0xff, dst[13], dst[14], dst[15]}, icmp6(p, src, group, 135, 0, 255, body))
}

func na(p *pod, src, target netip.Addr) []byte {
	t := target.As16()
	return icmp6(p, src, gateway6, 136, 0, 255, append(append([]byte{0x60, 0, 0, 0}, t[:]...), append([]byte{2, 1}, p.commit.MAC...)...))
}

func packetCases(a, b *pod) []packetCase {
	var (
		a4, b4, a6, b6 = at(a.v4, 4000), at(b.v4, 80), at(a.v6, 4000), at(b.v6, 80)
		none6          = netip.IPv6Unspecified()
		linkLocal      = netip.MustParseAddr("fe80::1:1")
		group6         = netip.MustParseAddr("ff02::1")
		broadcast      = net.HardwareAddr{255, 255, 255, 255, 255, 255}
		udp4, udp6     = udp(a, a4, b4, 32), udp(a, a6, b6, 32)
		tcp4, tcp6     = tcp(a, a4, b4, "S", 0), tcp(a, a6, b6, "S", 0)
		sctp4          = sctp(a, a4, b4, 1)
	)
	mapped := func(x netip.Addr) netip.Addr { return netip.AddrFrom16(x.As16()) }
	in6 := func(src, dst netip.Addr) []byte { // addresses as they are, also v4-mapped ones
		f := bytes.Clone(udp6)
		s, d := src.As16(), dst.As16()
		copy(f[22:], s[:])
		copy(f[38:], d[:])
		return f
	}
	return []packetCase{
		{"tcp", tcp4, "forward_pod"}, {"tcp6", tcp6, "forward_pod"},
		{"udp", udp4, "forward_pod"}, {"udp6", udp6, "forward_pod"},
		{"udp empty", udp(a, a4, b4, 0), "forward_pod"},
		{"echo", echo(a, a.v4, b.v4, 9, false), "forward_pod"}, {"echo6", echo(a, a.v6, b.v6, 9, false), "forward_pod"},
		{"sctp init", sctp4, "forward_pod"}, {"sctp6 data", sctp(a, a6, b6, 0), "forward_pod"},
		{"gre", raw(a, a.v4, b.v4, layers.IPProtocolGRE, make([]byte, 8)), "stack_protocol"},
		{"esp6", raw(a, a.v6, b.v6, layers.IPProtocolESP, make([]byte, 8)), "stack_protocol"},
		{"ah6", raw(a, a.v6, b.v6, layers.IPProtocolAH, make([]byte, 24)), "stack_protocol"},
		{"nothing inside", raw(a, a.v6, b.v6, protoNone, nil), "stack_protocol"},
		{"to the host", udp(a, a4, at(outside, 53), 1), "stack_routed"},
		{"to the world", udp(a, a4, at(stranger4, 53), 1), "stack_routed"}, {"to the world 6", udp(a, a6, at(stranger6, 53), 1), "stack_routed"},
		{"to metadata", udp(a, a4, at(netip.MustParseAddr("169.254.169.254"), 80), 1), "stack_routed"},
		{"to nobody", udp(a, a4, at(nobody4, 53), 1), "drop_no_pod"}, {"to nobody 6", udp(a, a6, at(nobody6, 53), 1), "drop_no_pod"},
		{"to itself", udp(a, a4, a4, 1), "forward_pod"},
		{"padded", append(bytes.Clone(udp4), make([]byte, 30)...), "forward_pod"},

		{"wrong version", patch(udp4, 14, 0x65), "drop_malformed_ip"}, {"wrong version 6", patch(udp6, 14, 0x40), "drop_malformed_ip"},
		{"header of 16 bytes", patch(udp4, 14, 0x44), "drop_malformed_ip"},
		{"header of 0 bytes", patch(udp4, 14, 0x40), "drop_malformed_ip"},
		{"header longer than the packet", patch(udp(a, a4, b4, 0), 14, 0x4f), "drop_malformed_ip"},
		{"total length 0", patch(udp4, 16, 0, 0), "drop_malformed_ip"},
		{"total length 19", patch(udp4, 16, 0, 19), "drop_malformed_ip"},
		{"total length 20", patch(udp4, 16, 0, 20), "drop_malformed_l4"},
		{"total length 65535", patch(udp4, 16, 255, 255), "drop_malformed_ip"},
		{"total length one too long", patch(udp4, 17, udp4[17]+1), "drop_malformed_ip"},
		{"payload length one too long", patch(udp6, 19, udp6[19]+1), "drop_malformed_ip"},
		{"payload length 0", patch(udp6, 18, 0, 0), "drop_malformed_l4"},
		{"udp length 7", patch(udp4, 38, 0, 7), "drop_malformed_l4"}, {"udp length 0", patch(udp4, 38, 0, 0), "drop_malformed_l4"},
		{"udp length one too long", patch(udp4, 39, udp4[39]+1), "drop_malformed_l4"},
		{"udp6 length 7", patch(udp6, 58, 0, 7), "drop_malformed_l4"},
		{"udp6 jumbogram", patch(udp6, 58, 0, 0), "forward_pod"},
		{"tcp offset 4", patch(tcp4, 46, 0x40), "drop_malformed_l4"}, {"tcp offset 15", patch(tcp4, 46, 0xf0), "drop_malformed_l4"},
		{"tcp6 offset 4", patch(tcp6, 66, 0x40), "drop_malformed_l4"}, {"tcp6 offset 6", patch(tcp6, 66, 0x60), "drop_malformed_l4"},
		{"icmp of 4 bytes", raw(a, a.v4, b.v4, layers.IPProtocolICMPv4, []byte{8, 0, 0, 0}), "drop_malformed_l4"},
		{"sctp without chunk", raw(a, a.v4, b.v4, layers.IPProtocolSCTP, make([]byte, 12)), "drop_malformed_l4"},

		{"options", options4(udp4), "stack_options"}, {"options tcp", options4(tcp4), "stack_options"},
		{"options longer than the packet", patch(options4(udp(a, a4, b4, 0)), 14, 0x4f), "drop_malformed_ip"},
		{"options to the world", options4(udp(a, a4, at(stranger4, 53), 1)), "stack_routed"},
		{"options spoofed", options4(udp(a, at(stranger4, 1), b4, 1)), "drop_spoof"},
		{"hop by hop", chain6(a, a.v6, b.v6, udp6[54:], 17, 0), "stack_options"},
		{"destination options", chain6(a, a.v6, b.v6, udp6[54:], 17, protoDestination), "forward_pod"},
		{"routing header", chain6(a, a.v6, b.v6, tcp6[54:], 6, protoRouting), "forward_pod"},
		{"atomic fragment", chain6(a, a.v6, b.v6, udp6[54:], 17, protoFragment), "forward_pod"},
		{"all headers", chain6(a, a.v6, b.v6, udp6[54:], 17, 0, protoDestination, protoRouting, protoFragment, protoDestination), "stack_options"},
		{"hop by hop second", chain6(a, a.v6, b.v6, udp6[54:], 17, protoDestination, 0), "drop_extension"},
		{"hop by hop twice", chain6(a, a.v6, b.v6, udp6[54:], 17, 0, 0), "drop_extension"},
		{"two fragment headers", chain6(a, a.v6, b.v6, udp6[54:], 17, protoFragment, protoFragment), "drop_extension"},
		{"five headers", chain6(a, a.v6, b.v6, udp6[54:], 17, 60, 60, 60, 60, 60), "forward_pod"},
		{"six headers", chain6(a, a.v6, b.v6, udp6[54:], 17, 60, 60, 60, 60, 60, 60), "drop_extension"},
		{"nine headers", chain6(a, a.v6, b.v6, udp6[54:], 17, 60, 60, 60, 60, 60, 60, 60, 60, 60), "drop_extension"},
		{"header longer than the packet", patch(chain6(a, a.v6, b.v6, udp6[54:], 17, 60), 55, 255), "drop_malformed_ip"},
		{"headers and nothing", raw(a, a.v6, b.v6, 60, header6(17)), "drop_malformed_l4"},
		{"half a header", raw(a, a.v6, b.v6, 60, []byte{17, 0, 1, 4}), "drop_malformed_ip"},

		{"to unspecified", udp(a, a4, at(netip.MustParseAddr("0.0.0.0"), 1), 1), "drop_martian"},
		{"to loopback", udp(a, a4, at(netip.MustParseAddr("127.0.0.1"), 1), 1), "drop_martian"},
		{"to the gateway", udp(a, a4, at(gateway4, 1), 1), "drop_martian"}, {"to the gateway 6", udp(a, a6, at(gateway6, 1), 1), "drop_martian"},
		{"to loopback 6", in6(a.v6, netip.IPv6Loopback()), "drop_martian"}, {"to unspecified 6", in6(a.v6, none6), "drop_martian"},
		{"to v4-compatible", in6(a.v6, netip.MustParseAddr("::10.65.0.2")), "drop_martian"},
		{"to v4-mapped", in6(a.v6, mapped(b.v4)), "drop_martian"},
		{"to multicast", udp(a, a4, at(netip.MustParseAddr("224.0.0.251"), 5353), 1), "drop_multicast"},
		{"to multicast 6", udp(a, a6, at(group6, 5353), 1), "drop_multicast"},
		{"to broadcast", to(broadcast, udp(a, a4, at(netip.MustParseAddr("255.255.255.255"), 67), 1)), "drop_multicast"},

		{"spoofed", udp(a, at(stranger4, 1), b4, 1), "drop_spoof"}, {"spoofed 6", udp(a, at(stranger6, 1), b6, 1), "drop_spoof"},
		{"another pod's", udp(a, at(b.v4, 1), b4, 1), "drop_spoof"}, {"another pod's 6", udp(a, at(b.v6, 1), b6, 1), "drop_spoof"},
		{"the host's", udp(a, at(outside, 1), b4, 1), "drop_spoof"},
		{"from unspecified", udp(a, at(netip.MustParseAddr("0.0.0.0"), 1), b4, 1), "drop_spoof"},
		{"from unspecified 6", in6(none6, b.v6), "drop_spoof"}, {"from loopback 6", in6(netip.IPv6Loopback(), b.v6), "drop_spoof"},
		{"from v4-mapped", in6(mapped(a.v4), b.v6), "drop_spoof"}, {"both v4-mapped", in6(mapped(a.v4), mapped(b.v4)), "drop_spoof"},
		{"from v4-compatible", in6(netip.MustParseAddr("::10.65.0.1"), b.v6), "drop_spoof"},
		{"from link-local", in6(linkLocal, b.v6), "drop_spoof"},
		{"spoofed gre", raw(a, stranger4, b.v4, layers.IPProtocolGRE, make([]byte, 8)), "drop_spoof"},

		{"later fragment first", part4(a, a.v4, b.v4, 17, 70, 1480, false, make([]byte, 100)), "drop_fragment"},
		{"later fragment first 6", part6(a, a.v6, b.v6, 17, 70, 1448, false, make([]byte, 100)), "drop_fragment"},
		{"tiny first", part4(a, a.v4, b.v4, 6, 71, 0, true, make([]byte, 8)), "drop_tiny_fragment"},
		{"tiny first 6", part6(a, a.v6, b.v6, 6, 71, 0, true, make([]byte, 16)), "drop_tiny_fragment"},
		{"tiny offset", part4(a, a.v4, b.v4, 6, 72, 8, true, make([]byte, 64)), "drop_tiny_fragment"},
		{"tiny offset 6", part6(a, a.v6, b.v6, 6, 72, 8, true, make([]byte, 64)), "drop_tiny_fragment"},
		{"first fragment", part4(a, a.v4, b.v4, 17, 73, 0, true, patch(udp4[34:], 4, 2, 0)), "forward_pod"},
		{"first fragment 6", part6(a, a.v6, b.v6, 17, 73, 0, true, patch(udp6[54:], 4, 2, 0)), "forward_pod"},

		{"no type", patch(udp4, 12, 0, 0), "drop_ethertype"}, {"lldp", patch(udp4, 12, 0x88, 0xcc), "drop_ethertype"},
		{"mpls", patch(udp4, 12, 0x88, 0x47), "drop_ethertype"}, {"only an IP header", udp4[:34], "drop_malformed_ip"},
		{"vlan", tagged(udp4), "drop_vlan"}, {"qinq", patch(tagged(udp4), 12, 0x88, 0xa8), "drop_vlan"},
		{"broadcast frame", to(broadcast, udp4), "drop_frame"}, {"multicast frame", to(net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}, udp6), "drop_frame"},
		{"frame to another", to(b.commit.MAC, udp4), "drop_frame"},

		{"dhcp server", udp(a, at(a.v4, 67), at(b.v4, 68), 1), "drop_dhcp_server"}, {"dhcp6 server", udp(a, at(a.v6, 547), at(b.v6, 546), 1), "drop_dhcp_server"},
		{"dhcp client", udp(a, at(a.v4, 68), at(b.v4, 67), 1), "forward_pod"},
		{"redirect", raw(a, a.v4, b.v4, 1, append([]byte{5, 1, 0, 0}, make([]byte, 32)...)), "drop_redirect"},
		{"irdp", raw(a, a.v4, b.v4, 1, append([]byte{9, 0, 0, 0}, make([]byte, 32)...)), "drop_router_advertisement"},
		{"redirect 6", icmp6(a, linkLocal, b.v6, 137, 0, 255, make([]byte, 36)), "drop_redirect"},
		{"router advertisement", icmp6(a, linkLocal, group6, 134, 0, 255, make([]byte, 12)), "drop_router_advertisement"},
		{"router advertisement behind headers", chain6(a, a.v6, b.v6, icmp6(a, a.v6, b.v6, 134, 0, 255, make([]byte, 12))[54:], 58, 0, 60), "drop_router_advertisement"},
		{"router advertisement in a fragment", part6(a, a.v6, b.v6, 58, 74, 0, true, icmp6(a, a.v6, b.v6, 134, 0, 255, make([]byte, 12))[54:]), "drop_router_advertisement"},
		{"router advertisement beyond the fragment", part6(a, a.v6, b.v6, 60, 75, 0, true, header6(58)), "drop_tiny_fragment"},
		{"error about nothing", unreachable(a, a.v4, b.v4, udp(b, b4, at(a.v4, 9), 1)), "drop_icmp_error"},
		{"error about nothing 6", unreachable(a, a.v6, b.v6, udp(b, b6, at(a.v6, 9), 1)), "drop_icmp_error"},

		{"arp for the gateway", arp(a, 1, a.v4, gateway4), "answer_arp"},
		{"arp probe for the gateway", arp(a, 1, netip.MustParseAddr("0.0.0.0"), gateway4), "answer_arp"},
		{"arp announcement", arp(a, 1, a.v4, a.v4), "control"}, {"arp for another", arp(a, 1, a.v4, b.v4), "drop_foreign_arp"},
		{"arp as another", arp(a, 1, b.v4, gateway4), "drop_foreign_arp"}, {"arp reply", arp(a, 2, a.v4, outside), "stack_arp"},
		{"arp reply as the gateway", arp(a, 2, gateway4, outside), "drop_foreign_arp"}, {"arp reply as nobody", arp(a, 2, netip.MustParseAddr("0.0.0.0"), outside), "drop_foreign_arp"},
		{"arp of another medium", patch(arp(a, 1, a.v4, gateway4), 14, 0, 6), "drop_malformed_arp"}, {"arp of long addresses", patch(arp(a, 1, a.v4, gateway4), 18, 8), "drop_malformed_arp"},
		{"half an arp", arp(a, 1, a.v4, gateway4)[:30], "drop_malformed_arp"},
		{"ns for the gateway", ns(a, a.v6, gateway6), "answer_nd"}, {"ns from link-local", ns(a, linkLocal, gateway6), "answer_nd"},
		{"ns as another", ns(a, b.v6, gateway6), "drop_foreign_arp"}, {"ns for another", ns(a, a.v6, b.v6), "drop_foreign_arp"},
		{"ns from afar", icmp6(a, a.v6, gateway6, 135, 0, 254, append(make([]byte, 4), gateway6.AsSlice()...)), "drop_malformed_arp"},
		{"ns cut short", icmp6(a, a.v6, gateway6, 135, 0, 255, make([]byte, 8)), "drop_malformed_arp"},
		{"ns cut short in a padded frame", append(icmp6(a, a.v6, gateway6, 135, 0, 255, make([]byte, 4)), gateway6.AsSlice()...), "drop_malformed_arp"},
		{"ns in a fragment", part6(a, a.v6, gateway6, 58, 76, 0, true, icmp6(a, a.v6, gateway6, 135, 0, 255, append(make([]byte, 4), gateway6.AsSlice()...))[54:]), "drop_malformed_arp"},
		{"dad", ns(a, none6, a.v6), "control"}, {"dad link-local", ns(a, none6, linkLocal), "control"},
		{"dad for another's", ns(a, none6, b.v6), "drop_foreign_arp"}, {"dad for the gateway's", ns(a, none6, gateway6), "drop_foreign_arp"},
		{"na", na(a, a.v6, a.v6), "stack_arp"}, {"na for another's", na(a, a.v6, b.v6), "drop_foreign_arp"},
		{"mld", icmp6(a, linkLocal, netip.MustParseAddr("ff02::16"), 143, 0, 1, make([]byte, 24)), "control"},
		{"router solicitation", icmp6(a, linkLocal, netip.MustParseAddr("ff02::2"), 133, 0, 255, make([]byte, 4)), "control"},
		{"igmp", raw(a, a.v4, netip.MustParseAddr("224.0.0.22"), 2, make([]byte, 16)), "control"},
		{"igmp to a pod", raw(a, a.v4, b.v4, 2, make([]byte, 16)), "stack_protocol"},

		{"ttl 0", checksum4(patch(udp4, 22, 0)), "stack_ttl"}, {"ttl 1", checksum4(patch(udp4, 22, 1)), "stack_ttl"},
		{"ttl 2", checksum4(patch(udp4, 22, 2)), "forward_pod"}, {"ttl 255", checksum4(patch(udp4, 22, 255)), "forward_pod"},
		{"hop limit 0", patch(udp6, 21, 0), "stack_ttl"}, {"hop limit 1", patch(udp6, 21, 1), "stack_ttl"}, {"hop limit 2", patch(udp6, 21, 2), "forward_pod"},
		{"mtu", udp(a, a4, b4, 1472), "forward_pod"}, {"mtu and one", udp(a, a4, b4, 1473), "stack_mtu"},
		{"mtu 6", udp(a, a6, b6, 1452), "forward_pod"}, {"mtu and one 6", udp(a, a6, b6, 1453), "stack_mtu"},
	}
}

// Every packet on a node that knows no flow, then again, when it may know one.
func TestPackets(t *testing.T) {
	b := newBench(t, loader.Config{})
	for _, c := range packetCases(b.a, b.b) {
		t.Run(c.name, func(t *testing.T) {
			b.purge(t)
			for range 2 {
				check(t, c.frame, b.fromA(c.frame), c.verdict)
			}
		})
	}
}

// purge removes all flows of the two pods.
func (b *bench) purge(t testing.TB) {
	t.Helper()
	for _, p := range []*pod{b.a, b.b} {
		if _, err := b.maps.PurgeFlows(p.commit.Addrs); err != nil {
			t.Fatal(err)
		}
	}
}

// Cut at every length, a packet is malformed, or still whole where only padding was cut.
func TestTruncated(t *testing.T) {
	b := newBench(t, loader.Config{})
	for _, c := range packetCases(b.a, b.b) {
		if wantAction(c.verdict) == actionShot || len(c.frame) > 200 {
			continue
		}
		shortest := 15 // TEST_RUN takes no empty packet and no part of an IP header
		switch c.frame[12] {
		case 0x08:
			shortest = 34
		case 0x86:
			shortest = 54
		}
		for n := shortest; n < len(c.frame); n++ {
			r := b.fromA(c.frame[:n])
			if whole(c.frame[:n]) || c.verdict[:6] == "answer" {
				continue // only padding is gone
			}
			switch r.verdict {
			case "drop_malformed_ip", "drop_malformed_l4", "drop_malformed_arp":
			default:
				t.Fatalf("%s, cut to %d of %d bytes: %s", c.name, n, len(c.frame), r.verdict)
			}
		}
		// The same with the IP header's length made right: the transport header is cut.
		if c.verdict != "forward_pod" || len(c.frame) > 120 || c.name == "padded" {
			continue
		}
		for n := 34; n < len(c.frame); n++ {
			f := bytes.Clone(c.frame[:n])
			if f[14]>>4 == 4 {
				binary.BigEndian.PutUint16(f[16:], uint16(n-14))
			} else if n < 54 {
				continue
			} else {
				binary.BigEndian.PutUint16(f[18:], uint16(n-54))
			}
			r := b.fromA(f)
			switch r.verdict {
			case "drop_malformed_ip", "drop_malformed_l4", "drop_tiny_fragment", "forward_pod":
			default:
				t.Fatalf("%s, shortened to %d of %d bytes: %s", c.name, n, len(c.frame), r.verdict)
			}
			if err := r.consistent(f); err != nil {
				t.Fatalf("%s, shortened to %d: %v", c.name, n, err)
			}
		}
	}
}

// TTL, checksum and MAC addresses on the first, slow packets of a flow and on the cached ones, for every checksum.
func TestRewriting(t *testing.T) {
	b := newBench(t, loader.Config{})
	r4, r6 := b.v4pair(), b.v6pair()
	for i, f := range [][]byte{udp(b.b, r4[1], r4[0], 3), udp(b.b, r6[1], r6[0], 3)} {
		check(t, f, b.fromB(f), "forward_pod")
		for range 3 {
			f := udp(b.a, [][2]netip.AddrPort{r4, r6}[i][0], [][2]netip.AddrPort{r4, r6}[i][1], 3)
			r := b.fromA(f)
			check(t, f, r, "forward_pod")
			if want := append(bytes.Clone(b.b.commit.MAC), gatewayMAC...); !bytes.Equal(r.out[:12], want) {
				t.Fatalf("frame addresses %x, want %x", r.out[:12], want)
			}
		}
	}
	if flows, err := b.maps.Flows(); err != nil || len(flows) != 2 || !flows[0].Confirmed || !flows[1].Confirmed {
		t.Fatalf("flows %+v (%v), want two confirmed ones", flows, err)
	}
	// Identifications that bring the checksum to each of its corners, on the cached path.
	base := udp(b.a, r4[0], r4[1], 3)
	for _, want := range []uint16{0, 1, 0xfeff, 0xff00, 0xfffe, 0xffff, 0x00ff, 0x0100} {
		f := bytes.Clone(base)
		for id := range 0x10000 {
			binary.BigEndian.PutUint16(f[18:], uint16(id))
			if checksum4(f); binary.BigEndian.Uint16(f[24:]) == want {
				break
			}
		}
		r := b.fromA(f)
		if r.verdict != "forward_pod" {
			t.Fatalf("verdict %s", r.verdict)
		}
		if s := sum16(0, r.out[14:34]); s != 0xffff {
			t.Errorf("checksum %#04x became %x, which adds up to %#04x", want, r.out[24:26], s)
		}
	}
	for range 100 {
		f := bytes.Clone(base)
		f[22] = byte(2 + rand.IntN(254))
		binary.BigEndian.PutUint16(f[18:], uint16(rand.Uint32()))
		check(t, f, b.fromA(checksum4(f)), "forward_pod")
	}
}

func (b *bench) v4pair() [2]netip.AddrPort {
	return [2]netip.AddrPort{at(b.a.v4, 4000), at(b.b.v4, 80)}
}
func (b *bench) v6pair() [2]netip.AddrPort {
	return [2]netip.AddrPort{at(b.a.v6, 4000), at(b.b.v6, 80)}
}

func TestAnswers(t *testing.T) {
	b := newBench(t, loader.Config{})
	mac := b.a.commit.MAC
	r := b.fromA(arp(b.a, 1, b.a.v4, gateway4))
	want := build(&layers.Ethernet{SrcMAC: gatewayMAC, DstMAC: mac, EthernetType: layers.EthernetTypeARP},
		&layers.ARP{AddrType: 1, Protocol: layers.EthernetTypeIPv4, HwAddressSize: 6, ProtAddressSize: 4, Operation: 2,
			SourceHwAddress: gatewayMAC, SourceProtAddress: gateway4.AsSlice(), DstHwAddress: mac, DstProtAddress: b.a.v4.AsSlice()})
	if r.verdict != "answer_arp" || !bytes.Equal(r.out[:42], want[:42]) {
		t.Errorf("ARP: %s %x, want %x", r.verdict, r.out, want)
	}
	for name, src := range map[string]netip.Addr{"global": b.a.v6, "link-local": netip.MustParseAddr("fe80::42")} {
		for _, extra := range []int{0, 40} { // a longer solicitation is cut, a shorter one grows
			f := append(ns(b.a, src, gateway6), make([]byte, extra)...)
			r := b.fromA(f)
			body := append(append([]byte{0xe0, 0, 0, 0}, gateway6.AsSlice()...), append([]byte{2, 1}, gatewayMAC...)...)
			want := build(&layers.Ethernet{SrcMAC: gatewayMAC, DstMAC: mac, EthernetType: layers.EthernetTypeIPv6},
				&layers.IPv6{Version: 6, HopLimit: 255, NextHeader: layers.IPProtocolICMPv6, SrcIP: gateway6.AsSlice(), DstIP: src.AsSlice()},
				func() *layers.ICMPv6 {
					l := &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(136, 0)}
					l.SetNetworkLayerForChecksum(&layers.IPv6{Version: 6, NextHeader: layers.IPProtocolICMPv6, SrcIP: gateway6.AsSlice(), DstIP: src.AsSlice()})
					return l
				}(), gopacket.Payload(body))
			if r.verdict != "answer_nd" || !bytes.Equal(r.out, want) {
				t.Errorf("NS from %s: %s\n%x, want\n%x", name, r.verdict, r.out, want)
			}
		}
	}
}

// Fragments follow the first one's ports, whatever their order after it and however they overlap.
func TestFragmentOrder(t *testing.T) {
	b := newBench(t, loader.Config{})
	body := make([]byte, 3000)
	for name, v6 := range map[string]bool{"v4": false, "v6": true} {
		part := func(p *pod, src netip.Addr, id uint16, offset int, more bool) []byte {
			payload := body[offset : offset+min(1000, len(body)-offset)]
			if offset == 0 {
				payload = patch(payload, 0, 0x0f, 0xa0, 0, 80, 0x0b, 0xb8) // ports 4000 and 80, length 3000
			}
			if v6 {
				return part6(p, src, b.b.v6, 17, uint32(id), offset, more, payload)
			}
			return part4(p, src, b.b.v4, 17, id, offset, more, payload)
		}
		a := b.a.addr(v6)
		step := func(what string, f []byte, verdict string) {
			t.Helper()
			r := b.fromA(f)
			if r.verdict != verdict {
				t.Errorf("%s: %s: %s, want %s", name, what, r.verdict, verdict)
			} else if err := r.consistent(f); err != nil {
				t.Errorf("%s: %s: %v", name, what, err)
			}
		}
		step("last before first", part(b.a, a, 1, 2000, false), "drop_fragment")
		step("first", part(b.a, a, 1, 0, true), "forward_pod")
		step("last", part(b.a, a, 1, 2000, false), "forward_pod")
		step("middle", part(b.a, a, 1, 1000, true), "forward_pod")
		step("overlapping the middle", part(b.a, a, 1, 504, true), "forward_pod")
		step("overlapping the header", part(b.a, a, 1, 8, true), "drop_tiny_fragment")
		step("first again", part(b.a, a, 1, 0, true), "forward_pod")
		step("of another packet", part(b.a, a, 2, 1000, true), "drop_fragment")

		flows, err := b.maps.Flows()
		if err != nil || len(flows) != 1 || flows[0].Opener != at(a, 4000) || flows[0].Responder.Port() != 80 {
			t.Errorf("%s: flows %+v (%v), want the first fragment's", name, flows, err)
		}
		// What another pod sends in a's name does not name the ports of a's fragments.
		r := b.fromB(part(b.b, a, 3, 0, true))
		if r.verdict != "drop_spoof" {
			t.Errorf("%s: first fragment in another's name: %s", name, r.verdict)
		}
		step("after another's first", part(b.a, a, 3, 1000, true), "drop_fragment")
		b.purge(t)
	}
	// A fragment header that is followed by options: only the first fragment knows the protocol.
	first := part6(b.a, b.a.v6, b.b.v6, 60, 9, 0, true, append(header6(17), patch(make([]byte, 64), 0, 0x0f, 0xa0, 0, 80, 4, 0)...))
	check(t, first, b.fromA(first), "forward_pod")
	later := part6(b.a, b.a.v6, b.b.v6, 60, 9, 1000, false, make([]byte, 64))
	check(t, later, b.fromA(later), "forward_pod")
	if flows, err := b.maps.Flows(); err != nil || len(flows) != 1 || flows[0].Sent.Packets != 2 {
		t.Errorf("flows %+v (%v), want one with two packets", flows, err)
	}
	gre := part4(b.a, b.a.v4, b.b.v4, layers.IPProtocolGRE, 10, 0, true, make([]byte, 64))
	check(t, gre, b.fromA(gre), "stack_protocol")
	gre = part4(b.a, b.a.v4, b.b.v4, layers.IPProtocolGRE, 10, 64, false, make([]byte, 64))
	check(t, gre, b.fromA(gre), "stack_protocol")
}

// An ICMP error follows the flow it quotes: to who sent the quoted packet, from who received it, as policy still allows.
func TestICMPErrors(t *testing.T) {
	b := newBench(t, loader.Config{})
	c := b.quietPod("c", 3)
	for _, v6 := range []bool{false, true} {
		x, y := b.a.addr(v6), b.b.addr(v6)
		for name, quoted := range map[string][]byte{
			"udp": udp(b.a, at(x, 1000), at(y, 53), 20), "tcp": tcp(b.a, at(x, 1000), at(y, 80), "S", 0),
			"sctp": sctp(b.a, at(x, 1000), at(y, 80), 1), "echo": echo(b.a, x, y, 5, false),
			"gre": raw(b.a, x, y, layers.IPProtocolGRE, make([]byte, 8)),
		} {
			b.purge(t)
			e := unreachable(b.b, y, x, quoted)
			check(t, e, b.fromB(e), "drop_icmp_error")
			if r := b.fromA(quoted); r.action == actionShot {
				t.Fatalf("%s: %s", name, r.verdict)
			}
			check(t, e, b.fromB(e), "forward_pod")
			foreign := unreachable(c, c.addr(v6), x, quoted)
			check(t, foreign, b.run("from_pod", foreign, skb{ifindex: uint32(c.commit.IfIndex)}), "drop_icmp_error")
			astray := unreachable(b.b, y, c.addr(v6), quoted)
			check(t, astray, b.fromB(astray), "drop_icmp_error")
			router := unreachable(b.b, map[bool]netip.Addr{false: stranger4, true: stranger6}[v6], x, quoted)
			toA := skb{ifindex: uint32(b.a.commit.IfIndex), ingress: 77}
			check(t, router, b.run("to_pod", router, toA), "forward_from_stack")

			b.policy(b.a, 9, 0)
			check(t, e, b.fromB(e), "drop_policy_egress")
			check(t, router, b.run("to_pod", router, toA), "drop_policy_egress")
			toA.ingress = 0
			check(t, router, b.run("to_pod", router, toA), "forward_from_stack")
			b.policy(b.a, 0, 9) // the error answers a's packet: a's ingress policy has no say
			check(t, e, b.fromB(e), "forward_pod")
			b.policy(b.a, 0, 0)
		}
	}
}

// A large packet that the sender left to be segmented is judged by its segments.
func TestSegmented(t *testing.T) {
	b := newBench(t, loader.Config{})
	x, y := b.v4pair()[0], b.v4pair()[1]
	x6, y6 := b.v6pair()[0], b.v6pair()[1]
	big, big6 := tcp(b.a, x, y, "A", 3000), tcp(b.a, x6, y6, "A", 3000)
	from := func(size, segments uint32) skb {
		return skb{ifindex: uint32(b.a.commit.IfIndex), gsoSize: size, gsoSegs: segments}
	}
	for _, c := range []struct {
		name    string
		frame   []byte
		skb     skb
		verdict string
	}{
		{"not segmented", big, from(0, 0), "stack_mtu"},
		{"fits", big, from(1460, 3), "forward_pod"}, {"one too large", big, from(1461, 3), "stack_mtu"},
		{"fits 6", big6, from(1440, 3), "forward_pod"}, {"one too large 6", big6, from(1441, 3), "stack_mtu"},
		{"udp fits", udp(b.a, x, y, 3000), from(1472, 3), "forward_pod"}, {"udp one too large", udp(b.a, x, y, 3000), from(1473, 3), "stack_mtu"},
		{"big tcp", patch(big, 16, 0, 0), from(1400, 3), "forward_pod"}, {"big tcp 6", patch(big6, 18, 0, 0), from(1400, 3), "forward_pod"},
		{"big tcp not segmented", patch(big, 16, 0, 0), from(0, 0), "drop_malformed_ip"},
	} {
		r := b.run("from_pod", c.frame, c.skb)
		if r.verdict != c.verdict {
			t.Errorf("%s: %s, want %s", c.name, r.verdict, c.verdict)
		}
	}
}

// What comes out of the host's stack gets the MAC address that the pod has now.
func TestToPod(t *testing.T) {
	b := newBench(t, loader.Config{})
	moved := net.HardwareAddr{2, 0, 0, 0, 9, 9}
	hello := patch(udp(b.b, b.v4pair()[1], at(stranger4, 9), 1), 6, moved...)
	check(t, hello, b.fromB(hello), "stack_routed")

	for _, c := range []struct {
		name    string
		frame   []byte
		skb     skb
		verdict string
	}{
		{"from outside", udp(b.a, at(stranger4, 1), at(b.b.v4, 80), 1), skb{ingress: 77}, "forward_from_stack"},
		{"from a process", udp(b.a, at(outside, 1), at(b.b.v4, 80), 1), skb{}, "forward_from_stack"},
		{"marked", udp(b.a, at(b.a.v4, 1), at(b.b.v4, 80), 1), skb{ingress: 77, mark: 0x00100000}, "forward_judged"},
		{"multicast", udp(b.a, at(outside, 1), at(netip.MustParseAddr("224.0.0.251"), 80), 1), skb{}, "forward_from_stack"},
		{"gre", raw(b.a, stranger4, b.b.v4, layers.IPProtocolGRE, make([]byte, 8)), skb{ingress: 77}, "forward_from_stack"},
		{"malformed", patch(udp(b.a, at(stranger4, 1), at(b.b.v4, 80), 1), 14, 0x41), skb{ingress: 77}, "drop_malformed_ip"},
		{"arp", arp(b.a, 1, outside, b.b.v4), skb{}, "stack_arp"},
		{"ns", ns(b.a, netip.MustParseAddr("fe80::77"), b.b.v6), skb{}, "stack_arp"},
		{"error about nothing", unreachable(b.a, stranger4, b.b.v4, udp(b.b, at(b.b.v4, 999), at(stranger4, 9), 1)), skb{ingress: 77}, "drop_icmp_error"},
		{"the host's own error", unreachable(b.a, outside, b.b.v4, udp(b.b, at(b.b.v4, 999), at(stranger4, 9), 1)), skb{}, "forward_from_stack"},
	} {
		c.skb.ifindex = uint32(b.b.commit.IfIndex)
		c.frame = to(b.b.commit.MAC, c.frame)
		r := b.run("to_pod", c.frame, c.skb)
		check(t, c.frame, r, c.verdict)
		if wantAction(c.verdict) == actionNext && c.verdict != "stack_arp" && !bytes.Equal(r.out[:6], moved) {
			t.Errorf("%s: sent to %x, want %x", c.name, r.out[:6], moved)
		}
	}
	if r := b.run("to_pod", hello, skb{ifindex: 1}); r.verdict != "drop_interface" {
		t.Errorf("unknown interface: %s", r.verdict)
	}
	if r := b.run("from_pod", hello, skb{ifindex: 1}); r.verdict != "drop_interface" && r.verdict != "drop_frame" {
		t.Errorf("unknown interface: %s", r.verdict)
	}
}

// Packets left to the stack carry the mark only when both ends were judged.
func TestMark(t *testing.T) {
	b := newBench(t, loader.Config{})
	s := b.quietPod("s", 3, shaped())
	x := b.v4pair()[0]
	for _, c := range []struct {
		frame   []byte
		verdict string
		marked  bool
	}{
		{udp(b.a, x, at(s.v4, 80), 1), "stack_shaped", true},
		{options4(udp(b.a, x, b.v4pair()[1], 1)), "stack_options", true},
		{udp(b.a, x, b.v4pair()[1], 1473), "stack_mtu", true},
		{raw(b.a, x.Addr(), b.b.v4, layers.IPProtocolGRE, make([]byte, 8)), "stack_protocol", true},
		{raw(b.a, x.Addr(), stranger4, layers.IPProtocolGRE, make([]byte, 8)), "stack_protocol", false},
		{udp(b.a, x, at(stranger4, 80), 1), "stack_routed", false},
	} {
		for range 2 {
			r := b.fromA(c.frame)
			check(t, c.frame, r, c.verdict)
			if r.mark&0x00100000 != 0 != c.marked {
				t.Errorf("%s: mark %#x", c.verdict, r.mark)
			}
		}
	}
	f := udp(s, at(s.v4, 1), b.v4pair()[1], 1)
	check(t, f, b.run("from_pod", f, skb{ifindex: uint32(s.commit.IfIndex)}), "stack_shaped")
}

// Where a route leads, and where one leads nowhere.
func TestRouteKinds(t *testing.T) {
	b := newBench(t, loader.Config{})
	for i, c := range []struct {
		kind    maps.RouteKind
		verdict string
	}{
		{maps.RouteHost, "stack_routed"}, {maps.RouteRemote, "stack_routed"}, {maps.RouteTunnel, "stack_routed"},
		{maps.RouteStack, "stack_routed"}, {maps.RoutePool, "drop_no_pod"}, {maps.RouteBlackhole, "drop_no_pod"},
		{maps.RouteLocalPod, "drop_no_pod"}, {maps.RouteKind(99), "stack_routed"},
	} {
		dst := netip.MustParseAddr(fmt.Sprintf("198.51.100.%d", i))
		if err := b.maps.PutRoute(maps.Route{Prefix: netip.PrefixFrom(dst, 32), Kind: c.kind, IfIndex: 4242}); err != nil {
			t.Fatal(err)
		}
		f := udp(b.a, b.v4pair()[0], at(dst, 1), 1)
		check(t, f, b.fromA(f), c.verdict)
	}
	// A route that leads to a pod without that address: the pod has gone, another came.
	dst := netip.MustParseAddr("198.51.100.99")
	if err := b.maps.PutRoute(maps.Route{Prefix: netip.PrefixFrom(dst, 32), Kind: maps.RouteLocalPod, IfIndex: uint32(b.b.commit.IfIndex)}); err != nil {
		t.Fatal(err)
	}
	f := udp(b.a, b.v4pair()[0], at(dst, 1), 1)
	check(t, f, b.fromA(f), "drop_no_pod")
}

// whole tells whether a frame holds all of its IP packet.
func whole(frame []byte) bool {
	switch frame[12] {
	case 0x08:
		if frame[13] == 6 {
			return len(frame) >= 14+28
		}
		return len(frame)-14 >= int(binary.BigEndian.Uint16(frame[16:]))
	case 0x86:
		return len(frame)-54 >= int(binary.BigEndian.Uint16(frame[18:]))
	}
	return false
}
