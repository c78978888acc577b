package guest_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"hauberk.dev/internal/kernel"
	"hauberk.dev/vm"
)

// machine is a cold-booted guest: QEMU, Debian's kernel, and the agent of this
// tree. It is the smallest launcher that serves these tests.
type machine struct {
	dir     string
	socket  string
	console string
	qemu    *exec.Cmd
	files   *exec.Cmd // virtiofsd, which serves the folder share
	ended   chan struct{}
}

// boot starts a machine, with files added to its initramfs, and ends it with
// the test.
func boot(t testing.TB, files map[string][]byte) *machine {
	t.Helper()
	dir := t.TempDir()
	m := &machine{dir: dir, socket: filepath.Join(dir, "agent.sock"), console: filepath.Join(dir, "console"), ended: make(chan struct{})}
	kernel, release := findKernel(t)
	initrd := filepath.Join(dir, "initrd.cpio")
	if err := os.WriteFile(initrd, initramfs(t, release, files), 0o600); err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(dir, "root.erofs")
	buildImage(t, image)
	disks := []string{"root0", image, "root1", image}
	for _, serial := range []string{"w0", "w1"} {
		path := filepath.Join(dir, serial)
		buildDisk(t, path, 24<<20)
		disks = append(disks, serial, path)
	}
	args := []string{
		"-M", "microvm,acpi=on,pcie=on,memory-backend=mem", "-object", "memory-backend-memfd,id=mem,size=192M,share=on", "-accel", "tcg,tb-size=32", "-cpu", "max", "-smp", "1", "-m", "192",
		"-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-serial", "file:" + m.console,
		"-kernel", kernel, "-initrd", initrd,
		"-append", "console=ttyS0 quiet reboot=t panic=-1 lsm=lockdown,capability,landlock,yama,bpf tsc_early_khz=" + tscKHz(t) +
			" cryptomgr.notests random.trust_cpu=on audit=0 no_timer_check rcupdate.rcu_expedited=1 8250.nr_uarts=1 transparent_hugepage=madvise",
		"-device", "virtio-serial-pci", "-chardev", "socket,id=ag,path=" + m.socket + ",server=on,wait=off",
		"-device", "virtserialport,chardev=ag,name=agent.0",
		"-netdev", "user,id=n0,restrict=on", "-device", "virtio-net-pci,netdev=n0,mac=52:54:00:12:34:56,romfile=",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
	}
	for i := 0; i < len(disks); i += 2 {
		serial, readOnly := disks[i], "off"
		if disks[i+1] == image {
			readOnly = "on"
		}
		args = append(args, "-drive", "if=none,id="+serial+",format=raw,read-only="+readOnly+",file="+disks[i+1],
			"-device", "virtio-blk-pci,drive="+serial+",serial="+serial)
	}
	m.serveShare(t)
	args = append(args, "-chardev", "socket,id=vfs,path="+m.dir+"/vfs.sock", "-device", "vhost-user-fs-pci,chardev=vfs,tag=share,queue-size=256")
	m.qemu = exec.Command("qemu-system-x86_64", args...)
	var said bytes.Buffer
	m.qemu.Stdout, m.qemu.Stderr = &said, &said
	if err := m.qemu.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { m.qemu.Wait(); close(m.ended) }()
	t.Cleanup(func() {
		m.qemu.Process.Kill()
		<-m.ended
		if t.Failed() {
			console, _ := os.ReadFile(m.console)
			t.Logf("qemu: %s\nconsole:\n%s", &said, console)
		}
	})
	return m
}

// serveShare starts a virtiofsd for a folder of the machine's directory.
func (m *machine) serveShare(t testing.TB) {
	share := filepath.Join(m.dir, "share")
	if err := os.Mkdir(share, 0o755); err != nil {
		t.Fatal(err)
	}
	m.files = exec.Command("/usr/lib/qemu/virtiofsd", "--socket-path="+m.dir+"/vfs.sock", "-o", "source="+share,
		"-o", "cache=auto", "-o", "sandbox=chroot", "--thread-pool-size=0")
	if err := m.files.Start(); err != nil {
		t.Fatalf("serve a share: %v: install qemu-system-common", err)
	}
	ended := make(chan struct{})
	go func() { m.files.Wait(); close(ended) }()
	t.Cleanup(func() {
		m.files.Process.Kill()
		<-ended
	})
	for range 500 {
		if _, err := os.Stat(m.dir + "/vfs.sock"); err == nil {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("virtiofsd makes no socket")
}

// buildDisk makes an empty ext4 file system.
func buildDisk(t testing.TB, path string, size int64) {
	f, err := os.Create(path)
	if err == nil {
		err = f.Truncate(size)
		f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", path).CombinedOutput(); err != nil {
		t.Fatalf("make disk: %v\n%s", err, out)
	}
}

// dial opens a session with the agent.
func (m *machine) dial(t testing.TB, onRecord func([]byte)) *vm.Channel {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	go func() {
		select {
		case <-m.ended:
			cancel()
		case <-ctx.Done():
		}
	}()
	c, hello, err := vm.Dial(ctx, m.socket, onRecord)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("agent %s on %s, up after %.2f s", hello.Build, hello.Release, float64(hello.BootMicros)/1e6)
	t.Cleanup(func() { c.Close() })
	return c
}

func findKernel(t testing.TB) (path, release string) {
	t.Helper()
	k, err := kernel.Find("/", kernel.Flavour)
	if errors.Is(err, kernel.ErrMissing) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return k.Image, k.Release
}

// tscKHz is the rate of the host's clock, which a microvm with ACPI waits for
// in vain unless it is told.
func tscKHz(t testing.TB) string {
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "cpu MHz" {
			var mhz float64
			if _, err := fmt.Sscan(value, &mhz); err != nil {
				t.Fatal(err)
			}
			return fmt.Sprint(int(mhz * 1000))
		}
	}
	t.Fatal("find cpu MHz in /proc/cpuinfo: it is not there")
	return ""
}

var agentOnce = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "agent")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w -buildid= -X hauberk.dev/guest.Build=test",
		"-o", dir+"/init", "hauberk.dev/cmd/hauberk-guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build agent: %w\n%s", err, out)
	}
	return os.ReadFile(dir + "/init")
})

// initramfs packs the agent, the modules it needs in order, and more files.
func initramfs(t testing.TB, release string, files map[string][]byte) []byte {
	agent, err := agentOnce()
	if err != nil {
		t.Fatal(err)
	}
	var a cpio
	a.file("init", 0o755, agent)
	a.dir("modules")
	var order bytes.Buffer
	for _, path := range moduleOrder(t, release, "virtio_pci", "virtio_console", "virtio_blk", "virtio_net", "erofs", "overlay", "virtiofs") {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		a.file("modules/"+filepath.Base(path), 0o644, b)
		fmt.Fprintln(&order, filepath.Base(path))
	}
	a.file("modules/order", 0o644, order.Bytes())
	for name, b := range files {
		a.file(name, 0o644, b)
	}
	return a.end()
}

// moduleOrder gives the files of modules and of what they need, that first.
func moduleOrder(t testing.TB, release string, names ...string) (paths []string) {
	dir := "/lib/modules/" + release
	b, err := os.ReadFile(dir + "/modules.dep")
	if err != nil {
		t.Fatal(err)
	}
	needs := map[string][]string{}
	byName := map[string]string{}
	for line := range strings.Lines(string(b)) {
		file, deps, _ := strings.Cut(strings.TrimSpace(line), ":")
		needs[file] = strings.Fields(deps)
		byName[strings.ReplaceAll(strings.TrimSuffix(filepath.Base(file), ".ko"), "-", "_")] = file
	}
	seen := map[string]bool{}
	var add func(file string)
	add = func(file string) {
		if seen[file] {
			return
		}
		seen[file] = true
		for _, d := range needs[file] {
			add(d)
		}
		paths = append(paths, dir+"/"+file)
	}
	for _, n := range names {
		if byName[n] == "" {
			t.Fatalf("find module %s in %s: it is not there", n, dir)
		}
		add(byName[n])
	}
	return paths
}

// cpio is an archive in the "newc" format that the kernel unpacks.
type cpio struct {
	bytes.Buffer
	inode int
}

func (a *cpio) entry(name string, mode int, data []byte) {
	a.inode++
	fmt.Fprintf(a, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
		a.inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
	a.WriteString(name + "\x00")
	a.pad()
	a.Write(data)
	a.pad()
}

func (a *cpio) pad() {
	for a.Len()%4 != 0 {
		a.WriteByte(0)
	}
}

func (a *cpio) dir(name string)                         { a.entry(name, 0o40755, nil) }
func (a *cpio) file(name string, mode int, data []byte) { a.entry(name, 0o100000|mode, data) }
func (a *cpio) end() []byte                             { a.entry("TRAILER!!!", 0, nil); return a.Bytes() }

// buildImage makes an erofs image of busybox and the files a container wants.
func buildImage(t testing.TB, path string) {
	root := t.TempDir()
	os.Chmod(root, 0o755)
	for _, d := range []string{"bin", "etc", "home/app"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skip("no busybox to put into the image: install busybox-static")
	}
	write := func(name string, mode os.FileMode, data []byte) {
		if err := os.WriteFile(filepath.Join(root, name), data, mode); err != nil {
			t.Fatal(err)
		}
	}
	write("bin/busybox", 0o755, busybox)
	for _, name := range strings.Fields("sh cat echo id mount ip kill sleep head dd wc stty tty ps hostname true false env pwd mknod touch chmod cp tail seq stat nproc dmesg date readlink ls md5sum grep rm ln mkfifo hexdump sync") {
		if err := os.Symlink("busybox", filepath.Join(root, "bin", name)); err != nil {
			t.Fatal(err)
		}
	}
	write("etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:app:/home/app:/bin/sh\n"))
	write("etc/group", 0o644, []byte("root:x:0:\napp:x:1001:\nextra:x:1002:other,app\n"))
	if err := os.Symlink("../run/resolv.conf", filepath.Join(root, "etc/resolv.conf")); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.erofs", "--quiet", path, root).CombinedOutput(); err != nil {
		t.Fatalf("make image: %v\n%s", err, out)
	}
}
