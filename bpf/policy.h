// policy.h: may this flow be? The place of policy in the pipeline.
#pragma once
#include "flow.h"

// judge decides one orientation: the opener's egress policy, then the responder's ingress policy. Either end is
// NULL when it is no pod of this node. A policy id of 0 means that no policy applies; an id without rows denies, and no
// rows are compiled yet.
static __always_inline int judge(const struct pod_slot *opener, const struct pod_slot *responder)
{
	if (opener && opener->policy_egress)
		return DROP_POLICY_EGRESS;
	if (responder && responder->policy_ingress)
		return DROP_POLICY_INGRESS;
	return VERDICT_NEXT;
}
