// host.h: what pods send to processes of this host by way of a Service.
//
// Direct packets of theirs were judged by from_pod. What the host's stack has translated to an address of this host meets no other
// hook than the look-up of its socket: of TCP's first packet, and of each that comes for a socket of UDP without a peer. What is
// denied there finds no socket, and is refused. What the host answers is judged by to_pod.
#pragma once
#include "masquerade.h"

// deny_socket counts what to_host denies, and tells of it.
static __noinline void deny_socket(const struct packet *p, __u32 ifindex, int verdict)
{
	__u32 index = HOOK_TO_HOST * VERDICT_SPACE + (verdict & (VERDICT_SPACE - 1));
	struct count *c = bpf_map_lookup_elem(&caracal_counts, &index);
	struct work *w = work();

	if (c)
		c->packets++;
	if (w && verdict == DROP_POLICY_EGRESS)
		tally(w->judged.rule_egress, 1, 0);
	tell_of(p, ifindex, 0, EVENT_DROP, verdict);
}

// socket_packet fills p from a look-up. False: it is of another family.
static __always_inline bool socket_packet(struct bpf_sk_lookup *ctx, struct packet *p)
{
	__be16 port = bpf_htons(ctx->local_port);

	p->hook = HOOK_TO_HOST;
	p->key.protocol = ctx->protocol;
	if (ctx->family == AF_INET) {
		p->side =
		    sorted(&p->key, 0, v4_low(ctx->remote_ip4), 0, v4_low(ctx->local_ip4), ctx->remote_port, port);
		return true;
	}
	if (ctx->family != AF_INET6)
		return false;
	p->is_v6 = 1;
	p->side = sorted(&p->key, (__u64)ctx->remote_ip6[1] << 32 | ctx->remote_ip6[0],
			 (__u64)ctx->remote_ip6[3] << 32 | ctx->remote_ip6[2],
			 (__u64)ctx->local_ip6[1] << 32 | ctx->local_ip6[0],
			 (__u64)ctx->local_ip6[3] << 32 | ctx->local_ip6[2], ctx->remote_port, port);
	return true;
}

// socket_stages judges whom a pod has reached. What answers a flow of this host's own is no opening. It may run inside another hook, which
// looks for a socket, and has no use for work() then: that packet is no pod's.
static __always_inline int socket_stages(struct bpf_sk_lookup *ctx, struct packet *p)
{
	__u32 ifindex = ctx->ingress_ifindex;
	struct state *s = node_state();
	struct found_pod *pod;
	struct flow *f;

	if (!s || s->version != SCHEMA_VERSION || !is_pods(ifindex))
		return VERDICT_NEXT;
	p->epoch = READ_ONCE(s->epoch);
	pod = find_self(ifindex, p->epoch);
	if (!pod || !socket_packet(ctx, p) || !holds(&pod->slot, source(p)))
		return VERDICT_NEXT;
	f = find_flow(&p->key);
	if (f && f->opener != p->side)
		return VERDICT_NEXT;
	return judge(p, &p->key, pod->slot.policy_egress, 0, opening(p->side, 0, 0));
}
