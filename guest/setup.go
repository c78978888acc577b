package guest

import (
	"strconv"
	"syscall"

	"hauberk.dev/api/guestproto"
)

const (
	maxSpec     = guestproto.MaxFrame + 512
	maxAccounts = 1 << 20 // of /etc/passwd and /etc/group
)

// setupMain is the setup stage: it turns itself into the process the host
// asked for, or says why not.
func setupMain(isSpare bool) {
	for fd := setupSocket; fd <= setupContainer; fd++ {
		syscall.CloseOnExec(fd)
	}
	var err error
	if isSpare {
		err = beTaken()
	}
	if err == nil {
		err = setup()
	}
	f, ok := err.(*failure)
	if !ok {
		f = &failure{syscall.EINVAL, err.Error()}
	}
	word := []byte{wordError, byte(f.errno), byte(f.errno >> 8), 0, 0}
	word = append(word, f.text[:min(len(f.text), 1000)]...)
	_, _ = syscall.Write(setupSocket, word)
	code := 126
	if f.errno == syscall.ENOENT {
		code = 127
	}
	syscall.Exit(code)
}

// beTaken waits, as the spare, for the descriptors that another setup stage is
// started with.
func beTaken() error {
	var word [1]byte
	var oob [64]byte
	n, oobn, _, _, err := syscall.Recvmsg(setupSocket, word[:], oob[:], syscall.MSG_CMSG_CLOEXEC)
	if err != nil || n != 1 || word[0] != wordTake {
		return fail("wait for", "container", syscall.ECANCELED)
	}
	messages, err := syscall.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(messages) != 1 {
		return fail("take", "descriptors", syscall.EBADMSG)
	}
	fds, err := syscall.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 5 {
		return fail("take", "descriptors", syscall.EBADMSG)
	}
	// They have the lowest free numbers, in order; so none that is still to
	// be moved lies where one moves to.
	for i, to := range [5]int{0, 1, 2, setupSpec, setupCgroup} {
		flags := 0
		if to > 2 {
			flags = syscall.O_CLOEXEC
		}
		if fds[i] == to {
			continue
		}
		if err := syscall.Dup3(fds[i], to, flags); err != nil {
			return fail("take", "descriptors", err)
		}
		_ = syscall.Close(fds[i])
	}
	return nil
}

// setup returns only if it fails.
func setup() error {
	// A container's root must not look into a process that has not shed the
	// agent's rights yet.
	if err := prctl(prSetDumpable, 0); err != nil {
		return fail("hide", "setup stage", err)
	}
	spec, err := readDescriptor(setupSpec, "setup spec", maxSpec)
	if err != nil {
		return err
	}
	if len(spec) < 2 || len(spec) < 2+int(spec[1]) {
		return fail("read", "setup spec", syscall.EBADMSG)
	}
	machineID, payload := string(spec[2:2+int(spec[1])]), spec[2+int(spec[1]):]
	syscall.Umask(0)
	join, err := syscall.Openat(setupCgroup, "cgroup.procs", syscall.O_WRONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return fail("open", "cgroup.procs", err)
	}
	switch spec[0] {
	case kindCreate:
		return becomeContainer(payload, machineID, join)
	case kindExec:
		return becomeExec(payload, join)
	case kindCopy:
		return becomeCopy(payload, join)
	}
	return fail("read", "setup spec", syscall.EBADMSG)
}

// becomeContainer makes a container and becomes its first process.
func becomeContainer(payload []byte, machineID string, join int) error {
	m, err := guestproto.ParseCreate(payload)
	if err != nil {
		return err
	}
	if err := scoreOOM(&m.Program); err != nil {
		return err
	}
	if err := joinCgroup(join); err != nil {
		return err
	}
	if err := makeContainer(&m, machineID); err != nil {
		return err
	}
	return become(&m.Program, true, func() error { return limitProcesses(m.Resources.PidsMax) })
}

// becomeExec becomes one more process of a container.
func becomeExec(payload []byte, join int) error {
	m, err := guestproto.ParseExec(payload)
	if err != nil {
		return err
	}
	if err := scoreOOM(&m.Program); err != nil {
		return err
	}
	if err := enterExisting(); err != nil {
		return err
	}
	return become(&m.Program, false, func() error { return joinCgroup(join) })
}

// scoreOOM says how gladly the kernel kills the program for want of memory.
// It needs the agent's /proc.
func scoreOOM(p *guestproto.Program) error {
	if p.OOMScoreAdj == 0 {
		return nil
	}
	return writeFile("/proc/self/oom_score_adj", strconv.Itoa(int(p.OOMScoreAdj)))
}

// joinCgroup moves this process into the cgroup whose cgroup.procs is open.
func joinCgroup(procs int) error {
	if _, err := syscall.Write(procs, []byte("0")); err != nil {
		return fail("join", "cgroup", err)
	}
	return nil
}

// limitProcesses limits the container's, this runtime's threads not counted:
// the exec is about to end them.
func limitProcesses(most uint32) error {
	if most == 0 {
		return nil
	}
	fd, err := syscall.Openat(setupCgroup, "pids.max", syscall.O_WRONLY|syscall.O_CLOEXEC, 0)
	if err == nil {
		_, err = syscall.Write(fd, strconv.AppendUint(nil, uint64(most), 10))
	}
	if err != nil {
		return fail("limit", "processes", err)
	}
	return nil
}

// enterExisting joins the container whose PID namespace PID 1 put this process
// into already.
func enterExisting() error {
	// The Go runtime's threads share a root and a working directory; a mount
	// namespace is entered alone.
	if err := syscall.Unshare(syscall.CLONE_FS); err != nil {
		return fail("leave", "shared root", err)
	}
	const kinds = syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC | cloneNewCgroup
	if err := setns(setupContainer, kinds); err != nil {
		return fail("join", "container", err)
	}
	return nil
}

// become sheds the agent's rights and execs the program. last is done when
// nothing but that is left to do.
func become(p *guestproto.Program, first bool, last func() error) error {
	who, err := account(p)
	if err != nil {
		return err
	}
	if err := stdio(p, who.uid, first); err != nil {
		return err
	}
	cwd := p.Cwd
	if cwd == "" {
		cwd = "/"
	}
	if err := makeDirs(cwd, 0o755); err != nil {
		return err
	}
	if err := syscall.Chdir(cwd); err != nil {
		return fail("enter", strconv.Quote(cwd), err)
	}
	r, err := newRights(p, who)
	if err != nil {
		return err
	}
	env := environment(p, who)
	x, err := newExecImage(programPaths(p.Args[0], env), p.Args, env)
	if err != nil {
		return fail("exec", strconv.Quote(p.Args[0]), err)
	}
	if first {
		var word [1]byte
		n, err := syscall.Read(setupSocket, word[:])
		if err != nil || n != 1 || word[0] != wordGo {
			return fail("wait for", "start", syscall.ECANCELED)
		}
	}
	if err := last(); err != nil {
		return err
	}
	if err := r.apply(); err != nil {
		return err
	}
	return x.run(p.Args[0])
}

// stdio gives the process its terminal, if it has one, and tells PID 1 that all
// is ready. Pipes become the user's own, so that /dev/stdout can be opened.
func stdio(p *guestproto.Program, uid uint32, first bool) error {
	var rights []byte
	master := -1
	if p.TTY {
		var err error
		if master, err = openTerminal(p, uid, first); err != nil {
			return err
		}
		rights = syscall.UnixRights(master)
	} else {
		for fd := range 3 {
			_ = syscall.Fchown(fd, int(uid), -1)
		}
	}
	if err := syscall.Sendmsg(setupSocket, []byte{wordReady}, rights, nil, 0); err != nil {
		return fail("report to", "agent", err)
	}
	closeFD(&master)
	return nil
}

// openTerminal makes a new terminal of the container this process' own.
func openTerminal(p *guestproto.Program, uid uint32, first bool) (master int, err error) {
	if master, err = syscall.Open("/dev/ptmx", syscall.O_RDWR|syscall.O_NOCTTY|syscall.O_CLOEXEC, 0); err != nil {
		return -1, fail("open", "/dev/ptmx", err)
	}
	n, err := unlockTerminal(master)
	if err != nil {
		return -1, fail("unlock", "terminal", err)
	}
	path := "/dev/pts/" + strconv.Itoa(int(n))
	slave, err := syscall.Open(path, syscall.O_RDWR|syscall.O_CLOEXEC, 0)
	if err != nil {
		return -1, fail("open", path, err)
	}
	if p.Rows > 0 && p.Cols > 0 {
		if err := resizeTerminal(master, p.Rows, p.Cols); err != nil {
			return -1, fail("resize", path, err)
		}
	}
	_ = syscall.Fchown(slave, int(uid), 5)
	if _, _, errno := syscall.RawSyscall(syscall.SYS_IOCTL, uintptr(slave), tiocSctty, 0); errno != 0 {
		return -1, fail("take control of", path, errno)
	}
	if first {
		if err := bindConsole(slave); err != nil {
			return -1, err
		}
	}
	for fd := range 3 {
		if err := syscall.Dup3(slave, fd, 0); err != nil {
			return -1, fail("use", path, err)
		}
	}
	closeFD(&slave)
	return master, nil
}

// bindConsole makes the terminal of a container's first process its console.
func bindConsole(slave int) error {
	in, err := openInside()
	if err != nil {
		return err
	}
	defer in.close()
	to, err := in.target("/dev/console", false)
	if err != nil {
		return err
	}
	defer syscall.Close(to)
	tree, err := openTree(slave, false)
	if err == nil {
		err = moveMount(tree, to)
		_ = syscall.Close(tree)
	}
	if err != nil {
		return fail("bind", "/dev/console", err)
	}
	return nil
}

// programPaths are where a program may lie: at its path, or in the directories
// of PATH. The working directory is no place to find programs.
func programPaths(name string, env []string) (paths []string) {
	for i := range len(name) {
		if name[i] == '/' {
			return []string{name}
		}
	}
	path := defaultPath
	for _, e := range env {
		if len(e) > 5 && e[:5] == "PATH=" {
			path = e[5:]
		}
	}
	for path != "" {
		var dir string
		if dir, path = cut(path, ':'); dir != "" {
			paths = append(paths, dir+"/"+name)
		}
	}
	return paths
}

// run replaces this process by the program. It returns only if it fails.
func (x *execImage) run(name string) error {
	cause := syscall.ENOENT
	for i := range x.paths {
		errno := x.exec(i)
		switch {
		case errno == syscall.ENOENT || errno == syscall.ENOTDIR:
			if len(x.paths) == 1 {
				cause = errno
			}
		case errno == syscall.EACCES || errno == syscall.EPERM:
			cause = errno // another directory may have one that may be run
		default:
			return fail("exec", strconv.Quote(name), errno)
		}
	}
	return fail("exec", strconv.Quote(name), cause)
}

// cut splits s at the first c.
func cut(s string, c byte) (before, after string) {
	for i := range len(s) {
		if s[i] == c {
			return s[:i], s[i+1:]
		}
	}
	return s, ""
}
