package shim

import (
	"fmt"
	"maps"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/internal/protofields"
)

// flat lists the numbers of a message by their places, as "4.33.1".
func flat(t *testing.T, raw []byte, messages map[string]bool, at string, into map[string]uint64) {
	t.Helper()
	err := protofields.Each(raw, func(n protowire.Number, inner []byte, v uint64) error {
		place := fmt.Sprintf("%s%d", at, n)
		if messages[place] {
			flat(t, inner, messages, place+".", into)
		} else {
			into[place] = v
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// TestMetrics puts each figure where containerd's clients look for it: the
// places are those of containerd/cgroups' metrics.proto, of either version.
func TestMetrics(t *testing.T) {
	used := guestproto.ContainerStats{
		Memory: 100, MemoryPeak: 101, Anonymous: 102, File: 103, InactiveFile: 104, Shmem: 105, Faults: 106, MajorFaults: 107,
		OOMs: 108, OOMKills: 109, CPU: 110, CPUUser: 111, CPUSystem: 112, Periods: 113, Throttled: 114, ThrottledTime: 115,
		Pids: 116, ReadBytes: 117, Reads: 118, Wrote: 119, Writes: 120,
	}
	for _, c := range []struct {
		legacy   bool
		limits   limits
		url      string
		messages map[string]bool
		want     map[string]uint64
	}{
		{false, limits{memory: 1000, pids: 50}, "io.containerd.cgroups.v2.Metrics",
			map[string]bool{"1": true, "2": true, "4": true, "6": true, "6.1": true, "8": true},
			map[string]uint64{
				"1.1": 116, "1.2": 50, "2.1": 110, "2.2": 111, "2.3": 112, "2.4": 113, "2.5": 114, "2.6": 115,
				"4.1": 102, "4.2": 103, "4.6": 105, "4.13": 104, "4.18": 106, "4.19": 107, "4.32": 100, "4.33": 1000, "4.36": 101,
				"6.1.3": 117, "6.1.4": 119, "6.1.5": 118, "6.1.6": 120, "8.4": 108, "8.5": 109,
			}},
		{true, limits{}, "io.containerd.cgroups.v1.Metrics",
			map[string]bool{"2": true, "3": true, "3.1": true, "3.2": true, "4": true, "4.33": true, "9": true},
			map[string]uint64{
				"2.1": 116, "3.1.1": 110000, "3.1.2": 112000, "3.1.3": 111000, "3.2.1": 113, "3.2.2": 114, "3.2.3": 115000,
				"4.1": 103, "4.2": 102, "4.9": 106, "4.10": 107, "4.13": 104, "4.16": unlimited,
				"4.18": 103, "4.19": 102, "4.25": 106, "4.26": 107, "4.29": 104,
				"4.33.1": unlimited, "4.33.2": 100, "4.33.3": 101, "9.3": 109,
			}},
	} {
		m := metrics(used, c.limits, c.legacy)
		got := map[string]uint64{}
		flat(t, m.Value, c.messages, "", got)
		if m.TypeUrl != c.url || !maps.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", m.TypeUrl, got, c.want)
		}
	}
	if two := together(used, used); two.Memory != 200 || two.CPU != 220 || two.Pids != 232 || two.OOMKills != 218 {
		t.Errorf("together %+v", two)
	}
}
