// masquerade.h: what pods send out of all pools leaves with the host's address, and its answers find the way back.
//
// The host's stack routes such packets, so its own tables say which way. to_net, the last to see them, gives them the
// address of the uplink; from_net, the first to see an answer, takes it back. The stack sees both directions of one flow,
// the pod's.
#pragma once
#include "finish.h"

#define NAT_TRIES 32 // ports that are tried for a new flow

// idle tells whether a flow may lose its port when no other is free: it is over, or a question that was answered and not asked
// again.
static __always_inline bool idle(const struct flow_key *k, const struct flow *f, __u64 at)
{
	const struct flow_leg *asked = &f->leg[f->opener & 1];

	if (f->leg[0].last_seen + FRESH > at || f->leg[1].last_seen + FRESH > at)
		return false;
	return f->state == FLOW_CLOSED || f->state == FLOW_CLOSING || (k->protocol != PROTO_TCP && asked->packets == 1);
}

// host_uses tells whether a socket of this host would get what answers a packet with source n.
static __noinline bool host_uses(struct __sk_buff *ctx, const struct packet *p, const struct nat *n)
{
	struct bpf_sock_tuple t = {};
	struct bpf_sock *sk;
	__u32 size;

	if (is_icmp(p->key.protocol))
		return false;
	if (p->is_v6) {
		__builtin_memcpy(t.ipv6.saddr, destination(p), 16);
		__builtin_memcpy(t.ipv6.daddr, n->address, 16);
		t.ipv6.sport = end_port(&p->key, !p->side);
		t.ipv6.dport = n->port;
		size = sizeof(t.ipv6);
	} else {
		t.ipv4.saddr = *(__u32 *)(destination(p) + 12);
		t.ipv4.daddr = *(__u32 *)(n->address + 12);
		t.ipv4.sport = end_port(&p->key, !p->side);
		t.ipv4.dport = n->port;
		size = sizeof(t.ipv4);
	}
	if (p->key.protocol == PROTO_TCP)
		sk = bpf_skc_lookup_tcp(ctx, &t, size, BPF_F_CURRENT_NETNS, 0);
	else
		sk = bpf_sk_lookup_udp(ctx, &t, size, BPF_F_CURRENT_NETNS, 0);
	if (sk)
		bpf_sk_release(sk);
	return sk != NULL;
}

// From whom take_port may take a port.
#define FROM_IDLE 1      // a flow that is over, or was asked once and answered
#define FROM_HALF_OPEN 2 // also one that nobody has answered yet

// take_port writes the entries of a new flow that has w->host outside. VERDICT_NEXT: it has them.
// It is a global function, so that the verifier walks it once and not for each port that is tried.
__noinline int take_port(struct __sk_buff *ctx, struct packet *p, int from)
{
	struct work *w = work();
	__u64 at = now();
	struct nat *old;
	struct flow *f;

	if (!p || !w)
		return DROP_NO_STATE;
	w->inner = p->key;
	w->pod.side = swapped(&w->answer, &w->inner, &w->host);
	old = bpf_map_lookup_elem(&caracal_natopen, &w->answer); // before caracal_nat: keep_nat moves entries there
	if (old) {
		swapped(&w->held, &w->answer, old);
		f = find_flow(&w->held);
		if (f && f->masqueraded && !expired(&w->held, f, at) &&
		    from < (idle(&w->held, f, at) ? FROM_IDLE : FROM_HALF_OPEN))
			return DROP_NAT_PORTS;
		bpf_map_delete_elem(&caracal_natopen, &w->held);
		bpf_map_delete_elem(&caracal_natopen, &w->answer);
	}
	old = bpf_map_lookup_elem(&caracal_nat, &w->answer);
	if (old) {
		swapped(&w->held, &w->answer, old);
		f = bpf_map_lookup_elem(&caracal_flows, &w->held);
		if (f && !expired(&w->held, f, at) && !(from && idle(&w->held, f, at)))
			return DROP_NAT_PORTS;
		if (f)
			remove_flow(&w->held, f);
		forget_nat(&w->answer);
	}
	if (host_uses(ctx, p, &w->host))
		return DROP_NAT_PORTS;
	__builtin_memcpy(w->pod.address, source(p), 16);
	w->pod.port = end_port(&p->key, p->side);
	if (bpf_map_update_elem(&caracal_natopen, &w->answer, &w->pod, BPF_NOEXIST))
		return DROP_NAT_PORTS;
	if (bpf_map_update_elem(&caracal_natopen, &w->inner, &w->host, BPF_NOEXIST)) {
		bpf_map_delete_elem(&caracal_natopen, &w->answer); // another CPU had this flow's packet
		return DROP_NAT_PORTS;
	}
	return VERDICT_NEXT;
}

// allocate finds the address and a port for a new flow. VERDICT_NEXT: they are in work()->host.
static __noinline int allocate(struct __sk_buff *ctx, struct packet *p)
{
	struct work *w = work();
	struct state *s = node_state();
	__u32 ifindex = ctx->ifindex;
	struct uplink *up = bpf_map_lookup_elem(&caracal_uplinks, &ifindex);
	__u32 first, ports, start;

	if (!s || !up || !w)
		return DROP_NAT_ADDRESS;
	__builtin_memcpy(w->host.address, p->is_v6 ? up->address_v6 : up->address_v4, 16);
	if (!cwords(w->host.address)[0] && !cwords(w->host.address)[1])
		return DROP_NAT_ADDRESS;
	first = s->nat_first;
	ports = (__u32)s->nat_last + 1 - first;
	if (!s->nat_last || !ports || ports > 0xffff)
		return DROP_NAT_PORTS;
	w->host.side = p->side & 1;
	start = bpf_get_prandom_u32();
	for (__u32 i = 0; i < (FROM_HALF_OPEN + 1) * NAT_TRIES; i++) {
		w->host.port = bpf_htons(first + (start + i % NAT_TRIES) % ports);
		if (!take_port(ctx, p, i / NAT_TRIES))
			return VERDICT_NEXT;
	}
	return DROP_NAT_PORTS;
}

// stands tells whether a flow's entry still holds: the host has the address, and the entry for the answers leads back.
static __always_inline bool stands(const struct flow_key *k, const struct nat *n)
{
	struct route *r = find_route(n->address);
	struct flow_key answer = {};
	struct nat *back;

	if (!r || r->kind != ROUTE_HOST)
		return false;
	swapped(&answer, k, n);
	back = find_nat(&answer);
	return back && same_address(back->address, end_address(k, n->side)) && back->port == end_port(k, n->side);
}

// readdress_end gives a packet another source, or destination. Ports stay where there are none: in errors and in fragments
// behind the first.
__noinline int readdress_end(struct __sk_buff *ctx, const struct packet *p, bool from, const struct nat *n)
{
	__u8 was[16] ADDRESS, is[16] ADDRESS;
	__u32 at, port_at, check_at;
	bool later, error;
	__u64 flags = 0;
	__be16 old;
	__s64 diff;
	int err = 0;

	if (!p || !n)
		return DROP_REWRITE;
	later = p->flags & PKT_LATER_FRAGMENT;
	error = p->flags & PKT_ICMP_ERROR;
	at = ETH_HLEN + (p->is_v6 ? (from ? 8 : 24) : (from ? 12 : 16));
	port_at = p->l4_offset + (from ? 0 : 2);
	check_at = p->l4_offset + 2;
	__builtin_memcpy(was, end_address(&p->key, from ? p->side : !p->side), 16);
	__builtin_memcpy(is, n->address, 16);
	old = end_port(&p->key, from ? p->side : !p->side);
	if (p->is_v6)
		diff = bpf_csum_diff((__be32 *)was, 16, (__be32 *)is, 16, 0);
	else
		diff = bpf_csum_diff((__be32 *)&was[12], 4, (__be32 *)&is[12], 4, 0);
	switch (p->key.protocol) {
	case PROTO_TCP:
		check_at = p->l4_offset + 16;
		break;
	case PROTO_UDP:
		check_at = p->l4_offset + 6;
		flags = BPF_F_MARK_MANGLED_0;
		break;
	default:
		port_at = p->l4_offset + 4;
	}
	if (!later) {
		if (p->key.protocol != PROTO_ICMP) // which sums no pseudo-header
			err |= bpf_l4_csum_replace(ctx, check_at, 0, diff, flags | BPF_F_PSEUDO_HDR);
		if (!error) {
			err |= bpf_l4_csum_replace(ctx, check_at, old, n->port, flags | 2);
			err |= bpf_skb_store_bytes(ctx, port_at, &n->port, 2, 0);
		}
	}
	if (p->is_v6) {
		// No header checksum balances the addresses, in later fragments no other either; matters only to
		// CHECKSUM_COMPLETE.
		bpf_csum_update(ctx, diff);
		err |= bpf_skb_store_bytes(ctx, at, is, 16, BPF_F_INVALIDATE_HASH);
	} else {
		err |= bpf_l3_csum_replace(ctx, ETH_HLEN + 10, 0, diff, 0);
		err |= bpf_skb_store_bytes(ctx, at, &is[12], 4, BPF_F_INVALIDATE_HASH);
	}
	return err ? DROP_REWRITE : VERDICT_NEXT;
}

// readdress_quoted does the same inside an ICMP error, to an end of the packet that it quotes. The quoted transport checksum
// stays as it is: nobody verifies it, and half of it may be missing.
__noinline int readdress_quoted(struct __sk_buff *ctx, const struct packet *p, const struct quoted *q, bool from,
				const struct nat *n)
{
	__u8 was[16] ADDRESS, is[16] ADDRESS;
	__u32 at, port_at;
	__be16 old;
	__s64 diff;
	int err = 0;

	if (!p || !q || !n)
		return DROP_REWRITE;
	at = q->ip_at + (p->is_v6 ? (from ? 8 : 24) : (from ? 12 : 16));
	port_at = is_icmp(q->key.protocol) ? q->l4_at + 4 : q->l4_at + (from ? 0 : 2);
	__builtin_memcpy(was, end_address(&q->key, from ? q->side : !q->side), 16);
	__builtin_memcpy(is, n->address, 16);
	old = end_port(&q->key, from ? q->side : !q->side);
	if (p->is_v6) {
		diff = bpf_csum_diff((__be32 *)was, 16, (__be32 *)is, 16, 0);
		err |= bpf_l4_csum_replace(ctx, p->l4_offset + 2, 0, diff, 0);
		err |= bpf_skb_store_bytes(ctx, at, is, 16, 0);
	} else { // the quoted header's own checksum balances the address
		diff = bpf_csum_diff((__be32 *)&was[12], 4, (__be32 *)&is[12], 4, 0);
		err |= bpf_l3_csum_replace(ctx, q->ip_at + 10, 0, diff, 0);
		err |= bpf_skb_store_bytes(ctx, at, &is[12], 4, 0);
	}
	err |= bpf_l4_csum_replace(ctx, p->l4_offset + 2, old, n->port, 2);
	err |= bpf_skb_store_bytes(ctx, port_at, &n->port, 2, 0);
	return err ? DROP_REWRITE : VERDICT_NEXT;
}

// masquerade_stage gives what a pod sends to the outside the host's address.
static __noinline int masquerade_stage(struct __sk_buff *ctx, struct packet *p)
{
	struct work *w = work();
	struct nat *found;
	int v;

	if (p->flags & PKT_NO_PORTS || p->key.protocol == PROTO_SCTP ||
	    (is_icmp(p->key.protocol) && !p->key.port_a && !is_query(p->is_v6, p->icmp_type)))
		return DROP_NAT_PROTOCOL;
	if (!w)
		return DROP_NO_STATE;
	found = find_nat(&p->key);
	if (found) {
		w->host = *found;
		if (!stands(&p->key, &w->host)) {
			forget_nat(&p->key);
			bpf_map_delete_elem(&caracal_natopen, &p->key);
			found = NULL;
		}
	}
	if (!found) {
		v = allocate(ctx, p);
		if (v && !(found = find_nat(&p->key)))
			return v;
		if (v) // another CPU had a packet of this flow meanwhile
			w->host = *found;
	}
	if (!found && bpf_map_lookup_elem(&caracal_flows, &p->key)) // it was confirmed with others
		keep_nat(&p->key);
	v = readdress_end(ctx, p, true, &w->host);
	return v ? v : FORWARD_MASQUERADED;
}

// masquerade_error makes an ICMP error about a masqueraded flow, a pod's or the host's own, one that its receiver knows.
// VERDICT_NEXT: it is about another.
static __noinline int masquerade_error(struct __sk_buff *ctx, struct packet *p, bool by_pod)
{
	struct quoted q = {};
	struct nat *found, n;
	int v;

	if (!quote(ctx, p, &q) || !(found = find_nat(&q.key)))
		return VERDICT_NEXT;
	n = *found;
	if (n.side == q.side) // the pod itself sent what it quotes
		return VERDICT_NEXT;
	if ((v = readdress_quoted(ctx, p, &q, false, &n)) || (by_pod && (v = readdress_end(ctx, p, true, &n))))
		return v;
	return FORWARD_MASQUERADED;
}

// unmasquerade_stage gives what answers a masqueraded flow its pod's address back. VERDICT_NEXT: done, and p is the pod's
// packet now.
static __noinline int unmasquerade_stage(struct __sk_buff *ctx, struct packet *p)
{
	struct work *w = work();
	struct quoted q = {};
	struct nat *found, *n;
	struct flow *f;
	bool side;
	int v;

	if (!w || (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN) // nobody outside opens what has no address there
		return STACK_OTHER;
	if (p->flags & PKT_ICMP_ERROR) {
		if (!quote(ctx, p, &q))
			return STACK_OTHER;
	} else {
		q.key = p->key;
		q.side = !p->side;
	}
	// q is what the host sent, of the error or of the answer.
	found = find_nat(&q.key);
	if (!found || found->side != q.side)
		return STACK_OTHER;
	n = &w->pod;
	*n = *found;
	side = swapped(&w->inner, &q.key, n);
	f = find_flow(&w->inner);
	if (!f || !f->masqueraded || expired(&w->inner, f, now())) // it is over, or the pod that had it is gone
		return STACK_OTHER;
	if (p->flags & PKT_ICMP_ERROR && (v = readdress_quoted(ctx, p, &q, true, n)))
		return v;
	if ((v = readdress_end(ctx, p, false, n)))
		return v;
	if (p->flags & PKT_ICMP_ERROR) {
		__builtin_memcpy(w->inner.address_a, source(p), 16); // only the addresses count from here on
		__builtin_memcpy(w->inner.address_b, n->address, 16);
		p->side = sorted(&p->key, cwords(w->inner.address_a)[0], cwords(w->inner.address_a)[1],
				 cwords(n->address)[0], cwords(n->address)[1], 0, 0);
	} else {
		p->key = w->inner;
		p->side = !side;
	}
	return VERDICT_NEXT;
}
