package seccomp

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

const childEnv = "SECCOMP_TEST_PROFILE"

// TestMain: with childEnv set this program is the one that is confined.
func TestMain(m *testing.M) {
	if which := os.Getenv(childEnv); which != "" {
		if err := confined(which); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

var kernelProfiles = map[string]*Profile{
	"errors": {
		DefaultAction: "SCMP_ACT_ALLOW", Flags: []string{"SECCOMP_FILTER_FLAG_LOG"},
		Syscalls: []Syscall{
			{Names: []string{"getpriority"}, Action: "SCMP_ACT_ERRNO", ErrnoRet: number(123)},
			{Names: []string{"personality"}, Action: "SCMP_ACT_ERRNO", Args: []Arg{{Index: 0, Value: 0xffffffff, Op: "SCMP_CMP_NE"}}},
			{Names: []string{"umask"}, Action: "SCMP_ACT_LOG"},
		},
	},
	"kill": {
		DefaultAction: "SCMP_ACT_ALLOW",
		Syscalls:      []Syscall{{Names: []string{"getpriority"}, Action: "SCMP_ACT_KILL_PROCESS"}},
	},
}

// confined puts the filter on and tries.
func confined(which string) error {
	f, err := Compile(kernelProfiles[which])
	if err != nil {
		return err
	}
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	b := f.Bytes()
	prog := unix.SockFprog{Len: uint16(len(f.Instructions)), Filter: (*unix.SockFilter)(unsafe.Pointer(&b[0]))}
	if _, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, uintptr(f.Flags), uintptr(unsafe.Pointer(&prog))); errno != 0 {
		return fmt.Errorf("put filter on: %w", errno)
	}
	_, _, one := unix.RawSyscall(unix.SYS_GETPRIORITY, 0, 0, 0)
	_, _, two := unix.RawSyscall(unix.SYS_PERSONALITY, 8, 0, 0)
	_, _, three := unix.RawSyscall(unix.SYS_PERSONALITY, 0xffffffff, 0, 0)
	_, _, four := unix.RawSyscall(unix.SYS_UMASK, 0o22, 0, 0)
	fmt.Println(int(one), int(two), int(three), int(four))
	return nil
}

// TestKernel puts filters on real processes.
func TestKernel(t *testing.T) {
	run := func(which string) (string, error) {
		cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
		cmd.Env = append(os.Environ(), childEnv+"="+which)
		out, err := cmd.Output()
		return strings.TrimSpace(string(out)), err
	}
	if out, err := run("errors"); err != nil || out != "123 1 0 0" {
		t.Errorf("the calls gave %q, %v, want 123 1 0 0", out, err)
	}
	out, err := run("kill")
	failed, ok := err.(*exec.ExitError)
	if !ok || failed.Sys().(syscall.WaitStatus).Signal() != syscall.SIGSYS {
		t.Errorf("killed process: %q, %v, want SIGSYS", out, err)
	}
}
