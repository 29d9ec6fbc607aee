// forward.h: the last decision before a packet leaves, and its rewriting.
#pragma once
#include "track.h"

// oversize tells whether a packet does not fit the path. A GSO packet is judged by its segments.
static __always_inline bool oversize(struct __sk_buff *ctx, const struct packet *p)
{
	if (likely(p->l3_len <= p->to.mtu))
		return false;
	if (!ctx->gso_size)
		return true;

	__u32 headers = p->l4_offset - ETH_HLEN + 8;

	if (p->key.protocol == PROTO_TCP) {
		__u8 doff;

		if (bpf_skb_load_bytes(ctx, p->l4_offset + 12, &doff, 1))
			return true;
		headers += (doff >> 4) * 4 - 8;
	}
	return headers + ctx->gso_size > p->to.mtu;
}

// rewrite turns a packet into what a router sends on: one hop fewer and, to a pod, new frame addresses. Those of what
// leaves for the net come from the kernel's neighbour table.
static __always_inline int rewrite(struct __sk_buff *ctx, const struct packet *p, int verdict)
{
	void *data = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	__u32 check;

	if (p->is_v6) {
		struct ipv6hdr *ip = data + ETH_HLEN;

		if ((void *)(ip + 1) > end)
			return DROP_REWRITE;
		if (verdict == FORWARD_POD)
			__builtin_memcpy(data, p->to.hop, 12);
		ip->hop_limit--;
		// IPv6 has no header checksum to balance the change; matters only to CHECKSUM_COMPLETE.
		bpf_csum_update(ctx, ~(__u32)bpf_htons(1));
		return verdict;
	}

	struct iphdr *ip = data + ETH_HLEN;

	if ((void *)(ip + 1) > end)
		return DROP_REWRITE;
	if (verdict == FORWARD_POD)
		__builtin_memcpy(data, p->to.hop, 12);
	ip->ttl--;
	check = (__u32)ip->check + bpf_htons(0x0100); // RFC 1141
	ip->check = check + (check >= 0xffff);
	return verdict;
}

// encapsulate gives a packet the key by which the VXLAN interface sends it to the host that has its destination (RFC 7348). Its
// inner MAC addresses are nobody's, so that no host need know another's: from_net takes what comes encapsulated for this host's.
static __noinline int encapsulate(struct __sk_buff *ctx, const struct packet *p)
{
	struct uplink *tunnel = bpf_map_lookup_elem(&caracal_uplinks, &p->to.ifindex);
	struct bpf_tunnel_key k = {};
	__u8 macs[12];
	__u64 flags = 0;

	if (!tunnel)
		return DROP_REWRITE;
	k.tunnel_id = tunnel->vni;
	if (is_v4(p->to.hop)) {
		k.remote_ipv4 = bpf_ntohl(*(__be32 *)&p->to.hop[12]);
		flags = BPF_F_ZERO_CSUM_TX;
	} else {
		__builtin_memcpy(k.remote_ipv6, p->to.hop, 16);
		flags = BPF_F_TUNINFO_IPV6;
	}
	__builtin_memset(macs, 0xee, sizeof(macs));
	if (bpf_skb_store_bytes(ctx, 0, macs, sizeof(macs), 0) || bpf_skb_set_tunnel_key(ctx, &k, sizeof(k), flags))
		return DROP_REWRITE;
	return FORWARD_TUNNEL;
}

// forward_stage sends a judged packet on by p->to. What needs more than a router's common work goes to the host's stack,
// which has the same routes.
static __always_inline int forward_stage(struct __sk_buff *ctx, struct packet *p)
{
	switch (p->to.forward) {
	case FORWARD_TO_POD:
	case FORWARD_TO_NET:
	case FORWARD_TO_TUNNEL:
		p->mark = MARK_JUDGED; // for the ways out that follow
		if (unlikely(p->flags & PKT_NO_PORTS))
			return STACK_PROTOCOL;
		if (unlikely(p->flags & PKT_OPTIONS))
			return STACK_OPTIONS;
		if (unlikely(p->ttl <= 1))
			return STACK_TTL;
		if (unlikely(oversize(ctx, p)))
			return STACK_MTU;
		if (likely(p->to.forward == FORWARD_TO_POD))
			return rewrite(ctx, p, FORWARD_POD);
		if (p->to.forward == FORWARD_TO_NET)
			return rewrite(ctx, p, FORWARD_NET);
		if (rewrite(ctx, p, FORWARD_TUNNEL) != FORWARD_TUNNEL)
			return DROP_REWRITE;
		return encapsulate(ctx, p);
	case FORWARD_SHAPED:
		p->mark = MARK_JUDGED;
		return STACK_SHAPED;
	case FORWARD_DEFERRED:
		p->mark = MARK_DEFERRED;
		return STACK_SERVICE;
	case FORWARD_UNSURE:
		p->mark = MARK_DEFERRED;
		return STACK_ROUTED;
	case FORWARD_REPLY:
		return STACK_REPLY;
	case FORWARD_DELIVER:
		return FORWARD_FROM_STACK;
	default:
		return p->flags & PKT_NO_PORTS ? STACK_PROTOCOL : STACK_ROUTED;
	}
}
