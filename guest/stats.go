package guest

import (
	"syscall"

	"hauberk.dev/api/guestproto"
)

// stats appends what the guest, this agent, every container and every
// directory of the pod use.
func (a *agent) stats() error {
	var buf [4096]byte
	m := guestproto.Stats{UptimeMicros: uptimeMicros()}
	b, err := readFile("/proc/meminfo", buf[:])
	if err != nil {
		return err
	}
	m.MemoryTotal = field(b, "MemTotal:") << 10
	m.MemoryAvailable = field(b, "MemAvailable:") << 10
	m.MemoryFree = field(b, "MemFree:") << 10
	m.MemoryCached = field(b, "Cached:") << 10
	if b, err = readFile("/proc/self/smaps_rollup", buf[:]); err != nil {
		return err
	}
	m.AgentResident = field(b, "Rss:") << 10
	// The text lies in the initramfs, which a clone shares with its template;
	// anonymous memory is what this agent costs beyond it.
	m.AgentPrivate = field(b, "Anonymous:") << 10
	m.AgentFiles = countFiles(buf[:])
	m.AgentMounts = countMounts(buf[:])
	if b, err = readFile("/proc/stat", buf[:]); err != nil {
		return err
	}
	m.CPUUser, m.CPUSystem, m.CPUIdle, m.CPUSteal = cpuTimes(b)
	a.tx = m.AppendHead(a.tx)
	at := a.beginList()
	for i := range a.processes {
		if p := &a.processes[i]; p.id != 0 && p.cgroup >= 0 {
			c := p.usage(buf[:])
			a.tx = c.Append(a.tx)
			a.tx[at]++
		}
	}
	at = a.beginList()
	for i := range a.dirs {
		if d := &a.dirs[i]; d.state == dirReady {
			s := guestproto.DirStats{Name: d.name}
			s.Used, s.Bytes, s.Files = space(dirPath(d.name))
			a.tx = s.Append(a.tx)
			a.tx[at]++
		}
	}
	return nil
}

// beginList begins a list of less than 256 in tx, and gives where the low byte
// of its length stands.
func (a *agent) beginList() int {
	a.tx = append(a.tx, 0, 0)
	return len(a.tx) - 2
}

// cpuTimes reads the first line of /proc/stat, in microseconds.
func cpuTimes(b []byte) (user, system, idle, steal uint64) {
	const tick = 10000
	line, _ := nextLine(b)
	var fields [8]uint64 // user nice system idle iowait irq softirq steal
	n, inside := 0, false
	for i, c := range line {
		digit := c >= '0' && c <= '9'
		if digit && !inside && n < len(fields) {
			fields[n] = number(line[i:]) * tick
			n++
		}
		inside = digit
	}
	return fields[0] + fields[1], fields[2] + fields[5] + fields[6], fields[3] + fields[4], fields[7]
}

// space is what a file system holds. The agent asks only those whose answer
// comes from this kernel.
func space(path string) (used, size, files uint64) {
	var st syscall.Statfs_t
	if syscall.Statfs(path, &st) != nil {
		return 0, 0, 0
	}
	unit := uint64(st.Bsize)
	return (st.Blocks - st.Bfree) * unit, st.Blocks * unit, st.Files - st.Ffree
}

// countFiles counts the agent's open descriptors, the one it needs for that
// not included.
func countFiles(buf []byte) (n uint32) {
	fd, err := syscall.Open("/proc/self/fd", syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return 0
	}
	defer syscall.Close(fd)
	for {
		got, err := syscall.ReadDirent(fd, buf)
		if err != nil || got <= 0 {
			return max(n, 3) - 3 // itself, "." and ".."
		}
		for at := 0; at+18 <= got; {
			size := int(buf[at+16]) | int(buf[at+17])<<8
			if size <= 0 {
				break
			}
			at += size
			n++
		}
	}
}

// countMounts counts the mounts of the agent's namespace.
func countMounts(buf []byte) (n uint32) {
	fd, err := syscall.Open("/proc/self/mountinfo", syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return 0
	}
	defer syscall.Close(fd)
	for {
		got, err := syscall.Read(fd, buf)
		if err != nil || got <= 0 {
			return n
		}
		for _, c := range buf[:got] {
			if c == '\n' {
				n++
			}
		}
	}
}

// usage is what a container uses; what this kernel does not count is 0.
func (p *process) usage(buf []byte) (c guestproto.ContainerStats) {
	c.Process = p.id
	c.Memory = number(p.counter("memory.current", buf))
	c.MemoryPeak = number(p.counter("memory.peak", buf))
	b := p.counter("memory.stat", buf)
	c.Anonymous, c.File = field(b, "anon "), field(b, "file ")
	c.InactiveFile, c.Shmem = field(b, "inactive_file "), field(b, "shmem ")
	if c.Kernel = field(b, "kernel "); c.Kernel == 0 {
		c.Kernel = field(b, "kernel_stack ") + field(b, "pagetables ") + field(b, "slab ")
	}
	c.Faults, c.MajorFaults = field(b, "pgfault "), field(b, "pgmajfault ")
	b = p.counter("memory.events", buf)
	c.OOMs, c.OOMKills = field(b, "oom "), uint32(field(b, "oom_kill "))
	b = p.counter("cpu.stat", buf)
	c.CPU, c.CPUUser, c.CPUSystem = field(b, "usage_usec "), field(b, "user_usec "), field(b, "system_usec ")
	c.Periods, c.Throttled, c.ThrottledTime = field(b, "nr_periods "), field(b, "nr_throttled "), field(b, "throttled_usec ")
	c.Pids = uint32(number(p.counter("pids.current", buf)))
	b = p.counter("io.stat", buf)
	c.ReadBytes, c.Wrote = sum(b, "rbytes="), sum(b, "wbytes=")
	c.Reads, c.Writes = sum(b, "rios="), sum(b, "wios=")
	c.UpperBytes, _, c.UpperFiles = space(upperPath(p.root))
	return c
}

// sum adds up the numbers that follow a name wherever it stands in b.
func sum(b []byte, name string) (n uint64) {
	for i := 0; i+len(name) <= len(b); i++ {
		if string(b[i:i+len(name)]) == name {
			n += number(b[i+len(name):])
		}
	}
	return n
}

// counter reads a file of a container's cgroup.
func (p *process) counter(name string, buf []byte) []byte {
	fd, err := syscall.Openat(p.cgroup, name, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	defer syscall.Close(fd)
	n, err := readFull(fd, buf)
	if err != nil {
		return nil
	}
	return buf[:n]
}
