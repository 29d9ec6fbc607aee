// track.h: a packet meets its flow: judged when it must be, then the flow opened, refreshed or confirmed.
#pragma once
#include "route.h"

// Where a packet came from, for the flow.
struct origin {
	__u32 ifindex;                // as in flow_leg.ifindex_in
	enum flow_entry entered;      // of a new flow
	__u32 charged;                // whose quota a new flow counts against
	const struct found_pod *self; // the sender, NULL when it is no pod of this node
	const struct found_pod *peer; // the receiver, likewise
};

// Before Linux 6.8 the verifier loses track of a constant that is put on the stack at a multiple of eight bytes and read by way of a
// pointer: it takes two paths that differ in nothing else for one, and removes what only the other one does.
_Static_assert(offsetof(struct origin, entered) % 8, "");

// reopens tells whether a packet starts a new connection in the place of flow f: a SYN, or an INIT of SCTP, when f is
// over, or the other side had opened it, or it came the other way (a pod may take one port to a Service and to the pod
// behind it in turn).
static __always_inline bool reopens(const struct packet *p, const struct flow *f, const struct origin *o)
{
	bool starts = p->key.protocol == PROTO_TCP ? (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN
						   : p->key.protocol == PROTO_SCTP && p->sctp_chunk == SCTP_INIT;

	if (!starts)
		return false;
	return f->state == FLOW_CLOSED || f->state == FLOW_CLOSING || p->side != f->opener ||
	       (by_stack(o->entered) ? !by_stack(f->entered) : o->entered != f->entered);
}

// oriented judges flow k, of which the packet opens one or, as a reply, belongs to one. A pod always reaches itself, and a
// process of the host every pod.
static __always_inline int oriented(const struct packet *p, const struct origin *o, const struct flow_key *k,
				    bool reply, __u32 opened)
{
	const struct found_pod *opener = reply ? o->peer : o->self;
	const struct found_pod *responder = reply ? o->self : o->peer;
	__u32 egress = 0, ingress = 0;

	if (o->entered != ENTERED_HOST && (!opener || !responder || opener->ifindex != responder->ifindex)) {
		if (opener)
			egress = opener->slot.policy_egress;
		if (responder)
			ingress = responder->slot.policy_ingress;
	}
	return judge(p, k, egress, ingress, opened);
}

// opens judges a packet as one that opens a flow.
static __always_inline int opens(const struct packet *p, const struct origin *o)
{
	if (o->entered == ENTERED_SERVICE) // no policy id
		return judge(p, &p->key, 0, 0, 0);
	return oriented(p, o, &p->key, false, opening(p->side, p->icmp_type, p->icmp_code));
}

// again judges a packet that is no opening, of a flow that policy allowed before. The flow then has the rules that allow it
// now, and all that it has counted moves to them.
static __noinline int again(const struct packet *p, const struct origin *o, struct flow *f, bool confirmed)
{
	struct work *w = work();
	__u64 rules, old;
	int v = oriented(p, o, &p->key, p->side != f->opener, opening(f->opener, f->icmp_type, f->icmp_code));

	if (v || !w)
		return v;
	rules = *(__u64 *)&w->judged.rule_egress;
	if (flow_rules(f) == rules)
		return VERDICT_NEXT;
	old = __sync_lock_test_and_set((__u64 *)&f->rule_egress, rules);
	if (confirmed && old != rules) {
		tally_flow(f, old, false);
		tally_flow(f, rules, true);
	}
	return VERDICT_NEXT;
}

// through makes the packets of a flow that was opened through the host's stack, or to what it translates, go into it, so that the
// stack sees both directions and can undo its translation. by_opener: the flow's opener sent the packet.
static __always_inline void through(struct packet *p, const struct flow *f, bool by_opener)
{
	bool service = f->entered == ENTERED_SERVICE;

	if (p->to.forward == FORWARD_DEFERRED)
		return;
	if (p->to.forward == FORWARD_UNSURE && !by_opener)
		p->to.forward = FORWARD_TO_STACK;
	if (p->hook == HOOK_FROM_POD ? service || by_stack(f->entered)
				     : p->hook == HOOK_FROM_NET && by_stack(f->entered)) {
		p->to.forward = service && by_opener ? FORWARD_DEFERRED : FORWARD_REPLY;
		p->to.ifindex = 0;
	}
}

// deferred tells whether a packet is not to be judged as one of flow f: its opener's is judged when the stack has translated it, its
// answer was before. What comes out of the stack as it went in, nobody having translated it, is judged as what it is.
static __always_inline bool deferred(const struct packet *p, const struct flow *f, bool by_opener)
{
	return p->to.forward == FORWARD_DEFERRED ||
	       (p->hook != HOOK_FROM_POD && f->entered == ENTERED_SERVICE && !by_opener);
}

// find_sender finds the pod that opened a flow which the stack gave another source, for who judges an answer.
static __always_inline void find_sender(const struct packet *p, struct origin *o, const struct flow *f)
{
	__u32 in = f->leg[f->opener & 1].ifindex_in;

	if (!o->peer && in & LEG_SENDER)
		o->peer = find_peer(in & ~LEG_SENDER, p->epoch);
}

// judge_socket judges what a process of this host answers to a flow that a pod opened to a Service, by the socket, which tells what
// the host's stack made of the Service's address. A socket without an address of its own does not, but to_host judges each packet
// that it is looked up for.
static __noinline int judge_socket(struct __sk_buff *ctx, const struct packet *p, const struct origin *o)
{
	struct bpf_sock *sk = ctx->sk;
	struct work *w = work();
	__u64 hi = 0, lo;
	bool side;

	if (!sk || !w || !o->peer)
		return VERDICT_NEXT;
	sk = bpf_sk_fullsock(sk);
	if (!sk)
		return VERDICT_NEXT;
	if (p->is_v6) {
		hi = (__u64)sk->src_ip6[1] << 32 | sk->src_ip6[0];
		lo = (__u64)sk->src_ip6[3] << 32 | sk->src_ip6[2];
		if (!hi && !lo)
			return VERDICT_NEXT;
	} else {
		lo = v4_low(sk->src_ip4);
		if (!sk->src_ip4)
			return VERDICT_NEXT;
	}
	*(__u32 *)&w->answer.protocol = *(const __u32 *)&p->key.protocol;
	side = sorted(&w->answer, cwords(destination(p))[0], cwords(destination(p))[1], hi, lo,
		      end_port(&p->key, !p->side), bpf_htons(sk->src_port));
	return judge(p, &w->answer, o->peer->slot.policy_egress, 0, opening(side, 0, 0));
}

// insert_flow writes a new flow that side `opener` opened, as judge() found it allowed.
static __noinline void insert_flow(struct __sk_buff *ctx, struct packet *p, const struct origin *o, __u64 at,
				   __u8 opener)
{
	struct churn *c = churn();
	struct work *w = work();
	struct flow *f, *n;
	long err;

	if (!c || !w)
		return;
	n = &w->flow;
	__builtin_memset(n, 0, sizeof(*n));
	n->opener = opener;
	n->opened = at;
	n->charged = o->charged;
	n->entered = o->entered;
	n->state = FLOW_OPENING;
	n->rule_egress = w->judged.rule_egress;
	n->rule_ingress = w->judged.rule_ingress;
	if (opener == p->side) {
		n->icmp_type = p->icmp_type;
		n->icmp_code = p->icmp_code;
	}
	stamp(&n->leg[p->side & 1], p, o->ifindex);
	account(ctx, &n->leg[p->side & 1], at);
	tally_packet(ctx, flow_rules(n));
	if (w->judged.log)
		tell(ctx, p, EVENT_LOG, VERDICT_NEXT);
	err = bpf_map_update_elem(&caracal_opens, &p->key, n, BPF_NOEXIST);
	if (!err)
		__sync_fetch_and_add(&c->opened, 1);
	if (err != -17 /* EEXIST: another CPU opened it meanwhile */)
		return; // without room for the entry the next packet opens it again
	f = bpf_map_lookup_elem(&caracal_opens, &p->key);
	if (f) {
		through(p, f, p->side == f->opener);
		stamp(&f->leg[p->side & 1], p, o->ifindex);
		account(ctx, &f->leg[p->side & 1], at);
	}
}

// open_flow judges a packet without a flow, unless it was `judged` and allowed, and opens one.
static __noinline int open_flow(struct __sk_buff *ctx, struct packet *p, struct origin *o, __u64 at, bool judged)
{
	struct work *w = work();
	__u8 opener = p->side & 1;
	int v = judged ? VERDICT_NEXT : opens(p, o);

	if (v && w && p->key.protocol == PROTO_TCP && !(p->tcp_flags & TCP_SYN) && !(ctx->mark & mark_deferred)) {
		w->first = w->judged;
		// In the middle of a connection it may come from either side, unless from_pod knew that its opener sent it.
		opener ^= 1;
		if (oriented(p, o, &p->key, true, opening(opener, 0, 0)))
			w->judged = w->first;
		else
			v = VERDICT_NEXT;
		if (p->to.forward == FORWARD_UNSURE)
			p->to.forward = FORWARD_TO_STACK;
	}
	if (v)
		return v;
	v = charge(o->charged, o->entered, at);
	if (v) // what a process of the host sends arrives also when its flow finds no room
		return o->entered == ENTERED_HOST ? VERDICT_NEXT : v;
	insert_flow(ctx, p, o, at, opener);
	return VERDICT_NEXT;
}

// track finds the packet's flow, judges the packet unless its leg is current, and keeps the flow up to date.
static __noinline int track(struct __sk_buff *ctx, struct packet *p, struct origin *o)
{
	struct flow *f = bpf_map_lookup_elem(&caracal_flows, &p->key);
	bool confirmed = true, judged = false, over, by_opener;
	struct flow_leg *leg;
	__u64 at = now();
	int v;

	if (!f) {
		f = bpf_map_lookup_elem(&caracal_opens, &p->key);
		confirmed = false;
	}
	if (!f) { // confirmed by another CPU between the two looks: it enters the one before it leaves the other
		f = bpf_map_lookup_elem(&caracal_flows, &p->key);
		confirmed = f != NULL;
	}
	over = f && expired(&p->key, f, at);
	if (f && (over || reopens(p, f, o))) {
		// Judged before a living flow goes: a denied SYN must not end the connection whose ports it took.
		if (!over && (v = opens(p, o)))
			return v;
		judged = !over;
		if (confirmed)
			remove_flow(&p->key, f);
		else
			forget_open(&p->key);
		f = NULL;
	}
	if (!f)
		return open_flow(ctx, p, o, at, judged);

	by_opener = p->side == f->opener;
	if (by_opener && f->entered == ENTERED_POD &&
	    (o->entered == ENTERED_SERVICE || (o->entered == ENTERED_STACK && ctx->mark & mark_deferred))) {
		// A datagram to a Service, of ports that were used without one: its answers have to go back through the stack.
		f->entered = o->entered;
		WRITE_ONCE(f->leg[!(p->side & 1)].epoch, 0);
	}
	through(p, f, by_opener);
	leg = &f->leg[p->side & 1];
	if (!current(leg, p, o->ifindex, at)) {
		if (!by_opener)
			find_sender(p, o, f);
		if (o->entered != ENTERED_HOST && f->entered != ENTERED_HOST && !deferred(p, f, by_opener) &&
		    !vouched(p, f) && (v = again(p, o, f, confirmed)))
			return v;
		if (o->entered == ENTERED_HOST && f->entered == ENTERED_SERVICE && (v = judge_socket(ctx, p, o)))
			return v;
		stamp(leg, p, o->ifindex);
	}
	account(ctx, leg, at);
	if (!confirmed)
		tally_packet(ctx, flow_rules(f));
	if (advance(p, f) && !confirmed)
		return confirm(&p->key, f, at);
	return VERDICT_NEXT;
}

// What an ICMP error quotes: the tuple of the packet that it is about, its source on side `side`, and where it lies.
struct quoted {
	struct flow_key key;
	__u32 ip_at, l4_at; // from the start of the frame
	__u8 side;
};

// quote reads it: true. It is a global function, so that the verifier walks it once; those return int and take no NULL.
__noinline int quote(struct __sk_buff *ctx, const struct packet *p, struct quoted *q)
{
	__u64 address[4] = {};
	__be16 ports[2] = {};
	__u8 l4[8] = {};
	__u32 at;

	if (!p || !q)
		return false;
	at = p->l4_offset + 8;
	q->ip_at = at;
	if (p->is_v6) {
		struct ipv6hdr ip;

		if (bpf_skb_load_bytes(ctx, at, &ip, sizeof(ip)))
			return false;
		q->key.protocol = ip.nexthdr;
		__builtin_memcpy(&address[0], &ip.saddr, 16);
		__builtin_memcpy(&address[2], &ip.daddr, 16);
		at += sizeof(ip);
		if (q->key.protocol == PROTO_FRAGMENT) { // of the first fragment, or of one alone
			if (bpf_skb_load_bytes(ctx, at, l4, sizeof(l4)) || *(__be16 *)&l4[2] & bpf_htons(0xfff8))
				return false;
			q->key.protocol = l4[0];
			at += 8;
		}
	} else {
		struct iphdr ip;

		if (bpf_skb_load_bytes(ctx, at, &ip, sizeof(ip)) || ip.ihl < 5 || ip.frag_off & bpf_htons(0x1fff))
			return false;
		q->key.protocol = ip.protocol;
		address[1] = v4_low(ip.saddr);
		address[3] = v4_low(ip.daddr);
		at += ip.ihl * 4;
	}
	q->l4_at = at;
	if (bpf_skb_load_bytes(ctx, at, l4, sizeof(l4)))
		return false;
	if (is_icmp(q->key.protocol)) {
		q->key.icmp_type = queried(p->is_v6, l4[0]);
		q->key.icmp_code = l4[1];
		if (is_query(p->is_v6, l4[0]))
			ports[0] = ports[1] = *(__be16 *)&l4[4];
	} else if (has_ports(q->key.protocol)) {
		ports[0] = *(__be16 *)&l4[0];
		ports[1] = *(__be16 *)&l4[2];
	}
	q->side = sorted(&q->key, address[0], address[1], address[2], address[3], ports[0], ports[1]);
	return true;
}

// related passes an ICMP error that is about a flow which policy still allows, found in the packet it quotes. It must go
// to who sent that packet (RFC 1122 section 3.2.2, RFC 4443 section 2.4), and what a pod sends must come from who received
// it: no pod speaks about the flows of others.
static __noinline int related(struct __sk_buff *ctx, struct packet *p, struct origin *o)
{
	struct quoted q = {};
	bool by_opener;
	struct flow *f;

	if (!quote(ctx, p, &q) || !same_address(end_address(&q.key, q.side), destination(p)))
		return DROP_ICMP_ERROR;
	if (p->hook == HOOK_FROM_POD && !same_address(end_address(&q.key, !q.side), source(p)))
		return DROP_ICMP_ERROR;
	f = find_flow(&q.key);
	if (!f)
		return DROP_ICMP_ERROR;
	by_opener = q.side != f->opener;
	through(p, f, by_opener);
	// What the quoted packet went through may have to translate the error as well.
	if (p->hook == HOOK_FROM_NET && into_stack(&f->leg[q.side & 1]))
		to_stack_stage(p);
	if (f->entered == ENTERED_HOST || o->entered == ENTERED_HOST || deferred(p, f, by_opener))
		return VERDICT_NEXT;
	if (!by_opener)
		find_sender(p, o, f);
	// It answers the packet it quotes.
	return oriented(p, o, &q.key, q.side == f->opener, opening(f->opener, f->icmp_type, f->icmp_code));
}
