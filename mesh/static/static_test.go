package static

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hauberk.dev/mesh/http1"
)

func asked(t testing.TB, method string, fields ...string) *http1.Message {
	t.Helper()
	m := &http1.Message{}
	if err := m.Request([]byte(method + " / HTTP/1.1\r\nHost: a\r\n" + strings.Join(append(fields, ""), "\r\n") + "\r\n")); err != nil {
		t.Fatal(err)
	}
	return m
}

// site is a directory with everything that may be in one.
func site(t *testing.T) (root string) {
	t.Helper()
	root = filepath.Join(t.TempDir(), "site")
	outside := filepath.Join(filepath.Dir(root), "outside")
	for name, text := range map[string]string{
		root + "/index.html": "index", root + "/a/index.html": "a", root + "/b/x.txt": "0123456789", root + "/.git/config": "secret",
		root + "/.well-known/acme": "token", root + "/b/.hidden": "secret", outside + "/secret": "secret",
	} {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for link, to := range map[string]string{"out": "../outside", "abs": outside + "/secret", "in": "b/x.txt", "loop": "loop"} {
		if err := os.Symlink(to, filepath.Join(root, link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(root+"/fifo", 0o644); err != nil {
		t.Fatal(err)
	}
	return root
}

func TestFiles(t *testing.T) {
	d, err := Open(site(t), []string{"index.html"}, "")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for path, want := range map[string]string{
		"/": "200 index", "/index.html": "200 index", "/a/": "200 a", "/a": "301 ", "/b/": "404 ", "/b/x.txt": "200 0123456789", "/b/x.txt/": "404 ",
		"/none": "404 ", "/.git/config": "404 ", "/b/.hidden": "404 ", "/.well-known/acme": "200 token", "/in": "200 0123456789",
		"/out/secret": "404 ", "/abs": "404 ", "/loop": "404 ", "/fifo": "404 ", "/../outside/secret": "404 ", "/a/../../outside/secret": "404 ",
		"/b/x.txt\x00": "404 ", "": "301 ",
	} {
		if got := said(t, d.Answer(path, asked(t, "GET"))); got != want {
			t.Errorf("%q: %q, want %q", path, got, want)
		}
	}
	if got := said(t, d.Answer("/index.html", asked(t, "POST"))); got != "405 " {
		t.Errorf("POST: %q", got)
	}
	tried, err := Open(site(t), nil, "/index.html")
	if err != nil {
		t.Fatal(err)
	}
	defer tried.Close()
	for path, want := range map[string]string{"/none": "200 index", "/out/secret": "200 index", "/b/x.txt": "200 0123456789"} {
		if got := said(t, tried.Answer(path, asked(t, "GET"))); got != want {
			t.Errorf("%q, with a file for what is not there: %q, want %q", path, got, want)
		}
	}
	if _, err := Open(filepath.Join(t.TempDir(), "none"), nil, ""); err == nil {
		t.Error("what is not there was opened")
	}
}

// said is the status and what of the file would be sent.
func said(t *testing.T, a Answer) string {
	t.Helper()
	defer a.Close()
	status := string(rune('0'+a.Status/100)) + string(rune('0'+a.Status/10%10)) + string(rune('0'+a.Status%10)) + " "
	if a.File == nil || a.N == 0 {
		return status
	}
	raw, err := io.ReadAll(io.NewSectionReader(a.File, a.From, a.N))
	if err != nil {
		t.Fatal(err)
	}
	return status + string(raw)
}

func TestConditionsAndRanges(t *testing.T) {
	root := site(t)
	when := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	if err := os.Chtimes(root+"/b/x.txt", when, when); err != nil {
		t.Fatal(err)
	}
	d, err := Open(root, nil, "")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	whole := d.Answer("/b/x.txt", asked(t, "GET"))
	defer whole.Close()
	tag, at := whole.ETag, when.Format(TimeFormat)
	before := when.Add(-time.Hour).Format(TimeFormat)
	for _, c := range []struct {
		fields []string
		want   string
	}{
		{[]string{"If-None-Match: " + tag}, "304 "},
		{[]string{"If-None-Match: \"x\", W/" + tag}, "304 "},
		{[]string{"If-None-Match: *"}, "304 "},
		{[]string{`If-None-Match: "x"`, "If-Modified-Since: " + at}, "200 0123456789"}, // the tag decides
		{[]string{"If-Modified-Since: " + at}, "304 "},
		{[]string{"If-Modified-Since: " + before}, "200 0123456789"},
		{[]string{"If-Modified-Since: yesterday"}, "200 0123456789"},
		{[]string{`If-Match: "x"`}, "412 "},
		{[]string{"If-Match: W/" + tag}, "412 "}, // strongly
		{[]string{"If-Match: " + tag}, "200 0123456789"},
		{[]string{"If-Unmodified-Since: " + before}, "412 "},
		{[]string{"Range: bytes=2-4"}, "206 234"},
		{[]string{"Range: bytes=7-"}, "206 789"},
		{[]string{"Range: bytes=-3"}, "206 789"},
		{[]string{"Range: bytes=-99"}, "206 0123456789"},
		{[]string{"Range: bytes=5-99"}, "206 56789"},
		{[]string{"Range: bytes=10-"}, "416 "},
		{[]string{"Range: bytes=-0"}, "416 "},
		{[]string{"Range: bytes=4-2"}, "200 0123456789"},
		{[]string{"Range: bytes=0-1,3-4"}, "200 0123456789"},
		{[]string{"Range: bytes=99999999999999999999-"}, "200 0123456789"},
		{[]string{"Range: lines=1-2"}, "200 0123456789"},
		{[]string{"Range: bytes=0-1", "If-Range: " + tag}, "206 01"},
		{[]string{"Range: bytes=0-1", `If-Range: "x"`}, "200 0123456789"},
		{[]string{"Range: bytes=0-1", "If-Range: " + before}, "200 0123456789"},
	} {
		if got := said(t, d.Answer("/b/x.txt", asked(t, "GET", c.fields...))); got != c.want {
			t.Errorf("%q: %q, want %q", c.fields, got, c.want)
		}
	}
}
