package main

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// What TCP does is what is told of TCP, so that a difference in the other column is
// one of shortcuts.
func TestPlain(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	w := &world{plain: ln}
	want := map[string]string{
		"counted": `"hello", 5 counted`, "both ways": "as sent", "early": `"firstthen!"`, "pending": "5", "back pressure": "less than 1 MiB",
		"half close": `"question", then its end; "answer", then its end`, "reset": `"bytes", then a reset`, "severed": `"", then a reset; "", then a reset`, "closed unread": `"", then a reset`,
		"spliced": `"hello"`, "passed": `"before after"; "answer"`, "moved": "all in order", "taken away": `"before"`, "afterwards": `"before"; "after"`,
	}
	for _, tr := range traits {
		if got, err := tr.over(w, over(ln)); err != nil || got != want[tr.name] {
			t.Errorf("%s: %s, %v, want %s", tr.what, got, err, want[tr.name])
		}
		// What is said in favour of a socket pair, and the one thing against it.
		pair := want[tr.name]
		if tr.name == "severed" {
			pair = `"secret", then its end; "", then its end`
		}
		if got, err := tr.over(w, unixPair); err != nil || got != pair && got != none {
			t.Errorf("socket pair: %s: %s, %v, want %s", tr.what, got, err, pair)
		}
		delete(want, tr.name)
	}
	if len(want) > 0 {
		t.Errorf("no trait %v", want)
	}
}

// Shortcuts are in force where they are meant, and only there; whatever was made is
// gone when they are closed.
func TestShortcuts(t *testing.T) {
	w, err := openWorld()
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS) {
		t.Skipf("no cgroup of our own: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	closed := false
	defer func() {
		if !closed {
			w.Close()
		}
	}()
	if err := w.cut(); errors.Is(err, unix.EPERM) {
		t.Skipf("the kernel takes no programs from us: %v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	for ln, want := range map[net.Listener]string{w.plain: `"hello", 5 counted`, w.short: `"hello", 0 counted`} {
		if got, err := (trait{sent: "hello", see: counted}).over(w, over(ln)); err != nil || got != want {
			t.Errorf("%s, %v, want %s", got, err, want)
		}
		if got, err := (trait{see: bothWays}).over(w, over(ln)); err != nil || got != "as sent" {
			t.Errorf("%s, %v", got, err)
		}
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	closed = true
	if _, err := os.Stat(w.cgroup); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s is left: %v", w.cgroup, err)
	}
	if in, err := ownCgroup(); err != nil || filepath.Clean(in) != filepath.Clean(w.home) {
		t.Errorf("this process is in %s, not %s: %v", in, w.home, err)
	}
}

// Every leg gives to each question the answer that it asks for, and is timed.
func TestLegs(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	all, err := (&world{plain: ln, short: ln}).legs()
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for _, l := range all {
		defer l.Close()
		if err := errors.Join(l.start(), l.turn(t.Context(), 50e6, 0, largest), l.turn(t.Context(), 50e6, 1000, 1<<10)); err != nil {
			t.Fatal(err)
		}
		l.print(&out, l)
	}
	if got := strings.Count(out.String(), "(1.00x)"); got != len(all) || strings.Contains(out.String(), "nothing") {
		t.Errorf("%d of %d were timed: %s", got, len(all), out.String())
	}
}
