package volume

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/image"
	"hauberk.dev/internal/kernel"
	"hauberk.dev/shim/oci"
	"hauberk.dev/vm"
	"hauberk.dev/vm/boot"
)

// lab is one real guest for all tests of this file: a clone whose memory file
// servers reach, of the agent of this tree, without the Guard.
type lab struct {
	*vm.Channel
	machine *vm.Machine
	pod     *Pod
	last    int
	over    atomic.Bool
}

// Share, Attach and Detach are what volumes ask of a machine.
func (l *lab) Share(ctx context.Context, tag string, server *os.File) error {
	return l.machine.Share(ctx, tag, server)
}
func (l *lab) Attach(ctx context.Context, disk *os.File, writable bool) (string, error) {
	slot := vm.ReadOnlySlot(1)
	if writable {
		slot = vm.WritableSlot(0)
	}
	return string(slot), l.machine.Attach(ctx, vm.Disk{File: disk, Slot: slot})
}
func (l *lab) Detach(ctx context.Context, serial string) error {
	return l.machine.Detach(ctx, vm.Slot(serial))
}

const (
	// patience is for a busy machine that translates the guest's code.
	patience = 3 * time.Minute
	labUser  = 64470 // of the monitors, and nobody else's
)

func openLab(t *testing.T) *lab {
	t.Helper()
	needRoot(t)
	for _, path := range []string{"/usr/bin/qemu-system-x86_64", serverPath, "/bin/busybox"} {
		if _, err := os.Stat(path); err != nil {
			t.Skip("it starts a machine: ", err)
		}
	}
	if _, err := kernel.Find("/", kernel.Flavour); errors.Is(err, kernel.ErrMissing) {
		t.Skip("it starts a machine: ", err)
	}
	dir, err := os.MkdirTemp("", "xv") // a short one: sockets lie in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w -buildid=", "-o", dir+"/agent", "hauberk.dev/cmd/hauberk-guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build agent: %v: %s", err, out)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	guest, err := boot.Open(ctx, boot.Config{State: dir + "/s", Run: dir + "/r", User: labUser, Agent: dir + "/agent"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := guest.Close(); err != nil {
			t.Error(err)
		}
	})
	l := &lab{}
	attacker := exec.Command("go", "build", "-o", dir+"/handles", ".")
	attacker.Dir, attacker.Env = "testdata/handles", append(os.Environ(), "CGO_ENABLED=0")
	if out, err := attacker.CombinedOutput(); err != nil {
		t.Fatalf("build attacker: %v: %s", err, out)
	}
	l.start(ctx, t, guest, dir)
	l.pod = New(Config{
		Guest: l, Machine: l, Log: slog.New(slog.NewTextHandler(t.Output(), nil)), MemoryMiB: 256, UID: "uid",
		Failed: func(err error) {
			if !l.over.Load() { // the end of the machine is that of its server
				t.Error(err)
			}
		},
	})
	t.Cleanup(func() {
		if err := l.pod.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// start clones the machine, and opens what its containers' root is.
func (l *lab) start(ctx context.Context, t *testing.T, guest *boot.Guest, dir string) {
	t.Helper()
	root, err := image.Pack(ctx, rootArchive(t, dir+"/handles"), dir+"/i")
	if err != nil {
		t.Fatal(err)
	}
	disk, err := os.Open(root.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	spec := guest.Template(256, 1, "test")
	template, err := guest.Driver.Template(ctx, spec, func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	l.machine, err = guest.Driver.Clone(ctx, template, vm.Spec{
		ID: "volumes", Template: spec, UID: labUser + 1, GID: labUser + 1, Shared: true, Disks: []vm.Disk{{File: disk, Slot: "r0"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		l.over.Store(true)
		if t.Failed() {
			t.Logf("the guest printed %s", l.machine.Console())
		}
		if err := l.machine.Kill(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	if l.Channel, _, err = l.machine.Channel(ctx, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Channel.Close() })
	if _, err := l.MountRoot(ctx, guestproto.MountRoot{Root: 0, Serial: "r0"}); err != nil {
		t.Fatal(err)
	}
}

// rootArchive holds busybox, a program, and what a container wants.
func rootArchive(t *testing.T, path string) io.Reader {
	t.Helper()
	program, err := os.ReadFile("/bin/busybox")
	other, err2 := os.ReadFile(path)
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	put := func(h tar.Header, data []byte) {
		h.Size = int64(len(data))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"bin/", "etc/", "tmp/", "proc/", "sys/", "dev/"} {
		put(tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o1777}, nil)
	}
	put(tar.Header{Name: "bin/busybox", Mode: 0o755}, program)
	put(tar.Header{Name: "bin/" + filepath.Base(path), Mode: 0o755}, other)
	put(tar.Header{Name: "etc/passwd", Mode: 0o644}, []byte("root:x:0:0::/root:/bin/sh\n"))
	for name := range strings.FieldsSeq("sh dd readlink cat ls ln mv mkdir mknod rm chmod chown sleep touch id mount grep head stat test unshare hostname wc tr sync sysctl chroot") {
		put(tar.Header{Name: "bin/" + name, Typeflag: tar.TypeSymlink, Linkname: "busybox", Mode: 0o777}, nil)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

// mount is one of a test's container.
type mount struct {
	Destination string   `json:"destination"`
	Type        string   `json:"type"`
	Source      string   `json:"source"`
	Options     []string `json:"options"`
}

func bound(source, at, how string) mount {
	return mount{at, "bind", source, []string{"rbind", how}}
}

// make creates a container of the configuration that the CRI of containerd 2.4
// wrote, with another script and other volumes, and starts it.
func (l *lab) make(t *testing.T, script string, edit func(config map[string]any), volumes ...mount) (string, *vm.Process) {
	t.Helper()
	raw, err := os.ReadFile("../oci/testdata/cri24-container.json")
	if err != nil {
		t.Fatal(err)
	}
	var config map[string]any
	if err := json.Unmarshal(raw, &config); err != nil {
		t.Fatal(err)
	}
	mounts := config["mounts"].([]any)[:6] // the kernel's
	for _, v := range volumes {
		mounts = append(mounts, v)
	}
	config["mounts"] = mounts
	process := config["process"].(map[string]any)
	process["args"], process["user"] = []string{"sh", "-c", script}, map[string]any{"uid": 0, "gid": 0}
	if edit != nil {
		edit(config)
	}
	if raw, err = json.Marshal(config); err != nil {
		t.Fatal(err)
	}
	c, err := oci.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	create, list, err := c.Create(oci.Facts{PIDs: map[uint32]uint32{13004: 0}})
	if err != nil {
		t.Fatal(err)
	}
	l.last++
	name := "c" + strconv.Itoa(l.last)
	if err := l.pod.Add(t.Context(), name, &create, list); err != nil {
		t.Fatal(err)
	}
	p, err := l.Channel.Create(t.Context(), create)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return name, p
}

// run makes a container and gives what its script prints, to both outputs.
func (l *lab) run(t *testing.T, script string, edit func(map[string]any), volumes ...mount) string {
	t.Helper()
	name, p := l.make(t, "exec 2>&1; "+script, edit, volumes...)
	return l.finish(t, name, p)
}

func (l *lab) finish(t *testing.T, name string, p *vm.Process) string {
	t.Helper()
	go func() { _, _ = io.Copy(io.Discard, p.Stderr()) }()
	out, err := io.ReadAll(io.LimitReader(p.Stdout(), 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := p.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(l.pod.Collect(ctx, name), p.Forget(ctx), l.pod.Remove(ctx, name)); err != nil {
		t.Error(err)
	}
	return string(out)
}

// want compares what a script printed, line by line.
func want(t *testing.T, got string, lines ...string) {
	t.Helper()
	if got != strings.Join(lines, "\n")+"\n" {
		t.Errorf("printed %q\n   want %q", got, strings.Join(lines, "\n")+"\n")
	}
}

func withRights(names ...string) func(map[string]any) {
	return func(config map[string]any) {
		set := append([]string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_MKNOD"}, names...)
		config["process"].(map[string]any)["capabilities"] = map[string]any{"bounding": set, "effective": set, "permitted": set}
		config["root"].(map[string]any)["readonly"] = false
		delete(config["linux"].(map[string]any), "seccomp")
	}
}

// TestGuest is what containers of a real guest see of their volumes.
func TestGuest(t *testing.T) {
	l := openLab(t)
	shared, seen := t.TempDir(), t.TempDir()
	for _, dir := range []string{shared, seen} {
		if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(filepath.Join(dir, "f"), []byte("kept\n"), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	// The first volume is a share: that starts the machine.
	want(t, l.run(t, "cat /w/f /r/f; echo new > /w/new", withRights(), bound(shared, "/w", "rw"), bound(seen, "/r", "ro")), "kept", "kept")
	if b, err := os.ReadFile(filepath.Join(shared, "new")); err != nil || string(b) != "new\n" {
		t.Errorf("written through the share: %q, %v", b, err)
	}
	t.Run("escapes", func(t *testing.T) { l.testEscapes(t, shared, seen) })
	t.Run("live", l.testLive)
	t.Run("scratch", l.testScratch)
	t.Run("termination", l.testTermination)
	t.Run("confined", l.testConfined)
	t.Run("devices", l.testDevices)
}

// testEscapes is what root of a container does to leave its share, with every
// right over files that a container can have.
func (l *lab) testEscapes(t *testing.T, shared, seen string) {
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	// The guest's kernel would follow a link in the guest; a server that
	// followed one would give the host's.
	script := fmt.Sprintf(`
ln -s %[1]s /w/link; cat /w/link /w/../..%[1]s /w/f/../../..%[1]s
ln -s / /w/top; ls /w/top/ | tr '\n' ' '; echo
mkdir /w/d; ln -s ../../../../../../.. /w/d/up; cat /w/d/up%[1]s
mv /w/d /r/d; ln /w/f /r/g; touch /r/new; rm /r/f; chmod 777 /r/f; echo x > /r/f
mount -o remount,rw /r && touch /r/new
mknod /w/disk b 8 0; mknod /w/kvm c 10 232; ls /w/disk /w/kvm
ls -R /w /r > /dev/null; handles /w %[1]s; handles /r %[1]s
echo done`, secret)
	out := l.run(t, script, withRights("CAP_SYS_ADMIN", "CAP_DAC_READ_SEARCH", "CAP_SYS_CHROOT"), bound(shared, "/w", "rw"), bound(seen, "/r", "ro"))
	if strings.Contains(out, "secret\n") || !strings.HasSuffix(out, "done\n") {
		t.Errorf("printed %s", out)
	}
	if strings.Contains(out, "the host's top") || strings.Contains(out, "the secret") || strings.Count(out, "tried: true true\n") != 2 {
		t.Errorf("made-up handles: %s", out)
	}
	if n := strings.Count(out, "No such file or directory"); n < 4 {
		t.Errorf("%d of the host's files were looked for in vain, want 4 or more:\n%s", n, out)
	}
	if !strings.Contains(out, "bin dev etc ") {
		t.Errorf("the link to the top did not lead to the container's: %s", out)
	}
	for _, dir := range []string{shared, seen} {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.Type()&(fs.ModeDevice|fs.ModeCharDevice) != 0 {
				err = fmt.Errorf("%s is a device", path)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
	entries, err := os.ReadDir(seen)
	if b, err2 := os.ReadFile(filepath.Join(seen, "f")); err != nil || err2 != nil || len(entries) != 1 || string(b) != "kept\n" {
		t.Errorf("the read-only volume holds %v, %q, %v, %v", entries, b, err, err2)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(seen, "f"), &st); err != nil || st.Mode&0o777 != 0o644 {
		t.Errorf("mode %#o, %v", st.Mode, err)
	}
}

// testLive changes a volume of kubelet's 100 times while a container reads: it
// never sees a file that is torn or older than one it has seen, nor two files
// of one view that differ.
func (l *lab) testLive(t *testing.T) {
	k := newKubelet(t, "configmap")
	view := func(n int) map[string]string {
		text := fmt.Sprintf("%06d", n)
		return map[string]string{"n": text, "m": strings.Repeat(text, 2000)}
	}
	if err := k.publish(view(0)); err != nil {
		t.Fatal(err)
	}
	const last = 100
	script := fmt.Sprintf(`
seen=000000; rounds=0; views=0
while :; do
  n=$(cat /v/n) || continue # its view went between two steps of the path, as with kubelet
  [ ${#n} = 6 ] || { echo torn $n; exit; }
  [ $n -ge $seen ] || { echo back from $seen to $n; exit; }
  [ $n = $seen ] || views=$((views+1))
  seen=$n
  cd -P /v/..data && a=$(cat n 2>/dev/null) && b=$(head -c 6 m 2>/dev/null) && c=$(wc -c < m 2>/dev/null) && {
    [ $a = $b ] && [ $c = 12000 ] || { echo a view of $a and $b, $c; exit; }
  }
  cd /
  rounds=$((rounds+1))
  [ $n != %06d ] || { echo whole; [ $views -gt 2 ] && [ $rounds -gt 5 ] && echo followed; exit; }
done`, last)
	name, p := l.make(t, "exec 2>/dev/null; "+script, nil, bound(k.dir, "/v", "ro"))
	for n := 1; n <= last; n++ {
		if err := k.publish(view(n)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(30 * time.Millisecond)
	}
	want(t, l.finish(t, name, p), "whole", "followed")
}

// testScratch: an emptyDir is one for the containers of a pod, bounded, and a
// part of it may be made for a container.
func (l *lab) testScratch(t *testing.T) {
	k := newKubelet(t, "empty-dir")
	if err := unix.Mount("tmpfs", k.dir, "tmpfs", 0, "size=1m,mode=0777"); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount(k.dir, 0) }()
	want(t, l.run(t, "head -c 3000000 /dev/zero 2>/dev/null > /s/large || echo $(wc -c < /s/large) full; rm /s/large; echo one > /s/f; stat -c %a /s", nil, bound(k.dir, "/s", "rw")),
		"1048576 full", "777")
	if err := os.Mkdir(k.dir+"/part", 0o755); err != nil {
		t.Fatal(err)
	}
	sub := filepath.Join(t.TempDir(), "volume-subpaths")
	if err := os.Mkdir(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(k.dir+"/part", sub, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount(sub, 0) }()
	want(t, l.run(t, "cat /s/f; echo two > /p/g; cat /s/part/g", nil, bound(k.dir, "/s", "rw"), bound(sub, "/p", "rw")), "one", "two")
}

// testTermination: what a container leaves is the host's, /etc/hosts is the
// pod's and follows the host.
func (l *lab) testTermination(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pods/uid/containers/app")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	file, hosts := filepath.Join(dir, "0badcafe"), filepath.Join(dir, "etc-hosts")
	if err := errors.Join(os.WriteFile(file, nil, 0o666), os.WriteFile(hosts, []byte("10.0.0.1 a\n"), 0o644)); err != nil {
		t.Fatal(err)
	}
	name, p := l.make(t, "cat /etc/hosts; echo it was the disk > /dev/termination-log; while grep -q ' a$' /etc/hosts; do sleep 0.05; done; cat /etc/hosts", nil,
		bound(file, "/dev/termination-log", "rw"), bound(hosts, "/etc/hosts", "rw"))
	if err := os.WriteFile(hosts, []byte("10.0.0.2 b\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	out := l.finish(t, name, p)
	if !strings.HasSuffix(out, "10.0.0.2 b\n") {
		t.Errorf("printed %q", out)
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "it was the disk\n" {
		t.Errorf("the container left %q, %v", b, err)
	}
}

// testConfined: the rights, limits and filter of the configuration hold in the
// guest as they were translated.
func (l *lab) testConfined(t *testing.T) {
	out := l.run(t, `grep -E 'CapBnd|CapEff|NoNewPrivs|Seccomp:|Max open' /proc/self/status | tr '\t' ' '
id -u; mount -t tmpfs x /tmp; unshare -U true; touch /new
cat /proc/sys/kernel/hostname > /dev/null && echo read; cat /proc/kcore | wc -c; echo 1 > /proc/sysrq-trigger`, nil)
	want(t, out, "CapEff: 0000000000000400", "CapBnd: 0000000000000400", "NoNewPrivs: 1", "Seccomp: 2", "0",
		"mount: permission denied (are you root?)", "unshare: unshare(0x10000000): Operation not permitted",
		"touch: /new: Read-only file system", "read", "0", "sh: can't create /proc/sysrq-trigger: Read-only file system")
}

// loop makes a disk of the host out of a file.
func loop(t *testing.T, content string, size int64) (path string, major, minor uint32, file string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "disk")
	if err := errors.Join(os.WriteFile(file, []byte(content), 0o600), os.Truncate(file, size)); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "--find", "--show", file).Output()
	if err != nil {
		t.Skip("it makes disks of the host, for which this machine has no loop devices: ", err)
	}
	path = strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if err := exec.Command("losetup", "--detach", path).Run(); err != nil {
			t.Errorf("detach %s: %v", path, err)
		}
	})
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return path, unix.Major(st.Rdev), unix.Minor(st.Rdev), file
}

// testDevices: disks of the host are where they were asked for, as they were
// asked for, and so are the devices that a guest has of its own.
func (l *lab) testDevices(t *testing.T) {
	_, major, minor, data := loop(t, "old", 1<<20)
	_, major2, minor2, seed := loop(t, "seed", 1<<20)
	script := `
stat -c '%a %u %g %F' /dev/data /srv/deep/seed
head -c 3 /dev/data; echo; head -c 4 /srv/deep/seed; echo
printf new | dd of=/dev/data conv=notrunc,fsync 2>/dev/null && echo written
printf bad | dd of=/srv/deep/seed conv=notrunc,fsync 2>&1 | grep -c -i 'not permitted\|read-only'
for d in /dev/data /srv/deep/seed; do set -- $(stat -c '0x%t 0x%T' $d); s=/sys/dev/block/$(($1)):$(($2)); cat $s/size $s/ro | tr '\n' ' '; done; echo
stat -c %t:%T /dev/fuse /dev/net/tun /etc/off; wc -c < /etc/off`
	disk := func(path string, major, minor uint32, mode, uid, gid int) map[string]any {
		return map[string]any{"path": path, "type": "b", "major": major, "minor": minor, "fileMode": mode, "uid": uid, "gid": gid}
	}
	rule := func(major, minor uint32, access string) map[string]any {
		return map[string]any{"allow": true, "type": "b", "major": major, "minor": minor, "access": access}
	}
	out := l.run(t, script, func(config map[string]any) {
		withRights()(config)
		linux := config["linux"].(map[string]any)
		linux["devices"] = []any{
			disk("/dev/data", major, minor, 0o640, 7, 8), disk("/srv/deep/seed", major2, minor2, 0o444, 0, 0),
			map[string]any{"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200},
		}
		linux["resources"] = map[string]any{"devices": []any{
			map[string]any{"allow": false, "access": "rwm"}, rule(major, minor, "rwm"), rule(major2, minor2, "rm"),
		}}
	}, bound("/dev/fuse", "/dev/fuse", "rw"), bound("/dev/null", "/etc/off", "rw"))
	want(t, out, "640 7 8 block special file", "444 0 0 block special file", "old", "seed", "written", "1", "2048 0 2048 1 ", "a:e5", "a:c8", "1:3", "0")
	for file, is := range map[string]string{data: "new", seed: "seed"} {
		if raw, err := os.ReadFile(file); err != nil || !strings.HasPrefix(string(raw), is) {
			t.Errorf("the host's disk begins with %.8q, %v, want %q", raw, err, is)
		}
	}
}
