package unixsock

import (
	"bytes"
	"io"
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// pair is a connected pair of sockets.
func pair(t *testing.T, kind int) (ends [2]*net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		ends[i] = c.(*net.UnixConn)
	}
	return ends
}

// nulls are n open files.
func nulls(t *testing.T, n int) (all []*os.File) {
	t.Helper()
	for range n {
		f, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		all = append(all, f)
	}
	return all
}

// descriptorFlags asks for the flags of a descriptor (F_GETFD) or of what it is of
// (F_GETFL).
func descriptorFlags(t *testing.T, f *os.File, which int) int {
	t.Helper()
	raw, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var flags int
	if cerr := raw.Control(func(fd uintptr) { flags, err = unix.FcntlInt(fd, which, 0) }); cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	return flags
}

func TestFilesComeAlong(t *testing.T) {
	for name, kind := range map[string]int{"messages": unix.SOCK_SEQPACKET, "stream": unix.SOCK_STREAM} {
		for _, nonblock := range []bool{false, true} {
			ends := pair(t, kind)
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			defer w.Close()
			blocking := os.NewFile(uintptr(must(unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0))), "blocking")
			defer blocking.Close()
			if err := Send(ends[0], []byte("two"), w, blocking); err != nil {
				t.Fatal(err)
			}
			in := NewInbox(8, 2)
			in.Nonblock = nonblock
			body, files, err := in.Receive(ends[1])
			if err != nil || string(body) != "two" || len(files) != 2 {
				t.Fatalf("%s: %q with %d files, %v", name, body, len(files), err)
			}
			for _, f := range files {
				defer f.Close()
				if descriptorFlags(t, f, unix.F_GETFD)&unix.FD_CLOEXEC == 0 {
					t.Errorf("%s: a program that is started has what was received", name)
				}
			}
			if got := descriptorFlags(t, files[1], unix.F_GETFL)&unix.O_NONBLOCK != 0; got != nonblock {
				t.Errorf("%s: what was received is non-blocking: %v, want %v", name, got, nonblock)
			}
			if descriptorFlags(t, w, unix.F_GETFL)&unix.O_NONBLOCK == 0 {
				t.Errorf("%s: what was sent turned blocking", name)
			}
			if _, err := files[0].Write([]byte("x")); err != nil {
				t.Error(err)
			}
			if _, err := io.ReadFull(r, make([]byte, 1)); err != nil {
				t.Errorf("%s: what came is not what was sent: %v", name, err)
			}
			ends[0].Close()
			if _, _, err := in.Receive(ends[1]); err != io.EOF {
				t.Errorf("%s: the other end is gone: %v, want EOF", name, err)
			}
		}
	}
}

func must(fd int, err error) int {
	if err != nil {
		panic(err)
	}
	return fd
}

// Whatever is refused leaves no descriptor behind. Room for three has, as the kernel
// counts it, room for four: that is refused by its count, and not by the kernel.
func TestReceiveIsBounded(t *testing.T) {
	for name, c := range map[string]struct {
		body    int
		files   int
		refused string
	}{
		"as much as there is room": {8, 3, ""},
		"a long message":           {9, 3, "longer than 8 bytes"},
		"one file more":            {8, 4, "more than 3 files"},
		"many files more":          {8, 250, "more than 3 files"},
		"an empty message":         {0, 3, "EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			kind := unix.SOCK_SEQPACKET
			if c.body == 0 {
				kind = unix.SOCK_DGRAM // on others the standard library puts a byte in
			}
			ends := pair(t, kind)
			files := nulls(t, c.files)
			before := openFiles(t)
			if err := Send(ends[0], bytes.Repeat([]byte("x"), c.body), files...); err != nil {
				t.Fatal(err)
			}
			_, got, err := NewInbox(8, 3).Receive(ends[1])
			if c.refused == "" {
				if err != nil || len(got) != c.files {
					t.Fatalf("%d files, %v", len(got), err)
				}
			} else if err == nil || !strings.Contains(err.Error(), c.refused) || got != nil {
				t.Errorf("%d files, %v; want an error of %q", len(got), err, c.refused)
			}
			for _, f := range got {
				f.Close()
			}
			if after := openFiles(t); after != before {
				t.Errorf("%d descriptors are open, %d were", after, before)
			}
		})
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}
