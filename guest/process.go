package guest

import (
	"strconv"
	"syscall"

	"hauberk.dev/api/guestproto"
)

// process is one that the host asked for. Its slot is free when id is 0.
type process struct {
	id        uint32
	container *process // itself, if it is a container's first process
	phase     guestproto.Phase
	pid       int
	pidfd     int // until it is reaped
	setup     int // socket to its setup stage, until that has exec'd
	// request is what the host waits for: create until the setup stage is
	// ready, start or exec until the program runs.
	request    uint32
	code       uint8
	sig        uint8
	tty        bool
	attached   bool // the host wants its events
	exitSent   bool
	out        [2]stream
	stdin      int
	input      []byte // what stdin did not take yet
	inputSpace []byte // mapped
	inputReq   uint32
	log        *history // nil: none is kept

	// Of a container only.
	root     uint8
	cgroup   int // directory
	oom      int // its memory.events
	oomKills uint32
}

// stream is an output of a process.
type stream struct {
	fd      int // -1 after its end
	credit  uint32
	endSent bool
}

// clear makes the slot free.
func (p *process) clear() {
	*p = process{pidfd: -1, setup: -1, stdin: -1, cgroup: -1, oom: -1, out: [2]stream{{fd: -1}, {fd: -1}}}
}

// detach forgets what the host was sent and may be sent.
func (p *process) detach() {
	p.attached, p.exitSent = false, false
	p.request = 0
	// What is left of the input is written all the same; nobody waits for it.
	p.inputReq = 0
	for i := range p.out {
		p.out[i].credit, p.out[i].endSent = 0, false
	}
}

func closeFD(fd *int) {
	if *fd >= 0 {
		_ = syscall.Close(*fd)
		*fd = -1
	}
}

// name is how errors speak of it.
func (p *process) name() string { return "process " + strconv.FormatUint(uint64(p.id), 10) }

// find gives the process with the number, for a verb.
func (a *agent) find(v guestproto.Verb, id uint32) (*process, error) {
	for i := range a.processes {
		if p := &a.processes[i]; p.id == id && id != 0 {
			return p, nil
		}
	}
	return nil, fail(v.String(), "process "+strconv.FormatUint(uint64(id), 10), syscall.ESRCH)
}

// free gives an empty slot.
func (a *agent) free(v guestproto.Verb) (*process, error) {
	for i := range a.processes {
		if p := &a.processes[i]; p.id == 0 {
			p.clear()
			return p, nil
		}
	}
	return nil, fail(v.String(), "process: table of "+strconv.Itoa(guestproto.MaxProcesses), syscall.EAGAIN)
}

// notify sends what the host should know and was not told for want of room.
func (a *agent) notify() {
	for i := range a.processes {
		p := &a.processes[i]
		if !a.session || p.id == 0 || !p.attached || a.room() < reserve+256 {
			continue
		}
		if p.phase == guestproto.PhaseExited && !p.exitSent {
			if p.container != nil {
				a.sendOOM(p.container) // the kernel counts before it kills, and tells later
			}
			start := len(a.tx)
			m := guestproto.Exit{Process: p.id, Code: p.code, Signal: p.sig}
			a.tx = m.Append(guestproto.Begin(a.tx, 0, guestproto.VerbExit))
			guestproto.End(a.tx, start)
			p.exitSent = true
		}
		for s := range p.out {
			if o := &p.out[s]; o.fd < 0 && !o.endSent {
				start := len(a.tx)
				m := guestproto.Output{Process: p.id, Stream: streamOf(s)}
				a.tx = m.AppendPrefix(guestproto.Begin(a.tx, 0, guestproto.VerbOutput))
				guestproto.End(a.tx, start)
				o.endSent = true
			}
		}
	}
}

func streamOf(s int) guestproto.Stream {
	if s == 0 {
		return guestproto.StreamStdout
	}
	return guestproto.StreamStderr
}

// sendOutput reads once from a stream, straight into tx.
func (a *agent) sendOutput(p *process, s int) {
	const prefix = guestproto.HeaderSize + guestproto.OutputPrefix
	o := &p.out[s]
	most := min(a.room()-reserve-prefix, int(o.credit), guestproto.MaxChunk)
	if o.fd < 0 || most <= 0 {
		return
	}
	start := len(a.tx)
	a.tx = guestproto.Begin(a.tx, 0, guestproto.VerbOutput)
	m := guestproto.Output{Process: p.id, Stream: streamOf(s)}
	a.tx = m.AppendPrefix(a.tx)
	n, err := syscall.Read(o.fd, a.tx[start+prefix:start+prefix+most])
	if n > 0 {
		a.tx = a.tx[:start+prefix+n]
		guestproto.End(a.tx, start)
		o.credit -= uint32(n)
		p.log.keep(a.tx[start+prefix:])
		return
	}
	a.tx = a.tx[:start]
	if err != syscall.EAGAIN && err != syscall.EINTR {
		closeFD(&o.fd) // its end, or EIO: the last holder of a terminal left
	}
}

// reap takes the status of every child that ended. In a container orphans go
// to the container's first process, so all children here are known; one that
// is not is just taken.
func (a *agent) reap() {
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		for i := range a.processes {
			if p := &a.processes[i]; p.id != 0 && p.pid == pid && p.phase != guestproto.PhaseExited {
				a.ended(p, status)
				break
			}
		}
	}
}

// ended notes how a process ended.
func (a *agent) ended(p *process, status syscall.WaitStatus) {
	if p.setup >= 0 {
		a.setupReady(p) // its last words, if they were not read yet
	}
	if p.id == 0 {
		return
	}
	p.code = uint8(status.ExitStatus())
	if status.Signaled() {
		p.sig = uint8(status.Signal())
		p.code = 128 + p.sig
	}
	p.phase = guestproto.PhaseExited
	if p.container == p {
		// Those in a PID namespace that is not its own would live on.
		_ = writeFile(cgroupOf(p.id)+"/cgroup.kill", "1")
	}
	closeFD(&p.pidfd)
	closeFD(&p.setup)
	a.endInput(p, syscall.EPIPE)
	closeFD(&p.stdin)
	if p.request != 0 {
		a.refuse(p.request, fail("start", p.name(), syscall.ECHILD))
		p.request = 0
	}
}

// release frees the slot of a process that ended, and its container.
func (a *agent) release(p *process) {
	closeFD(&p.pidfd)
	closeFD(&p.setup)
	closeFD(&p.stdin)
	closeFD(&p.out[0].fd)
	closeFD(&p.out[1].fd)
	p.log.drop()
	if p.inputSpace != nil {
		_ = syscall.Munmap(p.inputSpace)
	}
	if p.cgroup >= 0 {
		guardNoDevices(p.cgroup)
		closeFD(&p.cgroup)
		closeFD(&p.oom)
		a.dropCgroup(p.id)
	}
	p.clear()
}

// attach makes the agent send a process' events in this session.
func (a *agent) attach(payload []byte) error {
	m, err := guestproto.ParseProcessID(guestproto.VerbAttach, payload)
	if err != nil {
		return err
	}
	p, err := a.find(guestproto.VerbAttach, m.Process)
	if err == nil {
		p.attached = true
	}
	return err
}

// forget frees what is kept of a process that ended.
func (a *agent) forget(payload []byte) error {
	m, err := guestproto.ParseProcessID(guestproto.VerbForget, payload)
	if err != nil {
		return err
	}
	p, err := a.find(guestproto.VerbForget, m.Process)
	if err != nil {
		return err
	}
	if p.phase != guestproto.PhaseExited {
		return fail("forget", p.name(), syscall.EBUSY)
	}
	for i := range a.processes {
		if q := &a.processes[i]; q.id != 0 && q != p && q.container == p {
			if q.phase != guestproto.PhaseExited {
				return fail("forget", p.name()+": "+q.name()+" is in its container", syscall.EBUSY)
			}
			q.container = nil
		}
	}
	a.release(p)
	return nil
}

// list appends every process to the reply.
func (a *agent) list() {
	var infos [guestproto.MaxProcesses]guestproto.ProcessInfo
	n := 0
	for i := range a.processes {
		p := &a.processes[i]
		if p.id == 0 {
			continue
		}
		infos[n] = guestproto.ProcessInfo{
			Process: p.id, PID: uint32(p.pid), Phase: p.phase, TTY: p.tty, Code: p.code, Signal: p.sig,
		}
		if p.container != nil {
			infos[n].Container = p.container.id
		}
		n++
	}
	a.tx = guestproto.AppendProcesses(a.tx, infos[:n])
}

// signal sends a signal to a process, or to all in its container.
func (a *agent) signal(payload []byte) error {
	m, err := guestproto.ParseSignal(payload)
	if err != nil {
		return err
	}
	p, err := a.find(guestproto.VerbSignal, m.Process)
	if err != nil {
		return err
	}
	if !m.All {
		if p.phase == guestproto.PhaseExited {
			return fail("signal", p.name(), syscall.ESRCH)
		}
		if err := pidfdSignal(p.pidfd, m.Number); err != nil {
			return fail("signal", p.name(), err)
		}
		return nil
	}
	if p.container == nil {
		return fail("signal", "container of "+p.name(), syscall.ESRCH)
	}
	return signalAll(cgroupOf(p.container.id), syscall.Signal(m.Number))
}

// signalAll signals every process of a cgroup.
func signalAll(dir string, s syscall.Signal) error {
	if s == syscall.SIGKILL {
		return writeFile(dir+"/cgroup.kill", "1")
	}
	return listed(dir, func(pid int) {
		_ = syscall.Kill(pid, s) // it may have gone in between
	})
}

// listed calls f for every process of a cgroup.
func listed(dir string, f func(pid int)) error {
	const most = 64 << 10
	buf, err := mapMemory(most)
	if err != nil {
		return fail("map", "list of processes", err)
	}
	defer syscall.Munmap(buf)
	pids, err := readFile(dir+"/cgroup.procs", buf)
	for err == nil && len(pids) > 0 {
		var line []byte
		line, pids = nextLine(pids)
		if pid := int(number(line)); pid > 1 {
			f(pid)
		}
	}
	return err
}

// mapMemory gives memory that goes back to the kernel when it is unmapped, and
// costs nothing as far as it is not touched.
func mapMemory(size int) ([]byte, error) {
	return syscall.Mmap(-1, 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON)
}

// resize sets the size of a terminal.
func (a *agent) resize(payload []byte) error {
	m, err := guestproto.ParseResize(payload)
	if err != nil {
		return err
	}
	p, err := a.find(guestproto.VerbResize, m.Process)
	if err != nil {
		return err
	}
	if !p.tty || p.out[0].fd < 0 {
		return fail("resize", p.name(), syscall.ENOTTY)
	}
	if err := resizeTerminal(p.out[0].fd, m.Rows, m.Cols); err != nil {
		return fail("resize", p.name(), err)
	}
	return nil
}

// stdin gives input to a process. What it does not take at once is kept, and
// the reply with it.
func (a *agent) stdin(request uint32, payload []byte) error {
	m, err := guestproto.ParseStdin(payload)
	if err != nil {
		return err
	}
	p, err := a.find(guestproto.VerbStdin, m.Process)
	if err != nil {
		return err
	}
	if len(p.input) > 0 {
		return fail("write to", p.name(), syscall.EBUSY)
	}
	if p.stdin < 0 {
		return fail("write to", p.name(), syscall.EPIPE)
	}
	if p.inputSpace == nil {
		if p.inputSpace, err = mapMemory(guestproto.MaxChunk); err != nil {
			return fail("map", "input of "+p.name(), err)
		}
	}
	p.input = p.inputSpace[:copy(p.inputSpace, m.Data)]
	p.inputReq = request
	a.feed(p)
	return nil
}

// feed writes what is left of a process' input and answers when it is gone.
func (a *agent) feed(p *process) {
	for len(p.input) > 0 && p.stdin >= 0 {
		n, err := syscall.Write(p.stdin, p.input)
		switch err {
		case nil:
			p.input = p.input[n:]
		case syscall.EINTR:
		case syscall.EAGAIN:
			return
		default:
			closeFD(&p.stdin)
			a.endInput(p, err)
			return
		}
	}
	a.endInput(p, nil)
}

// endInput answers the stdin under way, if there is one.
func (a *agent) endInput(p *process, err error) {
	p.input = nil
	request := p.inputReq
	p.inputReq = 0
	switch {
	case request == 0:
	case err != nil:
		a.refuse(request, fail("write to", p.name(), err))
	default:
		a.reply(request)
	}
}

// reply answers a request with nothing but that it was done.
func (a *agent) reply(request uint32) {
	start := len(a.tx)
	a.tx = guestproto.Begin(a.tx, request, guestproto.VerbReply)
	guestproto.End(a.tx, start)
}

// closeStdin ends a process' input. A terminal has no end: it gets ^D.
func (a *agent) closeStdin(payload []byte) error {
	m, err := guestproto.ParseProcessID(guestproto.VerbCloseStdin, payload)
	if err != nil {
		return err
	}
	p, err := a.find(guestproto.VerbCloseStdin, m.Process)
	if err != nil {
		return err
	}
	if len(p.input) > 0 {
		return fail("close stdin of", p.name(), syscall.EBUSY)
	}
	if p.tty && p.stdin >= 0 {
		_, _ = syscall.Write(p.stdin, []byte{4})
		return nil
	}
	closeFD(&p.stdin)
	return nil
}

// credit lets more of a stream be sent.
func (a *agent) credit(payload []byte) error {
	m, err := guestproto.ParseCredit(payload)
	if err != nil {
		return err
	}
	if m.Stream == guestproto.StreamGuard {
		a.guardCredit = min(a.guardCredit+m.Bytes, guestproto.MaxWindow)
		a.guardFull = false
		return nil
	}
	p, err := a.find(guestproto.VerbCredit, m.Process)
	if err != nil {
		return nil // forgotten while the credit was on its way
	}
	o := &p.out[m.Stream-guestproto.StreamStdout]
	o.credit = min(o.credit+m.Bytes, guestproto.MaxWindow)
	return nil
}

// sendOOM tells the host that the kernel killed in a container.
func (a *agent) sendOOM(p *process) {
	if p.oom < 0 {
		return
	}
	var buf [256]byte
	n, err := syscall.Pread(p.oom, buf[:], 0)
	if err != nil {
		closeFD(&p.oom)
		return
	}
	kills := uint32(field(buf[:n], "oom_kill "))
	if kills == p.oomKills || !a.session || !p.attached || a.room() < reserve {
		return // what is not told now goes with the exit
	}
	p.oomKills = kills
	start := len(a.tx)
	m := guestproto.OOM{Process: p.id, Kills: kills}
	a.tx = m.Append(guestproto.Begin(a.tx, 0, guestproto.VerbOOM))
	guestproto.End(a.tx, start)
}

// logs appends the last output of a process to the reply.
func (a *agent) logs(payload []byte) error {
	m, err := guestproto.ParseProcessID(guestproto.VerbLogs, payload)
	if err != nil {
		return err
	}
	p, err := a.find(guestproto.VerbLogs, m.Process)
	if err != nil {
		return err
	}
	if p.log == nil {
		return fail("read log of", p.name(), syscall.ENODATA)
	}
	a.tx = p.log.append(a.tx)
	return nil
}

// history is the last of a process' output, both streams as they came.
type history struct {
	b     []byte // mapped; untouched pages cost nothing
	total int
}

func newHistory() (*history, error) {
	b, err := mapMemory(guestproto.LogBytes)
	if err != nil {
		return nil, fail("map", "log", err)
	}
	return &history{b: b}, nil
}

func (h *history) keep(data []byte) {
	if h == nil {
		return
	}
	for len(data) > 0 {
		n := copy(h.b[h.total%len(h.b):], data)
		h.total += n
		data = data[n:]
	}
}

func (h *history) append(b []byte) []byte {
	if h.total <= len(h.b) {
		return append(b, h.b[:h.total]...)
	}
	at := h.total % len(h.b)
	return append(append(b, h.b[at:]...), h.b[:at]...)
}

func (h *history) drop() {
	if h != nil {
		_ = syscall.Munmap(h.b)
	}
}
