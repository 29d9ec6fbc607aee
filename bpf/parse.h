// parse.h: from bytes to struct packet. All bounds checks of the pipeline are here.
#pragma once
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/in.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_endian.h>
#include "maps.h"

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define barrier() asm volatile("" ::: "memory")
#define READ_ONCE(x) (*(volatile typeof(x) *)&(x))
#define WRITE_ONCE(x, v) (*(volatile typeof(x) *)&(x) = (v))

#define AF_INET 2 // address families as the kernel numbers them
#define AF_INET6 10

#define PROTO_ICMP 1
#define PROTO_IGMP 2
#define PROTO_TCP 6
#define PROTO_UDP 17
#define PROTO_ICMPV6 58
#define PROTO_SCTP 132
#define PROTO_HOP_BY_HOP 0
#define PROTO_ROUTING 43
#define PROTO_FRAGMENT 44
#define PROTO_DESTINATION 60

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

#define SCTP_INIT 1 // chunk type, RFC 9260 section 3.2

#define EXTENSIONS 6          // IPv6 extension headers that are followed
#define V4_WORD 0xffff0000ULL // second 32-bit word of a v4-mapped address, in the low half of its second 64-bit word

// What parsing found out that the common packet does not have.
#define PKT_OPTIONS 1 // IPv4 options or IPv6 hop-by-hop options
#define PKT_FIRST_FRAGMENT 2
#define PKT_LATER_FRAGMENT 4
#define PKT_ICMP_ERROR 8 // an ICMP error that quotes a packet
#define PKT_ND 16        // IPv6 neighbour discovery or MLD
#define PKT_NO_PORTS 32  // a protocol whose ports are not known
#define PKT_ICMP_REDIRECT 64

// What to_pod and to_net are told of a packet that comes out of the host's stack.
enum mark {
	MARK_NONE = 0,
	MARK_JUDGED,   // both ends were judged
	MARK_DEFERRED, // nobody was; the stack may have given it another source as well
};

// A parsed packet. Fields before `to` are set by parse() and stay; later ones say who sets them.
struct packet {
	struct flow_key key; // sorted; ports 0 until the fragment stage for later fragments
	__u32 l3_len;        // bytes of IP packet
	__u32 fragment_id;
	__u16 l4_offset; // from the start of the frame
	__u8 side;       // 0: the source is address_a, 1: it is address_b
	__u8 is_v6;
	__u8 ttl;
	__u8 flags; // PKT_*
	__u8 tcp_flags;
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 sctp_chunk;
	__u8 hook;          // enum hook, set by the entry
	__u8 mark;          // enum mark, set by forward
	__u32 epoch;        // read once, before any map lookup
	struct next_hop to; // set by the leg or by the route stage
};

static __always_inline __u64 *words(__u8 *address)
{
	return (__u64 *)address;
}
static __always_inline const __u64 *cwords(const __u8 *address)
{
	return (const __u64 *)address;
}

// end_address and end_port are what a key has on a side, 0 for a.
static __always_inline const __u8 *end_address(const struct flow_key *k, bool side)
{
	return side ? k->address_b : k->address_a;
}

static __always_inline __be16 end_port(const struct flow_key *k, bool side)
{
	return side ? k->port_b : k->port_a;
}

static __always_inline const __u8 *source(const struct packet *p)
{
	return end_address(&p->key, p->side);
}

static __always_inline const __u8 *destination(const struct packet *p)
{
	return end_address(&p->key, !p->side);
}

static __always_inline bool same_address(const __u8 *x, const __u8 *y)
{
	return cwords(x)[1] == cwords(y)[1] && cwords(x)[0] == cwords(y)[0];
}

static __always_inline bool is_v4(const __u8 *a)
{
	return !cwords(a)[0] && (__u32)cwords(a)[1] == (__u32)V4_WORD;
}

static __always_inline void put_address(__u8 *to, __u64 hi, __u64 lo)
{
	words(to)[0] = hi;
	words(to)[1] = lo;
}

// sorted writes the addresses and ports of a key in their order. It returns the source's side. Ports are in wire order.
static __always_inline bool sorted(struct flow_key *k, __u64 src_hi, __u64 src_lo, __u64 dst_hi, __u64 dst_lo,
				   __be16 sport, __be16 dport)
{
	bool swap = src_lo > dst_lo || (src_lo == dst_lo && (src_hi > dst_hi || (src_hi == dst_hi && sport > dport)));

	if (swap) {
		put_address(k->address_a, dst_hi, dst_lo);
		put_address(k->address_b, src_hi, src_lo);
		k->port_a = dport;
		k->port_b = sport;
	} else {
		put_address(k->address_a, src_hi, src_lo);
		put_address(k->address_b, dst_hi, dst_lo);
		k->port_a = sport;
		k->port_b = dport;
	}
	return swap;
}

static __always_inline __u64 v4_low(__be32 address)
{
	return V4_WORD | (__u64)address << 32;
}

// is_query tells the ICMP messages that carry an identifier: echo, timestamp, information and mask, and their replies.
static __always_inline bool is_query(bool is_v6, __u8 type)
{
	return is_v6 ? type == 128 || type == 129 : type == 0 || type == 8 || (type >= 13 && type <= 18);
}

// queried is the type of the query that an ICMP message answers, or its own type.
static __always_inline __u8 queried(bool is_v6, __u8 type)
{
	if (is_v6)
		return type == 129 ? 128 : type;
	return type == 0 ? 8 : type == 14 || type == 16 || type == 18 ? type - 1 : type;
}

// icmp sets what an ICMP message is. The identifier takes the place of both ports, so that a request and its reply
// are one flow.
static __always_inline void icmp(struct packet *p, __u8 type, __u8 code, __be16 id, __be16 *sport, __be16 *dport)
{
	p->icmp_type = type;
	p->icmp_code = code;
	p->key.icmp_type = queried(p->is_v6, type);
	p->key.icmp_code = code;
	if (p->is_v6) {
		if (type < 128)
			p->flags |= PKT_ICMP_ERROR;
		else if ((type >= 130 && type <= 137) || type == 143)
			p->flags |= PKT_ND;
	} else if (type == 3 || type == 4 || type == 11 || type == 12) {
		p->flags |= PKT_ICMP_ERROR;
	} else if (type == 5) {
		p->flags |= PKT_ICMP_REDIRECT;
	}
	*sport = *dport = is_query(p->is_v6, type) ? id : 0;
}

static __always_inline bool is_icmp(__u8 protocol)
{
	return protocol == PROTO_ICMP || protocol == PROTO_ICMPV6;
}

static __always_inline bool has_ports(__u8 protocol)
{
	return protocol == PROTO_TCP || protocol == PROTO_UDP || protocol == PROTO_SCTP || is_icmp(protocol);
}

// transport reads what the flow needs from the first bytes of the transport header, wherever it lies.
static __noinline int transport(struct __sk_buff *ctx, struct packet *p, __be16 *sport, __be16 *dport)
{
	__u8 h[20] = {};
	__u32 left, need = 8;

	left = ETH_HLEN + p->l3_len - p->l4_offset;
	if (!has_ports(p->key.protocol)) {
		p->flags |= PKT_NO_PORTS;
		return VERDICT_NEXT;
	}
	if (p->key.protocol == PROTO_TCP)
		need = 20;
	else if (p->key.protocol == PROTO_SCTP)
		need = 16;
	if (p->flags & PKT_FIRST_FRAGMENT && left < need)
		return DROP_TINY_FRAGMENT;
	if (left < need || ETH_HLEN + p->l3_len < p->l4_offset)
		return DROP_MALFORMED_L4;
	if (need == 20   ? bpf_skb_load_bytes(ctx, p->l4_offset, h, 20)
	    : need == 16 ? bpf_skb_load_bytes(ctx, p->l4_offset, h, 16)
			 : bpf_skb_load_bytes(ctx, p->l4_offset, h, 8))
		return DROP_MALFORMED_L4;
	*sport = *(__be16 *)&h[0];
	*dport = *(__be16 *)&h[2];
	switch (p->key.protocol) {
	case PROTO_TCP:
		if ((h[12] >> 4) < 5 || (__u32)(h[12] >> 4) * 4 > left)
			return DROP_MALFORMED_L4;
		p->tcp_flags = h[13];
		break;
	case PROTO_UDP: {
		__u16 len = bpf_ntohs(*(__be16 *)&h[4]);

		// A first fragment holds less than the length says; 0 is an IPv6 jumbogram (RFC 2675).
		if ((len || !p->is_v6) && (len < 8 || (len > left && !(p->flags & PKT_FIRST_FRAGMENT))))
			return DROP_MALFORMED_L4;
		break;
	}
	case PROTO_SCTP:
		p->sctp_chunk = h[12];
		break;
	default:
		icmp(p, h[0], h[1], *(__be16 *)&h[4], sport, dport);
	}
	return VERDICT_NEXT;
}

// extensions follows IPv6 extension headers (RFC 8200 section 4) from p->l4_offset on and sets the protocol.
static __noinline int extensions(struct __sk_buff *ctx, struct packet *p, __u8 next)
{
	bool fragment = false;
	__u32 end;

	end = ETH_HLEN + p->l3_len;
	for (int i = 0; i < EXTENSIONS; i++) {
		__u8 h[8];

		if (next != PROTO_HOP_BY_HOP && next != PROTO_ROUTING && next != PROTO_FRAGMENT &&
		    next != PROTO_DESTINATION) {
			p->key.protocol = next;
			return VERDICT_NEXT;
		}
		if (next == PROTO_HOP_BY_HOP && i)
			return DROP_EXTENSION;
		if (p->l4_offset + 8 > end || bpf_skb_load_bytes(ctx, p->l4_offset, h, 8))
			return DROP_MALFORMED_IP;
		if (next == PROTO_FRAGMENT) {
			__u16 offset = bpf_ntohs(*(__be16 *)&h[2]);

			if (fragment)
				return DROP_EXTENSION;
			fragment = true;
			p->fragment_id = *(__u32 *)&h[4];
			p->l4_offset += 8;
			p->key.protocol = h[0];
			if (offset >> 3) {
				if (offset >> 3 == 1)
					return DROP_TINY_FRAGMENT;
				p->flags |= PKT_LATER_FRAGMENT; // what follows is payload
				return VERDICT_NEXT;
			}
			if (offset & 1)
				p->flags |= PKT_FIRST_FRAGMENT;
			next = h[0];
			continue;
		}
		if (next == PROTO_HOP_BY_HOP)
			p->flags |= PKT_OPTIONS;
		p->l4_offset += 8 + (__u16)h[1] * 8;
		if (p->l4_offset > end)
			return DROP_MALFORMED_IP;
		next = h[0];
	}
	return DROP_EXTENSION;
}

// fragment_ports gives every fragment of a packet the ports of the first.
static __noinline int fragment_ports(struct __sk_buff *ctx, struct packet *p, const __u64 *address, __be16 *ports)
{
	struct fragment_key k = {};
	struct fragment *f, value = {};

	put_address(k.source, address[0], address[1]);
	put_address(k.destination, address[2], address[3]);
	k.id = p->fragment_id;
	k.ifindex = ctx->ifindex;
	k.protocol = p->is_v6 ? 0 : p->key.protocol;
	if (p->flags & PKT_LATER_FRAGMENT) {
		f = bpf_map_lookup_elem(&caracal_frags, &k);
		if (!f)
			return DROP_FRAGMENT;
		ports[0] = f->source_port;
		ports[1] = f->destination_port;
		p->key.protocol = f->protocol;
		p->icmp_type = f->icmp_type;
		p->icmp_code = f->icmp_code;
		if (is_icmp(f->protocol)) {
			p->key.icmp_type = queried(p->is_v6, f->icmp_type);
			p->key.icmp_code = f->icmp_code;
		}
		if (!has_ports(f->protocol))
			p->flags |= PKT_NO_PORTS;
		return VERDICT_NEXT;
	}
	value.source_port = ports[0];
	value.destination_port = ports[1];
	value.protocol = p->key.protocol;
	value.icmp_type = p->icmp_type;
	value.icmp_code = p->icmp_code;
	bpf_map_update_elem(&caracal_frags, &k, &value, BPF_ANY);
	return VERDICT_NEXT;
}

// Source and destination, and the ports of a packet while it is parsed.
struct ends {
	__u64 address[4];
};
struct ports {
	__be16 port[2];
};

// uncommon parses what the straight path of parse() does not: IPv4 options, IPv6 extension headers, fragments and
// every transport protocol but whole TCP and UDP.
// It is a global function, so that the verifier walks it once and not once on every way to it; those take no NULL.
__noinline int uncommon(struct __sk_buff *ctx, struct packet *p, const struct ends *ends, struct ports *ports)
{
	const __u64 *address;
	int v;

	if (!p || !ends || !ports)
		return DROP_NO_STATE;
	address = ends->address;
	if (p->is_v6 && (v = extensions(ctx, p, p->key.protocol)))
		return v;
	if (!(p->flags & PKT_LATER_FRAGMENT) && (v = transport(ctx, p, &ports->port[0], &ports->port[1])))
		return v;
	if (p->flags & (PKT_FIRST_FRAGMENT | PKT_LATER_FRAGMENT))
		return fragment_ports(ctx, p, address, ports->port);
	return VERDICT_NEXT;
}

// whole makes sure that the headers lie in the linear part of the packet. It asks for no byte more: pulling payload
// copies it, and TCP keeps all payload outside the linear part.
static __always_inline void whole(struct __sk_buff *ctx)
{
	__u32 linear = ctx->data_end - ctx->data;
	__u32 need =
	    ETH_HLEN + 8 + (ctx->protocol == bpf_htons(ETH_P_IPV6) ? sizeof(struct ipv6hdr) : sizeof(struct iphdr));

	if (unlikely(linear < need && ctx->len > linear))
		bpf_skb_pull_data(ctx, ctx->len < need ? ctx->len : need);
}

// parse fills p from an Ethernet frame. VERDICT_NEXT: an IP packet with a tuple. STACK_ARP: an ARP packet.
static __always_inline int parse(struct __sk_buff *ctx, struct packet *p)
{
	struct ends ends;
	struct ports both = {};
	__u64 *address = ends.address;
	__be16 *ports = both.port;
	bool straight;
	void *data, *end;
	int v;

	whole(ctx);
	data = (void *)(long)ctx->data;
	end = (void *)(long)ctx->data_end;
	if (unlikely(ctx->vlan_present))
		return DROP_VLAN;
	if (data + ETH_HLEN > end)
		return DROP_ETHERTYPE;

	__be16 type = ((struct ethhdr *)data)->h_proto;

	if (likely(type == bpf_htons(ETH_P_IP))) {
		struct iphdr *ip = data + ETH_HLEN;

		if ((void *)(ip + 1) > end || ip->version != 4 || ip->ihl < 5)
			return DROP_MALFORMED_IP;
		p->l3_len = bpf_ntohs(ip->tot_len);
		if (unlikely(!p->l3_len) && ctx->gso_size)
			p->l3_len = ctx->len - ETH_HLEN; // larger than the field can say (BIG TCP)
		if (p->l3_len > ctx->len - ETH_HLEN || p->l3_len < ip->ihl * 4)
			return DROP_MALFORMED_IP;
		address[0] = address[2] = 0;
		address[1] = v4_low(ip->saddr);
		address[3] = v4_low(ip->daddr);
		p->ttl = ip->ttl;
		p->key.protocol = ip->protocol;
		p->l4_offset = ETH_HLEN + ip->ihl * 4;
		straight = true;
		if (unlikely(ip->ihl > 5)) {
			p->flags |= PKT_OPTIONS;
			straight = false;
		}
		if (unlikely(ip->frag_off & bpf_htons(0x3fff))) {
			__u16 offset = bpf_ntohs(ip->frag_off) & 0x1fff;

			if (offset == 1)
				return DROP_TINY_FRAGMENT;
			p->fragment_id = ip->id;
			p->flags |= offset ? PKT_LATER_FRAGMENT : PKT_FIRST_FRAGMENT;
			straight = false;
		}
	} else if (type == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = data + ETH_HLEN;

		if ((void *)(ip + 1) > end || ip->version != 6)
			return DROP_MALFORMED_IP;
		p->is_v6 = 1;
		p->l3_len = sizeof(*ip) + bpf_ntohs(ip->payload_len);
		if (unlikely(!ip->payload_len) && ctx->gso_size)
			p->l3_len = ctx->len - ETH_HLEN;
		if (p->l3_len > ctx->len - ETH_HLEN)
			return DROP_MALFORMED_IP;
		__builtin_memcpy(&address[0], &ip->saddr, 16);
		__builtin_memcpy(&address[2], &ip->daddr, 16);
		// In an IPv6 header a v4-mapped address would pass for the IPv4 one (RFC 4942 section 2.2).
		if (unlikely(!address[0]) && (__u32)address[1] == (__u32)V4_WORD)
			return DROP_SPOOF;
		if (unlikely(!address[2]) && (__u32)address[3] == (__u32)V4_WORD)
			return DROP_MARTIAN;
		p->ttl = ip->hop_limit;
		p->key.protocol = ip->nexthdr;
		p->l4_offset = ETH_HLEN + sizeof(*ip);
		straight = true;
	} else {
		return type == bpf_htons(ETH_P_ARP)                                        ? STACK_ARP
		       : type == bpf_htons(ETH_P_8021Q) || type == bpf_htons(ETH_P_8021AD) ? DROP_VLAN
											   : DROP_ETHERTYPE;
	}

	// The constant offsets let the verifier see the bounds.
	void *l4 = data + ETH_HLEN + (p->is_v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr));
	__u32 left = p->l3_len - (p->is_v6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr));

	if (straight && p->key.protocol == PROTO_TCP && l4 + 20 <= end && left >= 20) {
		__u8 *tcp = l4;
		__u8 header = (tcp[12] >> 4) * 4;

		if (header < 20 || header > left)
			return DROP_MALFORMED_L4;
		ports[0] = *(__be16 *)tcp;
		ports[1] = *(__be16 *)(tcp + 2);
		p->tcp_flags = tcp[13];
	} else if (straight && p->key.protocol == PROTO_UDP && l4 + 8 <= end && left >= 8) {
		__u16 len = bpf_ntohs(*(__be16 *)(l4 + 4));

		if (unlikely(len < 8 || len > left) && (len || !p->is_v6))
			return DROP_MALFORMED_L4;
		ports[0] = *(__be16 *)l4;
		ports[1] = *(__be16 *)(l4 + 2);
	} else if ((v = uncommon(ctx, p, &ends, &both))) {
		return v;
	}
	p->side = sorted(&p->key, address[0], address[1], address[2], address[3], ports[0], ports[1]);
	return VERDICT_NEXT;
}
