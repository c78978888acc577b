package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// The places an image comes from, as they are written before a colon.
const (
	FromRegistry      = "docker" // written docker://, or not at all
	FromLayout        = "oci"
	FromArchive       = "oci-archive"
	FromDockerArchive = "docker-archive"
)

// Reference names an image as people write it.
type Reference struct {
	// From is one of the places above.
	From string
	// Path of a directory or file, absolute.
	Path string
	// Host and Repository of a registry.
	Host, Repository string
	// Tag, or the name in a layout or an archive; Digest of a manifest.
	Tag, Digest string
}

const (
	dockerHub  = "docker.io"
	dockerHost = "registry-1.docker.io" // where Docker's hub answers
)

var (
	validRepository = regexp.MustCompile(`^[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*$`)
	validTag        = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$`)
)

// ParseReference reads NAME[:TAG][@DIGEST] as Docker's users write it, or
// oci:DIRECTORY[:NAME], oci-archive:FILE[:NAME], docker-archive:FILE[:NAME].
// Relative paths are taken from the working directory.
func ParseReference(s string) (Reference, error) {
	fault := func(format string, a ...any) (Reference, error) {
		return Reference{}, fmt.Errorf("parse image %.256q: %w", s, fmt.Errorf(format, a...))
	}
	if from, rest, ok := strings.Cut(s, ":"); ok {
		switch from {
		case FromLayout, FromArchive, FromDockerArchive:
			path, name, _ := strings.Cut(rest, ":")
			if path == "" {
				return fault("no path after %s:", from)
			}
			abs, err := filepath.Abs(path)
			if err != nil {
				return fault("%w", err)
			}
			return Reference{From: from, Path: abs, Tag: name}, nil
		}
	}
	rest := strings.TrimPrefix(s, FromRegistry+"://")
	if strings.Contains(rest, "://") {
		return fault("want NAME[:TAG], oci:DIRECTORY, oci-archive:FILE or docker-archive:FILE")
	}
	r := Reference{From: FromRegistry}
	rest, r.Digest, _ = strings.Cut(rest, "@")
	if r.Digest != "" {
		if _, err := parseDigest(r.Digest); err != nil {
			return fault("%w", err)
		}
	}
	if i := strings.LastIndexByte(rest, ':'); i > strings.LastIndexByte(rest, '/') {
		rest, r.Tag = rest[:i], rest[i+1:]
		if !validTag.MatchString(r.Tag) {
			return fault("tag %q: want letters, digits and . _ -, at most 128", r.Tag)
		}
	}
	host, repository, ok := strings.Cut(rest, "/")
	if ok && (strings.ContainsAny(host, ".:") || host == "localhost") {
		r.Host, r.Repository = host, repository
	} else {
		r.Host, r.Repository = dockerHub, rest
	}
	if r.Host == "index.docker.io" {
		r.Host = dockerHub
	}
	if r.Host == dockerHub && !strings.Contains(r.Repository, "/") {
		r.Repository = "library/" + r.Repository
	}
	if len(r.Repository) > 255 || !validRepository.MatchString(r.Repository) {
		return fault("name %.256q: want lower-case letters and digits, joined by . _ - and /", r.Repository)
	}
	if r.Tag == "" && r.Digest == "" {
		r.Tag = "latest"
	}
	return r, nil
}

// String is the whole name.
func (r Reference) String() string {
	if r.From != FromRegistry {
		s := r.From + ":" + r.Path
		if r.Tag != "" {
			s += ":" + r.Tag
		}
		return s
	}
	s := r.Host + "/" + r.Repository
	if r.Tag != "" {
		s += ":" + r.Tag
	}
	if r.Digest != "" {
		s += "@" + r.Digest
	}
	return s
}

// Short is the name as people write it.
func (r Reference) Short() string {
	if r.From != FromRegistry {
		return r.String()
	}
	return strings.TrimPrefix(strings.TrimPrefix(r.String(), dockerHub+"/"), "library/")
}

// Source is a place that an image can be pulled from.
type Source struct {
	Blobs
	// Digest of the image's manifest for this machine.
	Digest string

	close func() error
}

// Close lets go of what was opened.
func (s *Source) Close() error {
	if s.close == nil {
		return nil
	}
	return s.close()
}

// OpenOptions say how a registry is spoken to.
type OpenOptions struct {
	// Client makes the requests; nil is http.DefaultClient.
	Client *http.Client
	// PlainHTTP allows a registry that has no TLS; one on the loopback
	// interface may always have none.
	PlainHTTP bool
}

// Open finds the manifest that a reference names.
func (r Reference) Open(ctx context.Context, o OpenOptions) (*Source, error) {
	s, err := r.open(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("find image %s: %w", r, err)
	}
	if s.Digest, err = resolve(ctx, s.Blobs, s.Digest); err != nil {
		return nil, errors.Join(fmt.Errorf("find image %s: %w", r, err), s.Close())
	}
	return s, nil
}

func (r Reference) open(ctx context.Context, o OpenOptions) (*Source, error) {
	switch r.From {
	case FromLayout:
		l := Layout(r.Path)
		d, err := l.Manifest(r.Tag)
		return &Source{Blobs: l, Digest: d}, err
	case FromArchive, FromDockerArchive:
		a, err := openArchive(ctx, r.Path)
		if err != nil {
			return nil, err
		}
		d, err := a.manifest(r.From, r.Tag)
		if err != nil {
			return nil, errors.Join(err, a.close())
		}
		return &Source{Blobs: a, Digest: d, close: a.close}, nil
	}
	reg := r.registry(o)
	if r.Digest != "" {
		return &Source{Blobs: reg, Digest: r.Digest}, nil
	}
	d, err := reg.Manifest(ctx, r.Tag)
	return &Source{Blobs: reg, Digest: d}, err
}

func (r Reference) registry(o OpenOptions) Registry {
	host, scheme := r.Host, "https"
	if host == dockerHub {
		host = dockerHost
	}
	if o.PlainHTTP || loopback(host) {
		scheme = "http"
	}
	client := o.Client
	if client == nil {
		client = http.DefaultClient
	}
	anonymous := *client
	anonymous.Transport = &tokens{next: client.Transport, given: map[string]string{}}
	return Registry{Client: &anonymous, URL: scheme + "://" + host, Repository: r.Repository}
}

// loopback says whether a host is this machine.
func loopback(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	addr, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return host == "localhost" || err == nil && addr.IsLoopback()
}

// maxNested is how many indexes may lead to a manifest.
const maxNested = 4

// resolve follows indexes to the manifest for this machine.
func resolve(ctx context.Context, from Blobs, digest string) (string, error) {
	for range maxNested {
		raw, err := read(ctx, from, digest, -1, standard.manifest)
		if err != nil {
			return "", err
		}
		var m struct {
			MediaType string            `json:"mediaType"`
			Manifests []v1.Descriptor   `json:"manifests"`
			Layers    []json.RawMessage `json:"layers"`
		}
		if err := decode(raw, &m); err != nil {
			return "", fmt.Errorf("parse manifest: %w", err)
		}
		if len(m.Manifests) == 0 {
			return digest, nil // Pull judges it
		}
		if digest, err = choose(m.Manifests); err != nil {
			return "", err
		}
	}
	return "", fmt.Errorf("parse manifest: more than %d indexes lead to it", maxNested)
}

// choose finds the manifest for this machine; one that names no machine is
// taken if it is the only one.
func choose(list []v1.Descriptor) (string, error) {
	var have []string
	for _, d := range list {
		if p := d.Platform; p != nil {
			if p.OS == "linux" && p.Architecture == runtime.GOARCH {
				return string(d.Digest), nil
			}
			have = append(have, fmt.Sprintf("%.32s/%.32s", p.OS, p.Architecture))
		}
	}
	if len(list) == 1 && list[0].Platform == nil {
		return string(list[0].Digest), nil
	}
	return "", fmt.Errorf("the image is for %q, this machine runs linux/%s", have, runtime.GOARCH)
}

// Manifest asks for the digest that a tag means now.
func (r Registry) Manifest(ctx context.Context, tag string) (string, error) {
	body, err := r.get(ctx, "manifests", tag)
	if err != nil {
		return "", err
	}
	defer body.Close()
	raw, err := io.ReadAll(io.LimitReader(body, standard.manifest+1))
	if err != nil {
		return "", fmt.Errorf("read manifest: %w", err)
	}
	if int64(len(raw)) > standard.manifest {
		return "", fmt.Errorf("read manifest: larger than %d bytes", standard.manifest)
	}
	return digestOf(raw), nil
}
