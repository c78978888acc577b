package vm

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// written is a manifest as Snapshot writes it.
func written(t testing.TB) []byte {
	s := Snapshot{
		Version: snapshotVersion, Key: "k", Origin: Origin{Monitor: "QEMU 7", Kernel: "aa", MemoryMiB: 128},
		Slots: []Slot{"r0", "w1"}, Networks: 1, Bytes: 1, SHA256: strings.Repeat("0", 64), Note: []byte(`{"who": "a <b>"}`),
	}
	var err error
	if s.Sum, err = s.sum(); err != nil {
		t.Fatal(err)
	}
	raw, err := json.MarshalIndent(s, "", "\t")
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// TestSnapshotManifest reads what was written, and nothing that was changed.
func TestSnapshotManifest(t *testing.T) {
	good := written(t)
	if s, err := parseSnapshot(good); err != nil || s.Origin.MemoryMiB != 128 || !strings.Contains(string(s.Note), "who") {
		t.Fatalf("%+v, %v", s, err)
	}
	for _, c := range [][2]string{{`"who"`, `"whu"`}, {`"k"`, `"l"`}, {`QEMU 7`, `QEMU 8`}, {`"bytes": 1`, `"bytes": 2`}, {`"networks": 1`, `"networks": 2`}, {`"sum": "`, `"sum": "0`}} {
		changed := bytes.Replace(good, []byte(c[0]), []byte(c[1]), 1)
		if _, err := parseSnapshot(changed); bytes.Equal(good, changed) || !errors.Is(err, ErrDamaged) {
			t.Errorf("%s in place of %s: %v, want %v", c[1], c[0], err, ErrDamaged)
		}
	}
	old := bytes.Replace(good, []byte(`"version": 2`), []byte(`"version": 1`), 1)
	if _, err := parseSnapshot(old); err == nil || !strings.Contains(err.Error(), "version 1") {
		t.Errorf("another version: %v", err)
	}
	dir := t.TempDir()
	name := filepath.Join(dir, manifestName)
	if err := os.WriteFile(name, good, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadSnapshot(dir); err != nil {
		t.Error(err)
	}
	if err := os.Chmod(name, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadSnapshot(dir); !errors.Is(err, ErrDamaged) {
		t.Errorf("one that others could read: %v, want %v", err, ErrDamaged)
	}
}

// TestCheckOrigin names what is not as it was.
func TestCheckOrigin(t *testing.T) {
	was := Origin{Monitor: "QEMU 7", Arguments: "aa", Kernel: "bb", Initrd: "cc", MemoryMiB: 128, CPUs: 1, TrustDomain: "d"}
	s := Snapshot{Key: "k", Origin: was}
	if err := s.CheckOrigin("k", Origin{}); err != nil {
		t.Errorf("the same key: %v", err)
	}
	for want, change := range map[string]func(*Origin){
		`monitor was "QEMU 7" and is "QEMU 8"`:                func(o *Origin) { o.Monitor = "QEMU 8" },
		"kernel was bb and is b":                              func(o *Origin) { o.Kernel = "b" },
		"initramfs of agent and Guard was cc and is c":        func(o *Origin) { o.Initrd = "c" },
		"memory in MiB was 128 and is 256":                    func(o *Origin) { o.MemoryMiB, o.Arguments = 256, "a" },
		"number of CPUs was 1 and is 2":                       func(o *Origin) { o.CPUs = 2 },
		`trust domain was "d" and is "e"`:                     func(o *Origin) { o.TrustDomain = "e" },
		"digest of the monitor's arguments was aa and is a":   func(o *Origin) { o.Arguments = "a" },
		"the state's key is k, the machine needs another-key": func(*Origin) {},
	} {
		is := was
		change(&is)
		if err := s.CheckOrigin("another-key", is); !errors.Is(err, ErrWrongTemplate) || !strings.HasSuffix(err.Error(), ": "+want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

func FuzzParseSnapshot(f *testing.F) {
	f.Add(written(f))
	f.Add([]byte(`{"version":2,"slots":["r0","r0"]}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		s, err := parseSnapshot(raw)
		if err != nil {
			return
		}
		if s.Bytes <= 0 || s.Networks < 1 || s.Networks > MaxNetworks || len(s.Slots) > MaxDisks {
			t.Errorf("taken: %+v", s)
		}
	})
}
