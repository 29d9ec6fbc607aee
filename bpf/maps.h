// maps.h: every kernel map with its key and value. This is the schema; Go types and docs/maps.md are generated from it.
#pragma once
#include <linux/types.h>
#include <stdbool.h>
#include <stddef.h>
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "verdict.h"

#define SCHEMA_VERSION 1

// An address is 16 bytes in wire order, IPv4 as v4-mapped IPv6 (::ffff:a.b.c.d, RFC 4291 section 2.5.5.2).
#define ADDRESS __attribute__((aligned(8)))
#define PACKED __attribute__((packed))

// A range of addresses, the key of LPM tries.
struct prefix {
	__u32 prefixlen; // of the v4-mapped address: 96 + n for an IPv4 /n
	__u8 address[16];
};

#define POD_ADDRESSES 4
#define POD_SHAPED 1        // leaves and arrives through its qdiscs, so through the host's stack
#define POD_MASQUERADE_V4 2 // what it sends out of all pools gets the host's address, by family
#define POD_MASQUERADE_V6 4

// One version of a pod.
struct pod_slot {
	__u8 addresses[POD_ADDRESSES][16] ADDRESS; // allowed as source; unused ones are ::
	__u32 policy_egress;                       // policy id for what the pod opens; 0: none applies
	__u32 policy_ingress;                      // policy id for what is opened to the pod; 0: none applies
	__u32 network;                             // FNV-1a hash of the network's name
	__u16 mtu;                                 // of both ends of the veth, bytes of IP packet
	__u16 flags;                               // POD_*
};

struct pod {
	struct pod_slot slot[2]; // the epoch's lowest bit says which is in force
	__u8 mac[6];             // the pod's end; from_pod writes it when the pod changes it
	__u8 host_mac[6];        // the host's end: the pod's gateway
	__u32 pad;
};

// caracal_pods: host veth ifindex -> the pod behind it.
// Writer: plugin and agent (commit); from_pod (mac only). Reader: all hooks, caracalctl pods.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, struct pod);
} caracal_pods SEC(".maps");

enum PACKED route_kind {
	ROUTE_NONE = 0,
	ROUTE_LOCAL_POD, // ifindex is the pod's host veth
	ROUTE_HOST,      // an address of this host: the host's stack
	ROUTE_REMOTE,    // a block of another host, by next_hop
	ROUTE_TUNNEL,    // a block of another host, encapsulated: next_hop is that host
	ROUTE_POOL,      // inside a pool, in no known block
	ROUTE_STACK,     // whatever the host's stack decides
	ROUTE_BLACKHOLE, // inside one of this node's blocks, held by no pod
};

#define ROUTE_IN_POOL 1 // a remote prefix inside the cluster's pools: what goes there is never masqueraded
#define ROUTE_NODE 2    // another host's own address: it may speak for itself in the tunnel

struct route {
	enum route_kind kind;
	__u8 flags;        // ROUTE_*
	__u16 mtu;         // bytes of IP packet; 0, or more than it: the interface's when a flow is judged
	__u32 ifindex;     // out of which; 0: none
	__u8 next_hop[16]; // :: where there is none
};

// caracal_routes: prefix -> how it is reached. No match means ROUTE_STACK.
// Writer: plugin and agent (commit). Reader: all hooks, caracalctl routes.
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct prefix);
	__type(value, struct route);
} caracal_routes SEC(".maps");

// Which rule peers an address satisfies, as a number that the compiled policy has for it.
struct peer {
	__u32 identity[2]; // the epoch's lowest bit says which is in force; 0: anyone else
};

// caracal_peers: prefix -> its identity. No match means 0.
// Writer: plugin and agent (commit). Reader: all hooks.
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 524288);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct prefix);
	__type(value, struct peer);
} caracal_peers SEC(".maps");

#define POLICY_KEY_BITS 96               // of a look-up: all that follows prefixlen
#define IDENTITY_SOURCE_PORTS 0xffffffff // in place of the identity: port is the source's, policy a table of such

// A flow as one of its ends sees it, who is at the other and what it wants there.
struct policy_key {
	__u32 prefixlen; // 64: any protocol, 80: any port, 80 + n: n bits of the port
	__be32 policy;   // policy id of this end
	__be32 identity; // of the other; 0: anyone else
	__u8 protocol;   // IANA number
	__u8 pad;
	__be16 port; // the responder's; ICMP: type << 8 | code of the opening packet
};

enum PACKED policy_action {
	POLICY_NONE = 0,
	POLICY_ALLOW,
	POLICY_DENY,
};

#define POLICY_LOG 1          // a rule that logs was met on the way
#define POLICY_SOURCE_PORTS 2 // the source port decides: rule is the table where

struct policy_row {
	enum policy_action action;
	__u8 flags; // POLICY_*
	__u16 pad;
	__u32 rule; // that decides; 0: none
};

// caracal_policy: policy id, identity, protocol, port -> what becomes of such a flow. An identity without a row has those of
// identity 0; each that has rows has one for any protocol. A policy id without rows denies.
// Writer: plugin and agent (commit). Reader: all hooks.
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 1048576);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct policy_key);
	__type(value, struct policy_row);
} caracal_policy SEC(".maps");

// The two directions of a flow in one key: (address_a, port_a) is the smaller, compared as native 64-bit words.
struct flow_key {
	__u8 address_a[16] ADDRESS;
	__u8 address_b[16] ADDRESS;
	__be16 port_a; // ICMP: the echo identifier, in both ports
	__be16 port_b;
	__u8 protocol;  // IANA number
	__u8 icmp_type; // of the message, or of the query that it answers
	__u8 icmp_code;
	__u8 pad;
};

enum PACKED forward {
	FORWARD_UNSET = 0,
	FORWARD_TO_POD,    // redirect_peer to ifindex
	FORWARD_TO_STACK,  // the host's stack, not judged for what comes after it
	FORWARD_SHAPED,    // the host's stack, judged for both ends
	FORWARD_REPLY,     // the host's stack, through which the flow was opened
	FORWARD_DELIVER,   // to_pod, to_net: on to where the stack sends it
	FORWARD_TO_NET,    // redirect_neigh out of ifindex
	FORWARD_TO_TUNNEL, // redirect to ifindex, a VXLAN interface
	FORWARD_DEFERRED,  // the host's stack, which translates its destination: judged when it comes out
	FORWARD_UNSURE, // the host's stack, which may translate it: judged for what it is, and again when it comes out
};

// Where a packet goes next. The first eight bytes are read and written as one word.
struct next_hop {
	__u32 ifindex;
	__u16 mtu;
	enum forward forward;
	__u8 pad;
	__u8 hop
	    [16] ADDRESS; // FORWARD_TO_POD: new destination and source MAC; FORWARD_TO_NET, FORWARD_TO_TUNNEL: the next host's address
};

// In place of ifindex_in: out of the host's stack with another source address, sent by the pod whose interface the other bits are.
#define LEG_SENDER 0x80000000

// One direction of a flow. It lies on a cache line of its own, because each direction has its CPU.
struct flow_leg {
	__u32 epoch;      // in which it was judged, or the other one was; 0: never. Written last.
	__u32 ifindex_in; // by which its packets come; 0: out of the host's stack; or LEG_SENDER
	struct next_hop to;
	__u64 packets;   // wire segments; approximate
	__u64 bytes;     // of frames; approximate
	__u64 last_seen; // ns, by the programs' own clock
	__u64 bound;     // what of its key `to` was made for, see bound()
};

enum PACKED flow_entry {
	ENTERED_NONE = 0,
	ENTERED_POD,   // first seen by from_pod
	ENTERED_STACK, // first seen coming out of the host's stack, into which it answers
	ENTERED_HOST,  // the same, sent by a process of this host: never judged
	ENTERED_NET,   // first seen by from_net
	ENTERED_SERVICE, // first seen by from_pod, to an address in caracal_service: behind the translation it is another flow
};

enum PACKED flow_state {
	FLOW_NEW = 0,
	FLOW_OPENING,  // only the opener was heard
	FLOW_ANSWERED, // TCP: SYN and SYN-ACK
	FLOW_OPEN,     // confirmed by both sides
	FLOW_CLOSING,  // TCP: FIN from both; SCTP: shutdown complete
	FLOW_CLOSED,   // TCP: RST; SCTP: ABORT
};

#define SEEN_FIN 1

struct flow {
	__u64 opened;       // ns, by the programs' own clock
	__u32 rule_egress;  // rule that allowed it at the opener; 0: no policy applied
	__u32 rule_ingress; // rule that allowed it at the responder; 0: no policy applied
	__u32 charged;      // ifindex of the pod whose quota it counts against; 0: its removal has begun
	__u32 slot;         // its place in caracal_slots
	enum flow_entry entered;
	enum flow_state state;
	__u8 opener;      // 0: side a opened it, 1: side b
	__u8 seen[2];     // SEEN_* of side a and b
	__u8 masqueraded; // 1: caracal_nat has entries of it
	__u8 icmp_type;   // of the packet that opened it, for who judges it again
	__u8 icmp_code;
	__u8 pad[8];
	struct flow_leg leg[2]; // packets from side a, packets from side b
};

// caracal_flows: confirmed flows. Its elements are 256 bytes with the legs on cache lines of their own.
// Never displaced by new ones: a full table refuses new flows, and inserting reclaims expired ones.
// Writer: all hooks. Reader: all hooks, caracalctl flows.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 131072);
	__type(key, struct flow_key);
	__type(value, struct flow);
} caracal_flows SEC(".maps");

// caracal_opens: flows that only one side has confirmed. A flood of them displaces only its own kind.
// Writer: all hooks. Reader: all hooks, caracalctl flows.
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct flow_key);
	__type(value, struct flow);
} caracal_opens SEC(".maps");

struct churn {
	__u64 opened;    // entries made in caracal_opens
	__u64 left;      // entries taken out of it: confirmed, over or expired; what else is gone was displaced
	__u64 confirmed; // flows that entered caracal_flows
	__u64 reclaimed; // expired flows removed from it when another needed room
	__u64 swept;     // expired flows removed from it by the agent
};

// caracal_churn: one entry, of each CPU: how many flows came and went since the map was made.
// Writer: all hooks, sweep and purge. Reader: caracald (metrics).
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct churn);
} caracal_churn SEC(".maps");

// caracal_slots: a ring with one place for each flow the table may hold. Inserting walks it and reclaims the
// expired flows it meets, so expiry needs no agent. A place is free when no flow of that key claims it.
// Writer: all hooks. Reader: all hooks.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 131072);
	__type(key, __u32);
	__type(value, struct flow_key);
} caracal_slots SEC(".maps");

// What one end of a tuple is outside, or inside.
struct nat {
	__u8 address[16] ADDRESS;
	__be16 port; // ICMP: the echo identifier
	__u8 side;   // which end of the key it stands for: 0: a, 1: b
	__u8 pad[5];
};

// caracal_nat: the two tuples of a masqueraded flow, each to what stands in its place. That of the pod leads to the host's
// address and port, that of the host to the pod's. It holds confirmed flows only, so that it has room for each.
// Writer: all hooks. Reader: from_net, to_net, caracalctl flows.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct flow_key);
	__type(value, struct nat);
} caracal_nat SEC(".maps");

// caracal_natopen: the same of flows in caracal_opens. A flood of them displaces only its own kind.
// Writer: all hooks. Reader: from_net, to_net, caracalctl flows.
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 32768);
	__type(key, struct flow_key);
	__type(value, struct nat);
} caracal_natopen SEC(".maps");

enum PACKED event_kind {
	EVENT_NONE = 0,
	EVENT_DROP, // a packet was dropped, by its verdict
	EVENT_LOG,  // a flow was opened, and a rule that logs was met
};

// What a program tells of one packet.
struct event {
	__u64 time; // ns, CLOCK_MONOTONIC
	__u8 source[16] ADDRESS;
	__u8 destination[16] ADDRESS;
	__be16 source_port;
	__be16 destination_port;
	__u32 ifindex;      // of the interface
	__u32 rule_egress;  // that decided at the opener; 0: no policy applied, or something else ended it
	__u32 rule_ingress; // that decided at the responder; likewise
	__u32 length;       // bytes of frame
	__u32 epoch;        // in which it was judged
	enum event_kind kind;
	__u8 hook;     // enum hook
	__u8 verdict;  // enum verdict
	__u8 log;      // 1: a rule that logs was met
	__u8 protocol; // IANA number; 0: not known
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 pad;
};

struct count {
	__u64 packets; // wire segments; exact
	__u64 bytes;   // of frames; exact
};

// caracal_rules: rule id -> what it allowed, of flows that are gone, and what it denied, per CPU. What a flow in caracal_flows
// has counted until now is missing here. Readers take the sum over CPUs as a signed number.
// Writer: all hooks, commit (removes rules that are gone). Reader: user space.
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct count);
} caracal_rules SEC(".maps");

// caracal_events: packets that were dropped or logged, struct event each. One process reads it at a time.
// Writer: all hooks. Reader: user space.
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1048576);
} caracal_events SEC(".maps");

struct told {
	__u64 since;  // ns, by the programs' own clock: when this second began
	__u64 events; // told since then
	__u64 lost;   // not told, ever: too many in a second, or nobody read
};

// caracal_told: one entry, of each CPU.
// Writer: all hooks. Reader: user space.(lost).
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct told);
} caracal_told SEC(".maps");

// What judge() found about a flow.
struct judgement {
	__u32 rule_egress; // as in struct flow
	__u32 rule_ingress;
	__u32 log; // 1: a rule that logs was met
	__u32 pad;
};

// A pod as a packet's epoch has it, copied from caracal_pods.
struct found_pod {
	struct pod_slot slot;
	__u8 mac[6];
	__u8 host_mac[6];
	__u32 ifindex; // 0: none was found
};

// What is too much for the stack. No program of a hook runs inside another on a CPU.
struct work {
	struct found_pod sender, receiver; // see copy_pod()
	struct nat host, pod;              // the entries of a masqueraded flow
	struct flow_key inner, answer,
	    held; // its tuples, of the pod and outside; the inner one of who has the port it wants
	struct flow_key gone, gone_answer; // likewise, of a flow that is removed
	struct flow_key taken;             // what held a place of caracal_slots
	struct flow flow;                  // the flow that is opened, or confirmed
	struct event event;
	struct judgement judged; // of this packet's flow, once judge() was asked
	struct judgement first;  // of a packet that may open it from either side: as if its sender had
	struct prefix peer;      // whose identity is asked for
	struct policy_key row;
};

// caracal_work: one entry.
// Writer and reader: all hooks.
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct work);
} caracal_work SEC(".maps");

struct uplink {
	__u8 address_v4[16] ADDRESS; // that masqueraded packets leave with; ::: none
	__u8 address_v6[16] ADDRESS;
	__u32 vni; // of the VXLAN interface (RFC 7348); 0: it is none
	__u32 pad;
};

// caracal_uplinks: uplink's ifindex -> its addresses. The VXLAN interface is one of them.
// Writer: agent, or plugin where there is none. Reader: to_net, from_pod (vni), caracalctl doctor.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 256);
	__type(key, __u32);
	__type(value, struct uplink);
} caracal_uplinks SEC(".maps");

// A port of an address that the host's stack translates to that of somebody else.
struct service_key {
	__u8 address[16] ADDRESS; // ::: each of this host's own
	__be16 port;
	__u8 protocol; // IANA number
	__u8 pad[5];
};

struct service {
	__u8 name[64]; // namespace/name of the Service, zero-terminated, cut off if longer
};

// caracal_service: address, port and protocol of a Service -> its name. What pods send there is judged behind the translation. An
// entry of address, port and protocol 0 says that there are Services which are not here.
// Writer: agent. Reader: from_pod, caracalctl services.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 131072);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct service_key);
	__type(value, struct service);
} caracal_service SEC(".maps");

struct fragment_key {
	__u8 source[16] ADDRESS;
	__u8 destination[16] ADDRESS;
	__u32 id;      // as in the header
	__u32 ifindex; // at which it was seen: what another pod sends in this pod's name is not found
	__u8 protocol; // IPv6: 0, only the first fragment knows it
	__u8 pad[7];
};

struct fragment {
	__be16 source_port;
	__be16 destination_port;
	__u8 protocol;
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 pad;
};

// caracal_frags: the ports in the first fragment of a packet, for the other fragments.
// Writer and reader: all hooks.
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct fragment_key);
	__type(value, struct fragment);
} caracal_frags SEC(".maps");

struct quota {
	__u32 flows; // confirmed flows that count against the pod now
	__u32 limit; // how many may
};

// caracal_quota: host veth ifindex -> the pod's share of caracal_flows.
// Writer: plugin (limit), all hooks (flows). Reader: all hooks, caracalctl pods.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, struct quota);
} caracal_quota SEC(".maps");

#define COUNTS (HOOK_COUNT * VERDICT_SPACE)

// caracal_counts: hook * 64 + verdict -> how many packets left the pipeline so. Every packet is counted once at each hook.
// Writer: all hooks. Reader: caracalctl counters.
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTS);
	__type(key, __u32);
	__type(value, struct count);
} caracal_counts SEC(".maps");

struct state {
	__u32 epoch;     // raised by every change; its lowest bit selects the slot in force. Never 0.
	__u32 version;   // SCHEMA_VERSION
	__u32 max_flows; // places in caracal_slots
	__u32 flows;     // confirmed flows now
	__u32 hand;      // next place of caracal_slots to look at
	__u16 nat_first; // ports of masqueraded flows, both included; nat_last 0: nothing is masqueraded
	__u16 nat_last;
	__u8 node[24]; // the node's name, zero-terminated
	__u32 staged;  // 1: a change of policy has begun, and the slots of pods and peers may differ
	__u32 tunnel;  // ifindex of the VXLAN interface, 0: none
	__u8 build[8]; // which build of the programs is loaded
};

// caracal_state: one entry, also mapped into user space.
// Writer: plugin and agent (epoch, by an atomic add), commit (staged), agent (nat_*, tunnel), all hooks (flows, hand). Reader: all.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct state);
} caracal_state SEC(".maps");
