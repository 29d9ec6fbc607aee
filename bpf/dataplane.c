//go:build ignore

// dataplane.c: the programs, each a list of stages. A stage returns a verdict; VERDICT_NEXT goes on to the next.
#include "host.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

// established forwards a packet of a confirmed flow whose leg is current: one lookup. VERDICT_NEXT: it is not one.
static __always_inline int established(struct __sk_buff *ctx, struct packet *p, __u32 ifindex_in)
{
	struct flow *f = bpf_map_lookup_elem(&caracal_flows, &p->key);
	struct flow_leg *leg;
	__u64 at, to;

	if (!f)
		return VERDICT_NEXT;
	leg = p->side ? &f->leg[1] : &f->leg[0];
	at = now();
	to = READ_ONCE(*(__u64 *)&leg->to); // before the check, so that the check is about it
	__builtin_memcpy(p->to.hop, leg->to.hop, 16);
	barrier();
	if (unlikely(!current(leg, p, ifindex_in, at)))
		return VERDICT_NEXT;
	*(__u64 *)&p->to = to;
	account(ctx, leg, at);
	return forward_stage(ctx, p);
}

// plain tells the packets that established() may take: those whose flow they cannot change.
static __always_inline bool plain(struct __sk_buff *ctx, const struct packet *p)
{
	return !(p->flags & ~(PKT_FIRST_FRAGMENT | PKT_LATER_FRAGMENT)) &&
	       !(p->tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST)) && !p->sctp_chunk;
}

// learn keeps the pod's MAC address up to date, for packets that come out of the host's stack.
static __always_inline void learn(struct __sk_buff *ctx, const struct found_pod *found)
{
	__u32 ifindex = found->ifindex;
	struct pod *pod;
	__u8 mac[6];

	if (bpf_skb_load_bytes(ctx, 6, mac, 6) || mac[0] & 1 || likely(!__builtin_memcmp(found->mac, mac, 6)))
		return;
	pod = bpf_map_lookup_elem(&caracal_pods, &ifindex);
	if (pod)
		__builtin_memcpy(pod->mac, mac, 6);
}

// from_pod_slow is everything but the established path: who is it, may it send this, where to, is it allowed.
static __noinline int from_pod_slow(struct __sk_buff *ctx, struct packet *p, int parsed)
{
	__u32 ifindex = ctx->ifindex;
	struct found_pod *pod = find_self(ifindex, p->epoch);
	struct origin o = {};
	int v;

	if (!pod)
		return DROP_INTERFACE;
	o.self = pod;
	learn(ctx, pod);
	if (parsed == STACK_ARP)
		return arp_stage(ctx, pod, &pod->slot);
	if (p->flags & PKT_ND)
		return nd_stage(ctx, p, pod, &pod->slot);
	if ((v = admit_stage(ctx, p, &pod->slot)))
		return v;
	if ((v = route_stage(ctx, p, o.self, &o.peer)))
		return v;
	o.ifindex = o.charged = ifindex;
	o.entered = p->to.forward == FORWARD_DEFERRED ? ENTERED_SERVICE : ENTERED_POD;
	if ((v = p->flags & PKT_ICMP_ERROR ? related(ctx, p, &o) : track(ctx, p, &o)))
		return v;
	return forward_stage(ctx, p);
}

static __always_inline int from_pod_stages(struct __sk_buff *ctx, struct packet *p)
{
	struct state *s = node_state();
	int v;

	if (!s || s->version != SCHEMA_VERSION)
		return DROP_NO_STATE;
	p->epoch = READ_ONCE(s->epoch);
	v = parse(ctx, p);
	if (likely(!v) && likely(plain(ctx, p)) && likely(!ctx->pkt_type) && (v = established(ctx, p, ctx->ifindex)))
		return v;
	if (v && v != STACK_ARP)
		return v;
	return from_pod_slow(ctx, p, v);
}

// readdress gives a frame from the host's stack the MAC address that the pod has now.
static __always_inline void readdress(struct __sk_buff *ctx, const struct found_pod *pod)
{
	__u8 mac[6];

	if (bpf_skb_load_bytes(ctx, 0, mac, 6) || mac[0] & 1 || !__builtin_memcmp(pod->mac, mac, 6))
		return;
	__builtin_memcpy(mac, pod->mac, 6);
	bpf_skb_store_bytes(ctx, 0, mac, 6, 0);
}

// sent_by finds the pod of this node that sent what comes out of the host's stack: by its source address, or, if the stack may
// have given it another, by the interface that it came in by. NULL: somebody else did.
static __noinline struct found_pod *sent_by(struct __sk_buff *ctx, const struct packet *p, struct origin *o)
{
	struct found_pod *pod;
	struct route *r;

	if (ctx->mark & mark_deferred) {
		pod = find_self(ctx->ingress_ifindex, p->epoch);
		if (pod && !holds(&pod->slot, source(p)))
			o->ifindex = LEG_SENDER | ctx->ingress_ifindex;
		return pod;
	}
	r = find_route(source(p));
	return r && r->kind == ROUTE_LOCAL_POD ? find_self(r->ifindex, p->epoch) : NULL;
}

static __noinline int to_pod_slow(struct __sk_buff *ctx, struct packet *p)
{
	__u32 ifindex = ctx->ifindex;
	struct found_pod *pod = find_peer(ifindex, p->epoch);
	struct origin o = {};
	__u8 to[16] ADDRESS;
	int v;

	if (!pod)
		return DROP_INTERFACE;
	readdress(ctx, pod);
	if (ctx->mark & mark_judged)
		return FORWARD_JUDGED;
	__builtin_memcpy(to, destination(p), 16);
	if (is_multicast(to))
		return FORWARD_FROM_STACK;
	if (p->flags & PKT_ICMP_ERROR && !ctx->ingress_ifindex)
		return FORWARD_FROM_STACK;
	o.peer = pod;
	o.charged = ifindex;
	o.entered = ctx->ingress_ifindex ? ENTERED_STACK : ENTERED_HOST;
	if (ctx->ingress_ifindex)
		o.self = sent_by(ctx, p, &o);
	p->to.forward = FORWARD_DELIVER;
	if ((v = p->flags & PKT_ICMP_ERROR ? related(ctx, p, &o) : track(ctx, p, &o)))
		return v;
	return FORWARD_FROM_STACK;
}

static __always_inline int to_pod_stages(struct __sk_buff *ctx, struct packet *p)
{
	struct state *s = node_state();
	int v;

	if (!s || s->version != SCHEMA_VERSION)
		return DROP_NO_STATE;
	p->epoch = READ_ONCE(s->epoch);
	v = parse(ctx, p);
	if (v)
		return v; // STACK_ARP passes
	if (p->flags & PKT_ND)
		return STACK_ARP;
	return to_pod_slow(ctx, p);
}

// tunnel_stage lets in what came encapsulated from the host that has its source's block, or its source. VERDICT_NEXT: it did.
static __noinline int tunnel_stage(struct __sk_buff *ctx, const struct packet *p)
{
	__u32 ifindex = ctx->ifindex;
	struct uplink *tunnel = bpf_map_lookup_elem(&caracal_uplinks, &ifindex);
	struct route *r = find_route(source(p));
	struct bpf_tunnel_key k = {};
	__u8 outer[16] ADDRESS;
	bool block;

	// A host may encapsulate before this one does: the mode of a pool reaches one of them first.
	block = r && (r->kind == ROUTE_TUNNEL || r->kind == ROUTE_REMOTE);
	if (!tunnel || !r || (!block && !(r->flags & ROUTE_NODE)))
		return DROP_TUNNEL;
	if (!bpf_skb_get_tunnel_key(ctx, &k, sizeof(k), 0))
		put_address(outer, 0, v4_low(bpf_htonl(k.remote_ipv4)));
	else if (!bpf_skb_get_tunnel_key(ctx, &k, sizeof(k), BPF_F_TUNINFO_IPV6))
		__builtin_memcpy(outer, k.remote_ipv6, 16);
	else
		return DROP_TUNNEL;
	if (k.tunnel_id != tunnel->vni || !same_address(outer, block ? r->next_hop : source(p)))
		return DROP_TUNNEL;
	if (ctx->pkt_type) // its inner MAC address is nobody's
		bpf_skb_change_type(ctx, 0 /* PACKET_HOST */);
	return VERDICT_NEXT;
}

// may_answer tells what can't be an answer to a masqueraded flow without looking for one.
static __always_inline bool may_answer(const struct packet *p)
{
	struct state *s = node_state();
	__u16 port = bpf_ntohs(end_port(&p->key, !p->side));

	return s && s->nat_last && (p->flags & PKT_ICMP_ERROR || (port >= s->nat_first && port <= s->nat_last));
}

// from_net_slow finds out whether a packet from the net is for a pod, and whether it may be. A flow goes through the
// host's stack in both directions or in none, so only what comes from another host's block, to which the answer goes
// straight, goes straight to the pod.
static __noinline int from_net_slow(struct __sk_buff *ctx, struct packet *p)
{
	struct route *from, *to;
	int v, left = STACK_ROUTED;
	struct origin o = {};
	struct flow *f;

	if (ctx->pkt_type || p->flags & PKT_ND) // PACKET_HOST is 0
		return STACK_OTHER;
	from = find_route(source(p));
	if (from && (from->kind == ROUTE_LOCAL_POD || from->kind == ROUTE_BLACKHOLE))
		return DROP_SPOOF_NET;
	to = find_route(destination(p));
	if (to && to->kind == ROUTE_BLACKHOLE)
		return DROP_NO_POD;
	if (to && to->kind == ROUTE_HOST && may_answer(p)) {
		if ((v = unmasquerade_stage(ctx, p)))
			return v;
		left = STACK_ANSWER;
		to = find_route(destination(p));
	}
	if (!to || to->kind != ROUTE_LOCAL_POD)
		return left == STACK_ANSWER ? DROP_NO_POD : STACK_OTHER;
	if ((v = to_pod_stage(p, to, NULL, &o.peer)))
		return v;
	o.ifindex = ctx->ifindex;
	o.charged = p->to.ifindex;
	o.entered = ENTERED_NET;
	if (p->flags & PKT_ICMP_ERROR) {
		v = related(ctx, p, &o);
		return v ? v : left == STACK_ANSWER ? left : forward_stage(ctx, p);
	}
	if (!from || !straight(from, p->is_v6))
		to_stack_stage(p);
	f = find_flow(&p->key);
	if (f && by_stack(f->entered)) {
		struct flow_leg *leg = &f->leg[p->side & 1];

		if (leg->epoch && !leg->ifindex_in) // to_pod follows it
			return STACK_REPLY;
	} else if (p->to.forward == FORWARD_TO_STACK || (f && into_stack(&f->leg[!p->side]))) {
		return left;
	}
	if ((v = track(ctx, p, &o)))
		return v;
	return forward_stage(ctx, p);
}

// What is wrong with a packet from the net is the host's stack's to find out when it is not for a pod, and to_pod's when
// it is. So nothing that cannot be parsed is dropped here.
static __always_inline int from_net_stages(struct __sk_buff *ctx, struct packet *p)
{
	struct state *s = node_state();
	int v;

	if (!s || s->version != SCHEMA_VERSION)
		return STACK_OTHER;
	p->epoch = READ_ONCE(s->epoch);
	if (unlikely(parse(ctx, p)))
		return ctx->ifindex == s->tunnel ? DROP_TUNNEL : STACK_OTHER;
	if (unlikely(ctx->ifindex == s->tunnel) && (v = tunnel_stage(ctx, p)))
		return v;
	if (likely(plain(ctx, p)) && likely(!ctx->pkt_type) && (v = established(ctx, p, ctx->ifindex)))
		return v;
	return from_net_slow(ctx, p);
}

// as_from_pod tells whether from_pod has judged packets of this flow and left them to the host's stack, so that what comes
// out of it was not translated.
static __always_inline bool as_from_pod(const struct flow_leg *leg, __u32 epoch, __u32 ifindex)
{
	return leg->epoch == epoch && leg->ifindex_in == ifindex &&
	       (leg->to.forward == FORWARD_TO_STACK || leg->to.forward == FORWARD_UNSURE ||
		leg->to.forward == FORWARD_REPLY);
}

// leaves masquerades what is to be. What answers a flow that came from outside keeps its pod's address.
static __always_inline int leaves(struct __sk_buff *ctx, struct packet *p, const struct found_pod *self, int judged)
{
	bool wanted = masquerades(self, find_route(destination(p)), p->is_v6);
	struct flow *f;
	int v;

	if (p->flags & PKT_ICMP_ERROR)
		return wanted && (v = masquerade_error(ctx, p, true)) ? v : judged;
	f = find_flow(&p->key);
	// Once both sides know each other by some addresses they stay with them, whatever is wanted meanwhile.
	if (f && (f->opener != p->side || f->state > FLOW_OPENING))
		wanted = f->opener == p->side && f->masqueraded;
	if (!wanted)
		return judged;
	if (f)
		f->masqueraded = 1;
	return masquerade_stage(ctx, p);
}

// to_net_slow judges what the host's stack made of a pod's packet: translated, it belongs to a flow that from_pod does not
// know.
static __noinline int to_net_slow(struct __sk_buff *ctx, struct packet *p)
{
	struct origin o = {};
	struct found_pod *pod = sent_by(ctx, p, &o);
	struct flow *f;
	int v;

	if (!pod || is_multicast(destination(p)))
		return STACK_OTHER;
	o.self = pod;
	o.charged = pod->ifindex;
	o.entered = ENTERED_STACK;
	f = find_flow(&p->key);
	v = FORWARD_JUDGED;
	if (!f || !as_from_pod(&f->leg[p->side & 1], p->epoch, o.charged)) {
		to_stack_stage(p);
		p->to.forward = FORWARD_DELIVER;
		if ((v = p->flags & PKT_ICMP_ERROR ? related(ctx, p, &o) : track(ctx, p, &o)))
			return v;
		v = FORWARD_FROM_STACK;
		if (ctx->mark & mark_deferred) // in a tunnel it comes here again, inside what the host sends
			p->mark = MARK_JUDGED;
	}
	return o.ifindex ? v : leaves(ctx, p, o.self, v);
}

// maybe_icmp tells cheaply what a process of the host can't have sent: errors come from its stack.
static __always_inline bool maybe_icmp(struct __sk_buff *ctx)
{
	__u8 protocol = 0;

	if (ctx->protocol == bpf_htons(ETH_P_IPV6))
		bpf_skb_load_bytes(ctx, ETH_HLEN + 6, &protocol, 1);
	else
		bpf_skb_load_bytes(ctx, ETH_HLEN + 9, &protocol, 1);
	return is_icmp(protocol);
}

static __always_inline int to_net_stages(struct __sk_buff *ctx, struct packet *p)
{
	struct state *s = node_state();
	int v;

	if (!s || s->version != SCHEMA_VERSION)
		return STACK_OTHER;
	if (!ctx->ingress_ifindex && !(s->nat_last && maybe_icmp(ctx)))
		return STACK_OTHER;
	p->epoch = READ_ONCE(s->epoch);
	if (parse(ctx, p) || p->flags & PKT_ND)
		return STACK_OTHER;
	if (ctx->ingress_ifindex)
		return to_net_slow(ctx, p);
	v = p->flags & PKT_ICMP_ERROR ? masquerade_error(ctx, p, false) : VERDICT_NEXT;
	return v ? v : STACK_OTHER;
}

SEC("tc")
int from_pod(struct __sk_buff *ctx)
{
	struct packet p = { .hook = HOOK_FROM_POD };

	return finish(ctx, &p, from_pod_stages(ctx, &p));
}

SEC("tc")
int to_pod(struct __sk_buff *ctx)
{
	struct packet p = { .hook = HOOK_TO_POD };

	return finish(ctx, &p, to_pod_stages(ctx, &p));
}

SEC("tc")
int from_net(struct __sk_buff *ctx)
{
	struct packet p = { .hook = HOOK_FROM_NET };

	return finish(ctx, &p, from_net_stages(ctx, &p));
}

SEC("tc")
int to_net(struct __sk_buff *ctx)
{
	if (likely(ctx->mark & mark_judged)) {
		count(ctx, HOOK_TO_NET, FORWARD_JUDGED);
		return TC_ACT_UNSPEC;
	}

	struct packet p = { .hook = HOOK_TO_NET };

	return finish(ctx, &p, to_net_stages(ctx, &p));
}

SEC("sk_lookup")
int to_host(struct bpf_sk_lookup *ctx)
{
	struct packet p = {};
	int v;

	if (likely(!ctx->ingress_ifindex))
		return SK_PASS;
	v = socket_stages(ctx, &p);
	if (likely(!v))
		return SK_PASS;
	deny_socket(&p, ctx->ingress_ifindex, v);
	return SK_DROP;
}

// What purge removes. Zero everywhere removes the expired flows only.
struct purge_args {
	__u8 address[POD_ADDRESSES][16] ADDRESS; // flows that one of these is an end of; unused ones are ::
	__u32 all;                               // 1: every flow
	__u32 pad;
	__u64 removed; // out: how many went
	__u64 now;     // set by purge
};

struct clock_args {
	__u64 now; // out
};

static __always_inline bool purged(const struct purge_args *a, const struct flow_key *k, const struct flow *f)
{
	if (a->all || expired(k, f, a->now))
		return true;
	for (int i = 0; i < POD_ADDRESSES; i++) {
		if (!cwords(a->address[i])[0] && !cwords(a->address[i])[1])
			continue;
		if (same_address(a->address[i], k->address_a) || same_address(a->address[i], k->address_b))
			return true;
	}
	return false;
}

static long purge_flow(void *map, struct flow_key *k, struct flow *f, struct purge_args *a)
{
	struct flow_key copy = *k; // the walk's own may only be read

	if (purged(a, k, f))
		a->removed += remove_for_user(&copy, f);
	return 0;
}

static long purge_open(void *map, struct flow_key *k, struct flow *f, struct purge_args *a)
{
	if (purged(a, k, f))
		a->removed += forget_open(k);
	return 0;
}

// purge removes flows with their charges; user space runs it when a pod is gone.
SEC("syscall")
int purge(struct purge_args *args)
{
	struct purge_args a = *args;
	struct state *s = node_state();

	a.now = now();
	if (!s || s->flows) // flows are counted before they enter; walking the empty table takes milliseconds
		bpf_for_each_map_elem(&caracal_flows, purge_flow, &a, 0);
	bpf_for_each_map_elem(&caracal_opens, purge_open, &a, 0);
	args->removed = a.removed;
	return 0;
}

// What sweep looks at.
struct sweep_args {
	__u32 first;   // place of caracal_slots
	__u32 places;  // how many from there on; there are no more than max_flows in all
	__u32 opens;   // 1: caracal_opens as well
	__u32 opening; // out, with opens: flows in caracal_opens that stay
	__u64 removed; // out: how many went from caracal_flows
	__u64 now;     // set by sweep
};

static long sweep_place(__u32 i, struct sweep_args *a)
{
	__u32 slot = a->first + i;
	struct flow_key *place = bpf_map_lookup_elem(&caracal_slots, &slot), k;
	struct flow *f;

	if (!place)
		return 1;
	k = *place; // not in work(): this runs with interrupts on
	f = bpf_map_lookup_elem(&caracal_flows, &k);
	if (f && expired(&k, f, a->now))
		a->removed += remove_for_user(&k, f);
	return 0;
}

static long sweep_open(void *map, struct flow_key *k, struct flow *f, struct sweep_args *a)
{
	if (!expired(k, f, a->now) || !forget_open(k))
		a->opening++;
	return 0;
}

// sweep removes expired flows, so that the table tells who is there. It looks at so much of it as it is told, takes no lock that a
// packet waits for, and what a flow was charged is given back once, whoever else removes it at that moment.
SEC("syscall")
int sweep(struct sweep_args *args)
{
	struct sweep_args a = *args;
	struct churn *c = churn();

	a.now = now();
	bpf_loop(a.places, sweep_place, &a, 0);
	if (a.opens)
		bpf_for_each_map_elem(&caracal_opens, sweep_open, &a, 0);
	if (c)
		__sync_fetch_and_add(&c->swept, a.removed);
	args->removed = a.removed;
	args->opening = a.opening;
	return 0;
}

// clock tells what the time is by now().
SEC("syscall")
int clock(struct clock_args *args)
{
	args->now = now();
	return 0;
}

// placeholder takes a TCX hook's place while an interface moves from clsact to TCX: the move waits for an RCU grace
// period with this program, and the real one then takes over in an instant.
SEC("tc")
int placeholder(struct __sk_buff *ctx)
{
	return TC_ACT_UNSPEC;
}
