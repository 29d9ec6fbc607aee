// flow.h: the flow table: finding, expiring, confirming and removing flows.
#pragma once
#include "rules.h"

#define SLOT_TRIES 32      // places of caracal_slots that one insert looks at
#define FRESH (5 * SECOND) // a leg seen so recently belongs to a flow that no timeout has ended

static __always_inline __u64 timeout(const struct flow_key *k, const struct flow *f)
{
	switch (f->state) {
	case FLOW_OPENING:
	case FLOW_ANSWERED:
		return timeout_opening;
	case FLOW_CLOSING:
		return timeout_closing;
	case FLOW_CLOSED:
		return timeout_closed;
	default:
		return k->protocol == PROTO_TCP    ? timeout_tcp
		       : k->protocol == PROTO_UDP  ? timeout_udp
		       : k->protocol == PROTO_SCTP ? timeout_sctp
						   : timeout_icmp;
	}
}

static __always_inline bool expired(const struct flow_key *k, const struct flow *f, __u64 at)
{
	__u64 seen = f->leg[0].last_seen > f->leg[1].last_seen ? f->leg[0].last_seen : f->leg[1].last_seen;

	return seen + timeout(k, f) < at;
}

// decrement takes one off a counter that another CPU may have reset meanwhile, for an interface's next pod.
static __always_inline void decrement(__u32 *counter)
{
	if ((__s32)__sync_fetch_and_add(counter, -1) <= 0)
		__sync_fetch_and_add(counter, 1);
}

// uncharge gives back what a removed flow took.
static __always_inline void uncharge(__u32 charged)
{
	struct state *s = node_state();
	struct quota *q;

	if (s)
		__sync_fetch_and_add(&s->flows, -1);
	q = bpf_map_lookup_elem(&caracal_quota, &charged);
	if (q)
		decrement(&q->flows);
}

static __always_inline struct flow *find_flow(const struct flow_key *k)
{
	struct flow *f = bpf_map_lookup_elem(&caracal_flows, k);

	if (!f)
		f = bpf_map_lookup_elem(&caracal_opens, k);
	return f ? f : bpf_map_lookup_elem(&caracal_flows, k); // confirmed between the two looks
}

// forget_open takes an entry out of caracal_opens, if it is there.
static __always_inline long forget_open(const struct flow_key *k)
{
	struct churn *c = churn();

	if (bpf_map_delete_elem(&caracal_opens, k))
		return 0;
	if (c)
		__sync_fetch_and_add(&c->left, 1);
	return 1;
}

// by_stack tells whether packets first seen in this way came out of the host's stack, into which they are answered.
static __always_inline bool by_stack(enum flow_entry entered)
{
	return entered == ENTERED_STACK || entered == ENTERED_HOST;
}

// take_out removes a confirmed flow but for its entries in caracal_nat; of several removers at once one gives back its charge. Who
// takes the charge out of the element has the flow to itself: it cannot go, nor its key come back with another charge, until it
// is removed here. Returns 0: somebody else did; 1: removed; 2: removed, and it was masqueraded.
static __always_inline int take_out(const struct flow_key *k, struct flow *f)
{
	__u32 charged = __sync_lock_test_and_set(&f->charged, 0);
	bool masqueraded;

	if (!charged)
		return 0;
	if (bpf_map_lookup_elem(&caracal_flows, k) != f) { // its element is another flow's by now
		WRITE_ONCE(f->charged, charged);
		return 0;
	}
	masqueraded = f->masqueraded;
	tally_flow(f, flow_rules(f), false);
	bpf_map_delete_elem(&caracal_flows, k);
	uncharge(charged);
	return masqueraded ? 2 : 1;
}

// remove_flow removes a confirmed flow, for the hooks. 1: it did.
static __noinline long remove_flow(const struct flow_key *k, struct flow *f)
{
	int out = take_out(k, f);

	if (out == 2)
		forget_nat(k);
	return out > 0;
}

// remove_for_user is remove_flow for programs that user space runs.
static __noinline long remove_for_user(const struct flow_key *k, struct flow *f)
{
	int out = take_out(k, f);

	if (out == 2)
		forget_nat_for_user(k);
	return out > 0;
}

// taker finds the flow whose key is in a place of caracal_slots: in w->taken, because another CPU may give the place away.
static __always_inline struct flow *taker(struct work *w, __u32 slot)
{
	struct flow_key *k = bpf_map_lookup_elem(&caracal_slots, &slot);

	if (!k)
		return NULL;
	w->taken = *k;
	return bpf_map_lookup_elem(&caracal_flows, &w->taken);
}

// take_slot finds a free place in caracal_slots, reclaiming expired flows on its way. Returns the place, or -1.
// Like charge it is a global function, so that the verifier walks its loop once and not once on every way to it.
__noinline long take_slot(__u64 at)
{
	struct state *s = node_state();
	struct churn *c = churn();
	struct work *w = work();

	if (!s || !c || !w)
		return -1;
	for (int i = 0; i < SLOT_TRIES; i++) {
		__u32 slot = __sync_fetch_and_add(&s->hand, 1) % s->max_flows;
		struct flow *f = taker(w, slot);

		if (!f || f->slot != slot)
			return slot;
		if (expired(&w->taken, f, at) && remove_flow(&w->taken, f)) {
			__sync_fetch_and_add(&c->reclaimed, 1);
			return slot;
		}
	}
	return -1;
}

// reclaim removes expired flows from places picked at random, where those of a pod that holds many are likely met: the
// walk of take_slot would end at the first free place.
__noinline int reclaim(__u64 at)
{
	struct state *s = node_state();
	struct churn *c = churn();
	struct work *w = work();

	if (!s || !c || !w)
		return 0;
	for (int i = 0; i < SLOT_TRIES; i++) {
		struct flow *f = taker(w, bpf_get_prandom_u32() % s->max_flows);

		if (f && expired(&w->taken, f, at) && remove_flow(&w->taken, f))
			__sync_fetch_and_add(&c->reclaimed, 1);
	}
	return 0;
}

// charge checks, before a flow is opened, that it would have room. VERDICT_NEXT: it has. Quotas do not bind what a
// process of the host sends.
__noinline int charge(__u32 pod, __u8 entered, __u64 at)
{
	struct quota *q = bpf_map_lookup_elem(&caracal_quota, &pod);
	struct state *s = node_state();

	if (!s)
		return DROP_NO_STATE;
	if (q && q->flows >= q->limit && entered != ENTERED_HOST) {
		reclaim(at);
		if (q->flows >= q->limit)
			return DROP_QUOTA;
	}
	if (s->flows >= s->max_flows && take_slot(at) < 0)
		return DROP_FLOWS_FULL;
	return VERDICT_NEXT;
}

// confirm moves a flow from caracal_opens to caracal_flows, by way of a copy: its element may become another flow's.
static __noinline int confirm(struct flow_key *k, struct flow *f, __u64 at)
{
	struct state *s = node_state();
	struct churn *c = churn();
	struct work *w = work();
	struct flow_key *place;
	struct quota *q;
	__u32 index, charged;
	long slot, err;

	if (!s || !c || !w)
		return DROP_NO_STATE;
	slot = take_slot(at);
	if (slot < 0)
		return DROP_FLOWS_FULL;
	index = slot;
	place = bpf_map_lookup_elem(&caracal_slots, &index);
	if (!place)
		return DROP_FLOWS_FULL;
	w->flow = *f;
	w->flow.slot = index;
	w->flow.state = FLOW_OPEN;
	charged = w->flow.charged;
	// Count first: a remover on another CPU must never see the flow uncounted.
	__sync_fetch_and_add(&s->flows, 1);
	q = bpf_map_lookup_elem(&caracal_quota, &charged);
	if (q && __sync_fetch_and_add(&q->flows, 1) >= q->limit && w->flow.entered != ENTERED_HOST) {
		uncharge(charged);
		return DROP_QUOTA;
	}
	*place = *k;
	err = bpf_map_update_elem(&caracal_flows, k, &w->flow, BPF_NOEXIST);
	if (err)
		uncharge(charged);
	if (err && err != -17 /* EEXIST: the other side's packet did it */)
		return DROP_FLOWS_FULL;
	if (!err) { // from here on the flow itself counts them
		tally_flow(&w->flow, flow_rules(&w->flow), true);
		__sync_fetch_and_add(&c->confirmed, 1);
	}
	if (!err && bpf_map_lookup_elem(&caracal_opens, k) != f) {
		// Displaced while it was copied, so that the copy may be of another. The next packet opens it again.
		f = bpf_map_lookup_elem(&caracal_flows, k);
		if (f)
			remove_flow(k, f);
		return VERDICT_NEXT;
	}
	f = bpf_map_lookup_elem(&caracal_flows, k);
	if (f && f->masqueraded)
		keep_nat(k);
	forget_open(k);
	return VERDICT_NEXT;
}

// advance follows the flow's state with one packet. True: both sides have now confirmed it.
static __always_inline bool advance(const struct packet *p, struct flow *f)
{
	bool reply = p->side != f->opener;

	if (p->key.protocol == PROTO_TCP) {
		if (p->tcp_flags & TCP_RST) {
			f->state = FLOW_CLOSED;
			return false;
		}
		if (p->tcp_flags & TCP_FIN) {
			f->seen[p->side & 1] |= SEEN_FIN;
			if (f->seen[0] & f->seen[1] & SEEN_FIN)
				f->state = FLOW_CLOSING;
		}
		if (f->state == FLOW_OPENING && reply) {
			if (!(p->tcp_flags & TCP_SYN))
				return true;
			f->state = FLOW_ANSWERED;
		}
		return f->state == FLOW_ANSWERED && !reply && !(p->tcp_flags & TCP_SYN);
	}
	if (p->key.protocol == PROTO_SCTP) { // RFC 9260 section 3.2: 6 ABORT, 14 SHUTDOWN COMPLETE
		if (p->sctp_chunk == 6)
			f->state = FLOW_CLOSED;
		else if (p->sctp_chunk == 14)
			f->state = FLOW_CLOSING;
	}
	return f->state == FLOW_OPENING && reply;
}

// account counts a packet on its leg. Flows count approximately: two CPUs on one leg may lose an increment.
static __always_inline void account(struct __sk_buff *ctx, struct flow_leg *leg, __u64 at)
{
	leg->packets += segments(ctx);
	leg->bytes += ctx->len;
	leg->last_seen = at;
}

// bound is what ties a leg to its key. An element of a hash table may be given to another flow while a program holds it;
// a leg that this happened to does not lead anybody's packets astray. The source is tied by ifindex_in.
static __always_inline __u64 bound(const struct flow_key *k, __u8 side)
{
	return *(const __u64 *)&k->port_a ^ (side ? cwords(k->address_a)[1] : cwords(k->address_b)[1]);
}

// stamp makes a leg current: invalid first, the epoch last, so that no other CPU uses half of it.
static __always_inline void stamp(struct flow_leg *leg, const struct packet *p, __u32 ifindex_in)
{
	WRITE_ONCE(leg->epoch, 0);
	barrier();
	leg->ifindex_in = ifindex_in;
	__builtin_memcpy(leg->to.hop, p->to.hop, 16);
	WRITE_ONCE(*(__u64 *)&leg->to, *(__u64 *)&p->to);
	leg->bound = bound(&p->key, p->side);
	barrier();
	WRITE_ONCE(leg->epoch, p->epoch);
}

// current tells whether a leg was judged in this epoch for packets that come this way.
static __always_inline bool current(const struct flow_leg *leg, const struct packet *p, __u32 ifindex_in, __u64 at)
{
	return READ_ONCE(leg->epoch) == p->epoch && READ_ONCE(leg->ifindex_in) == ifindex_in &&
	       READ_ONCE(leg->bound) == bound(&p->key, p->side) && at - leg->last_seen < FRESH;
}

// into_stack tells whether a leg's packets are left to the host's stack, to go where that leads them.
static __always_inline bool into_stack(const struct flow_leg *leg)
{
	return leg->to.forward == FORWARD_TO_STACK || leg->to.forward == FORWARD_UNSURE ||
	       leg->to.forward == FORWARD_DEFERRED;
}

// vouched tells whether a packet of the other direction was judged in this epoch, and so the flow: what decides is the same for
// both. That packet came from where this one goes; one out of the host's stack may be the host's own, which nobody judges.
static __always_inline bool vouched(const struct packet *p, const struct flow *f)
{
	const struct flow_leg *other = &f->leg[(p->side & 1) ^ 1];

	return p->to.ifindex && READ_ONCE(other->epoch) == p->epoch && READ_ONCE(other->ifindex_in) == p->to.ifindex &&
	       READ_ONCE(other->bound) == bound(&p->key, !p->side);
}
