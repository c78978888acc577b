package volume

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/shim/oci"
)

// needRoot: namespaces and mounts are root's.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("it makes namespaces and mounts: run as root")
	}
}

// eventually waits until f is content.
func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	var err error
	for range 2000 {
		if err = f(); err == nil {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("%s: %v", what, err)
}

// descendants are the processes below one.
func descendants(t *testing.T, pid int) (all []int) {
	t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return nil // ended
	}
	for _, word := range strings.Fields(string(raw)) {
		child, err := strconv.Atoi(word)
		if err != nil {
			t.Fatal(err)
		}
		all = append(append(all, child), descendants(t, child)...)
	}
	return all
}

// openTestShare makes a pod with a share of two volumes, and gives the process
// that serves them once it has shut itself in.
func openTestShare(t *testing.T) (p *Pod, m *machine, server int, writable, readOnly string) {
	t.Helper()
	needRoot(t)
	if _, err := os.Stat(serverPath); err != nil {
		t.Skip("it is about Debian's virtiofsd (qemu-system-common): ", err)
	}
	writable, readOnly = t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(readOnly, "f"), []byte("kept"), 0o644); err != nil {
		t.Fatal(err)
	}
	p, _, m = newPod(t)
	create := guestproto.Create{Mounts: make([]guestproto.Mount, 2)}
	if err := p.Add(t.Context(), "c", &create, []oci.Volume{
		{Field: "mounts[0].source", Mount: 0, Device: -1, Source: writable, Target: "/w", Recursive: true},
		{Field: "mounts[1].source", Mount: 1, Device: -1, Source: readOnly, Target: "/r", ReadOnly: true, Recursive: true},
	}); err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{"share/0", "share/1"} {
		if got := create.Mounts[i]; got.Kind != guestproto.MountShare || got.Source != want {
			t.Errorf("mount %d: %+v", i, got)
		}
	}
	eventually(t, "the server shuts itself in", func() error {
		for _, pid := range descendants(t, p.share.server.Process.Pid) {
			status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
			_, rest, _ := strings.Cut(string(status), "\nCapEff:\t")
			rights, _, _ := strings.Cut(rest, "\n")
			caps, err2 := strconv.ParseUint(rights, 16, 64)
			if err == nil && err2 == nil && caps>>unix.CAP_SYS_ADMIN&1 == 0 { // the last that it gives up
				server = pid
				return nil
			}
		}
		return errors.New("it still may administrate")
	})
	return p, m, server, writable, readOnly
}

// TestShareHoldsNothingElse looks at what the file server could give away.
func TestShareHoldsNothingElse(t *testing.T) {
	p, _, server, writable, _ := openTestShare(t)
	root := fmt.Sprintf("/proc/%d/root", server)
	entries, err := os.ReadDir(root)
	if err != nil || len(entries) != 2 || entries[0].Name() != "0" || entries[1].Name() != "1" {
		t.Errorf("it sees %v, %v", entries, err)
	}
	// The way up leads nowhere, by whatever name.
	for _, path := range []string{"..", "../..", "0/..", "0/../.."} {
		if up, err := os.ReadDir(root + "/" + path); err != nil || len(up) != 2 {
			t.Errorf("%s: %v, %v", path, up, err)
		}
	}
	lines, err := os.Open(fmt.Sprintf("/proc/%d/mountinfo", server))
	if err != nil {
		t.Fatal(err)
	}
	defer lines.Close()
	mounts, err := parseMounts(lines)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mounts {
		if m.point != "/" && m.point != "/0" && m.point != "/1" {
			t.Errorf("it has a mount at %s", m.point)
		}
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", server))
	if err != nil {
		t.Fatal(err)
	}
	const may = 1<<unix.CAP_CHOWN | 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_FOWNER | 1<<unix.CAP_FSETID | 1<<unix.CAP_SETGID | 1<<unix.CAP_SETUID | 1<<unix.CAP_SETFCAP
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":\t")
		switch name {
		case "CapEff", "CapPrm", "CapBnd":
			if caps, err := strconv.ParseUint(value, 16, 64); err != nil || caps&^may != 0 {
				t.Errorf("%s %s: it may more than %x, %v", name, value, may, err)
			}
		case "NoNewPrivs":
			if value != "1" {
				t.Errorf("it can gain rights")
			}
		case "Seccomp":
			if value != "2" {
				t.Errorf("it has no filter of system calls")
			}
		}
	}
	for _, kind := range []string{"net", "mnt", "pid", "ipc", "uts"} {
		its, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", server, kind))
		ours, err2 := os.Readlink("/proc/self/ns/" + kind)
		if err != nil || err2 != nil || its == ours {
			t.Errorf("namespace %s: %s and %s, %v, %v", kind, its, ours, err, err2)
		}
	}
	// A volume of a later container appears, one that was unmounted from the
	// host's tree does not matter.
	later := t.TempDir()
	create := guestproto.Create{Mounts: make([]guestproto.Mount, 2)}
	if err := p.Add(t.Context(), "d", &create, []oci.Volume{
		{Mount: 0, Device: -1, Source: later, Target: "/l"}, {Mount: 1, Device: -1, Source: writable, Target: "/w", Recursive: true},
	}); err != nil {
		t.Fatal(err)
	}
	if create.Mounts[0].Source != "share/2" || create.Mounts[1].Source != "share/0" {
		t.Errorf("%+v", create.Mounts)
	}
	if err := os.WriteFile(filepath.Join(later, "x"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(root + "/2/x"); err != nil {
		t.Errorf("a later volume: %v", err)
	}
}

// TestReadOnlyShareCannotBeWritten writes as the server would if the guest had
// taken it over.
func TestReadOnlyShareCannotBeWritten(t *testing.T) {
	_, _, server, writable, readOnly := openTestShare(t)
	root := fmt.Sprintf("/proc/%d/root", server)
	if err := os.WriteFile(root+"/0/new", []byte("x"), 0o644); err != nil {
		t.Errorf("a writable volume: %v", err)
	}
	if _, err := os.Stat(filepath.Join(writable, "new")); err != nil {
		t.Error(err)
	}
	for name, act := range map[string]func() error{
		"write":  func() error { return os.WriteFile(root+"/1/f", []byte("x"), 0o644) },
		"make":   func() error { return os.WriteFile(root+"/1/new", nil, 0o644) },
		"remove": func() error { return os.Remove(root + "/1/f") },
		"rename": func() error { return os.Rename(root+"/1/f", root+"/1/g") },
		"mode":   func() error { return os.Chmod(root+"/1/f", 0o777) },
		"owner":  func() error { return os.Chown(root+"/1/f", 1, 1) },
		"time":   func() error { return os.Chtimes(root+"/1/f", time.Now(), time.Now()) },
		"link":   func() error { return os.Link(root+"/1/f", root+"/1/g") },
		"escape": func() error { return os.Link(root+"/1/f", root+"/0/g") },
	} {
		err := act()
		if !errors.Is(err, unix.EROFS) && !(name == "escape" && errors.Is(err, unix.EXDEV)) {
			t.Errorf("%s: %v, want a read-only file system", name, err)
		}
	}
	if b, err := os.ReadFile(filepath.Join(readOnly, "f")); string(b) != "kept" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	// Where the volume can be written, a device node there opens nothing.
	if err := unix.Mknod(filepath.Join(writable, "disk"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))); err != nil {
		t.Fatal(err)
	}
	if f, err := os.Open(root + "/0/disk"); !errors.Is(err, unix.EACCES) {
		t.Errorf("a device: %v, %v", f, err)
	}
}

// TestReadOnlyBelow: read-only is a volume's first mount, and with rro those
// below, too. The guest is told so where it cannot see the difference.
func TestReadOnlyBelow(t *testing.T) {
	p, _, server, _, _ := openTestShare(t)
	dir := t.TempDir()
	below := filepath.Join(dir, "below")
	if err := os.Mkdir(below, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("x", below, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(below, unix.MNT_DETACH) })
	create := guestproto.Create{Mounts: []guestproto.Mount{{Flags: unix.MS_RDONLY | unix.MS_BIND}, {Flags: unix.MS_RDONLY | unix.MS_BIND}, {Flags: unix.MS_RDONLY}}}
	if err := p.Add(t.Context(), "below", &create, []oci.Volume{
		{Mount: 0, Device: -1, Source: dir, Target: "/a", ReadOnly: true, Recursive: true},
		{Mount: 1, Device: -1, Source: dir, Target: "/b", ReadOnly: true, Recursive: true, Below: true},
		{Mount: 2, Device: -1, Source: dir, Target: "/c", ReadOnly: true},
	}); err != nil {
		t.Fatal(err)
	}
	for i, want := range []struct {
		top, below error
		flags      uint32
	}{{unix.EROFS, nil, unix.MS_BIND}, {unix.EROFS, unix.EROFS, unix.MS_RDONLY | unix.MS_BIND}, {unix.EROFS, unix.EROFS, unix.MS_RDONLY}} {
		m := create.Mounts[i]
		at := fmt.Sprintf("/proc/%d/root/%s", server, strings.TrimPrefix(m.Source, "share/"))
		if err := os.WriteFile(at+"/f", nil, 0o644); !errors.Is(err, want.top) {
			t.Errorf("%d: write: %v, want %v", i, err, want.top)
		}
		if err := os.WriteFile(at+"/below/f", nil, 0o644); !errors.Is(err, want.below) {
			t.Errorf("%d: write below: %v, want %v", i, err, want.below)
		}
		if m.Flags != want.flags {
			t.Errorf("%d: the guest mounts with %#x, want %#x", i, m.Flags, want.flags)
		}
	}
}

// TestLaterMountsStayOut: what is mounted on the host below a read-only volume
// later does not come in by propagation, where it could be written.
func TestLaterMountsStayOut(t *testing.T) {
	_, _, server, _, readOnly := openTestShare(t)
	below := filepath.Join(readOnly, "below")
	if err := os.Mkdir(below, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("x", below, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(below, 0) })
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/root/1/below/x", server), nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("write to a later mount: %v", err)
	}
}

// TestLaterMountsComeIn: below a volume that asks for it what the host mounts
// later is there, and gone when the host unmounts it, and only there.
func TestLaterMountsComeIn(t *testing.T) {
	p, _, server, _, _ := openTestShare(t)
	dir, private := t.TempDir(), t.TempDir()
	for path, kind := range map[string]uintptr{dir: unix.MS_SHARED, private: unix.MS_PRIVATE} {
		if err := errors.Join(unix.Mount(path, path, "", unix.MS_BIND, ""), unix.Mount("", path, "", kind, "")); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Unmount(path, unix.MNT_DETACH) })
	}
	below := filepath.Join(dir, "below")
	if err := os.Mkdir(below, 0o755); err != nil {
		t.Fatal(err)
	}
	create := guestproto.Create{Mounts: make([]guestproto.Mount, 2)}
	if err := p.Add(t.Context(), "later", &create, []oci.Volume{
		{Mount: 0, Device: -1, Source: dir, Target: "/later", Recursive: true, Later: true},
		{Mount: 1, Device: -1, Source: dir, Target: "/never", Recursive: true},
	}); err != nil {
		t.Fatal(err)
	}
	at := func(mount int) string {
		return fmt.Sprintf("/proc/%d/root/%s/below/x", server, strings.TrimPrefix(create.Mounts[mount].Source, "share/"))
	}
	if err := errors.Join(unix.Mount("x", below, "tmpfs", 0, "size=64k"), os.WriteFile(below+"/x", nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(at(0)); err != nil {
		t.Errorf("below a volume that asks for it: %v", err)
	}
	if _, err := os.Stat(at(1)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("below one that does not: %v", err)
	}
	if err := unix.Unmount(below, 0); err != nil {
		t.Errorf("unmount it on the host: %v", err)
	}
	if _, err := os.Stat(at(0)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after the host unmounted it: %v", err)
	}
	err := p.Add(t.Context(), "private", &guestproto.Create{Mounts: make([]guestproto.Mount, 1)}, []oci.Volume{{Mount: 0, Device: -1, Source: private, Target: "/p", Later: true}})
	if err == nil || !strings.Contains(err.Error(), "private") {
		t.Errorf("on a private mount: %v", err)
	}
}

// TestServerKilled: the pod is told, once, and nothing is left.
func TestServerKilled(t *testing.T) {
	p, m, server, _, _ := openTestShare(t)
	if err := unix.Kill(server, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-m.failed:
		if !strings.Contains(err.Error(), "file server of the pod's volumes ended") {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("nobody is told")
	}
	create := guestproto.Create{Mounts: make([]guestproto.Mount, 1)}
	err := p.Add(t.Context(), "d", &create, []oci.Volume{{Mount: 0, Device: -1, Source: t.TempDir(), Target: "/l"}})
	if err == nil || !strings.Contains(err.Error(), "has ended") {
		t.Errorf("a volume after the end: %v", err)
	}
}

// TestShareEnds: closing the pod ends the server and its child, even one that
// does not listen.
func TestShareEnds(t *testing.T) {
	p, m, server, _, _ := openTestShare(t)
	if err := unix.Kill(server, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the server ends", func() error {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", server)); err == nil {
			return errors.New("it is there")
		}
		return nil
	})
	select {
	case err := <-m.failed:
		t.Errorf("told %v", err)
	default:
	}
}
