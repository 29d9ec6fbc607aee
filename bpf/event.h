// event.h: what user space is told of as it happens.
#pragma once
#include "flow.h"

// tell_of puts a packet into caracal_events, with what judge() found about it: seen at an interface, so many bytes long. What the
// reader is not told is counted.
__noinline int tell_of(const struct packet *p, __u32 ifindex, __u32 length, __u8 kind, __u8 verdict)
{
	struct work *w = work();
	__u32 zero = 0;
	struct told *t = bpf_map_lookup_elem(&caracal_told, &zero);
	__u64 at = now();
	struct event *e;

	if (!p || !w || !t)
		return 0;
	if (at - t->since >= SECOND) {
		t->since = at;
		t->events = 0;
	}
	if (t->events >= event_rate) {
		t->lost++;
		return 0;
	}
	t->events++;
	e = &w->event;
	e->time = bpf_ktime_get_ns();
	__builtin_memcpy(e->source, source(p), 16);
	__builtin_memcpy(e->destination, destination(p), 16);
	e->source_port = end_port(&p->key, p->side);
	e->destination_port = end_port(&p->key, !p->side);
	e->ifindex = ifindex;
	e->rule_egress = w->judged.rule_egress;
	e->rule_ingress = w->judged.rule_ingress;
	e->length = length;
	e->epoch = p->epoch;
	e->kind = kind;
	e->hook = p->hook;
	e->verdict = verdict;
	e->log = w->judged.log;
	e->protocol = p->key.protocol;
	e->icmp_type = p->icmp_type;
	e->icmp_code = p->icmp_code;
	if (bpf_ringbuf_output(&caracal_events, e, sizeof(*e), 0))
		t->lost++;
	return 0;
}

// tell tells of the packet that a hook has.
static __always_inline int tell(struct __sk_buff *ctx, const struct packet *p, __u8 kind, __u8 verdict)
{
	return tell_of(p, ctx->ifindex, ctx->len, kind, verdict);
}
