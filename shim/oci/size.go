package oci

import (
	"fmt"
	"strconv"

	"hauberk.dev/internal/strictjson"
	"hauberk.dev/vm"
)

const (
	defaultMemoryMiB = 256
	// ownMiB is what a guest's kernel and agent take beside the workload.
	ownMiB     = 96
	maxOptions = 64 << 10
	// shareOfOne is what a container that asks for one processor has as shares.
	shareOfOne = 1024
)

// Options are those of the runtime.
type Options struct {
	Version    int `json:"version"`
	MemoryMiB  int `json:"memoryMiB"`
	Processors int `json:"processors"`
}

// ParseOptions reads the runtime's options; none are the zero value.
func ParseOptions(raw []byte) (Options, error) {
	var o Options
	if len(raw) == 0 {
		return o, nil
	}
	if err := strictjson.Decode(raw, maxOptions, &o); err != nil {
		return Options{}, fmt.Errorf("read runtime options: want JSON such as {\"version\": 1, \"memoryMiB\": 256}: %w", err)
	}
	switch {
	case o.Version != 1:
		return Options{}, fmt.Errorf("read runtime options: version %d: want 1", o.Version)
	case o.MemoryMiB != 0 && (o.MemoryMiB < vm.MinMemoryMiB || o.MemoryMiB > vm.MaxMemoryMiB):
		return Options{}, fmt.Errorf("read runtime options: memoryMiB %d: want %d to %d", o.MemoryMiB, vm.MinMemoryMiB, vm.MaxMemoryMiB)
	case o.Processors < 0 || o.Processors > vm.MaxCPUs:
		return Options{}, fmt.Errorf("read runtime options: processors %d: want 1 to %d", o.Processors, vm.MaxCPUs)
	}
	return o, nil
}

// Size of a machine.
type Size struct {
	MemoryMiB  int
	Processors int
}

// What the CRI says of the size of a whole pod.
const (
	annotationMemory = cri + "sandbox-memory"
	annotationQuota  = cri + "sandbox-cpu-quota"
	annotationPeriod = cri + "sandbox-cpu-period"
	annotationShares = cri + "sandbox-cpu-shares"
)

// Size is what options and limits come to, on a host of so many processors.
// Limits are the containers'; their machine needs more memory. A pod's are in
// the annotations of its sandbox.
func (c *Config) Size(o Options, processors int) (Size, error) {
	memory, quota, period, shares, err := c.asked()
	if err != nil {
		return Size{}, fmt.Errorf("read config.json: %w", err)
	}
	s := Size{MemoryMiB: o.MemoryMiB, Processors: o.Processors}
	if s.MemoryMiB == 0 && memory > 0 {
		s.MemoryMiB = max(vm.MinMemoryMiB, int((memory+1<<20-1)>>20)+ownMiB)
	}
	if s.MemoryMiB == 0 {
		s.MemoryMiB = defaultMemoryMiB
	}
	if s.MemoryMiB > vm.MaxMemoryMiB {
		return Size{}, fmt.Errorf("read config.json: memory of %d MiB: a sandbox can have %d", s.MemoryMiB, vm.MaxMemoryMiB)
	}
	if s.Processors == 0 && quota > 0 {
		s.Processors = up(quota, period)
	} else if n := len(c.CPUs()); s.Processors == 0 && n > 0 {
		s.Processors = n
	} else if s.Processors == 0 {
		s.Processors = up(shares, shareOfOne)
	}
	s.Processors = max(1, min(s.Processors, processors, vm.MaxCPUs))
	return s, nil
}

// Fits says why a machine of this size has no room for a pod of these limits, on
// a host of so many processors; 0 is no limit, which is no more than it has.
func (s Size) Fits(memory, quota, period int64, processors int) error {
	if need := int((memory+1<<20-1)>>20) + ownMiB; memory > 0 && need > s.MemoryMiB {
		return fmt.Errorf("it has %d MiB of memory, and would need %d: make the pod anew", s.MemoryMiB, need)
	}
	if period <= 0 {
		period = defaultPeriod
	}
	if need := min(up(max(quota, 0), period), processors, vm.MaxCPUs); need > s.Processors {
		return fmt.Errorf("it has %d processors, and would need %d: make the pod anew", s.Processors, need)
	}
	return nil
}

func up(n, by int64) int { return int((n + by - 1) / by) }

const defaultPeriod = 100000

// asked are the limits that decide about a machine; 0 is none.
func (c *Config) asked() (memory, quota, period, shares int64, err error) {
	r := &c.spec.Linux.Resources
	own := func(n *int64) int64 {
		if n == nil {
			return 0
		}
		return max(0, *n)
	}
	unsigned := func(n *uint64) int64 {
		if n == nil {
			return 0
		}
		return int64(min(*n, maxQuota))
	}
	memory, quota, period, shares = own(r.Memory.Limit), own(r.CPU.Quota), unsigned(r.CPU.Period), unsigned(r.CPU.Shares)
	if Kind(c.spec.Annotations[annotationKind]) == KindSandbox {
		for _, a := range []struct {
			name string
			into *int64
			most int64
		}{{annotationMemory, &memory, maxMemory}, {annotationQuota, &quota, maxQuota}, {annotationPeriod, &period, maxPeriod}, {annotationShares, &shares, maxQuota}} {
			if *a.into, err = number(c.spec.Annotations, a.name, a.most); err != nil {
				return 0, 0, 0, 0, err
			}
		}
	}
	if period == 0 {
		period = defaultPeriod
	}
	return memory, quota, period, shares, nil
}

// number reads an annotation that is a number, if it is there; below 0 is none.
func number(annotations map[string]string, name string, most int64) (int64, error) {
	text := annotations[name]
	if text == "" {
		return 0, nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n > most {
		return 0, fmt.Errorf("annotations[%q] %.64q: want a number up to %d", name, text, most)
	}
	return max(0, n), nil
}
