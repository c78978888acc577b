package image

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
)

func sum(data string) string {
	s := sha256.Sum256([]byte(data))
	return hex.EncodeToString(s[:])
}

// What a file holds names it, wherever it lies and however it is stored.
func TestFilesWith(t *testing.T) {
	dir := t.TempDir()
	large, small, odd := strings.Repeat("large", 40000), "small", "odd name"
	var raw bytes.Buffer
	w := tar.NewWriter(&raw)
	put := func(name, data string, h tar.Header) {
		h.Name, h.Size, h.Mode = name, int64(len(data)), 0o755
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(data)); err != nil {
			t.Fatal(err)
		}
	}
	put("bin/large", large, tar.Header{Typeflag: tar.TypeReg})
	put("bin/small", small, tar.Header{Typeflag: tar.TypeReg, PAXRecords: map[string]string{"SCHILY.xattr.user.x": "y"}})
	put("opt/deep/er/again", small, tar.Header{Typeflag: tar.TypeReg})
	put("opt/link", "", tar.Header{Typeflag: tar.TypeLink, Linkname: "bin/large"})
	put("opt/symlink", "", tar.Header{Typeflag: tar.TypeSymlink, Linkname: "/bin/large"})
	put("opt/odd\nname \"x\"", odd, tar.Header{Typeflag: tar.TypeReg})
	for i := range 600 { // a directory of several blocks
		put("many/"+strings.Repeat("n", 40)+string(rune('a'+i%26))+strings.Repeat("i", i/26+1), "", tar.Header{Typeflag: tar.TypeReg})
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	img, err := Pack(t.Context(), &raw, dir)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // digested, and then read again
		found, err := FilesWith(t.Context(), img.Path, []string{sum(large), sum(small), sum(odd), sum("absent"), sum("")})
		if err != nil {
			t.Fatal(err)
		}
		for digest, want := range map[string][]string{
			sum(large): {"/bin/large", "/opt/link"}, sum(small): {"/bin/small", "/opt/deep/er/again"}, sum(odd): {"/opt/odd\nname \"x\""}, sum("absent"): nil,
		} {
			got := found[digest]
			slices.Sort(got)
			if !slices.Equal(got, want) {
				t.Errorf("%s: %q, want %q", digest[:8], got, want)
			}
		}
		if len(found[sum("")]) != 600 {
			t.Errorf("%d empty files, want 600", len(found[sum("")]))
		}
	}
	if err := Prune(t.Context(), dir, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(indexOf(img.Path)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the digests of a pruned image: %v, want none", err)
	}
}

func FuzzReadImage(f *testing.F) {
	spool, err := newSpool(f.TempDir())
	if err != nil {
		f.Fatal(err)
	}
	defer spool.Close()
	m := newMerger(spool, standard)
	if err := m.read(tar.NewReader(bytes.NewReader(archive(f, tar.Header{Name: "a/b", Typeflag: tar.TypeReg, Mode: 0o644}, tar.Header{Name: "c", Typeflag: tar.TypeDir})))); err != nil {
		f.Fatal(err)
	}
	p, err := layOut(m.tree.root.file, [16]byte{})
	if err != nil {
		f.Fatal(err)
	}
	var out bytes.Buffer
	if err := p.write(&out, spool); err != nil {
		f.Fatal(err)
	}
	f.Add(out.Bytes())
	f.Add(make([]byte, 2*blockSize))
	f.Fuzz(func(t *testing.T, raw []byte) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		r := reader{ctx: ctx, f: bytes.NewReader(raw)}
		seen := 0
		err := r.walk(func(p string, _ uint64, _ stored) error {
			if seen++; seen > 1<<12 { // one may name itself a thousand times
				cancel()
			}
			if !strings.HasPrefix(p, "/") || strings.Contains(p, "/../") {
				t.Errorf("path %q", p)
			}
			return nil
		})
		if err == nil && seen > len(raw) {
			t.Errorf("%d files in %d bytes", seen, len(raw))
		}
	})
}
