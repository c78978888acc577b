package registry_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content/memory"
	"oras.land/oras-go/v2/errdef"
	"oras.land/oras-go/v2/registry/remote"

	"hauberk.dev/registry"
)

const repo = "bank/web"

func open(t testing.TB) (*registry.Store, string) {
	t.Helper()
	dir := t.TempDir()
	s, err := registry.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s, dir
}

func put(t testing.TB, s *registry.Store, mediaType string, data []byte) v1.Descriptor {
	t.Helper()
	d := digest.FromBytes(data)
	if err := s.PutBlob(t.Context(), repo, d.String(), int64(len(data)), bytes.NewReader(data)); err != nil {
		t.Fatal(err)
	}
	return v1.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data))}
}

// putImage stores an image, or with a subject an artifact, and tags it.
func putImage(t testing.TB, s *registry.Store, tag, artifactType string, subject *v1.Descriptor) v1.Descriptor {
	t.Helper()
	m := v1.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, ArtifactType: artifactType, Subject: subject,
		Config: put(t, s, v1.MediaTypeImageConfig, []byte("{}")),
		Layers: []v1.Descriptor{put(t, s, v1.MediaTypeImageLayer, []byte("layer of "+tag+artifactType)), put(t, s, v1.MediaTypeImageLayer, nil)}}
	raw, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	d, err := s.PutManifest(t.Context(), repo, v1.MediaTypeImageManifest, raw)
	if err != nil {
		t.Fatal(err)
	}
	if tag != "" {
		if err := s.PutTag(t.Context(), repo, tag, d); err != nil {
			t.Fatal(err)
		}
	}
	return v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: digest.Digest(d), Size: int64(len(raw))}
}

type denied map[string]string

func (d denied) Pull(_, digest string) error {
	if why, ok := d[digest]; ok {
		return errors.New(why)
	}
	return nil
}

func serve(t testing.TB, s *registry.Store, p registry.Pulls) (*remote.Repository, string) {
	t.Helper()
	srv := httptest.NewServer(registry.Handler(s, p))
	t.Cleanup(srv.Close)
	r, err := remote.NewRepository(strings.TrimPrefix(srv.URL, "http://") + "/" + repo)
	if err != nil {
		t.Fatal(err)
	}
	r.PlainHTTP = true
	return r, srv.URL
}

// TestOras has an independent client pull, list and push.
func TestOras(t *testing.T) {
	s, _ := open(t)
	one := putImage(t, s, "1", "", nil)
	putImage(t, s, "2", "", nil)
	verdict := putImage(t, s, "", "application/vnd.test.verdict", &one)
	putImage(t, s, "", "application/vnd.test.other", &one)
	r, _ := serve(t, s, nil)
	ctx := t.Context()

	into := memory.New()
	got, err := oras.Copy(ctx, r, "1", into, "1", oras.DefaultCopyOptions)
	if err != nil || got.Digest != one.Digest {
		t.Fatalf("pull: %v, %v", got, err)
	}
	if d, err := r.Resolve(ctx, one.Digest.String()); err != nil || d.Size != one.Size {
		t.Errorf("resolve: %v, %v", d, err)
	}
	r.TagListPageSize = 1
	var tags []string
	if err := r.Tags(ctx, "", func(page []string) error { tags = append(tags, page...); return nil }); err != nil || fmt.Sprint(tags) != "[1 2]" {
		t.Errorf("tags %v, %v", tags, err)
	}
	for artifactType, want := range map[string]int{"": 2, "application/vnd.test.verdict": 1, "application/vnd.test.none": 0} {
		var found []v1.Descriptor
		if err := r.Referrers(ctx, one, artifactType, func(page []v1.Descriptor) error { found = append(found, page...); return nil }); err != nil || len(found) != want {
			t.Errorf("referrers %q: %v, %v", artifactType, found, err)
		}
		if want == 1 && found[0].Digest != verdict.Digest {
			t.Errorf("referrer is %v", found[0])
		}
	}
	if _, err := r.Resolve(ctx, "3"); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("tag 3: %v", err)
	}
	_, err = oras.Copy(ctx, into, "1", r, "3", oras.DefaultCopyOptions)
	if err == nil {
		t.Error("pushed a tag over the wire")
	}
	layer := []byte("pushed")
	if err := r.Push(ctx, v1.Descriptor{MediaType: v1.MediaTypeImageLayer, Digest: digest.FromBytes(layer), Size: 6}, bytes.NewReader(layer)); err == nil || !strings.Contains(err.Error(), "405") {
		t.Errorf("push: %v", err)
	}
}

func TestWire(t *testing.T) {
	s, dir := open(t)
	one := putImage(t, s, "1", "", nil)
	two := putImage(t, s, "2", "", nil)
	_, url := serve(t, s, denied{two.Digest.String(): "digest is revoked"})
	layer := digest.FromString("layer of 1")
	for _, c := range []struct {
		method, path string
		status       int
		want         string
	}{
		{"GET", "/v2/", 200, "{}"},
		{"GET", "/v2", 200, "{}"},
		{"HEAD", "/v2/" + repo + "/manifests/1", 200, ""},
		{"GET", "/v2/" + repo + "/manifests/" + one.Digest.String(), 200, v1.MediaTypeImageManifest},
		{"GET", "/v2/" + repo + "/blobs/" + layer.String(), 200, "layer of 1"},
		{"GET", "/v2/" + repo + "/manifests/2", 403, "digest is revoked"},
		{"GET", "/v2/" + repo + "/manifests/" + layer.String(), 404, "MANIFEST_UNKNOWN"},
		{"GET", "/v2/other/blobs/" + layer.String(), 404, "BLOB_UNKNOWN"},
		{"GET", "/v2/" + repo + "/blobs/sha512:aa", 404, "BLOB_UNKNOWN"},
		{"GET", "/v2/other/tags/list", 404, "NAME_UNKNOWN"},
		{"GET", "/v2/" + repo + "/tags/list?n=x", 400, "n="},
		{"GET", "/v2/" + repo + "/tags/list?last=1", 200, `["2"]`},
		{"GET", "/v2/" + repo + "/referrers/sha256:x", 400, "DIGEST_INVALID"},
		{"GET", "/v2/nothing/referrers/" + one.Digest.String(), 200, `"manifests":[]`},
		{"GET", "/v2/../../etc/manifests/1", 404, ""},
		{"GET", "/v2/%2e%2e/%2e%2e/manifests/1", 404, "NAME_UNKNOWN"},
		{"GET", "/v2/_catalog", 404, "NAME_UNKNOWN"},
		{"GET", "/v2/bank/_tags/manifests/1", 404, "NAME_UNKNOWN"},
		{"GET", "/v1/", 404, "/v2/"},
		{"POST", "/v2/" + repo + "/blobs/uploads/", 405, "hauberk release"},
		{"PUT", "/v2/" + repo + "/manifests/3", 405, "hauberk release"},
		{"PATCH", "/v2/" + repo + "/blobs/uploads/1", 405, "UNSUPPORTED"},
		{"DELETE", "/v2/" + repo + "/manifests/" + one.Digest.String(), 405, "UNSUPPORTED"},
	} {
		req, err := http.NewRequest(c.method, url+c.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != c.status || !strings.Contains(string(body)+resp.Header.Get("Content-Type"), c.want) {
			t.Errorf("%s %s: %s %q, %v; want %d %q", c.method, c.path, resp.Status, body, err, c.status, c.want)
		}
	}
	// A blob that rots is not served to its end.
	blob := filepath.Join(dir, "blobs/sha256", layer.Encoded())
	for _, rotten := range []string{"LAYER of 1", "layer", "layer of 1 and more"} {
		if err := os.WriteFile(blob, []byte(rotten), 0o600); err != nil {
			t.Fatal(err)
		}
		resp, err := http.Get(url + "/v2/" + repo + "/blobs/" + layer.String())
		if err == nil {
			_, err = io.ReadAll(resp.Body)
			resp.Body.Close()
		}
		if err == nil {
			t.Errorf("served %q whole", rotten)
		}
	}
	put(t, s, "", []byte("layer of 1")) // putting it again mends it
	if r, _, err := s.Blob(t.Context(), repo, layer.String()); err != nil {
		t.Error(err)
	} else if data, err := io.ReadAll(r); err != nil || string(data) != "layer of 1" {
		t.Errorf("mended: %q, %v", data, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "blobs/sha256", one.Digest.Encoded()), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Manifest(t.Context(), repo, one.Digest.String()); !errors.Is(err, registry.ErrCorrupt) {
		t.Errorf("rotten manifest: %v", err)
	}
}

func TestPutRefuses(t *testing.T) {
	s, dir := open(t)
	ctx := t.Context()
	data := []byte("content")
	good := digest.FromBytes(data).String()
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	for name, try := range map[string]func() error{
		"other content": func() error { return s.PutBlob(ctx, repo, good, 7, strings.NewReader("Content")) },
		"too short":     func() error { return s.PutBlob(ctx, repo, good, 8, bytes.NewReader(data)) },
		"too long":      func() error { return s.PutBlob(ctx, repo, good, 6, bytes.NewReader(data)) },
		"huge":          func() error { return s.PutBlob(ctx, repo, good, 1<<40, bytes.NewReader(data)) },
		"traversal":     func() error { return s.PutBlob(ctx, "../x", good, 7, bytes.NewReader(data)) },
		"inner name":    func() error { return s.PutBlob(ctx, "bank/_tags", good, 7, bytes.NewReader(data)) },
		"digest":        func() error { return s.PutBlob(ctx, repo, "sha256:../../x", 7, bytes.NewReader(data)) },
		"cancelled":     func() error { return s.PutBlob(cancelled, repo, good, 7, bytes.NewReader(data)) },
		"dangling": func() error {
			_, err := s.PutManifest(ctx, repo, v1.MediaTypeImageManifest, []byte(`{"schemaVersion":2,"config":{"digest":"`+good+`"}}`))
			return err
		},
		"unknown type": func() error { _, err := s.PutManifest(ctx, repo, "text/plain", []byte(`{}`)); return err },
		"no JSON":      func() error { _, err := s.PutManifest(ctx, repo, v1.MediaTypeImageManifest, []byte(`{`)); return err },
		"two types": func() error {
			_, err := s.PutManifest(ctx, repo, v1.MediaTypeImageIndex, []byte(`{"mediaType":"`+v1.MediaTypeImageManifest+`"}`))
			return err
		},
		"tag of nothing": func() error { return s.PutTag(ctx, repo, "1", good) },
	} {
		if err := try(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			t.Errorf("left behind: %s", p)
		}
		return nil
	})
	one := putImage(t, s, "1", "", nil)
	two := putImage(t, s, "2", "", nil)
	if err := s.PutTag(ctx, repo, "1", two.Digest.String()); !errors.Is(err, registry.ErrTagTaken) {
		t.Errorf("moving a tag: %v", err)
	}
	if err := s.PutTag(ctx, repo, "1", one.Digest.String()); err != nil {
		t.Errorf("the same tag again: %v", err)
	}
	if err := s.PutTag(ctx, repo, "../../x", one.Digest.String()); err == nil {
		t.Error("a tag that is a path")
	}
	again, err := registry.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if d, err := again.Tag(ctx, repo, "1"); err != nil || d != one.Digest.String() {
		t.Errorf("after reopening: %v, %v", d, err)
	}
}

func FuzzManifest(f *testing.F) {
	f.Add(v1.MediaTypeImageManifest, []byte(`{"schemaVersion":2,"config":{"digest":"sha256:`+strings.Repeat("0", 64)+`","size":2}}`))
	f.Add(v1.MediaTypeImageIndex, []byte(`{"schemaVersion":2,"manifests":[],"subject":{"digest":"sha256:`+strings.Repeat("0", 64)+`"}}`))
	s, _ := open(f)
	f.Fuzz(func(t *testing.T, mediaType string, raw []byte) {
		d, err := s.PutManifest(t.Context(), repo, mediaType, raw)
		if err != nil {
			return
		}
		if _, back, err := s.Manifest(t.Context(), repo, d); err != nil || !bytes.Equal(back, raw) {
			t.Fatalf("%s: %v", d, err)
		}
	})
}

func FuzzPath(f *testing.F) {
	s, _ := open(f)
	h := registry.Handler(s, nil)
	f.Add("GET", "/v2/bank/web/manifests/1")
	f.Add("PUT", "/v2/a/b/c/blobs/../../../x")
	f.Fuzz(func(t *testing.T, method, path string) {
		r := httptest.NewRequest("GET", "/", nil)
		r.Method, r.URL.Path = method, path
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code == 500 || w.Code == 200 && strings.Contains(path, "blobs") {
			t.Fatalf("%s %q: %d %s", method, path, w.Code, w.Body)
		}
	})
}
