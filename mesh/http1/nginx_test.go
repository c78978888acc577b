package http1

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// nginxConf tells a recorder how nginx has cut a connection into requests: each
// becomes one POST with the body it had and nothing of its head but what is said.
const nginxConf = `
daemon off;
master_process off;
worker_processes 1;
pid DIR/pid;
error_log DIR/error.log crit;
events { worker_connections 512; }
http {
    access_log off;
    client_body_temp_path DIR/body; proxy_temp_path DIR/proxy; fastcgi_temp_path DIR/f; uwsgi_temp_path DIR/u; scgi_temp_path DIR/s;
    client_max_body_size 0;
    client_body_buffer_size 128k;
    large_client_header_buffers 4 64k;
    lingering_timeout 1s;
    server {
        listen 127.0.0.1:PORT;
        location / {
            rewrite ^ /seen break;
            proxy_pass http://UP;
            proxy_ignore_client_abort on; # half a close is none
            proxy_method POST;
            proxy_pass_request_headers off;
            proxy_set_header X-Line $request;
            proxy_set_header X-Host $host;
        }
    }
}
`

// nginx is one that runs, with the recorder behind it.
type nginx struct {
	address string
	mu      sync.Mutex
	all     map[int]seen
	next    int
}

// startNginx starts nginx, which ends with the test or with this process.
func startNginx(t testing.TB) *nginx {
	t.Helper()
	program, err := exec.LookPath("/usr/sbin/nginx")
	if err != nil {
		t.Skipf("nginx is not here to compare with (apt-get install nginx-light): %v", err)
	}
	n := &nginx{all: map[int]seen{}}
	up, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { up.Close() })
	go n.record(up)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n.address = ln.Addr().String()
	ln.Close()
	dir, err := os.MkdirTemp("", "xnginx")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	_, port, _ := net.SplitHostPort(n.address)
	conf := strings.NewReplacer("DIR", dir, "PORT", port, "UP", up.Addr().String()).Replace(nginxConf)
	if err := os.WriteFile(filepath.Join(dir, "nginx.conf"), []byte(conf), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "-p", dir, "-c", filepath.Join(dir, "nginx.conf"))
	var out bytes.Buffer
	cmd.Stderr, cmd.SysProcAttr = &out, &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, ended := make(chan error), make(chan struct{})
	go func() {
		runtime.LockOSThread() // Pdeathsig goes by the thread that started it
		started <- cmd.Start()
		cmd.Wait()
		close(ended)
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); <-ended })
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		c, err := net.Dial("tcp", n.address)
		if err == nil {
			c.Close()
			return n
		}
		select {
		case <-ended:
			t.Fatalf("nginx ended: %s", &out)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("nginx does not answer: %v, %s", err, &out)
		}
	}
}

// record notes what nginx passes on, under a number that its answer carries.
func (n *nginx) record(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			req, err := http.ReadRequest(bufio.NewReader(c))
			if err != nil {
				return
			}
			body, err := io.ReadAll(req.Body)
			if err != nil {
				return
			}
			line := req.Header.Get("X-Line")
			method, rest, _ := strings.Cut(line, " ")
			target, _, _ := strings.Cut(rest, " ")
			n.mu.Lock()
			n.next++
			id := n.next
			n.all[id] = seen{method, target, req.Header.Get("X-Host"), string(body)}
			n.mu.Unlock()
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX-N: %d\r\nConnection: close\r\n\r\n", id)
		}()
	}
}

func (n *nginx) take(id string) seen {
	i, _ := strconv.Atoi(id)
	n.mu.Lock()
	defer n.mu.Unlock()
	s := n.all[i]
	delete(n.all, i)
	return s
}

// host as nginx reads it: without a port, in small letters.
func nginxHost(h string) string {
	h = strings.ToLower(h)
	if i := strings.LastIndexByte(h, ':'); i >= 0 && !strings.HasSuffix(h, "]") {
		h = h[:i]
	}
	return strings.TrimSuffix(h, ".")
}

// same sends the bytes to nginx: it must see no other request than those, up to
// where it refuses or ends.
func (n *nginx) same(t testing.TB, in []byte, all []seen, end error) (agreed int) {
	t.Helper()
	c, err := net.Dial("tcp", n.address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	go func() {
		c.Write(in) // as much as nginx takes
		c.(*net.TCPConn).CloseWrite()
	}()
	r := bufio.NewReader(c)
	for i := 0; ; {
		method := "GET"
		if i < len(all) {
			method = all[i].method
		}
		resp, err := http.ReadResponse(r, &http.Request{Method: method})
		if err != nil {
			if ne, ok := err.(net.Error); ok && ne.Timeout() {
				t.Fatalf("nginx neither answers nor ends %q", in)
			}
			return agreed
		}
		if resp.StatusCode < 200 {
			continue
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			return agreed
		}
		id := resp.Header.Get("X-N")
		if id == "" { // nginx's own answer
			if resp.StatusCode < 400 {
				t.Fatalf("nginx answers request %d of %q by itself: %s", i, in, resp.Status)
			}
			i++
			continue
		}
		got := n.take(id)
		if i >= len(all) {
			if end == io.EOF {
				t.Fatalf("nginx sees another request in %q: %q", in, got)
			}
			return agreed // past what we refuse
		}
		want := all[i]
		want.host = nginxHost(want.host)
		got.host = nginxHost(got.host)
		if got != want && !(want.host == "" && got.host == "" && got.method == want.method && got.target == want.target && got.body == want.body) {
			t.Fatalf("request %d of %q:\nhere  %q\nnginx %q", i, in, want, got)
		}
		agreed++
		i++
	}
}

// nginxRefuses are the entries of smuggling that pass here, and of which nginx
// sees fewer requests.
var nginxRefuses = map[string]bool{
	"authority-form": true, "CONNECT to an address and port": true, "asterisk-form": true, "lower case method": true, "TRACE": true, "host empty": true,
	"almost close": true, // nginx closes for any value with "close" in it
}

func TestSmugglingBesideNginx(t *testing.T) {
	n := startNginx(t)
	agreed := 0
	for _, c := range smuggling {
		all, end := read([]byte(c.in))
		got := n.same(t, []byte(c.in), all, end)
		if got != len(all) != nginxRefuses[c.name] && c.accepted > 0 {
			t.Errorf("%s: nginx sees %d requests of %d", c.name, got, len(all))
		}
		agreed += got
	}
	if agreed < 40 {
		t.Errorf("nginx has read %d requests alike: too few to have compared anything", agreed)
	}
}

// FuzzBesideNginx: whatever is let through is the same to nginx, or refused by it.
func FuzzBesideNginx(f *testing.F) {
	n := startNginx(f)
	for _, c := range smuggling {
		f.Add([]byte(c.in))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		if all, end := read(in); len(all) > 0 {
			n.same(t, in, all, end)
		}
	})
}
