package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// Layout is a directory in the OCI image layout.
type Layout string

// Open opens the blob a digest names.
func (l Layout) Open(_ context.Context, digest string) (io.ReadCloser, error) {
	hexa, err := parseDigest(digest)
	if err != nil {
		return nil, err
	}
	return os.OpenFile(filepath.Join(string(l), "blobs", "sha256", hexa), os.O_RDONLY|unix.O_NOFOLLOW, 0)
}

// Manifest returns the digest of the manifest the layout holds under a name
// (annotation org.opencontainers.image.ref.name). An empty name means the only
// one there is.
func (l Layout) Manifest(name string) (string, error) {
	f, err := os.Open(filepath.Join(string(l), "index.json"))
	if err != nil {
		return "", err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, standard.manifest+1))
	if err != nil {
		return "", err
	}
	if int64(len(raw)) > standard.manifest {
		return "", fmt.Errorf("read %s: larger than %d bytes", f.Name(), standard.manifest)
	}
	return named(raw, name, f.Name())
}

// Registry is a repository behind the OCI distribution protocol.
type Registry struct {
	// Client makes the requests; it carries the certificates.
	Client *http.Client
	// URL of the registry, without path.
	URL string
	// Repository such as "bank/web".
	Repository string
}

// Open asks for a blob, and for a manifest if there is no such blob: a digest
// does not tell which it names.
func (r Registry) Open(ctx context.Context, digest string) (io.ReadCloser, error) {
	if _, err := parseDigest(digest); err != nil {
		return nil, err
	}
	body, err := r.get(ctx, "manifests", digest)
	if errors.Is(err, os.ErrNotExist) {
		return r.get(ctx, "blobs", digest)
	}
	return body, err
}

func (r Registry) get(ctx context.Context, kind, digest string) (io.ReadCloser, error) {
	url := strings.TrimSuffix(r.URL, "/") + "/v2/" + r.Repository + "/" + kind + "/" + digest
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	if kind == "manifests" {
		req.Header.Set("Accept", strings.Join([]string{v1.MediaTypeImageManifest, dockerManifest, v1.MediaTypeImageIndex, dockerIndex}, ", "))
	}
	resp, err := r.Client.Do(req)
	if err != nil {
		return nil, err
	}
	switch resp.StatusCode {
	case http.StatusOK:
		return resp.Body, nil
	case http.StatusNotFound:
		resp.Body.Close()
		return nil, fmt.Errorf("GET %s: %w", url, os.ErrNotExist)
	}
	defer resp.Body.Close()
	return nil, fmt.Errorf("GET %s: %s%s", url, resp.Status, refusal(resp.Body))
}

// refusal returns what a registry says about its refusal, so that the reason
// reaches the person who waits for the image.
func refusal(body io.Reader) string {
	var e struct {
		Errors []struct{ Code, Message string }
	}
	raw, _ := io.ReadAll(io.LimitReader(body, 16<<10))
	if json.Unmarshal(raw, &e) != nil || len(e.Errors) == 0 {
		return ""
	}
	return fmt.Sprintf(": %s: %.512q", e.Errors[0].Code, e.Errors[0].Message)
}
