// finish.h: the one exit. Every packet is counted here once, and its verdict becomes a TC action.
#pragma once
#include "admit.h"

// send_on sends a packet out of an uplink. The kernel's neighbour table knows, or finds, the next host's MAC address.
static __always_inline int send_on(struct __sk_buff *ctx, const struct packet *p)
{
	struct bpf_redir_neigh hop = { .nh_family = AF_INET6 };

	__builtin_memcpy(hop.ipv6_nh, p->to.hop, 16);
	if (is_v4(p->to.hop)) {
		hop.nh_family = AF_INET;
		hop.ipv4_nh = hop.ipv6_nh[3];
	}
	ctx->mark |= mark_judged; // for to_net
	return bpf_redirect_neigh(p->to.ifindex, &hop, sizeof(hop), 0);
}

static __always_inline void count(struct __sk_buff *ctx, enum hook hook, int verdict)
{
	__u32 index = hook * VERDICT_SPACE + (verdict & (VERDICT_SPACE - 1));
	struct count *c = bpf_map_lookup_elem(&caracal_counts, &index);

	if (likely(c)) {
		c->packets += segments(ctx);
		c->bytes += ctx->len;
	}
}

// dropped counts a packet at the rule that denied it, and tells of it.
__noinline int dropped(struct __sk_buff *ctx, const struct packet *p, int verdict)
{
	struct work *w = work();

	if (!p || !w)
		return 0;
	if (verdict == DROP_POLICY_EGRESS)
		tally(w->judged.rule_egress, segments(ctx), ctx->len);
	else if (verdict == DROP_POLICY_INGRESS)
		tally(w->judged.rule_ingress, segments(ctx), ctx->len);
	else if (verdict != DROP_POLICY_UNKNOWN) // another reason than policy
		__builtin_memset(&w->judged, 0, sizeof(w->judged));
	return tell(ctx, p, EVENT_DROP, verdict);
}

// finish counts and acts. "Pass" is TC_ACT_UNSPEC (= TCX_NEXT), so that other programs on the interface go on working.
static __always_inline int finish(struct __sk_buff *ctx, const struct packet *p, int verdict)
{
	count(ctx, p->hook, verdict);
	if (likely(verdict == FORWARD_POD))
		return bpf_redirect_peer(p->to.ifindex, 0);
	switch (verdict) {
	case FORWARD_NET:
		return send_on(ctx, p);
	case FORWARD_TUNNEL:
		ctx->mark |= mark_judged; // for to_net
		return bpf_redirect(p->to.ifindex, 0);
	case CONTROL:
		return TC_ACT_SHOT;
	case ANSWER_ARP:
	case ANSWER_ND:
		return bpf_redirect(ctx->ifindex, 0);
	case FORWARD_FROM_STACK:
	case FORWARD_JUDGED:
	case FORWARD_MASQUERADED:
	case STACK_ROUTED:
	case STACK_REPLY:
	case STACK_SHAPED:
	case STACK_TTL:
	case STACK_MTU:
	case STACK_OPTIONS:
	case STACK_PROTOCOL:
	case STACK_ARP:
	case STACK_ANSWER:
	case STACK_OTHER:
	case STACK_SERVICE:
		if (p->mark)
			ctx->mark |= p->mark == MARK_DEFERRED ? mark_deferred : mark_judged;
		return TC_ACT_UNSPEC;
	default:
		dropped(ctx, p, verdict);
		return TC_ACT_SHOT;
	}
}
