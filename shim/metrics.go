package shim

import (
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/anypb"

	"hauberk.dev/api/guestproto"
)

// metricsURL is the type of a cgroup's figures, as containerd's clients know
// them. Its few fields that a sandbox has are written here by hand: the package
// that defines them would bring a second loader of eBPF programs.
const metricsURL = "io.containerd.cgroups.v2.Metrics"

// metrics are the figures of a container. They are the guest's word.
func metrics(c guestproto.ContainerStats, l limits) *anypb.Any {
	var b []byte
	b = message(b, 1, map[protowire.Number]uint64{1: uint64(c.Pids), 2: uint64(l.pids)}) // pids: current, limit
	b = message(b, 2, map[protowire.Number]uint64{1: c.CPU})                             // cpu: usage_usec
	b = message(b, 4, map[protowire.Number]uint64{32: c.Memory, 33: l.memory})           // memory: usage, usage_limit
	b = message(b, 8, map[protowire.Number]uint64{5: uint64(c.OOMKills)})                // memory_events: oom_kill
	return &anypb.Any{TypeUrl: metricsURL, Value: b}
}

// message appends an embedded message of numbers.
func message(b []byte, at protowire.Number, fields map[protowire.Number]uint64) []byte {
	var inner []byte
	for n := protowire.Number(1); n <= 64; n++ {
		if v := fields[n]; v != 0 {
			inner = protowire.AppendVarint(protowire.AppendTag(inner, n, protowire.VarintType), v)
		}
	}
	return protowire.AppendBytes(protowire.AppendTag(b, at, protowire.BytesType), inner)
}
