package guest

import (
	"strconv"
	"syscall"

	"hauberk.dev/api/guestproto"
)

func cgroupOf(id uint32) string { return cgroupDir + "/c" + strconv.FormatUint(uint64(id), 10) }

// makeCgroup makes the cgroup of a container. Its limit on processes is set by
// the setup stage.
func (p *process) makeCgroup(r *guestproto.Resources) (err error) {
	dir := cgroupOf(p.id)
	if err := syscall.Mkdir(dir, 0o755); err != nil {
		return fail("make cgroup", dir, err)
	}
	if p.cgroup, err = syscall.Open(dir, syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0); err != nil {
		return fail("open cgroup", dir, err)
	}
	unpidded := *r
	unpidded.PidsMax = 0
	if err := limit(dir, &unpidded); err != nil {
		return err
	}
	if fd, err := syscall.Open(dir+"/memory.events", syscall.O_RDONLY|syscall.O_CLOEXEC, 0); err == nil {
		p.oom = fd // else this kernel counts no memory
	}
	return nil
}

// limit writes a container's limits.
func limit(dir string, r *guestproto.Resources) error {
	for _, f := range [...]struct {
		name  string
		value uint64
	}{
		{"memory.high", r.MemoryHigh}, {"memory.low", r.MemoryLow}, {"memory.swap.max", r.SwapMax},
		{"memory.max", r.MemoryMax}, {"cpu.weight", r.CPUWeight},
	} {
		if f.value == 0 {
			continue
		}
		if err := writeFile(dir+"/"+f.name, decimal(f.value)); err != nil {
			return err
		}
	}
	if r.CPUQuota != 0 || r.CPUPeriod != 0 {
		if err := writeFile(dir+"/cpu.max", cpuMax(dir, r)); err != nil {
			return err
		}
	}
	for _, f := range [...]struct{ name, value string }{{"cpuset.cpus", r.CPUs}, {"cpuset.mems", r.Nodes}} {
		if f.value == "" {
			continue
		}
		if err := writeFile(dir+"/"+f.name, f.value); err != nil {
			return err
		}
	}
	if r.PidsMax != 0 {
		if err := writeFile(dir+"/pids.max", pids(r.PidsMax)); err != nil {
			return err
		}
	}
	for _, f := range r.Unified {
		if !limitFile(f.Name) {
			return fail("set", strconv.Quote(f.Name), syscall.EPERM)
		}
		if err := writeFile(dir+"/"+f.Name, f.Value); err != nil {
			return err
		}
	}
	return nil
}

// cpuMax is what cpu.max shall hold: a period alone leaves the quota.
func cpuMax(dir string, r *guestproto.Resources) string {
	quota := decimal(r.CPUQuota)
	if r.CPUQuota == 0 {
		var buf [64]byte
		b, err := readFile(dir+"/cpu.max", buf[:])
		if quota, _ = cut(trim(b), ' '); err != nil || quota == "" {
			quota = "max"
		}
	}
	if r.CPUPeriod == 0 {
		return quota
	}
	return quota + " " + decimal(r.CPUPeriod)
}

// limitFile says whether a name is that of a controller's file, and not one
// that moves processes or changes what is counted.
func limitFile(name string) bool {
	for i := range len(name) {
		if name[i] == '/' || name[i] == 0 {
			return false
		}
	}
	for _, prefix := range [...]string{"memory.", "cpu.", "cpuset.", "pids.", "io.", "hugetlb.", "misc."} {
		if len(name) > len(prefix) && name[:len(prefix)] == prefix {
			return true
		}
	}
	return false
}

func decimal(v uint64) string {
	if v == guestproto.Unlimited {
		return "max"
	}
	return strconv.FormatUint(v, 10)
}

func pids(most uint32) string {
	if most == guestproto.UnlimitedPids {
		return "max"
	}
	return strconv.FormatUint(uint64(most), 10)
}

// update changes a container's limits. The kernel may have to reclaim memory
// for it, which takes long.
func (a *agent) update(request uint32, payload []byte) error {
	m, err := guestproto.ParseUpdate(payload)
	if err != nil {
		return err
	}
	c, err := a.container(guestproto.VerbUpdate, m.Container)
	if err != nil {
		return err
	}
	if c.phase == guestproto.PhaseSetup || c.phase == guestproto.PhaseCreated {
		m.Resources.PidsMax = 0 // its setup stage limits that, by what create said
	}
	dir := cgroupOf(c.id)
	return a.send(request, func() error { return limit(dir, &m.Resources) }, nil)
}

// container finds a container that has not ended.
func (a *agent) container(v guestproto.Verb, id uint32) (*process, error) {
	c, err := a.find(v, id)
	if err != nil {
		return nil, err
	}
	if c.container != c || c.cgroup < 0 || c.phase == guestproto.PhaseExited {
		return nil, fail(v.String(), c.name(), syscall.ESRCH)
	}
	return c, nil
}

// freezeMillis bounds how long a container's processes may take to stand still.
const freezeMillis = 5000

// freeze stops a container's processes, or lets them go on.
func (a *agent) freeze(request uint32, payload []byte) error {
	m, err := guestproto.ParseFreeze(payload)
	if err != nil {
		return err
	}
	c, err := a.container(guestproto.VerbFreeze, m.Container)
	if err != nil {
		return err
	}
	dir := cgroupOf(c.id)
	return a.send(request, func() error { return freeze(dir, m.Frozen) }, nil)
}

func freeze(dir string, frozen bool) error {
	want, value := uint64(0), "0"
	if frozen {
		want, value = 1, "1"
	}
	events, err := syscall.Open(dir+"/cgroup.events", syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return fail("open", dir+"/cgroup.events", err)
	}
	defer syscall.Close(events)
	if err := writeFile(dir+"/cgroup.freeze", value); err != nil {
		return err
	}
	for end := uptimeMicros() + freezeMillis*1000; ; {
		var buf [128]byte
		n, err := syscall.Pread(events, buf[:], 0)
		if err != nil {
			return fail("read", dir+"/cgroup.events", err)
		}
		if field(buf[:n], "frozen ") == want {
			return nil
		}
		if uptimeMicros() >= end {
			if frozen {
				_ = writeFile(dir+"/cgroup.freeze", "0") // half of it is no state to stay in
			}
			return fail("freeze", dir, syscall.ETIMEDOUT)
		}
		if _, err := poll([]pollFD{{fd: int32(events), events: pollPri}}, 50); err != nil {
			return fail("wait for", dir+"/cgroup.events", err)
		}
	}
}

// leftCgroups are those of containers that were forgotten while their last
// processes were still on their way out.
type leftCgroups struct {
	ids  []uint32
	wait int // milliseconds to the next try
}

const (
	sweepFirst = 10
	sweepMost  = 1000
)

// dropCgroup kills what is left in a container's cgroup and removes it.
func (a *agent) dropCgroup(id uint32) {
	_ = writeFile(cgroupOf(id)+"/cgroup.kill", "1")
	if err := syscall.Rmdir(cgroupOf(id)); err != syscall.EBUSY {
		return
	}
	a.left.ids, a.left.wait = append(a.left.ids, id), sweepFirst
}

// sweep removes what cgroups can be removed now, and gives the milliseconds
// after which it is worth another try; 0: nothing is left.
func (a *agent) sweep() int {
	if len(a.left.ids) == 0 {
		return 0
	}
	still := a.left.ids[:0]
	for _, id := range a.left.ids {
		if syscall.Rmdir(cgroupOf(id)) == syscall.EBUSY {
			still = append(still, id)
		}
	}
	if a.left.ids = still; len(still) == 0 {
		return 0
	}
	a.left.wait = min(a.left.wait*2, sweepMost)
	return a.left.wait
}

// top appends the processes of a container to the reply.
func (a *agent) top(payload []byte) error {
	m, err := guestproto.ParseProcessID(guestproto.VerbTop, payload)
	if err != nil {
		return err
	}
	c, err := a.container(guestproto.VerbTop, m.Process)
	if err != nil {
		return err
	}
	start, n := len(a.tx), 0
	a.tx = append(a.tx, 0, 0)
	err = listed(cgroupOf(c.id), func(pid int) {
		t := guestproto.Task{PID: uint32(pid)}
		if n < guestproto.MaxTop && readTask(&t) {
			a.tx = guestproto.AppendTask(a.tx, &t)
			n++
		}
	})
	a.tx[start], a.tx[start+1] = byte(n), byte(n>>8)
	return err
}

// readTask reads what /proc says of a process; one that ended meanwhile is
// none.
func readTask(t *guestproto.Task) bool {
	const tick = 10000 // microseconds
	dir := "/proc/" + strconv.FormatUint(uint64(t.PID), 10)
	var st syscall.Stat_t
	var buf [512]byte
	if syscall.Stat(dir, &st) != nil {
		return false
	}
	b, err := readFile(dir+"/stat", buf[:])
	if err != nil {
		return false
	}
	// "pid (name) state parent …": the name may hold anything.
	open, end := 0, 0
	for i, c := range b {
		if c == '(' && open == 0 {
			open = i + 1
		}
		if c == ')' {
			end = i
		}
	}
	if open == 0 || end < open {
		return false
	}
	t.UID, t.Name = st.Uid, string(b[open:end])
	rest := string(b[end+1:])
	_, rest = cut(rest, ' ')
	for i := 3; i <= 24 && rest != ""; i++ {
		var f string
		f, rest = cut(rest, ' ')
		v := number([]byte(f))
		switch i {
		case 4:
			t.Parent = uint32(v)
		case 14, 15:
			t.CPUMicros += v * tick
		case 24:
			t.Resident = v << 12
		}
	}
	return true
}
