package main

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// why names what stopped a step: the error number if there is one.
func why(err error) string {
	var no syscall.Errno
	if errors.As(err, &no) {
		if name := unix.ErrnoName(no); name != "" {
			return name
		}
	}
	return err.Error()
}

// ran runs a program that should print a token, and says whether it did.
func ran(try string, argv []string, env []string, token string) Step {
	// Its own standard input: there may be no /dev/null here.
	cmd := &exec.Cmd{Path: argv[0], Args: argv, Env: env, Stdin: os.Stdin}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		return Step{Try: try, Seen: why(err)}
	}
	kill := time.AfterFunc(15*time.Second, func() { cmd.Process.Kill() })
	defer kill.Stop()
	err := cmd.Wait()
	switch {
	case strings.Contains(out.String(), token):
		return Step{Try: try, Reached: true, Seen: "it ran"}
	case err != nil:
		return Step{Try: try, Seen: fmt.Sprintf("%v: %.200q", err, strings.TrimSpace(out.String()))}
	}
	return Step{Try: try, Seen: "it ran without the foreign code"}
}

// drop writes a copy of this program under a name, ready to run.
func drop(name string) error {
	in, err := os.Open("/proc/self/exe")
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// dropIn drops a copy into a directory and runs it.
func dropIn(dir string) Step {
	token := rand.Text()
	name := filepath.Join(dir, ".x-"+token[:8])
	if err := drop(name); err != nil {
		os.Remove(name)
		return Step{Try: "write " + name, Seen: why(err)}
	}
	defer os.Remove(name)
	return ran("run "+name, []string{name, "proof", token}, nil, token)
}

// dropAndExecute runs programs that were not in the image: dropped beside
// others, put in the place of one, handed to the loader, and as a script.
func dropAndExecute([]string) []Step {
	var steps []Step
	for _, dir := range []string{"/tmp", "/var/tmp", "/bin", "/"} {
		if st, err := os.Stat(dir); err == nil && st.IsDir() {
			steps = append(steps, dropIn(dir))
		}
	}
	return append(steps, changeProgram(), unlinked())
}

// changeProgram touches a program of the image and runs it: the times of a
// file are enough to make it one of the writable layer.
func changeProgram() Step {
	const victim = "/bin/true"
	const try = "touch " + victim + " and run it"
	now := time.Now()
	if err := os.Chtimes(victim, now, now); err != nil {
		return Step{Try: try, Seen: "touch: " + why(err)}
	}
	cmd := &exec.Cmd{Path: victim, Args: []string{victim}, Stdin: os.Stdin, Stdout: os.Stderr, Stderr: os.Stderr}
	if err := cmd.Run(); err != nil {
		return Step{Try: try, Seen: why(err)}
	}
	return Step{Try: try, Reached: true, Seen: "it ran"}
}

// unlinked runs a program whose name is gone.
func unlinked() Step {
	token := rand.Text()
	const try = "run a dropped program whose name was removed"
	name := "/tmp/.u-" + token[:8]
	if err := drop(name); err != nil {
		os.Remove(name)
		return Step{Try: try, Seen: "write: " + why(err)}
	}
	f, err := os.Open(name)
	os.Remove(name)
	if err != nil {
		return Step{Try: try, Seen: why(err)}
	}
	defer f.Close()
	return ran(try, []string{fmt.Sprintf("/proc/self/fd/%d", keep(f)), "proof", token}, nil, token)
}

// keep lets a descriptor live on in the program that is started.
func keep(f *os.File) int {
	fd := int(f.Fd())
	unix.FcntlInt(uintptr(fd), unix.F_SETFD, 0)
	return fd
}

// memfd runs a program that was never in a file system.
func memfd([]string) []Step {
	token := rand.Text()
	fd, err := unix.MemfdCreate("x", 0)
	if err != nil {
		return []Step{{Try: "memfd_create", Seen: why(err)}}
	}
	mem := os.NewFile(uintptr(fd), "memfd")
	defer mem.Close()
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return []Step{{Try: "read this program", Seen: why(err)}}
	}
	defer self.Close()
	if _, err := io.Copy(mem, self); err != nil {
		return []Step{{Try: "write memfd", Seen: why(err)}}
	}
	// A descriptor open for writing cannot be run.
	ro, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return []Step{{Try: "open memfd again", Seen: why(err)}}
	}
	defer ro.Close()
	mem.Close()
	return []Step{
		ran("run memfd", []string{fmt.Sprintf("/proc/self/fd/%d", keep(ro)), "proof", token}, nil, token),
		mapCode("map memfd executable", int(ro.Fd())),
		mapCode("map anonymous memory executable", -1),
	}
}

// mapCode makes memory executable that no file of the image is behind. For
// anonymous memory that is first writable, then executable, as shellcode does.
func mapCode(try string, fd int) Step {
	if fd >= 0 {
		b, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE)
		if err != nil {
			return Step{Try: try, Seen: why(err)}
		}
		unix.Munmap(b)
		return Step{Try: try, Reached: true, Seen: "mapped"}
	}
	b, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return Step{Try: try, Seen: why(err)}
	}
	defer unix.Munmap(b)
	b[0] = 0xc3
	if err := unix.Mprotect(b, unix.PROT_READ|unix.PROT_EXEC); err != nil {
		return Step{Try: try, Seen: why(err)}
	}
	return Step{Try: try, Reached: true, Seen: "executable"}
}

// tmpfsExec runs programs from file systems that live in memory.
func tmpfsExec([]string) []Step {
	var steps []Step
	for _, dir := range []string{"/dev/shm", "/run", "/tmp", "/dev"} {
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err == nil && st.Type == unix.TMPFS_MAGIC {
			steps = append(steps, dropIn(dir))
		}
	}
	return append(steps, ownTmpfs())
}

// ownTmpfs mounts one.
func ownTmpfs() Step {
	dir, err := os.MkdirTemp("/tmp", "m-")
	if err != nil {
		return Step{Try: "make a directory", Seen: why(err)}
	}
	defer os.Remove(dir)
	if err := unix.Mount("none", dir, "tmpfs", 0, ""); err != nil {
		return Step{Try: "mount a tmpfs", Seen: why(err)}
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	return dropIn(dir)
}

// ldPreload brings foreign code into programs of the image: a library made
// here, and the loader told to run a dropped program.
func ldPreload(args []string) []Step {
	victim := "/bin/cat"
	if len(args) > 0 {
		victim = args[0]
	}
	token := rand.Text()
	so, err := library(token)
	if err != nil {
		return []Step{{Try: "make a library", Seen: err.Error()}}
	}
	var steps []Step
	for _, dir := range []string{"/tmp", "/dev/shm"} {
		name := filepath.Join(dir, "x-"+token[:8]+".so")
		if err := os.WriteFile(name, so, 0o755); err != nil {
			steps = append(steps, Step{Try: "write " + name, Seen: why(err)})
			continue
		}
		steps = append(steps, ran("run "+victim+" with LD_PRELOAD="+name, []string{victim, "/etc/passwd"}, []string{"LD_PRELOAD=" + name}, token))
		os.Remove(name)
	}
	return append(steps, byLoader(victim))
}

// byLoader hands a copied program to the loader, so that nothing foreign is
// executed by the kernel, only mapped.
func byLoader(victim string) Step {
	const loader = "/lib64/ld-linux-x86-64.so.2"
	token := rand.Text()
	name := "/tmp/l-" + token[:8]
	raw, err := os.ReadFile(victim)
	if err == nil {
		err = os.WriteFile(name, raw, 0o755)
	}
	if err != nil {
		return Step{Try: "copy " + victim, Seen: why(err)}
	}
	defer os.Remove(name)
	text := name + ".txt"
	if err := os.WriteFile(text, []byte(token), 0o644); err != nil {
		return Step{Try: "write " + text, Seen: why(err)}
	}
	defer os.Remove(text)
	return ran("have the loader run a copied program", []string{loader, name, text}, nil, token)
}
