package guestproto

// Unlimited takes a limit away, where 0 leaves it as it is.
const Unlimited = 1<<64 - 1

// UnlimitedPids does so for the number of processes.
const UnlimitedPids = 1<<32 - 1

// Rights are the capability sets of a program, one bit a capability, as the
// kernel numbers them. Not given, root has the agent's default and anyone else
// none.
type Rights struct {
	Given                                                bool
	Bounding, Effective, Permitted, Inheritable, Ambient uint64
}

// Rlimit is one of setrlimit(2), by the kernel's number.
type Rlimit struct {
	Kind       uint8
	Soft, Hard uint64
}

// MaxRlimit is the highest number of a resource limit.
const MaxRlimit = 15

// SeccompMode says which filter of system calls a program runs under.
type SeccompMode uint8

// The modes of seccomp.
const (
	SeccompDefault SeccompMode = iota // the agent's own, of a few calls
	SeccompNone
	SeccompFilter // the one given, and it alone
)

// Seccomp is a filter of system calls. It is installed as the last thing
// before the exec, or, with NewPrivileges, before the rights are dropped, for
// then it needs them.
type Seccomp struct {
	Mode   SeccompMode
	Flags  uint32 // SECCOMP_FILTER_FLAG_*
	Filter []byte // of struct sock_filter; lies in what was parsed
}

// Program is what to run and as whom.
type Program struct {
	Args []string // the first is looked up in the PATH of Env
	Env  []string
	Cwd  string // made if it is missing; "/" if empty
	// User is resolved in the container's own /etc/passwd and /etc/group:
	// "name", "name:group", "uid", "uid:gid". Empty: UID, GID and Groups.
	User   string
	UID    uint32
	GID    uint32
	Groups []uint32
	TTY    bool // one terminal; its output is StreamStdout
	Rows   uint16
	Cols   uint16

	Rights        Rights
	NewPrivileges bool // it may gain some by its exec: no_new_privs is not set
	Rlimits       []Rlimit
	Umask         uint32 // used if UmaskGiven; else 022
	UmaskGiven    bool
	OOMScoreAdj   int32
	Seccomp       Seccomp
}

// Append appends p to b.
func (p *Program) Append(b []byte) []byte {
	b = appendStrings(b, p.Args)
	b = appendStrings(b, p.Env)
	b = appendString(b, p.Cwd)
	b = appendString(b, p.User)
	b = appendU32(appendU32(b, p.UID), p.GID)
	b = appendU16(b, uint16(len(p.Groups)))
	for _, g := range p.Groups {
		b = appendU32(b, g)
	}
	b = appendBool(b, p.TTY)
	b = appendU16(appendU16(b, p.Rows), p.Cols)
	b = p.Rights.append(b)
	b = appendBool(b, p.NewPrivileges)
	b = appendU16(b, uint16(len(p.Rlimits)))
	for _, l := range p.Rlimits {
		b = appendU64(appendU64(append(b, l.Kind), l.Soft), l.Hard)
	}
	b = appendBool(appendU32(b, p.Umask), p.UmaskGiven)
	b = appendU32(b, uint32(p.OOMScoreAdj))
	b = appendU32(append(b, byte(p.Seccomp.Mode)), p.Seccomp.Flags)
	return appendBytes(b, p.Seccomp.Filter)
}

func (g *Rights) append(b []byte) []byte {
	b = appendBool(b, g.Given)
	for _, set := range [...]uint64{g.Bounding, g.Effective, g.Permitted, g.Inheritable, g.Ambient} {
		b = appendU64(b, set)
	}
	return b
}

func (r *reader) program() (p Program) {
	p.Args, p.Env = r.strings(), r.strings()
	p.Cwd, p.User = r.string(), r.string()
	p.UID, p.GID = r.u32(), r.u32()
	n := r.count(4)
	p.Groups = listOf[uint32](r, n)
	for range n {
		if g := r.u32(); !r.dry {
			p.Groups = append(p.Groups, g)
		}
	}
	p.TTY = r.bool()
	p.Rows, p.Cols = r.u16(), r.u16()
	p.Rights = Rights{r.bool(), r.u64(), r.u64(), r.u64(), r.u64(), r.u64()}
	p.NewPrivileges = r.bool()
	n = r.count(17)
	p.Rlimits = listOf[Rlimit](r, n)
	for range n {
		l := Rlimit{r.u8(), r.u64(), r.u64()}
		if l.Kind > MaxRlimit {
			r.fail("no such resource limit")
		}
		if !r.dry {
			p.Rlimits = append(p.Rlimits, l)
		}
	}
	p.Umask, p.UmaskGiven = r.u32(), r.bool()
	p.OOMScoreAdj = int32(r.u32())
	p.Seccomp = Seccomp{SeccompMode(r.u8()), r.u32(), r.bytes()}
	r.checkProgram(&p)
	return p
}

func (r *reader) checkProgram(p *Program) {
	s := &p.Seccomp
	switch {
	case r.cause != "":
	case len(p.Args) == 0 && !r.dry:
		r.fail("no program is named")
	case p.Umask&^0o777 != 0:
		r.fail("the umask has more than the bits of a mode")
	case s.Mode > SeccompFilter, (s.Mode == SeccompFilter) != (len(s.Filter) > 0), len(s.Filter)%8 != 0, len(s.Filter) > MaxFilter*8:
		r.fail("the seccomp filter is none")
	}
	if len(s.Filter) == 0 {
		s.Filter = nil
	}
}

// File is written into a container before its program starts, in place of
// whatever the image has there.
type File struct {
	Path string // absolute
	Mode uint32
	Data []byte
}

// Setting is a name and its value: of a sysctl or of a file of a cgroup.
type Setting struct{ Name, Value string }

func appendSettings(b []byte, list []Setting) []byte {
	b = appendU16(b, uint16(len(list)))
	for _, s := range list {
		b = appendString(appendString(b, s.Name), s.Value)
	}
	return b
}

func (r *reader) settings() (list []Setting) {
	n := r.count(4)
	list = listOf[Setting](r, n)
	for range n {
		s := Setting{r.string(), r.string()}
		if !r.dry {
			list = append(list, s)
		}
	}
	return list
}

// Resources are a container's limits. What is 0 or empty is left as it is: at
// the start without a limit.
type Resources struct {
	MemoryMax  uint64 // bytes, as all of memory; Unlimited takes it away
	MemoryHigh uint64
	MemoryLow  uint64
	SwapMax    uint64
	CPUWeight  uint64 // 1 to 10000
	CPUQuota   uint64 // microseconds of each period; Unlimited takes it away
	CPUPeriod  uint64 // microseconds; 0 is 100000
	CPUs       string // a list as "0-1,3"
	Nodes      string // of memory
	PidsMax    uint32 // UnlimitedPids takes it away
	// Unified are files of the cgroup, written after all else.
	Unified []Setting
}

// Append appends m to b.
func (m *Resources) Append(b []byte) []byte {
	for _, v := range [...]uint64{m.MemoryMax, m.MemoryHigh, m.MemoryLow, m.SwapMax, m.CPUWeight, m.CPUQuota, m.CPUPeriod} {
		b = appendU64(b, v)
	}
	b = appendString(appendString(b, m.CPUs), m.Nodes)
	return appendSettings(appendU32(b, m.PidsMax), m.Unified)
}

func (r *reader) resources() (m Resources) {
	for _, v := range [...]*uint64{&m.MemoryMax, &m.MemoryHigh, &m.MemoryLow, &m.SwapMax, &m.CPUWeight, &m.CPUQuota, &m.CPUPeriod} {
		*v = r.u64()
	}
	m.CPUs, m.Nodes = r.string(), r.string()
	m.PidsMax, m.Unified = r.u32(), r.settings()
	return m
}

// MountKind says where what is mounted comes from.
type MountKind uint8

// The kinds of mounts.
const (
	MountFS    MountKind = iota // a file system of the kernel: FS, Data
	MountBind                   // Source: a path in the container
	MountPod                    // Source: a directory of the pod, "name" or "name/path/below"
	MountShare                  // Source: a share of the host, "tag" or "tag/path/below"
	MountDisk                   // Source: the serial of a disk; FS, Data
)

// Mount is one of a container. Its target is made if it is missing: a
// directory, or for a source that is none a file. Symbolic links on the way to
// the target are followed inside the container; below a pod's directory or a
// share none is followed at all.
type Mount struct {
	Kind   MountKind
	Target string // absolute
	Source string
	FS     string
	Data   string
	Flags  uint32 // MS_* of mount(2): MS_REC of a bind takes the mounts below along
	// Recursive are MS_* that hold for the mounts below, too: with MS_RDONLY
	// nothing there can be written, however it was mounted.
	Recursive uint32
	// Propagation is MS_PRIVATE, MS_SLAVE, MS_SHARED or MS_UNBINDABLE, and
	// perhaps MS_REC; 0 is private.
	Propagation uint32
}

func (m *Mount) append(b []byte) []byte {
	b = append(b, byte(m.Kind))
	for _, s := range [...]string{m.Target, m.Source, m.FS, m.Data} {
		b = appendString(b, s)
	}
	return appendU32(appendU32(appendU32(b, m.Flags), m.Recursive), m.Propagation)
}

func (r *reader) mounts() (list []Mount) {
	n := r.count(1 + 4*2 + 3*4)
	list = listOf[Mount](r, n)
	for range n {
		m := Mount{MountKind(r.u8()), r.string(), r.string(), r.string(), r.string(), r.u32(), r.u32(), r.u32()}
		if m.Kind > MountDisk {
			r.fail("no such kind of mount")
		}
		if !r.dry {
			list = append(list, m)
		}
	}
	return list
}

// Device is a node in a container's /dev, or elsewhere on a file system made
// for the container. The container may use the device behind it.
type Device struct {
	Path         string // absolute
	Kind         byte   // 'b', 'c' or 'p'
	Major, Minor uint32
	// Serial names a disk of the pod instead of a number.
	Serial   string
	Mode     uint32
	UID, GID uint32
}

func (d *Device) append(b []byte) []byte {
	b = append(appendString(b, d.Path), d.Kind)
	b = appendString(appendU32(appendU32(b, d.Major), d.Minor), d.Serial)
	return appendU32(appendU32(appendU32(b, d.Mode), d.UID), d.GID)
}

func (r *reader) devices() (list []Device) {
	n := r.count(2 + 1 + 8 + 2 + 12)
	list = listOf[Device](r, n)
	for range n {
		d := Device{r.string(), r.u8(), r.u32(), r.u32(), r.string(), r.u32(), r.u32(), r.u32()}
		if d.Kind != 'b' && d.Kind != 'c' && d.Kind != 'p' {
			r.fail("no such kind of device")
		}
		if !r.dry {
			list = append(list, d)
		}
	}
	return list
}

// PIDMode says which processes a container sees.
type PIDMode uint8

// The modes of a container's PID namespace.
const (
	PIDOwn       PIDMode = iota
	PIDPod               // one for all containers of the guest that ask for it
	PIDContainer         // that of the container PIDOf
)

// Create makes a container on a mounted root and its first process up to, but
// not including, the execve. The reply is a ProcessID. All containers of a
// guest share its network, its IPC and its UTS namespace.
type Create struct {
	Root       uint8
	Hostname   string // of all containers of the guest
	Domainname string
	KeepLog    bool // remember the last LogBytes of output
	Resources  Resources
	Files      []File
	Program    Program

	// Mounts, if there are any, replace the agent's own, and then Masked and
	// ReadOnly do so too. A tmpfs at /dev is filled with the usual devices.
	Mounts          []Mount
	Masked          []string
	ReadOnly        []string
	Devices         []Device
	Sysctls         []Setting // those of a namespace, by name or path
	ReadOnlyRoot    bool
	RootPropagation uint32 // as in Mount
	PID             PIDMode
	PIDOf           uint32
}

// Append appends the payload to b.
func (m *Create) Append(b []byte) []byte {
	b = appendString(appendString(append(b, m.Root), m.Hostname), m.Domainname)
	b = appendBool(b, m.KeepLog)
	b = m.Resources.Append(b)
	b = appendU16(b, uint16(len(m.Files)))
	for _, f := range m.Files {
		b = appendBytes(appendU32(appendString(b, f.Path), f.Mode), f.Data)
	}
	b = m.Program.Append(b)
	b = appendU16(b, uint16(len(m.Mounts)))
	for i := range m.Mounts {
		b = m.Mounts[i].append(b)
	}
	b = appendStrings(appendStrings(b, m.Masked), m.ReadOnly)
	b = appendU16(b, uint16(len(m.Devices)))
	for i := range m.Devices {
		b = m.Devices[i].append(b)
	}
	b = appendSettings(b, m.Sysctls)
	b = appendU32(appendBool(b, m.ReadOnlyRoot), m.RootPropagation)
	return appendU32(append(b, byte(m.PID)), m.PIDOf)
}

// ParseCreate reads the payload of a create. The files' data lies in b.
func ParseCreate(b []byte) (Create, error) { return parseCreate(reader{b: b}) }

// CheckCreate reads the same, takes no memory but for the limits, and leaves
// everything else that is a string or a list away.
func CheckCreate(b []byte) (Create, error) { return parseCreate(reader{b: b, dry: true}) }

func parseCreate(r reader) (m Create, err error) {
	m.Root, m.Hostname, m.Domainname = r.u8(), r.string(), r.string()
	m.KeepLog = r.bool()
	dry := r.dry
	r.dry = false
	m.Resources = r.resources()
	r.dry = dry
	n := r.count(2 + 4 + 4)
	m.Files = listOf[File](&r, n)
	for range n {
		f := File{r.string(), r.u32(), r.bytes()}
		if !r.dry {
			m.Files = append(m.Files, f)
		}
	}
	m.Program = r.program()
	m.Mounts = r.mounts()
	m.Masked, m.ReadOnly = r.strings(), r.strings()
	m.Devices, m.Sysctls = r.devices(), r.settings()
	m.ReadOnlyRoot, m.RootPropagation = r.bool(), r.u32()
	m.PID, m.PIDOf = PIDMode(r.u8()), r.u32()
	if m.Root >= MaxRoots {
		r.fail("the root's number is too high")
	}
	if m.PID > PIDContainer || (m.PID == PIDContainer) != (m.PIDOf != 0) {
		r.fail("no such mode of the PID namespace")
	}
	return m, r.end("create")
}

// Exec runs one more process in a container that was started. The reply is a
// ProcessID, sent when the program runs.
type Exec struct {
	Container uint32 // the process that Create returned
	Program   Program
}

// Append appends the payload to b.
func (m *Exec) Append(b []byte) []byte { return m.Program.Append(appendU32(b, m.Container)) }

// ParseExec reads the payload of an exec.
func ParseExec(b []byte) (Exec, error) { return parseExec(reader{b: b}) }

// CheckExec reads the same and leaves every string and list away.
func CheckExec(b []byte) (Exec, error) { return parseExec(reader{b: b, dry: true}) }

func parseExec(r reader) (m Exec, err error) {
	m.Container = r.u32()
	m.Program = r.program()
	return m, r.end("exec")
}

// Update changes the limits of a container that runs.
type Update struct {
	Container uint32
	Resources Resources
}

// Append appends the payload to b.
func (m *Update) Append(b []byte) []byte { return m.Resources.Append(appendU32(b, m.Container)) }

// ParseUpdate reads the payload of an update.
func ParseUpdate(b []byte) (m Update, err error) {
	r := reader{b: b}
	m.Container, m.Resources = r.u32(), r.resources()
	return m, r.end("update")
}

// Freeze stops every process of a container, or lets them go on. It is
// answered when they stand still or may run. SIGKILL ends them all the same.
type Freeze struct {
	Container uint32
	Frozen    bool
}

// Append appends the payload to b.
func (m *Freeze) Append(b []byte) []byte { return appendBool(appendU32(b, m.Container), m.Frozen) }

// ParseFreeze reads the payload of a freeze.
func ParseFreeze(b []byte) (m Freeze, err error) {
	r := reader{b: b}
	m.Container, m.Frozen = r.u32(), r.bool()
	return m, r.end("freeze")
}

// Task is a process of a container, whoever started it.
type Task struct {
	PID       uint32 // as the agent sees it
	Parent    uint32
	UID       uint32
	Resident  uint64 // bytes
	CPUMicros uint64
	Name      string
}

// AppendTasks appends the reply to top to b.
func AppendTasks(b []byte, list []Task) []byte {
	b = appendU16(b, uint16(len(list)))
	for i := range list {
		b = AppendTask(b, &list[i])
	}
	return b
}

// AppendTask appends one task to a list whose length was written before.
func AppendTask(b []byte, t *Task) []byte {
	b = appendU32(appendU32(appendU32(b, t.PID), t.Parent), t.UID)
	return appendString(appendU64(appendU64(b, t.Resident), t.CPUMicros), t.Name)
}

// ParseTasks reads the reply to top.
func ParseTasks(b []byte) (list []Task, err error) {
	r := reader{b: b}
	n := r.count(3*4 + 2*8 + 2)
	if n > MaxTop {
		r.fail("more processes than are listed")
		n = 0
	}
	for range n {
		list = append(list, Task{r.u32(), r.u32(), r.u32(), r.u64(), r.u64(), r.string()})
	}
	return list, r.end("top reply")
}
