// admit.h: what may enter the network from a pod at all, before routes and policy.
#pragma once
#include "control.h"

static __always_inline bool is_multicast(const __u8 *a)
{
	if (is_v4(a)) // class D, and the limited broadcast address
		return (a[12] & 0xf0) == 0xe0 || *(__u32 *)&a[12] == 0xffffffff;
	return a[0] == 0xff;
}

// is_martian tells addresses that no packet may be forwarded to (RFC 6890), and the pod's gateway.
static __always_inline bool is_martian(const __u8 *a)
{
	if (is_v4(a))
		return a[12] == 0 || a[12] == 127 || *(__be32 *)&a[12] == GATEWAY_V4;
	if (!cwords(a)[0] && (__u32)cwords(a)[1] == 0) // ::/96: unspecified, loopback, IPv4-compatible
		return true;
	return a[0] == 0xfe && (a[1] & 0xc0) == 0x80;
}

// admit_stage: VERDICT_NEXT means that the pod may send this packet.
static __noinline int admit_stage(struct __sk_buff *ctx, struct packet *p, const struct pod_slot *slot)
{
	__u8 from[16] ADDRESS, to[16] ADDRESS;
	__be16 sport = p->side ? p->key.port_b : p->key.port_a;

	__builtin_memcpy(from, source(p), 16);
	__builtin_memcpy(to, destination(p), 16);
	if (is_multicast(to))
		return p->key.protocol == PROTO_IGMP ? CONTROL : DROP_MULTICAST;
	if (ctx->pkt_type) // PACKET_HOST is 0
		return DROP_FRAME;
	if (!holds(slot, from))
		return DROP_SPOOF;
	if (is_martian(to))
		return DROP_MARTIAN;
	if (p->key.protocol == PROTO_UDP && (sport == bpf_htons(67) || sport == bpf_htons(547)))
		return DROP_DHCP_SERVER;
	if (p->flags & PKT_ICMP_REDIRECT)
		return DROP_REDIRECT;
	if (p->key.protocol == PROTO_ICMP && !p->is_v6 && p->icmp_type == 9) // RFC 1256
		return DROP_ROUTER_ADVERTISEMENT;
	return VERDICT_NEXT;
}
