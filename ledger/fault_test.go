package ledger

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// faults makes the system call number at fail. If dead, every later one fails
// too, as if the process had been killed just before it.
type faults struct {
	at, seen int
	dead     bool
	err      error
}

func (f *faults) before(op, path string) error {
	f.seen++
	if f.seen == f.at || f.dead && f.at > 0 && f.seen > f.at {
		return fmt.Errorf("%s %s: %w", op, path, f.err)
	}
	return nil
}

// TestEverySystemCallFailsOnce appends over a tile boundary with each system
// call failing in turn, alone (a full disk) and as the last (a kill). Each
// time the log must open, verify, and hold exactly what was acknowledged, give
// or take the entry whose append was cut off or said it could not know.
func TestEverySystemCallFailsOnce(t *testing.T) {
	const start, appends = 254, 4 // 254 entries, so the second append fills a tile
	s := newSigner(t)
	seed := t.TempDir()
	l := openLog(t, seed, s)
	fill(t, l, start)
	l.Close()
	for _, dead := range []bool{false, true} {
		calls := 0
		for at := 1; ; at++ {
			dir := memoryDir(t)
			if err := os.CopyFS(dir, os.DirFS(seed)); err != nil {
				t.Fatal(err)
			}
			f := &faults{at: at, dead: dead, err: syscall.ENOSPC}
			acked, unsure := appendAll(t, dir, s, f, appends)
			if f.seen < at {
				break // every call has had its turn
			}
			calls++
			checkAfterFault(t, fmt.Sprintf("dead=%v call %d", dead, at), dir, s, acked, unsure)
		}
		if calls < 30 {
			t.Errorf("dead=%v: only %d system calls were made to fail", dead, calls)
		}
	}
}

// memoryDir is a directory that syncs fast: the failures are made up here, and
// thousands of real syncs would only keep the disk busy.
func memoryDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "ledger-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// TestLostCheckpointIsMadeAgain takes back the rename of a checkpoint, as a
// loss of power may, after somebody has copied it: the log must come to say
// the very same again, or the copy would convict it of lying.
func TestLostCheckpointIsMadeAgain(t *testing.T) {
	dir, s := t.TempDir(), newSigner(t)
	l := openLog(t, dir, s)
	fill(t, l, 300)
	before := get(t, dir, "checkpoint")
	if _, err := l.Append(t.Context(), entry(300)); err != nil {
		t.Fatal(err)
	}
	copied := l.Checkpoint()
	l.Close()
	put(t, dir, "checkpoint", before)
	for _, p := range []string{"tile/0/001.p/45", "tile/entries/001.p/45"} { // not synced either
		if err := os.Truncate(filepath.Join(dir, p), 0); err != nil {
			t.Fatal(err)
		}
	}
	l = openLog(t, dir, s)
	if got := l.Checkpoint(); string(got.Note) != string(copied.Note) {
		t.Errorf("checkpoint is %q, copied was %q", got.Note, copied.Note)
	}
	if _, err := VerifyDir(dir, s.VerifierKey()); err != nil {
		t.Error(err)
	}
}

// appendAll appends until the log opens no more, and says which texts were
// acknowledged at which index, and which may or may not be there.
func appendAll(t *testing.T, dir string, s *Signer, f *faults, n int) (acked map[uint64]string, unsure map[string]bool) {
	acked, unsure = map[uint64]string{}, map[string]bool{}
	l, err := open(dir, origin, s, f.before)
	if err != nil {
		return acked, unsure
	}
	defer l.Close()
	for i := range n {
		text := fmt.Sprintf("appended %d", i)
		at, err := l.Append(context.Background(), Entry{Kind: "test", Text: text})
		switch {
		case err == nil:
			acked[at] = text
		case f.dead || strings.Contains(err.Error(), "may or may not"):
			unsure[text] = true
		case !errors.Is(err, syscall.ENOSPC) && !strings.Contains(err.Error(), "open the log again"):
			t.Errorf("append: %v", err)
		}
	}
	return acked, unsure
}

func checkAfterFault(t *testing.T, name, dir string, s *Signer, acked map[uint64]string, unsure map[string]bool) {
	t.Helper()
	if _, err := VerifyDir(dir, s.VerifierKey()); err != nil {
		t.Errorf("%s: before reopening: %v", name, err)
	}
	l, err := Open(dir, origin, s)
	if err != nil {
		t.Errorf("%s: %v", name, err)
		return
	}
	defer l.Close()
	found := map[uint64]string{}
	l.Scan(0, func(at uint64, e Entry) error {
		if e.Kind == "test" {
			found[at] = e.Text
		}
		return nil
	})
	for at, text := range acked {
		if found[at] != text {
			t.Errorf("%s: acknowledged entry %d is %q, want %q", name, at, found[at], text)
		}
	}
	for at, text := range found {
		if acked[at] != text && !unsure[text] {
			t.Errorf("%s: entry %d (%q) is there, though its append failed", name, at, text)
		}
	}
	if _, err := l.Append(context.Background(), entry(1)); err != nil {
		t.Errorf("%s: append after reopening: %v", name, err)
	}
	if _, err := VerifyDir(dir, s.VerifierKey()); err != nil {
		t.Errorf("%s: after reopening: %v", name, err)
	}
}

// TestFullDisk writes to a real file system without space.
func TestFullDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting a small file system needs root")
	}
	dir := t.TempDir()
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Fatal(err)
	}
	defer syscall.Unmount(dir, syscall.MNT_DETACH)
	s := newSigner(t)
	l := openLog(t, dir, s)
	big := Entry{Kind: "test", Text: strings.Repeat("x", 8000)}
	acked := 0
	var err error
	for err == nil && acked < 1000 {
		if _, err = l.Append(t.Context(), big); err == nil {
			acked++
		}
	}
	if !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "nothing was added") {
		t.Fatalf("after %d: %v", acked, err)
	}
	if size := l.Checkpoint().Size; size != uint64(acked) {
		t.Errorf("size is %d, want %d", size, acked)
	}
	if err := syscall.Mount("none", dir, "tmpfs", syscall.MS_REMOUNT, "size=4m"); err != nil {
		t.Fatal(err)
	}
	if at, err := l.Append(t.Context(), big); err != nil || at != uint64(acked) {
		t.Errorf("with space again: entry %d, %v", at, err)
	}
	l.Close()
	if r, err := VerifyDir(dir, s.VerifierKey()); err != nil || r.Size != uint64(acked)+1 {
		t.Errorf("%+v, %v", r, err)
	}
}

const childEnv = "HAUBERK_LEDGER_TEST_CHILD"

// TestMain lets the test binary be the process that is killed.
func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		child(dir)
	}
	os.Exit(m.Run())
}

// child appends from several goroutines and prints each index once it is
// acknowledged.
func child(dir string) {
	s, err := LoadOrCreateSigner(filepath.Join(dir, "key"), origin)
	if err == nil {
		var l *Log
		if l, err = Open(filepath.Join(dir, "log"), origin, s); err == nil {
			for g := range 4 {
				go func() {
					for {
						text := fmt.Sprintf("from %d at %d", g, time.Now().UnixNano())
						at, err := l.Append(context.Background(), Entry{Kind: "test", Text: text})
						if err != nil {
							fmt.Fprintln(os.Stderr, err)
							os.Exit(3)
						}
						fmt.Printf("%d %s\n", at, text) // one write, so one line
					}
				}()
			}
			select {}
		}
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(2)
}

// TestKill kills a process that appends, twenty times in a row on one log.
func TestKill(t *testing.T) {
	dir := t.TempDir()
	acked := map[uint64]string{}
	for round := range 20 {
		cmd := exec.Command(os.Args[0], "-test.run=^$")
		cmd.Env = append(os.Environ(), childEnv+"="+dir)
		var stderr strings.Builder
		cmd.Stderr = &stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		if !lines.Scan() { // it is up and writing
			cmd.Wait()
			t.Fatalf("round %d: %s", round, stderr.String())
		}
		kill := time.AfterFunc(time.Duration(rand.IntN(40_000))*time.Microsecond, func() { cmd.Process.Kill() })
		for ok := true; ok; ok = lines.Scan() {
			at, text, _ := strings.Cut(lines.Text(), " ")
			n, err := strconv.ParseUint(at, 10, 64)
			if err != nil {
				t.Fatalf("child said %q: %s", lines.Text(), stderr.String())
			}
			acked[n] = text
		}
		kill.Stop()
		cmd.Wait()
	}
	s, err := LoadOrCreateSigner(filepath.Join(dir, "key"), origin)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := VerifyDir(filepath.Join(dir, "log"), s.VerifierKey()); err != nil {
		t.Errorf("as the kill left it: %v", err)
	}
	l := openLog(t, filepath.Join(dir, "log"), s)
	found := map[uint64]string{}
	if err := l.Scan(0, func(at uint64, e Entry) error { found[at] = e.Text; return nil }); err != nil {
		t.Fatal(err)
	}
	for at, text := range acked {
		if found[at] != text {
			t.Errorf("acknowledged entry %d is %q, want %q", at, found[at], text)
		}
	}
	t.Logf("%d entries acknowledged over 20 kills, %d in the log", len(acked), len(found))
	if len(acked) < 20 {
		t.Errorf("only %d entries were acknowledged", len(acked))
	}
}
