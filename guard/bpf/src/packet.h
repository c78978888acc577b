// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//
// What stands in a packet.
#ifndef PACKET_H
#define PACKET_H

#include "net.h"

/* What a packet is about, seen from here. */
struct packet {
	struct destination peer;
	__u16 port; /* our own, in the machine's order */
	__u16 payload; /* where what it carries begins */
	__u8 protocol;
	bool opens; /* a connection, or it is a datagram */
};

/* False: it has no ports to judge by. */
static __always_inline bool read_ports(struct __sk_buff *skb, __u32 at, bool out, struct packet *k)
{
	__u16 ports[2];
	__u8 flags[2] = {};

	if (k->protocol != IPPROTO_TCP && k->protocol != IPPROTO_UDP)
		return true;
	if (bpf_skb_load_bytes(skb, at, ports, sizeof(ports)))
		return false;
	k->peer.port = out ? ports[1] : ports[0];
	k->port = bpf_ntohs(out ? ports[0] : ports[1]);
	if (k->protocol == IPPROTO_TCP) {
		if (bpf_skb_load_bytes(skb, at + 12, flags, 2))
			return false;
		k->opens = (flags[1] & 0x12) == 0x02; /* SYN without ACK */
		k->payload = at + (flags[0] >> 4) * 4;
	} else {
		k->payload = at + 8;
	}
	return true;
}

static __always_inline bool read_four(struct __sk_buff *skb, bool out, struct packet *k)
{
	__u8 head[20];

	if (bpf_skb_load_bytes(skb, 0, head, sizeof(head)))
		return false;
	k->protocol = head[9];
	set_four(&k->peer, head + (out ? 16 : 12));
	/* A later fragment has no ports, and is nothing without the first. */
	if (head[6] & 0x1f || head[7])
		return false;
	return read_ports(skb, (head[0] & 15) * 4, out, k);
}

static __always_inline bool read_six(struct __sk_buff *skb, bool out, struct packet *k)
{
	__u8 head[40], next[2];
	__u32 at = 40;

	if (bpf_skb_load_bytes(skb, 0, head, sizeof(head)))
		return false;
	k->protocol = head[6];
	set_six(&k->peer, head + (out ? 24 : 8));
	for (int i = 0; i < 4; i++) {
		if (k->protocol != 0 && k->protocol != 43 && k->protocol != 44 && k->protocol != 60)
			break;
		if (bpf_skb_load_bytes(skb, at, next, sizeof(next)))
			return false;
		at += k->protocol == 44 ? 8 : ((__u32)next[1] + 1) * 8;
		k->protocol = next[0];
	}
	return read_ports(skb, at, out, k);
}

/* False: there is nothing to judge in this packet. */
static __always_inline bool read_packet(struct __sk_buff *skb, bool out, struct packet *k)
{
	__builtin_memset(k, 0, sizeof(*k));
	k->peer.prefix = 160;
	k->opens = true;
	if (skb->protocol == bpf_htons(0x0800))
		return read_four(skb, out, k);
	return skb->protocol == bpf_htons(0x86dd) && read_six(skb, out, k);
}

#endif
