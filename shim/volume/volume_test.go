package volume

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/shim/oci"
)

// guest is the agent's directories, in memory. Every push goes through the
// bytes of the protocol.
type guest struct {
	mu    sync.Mutex
	dirs  map[string]guestproto.Dir
	files map[string]map[string]guestproto.PushFile // by directory
	stamp map[string]string
	pushs int
	views []string // of the file "n" of every push with a stamp
	fail  error
}

func (g *guest) MakeDir(_ context.Context, m guestproto.Dir) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if _, err := guestproto.ParseDir(m.Append(nil)); err != nil {
		return err
	}
	if _, ok := g.dirs[m.Name]; ok {
		return unix.EEXIST
	}
	g.dirs[m.Name] = m
	return nil
}

func (g *guest) Push(_ context.Context, dir, stamp string, files []guestproto.PushFile) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.fail != nil {
		return g.fail
	}
	if _, ok := g.dirs[dir]; !ok {
		return unix.ENOENT
	}
	m := guestproto.Push{Dir: dir, Stamp: stamp, First: true, Last: true, Files: files}
	if _, err := guestproto.ParsePush(m.Append(nil)); err != nil {
		return err
	}
	if stamp != "" && stamp == g.stamp[dir] {
		return unix.EEXIST
	}
	if g.files[dir] == nil || stamp != "" {
		g.files[dir] = map[string]guestproto.PushFile{}
	}
	for _, f := range files {
		g.files[dir][f.Path] = f
		if f.Path == "n" && stamp != "" {
			g.views = append(g.views, string(f.Data))
		}
	}
	g.stamp[dir] = stamp
	g.pushs++
	return nil
}

func (g *guest) Pull(_ context.Context, dir, path string) ([]byte, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	f, ok := g.files[dir][path]
	if !ok {
		return nil, unix.ENOENT
	}
	return f.Data, nil
}

func (g *guest) Rescan(context.Context) error { return g.fail }

func (g *guest) MountShare(context.Context, string) error { return g.fail }

// text is a pushed file's.
func (g *guest) text(source, path string) string {
	g.mu.Lock()
	defer g.mu.Unlock()
	dir, name, _ := strings.Cut(source, "/")
	return string(g.files[dir][filepath.Join(name, path)].Data)
}

// machine holds the other ends.
type machine struct {
	failed chan error
	mu     sync.Mutex
	shares []*os.File
	disks  map[string]bool // writable, by serial
}

func (m *machine) Share(_ context.Context, _ string, server *os.File) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.shares = append(m.shares, server)
	return nil
}

func (m *machine) Attach(_ context.Context, f *os.File, writable bool) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	serial := fmt.Sprintf("s%d", len(m.disks))
	m.disks[serial] = writable
	return serial, nil
}

func (m *machine) Detach(_ context.Context, serial string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.disks, serial)
	return nil
}

func newPod(t *testing.T) (*Pod, *guest, *machine) {
	t.Helper()
	g := &guest{dirs: map[string]guestproto.Dir{}, files: map[string]map[string]guestproto.PushFile{}, stamp: map[string]string{}}
	m := &machine{failed: make(chan error, 4), disks: map[string]bool{}}
	p := New(Config{
		Guest: g, Machine: m, Log: slog.New(slog.DiscardHandler), MemoryMiB: 256, UID: "uid",
		Failed: func(err error) { m.failed <- err },
	})
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
		for _, f := range m.shares {
			_ = f.Close()
		}
	})
	return p, g, m
}

// bring adds one volume for a container and gives its mount.
func bring(t *testing.T, p *Pod, container string, v oci.Volume) (guestproto.Mount, error) {
	t.Helper()
	create := guestproto.Create{Mounts: make([]guestproto.Mount, 1)}
	v.Field, v.Device = "mounts[0].source", -1
	err := p.Add(t.Context(), container, &create, []oci.Volume{v})
	return append(create.Mounts, guestproto.Mount{})[0], err
}

// kubelet writes a volume as kubelet does: a view in a directory of its own,
// published by the rename of a link.
type kubelet struct {
	dir   string
	views int
}

func newKubelet(t *testing.T, kind string) *kubelet {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "pods/uid/volumes/kubernetes.io~"+kind+"/v")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return &kubelet{dir: dir}
}

func (k *kubelet) publish(files map[string]string) error {
	k.views++
	view := fmt.Sprintf("..2026_11_22_10_00_00.%d", k.views)
	for name, text := range files {
		path := filepath.Join(k.dir, view, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(text), 0o640); err != nil {
			return err
		}
		first, _, _ := strings.Cut(name, "/")
		if err := os.Symlink("..data/"+first, filepath.Join(k.dir, first)); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	old, err := os.Readlink(filepath.Join(k.dir, "..data"))
	if err2 := os.Symlink(view, filepath.Join(k.dir, "..data_tmp")); err2 != nil {
		return err2
	}
	if err := os.Rename(filepath.Join(k.dir, "..data_tmp"), filepath.Join(k.dir, "..data")); err != nil {
		return err
	}
	if err == nil {
		return os.RemoveAll(filepath.Join(k.dir, old))
	}
	return nil
}

// TestLiveDirectory: a volume of kubelet's comes whole and is followed.
func TestLiveDirectory(t *testing.T) {
	for _, kind := range []string{"configmap", "secret", "projected", "downward-api"} {
		t.Run(kind, func(t *testing.T) {
			p, g, _ := newPod(t)
			k := newKubelet(t, kind)
			if err := k.publish(map[string]string{"a": "1", "deep/er/b": "2"}); err != nil {
				t.Fatal(err)
			}
			m, err := bring(t, p, "c", oci.Volume{Source: k.dir, Target: "/v", ReadOnly: true})
			if err != nil || m.Kind != guestproto.MountPod || m.Source != "v0" {
				t.Fatalf("%+v, %v", m, err)
			}
			if g.text("v0", "a") != "1" || g.text("v0", "deep/er/b") != "2" || g.stamp["v0"] != "..2026_11_22_10_00_00.1" || g.files["v0"]["a"].Mode != 0o640 {
				t.Errorf("%+v", g.files)
			}
			if err := k.publish(map[string]string{"a": "3"}); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the change", func() error {
				if a, b := g.text("v0", "a"), g.text("v0", "deep/er/b"); a != "3" || b != "" {
					return fmt.Errorf("%q, %q", a, b)
				}
				return nil
			})
			// The next container sees the same directory.
			if m, err := bring(t, p, "d", oci.Volume{Source: k.dir, Target: "/w"}); err != nil || m.Source != "v0" {
				t.Errorf("%+v, %v", m, err)
			}
			// When kubelet takes it away, the last view stays.
			pushs := g.pushs
			if err := os.RemoveAll(k.dir); err != nil {
				t.Fatal(err)
			}
			time.Sleep(3 * most)
			if g.text("v0", "a") != "3" || g.pushs != pushs {
				t.Errorf("%q after %d pushes, before %d", g.text("v0", "a"), g.pushs, pushs)
			}
		})
	}
}

// TestLiveOrder publishes as fast as it can: every view that is pushed is whole
// and newer than the one before, and the last one arrives.
func TestLiveOrder(t *testing.T) {
	p, g, _ := newPod(t)
	k := newKubelet(t, "configmap")
	view := func(n int) map[string]string {
		text := fmt.Sprintf("%06d", n)
		return map[string]string{"n": text, "m": text, "deep/o": text}
	}
	if err := k.publish(view(0)); err != nil {
		t.Fatal(err)
	}
	if _, err := bring(t, p, "c", oci.Volume{Source: k.dir, Target: "/v"}); err != nil {
		t.Fatal(err)
	}
	const last = 400
	for n := 1; n <= last; n++ {
		if err := k.publish(view(n)); err != nil {
			t.Fatal(err)
		}
		g.mu.Lock()
		f := g.files["v0"]
		if a, b, c := string(f["n"].Data), string(f["m"].Data), string(f["deep/o"].Data); a != b || a != c {
			t.Fatalf("a torn view: %s %s %s", a, b, c)
		}
		g.mu.Unlock()
		time.Sleep(time.Millisecond)
	}
	eventually(t, "the last view", func() error {
		if got := g.text("v0", "n"); got != fmt.Sprintf("%06d", last) {
			return errors.New(got)
		}
		return nil
	})
	if !slices.IsSorted(g.views) || len(slices.Compact(slices.Clone(g.views))) != len(g.views) {
		t.Errorf("views went back or came twice: %v", g.views)
	}
	t.Logf("%d of %d views were pushed", len(g.views), last+1)
}

// TestPushFailsOnce: what could not be pushed is tried again.
func TestPushFailsOnce(t *testing.T) {
	p, g, _ := newPod(t)
	k := newKubelet(t, "secret")
	if err := k.publish(map[string]string{"a": "1"}); err != nil {
		t.Fatal(err)
	}
	g.fail = unix.EAGAIN
	if _, err := bring(t, p, "c", oci.Volume{Source: k.dir, Target: "/v"}); !errors.Is(err, unix.EAGAIN) {
		t.Fatalf("%v", err)
	}
	g.fail = nil
	m, err := bring(t, p, "c", oci.Volume{Source: k.dir, Target: "/v"})
	if err != nil {
		t.Fatal(err)
	}
	g.mu.Lock()
	g.fail = unix.EAGAIN
	g.mu.Unlock()
	if err := k.publish(map[string]string{"a": "2"}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(most)
	g.mu.Lock()
	g.fail = nil
	g.mu.Unlock()
	eventually(t, "the change", func() error {
		if got := g.text(m.Source, "a"); got != "2" {
			return errors.New(got)
		}
		return nil
	})
}

// TestLiveBounds: what a directory could be made of to hurt is refused.
func TestLiveBounds(t *testing.T) {
	for name, c := range map[string]struct {
		make func(k *kubelet) error
		want string
	}{
		"large":  {func(k *kubelet) error { return k.publish(map[string]string{"a": strings.Repeat("x", maxLiveBytes+1)}) }, "more than"},
		"link":   {func(k *kubelet) error { return os.Symlink("/etc", filepath.Join(k.dir, "..data")) }, "leads out"},
		"parent": {func(k *kubelet) error { return os.Symlink("..", filepath.Join(k.dir, "..data")) }, "cross-device"},
		"inner": {func(k *kubelet) error {
			if err := k.publish(map[string]string{"d/a": ""}); err != nil {
				return err
			}
			return os.Symlink("/etc/shadow", filepath.Join(k.dir, "..data/d/b"))
		}, "neither a file nor a directory"},
		"pipe": {func(k *kubelet) error {
			if err := k.publish(map[string]string{"a": ""}); err != nil {
				return err
			}
			return unix.Mkfifo(filepath.Join(k.dir, "..data/b"), 0o600)
		}, "neither a file nor a directory"},
	} {
		t.Run(name, func(t *testing.T) {
			p, g, _ := newPod(t)
			k := newKubelet(t, "configmap")
			if err := c.make(k); err != nil {
				t.Fatal(err)
			}
			if _, err := bring(t, p, "c", oci.Volume{Source: k.dir, Target: "/v"}); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			if g.pushs != 0 {
				t.Errorf("%+v", g.files)
			}
		})
	}
}

// TestSingleFiles: small files that are only read, and those of the pod, are
// pushed and followed; what lies under another file of the name is not.
func TestSingleFiles(t *testing.T) {
	p, g, _ := newPod(t)
	hosts := filepath.Join(t.TempDir(), "etc-hosts")
	if err := os.WriteFile(hosts, []byte("one"), 0o644); err != nil {
		t.Fatal(err)
	}
	m, err := bring(t, p, "c", oci.Volume{Source: hosts, Target: "/etc/hosts"})
	if err != nil || m.Kind != guestproto.MountPod || m.Source != "files/f0" || g.text(m.Source, "") != "one" {
		t.Fatalf("%+v, %v, %q", m, err, g.text(m.Source, ""))
	}
	if err := os.WriteFile(hosts, []byte("two"), 0o644); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the change", func() error {
		if got := g.text(m.Source, ""); got != "two" {
			return errors.New(got)
		}
		return nil
	})
	// The second container's is the same, until both are gone.
	if again, err := bring(t, p, "d", oci.Volume{Source: hosts, Target: "/x", ReadOnly: true}); err != nil || again.Source != m.Source {
		t.Errorf("%+v, %v", again, err)
	}
	for _, c := range []string{"c", "d"} {
		if err := p.Remove(t.Context(), c); err != nil {
			t.Error(err)
		}
	}
	other := filepath.Join(t.TempDir(), "name")
	if err := os.WriteFile(other, []byte("other"), 0o644); err != nil {
		t.Fatal(err)
	}
	if m, err = bring(t, p, "e", oci.Volume{Source: other, Target: "/etc/hostname"}); err != nil || m.Source != "files/f0" || g.text(m.Source, "") != "other" {
		t.Errorf("%+v, %v: the name is not used again", m, err)
	}
	if err := os.WriteFile(hosts, []byte("three"), 0o644); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * most)
	if got := g.text(m.Source, ""); got != "other" {
		t.Errorf("%q: a file that was let go of is followed", got)
	}
}

// TestTerminationMessage: what a container leaves is the host's before anybody
// is told of its end, in the file that was there at the start.
func TestTerminationMessage(t *testing.T) {
	p, g, _ := newPod(t)
	dir := filepath.Join(t.TempDir(), "pods/uid/containers/app")
	file, decoy := filepath.Join(dir, "0badcafe"), filepath.Join(dir, "shadow")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{file, decoy} {
		if err := os.WriteFile(f, nil, 0o666); err != nil {
			t.Fatal(err)
		}
	}
	m, err := bring(t, p, "c", oci.Volume{Source: file, Target: "/dev/termination-log"})
	if err != nil || m.Source != "files/f0" {
		t.Fatalf("%+v, %v", m, err)
	}
	left := guestproto.PushFile{Path: "f0", Data: []byte("it was the disk")}
	g.mu.Lock()
	g.files["files"]["f0"] = left
	g.mu.Unlock()
	if err := p.Collect(t.Context(), "c"); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "it was the disk" {
		t.Errorf("%q, %v", b, err)
	}
	// Another file in its place is not written.
	left.Data = []byte("again")
	g.mu.Lock()
	g.files["files"]["f0"] = left
	g.mu.Unlock()
	if err := errors.Join(os.Remove(file), os.Symlink(decoy, file)); err != nil {
		t.Fatal(err)
	}
	if err := p.Collect(t.Context(), "c"); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(decoy); err != nil || len(b) != 0 {
		t.Errorf("the file behind a link is %q, %v", b, err)
	}
}

// TestScratch: an emptyDir is the guest's, and one for all containers.
func TestScratch(t *testing.T) {
	p, g, _ := newPod(t)
	k := newKubelet(t, "empty-dir")
	if err := os.Chmod(k.dir, 0o777|os.ModeSetgid); err != nil {
		t.Fatal(err)
	}
	m, err := bring(t, p, "c", oci.Volume{Source: k.dir, Target: "/tmp"})
	if err != nil || m.Kind != guestproto.MountPod || m.Source != "v0" || g.dirs["v0"].Mode != 0o2777 {
		t.Errorf("%+v, %v, %+v", m, err, g.dirs)
	}
	if m, err := bring(t, p, "d", oci.Volume{Source: k.dir, Target: "/x"}); err != nil || m.Source != "v0" {
		t.Errorf("%+v, %v", m, err)
	}
	if m, err := bring(t, p, "e", oci.Volume{Source: k.dir + "/../v", Target: "/x"}); err != nil || m.Source != "v0" {
		t.Errorf("%+v, %v", m, err)
	}
	if _, err := bring(t, p, "f", oci.Volume{Source: k.dir, Target: "/x", Later: true}); err == nil || !strings.Contains(err.Error(), "leave out the propagation") {
		t.Errorf("with propagation: %v", err)
	}
}

// TestScratchInMemory: of one that is memory the size is kubelet's, and parts
// of it, which kubelet binds elsewhere, are parts of it in the guest.
func TestScratchInMemory(t *testing.T) {
	needRoot(t)
	p, g, _ := newPod(t)
	k := newKubelet(t, "empty-dir")
	sub := filepath.Join(filepath.Dir(filepath.Dir(filepath.Dir(k.dir))), "volume-subpaths/v/app/0")
	if err := os.MkdirAll(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", k.dir, "tmpfs", 0, "size=1m,mode=0777"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(k.dir, 0) })
	if err := os.MkdirAll(k.dir+"/a/b", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(k.dir+"/a/b", sub, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(sub, 0) })
	m, err := bring(t, p, "c", oci.Volume{Source: sub, Target: "/s"})
	if err != nil || m.Source != "v0/a/b" || g.dirs["v0"].Bytes != 1<<20 {
		t.Errorf("%+v, %v, %+v", m, err, g.dirs)
	}
	if m, err := bring(t, p, "d", oci.Volume{Source: k.dir, Target: "/x"}); err != nil || m.Source != "v0" {
		t.Errorf("%+v, %v", m, err)
	}
	shm := filepath.Join(t.TempDir(), "shm")
	if err := os.Mkdir(shm, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("shm", shm, "tmpfs", 0, "size=64m,mode=1777"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(shm, 0) })
	if m, err := bring(t, p, "e", oci.Volume{Source: shm, Target: "/dev/shm"}); err != nil || m.Source != "v1" || g.dirs["v1"].Bytes != 64<<20 || g.dirs["v1"].Mode != 0o1777 {
		t.Errorf("%+v, %v, %+v", m, err, g.dirs)
	}
}

// TestSourcesRefused: each with its reason.
func TestSourcesRefused(t *testing.T) {
	p, _, _ := newPod(t)
	dir := t.TempDir()
	if err := errors.Join(os.Symlink("nowhere", dir+"/dangling"), os.Symlink("loop", dir+"/loop"), unix.Mkfifo(dir+"/pipe", 0o600)); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("unix", dir+"/socket")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for source, want := range map[string]string{
		dir + "/missing":  "it is not there",
		dir + "/dangling": "it is not there",
		dir + "/loop":     "too many links",
		dir + "/pipe":     "pipe of the host",
		dir + "/socket":   "socket of the host",
		"/dev/console":    "device 5:1 of the host",
	} {
		_, err := bring(t, p, "c", oci.Volume{Source: source, Target: "/v"})
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "mounts[0].source") {
			t.Errorf("%s: %v, want %q", source, err, want)
		}
	}
}

// TestDisks are attached by their number, and taken away again.
func TestDisks(t *testing.T) {
	needRoot(t)
	raw, err := os.ReadDir("/sys/block")
	if err != nil || len(raw) == 0 {
		t.Skipf("the host has no block device: %v", err)
	}
	var major, minor uint32
	number, err := os.ReadFile("/sys/block/" + raw[0].Name() + "/dev")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscanf(string(number), "%d:%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	p, _, m := newPod(t)
	create := guestproto.Create{Devices: []guestproto.Device{{Path: "/dev/x", Kind: 'b', Major: major, Minor: minor}}}
	err = p.Add(t.Context(), "c", &create, []oci.Volume{{Field: "linux.devices[0]", Mount: -1, Device: 0, Target: "/dev/x", ReadOnly: true}})
	if err != nil {
		t.Skipf("%s cannot be opened here: %v", raw[0].Name(), err)
	}
	if d := create.Devices[0]; d.Serial != "s0" || d.Major != 0 || m.disks["s0"] {
		t.Errorf("%+v, %+v", d, m.disks)
	}
	if err := p.Remove(t.Context(), "c"); err != nil || len(m.disks) != 0 {
		t.Errorf("%v, %+v", err, m.disks)
	}
}

// TestAddFails: what was brought for a container whose next volume fails is let
// go of.
func TestAddFails(t *testing.T) {
	p, _, _ := newPod(t)
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	create := guestproto.Create{Mounts: make([]guestproto.Mount, 2)}
	err := p.Add(t.Context(), "c", &create, []oci.Volume{
		{Mount: 0, Device: -1, Source: file, Target: "/f", ReadOnly: true}, {Mount: 1, Device: -1, Source: file + "x", Target: "/g"},
	})
	if err == nil || len(p.byPath) != 0 || len(p.users) != 0 || len(p.follow.watches) != 0 {
		t.Errorf("%v, %v, %v", err, slices.Collect(maps.Keys(p.byPath)), p.users)
	}
}

func FuzzMounts(f *testing.F) {
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(raw))
	f.Add("36 35 98:0 /a\\040b /pods/u/volumes/kubernetes.io~empty-dir/x rw - ext4 d rw\n")
	f.Fuzz(func(t *testing.T, text string) {
		lines, err := parseMounts(strings.NewReader(text))
		if err != nil {
			return
		}
		for _, l := range lines {
			if len(l.point) > len(text) {
				t.Errorf("%q", l.point)
			}
			_ = origin(lines, l.point)
		}
	})
}
