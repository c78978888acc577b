package image

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// tarball is a tar of an image: in the OCI layout, or as docker save writes it.
// Nothing of it is unpacked; its files are read where they lie.
type tarball struct {
	file  *os.File
	files map[string]section
	links map[string]string
	made  map[string]section // by digest: what the tar names otherwise
}

// section is a file of the tar, or one that was made for it.
type section struct {
	start, size int64
	raw         []byte // if it was made
}

// maxArchived is how many files an archive may have.
const maxArchived = 1 << 16

func openArchive(ctx context.Context, name string) (*tarball, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	a := &tarball{file: f, files: map[string]section{}, links: map[string]string{}, made: map[string]section{}}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("read %s: it is no file", name)
	}
	if err == nil {
		err = a.scan(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return a, nil
}

func (a *tarball) close() error { return a.file.Close() }

// scan finds where the files of the archive lie.
func (a *tarball) scan(ctx context.Context) error {
	var magic [2]byte
	if _, err := a.file.ReadAt(magic[:], 0); err == nil && magic == [2]byte{0x1f, 0x8b} {
		return fmt.Errorf("read %s: it is compressed: run gunzip first", a.file.Name())
	}
	t := tar.NewReader(a.file) // which seeks over what is not read
	for n := 0; ; n++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, err := t.Next()
		if errors.Is(err, io.EOF) && n > 0 {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read %s: %w", a.file.Name(), err)
		}
		if n >= maxArchived {
			return fmt.Errorf("read %s: more than %d files", a.file.Name(), maxArchived)
		}
		name := path.Clean(h.Name)
		switch h.Typeflag {
		case tar.TypeReg:
			at, err := a.file.Seek(0, io.SeekCurrent)
			if err != nil {
				return err
			}
			a.files[name] = section{start: at, size: h.Size}
		case tar.TypeSymlink: // docker's way to name a layer twice
			a.links[name] = path.Join(path.Dir(name), h.Linkname)
		case tar.TypeLink:
			a.links[name] = path.Clean(h.Linkname)
		}
	}
}

func (a *tarball) find(name string) (section, error) {
	name = path.Clean(name)
	if to, ok := a.links[name]; ok {
		name = to
	}
	s, ok := a.files[name]
	if !ok {
		return section{}, fmt.Errorf("read %s: it holds no %q: %w", a.file.Name(), name, os.ErrNotExist)
	}
	return s, nil
}

func (a *tarball) reader(s section) io.Reader {
	if s.raw != nil {
		return bytes.NewReader(s.raw)
	}
	return io.NewSectionReader(a.file, s.start, s.size)
}

// small reads a file whole.
func (a *tarball) small(name string) ([]byte, error) {
	s, err := a.find(name)
	if err != nil {
		return nil, err
	}
	if s.size > standard.manifest {
		return nil, fmt.Errorf("read %s: %q is larger than %d bytes", a.file.Name(), name, standard.manifest)
	}
	return io.ReadAll(a.reader(s))
}

// Open opens the blob a digest names.
func (a *tarball) Open(_ context.Context, digest string) (io.ReadCloser, error) {
	hexa, err := parseDigest(digest)
	if err != nil {
		return nil, err
	}
	s, ok := a.made[digest]
	if !ok {
		if s, err = a.find("blobs/sha256/" + hexa); err != nil {
			return nil, err
		}
	}
	return io.NopCloser(a.reader(s)), nil
}

// manifest finds the one of a name.
func (a *tarball) manifest(from, name string) (string, error) {
	if from == FromArchive {
		raw, err := a.small(v1.ImageIndexFile)
		if err != nil {
			return "", err
		}
		return named(raw, name, a.file.Name())
	}
	raw, err := a.small("manifest.json")
	if err != nil {
		return "", err
	}
	var list []saved
	if err := decode(raw, &list); err != nil {
		return "", fmt.Errorf("read manifest.json of %s: %w", a.file.Name(), err)
	}
	var found []saved
	var have []string
	for _, s := range list {
		have = append(have, s.RepoTags...)
		if name == "" || slices.ContainsFunc(s.RepoTags, func(t string) bool { return t == name || t == name+":latest" }) {
			found = append(found, s)
		}
	}
	if len(found) != 1 {
		return "", fmt.Errorf("read %s: %d images are called %q; it has %q", a.file.Name(), len(found), name, have)
	}
	return a.wrap(found[0])
}

// saved is an image as docker save lists it.
type saved struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// wrap makes a manifest of what docker saved without one.
func (a *tarball) wrap(s saved) (string, error) {
	if len(s.Layers) > standard.layers {
		return "", fmt.Errorf("read %s: %d layers, at most %d are taken", a.file.Name(), len(s.Layers), standard.layers)
	}
	m := v1.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest}
	var err error
	if m.Config, err = a.describe(s.Config, v1.MediaTypeImageConfig); err != nil {
		return "", err
	}
	for _, l := range s.Layers {
		d, err := a.describe(l, v1.MediaTypeImageLayer)
		if err != nil {
			return "", err
		}
		m.Layers = append(m.Layers, d)
	}
	raw, err := json.Marshal(m)
	if err != nil {
		return "", err
	}
	at := digestOf(raw)
	a.made[at] = section{raw: raw, size: int64(len(raw))}
	return at, nil
}

// describe names a file of the archive by its content.
func (a *tarball) describe(name, media string) (v1.Descriptor, error) {
	s, err := a.find(name)
	if err != nil {
		return v1.Descriptor{}, err
	}
	if s.size > standard.blob {
		return v1.Descriptor{}, fmt.Errorf("read %s: %q is larger than %d bytes", a.file.Name(), name, standard.blob)
	}
	sum := sha256.New()
	head := make([]byte, 2)
	r := a.reader(s)
	n, err := io.ReadFull(r, head)
	if err != nil {
		return v1.Descriptor{}, fmt.Errorf("read %q of %s: %w", name, a.file.Name(), err)
	}
	sum.Write(head[:n])
	if _, err := io.Copy(sum, r); err != nil {
		return v1.Descriptor{}, fmt.Errorf("read %q of %s: %w", name, a.file.Name(), err)
	}
	if media == v1.MediaTypeImageLayer && bytes.Equal(head, []byte{0x1f, 0x8b}) {
		media = v1.MediaTypeImageLayerGzip
	}
	d := digest.Digest("sha256:" + hex.EncodeToString(sum.Sum(nil)))
	a.made[string(d)] = s
	return v1.Descriptor{MediaType: media, Digest: d, Size: s.size}, nil
}

func digestOf(raw []byte) string {
	sum := sha256.Sum256(raw)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// named finds a manifest in an index by its name, which containerd writes
// whole and others as the tag alone.
func named(raw []byte, name, where string) (string, error) {
	var index v1.Index
	if err := decode(raw, &index); err != nil {
		return "", fmt.Errorf("read %s: %w", where, err)
	}
	var found, have []string
	for _, d := range index.Manifests {
		tag, whole := d.Annotations[v1.AnnotationRefName], d.Annotations["io.containerd.image.name"]
		if n := cmp.Or(whole, tag); n != "" {
			have = append(have, n)
		}
		if (name == "" || name == tag || name == whole) && !slices.Contains(found, string(d.Digest)) {
			found = append(found, string(d.Digest))
		}
	}
	switch {
	case len(found) == 1:
		_, err := parseDigest(found[0])
		return found[0], err
	case name == "" && len(found) > 1:
		return "", fmt.Errorf("read %s: it has more than one manifest, name one of %s", where, strings.Join(have, ", "))
	case len(found) > 1:
		return "", fmt.Errorf("read %s: more than one manifest is named %q", where, name)
	}
	return "", fmt.Errorf("read %s: no manifest is named %q; it has %q", where, name, have)
}
