package image

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"testing"
)

func TestIndexFindsPrograms(t *testing.T) {
	s := store{}
	digest := s.image(t,
		archive(t, tar.Header{Name: "usr/bin/busybox", Uname: "ELF"}, tar.Header{Name: "bin", Typeflag: tar.TypeSymlink, Linkname: "usr/bin"},
			tar.Header{Name: "usr/bin/sh", Typeflag: tar.TypeSymlink, Linkname: "/usr/bin/busybox"},
			tar.Header{Name: "usr/bin/up", Typeflag: tar.TypeSymlink, Linkname: "../../../../usr/bin/busybox"},
			tar.Header{Name: "loop", Typeflag: tar.TypeSymlink, Linkname: "/loop"},
			tar.Header{Name: "gone", Uname: "x"}, tar.Header{Name: "etc/conf", Uname: "c", Mode: 0o644}),
		archive(t, tar.Header{Name: "app", Uname: "#! /bin/sh -e\nexit\n"}, tar.Header{Name: ".wh.gone"}))
	dir := t.TempDir()
	x, err := ReadIndex(t.Context(), s, digest, dir)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256([]byte("ELF"))
	busybox := Program{Path: "/usr/bin/busybox", SHA256: hex.EncodeToString(sum[:])}
	for _, name := range []string{"/usr/bin/busybox", "/bin/sh", "//bin/./up", "/usr/../bin/busybox", "/../bin/sh"} {
		if p, ok := x.Program(name); !ok || p != busybox {
			t.Errorf("%s: %+v %v", name, p, ok)
		}
	}
	if p, ok := x.Program("/app"); !ok || p.Interpreter != "/bin/sh" || p.Path != "/app" {
		t.Errorf("/app: %+v %v", p, ok)
	}
	for _, name := range []string{"/gone", "/loop", "/nowhere", "/etc/conf", "/usr", "/app/x", ""} {
		if p, ok := x.Program(name); ok {
			t.Errorf("%q is a program: %+v", name, p)
		}
	}
	if real, ok := x.Real("/bin/../etc/conf"); ok || real != "" {
		// /bin is /usr/bin, so its parent has no etc.
		t.Errorf("climbed to %q", real)
	}
	if real, ok := x.Real("/etc/conf"); !ok || real != "/etc/conf" {
		t.Errorf("%q %v", real, ok)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
	if x.Config.Entrypoint[0] != "/bin/app" {
		t.Errorf("%+v", x.Config)
	}
}

func TestIndexRefuses(t *testing.T) {
	s := store{}
	digest := s.image(t, archive(t, tar.Header{Name: "../up", Uname: "x"}))
	if _, err := ReadIndex(t.Context(), s, digest, t.TempDir()); err == nil {
		t.Error("a name that climbs was taken")
	}
}
