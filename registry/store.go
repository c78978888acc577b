// Package registry serves released images to whoever pulls them: the OCI
// distribution protocol, read only over the wire.
//
// Content is a directory of blobs named by digest, and for each repository the
// manifests, tags and referrers in it. Only room release puts anything there,
// in the same process; a push over the wire is refused with the way to the
// gate. The registry decides nothing about what may be released or launched.
package registry

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"hauberk.dev/internal/atomicfile"
)

// Bounds.
const (
	MaxManifest = 4 << 20
	MaxBlob     = 4 << 30
)

// Errors to branch on. ErrNotFound is also fs.ErrNotExist, so that a room
// that does not know this one can tell.
var (
	ErrNotFound = fmt.Errorf("not in the registry: %w", fs.ErrNotExist)
	ErrTagTaken = fmt.Errorf("the tag names another digest and tags never move: %w", fs.ErrExist)
	ErrCorrupt  = errors.New("stored content does not match its digest")
)

var (
	repositoryPattern = regexp.MustCompile(`^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$`)
	tagPattern        = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$`)
	digestPattern     = regexp.MustCompile(`^sha256:[a-f0-9]{64}$`)
)

// Store is the content. Everything it holds is durable when a Put returns,
// and checked against its digest on the way in and out.
//
//	blobs/sha256/<hex>                            content
//	repositories/<name>/_links/<hex>              what of it the repository has
//	repositories/<name>/_tags/<tag>               a digest
//	repositories/<name>/_referrers/<hex>/<hex>    a descriptor
//
// A name component never begins with "_", so the two kinds of directory below
// a repository cannot meet.
type Store struct{ dir string }

// link is what a repository knows of a blob.
type link struct {
	MediaType string `json:"mediaType,omitempty"` // of a manifest, else ""
	Size      int64  `json:"size"`
}

// Open takes the content below dir, or begins with none, and clears away what
// killed writers left.
func Open(dir string) (*Store, error) {
	s := &Store{dir: dir}
	for _, sub := range []string{"blobs/sha256", "repositories"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			return nil, fmt.Errorf("open registry: %w", err)
		}
	}
	left, err := filepath.Glob(filepath.Join(dir, "blobs/sha256/.*"))
	if err != nil {
		return nil, fmt.Errorf("open registry: %w", err)
	}
	for _, p := range left {
		if err := os.Remove(p); err != nil {
			return nil, fmt.Errorf("open registry: %w", err)
		}
	}
	return s, nil
}

func (s *Store) blobPath(digest string) string {
	return filepath.Join(s.dir, "blobs/sha256", strings.TrimPrefix(digest, "sha256:"))
}

func (s *Store) repoPath(repository string, elem ...string) string {
	return filepath.Join(append([]string{s.dir, "repositories", filepath.FromSlash(repository)}, elem...)...)
}

func checkNames(repository string, digests ...string) error {
	if len(repository) > 255 || !repositoryPattern.MatchString(repository) {
		return fmt.Errorf("repository %.300q is not of the form name/name", repository)
	}
	for _, d := range digests {
		if !digestPattern.MatchString(d) {
			return fmt.Errorf("digest %.100q is not of the form %s", d, digestPattern)
		}
	}
	return nil
}

// PutBlob reads a blob of the repository to its end. Content that is not the
// size and digest said leaves no trace.
func (s *Store) PutBlob(ctx context.Context, repository, digest string, size int64, r io.Reader) error {
	if err := checkNames(repository, digest); err != nil {
		return fmt.Errorf("put blob: %w", err)
	}
	if size < 0 || size > MaxBlob {
		return fmt.Errorf("put blob %s: size %d is out of range, at most %d", digest, size, MaxBlob)
	}
	if err := s.writeBlob(ctx, digest, size, r); err != nil {
		return fmt.Errorf("put blob: %w", err)
	}
	return s.link(repository, digest, link{Size: size})
}

func (s *Store) writeBlob(ctx context.Context, digest string, size int64, r io.Reader) error {
	if fi, err := os.Stat(s.blobPath(digest)); err == nil && fi.Size() == size {
		if s.verify(digest) == nil {
			return nil
		} // else it rotted on the disk, and the right content mends it
	}
	return atomicfile.WriteFrom(s.blobPath(digest), 0o600, func(w io.Writer) error {
		sum := sha256.New()
		n, err := io.Copy(io.MultiWriter(w, sum), io.LimitReader(contextReader{ctx, r}, size+1))
		if err != nil {
			return err
		}
		if got := digestOf(sum); n != size || got != digest {
			return fmt.Errorf("content has digest %s and %d bytes or more, want %s and %d", got, n, digest, size)
		}
		return nil
	})
}

// contextReader ends with its context.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

func digestOf(h hash.Hash) string { return "sha256:" + hex.EncodeToString(h.Sum(nil)) }

func (s *Store) link(repository, digest string, l link) error {
	raw, err := json.Marshal(l)
	if err != nil {
		return err
	}
	return s.writeName(s.repoPath(repository, "_links", digest[len("sha256:"):]), raw)
}

// writeName writes a small file whose directories may not be there yet.
func (s *Store) writeName(path string, data []byte) error {
	if err := makeDirs(filepath.Dir(path)); err != nil {
		return err
	}
	return atomicfile.Write(path, data, 0o600)
}

// makeDirs is os.MkdirAll with durable names.
func makeDirs(dir string) error {
	if fi, err := os.Stat(dir); err == nil && fi.IsDir() {
		return nil
	}
	if err := makeDirs(filepath.Dir(dir)); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return atomicfile.SyncDir(filepath.Dir(dir))
}

// PutManifest stores a manifest. What it refers to must be in the repository
// already; if it has a subject, it becomes a referrer of it.
func (s *Store) PutManifest(ctx context.Context, repository, mediaType string, raw []byte) (digest string, err error) {
	if err := checkNames(repository); err != nil {
		return "", fmt.Errorf("put manifest: %w", err)
	}
	if len(raw) > MaxManifest {
		return "", fmt.Errorf("put manifest: is %d bytes, at most %d are allowed", len(raw), MaxManifest)
	}
	m, err := parseManifest(mediaType, raw)
	if err != nil {
		return "", fmt.Errorf("put manifest: %w", err)
	}
	for _, d := range m.content() {
		if !s.has(repository, d.Digest.String()) {
			return "", fmt.Errorf("put manifest: it refers to %s, which repository %s does not have", d.Digest, repository)
		}
	}
	digest = digestBytes(raw)
	if err := s.writeBlob(ctx, digest, int64(len(raw)), bytes.NewReader(raw)); err != nil {
		return "", fmt.Errorf("put manifest: %w", err)
	}
	if m.Subject != nil {
		if err := s.refer(repository, m, digest, int64(len(raw))); err != nil {
			return "", fmt.Errorf("put manifest: %w", err)
		}
	}
	if err := s.link(repository, digest, link{MediaType: mediaType, Size: int64(len(raw))}); err != nil {
		return "", fmt.Errorf("put manifest: %w", err)
	}
	return digest, nil
}

func digestBytes(raw []byte) string {
	sum := sha256.Sum256(raw)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// manifest is the part of manifests and indexes that the registry reads.
type manifest struct {
	MediaType    string            `json:"mediaType"`
	ArtifactType string            `json:"artifactType"`
	Config       *v1.Descriptor    `json:"config"`
	Layers       []v1.Descriptor   `json:"layers"`
	Manifests    []v1.Descriptor   `json:"manifests"`
	Subject      *v1.Descriptor    `json:"subject"`
	Annotations  map[string]string `json:"annotations"`
}

func parseManifest(mediaType string, raw []byte) (manifest, error) {
	var m manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return m, err
	}
	if m.MediaType != "" && m.MediaType != mediaType {
		return m, fmt.Errorf("media type is %q inside and %q outside", m.MediaType, mediaType)
	}
	switch mediaType {
	case v1.MediaTypeImageManifest:
		if m.Config == nil || m.Manifests != nil {
			return m, errors.New("is not an image manifest: it must have a config and no manifests")
		}
	case v1.MediaTypeImageIndex:
		if m.Config != nil || m.Layers != nil {
			return m, errors.New("is not an image index: it must have neither config nor layers")
		}
	default:
		return m, fmt.Errorf("media type %.100q is unknown; OCI image manifests and indexes are accepted", mediaType)
	}
	all := m.content()
	if m.Subject != nil {
		all = append(all, *m.Subject)
	}
	if len(all) > 1024 {
		return m, fmt.Errorf("refers to %d things, at most 1024 are allowed", len(all))
	}
	for _, d := range all {
		if !digestPattern.MatchString(d.Digest.String()) || d.Size < 0 {
			return m, fmt.Errorf("refers to digest %.100q of %d bytes; sha256 is accepted", d.Digest, d.Size)
		}
	}
	return m, nil
}

func (m manifest) content() []v1.Descriptor {
	all := slices.Concat(m.Layers, m.Manifests)
	if m.Config != nil {
		all = append(all, *m.Config)
	}
	return all
}

func (s *Store) refer(repository string, m manifest, digest string, size int64) error {
	d := v1.Descriptor{MediaType: m.MediaType, Digest: digestType(digest), Size: size, ArtifactType: m.ArtifactType, Annotations: m.Annotations}
	if d.MediaType == "" {
		d.MediaType = v1.MediaTypeImageManifest
	}
	if d.ArtifactType == "" && m.Config != nil {
		d.ArtifactType = m.Config.MediaType
	}
	raw, err := json.Marshal(d)
	if err != nil {
		return err
	}
	subject := m.Subject.Digest.Encoded()
	return s.writeName(s.repoPath(repository, "_referrers", subject, strings.TrimPrefix(digest, "sha256:")), raw)
}

// PutTag names a manifest. A tag never moves: a second name for another
// digest is ErrTagTaken.
func (s *Store) PutTag(_ context.Context, repository, tag, digest string) error {
	if err := checkNames(repository, digest); err != nil {
		return fmt.Errorf("put tag: %w", err)
	}
	if !tagPattern.MatchString(tag) {
		return fmt.Errorf("put tag: %.200q is not of the form %s", tag, tagPattern)
	}
	if l, err := s.readLink(repository, digest); err != nil || l.MediaType == "" {
		return fmt.Errorf("put tag %s: manifest %s: %w", tag, digest, ErrNotFound)
	}
	switch old, err := s.Tag(context.Background(), repository, tag); {
	case err == nil && old == digest:
		return nil
	case err == nil:
		return fmt.Errorf("put tag %s of %s: it names %s: %w", tag, repository, old, ErrTagTaken)
	case !errors.Is(err, ErrNotFound):
		return fmt.Errorf("put tag: %w", err)
	}
	return s.writeName(s.repoPath(repository, "_tags", tag), []byte(digest))
}

// Tag returns the digest that a tag names.
func (s *Store) Tag(_ context.Context, repository, tag string) (string, error) {
	if err := checkNames(repository); err != nil {
		return "", fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	if !tagPattern.MatchString(tag) {
		return "", fmt.Errorf("tag %.200q: %w", tag, ErrNotFound)
	}
	raw, err := os.ReadFile(s.repoPath(repository, "_tags", tag))
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("tag %s of %s: %w", tag, repository, ErrNotFound)
	}
	if err != nil {
		return "", err
	}
	if !digestPattern.Match(raw) {
		return "", fmt.Errorf("tag %s of %s: %w", tag, repository, ErrCorrupt)
	}
	return string(raw), nil
}

// Manifest returns a manifest of the repository, checked against its digest.
func (s *Store) Manifest(_ context.Context, repository, digest string) (mediaType string, raw []byte, err error) {
	l, err := s.readLink(repository, digest)
	if err != nil {
		return "", nil, err
	}
	if l.MediaType == "" {
		return "", nil, fmt.Errorf("%s is a blob, not a manifest: %w", digest, ErrNotFound)
	}
	raw, err = os.ReadFile(s.blobPath(digest))
	if err != nil {
		return "", nil, fmt.Errorf("manifest %s: %w", digest, err)
	}
	if digestBytes(raw) != digest {
		return "", nil, fmt.Errorf("manifest %s: %w", digest, ErrCorrupt)
	}
	return l.MediaType, raw, nil
}

// Blob opens a blob of the repository. The reader fails instead of ending if
// the content turns out not to match the digest.
func (s *Store) Blob(_ context.Context, repository, digest string) (io.ReadCloser, int64, error) {
	l, err := s.readLink(repository, digest)
	if err != nil {
		return nil, 0, err
	}
	f, err := os.Open(s.blobPath(digest))
	if err != nil {
		return nil, 0, fmt.Errorf("blob %s: %w", digest, err)
	}
	return &checkedReader{f: f, digest: digest, left: l.Size, sum: sha256.New()}, l.Size, nil
}

// checkedReader holds back the last byte of a blob until all of it is known
// to be right, so a reader who got it all got the right content.
type checkedReader struct {
	f      *os.File
	digest string
	left   int64
	sum    hash.Hash
}

func (r *checkedReader) Read(p []byte) (int, error) {
	if r.left == 0 && r.sum == nil {
		return 0, io.EOF
	}
	if len(p) == 0 {
		return 0, nil
	}
	if int64(len(p)) > r.left {
		p = p[:r.left]
	}
	n, err := r.f.Read(p)
	r.sum.Write(p[:n])
	r.left -= int64(n)
	if r.left > 0 {
		if err == io.EOF {
			err = fmt.Errorf("blob %s: %w: it is too short", r.digest, ErrCorrupt)
		}
		return n, err
	}
	more, _ := r.f.Read(make([]byte, 1))
	if digestOf(r.sum) != r.digest || more > 0 {
		return 0, fmt.Errorf("blob %s: %w", r.digest, ErrCorrupt)
	}
	r.sum = nil
	return n, nil
}

func (r *checkedReader) Close() error { return r.f.Close() }

func (s *Store) verify(digest string) error {
	f, err := os.Open(s.blobPath(digest))
	if err != nil {
		return err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return err
	}
	if digestOf(sum) != digest {
		return fmt.Errorf("blob %s: %w", digest, ErrCorrupt)
	}
	return nil
}

func (s *Store) readLink(repository, digest string) (link, error) {
	var l link
	if err := checkNames(repository, digest); err != nil {
		return l, fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	raw, err := os.ReadFile(s.repoPath(repository, "_links", digest[len("sha256:"):]))
	if errors.Is(err, fs.ErrNotExist) {
		return l, fmt.Errorf("%s in repository %s: %w", digest, repository, ErrNotFound)
	}
	if err == nil {
		err = json.Unmarshal(raw, &l)
	}
	return l, err
}

func (s *Store) has(repository, digest string) bool {
	_, err := s.readLink(repository, digest)
	return err == nil
}

// Tags lists the tags of a repository in order.
func (s *Store) Tags(_ context.Context, repository string) ([]string, error) {
	if err := checkNames(repository); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	if _, err := os.Stat(s.repoPath(repository, "_links")); err != nil {
		return nil, fmt.Errorf("repository %s: %w", repository, ErrNotFound)
	}
	return names(s.repoPath(repository, "_tags"))
}

// Referrers lists what refers to a manifest, in order of digest. Nothing does
// is no error, and neither is a repository or manifest that is not there.
func (s *Store) Referrers(_ context.Context, repository, digest, artifactType string) ([]v1.Descriptor, error) {
	if err := checkNames(repository, digest); err != nil {
		return nil, fmt.Errorf("referrers: %w", err)
	}
	dir := s.repoPath(repository, "_referrers", digest[len("sha256:"):])
	list, err := names(dir)
	if err != nil {
		return nil, fmt.Errorf("referrers of %s: %w", digest, err)
	}
	out := []v1.Descriptor{}
	for _, name := range list {
		raw, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return nil, fmt.Errorf("referrers of %s: %w", digest, err)
		}
		var d v1.Descriptor
		if err := json.Unmarshal(raw, &d); err != nil {
			return nil, fmt.Errorf("referrers of %s: %s: %w", digest, name, err)
		}
		// A referrer is listed before it is linked, so a killed writer may
		// have left one without content.
		if (artifactType == "" || d.ArtifactType == artifactType) && s.has(repository, d.Digest.String()) {
			out = append(out, d)
		}
	}
	return out, nil
}

// names lists a directory without the leftovers of killed writers.
func names(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var out []string
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") {
			out = append(out, e.Name())
		}
	}
	return out, nil
}
