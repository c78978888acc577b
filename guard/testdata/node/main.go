// Command node is PID 1 of a machine that plays a node: a kernel that runc's
// containers share. It starts the loader and containers, makes attempts in them,
// and says on the console what came of each.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

const (
	image  = "/run/image" // of containers; below node the programs of this machine
	boxes  = "/run/boxes"
	common = "/run/common"
	run    = "/run/hauberk-guard"
	pins   = "/sys/fs/bpf/hauberk"
)

func main() {
	if len(os.Args) > 3 && os.Args[1] == "enter" {
		fmt.Println("notstarted", enter(os.Args[2], os.Args[3:]))
		os.Exit(12)
	}
	if err := play(); err != nil {
		fmt.Println("FATAL", err)
	}
	records()
	fmt.Println("END")
	syscall.Sync()
	_ = syscall.Reboot(syscall.LINUX_REBOOT_CMD_RESTART)
}

func play() error {
	if err := settle(); err != nil {
		return err
	}
	steps, err := os.ReadFile(image + "/.steps")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(steps)) {
		start := time.Now()
		if err := step(strings.Fields(line)); err != nil {
			return fmt.Errorf("step %q: %w", strings.TrimSpace(line), err)
		}
		fmt.Println("TOOK", time.Since(start).Milliseconds(), strings.TrimSpace(line))
	}
	return nil
}

// settle makes a node of an empty machine.
func settle() error {
	// pivot_root does not leave the initramfs as such.
	if err := os.Mkdir("/self", 0o755); err != nil {
		return err
	}
	if err := syscall.Mount("/", "/self", "", syscall.MS_BIND, ""); err != nil {
		return err
	}
	if err := os.Chdir("/self"); err != nil {
		return err
	}
	if err := syscall.Mount(".", "/", "", syscall.MS_MOVE, ""); err != nil {
		return err
	}
	if err := syscall.Chroot("."); err != nil {
		return err
	}
	for _, m := range [][3]string{
		{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"cgroup2", "/sys/fs/cgroup"}, {"bpf", "/sys/fs/bpf"},
		{"securityfs", "/sys/kernel/security"}, {"tmpfs", "/run"}, {"tmpfs", "/tmp"},
	} {
		if err := os.MkdirAll(m[1], 0o755); err != nil {
			return err
		}
		if err := syscall.Mount(m[0], m[1], m[0], 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	if err := loadModules(); err != nil {
		return err
	}
	if err := os.Mkdir(image, 0o755); err != nil {
		return err
	}
	for range 2000 {
		if _, err := os.Stat("/dev/vda"); err == nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if err := syscall.Mount("/dev/vda", image, "erofs", syscall.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("mount image: %w", err)
	}
	if err := os.WriteFile("/sys/fs/cgroup/cgroup.subtree_control", []byte("+pids"), 0o644); err != nil {
		return err
	}
	// The loader of programs that runc was linked for.
	for name, to := range map[string]string{"/lib64/ld-linux-x86-64.so.2": "ld.so", "/lib/x86_64-linux-gnu/libc.so.6": "libc.so.6", "/lib/x86_64-linux-gnu/libseccomp.so.2": "libseccomp.so.2"} {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		if err := os.Symlink(image+"/node/"+to, name); err != nil {
			return err
		}
	}
	if err := os.Mkdir(common, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(common+"/kept", nil, 0o644); err != nil {
		return err
	}
	for i, a := range []string{"127.0.0.1", "192.0.2.1", "198.51.100.7", "203.0.113.9"} {
		if err := address(i, a); err != nil {
			return fmt.Errorf("address %s: %w", a, err)
		}
	}
	return nil
}

func loadModules() error {
	order, err := os.ReadFile("/modules/order")
	if err != nil {
		return err
	}
	for name := range strings.FieldsSeq(string(order)) {
		f, err := os.Open("/modules/" + name)
		if err != nil {
			return err
		}
		var none [1]byte
		_, _, errno := syscall.Syscall(313, f.Fd(), uintptr(unsafe.Pointer(&none)), 0)
		f.Close()
		if errno != 0 {
			return fmt.Errorf("load %s: %w", name, errno)
		}
	}
	return nil
}

// address gives the loopback interface one more address.
func address(i int, addr string) error {
	s, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(s)
	var req [40]byte
	name := "lo"
	if i > 0 {
		name = fmt.Sprint("lo:", i)
	}
	copy(req[:], name)
	req[16] = syscall.AF_INET
	copy(req[20:], net.ParseIP(addr).To4())
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(s), syscall.SIOCSIFADDR, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return errno
	}
	clear(req[16:])
	copy(req[:], "lo\x00")
	req[16] = syscall.IFF_UP | syscall.IFF_RUNNING
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(s), syscall.SIOCSIFFLAGS, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return errno
	}
	return nil
}

func step(words []string) error {
	switch words[0] {
	case "loader":
		return startLoader()
	case "kill": // the loader, as nothing can refuse
		if err := serving.Process.Kill(); err != nil {
			return err
		}
		_ = serving.Wait()
		return nil
	case "box": // name, policy or -, whether it is bound
		return box(words[1], words[2], words[3] == "bound")
	case "create": // by the real runtime, whose answer is told
		fmt.Println("RAN", "runc/"+words[1], tool("runc", "run", "-d", "-b", boxes+"/"+words[1]+"/bundle", words[1]))
	case "exec": // by the real runtime
		fmt.Println("RAN", words[1]+"/"+words[2], tool("runc", append([]string{"exec", words[1], "/attack"}, words[2:]...)...))
	case "delete":
		fmt.Println("RAN", "runc/"+words[1]+"-delete", tool("runc", "delete", "-f", words[1]))
	case "guard":
		fmt.Println("RAN", "guard/"+strings.Join(words[1:], "-"), tool("hauberk-guard", append([]string{words[1], "-policies", image + "/node/policies"}, words[2:]...)...))
	case "run": // container, attack
		fmt.Println("RAN", words[1]+"/"+words[2], attack(words[1], words[2:]))
	case "swap": // container, policy, times, attack
		return swap(words[1], words[2], words[3:])
	default:
		return fmt.Errorf("no such step")
	}
	return nil
}

var serving *exec.Cmd

func startLoader() error {
	out, err := os.OpenFile("/run/records", os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer out.Close()
	serving = exec.Command(image+"/node/hauberk-guard", "serve", "-bundle", image+"/node/bundle", "-node", "node")
	serving.Stdout, serving.Stderr = out, os.Stdout
	if err := serving.Start(); err != nil {
		return err
	}
	// It answers that it knows no such container once it has attached all.
	for end := time.Now().Add(3 * time.Minute); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		said := tool("hauberk-guard", "status", "nobody")
		if strings.Contains(said, "not bound") {
			raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", serving.Process.Pid))
			if err != nil {
				return err
			}
			_, after, _ := strings.Cut(string(raw), "CapEff:")
			fmt.Println("RAN loader/capabilities", strings.Fields(after)[0])
			return nil
		}
		if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", serving.Process.Pid)); err != nil || strings.Contains(string(stat), ") Z ") {
			return fmt.Errorf("loader has ended; %s", said)
		}
	}
	return fmt.Errorf("loader does not answer")
}

// tool runs a program of the node.
func tool(name string, args ...string) string {
	cmd := exec.Command(image+"/node/"+name, args...)
	out, err := os.CreateTemp("/run", "said")
	if err != nil {
		return err.Error()
	}
	defer os.Remove(out.Name())
	defer out.Close()
	// A file: what runs on in a container would keep a pipe open.
	cmd.Stdout, cmd.Stderr = out, out
	_ = cmd.Run()
	said, _ := os.ReadFile(out.Name())
	return fmt.Sprintf("exit %d %s", cmd.ProcessState.ExitCode(), strings.ReplaceAll(string(bytes.TrimSpace(said)), "\n", "; "))
}

// box makes a bundle and the overlay that is its root.
func box(name, policy string, bound bool) error {
	dir := filepath.Join(boxes, name)
	for _, d := range []string{"upper", "work", "root", "bundle"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	data := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", image, dir, dir)
	if err := syscall.Mount("overlay", dir+"/root", "overlay", 0, data); err != nil {
		return fmt.Errorf("mount overlay: %w", err)
	}
	raw, err := json.Marshal(config(name, dir+"/root", policy, bound))
	if err != nil {
		return err
	}
	return os.WriteFile(dir+"/bundle/config.json", raw, 0o644)
}

type object map[string]any

// config is a container that has all capabilities, and shares all namespaces
// with the node but that of mounts: what is refused, the Guard refuses.
func config(name, root, policy string, bound bool) object {
	caps := []string{}
	for _, c := range strings.Fields("CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE") {
		caps = append(caps, "CAP_"+c)
	}
	c := object{
		"ociVersion": "1.0.2",
		"process": object{
			"args": []string{"/attack", "serve"}, "cwd": "/", "env": []string{"PATH=/bin"}, "user": object{"uid": 0, "gid": 0},
			"capabilities": object{"bounding": caps, "effective": caps, "permitted": caps},
		},
		"root": object{"path": root},
		"mounts": []object{
			{"destination": "/proc", "type": "proc", "source": "proc"},
			{"destination": "/sys", "type": "sysfs", "source": "sysfs"},
			{"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
			{"destination": "/shm", "type": "tmpfs", "source": "tmpfs"},
			{"destination": "/mnt", "type": "bind", "source": common, "options": []string{"bind"}}, // a volume of all
		},
		"linux": object{
			"cgroupsPath": "/boxes/" + name, "namespaces": []object{{"type": "mount"}},
			"resources": object{"devices": []object{{"allow": true, "access": "rwm"}}},
		},
	}
	if !bound {
		return c
	}
	program := image + "/node/hauberk-guard"
	c["hooks"] = object{
		"createRuntime": []object{{"path": program, "args": []string{"hauberk-guard", "bind", "-policies", image + "/node/policies"}}},
		"poststop":      []object{{"path": program, "args": []string{"hauberk-guard", "unbind"}}},
	}
	if policy != "-" {
		c["annotations"] = object{"dev.hauberk.guard.policy": policy}
	}
	return c
}

// attack makes an attempt in a container, as its runtime would: a process of the
// node goes into the cgroup and the mounts, and runs the program there.
func attack(name string, words []string) string {
	r, w, err := os.Pipe()
	if err != nil {
		return err.Error()
	}
	defer r.Close()
	null, err := os.Open("/dev/null")
	if err != nil {
		return err.Error()
	}
	defer null.Close()
	pid, err := syscall.ForkExec("/init", append([]string{"/init", "enter", name}, words...), &syscall.ProcAttr{
		Dir: "/", Files: []uintptr{null.Fd(), w.Fd(), w.Fd()}, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	w.Close()
	if err != nil {
		return "notstarted " + err.Error()
	}
	said := make(chan string, 1)
	go func() {
		buf := make([]byte, 4096)
		n, _ := r.Read(buf)
		said <- strings.ReplaceAll(strings.TrimSpace(string(buf[:n])), "\n", "; ")
	}()
	var status syscall.WaitStatus
	for {
		if got, err := syscall.Wait4(pid, &status, 0, nil); err != syscall.EINTR && got == pid {
			break
		}
	}
	text := ""
	select {
	case text = <-said:
	case <-time.After(5 * time.Second):
		text = "said nothing"
	}
	if status.Signaled() {
		return fmt.Sprintf("signal %d %s", status.Signal(), text)
	}
	return fmt.Sprintf("exit %d %s", status.ExitStatus(), text)
}

// enter becomes a process of a container.
func enter(name string, words []string) error {
	const setns = 308
	runtime.LockOSThread() // a mount namespace belongs to a thread
	dir := "/sys/fs/cgroup/boxes/" + name
	raw, err := os.ReadFile(dir + "/cgroup.procs")
	if err != nil {
		return err
	}
	first, _, _ := strings.Cut(string(raw), "\n")
	ns, err := os.Open("/proc/" + first + "/ns/mnt")
	if err != nil {
		return err
	}
	if err := os.WriteFile(dir+"/cgroup.procs", []byte("0"), 0); err != nil {
		return err
	}
	if err := syscall.Unshare(syscall.CLONE_FS); err != nil {
		return err
	}
	if _, _, errno := syscall.RawSyscall(setns, ns.Fd(), syscall.CLONE_NEWNS, 0); errno != 0 {
		return errno
	}
	return syscall.Exec("/attack", append([]string{"/attack"}, words...), []string{"PATH=/bin"})
}

// swap puts a policy in force anew, so many times, while an attack runs that ends
// when a file appears.
func swap(name, policy string, words []string) error {
	var times int
	if _, err := fmt.Sscan(words[0], &times); err != nil {
		return err
	}
	result := make(chan string)
	go func() { result <- attack(name, words[1:]) }()
	failed := ""
	// It goes on in the cgroup of another, which is not bound.
	if err := move(name, words[1], "free"); err != nil {
		return err
	}
	for range times {
		if said := tool("hauberk-guard", "policy", "-policies", image+"/node/policies", name, policy); !strings.HasPrefix(said, "exit 0 ") {
			failed = said
		}
	}
	if said := attack(name, []string{"write", words[2]}); !strings.HasPrefix(said, "exit 0 ") {
		failed += said
	}
	fmt.Println("RAN", name+"/"+words[1], <-result, failed)
	return nil
}

// move puts the process that makes an attack into another cgroup.
func move(name, attack, to string) error {
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		raw, err := os.ReadFile("/sys/fs/cgroup/boxes/" + name + "/cgroup.procs")
		if err != nil {
			return err
		}
		for pid := range strings.FieldsSeq(string(raw)) {
			args, _ := os.ReadFile("/proc/" + pid + "/cmdline")
			if strings.HasPrefix(string(args), "/attack\x00"+attack+"\x00") {
				return os.WriteFile("/sys/fs/cgroup/boxes/"+to+"/cgroup.procs", []byte(pid), 0)
			}
		}
	}
	return fmt.Errorf("%s does not run in %s", attack, name)
}

// records says what the loader wrote down.
func records() {
	time.Sleep(100 * time.Millisecond)
	raw, _ := os.ReadFile("/run/records")
	for line := range strings.Lines(string(raw)) {
		fmt.Println("RECORD", strings.TrimSpace(line))
	}
}
