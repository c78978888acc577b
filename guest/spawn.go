package guest

import (
	"strconv"
	"syscall"

	"hauberk.dev/api/guestproto"
)

// How processes come to be, for whoever labels tasks (the Guard).
//
// The agent is PID 1 and never execs anything but itself. A process of the
// host's asking is made in two steps:
//
//  1. PID 1 calls syscall.ForkExec("/init") (a vfork by clone or clone3, one
//     exec) with HAUBERK_STAGE=setup in the environment: the setup stage. It is
//     the agent's own inode, from the initramfs (rootfs, or a bind of it).
//     For a container the clone carries NEWPID and the child unshares its mount
//     and cgroup namespaces; network, IPC and UTS are those of the guest, which
//     all containers of the pod share. For an exec into a container, and for a
//     container in the PID namespace of another or of the pod, the child is
//     cloned into that (PID 1 points its pid_for_children there for the moment
//     of the clone); an exec joins the other namespaces itself by setns on a
//     pidfd. One setup stage is started at boot, the spare: it is part of a
//     template and saves the first container of a clone the start of a Go
//     program. It does nothing until it is sent its spec and descriptors.
//  2. The setup stage is trusted code on untrusted data. It mounts, pivots into
//     the container's overlay root, writes /etc/hosts and the like, opens a
//     terminal, drops capabilities, sets no_new_privs and its uid, waits for
//     Start if it is a container's first process, and calls execve(2) on the
//     workload's program, once it succeeds. It never forks. It moves itself
//     into the container's cgroup, at the start for a container and at the end
//     for an exec: a limit on processes must not hit the threads of this
//     runtime.
//
// Two setup stages never exec: that of a copy, which enters a container, gives
// up what it does not need, and moves files itself; and the reaper, which is
// the first process of the pod's PID namespace, if a container asks for that,
// and only lets orphans end.
//
// So, in labels:
//
//   - the thread group of PID 1 is the AGENT, its threads included: Go clones
//     threads (CLONE_THREAD) whenever it likes, in PID 1 and in a setup stage;
//     a thread takes the label of its thread group;
//   - a child of AGENT is SETUP. Its exec of the agent's own inode keeps SETUP;
//     its exec of anything else makes it WORKLOAD. That exec itself already
//     obeys the policy: it is the first thing the workload does;
//   - whatever a WORKLOAD forks or execs is WORKLOAD, for good;
//   - the agent's inode is never reachable from a container: it lies on a mount
//     that is detached from the container's mount namespace before the exec.
//
// Nothing runs before the Guard: at boot PID 1 mounts proc, sys, dev and
// cgroup2, loads modules with finit_module, calls guardStart, and only then
// opens the port. After a root is mounted it calls guardRoot with the device
// numbers of the overlay and of the erofs below it.

const (
	stageName  = "HAUBERK_STAGE"
	stageSetup = "setup"
	stageSpare = "spare"
	stageCopy  = "copy"
	stageReap  = "reap"
	initPath   = "/init"
)

// Descriptors of a setup stage, after its standard three.
const (
	setupSocket    = 3 // words to and from PID 1
	setupSpec      = 4 // a memfd: kind, length and bytes of the machine id, request's payload
	setupCgroup    = 5 // directory of the container's cgroup
	setupContainer = 6 // of an exec: pidfd of the container's first process
)

// Kinds of setup.
const (
	kindCreate = 'C'
	kindExec   = 'X'
	kindCopy   = 'Y'
)

// Words on the setup socket, one a message.
const (
	wordTake  = 'T' // to the spare, with its descriptors: standard three, spec, cgroup
	wordGive  = 'D' // from the setup stage: kind, u32 major, u32 minor of a device that the container was given
	wordMount = 'M' // from the setup stage, with a descriptor: path of a mount that the container has
	wordPlace = 'P' // from the setup stage, with a descriptor: path of a mount, or of the root, once all is mounted
	wordReady = 'R' // from the setup stage, with the terminal's master if there is one
	wordGo    = 'G' // to it: exec now
	wordError = 'E' // from it: u32 errno, text
)

// spawning is a process on its way.
type spawning struct {
	kind      byte
	payload   []byte
	tty       bool
	container *process // of an exec or a copy
	inside    int      // pidfd of a process in the PID namespace to be in, or -1: a new one
	cgroup    int
}

// create makes a container and its first process, up to the execve.
func (a *agent) create(request uint32, payload []byte) error {
	m, err := guestproto.CheckCreate(payload)
	if err != nil {
		return err
	}
	if a.roots[m.Root].state != rootMounted {
		return fail("create", "container on root "+strconv.Itoa(int(m.Root)), syscall.ENOENT)
	}
	p, err := a.admit(guestproto.VerbCreate)
	if err != nil {
		return err
	}
	a.lastID++
	p.id, p.request, p.container, p.root = a.lastID, request, p, m.Root
	s := spawning{kind: kindCreate, payload: payload, tty: m.Program.TTY, inside: -1}
	switch m.PID {
	case guestproto.PIDPod:
		s.inside, err = a.podNamespace()
	case guestproto.PIDContainer:
		s.inside, err = a.namespaceOf(m.PIDOf)
	}
	if err == nil {
		err = p.makeCgroup(&m.Resources)
	}
	if err == nil && m.KeepLog {
		p.log, err = newHistory()
	}
	if err == nil {
		s.cgroup = p.cgroup
		err = a.spawn(p, s)
	}
	if err != nil {
		a.release(p)
	}
	return err
}

// namespaceOf gives the pidfd of a container that runs.
func (a *agent) namespaceOf(id uint32) (int, error) {
	c, err := a.running(guestproto.VerbCreate, id)
	if err != nil {
		return -1, err
	}
	return c.pidfd, nil
}

// running finds a container that was started and has not ended.
func (a *agent) running(v guestproto.Verb, id uint32) (*process, error) {
	c, err := a.find(v, id)
	if err != nil {
		return nil, err
	}
	if c.container != c || c.phase != guestproto.PhaseRunning {
		return nil, fail(v.String()+" in", c.name(), syscall.ESRCH)
	}
	return c, nil
}

// exec runs one more process in a container.
func (a *agent) exec(request uint32, payload []byte) error {
	m, err := guestproto.CheckExec(payload)
	if err != nil {
		return err
	}
	return a.join(guestproto.VerbExec, request, m.Container, spawning{kind: kindExec, payload: payload, tty: m.Program.TTY})
}

// copy starts a copy of files into or out of a container.
func (a *agent) copy(request uint32, payload []byte) error {
	m, err := guestproto.ParseCopy(payload)
	if err != nil {
		return err
	}
	if _, ok := absolute(m.Path); !ok {
		return fail("copy at", strconv.Quote(m.Path), syscall.EINVAL)
	}
	return a.join(guestproto.VerbCopy, request, m.Container, spawning{kind: kindCopy, payload: payload})
}

// join starts a setup stage that enters a container.
func (a *agent) join(v guestproto.Verb, request, container uint32, s spawning) error {
	c, err := a.running(v, container)
	if err != nil {
		return err
	}
	p, err := a.admit(v)
	if err != nil {
		return err
	}
	a.lastID++
	p.id, p.request, p.container = a.lastID, request, c
	s.container, s.inside, s.cgroup = c, c.pidfd, c.cgroup
	if err := a.spawn(p, s); err != nil {
		a.release(p)
		return err
	}
	return nil
}

// admit gives a slot, unless the Guard that should be here is not.
func (a *agent) admit(v guestproto.Verb) (*process, error) {
	if a.guard == guestproto.GuardFailed {
		return nil, fail(v.String(), "process: guard is not attached: "+a.guardText, syscall.EPERM)
	}
	return a.free(v)
}

// start lets the first process of a container exec.
func (a *agent) start(request uint32, payload []byte) error {
	m, err := guestproto.ParseProcessID(guestproto.VerbStart, payload)
	if err != nil {
		return err
	}
	p, err := a.find(guestproto.VerbStart, m.Process)
	if err != nil {
		return err
	}
	if p.phase != guestproto.PhaseCreated || p.request != 0 {
		return fail("start", p.name(), syscall.EALREADY)
	}
	if _, err := syscall.Write(p.setup, []byte{wordGo}); err != nil {
		return fail("start", p.name(), err)
	}
	p.request = request
	return nil
}

// spawn starts the setup stage of p.
func (a *agent) spawn(p *process, s spawning) error {
	var child [5]int // the child's standard three, its socket, the spec
	for i := range child {
		child[i] = -1
	}
	defer func() {
		for i := range child {
			closeFD(&child[i])
		}
	}()
	p.tty = s.tty
	if err := p.openStdio(&child, s.tty); err != nil {
		return err
	}
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_SEQPACKET|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return fail("make", "setup socket", err)
	}
	p.setup, child[setupSocket] = pair[0], pair[1]
	if child[setupSpec], err = a.writeSpec(s); err != nil {
		return err
	}
	if s.inside < 0 && a.useSpare(p, child, s.cgroup) {
		return nil
	}
	files := make([]uintptr, 0, len(child)+2)
	for _, fd := range child {
		files = append(files, uintptr(fd))
	}
	files = append(files, uintptr(s.cgroup))
	if s.container != nil {
		files = append(files, uintptr(s.container.pidfd))
	}
	stage := stageSetup
	if s.kind == kindCopy {
		stage = stageCopy
	}
	if s.inside < 0 {
		p.pid, p.pidfd, err = startStage(stage, files, containerClone)
	} else {
		p.pid, p.pidfd, err = a.startInside(s.inside, stage, files)
	}
	if err != nil {
		return fail("start setup of", p.name(), err)
	}
	return nil
}

// containerClone is what a container's first process is cloned with; the rest
// of its namespaces it makes itself.
const containerClone = syscall.CLONE_NEWPID

// startStage starts a setup stage with the files as its descriptors. It is to
// take no signal of its own runtime: a filter might forbid the return from it.
func startStage(stage string, files []uintptr, flags uintptr) (pid, pidfd int, err error) {
	garbage := "GOGC=off" // it ends before it has made any
	if stage == stageCopy {
		garbage = "GOGC=50"
	}
	pid, err = syscall.ForkExec(initPath, []string{initPath}, &syscall.ProcAttr{
		Env:   []string{stageName + "=" + stage, garbage, "GODEBUG=asyncpreemptoff=1"},
		Files: files,
		Sys:   &syscall.SysProcAttr{Cloneflags: flags, PidFD: &pidfd, Setsid: true},
	})
	if err != nil {
		return 0, -1, err
	}
	return pid, pidfd, nil
}

// startInside starts a setup stage in the PID namespace of a process.
func (a *agent) startInside(other int, stage string, files []uintptr) (pid, pidfd int, err error) {
	if err := setns(other, syscall.CLONE_NEWPID); err != nil {
		return 0, -1, fail("enter", "PID namespace", err)
	}
	pid, pidfd, err = startStage(stage, files, 0)
	if err := setns(a.selfPIDNS, syscall.CLONE_NEWPID); err != nil {
		panic("cannot leave a container's PID namespace")
	}
	return pid, pidfd, err
}

// spare is a setup stage that was started ahead. It is none when pid is 0.
type spare struct{ pid, pidfd, socket int }

// makeSpare starts the spare.
func (a *agent) makeSpare() error {
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_SEQPACKET|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return fail("make", "setup socket", err)
	}
	defer syscall.Close(pair[1])
	null, files, err := nullFiles()
	if err != nil {
		_ = syscall.Close(pair[0])
		return err
	}
	defer syscall.Close(null)
	a.spare.socket = pair[0]
	a.spare.pid, a.spare.pidfd, err = startStage(stageSpare, append(files, uintptr(pair[1])), containerClone)
	if err != nil {
		_ = syscall.Close(pair[0])
		return fail("start", "spare setup stage", err)
	}
	return nil
}

// useSpare makes the spare p's setup stage, if it is there and lives.
func (a *agent) useSpare(p *process, child [5]int, cgroup int) bool {
	s := a.spare
	a.spare = spare{}
	if s.pid == 0 {
		return false
	}
	rights := syscall.UnixRights(child[0], child[1], child[2], child[setupSpec], cgroup)
	if err := syscall.Sendmsg(s.socket, []byte{wordTake}, rights, nil, syscall.MSG_DONTWAIT|syscall.MSG_NOSIGNAL); err != nil {
		_ = syscall.Close(s.socket)
		_ = pidfdSignal(s.pidfd, uint8(syscall.SIGKILL))
		_ = syscall.Close(s.pidfd) // reaped with the next child that ends
		return false
	}
	closeFD(&p.setup)
	p.pid, p.pidfd, p.setup = s.pid, s.pidfd, s.socket
	return true
}

// openStdio makes the pipes of a process. One with a terminal gets nothing for
// now; its setup stage opens the terminal and sends the master.
func (p *process) openStdio(child *[5]int, tty bool) error {
	if tty {
		for i := range 3 {
			fd, err := syscall.Open("/dev/null", syscall.O_RDWR|syscall.O_CLOEXEC, 0)
			if err != nil {
				return fail("open", "/dev/null", err)
			}
			child[i] = fd
		}
		return nil
	}
	mine := [3]*int{&p.stdin, &p.out[0].fd, &p.out[1].fd}
	for i := range 3 {
		var pipe [2]int
		if err := syscall.Pipe2(pipe[:], syscall.O_CLOEXEC); err != nil {
			return fail("make", "pipe", err)
		}
		if i == 0 {
			child[i], *mine[i] = pipe[0], pipe[1]
		} else {
			*mine[i], child[i] = pipe[0], pipe[1]
		}
		if err := syscall.SetNonblock(*mine[i], true); err != nil {
			return fail("set up", "pipe", err)
		}
	}
	return nil
}

// writeSpec puts what the setup stage must know into a memfd: the agent never
// waits for it to be read.
func (a *agent) writeSpec(s spawning) (int, error) {
	fd, err := memfd("setup")
	if err != nil {
		return -1, fail("make", "setup spec", err)
	}
	head := append([]byte{s.kind, byte(len(a.machineID))}, a.machineID...)
	for _, b := range [][]byte{head, s.payload} {
		for len(b) > 0 {
			n, err := syscall.Write(fd, b)
			if err != nil && err != syscall.EINTR {
				_ = syscall.Close(fd)
				return -1, fail("write", "setup spec", err)
			}
			b = b[max(n, 0):]
		}
	}
	if _, err := syscall.Seek(fd, 0, 0); err != nil {
		_ = syscall.Close(fd)
		return -1, fail("rewind", "setup spec", err)
	}
	return fd, nil
}

// nullFiles are a standard three that lead nowhere. The caller closes null.
func nullFiles() (null int, files []uintptr, err error) {
	if null, err = syscall.Open("/dev/null", syscall.O_RDWR|syscall.O_CLOEXEC, 0); err != nil {
		return -1, nil, fail("open", "/dev/null", err)
	}
	n := uintptr(null)
	return null, []uintptr{n, n, n}, nil
}

// setupReady hears what a setup stage has to say; that it hangs up without a
// word means that it exec'd.
func (a *agent) setupReady(p *process) {
	for p.setup >= 0 && a.hearSetup(p) {
	}
}

// hearSetup takes one word, and says whether there is more to come before the
// one that matters.
func (a *agent) hearSetup(p *process) bool {
	var msg [4096 + 1]byte
	var oob [32]byte
	n, oobn, _, _, err := syscall.Recvmsg(p.setup, msg[:], oob[:], syscall.MSG_DONTWAIT|syscall.MSG_CMSG_CLOEXEC)
	switch {
	case err == syscall.EAGAIN || err == syscall.EINTR:
	case err != nil || n == 0:
		closeFD(&p.setup)
		a.setupLeft(p)
	case msg[0] == wordGive && n == giveSize && p.container == p:
		err := p.give(msg[1:n])
		if err != nil {
			a.setupFailed(p, err)
		}
		return err == nil
	case (msg[0] == wordMount || msg[0] == wordPlace) && oobn > 0 && p.container == p:
		err := p.mounted(msg[0], string(msg[1:n]), oob[:oobn])
		if err != nil {
			a.setupFailed(p, err)
		}
		return err == nil
	case msg[0] == wordReady:
		if oobn > 0 {
			p.takeTerminal(oob[:oobn])
		}
		if p.container == p {
			p.phase = guestproto.PhaseCreated
			p.attached = p.request != 0
			a.answerProcess(p)
		}
	case msg[0] == wordError && n >= 5:
		a.setupFailed(p, &failure{
			syscall.Errno(uint32(msg[1]) | uint32(msg[2])<<8), string(msg[5:n]),
		})
	}
	return false
}

// giveSize is the size of the word that gives a device.
const giveSize = 1 + 1 + 4 + 4

// giveWord is that word.
func giveWord(kind, major, minor uint32) []byte {
	word := []byte{wordGive, 'c'}
	if kind == syscall.S_IFBLK {
		word[1] = 'b'
	}
	for _, v := range [...]uint32{major, minor} {
		word = append(word, byte(v), byte(v>>8), byte(v>>16), byte(v>>24))
	}
	return word
}

// give lets a container's processes open a device that its setup stage made.
func (p *process) give(b []byte) error {
	kind := uint32(syscall.S_IFCHR)
	if b[0] == 'b' {
		kind = syscall.S_IFBLK
	}
	at := func(b []byte) uint32 { return uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 | uint32(b[3])<<24 }
	return guardDevice(p.cgroup, kind, at(b[1:]), at(b[5:]))
}

// mounted tells the Guard what lies where in a container.
func (p *process) mounted(word byte, path string, oob []byte) error {
	messages, err := syscall.ParseSocketControlMessage(oob)
	if err != nil || len(messages) != 1 {
		return fail("take", "mount at "+strconv.Quote(path), syscall.EBADMSG)
	}
	fds, err := syscall.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return fail("take", "mount at "+strconv.Quote(path), syscall.EBADMSG)
	}
	if word == wordPlace {
		return guardPlace(p.cgroup, path, fds[0])
	}
	return guardMount(p.cgroup, path, fds[0])
}

// setupLeft is the end of a setup stage.
func (a *agent) setupLeft(p *process) {
	switch {
	case p.phase == guestproto.PhaseSetup && p.container == p:
		a.setupFailed(p, fail("create", p.name()+": setup stage died", syscall.ECHILD))
	case p.phase == guestproto.PhaseSetup:
		p.phase = guestproto.PhaseRunning
		p.attached = p.request != 0
		a.answerProcess(p)
	case p.phase == guestproto.PhaseCreated && p.request != 0:
		p.phase = guestproto.PhaseRunning
		a.reply(p.request)
		p.request = 0
	}
}

// answerProcess answers the create or exec that p was asked for by, if the
// host that asked is still there.
func (a *agent) answerProcess(p *process) {
	if p.request == 0 {
		return
	}
	start := len(a.tx)
	m := guestproto.ProcessID{Process: p.id}
	a.tx = m.Append(guestproto.Begin(a.tx, p.request, guestproto.VerbReply))
	guestproto.End(a.tx, start)
	p.request = 0
}

// setupFailed answers the request. A process whose number the host does not
// have yet is gone with that; another ends like any.
func (a *agent) setupFailed(p *process, err error) {
	if p.request != 0 {
		a.refuse(p.request, err)
		p.request = 0
	}
	if p.phase != guestproto.PhaseSetup {
		return
	}
	_ = pidfdSignal(p.pidfd, uint8(syscall.SIGKILL))
	for {
		if _, err := syscall.Wait4(p.pid, nil, 0, nil); err != syscall.EINTR {
			break
		}
	}
	a.release(p)
}

// takeTerminal takes the master from the setup stage.
func (p *process) takeTerminal(oob []byte) {
	messages, err := syscall.ParseSocketControlMessage(oob)
	if err != nil || len(messages) != 1 {
		return
	}
	fds, err := syscall.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return
	}
	_ = syscall.SetNonblock(fds[0], true)
	p.out[0].fd = fds[0]
	if p.stdin, err = syscall.Dup(fds[0]); err != nil {
		p.stdin = -1
		return
	}
	syscall.CloseOnExec(p.stdin)
}
