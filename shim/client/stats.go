package client

import (
	"context"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/containerd/containerd/api/runtime/task/v2"

	"hauberk.dev/internal/protofields"
)

// Stats are what a container uses, by its guest's word. A limit of 0 is none.
type Stats struct {
	CPUMicros   uint64
	Memory      uint64 // bytes
	MemoryLimit uint64
	Pids        uint64
	PidsLimit   uint64
	OOMKills    uint64
}

// metricsURL is the type of the figures, which are read here by hand: the
// package that defines them would bring a loader of eBPF programs.
const metricsURL = "io.containerd.cgroups.v2.Metrics"

// Stats gives what a container uses.
func (s *Shim) Stats(ctx context.Context, id string) (Stats, error) {
	r, err := s.task.Stats(ctx, &task.StatsRequest{ID: id})
	if err != nil {
		return Stats{}, said(err)
	}
	if u := r.GetStats().GetTypeUrl(); u != metricsURL && u != "type.googleapis.com/"+metricsURL {
		return Stats{}, fmt.Errorf("read statistics of %q: type %.128q: want %s", id, u, metricsURL)
	}
	return parseStats(r.GetStats().GetValue())
}

// parseStats reads the few figures that are shown, and skips the others.
func parseStats(raw []byte) (out Stats, err error) {
	into := map[[2]protowire.Number]*uint64{
		{1, 1}: &out.Pids, {1, 2}: &out.PidsLimit, {2, 1}: &out.CPUMicros,
		{4, 32}: &out.Memory, {4, 33}: &out.MemoryLimit, {8, 5}: &out.OOMKills,
	}
	err = protofields.Each(raw, func(group protowire.Number, inner []byte, _ uint64) error {
		if inner == nil {
			return nil
		}
		return protofields.Each(inner, func(n protowire.Number, _ []byte, v uint64) error {
			if p, ok := into[[2]protowire.Number{group, n}]; ok {
				*p = v
			}
			return nil
		})
	})
	if err != nil {
		return Stats{}, fmt.Errorf("read statistics: %w", err)
	}
	return out, nil
}
