package guard

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// seedBundle is a small bundle: one map, one program.
func seedBundle() []byte {
	text := func(b []byte, s string) []byte { return append(append16(b, uint16(len(s))), s...) }
	b := text([]byte(bundleMagic), "aa55")
	b = append32(b, 0)
	b = text(append16(b, 1), "m")
	for _, v := range []uint32{2, 4, 8, 1, 0, 0, 0} {
		b = append32(b, v)
	}
	b = append16(b, 0)
	b = text(text(append16(b, 1), "p"), "GPL")
	for _, v := range []uint32{29, 27, 0, 7, 2, 1, 1} {
		b = append32(b, v)
	}
	b = append(b, make([]byte, 16)...)
	return append32(append32(append32(append32(b, 0), 0), 0), 3)
}

func seedPolicy() []byte {
	b := append64([]byte(policyMagic), 5)
	b = append(b, make([]byte, 32)...)
	b = append64(b, 5)
	b = append(b, make([]byte, policySize-8)...)
	b = append32(append32(b, 1), 18)
	b = append(append16(b, 2), "/x"...)
	b = append32(b, 1)
	b = append(b, make([]byte, destSize+listsSize)...)
	for _, s := range []struct {
		tag  uint16
		data []byte
	}{{sectionFiles, seedFiles()}, {sectionOpen, append32(append32(append32(nil, 1), 16), 20)}} {
		b = append(append32(append16(b, s.tag), uint32(len(s.data))), s.data...)
	}
	return b
}

// seedFiles is one list of one program, and two rules.
func seedFiles() []byte {
	b := append16(append32(nil, 1), 1)
	b = append(append16(b, 6), "/bin/x"...)
	b = append32(b, 2)
	for _, r := range []fileRule{{list: 1, allow: wantRead, ref: 17 | denies, path: "/etc"}, {base: wantWrite, ref: 18, watch: 19, path: "/a\xff\n"}} {
		b = append(append16(append16(b, r.policy), r.list), r.base, r.allow)
		b = append32(append32(b, r.ref), r.watch)
		b = append(append16(b, uint16(len(r.path))), r.path...)
	}
	return b
}

// seedPrograms is a small policy with what only some have.
func seedPrograms() []byte {
	b := append32(append16(seedPolicy(), sectionExecLists), execListsSize)
	b = append(b, make([]byte, execListsSize)...)
	text := func(b []byte, s string) []byte { return append(append16(b, uint16(len(s))), s...) }
	e := append32(append32(append16(append32(nil, 2), entryLimited), 3), 19|denies)
	e = text(append16(text(append(e, make([]byte, 16)...), "/bin/sh"), 1), "/bin/x")
	e = append32(append32(append16(e, entryVolume), 1), 20)
	e = append16(text(append(e, make([]byte, 16)...), "/opt"), 0)
	return append(append32(append16(b, sectionPrograms), uint32(len(e))), e...)
}

func TestParseBundle(t *testing.T) {
	got, err := parseBundle(seedBundle())
	if err != nil || got.kernel != "aa55" || len(got.maps) != 1 || len(got.programs) != 1 || len(got.programs[0].code) != 16 {
		t.Fatalf("%+v, %v", got, err)
	}
	b := seedBundle()
	for n := range len(b) {
		if _, err := parseBundle(b[:n]); err == nil {
			t.Errorf("a bundle cut after %d of %d bytes was read", n, len(b))
		}
	}
	if _, err := parseBundle(append(b, 0)); err == nil {
		t.Error("a bundle with a byte too many was read")
	}
}

func TestParsePolicy(t *testing.T) {
	p, err := parsePolicy(seedPolicy())
	if err != nil || p.generation != 5 || len(p.files) != 2 || p.files[0].path != "/etc" || p.files[1].path != "/a\xff\n" || len(p.lists) != 1 || len(p.open) != 1 || len(p.programs) != 1 || len(p.egress) != destSize+listsSize {
		t.Fatalf("%+v, %v", p, err)
	}
	b := seedPolicy()
	const open = 6 + 4 + 8
	files := 6 + len(seedFiles())
	for n := range len(b) {
		if n == len(b)-open || n == len(b)-open-files {
			continue // between sections: the frame has its own length
		}
		if _, err := parsePolicy(b[:n]); err == nil {
			t.Errorf("a policy cut after %d of %d bytes was read", n, len(b))
		}
	}
	if _, err := parsePolicy(append(append32([]byte(append(seedPolicy(), 0xff, 0xff)), 1), 0)); err == nil {
		t.Error("a policy with an unknown section was read")
	}
	b[len(policyMagic)+8+32]++ // the generation inside
	if _, err := parsePolicy(b); err == nil {
		t.Error("a policy of two generations was read")
	}
}

func TestParsePrograms(t *testing.T) {
	b := seedPrograms()
	p, err := parsePolicy(b)
	if err != nil || len(p.execs) != execListsSize || len(p.entries) != 2 || p.entries[0].parents[0] != "/bin/x" || p.entries[0].rule != 19|denies ||
		p.entries[1].kind != entryVolume || p.entries[1].lists != 1 || p.entries[1].path != "/opt" {
		t.Fatalf("%+v, %v", p, err)
	}
	whole := map[int]bool{len(seedPolicy()): true, len(seedPolicy()) + 6 + execListsSize: true} // ends of sections
	for n := len(seedPolicy()); n < len(b); n++ {
		if _, err := parsePolicy(b[:n]); err == nil && !whole[n] {
			t.Errorf("a policy cut after %d of %d bytes was read", n, len(b))
		}
	}
	b[len(seedPolicy())+6+execListsSize+6+4] = 99 // kind of the first
	if _, err := parsePolicy(b); err == nil {
		t.Error("a policy that says what nobody knows of a program was read")
	}
}

func FuzzParseBundle(f *testing.F) {
	f.Add(seedBundle())
	f.Add([]byte(bundleMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := parseBundle(b)
		if err != nil {
			return
		}
		for _, p := range got.programs {
			for _, u := range p.maps {
				if int(u.slot)*8+8 > len(p.code) || int(u.index) >= len(got.maps) {
					t.Errorf("map use %+v points outside", u)
				}
			}
		}
	})
}

func FuzzParsePolicy(f *testing.F) {
	f.Add(seedPolicy())
	f.Add(seedPrograms())
	f.Add([]byte(policyMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := parsePolicy(b)
		if err != nil {
			return
		}
		if len(p.fixed) != policySize || len(p.egress)%(destSize+listsSize) != 0 || len(p.files)+len(p.programs)+len(p.entries) > len(b) {
			t.Errorf("more was read than there is: %d rules in %d bytes", len(p.files)+len(p.programs), len(b))
		}
	})
}

func FuzzBuildID(f *testing.F) {
	f.Add([]byte("\x04\x00\x00\x00\x02\x00\x00\x00\x03\x00\x00\x00GNU\x00\xab\xcd\x00\x00"))
	f.Add([]byte("\xff\xff\xff\xff\xff\xff\xff\xff\x03\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, notes []byte) {
		if id := buildID(notes); len(id) > 2*len(notes) {
			t.Errorf("id of %d digits from %d bytes", len(id), len(notes))
		}
	})
}

func TestBuildID(t *testing.T) {
	other := "\x06\x00\x00\x00\x01\x00\x00\x00\x01\x00\x00\x00Linux\x00\x00\x00\x00\x00\x00\x00"
	gnu := "\x04\x00\x00\x00\x02\x00\x00\x00\x03\x00\x00\x00GNU\x00\xab\xcd\x00\x00"
	if got := buildID([]byte(other + gnu)); got != "abcd" {
		t.Errorf("build id %q, want abcd", got)
	}
	if got := buildID([]byte(other)); got != "" {
		t.Errorf("build id %q of notes without one", got)
	}
}

// A path is followed as a process inside would follow it, and never leaves.
func TestWalkStaysInside(t *testing.T) {
	root := t.TempDir()
	for _, d := range []string{"etc/app", "var", "run"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for link, target := range map[string]string{
		"var/run": "/run", "etc/up": "../../../../etc/app", "loop": "loop", "etc/host": "/../../../etc/passwd", "abs": "/etc",
	} {
		if err := os.Symlink(target, filepath.Join(root, link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "etc/app/key"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	fd, err := openPath(atCwd, root, syscall.O_DIRECTORY)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	for _, tt := range []struct {
		path, last, absent, after string
		steps                     []string
		err                       error
	}{
		{path: "/etc/app/key", last: "etc/app/key", steps: []string{"etc", "etc/app"}},
		{path: "/etc/up/key", last: "etc/app/key", steps: []string{"etc", "etc/up", "etc", "etc/app"}},
		{path: "/abs/app/../app/key", last: "etc/app/key", steps: []string{"abs", "etc", "etc/app", "etc/app"}},
		{path: "/var/run/pid", absent: "run/pid", steps: []string{"var", "var/run", "run"}},
		{path: "/etc/host", absent: "etc/passwd", after: "/", steps: []string{"etc", "etc/host", "etc"}},
		{path: "/none/at/all", absent: "none", after: "/at/all"},
		{path: "/abs/..", last: ".", steps: []string{"abs", "etc"}},
		{path: "/var/run/../etc/up", last: "etc/app", steps: []string{"var", "var/run", "run", "etc", "etc/up", "etc"}},
		{path: "/", last: "."},
		{path: "/../..", last: "."},
		{path: "/loop/x", err: syscall.ELOOP},
		{path: "/etc/app/key/x", err: syscall.ENOTDIR, steps: []string{"etc", "etc/app"}},
	} {
		var last, absent, after string
		var steps []string
		name := func(fd int) string {
			p, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
			if err != nil {
				t.Fatal(err)
			}
			rel, err := filepath.Rel(root, p)
			if err != nil || strings.HasPrefix(rel, "..") {
				t.Errorf("%s: %s lies outside", tt.path, p)
			}
			return rel
		}
		w := walker{root: fd, top: &place{name: "."}, step: func(fd int, at *place, end bool) error {
			defer syscall.Close(fd)
			called := name(fd)
			if full := at.path(); full != called {
				t.Errorf("%s: %q is said to be at %q", tt.path, called, full)
			}
			if end {
				last = called
			} else if called != "." {
				steps = append(steps, called)
			}
			return nil
		}, absent: func(at *place, rest string) error {
			absent, after = at.path(), rest
			return nil
		}}
		err := w.walk(tt.path)
		if tt.err != nil {
			if err != tt.err {
				t.Errorf("%s: %v, want %v", tt.path, err, tt.err)
			}
			continue
		}
		if err != nil || last != tt.last || absent != tt.absent || after != tt.after || !slices.Equal(steps, tt.steps) {
			t.Errorf("%s: ends at %q, lacks %q, by %q (%v); want %q, %q, %q", tt.path, last, absent, steps, err, tt.last, tt.absent, tt.steps)
		}
	}
	if n := openDescriptors(t); n > 64 {
		t.Errorf("%d descriptors are open; walking leaks them", n)
	}
}

// path is the place's path in the container, as the test knows it.
func (p *place) path() string {
	if p.up == nil || p.up.up == nil {
		return p.name
	}
	return p.up.path() + "/" + p.name
}

func openDescriptors(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}
