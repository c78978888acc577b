package sandbox_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"hauberk.dev/sandbox"
)

// counts counts in its memory and draws a random number each time, as soon as it
// may.
const counts = `busybox httpd -p 80 -h /etc
i=0
while sleep 0.05; do
  i=$((i+1))
  echo $i $(busybox head -c 8 /dev/urandom | busybox od -An -tx8) $(busybox date +%s) >>/tmp/drawn
done`

// draw is a number that one that counts has drawn, and when, by its clock.
type draw struct {
	number string
	at     int64
}

// drawn is what one that counts has drawn, by its count.
func drawn(t *testing.T, b *sandbox.Sandbox) map[int]draw {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), callTime)
	defer cancel()
	raw, err := b.ReadFile(ctx, "/tmp/drawn")
	if err != nil {
		return nil // not begun
	}
	out := map[int]draw{}
	for line := range strings.Lines(string(raw)) {
		if f := strings.Fields(line); len(f) == 3 && strings.HasSuffix(line, "\n") {
			n, err := strconv.Atoi(f[0])
			at, atErr := strconv.ParseInt(f[2], 10, 64)
			if err != nil || atErr != nil {
				t.Fatalf("line %q", line)
			}
			out[n] = draw{f[1], at}
		}
	}
	return out
}

// countsOn waits until a sandbox has counted a few more.
func countsOn(t *testing.T, b *sandbox.Sandbox, beyond int) map[int]draw {
	t.Helper()
	for began := time.Now(); time.Since(began) < callTime; time.Sleep(20 * time.Millisecond) {
		if d := drawn(t, b); d[beyond+3].number != "" {
			return d
		}
	}
	t.Fatalf("%s does not count beyond %d", b.ID(), beyond)
	return nil
}

// testSnapshot saves one that counts, forks it and restores it: each goes on from
// where it was, is of its own, and the first notices nothing.
func (w *world) testSnapshot(t *testing.T) {
	outside := greeter(t, ownAddress(t))
	first := w.start(t, sandbox.Options{
		Args: []string{"sh", "-c", counts}, Egress: []string{outside}, Publish: []string{"0:80"}, Env: []string{"SECRET=kept"},
	})
	countsOn(t, first, 0)
	ctx, cancel := context.WithTimeout(t.Context(), 6*callTime)
	defer cancel()
	if err := first.WriteFile(ctx, "/tmp/mine", []byte("before"), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "saved")
	began := time.Now()
	if err := first.Snapshot(ctx, dir); err != nil {
		t.Fatal(err)
	}
	t.Logf("saved in %v", time.Since(began).Round(time.Millisecond))
	onlyRoots(t, dir)
	failsWhole(t, ctx, first)
	if err := first.Snapshot(ctx, dir); !errors.Is(err, fs.ErrExist) {
		t.Errorf("saved over another: %v", err)
	}
	countsOn(t, first, len(drawn(t, first)))

	// They part while it is paused, so that what was drawn before and after can
	// be told apart by the clock.
	if err := first.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	parted := time.Now().Add(2 * time.Second)
	for time.Now().Before(parted.Add(time.Second)) {
		time.Sleep(10 * time.Millisecond)
	}
	began = time.Now()
	forks, err := first.Fork(ctx, 2)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("two forks in %v", time.Since(began).Round(time.Millisecond))
	if left, err := os.ReadDir(filepath.Join(w.conf.State, "forks")); err != nil || len(left) > 0 {
		t.Errorf("left of the forks: %v, %v", left, err)
	}
	boxes := append([]*sandbox.Sandbox{first}, forks...)
	for _, b := range boxes {
		if i, err := b.Info(ctx); err != nil || i.Phase != sandbox.Paused {
			t.Errorf("%+v, %v", i, err)
		}
		if err := b.Resume(ctx); err != nil {
			t.Fatal(err)
		}
	}
	differ(t, boxes, parted.Unix())
	ports, boots := map[string]bool{}, map[string]bool{}
	for i, b := range boxes {
		if err := b.WriteFile(ctx, "/tmp/own", []byte{byte('0' + i)}, 0o600); err != nil {
			t.Fatal(err)
		}
		boots[w.works(t, b, outside, ports)] = true
	}
	if len(ports) != 3 || len(boots) != 3 {
		t.Errorf("ports %v and boots %v of three", ports, boots)
	}
	for i, b := range boxes {
		if own, err := b.ReadFile(ctx, "/tmp/own"); err != nil || string(own) != strconv.Itoa(i) {
			t.Errorf("%d has %q, %v", i, own, err)
		}
	}
	for _, b := range forks {
		if err := b.Remove(ctx, true); err != nil {
			t.Error(err)
		}
	}
	w.testRestore(t, ctx, first, dir, outside)
	w.testRefused(t, ctx, dir)
}

// differ compares what boxes drew: the same before they parted, and no number
// twice since.
func differ(t *testing.T, boxes []*sandbox.Sandbox, parted int64) {
	t.Helper()
	before := map[int]string{}
	for n, d := range drawn(t, boxes[0]) {
		if d.at < parted {
			before[n] = d.number
		}
	}
	if len(before) < 3 {
		t.Fatalf("before they parted %v was drawn", before)
	}
	seen := map[string]bool{}
	for _, b := range boxes {
		for n, d := range countsOn(t, b, len(before)) {
			switch {
			case n <= len(before) && d.number != before[n]:
				t.Errorf("%s has drawn %v at %d, and the first %s", b.ID(), d, n, before[n])
			case n > len(before) && (seen[d.number] || d.at < parted):
				t.Errorf("%s draws %v again at %d, or before %d", b.ID(), d, n, parted)
			case n > len(before):
				seen[d.number] = true
			}
		}
	}
}

// failsWhole saves to a full disk, and gives up saving: both leave nothing, and a
// sandbox that goes on.
func failsWhole(t *testing.T, ctx context.Context, b *sandbox.Sandbox) {
	t.Helper()
	small := t.TempDir()
	if err := syscall.Mount("small", small, "tmpfs", 0, "size=4m"); err != nil {
		t.Fatal(err)
	}
	defer syscall.Unmount(small, 0)
	if err := b.Snapshot(ctx, small+"/s"); err == nil || !strings.Contains(err.Error(), "no space left") {
		t.Errorf("saved to a full disk: %v", err)
	}
	gone, leave := context.WithCancel(ctx)
	leave()
	if err := b.Snapshot(gone, small+"/s"); err == nil {
		t.Error("saved for who has left")
	}
	if left, err := os.ReadDir(small); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	countsOn(t, b, len(drawn(t, b)))
}

// works tries files, network and processes of one, and gives its boot's name.
func (w *world) works(t *testing.T, b *sandbox.Sandbox, outside string, ports map[string]bool) string {
	t.Helper()
	host, port, _ := net.SplitHostPort(outside)
	out, _, code := execIn(t, b, "typed", sandbox.Cmd{Args: []string{"sh", "-c",
		"cat; echo; cat /tmp/mine; echo; echo $SECRET; cat /proc/sys/kernel/random/boot_id; busybox nc -w5 " + host + " " + port}})
	lines := strings.Split(out, "\n")
	if code != 0 || len(lines) != 5 || lines[0] != "typed" || lines[1] != "before" || lines[2] != "kept" || lines[4] != "outside" {
		t.Fatalf("%s says %q and ends with %d", b.ID(), out, code)
	}
	i, err := b.Info(t.Context())
	if err != nil || i.Phase != sandbox.Running || len(i.Ports) != 1 {
		t.Fatalf("%+v, %v", i, err)
	}
	if got := page(t, strings.TrimSuffix(i.Ports[0], ":80")); !strings.Contains(got, "app:x:1000") {
		t.Errorf("the published port of %s says %q", b.ID(), got)
	}
	ports[i.Ports[0]] = true
	return lines[3]
}

// testRestore suspends the first, restores it twice, one after the other, and
// kills what holds the second.
func (w *world) testRestore(t *testing.T, ctx context.Context, first *sandbox.Sandbox, dir, outside string) {
	t.Helper()
	suspended := dir + "2"
	if err := first.Suspend(ctx, suspended); err != nil {
		t.Fatal(err)
	}
	if e, err := first.Wait(ctx); err != nil || e.Code != 137 {
		t.Errorf("the first ended with %+v, %v", e, err)
	}
	if err := first.Snapshot(ctx, dir+"3"); !errors.Is(err, sandbox.ErrNotRunning) {
		t.Errorf("one that has ended was saved: %v", err)
	}
	for i, from := range []string{dir, suspended} {
		b, err := w.host.Restore(ctx, from, sandbox.Options{Name: "again"})
		if err != nil {
			t.Fatal(err)
		}
		defer b.Remove(ctx, true)
		d := drawn(t, b)
		countsOn(t, b, len(d))
		w.works(t, b, outside, map[string]bool{})
		if i == 0 { // the next has its name
			if err := b.Remove(ctx, true); err != nil {
				t.Error(err)
			}
			continue
		}
		if info, err := b.Info(ctx); err != nil || info.From != first.ID() || info.Name != "again" {
			t.Errorf("%+v, %v", info, err)
		}
		w.killShim(t, b)
		if err := b.Remove(ctx, false); err != nil {
			t.Error(err)
		}
	}
}

// testRefused damages a snapshot, and asks for what it is not of.
func (w *world) testRefused(t *testing.T, ctx context.Context, dir string) {
	t.Helper()
	if _, err := w.host.Restore(ctx, dir, sandbox.Options{Env: []string{"A=b"}, ReadOnly: true}); err == nil || !strings.Contains(err.Error(), "Env, ReadOnly:") {
		t.Errorf("with another environment: %v", err)
	}
	// Another agent: the same program, and a byte that nothing reads.
	other := w.conf
	bin := t.TempDir()
	for _, name := range []string{"containerd-shim-hauberk-v2", "hauberk-guest"} {
		raw, err := os.ReadFile(filepath.Join(filepath.Dir(w.conf.Shim), name))
		if err != nil {
			t.Fatal(err)
		}
		if name == "hauberk-guest" {
			raw = append(raw, 0)
		}
		if err := os.WriteFile(filepath.Join(bin, name), raw, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	other.Shim = filepath.Join(bin, "containerd-shim-hauberk-v2")
	host, err := sandbox.Open(other)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := host.Restore(ctx, dir, sandbox.Options{}); err == nil || !strings.Contains(err.Error(), "initramfs of agent and Guard was") {
		t.Errorf("under another agent: %v", err)
	}
	for _, c := range []struct {
		file string
		edit func([]byte) []byte
	}{
		{"snapshot.json", func(b []byte) []byte { return bytes.Replace(b, []byte("SECRET=kept"), []byte("SECRET=lost"), -1) }},
		{"state", func(b []byte) []byte { b[len(b)/2] ^= 1; return b }},
		{"state", func(b []byte) []byte { return b[:len(b)-1] }},
	} {
		name := filepath.Join(dir, c.file)
		was, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, c.edit(bytes.Clone(was)), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := w.host.Restore(ctx, dir, sandbox.Options{}); !errors.Is(err, sandbox.ErrDamaged) {
			t.Errorf("an edited %s: %v, want %v", c.file, err, sandbox.ErrDamaged)
		}
		if err := os.WriteFile(name, was, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if list, err := w.host.List(ctx); err != nil || len(list) != 2 { // the one that stays, and the first, which ended
		t.Errorf("there are %+v, %v", list, err)
	}
}

// onlyRoots checks that nobody else reads what was saved.
func onlyRoots(t *testing.T, dir string) {
	t.Helper()
	for path, want := range map[string]fs.FileMode{dir: 0o700 | fs.ModeDir, dir + "/state": 0o600, dir + "/snapshot.json": 0o600} {
		if fi, err := os.Stat(path); err != nil || fi.Mode() != want || fi.Sys().(*syscall.Stat_t).Uid != 0 {
			t.Errorf("%s: %v, %v", path, fi.Mode(), err)
		}
	}
}
