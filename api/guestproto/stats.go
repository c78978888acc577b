package guestproto

// ContainerStats is what one container uses, as its cgroup counts. What the
// kernel does not count is 0. Memory is in bytes, time in microseconds.
type ContainerStats struct {
	Process uint32

	Memory       uint64 // all that is charged to it
	MemoryPeak   uint64
	Anonymous    uint64
	File         uint64
	InactiveFile uint64 // Memory less this is the working set
	Shmem        uint64
	Kernel       uint64
	Faults       uint64
	MajorFaults  uint64
	OOMs         uint64 // how often it hit its limit with nothing to reclaim
	OOMKills     uint32

	CPU           uint64
	CPUUser       uint64
	CPUSystem     uint64
	Periods       uint64
	Throttled     uint64 // periods in which it was
	ThrottledTime uint64

	Pids      uint32
	ReadBytes uint64 // of disks
	Reads     uint64
	Wrote     uint64
	Writes    uint64

	UpperBytes uint64 // of the file system that holds what is written to its root, used
	UpperFiles uint64
}

const containerStatsSize = 4 + 10*8 + 4 + 6*8 + 4 + 4*8 + 2*8

// Append appends c to b.
func (c *ContainerStats) Append(b []byte) []byte {
	b = appendU32(b, c.Process)
	for _, v := range [...]uint64{
		c.Memory, c.MemoryPeak, c.Anonymous, c.File, c.InactiveFile, c.Shmem, c.Kernel, c.Faults, c.MajorFaults, c.OOMs,
	} {
		b = appendU64(b, v)
	}
	b = appendU32(b, c.OOMKills)
	for _, v := range [...]uint64{c.CPU, c.CPUUser, c.CPUSystem, c.Periods, c.Throttled, c.ThrottledTime} {
		b = appendU64(b, v)
	}
	b = appendU32(b, c.Pids)
	for _, v := range [...]uint64{c.ReadBytes, c.Reads, c.Wrote, c.Writes, c.UpperBytes, c.UpperFiles} {
		b = appendU64(b, v)
	}
	return b
}

func (r *reader) containerStats(c *ContainerStats) {
	c.Process = r.u32()
	for _, v := range [...]*uint64{
		&c.Memory, &c.MemoryPeak, &c.Anonymous, &c.File, &c.InactiveFile, &c.Shmem, &c.Kernel, &c.Faults, &c.MajorFaults, &c.OOMs,
	} {
		*v = r.u64()
	}
	c.OOMKills = r.u32()
	for _, v := range [...]*uint64{&c.CPU, &c.CPUUser, &c.CPUSystem, &c.Periods, &c.Throttled, &c.ThrottledTime} {
		*v = r.u64()
	}
	c.Pids = r.u32()
	for _, v := range [...]*uint64{&c.ReadBytes, &c.Reads, &c.Wrote, &c.Writes, &c.UpperBytes, &c.UpperFiles} {
		*v = r.u64()
	}
}

// DirStats is what a directory of the pod holds. Of one on a disk it is the
// disk's.
type DirStats struct {
	Name        string
	Used, Bytes uint64
	Files       uint64
}

// Stats is what a guest uses. Memory is in bytes.
type Stats struct {
	UptimeMicros    uint64
	MemoryTotal     uint64
	MemoryAvailable uint64
	MemoryFree      uint64
	MemoryCached    uint64
	AgentResident   uint64
	AgentPrivate    uint64 // of AgentResident, what no file or template holds
	AgentFiles      uint32 // descriptors the agent has open
	AgentMounts     uint32 // mounts in the agent's namespace
	CPUUser         uint64 // microseconds, of all CPUs, as are the next
	CPUSystem       uint64
	CPUIdle         uint64
	CPUSteal        uint64
	Containers      []ContainerStats
	Dirs            []DirStats
}

// Append appends the payload to b.
func (m *Stats) Append(b []byte) []byte {
	b = m.AppendHead(b)
	b = appendU16(b, uint16(len(m.Containers)))
	for i := range m.Containers {
		b = m.Containers[i].Append(b)
	}
	b = appendU16(b, uint16(len(m.Dirs)))
	for i := range m.Dirs {
		b = m.Dirs[i].Append(b)
	}
	return b
}

// AppendHead appends what stands before the lists of containers and of
// directories; each of them begins with how many there are.
func (m *Stats) AppendHead(b []byte) []byte {
	for _, v := range [...]uint64{
		m.UptimeMicros, m.MemoryTotal, m.MemoryAvailable, m.MemoryFree, m.MemoryCached, m.AgentResident, m.AgentPrivate,
	} {
		b = appendU64(b, v)
	}
	b = appendU32(appendU32(b, m.AgentFiles), m.AgentMounts)
	for _, v := range [...]uint64{m.CPUUser, m.CPUSystem, m.CPUIdle, m.CPUSteal} {
		b = appendU64(b, v)
	}
	return b
}

// Append appends d to b.
func (d *DirStats) Append(b []byte) []byte {
	return appendU64(appendU64(appendU64(appendString(b, d.Name), d.Used), d.Bytes), d.Files)
}

// ParseStats reads the reply to a stats.
func ParseStats(b []byte) (m Stats, err error) {
	r := reader{b: b}
	for _, v := range [...]*uint64{
		&m.UptimeMicros, &m.MemoryTotal, &m.MemoryAvailable, &m.MemoryFree, &m.MemoryCached, &m.AgentResident, &m.AgentPrivate,
	} {
		*v = r.u64()
	}
	m.AgentFiles, m.AgentMounts = r.u32(), r.u32()
	for _, v := range [...]*uint64{&m.CPUUser, &m.CPUSystem, &m.CPUIdle, &m.CPUSteal} {
		*v = r.u64()
	}
	if n := r.count(containerStatsSize); n > 0 {
		m.Containers = make([]ContainerStats, n)
		for i := range m.Containers {
			r.containerStats(&m.Containers[i])
		}
	}
	if n := r.count(2 + 3*8); n > 0 {
		m.Dirs = make([]DirStats, n)
		for i := range m.Dirs {
			m.Dirs[i] = DirStats{r.string(), r.u64(), r.u64(), r.u64()}
		}
	}
	return m, r.end("stats reply")
}
