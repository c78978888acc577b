package ledger

import (
	"bytes"
	"testing"
)

func FuzzTile(f *testing.F) {
	f.Add([]byte{0, 1, 'a', 0, 2, 'b', 'c'}, 2, "tile/entries/000.p/2")
	f.Add([]byte{0xff, 0xff}, 1, "tile/0/x001/234")
	f.Add([]byte{}, 0, "tile/3/x001/x234/067.p/8")
	f.Add([]byte{0}, 256, "tile/entries/-01")
	f.Fuzz(func(t *testing.T, data []byte, n int, path string) {
		if leaves, err := splitBundle(data, n); err == nil {
			var back []byte
			for _, leaf := range leaves {
				back = appendBundle(back, leaf)
			}
			if !bytes.Equal(back, data) || len(leaves) != n {
				t.Fatalf("bundle of %d entries prints back as %x, was %x", n, back, data)
			}
			for _, leaf := range leaves {
				decodeEntry(leaf)
			}
		}
		if tile, err := parseTilePath(path); err == nil && tilePath(tile) != path {
			t.Fatalf("%q prints back as %q", path, tilePath(tile))
		}
	})
}

func FuzzCheckpoint(f *testing.F) {
	s := newSigner(f)
	good, err := s.checkpoint(0, [32]byte{1})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good.Note)
	f.Add([]byte("ledger\n-1\nAAAA\n\n— ledger AAAA\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		c, err := ParseCheckpoint(raw, s.VerifierKey())
		if err == nil && (c.Root != good.Root || c.Size != good.Size) {
			t.Fatalf("forged: %+v", c)
		}
		if c, err := parseCheckpointText(string(raw)); err == nil && c.Origin == "" {
			t.Fatal("a checkpoint without origin")
		}
	})
}

func FuzzJournal(f *testing.F) {
	f.Add(journal{base: 3, entries: [][]byte{[]byte("a"), {}}}.encode())
	f.Add([]byte(journalMagic))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if j, err := parseJournal(raw); err == nil && !bytes.Equal(j.encode(), raw) {
			t.Fatal("prints back otherwise")
		}
	})
}
