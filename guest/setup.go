package guest

import (
	"strconv"
	"syscall"

	"hauberk.dev/api/guestproto"
)

// keptCaps are what root of a container may do: the common default of
// container engines without MKNOD and SYS_CHROOT.
const keptCaps = 1<<0 | // CHOWN
	1<<1 | // DAC_OVERRIDE
	1<<3 | // FOWNER
	1<<4 | // FSETID
	1<<5 | // KILL
	1<<6 | // SETGID
	1<<7 | // SETUID
	1<<8 | // SETPCAP
	1<<10 | // NET_BIND_SERVICE
	1<<13 | // NET_RAW
	1<<29 | // AUDIT_WRITE
	1<<31 // SETFCAP

const (
	openFiles   = 1 << 20
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
	var program *guestproto.Program
	var pids uint32
	join, err := syscall.Openat(setupCgroup, "cgroup.procs", syscall.O_WRONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return fail("open", "cgroup.procs", err)
	}
	if spec[0] == kindCreate {
		m, err := guestproto.ParseCreate(payload)
		if err != nil {
			return err
		}
		if err := enterNew(&m, machineID, join); err != nil {
			return err
		}
		program, pids = &m.Program, m.Resources.PidsMax
	} else {
		m, err := guestproto.ParseExec(payload)
		if err != nil {
			return err
		}
		if err := enterExisting(); err != nil {
			return err
		}
		program = &m.Program
	}
	syscall.Umask(0o022)
	return become(program, spec[0] == kindCreate, func() error {
		if spec[0] == kindExec {
			return joinCgroup(join)
		}
		return limitProcesses(pids)
	})
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

// enterNew makes the container that this process is the first of.
func enterNew(m *guestproto.Create, machineID string, cgroup int) error {
	if err := joinCgroup(cgroup); err != nil {
		return err
	}
	// A mount namespace takes this thread's root and working directory out of
	// those the runtime's threads share.
	if err := syscall.Unshare(syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS | cloneNewCgroup); err != nil {
		return fail("make", "namespaces", err)
	}
	if err := enterRoot(rootPath(m.Root)); err != nil {
		return err
	}
	if m.Hostname != "" {
		if err := syscall.Sethostname([]byte(m.Hostname)); err != nil {
			return fail("set hostname", strconv.Quote(m.Hostname), err)
		}
	}
	if machineID != "" {
		m.Files = append(m.Files, guestproto.File{Path: "/etc/machine-id", Mode: 0o444, Data: []byte(machineID + "\n")})
	}
	for _, f := range m.Files {
		if len(f.Path) < 2 || f.Path[0] != '/' || f.Mode&^0o777 != 0 {
			return fail("write file", strconv.Quote(f.Path), syscall.EINVAL)
		}
		if err := makeDirs(parent(f.Path), 0o755); err != nil {
			return err
		}
		if err := replaceFile(f.Path, f.Data, f.Mode); err != nil {
			return err
		}
	}
	return nil
}

func parent(path string) string {
	for i := len(path) - 1; i > 0; i-- {
		if path[i] == '/' {
			return path[:i]
		}
	}
	return "/"
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
func become(p *guestproto.Program, waits bool, last func() error) error {
	who, err := account(p)
	if err != nil {
		return err
	}
	if err := stdio(p, who.uid); err != nil {
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
	if waits {
		var word [1]byte
		n, err := syscall.Read(setupSocket, word[:])
		if err != nil || n != 1 || word[0] != wordGo {
			return fail("wait for", "start", syscall.ECANCELED)
		}
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: openFiles, Max: openFiles}); err != nil {
		return fail("set limit of", "open files", err)
	}
	if err := last(); err != nil {
		return err
	}
	if err := shed(who); err != nil {
		return err
	}
	return execute(p.Args, environment(p, who))
}

// shed gives up every right that a workload must not have, on this thread; the
// exec ends the others.
func shed(who identity) error {
	if err := prctl(prSetNoNewPrivs, 1); err != nil {
		return fail("set", "no_new_privs", err)
	}
	for c := uintptr(0); c < 64; c++ {
		if keptCaps>>c&1 == 1 {
			continue
		}
		if err := prctl(prCapbsetDrop, c); err == syscall.EINVAL {
			break // past the last the kernel knows
		} else if err != nil {
			return fail("drop", "capability "+strconv.Itoa(int(c)), err)
		}
	}
	if err := prctl(prCapAmbient, prCapAmbientWipe); err != nil {
		return fail("drop", "ambient capabilities", err)
	}
	if err := setGroups(who.groups); err != nil {
		return fail("set", "groups", err)
	}
	if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESGID, uintptr(who.gid), uintptr(who.gid), uintptr(who.gid)); errno != 0 {
		return fail("set", "gid "+strconv.Itoa(int(who.gid)), errno)
	}
	if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, uintptr(who.uid), uintptr(who.uid), uintptr(who.uid)); errno != 0 {
		return fail("set", "uid "+strconv.Itoa(int(who.uid)), errno)
	}
	caps := uint64(keptCaps)
	if who.uid != 0 {
		caps = 0
	}
	if err := setCaps(caps); err != nil {
		return fail("drop", "capabilities", err)
	}
	if err := setSeccomp(syscallFilter()); err != nil {
		return fail("set", "seccomp filter", err)
	}
	return nil
}

// syscallFilter refuses, with EPERM, the few system calls that have no place in
// a container and that no hook of the kernel's LSM sees: kernel keys,
// userfaultfd, and whatever is not of the 64-bit ABI. What the Guard can refuse,
// and report, is left to it.
func syscallFilter() []filterInsn {
	const (
		load, jumpEq, jumpGe, ret = 0x20, 0x15, 0x35, 0x06
		offNumber, offArch        = 0, 4
		archX8664, x32            = 0xc000003e, 0x40000000
		allow, refuse             = 0x7fff0000, 0x00050001
	)
	numbers := []uint32{248, 249, 250, 323} // add_key, request_key, keyctl, userfaultfd
	n := uint8(len(numbers))
	f := []filterInsn{
		{load, 0, 0, offArch},
		{jumpEq, 0, n + 3, archX8664},
		{load, 0, 0, offNumber},
		{jumpGe, n + 1, 0, x32},
	}
	for i, number := range numbers {
		f = append(f, filterInsn{jumpEq, n - uint8(i), 0, number})
	}
	return append(f, filterInsn{ret, 0, 0, allow}, filterInsn{ret, 0, 0, refuse})
}

// stdio gives the process its terminal, if it has one, and tells PID 1 that all
// is ready. Pipes become the user's own, so that /dev/stdout can be opened.
func stdio(p *guestproto.Program, uid uint32) error {
	var rights []byte
	master := -1
	if p.TTY {
		var err error
		if master, err = openTerminal(p, uid); err != nil {
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
func openTerminal(p *guestproto.Program, uid uint32) (master int, err error) {
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
	for fd := range 3 {
		if err := syscall.Dup3(slave, fd, 0); err != nil {
			return -1, fail("use", path, err)
		}
	}
	closeFD(&slave)
	return master, nil
}

// execute replaces this process by the program. It returns only if it fails.
func execute(args, env []string) error {
	name := args[0]
	for i := range len(name) {
		if name[i] == '/' {
			return fail("exec", strconv.Quote(name), syscall.Exec(name, args, env))
		}
	}
	path := defaultPath
	for _, e := range env {
		if len(e) > 5 && e[:5] == "PATH=" {
			path = e[5:]
		}
	}
	cause := error(syscall.ENOENT)
	for path != "" {
		var dir string
		dir, path = cut(path, ':')
		if dir == "" {
			continue // not the working directory: it is no place to find programs
		}
		switch err := syscall.Exec(dir+"/"+name, args, env); err {
		case syscall.ENOENT, syscall.ENOTDIR:
		case syscall.EACCES, syscall.EPERM:
			cause = err // another directory may have one that may be run
		default:
			return fail("exec", strconv.Quote(name), err)
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
