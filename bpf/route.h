// route.h: where does this packet go next?
#pragma once
#include "policy.h"

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

// route_stage sets p->to from the destination. *peer becomes the pod that holds it, when it is one of this node's.
static __always_inline int route_stage(struct packet *p, const struct pod_slot *self, const struct pod_slot **peer)
{
	struct route_key k = { .prefixlen = 128 };
	struct route *r;
	struct pod *pod;
	const struct pod_slot *slot;

	__builtin_memcpy(k.address, destination(p), 16);
	p->to.forward = FORWARD_TO_STACK;
	p->to.ifindex = 0;
	p->to.mtu = 0;
	r = bpf_map_lookup_elem(&caracal_routes, &k);
	if (!r)
		return VERDICT_NEXT;
	switch (r->kind) {
	case ROUTE_LOCAL_POD:
		break;
	case ROUTE_BLACKHOLE:
	case ROUTE_POOL:
		return DROP_NO_POD;
	default:
		return VERDICT_NEXT;
	}
	p->to.ifindex = r->ifindex;
	pod = bpf_map_lookup_elem(&caracal_pods, &p->to.ifindex);
	if (!pod)
		return DROP_NO_POD;
	slot = &pod->slot[p->epoch & 1];
	if (!holds(slot, destination(p)))
		return DROP_NO_POD;
	*peer = slot;
	p->to.mtu = slot->mtu;
	p->to.forward = (self->flags | slot->flags) & POD_SHAPED ? FORWARD_SHAPED : FORWARD_TO_POD;
	__builtin_memcpy(p->to.mac, pod->mac, 12);
	return VERDICT_NEXT;
}
