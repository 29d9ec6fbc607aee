// route.h: where does this packet go next?
#pragma once
#include "policy.h"

// same_pod tells whether what was copied is what the pod's entry has. It has one branch: the verifier walks all ways.
static __always_inline bool same_pod(const struct found_pod *f, const struct pod *pod, __u32 epoch)
{
	const __u64 *a = (const __u64 *)&f->slot, *b = (const __u64 *)&pod->slot[epoch & 1];
	const __u32 *m = (const __u32 *)f->mac, *n = (const __u32 *)pod->mac;
	__u64 differs = 0;

#pragma unroll
	for (int i = 0; i < (int)sizeof(struct pod_slot) / 8; i++)
		differs |= a[i] ^ READ_ONCE(b[i]);
#pragma unroll
	for (int i = 0; i < 3; i++)
		differs |= m[i] ^ READ_ONCE(n[i]);
	return !differs;
}

// copy_pod copies the entry of the pod behind an interface, as an epoch has it, to work()->sender or ->receiver. 1: there is
// one. User space may replace an entry that a program looks at, and the kernel gives its place to whatever entry is written
// next, at once. So what was copied is that pod's only if its entry is still in the same place afterwards, and says the same;
// and a look-up that is on its way past the old entry just then finds neither the old one nor the new one, so it is no answer
// until it is repeated.
__noinline int copy_pod(__u32 ifindex, __u32 epoch, int receiver)
{
	struct work *w = work();
	struct found_pod *f;
	struct pod *pod;

	if (!w)
		return 0;
	f = receiver ? &w->receiver : &w->sender;
	f->ifindex = 0;
	for (int i = 0; i < 4; i++) {
		pod = bpf_map_lookup_elem(&caracal_pods, &ifindex);
		if (!pod)
			continue;
		f->slot = pod->slot[epoch & 1];
		__builtin_memcpy(f->mac, pod->mac, 12);
		barrier();
		if (bpf_map_lookup_elem(&caracal_pods, &ifindex) == pod && same_pod(f, pod, epoch)) {
			f->ifindex = ifindex;
			return 1;
		}
	}
	return 0;
}

// is_pods tells whether an interface is a pod's, and touches no work(). Two look-ups: see copy_pod().
static __always_inline bool is_pods(__u32 ifindex)
{
	return bpf_map_lookup_elem(&caracal_pods, &ifindex) || bpf_map_lookup_elem(&caracal_pods, &ifindex);
}

// find_self is the pod that sends, or NULL.
static __always_inline struct found_pod *find_self(__u32 ifindex, __u32 epoch)
{
	struct work *w;

	if (!copy_pod(ifindex, epoch, false))
		return NULL;
	w = work();
	return w ? &w->sender : NULL;
}

// find_peer is the pod that receives, or NULL.
static __always_inline struct found_pod *find_peer(__u32 ifindex, __u32 epoch)
{
	struct work *w;

	if (!copy_pod(ifindex, epoch, true))
		return NULL;
	w = work();
	return w ? &w->receiver : NULL;
}

// holds tells whether a pod has an address. Unused places are ::, which no pod has.
static __always_inline bool holds(const struct pod_slot *slot, const __u8 *address)
{
	if (!cwords(address)[0] && !cwords(address)[1])
		return false;
	for (int i = 0; i < POD_ADDRESSES; i++)
		if (same_address(slot->addresses[i], address))
			return true;
	return false;
}

static __always_inline struct route *find_route(const __u8 *address)
{
	struct prefix k = { .prefixlen = 128 };

	__builtin_memcpy(k.address, address, 16);
	return bpf_map_lookup_elem(&caracal_routes, &k);
}

// straight tells whether packets of a family take a route without the host's stack. An IPv4 packet may have an IPv6 next
// hop (RFC 8950), not the other way about.
static __always_inline bool straight(const struct route *r, bool is_v6)
{
	__u8 hop[16] ADDRESS;

	__builtin_memcpy(hop, r->next_hop, 16);
	if (!r->ifindex || (!cwords(hop)[0] && !cwords(hop)[1]))
		return false;
	return r->kind == ROUTE_TUNNEL || (r->kind == ROUTE_REMOTE && !(is_v6 && is_v4(hop)));
}

// inside tells whether a route leads into the cluster's pools.
static __always_inline bool inside(const struct route *r)
{
	return r && (r->kind == ROUTE_LOCAL_POD || r->kind == ROUTE_BLACKHOLE || r->kind == ROUTE_POOL ||
		     r->kind == ROUTE_TUNNEL || r->flags & ROUTE_IN_POOL);
}

// masquerades tells whether a pod's packet by route r leaves with the host's address.
static __always_inline bool masquerades(const struct found_pod *self, const struct route *r, bool is_v6)
{
	return self->slot.flags & (is_v6 ? POD_MASQUERADE_V6 : POD_MASQUERADE_V4) && !inside(r);
}

// to_pod_stage sets p->to from the route of a local pod. self is the sender, NULL when it is no pod of this node.
static __always_inline int to_pod_stage(struct packet *p, const struct route *r, const struct found_pod *self,
					const struct found_pod **peer)
{
	const struct pod_slot *slot;
	struct found_pod *pod;

	p->to.ifindex = r->ifindex;
	pod = find_peer(r->ifindex, p->epoch);
	if (!pod)
		return DROP_NO_POD;
	slot = &pod->slot;
	if (!holds(slot, destination(p)))
		return DROP_NO_POD;
	*peer = pod;
	p->to.mtu = slot->mtu;
	p->to.forward = ((self ? self->slot.flags : 0) | slot->flags) & POD_SHAPED ? FORWARD_SHAPED : FORWARD_TO_POD;
	__builtin_memcpy(p->to.hop, pod->mac, 12);
	return VERDICT_NEXT;
}

// to_net_stage sets p->to from the route to another host's block.
static __always_inline void to_net_stage(struct __sk_buff *ctx, struct packet *p, const struct route *r,
					 const struct found_pod *self)
{
	__u32 mtu = 0;

	if (!straight(r, p->is_v6) || masquerades(self, r, p->is_v6))
		return;
	p->to.mtu = r->mtu;
	// What is larger than the interface's would be lost on it, without a word.
	if (bpf_check_mtu(ctx, r->ifindex, &mtu, 0, 0) >= 0 && (!r->mtu || r->mtu > mtu))
		p->to.mtu = mtu > 0xffff ? 0xffff : mtu;
	p->to.ifindex = r->ifindex;
	p->to.forward = self->slot.flags & POD_SHAPED ? FORWARD_SHAPED
			: r->kind == ROUTE_TUNNEL     ? FORWARD_TO_TUNNEL
						      : FORWARD_TO_NET;
	__builtin_memcpy(p->to.hop, r->next_hop, 16);
}

// to_stack_stage sets p->to for a packet that no route leads elsewhere.
static __always_inline void to_stack_stage(struct packet *p)
{
	__builtin_memset(&p->to, 0, sizeof(p->to));
	p->to.forward = FORWARD_TO_STACK;
}

// serviced tells what of the host's stack's translating a pod's packet is for: FORWARD_DEFERRED: its destination is a Service's;
// FORWARD_UNSURE: it may be one's that caracal_service does not have; FORWARD_TO_STACK: it is not. own: it is an address of this host.
// It is a global function, so that the verifier walks it once.
__noinline int serviced(const struct packet *p, bool own)
{
	struct service_key k = {};

	if (!p || (p->key.protocol != PROTO_TCP && p->key.protocol != PROTO_UDP && p->key.protocol != PROTO_SCTP))
		return FORWARD_TO_STACK;
	__builtin_memcpy(k.address, destination(p), 16);
	k.port = end_port(&p->key, !p->side);
	k.protocol = p->key.protocol;
	if (bpf_map_lookup_elem(&caracal_service, &k))
		return FORWARD_DEFERRED;
	put_address(k.address, 0, 0);
	if (own && bpf_map_lookup_elem(&caracal_service, &k))
		return FORWARD_DEFERRED;
	k.port = 0;
	k.protocol = 0;
	return bpf_map_lookup_elem(&caracal_service, &k) ? FORWARD_UNSURE : FORWARD_TO_STACK;
}

// route_stage sets p->to from the destination of a pod's packet. *peer becomes the pod that holds it, when it is one of
// this node's.
static __always_inline int route_stage(struct __sk_buff *ctx, struct packet *p, const struct found_pod *self,
				       const struct found_pod **peer)
{
	struct route *r = find_route(destination(p));

	to_stack_stage(p);
	if (!inside(r))
		p->to.forward = serviced(p, r && r->kind == ROUTE_HOST);
	if (!r || p->to.forward == FORWARD_DEFERRED)
		return VERDICT_NEXT;
	switch (r->kind) {
	case ROUTE_LOCAL_POD:
		return to_pod_stage(p, r, self, peer);
	case ROUTE_BLACKHOLE:
	case ROUTE_POOL:
		return DROP_NO_POD;
	case ROUTE_REMOTE:
	case ROUTE_TUNNEL:
		to_net_stage(ctx, p, r, self);
		return VERDICT_NEXT;
	default:
		return VERDICT_NEXT;
	}
}
