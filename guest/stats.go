package guest

import (
	"syscall"

	"hauberk.dev/api/guestproto"
)

// stats appends what the guest, this agent and every container use.
func (a *agent) stats() error {
	var containers [guestproto.MaxProcesses]guestproto.ContainerStats
	var buf [4096]byte
	m := guestproto.Stats{UptimeMicros: uptimeMicros()}
	b, err := readFile("/proc/meminfo", buf[:])
	if err != nil {
		return err
	}
	m.MemoryTotal = field(b, "MemTotal:") << 10
	m.MemoryAvailable = field(b, "MemAvailable:") << 10
	if b, err = readFile("/proc/self/smaps_rollup", buf[:]); err != nil {
		return err
	}
	m.AgentResident = field(b, "Rss:") << 10
	// The text lies in the initramfs, which a clone shares with its template;
	// anonymous memory is what this agent costs beyond it.
	m.AgentPrivate = field(b, "Anonymous:") << 10
	n := 0
	for i := range a.processes {
		p := &a.processes[i]
		if p.id == 0 || p.cgroup < 0 {
			continue
		}
		containers[n] = p.usage(buf[:])
		n++
	}
	m.Containers = containers[:n]
	a.tx = m.Append(a.tx)
	return nil
}

// usage is what a container uses; what this kernel does not count is 0.
func (p *process) usage(buf []byte) (c guestproto.ContainerStats) {
	c.Process = p.id
	c.Memory = number(p.counter("memory.current", buf))
	c.CPU = field(p.counter("cpu.stat", buf), "usage_usec ")
	c.Pids = uint32(number(p.counter("pids.current", buf)))
	c.OOMKills = uint32(field(p.counter("memory.events", buf), "oom_kill "))
	return c
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
