package shim

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/containerd/containerd/api/types"

	"hauberk.dev/image"
)

// waitFor asks until it is so, for at most ten seconds.
func waitFor(t *testing.T, so func() bool) {
	t.Helper()
	for range 1000 {
		if so() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("it never came")
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounting needs root")
	}
}

// layer writes files below a new directory; names that end in / are
// directories.
func layer(t *testing.T, dir string, files map[string]string) string {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		p := filepath.Join(dir, name)
		err := os.MkdirAll(filepath.Dir(p), 0o755)
		if err == nil && !strings.HasSuffix(name, "/") {
			err = os.WriteFile(p, []byte(text), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func overlay(dirs ...string) []*types.Mount {
	return []*types.Mount{{Type: "overlay", Source: "overlay", Options: []string{
		"index=off", "workdir=/none", "upperdir=" + dirs[0], "lowerdir=" + strings.Join(dirs[1:], ":")}}}
}

// TestArchiveOverlay merges layers with a whiteout, hard links, attributes and
// what a writable layer brought, and leaves nothing mounted.
func TestArchiveOverlay(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	low := layer(t, filepath.Join(dir, "1"), map[string]string{"etc/a": "old", "etc/gone": "x", "bin/b": "program"})
	high := layer(t, filepath.Join(dir, "2"), map[string]string{"etc/a": "new"})
	upper := layer(t, filepath.Join(dir, "3"), map[string]string{"data/c": "written"})
	for _, err := range []error{
		unix.Mknod(filepath.Join(high, "etc/gone"), unix.S_IFCHR, 0), // a whiteout
		os.Link(filepath.Join(low, "bin/b"), filepath.Join(low, "bin/c")),
		os.Symlink("../../../etc/shadow", filepath.Join(low, "bin/d")),
		os.Chown(filepath.Join(low, "bin/b"), 1000, 1001),
		unix.Lsetxattr(filepath.Join(low, "bin/b"), "security.capability", []byte("\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	r, err := rootOf(overlay(upper, high, low), "")
	if err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	got := contents(t, r)
	want := []string{". dir", "bin dir", "bin/b file 1000:1001 program security.capability", "bin/c link bin/b", "bin/d symlink ../../../etc/shadow",
		"data dir", "data/c file 0:0 written", "etc dir", "etc/a file 0:0 new"}
	if !slices.Equal(got, want) {
		t.Errorf("archive holds %q, want %q", got, want)
	}
	if after, err := os.ReadFile("/proc/self/mountinfo"); err != nil || !bytes.Equal(before, after) {
		t.Errorf("mounts changed: %v", err)
	}
	img, err := r.pack(t.Context(), filepath.Join(dir, "images"))
	if err != nil || image.Verify(img.Path, img.ErofsSHA256) != nil {
		t.Errorf("%+v, %v", img, err)
	}
}

// contents lists what is in a root's archive.
func contents(t *testing.T, r root) (out []string) {
	t.Helper()
	var b bytes.Buffer
	var err error
	onOwnThread(func() { err = r.archive(t.Context(), &b) })
	if err != nil {
		t.Fatal(err)
	}
	for tr := tar.NewReader(&b); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		line := strings.TrimSuffix(h.Name, "/")
		switch h.Typeflag {
		case tar.TypeDir:
			line += " dir"
		case tar.TypeLink:
			line += " link " + h.Linkname
		case tar.TypeSymlink:
			line += " symlink " + h.Linkname
		default:
			text, err := io.ReadAll(tr)
			if err != nil {
				t.Fatal(err)
			}
			line += " file " + strings.Join([]string{strconv.Itoa(h.Uid) + ":" + strconv.Itoa(h.Gid), string(text)}, " ")
		}
		for key := range h.PAXRecords {
			if name, ok := strings.CutPrefix(key, "SCHILY.xattr."); ok {
				line += " " + name
			}
		}
		out = append(out, line)
	}
}

// TestManyLayers: their names together are longer than a mount's options.
func TestManyLayers(t *testing.T) {
	needRoot(t)
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 100))
	var dirs []string
	for i := range 60 {
		dirs = append(dirs, layer(t, filepath.Join(dir, strconv.Itoa(i), "fs"), map[string]string{"f" + strconv.Itoa(i): ""}))
	}
	r, err := rootOf(overlay(append([]string{layer(t, filepath.Join(dir, "upper"), nil)}, dirs...)...), "")
	if err != nil {
		t.Fatal(err)
	}
	if len(strings.Join(r.layers, ":")) < 4096 {
		t.Fatal("the test is too small")
	}
	if got := contents(t, r); len(got) != 61 {
		t.Errorf("%d files: %q", len(got), got)
	}
}

// TestLayersAreRemembered: the same layers are packed once; others, changed
// ones, and an image that was harmed, anew.
func TestLayersAreRemembered(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	images := filepath.Join(dir, "images")
	low := layer(t, filepath.Join(dir, "1"), map[string]string{"bin/sh": "a"})
	upper := layer(t, filepath.Join(dir, "upper"), nil)
	pack := func() image.Image {
		t.Helper()
		r, err := rootOf(overlay(upper, low), "")
		if err != nil {
			t.Fatal(err)
		}
		img, err := r.pack(t.Context(), images)
		if err != nil {
			t.Fatal(err)
		}
		return img
	}
	first := pack()
	record, err := filepath.Glob(filepath.Join(images, "layers-*.json"))
	if err != nil || len(record) != 1 {
		t.Fatalf("%q, %v", record, err)
	}
	// A file deep in a layer does not change its directory's identity: this
	// is seen only if the record is used.
	if err := os.WriteFile(filepath.Join(low, "bin/sh"), []byte("b"), 0o644); err != nil {
		t.Fatal(err)
	}
	if again := pack(); again.ErofsSHA256 != first.ErofsSHA256 {
		t.Error("a layer known by its identity was read again")
	}
	if err := os.WriteFile(record[0], []byte(`{"version": 1}`), 0o600); err != nil {
		t.Fatal(err)
	}
	other := pack()
	if other.ErofsSHA256 == first.ErofsSHA256 {
		t.Error("a record of nothing was believed")
	}
	if err := os.Remove(other.Path); err != nil {
		t.Fatal(err)
	}
	if mended := pack(); mended.Path != other.Path || image.Verify(other.Path, other.ErofsSHA256) != nil {
		t.Error("an image that is gone was not made again")
	}
	// The same name, another directory.
	if err := os.RemoveAll(low); err != nil {
		t.Fatal(err)
	}
	layer(t, low, map[string]string{"bin/sh": "c"})
	if now := pack(); now.ErofsSHA256 == other.ErofsSHA256 {
		t.Error("another directory of the same name was taken for the first")
	}
}

func TestRootOfRefuses(t *testing.T) {
	empty := t.TempDir()
	for want, mounts := range map[string][]*types.Mount{
		"2 mounts":            {{Type: "bind", Source: "/a"}, {Type: "bind", Source: "/b"}},
		`type "erofs"`:        {{Type: "erofs", Source: "/a"}},
		`target "/x"`:         {{Type: "bind", Source: "/a", Target: "/x"}},
		`"nfs_export=on"`:     {{Type: "overlay", Options: []string{"lowerdir=/a", "nfs_export=on"}}},
		`"metacopy=on"`:       {{Type: "overlay", Options: []string{"lowerdir=/a", "metacopy=on"}}},
		"0 layers":            {{Type: "overlay", Options: []string{"upperdir=" + empty}}},
		`path "a"`:            {{Type: "overlay", Options: []string{"lowerdir=a"}}},
		`path "/a,b"`:         {{Type: "overlay", Options: []string{"lowerdir=/a,b"}}},
		"no such file":        {{Type: "overlay", Options: []string{"lowerdir=/a", "upperdir=/no/such"}}},
		`path "relative/dir"`: {{Type: "bind", Source: "relative/dir"}},
	} {
		if r, err := rootOf(mounts, ""); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %+v, %v, want %q", mounts, r, err, want)
		}
	}
}
