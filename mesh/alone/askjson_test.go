package alone

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	_ "google.golang.org/genproto/googleapis/api/annotations"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"

	"hauberk.dev/mesh/bolt"
	"hauberk.dev/mesh/transcode"
)

// accounts is what protoc would make of a service of accounts.
const accounts = `
name: "bank.proto" package: "bank.v1" syntax: "proto3" dependency: "google/api/annotations.proto"
message_type { name: "Account"
  field { name: "id" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING json_name: "id" }
  field { name: "cents" number: 2 label: LABEL_OPTIONAL type: TYPE_INT64 json_name: "cents" }
  field { name: "last_note" number: 3 label: LABEL_OPTIONAL type: TYPE_STRING json_name: "lastNote" } }
message_type { name: "Accounts" field { name: "all" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".bank.v1.Account" json_name: "all" } }
message_type { name: "Nothing" }
service { name: "Bank"
  method { name: "Get" input_type: ".bank.v1.Account" output_type: ".bank.v1.Account" options { [google.api.http] { get: "/v1/accounts/{id}" } } }
  method { name: "Pay" input_type: ".bank.v1.Account" output_type: ".bank.v1.Account" options { [google.api.http] { post: "/v1/accounts/{id}:pay" body: "*" } } }
  method { name: "List" input_type: ".bank.v1.Nothing" output_type: ".bank.v1.Accounts" options { [google.api.http] { get: "/v1/accounts" response_body: "all" } } }
  method { name: "Close" input_type: ".bank.v1.Account" output_type: ".bank.v1.Nothing" options { [google.api.http] { delete: "/v1/accounts/{id}" } } }
  method { name: "Plain" input_type: ".bank.v1.Account" output_type: ".bank.v1.Account" }
  method { name: "Watch" input_type: ".bank.v1.Nothing" output_type: ".bank.v1.Account" server_streaming: true } }`

// bankSchema writes a file of descriptors, and returns the types in it.
func bankSchema(t *testing.T) (path string, all protoreflect.MessageDescriptors) {
	t.Helper()
	fd := &descriptorpb.FileDescriptorProto{}
	if err := prototext.Unmarshal([]byte(accounts), fd); err != nil {
		t.Fatal(err)
	}
	f, err := protodesc.NewFile(fd, protoregistry.GlobalFiles)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := proto.Marshal(&descriptorpb.FileDescriptorSet{File: []*descriptorpb.FileDescriptorProto{fd}})
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(t.TempDir(), "bank.pb")
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	return path, f.Messages()
}

// teller is a server of JSON that knows nothing else. What it answers the account's
// name says.
type teller struct {
	mu    sync.Mutex
	seen  []string // method, target, body
	head  http.Header
	came  atomic.Int32 // requests, read or not
	under atomic.Int32 // of them, those that are being served
}

func (x *teller) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	x.under.Add(1)
	x.came.Add(1)
	defer x.under.Add(-1)
	body, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	x.mu.Lock()
	x.seen, x.head = append(x.seen, r.Method+" "+r.RequestURI+" "+string(body)), r.Header
	x.mu.Unlock()
	name := strings.TrimSuffix(r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:], ":pay")
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.Header().Set("X-Teller", "seven")
	w.Header().Set("X-Bad-Bin", "*")
	w.Header().Set("X-Good-Bin", "AAE=")
	w.Header().Set("Grpc-Status", "5")
	w.Header().Set("Connection", "X-Hop")
	w.Header().Set("X-Hop", "1")
	var code int
	if n, _ := fmt.Sscanf(name, "status-%d", &code); n == 1 {
		w.WriteHeader(code)
		io.WriteString(w, `{"error":{"a":1},"message":"because of `+name+`"}`)
		return
	}
	switch name {
	case "html":
		w.Header().Set("Content-Type", "text/html")
		io.WriteString(w, "<p>")
	case "coded":
		w.Header().Set("Content-Encoding", "gzip")
		io.WriteString(w, "{}")
	case "unknown":
		io.WriteString(w, `{"nope":1}`)
	case "wrong":
		io.WriteString(w, `{"cents":true}`)
	case "broken":
		io.WriteString(w, `{"cents":`)
	case "none", "accounts":
		w.WriteHeader(204)
	case "long":
		io.WriteString(w, `{"lastNote":"`+strings.Repeat("a", maxCall)+`"}`)
	case "longstatus":
		w.WriteHeader(500)
		io.WriteString(w, `{"message":"`+strings.Repeat("a", maxReason)+`"}`)
	case "cut":
		w.Header().Set("Content-Length", "100")
		io.WriteString(w, "{")
		panic(http.ErrAbortHandler)
	case "gone":
		panic(http.ErrAbortHandler)
	case "slow":
		<-r.Context().Done()
	case "large":
		io.WriteString(w, `{"lastNote":"`+strings.Repeat("a", 3<<20)+`"}`)
	case "list":
		io.WriteString(w, `[{"id":"a"},{"id":"b"}]`)
	case "null":
		io.WriteString(w, "null")
	case "number":
		io.WriteString(w, "7")
	default:
		io.WriteString(w, `{"id":"`+name+`","cents":"9007199254740993","lastNote":"ü"}`)
	}
}

func (x *teller) last() (string, http.Header) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if len(x.seen) == 0 {
		return "", nil
	}
	return x.seen[len(x.seen)-1], x.head
}

// leaves has a client give a call up, until one of them was at the server before that:
// the server is told of it.
func (x *teller) leaves(t *testing.T, call func()) {
	t.Helper()
	before := x.came.Load()
	waitFor(t, "call at the server", func() bool {
		call()
		return x.came.Load() > before
	})
	waitFor(t, "end of the call at the server", func() bool { return x.under.Load() == 0 })
}

func newTeller(t *testing.T) (x *teller, address string) {
	t.Helper()
	x = &teller{}
	s := httptest.NewUnstartedServer(x)
	s.Config.Protocols = new(http.Protocols)
	s.Config.Protocols.SetHTTP1(true)
	s.Config.Protocols.SetUnencryptedHTTP2(true)
	s.Start()
	t.Cleanup(s.Close)
	return x, s.Listener.Addr().String()
}

// TestCallJSON has a client of gRPC call a server that speaks JSON.
func TestCallJSON(t *testing.T) {
	for _, protocol := range []string{"http", "http2"} {
		t.Run(protocol, func(t *testing.T) { callJSONOver(t, protocol) })
	}
}

func callJSONOver(t *testing.T, protocol string) {
	x, address := newTeller(t)
	schema, types := bankSchema(t)
	p := serve(t, one(`
  - {transcode: {descriptors: '`+schema+`', to: json}, upstream: up, deadline: X-Timeout-Ms, body: 64KiB, host: bank.example,
     request_headers: {set: {X-Set: "$remote"}, remove: [X-Removed]}, response_headers: {remove: [X-Teller-Of]}}`,
		"upstreams: [{name: up, protocol: "+protocol+", outlier: {unreachable: 1000}, endpoints: [{address: '"+address+"'}]}]"))
	conn := grpcTo(t, p)
	call := func(ctx context.Context, method, in string, o ...grpc.CallOption) (string, error) {
		t.Helper()
		input, output := "Account", "Account"
		switch method {
		case "List":
			input, output = "Nothing", "Accounts"
		case "Watch":
			input = "Nothing"
		case "Close":
			output = "Nothing"
		}
		q, r := dynamicpb.NewMessage(types.ByName(protoreflect.Name(input))), dynamicpb.NewMessage(types.ByName(protoreflect.Name(output)))
		if err := protojson.Unmarshal([]byte(in), q); err != nil {
			t.Fatal(err)
		}
		if err := conn.Invoke(ctx, "/bank.v1.Bank/"+method, q, r, o...); err != nil {
			return "", err
		}
		text, err := protojson.Marshal(r)
		return strings.ReplaceAll(string(text), " ", ""), err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for _, c := range []struct{ method, in, seen, want string }{
		{"Get", `{"id":"7"}`, "GET /v1/accounts/7 ", `{"id":"7","cents":"9007199254740993","lastNote":"ü"}`},
		{"Get", `{"id":"ü ?a=1&b#%2e","cents":-1}`, "", `! InvalidArgument different ways`},
		{"Get", `{"id":"ü ?a=1&b#","cents":-1,"lastNote":"a b"}`, "GET /v1/accounts/%C3%BC%20%3Fa%3D1%26b%23?cents=-1&lastNote=a%20b ", `{"id":"ü?a=1&b#","cents":"9007199254740993","lastNote":"ü"}`},
		{"Pay", `{"id":"7","cents":5}`, `POST /v1/accounts/7:pay {"cents":"5"}`, `{"id":"7","cents":"9007199254740993","lastNote":"ü"}`},
		{"Plain", `{"id":"7"}`, `POST /bank.v1.Bank/Plain {"id":"7"}`, `{"id":"Plain","cents":"9007199254740993","lastNote":"ü"}`},
		{"Close", `{"id":"none"}`, "DELETE /v1/accounts/none ", `{}`},
		{"Close", `{"id":"7"}`, "DELETE /v1/accounts/7 ", `! Internal no such field`},
		{"List", `{}`, "GET /v1/accounts ", `! Internal no body`},
		{"Watch", `{}`, "", `! Unimplemented streams`},
		{"Nope", `{}`, "", `! Unimplemented has no method`},
		{"Get", `{}`, "", `! InvalidArgument is empty`}, {"Get", `{"id":".."}`, "", `! InvalidArgument change which path`}, {"Get", `{"id":"a/b"}`, "", `! InvalidArgument change which path`},
		{"Get", `{"id":"7:pay"}`, "GET /v1/accounts/7%3Apay ", `{"id":"7","cents":"9007199254740993","lastNote":"ü"}`}, // Pay is asked by POST
		{"Get", `{"id":"a","lastNote":"` + strings.Repeat("a", 9000) + `"}`, "", `! ResourceExhausted too large`},
		{"Pay", `{"id":"a","lastNote":"` + strings.Repeat("a", 70_000) + `"}`, "", `! ResourceExhausted over the limit`},
		{"Get", `{"id":"status-400"}`, "GET /v1/accounts/status-400 ", `! Internal status 400: because of status-400`},
		{"Get", `{"id":"status-401"}`, "", `! Unauthenticated 401`}, {"Get", `{"id":"status-403"}`, "", `! PermissionDenied 403`}, {"Get", `{"id":"status-404"}`, "", `! Unimplemented 404`},
		{"Get", `{"id":"status-429"}`, "", `! Unavailable 429`}, {"Get", `{"id":"status-502"}`, "", `! Unavailable 502`}, {"Get", `{"id":"status-503"}`, "", `! Unavailable 503`},
		{"Get", `{"id":"status-504"}`, "", `! Unavailable 504`}, {"Get", `{"id":"status-500"}`, "", `! Unknown 500`}, {"Get", `{"id":"status-302"}`, "", `! Unknown 302`}, {"Get", `{"id":"status-206"}`, "", `! Unknown 206`},
		{"Get", `{"id":"longstatus"}`, "", `! Unknown status 500`},
		{"Get", `{"id":"html"}`, "", `! Internal not application/json`}, {"Get", `{"id":"coded"}`, "", `! Internal coding is "gzip"`}, {"Get", `{"id":"unknown"}`, "", `! Internal no such field`},
		{"Get", `{"id":"wrong"}`, "", `! Internal cents`}, {"Get", `{"id":"broken"}`, "", `! Internal the server's answer`}, {"Get", `{"id":"none"}`, "", `! Internal no body`}, {"Get", `{"id":"list"}`, "", `! Internal want an object`},
		{"Get", `{"id":"long"}`, "", `! Internal too long`}, {"Pay", `{"id":"cut"}`, "", `! Unavailable `}, {"Pay", `{"id":"gone"}`, "", `! Unavailable `},
		{"Get", `{"id":"7"}`, "GET /v1/accounts/7 ", `{"id":"7","cents":"9007199254740993","lastNote":"ü"}`},
	} {
		got, err := call(ctx, c.method, c.in)
		if want, fails := strings.CutPrefix(c.want, "! "); fails {
			code, text, _ := strings.Cut(want, " ")
			if s := status.Convert(err); s.Code().String() != code || !strings.Contains(s.Message(), text) {
				t.Errorf("%s %.80s: %s, %v; want %s", c.method, c.in, got, err, c.want)
			}
		} else if err != nil || got != want {
			t.Errorf("%s %.80s: %s, %v; want %s", c.method, c.in, got, err, c.want)
		}
		if seen, _ := x.last(); c.seen != "" && seen != c.seen {
			t.Errorf("%s %.80s: the server saw %q, want %q", c.method, c.in, seen, c.seen)
		}
	}

	// Metadata, and the time that is left.
	var head metadata.MD
	with := metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer x", "x-removed", "1", "x-forwarded-for", "6.6.6.6", "some-bin", "\x00\xff", "x-timeout-ms", "99999999", "x_timeout_ms", "99999999",
		"x-http-method-override", "DELETE", "x_http_method", "DELETE", "x-original-url", "/admin", "content_length", "3", "transfer_encoding", "chunked")
	if _, err := call(with, "Get", `{"id":"7"}`, grpc.Header(&head)); err != nil {
		t.Fatal(err)
	}
	_, saw := x.last()
	for name, want := range map[string]string{"Authorization": "Bearer x", "X-Removed": "", "X-Forwarded-For": "127.0.0.1", "Some-Bin": "AP8", "X-Set": "127.0.0.1", "Te": "", "X_timeout_ms": "", "X-Http-Method-Override": "", "X_http_method": "", "X-Original-Url": "", "Content_length": "", "Transfer_encoding": "", "Accept": "application/json", "Accept-Encoding": "identity"} {
		if got := saw.Get(name); got != want || len(saw[name]) > 1 {
			t.Errorf("the server saw %s: %q, want %q", name, saw[name], want)
		}
	}
	left, err := time.ParseDuration(saw.Get("X-Timeout-Ms") + "ms")
	if err != nil || left > patience || left <= 0 || len(saw["X-Timeout-Ms"]) != 1 {
		t.Errorf("%v, %v, of %v", left, err, saw["X-Timeout-Ms"])
	}
	if d, ok := grpcTimeout([]byte(saw.Get("Grpc-Timeout"))); !ok || d > patience || d <= 0 {
		t.Errorf("Grpc-Timeout: %v", saw["Grpc-Timeout"])
	}
	hops := map[string]int{"http2": 1}[protocol] // where Connection names nothing
	if got := fmt.Sprint(head.Get("x-teller"), len(head.Get("x-bad-bin")), head.Get("x-good-bin"), len(head.Get("grpc-status")), len(head.Get("x-hop"))-hops); got != "[seven] 0 [\x00\x01] 0 0" {
		t.Errorf("metadata: %q", got)
	}

	// The client's time is over, or it gives up: the server is told at once.
	x.leaves(t, func() {
		short, stop := context.WithTimeout(ctx, 200*time.Millisecond)
		defer stop()
		if _, err := call(short, "Get", `{"id":"slow"}`); status.Code(err) != codes.DeadlineExceeded {
			t.Error(err)
		}
	})
	x.leaves(t, func() {
		gone, leave := context.WithCancel(ctx)
		before := x.came.Load()
		var waits sync.WaitGroup
		waits.Go(func() {
			for x.came.Load() == before && gone.Err() == nil {
				time.Sleep(time.Millisecond)
			}
			leave()
		})
		if _, err := call(gone, "Pay", `{"id":"slow"}`); status.Code(err) != codes.Canceled {
			t.Error(err)
		}
		leave()
		waits.Wait()
	})

	if _, err := call(ctx, "Get", `{"id":"7"}`, grpc.UseCompressor(gzip.Name)); status.Code(err) != codes.Unimplemented {
		t.Errorf("a compressed call: %v", err)
	}
	if _, err := call(ctx, "Get", `{"id":"7"}`, grpc.CallContentSubtype("proto")); err != nil {
		t.Error(err)
	}

	// What is no call goes through as it is.
	if r, body := get(t, p, "GET", "/v1/accounts/list?a=%2F", nil, func(*http.Request) {}); r.StatusCode != 200 || body != `[{"id":"a"},{"id":"b"}]` {
		t.Errorf("%d %s", r.StatusCode, body)
	}
}

// TestCallJSONStale has a server end the connections that are kept.
func TestCallJSONStale(t *testing.T) {
	schema, types := bankSchema(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var served sync.WaitGroup
	t.Cleanup(func() { // when the proxy has ended
		ln.Close()
		served.Wait()
	})
	served.Go(func() { // the second request of a connection is read, and never answered
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			served.Go(func() {
				defer c.Close()
				buf := make([]byte, 4096)
				if _, err := c.Read(buf); err != nil {
					return
				}
				io.WriteString(c, "HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n")
				c.Read(buf)
			})
		}
	})
	p := serve(t, one(`
  - {transcode: {descriptors: '`+schema+`', to: json}, upstream: up}`, upstreamOf(ln.Addr().String())))
	conn := grpcTo(t, p)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	call := func(method string) error {
		q, r := dynamicpb.NewMessage(types.ByName("Account")), dynamicpb.NewMessage(types.ByName("Account"))
		q.Set(q.Descriptor().Fields().ByName("id"), protoreflect.ValueOfString("7"))
		return conn.Invoke(ctx, "/bank.v1.Bank/"+method, q, r)
	}
	for range 3 { // what may be sent twice is
		if err := call("Get"); err != nil {
			t.Error(err)
		}
	}
	if err := call("Pay"); status.Code(err) != codes.Unavailable { // on a connection that was kept
		t.Error(err)
	}
	if err := call("Pay"); err != nil { // on one of its own
		t.Error(err)
	}
}

// TestTranscodeToFaults finds what a file says that could not work.
func TestTranscodeToFaults(t *testing.T) {
	schema, _ := bankSchema(t)
	const books = `bolt: {service: "com.x.Books:1.0", methods: [{name: get, args: [int], returns: com.x.Book}], classes: {com.x.Book: [{name: id, type: int}]}}`
	http := func(transcode string) string {
		return one("\n  - {transcode: {"+transcode+"}, upstream: up}", "upstreams: [{name: up, endpoints: [{address: '127.0.0.1:1'}]}, {name: g, protocol: grpc, endpoints: [{address: '127.0.0.1:1'}]}]")
	}
	rpc := func(protocol, call string) string {
		return "version: 1\nlisteners: [{name: rpc, address: 127.0.0.1:0, protocol: " + protocol + ", calls: [{" + call + "}]}]\n" +
			"upstreams: [{name: up, endpoints: [{address: '127.0.0.1:1'}]}, {name: b, protocol: bolt, endpoints: [{address: '127.0.0.1:1'}]}, {name: one, proxy_protocol: v2, endpoints: [{address: '127.0.0.1:1'}]}]\n"
	}
	for _, c := range []struct{ text, want string }{
		{http("to: json, descriptors: '" + schema + "'"), ""},
		{http("to: xml, descriptors: '" + schema + "'"), `transcode.to: "xml" is not known; use , json`},
		{http("to: json, descriptors: nowhere.pb"), `/nowhere.pb": open`},
		{http("descriptors: '" + schema + "'"), "write protocol: grpc"},
		{strings.Replace(http("to: json, descriptors: '"+schema+"'"), "upstream: up", "upstream: g", 1), "write protocol: http or http2"},
		{http("to: json, path: /a, descriptors: '" + schema + "'"), `transcode.path: "/a" goes with calls of a listener of protocol bolt`},
		{http("to: json, " + books), "write the transcode under one of its calls"},
		{rpc("bolt", "upstream: up, service: com.x.Books, host: a.example, deadline: X-Ms, transcode: {to: json, path: /books, "+books+"}"), ""},
		{rpc("bolt", "upstream: up, transcode: {path: /books, "+books+"}"), "write to: json"},
		{rpc("bolt", "upstream: up, transcode: {to: json, "+books+"}"), `transcode.path: "" is no path; write for example /books`},
		{rpc("bolt", "upstream: up, transcode: {to: json, path: '/a?b', "+books+"}"), "is no path"},
		{rpc("bolt", "upstream: up, transcode: {to: json, path: /a/../b, "+books+"}"), `"/a/../b/get", which is no path`},
		{rpc("bolt", "upstream: up, transcode: {to: json, path: /a, descriptors: x}"), "use bolt and no descriptors"},
		{rpc("bolt", "upstream: b, transcode: {to: json, path: /a, "+books+"}"), "write protocol: http or http2"},
		{rpc("bolt", "upstream: one, transcode: {to: json, path: /a, "+books+"}"), "has proxy_protocol"},
		{rpc("bolt", "upstream: up, service: com.y, transcode: {to: json, path: /a, "+books+"}"), `"com.x.Books:1.0" is not what the call is for`},
		{rpc("bolt", "upstream: up, version: '2.0', transcode: {to: json, path: /a, "+books+"}"), `is not what the call is for`},
		{rpc("bolt", "upstream: up, host: 'a b', transcode: {to: json, path: /a, "+books+"}"), `host: "a b"`},
		{rpc("bolt", "upstream: up, deadline: 'a b', transcode: {to: json, path: /a, "+books+"}"), `deadline`},
		{rpc("bolt", "upstream: up, transcode: {to: json, path: /a, "+strings.Replace(books, "int]", "x.Y]", 1)+"}"), `type "x.Y" is not known`},
		{rpc("bolt", "upstream: b, host: a"), "host and deadline go with transcode"},
		{rpc("dubbo", "upstream: up, transcode: {to: json, path: /a, "+books+"}"), "goes with protocol bolt"},
	} {
		_, err := Parse("proxy.yaml", t.TempDir(), []byte(c.text))
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s\n%v\nwant %s", c.text, err, c.want)
		}
	}
}

// TestBoltJSON has a client of SOFABolt call a server that speaks JSON.
func TestBoltJSON(t *testing.T) {
	x, address := newTeller(t)
	log := t.TempDir() + "/log"
	p := serve(t, "access_log: {path: "+log+"}\n"+`version: 1
listeners:
- name: rpc
  address: 127.0.0.1:0
  protocol: bolt
  calls:
  - service: com.x.Books
    upstream: up
    timeout: 5s
    host: bank.example
    deadline: X-Timeout-Ms
    transcode:
      to: json
      path: /v1/books
      bolt:
        service: com.x.Books:1.0
        methods: [{name: get, args: [com.x.Book, int], returns: com.x.Book`+methodsOf("status-404", "status-503", "status-504", "status-502", "status-400", "status-500", "html", "unknown", "list", "broken", "none", "long", "cut", "gone", "slow", "number")+`, {name: free}, {name: 'null', returns: void}]
        classes: {com.x.Book: [{name: id, type: java.lang.String}, {name: cents, type: long}, {name: lastNote, type: java.lang.String}]}
upstreams: [{name: up, outlier: {unreachable: 1000}, endpoints: [{address: '`+address+`'}]}]
`)
	book := []transcode.Member{{Name: "id", Type: "java.lang.String"}, {Name: "cents", Type: "long"}, {Name: "nope", Type: "int"}}
	s := &transcode.Service{Name: "com.x.Books:1.0", Classes: map[string][]transcode.Member{}}
	c := newRPCTester(t, p, "rpc", false)
	id := uint32(0)
	// ask makes a call in the other direction's words.
	ask := func(millis int32, name, types, arguments string, pairs ...string) rpcFrame {
		t.Helper()
		m := &transcode.Signature{Name: name, Args: strings.Fields(types)}
		id++
		frame, err := s.AppendRequest(nil, m, id, millis, []byte(arguments))
		if err != nil {
			t.Fatal(err)
		}
		if len(pairs) > 0 {
			e, err := bolt.Size(frame)
			if err != nil {
				t.Fatal(err)
			}
			var all [][2]string
			for i := 0; i < len(pairs); i += 2 {
				all = append(all, [2]string{pairs[i], pairs[i+1]})
			}
			if frame, err = bolt.Extend(nil, frame, e, all); err != nil {
				t.Fatal(err)
			}
		}
		c.send(frame)
		f := c.next()
		if f.id != uint64(id) {
			t.Errorf("%s: id %d, want %d", name, f.id, id)
		}
		return f
	}
	const good = `{"id":"get","cents":9007199254740993,"lastNote":"ü"}`
	for _, q := range []struct {
		name, types, arguments string
		status                 bolt.Status
		want                   string
	}{
		{"get", "com.x.Book int", `[{"id":"a/../b?c","cents":5},7]`, bolt.OK, good},
		{"get", "com.x.Book int", `[null,7]`, bolt.OK, good},
		{"free", "", `[]`, bolt.OK, `{"id":"free","cents":"9007199254740993","lastNote":"ü"}`}, // nothing says that it is a long
		{"null", "", `[]`, bolt.OK, `null`},
		{"get", "int", `[7]`, bolt.CodecFailed, "no method"},
		{"other", "", `[]`, bolt.CodecFailed, "no method"},
		{"get", "com.x.Book int", `[{"nope":1},7]`, bolt.CodecFailed, "no such field"},
		{"status-404", "", `[]`, bolt.NoProcessor, "because of status-404"}, {"status-503", "", `[]`, bolt.Busy, "503"}, {"status-504", "", `[]`, bolt.Timeout, "504"}, {"status-502", "", `[]`, bolt.Closed, "502"},
		{"status-400", "", `[]`, bolt.ServerException, "because of status-400"}, {"status-500", "", `[]`, bolt.ServerException, "500"}, {"html", "", `[]`, bolt.ServerException, "not application/json"},
		{"unknown", "", `[]`, bolt.ServerException, "no such field"}, {"list", "", `[]`, bolt.ServerException, "want an object"}, {"broken", "", `[]`, bolt.ServerException, "the server's answer"},
		{"none", "", `[]`, bolt.ServerException, "no body"}, {"long", "", `[]`, bolt.ServerException, "too long"}, {"cut", "", `[]`, bolt.Closed, "EOF"}, {"gone", "", `[]`, bolt.Closed, "EOF"},
		{"number", "", `[]`, bolt.ServerException, "want an object"},
		{"get", "com.x.Book int", `[null,7]`, bolt.OK, good},
	} {
		s.Classes["com.x.Book"] = book[:2]
		if strings.Contains(q.arguments, "nope") {
			s.Classes["com.x.Book"] = book
		}
		f := ask(30000, q.name, q.types, q.arguments)
		text := f.text()
		if f.bolt.Status == bolt.OK {
			if raw, err := transcode.AppendResponse(nil, &f.bolt, 1<<20); err != nil {
				t.Error(err)
			} else {
				text = string(raw)
			}
		}
		if f.bolt.Status != q.status || !strings.Contains(text, q.want) {
			t.Errorf("%s(%s): status %d, %.300q; want %d, %s", q.name, q.arguments, f.bolt.Status, text, q.status, q.want)
		}
	}
	ask(30000, "get", "com.x.Book int", `[{"id":"a/../b?c","cents":5},7]`, "authorization", "Bearer x", "Host", "evil", "X-Forwarded-For", "6.6.6.6", "Transfer-Encoding", "chunked", "x-timeout-ms", "9", "sofa_head_method_name", "get", "X-Http-Method-Override", "DELETE", "content_length", "3")
	seen, head := x.last()
	if want := `POST /v1/books/get [{"id":"a/../b?c","cents":5},7]`; seen != want {
		t.Errorf("the server saw %q, want %q", seen, want)
	}
	for name, want := range map[string]string{"Authorization": "Bearer x", "X-Forwarded-For": "127.0.0.1", "Content-Type": "application/json", "X-Http-Method-Override": "", "Content_length": "", "Service": "", "Sofa_head_method_name": ""} {
		if got := head.Get(name); got != want || len(head[name]) > 1 {
			t.Errorf("the server saw %s: %q, want %q", name, head[name], want)
		}
	}
	if left, err := time.ParseDuration(head.Get("X-Timeout-Ms") + "ms"); err != nil || left > 5*time.Second || left <= 0 || len(head["X-Timeout-Ms"]) != 1 {
		t.Errorf("%v, %v, of %v", left, err, head["X-Timeout-Ms"])
	}
	if f := ask(30000, "get", "com.x.Book int", `[null,7]`, "a", "b\r\nX-Evil: 1"); f.bolt.Status != bolt.CodecFailed {
		t.Errorf("a header that ends a field: status %d", f.bolt.Status)
	}
	x.leaves(t, func() {
		if f := ask(50, "slow", "", `[]`); f.bolt.Status != bolt.Timeout {
			t.Errorf("a slow server: status %d, %q", f.bolt.Status, f.text())
		}
	})

	// Of version 2 with its sum; a call of another service or codec; one way.
	c.send(boltCall(bolt.Request, 900, "com.x.Books:1.0", "free", true, ""))
	if f := c.next(); f.bolt.Status != bolt.OK || f.bolt.Protocol != 2 || f.id != 900 {
		t.Errorf("%+v", f.bolt)
	}
	c.send(boltCall(bolt.Request, 901, "com.x.Books:2.0", "free", false, ""))
	if f := c.next(); f.bolt.Status != bolt.NoProcessor {
		t.Errorf("another version: %+v", f.bolt)
	}
	before, _ := x.last()
	c.send(boltCall(bolt.OneWay, 902, "com.x.Books:1.0", "status-500", false, ""), boltCall(bolt.Request, 903, "com.x.Books:1.0", "free", false, ""))
	if f := c.next(); f.id != 903 || before == "" {
		t.Errorf("%+v", f)
	}
	// All at once.
	const many = 200
	for i := range uint32(many) {
		c.send(boltCall(bolt.Request, 1000+i, "com.x.Books:1.0", "free", false, ""))
	}
	got := map[uint64]bool{}
	for range many {
		f := c.next()
		if f.bolt.Status != bolt.OK || got[f.id] {
			t.Fatalf("%d, %d %q", f.id, f.bolt.Status, f.text())
		}
		got[f.id] = true
	}
}

func methodsOf(names ...string) (s string) {
	for _, name := range names {
		s += "}, {name: " + name + ", returns: com.x.Book"
	}
	return s + "}"
}

// TestCallJSONGivenUp has clients that give a server no time to answer: it stays in.
func TestCallJSONGivenUp(t *testing.T) {
	schema, types := bankSchema(t)
	for _, protocol := range []string{"http", "http2"} {
		x, address := newTeller(t)
		p := serve(t, `version: 1
listeners:
- {name: web, address: 127.0.0.1:0}
- name: rpc
  address: 127.0.0.2:0
  protocol: bolt
  calls: [{upstream: up, transcode: {to: json, path: /v1, bolt: {service: com.x.Books:1.0, methods: [{name: slow}]}}}]
hosts: [{names: ["*"], routes: [{transcode: {descriptors: '`+schema+`', to: json}, upstream: up}]}]
upstreams: [{name: up, protocol: `+protocol+`, outlier: {failures: 1, ejection: 1h}, endpoints: [{address: '`+address+`'}]}]
`)
		conn := grpcTo(t, p)
		q, r := dynamicpb.NewMessage(types.ByName("Account")), dynamicpb.NewMessage(types.ByName("Account"))
		q.Set(q.Descriptor().Fields().ByName("id"), protoreflect.ValueOfString("slow"))
		x.leaves(t, func() {
			ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
			defer cancel()
			if err := conn.Invoke(ctx, "/bank.v1.Bank/Get", q, r); status.Code(err) != codes.DeadlineExceeded {
				t.Error(err)
			}
		})
		c := newRPCTester(t, p, "rpc", false)
		x.leaves(t, func() {
			frame := boltCall(bolt.Request, 3, "com.x.Books:1.0", "slow", false, "")
			binary.BigEndian.PutUint32(frame[10:], 50) // its timeout
			c.send(frame)
			if f := c.next(); f.bolt.Status != bolt.Timeout {
				t.Errorf("%+v", f)
			}
		})
		waitFor(t, "end of the calls", func() bool { return p.world.Load().upstreams["up"].endpoints[0].active.Load() == 0 })
		if !allUp(p) || p.world.Load().upstreams["up"].endpoints[0].failures.Load() > 0 {
			t.Error("the server is blamed")
		}
	}
}

// TestCallJSONHeld has calls take more than is left, and counts what they leave.
func TestCallJSONHeld(t *testing.T) {
	schema, types := bankSchema(t)
	x, address := newTeller(t)
	p := serve(t, one("\n  - {transcode: {descriptors: '"+schema+"', to: json}, upstream: up, body: 4MiB}", upstreamOf(address)))
	p.held.most = 100 << 10
	conn := grpcTo(t, p)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for _, c := range []struct {
		id, note string
		want     codes.Code
		asked    bool
	}{
		{"7", strings.Repeat("a", 10<<10), codes.OK, true},
		{"7", strings.Repeat("a", 200<<10), codes.ResourceExhausted, false},
		{"7", strings.Repeat("\x01", 40<<10), codes.ResourceExhausted, false}, // six times as long in JSON
		{"large", "", codes.ResourceExhausted, true},
		{"gone", strings.Repeat("a", 10<<10), codes.Unavailable, true},
		{"7", strings.Repeat("a", 10<<10), codes.OK, true},
	} {
		before := x.came.Load()
		q, r := dynamicpb.NewMessage(types.ByName("Account")), dynamicpb.NewMessage(types.ByName("Account"))
		q.Set(q.Descriptor().Fields().ByName("id"), protoreflect.ValueOfString(c.id))
		q.Set(q.Descriptor().Fields().ByName("last_note"), protoreflect.ValueOfString(c.note))
		if err := conn.Invoke(ctx, "/bank.v1.Bank/Pay", q, r); status.Code(err) != c.want || x.came.Load() > before != c.asked {
			t.Errorf("%s, %d bytes: %v, want %v", c.id, len(c.note), err, c.want)
		}
		waitFor(t, "end of what is counted", func() bool { return p.held.n.Load() == 0 && p.answers.n.Load() == 0 })
	}
}

// TestCallJSONUnread has a client that does not read its answer: it is given up as idle.
func TestCallJSONUnread(t *testing.T) {
	schema, types := bankSchema(t)
	_, address := newTeller(t)
	p := serve(t, "limits: {idle_timeout: 2s}\n"+one("\n  - {transcode: {descriptors: '"+schema+"', to: json}, upstream: up}", upstreamOf(address)))
	conn, err := grpc.NewClient("passthrough:///"+p.Address("web").String(), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithStaticStreamWindowSize(64<<10))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, "/bank.v1.Bank/Get")
	if err != nil {
		t.Fatal(err)
	}
	q, r := dynamicpb.NewMessage(types.ByName("Account")), dynamicpb.NewMessage(types.ByName("Account"))
	q.Set(q.Descriptor().Fields().ByName("id"), protoreflect.ValueOfString("large"))
	if err := s.SendMsg(q); err != nil {
		t.Fatal(err)
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "count of the answer", func() bool { return p.held.n.Load() > 3<<20 })
	waitFor(t, "end of the call", func() bool { return p.held.n.Load() == 0 })
	if err := s.RecvMsg(r); err == nil {
		t.Error("the call went on")
	}
}
