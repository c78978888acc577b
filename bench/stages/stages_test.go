package stages

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

func TestOf(t *testing.T) {
	for _, c := range []struct {
		want      string
		functions []string
	}{
		{"system call: read", []string{"internal/runtime/syscall.Syscall6", "syscall.RawSyscall6", "syscall.Syscall", "syscall.read", "syscall.Read", "internal/poll.(*FD).Read", "net.(*conn).Read", "hauberk.dev/mesh/tls13.(*Conn).Read"}},
		{"system call: write", []string{"internal/runtime/syscall.Syscall6", "syscall.Syscall", "syscall.write", "hauberk.dev/mesh/alone.(*exchange).send"}},
		{"system call: epoll", []string{"internal/runtime/syscall.Syscall6", "internal/runtime/syscall.EpollWait", "runtime.netpoll", "runtime.findRunnable"}},
		{"scheduler", []string{"runtime.futex", "runtime.notesleep", "runtime.stopm"}},
		{"copying", []string{"runtime.memmove", "hauberk.dev/mesh/http1.(*Reader).Head"}},
		{"parsing and writing of protocols", []string{"internal/bytealg.IndexByte", "bytes.IndexByte", "hauberk.dev/mesh/http1.field", "hauberk.dev/mesh/alone.serve"}},
		{"TLS", []string{"crypto/internal/fips140/aes/gcm.gcmAesEnc", "hauberk.dev/mesh/tls13.(*half).seal"}},
		{"routing and policy", []string{"strings.EqualFold", "hauberk.dev/mesh/route.(*Table).Match"}},
		{"the proxy's own glue", []string{"hauberk.dev/mesh.(*Proxy).serve"}},
		{"system call: other", []string{"internal/runtime/syscall.Syscall6", "syscall.RawSyscall", "syscall.connect", "net.(*netFD).connect"}},
		{Other, []string{"runtime.unknown"}},
		{Other, nil},
	} {
		if got := Of(c.functions); got != c.want {
			t.Errorf("%q is %q, want %q", c.functions, got, c.want)
		}
	}
}

// TestProfile takes a real profile and finds in it what was done.
func TestProfile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cpu")
	err := Profile(context.Background(), path, func(context.Context) error {
		b := make([]byte, 1<<16)
		// A profile counts processor time, so this does: neighbours make it no shorter.
		for end := spent(t) + 500*time.Millisecond; spent(t) < end; {
			sum := sha256.Sum256(b)
			b[0] = sum[0]
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	all, err := Read(path)
	if err != nil {
		t.Fatal(err)
	}
	sum, samples := Sum(all)
	if samples == 0 || sum != time.Duration(samples)*10*time.Millisecond || all[0].Stage != "TLS" {
		t.Errorf("%v of %d samples: %+v", sum, samples, all)
	}
	if err := Profile(context.Background(), path, nil); !os.IsExist(err) {
		t.Errorf("a profile was written over: %v", err)
	}
}

// spent is the processor time of this process in its own code.
func spent(t *testing.T) time.Duration {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		t.Fatal(err)
	}
	return time.Duration(r.Utime.Nano())
}

func packed(raw []byte) []byte {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	z.Write(raw)
	z.Close()
	return b.Bytes()
}

// Two samples: one with packed numbers, one with single ones.
var small = []byte{
	0x12, 8, 0x0a, 2, 1, 2, 0x12, 2, 3, 30, // locations 1 and 2, three times, 30 ns
	0x12, 6, 0x08, 2, 0x10, 1, 0x10, 10, // location 2, once, 10 ns
	0x22, 10, 0x08, 1, 0x22, 2, 0x08, 1, 0x22, 2, 0x08, 2, // location 1 is function 1, in function 2
	0x22, 6, 0x08, 2, 0x22, 2, 0x08, 2, // location 2 is function 2
	0x2a, 4, 0x08, 1, 0x10, 1, 0x2a, 4, 0x08, 2, 0x10, 2,
	0x32, 0, 0x32, 1, 'a', 0x32, 1, 'b',
}

func TestDecode(t *testing.T) {
	got, err := decode(packed(small))
	if err != nil || len(got) != 2 {
		t.Fatal(got, err)
	}
	if s := got[0]; len(s.functions) != 3 || s.functions[0] != "a" || s.functions[2] != "b" || s.count != 3 || s.nanoseconds != 30 {
		t.Errorf("%+v", s)
	}
	if s := got[1]; len(s.functions) != 1 || s.functions[0] != "b" || s.count != 1 || s.nanoseconds != 10 {
		t.Errorf("%+v", s)
	}
	for name, raw := range map[string][]byte{"not packed": small, "broken": packed(small[:3]), "of another kind": packed([]byte{0x12, 2, 0x10, 1}), "a broken number": packed([]byte{0x12, 3, 0x0a, 1, 0x80})} {
		if got, err := decode(raw); err == nil {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(small)
	f.Fuzz(func(t *testing.T, raw []byte) {
		if all, err := decode(packed(raw)); err == nil {
			for _, s := range all {
				Of(s.functions)
			}
		}
	})
}

func TestPrint(t *testing.T) {
	var out bytes.Buffer
	c := Cost{What: "w", Each: 10 * time.Microsecond, Requests: 5, Shares: []Share{{"TLS", 30, 3}, {Other, 10, 1}}}
	if err := c.Print(&out); err != nil {
		t.Fatal(err)
	}
	want := "w: 10.0 us of processor time a request, 5 requests, 4 samples\n" +
		"  share  us/request  samples  stage\n  75.0%        7.50        3  TLS\n  25.0%        2.50        1  other\n"
	if out.String() != want {
		t.Errorf("%s, want\n%s", &out, want)
	}
	if err := (Cost{}).Print(&out); err != nil {
		t.Error(err)
	}
}
