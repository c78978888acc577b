package unpack

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"hauberk.dev/image"
)

// layout is a directory in the OCI image layout.
type layout string

func (l layout) put(t *testing.T, b []byte) map[string]any {
	t.Helper()
	sum := sha256.Sum256(b)
	name := hex.EncodeToString(sum[:])
	if err := os.WriteFile(filepath.Join(string(l), "blobs/sha256", name), b, 0o644); err != nil {
		t.Fatal(err)
	}
	return map[string]any{"digest": "sha256:" + name, "size": len(b)}
}

func encode(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// write writes an image of layers, every other one compressed, under the tag
// "it", and returns the digest of its manifest.
func write(t *testing.T, layers [][]byte) (layout, string) {
	t.Helper()
	l := layout(t.TempDir())
	if err := os.MkdirAll(filepath.Join(string(l), "blobs/sha256"), 0o755); err != nil {
		t.Fatal(err)
	}
	var descriptors []map[string]any
	var diffs []string
	for i, raw := range layers {
		sum := sha256.Sum256(raw)
		diffs = append(diffs, "sha256:"+hex.EncodeToString(sum[:]))
		kind := "application/vnd.oci.image.layer.v1.tar"
		if i%2 == 0 {
			raw, kind = zip(raw), kind+"+gzip"
		}
		d := l.put(t, raw)
		d["mediaType"] = kind
		descriptors = append(descriptors, d)
	}
	config := l.put(t, encode(t, map[string]any{"os": "linux", "architecture": runtime.GOARCH, "config": map[string]any{"Cmd": []string{"/x"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffs}}))
	config["mediaType"] = "application/vnd.oci.image.config.v1+json"
	manifest := l.put(t, encode(t, map[string]any{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": descriptors}))
	digest := manifest["digest"].(string)
	manifest["mediaType"] = "application/vnd.oci.image.manifest.v1+json"
	manifest["annotations"] = map[string]string{"org.opencontainers.image.ref.name": "it"}
	for name, b := range map[string][]byte{
		"oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`),
		"index.json": encode(t, map[string]any{"schemaVersion": 2, "manifests": []any{manifest}}),
	} {
		if err := os.WriteFile(filepath.Join(string(l), name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return l, digest
}

func zip(raw []byte) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	w.Write(raw)
	w.Close()
	return b.Bytes()
}

// TestTrees compares, file by file, the tree that a machine will mount with
// umoci's.
func TestTrees(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting, and giving files to others, needs root")
	}
	if _, err := exec.LookPath("umoci"); err != nil {
		t.Fatalf("umoci is not here to compare with (apt-get install umoci): %v", err)
	}
	all := samples()
	if len(all) < 20 {
		t.Fatalf("only %d images", len(all))
	}
	for _, s := range all {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			var layers [][]byte
			for _, make := range s.layers {
				layers = append(layers, make(t))
			}
			l, digest := write(t, layers)
			img, err := image.Pull(t.Context(), image.Layout(l), digest, t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			if saved := pullSaved(t, layers); saved != img.ErofsSHA256 {
				t.Errorf("what docker save would write of it has digest %s, not %s", saved, img.ErofsSHA256)
			}
			other := umoci
			if s.plain {
				other = untar
			}
			same(t, list(t, mount(t, img.Path), s.implied), list(t, other(t, l, layers), s.implied))
		})
	}
}

// pullSaved pulls the image from an archive in docker's format.
func pullSaved(t *testing.T, layers [][]byte) string {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(name string, content []byte) {
		if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(content))}); err != nil {
			t.Fatal(err)
		}
		w.Write(content)
	}
	var names, diffs []string
	for i, raw := range layers {
		names, diffs = append(names, fmt.Sprintf("%d/layer.tar", i)), append(diffs, fmt.Sprintf("sha256:%x", sha256.Sum256(raw)))
		add(names[i], raw)
	}
	add("config.json", encode(t, map[string]any{"os": "linux", "architecture": runtime.GOARCH, "rootfs": map[string]any{"type": "layers", "diff_ids": diffs}}))
	add("manifest.json", encode(t, []any{map[string]any{"Config": "config.json", "RepoTags": []string{"it:1"}, "Layers": names}}))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "saved.tar")
	if err := os.WriteFile(name, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	ref, err := image.ParseReference("docker-archive:" + name)
	if err != nil {
		t.Fatal(err)
	}
	src, err := ref.Open(t.Context(), image.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	img, err := image.Pull(t.Context(), src.Blobs, src.Digest, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return img.ErofsSHA256
}

func umoci(t *testing.T, l layout, _ [][]byte) string {
	t.Helper()
	bundle := filepath.Join(t.TempDir(), "bundle")
	if out, err := exec.Command("umoci", "unpack", "--image", string(l)+":it", bundle).CombinedOutput(); err != nil {
		t.Fatalf("umoci: %v: %s", err, out)
	}
	return filepath.Join(bundle, "rootfs")
}

func untar(t *testing.T, _ layout, layers [][]byte) string {
	t.Helper()
	at := t.TempDir()
	c := exec.Command("tar", "--numeric-owner", "--same-owner", "-p", "-C", at, "-x")
	c.Stdin = bytes.NewReader(layers[0])
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("tar: %v: %s", err, out)
	}
	return at
}

func mount(t *testing.T, path string) string {
	t.Helper()
	at := t.TempDir()
	if out, err := exec.Command("mount", "-t", "erofs", "-o", "loop,ro", path, at).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Error(err)
		}
	})
	return at
}

// list describes everything below a directory, one line a file. Hard links are
// told by the first name of their inode; the root has only what a layer says.
func list(t *testing.T, root string, implied bool) (out []string) {
	t.Helper()
	first := map[uint64]string{}
	err := filepath.WalkDir(root, func(p string, _ fs.DirEntry, err error) error {
		if err != nil || p == root {
			return err
		}
		line, err := describe(p, strings.TrimPrefix(p, root), first, implied)
		out = append(out, line)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func describe(p, rel string, first map[uint64]string, implied bool) (string, error) {
	var st unix.Stat_t
	if err := unix.Lstat(p, &st); err != nil {
		return "", err
	}
	line := fmt.Sprintf("%q mode=%o owner=%d:%d rdev=%d", rel, st.Mode, st.Uid, st.Gid, st.Rdev)
	kind := st.Mode & unix.S_IFMT
	if kind != unix.S_IFDIR {
		if _, ok := first[st.Ino]; !ok {
			first[st.Ino] = rel
		}
		line += fmt.Sprintf(" nlink=%d size=%d same=%q", st.Nlink, st.Size, first[st.Ino])
	}
	if kind != unix.S_IFDIR || !implied {
		line += fmt.Sprintf(" mtime=%d.%d", st.Mtim.Sec, st.Mtim.Nsec)
	}
	switch kind {
	case unix.S_IFREG:
		raw, err := os.ReadFile(p)
		if err != nil {
			return "", err
		}
		line += fmt.Sprintf(" sha256=%x", sha256.Sum256(raw))
	case unix.S_IFLNK:
		to, err := os.Readlink(p)
		if err != nil {
			return "", err
		}
		line += fmt.Sprintf(" -> %q", to)
	}
	names, err := attributesOf(p)
	if err != nil {
		return "", err
	}
	for _, name := range names {
		buf := make([]byte, 1<<16)
		n, err := unix.Lgetxattr(p, name, buf)
		if err != nil {
			return "", fmt.Errorf("%s %s: %w", p, name, err)
		}
		line += fmt.Sprintf(" %s=%x", name, buf[:n])
	}
	return line, nil
}

func attributesOf(p string) (names []string, err error) {
	buf := make([]byte, 1<<16)
	n, err := unix.Llistxattr(p, buf)
	if err != nil {
		return nil, err
	}
	for name := range strings.SplitSeq(string(buf[:n]), "\x00") {
		if name != "" {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}

func same(t *testing.T, got, want []string) {
	t.Helper()
	if len(want) == 0 {
		t.Fatal("umoci unpacked nothing")
	}
	wrong := 0
	for i := range max(len(got), len(want)) {
		g, w := "(nothing)", "(nothing)"
		if i < len(got) {
			g = got[i]
		}
		if i < len(want) {
			w = want[i]
		}
		if g != w {
			if wrong++; wrong > 5 {
				return
			}
			t.Errorf("entry %d:\n  ours %.300s\n umoci %.300s", i, g, w)
		}
	}
}
