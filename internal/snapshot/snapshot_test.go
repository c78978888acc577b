package snapshot

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
	s := Manifest{
		Version: Version, Key: "k", Origin: Origin{Monitor: "QEMU 7", Kernel: "aa", MemoryMiB: 128},
		Slots: []string{"r0", "w1"}, Networks: 1, Bytes: 1, SHA256: strings.Repeat("0", 64), Note: []byte(`{"who": "a <b>"}`),
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

// TestManifest reads what was written, and nothing that was changed.
func TestManifest(t *testing.T) {
	good := written(t)
	if s, err := parse(good); err != nil || s.Origin.MemoryMiB != 128 || !strings.Contains(string(s.Note), "who") {
		t.Fatalf("%+v, %v", s, err)
	}
	for _, c := range [][2]string{{`"who"`, `"whu"`}, {`"k"`, `"l"`}, {`QEMU 7`, `QEMU 8`}, {`"bytes": 1`, `"bytes": 2`}, {`"networks": 1`, `"networks": 2`}, {`"sum": "`, `"sum": "0`}} {
		changed := bytes.Replace(good, []byte(c[0]), []byte(c[1]), 1)
		if _, err := parse(changed); bytes.Equal(good, changed) || !errors.Is(err, ErrDamaged) {
			t.Errorf("%s in place of %s: %v, want %v", c[1], c[0], err, ErrDamaged)
		}
	}
	old := bytes.Replace(good, []byte(`"version": 2`), []byte(`"version": 1`), 1)
	if _, err := parse(old); err == nil || !strings.Contains(err.Error(), "version 1") {
		t.Errorf("another version: %v", err)
	}
	dir := t.TempDir()
	name := filepath.Join(dir, manifestName)
	if err := os.WriteFile(name, good, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Read(dir); err != nil {
		t.Error(err)
	}
	if err := os.Chmod(name, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Read(dir); !errors.Is(err, ErrDamaged) {
		t.Errorf("one that others could read: %v, want %v", err, ErrDamaged)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(written(f))
	f.Add([]byte(`{"version":2,"networks":0}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		s, err := parse(raw)
		if err != nil {
			return
		}
		if s.Bytes <= 0 || s.Networks < 1 {
			t.Errorf("taken: %+v", s)
		}
	})
}
