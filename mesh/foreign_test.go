package mesh

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"hauberk.dev/plan"
)

// runIn runs a program in a guest, or beside it if there is none, to its end.
func runIn(t *testing.T, b *box, name string, args ...string) (out []byte, err error) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	var all bytes.Buffer
	cmd.Stdout, cmd.Stderr, cmd.Dir = &all, &all, t.TempDir()
	if b == nil {
		err = cmd.Start()
	} else {
		err = b.guest.Do(cmd.Start)
	}
	if err == nil {
		err = cmd.Wait()
	}
	return all.Bytes(), err
}

// TestCurlAndH2load: Debian's clients, through the mesh, in both versions of HTTP.
func TestCurlAndH2load(t *testing.T) {
	for _, program := range []string{"/usr/bin/curl", "/usr/bin/h2load"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("%v (apt-get install curl nghttp2-client)", err)
		}
	}
	w := newWorld(t)
	web := w.add("web", nil, nil, nil)
	shop := w.add("shop", httpPort, anyone(), []plan.Rule{{Name: "shop/secret", From: []string{"*"}, Paths: []string{"/secret"}}})
	w.apply()
	srv := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s %s %d\n", r.Proto, r.Method, r.URL, len(b))
	})}
	srv.Protocols.SetHTTP1(true)
	srv.Protocols.SetUnencryptedHTTP2(true)
	go srv.Serve(shop.listen(t, 8080))
	t.Cleanup(func() { srv.Close() })
	url := "http://" + w.service("shop").Address.String() + ":8080"
	t.Run("curl", func(t *testing.T) { curl(t, web, url) })
	t.Run("h2load", func(t *testing.T) { h2load(t, web, url) })
}

func curl(t *testing.T, web *box, url string) {
	file := filepath.Join(t.TempDir(), "body")
	if err := os.WriteFile(file, bytes.Repeat([]byte("b"), 3<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		out  string
		one  bool // HTTP/1 only
	}{
		{[]string{url + "/a"}, " GET /a 0\n200", false},
		{[]string{"--data-binary", "@" + file, url + "/up"}, " POST /up 3145728\n200", false},
		{[]string{"-T", file, "-H", "Transfer-Encoding: chunked", url + "/chunks"}, " PUT /chunks 3145728\n200", false},
		{[]string{"-T", file, "-H", "Expect: 100-continue", url + "/expect"}, " PUT /expect 3145728\n200", false},
		{[]string{"-I", url + "/head"}, "200", false},
		{[]string{"-X", "DELETE", url + "/d?x=y"}, " DELETE /d?x=y 0\n200", false},
		{[]string{url + "/secret"}, "403", false},
		// By HTTP/2 with prior knowledge Debian's curl does not use a connection
		// twice, with or without a proxy.
		{[]string{url + "/one", url + "/two"}, " GET /two 0\n200", true},
	} {
		for version, proto := range map[string]string{"--http1.1": "HTTP/1.1", "--http2-prior-knowledge": "HTTP/2"} {
			if c.one && proto == "HTTP/2" {
				continue
			}
			out, err := runIn(t, web, "/usr/bin/curl", append([]string{"-s", "-S", version, "--max-time", "60", "-w", "%{http_code}"}, c.args...)...)
			if err != nil || !strings.HasSuffix(string(out), c.out) || !strings.Contains(string(out), proto) && c.out != "403" {
				t.Errorf("curl %s %q: %v: %s", version, c.args, err, out)
			}
		}
	}
}

var loaded = regexp.MustCompile(`requests: (\d+) total, \d+ started, \d+ done, (\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout`)

func h2load(t *testing.T, web *box, url string) {
	file := filepath.Join(t.TempDir(), "body")
	if err := os.WriteFile(file, bytes.Repeat([]byte("b"), 200_000), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"-n", "5000", "-c", "20", "-m", "50"}, {"-n", "2000", "-c", "10", "--h1"}, {"-n", "500", "-c", "4", "-m", "10", "-d", file}} {
		out, err := runIn(t, web, "/usr/bin/h2load", append(args, url+"/")...)
		m := loaded.FindStringSubmatch(string(out))
		if err != nil || m == nil || m[1] != m[2] || m[3] != "0" || m[4] != "0" || m[5] != "0" {
			t.Errorf("h2load %q: %v: %s", args, err, out)
			continue
		}
		t.Logf("h2load %q: %s", args, m[0])
	}
}
