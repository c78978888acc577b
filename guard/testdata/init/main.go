// Command init is PID 1 of the guard's test machine: it attaches the Guard as
// the real agent does, then follows a list of steps that lies in the image,
// with none of the agent's confinement around what it runs, so that only the
// Guard stands in an attack's way.
package main

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"hauberk.dev/guest/guard"
)

const (
	image = "/run/roots/0/image"
	upper = "/run/roots/0/upper"
	root  = "/run/roots/0/root"
	// cgroup is named as the agent names that of container 77.
	cgroup = "/sys/fs/cgroup/c77"
)

func main() {
	if len(os.Args) > 2 && os.Args[1] == "setup" {
		fmt.Println("notstarted", setup(os.Args[2:]))
		os.Exit(12)
	}
	if err := run(); err != nil {
		fmt.Println("FATAL", err)
	}
	fmt.Println("END")
	syscall.Sync()
	_ = syscall.Reboot(syscall.LINUX_REBOOT_CMD_RESTART)
}

func run() error {
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
	for _, m := range [][3]string{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"cgroup2", "/sys/fs/cgroup"}} {
		if err := syscall.Mount(m[0], m[1], m[0], 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	if err := os.Mkdir(cgroup, 0o755); err != nil {
		return err
	}
	if err := loadModules(); err != nil {
		return err
	}
	var g *guard.Guard
	if bundle, err := os.ReadFile("/guard.bundle"); err == nil {
		start := time.Now()
		if g, err = guard.Attach(bundle); err != nil {
			return err
		}
		fmt.Println("ATTACHED", time.Since(start).Milliseconds())
	}
	overlay, lower, err := mountRoot()
	if err != nil {
		return err
	}
	if g != nil {
		if err := g.Root(root, overlay, lower); err != nil {
			return err
		}
	}
	if err := fillRoot(); err != nil {
		return err
	}
	if err := fillVolume(g); err != nil {
		return fmt.Errorf("fill volume: %w", err)
	}
	steps, err := os.ReadFile(image + "/.steps")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(steps)) {
		if err := step(g, strings.Fields(line)); err != nil {
			return fmt.Errorf("step %q: %w", strings.TrimSpace(line), err)
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

func mountRoot() (overlay, lower uint32, err error) {
	for _, d := range []string{image, upper, root} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return 0, 0, err
		}
	}
	for range 2000 {
		if _, err = os.Stat("/dev/vda"); err == nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if err := syscall.Mount("/dev/vda", image, "erofs", syscall.MS_RDONLY, ""); err != nil {
		return 0, 0, fmt.Errorf("mount image: %w", err)
	}
	if err := syscall.Mount("tmpfs", upper, "tmpfs", 0, ""); err != nil {
		return 0, 0, fmt.Errorf("mount upper: %w", err)
	}
	for _, d := range []string{"/data", "/work"} {
		if err := os.Mkdir(upper+d, 0o755); err != nil {
			return 0, 0, err
		}
	}
	data := "lowerdir=" + image + ",upperdir=" + upper + "/data,workdir=" + upper + "/work"
	if err := syscall.Mount("overlay", root, "overlay", 0, data); err != nil {
		return 0, 0, fmt.Errorf("mount overlay: %w", err)
	}
	if overlay, err = device(root); err != nil {
		return 0, 0, err
	}
	lower, err = device(image)
	return overlay, lower, err
}

func device(path string) (uint32, error) {
	var st syscall.Stat_t
	err := syscall.Stat(path, &st)
	return uint32(st.Dev>>8&0xfff)<<20 | uint32(st.Dev&0xff), err
}

// fillRoot gives the container what an attack may need to find.
func fillRoot() error {
	for _, m := range [][3]string{{"proc", "proc"}, {"sysfs", "sys"}, {"tmpfs", "dev"}, {"tmpfs", "shm"}} {
		if err := syscall.Mount(m[0], root+"/"+m[1], m[0], 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	for name, dev := range map[string]int{"null": 1<<8 | 3, "zero": 1<<8 | 5, "urandom": 1<<8 | 9, "tty": 5 << 8, "port": 4<<8 | 64} {
		if err := syscall.Mknod(root+"/dev/"+name, syscall.S_IFCHR|0o666, dev); err != nil {
			return err
		}
	}
	if err := syscall.Mknod(root+"/dev/disk", syscall.S_IFBLK|0o666, 254<<8); err != nil {
		return err
	}
	for i, a := range []string{"127.0.0.1", "192.0.2.1", "198.51.100.7", "203.0.113.9"} {
		if err := address(i, a); err != nil {
			return fmt.Errorf("address %s: %w", a, err)
		}
	}
	if err := address6("2001:db8::1"); err != nil {
		return fmt.Errorf("IPv6 address: %w", err)
	}
	return nil
}

// address6 gives the loopback interface an IPv6 address.
func address6(addr string) error {
	s, err := syscall.Socket(syscall.AF_INET6, syscall.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(s)
	var req [24]byte
	copy(req[:], net.ParseIP(addr))
	req[16], req[20] = 128, 1 // length of the prefix, number of lo
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(s), syscall.SIOCSIFADDR, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return errno
	}
	return nil
}

// fillVolume mounts a directory of a file system, which is mounted elsewhere
// too, as a volume with a program.
func fillVolume(g *guard.Guard) error {
	if err := os.Mkdir(root+"/shm/plugins", 0o755); err != nil {
		return err
	}
	if err := syscall.Mount(root+"/shm/plugins", root+"/mnt/plugins", "", syscall.MS_BIND, ""); err != nil {
		return err
	}
	program, err := os.ReadFile(image + "/attack")
	if err != nil {
		return err
	}
	for _, name := range []string{"tool", "lib"} {
		if err := os.WriteFile(root+"/mnt/plugins/"+name, program, 0o755); err != nil {
			return err
		}
	}
	if g == nil {
		return nil
	}
	const asPath = 0x200000
	fd, err := syscall.Open(root+"/mnt/plugins", asPath|syscall.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return g.Mounted(1, "/mnt/plugins", fd)
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

func step(g *guard.Guard, words []string) error {
	switch words[0] {
	case "network": // beyond this machine
		return network()
	case "policy":
		return policy(g, words[1], 1)
	case "run":
		fmt.Println("RAN", words[1], attack(words[1:]))
		if g != nil {
			events(g)
		}
	case "events":
		events(g)
	case "drain": // as the host would, though nothing ran
		fmt.Println("RAN drain done")
		events(g)
	case "recount":
		g.Recount()
		events(g)
	case "status":
		fmt.Println("STATUS", hex.EncodeToString(g.Status(nil)))
	case "swap": // swap policies for as long as the attack runs
		return swap(g, words[1:])
	case "hold": // run, and leave the events where they are
		fmt.Println("RAN", words[1], attack(words[1:]))
	case "load": // run, and take the events away meanwhile, as the agent does
		return load(g, words[1:])
	case "costs":
		return costs()
	case "verifier": // what it takes to load each program
		bundle, err := os.ReadFile("/guard.bundle")
		if err != nil {
			return err
		}
		return guard.Measure(bundle, func(l guard.Loaded) {
			fmt.Println("LOADED", l.Name, l.Native, strings.Join(strings.Fields(l.Said), " "))
		})
	case "memory": // that this process holds, in KiB
		raw, err := os.ReadFile("/proc/self/status")
		if err != nil {
			return err
		}
		_, after, _ := strings.Cut(string(raw), "VmRSS:")
		fmt.Println("MEMORY", strings.Fields(after)[0])
	case "file": // of the container, or of the guest with an absolute name
		return makeFile(words[1])
	case "link":
		if err := os.MkdirAll(filepath.Dir(root+words[2]), 0o755); err != nil {
			return err
		}
		return os.Link(root+words[1], root+words[2])
	case "setting":
		return os.WriteFile(words[1], []byte(strings.Join(words[2:], " ")), 0o644)
	default:
		return fmt.Errorf("no such step")
	}
	return nil
}

func makeFile(name string) error {
	if err := os.MkdirAll(filepath.Dir(root+name), 0o755); err != nil {
		return err
	}
	return os.WriteFile(root+name, []byte("kept\n"), 0o644)
}

func policy(g *guard.Guard, name string, generation uint64) error {
	blob, err := os.ReadFile(filepath.Join(image, name))
	if err != nil {
		return err
	}
	for i := range 8 {
		generation = generation&^(0xff<<(8*i)) | uint64(blob[8+i])<<(8*i)
	}
	start := time.Now()
	reply, err := g.Policy(generation, blob)
	if err != nil {
		return err
	}
	fmt.Println("POLICY", name, hex.EncodeToString(reply), time.Since(start).Microseconds())
	fmt.Println("STANDS", hex.EncodeToString(g.Status(nil)))
	return nil
}

// setup is the stage between the agent and a workload: the agent's own program,
// which enters the container and becomes the workload.
func setup(args []string) error {
	runtime.LockOSThread() // a mount namespace belongs to a thread
	if err := syscall.Unshare(syscall.CLONE_NEWNS); err != nil {
		return err
	}
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := os.Chdir(root); err != nil {
		return err
	}
	if err := syscall.PivotRoot(".", "."); err != nil {
		return err
	}
	if err := syscall.Unmount(".", syscall.MNT_DETACH); err != nil {
		return err
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	return syscall.Exec("/attack", append([]string{"/attack"}, args...), []string{"PATH=/bin"})
}

// attack runs a program in the container and says how it ended.
func attack(words []string) string {
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
	group, err := os.Open(cgroup)
	if err != nil {
		return err.Error()
	}
	defer group.Close()
	runtime.LockOSThread() // who traces a process is a thread
	defer runtime.UnlockOSThread()
	pid, err := syscall.ForkExec("/init", append([]string{"/init", "setup"}, words...), &syscall.ProcAttr{
		Dir: "/", Files: []uintptr{null.Fd(), w.Fd(), w.Fd()}, Sys: &syscall.SysProcAttr{Setsid: true, UseCgroupFD: true, CgroupFD: int(group.Fd())},
	})
	w.Close()
	if err != nil {
		return "notstarted " + err.Error()
	}
	fmt.Println("PROCESS", words[0], pid)
	said := make(chan string, 1)
	go func() {
		buf := make([]byte, 4096)
		n, _ := r.Read(buf)
		said <- strings.ReplaceAll(strings.TrimSpace(string(buf[:n])), "\n", "; ")
	}()
	var status syscall.WaitStatus
	for {
		got, err := syscall.Wait4(pid, &status, 0, nil)
		if err == nil && got == pid && status.Stopped() { // it had itself traced
			_ = syscall.PtraceCont(pid, int(status.StopSignal()))
			continue
		}
		if err != syscall.EINTR && got == pid {
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

func events(g *guard.Guard) {
	g.Drain(func(record []byte) bool {
		fmt.Println("EVENT", hex.EncodeToString(record))
		return true
	})
}

// swap puts policies in force in turn, so many times, while an attack runs that
// ends when a file appears. The events are left where they are, if so said.
func swap(g *guard.Guard, words []string) error {
	var blobs [][]byte
	for name := range strings.SplitSeq(words[0], ",") {
		blob, err := os.ReadFile(filepath.Join(image, name))
		if err != nil {
			return err
		}
		blobs = append(blobs, blob)
	}
	times, err := strconv.Atoi(words[1])
	if err != nil {
		return err
	}
	stop := root + "/shm/stop"
	if err := os.Remove(stop); err != nil && !os.IsNotExist(err) {
		return err
	}
	result := make(chan string, 1)
	go func() { result <- attack(words[3:]) }()
	generation := binary.LittleEndian.Uint64(blobs[0][8:])
	for i := 0; ; i++ {
		select {
		case ran := <-result:
			fmt.Println("RAN", words[3], ran)
			return nil
		default:
		}
		// The attack ends when it may and has tried often enough; what it tries
		// until then is under fire too.
		if i == times {
			if err := os.WriteFile(stop, nil, 0o644); err != nil {
				return err
			}
		}
		generation++
		blob := blobs[i%len(blobs)]
		// Both places of the generation in a blob.
		binary.LittleEndian.PutUint64(blob[8:], generation)
		binary.LittleEndian.PutUint64(blob[48:], generation)
		if _, err := g.Policy(generation, blob); err != nil {
			return err
		}
		if words[2] == "drain" {
			g.Drain(func([]byte) bool { return true })
		}
	}
}

// load runs a program while the events are read and thrown away.
func load(g *guard.Guard, words []string) error {
	done, result := make(chan struct{}), ""
	go func() {
		result = attack(words)
		close(done)
	}()
	for {
		select {
		case <-done:
			fmt.Println("RAN", words[0], result)
			return nil
		case <-time.After(5 * time.Millisecond):
			if g != nil {
				g.Drain(func([]byte) bool { return true })
			}
		}
	}
}
