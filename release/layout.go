package release

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"hauberk.dev/evidence"
	"hauberk.dev/internal/strictjson"
)

// Bounds of a submission.
const (
	maxFiles    = 1024
	maxTotal    = 4 << 30
	maxDocument = 4 << 20 // index, manifest, configuration
	maxLayers   = 128
	maxEvidence = 64
)

// filePattern is every path a submission may have.
var filePattern = regexp.MustCompile(`^(oci-layout|index\.json|blobs/sha256/[a-f0-9]{64}|evidence/[a-z0-9][a-z0-9._-]{0,127}\.json)$`)

// layout is a submission on the disk, checked for shape: one image, every
// blob it refers to there and as its digest says.
type layout struct {
	root     *os.Root
	scratch  string // to remove, or ""
	digest   string
	raw      []byte // the manifest
	manifest v1.Manifest
	evidence []document
}

// document is one envelope of evidence.
type document struct {
	name string // below evidence/
	raw  []byte
	env  evidence.Envelope
}

// openLayout reads a submission. Its errors are about the content, unless
// they are of the disk it is unpacked to.
func openLayout(s Submission, scratch string) (_ *layout, err error) {
	if (s.Dir == "") == (s.Tar == nil) {
		return nil, errors.New("exactly one of a directory and a tar must be submitted")
	}
	l := &layout{}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	dir := s.Dir
	if s.Tar != nil {
		if l.scratch, err = os.MkdirTemp(scratch, "submission-"); err != nil {
			return nil, &diskError{err}
		}
		dir = l.scratch
	}
	if l.root, err = os.OpenRoot(dir); err != nil {
		return nil, err
	}
	if s.Tar != nil {
		if err := unpack(l.root, s.Tar); err != nil {
			return nil, err
		}
	}
	if err := l.survey(); err != nil {
		return nil, err
	}
	if err := l.readImage(); err != nil {
		return nil, err
	}
	return l, l.readEvidence()
}

// diskError is a failure of this machine, not of the submission.
type diskError struct{ cause error }

func (e *diskError) Error() string { return e.cause.Error() }
func (e *diskError) Unwrap() error { return e.cause }

func (l *layout) close() {
	if l == nil {
		return
	}
	if l.root != nil {
		l.root.Close()
	}
	if l.scratch != "" {
		os.RemoveAll(l.scratch)
	}
}

// unpack takes regular files with the paths of a submission, and nothing else.
func unpack(root *os.Root, r io.Reader) error {
	for _, dir := range []string{"blobs", "blobs/sha256", "evidence"} {
		if err := root.Mkdir(dir, 0o700); err != nil {
			return &diskError{err}
		}
	}
	tr := tar.NewReader(r)
	files, total := 0, int64(0)
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read tar: %w", err)
		}
		name := strings.TrimPrefix(strings.TrimSuffix(h.Name, "/"), "./")
		if h.Typeflag == tar.TypeDir && slices.Contains([]string{"", ".", "blobs", "blobs/sha256", "evidence"}, name) {
			continue
		}
		if h.Typeflag != tar.TypeReg {
			return fmt.Errorf("tar has %.200q of type %q; only regular files are taken", h.Name, h.Typeflag)
		}
		if !filePattern.MatchString(name) {
			return fmt.Errorf("tar has %.200q; only oci-layout, index.json, blobs/sha256/<digest> and evidence/<name>.json are taken", h.Name)
		}
		files, total = files+1, total+h.Size
		if files > maxFiles || total > maxTotal {
			return fmt.Errorf("tar has more than %d files or %d bytes", maxFiles, int64(maxTotal))
		}
		if err := unpackFile(root, name, tr); err != nil {
			return err
		}
	}
}

func unpackFile(root *os.Root, name string, r io.Reader) error {
	f, err := root.OpenFile(filepath.FromSlash(name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("tar has %q twice", name)
	}
	if err != nil {
		return &diskError{err}
	}
	from := &readError{r: r}
	_, err = io.Copy(f, from)
	if err := errors.Join(err, f.Close()); err != nil {
		if from.err != nil {
			return fmt.Errorf("read tar: %s: %w", name, from.err)
		}
		return &diskError{err}
	}
	return nil
}

// readError remembers whether reading, not writing, failed.
type readError struct {
	r   io.Reader
	err error
}

func (r *readError) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	if err != nil && err != io.EOF {
		r.err = err
	}
	return n, err
}

// survey refuses symbolic links, devices and strangers before any is opened.
func (l *layout) survey() error {
	files, total := 0, int64(0)
	return fs.WalkDir(l.root.FS(), ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if p != "." && p != "blobs" && p != "blobs/sha256" && p != "evidence" {
				return fmt.Errorf("layout has directory %.200q; only blobs/sha256 and evidence are taken", p)
			}
			return nil
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		if !fi.Mode().IsRegular() {
			return fmt.Errorf("layout has %.200q, which is no regular file (%v)", p, fi.Mode().Type())
		}
		if !filePattern.MatchString(p) {
			return fmt.Errorf("layout has %.200q; only oci-layout, index.json, blobs/sha256/<digest> and evidence/<name>.json are taken", p)
		}
		if files, total = files+1, total+fi.Size(); files > maxFiles || total > maxTotal {
			return fmt.Errorf("layout has more than %d files or %d bytes", maxFiles, int64(maxTotal))
		}
		return nil
	})
}

func (l *layout) read(name string, limit int64) ([]byte, error) {
	f, err := l.root.Open(filepath.FromSlash(name))
	if err != nil {
		return nil, fmt.Errorf("layout has no %s", name)
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(raw)) > limit {
		err = fmt.Errorf("%s is larger than %d bytes", name, limit)
	}
	return raw, err
}

func blobName(digest string) string { return "blobs/sha256/" + strings.TrimPrefix(digest, "sha256:") }

func (l *layout) readImage() error {
	raw, err := l.read("oci-layout", 4096)
	if err != nil {
		return err
	}
	var version v1.ImageLayout
	if err := strictjson.DecodeLoose(raw, 4096, &version); err != nil || version.Version != v1.ImageLayoutVersion {
		return fmt.Errorf("oci-layout has version %.40q, want %q", version.Version, v1.ImageLayoutVersion)
	}
	if raw, err = l.read(v1.ImageIndexFile, maxDocument); err != nil {
		return err
	}
	var index v1.Index
	if err := strictjson.DecodeLoose(raw, maxDocument, &index); err != nil {
		return fmt.Errorf("index.json: %w", err)
	}
	if index.MediaType != "" && index.MediaType != v1.MediaTypeImageIndex {
		return fmt.Errorf("index.json has unknown media type %.100q", index.MediaType)
	}
	if len(index.Manifests) != 1 {
		return fmt.Errorf("index.json names %d images, want exactly one", len(index.Manifests))
	}
	d := index.Manifests[0]
	if d.MediaType != v1.MediaTypeImageManifest {
		return fmt.Errorf("the image has media type %.100q, want %s", d.MediaType, v1.MediaTypeImageManifest)
	}
	if err := l.checkBlob(d); err != nil {
		return err
	}
	if l.raw, err = l.read(blobName(d.Digest.String()), maxDocument); err != nil {
		return err
	}
	l.digest = d.Digest.String()
	return l.readManifest()
}

func (l *layout) readManifest() error {
	m := &l.manifest
	if err := strictjson.DecodeLoose(l.raw, maxDocument, m); err != nil {
		return fmt.Errorf("manifest: %w", err)
	}
	switch {
	case m.SchemaVersion != 2:
		return fmt.Errorf("manifest has schema version %d, want 2", m.SchemaVersion)
	case m.MediaType != "" && m.MediaType != v1.MediaTypeImageManifest:
		return fmt.Errorf("manifest has media type %.100q, want %s", m.MediaType, v1.MediaTypeImageManifest)
	case m.Config.MediaType != v1.MediaTypeImageConfig:
		return fmt.Errorf("manifest has a configuration of media type %.100q, want %s", m.Config.MediaType, v1.MediaTypeImageConfig)
	case m.Subject != nil || m.ArtifactType != "":
		return errors.New("manifest is of an artifact that refers to another, not of an image")
	case len(m.Layers) == 0 || len(m.Layers) > maxLayers:
		return fmt.Errorf("manifest has %d layers, want 1 to %d", len(m.Layers), maxLayers)
	}
	for i, d := range m.Layers {
		// What no node could unpack is refused here, not at launch.
		if d.MediaType != v1.MediaTypeImageLayer && d.MediaType != v1.MediaTypeImageLayerGzip {
			return fmt.Errorf("layer %d has media type %.100q, want %s or %s", i, d.MediaType, v1.MediaTypeImageLayer, v1.MediaTypeImageLayerGzip)
		}
		if err := l.checkBlob(d); err != nil {
			return fmt.Errorf("layer %d: %w", i, err)
		}
	}
	if err := l.checkBlob(m.Config); err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	raw, err := l.read(blobName(m.Config.Digest.String()), maxDocument)
	if err != nil {
		return err
	}
	var config v1.Image
	if err := strictjson.DecodeLoose(raw, maxDocument, &config); err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	if len(config.RootFS.DiffIDs) != len(m.Layers) {
		return fmt.Errorf("configuration names %d layers, the manifest %d", len(config.RootFS.DiffIDs), len(m.Layers))
	}
	return nil
}

var digestPattern = regexp.MustCompile(`^sha256:[a-f0-9]{64}$`)

// checkBlob hashes a blob.
func (l *layout) checkBlob(d v1.Descriptor) error {
	digest := d.Digest.String()
	if !digestPattern.MatchString(digest) {
		return fmt.Errorf("digest %.100q is not of the form %s", digest, digestPattern)
	}
	if len(d.URLs) > 0 || len(d.Data) > 0 {
		return fmt.Errorf("%s has its content elsewhere or inline; only blobs of the layout are taken", digest)
	}
	f, err := l.root.Open(filepath.FromSlash(blobName(digest)))
	if err != nil {
		return fmt.Errorf("layout has no %s", blobName(digest))
	}
	defer f.Close()
	sum := sha256.New()
	n, err := io.Copy(sum, f)
	if err != nil {
		return &diskError{err}
	}
	if got := "sha256:" + hex.EncodeToString(sum.Sum(nil)); got != digest || n != d.Size {
		return fmt.Errorf("%s has digest %s and %d bytes, want %d", blobName(digest), got, n, d.Size)
	}
	return nil
}

func (l *layout) readEvidence() error {
	entries, err := fs.ReadDir(l.root.FS(), "evidence")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return &diskError{err}
	}
	if len(entries) > maxEvidence {
		return fmt.Errorf("layout has %d files of evidence, at most %d are taken", len(entries), maxEvidence)
	}
	for _, e := range entries { // in order of name
		name := path.Join("evidence", e.Name())
		if !knownEvidence(e.Name()) {
			return fmt.Errorf("%s is no evidence the gate knows: provenance.json, review-<any>.json, approval-<any>.json", name)
		}
		raw, err := l.read(name, evidence.MaxEnvelope)
		if err != nil {
			return err
		}
		env, err := evidence.ParseEnvelope(raw)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		l.evidence = append(l.evidence, document{e.Name(), raw, env})
	}
	return nil
}

func knownEvidence(name string) bool {
	return name == "provenance.json" || strings.HasPrefix(name, "review-") || strings.HasPrefix(name, "approval-")
}

// documents returns the evidence whose names begin with a prefix.
func (l *layout) documents(prefix string) []document {
	var out []document
	for _, d := range l.evidence {
		if strings.HasPrefix(d.name, prefix) {
			out = append(out, d)
		}
	}
	return out
}

func (d document) digest() string {
	sum := sha256.Sum256(d.raw)
	return "sha256:" + hex.EncodeToString(sum[:])
}

func (l *layout) evidenceDigests() map[string]string {
	out := map[string]string{}
	for _, d := range l.evidence {
		out[d.name] = d.digest()
	}
	return out
}

// digestJSON is the digest of a value's JSON.
func digestJSON(v any) (string, error) {
	raw, err := json.Marshal(v)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(raw)
	return hex.EncodeToString(sum[:]), nil
}
