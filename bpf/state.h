// state.h: the node's one state entry, the clock and the settings that are fixed when the programs are loaded.
#pragma once
#include "parse.h"

#define SECOND 1000000000ULL

// Mark of packets that from_pod or from_net judged for both ends and left to the host's stack, or sent out of an uplink;
// to_pod and to_net let them pass. A packet loses its mark when it enters or leaves a pod, so no pod can set it.
volatile const __u32 mark_judged = 0x00100000;

// Mark of packets that from_pod left to the host's stack unjudged, because it translates their destination, or may do so. They are judged
// as what comes out of it, and by the interface that they came in by it is known whose they are. Who sent one opened its flow. No pod can
// set it either.
volatile const __u32 mark_deferred = 0x00200000;

// How long a tick of the kernel's is, in ns; the loader sets it.
volatile const __u64 tick = 4000000;

// How many events a CPU tells in a second, so that a flood of drops costs little.
volatile const __u64 event_rate = 256;

// How long a flow may be silent, in ns, before its place is taken by a new one.
volatile const __u64 timeout_opening = 30 * SECOND;
volatile const __u64 timeout_tcp = 3600 * SECOND;
volatile const __u64 timeout_udp = 120 * SECOND;
volatile const __u64 timeout_icmp = 30 * SECOND;
volatile const __u64 timeout_sctp = 3600 * SECOND;
volatile const __u64 timeout_closing = 30 * SECOND;
volatile const __u64 timeout_closed = 10 * SECOND;

static __always_inline struct state *node_state(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&caracal_state, &zero);
}

// segments is how many packets a GSO packet is on the wire.
static __always_inline __u32 segments(struct __sk_buff *ctx)
{
	__u32 n = ctx->gso_segs;

	return n ? n : 1;
}

static __always_inline struct work *work(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&caracal_work, &zero);
}

// churn is this CPU's entry of caracal_churn. User space runs programs that come here with interrupts on, so additions to it are
// atomic.
static __always_inline struct churn *churn(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&caracal_churn, &zero);
}

// now is the time in ns since some moment before the boot, as fine as a tick. It is read without a call, unlike the
// kernel's clocks: that is noticeable in the time a packet takes.
static __always_inline __u64 now(void)
{
	return bpf_jiffies64() * tick;
}
