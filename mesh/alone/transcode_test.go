package alone_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/api/annotations"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	health "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/types/descriptorpb"

	"hauberk.dev/mesh/bolt"
)

// doctor is a service of gRPC.
type doctor struct {
	health.UnimplementedHealthServer
	mu   sync.Mutex
	last metadata.MD
	done chan struct{}
}

func (d *doctor) Check(ctx context.Context, r *health.HealthCheckRequest) (*health.HealthCheckResponse, error) {
	d.mu.Lock()
	d.last, _ = metadata.FromIncomingContext(ctx)
	d.mu.Unlock()
	switch r.Service {
	case "nobody":
		return nil, status.Error(codes.NotFound, "who is that? 50% ü")
	case "slow":
		select {
		case <-ctx.Done():
		case <-d.done:
		}
		return nil, ctx.Err()
	}
	return &health.HealthCheckResponse{Status: health.HealthCheckResponse_SERVING}, nil
}

// descriptors writes a file of descriptors in which Check is bound to a path too.
func descriptors(t *testing.T) string {
	t.Helper()
	fd := protodesc.ToFileDescriptorProto(health.File_grpc_health_v1_health_proto)
	for _, m := range fd.Service[0].Method {
		if m.GetName() == "Check" {
			m.Options = &descriptorpb.MethodOptions{}
			proto.SetExtension(m.Options, annotations.E_Http, &annotations.HttpRule{Pattern: &annotations.HttpRule_Get{Get: "/v1/health/{service}"}})
		}
	}
	raw, err := proto.Marshal(&descriptorpb.FileDescriptorSet{File: []*descriptorpb.FileDescriptorProto{fd}})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "health.pb")
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestTranscodeGRPC asks a real server of gRPC in JSON, by HTTP/1 and HTTP/2.
func TestTranscodeGRPC(t *testing.T) {
	d := &doctor{done: make(chan struct{})}
	server, stop := serveGRPC(t, func(s *grpc.Server) { health.RegisterHealthServer(s, d) })
	a, address := told(t), freePort(t)
	configure := func(timeout string) {
		t.Helper()
		status, answer := a.put("version: 1\nadmin: a\nlisteners: [{name: web, address: '" + address + `'}]
upstreams: [{name: doctor, protocol: grpc, endpoints: [{address: '` + server + `'}]}]
hosts: [{names: ["*"], routes: [{upstream: doctor, timeout: ` + timeout + `, body: 1KiB, transcode: {descriptors: '` + descriptors(t) + `'},
  request_headers: {set: {X-Set: "$remote"}}}]}]
`)
		if status != 200 {
			t.Fatalf("%d %v", status, answer)
		}
	}
	configure("30s")
	two := &http.Transport{Protocols: new(http.Protocols)}
	two.Protocols.SetUnencryptedHTTP2(true)
	defer two.CloseIdleConnections()
	const json = "application/json; charset=utf-8"
	ask := func(c *http.Client, method, path, kind string, body io.Reader) (int, string) {
		t.Helper()
		req, err := http.NewRequest(method, "http://"+address+path, body)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", kind)
		req.Header.Set("Authorization", "Bearer x")
		req.Header.Set("Grpc-Timeout", "1n")
		r, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Fatal(err)
		}
		return r.StatusCode, string(b)
	}
	pieces := func(s string) io.Reader { return io.MultiReader(strings.NewReader(s[:3]), strings.NewReader(s[3:])) }
	for name, c := range map[string]*http.Client{"HTTP/1": http.DefaultClient, "HTTP/2": {Transport: two}} {
		for _, x := range []struct {
			method, path, kind string
			body               io.Reader
			status             int
			want               string
		}{
			{"POST", "/grpc.health.v1.Health/Check", json, strings.NewReader(`{"service":"a"}`), 200, `{"status":"SERVING"}`},
			{"POST", "/grpc.health.v1.Health/Check", json, pieces(`{"service":"a"}`), 200, `{"status":"SERVING"}`},
			{"GET", "/v1/health/a", "", nil, 200, `{"status":"SERVING"}`},
			{"GET", "/v1/health/nobody", "", nil, 404, `"reason":"who is that? 50% ü"`},
			{"GET", "/v1/health/a?nope=1", "", nil, 400, "has no such field"},
			{"POST", "/grpc.health.v1.Health/Check", json, strings.NewReader(`{"service":1}`), 400, "service: 1: want text"},
			{"POST", "/grpc.health.v1.Health/Check", "text/plain", strings.NewReader(`{}`), 415, "not application/json"},
			{"POST", "/grpc.health.v1.Health/Check", json, strings.NewReader(strings.Repeat(" ", 2000)), 413, "over the limit"},
			{"POST", "/grpc.health.v1.Health/Check", json, pieces(strings.Repeat(" ", 2000)), 413, "over the limit"},
			{"POST", "/grpc.health.v1.Health/Watch", json, strings.NewReader("{}"), 501, "streams"},
			{"GET", "/grpc.health.v1.Health/Check", "", nil, 404, "google.api.http"},
		} {
			if status, body := ask(c, x.method, x.path, x.kind, x.body); status != x.status || !strings.Contains(body, x.want) {
				t.Errorf("%s: %s %s: %d %s, want %d %s", name, x.method, x.path, status, body, x.status, x.want)
			}
		}
	}
	d.mu.Lock()
	if got := d.last; got.Get("authorization")[0] != "Bearer x" || got.Get("x-set")[0] != "127.0.0.1" || len(got.Get("x-forwarded-for")) != 1 {
		t.Errorf("the server saw %v", got)
	}
	d.mu.Unlock()

	for _, c := range []*http.Client{{Transport: &http.Transport{ExpectContinueTimeout: time.Minute}}, {Transport: two}} {
		req := mustRequest(t, "POST", "http://"+address+"/grpc.health.v1.Health/Check", pieces(`{"service":"a"}`), -1)
		req.Header.Set("Content-Type", json)
		req.Header.Set("Expect", "100-continue")
		if r, err := c.Do(req); err != nil {
			t.Error(err)
		} else if r.Body.Close(); r.StatusCode != 200 {
			t.Errorf("a client that waits to be asked for its body: %s", r.Status)
		}
		c.CloseIdleConnections()
	}
	expectTwice(t, address, "/grpc.health.v1.Health/Check", `{"service":"a"}`)

	// Calls of gRPC go through the same route as they are.
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if r, err := health.NewHealthClient(conn).Check(context.Background(), &health.HealthCheckRequest{}); err != nil || r.Status != health.HealthCheckResponse_SERVING {
		t.Errorf("by gRPC: %v, %v", r, err)
	}

	configure("50ms")
	if status, body := ask(http.DefaultClient, "GET", "/v1/health/slow", "", nil); status != 504 {
		t.Errorf("a slow server: %d %s", status, body)
	}
	close(d.done)
	configure("30s")
	stop()
	for end := time.Now().Add(60 * time.Second); ; { // a call on the connection that has just ended may have been taken
		status, body := ask(http.DefaultClient, "GET", "/v1/health/a", "", nil)
		if status == 503 {
			break
		}
		if status != 502 || time.Now().After(end) {
			t.Fatalf("nobody there: %d %s", status, body)
		}
	}
}

// expectTwice sends two requests whose bodies wait to be asked for, the head of
// the second with the body of the first.
func expectTwice(t *testing.T, address, path, body string) {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	head := fmt.Sprintf("POST %s HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n", path, len(body))
	in := bufio.NewReader(c)
	next := head
	for i := range 2 {
		io.WriteString(c, next)
		asked, err := http.ReadResponse(in, nil)
		if err != nil || asked.StatusCode != 100 {
			t.Fatalf("request %d: %v, %v; want to be asked for the body", i, asked, err)
		}
		if next = body + head; i == 1 {
			next = body
		}
		io.WriteString(c, next)
		r, err := http.ReadResponse(in, nil)
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, r.Body)
		if r.StatusCode != 200 {
			t.Errorf("request %d: %s", i, r.Status)
		}
		next = ""
	}
}

// TestTranscodeFaults finds what a file says that could not work.
func TestTranscodeFaults(t *testing.T) {
	a, address := told(t), freePort(t)
	for routes, want := range map[string]string{
		`{upstream: u, transcode: {descriptors: nowhere.pb}}`:                            "no such file",
		`{upstream: u, transcode: {descriptors: a}}`:                                     "write protocol: grpc",
		`{respond: {status: 200}, transcode: {descriptors: '` + descriptors(t) + `'}}`:   "goes with upstream",
		`{upstream: u, rewrite: /x, transcode: {descriptors: '` + descriptors(t) + `'}}`: "does not go with rewrite",
	} {
		status, answer := a.put("version: 1\nadmin: a\nlisteners: [{name: web, address: '" + address + `'}]
upstreams: [{name: u, endpoints: []}]
hosts: [{names: ["*"], routes: [` + routes + "]}]\n")
		if said, _ := answer["reason"].(string); status != 422 || !strings.Contains(said, want) {
			t.Errorf("%s: %d %s, want %s", routes, status, said, want)
		}
	}
}

// accountant is a server of SOFABolt: it answers m with its argument, and other
// methods as their names say.
func accountant(t *testing.T) (address string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	var mu sync.Mutex
	var open []net.Conn
	serving.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open = append(open, c)
			mu.Unlock()
			serving.Go(func() { account(c) })
		}
	})
	t.Cleanup(func() {
		ln.Close()
		mu.Lock()
		for _, c := range open {
			c.Close()
		}
		mu.Unlock()
		serving.Wait()
	})
	return ln.Addr().String()
}

func account(c net.Conn) {
	defer c.Close()
	var b []byte
	buf := make([]byte, 1<<16)
	for {
		n, err := c.Read(buf)
		if err != nil {
			return
		}
		b = append(b, buf[:n]...)
		x, err := bolt.Size(b)
		if err != nil || x.Len == 0 || len(b) < x.Len {
			continue
		}
		f := bolt.Parse(b, x)
		var r bolt.Reader
		target, err := r.Target(&f)
		if err != nil {
			return
		}
		status, class := byte(0), "com.alipay.sofa.rpc.core.response.SofaResponse"
		content := "O\xbe" + class + "\x94\x07isError\x08errorMsg\x0bappResponse\x0dresponsePropso\x90FN"
		arguments := f.Content[strings.LastIndex(string(f.Content), string(target.Service)+"NN")+len(target.Service)+2:]
		switch string(target.Method) {
		case "echo":
			content += string(arguments) + "N"
		case "throw":
			content += "O\x9djava.lang.Err\x92\x0ddetailMessage\x0astackTraceo\x91\x02noNN"
		case "busy":
			status, content, class = 4, "", ""
		case "silent":
			b = b[x.Len:]
			continue
		case "push": // what the server has to say of itself fills what it is read into, and more
			content += "NN"
			for _, size := range []int{4096 - 22, 10000} { // the head and the sign of life come with the first
				c.Write(append([]byte{1, 2, 0, 1, 1, 0, 0, 0, 9, 1, 0, 0, 0, 0, 0, 0, 0, 0, byte(size >> 24), byte(size >> 16), byte(size >> 8), byte(size)}, make([]byte, size)...))
			}
		}
		// A sign of life goes before.
		c.Write([]byte{1, 1, 0, 0, 1, 0, 0, 0, 9, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
		head := []byte{1, 0, 0, 2, 1, b[5], b[6], b[7], b[8], 1, 0, status, byte(len(class) >> 8), byte(len(class)), 0, 0}
		head = binary.BigEndian.AppendUint32(head, uint32(len(content)))
		c.Write(append(append(head, class...), content...))
		b = b[x.Len:]
	}
}

// TestTranscodeBolt calls a server of SOFABolt in JSON.
func TestTranscodeBolt(t *testing.T) {
	a, address := told(t), freePort(t)
	configure := func(timeout string) {
		t.Helper()
		status, answer := a.put("version: 1\nadmin: a\nlisteners: [{name: web, address: '" + address + `'}]
upstreams: [{name: books, protocol: bolt, endpoints: [{address: '` + accountant(t) + `'}]}]
hosts:
- names: ["*"]
  routes:
  - prefix: /books
    upstream: books
    timeout: ` + timeout + `
    transcode:
      bolt:
        service: com.x.Books:1.0
        methods: [{name: echo, args: [com.x.Entry]}, {name: throw}, {name: busy}, {name: silent}, {name: push}]
        classes:
          com.x.Entry: [{name: id, type: long}, {name: text, type: java.lang.String}, {name: parts, type: "com.x.Entry[]"}]
`)
		if status != 200 {
			t.Fatalf("%d %v", status, answer)
		}
	}
	ask := func(method, path, kind, body string) (int, string) {
		t.Helper()
		req := mustRequest(t, method, "http://"+address+path, strings.NewReader(body), int64(len(body)))
		req.Header.Set("Content-Type", kind)
		r, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Fatal(err)
		}
		return r.StatusCode, string(b)
	}
	configure("30s")
	const json = "application/json"
	for range 2 { // the second time on the connection of the first
		for _, x := range []struct {
			method, path, kind, body string
			status                   int
			want                     string
		}{
			{"POST", "/books/echo", json, `[{"text":"ü","id":"-1","parts":[{"id":2}]}]`, 200, `{"id":-1,"text":"ü","parts":[{"id":2,"text":null,"parts":null}]}`},
			{"POST", "/books/echo", json, `[null]`, 200, `null`},
			{"POST", "/books/push", json, `[]`, 200, "null"},
			{"POST", "/books/throw", json, `[]`, 500, `the server threw java.lang.Err: \"no\"`},
			{"POST", "/books/busy", json, `[]`, 503, "status 4"},
			{"POST", "/books/echo", json, `[{"nope":1}]`, 400, "has no such field"},
			{"POST", "/books/echo", "", `[null]`, 415, "not application/json"},
			{"POST", "/books/other", json, `[]`, 404, `no method`},
			{"GET", "/books/echo", "", "", 404, "not asked by POST"},
		} {
			if status, body := ask(x.method, x.path, x.kind, x.body); status != x.status || !strings.Contains(body, x.want) {
				t.Errorf("%s %s %s: %d %s, want %d %s", x.method, x.path, x.body, status, body, x.status, x.want)
			}
		}
	}
	configure("50ms")
	if status, body := ask("POST", "/books/silent", json, "[]"); status != 504 {
		t.Errorf("a silent server: %d %s", status, body)
	}
	status, answer := a.put("version: 1\nadmin: a\nlisteners: [{name: web, address: '" + address + `'}]
upstreams: [{name: u, endpoints: []}]
hosts: [{names: ["*"], routes: [{upstream: u, transcode: {bolt: {service: s, methods: [{name: m, args: [x.Y]}]}}}]}]
`)
	if said := fmt.Sprint(answer["reason"]); status != 422 || !strings.Contains(said, "write protocol: bolt") || !strings.Contains(said, `type "x.Y" is not known`) {
		t.Errorf("%d %s", status, said)
	}
}
