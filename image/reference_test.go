package image

import (
	"archive/tar"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

func TestParseReference(t *testing.T) {
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	digest := store{}.put([]byte("x"))
	for given, want := range map[string]string{
		"busybox":                         "docker.io/library/busybox:latest",
		"busybox:1.36":                    "docker.io/library/busybox:1.36",
		"bank/web@" + digest:              "docker.io/bank/web@" + digest,
		"index.docker.io/a/b":             "docker.io/a/b:latest",
		"localhost/x":                     "localhost/x:latest",
		"127.0.0.1:5000/x/y:2":            "127.0.0.1:5000/x/y:2",
		"docker://quay.io/x/y":            "quay.io/x/y:latest",
		"oci:dir":                         "oci:" + wd + "/dir",
		"oci:/a/../dir:name":              "oci:/dir:name",
		"docker-archive:/x.tar:busybox:1": "docker-archive:/x.tar:busybox:1",
		"oci-archive:/x.tar":              "oci-archive:/x.tar",
	} {
		if r, err := ParseReference(given); err != nil || r.String() != want {
			t.Errorf("%s: %s, %v, want %s", given, r, err, want)
		}
	}
	for _, bad := range []string{"", "Busybox", "a//b", "a:", "a:b c", "a@sha256:1", "oci:", "http://x/y", "/x", "a/../b", "-x", "a:" + strings.Repeat("x", 129)} {
		if r, err := ParseReference(bad); err == nil {
			t.Errorf("%q became %s", bad, r)
		}
	}
	if r, err := ParseReference("busybox"); err != nil || r.Short() != "busybox:latest" {
		t.Errorf("%s, %v", r.Short(), err)
	}
}

func FuzzReference(f *testing.F) {
	f.Add("a/b:c@sha256:0")
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ParseReference(s)
		if err != nil || r.From != FromRegistry {
			return
		}
		if again, err := ParseReference(r.String()); err != nil || again != r {
			t.Errorf("%q became %+v, then %+v, %v", s, r, again, err)
		}
	})
}

// pullReference opens what a reference names and packs it.
func pullReference(t *testing.T, text string, o OpenOptions) (Image, error) {
	t.Helper()
	r, err := ParseReference(text)
	if err != nil {
		t.Fatal(err)
	}
	s, err := r.Open(t.Context(), o)
	if err != nil {
		return Image{}, err
	}
	defer s.Close()
	return Pull(t.Context(), s, s.Digest, t.TempDir())
}

// TestArchives reads the same image from a layout, a tar of it, and what
// docker save makes, old and new.
func TestArchives(t *testing.T) {
	s := store{}
	layer := archive(t, passwd, group)
	d := s.image(t, layer)
	want := pullForTest(t, s, d)
	index := fmt.Sprintf(`{"manifests":[{"digest":%q,"annotations":{"org.opencontainers.image.ref.name":"1","io.containerd.image.name":"docker.io/x/y:1"}}]}`, d)
	files := []tar.Header{{Name: "index.json", Uname: index}}
	for digest, content := range s {
		files = append(files, tar.Header{Name: "blobs/sha256/" + strings.TrimPrefix(digest, "sha256:"), Uname: string(content)})
	}
	config := encode(map[string]any{
		"os": "linux", "architecture": runtime.GOARCH, "config": map[string]any{"User": "app"},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{digestOf(layer), digestOf(layer)}},
	})
	docker := archive(t,
		tar.Header{Name: "c.json", Uname: string(config)}, tar.Header{Name: "one/layer.tar", Uname: string(layer)},
		tar.Header{Name: "two/layer.tar", Typeflag: tar.TypeSymlink, Linkname: "../one/layer.tar"},
		tar.Header{Name: "manifest.json", Uname: `[{"Config":"c.json","RepoTags":["x:latest","y:2"],"Layers":["one/layer.tar","./two/layer.tar"]}]`})
	dir := t.TempDir()
	write := func(name string, raw []byte) string {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	oci, saved := write("oci.tar", archive(t, files...)), write("docker.tar", docker)
	write("l/index.json", []byte(index))
	for digest, content := range s {
		write("l/blobs/sha256/"+strings.TrimPrefix(digest, "sha256:"), content)
	}
	for _, ref := range []string{"oci:" + dir + "/l", "oci:" + dir + "/l:1", "oci:" + dir + "/l:docker.io/x/y:1", "oci-archive:" + oci, "oci-archive:" + oci + ":1"} {
		if img, err := pullReference(t, ref, OpenOptions{}); err != nil || img.Digest != d || img.ErofsSHA256 != want.ErofsSHA256 {
			t.Errorf("%s: %+v, %v", ref, img, err)
		}
	}
	for _, ref := range []string{"docker-archive:" + saved, "docker-archive:" + saved + ":x", "docker-archive:" + saved + ":y:2"} {
		img, err := pullReference(t, ref, OpenOptions{})
		if err != nil || img.Config.UID != 1000 {
			t.Errorf("%s: %+v, %v", ref, img, err)
			continue
		}
		again, err := img.As("root:log")
		if err != nil || again.UID != 0 || again.GID != 44 || again.Home != "/" {
			t.Errorf("as another user: %+v, %v", again, err)
		}
		if _, err := img.As("nobody"); err == nil {
			t.Error("a user that is not there was found")
		}
	}
	for ref, want := range map[string]string{
		"docker-archive:" + saved + ":z":        `0 images are called "z"; it has ["x:latest" "y:2"]`,
		"docker-archive:" + oci:                 `holds no "manifest.json"`,
		"oci-archive:" + saved:                  `holds no "index.json"`,
		"oci-archive:" + oci + ":2":             `no manifest is named "2"; it has ["docker.io/x/y:1"]`,
		"oci:" + dir + "/none":                  "no such file",
		"oci-archive:" + dir:                    "it is no file",
		"oci-archive:" + write("z", zip(nil)):   "gunzip",
		"docker-archive:" + write("empty", nil): "EOF",
		"docker-archive:" + write("lost", archive(t, tar.Header{Name: "manifest.json", Uname: `[{"Config":"../../etc/passwd","Layers":[]}]`})): `holds no "../../etc/passwd"`,
	} {
		if _, err := pullReference(t, ref, OpenOptions{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", ref, err, want)
		}
	}
}

// TestTags pulls by a tag through indexes from a registry that wants a token.
func TestTags(t *testing.T) {
	s := store{}
	d := s.image(t, archive(t, passwd))
	other := s.put([]byte(`{"schemaVersion":2,"layers":[]}`))
	index := s.put(fmt.Appendf(nil, `{"schemaVersion":2,"manifests":[{"digest":%q,"platform":{"os":"windows","architecture":"amd64"}},{"digest":%q,"platform":{"os":"linux","architecture":%q}}]}`, other, d, runtime.GOARCH))
	tags := map[string]string{"1": s.put(fmt.Appendf(nil, `{"manifests":[{"digest":%q}]}`, index)),
		"foreign": s.put(fmt.Appendf(nil, `{"manifests":[{"digest":%q,"platform":{"os":"plan9","architecture":"mips"}}]}`, d))}
	loop := "sha256:" + strings.Repeat("0", 64)
	asked := 0
	var srv *httptest.Server
	srv = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/token" {
			asked++
			fmt.Fprintf(w, `{"access_token":"for %s"}`, r.FormValue("scope"))
			return
		}
		if r.Header.Get("Authorization") != "Bearer for pull" {
			w.Header().Set("WWW-Authenticate", `Bearer realm="`+srv.URL+`/token",service="x",scope="pull"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		name := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
		if to, ok := tags[name]; ok {
			name = to
		}
		content, ok := s[name]
		if !ok || !strings.HasPrefix(r.URL.Path, "/v2/x/y/") {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		w.Write(content)
	}))
	defer srv.Close()
	at := strings.TrimPrefix(srv.URL, "http://") + "/x/y"
	for _, ref := range []string{at + ":1", at + "@" + d, at + ":1@" + index} {
		if img, err := pullReference(t, ref, OpenOptions{}); err != nil || img.Digest != d {
			t.Errorf("%s: %+v, %v", ref, img, err)
		}
	}
	if asked != 3 {
		t.Errorf("%d tokens were asked for, want one for each image", asked)
	}
	for ref, want := range map[string]string{
		at + ":2":       "file does not exist",
		at + ":foreign": `the image is for ["plan9/mips"]`,
		at + "@" + loop: "file does not exist",
	} {
		if _, err := pullReference(t, ref, OpenOptions{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", ref, err, want)
		}
	}
	if loopback("10.0.0.1:5000") || !loopback("[::1]:5000") || !loopback("localhost:1") || loopback("localhost.example") {
		t.Error("what is this machine and what is not is mistaken")
	}
}

// TestTokensAreNotSentAstray refuses a registry with TLS that names one without.
func TestTokensAreNotSentAstray(t *testing.T) {
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		t.Error("asked without TLS")
		io.WriteString(w, `{"token":"x"}`)
	}))
	defer plain.Close()
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("WWW-Authenticate", `Bearer realm="`+plain.URL+`"`)
		w.WriteHeader(http.StatusUnauthorized)
	}))
	defer srv.Close()
	client := *srv.Client()
	client.Transport = &tokens{next: client.Transport, given: map[string]string{}}
	if _, err := (Registry{Client: &client, URL: srv.URL, Repository: "x"}).Manifest(t.Context(), "1"); err == nil || !strings.Contains(err.Error(), "sends us to") {
		t.Errorf("got %v", err)
	}
}

// FuzzArchive opens arbitrary archives and pulls what they say they hold.
func FuzzArchive(f *testing.F) {
	layer := archive(f, passwd)
	config := encode(map[string]any{"os": "linux", "architecture": runtime.GOARCH, "rootfs": map[string]any{"type": "layers", "diff_ids": []string{digestOf(layer)}}})
	f.Add(archive(f, tar.Header{Name: "c.json", Uname: string(config)}, tar.Header{Name: "l/layer.tar", Uname: string(layer)},
		tar.Header{Name: "manifest.json", Uname: `[{"Config":"c.json","RepoTags":["x:latest"],"Layers":["l/layer.tar"]}]`}))
	f.Add(archive(f, tar.Header{Name: "manifest.json", Uname: `[{"Config":"../c","Layers":["a","a"]}]`}, tar.Header{Name: "a", Typeflag: tar.TypeSymlink, Linkname: "a"}))
	s := store{}
	d := s.image(f, layer)
	files := []tar.Header{{Name: "index.json", Uname: fmt.Sprintf(`{"manifests":[{"digest":%q}]}`, d)}}
	for digest, content := range s {
		files = append(files, tar.Header{Name: "blobs/sha256/" + strings.TrimPrefix(digest, "sha256:"), Uname: string(content)})
	}
	f.Add(archive(f, files...))
	f.Fuzz(func(t *testing.T, raw []byte) {
		name := filepath.Join(t.TempDir(), "a.tar")
		if err := os.WriteFile(name, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, kind := range []string{"docker-archive:", "oci-archive:"} {
			if img, err := pullReference(t, kind+name, OpenOptions{}); err == nil && Verify(img.Path, img.ErofsSHA256) != nil {
				t.Errorf("%s: pulled %+v", kind, img)
			}
		}
	})
}
