package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"runtime"
	"strings"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Media types of the older schema that registries still serve; their content
// has the shape of the OCI ones.
const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerIndex    = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerConfig   = "application/vnd.docker.container.image.v1+json"
	dockerLayer    = "application/vnd.docker.image.rootfs.diff.tar.gzip"
)

// blob is content that a manifest refers to.
type blob struct {
	digest string
	size   int64
	gzip   bool
}

// manifest is what this package needs of an image manifest.
type manifest struct {
	config blob
	layers []blob
}

// parseManifest reads an image manifest, refusing whatever this package would
// have to guess about.
func parseManifest(raw []byte, lim limits) (manifest, error) {
	var m v1.Manifest
	if err := decode(raw, &m); err != nil {
		return manifest{}, fmt.Errorf("parse manifest: %w", err)
	}
	switch {
	case m.SchemaVersion != 2:
		return manifest{}, fmt.Errorf("parse manifest: schemaVersion is %d, want 2", m.SchemaVersion)
	case m.MediaType == v1.MediaTypeImageIndex:
		return manifest{}, errors.New("parse manifest: it is an image index; name the manifest of one platform")
	case m.MediaType != "" && m.MediaType != v1.MediaTypeImageManifest && m.MediaType != dockerManifest:
		return manifest{}, fmt.Errorf("parse manifest: unknown media type %q", m.MediaType)
	case m.Config.MediaType != v1.MediaTypeImageConfig && m.Config.MediaType != dockerConfig:
		return manifest{}, fmt.Errorf("parse manifest: configuration has media type %q, want %q", m.Config.MediaType, v1.MediaTypeImageConfig)
	case len(m.Layers) == 0:
		return manifest{}, errors.New("parse manifest: no layers")
	case len(m.Layers) > lim.layers:
		return manifest{}, fmt.Errorf("parse manifest: %d layers, at most %d are taken", len(m.Layers), lim.layers)
	}
	out := manifest{}
	var err error
	if out.config, err = parseDescriptor(m.Config, lim.config); err != nil {
		return manifest{}, fmt.Errorf("parse manifest: configuration: %w", err)
	}
	for i, d := range m.Layers {
		b, err := parseDescriptor(d, lim.blob)
		if err != nil {
			return manifest{}, fmt.Errorf("parse manifest: layer %d: %w", i, err)
		}
		switch d.MediaType {
		case v1.MediaTypeImageLayer:
		case v1.MediaTypeImageLayerGzip, dockerLayer:
			b.gzip = true
		default:
			return manifest{}, fmt.Errorf("parse manifest: layer %d: media type %q is not a plain or gzip layer", i, d.MediaType)
		}
		out.layers = append(out.layers, b)
	}
	return out, nil
}

func parseDescriptor(d v1.Descriptor, limit int64) (blob, error) {
	if _, err := parseDigest(string(d.Digest)); err != nil {
		return blob{}, err
	}
	if d.Size < 0 || d.Size > limit {
		return blob{}, fmt.Errorf("%s has size %d, want 0 to %d", d.Digest, d.Size, limit)
	}
	return blob{digest: string(d.Digest), size: d.Size}, nil
}

// parseConfig reads an image configuration that belongs to a manifest of n
// layers, and returns the digests of the layers unpacked.
func parseConfig(raw []byte, n int) (Config, []string, error) {
	var c v1.Image
	if err := decode(raw, &c); err != nil {
		return Config{}, nil, fmt.Errorf("parse configuration: %w", err)
	}
	if c.OS != "linux" || c.Architecture != runtime.GOARCH {
		return Config{}, nil, fmt.Errorf("parse configuration: image is for %q/%q, this machine runs linux/%s", c.OS, c.Architecture, runtime.GOARCH)
	}
	if c.RootFS.Type != "layers" || len(c.RootFS.DiffIDs) != n {
		return Config{}, nil, fmt.Errorf("parse configuration: rootfs of type %q with %d diff_ids, want \"layers\" with %d", c.RootFS.Type, len(c.RootFS.DiffIDs), n)
	}
	diffs := make([]string, n)
	for i, d := range c.RootFS.DiffIDs {
		if _, err := parseDigest(string(d)); err != nil {
			return Config{}, nil, fmt.Errorf("parse configuration: diff_ids %d: %w", i, err)
		}
		diffs[i] = string(d)
	}
	out := Config{
		Entrypoint: c.Config.Entrypoint,
		Cmd:        c.Config.Cmd,
		Env:        c.Config.Env,
		User:       c.Config.User,
		WorkingDir: c.Config.WorkingDir,
		StopSignal: c.Config.StopSignal,
	}
	if out.WorkingDir == "" {
		out.WorkingDir = "/"
	}
	return out, diffs, out.check()
}

// check refuses what could not be handed to execve unchanged.
func (c Config) check() error {
	if !path.IsAbs(c.WorkingDir) {
		return fmt.Errorf("parse configuration: WorkingDir %q is not absolute", c.WorkingDir)
	}
	for _, e := range c.Env {
		if name, _, ok := strings.Cut(e, "="); !ok || name == "" {
			return fmt.Errorf("parse configuration: Env %q is not NAME=value", e)
		}
	}
	for _, list := range [][]string{c.Entrypoint, c.Cmd, c.Env, {c.User, c.WorkingDir}} {
		for _, s := range list {
			if strings.ContainsRune(s, 0) {
				return fmt.Errorf("parse configuration: %q holds a zero byte", s)
			}
		}
	}
	return nil
}

// decode reads one JSON value and nothing after it. Fields it does not know
// are left alone: the OCI formats grow that way.
func decode(raw []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(raw))
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something follows the JSON value")
	}
	return nil
}

// read returns a small blob whose digest, and size unless it is negative, are
// right.
func read(ctx context.Context, from Blobs, digest string, size, limit int64) ([]byte, error) {
	want, err := parseDigest(digest)
	if err != nil {
		return nil, err
	}
	r, err := from.Open(ctx, digest)
	if err != nil {
		return nil, fmt.Errorf("open blob %s: %w", digest, err)
	}
	defer r.Close()
	raw, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read blob %s: %w", digest, err)
	}
	if int64(len(raw)) > limit {
		return nil, fmt.Errorf("read blob %s: larger than %d bytes", digest, limit)
	}
	if size >= 0 && int64(len(raw)) != size {
		return nil, fmt.Errorf("read blob %s: %d bytes, its descriptor says %d", digest, len(raw), size)
	}
	if sum := sha256.Sum256(raw); hex.EncodeToString(sum[:]) != want {
		return nil, fmt.Errorf("read blob %s: content has digest sha256:%x", digest, sum)
	}
	return raw, nil
}
