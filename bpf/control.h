// control.h: ARP, neighbour discovery and multicast control between a pod and its gateway.
#pragma once
#include "forward.h"

#define GATEWAY_V4 bpf_htonl(0xa9fe0101) // 169.254.1.1, RFC 3927 range
#define LINK_LOCAL_HI bpf_cpu_to_be64(0xfe80000000000000ULL)
#define GATEWAY_V6_LO bpf_cpu_to_be64(1) // fe80::1

struct arp {
	__be16 htype, ptype;
	__u8 hlen, plen;
	__be16 op;
	__u8 sha[6];
	__u8 spa[4];
	__u8 tha[6];
	__u8 tpa[4];
} __attribute__((packed));

static __always_inline bool holds_v4(const struct pod_slot *slot, __be32 address)
{
	__u8 mapped[16] ADDRESS;

	put_address(mapped, 0, v4_low(address));
	return holds(slot, mapped);
}

// arp_stage answers the pod's requests for its gateway (RFC 826) and keeps it from speaking for others.
static __noinline int arp_stage(struct __sk_buff *ctx, const struct found_pod *pod, const struct pod_slot *slot)
{
	struct arp a, reply;
	__be32 sender, target;
	__u8 frame[12];

	if (bpf_skb_load_bytes(ctx, ETH_HLEN, &a, sizeof(a)) || a.htype != bpf_htons(1) ||
	    a.ptype != bpf_htons(ETH_P_IP) || a.hlen != 6 || a.plen != 4)
		return DROP_MALFORMED_ARP;
	__builtin_memcpy(&sender, a.spa, 4);
	__builtin_memcpy(&target, a.tpa, 4);
	if (sender && !holds_v4(slot, sender))
		return DROP_FOREIGN_ARP;
	if (a.op != bpf_htons(1))
		return sender ? STACK_ARP : DROP_FOREIGN_ARP;
	if (target != GATEWAY_V4) // announcement or probe of its own address (RFC 5227)
		return holds_v4(slot, target) ? CONTROL : DROP_FOREIGN_ARP;

	reply = a;
	reply.op = bpf_htons(2);
	__builtin_memcpy(reply.sha, pod->host_mac, 6);
	__builtin_memcpy(reply.spa, a.tpa, 4);
	__builtin_memcpy(reply.tha, a.sha, 6);
	__builtin_memcpy(reply.tpa, a.spa, 4);
	__builtin_memcpy(frame, a.sha, 6);
	__builtin_memcpy(frame + 6, pod->host_mac, 6);
	if (bpf_skb_store_bytes(ctx, 0, frame, sizeof(frame), 0) ||
	    bpf_skb_store_bytes(ctx, ETH_HLEN, &reply, sizeof(reply), 0))
		return DROP_REWRITE;
	return ANSWER_ARP;
}

struct nd { // neighbour solicitation or advertisement with one link-layer address option, RFC 4861 sections 4.3, 4.4
	struct ipv6hdr ip;
	__u8 type, code;
	__be16 check;
	__be32 flags;
	__u8 target[16];
	__u8 option, option_len;
	__u8 mac[6];
} __attribute__((packed));

static __always_inline __u16 fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

// advertise answers a neighbour solicitation for fe80::1 to who asked.
static __noinline int advertise(struct __sk_buff *ctx, const struct found_pod *pod, __u8 *asker)
{
	struct nd n ADDRESS = {};
	__u8 frame[12];
	__s64 sum;

	if (bpf_skb_load_bytes(ctx, 6, frame, 6))
		return DROP_MALFORMED_ARP;
	__builtin_memcpy(frame + 6, pod->host_mac, 6);
	n.ip.version = 6;
	n.ip.payload_len = bpf_htons(32);
	n.ip.nexthdr = PROTO_ICMPV6;
	n.ip.hop_limit = 255;
	((__u64 *)&n.ip.saddr)[0] = LINK_LOCAL_HI;
	((__u64 *)&n.ip.saddr)[1] = GATEWAY_V6_LO;
	__builtin_memcpy(&n.ip.daddr, asker, 16);
	n.type = 136;
	n.flags = bpf_htonl(0xe0000000); // router, solicited, override
	__builtin_memcpy(n.target, &n.ip.saddr, 16);
	n.option = 2;
	n.option_len = 1;
	__builtin_memcpy(n.mac, pod->host_mac, 6);
	// Pseudo-header (RFC 8200 section 8.1) and message: both addresses and the 32 bytes of payload lie together.
	sum = bpf_csum_diff(NULL, 0, (__be32 *)&n.ip.saddr, 64, bpf_htonl(32 + PROTO_ICMPV6));
	n.check = fold(sum);
	if (bpf_skb_change_tail(ctx, ETH_HLEN + sizeof(n), 0) || bpf_skb_store_bytes(ctx, 0, frame, sizeof(frame), 0) ||
	    bpf_skb_store_bytes(ctx, ETH_HLEN, &n, sizeof(n), BPF_F_INVALIDATE_HASH))
		return DROP_REWRITE;
	return ANSWER_ND;
}

// nd_stage handles neighbour discovery (RFC 4861) and MLD (RFC 3810): nothing of it is ever forwarded.
static __noinline int nd_stage(struct __sk_buff *ctx, struct packet *p, const struct found_pod *pod,
			       const struct pod_slot *slot)
{
	__u8 target[16] ADDRESS, from[16] ADDRESS;
	bool mine;

	switch (p->icmp_type) {
	case 134:
		return DROP_ROUTER_ADVERTISEMENT;
	case 137:
		return DROP_REDIRECT;
	case 135:
	case 136:
		break;
	default: // MLD and router solicitation
		return CONTROL;
	}
	if (p->ttl != 255 || p->icmp_code || p->flags & PKT_FIRST_FRAGMENT /* RFC 6980 */ ||
	    p->l4_offset + 24 > ETH_HLEN + p->l3_len || bpf_skb_load_bytes(ctx, p->l4_offset + 8, target, 16))
		return DROP_MALFORMED_ARP;
	__builtin_memcpy(from, source(p), 16);
	mine = holds(slot, from) || cwords(from)[0] == LINK_LOCAL_HI;
	if (p->icmp_type == 135 && cwords(target)[0] == LINK_LOCAL_HI && cwords(target)[1] == GATEWAY_V6_LO)
		return mine ? advertise(ctx, pod, from) : DROP_FOREIGN_ARP;
	if (!holds(slot, target) && cwords(target)[0] != LINK_LOCAL_HI)
		return DROP_FOREIGN_ARP;
	// Duplicate address detection, or an advertisement: to the host's stack only when it asked.
	return p->icmp_type == 136 && mine && !ctx->pkt_type ? STACK_ARP : CONTROL;
}
