package shim

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func fifo(t *testing.T) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(name, 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// TestOutputWaitsForItsReader: nothing is written before somebody can read it.
func TestOutputWaitsForItsReader(t *testing.T) {
	name := fifo(t)
	short, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if _, err := openOutput(short, name); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("without a reader: %v", err)
	}
	read := make(chan []byte)
	go func() {
		raw, _ := os.ReadFile(name) // until the end
		read <- raw
	}()
	o, err := openOutput(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(o.file, "all of it"); err != nil {
		t.Error(err)
	}
	o.close()
	if got := <-read; string(got) != "all of it" {
		t.Errorf("read %q", got)
	}
}

// TestOutputOutlivesItsReader: a client that leaves does not break the pipe.
func TestOutputOutlivesItsReader(t *testing.T) {
	name := fifo(t)
	reader, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	o, err := openOutput(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	defer o.close()
	reader.Close()
	if _, err := io.WriteString(o.file, "x"); err != nil {
		t.Errorf("after the reader left: %v", err)
	}
}

func TestStreamPath(t *testing.T) {
	for name, want := range map[string]string{
		"/a/b": "/a/b", "file:///a/b": "/a/b", "fifo:///a": "/a",
		"binary:///bin/logger?id=x": "", "npipe://x": "", "relative": "", "file://host/a": "", "": "",
	} {
		got, err := streamPath("output", name)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v, want %q", name, got, err, want)
		}
	}
}

func TestOutputToAFile(t *testing.T) {
	name := filepath.Join(t.TempDir(), "log")
	for range 2 {
		o, err := openOutput(t.Context(), "file://"+name)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(o.file, "line\n")
		o.close()
	}
	if raw, err := os.ReadFile(name); err != nil || string(raw) != "line\nline\n" {
		t.Errorf("%q, %v", raw, err)
	}
}

// TestPresent reads what is in a pipe, and does not wait for more.
func TestPresent(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	text := strings.Repeat("x", 40000)
	io.WriteString(w, text)
	var b bytes.Buffer
	if _, err := io.Copy(&b, &present{r}); err != nil || b.String() != text {
		t.Errorf("%d bytes, %v", b.Len(), err)
	}
}

// TestCloseFreesWhoWaitsForAWriter: input that nobody ever opened ends.
func TestCloseFreesWhoWaitsForAWriter(t *testing.T) {
	s := &stdio{names: streams{Stdin: fifo(t)}}
	opened := make(chan error)
	go func() {
		f, err := os.OpenFile(s.names.Stdin, os.O_RDONLY, 0)
		if err == nil {
			err = f.Close()
		}
		opened <- err
	}()
	for {
		s.mu.Lock()
		s.ended = false
		s.mu.Unlock()
		s.endInput()
		select {
		case err := <-opened:
			if err != nil {
				t.Error(err)
			}
			s.close()
			s.close()
			return
		case <-time.After(5 * time.Millisecond): // it was not waiting yet
		}
	}
}

// TestOutputIsTaken: an output has ended when its reader has read it, or left.
func TestOutputIsTaken(t *testing.T) {
	for name, end := range map[string]func(*os.File){
		"read":   func(f *os.File) { _, _ = f.Read(make([]byte, 100)) },
		"closed": func(f *os.File) { f.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "out")
			if err := unix.Mkfifo(path, 0o600); err != nil {
				t.Fatal(err)
			}
			reader, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer reader.Close()
			o, err := openOutput(t.Context(), path)
			if err != nil {
				t.Fatal(err)
			}
			defer o.close()
			if _, err := io.WriteString(o.file, "last words"); err != nil {
				t.Fatal(err)
			}
			late, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			o.taken(late)
			cancel()
			if late.Err() == nil {
				t.Error("taken before anybody read it")
			}
			end(reader)
			soon, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if o.taken(soon); soon.Err() != nil {
				t.Error("not taken")
			}
		})
	}
}
