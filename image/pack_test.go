package image

import (
	"archive/tar"
	"bytes"
	"os"
	"strings"
	"testing"
)

func TestPack(t *testing.T) {
	raw := archive(t,
		tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755},
		tar.Header{Name: "./bin/", Typeflag: tar.TypeDir, Mode: 0o755},
		tar.Header{Name: "./bin/true", Mode: 0o4755, Uname: strings.Repeat("true", 2500)},
		tar.Header{Name: "./bin/yes", Typeflag: tar.TypeLink, Linkname: "./bin/true"},
		tar.Header{Name: "./sbin", Typeflag: tar.TypeSymlink, Linkname: "bin"},
	)
	dir := t.TempDir()
	first, err := Pack(t.Context(), bytes.NewReader(raw), dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := Verify(first.Path, first.ErofsSHA256); err != nil {
		t.Error(err)
	}
	fsck(t, first.Path)
	before, err := os.Stat(first.Path)
	if err != nil {
		t.Fatal(err)
	}
	again, err := Pack(t.Context(), bytes.NewReader(raw), dir)
	if err != nil || again.Path != first.Path {
		t.Errorf("again: %q, %v, want %q", again.Path, err, first.Path)
	}
	if after, err := os.Stat(first.Path); err != nil || !os.SameFile(before, after) {
		t.Errorf("the same content was written anew: %v", err)
	}
	if err := os.Remove(first.Path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(first.Path, []byte("broken"), 0o400); err != nil {
		t.Fatal(err)
	}
	if _, err := Pack(t.Context(), bytes.NewReader(raw), dir); err != nil || Verify(first.Path, first.ErofsSHA256) != nil {
		t.Errorf("a broken file was not mended: %v", err)
	}
	nothingElse(t, dir)
}

// nothingElse checks that a cache holds one image and its lock.
func nothingElse(t *testing.T, dir string) {
	t.Helper()
	names, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range names {
		if e.Name() != ".lock" && !strings.HasSuffix(e.Name(), ".erofs") {
			t.Errorf("%s was left", e.Name())
		}
	}
}

func TestPackRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		header tar.Header
		want   string
	}{
		"device":  {tar.Header{Name: "dev/sda", Typeflag: tar.TypeBlock}, "it is a device"},
		"climbs":  {tar.Header{Name: "../etc", Typeflag: tar.TypeDir}, "climbs"},
		"overlay": {tar.Header{Name: "d", Typeflag: tar.TypeDir, PAXRecords: map[string]string{"SCHILY.xattr.trusted.overlay.opaque": "y"}}, "would steer the guest's overlay"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			_, err := Pack(t.Context(), bytes.NewReader(archive(t, c.header)), dir)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			nothingElse(t, dir)
		})
	}
}
