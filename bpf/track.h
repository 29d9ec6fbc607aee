// track.h: a packet meets its flow: judged when it must be, then the flow opened, refreshed or confirmed.
#pragma once
#include "route.h"

// Where a packet came from, for the flow.
struct origin {
	__u32 ifindex;               // as in flow_leg.ifindex_in
	__u32 charged;               // whose quota a new flow counts against
	enum flow_entry entered;     // of a new flow
	const struct pod_slot *self; // the sender, NULL when it is no pod of this node
	const struct pod_slot *peer; // the receiver, likewise
};

// reopens tells whether a packet starts a new connection in the place of flow f: a SYN, when f is over or the other
// side had opened it.
static __always_inline bool reopens(const struct packet *p, const struct flow *f)
{
	if (p->key.protocol != PROTO_TCP || (p->tcp_flags & (TCP_SYN | TCP_ACK)) != TCP_SYN)
		return false;
	return f->state == FLOW_CLOSED || f->state == FLOW_CLOSING || p->side != f->opener;
}

// oriented judges with the opener's side known.
static __always_inline int oriented(const struct origin *o, bool reply)
{
	return reply ? judge(o->peer, o->self) : judge(o->self, o->peer);
}

// through makes the packets of a flow that was opened through the host's stack go back into it, so that the stack sees
// both directions and can undo its translation.
static __always_inline void through(struct packet *p, const struct flow *f)
{
	if (p->hook == HOOK_FROM_POD && f->entered != ENTERED_POD) {
		p->to.forward = FORWARD_REPLY;
		p->to.ifindex = 0;
	}
}

static __noinline int open_flow(struct __sk_buff *ctx, struct packet *p, struct origin *o, __u64 at)
{
	struct flow n = {};
	struct flow *f;
	int v = VERDICT_NEXT;
	long err;

	n.opener = p->side & 1;
	if (o->entered != ENTERED_HOST)
		v = oriented(o, false);
	// A TCP packet in the middle of a connection may come from either side.
	if (v && p->key.protocol == PROTO_TCP && !(p->tcp_flags & TCP_SYN) && !oriented(o, true)) {
		v = VERDICT_NEXT;
		n.opener ^= 1;
	}
	if (v)
		return v;
	v = charge(o->charged, at);
	if (v)
		return v;
	n.opened = at;
	n.charged = o->charged;
	n.entered = o->entered;
	n.state = FLOW_OPENING;
	stamp(&n.leg[p->side & 1], p, o->ifindex);
	account(ctx, &n.leg[p->side & 1], at);
	err = bpf_map_update_elem(&caracal_opens, &p->key, &n, BPF_NOEXIST);
	if (err != -17 /* EEXIST: another CPU opened it since we looked */)
		return VERDICT_NEXT; // without room for the entry the next packet opens it again
	f = bpf_map_lookup_elem(&caracal_opens, &p->key);
	if (f) {
		through(p, f);
		stamp(&f->leg[p->side & 1], p, o->ifindex);
		account(ctx, &f->leg[p->side & 1], at);
	}
	return VERDICT_NEXT;
}

// track finds the packet's flow, judges the packet unless its leg is current, and keeps the flow up to date.
static __noinline int track(struct __sk_buff *ctx, struct packet *p, struct origin *o)
{
	struct flow *f = bpf_map_lookup_elem(&caracal_flows, &p->key);
	bool confirmed = f != NULL;
	struct flow_leg *leg;
	__u64 at = now();
	int v;

	if (!f)
		f = bpf_map_lookup_elem(&caracal_opens, &p->key);
	if (f && (expired(&p->key, f, at) || reopens(p, f))) {
		// Judged before the old flow goes: a denied SYN must not end the connection whose ports it took.
		if (o->entered != ENTERED_HOST && (v = oriented(o, false)))
			return v;
		if (confirmed)
			remove_flow(&p->key, f);
		else
			bpf_map_delete_elem(&caracal_opens, &p->key);
		f = NULL;
	}
	if (!f)
		return open_flow(ctx, p, o, at);

	through(p, f);
	leg = &f->leg[p->side & 1];
	if (!current(leg, p, o->ifindex, at)) {
		if (f->entered != ENTERED_HOST && (v = oriented(o, p->side != f->opener)))
			return v;
		stamp(leg, p, o->ifindex);
	}
	account(ctx, leg, at);
	if (advance(p, f) && !confirmed)
		return confirm(&p->key, f, at);
	return VERDICT_NEXT;
}

// quoted finds the flow that an ICMP error is about, in the packet it quotes, and whether the error goes to the
// sender of that packet (RFC 1122 section 3.2.2, RFC 4443 section 2.4).
static __noinline struct flow *quoted(struct __sk_buff *ctx, struct packet *p)
{
	__u32 at = p->l4_offset + 8;
	struct packet q = {};
	__u64 address[4] = {};
	__be16 ports[2] = {};
	__u8 l4[8] = {};
	struct flow *f;

	if (p->is_v6) {
		struct ipv6hdr ip;

		if (bpf_skb_load_bytes(ctx, at, &ip, sizeof(ip)))
			return NULL;
		q.is_v6 = 1;
		q.key.protocol = ip.nexthdr;
		__builtin_memcpy(&address[0], &ip.saddr, 16);
		__builtin_memcpy(&address[2], &ip.daddr, 16);
		at += sizeof(ip);
	} else {
		struct iphdr ip;

		if (bpf_skb_load_bytes(ctx, at, &ip, sizeof(ip)) || ip.ihl < 5 ||
		    ip.frag_off & bpf_htons(0x1fff))
			return NULL;
		q.key.protocol = ip.protocol;
		address[1] = v4_low(ip.saddr);
		address[3] = v4_low(ip.daddr);
		at += ip.ihl * 4;
	}
	if (bpf_skb_load_bytes(ctx, at, l4, sizeof(l4)))
		return NULL;
	if (q.key.protocol == PROTO_ICMP || q.key.protocol == PROTO_ICMPV6) {
		icmp(&q, l4[0], l4[1], *(__be16 *)&l4[4], &ports[0], &ports[1]);
	} else if (q.key.protocol == PROTO_TCP || q.key.protocol == PROTO_UDP || q.key.protocol == PROTO_SCTP) {
		ports[0] = *(__be16 *)&l4[0];
		ports[1] = *(__be16 *)&l4[2];
	} else {
		return NULL;
	}
	tuple(&q, address[0], address[1], address[2], address[3], ports[0], ports[1]);
	if (!same_address(source(&q), destination(p)))
		return NULL;
	f = bpf_map_lookup_elem(&caracal_flows, &q.key);
	return f ? f : bpf_map_lookup_elem(&caracal_opens, &q.key);
}
