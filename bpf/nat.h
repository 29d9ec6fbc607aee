// nat.h: the entries of masqueraded flows in caracal_nat and caracal_natopen.
#pragma once
#include "state.h"

// swapped writes key k with one end replaced by n: a pod's tuple becomes that of the host, and back. It returns the side on
// which the new end lies.
static __always_inline bool swapped(struct flow_key *out, const struct flow_key *k, const struct nat *n)
{
	__u8 near[16] ADDRESS, far[16] ADDRESS;

	__builtin_memcpy(near, n->address, 16);
	__builtin_memcpy(far, end_address(k, !n->side), 16);
	*(__u32 *)&out->protocol = *(const __u32 *)&k->protocol; // and of ICMP what it is
	return sorted(out, cwords(near)[0], cwords(near)[1], cwords(far)[0], cwords(far)[1], n->port,
		      is_icmp(k->protocol) ? n->port : end_port(k, !n->side));
}

static __always_inline struct nat *find_nat(const struct flow_key *k)
{
	struct nat *n = bpf_map_lookup_elem(&caracal_nat, k);

	if (!n)
		n = bpf_map_lookup_elem(&caracal_natopen, k);
	return n ? n : bpf_map_lookup_elem(&caracal_nat, k); // moved between the two looks
}

// forget_nat removes both entries of a masqueraded flow that is confirmed, found by either. It and keep_nat are global
// functions, so that the verifier walks them once; Linux 6.1 takes no argument of such a one for a key.
__noinline int forget_nat(const struct flow_key *of)
{
	struct work *w = work();
	struct nat *n;

	if (!of || !w)
		return 0;
	w->gone = *of;
	n = bpf_map_lookup_elem(&caracal_nat, &w->gone);
	if (!n)
		return 0;
	swapped(&w->gone_answer, &w->gone, n);
	bpf_map_delete_elem(&caracal_nat, &w->gone_answer);
	bpf_map_delete_elem(&caracal_nat, &w->gone);
	return 0;
}

// forget_nat_for_user is forget_nat for programs that user space runs. A packet may come in between on the same CPU, so it has no
// use for work(), and these have the stack.
static __always_inline void forget_nat_for_user(const struct flow_key *k)
{
	struct nat *n = bpf_map_lookup_elem(&caracal_nat, k);
	struct flow_key other = {};

	if (!n)
		return;
	swapped(&other, k, n);
	bpf_map_delete_elem(&caracal_nat, &other);
	bpf_map_delete_elem(&caracal_nat, k);
}

// keep_nat moves the entries of a flow that was confirmed to where nothing displaces them, unless it is gone already.
__noinline int keep_nat(const struct flow_key *of)
{
	struct flow_key k, other = {};
	struct nat *n, *back;

	if (!of)
		return 0;
	k = *of;
	n = bpf_map_lookup_elem(&caracal_natopen, &k);
	if (!n)
		return 0;
	swapped(&other, &k, n);
	back = bpf_map_lookup_elem(&caracal_natopen, &other);
	if (!back)
		return 0;
	if (bpf_map_update_elem(&caracal_nat, &other, back, BPF_ANY))
		return 0;
	if (bpf_map_update_elem(&caracal_nat, &k, n, BPF_ANY)) {
		bpf_map_delete_elem(&caracal_nat, &other);
		return 0;
	}
	bpf_map_delete_elem(&caracal_natopen, &k);
	bpf_map_delete_elem(&caracal_natopen, &other);
	if (!bpf_map_lookup_elem(&caracal_flows, &k)) // whoever removed it had nothing to forget yet
		forget_nat(&k);
	return 0;
}
