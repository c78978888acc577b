package meshload

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	pb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// grpcServer is the service of gRPC's own tests.
type grpcServer struct {
	pb.UnimplementedTestServiceServer
	ledger *Ledger
}

func (s *grpcServer) note(ctx context.Context) {
	md, _ := metadata.FromIncomingContext(ctx)
	if id, err := strconv.ParseUint(strings.Join(md.Get("id"), ""), 10, 64); err == nil {
		s.ledger.note(id)
	}
}

func (s *grpcServer) UnaryCall(ctx context.Context, r *pb.SimpleRequest) (*pb.SimpleResponse, error) {
	s.note(ctx)
	return &pb.SimpleResponse{Payload: r.GetPayload()}, nil
}

func (s *grpcServer) FullDuplexCall(st pb.TestService_FullDuplexCallServer) error {
	s.note(st.Context())
	for {
		r, err := st.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if err := st.Send(&pb.StreamingOutputCallResponse{Payload: r.GetPayload()}); err != nil {
			return err
		}
	}
}

func serveGRPC(ln net.Listener, l *Ledger) func() {
	srv := grpc.NewServer()
	pb.RegisterTestServiceServer(srv, &grpcServer{ledger: l})
	go srv.Serve(ln)
	return srv.Stop
}

type grpcClient struct {
	dial func() (net.Conn, error)
	conn *grpc.ClientConn
	stub pb.TestServiceClient
}

func (g *grpcClient) open() error {
	if g.conn != nil {
		return nil
	}
	c, err := grpc.NewClient("passthrough:///load", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableRetry(),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return g.dial() }))
	if err != nil {
		return err
	}
	g.conn, g.stub = c, pb.NewTestServiceClient(c)
	return nil
}

// Ask makes a unary call, or if its number is odd a stream both ways.
func (g *grpcClient) Ask(id uint64, size int) error {
	if err := g.open(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	err := g.call(metadata.AppendToOutgoingContext(ctx, "id", strconv.FormatUint(id, 10)), id, size)
	if err == nil {
		return nil
	}
	if s, ok := status.FromError(err); ok && (s.Code() == codes.PermissionDenied || strings.Contains(s.Message(), "hauberk why")) {
		return &Refused{err.Error()}
	}
	g.Close() // no waiting for gRPC's own pause before it dials again
	return err
}

func (g *grpcClient) call(ctx context.Context, id uint64, size int) error {
	payload := &pb.Payload{Body: body(id, size)}
	if id%2 == 0 {
		r, err := g.stub.UnaryCall(ctx, &pb.SimpleRequest{Payload: payload})
		if err == nil && !bytes.Equal(r.GetPayload().GetBody(), payload.Body) {
			err = fmt.Errorf("%d: another body came back", id)
		}
		return err
	}
	s, err := g.stub.FullDuplexCall(ctx)
	if err != nil {
		return err
	}
	for range 3 {
		if err := s.Send(&pb.StreamingOutputCallRequest{Payload: payload}); err != nil && err != io.EOF {
			return err
		}
		r, err := s.Recv()
		if err != nil {
			return err
		}
		if !bytes.Equal(r.GetPayload().GetBody(), payload.Body) {
			return fmt.Errorf("%d: another body came back", id)
		}
	}
	s.CloseSend()
	if _, err := s.Recv(); err != io.EOF {
		return fmt.Errorf("the end of a stream: %w", err)
	}
	return nil
}

func (g *grpcClient) Abort(id uint64, size int, at uint8) {
	if g.open() != nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s, err := g.stub.FullDuplexCall(metadata.AppendToOutgoingContext(ctx, "id", strconv.FormatUint(id, 10)))
	if err == nil && at > 40 {
		err = s.Send(&pb.StreamingOutputCallRequest{Payload: &pb.Payload{Body: body(id, size)}})
	}
	if err == nil && at > 128 {
		s.Recv()
	}
	cancel()
	if s != nil { // its end has been seen
		s.Recv()
	}
	if at%5 == 0 {
		g.Close()
	}
}

func (g *grpcClient) Close() {
	if g.conn != nil {
		g.conn.Close()
		g.conn = nil
	}
}
