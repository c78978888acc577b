package ledger

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/fstest"

	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
)

const origin = "ledger.hauberk.test"

func newSigner(t testing.TB) *Signer {
	t.Helper()
	s, err := LoadOrCreateSigner(filepath.Join(t.TempDir(), "key"), origin)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func openLog(t testing.TB, dir string, s *Signer) *Log {
	t.Helper()
	l, err := Open(dir, origin, s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func entry(i int) Entry {
	return Entry{Kind: "test.entry", Subject: fmt.Sprintf("subject-%d", i%7), Namespace: "bank",
		Text: fmt.Sprintf("entry number %d", i), Body: json.RawMessage(fmt.Sprintf(`{"i":%d}`, i))}
}

// fill appends n entries in a few batches.
func fill(t testing.TB, l *Log, n int) {
	t.Helper()
	start := int(l.Checkpoint().Size)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			if _, err := l.Append(context.Background(), entry(start+i)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

func TestAppendSurvivesReopen(t *testing.T) {
	dir, s := t.TempDir(), newSigner(t)
	want := map[uint64]string{}
	l := openLog(t, dir, s)
	for i := range 5 {
		at, err := l.Append(t.Context(), entry(i))
		if err != nil || at != uint64(i) {
			t.Fatalf("entry %d at %d, %v", i, at, err)
		}
	}
	fill(t, l, 700) // crosses two tiles
	if err := l.Scan(0, func(at uint64, e Entry) error { want[at] = e.Text; return nil }); err != nil {
		t.Fatal(err)
	}
	head := l.Checkpoint()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Append(t.Context(), entry(0)); !errors.Is(err, ErrClosed) {
		t.Errorf("append after close: %v", err)
	}
	l = openLog(t, dir, s)
	if got := l.Checkpoint(); got.Size != 705 || got.Root != head.Root {
		t.Errorf("head is %d %s, want %d %s", got.Size, got.Root, head.Size, head.Root)
	}
	seen := 0
	if err := l.Scan(3, func(at uint64, e Entry) error {
		seen++
		if want[at] != e.Text {
			t.Errorf("entry %d is %q, want %q", at, e.Text, want[at])
		}
		return nil
	}); err != nil || seen != 702 {
		t.Errorf("scanned %d, %v", seen, err)
	}
	for _, from := range []uint64{705, 706, 1 << 63, ^uint64(0)} {
		if err := l.Scan(from, func(at uint64, _ Entry) error { return fmt.Errorf("entry %d", at) }); err != nil {
			t.Errorf("scan from %d: %v", from, err)
		}
		if _, err := l.Read(from); !errors.Is(err, ErrRange) {
			t.Errorf("read %d: %v", from, err)
		}
	}
	r, err := VerifyDir(dir, s.VerifierKey())
	if err != nil || r.Size != 705 || r.Root != head.Root || r.First.IsZero() || r.Last.Before(r.First) {
		t.Errorf("report %+v, %v", r, err)
	}
}

func TestEveryPrefixVerifies(t *testing.T) {
	dir, s := t.TempDir(), newSigner(t)
	l := openLog(t, dir, s)
	var heads []Checkpoint
	for i := range 20 {
		if _, err := l.Append(t.Context(), entry(i)); err != nil {
			t.Fatal(err)
		}
		if _, err := VerifyDir(dir, s.VerifierKey()); err != nil {
			t.Fatalf("after %d: %v", i, err)
		}
		heads = append(heads, l.Checkpoint())
	}
	fill(t, l, 300)
	now := l.Checkpoint()
	for _, old := range heads {
		p, err := l.ConsistencyProof(old.Size)
		if err != nil {
			t.Fatal(err)
		}
		if err := CheckConsistency(p, old, now); err != nil {
			t.Error(err)
		}
		other := old
		other.Root[0] ^= 1
		if CheckConsistency(p, other, now) == nil {
			t.Errorf("another root at size %d is consistent", old.Size)
		}
	}
	// Partial tiles do not pile up: the last checkpoint's and the one before.
	left, err := filepath.Glob(filepath.Join(dir, "tile", "*", "*.p", "*"))
	if err != nil || len(left) > 6 {
		t.Errorf("%d partial tiles are left: %v", len(left), left)
	}
}

// TestProofsConvinceOthers checks inclusion with an independent verifier.
func TestProofsConvinceOthers(t *testing.T) {
	dir, s := t.TempDir(), newSigner(t)
	l := openLog(t, dir, s)
	fill(t, l, 600)
	head := l.Checkpoint()
	for _, at := range []uint64{0, 1, 255, 256, 511, 599} {
		p, err := l.Proof(at)
		if err != nil {
			t.Fatal(err)
		}
		var hashes [][]byte
		for _, h := range p.Hashes {
			hashes = append(hashes, h[:])
		}
		leaf := rfc6962.DefaultHasher.HashLeaf(p.Leaf)
		if err := proof.VerifyInclusion(rfc6962.DefaultHasher, at, head.Size, leaf, hashes, head.Root[:]); err != nil {
			t.Errorf("entry %d: %v", at, err)
		}
		if e, err := CheckProof(p, s.VerifierKey()); err != nil || e.Kind != "test.entry" {
			t.Errorf("entry %d: %+v, %v", at, e, err)
		}
		p.Leaf = bytes.Replace(p.Leaf, []byte("number"), []byte("NUMBER"), 1)
		if _, err := CheckProof(p, s.VerifierKey()); err == nil {
			t.Errorf("a changed entry %d is proved", at)
		}
	}
	if _, err := l.Proof(600); !errors.Is(err, ErrRange) {
		t.Errorf("proof past the end: %v", err)
	}
}

func TestFind(t *testing.T) {
	l := openLog(t, t.TempDir(), newSigner(t))
	for i := range 30 {
		e := entry(i)
		if i == 11 {
			e.Incident, e.Namespace = "inc-1", "shop"
		}
		if _, err := l.Append(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		q    Query
		want []uint64
	}{
		{Query{Incident: "inc-1"}, []uint64{11}},
		{Query{Subject: "subject-4"}, []uint64{4, 11, 18, 25}},
		{Query{Subject: "subject-4", Namespace: "bank"}, []uint64{4, 18, 25}},
		{Query{Subject: "subject-4", Limit: 2}, []uint64{18, 25}},
		{Query{Subject: "nobody"}, nil},
		{Query{Limit: 1}, []uint64{29}},
	} {
		got, err := l.Find(c.q)
		if err != nil {
			t.Fatal(err)
		}
		var at []uint64
		for _, r := range got {
			at = append(at, r.Index)
		}
		if fmt.Sprint(at) != fmt.Sprint(c.want) {
			t.Errorf("%+v: %v, want %v", c.q, at, c.want)
		}
	}
	// What the index no longer covers is found by reading.
	l.index.from = 20
	for w, list := range l.index.words {
		var kept []uint64
		for _, at := range list {
			if at >= 20 {
				kept = append(kept, at)
			}
		}
		l.index.words[w] = kept
	}
	got, err := l.Find(Query{Subject: "subject-4"})
	if err != nil || len(got) != 4 || got[0].Index != 4 || got[3].Index != 25 {
		t.Errorf("with a short index: %v, %v", got, err)
	}
}

func TestOneWriter(t *testing.T) {
	dir, s := t.TempDir(), newSigner(t)
	l := openLog(t, dir, s)
	_, err := Open(dir, origin, s)
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Errorf("second writer: %v", err)
	}
	l.Close()
	openLog(t, dir, s)
}

func TestAppendRefuses(t *testing.T) {
	l := openLog(t, t.TempDir(), newSigner(t))
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, c := range []struct {
		name string
		ctx  context.Context
		e    Entry
		want string
	}{
		{"no kind", t.Context(), Entry{Text: "x"}, "kind"},
		{"no text", t.Context(), Entry{Kind: "x"}, "text"},
		{"bad body", t.Context(), Entry{Kind: "k", Text: "x", Body: json.RawMessage(`{"a":`)}, "JSON"},
		{"body twice", t.Context(), Entry{Kind: "k", Text: "x", Body: json.RawMessage(`{"a":1,"a":2}`)}, "twice"},
		{"large", t.Context(), Entry{Kind: "k", Text: strings.Repeat("x", 1<<16)}, "at most"},
		{"cancelled", cancelled, entry(1), "canceled"},
	} {
		if _, err := l.Append(c.ctx, c.e); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error is %v, want %q", c.name, err, c.want)
		}
	}
	if size := l.Checkpoint().Size; size != 0 {
		t.Errorf("size is %d", size)
	}
}

func TestOpenRefuses(t *testing.T) {
	for _, c := range []struct {
		name  string
		spoil func(t *testing.T, dir string)
		want  string
	}{
		{"no checkpoint", func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, "checkpoint")) }, "no checkpoint"},
		{"old checkpoint", func(t *testing.T, dir string) { put(t, dir, "checkpoint", get(t, dir, "old")) }, "older checkpoint was put back"},
		{"tile cut", func(t *testing.T, dir string) { cut(t, dir, "tile/0/001.p/44") }, "tile/0/001.p/44: is"},
		{"bundle cut", func(t *testing.T, dir string) { cut(t, dir, "tile/entries/000") }, "tile/entries/000: is cut off"},
		{"tile gone", func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, "tile/entries/001.p/44")) }, "tile/entries/001.p/44"},
		{"checkpoint cut", func(t *testing.T, dir string) { cut(t, dir, "checkpoint") }, "checkpoint"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir, s := t.TempDir(), newSigner(t)
			l := openLog(t, dir, s)
			fill(t, l, 290)
			put(t, dir, "old", get(t, dir, "checkpoint"))
			for i := range 10 { // one by one, so the journal is not of all ten
				if _, err := l.Append(t.Context(), entry(i)); err != nil {
					t.Fatal(err)
				}
			}
			l.Close()
			c.spoil(t, dir)
			l, err := Open(dir, origin, s)
			if err == nil {
				l.Close()
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v, want %q", err, c.want)
			}
		})
	}
	if _, err := Open(t.TempDir(), "other", newSigner(t)); err == nil {
		t.Error("a log opened under a foreign origin")
	}
}

// TestVerifyNamesTheBadFile spoils each file of a log in each of three ways.
func TestVerifyNamesTheBadFile(t *testing.T) {
	dir, s := t.TempDir(), newSigner(t)
	l := openLog(t, dir, s)
	fill(t, l, 600)
	var buf bytes.Buffer
	if err := l.Archive(&buf); err != nil {
		t.Fatal(err)
	}
	good := untar(t, &buf)
	if r, err := VerifyFS(good, s.VerifierKey()); err != nil || r.Size != 600 || r.Tiles != 7 {
		t.Fatalf("archive: %+v, %v", r, err)
	}
	spoiled := 0
	for name, file := range good {
		for how, data := range map[string][]byte{
			"flip": flip(file.Data, len(file.Data)/2), "cut": file.Data[:len(file.Data)-1], "longer": append(bytes.Clone(file.Data), 0),
		} {
			bad := fstest.MapFS{}
			for n, f := range good {
				bad[n] = f
			}
			bad[name] = &fstest.MapFile{Data: data}
			_, err := VerifyFS(bad, s.VerifierKey())
			if err == nil {
				t.Errorf("%s %s: verifies", how, name)
			} else if !strings.Contains(err.Error(), name) {
				t.Errorf("%s %s: error does not name it: %v", how, name, err)
			}
			spoiled++
		}
		gone := fstest.MapFS{}
		for n, f := range good {
			if n != name {
				gone[n] = f
			}
		}
		if _, err := VerifyFS(gone, s.VerifierKey()); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("without %s: %v", name, err)
		}
	}
	if spoiled != 3*8 {
		t.Errorf("spoiled %d files", spoiled)
	}
	if _, err := VerifyFS(good, newSigner(t).VerifierKey()); err == nil {
		t.Error("verifies under a foreign key")
	}
}

func TestSignerFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	a, err := LoadOrCreateSigner(path, origin)
	if err != nil {
		t.Fatal(err)
	}
	b, err := LoadOrCreateSigner(path, origin)
	if err != nil || a.VerifierKey() != b.VerifierKey() {
		t.Errorf("second load: %v", err)
	}
	if _, err := LoadOrCreateSigner(path, "other"); err == nil || !strings.Contains(err.Error(), "other") {
		t.Errorf("foreign origin: %v", err)
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadOrCreateSigner(path, origin); err == nil || !strings.Contains(err.Error(), "0644") {
		t.Errorf("open mode: %v", err)
	}
}

func get(t *testing.T, dir, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func put(t *testing.T, dir, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func cut(t *testing.T, dir, name string) {
	t.Helper()
	data := get(t, dir, name)
	put(t, dir, name, data[:len(data)-1])
}

func flip(data []byte, at int) []byte {
	out := bytes.Clone(data)
	out[at] ^= 1
	return out
}

func untar(t *testing.T, r io.Reader) fstest.MapFS {
	t.Helper()
	out := fstest.MapFS{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(tr)
		if err != nil || !fs.ValidPath(h.Name) {
			t.Fatal(h.Name, err)
		}
		out[h.Name] = &fstest.MapFile{Data: data}
	}
}
