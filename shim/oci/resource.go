package oci

import (
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/internal/strictjson"
)

// resources are a container's limits.
type resources struct {
	Devices []deviceRule `json:"devices"`
	Memory  struct {
		Limit            *int64 `json:"limit"`
		Reservation      *int64 `json:"reservation"`
		DisableOOMKiller bool   `json:"disableOOMKiller"`
	} `json:"memory"`
	CPU struct {
		Shares *uint64 `json:"shares"`
		Quota  *int64  `json:"quota"`
		Burst  *uint64 `json:"burst"`
		Period *uint64 `json:"period"`
		Idle   *int64  `json:"idle"`
		Cpus   string  `json:"cpus"`
	} `json:"cpu"`
	Pids struct {
		Limit *int64 `json:"limit"`
	} `json:"pids"`
	HugepageLimits []struct {
		PageSize string `json:"pageSize"`
		Limit    uint64 `json:"limit"`
	} `json:"hugepageLimits"`
	Unified map[string]string `json:"unified"`
}

// Bounds of what cgroups take.
const (
	minPeriod, maxPeriod = 1000, 1000000 // microseconds
	minQuota             = 1000
	maxQuota             = 1 << 40
	maxShares            = 262144
	maxPids              = 1 << 22
	maxMemory            = 1 << 50
	minMemory            = 64 << 10
)

var unifiedName = regexp.MustCompile(`^(memory|cpu|pids|io|cpuset)\.[a-z][a-z0-9_.]{0,60}$`)

// maxCPU is the highest number of a processor that Linux has room for, and one.
const maxCPU = 8192

// cpuList reads numbers of processors as cgroups write them: 0-3,7. None are nil.
func cpuList(text string) (list []int, err error) {
	if text == "" {
		return nil, nil
	}
	for part := range strings.SplitSeq(text, ",") {
		from, to, isRange := strings.Cut(part, "-")
		if !isRange {
			to = from
		}
		first, err := strconv.ParseUint(from, 10, 32)
		last, err2 := strconv.ParseUint(to, 10, 32)
		if err != nil || err2 != nil || last < first || last >= maxCPU || len(text) > maxPath {
			return nil, fmt.Errorf("want processors such as 0-3,7, below %d", maxCPU)
		}
		for n := first; n <= last; n++ {
			list = append(list, int(n))
		}
		if len(list) > maxCPU {
			return nil, errors.New("processors are named more than once")
		}
	}
	slices.Sort(list)
	return slices.Compact(list), nil
}

// CPUs are the processors of the host that the container is to run on; nil is
// any.
func (c *Config) CPUs() []int {
	list, _ := cpuList(c.spec.Linux.Resources.CPU.Cpus) // Parse has seen it
	return list
}

func (l *linux) resourceFaults() []error { return l.Resources.faults("linux.resources.") }

// faults finds limits that cannot be. prefix is where they stand.
func (r *resources) faults(prefix string) (errs []error) {
	fault := func(format string, a ...any) { errs = append(errs, fmt.Errorf(prefix+format, a...)) }
	for name, n := range map[string]*int64{"limit": r.Memory.Limit, "reservation": r.Memory.Reservation} {
		if n != nil && *n != 0 && *n != -1 && (*n < minMemory || *n > maxMemory) {
			fault("memory.%s %d: want -1 (none) or %d to %d bytes", name, *n, minMemory, maxMemory)
		}
	}
	if r.Memory.DisableOOMKiller {
		fault("memory.disableOOMKiller: cgroups of a guest always have it: leave it out")
	}
	c := &r.CPU
	if c.Period != nil && *c.Period != 0 && (*c.Period < minPeriod || *c.Period > maxPeriod) {
		fault("cpu.period %d: want %d to %d microseconds", *c.Period, minPeriod, maxPeriod)
	}
	if c.Quota != nil && *c.Quota > 0 && (*c.Quota < minQuota || *c.Quota > maxQuota) {
		fault("cpu.quota %d: want -1 (none) or %d to %d microseconds", *c.Quota, minQuota, maxQuota)
	}
	if _, err := cpuList(c.Cpus); err != nil {
		fault("cpu.cpus %.64q: %w", c.Cpus, err)
	}
	if c.Burst != nil && *c.Burst > maxQuota {
		fault("cpu.burst %d: want at most %d microseconds", *c.Burst, maxQuota)
	}
	if c.Idle != nil && *c.Idle != 0 && *c.Idle != 1 {
		fault("cpu.idle %d: want 0 or 1", *c.Idle)
	}
	if n := r.Pids.Limit; n != nil && (*n < -1 || *n > maxPids) {
		fault("pids.limit %d: want -1 (none) or 1 to %d", *n, maxPids)
	}
	for i, h := range r.HugepageLimits {
		if h.Limit != 0 {
			fault("hugepageLimits[%d] %.16q: a sandbox has no huge pages: only 0 is possible", i, h.PageSize)
		}
	}
	if len(r.Unified) > guestproto.MaxList {
		fault("unified: more than %d", guestproto.MaxList)
	}
	for _, name := range slices.Sorted(maps.Keys(r.Unified)) {
		if v := r.Unified[name]; !unifiedName.MatchString(name) || len(v) > 4096 || strings.ContainsRune(v, 0) {
			fault("unified[%.128q]: want a file of the memory, cpu, cpuset, pids or io controller", name)
		}
	}
	return errs
}

// resources are the limits as the agent takes them.
func (r *resources) resources() (out guestproto.Resources) {
	out.MemoryMax, out.MemoryLow = bytes(r.Memory.Limit), bytes(r.Memory.Reservation)
	if out.MemoryLow == guestproto.Unlimited {
		out.MemoryLow = 0
	}
	if s := r.CPU.Shares; s != nil && *s > 0 {
		// As Kubernetes and runc turn shares into weights.
		out.CPUWeight = 1 + (min(max(*s, 2), maxShares)-2)*9999/(maxShares-2)
	}
	if q := r.CPU.Quota; q != nil && *q != 0 {
		out.CPUQuota = guestproto.Unlimited
		if *q > 0 {
			out.CPUQuota = uint64(*q)
		}
	}
	if p := r.CPU.Period; p != nil {
		out.CPUPeriod = *p
	}
	if n := r.Pids.Limit; n != nil && *n != 0 {
		out.PidsMax = guestproto.UnlimitedPids
		if *n > 0 {
			out.PidsMax = uint32(*n)
		}
	}
	if b := r.CPU.Burst; b != nil && *b != 0 {
		out.Unified = append(out.Unified, guestproto.Setting{Name: "cpu.max.burst", Value: fmt.Sprint(*b)})
	}
	if n := r.CPU.Idle; n != nil && *n != 0 {
		out.Unified = append(out.Unified, guestproto.Setting{Name: "cpu.idle", Value: "1"})
	}
	for _, name := range slices.Sorted(maps.Keys(r.Unified)) {
		out.Unified = append(out.Unified, guestproto.Setting{Name: name, Value: r.Unified[name]})
	}
	return out
}

func bytes(n *int64) uint64 {
	switch {
	case n == nil || *n == 0:
		return 0
	case *n < 0:
		return guestproto.Unlimited
	}
	return uint64(*n)
}

// resourcesType is what containerd calls LinuxResources of the specification.
const resourcesType = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"

// ParseResources reads the limits of an update: LinuxResources in JSON. cpus are
// the processors of the host to run on from now on, nil if nothing is said.
func ParseResources(typeURL string, raw []byte) (limits guestproto.Resources, cpus []int, err error) {
	fail := func(err error) (guestproto.Resources, []int, error) {
		return guestproto.Resources{}, nil, fmt.Errorf("read resources: %w", err)
	}
	if typeURL != resourcesType {
		return fail(fmt.Errorf("type %.128q: want %s", typeURL, resourcesType))
	}
	if err := survey(raw, "linux.resources"); err != nil {
		return fail(err)
	}
	var r resources
	if err := strictjson.DecodeLoose(raw, MaxConfig, &r); err != nil {
		return fail(err)
	}
	if err := errors.Join(r.faults("")...); err != nil {
		return fail(err)
	}
	cpus, err = cpuList(r.CPU.Cpus)
	return r.resources(), cpus, err
}
