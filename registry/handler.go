package registry

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

func digestType(s string) digest.Digest { return digest.Digest(s) }

// Pulls says whether a manifest may be pulled now. A nil error allows.
type Pulls interface {
	Pull(repository, digest string) error
}

// Handler serves the OCI distribution protocol below /v2/, read only. If
// pulls is not nil it is asked before a manifest is served.
func Handler(s *Store, pulls Pulls) http.Handler { return &handler{s, pulls} }

type handler struct {
	store *Store
	pulls Pulls
}

// refusal is a distribution error: a code of the specification and words.
type refusal struct {
	status  int
	code    string
	message string
}

func (r *refusal) Error() string { return r.message }

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Docker-Distribution-API-Version", "registry/2.0")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if err := h.serve(w, r); err != nil {
		fail(w, err)
	}
}

func (h *handler) serve(w http.ResponseWriter, r *http.Request) error {
	rest, ok := strings.CutPrefix(r.URL.Path, "/v2")
	if !ok || rest != "" && rest[0] != '/' {
		return &refusal{http.StatusNotFound, "NOT_FOUND", "this registry serves /v2/"}
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		return &refusal{http.StatusMethodNotAllowed, "UNSUPPORTED", "images enter only through the gate: use hauberk release; this registry takes no pushes and deletes nothing"}
	}
	if rest == "" || rest == "/" {
		w.Header().Set("Content-Type", "application/json")
		_, err := io.WriteString(w, "{}")
		return err
	}
	repository, kind, ref, ok := split(strings.TrimPrefix(rest, "/"))
	if !ok {
		return &refusal{http.StatusNotFound, "NAME_UNKNOWN", fmt.Sprintf("%.300q is not a path of the distribution protocol", r.URL.Path)}
	}
	switch kind {
	case "manifests":
		return h.manifest(w, r, repository, ref)
	case "blobs":
		return h.blob(w, r, repository, ref)
	case "referrers":
		return h.referrers(w, r, repository, ref)
	}
	return h.tags(w, r, repository)
}

// split takes <name>/<kind>/<reference> apart from the end, since the name
// has slashes.
func split(path string) (repository, kind, ref string, ok bool) {
	parts := strings.Split(path, "/")
	if len(parts) < 3 {
		return "", "", "", false
	}
	n := len(parts)
	repository, kind, ref = strings.Join(parts[:n-2], "/"), parts[n-2], parts[n-1]
	known := kind == "tags" && ref == "list" || kind == "manifests" || kind == "blobs" || kind == "referrers"
	return repository, kind, ref, known && checkNames(repository) == nil
}

func (h *handler) manifest(w http.ResponseWriter, r *http.Request, repository, ref string) error {
	digest := ref
	if !digestPattern.MatchString(ref) {
		var err error
		if digest, err = h.store.Tag(r.Context(), repository, ref); err != nil {
			return notFound(err, "MANIFEST_UNKNOWN")
		}
	}
	mediaType, raw, err := h.store.Manifest(r.Context(), repository, digest)
	if err != nil {
		return notFound(err, "MANIFEST_UNKNOWN")
	}
	if h.pulls != nil {
		if err := h.pulls.Pull(repository, digest); err != nil {
			return &refusal{http.StatusForbidden, "DENIED", err.Error()}
		}
	}
	w.Header().Set("Content-Type", mediaType)
	w.Header().Set("Content-Length", strconv.Itoa(len(raw)))
	w.Header().Set("Docker-Content-Digest", digest)
	if r.Method == http.MethodHead {
		return nil
	}
	_, err = w.Write(raw)
	return cut(err)
}

func (h *handler) blob(w http.ResponseWriter, r *http.Request, repository, digest string) error {
	blob, size, err := h.store.Blob(r.Context(), repository, digest)
	if err != nil {
		return notFound(err, "BLOB_UNKNOWN")
	}
	defer blob.Close()
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Length", strconv.FormatInt(size, 10))
	w.Header().Set("Docker-Content-Digest", digest)
	if r.Method == http.MethodHead {
		return nil
	}
	_, err = io.Copy(w, blob)
	return cut(err)
}

// cut ends the connection once the answer has begun: the client must not take
// a part for the whole.
func cut(err error) error {
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	return nil
}

func (h *handler) referrers(w http.ResponseWriter, r *http.Request, repository, digest string) error {
	if !digestPattern.MatchString(digest) {
		return &refusal{http.StatusBadRequest, "DIGEST_INVALID", fmt.Sprintf("digest %.100q is not of the form %s", digest, digestPattern)}
	}
	artifactType := r.URL.Query().Get("artifactType")
	list, err := h.store.Referrers(r.Context(), repository, digest, artifactType)
	if err != nil {
		return err
	}
	if artifactType != "" {
		w.Header().Set("OCI-Filters-Applied", "artifactType")
	}
	w.Header().Set("Content-Type", v1.MediaTypeImageIndex)
	return cut(json.NewEncoder(w).Encode(v1.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Manifests: list}))
}

func (h *handler) tags(w http.ResponseWriter, r *http.Request, repository string) error {
	list, err := h.store.Tags(r.Context(), repository)
	if err != nil {
		return notFound(err, "NAME_UNKNOWN")
	}
	q := r.URL.Query()
	if last := q.Get("last"); last != "" {
		at, found := slices.BinarySearch(list, last)
		if found {
			at++
		}
		list = list[at:]
	}
	if s := q.Get("n"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < 0 {
			return &refusal{http.StatusBadRequest, "UNSUPPORTED", fmt.Sprintf("n=%.40q is not a number of tags", s)}
		}
		if n < len(list) {
			list = list[:n]
			if n > 0 {
				next := url.Values{"n": {s}, "last": {list[n-1]}}
				w.Header().Set("Link", fmt.Sprintf(`</v2/%s/tags/list?%s>; rel="next"`, repository, next.Encode()))
			}
		}
	}
	if list == nil {
		list = []string{}
	}
	w.Header().Set("Content-Type", "application/json")
	return cut(json.NewEncoder(w).Encode(map[string]any{"name": repository, "tags": list}))
}

func notFound(err error, code string) error {
	if errors.Is(err, ErrNotFound) {
		return &refusal{http.StatusNotFound, code, err.Error()}
	}
	return err
}

func fail(w http.ResponseWriter, err error) {
	var r *refusal
	if !errors.As(err, &r) {
		r = &refusal{http.StatusInternalServerError, "UNKNOWN", err.Error()}
	}
	w.Header().Del("Content-Length")
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(r.status)
	json.NewEncoder(w).Encode(map[string]any{"errors": []map[string]string{{"code": r.code, "message": r.message}}})
}
