package outlog

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func read(t *testing.T, path string, o Options) (out, err string) {
	t.Helper()
	var b [2]strings.Builder
	fault := Read(t.Context(), path, o, func(l Line) error {
		i := 0
		if l.Stream == Stderr {
			i = 1
		}
		b[i].Write(l.Text)
		return nil
	})
	if fault != nil {
		t.Fatal(fault)
	}
	return b[0].String(), b[1].String()
}

func TestComesBackAsWritten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if out, err := read(t, path, Options{Tail: -1}); out != "" || err != "" {
		t.Errorf("a log that is not there holds %q and %q", out, err)
	}
	long := strings.Repeat("x", 3*maxText) + "\n"
	for range 2 { // opened anew, it goes on
		w, err := Open(path, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range []string{"one\ntwo", "", " goes on\n\n", long, "\x00\xff\r"} {
			if err := w.Write(Stdout, []byte(p)); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Write(Stderr, []byte("wrong\n")); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(w.Close(), w.Close()); err != nil {
			t.Fatal(err)
		}
		if err := w.Write(Stdout, []byte("late")); err == nil {
			t.Error("a closed log took something")
		}
	}
	once := "one\ntwo goes on\n\n" + long + "\x00\xff\r"
	if out, err := read(t, path, Options{Tail: -1}); out != once+once || err != "wrong\nwrong\n" {
		t.Errorf("came back: %d bytes %.80q, %q", len(out), out, err)
	}
	if out, err := read(t, path, Options{Tail: 0}); out != "" || err != "" {
		t.Errorf("the last 0 lines are %q, %q", out, err)
	}
	if out, err := read(t, path, Options{Tail: -1, Since: time.Now().Add(time.Hour)}); out != "" || err != "" {
		t.Errorf("the future holds %q, %q", out, err)
	}
}

func TestTail(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	w, err := Open(path, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	for _, p := range []string{"a\n", "b", "b", "b\n", "c\n", "d"} {
		if err := w.Write(Stdout, []byte(p)); err != nil {
			t.Fatal(err)
		}
	}
	for n, want := range []string{"", "d", "c\nd", "bbb\nc\nd", "a\nbbb\nc\nd", "a\nbbb\nc\nd"} {
		if out, _ := read(t, path, Options{Tail: n}); out != want {
			t.Errorf("the last %d are %q, want %q", n, out, want)
		}
	}
}

// TestBounded writes far more than a log may hold, while somebody follows it.
func TestBounded(t *testing.T) {
	const most = 64 << 10
	path := filepath.Join(t.TempDir(), "log")
	w, err := Open(path, most)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	followed := make(chan int, 1)
	go func() {
		n := 0
		_ = Read(t.Context(), path, Options{Tail: -1, Follow: true, Ended: ended}, func(l Line) error { n += len(l.Text); return nil })
		followed <- n
	}()
	line := bytes.Repeat([]byte("y"), 999)
	line = append(line, '\n')
	sum := 0
	for range 400 {
		if err := w.Write(Stdout, line); err != nil {
			t.Fatal(err)
		}
		sum += len(line)
		time.Sleep(2 * time.Millisecond) // the reader looks now and then
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	close(ended)
	if n := <-followed; n != sum {
		t.Errorf("the follower got %d bytes of %d", n, sum)
	}
	var size int64
	for _, p := range []string{path, path + before} {
		st, err := os.Stat(p)
		if err != nil {
			t.Fatal(err)
		}
		size += st.Size()
	}
	if size > 2*most || size < most {
		t.Errorf("%d bytes are kept, want %d to %d", size, most, 2*most)
	}
	out, _ := read(t, path, Options{Tail: 3})
	if out != strings.Repeat(string(line), 3) {
		t.Errorf("the last 3 lines have %d bytes", len(out))
	}
	if err := errors.Join(Remove(path), Remove(path)); err != nil {
		t.Error(err)
	}
	if left, _ := filepath.Glob(path + "*"); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

func TestRefused(t *testing.T) {
	dir := t.TempDir()
	if _, err := Open(filepath.Join(dir, "log"), 0); err == nil {
		t.Error("a log without size was opened")
	}
	if err := os.Symlink("/dev/null", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(filepath.Join(dir, "link"), 1); err == nil {
		t.Error("a link was followed")
	}
	huge := filepath.Join(dir, "huge")
	if err := os.WriteFile(huge, bytes.Repeat([]byte("z"), 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Read(t.Context(), huge, Options{Tail: -1}, func(Line) error { return nil }); err == nil {
		t.Error("a line without end was read")
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"2026-11-22T10:00:00.5Z stdout F hello", "2026-11-22T10:00:00Z stderr P ", "x", "a b c d", ""} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		l, err := Parse(raw)
		if err != nil {
			return
		}
		if len(l.Text) > len(raw) || l.Stream != Stdout && l.Stream != Stderr {
			t.Errorf("%q is %+v", raw, l)
		}
	})
}
