// policy.h: may this flow be? The place of policy in the pipeline.
#pragma once
#include "event.h"

// identity_of finds out which rule peers an address satisfies.
static __always_inline __u32 identity_of(struct work *w, const __u8 *address, __u32 epoch)
{
	struct peer *peer;

	w->peer.prefixlen = 128;
	__builtin_memcpy(w->peer.address, address, 16);
	peer = bpf_map_lookup_elem(&caracal_peers, &w->peer);
	return peer ? peer->identity[epoch & 1] : 0;
}

static __always_inline struct policy_row *find_row(struct work *w, __u32 policy, __u32 identity, __be16 port)
{
	w->row.prefixlen = POLICY_KEY_BITS;
	w->row.policy = bpf_htonl(policy);
	w->row.identity = bpf_htonl(identity);
	w->row.port = port;
	return bpf_map_lookup_elem(&caracal_policy, &w->row);
}

// decide finds the row of one end's policy for a flow; w->row has its protocol. NULL: the policy id has none.
static __noinline struct policy_row *decide(struct work *w, __u32 policy, __u32 identity, __be16 port, __be16 source)
{
	struct policy_row *r = find_row(w, policy, identity, port);

	if (!r && identity)
		r = find_row(w, policy, 0, port);
	if (r && r->flags & POLICY_SOURCE_PORTS)
		r = find_row(w, r->rule, IDENTITY_SOURCE_PORTS, source);
	return r;
}

// opening is what judge() must know of the packet that opened a flow: its side, and of ICMP what it was.
static __always_inline __u32 opening(__u8 side, __u8 icmp_type, __u8 icmp_code)
{
	return (side & 1) | icmp_type << 8 | icmp_code << 16;
}

// judge decides about flow k: first the opener's egress policy, then the responder's ingress policy. A policy id of 0
// means that none applies. Who decided is then in work()->judged. It is a global function, so that the verifier walks it
// once.
__noinline int judge(const struct packet *p, const struct flow_key *k, __u32 egress, __u32 ingress, __u32 opened)
{
	struct work *w = work();
	bool opener = opened & 1;
	struct policy_row *r;
	__be16 port, source;

	if (!p || !k || !w)
		return DROP_NO_STATE;
	__builtin_memset(&w->judged, 0, sizeof(w->judged));
	if (!egress && !ingress)
		return VERDICT_NEXT;
	source = end_port(k, opener);
	port = is_icmp(k->protocol) ? bpf_htons((opened & 0xff00) | opened >> 16) : end_port(k, !opener);
	w->row.protocol = k->protocol;
	if (egress) {
		r = decide(w, egress, identity_of(w, end_address(k, !opener), p->epoch), port, source);
		if (!r)
			return DROP_POLICY_UNKNOWN;
		w->judged.rule_egress = r->rule;
		w->judged.log |= r->flags & POLICY_LOG;
		if (r->action != POLICY_ALLOW)
			return DROP_POLICY_EGRESS;
	}
	if (ingress) {
		r = decide(w, ingress, identity_of(w, end_address(k, opener), p->epoch), port, source);
		if (!r)
			return DROP_POLICY_UNKNOWN;
		w->judged.rule_ingress = r->rule;
		w->judged.log |= r->flags & POLICY_LOG;
		if (r->action != POLICY_ALLOW)
			return DROP_POLICY_INGRESS;
	}
	return VERDICT_NEXT;
}
