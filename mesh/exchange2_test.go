package mesh

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	pb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/http2"
	"hauberk.dev/plan"
)

var grpcPort = []plan.Port{{Port: 9090, Protocol: "grpc"}}

// bankServer is gRPC's own test service.
type bankServer struct {
	pb.UnimplementedTestServiceServer
	cancelled chan struct{}
}

func (*bankServer) EmptyCall(ctx context.Context, _ *pb.Empty) (*pb.Empty, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	grpc.SetHeader(ctx, metadata.Pairs("head", strings.Join(md.Get("head"), "")))
	grpc.SetTrailer(ctx, metadata.Pairs("tail-bin", strings.Join(md.Get("tail-bin"), "")))
	return &pb.Empty{}, nil
}

func (*bankServer) UnaryCall(ctx context.Context, r *pb.SimpleRequest) (*pb.SimpleResponse, error) {
	if s := r.GetResponseStatus(); s != nil {
		return nil, status.Error(codes.Code(s.Code), s.Message)
	}
	return &pb.SimpleResponse{Payload: &pb.Payload{Body: r.GetPayload().GetBody()}}, nil
}

func (*bankServer) StreamingOutputCall(r *pb.StreamingOutputCallRequest, s pb.TestService_StreamingOutputCallServer) error {
	for _, p := range r.GetResponseParameters() {
		if err := s.Send(&pb.StreamingOutputCallResponse{Payload: &pb.Payload{Body: make([]byte, p.GetSize())}}); err != nil {
			return err
		}
	}
	return nil
}

func (*bankServer) StreamingInputCall(s pb.TestService_StreamingInputCallServer) error {
	n := 0
	for {
		r, err := s.Recv()
		if err == io.EOF {
			return s.SendAndClose(&pb.StreamingInputCallResponse{AggregatedPayloadSize: int32(n)})
		}
		if err != nil {
			return err
		}
		n += len(r.GetPayload().GetBody())
	}
}

func (b *bankServer) FullDuplexCall(s pb.TestService_FullDuplexCallServer) error {
	for {
		r, err := s.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			b.cancelled <- struct{}{}
			return err
		}
		if err := s.Send(&pb.StreamingOutputCallResponse{Payload: r.GetPayload()}); err != nil {
			return err
		}
	}
}

// serveGRPC runs the test service in a guest.
func (b *box) serveGRPC(t testing.TB) (*bankServer, *grpc.Server) {
	bank, srv := &bankServer{cancelled: make(chan struct{}, 100)}, grpc.NewServer(grpc.MaxRecvMsgSize(64<<20))
	pb.RegisterTestServiceServer(srv, bank)
	go srv.Serve(b.listen(t, 9090))
	t.Cleanup(srv.Stop)
	return bank, srv
}

// grpcClient calls from a guest.
func (b *box) grpcClient(t testing.TB, address string) pb.TestServiceClient {
	t.Helper()
	c, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return b.dial("tcp4", address) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return pb.NewTestServiceClient(c)
}

// TestGRPC passes every kind of call between gRPC's own client and server, over
// two proxies' worth of connections.
func TestGRPC(t *testing.T) {
	w := newWorld(t)
	web, bank := w.add("web", nil, nil, nil), w.add("bank", grpcPort, anyone(), nil)
	w.apply()
	served, _ := bank.serveGRPC(t)
	client := web.grpcClient(t, w.service("bank").Address.String()+":9090")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()

	var head, tail metadata.MD
	md := metadata.NewOutgoingContext(ctx, metadata.Pairs("head", "h", "tail-bin", "\x00\xff"))
	if _, err := client.EmptyCall(md, &pb.Empty{}, grpc.Header(&head), grpc.Trailer(&tail)); err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(head.Get("head"), tail.Get("tail-bin")) != "[h] [\x00\xff]" {
		t.Errorf("header %v, trailer %v", head, tail)
	}
	large := make([]byte, 20<<20)
	if r, err := client.UnaryCall(ctx, &pb.SimpleRequest{Payload: &pb.Payload{Body: large}}); err != nil || len(r.GetPayload().GetBody()) != len(large) {
		t.Errorf("large message: %v", err)
	}
	_, err := client.UnaryCall(ctx, &pb.SimpleRequest{ResponseStatus: &pb.EchoStatus{Code: 9, Message: "ünknown\n"}})
	if s := status.Convert(err); s.Code() != 9 || s.Message() != "ünknown\n" {
		t.Errorf("status %v", err)
	}
	if _, err := client.UnimplementedCall(ctx, &pb.Empty{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("unimplemented: %v", err)
	}
	grpcStreams(t, ctx, client)

	// A deadline and a cancellation reach the server.
	for name, stop := range map[string]func(context.Context) (context.Context, func()){
		"deadline": func(ctx context.Context) (context.Context, func()) {
			ctx, c := context.WithTimeout(ctx, 300*time.Millisecond)
			return ctx, func() { <-ctx.Done(); c() }
		},
		"cancel": func(ctx context.Context) (context.Context, func()) { return context.WithCancel(ctx) },
	} {
		ctx, end := stop(ctx)
		s, err := client.FullDuplexCall(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Send(&pb.StreamingOutputCallRequest{}); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); err != nil && name == "cancel" {
			t.Fatal(err)
		}
		end()
		if _, err := s.Recv(); status.Code(err) != codes.Canceled && status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("%s: %v", name, err)
		}
		select {
		case <-served.cancelled:
		case <-time.After(30 * time.Second):
			t.Errorf("%s: the server was not told", name)
		}
	}
}

// grpcStreams streams in each direction and in both.
func grpcStreams(t *testing.T, ctx context.Context, client pb.TestServiceClient) {
	t.Helper()
	const times, size = 200, 50_000
	in, err := client.StreamingInputCall(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var sizes []*pb.ResponseParameters
	for range times {
		sizes = append(sizes, &pb.ResponseParameters{Size: size})
		if err := in.Send(&pb.StreamingInputCallRequest{Payload: &pb.Payload{Body: make([]byte, size)}}); err != nil {
			t.Fatal(err)
		}
	}
	if r, err := in.CloseAndRecv(); err != nil || r.GetAggregatedPayloadSize() != times*size {
		t.Errorf("client streaming: %v, %v", r, err)
	}
	out, err := client.StreamingOutputCall(ctx, &pb.StreamingOutputCallRequest{ResponseParameters: sizes})
	n := 0
	for err == nil {
		var r *pb.StreamingOutputCallResponse
		if r, err = out.Recv(); err == nil {
			n += len(r.GetPayload().GetBody())
		}
	}
	if err != io.EOF || n != times*size {
		t.Errorf("server streaming: %d bytes, %v", n, err)
	}
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			s, err := client.FullDuplexCall(ctx)
			if err != nil {
				t.Error(err)
				return
			}
			for i := range 50 {
				if err := s.Send(&pb.StreamingOutputCallRequest{Payload: &pb.Payload{Body: make([]byte, i*100)}}); err != nil {
					t.Error(err)
					return
				}
				if r, err := s.Recv(); err != nil || len(r.GetPayload().GetBody()) != i*100 {
					t.Errorf("message %d: %v", i, err)
					return
				}
			}
			s.CloseSend()
			if _, err := s.Recv(); err != io.EOF {
				t.Errorf("end: %v", err)
			}
		})
	}
	wg.Wait()
}

// TestGRPCRules refuses single calls, in gRPC's words, and ends those under way
// that a new plan forbids; the others of the connection go on.
func TestGRPCRules(t *testing.T) {
	w := newWorld(t)
	web, evil := w.add("web", nil, nil, nil), w.add("evil", nil, nil, nil)
	bank := w.add("bank", grpcPort, []plan.Rule{{Name: "bank/calls", From: []string{spiffe("web")}, Paths: []string{"/grpc.testing.TestService/*"}}},
		[]plan.Rule{{Name: "bank/never", From: []string{"*"}, Paths: []string{"/grpc.testing.TestService/UnaryCall"}}})
	w.apply()
	bank.serveGRPC(t)
	address := w.service("bank").Address.String() + ":9090"
	client := web.grpcClient(t, address)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()

	stay, err := client.FullDuplexCall(ctx)
	if err != nil {
		t.Fatal(err)
	}
	echo := func() error {
		if err := stay.Send(&pb.StreamingOutputCallRequest{}); err != nil && err != io.EOF {
			return err
		}
		_, err := stay.Recv()
		return err
	}
	if err := echo(); err != nil {
		t.Fatal(err)
	}
	_, err = client.UnaryCall(ctx, &pb.SimpleRequest{Payload: &pb.Payload{Body: make([]byte, 3<<20)}})
	if s := status.Convert(err); s.Code() != codes.PermissionDenied || !strings.Contains(s.Message(), "bank/never") || !strings.Contains(s.Message(), "hauberk why bank-1") {
		t.Errorf("a denied call: %v", err)
	}
	w.awaitEvent(api.EventAccessDenied, "UnaryCall")
	if _, err := evil.grpcClient(t, address).EmptyCall(ctx, &pb.Empty{}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a stranger: %v", err)
	}
	if _, err := client.EmptyCall(ctx, &pb.Empty{}); err != nil {
		t.Errorf("beside: %v", err)
	}
	if err := echo(); err != nil {
		t.Errorf("the stream beside: %v", err)
	}
	w.service("bank").Deny[0].Paths = []string{"/grpc.testing.TestService/FullDuplexCall"}
	w.plan.Generation++
	w.apply()
	if err := echo(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a stream that the plan forbids now: %v", err)
	}
	w.awaitEvent(api.EventAccessDenied, "under way")
	if _, err := client.UnaryCall(ctx, &pb.SimpleRequest{}); err != nil {
		t.Errorf("a call that the plan allows now: %v", err)
	}

	// By service and method; gRPC's Post is not HTTP's POST.
	const service = "grpc.testing.TestService"
	for _, c := range []struct {
		deny, allow  plan.Rule
		empty, unary codes.Code
	}{
		{plan.Rule{From: []string{"*"}, Services: []string{service}, Methods: []string{"EmptyCall"}}, anyone()[0], codes.PermissionDenied, codes.OK},
		{plan.Rule{From: []string{"*"}, Services: []string{"grpc.testing.Other"}}, plan.Rule{From: []string{"*"}, Services: []string{service}}, codes.OK, codes.OK},
		{plan.Rule{From: []string{"*"}, Methods: []string{"post"}}, plan.Rule{From: []string{"*"}, Services: []string{"grpc.testing.*"}, Methods: []string{"UnaryCall", "Post"}}, codes.PermissionDenied, codes.OK},
		{plan.Rule{From: []string{"*"}, Services: []string{"grpc.*"}}, anyone()[0], codes.PermissionDenied, codes.PermissionDenied},
	} {
		s := w.service("bank")
		s.Deny, s.Allow = []plan.Rule{c.deny}, []plan.Rule{c.allow}
		w.plan.Generation++
		w.apply()
		_, empty := client.EmptyCall(ctx, &pb.Empty{})
		_, unary := client.UnaryCall(ctx, &pb.SimpleRequest{})
		if status.Code(empty) != c.empty || status.Code(unary) != c.unary {
			t.Errorf("deny %+v, allow %+v: %v and %v", c.deny, c.allow, empty, unary)
		}
	}

	// The server is gone, and its service has no endpoint: said in gRPC's words.
	w.service("bank").Endpoints = nil
	w.plan.Generation++
	w.apply()
	_, err = web.grpcClient(t, address).EmptyCall(ctx, &pb.Empty{})
	if s := status.Convert(err); s.Code() != codes.Unavailable || !strings.Contains(s.Message(), "no endpoint") {
		t.Errorf("without an endpoint: %v", err)
	}
}

// http2Client speaks HTTP/2 with prior knowledge.
func (b *box) http2Client(t testing.TB) *http.Client {
	tr := &http.Transport{Protocols: new(http.Protocols), DialContext: func(_ context.Context, network, address string) (net.Conn, error) { return b.dial(network, address) }}
	tr.Protocols.SetUnencryptedHTTP2(true)
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: time.Minute}
}

// TestHTTP2Rules judges each request of HTTP/2 on a port that speaks HTTP/1 too.
func TestHTTP2Rules(t *testing.T) {
	w := newWorld(t)
	web := w.add("web", nil, nil, nil)
	b := w.add("api", httpPort, []plan.Rule{
		{Name: "api/read", From: []string{spiffe("web")}, Methods: []string{"GET", "HEAD"}, Paths: []string{"/accounts*", "/"}},
		{Name: "api/write", From: []string{spiffe("web")}, Methods: []string{"POST"}, Paths: []string{"/payments"}},
	}, []plan.Rule{{Name: "api/never", From: []string{"*"}, Paths: []string{"/accounts/secret*"}}})
	w.apply()
	var mu sync.Mutex
	served := map[string]bool{}
	srv := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		mu.Lock()
		served[r.Method+" "+r.RequestURI] = true
		mu.Unlock()
		fmt.Fprintf(rw, "%s %s %d", r.Proto, r.URL.Path, len(body))
	})}
	srv.Protocols.SetHTTP1(true)
	srv.Protocols.SetUnencryptedHTTP2(true)
	go srv.Serve(b.listen(t, 8080))
	defer srv.Close()
	two := web.http2Client(t)
	one := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: two.Transport.(*http.Transport).DialContext}, Timeout: time.Minute}
	base := "http://" + w.service("api").Address.String() + ":8080"
	for _, c := range []struct {
		method, path, body string
		status             int
		rule               string
	}{
		{"GET", "/", "", 200, ""},
		{"GET", "/accounts/7?x=y", "", 200, ""},
		{"HEAD", "/accounts", "", 200, ""},
		{"POST", "/payments", strings.Repeat("p", 1<<20), 200, ""},
		{"POST", "/accounts", strings.Repeat("p", 200_000), 403, ""}, // HTTP/1 lingers for 256 KiB
		{"DELETE", "/accounts", "", 403, ""},
		{"GET", "/accounts/secret", "", 403, "api/never"},
		{"GET", "/accounts/%73ecret/1", "", 403, "api/never"},
		{"GET", "/accounts/../admin", "", 400, ""},
		{"GET", "/accounts//secret", "", 400, ""},
		{"TRACE", "/", "", 405, ""},
		{"GET", "/accounts/8", "", 200, ""},
	} {
		for _, client := range []*http.Client{two, one} {
			req, err := http.NewRequest(c.method, base+c.path, strings.NewReader(c.body))
			if err != nil {
				t.Fatal(err)
			}
			resp, err := client.Do(req)
			if err != nil {
				t.Errorf("%s %s: %v", c.method, c.path, err)
				continue
			}
			body, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			if resp.StatusCode != c.status || (resp.ProtoMajor == 2) != (client == two) {
				t.Errorf("%s %s: %s %d %s, want %d", c.method, c.path, resp.Proto, resp.StatusCode, body, c.status)
			}
			var r refusal
			if err := json.Unmarshal(body, &r); c.status != 200 && (err != nil || r.Rule != c.rule || r.Reason == "" || r.Caller != spiffe("web") || !strings.Contains(r.Hint, "hauberk why")) {
				t.Errorf("%s %s: body %s, %v", c.method, c.path, body, err)
			}
		}
	}
	mu.Lock()
	for s := range served {
		if strings.Contains(s, "secret") || strings.Contains(s, "admin") || strings.HasPrefix(s, "DELETE") {
			t.Errorf("the server has seen %s", s)
		}
	}
	mu.Unlock()
	w.awaitEvent(api.EventAccessDenied, "api/never")

	// Malformed requests are told of.
	c := web.mustDial(t, base[len("http://"):])
	io.WriteString(c, http2.Preface+"\x00\x00\x00\x04\x00\x00\x00\x00\x00"+"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	if all, err := io.ReadAll(c); err != nil || !strings.Contains(string(all), "\x07"+strings.Repeat("\x00", 12)+"\x01") {
		t.Errorf("no GOAWAY in %q, %v", all, err)
	}
	w.awaitEvent(api.EventBadRequest, "WINDOW_UPDATE of nothing")

	// A service without an endpoint.
	w.service("api").Endpoints = nil
	w.plan.Generation++
	w.apply()
	for _, client := range []*http.Client{web.http2Client(t), one} {
		resp, err := client.Get(base + "/")
		if err != nil {
			t.Error(err)
			continue
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != 503 || !strings.Contains(string(body), "no endpoint") {
			t.Errorf("%s %d %s", resp.Proto, resp.StatusCode, body)
		}
	}
}

// TestHTTP2Cut ends connections with streams under way when a party is revoked,
// and asks a server that has ended anew.
func TestHTTP2Cut(t *testing.T) {
	w := newWorld(t)
	web, bank := w.add("web", nil, nil, nil), w.add("bank", grpcPort, anyone(), nil)
	w.apply()
	_, srv := bank.serveGRPC(t)
	address := w.service("bank").Address.String() + ":9090"
	client := web.grpcClient(t, address)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := client.EmptyCall(ctx, &pb.Empty{}); err != nil {
		t.Fatal(err)
	}
	srv.Stop() // idle: nobody loses a call
	bank.serveGRPC(t)
	// Until the end of the old connection is seen, a call may meet it.
	for ctx.Err() == nil {
		if _, err := client.EmptyCall(ctx, &pb.Empty{}); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	for range 3 {
		if _, err := client.EmptyCall(ctx, &pb.Empty{}); err != nil {
			t.Errorf("after the server has started again: %v", err)
		}
	}
	s, err := client.FullDuplexCall(ctx)
	if err == nil {
		err = errors.Join(s.Send(&pb.StreamingOutputCallRequest{}))
	}
	if err == nil {
		_, err = s.Recv()
	}
	if err != nil {
		t.Fatal(err)
	}
	r, err := w.link.Cut(ctx, plan.Epoch{Number: 1, Identities: []string{spiffe("web")}})
	if err != nil || r.Connections == 0 {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := s.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("a stream of the revoked: %v", err)
	}
	if _, err := client.EmptyCall(ctx, &pb.Empty{}); status.Code(err) != codes.Unavailable {
		t.Errorf("a call of the revoked: %v", err)
	}
}

// TestNoH2C: an upgrade to HTTP/2, or to TLS, would carry requests that nobody
// judges.
func TestNoH2C(t *testing.T) {
	w := newWorld(t)
	web, b := w.add("web", nil, nil, nil), w.add("api", httpPort, anyone(), nil)
	w.apply()
	heads := make(chan http.Header, 10)
	srv := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { heads <- r.Header })}
	go srv.Serve(b.listen(t, 8080))
	defer srv.Close()
	for _, offer := range []string{"websocket, H2C", "h2c-14", "TLS/1.2, HTTP/1.1", "http/1.1", "h2", "websocket,HTTP/2.0"} {
		c := web.mustDial(t, w.service("api").Address.String()+":8080")
		defer c.Close()
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings, close\r\nupgrade: "+offer+"\r\nA: b\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n")
		got, err := io.ReadAll(c)
		if err != nil || !strings.HasPrefix(string(got), "HTTP/1.1 200 ") {
			t.Fatalf("%s: %q, %v", offer, got, err)
		}
		if h := <-heads; h.Get("Upgrade") != "" || h.Get("HTTP2-Settings") != "" || h.Get("A") != "b" {
			t.Errorf("%s: the server was offered %v", offer, h)
		}
	}
}
