// rules.h: what policy's rules allowed and denied, counted.
//
// The packets of a confirmed flow are counted by its legs alone, and at its rules when it is removed. A flow that is not
// confirmed may be displaced without anybody's noticing, so each of its packets is counted at its rules at once.
#pragma once
#include "nat.h"

// tally counts at a rule; 0 is none. Negative numbers take back. User space runs purge, which comes here, with interrupts
// on, so the additions are atomic.
__noinline int tally(__u32 rule, __s64 packets, __s64 bytes)
{
	struct count *c;

	if (!rule)
		return 0;
	c = bpf_map_lookup_elem(&caracal_rules, &rule);
	if (!c) {
		struct count none = {};

		bpf_map_update_elem(&caracal_rules, &rule, &none, BPF_NOEXIST);
		c = bpf_map_lookup_elem(&caracal_rules, &rule);
	}
	if (!c)
		return 0;
	__sync_fetch_and_add(&c->packets, packets);
	__sync_fetch_and_add(&c->bytes, bytes);
	return 0;
}

// flow_rules are both rules of a flow in one word, the opener's in its low half.
static __always_inline __u64 flow_rules(const struct flow *f)
{
	return READ_ONCE(*(const __u64 *)&f->rule_egress);
}

// tally_packet counts a packet of a flow that is not confirmed.
static __always_inline void tally_packet(struct __sk_buff *ctx, __u64 rules)
{
	tally(rules, segments(ctx), ctx->len);
	tally(rules >> 32, segments(ctx), ctx->len);
}

// tally_flow counts all that a confirmed flow has had at the given rules, or takes it back from them.
static __always_inline void tally_flow(const struct flow *f, __u64 rules, bool back)
{
	__s64 packets = f->leg[0].packets + f->leg[1].packets;
	__s64 bytes = f->leg[0].bytes + f->leg[1].bytes;

	if (!rules)
		return;
	tally(rules, back ? -packets : packets, back ? -bytes : bytes);
	tally(rules >> 32, back ? -packets : packets, back ? -bytes : bytes);
}
