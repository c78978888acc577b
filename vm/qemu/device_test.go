package qemu

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hauberk.dev/vm"
)

// tap opens a tap device that goes away with the file.
func tap(t *testing.T) *os.File {
	t.Helper()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skipf("the machine has no tap devices: %v", err)
	}
	f := os.NewFile(uintptr(fd), "tap")
	t.Cleanup(func() { f.Close() })
	req, err := unix.NewIfreq("hbvm%d")
	if err != nil {
		t.Fatal(err)
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		t.Fatal(err)
	}
	return f
}

// image writes a disk of 64 KiB that begins with a text.
func image(t *testing.T, text string) *os.File {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(t.TempDir(), "disk"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(64 << 10); err != nil {
		t.Fatal(err)
	}
	return f
}

// device gives the guest's file of a slot.
func device(t *testing.T, a *agent, slot string) string {
	t.Helper()
	for _, name := range strings.Fields(say(t, a, "find /sys/block/vd*")) {
		if say(t, a, "read "+name+"/serial") == slot {
			return "/dev/" + filepath.Base(name)
		}
	}
	t.Fatalf("the guest has no disk %s", slot)
	return ""
}

// eventually asks until the answer is wanted: devices appear after a rescan.
func eventually(t *testing.T, a *agent, line, want string) {
	t.Helper()
	var got string
	for range 700 {
		if got = say(t, a, line); got == want {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("%s: %q, want %q", line, got, want)
}

func TestDevices(t *testing.T) {
	spec := needMachine(t)
	run, ctx := filepath.Join(t.TempDir(), "run"), deadline(t)
	d := driver(t, run)
	template, err := d.Template(ctx, spec, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, start := range map[string]func(vm.Spec) (*vm.Machine, error){
		"clone": func(s vm.Spec) (*vm.Machine, error) { return d.Clone(ctx, template, s) },
		"boot":  func(s vm.Spec) (*vm.Machine, error) { return d.Boot(ctx, s) },
	} {
		t.Run(name, func(t *testing.T) {
			root, data := image(t, "the-root"), image(t, "the-data")
			s := machine(0, spec)
			s.ID = name
			s.Disks = []vm.Disk{{File: root, Slot: "r0"}, {File: data, Slot: "w1"}}
			s.Networks = []vm.Network{{Tap: tap(t)}, {Tap: tap(t)}}
			began := time.Now()
			m, err := start(s)
			if err != nil {
				t.Fatal(err)
			}
			a := converse(t, ctx, m)
			say(t, a, "ping")
			answered := time.Since(began)
			t.Logf("%s answers after %v", name, answered.Round(time.Millisecond))
			r0, w1 := device(t, a, "r0"), device(t, a, "w1")
			if got := say(t, a, "read /sys/class/net/eth0/address"); got != "02:48:4e:00:00:00" {
				t.Errorf("the first network device is %q", got)
			}
			if got := say(t, a, "rescan"); got != "ok" { // the second is none of the template's
				t.Errorf("rescan: %s", got)
			}
			eventually(t, a, "read /sys/class/net/eth1/address", "02:48:4e:00:00:01")
			for _, line := range [][2]string{
				{"read " + r0, "the-root"}, {"read " + w1, "the-data"}, {"read " + device(t, a, "r7"), ""}, {"write " + w1 + " changed!", "ok"},
			} {
				if got := say(t, a, line[0]); got != line[1] {
					t.Errorf("%s: %q, want %q", line[0], got, line[1])
				}
			}
			if got := say(t, a, "write "+r0+" broken"); got == "ok" {
				t.Error("the guest wrote to a read-only disk")
			}
			begins(t, root, "the-root")
			begins(t, data, "changed!")
			confined(t, m)
			if err := m.Kill(ctx); err != nil {
				t.Error(err)
			}
		})
	}
}

func begins(t *testing.T, f *os.File, want string) {
	t.Helper()
	b := make([]byte, len(want))
	if _, err := f.ReadAt(b, 0); err != nil || string(b) != want {
		t.Errorf("the disk begins with %q, %v; want %q", b, err, want)
	}
}

func TestTemplateCannotChange(t *testing.T) {
	spec := needMachine(t)
	ctx := deadline(t)
	d := driver(t, filepath.Join(t.TempDir(), "run"))
	template, err := d.Template(ctx, spec, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = template.Use(func(memory, state *os.File) error {
		for _, f := range []*os.File{memory, state} {
			fi, err := f.Stat()
			if err != nil || fi.Size() == 0 {
				t.Errorf("template file of %d bytes, %v", fi.Size(), err)
			}
			if _, err := f.WriteAt([]byte{1}, 0); !errors.Is(err, unix.EPERM) {
				t.Errorf("write: %v, want %v", err, unix.EPERM)
			}
			if err := f.Truncate(0); !errors.Is(err, unix.EPERM) {
				t.Errorf("truncate: %v, want %v", err, unix.EPERM)
			}
			if _, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
				t.Error("the file could be mapped to write")
			}
			if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, 0); !errors.Is(err, unix.EPERM) {
				t.Errorf("seals could be added: %v", err)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	refusesOthers(t, d, template, spec)
	if err := template.Close(); err != nil {
		t.Error(err)
	}
	if _, err := d.Clone(ctx, template, machine(1, spec)); !errors.Is(err, vm.ErrTemplateClosed) {
		t.Errorf("clone of a closed template: %v", err)
	}
}

// refusesOthers asks for machines that the template was not made for.
func refusesOthers(t *testing.T, d *Driver, template *vm.Template, spec vm.TemplateSpec) {
	t.Helper()
	for name, edit := range map[string]func(*vm.TemplateSpec){
		"memory":       func(s *vm.TemplateSpec) { s.MemoryMiB *= 2 },
		"processors":   func(s *vm.TemplateSpec) { s.CPUs++ },
		"trust domain": func(s *vm.TemplateSpec) { s.TrustDomain = "other.test" },
		"kernel":       func(s *vm.TemplateSpec) { s.Kernel.Digest = strings.Repeat("0", 64) },
		"initrd":       func(s *vm.TemplateSpec) { s.Initrd.Digest = strings.Repeat("0", 64) },
	} {
		other := spec
		edit(&other)
		if _, err := d.Clone(t.Context(), template, machine(0, other)); !errors.Is(err, vm.ErrWrongTemplate) {
			t.Errorf("another %s: %v, want %v", name, err, vm.ErrWrongTemplate)
		}
	}
	forged := vm.NewTemplate(strings.Repeat("0", 64), "", nil, nil)
	if _, err := d.Clone(t.Context(), forged, machine(0, spec)); !errors.Is(err, vm.ErrWrongTemplate) {
		t.Errorf("another key: %v", err)
	}
}

func TestPauseResumeKill(t *testing.T) {
	spec := needMachine(t)
	run, ctx := filepath.Join(t.TempDir(), "run"), deadline(t)
	d := driver(t, run)
	began := time.Now()
	m, err := d.Boot(ctx, machine(0, spec))
	if err != nil {
		t.Fatal(err)
	}
	a := converse(t, ctx, m)
	say(t, a, "ping")
	t.Logf("cold boot answers after %v", time.Since(began).Round(time.Millisecond))
	if err := m.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(a.conn, "ping")
	a.conn.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
	var quiet net.Error
	if n, err := a.conn.Read(make([]byte, 1)); !errors.As(err, &quiet) || !quiet.Timeout() {
		t.Fatalf("a paused guest answered: %d bytes, %v", n, err)
	}
	if err := m.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	a.conn.SetReadDeadline(time.Now().Add(patience))
	if !a.in.Scan() || a.in.Text() != "pong" {
		t.Errorf("the resumed guest says %q, %v", a.in.Text(), a.in.Err())
	}
	j, err := vm.ReadJournal(m.Dir())
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := m.Kill(ctx); err != nil {
			t.Error(err)
		}
	}
	if err := m.Err(); !errors.Is(err, vm.ErrKilled) {
		t.Errorf("it ended by %v", err)
	}
	gone(t, m.PID(), m.Dir())
	for _, path := range j.Cgroups {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("cgroup %s is left: %v", path, err)
		}
	}
	if _, err := m.Memory(); err == nil {
		t.Error("an ended machine has memory")
	}
}

func TestGuestThatEndsIsNoticed(t *testing.T) {
	spec := needMachine(t)
	ctx := deadline(t)
	d := driver(t, filepath.Join(t.TempDir(), "run"))
	template, err := d.Template(ctx, spec, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i, word := range []string{"die", "panic"} {
		m, err := d.Clone(ctx, template, machine(i, spec))
		if err != nil {
			t.Fatal(err)
		}
		a := converse(t, ctx, m)
		say(t, a, "ping")
		fmt.Fprintln(a.conn, word)
		select {
		case <-m.Done():
		case <-ctx.Done():
			t.Fatalf("%s: the machine runs on", word)
		}
		if err := m.Err(); !errors.Is(err, vm.ErrGone) {
			t.Errorf("%s: it ended by %v", word, err)
		}
		if word == "panic" && !strings.Contains(m.Console(), "Kernel panic") {
			t.Errorf("the console holds %s", m.Console())
		}
		if err := m.Kill(ctx); err != nil {
			t.Error(err)
		}
		gone(t, m.PID(), m.Dir())
	}
}

func TestStartsRefuse(t *testing.T) {
	spec := needMachine(t)
	run, ctx := filepath.Join(t.TempDir(), "run"), deadline(t)
	d := driver(t, run)
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for says, edit := range map[string]func(*vm.Spec){
		"is not letters":  func(s *vm.Spec) { s.ID = "../x" },
		"as root":         func(s *vm.Spec) { s.UID = 0 },
		"memory of 1 MiB": func(s *vm.Spec) { s.Template.MemoryMiB = 1 },
		"0 CPUs":          func(s *vm.Spec) { s.Template.CPUs = 0 },
		"has digest":      func(s *vm.Spec) { s.Template.Kernel.Digest = strings.Repeat("0", 64) },
		"not a SHA-256":   func(s *vm.Spec) { s.Template.Initrd.Digest = "x" },
		"no such file":    func(s *vm.Spec) { s.Template.Initrd.Path = "/nowhere" },
		`not "a,b"`:       func(s *vm.Spec) { s.Disks = []vm.Disk{{File: null, Slot: "a,b"}} },
		`not "r1"`:        func(s *vm.Spec) { s.Disks = []vm.Disk{{File: null, Slot: "r1"}, {File: null, Slot: "r1"}} },
		"needs a file":    func(s *vm.Spec) { s.Disks = []vm.Disk{{Slot: "r0"}} },
		"nor a block":     func(s *vm.Spec) { s.Disks = []vm.Disk{{File: null, Slot: "r0"}} },
		"needs a tap":     func(s *vm.Spec) { s.Networks = []vm.Network{{}} },
		"QEMU says":       func(s *vm.Spec) { s.Networks = []vm.Network{{Tap: null}} },
		"no trust domain": func(s *vm.Spec) { s.Template.TrustDomain = "" },
	} {
		s := machine(0, spec)
		edit(&s)
		if _, err := d.Boot(ctx, s); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("error %v, want one that says %q", err, says)
		}
	}
	if left, err := os.ReadDir(run); err != nil || len(left) != 0 {
		t.Errorf("refused starts left %v, %v", left, err)
	}
}

// TestSlots puts disks into running machines and takes them out again: what a
// guest reads is what is there, never what was there before.
func TestSlots(t *testing.T) {
	spec := needMachine(t)
	run, ctx := filepath.Join(t.TempDir(), "run"), deadline(t)
	d := driver(t, run)
	template, err := d.Template(ctx, spec, nil)
	if err != nil {
		t.Fatal(err)
	}
	s := machine(0, spec)
	s.Disks, s.DiskLimit = []vm.Disk{{File: image(t, "at-start"), Slot: "r0"}}, 64<<10
	m, err := d.Clone(ctx, template, s)
	if err != nil {
		t.Fatal(err)
	}
	a := converse(t, ctx, m)
	r0, w0 := device(t, a, "r0"), device(t, a, "w0")
	reads := func(dev, want string) {
		t.Helper()
		if got := say(t, a, "read "+dev); got != want {
			t.Errorf("%s reads %q, want %q", dev, got, want)
		}
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Error(err)
		}
	}
	reads(r0, "at-start")
	if err := m.Attach(ctx, vm.Disk{File: image(t, "x"), Slot: "r0"}); !errors.Is(err, vm.ErrSlotTaken) {
		t.Errorf("attach to a full slot: %v", err)
	}
	must(m.Detach(ctx, "r0"))
	must(m.Detach(ctx, "r0"))
	reads(r0, "")
	data := image(t, "writable")
	must(m.Attach(ctx, vm.Disk{File: image(t, "second"), Slot: "r0"}))
	must(m.Attach(ctx, vm.Disk{File: data, Slot: "w0"}))
	reads(r0, "second")
	reads(w0, "writable")
	if got := say(t, a, "write "+w0+" changed!"); got != "ok" {
		t.Errorf("write: %s", got)
	}
	begins(t, data, "changed!")
	if err := m.Attach(ctx, vm.Disk{File: data, Slot: "w9"}); err == nil {
		t.Error("there is no slot w9")
	}
	// What this clone changes is its own: no server could follow.
	if err := m.Share(ctx, "share", image(t, "")); !errors.Is(err, vm.ErrNotShared) {
		t.Errorf("share with a copy-on-write clone: %v", err)
	}
	must(m.Release())
	if m, err = d.Adopt(ctx, m.Dir()); err != nil {
		t.Fatal(err)
	}
	must(m.Detach(ctx, "r0"))
	must(m.Attach(ctx, vm.Disk{File: image(t, "third"), Slot: "r0"}))
	reads(r0, "third")
	for _, slot := range vm.Slots() {
		must(m.Detach(ctx, slot))
	}
	reads(w0, "")
	confined(t, m)
	must(m.Kill(ctx))
}
