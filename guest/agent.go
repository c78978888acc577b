package guest

import (
	"strconv"
	"syscall"

	"hauberk.dev/api/guestproto"
)

const (
	// reserve is the room an answer may need; while there is less, no request
	// is read. It covers a process' whole log.
	reserve = guestproto.LogBytes + 32<<10
	// txSize holds that and what the processes and the Guard have to say.
	txSize = reserve + 96<<10
	// writeMost keeps the kernel from buffering more than 128 (its queue)
	// times this for a host that does not read.
	writeMost = 16 << 10
	// awayMillis is how often the agent looks at a port that no host is
	// connected to, should it have missed that one came.
	awayMillis = 1000

	maxPolls = 4 + guestproto.MaxProcesses*6
)

// agent is all there is: one loop, no locks. What may take long is an errand.
type agent struct {
	port      int
	wake      int // epoll descriptor that holds port, edge-triggered
	guard     guestproto.GuardState
	guardText string
	selfPIDNS int // to come back from a container's PID namespace
	spare     spare

	// rx[:rxLen] is what came and was not understood yet; tx[txHead:] is what
	// was not taken yet. Both are mapped, so that untouched pages cost nothing.
	rx     []byte
	rxLen  int
	tx     []byte
	txHead int
	// session is true between a hello and the host's leaving; broken, from a
	// frame that cannot be understood until the host leaves.
	session  bool
	sessions uint32 // begun so far
	broken   bool
	// away is true while no host is connected: poll on the port would return
	// at once then, so the agent waits for wake.
	away bool

	processes   [guestproto.MaxProcesses]process
	lastID      uint32
	roots       [guestproto.MaxRoots]root
	dirs        [guestproto.MaxDirs]dir
	shares      [guestproto.MaxShares]string
	errands     errands
	reaper      reaper
	left        leftCgroups
	disks       []disk // known so far
	machineID   string
	guardCredit uint32
	guardRoom   int  // of the batch being filled
	guardFull   bool // a record was longer than the credit left
	emit        func(record []byte) bool
	stopping    bool

	polls  []pollFD
	owners []owner // of polls, beside them
}

// owner says what a poll entry is for.
type owner struct {
	p    *process
	what what
}

type what uint8

const (
	forPort what = iota
	forWake
	forGuard
	forSetup
	forExit
	forStdout
	forStderr
	forStdin
	forOOM
	forErrands
)

func newAgent() (*agent, error) {
	a := &agent{
		port:   -1,
		reaper: reaper{pidfd: -1},
		polls:  make([]pollFD, 0, maxPolls),
		owners: make([]owner, 0, maxPolls),

		left: leftCgroups{ids: make([]uint32, 0, guestproto.MaxProcesses)},
	}
	a.emit = a.emitRecord
	var err error
	if a.rx, err = mapMemory(guestproto.MaxFrame + 4); err != nil {
		return nil, fail("map", "receive buffer", err)
	}
	if a.tx, err = mapMemory(txSize); err != nil {
		return nil, fail("map", "send buffer", err)
	}
	a.tx = a.tx[:0]
	if a.selfPIDNS, err = syscall.Open("/proc/self/ns/pid", syscall.O_RDONLY|syscall.O_CLOEXEC, 0); err != nil {
		return nil, fail("open", "/proc/self/ns/pid", err)
	}
	return a, a.errands.open()
}

// serve runs until the host shuts the guest down.
func (a *agent) serve() error {
	for {
		a.understand()
		a.notify()
		a.recount()
		if err := a.flush(); err != nil {
			return err
		}
		if a.stopping && a.txHead == len(a.tx) {
			return shutdown()
		}
		a.gather()
		timeout := -1
		if a.away {
			timeout = awayMillis
		}
		if soon := a.sweep(); soon > 0 {
			timeout = soon
		}
		n, err := poll(a.polls, timeout)
		if err != nil {
			return fail("poll", "descriptors", err)
		}
		if n == 0 {
			a.away = false
		}
		if err := a.dispatch(); err != nil {
			return err
		}
	}
}

// room is how much more tx can take.
func (a *agent) room() int { return cap(a.tx) - len(a.tx) }

// compact moves what is not sent yet to the front of tx.
func (a *agent) compact() {
	if a.txHead == len(a.tx) {
		a.tx, a.txHead = a.tx[:0], 0
	}
	if a.txHead > 0 && a.room() < reserve+guestproto.MaxChunk {
		n := copy(a.tx[:cap(a.tx)], a.tx[a.txHead:])
		a.tx, a.txHead = a.tx[:n], 0
	}
}

// gather lists what to wait for. What nobody has room or credit for is not
// listed: its writer waits.
func (a *agent) gather() {
	a.compact()
	a.polls, a.owners = a.polls[:0], a.owners[:0]
	if a.away {
		a.watch(a.wake, pollIn, nil, forWake)
	} else {
		events := int16(0)
		if a.room() >= reserve || a.broken {
			events |= pollIn
		}
		if a.txHead < len(a.tx) {
			events |= pollOut
		}
		a.watch(a.port, events, nil, forPort)
	}
	if a.room() >= reserve {
		a.watch(a.errands.wake, pollIn, nil, forErrands)
	}
	speak := a.session && a.room() >= reserve+guestproto.MaxChunk
	if ring := guardRing(); ring >= 0 && speak && a.guardCredit > 0 && !a.guardFull {
		a.watch(ring, pollIn, nil, forGuard)
	}
	for i := range a.processes {
		p := &a.processes[i]
		if p.id == 0 {
			continue
		}
		a.watch(p.setup, pollIn, p, forSetup)
		a.watch(p.pidfd, pollIn, p, forExit)
		a.watch(p.oom, pollPri, p, forOOM)
		if len(p.input) > 0 {
			a.watch(p.stdin, pollOut, p, forStdin)
		}
		if !speak || !p.attached {
			continue
		}
		if p.out[0].credit > 0 {
			a.watch(p.out[0].fd, pollIn, p, forStdout)
		}
		if p.out[1].credit > 0 {
			a.watch(p.out[1].fd, pollIn, p, forStderr)
		}
	}
}

func (a *agent) watch(fd int, events int16, p *process, w what) {
	if fd >= 0 {
		a.polls = append(a.polls, pollFD{fd: int32(fd), events: events})
		a.owners = append(a.owners, owner{p, w})
	}
}

// dispatch does what poll found to do. A process that an earlier entry freed
// is passed over: its descriptors are -1 then.
func (a *agent) dispatch() error {
	exited := false
	for i := range a.polls {
		events, o := a.polls[i].revents, a.owners[i]
		if events == 0 {
			continue
		}
		switch o.what {
		case forPort:
			if err := a.portReady(events); err != nil {
				return err
			}
		case forWake:
			a.away = a.stillAway()
		case forGuard:
			a.sendRecords()
		case forSetup:
			a.setupReady(o.p)
		case forExit:
			exited = true
		case forStdout:
			a.sendOutput(o.p, 0)
		case forStderr:
			a.sendOutput(o.p, 1)
		case forStdin:
			a.feed(o.p)
		case forOOM:
			a.sendOOM(o.p)
		case forErrands:
			a.errandsBack()
		}
	}
	if exited {
		a.reap()
	}
	return nil
}

// portReady reads what the host sent and answers it.
func (a *agent) portReady(events int16) error {
	if events&(pollIn|pollHup) == 0 {
		return nil
	}
	for {
		n, err := syscall.Read(a.port, a.rx[a.rxLen:])
		switch {
		case err == syscall.EINTR:
			continue
		case err == syscall.EAGAIN:
			return nil
		case err != nil:
			return fail("read", "port "+portName, err)
		case n == 0:
			a.hangUp()
			return nil
		}
		if a.rxLen += n; a.broken {
			a.rxLen = 0
			continue
		}
		a.understand()
		if a.room() < reserve {
			return nil
		}
	}
}

// hangUp forgets a host that left. Processes run on; their output waits.
func (a *agent) hangUp() {
	a.session, a.broken = false, false
	a.rxLen, a.tx, a.txHead = 0, a.tx[:0], 0
	a.withdraw()
	a.away = true
	a.away = a.stillAway()
}

// withdraw takes back what a host was promised or had promised.
func (a *agent) withdraw() {
	a.guardCredit, a.guardFull = 0, false
	for i := range a.processes {
		a.processes[i].detach()
	}
}

// stillAway takes what woke the agent and looks at the port.
func (a *agent) stillAway() bool {
	var events [1]syscall.EpollEvent
	n, err := syscall.EpollWait(a.wake, events[:], 0)
	return err != nil || n < 1 || events[0].Events&pollHup != 0
}

// understand takes whole frames off the front of rx. It stops when tx might
// not hold the next answer.
func (a *agent) understand() {
	at, large := 0, false
	for !a.broken && a.rxLen-at >= guestproto.HeaderSize && a.room() >= reserve {
		h, err := guestproto.ParseHeader(a.rx[at:a.rxLen])
		if err != nil {
			a.broken = true
			break
		}
		end := at + 4 + int(h.Length)
		if end > a.rxLen {
			break
		}
		large = large || h.Length > guestproto.LogBytes
		a.answer(h, a.rx[at+guestproto.HeaderSize:end])
		at = end
		a.compact()
	}
	if a.broken {
		a.rxLen = 0
		return
	}
	a.rxLen = copy(a.rx, a.rx[at:a.rxLen])
	if large && a.rxLen == 0 {
		const dontNeed = 4
		_ = syscall.Madvise(a.rx, dontNeed) // give a large frame's pages back
	}
}

// flush gives the port what it takes.
func (a *agent) flush() error {
	for !a.away && a.txHead < len(a.tx) {
		n, err := syscall.Write(a.port, a.tx[a.txHead:min(len(a.tx), a.txHead+writeMost)])
		switch err {
		case nil:
			a.txHead += n
		case syscall.EINTR:
		case syscall.EAGAIN:
			return nil
		default:
			return fail("write", "port "+portName, err)
		}
	}
	return nil
}

// answer carries out one frame of the host.
func (a *agent) answer(h guestproto.Header, payload []byte) {
	if h.Verb == guestproto.VerbHello {
		a.hello(h, payload)
		return
	}
	if !a.session {
		a.broken = true
		return
	}
	if later, err := a.begin(h, payload); later {
		if err != nil {
			a.refuse(h.ID, err)
		}
		return
	}
	start, size := len(a.tx), cap(a.tx)
	a.tx = guestproto.Begin(a.tx, h.ID, guestproto.VerbReply)
	err := a.do(h, payload)
	if cap(a.tx) != size { // the reply outgrew the buffer and moved away from it
		panic("a reply is longer than the room kept for it")
	}
	if err != nil {
		a.tx = a.tx[:start]
		a.refuse(h.ID, err)
		return
	}
	guestproto.End(a.tx, start)
}

// begin carries out a verb that answers by itself, at once or later, and says
// whether it is one.
func (a *agent) begin(h guestproto.Header, payload []byte) (later bool, err error) {
	switch h.Verb {
	case guestproto.VerbCreate:
		return true, a.create(h.ID, payload)
	case guestproto.VerbStart:
		return true, a.start(h.ID, payload)
	case guestproto.VerbExec:
		return true, a.exec(h.ID, payload)
	case guestproto.VerbStdin:
		return true, a.stdin(h.ID, payload)
	case guestproto.VerbCredit:
		return true, a.credit(payload)
	case guestproto.VerbCopy:
		return true, a.copy(h.ID, payload)
	case guestproto.VerbMountRoot:
		return true, a.mountRoot(h.ID, payload)
	case guestproto.VerbUnmountRoot:
		return true, a.unmountRoot(h.ID, payload)
	case guestproto.VerbMakeDir:
		return true, a.makeDir(h.ID, payload)
	case guestproto.VerbRemoveDir:
		return true, a.removeDir(h.ID, payload)
	case guestproto.VerbMountShare:
		return true, a.mountShare(h.ID, payload)
	case guestproto.VerbUpdate:
		return true, a.update(h.ID, payload)
	case guestproto.VerbFreeze:
		return true, a.freeze(h.ID, payload)
	}
	return false, nil
}

// refuse answers a request with an error.
func (a *agent) refuse(id uint32, err error) {
	m := guestproto.Refusal{Errno: uint32(syscall.EINVAL), Text: err.Error()}
	switch e := err.(type) {
	case *failure:
		m.Errno = uint32(e.errno)
	case syscall.Errno:
		m.Errno = uint32(e)
	}
	start := len(a.tx)
	a.tx = m.Append(guestproto.Begin(a.tx, id, guestproto.VerbError))
	guestproto.End(a.tx, start)
}

// do carries out a verb and appends its reply's payload to tx.
func (a *agent) do(h guestproto.Header, payload []byte) error {
	switch h.Verb {
	case guestproto.VerbReseed:
		return a.reseed(payload)
	case guestproto.VerbRescan:
		return writeFile("/sys/bus/pci/rescan", "1")
	case guestproto.VerbNetwork:
		return configure(payload)
	case guestproto.VerbInterfaces:
		return a.interfaces()
	case guestproto.VerbRoutes:
		return a.routes()
	case guestproto.VerbPush:
		return a.push(payload)
	case guestproto.VerbPull:
		return a.pull(payload)
	case guestproto.VerbTop:
		return a.top(payload)
	case guestproto.VerbSignal:
		return a.signal(payload)
	case guestproto.VerbResize:
		return a.resize(payload)
	case guestproto.VerbCloseStdin:
		return a.closeStdin(payload)
	case guestproto.VerbStats:
		return a.stats()
	case guestproto.VerbGuardPolicy:
		return a.guardPolicy(payload)
	case guestproto.VerbGuardStatus:
		return a.appendReply(h.Verb, guardStatus(nil))
	case guestproto.VerbPing:
		return a.appendReply(h.Verb, payload)
	case guestproto.VerbShutdown:
		a.stopping = true
		return nil
	case guestproto.VerbProcesses:
		a.list()
		return nil
	case guestproto.VerbAttach:
		return a.attach(payload)
	case guestproto.VerbForget:
		return a.forget(payload)
	case guestproto.VerbLogs:
		return a.logs(payload)
	}
	return fail("answer", h.Verb.String(), syscall.ENOSYS)
}

// appendReply appends what another room or the host made, if it is not too
// long.
func (a *agent) appendReply(v guestproto.Verb, b []byte) error {
	if len(b) > guestproto.MaxChunk {
		return fail(v.String(), "reply of "+strconv.Itoa(len(b))+" bytes", syscall.EMSGSIZE)
	}
	a.tx = append(a.tx, b...)
	return nil
}

// hello starts a session afresh: what an older one left is dropped.
func (a *agent) hello(h guestproto.Header, payload []byte) {
	m, err := guestproto.ParseHelloRequest(payload)
	if err != nil {
		a.broken = true
		return
	}
	a.tx, a.txHead = append(a.tx[:0], m.Nonce[:]...), 0
	a.withdraw()
	a.sessions++
	if a.session = m.Version == guestproto.Version; !a.session {
		a.refuse(h.ID, fail("serve protocol version", strconv.Itoa(int(m.Version)), syscall.EPROTONOSUPPORT))
		return
	}
	start := len(a.tx)
	a.tx = guestproto.Begin(a.tx, h.ID, guestproto.VerbReply)
	reply := guestproto.Hello{
		Version: guestproto.Version, Release: kernelRelease(), BootID: bootID(), Build: Build,
		Guard: a.guard, GuardText: a.guardText, BootMicros: uptimeMicros(),
	}
	a.tx = reply.Append(a.tx)
	guestproto.End(a.tx, start)
}

func kernelRelease() string {
	var buf [128]byte
	b, err := readFile("/proc/sys/kernel/osrelease", buf[:])
	if err != nil {
		return ""
	}
	return trim(b)
}

func bootID() string {
	var buf [64]byte
	b, err := readFile("/proc/sys/kernel/random/boot_id", buf[:])
	if err != nil {
		return ""
	}
	return trim(b)
}

// shutdown ends everything. It does not return on success: the kernel stops
// the machine, or resets it, which QEMU takes for a stop.
func shutdown() error {
	_ = syscall.Kill(-1, syscall.SIGKILL)
	syscall.Sync()
	_ = syscall.Reboot(syscall.LINUX_REBOOT_CMD_RESTART)
	return fail("reboot", "guest", syscall.EIO)
}

// guardPolicy puts a policy in force and appends the Guard's reply.
func (a *agent) guardPolicy(payload []byte) error {
	m, err := guestproto.ParseGuardPolicy(payload)
	if err != nil {
		return err
	}
	reply, err := guardPolicy(m.Generation, m.Blob)
	if err != nil {
		return fail("put in force guard policy", strconv.FormatUint(m.Generation, 10), err)
	}
	return a.appendReply(guestproto.VerbGuardPolicy, reply)
}

// recount sends how often records were repeated, which no ring announces.
func (a *agent) recount() {
	if a.session && a.guardCredit > 0 && !a.guardFull && a.room() >= reserve+guestproto.MaxChunk && guardRecounts() {
		a.sendRecords()
	}
}

// sendRecords sends one batch of the Guard's records, within its credit.
func (a *agent) sendRecords() {
	const prefix = guestproto.HeaderSize
	a.guardRoom = min(int(a.guardCredit), a.room()-reserve-prefix, guestproto.MaxChunk)
	start := len(a.tx)
	a.tx = guestproto.Begin(a.tx, 0, guestproto.VerbGuardEvents)
	guardDrain(a.emit)
	if sent := len(a.tx) - start - prefix; sent > 0 {
		guestproto.End(a.tx, start)
		a.guardCredit -= uint32(sent)
		return
	}
	a.tx = a.tx[:start]
}

func (a *agent) emitRecord(record []byte) bool {
	n := guestproto.RecordPrefix + len(record)
	if n > guestproto.MaxChunk {
		return true // no batch could ever carry it
	}
	if n > a.guardRoom {
		// Without more credit, waiting for the ring would spin.
		a.guardFull = n > int(a.guardCredit)
		return false
	}
	a.guardRoom -= n
	a.tx = guestproto.AppendRecord(a.tx, record)
	return true
}
