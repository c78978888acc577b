package cri

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"hauberk.dev/registry"
)

// sandboxImage is the image of pods of runtimes that need one. It is none of those
// that the suite pulls and removes.
const sandboxImage = "registry.k8s.io/pause:3.10.2"

// Busybox is the suite's image for everything.
const Busybox = "registry.k8s.io/e2e-test-images/busybox:1.29-2"

// staging is where the suite's own images are.
const staging = "k8s-staging-cri-tools/"

// hosts are the registries whose images are made here.
var hosts = []string{"registry.k8s.io", "k8s.gcr.io", "gcr.io"}

// makeImages makes every image that the suite asks for, equal in what the suite
// sees of them, and puts them into a registry's content. It returns the digest
// of the one image that the suite names by digest.
func makeImages(ctx context.Context, store *registry.Store, inside, busybox string) (byDigest string, err error) {
	m := &maker{ctx: ctx, store: store, made: map[string]string{}}
	if m.inside, err = os.ReadFile(inside); err != nil {
		return "", fmt.Errorf("make images: %w", err)
	}
	if m.busybox, err = os.ReadFile(busybox); err != nil {
		return "", fmt.Errorf("make images: %w", err)
	}
	if m.words, err = exec.CommandContext(ctx, busybox, "--list").Output(); err != nil {
		return "", fmt.Errorf("make images: busybox --list: %w", err)
	}
	m.all()
	if m.err != nil {
		return "", fmt.Errorf("make images: %w", m.err)
	}
	return m.made[staging+"test-image-digest:latest"], nil
}

// maker makes images until the first fault.
type maker struct {
	ctx                    context.Context
	store                  *registry.Store
	inside, busybox, words []byte
	made                   map[string]string // digests by repository:tag
	err                    error
}

func (m *maker) all() {
	shell := v1.ImageConfig{Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, Cmd: []string{"sh"}}
	as := func(user string) v1.ImageConfig { c := shell; c.User = user; return c }
	base := m.base()
	m.image("e2e-test-images/busybox:1.29-2", shell, base)

	m.image("pause:3.9", v1.ImageConfig{Entrypoint: []string{"/pause"}}, m.program("pause", 0o755))
	m.image("pause:3.10.2", v1.ImageConfig{Entrypoint: []string{"/pause"}, Labels: map[string]string{"of": "sandboxes"}}, m.program("pause", 0o755))

	// The suite looks for these words in the first process' command line.
	server := v1.ImageConfig{Env: shell.Env, Entrypoint: []string{"/usr/sbin/nginx", "master process"}}
	m.image("e2e-test-images/nginx:1.14-2", server, base, m.program("usr/sbin/nginx", 0o755))
	httpd := v1.ImageConfig{Env: shell.Env, Entrypoint: []string{"/usr/sbin/httpd"}}
	m.image("e2e-test-images/httpd:2.4.39-4", httpd, base, m.program("usr/sbin/httpd", 0o755))
	server.Env = append(server.Env[:1:1], "PORT=12003")
	m.image(staging+"hostnet-nginx-amd64:latest", server, base, m.program("usr/sbin/nginx", 0o755))

	m.image("e2e-test-images/nonewprivs:1.3", v1.ImageConfig{Env: shell.Env, Entrypoint: []string{"/nnp"}}, base, m.program("nnp", 0o4755))

	m.image(staging+"test-image-user-uid:latest", as("1002"), base)
	m.image(staging+"test-image-user-username:latest", as("www-data"), base)
	m.image(staging+"test-image-user-uid-group:latest", as("1003:1004"), base)
	m.image(staging+"test-image-user-username-group:latest", as("www-data:1004"), base)
	m.image(staging+"test-image-predefined-group:latest", as("1000"), base, m.layer(
		file("etc/passwd", 0o644, passwd+"default-user:x:1000:1000::/home/default-user:/bin/sh\n"),
		file("etc/group", 0o644, group+"default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n")))

	for _, name := range []string{"test-image-1", "test-image-2", "test-image-3", "test-image-latest"} {
		m.image(staging+name+":latest", shell, base, m.layer(file(name, 0o644, "")))
	}
	// Its digest is compiled into the suite, so nothing of this machine is in it.
	m.image(staging+"test-image-digest:latest", shell, m.layer(file("test-image-digest", 0o644, "")))
	for _, tag := range []string{"1", "2", "3"} {
		m.image(staging+"test-image-tags:"+tag, shell, base, m.layer(file("same-image", 0o644, "")))
	}
	for _, tag := range []string{"test", "all"} {
		m.image(staging+"test-image-tag:"+tag, shell, base, m.layer(file(tag, 0o644, "")))
	}
}

const (
	passwd = "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/bin/false\nnobody:x:65534:65534:nobody:/home:/bin/false\n"
	group  = "root:x:0:\nwww-data:x:33:\nnogroup:x:65534:\n"
)

// entry is one thing in a layer.
type entry struct {
	tar.Header
	data []byte
}

func file(name string, mode int64, data string) entry {
	return entry{tar.Header{Name: name, Mode: mode, Size: int64(len(data))}, []byte(data)}
}

func dir(name string, mode int64) entry {
	return entry{tar.Header{Name: name + "/", Typeflag: tar.TypeDir, Mode: mode}, nil}
}

// base is busybox as its image has it: one program under many names by hard
// links, so that one of them can be masked alone.
func (m *maker) base() []byte {
	entries := []entry{
		dir("bin", 0o755), dir("dev", 0o755), dir("etc", 0o755), dir("home", 0o755), dir("proc", 0o755), dir("root", 0o700),
		dir("sys", 0o755), dir("tmp", 0o1777), dir("usr", 0o755), dir("usr/sbin", 0o755), dir("var", 0o755), dir("var/run", 0o755),
		file("etc/passwd", 0o644, passwd), file("etc/group", 0o644, group),
		file("bin/busybox", 0o755, string(m.busybox)), file("bin/ipcs", 0o755, string(m.inside)),
	}
	link := func(name, to string) {
		entries = append(entries, entry{tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: to, Mode: 0o755}, nil})
	}
	link("bin/pgrep", "bin/ipcs")
	link("bin/sh", "bin/ipcs")
	for word := range strings.FieldsSeq(string(m.words)) {
		if word != "busybox" && word != "sh" {
			link("bin/"+word, "bin/busybox")
		}
	}
	return m.layer(entries...)
}

// program is a layer with one program, named after what it shall do.
func (m *maker) program(name string, mode int64) []byte {
	return m.layer(file(name, mode, string(m.inside)))
}

func (m *maker) layer(entries ...entry) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		m.keep(w.WriteHeader(&e.Header))
		_, err := w.Write(e.data)
		m.keep(err)
	}
	m.keep(w.Close())
	return b.Bytes()
}

func (m *maker) keep(err error) {
	if m.err == nil {
		m.err = err
	}
}

// image puts an image of layers into the store and names it.
func (m *maker) image(name string, config v1.ImageConfig, layers ...[]byte) {
	repository, tag, _ := strings.Cut(name, ":")
	img := v1.Image{Platform: v1.Platform{Architecture: "amd64", OS: "linux"}, Config: config, RootFS: v1.RootFS{Type: "layers"}}
	manifest := v1.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest}
	for _, l := range layers {
		d := m.blob(repository, v1.MediaTypeImageLayer, l)
		img.RootFS.DiffIDs = append(img.RootFS.DiffIDs, d.Digest)
		manifest.Layers = append(manifest.Layers, d)
	}
	manifest.Config = m.blob(repository, v1.MediaTypeImageConfig, m.json(img))
	if m.err != nil {
		return
	}
	got, err := m.store.PutManifest(m.ctx, repository, v1.MediaTypeImageManifest, m.json(manifest))
	m.keep(err)
	if m.err == nil {
		m.keep(m.store.PutTag(m.ctx, repository, tag, got))
		m.made[name] = got
	}
}

func (m *maker) json(v any) []byte {
	raw, err := json.Marshal(v)
	m.keep(err)
	return raw
}

func (m *maker) blob(repository, kind string, data []byte) v1.Descriptor {
	d := v1.Descriptor{MediaType: kind, Digest: digest.FromBytes(data), Size: int64(len(data))}
	if m.err == nil {
		m.keep(m.store.PutBlob(m.ctx, repository, d.Digest.String(), d.Size, bytes.NewReader(data)))
	}
	return d
}
