package layout

import (
	"archive/tar"
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
)

func good() fstest.MapFS {
	return fstest.MapFS{
		"oci-layout":               {Data: []byte("{}")},
		"index.json":               {Data: []byte("[]")},
		"blobs/sha256/aa":          {Data: []byte("layer")},
		"evidence/provenance.json": {Data: []byte("signed")},
	}
}

func TestPackAndUnpack(t *testing.T) {
	var one, two bytes.Buffer
	if err := Pack(&one, good()); err != nil {
		t.Fatal(err)
	}
	if err := Pack(&two, good()); err != nil || !bytes.Equal(one.Bytes(), two.Bytes()) {
		t.Errorf("the same layout packs differently, %v", err)
	}
	dir := t.TempDir()
	if err := Unpack(&one, dir); err != nil {
		t.Fatal(err)
	}
	for name, f := range good() {
		if got, err := fs.ReadFile(os.DirFS(dir), name); err != nil || !bytes.Equal(got, f.Data) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

func TestPackRefuses(t *testing.T) {
	for want, spoil := range map[string]func(fstest.MapFS){
		"build it with hauberk build": func(m fstest.MapFS) { delete(m, "oci-layout") },
		"index.json":                  func(m fstest.MapFS) { delete(m, "index.json") },
		"evidence/link is a L": func(m fstest.MapFS) {
			m["evidence/link"] = &fstest.MapFile{Mode: fs.ModeSymlink, Data: []byte("/etc/shadow")}
		},
		"evidence/pipe is a p": func(m fstest.MapFS) { m["evidence/pipe"] = &fstest.MapFile{Mode: fs.ModeNamedPipe} },
	} {
		m := good()
		spoil(m)
		if err := Pack(&bytes.Buffer{}, m); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error is %v", want, err)
		}
	}
}

func archive(t testing.TB, headers ...tar.Header) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			w.Write(make([]byte, h.Size))
		}
	}
	w.Close()
	return b.Bytes()
}

func TestUnpackRefuses(t *testing.T) {
	for name, h := range map[string][]tar.Header{
		"up":       {{Name: "../out", Typeflag: tar.TypeReg}},
		"absolute": {{Name: "/out", Typeflag: tar.TypeReg}},
		"symlink":  {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "/"}},
		"device":   {{Name: "d", Typeflag: tar.TypeChar}},
		"twice":    {{Name: "a", Typeflag: tar.TypeReg}, {Name: "./a", Typeflag: tar.TypeReg}},
		"through":  {{Name: "a", Typeflag: tar.TypeReg}, {Name: "a/b", Typeflag: tar.TypeReg}},
	} {
		dir := filepath.Join(t.TempDir(), "in")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := Unpack(bytes.NewReader(archive(t, h...)), dir); err == nil {
			t.Errorf("%s: unpacked", name)
		}
		if left, _ := os.ReadDir(filepath.Dir(dir)); len(left) != 1 {
			t.Errorf("%s: files outside: %v", name, left)
		}
	}
}

func FuzzUnpack(f *testing.F) {
	var b bytes.Buffer
	if err := Pack(&b, good()); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Add(archive(f, tar.Header{Name: "../../x", Typeflag: tar.TypeReg, Size: 3}))
	f.Add([]byte("no tar"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		parent := t.TempDir()
		dir := filepath.Join(parent, "in")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		_ = Unpack(bytes.NewReader(raw), dir)
		if left, err := os.ReadDir(parent); err != nil || len(left) != 1 {
			t.Errorf("files outside: %v, %v", left, err)
		}
	})
}
