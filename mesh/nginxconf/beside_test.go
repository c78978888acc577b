package nginxconf

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hauberk.dev/mesh/alone"
)

const patience = 30 * time.Second

const besideConf = `
daemon off;
worker_processes 1;
pid DIR/nginx.pid;
error_log DIR/error.log;
events { worker_connections 256; }
http {
    access_log off;
    lingering_close off;
    client_body_temp_path DIR/body; proxy_temp_path DIR/proxy; fastcgi_temp_path DIR/f; uwsgi_temp_path DIR/u; scgi_temp_path DIR/s;
    client_max_body_size 1k;
    server {
        listen 127.0.0.1:PORT;
        server_name a.example *.b.example;
        root DIR/site;
        index index.html;
        location = /exact { return 200 "exact"; }
        location /api/ { proxy_pass http://UP/v2/; proxy_set_header Host $host; }
        location /text { proxy_pass http://UP; proxy_set_header Host $host; }
        location ~ ^/item/([0-9]+)$ { return 302 http://other.example/i/$1; }
        location ^~ /stop/ { return 200 "stopped"; }
        location ~* \.PNG$ { return 403; }
    }
    server {
        listen 127.0.0.1:PORT;
        server_name go.example;
        return 301 https://$host$request_uri;
    }
    proxy_set_header X-One http;
    server {
        listen 127.0.0.1:PORT;
        server_name own.example;
        proxy_set_header Host $host;
        proxy_set_header X-Two server;
        add_header X-Own server;
        location / { proxy_pass http://UP; }
        location /own { proxy_pass http://UP; proxy_set_header Host $host; add_header X-Add own; }
    }
    server {
        listen 127.0.0.1:PORT;
        server_name after.example;
        location / { proxy_pass http://UP/; }
    }
}
`

// nginxOnly are directives of this test that only nginx needs.
var nginxOnly = []string{"client_body_temp_path", "proxy_temp_path", "fastcgi_temp_path", "uwsgi_temp_path", "scgi_temp_path", "lingering_close"}

// TestBesideNginx asks nginx and the proxy with its configuration the same.
func TestBesideNginx(t *testing.T) {
	nginx, err := exec.LookPath("/usr/sbin/nginx")
	if err != nil {
		t.Fatalf("nginx is not here to compare with (apt-get install nginx-light): %v", err)
	}
	dir, err := os.MkdirTemp("", "xnginx")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	os.Chmod(dir, 0o755)
	os.MkdirAll(filepath.Join(dir, "site/sub"), 0o755)
	for name, text := range map[string]string{"index.html": "front", "a.txt": "0123456789", "sub/index.html": "sub", "with space.txt": "space"} {
		if err := os.WriteFile(filepath.Join(dir, "site", name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		host := r.Host
		if r.Header.Get("X-One") != "" {
			host = "" // the upstream's name, which is not the same
		}
		fmt.Fprintf(w, "%s %s %s %s %s %s", r.Method, r.RequestURI, host, b, r.Header["X-One"], r.Header["X-Two"])
	}))
	t.Cleanup(up.Close)
	port := free(t)
	conf := strings.NewReplacer("DIR", dir, "PORT", port, "UP", strings.TrimPrefix(up.URL, "http://")).Replace(besideConf)
	start(t, nginx, dir, conf, port)
	ours := serve(t, dir, conf, port)
	for _, request := range besides {
		theirs := exchange(t, "127.0.0.1:"+port, request)
		got := exchange(t, ours, request)
		if got != strings.ReplaceAll(theirs, ":"+port, "") && got != theirs {
			t.Errorf("%q:\nnginx %q\nours  %q", request, theirs, got)
		}
	}
	for _, request := range stricter {
		theirs, got := exchange(t, "127.0.0.1:"+port, request), exchange(t, ours, request)
		if !strings.HasPrefix(got, "4") {
			t.Errorf("%q: %q, nginx %q", request, got, theirs)
		}
	}
}

const closing = "Connection: close\r\n\r\n"

// besides are requests that both must answer alike.
var besides = []string{
	"GET / HTTP/1.1\r\nHost: a.example\r\n" + closing,
	"HEAD / HTTP/1.1\r\nHost: a.example\r\n" + closing,
	"GET /a.txt HTTP/1.1\r\nHost: x.b.example\r\n" + closing,
	"GET /a.txt HTTP/1.1\r\nHost: a.example\r\nRange: bytes=2-5\r\n" + closing,
	"GET /a.txt HTTP/1.1\r\nHost: a.example\r\nRange: bytes=-3\r\n" + closing,
	"GET /a.txt HTTP/1.1\r\nHost: a.example\r\nRange: bytes=50-\r\n" + closing,
	"GET /a.txt HTTP/1.0\r\n\r\n",
	"GET /sub/ HTTP/1.1\r\nHost: a.example\r\n" + closing,
	"GET /with%20space.txt HTTP/1.1\r\nHost: a.example\r\n" + closing,
	"GET /missing HTTP/1.1\r\nHost: a.example\r\n" + closing,
	"GET /exact HTTP/1.1\r\nHost: a.example\r\n" + closing,
	"GET /exact?q HTTP/1.1\r\nHost: A.EXAMPLE\r\n" + closing,
	"GET /api/x?y=1 HTTP/1.1\r\nHost: a.example\r\n" + closing,
	"POST /api/ HTTP/1.1\r\nHost: a.example\r\nContent-Length: 4\r\n" + closing + "body",
	"POST /text HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n" + closing + "4\r\nbody\r\n0\r\n\r\n",
	"GET /textual HTTP/1.1\r\nHost: a.example\r\n" + closing,
	"GET /item/42 HTTP/1.1\r\nHost: a.example\r\n" + closing,
	"GET /item/x HTTP/1.1\r\nHost: a.example\r\n" + closing,
	"GET /stop/x.png HTTP/1.1\r\nHost: a.example\r\n" + closing,
	"GET /x.png HTTP/1.1\r\nHost: a.example\r\n" + closing,
	"GET /go?x=1 HTTP/1.1\r\nHost: go.example\r\n" + closing,
	"GET / HTTP/1.1\r\nHost: own.example\r\n" + closing,
	"GET /own HTTP/1.1\r\nHost: own.example\r\n" + closing,
	"GET / HTTP/1.1\r\nHost: after.example\r\n" + closing,
	"GET / HTTP/1.1\r\nHost: unknown.example\r\n" + closing,
	"POST /api/ HTTP/1.1\r\nHost: a.example\r\nContent-Length: 2000\r\n" + closing,
	"GET / HTTP/1.1\r\n" + closing,
	"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n" + closing,
	"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n" + closing,
	"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n" + closing + "0\r\n\r\n",
	"GET /../../etc/passwd HTTP/1.1\r\nHost: a.example\r\n" + closing,
}

// stricter are requests that we refuse, whatever nginx makes of them.
var stricter = []string{
	"GET / HTTP/1.1\nHost: a.example\nConnection: close\n\n",
	"GET /x/../a.txt HTTP/1.1\r\nHost: a.example\r\n" + closing,
	"GET /stop%2Fx HTTP/1.1\r\nHost: a.example\r\n" + closing,
	"GET /api%2fx HTTP/1.1\r\nHost: a.example\r\n" + closing,
	"POST /text HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked, identity\r\n" + closing,
	"GET http://b.example/ HTTP/1.1\r\nHost: a.example\r\n" + closing,
	"GET / HTTP/1.1\r\nHost: a.example\r\nX : y\r\n" + closing,
}

// exchange sends bytes and says what of the answer must be alike: the status,
// where it redirects to, the range, the length, and the body of what went well.
func exchange(t *testing.T, address, request string) string {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	io.WriteString(c, request)
	b, _ := io.ReadAll(c)
	head, body, _ := strings.Cut(string(b), "\r\n\r\n")
	lines := strings.Split(head, "\r\n")
	parts := strings.SplitN(lines[0], " ", 3)
	if len(parts) < 2 {
		return "nothing"
	}
	out := parts[1]
	ok := parts[1][0] == '2'
	chunked := false
	for _, l := range lines[1:] {
		name, value, _ := strings.Cut(l, ": ")
		switch strings.ToLower(name) {
		case "location", "content-range", "x-own", "x-add":
			out += " " + value
		case "transfer-encoding":
			chunked = true
		}
	}
	if ok && !chunked {
		out += " " + body
	}
	return out
}

func free(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	return port
}

// start runs nginx to the end of the test.
func start(t *testing.T, nginx, dir, conf, port string) {
	t.Helper()
	file := filepath.Join(dir, "nginx.conf")
	if os.Geteuid() == 0 {
		conf = "user root;\n" + conf
	}
	if err := os.WriteFile(file, []byte(conf), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(nginx, "-p", dir, "-c", file, "-e", filepath.Join(dir, "error.log"))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Signal(os.Interrupt); cmd.Wait() })
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		if c, err := net.Dial("tcp", "127.0.0.1:"+port); err == nil {
			c.Close()
			return
		}
		if time.Now().After(deadline) {
			log, _ := os.ReadFile(filepath.Join(dir, "error.log"))
			t.Fatalf("nginx does not serve:\n%s", log)
		}
	}
}

// serve runs the proxy with the same configuration, on another port.
func serve(t *testing.T, dir, conf, port string) string {
	t.Helper()
	text, problems, err := Convert(conf)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		known := false
		for _, n := range nginxOnly {
			known = known || strings.Contains(p.Why, n)
		}
		if !known {
			t.Error(p)
		}
	}
	c, err := alone.Parse("proxy.yaml", dir, []byte(strings.ReplaceAll(text, `"127.0.0.1:`+port+`"`, `"127.0.0.1:0"`)))
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	p, err := alone.Open(c, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return p.Address("listen-127.0.0.1:" + port).String()
}
