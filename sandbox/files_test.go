package sandbox

import (
	"archive/tar"
	"bytes"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// tarOf makes a stream as a guest could.
func tarOf(t testing.TB, list ...tar.Header) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range list {
		body := h.Uname
		h.Uname = ""
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(body))
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, body)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

func TestUnpack(t *testing.T) {
	dir := t.TempDir()
	root, err := os.OpenRoot(dir)
	must(t, err)
	defer root.Close()
	stream := tarOf(t,
		tar.Header{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o4755},
		tar.Header{Name: "etc/a", Typeflag: tar.TypeReg, Mode: 0o6755, Uname: "content"},
		tar.Header{Name: "etc/b", Typeflag: tar.TypeSymlink, Linkname: "a"},
		tar.Header{Name: "etc/c", Typeflag: tar.TypeLink, Linkname: "etc/a"})
	raw := stream.Bytes()
	for range 2 { // over what is there
		must(t, unpack(tar.NewReader(bytes.NewReader(raw)), root, "new"))
	}
	for _, name := range []string{"new/a", "new/b", "new/c"} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != "content" {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	if st, err := os.Stat(filepath.Join(dir, "new/a")); err != nil || st.Mode() != 0o755 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
}

// TestUnpackStaysInside has a guest that wants to write elsewhere.
func TestUnpackStaysInside(t *testing.T) {
	for name, list := range map[string][]tar.Header{
		"through a link": {{Name: "x/", Typeflag: tar.TypeDir, Mode: 0o755}, {Name: "x/out", Typeflag: tar.TypeSymlink, Linkname: "../.."}, {Name: "x/out/evil", Typeflag: tar.TypeReg, Uname: "x"}},
		"a link away":    {{Name: "x", Typeflag: tar.TypeSymlink, Linkname: "/"}, {Name: "x/evil", Typeflag: tar.TypeReg, Uname: "x"}},
		"dots":           {{Name: "x/../../evil", Typeflag: tar.TypeReg, Uname: "x"}},
		"a device":       {{Name: "x", Typeflag: tar.TypeChar}},
		"a hard link":    {{Name: "x", Typeflag: tar.TypeLink, Linkname: "x/../../secret"}},
		"nothing":        {},
	} {
		t.Run(name, func(t *testing.T) {
			top := t.TempDir()
			dir := filepath.Join(top, "in")
			must(t, os.Mkdir(dir, 0o700))
			must(t, os.WriteFile(filepath.Join(top, "secret"), nil, 0o600))
			root, err := os.OpenRoot(dir)
			must(t, err)
			defer root.Close()
			err = unpack(tar.NewReader(tarOf(t, list...)), root, "x")
			if err == nil && name != "dots" {
				t.Error("it was taken")
			}
			filepath.WalkDir(top, func(p string, d fs.DirEntry, _ error) error {
				if strings.HasPrefix(d.Name(), "evil") && !strings.HasPrefix(p, dir+"/") {
					t.Errorf("%s was written", p)
				}
				return nil
			})
			if _, err := os.Lstat("/evil"); err == nil {
				t.Error("/evil was written")
			}
		})
	}
}

func TestPack(t *testing.T) {
	dir := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(dir, "d/e"), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "d/e/f"), []byte("body"), 0o640))
	must(t, os.Symlink("e/f", filepath.Join(dir, "d/l")))
	for name, want := range map[string]string{"new": "new/ new/e/ new/e/f new/l", ".": "e/ e/f l"} {
		var b bytes.Buffer
		must(t, pack(filepath.Join(dir, "d"), name, &b))
		var got []string
		for r := tar.NewReader(&b); ; {
			h, err := r.Next()
			if err == io.EOF {
				break
			}
			must(t, err)
			got = append(got, h.Name)
			if h.Uid != 0 || h.Name == "new/e/f" && h.Mode != 0o640 {
				t.Errorf("%+v", h)
			}
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	if err := pack("/dev/null", "x", io.Discard); err == nil {
		t.Error("a device was packed")
	}
}

func FuzzUnpack(f *testing.F) {
	f.Add(tarOf(f, tar.Header{Name: "a/", Typeflag: tar.TypeDir}, tar.Header{Name: "a/b", Typeflag: tar.TypeReg, Uname: "x"}).Bytes())
	f.Add(tarOf(f, tar.Header{Name: "a", Typeflag: tar.TypeSymlink, Linkname: ".."}, tar.Header{Name: "a/b", Typeflag: tar.TypeReg, Uname: "x"}).Bytes())
	f.Fuzz(func(t *testing.T, raw []byte) {
		top := t.TempDir()
		dir := filepath.Join(top, "in")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		root, err := os.OpenRoot(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		_ = unpack(tar.NewReader(bytes.NewReader(raw)), root, "x")
		if left, err := os.ReadDir(top); err != nil || len(left) != 1 {
			t.Errorf("outside are %v, %v", left, err)
		}
	})
}
