package http2

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	pb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"hauberk.dev/mesh/h2frame"
	"hauberk.dev/mesh/wire"
)

// mover is a proxy whose connections are put down and taken up again while they
// are in use.
type mover struct {
	t       *testing.T
	ln      net.Listener
	servers []string
	moves   atomic.Int64
	enough  atomic.Bool // moving stops
	clients atomic.Int64
	dialed  atomic.Int64
	failed  atomic.Int64 // requests that got no answer from their server
	wg      sync.WaitGroup
}

func newMover(t *testing.T, servers ...string) *mover {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m := &mover{t: t, ln: ln, servers: servers}
	m.wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			m.clients.Add(1)
			m.wg.Go(func() { m.serve(c.(*net.TCPConn)) })
		}
	})
	return m
}

// end waits for all clients to be served.
func (m *mover) end() {
	m.ln.Close()
	m.wg.Wait()
}

// group is a client's connection, the first, and those to its servers.
type group struct {
	m *mover

	mu     sync.Mutex
	frozen bool
	conns  []*Conn
	below  []*wire.Conn
	runs   sync.WaitGroup
	gone   map[*Conn]bool // whose Run returned something else than ErrFrozen
}

func (g *group) options(i int) Options {
	malformed := func(err error) { g.m.t.Errorf("connection %d: %v", i, err) }
	if i > 0 {
		return Options{Malformed: malformed}
	}
	return Options{Request: g.request, Malformed: malformed, Failed: func(s *Stream, err error) {
		g.m.failed.Add(1)
		s.Answer([]Field{{Name: ":status", Value: "502"}}, nil)
	}}
}

// request sends requests to all servers in turn.
func (g *group) request(s *Stream, h *Head) {
	s.Value = h.Path
	n := int(s.id/2)%len(g.m.servers) + 1
	g.mu.Lock()
	for len(g.conns) <= n {
		c, err := net.Dial("tcp", g.m.servers[len(g.conns)-1])
		if err != nil {
			g.m.t.Error(err)
			g.mu.Unlock()
			return
		}
		g.m.dialed.Add(1)
		w := wire.New(c.(*net.TCPConn))
		g.addLocked(w, Client(over{w}, g.options(len(g.conns))))
	}
	up := g.conns[n]
	g.mu.Unlock()
	if err := s.Forward(up, h); err != nil {
		g.m.t.Errorf("forward: %v", err)
		s.Reset(h2frame.CodeRefused)
	}
}

// addLocked runs a connection, which is frozen if the others are.
func (g *group) addLocked(w *wire.Conn, c *Conn) {
	g.conns, g.below = append(g.conns, c), append(g.below, w)
	if g.frozen {
		w.Freeze()
		c.Freeze()
	}
	g.run(c)
}

func (g *group) run(c *Conn) {
	g.runs.Go(func() {
		if err := c.Run(); !errors.Is(err, wire.ErrFrozen) {
			g.mu.Lock()
			g.gone[c] = true
			g.mu.Unlock()
		}
	})
}

// over is a Transport over a connection that can be put down.
type over struct{ *wire.Conn }

func (o over) Finish() { o.Close() }

func (m *mover) serve(client *net.TCPConn) {
	g := &group{m: m, gone: map[*Conn]bool{}}
	w := wire.New(client)
	g.mu.Lock()
	g.addLocked(w, Server(over{w}, g.options(0)))
	g.mu.Unlock()
	for {
		g.mu.Lock()
		down := g.conns[0]
		g.mu.Unlock()
		if !m.enough.Load() {
			time.Sleep(time.Duration(rand.IntN(3000)) * time.Microsecond)
		} else {
			<-down.Done()
		}
		g.mu.Lock()
		over := g.gone[down] || down.Err() != nil
		g.mu.Unlock()
		if over || !g.move() {
			break
		}
	}
	g.mu.Lock()
	for _, c := range g.conns {
		c.Close()
	}
	g.mu.Unlock()
	g.runs.Wait()
}

// move tells whether there was still a client.
func (g *group) move() bool {
	g.mu.Lock()
	g.frozen = true
	for i, c := range g.conns {
		if i%2 == 0 { // in either order
			c.Freeze()
		}
		g.below[i].Freeze()
		c.Freeze()
	}
	g.mu.Unlock()
	g.runs.Wait()
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, c := range g.conns {
		if g.gone[c] { // the test has no server that goes first
			return false
		}
	}
	s, err := Save(g.conns, func(s *Stream) (json.RawMessage, error) { return json.Marshal(s.Value) })
	if err != nil {
		g.m.t.Error(err)
		return false
	}
	s = throughJSON(g.m.t, s)
	below := make([]Transport, len(g.below))
	for i := range g.below {
		if g.below[i], err = carried(g.below[i]); err != nil {
			g.m.t.Error(err)
			return false
		}
		below[i] = over{g.below[i]}
	}
	g.conns, err = Resume(s, below, g.options, func(b json.RawMessage) (any, error) {
		var v string
		err := json.Unmarshal(b, &v)
		return v, err
	})
	if err != nil {
		g.m.t.Error(err)
		return false
	}
	g.frozen = false
	for i, c := range g.conns {
		g.below[i].Thaw()
		g.run(c)
	}
	g.m.moves.Add(1)
	return true
}

// carried is the connection as another process would get it.
func carried(c *wire.Conn) (*wire.Conn, error) {
	b, err := json.Marshal(c.State())
	if err != nil {
		return nil, err
	}
	var s wire.State
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, err
	}
	f, err := c.TCP().File()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	n, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	c.Close()
	return wire.Resume(n.(*net.TCPConn), s), nil
}

// echoServer is gRPC's own test service.
type echoServer struct {
	pb.UnimplementedTestServiceServer
}

func (echoServer) UnaryCall(ctx context.Context, r *pb.SimpleRequest) (*pb.SimpleResponse, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	grpc.SetHeader(ctx, metadata.Pairs("head-bin", strings.Join(md.Get("n-bin"), "")))
	grpc.SetTrailer(ctx, metadata.Pairs("tail-bin", strings.Join(md.Get("n-bin"), "")))
	if s := r.GetResponseStatus(); s != nil {
		return nil, status.Error(codes.Code(s.Code), s.Message)
	}
	return &pb.SimpleResponse{Payload: r.GetPayload()}, nil
}

func (echoServer) StreamingOutputCall(r *pb.StreamingOutputCallRequest, s pb.TestService_StreamingOutputCallServer) error {
	for i, p := range r.GetResponseParameters() {
		if err := s.Send(&pb.StreamingOutputCallResponse{Payload: &pb.Payload{Body: bytes.Repeat([]byte{byte(i)}, int(p.GetSize()))}}); err != nil {
			return err
		}
	}
	return nil
}

func (echoServer) StreamingInputCall(s pb.TestService_StreamingInputCallServer) error {
	sum, n := sha256.New(), 0
	for {
		r, err := s.Recv()
		if err == io.EOF {
			grpc.SetTrailer(s.Context(), metadata.Pairs("sum-bin", string(sum.Sum(nil))))
			return s.SendAndClose(&pb.StreamingInputCallResponse{AggregatedPayloadSize: int32(n)})
		}
		if err != nil {
			return err
		}
		sum.Write(r.GetPayload().GetBody())
		n += len(r.GetPayload().GetBody())
	}
}

func (echoServer) FullDuplexCall(s pb.TestService_FullDuplexCallServer) error {
	for {
		r, err := s.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if err := s.Send(&pb.StreamingOutputCallResponse{Payload: r.GetPayload()}); err != nil {
			return err
		}
	}
}

func noise(most int) []byte {
	b := make([]byte, rand.IntN(most))
	random := rand.NewChaCha8([32]byte{byte(rand.Uint32()), byte(rand.Uint32())})
	random.Read(b)
	return b
}

// kinds are the ways to call. Each returns what went wrong.
var kinds = map[string]func(context.Context, pb.TestServiceClient) error{
	"unary": func(ctx context.Context, c pb.TestServiceClient) error {
		b, n := noise(50_000), string(noise(100))
		var head, tail metadata.MD
		r, err := c.UnaryCall(metadata.AppendToOutgoingContext(ctx, "n-bin", n), &pb.SimpleRequest{Payload: &pb.Payload{Body: b}}, grpc.Header(&head), grpc.Trailer(&tail))
		if err == nil && !bytes.Equal(r.GetPayload().GetBody(), b) {
			err = errors.New("another message came back")
		}
		if err == nil && (strings.Join(head.Get("head-bin"), "") != n || strings.Join(tail.Get("tail-bin"), "") != n) {
			err = fmt.Errorf("head %q, tail %q; want %q", head, tail, n)
		}
		return err
	},
	"status": func(ctx context.Context, c pb.TestServiceClient) error {
		_, err := c.UnaryCall(ctx, &pb.SimpleRequest{ResponseStatus: &pb.EchoStatus{Code: 9, Message: "ünknown\n"}})
		if s := status.Convert(err); s.Code() != 9 || s.Message() != "ünknown\n" {
			return fmt.Errorf("status %v", err)
		}
		return nil
	},
	"down": func(ctx context.Context, c pb.TestServiceClient) error {
		r := &pb.StreamingOutputCallRequest{}
		for range 20 {
			r.ResponseParameters = append(r.ResponseParameters, &pb.ResponseParameters{Size: int32(rand.IntN(40_000))})
		}
		s, err := c.StreamingOutputCall(ctx, r)
		if err != nil {
			return err
		}
		for i, p := range r.ResponseParameters {
			m, err := s.Recv()
			if err != nil {
				return err
			}
			if !bytes.Equal(m.GetPayload().GetBody(), bytes.Repeat([]byte{byte(i)}, int(p.Size))) {
				return fmt.Errorf("message %d is another", i)
			}
			if i%4 == 0 {
				time.Sleep(time.Duration(rand.IntN(3)) * time.Millisecond) // so that windows fill
			}
		}
		if _, err := s.Recv(); err != io.EOF {
			return fmt.Errorf("the end is %w", err)
		}
		return nil
	},
	"up": func(ctx context.Context, c pb.TestServiceClient) error {
		s, err := c.StreamingInputCall(ctx)
		if err != nil {
			return err
		}
		sum, n := sha256.New(), 0
		for range rand.IntN(20) {
			b := noise(40_000)
			sum.Write(b)
			n += len(b)
			if err := s.Send(&pb.StreamingInputCallRequest{Payload: &pb.Payload{Body: b}}); err != nil {
				return err
			}
		}
		r, err := s.CloseAndRecv()
		if err != nil {
			return err
		}
		if int(r.GetAggregatedPayloadSize()) != n || strings.Join(s.Trailer().Get("sum-bin"), "") != string(sum.Sum(nil)) {
			return errors.New("the server has got something else")
		}
		return nil
	},
	"both": func(ctx context.Context, c pb.TestServiceClient) error {
		s, err := c.FullDuplexCall(ctx)
		if err != nil {
			return err
		}
		for range 1 + rand.IntN(30) {
			b := noise(5_000)
			if err := s.Send(&pb.StreamingOutputCallRequest{Payload: &pb.Payload{Body: b}}); err != nil {
				return err
			}
			r, err := s.Recv()
			if err != nil {
				return err
			}
			if !bytes.Equal(r.GetPayload().GetBody(), b) {
				return errors.New("another message came back")
			}
		}
		s.CloseSend()
		if _, err := s.Recv(); err != io.EOF {
			return fmt.Errorf("the end is %w", err)
		}
		return nil
	},
	"cancel": func(ctx context.Context, c pb.TestServiceClient) error {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		s, err := c.FullDuplexCall(ctx)
		if err != nil {
			return err
		}
		if err := s.Send(&pb.StreamingOutputCallRequest{Payload: &pb.Payload{Body: noise(100_000)}}); err != nil {
			return err
		}
		cancel()
		for err == nil {
			_, err = s.Recv()
		}
		if status.Code(err) != codes.Canceled {
			return err
		}
		time.Sleep(30 * time.Millisecond) // more than so many resets are not taken
		return nil
	},
}

// TestGRPCMoved makes every kind of call between gRPC's own client and server
// through a proxy that is moved hundreds of times. No call fails, and no
// connection is made twice.
func TestGRPCMoved(t *testing.T) {
	var servers []string
	for range 2 {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		srv := grpc.NewServer(grpc.MaxRecvMsgSize(64 << 20))
		pb.RegisterTestServiceServer(srv, echoServer{})
		go srv.Serve(ln)
		t.Cleanup(srv.Stop)
		servers = append(servers, ln.Addr().String())
	}
	m := newMover(t, servers...)
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	const clients, moves = 3, 300
	var calls sync.WaitGroup
	var done atomic.Int64
	var conns []*grpc.ClientConn
	for range clients {
		cc, err := grpc.NewClient("passthrough:///"+m.ln.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, cc)
		client := pb.NewTestServiceClient(cc)
		for name, call := range kinds {
			calls.Go(func() {
				for n := 0; n < 3 || m.moves.Load() < moves; n++ {
					if err := call(ctx, client); err != nil {
						t.Errorf("%s after %d moves: %v", name, m.moves.Load(), err)
						return
					}
					done.Add(1)
				}
			})
		}
	}
	calls.Wait()
	for _, cc := range conns {
		cc.Close()
	}
	m.enough.Store(true)
	m.end()
	t.Logf("%d calls, moved %d times", done.Load(), m.moves.Load())
	if n, d, f := m.clients.Load(), m.dialed.Load(), m.failed.Load(); n != clients || d != clients*int64(len(servers)) || f != 0 {
		t.Errorf("%d connections of clients, %d to servers, %d requests failed", n, d, f)
	}
}
