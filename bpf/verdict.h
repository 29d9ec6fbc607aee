// verdict.h: what can become of a packet, and at which hook. Includes nothing of ours.
#pragma once

// How a packet leaves the pipeline. VERDICT_NEXT means "not decided yet"; every other value is one reason, counted
// in caracal_counts and shown by the same word in caracalctl. The numbers are append-only: they are part of
// the pinned maps' contract. X(name, "what happened, as a sentence").
#define VERDICTS(X)                                                                                                    \
	X(VERDICT_NEXT, "not decided")                                                                                 \
	X(FORWARD_POD, "handed to a local pod's interface")                                                            \
	X(FORWARD_FROM_STACK, "came out of the host's stack and went to the pod, or to the net")                       \
	X(FORWARD_JUDGED, "came out of the host's stack after it was judged and went to the pod, or to the net")       \
	X(STACK_ROUTED, "left to the host's stack, which routes to its destination")                                   \
	X(STACK_REPLY, "left to the host's stack, through which its flow was opened")                                  \
	X(STACK_SHAPED, "left to the host's stack because one end's bandwidth is shaped")                              \
	X(STACK_TTL, "left to the host's stack because its TTL or hop limit ends here")                                \
	X(STACK_MTU, "left to the host's stack because it is larger than the path's MTU")                              \
	X(STACK_OPTIONS, "left to the host's stack because it carries IPv4 options or IPv6 hop-by-hop options")        \
	X(STACK_PROTOCOL, "left to the host's stack because its protocol has no ports that Caracal knows")             \
	X(STACK_ARP, "ARP or neighbour discovery between the host's stack and the pod")                                \
	X(ANSWER_ARP, "ARP request for the gateway, answered")                                                         \
	X(ANSWER_ND, "neighbour solicitation for the gateway, answered")                                               \
	X(CONTROL, "the pod's own duplicate address detection, MLD, IGMP or router solicitation, consumed")            \
	X(DROP_INTERFACE, "came from an interface that caracal_pods does not know")                                    \
	X(DROP_SPOOF, "its source address does not belong to the pod")                                                 \
	X(DROP_ETHERTYPE, "neither IPv4, IPv6 nor ARP")                                                                \
	X(DROP_VLAN, "carries a VLAN tag")                                                                             \
	X(DROP_MALFORMED_IP, "truncated or with wrong version or lengths in its IP header")                            \
	X(DROP_MALFORMED_L4, "truncated or with wrong lengths in its TCP, UDP, SCTP or ICMP header")                   \
	X(DROP_MALFORMED_ARP, "malformed ARP packet or neighbour discovery message")                                   \
	X(DROP_EXTENSION, "with more IPv6 extension headers than are followed, or with them in a wrong order")         \
	X(DROP_FRAGMENT, "fragment whose first fragment was not seen")                                                 \
	X(DROP_TINY_FRAGMENT, "fragment that could overlay its transport header (RFC 1858)")                           \
	X(DROP_FRAME, "unicast IP packet in a frame that is not addressed to the gateway")                             \
	X(DROP_MULTICAST, "multicast or broadcast, which is not forwarded")                                            \
	X(DROP_MARTIAN, "to an address that is never forwarded: unspecified, loopback or link-local")                  \
	X(DROP_FOREIGN_ARP, "ARP or neighbour advertisement for an address that is not the pod's")                     \
	X(DROP_ROUTER_ADVERTISEMENT, "router advertisement from a pod")                                                \
	X(DROP_REDIRECT, "ICMP redirect from a pod")                                                                   \
	X(DROP_DHCP_SERVER, "DHCP server message from a pod")                                                          \
	X(DROP_NO_POD, "to an address of this node's blocks that no pod holds")                                        \
	X(DROP_ICMP_ERROR, "ICMP error about a flow that does not exist")                                              \
	X(DROP_POLICY_EGRESS, "not allowed by the opener's egress policy")                                             \
	X(DROP_POLICY_INGRESS, "not allowed by the responder's ingress policy")                                        \
	X(DROP_QUOTA, "new flow refused: the pod holds as many flows as it may")                                       \
	X(DROP_FLOWS_FULL, "new flow refused: the flow table is full of live flows")                                   \
	X(DROP_NO_STATE, "caracal_state is missing or of another version")                                             \
	X(DROP_REWRITE, "could not be rewritten or encapsulated (out of memory)")                                      \
	X(FORWARD_NET, "sent out of an uplink to the next host")                                                       \
	X(STACK_OTHER, "neither from nor to a pod of this node, as far as Caracal can tell: left alone")               \
	X(DROP_SPOOF_NET, "came from the net with a source address of this node's pods or blocks")                     \
	X(FORWARD_MASQUERADED, "left for the outside with this host's address")                                        \
	X(STACK_ANSWER, "answer to a masqueraded flow: given its pod's address back and left to the host's stack")     \
	X(DROP_NAT_PROTOCOL, "can't be masqueraded: neither TCP, UDP nor an ICMP query")                               \
	X(DROP_NAT_ADDRESS, "can't be masqueraded: the uplink has no address of that family")                          \
	X(FORWARD_TUNNEL, "sent to the host that has its destination's block, encapsulated")                           \
	X(DROP_TUNNEL, "came encapsulated, but not from the host that has its source, or can't be parsed")             \
	X(DROP_NAT_PORTS, "can't be masqueraded: every port towards its destination is in use")                        \
	X(DROP_POLICY_UNKNOWN, "one end's policy id has no rows in caracal_policy, so nothing is allowed")             \
	X(STACK_SERVICE,                                                                                               \
	  "left to the host's stack, which translates its destination, a Service's: judged when it comes out")

enum verdict {
#define X(name, sentence) name,
	VERDICTS(X)
#undef X
	    VERDICT_COUNT,
};

// Where a packet was seen. Append-only.
#define HOOKS(X)                                                                                                       \
	X(HOOK_FROM_POD, "TC ingress of a pod's host interface: what the pod sends")                                   \
	X(HOOK_TO_POD, "TC egress of a pod's host interface: what the host's stack sends to the pod")                  \
	X(HOOK_FROM_NET, "TC ingress of an uplink: what comes from other hosts")                                       \
	X(HOOK_TO_NET, "TC egress of an uplink: what leaves for other hosts")                                          \
	X(HOOK_TO_HOST, "look-up of a socket of this host, for what a pod sends; only drops are counted")

enum hook {
#define X(name, sentence) name,
	HOOKS(X)
#undef X
	    HOOK_COUNT,
};

#define VERDICT_SPACE 64 // verdicts a hook has room for in caracal_counts
_Static_assert(VERDICT_COUNT <= VERDICT_SPACE, "caracal_counts has no room for another verdict");
