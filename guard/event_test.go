package guard

import (
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"testing"
)

// record makes an event as the programs do.
func record(op Op, verdict Verdict, kind byte, text string) []byte {
	b := make([]byte, eventSize)
	b[0], b[1], b[2], b[3], b[4] = eventVersion, byte(op), byte(verdict), 4, kind
	le := binary.LittleEndian
	le.PutUint32(b[8:], 17)
	le.PutUint32(b[12:], 42)
	le.PutUint64(b[24:], 9)
	le.PutUint64(b[40:], 3)
	copy(b[64:80], "sh")
	copy(b[80:], text)
	return b
}

func started(size, argc int, args string) []byte {
	b := append(record(OpStarted, Allowed, textPath, "/bin/sh"), make([]byte, argsSize)...)
	binary.LittleEndian.PutUint16(b[6:], uint16(argc))
	binary.LittleEndian.PutUint64(b[56:], uint64(size))
	copy(b[eventSize:], args)
	return b
}

func TestDecodeEvents(t *testing.T) {
	target := "\xa0\x00\x00\x00\x04\x00\x01\xbb" + strings.Repeat("\x00", 10) + "\xff\xff\x0a\x00\x00\x05"
	exec := record(OpExec, Denied, textPath, "/tmp/x\x00left over")
	exec[5] = 1
	for _, tt := range []struct {
		name string
		b    []byte
		want string
	}{
		{"path", exec, `denied: "sh" (pid 42, uid 0) tried to run "/tmp/x", which was added or changed since the image was released [rule 17, generation 3]`},
		{"names", record(OpWrite, Denied, textNames, "passwd\x00etc\x00"), `denied: "sh" (pid 42, uid 0) tried to change "/etc/passwd" [rule 17, generation 3]`},
		{"deep", record(OpWrite, Reported, textNames, strings.Repeat("d\x00", 12)), `reported: "sh" (pid 42, uid 0) tried to change ".../d/d/d/d/d/d/d/d/d/d/d/d" [rule 17, generation 3]`},
		{"target", record(OpEgress, Denied, textTarget, target), `denied: "sh" (pid 42, uid 0) tried to reach 10.0.0.5:443 [rule 17, generation 3]`},
		{"hostile name", record(OpWrite, Denied, textPath, "/a\n\xff\x1b"), `denied: "sh" (pid 42, uid 0) tried to change "/a\n` + "\uFFFD" + `\x1b" [rule 17, generation 3]`},
		{"unknown operation", record(200, Denied, 0, ""), `denied: "sh" (pid 42, uid 0) tried to do operation 200 [rule 17, generation 3]`},
	} {
		e, err := DecodeEvents(tt.b)
		if err != nil || e.String() != tt.want {
			t.Errorf("%s: %s, %v; want %s", tt.name, e, err, tt.want)
		}
	}
}

// What follows a program's arguments is its environment, which may hold
// secrets.
func TestDecodeArgumentsStopsAtEnvironment(t *testing.T) {
	args := "sh\x00-c\x00true\x00PASSWORD=secret\x00"
	for _, tt := range []struct {
		size, argc int
		want       []string
	}{
		{len(args), 3, []string{"sh", "-c", "true"}}, {len(args), 0, nil}, {4, 3, []string{"sh", "-"}}, {1 << 40, 1, []string{"sh"}}, {0, 3, nil},
	} {
		e, err := DecodeEvents(started(tt.size, tt.argc, args))
		if err != nil || !slices.Equal(e.Args, tt.want) {
			t.Errorf("size %d, %d arguments: %q, %v; want %q", tt.size, tt.argc, e.Args, err, tt.want)
		}
	}
}

// lineage makes a record of a process that two others led to.
func withLineage(b []byte) []byte {
	le := binary.LittleEndian
	who := b[whoOffset:]
	le.PutUint64(who, 77)
	le.PutUint32(who[20:], 3)
	who[25], who[26], who[27] = 1, 2, 1
	copy(who[48:], "/usr/bin/python3")
	copy(who[176:], "a-name-whose-path-is-long")
	le.PutUint32(who[304:], 41)
	copy(who[308:], "sh")
	le.PutUint32(who[304+ancestorSize:], 7)
	copy(who[308+ancestorSize:], "java\x1b[2J")
	return b
}

func TestDecodeLineage(t *testing.T) {
	b := withLineage(record(OpExec, Denied, textPath, "/tmp/x"))
	le := binary.LittleEndian
	le.PutUint64(b[336:], 5)
	le.PutUint64(b[344:], 9)
	e, err := DecodeEvents(b)
	want := []Ancestor{{41, "sh"}, {7, "java\x1b[2J"}}
	if err != nil || e.Exe != "/usr/bin/python3" || e.Parent != ".../a-name-whose-path-is-long" || e.Container != 3 || e.Start != 77 ||
		!slices.Equal(e.Lineage, want) || !e.Cut || e.Series != 5 || e.Count != 9 {
		t.Errorf("%+v, %v", e, err)
	}
	b[whoOffset+26] = 200 // more ancestors than there is room for
	if e, err := DecodeEvents(b); err != nil || len(e.Lineage) != ancestors {
		t.Errorf("%d ancestors, %v; want %d", len(e.Lineage), err, ancestors)
	}
}

func TestDecodeRepeated(t *testing.T) {
	b := make([]byte, repeatedSize)
	le := binary.LittleEndian
	b[0], b[1], b[2] = eventVersion, byte(OpRepeated), byte(Denied)
	le.PutUint32(b[8:], 17)
	le.PutUint32(b[12:], 42)
	le.PutUint64(b[16:], 9)
	le.PutUint64(b[24:], 1000)
	b[40] = byte(OpBPF)
	e, err := DecodeEvents(b)
	if want := `denied: "" (pid 42, uid 0) did the same 1000 times in all: tried to use eBPF [rule 17, generation 0]`; err != nil || e.String() != want || e.Series != 9 {
		t.Errorf("%s, %v; want %s", e, err, want)
	}
	b[40] = byte(OpRepeated) // which would tell of itself
	if _, err := DecodeEvents(b); !errors.Is(err, errRecord) {
		t.Errorf("%v; want a refusal", err)
	}
}

func TestDecodeEventsRefuses(t *testing.T) {
	good := record(OpExec, Denied, textPath, "/x")
	version, verdict, kind := slices.Clone(good), slices.Clone(good), slices.Clone(good)
	version[0], verdict[2], kind[4] = 1, 9, 7
	for name, b := range map[string][]byte{
		"nothing": nil, "short": good[:len(good)-1], "long": append(slices.Clone(good), 0), "version": version, "verdict": verdict, "kind": kind,
		"cut start": started(0, 0, "")[:eventSize],
	} {
		if e, err := DecodeEvents(b); !errors.Is(err, errRecord) {
			t.Errorf("%s: %v, %v; want a refusal", name, e, err)
		}
	}
}

func FuzzDecodeEvents(f *testing.F) {
	f.Add(record(OpExec, Denied, textPath, "/tmp/x"))
	f.Add(record(OpWrite, Reported, textNames, "passwd\x00etc\x00"))
	f.Add(record(OpEgress, Denied, textTarget, "\xa0\x00\x00\x00\x04\x00\x01\xbb"))
	f.Add(withLineage(record(OpExec, Denied, textPath, "/tmp/x")))
	f.Add(make([]byte, repeatedSize))
	f.Add(started(10, 3, "sh\x00-c\x00true\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := DecodeEvents(b)
		if err != nil {
			return
		}
		held := len(e.Path) + len(e.Command)
		for _, a := range e.Args {
			held += len(a)
		}
		if held > 4*len(b) { // a byte that is no text becomes three
			t.Errorf("%d bytes of text out of %d", held, len(b))
		}
		_ = e.String()
	})
}
