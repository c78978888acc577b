// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//
// Sends what the processes of one cgroup dial to the proxy's listener, tells the
// proxy and them where they wanted to go, and drops whatever else they send.
#include <linux/bpf.h>
#include <linux/in.h>
#include <stdbool.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

#define AF_INET 2
#define AF_INET6 10
#define SOL_IP 0
#define SO_ORIGINAL_DST 80
#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd

char LICENSE[] SEC("license") = "GPL";

/* Set before loading; network byte order, ports too. */
volatile const __u32 listener_address;
volatile const __u16 listener_port;
volatile const __u32 source_address;

struct place {
	__u32 address; /* network byte order */
	__u16 port;    /* network byte order */
	__u16 zero;
};

/* Where the owner of a socket wanted to go. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct place);
} wanted SEC(".maps");

/* The same by the socket's own end, until the proxy's end is established and takes
   it: who has the same address and port later finds nothing. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct place);
	__type(value, struct place);
} peers SEC(".maps");

/* Where the peer of a socket of the listener wanted to go. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct place);
} taken_for SEC(".maps");

/* What tried to leave around the proxy. Agrees with type attempt. */
struct attempt {
	__u32 address; /* network byte order, 0 of IPv6 */
	__u16 port;    /* network byte order, 0 of what has none */
	__u8 protocol;
	__u8 version; /* of IP */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 256);
	__type(key, struct attempt);
	__type(value, __u64);
} around SEC(".maps");

static __always_inline bool is_local(__u32 address)
{
	return (address & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
}

static __always_inline void note(__u32 address, __u16 port, __u8 protocol, __u8 version)
{
	struct attempt a = {.address = address, .port = port, .protocol = protocol, .version = version};
	__u64 one = 1, *n = bpf_map_lookup_elem(&around, &a);

	if (n)
		__sync_fetch_and_add(n, 1);
	else
		bpf_map_update_elem(&around, &a, &one, BPF_ANY);
}

/* keep notes where a connection is going, if it may go to the proxy. */
static __always_inline bool keep(struct bpf_sock_addr *ctx, __u32 address)
{
	struct place to = {.address = address, .port = ctx->user_port};
	struct place *p;

	if (!ctx->sk)
		return false;
	p = bpf_sk_storage_get(&wanted, ctx->sk, &to, BPF_SK_STORAGE_GET_F_CREATE);
	if (!p)
		return false;
	*p = to;
	return true;
}

/* left forgets where a socket that is not diverted has wanted to go before. */
static __always_inline int left(struct bpf_sock_addr *ctx, int verdict)
{
	if (ctx->sk)
		bpf_sk_storage_delete(&wanted, ctx->sk);
	return verdict;
}

SEC("cgroup/connect4")
int divert4(struct bpf_sock_addr *ctx)
{
	struct sockaddr_in from = {.sin_family = AF_INET};
	__u32 to = ctx->user_ip4;

	if (is_local(to))
		return left(ctx, 1);
	if (ctx->protocol != IPPROTO_TCP) {
		note(to, ctx->user_port, ctx->protocol, 4);
		return left(ctx, 0);
	}
	from.sin_addr.s_addr = source_address;
	/* Who has chosen where to call from cannot be told apart from others. */
	if (!keep(ctx, to) || bpf_bind(ctx, (struct sockaddr *)&from, sizeof(from))) {
		note(to, ctx->user_port, IPPROTO_TCP, 4);
		return left(ctx, 0);
	}
	ctx->user_ip4 = listener_address;
	ctx->user_port = listener_port;
	return 1;
}

struct address6 {
	__u16 family;
	__u16 port;
	__u32 flow;
	__u32 address[4];
	__u32 scope;
};

SEC("cgroup/connect6")
int divert6(struct bpf_sock_addr *ctx)
{
	struct address6 from = {.family = AF_INET6};
	__u32 a = ctx->user_ip6[0], b = ctx->user_ip6[1], c = ctx->user_ip6[2], to = ctx->user_ip6[3];

	if (!a && !b && !c && to == bpf_htonl(1))
		return left(ctx, 1);
	if (a || b || c != bpf_htonl(0xffff)) {
		note(0, ctx->user_port, ctx->protocol, 6);
		return left(ctx, 0);
	}
	if (is_local(to))
		return left(ctx, 1);
	if (ctx->protocol != IPPROTO_TCP) {
		note(to, ctx->user_port, ctx->protocol, 4);
		return left(ctx, 0);
	}
	from.address[2] = bpf_htonl(0xffff);
	from.address[3] = source_address;
	if (!keep(ctx, to) || bpf_bind(ctx, (struct sockaddr *)&from, sizeof(from))) {
		note(to, ctx->user_port, IPPROTO_TCP, 4);
		return left(ctx, 0);
	}
	ctx->user_ip6[3] = listener_address;
	ctx->user_port = listener_port;
	return 1;
}

/* A connection is established at its own end before the other has accepted it,
   so whoever accepts finds it. One that ends before that leaves nothing behind
   for who comes from its address and port next. */
SEC("sockops")
int established(struct bpf_sock_ops *ctx)
{
	struct place own = {};
	struct place *to;

	if (ctx->op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB && ctx->op != BPF_SOCK_OPS_STATE_CB)
		return 1;
	/* Diverted is what calls from here to there, whatever its socket wanted before. */
	if (!ctx->sk || ctx->local_ip4 != source_address || ctx->remote_ip4 != listener_address ||
	    ctx->remote_port != bpf_htonl(bpf_ntohs(listener_port)))
		return 1;
	to = bpf_sk_storage_get(&wanted, ctx->sk, 0, 0);
	if (!to)
		return 1;
	own.address = ctx->local_ip4;
	own.port = bpf_htons(ctx->local_port);
	if (ctx->op == BPF_SOCK_OPS_STATE_CB) {
		if (ctx->args[1] == BPF_TCP_CLOSE)
			bpf_map_delete_elem(&peers, &own);
		return 1;
	}
	/* Who could not be told of the end is not let in. */
	if (!bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG))
		bpf_map_update_elem(&peers, &own, to, BPF_ANY);
	return 1;
}

/* The other end, of the listener's cgroup, right after it. */
SEC("sockops")
int taken(struct bpf_sock_ops *ctx)
{
	struct place peer = {}, *to, own;
	struct bpf_sock *sk = ctx->sk;

	if (ctx->op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB || !sk || ctx->local_ip4 != listener_address ||
	    ctx->local_port != bpf_ntohs(listener_port))
		return 1;
	peer.address = ctx->remote_ip4;
	peer.port = bpf_htons(bpf_ntohl(ctx->remote_port));
	to = bpf_map_lookup_elem(&peers, &peer);
	if (!to)
		return 1;
	own = *to;
	bpf_map_delete_elem(&peers, &peer);
	bpf_sk_storage_get(&taken_for, sk, &own, BPF_SK_STORAGE_GET_F_CREATE);
	return 1;
}

/* The proxy asks as it would ask netfilter, whose own answer does not count. */
SEC("cgroup/getsockopt")
int original(struct bpf_sockopt *ctx)
{
	struct place *to;
	struct sockaddr_in *out = ctx->optval;

	if (ctx->level != SOL_IP || ctx->optname != SO_ORIGINAL_DST || !ctx->sk)
		return 1;
	to = bpf_sk_storage_get(&taken_for, ctx->sk, 0, 0);
	if (!to || (void *)(out + 1) > ctx->optval_end)
		return 1;
	__builtin_memset(out, 0, sizeof(*out));
	out->sin_family = AF_INET;
	out->sin_addr.s_addr = to->address;
	out->sin_port = to->port;
	ctx->optlen = sizeof(*out);
	barrier(); /* two fields: the verifier takes no store to both */
	ctx->retval = 0;
	return 1;
}

SEC("cgroup/getpeername4")
int peer4(struct bpf_sock_addr *ctx)
{
	struct place *to = ctx->sk ? bpf_sk_storage_get(&wanted, ctx->sk, 0, 0) : 0;

	if (to) {
		ctx->user_ip4 = to->address;
		ctx->user_port = to->port;
	}
	return 1;
}

SEC("cgroup/getpeername6")
int peer6(struct bpf_sock_addr *ctx)
{
	struct place *to = ctx->sk ? bpf_sk_storage_get(&wanted, ctx->sk, 0, 0) : 0;

	if (to) {
		ctx->user_ip6[3] = to->address;
		ctx->user_port = to->port;
	}
	return 1;
}

/* What was not diverted does not leave this machine: datagrams, raw sockets,
   connections from before. */
SEC("cgroup_skb/egress")
int fence(struct __sk_buff *skb)
{
	__u8 first = 0, protocol = 0;
	__u32 to = 0, to6[4] = {};
	__u16 port = 0;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		bpf_skb_load_bytes(skb, 16, &to, 4);
		if (is_local(to))
			return 1;
		bpf_skb_load_bytes(skb, 0, &first, 1);
		bpf_skb_load_bytes(skb, 9, &protocol, 1);
		if (protocol == IPPROTO_TCP || protocol == IPPROTO_UDP)
			bpf_skb_load_bytes(skb, (first & 15) * 4 + 2, &port, 2);
		note(to, port, protocol, 4);
		return 0;
	}
	if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		if (!bpf_skb_load_bytes(skb, 24, to6, 16) && !to6[0] && !to6[1] && !to6[2] && to6[3] == bpf_htonl(1))
			return 1;
		bpf_skb_load_bytes(skb, 6, &protocol, 1);
		note(0, 0, protocol, 6);
	}
	return 0;
}

/* Nor does anything from elsewhere come in: before Linux 6.6 the answer to a SYN
   is not shown to the fence. */
SEC("cgroup_skb/ingress")
int gate(struct __sk_buff *skb)
{
	__u32 from = 0, from6[4] = {};

	if (skb->protocol == bpf_htons(ETH_P_IP))
		return !bpf_skb_load_bytes(skb, 12, &from, 4) && is_local(from);
	return skb->protocol == bpf_htons(ETH_P_IPV6) && !bpf_skb_load_bytes(skb, 8, from6, 16) && !from6[0] && !from6[1] &&
	       !from6[2] && from6[3] == bpf_htonl(1);
}
