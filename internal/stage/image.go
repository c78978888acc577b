package stage

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
)

// Busybox is the program that images are made of: Debian's, which is static.
const Busybox = "/bin/busybox"

// archive writes a tar archive until the first fault.
type archive struct {
	*tar.Writer
	buf bytes.Buffer
	err error
}

func newArchive() *archive {
	a := &archive{}
	a.Writer = tar.NewWriter(&a.buf)
	return a
}

func (a *archive) put(h tar.Header, data []byte) {
	h.Size = int64(len(data))
	if a.err == nil {
		a.err = a.WriteHeader(&h)
	}
	if a.err == nil {
		_, a.err = a.Write(data)
	}
}

// text is a value as JSON.
func (a *archive) text(v any) []byte {
	raw, err := json.Marshal(v)
	a.err = errors.Join(a.err, err)
	return raw
}

func (a *archive) bytes() ([]byte, error) {
	err := errors.Join(a.err, a.Close())
	return a.buf.Bytes(), err
}

// Layer is a root file system with busybox under all its names, the users root
// and app, and more programs: names in the layer, and files here.
func Layer(more map[string]string) ([]byte, error) {
	words, err := exec.Command(Busybox, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("make layer: %s --list: %w", Busybox, err)
	}
	a := newArchive()
	for _, dir := range strings.Fields("bin etc root proc sys dev work") {
		a.put(tar.Header{Name: dir + "/", Typeflag: tar.TypeDir, Mode: 0o755}, nil)
	}
	a.put(tar.Header{Name: "tmp/", Typeflag: tar.TypeDir, Mode: 0o1777}, nil)
	for name, from := range more {
		a.program(name, from)
	}
	a.program("bin/busybox", Busybox)
	for word := range strings.FieldsSeq(string(words)) {
		if word != "busybox" {
			a.put(tar.Header{Name: "bin/" + word, Typeflag: tar.TypeSymlink, Linkname: "busybox", Mode: 0o777}, nil)
		}
	}
	a.put(tar.Header{Name: "etc/passwd", Mode: 0o644}, []byte("root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/home:/bin/sh\n"))
	a.put(tar.Header{Name: "etc/group", Mode: 0o644}, []byte("root:x:0:\napp:x:1001:\n"))
	raw, err := a.bytes()
	if err != nil {
		return nil, fmt.Errorf("make layer: %w", err)
	}
	return raw, nil
}

func (a *archive) program(name, from string) {
	f, err := os.Open(from)
	if err != nil {
		a.err = errors.Join(a.err, err)
		return
	}
	defer f.Close()
	raw, err := io.ReadAll(f)
	a.err = errors.Join(a.err, err)
	a.put(tar.Header{Name: name, Mode: 0o755}, raw)
}

type object = map[string]any

// config of an image with one layer, which has its digest.
func config(layer []byte, env ...string) object {
	return object{
		"architecture": runtime.GOARCH, "os": "linux",
		"config": object{"Cmd": []string{"sh"}, "Env": append([]string{"PATH=/bin"}, env...)},
		"rootfs": object{"type": "layers", "diff_ids": []string{digest(layer)}},
	}
}

func digest(b []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(b)) }

// DockerArchive writes an image of one layer as docker save would, under a tag.
func DockerArchive(path, tag string, layer []byte, env ...string) error {
	a := newArchive()
	a.put(tar.Header{Name: "c.json", Mode: 0o644}, a.text(config(layer, env...)))
	a.put(tar.Header{Name: "l.tar", Mode: 0o644}, layer)
	a.put(tar.Header{Name: "manifest.json", Mode: 0o644}, a.text([]object{{"Config": "c.json", "RepoTags": []string{tag}, "Layers": []string{"l.tar"}}}))
	return a.writeTo(path)
}

// Layout writes an image of one layer as an archived OCI layout, under a name.
func Layout(path, name string, layer []byte) error {
	a := newArchive()
	blob := func(kind string, data []byte) object {
		a.put(tar.Header{Name: "blobs/" + strings.Replace(digest(data), ":", "/", 1), Mode: 0o644}, data)
		return object{"mediaType": "application/vnd.oci.image." + kind, "digest": digest(data), "size": len(data)}
	}
	l := blob("layer.v1.tar", layer)
	c := blob("config.v1+json", a.text(config(layer)))
	m := blob("manifest.v1+json", a.text(object{"schemaVersion": 2, "config": c, "layers": []any{l}}))
	m["annotations"] = object{"io.containerd.image.name": name}
	a.put(tar.Header{Name: "index.json", Mode: 0o644}, a.text(object{"schemaVersion": 2, "manifests": []any{m}}))
	a.put(tar.Header{Name: "oci-layout", Mode: 0o644}, []byte(`{"imageLayoutVersion":"1.0.0"}`))
	return a.writeTo(path)
}

func (a *archive) writeTo(path string) error {
	raw, err := a.bytes()
	if err == nil {
		err = os.WriteFile(path, raw, 0o600)
	}
	if err != nil {
		return fmt.Errorf("write image: %w", err)
	}
	return nil
}
