package shim

import (
	"os"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/anypb"

	"hauberk.dev/api/guestproto"
)

// The types of a cgroup's figures, as containerd's clients know them. What of
// their fields a sandbox has is written here by hand: the package that defines
// them would bring a second loader of eBPF programs.
const (
	metricsV1 = "io.containerd.cgroups.v1.Metrics"
	metricsV2 = "io.containerd.cgroups.v2.Metrics"
)

// legacyHost says whether this host has cgroups of version 1. containerd's
// collector of metrics takes the host's version and no other.
func legacyHost() bool {
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	return err != nil
}

// metrics are the figures of a container. They are the guest's word.
func metrics(c guestproto.ContainerStats, l limits, legacy bool) *anypb.Any {
	if legacy {
		return &anypb.Any{TypeUrl: metricsV1, Value: metricsOne(c, l)}
	}
	return &anypb.Any{TypeUrl: metricsV2, Value: metricsTwo(c, l)}
}

// unlimited is how cgroups of version 1 say that there is no limit of memory.
const unlimited = 1<<63 - 4096

func metricsOne(c guestproto.ContainerStats, l limits) []byte {
	limit := l.memory
	if limit == 0 {
		limit = unlimited
	}
	pids := figures{1: uint64(c.Pids), 2: uint64(l.pids)}
	usage := figures{1: c.CPU * 1000, 2: c.CPUSystem * 1000, 3: c.CPUUser * 1000}
	throttling := figures{1: c.Periods, 2: c.Throttled, 3: c.ThrottledTime * 1000}
	memory := figures{ // of the cgroup, and, from 17, of all below it too: there is none
		1: c.File, 2: c.Anonymous, 9: c.Faults, 10: c.MajorFaults, 13: c.InactiveFile, 16: limit,
		18: c.File, 19: c.Anonymous, 25: c.Faults, 26: c.MajorFaults, 29: c.InactiveFile,
	}
	entry := figures{1: limit, 2: c.Memory, 3: c.MemoryPeak}
	b := within(nil, 2, pids.message())
	b = within(b, 3, within(within(nil, 1, usage.message()), 2, throttling.message()))
	b = within(b, 4, within(memory.message(), 33, entry.message()))
	return within(b, 9, figures{3: uint64(c.OOMKills)}.message())
}

func metricsTwo(c guestproto.ContainerStats, l limits) []byte {
	limit := l.memory
	if limit == 0 {
		limit = 1<<64 - 1
	}
	pids := figures{1: uint64(c.Pids), 2: uint64(l.pids)}
	cpu := figures{1: c.CPU, 2: c.CPUUser, 3: c.CPUSystem, 4: c.Periods, 5: c.Throttled, 6: c.ThrottledTime}
	memory := figures{
		1: c.Anonymous, 2: c.File, 6: c.Shmem, 13: c.InactiveFile, 18: c.Faults, 19: c.MajorFaults,
		32: c.Memory, 33: limit, 36: c.MemoryPeak,
	}
	disks := figures{3: c.ReadBytes, 4: c.Wrote, 5: c.Reads, 6: c.Writes}
	b := within(nil, 1, pids.message())
	b = within(b, 2, cpu.message())
	b = within(b, 4, memory.message())
	if entry := disks.message(); len(entry) > 0 {
		b = within(b, 6, within(nil, 1, entry))
	}
	return within(b, 8, figures{4: c.OOMs, 5: uint64(c.OOMKills)}.message())
}

// figures are the numbers of a message, by their places in it.
type figures map[protowire.Number]uint64

// highest place of a number in these messages.
const highest = 36

func (f figures) message() (b []byte) {
	for n := protowire.Number(1); n <= highest; n++ {
		if v := f[n]; v != 0 {
			b = protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), v)
		}
	}
	return b
}

// within appends a message to the one that holds it.
func within(b []byte, at protowire.Number, inner []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, at, protowire.BytesType), inner)
}

// together is what several containers use.
func together(a, b guestproto.ContainerStats) guestproto.ContainerStats {
	for _, v := range []struct {
		into *uint64
		more uint64
	}{
		{&a.Memory, b.Memory}, {&a.MemoryPeak, b.MemoryPeak}, {&a.Anonymous, b.Anonymous}, {&a.File, b.File},
		{&a.InactiveFile, b.InactiveFile}, {&a.Shmem, b.Shmem}, {&a.Kernel, b.Kernel}, {&a.Faults, b.Faults},
		{&a.MajorFaults, b.MajorFaults}, {&a.OOMs, b.OOMs}, {&a.CPU, b.CPU}, {&a.CPUUser, b.CPUUser},
		{&a.CPUSystem, b.CPUSystem}, {&a.Periods, b.Periods}, {&a.Throttled, b.Throttled},
		{&a.ThrottledTime, b.ThrottledTime}, {&a.ReadBytes, b.ReadBytes}, {&a.Reads, b.Reads}, {&a.Wrote, b.Wrote},
		{&a.Writes, b.Writes},
	} {
		*v.into += v.more
	}
	a.OOMKills += b.OOMKills
	a.Pids += b.Pids
	return a
}
