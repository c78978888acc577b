// Package build makes OCI images from Go sources, and says how it made them.
//
// An image is one layer, not compressed, that holds statically linked programs
// and the files its Spec lists; built twice from the same sources it has the
// same digest. Beside the image lies a signed SLSA provenance. Whether that is
// good enough to run is not decided here but by the release gate.
package build

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"

	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"hauberk.dev/evidence"
	"hauberk.dev/internal/atomicfile"
)

// BuildType names how this package builds, in provenances.
const BuildType = "https://hauberk.dev/go-build/v1"

// ProvenancePath is where, in a layout, the signed provenance lies.
const ProvenancePath = "evidence/provenance.json"

// Spec says what to build, from what, and who answers for it.
type Spec struct {
	// Dir is the directory of the Go module.
	Dir string
	// Image to make.
	Image Image
	// Output is the directory of the OCI layout. An older layout there is
	// replaced once the new one is complete.
	Output string
	// Source the module was checked out from; Checkout reads it from Git.
	Source evidence.Source
	// Modified says the sources differ from the revision of Source.
	Modified bool
	// Builder is the SLSA builder id that Signer's key stands for.
	Builder string
	Signer  evidence.Signer
}

// Built is a finished image.
type Built struct {
	// Layout is the directory it lies in.
	Layout string
	// Digest of its manifest.
	Digest string
	// Provenance as signed.
	Provenance evidence.Envelope
}

// Build builds an image. The provenance goes to evidence/provenance.json
// beside oci-layout.
func Build(ctx context.Context, s Spec) (Built, error) {
	b, err := build(ctx, s)
	if err != nil {
		return Built{}, fmt.Errorf("build image %q: %w", s.Image.Name, err)
	}
	return b, nil
}

func build(ctx context.Context, s Spec) (Built, error) {
	if err := s.check(); err != nil {
		return Built{}, err
	}
	work, err := os.MkdirTemp(filepath.Dir(s.Output), ".build-*")
	if err != nil {
		return Built{}, err
	}
	defer os.RemoveAll(work)
	l, err := collect(ctx, s, filepath.Join(work, "programs"))
	if err != nil {
		return Built{}, err
	}
	layout := filepath.Join(work, "layout")
	digest, err := writeLayout(layout, s.Image, l)
	if err != nil {
		return Built{}, err
	}
	env, err := evidence.SignStatement(s.Image.Name, digest, s.provenance(l), s.Signer)
	if err != nil {
		return Built{}, err
	}
	raw, err := json.MarshalIndent(env, "", "  ")
	if err != nil {
		return Built{}, err
	}
	if err := os.Mkdir(filepath.Join(layout, "evidence"), 0o755); err != nil {
		return Built{}, err
	}
	if err := os.WriteFile(filepath.Join(layout, ProvenancePath), append(raw, '\n'), 0o644); err != nil {
		return Built{}, err
	}
	if err := replace(s.Output, layout); err != nil {
		return Built{}, err
	}
	return Built{Layout: s.Output, Digest: digest, Provenance: env}, nil
}

func (s Spec) check() error {
	switch {
	case s.Dir == "":
		return errors.New("no module directory given")
	case s.Output == "":
		return errors.New("no output directory given")
	case s.Signer == nil:
		return errors.New("no builder's key given: an image without provenance would never be released")
	}
	return s.Image.check()
}

// layer is what goes into an image, with the sources it came from.
type layer struct {
	files     []placedFile
	materials []evidence.Resource
	toolchain string
}

// writeLayout writes an OCI layout and returns the digest of the manifest.
func writeLayout(dir string, img Image, l *layer) (string, error) {
	if err := os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o755); err != nil {
		return "", err
	}
	tarball, err := writeTar(filepath.Join(dir, "layer"), l.files)
	if err != nil {
		return "", err
	}
	if err := os.Rename(filepath.Join(dir, "layer"), blobPath(dir, tarball.Digest)); err != nil {
		return "", err
	}
	conf, err := put(dir, v1.MediaTypeImageConfig, v1.Image{
		Platform: v1.Platform{OS: "linux", Architecture: runtime.GOARCH},
		Config: v1.ImageConfig{
			User: img.User, Env: img.Env, Entrypoint: img.Entrypoint, WorkingDir: "/",
		},
		// Not compressed: the layer is its own diff, and no compressor's
		// version can change the digest.
		RootFS: v1.RootFS{Type: "layers", DiffIDs: []digest.Digest{tarball.Digest}},
	})
	if err != nil {
		return "", err
	}
	manifest, err := put(dir, v1.MediaTypeImageManifest, v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: v1.MediaTypeImageManifest,
		Config:    conf,
		Layers:    []v1.Descriptor{tarball},
	})
	if err != nil {
		return "", err
	}
	manifest.Annotations = map[string]string{v1.AnnotationRefName: img.Name}
	err = writeJSON(filepath.Join(dir, v1.ImageIndexFile), v1.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: v1.MediaTypeImageIndex,
		Manifests: []v1.Descriptor{manifest},
	})
	if err != nil {
		return "", err
	}
	return string(manifest.Digest), writeJSON(filepath.Join(dir, v1.ImageLayoutFile), v1.ImageLayout{Version: v1.ImageLayoutVersion})
}

func blobPath(dir string, d digest.Digest) string {
	return filepath.Join(dir, "blobs", "sha256", d.Encoded())
}

// put writes a JSON blob.
func put(dir, mediaType string, v any) (v1.Descriptor, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return v1.Descriptor{}, err
	}
	sum := sha256.Sum256(raw)
	d := v1.Descriptor{MediaType: mediaType, Digest: digest.Digest("sha256:" + hex.EncodeToString(sum[:])), Size: int64(len(raw))}
	return d, os.WriteFile(blobPath(dir, d.Digest), raw, 0o644)
}

func writeJSON(path string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return os.WriteFile(path, raw, 0o644)
}

// replace puts a finished layout in the place of an older one. It removes
// nothing that is not a layout.
func replace(output, layout string) error {
	_, err := os.Stat(output)
	switch {
	case err == nil:
		if _, err := os.Stat(filepath.Join(output, v1.ImageLayoutFile)); err != nil {
			return fmt.Errorf("replace %s: it is there and is no image layout; name another output", output)
		}
		if err := os.RemoveAll(output); err != nil {
			return err
		}
	case !errors.Is(err, os.ErrNotExist):
		return err
	}
	if err := os.Rename(layout, output); err != nil {
		return err
	}
	return atomicfile.SyncDir(filepath.Dir(output))
}

// namePattern is a repository with a tag, as workloads name images.
var namePattern = regexp.MustCompile(`^[a-z0-9]+([._/-][a-z0-9]+)*:[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$`)
