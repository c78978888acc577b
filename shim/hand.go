package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"path"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/containerd/ttrpc"

	"hauberk.dev/api/hand"
	"hauberk.dev/internal/strictjson"
)

const (
	maxHand = 2 << 20
	// dialTime bounds how long a caller's socket may take to answer.
	dialTime = 5 * time.Second
)

// handMethods answer those who run sandboxes by hand.
func (s *service) handMethods() map[string]ttrpc.Method {
	return map[string]ttrpc.Method{
		hand.MethodCopy: spoken(s.Copy), hand.MethodTop: spoken(s.Top), hand.MethodSnapshot: spoken(s.Snapshot),
	}
}

// spoken makes a method callable whose messages are JSON.
func spoken[Q, A any](f func(context.Context, *Q) (*A, error)) ttrpc.Method {
	return method(func(ctx context.Context, in *wrapperspb.BytesValue) (*wrapperspb.BytesValue, error) {
		q := new(Q)
		if err := strictjson.Decode(in.GetValue(), maxHand, q); err != nil {
			return nil, invalid(fmt.Errorf("read request: %w", err))
		}
		a, err := f(ctx, q)
		if err != nil {
			return nil, err
		}
		raw, err := json.Marshal(a)
		if err != nil {
			return nil, fmt.Errorf("write answer: %w", err)
		}
		return wrapperspb.Bytes(raw), nil
	})
}

// living is a container whose first process runs.
func (s *service) living(id string) (*running, error) {
	c, p, err := s.process(id, "")
	if err != nil {
		return nil, err
	}
	if ph, _, _ := p.state(); ph == phaseStopped || p.process() == nil {
		return nil, status.Errorf(codes.FailedPrecondition, "container %q does not run", id)
	}
	if c.isPaused() {
		return nil, status.Errorf(codes.FailedPrecondition, "container %q is paused", id)
	}
	return p, nil
}

// Copy copies files into or out of a container, over a socket of the caller's.
func (s *service) Copy(ctx context.Context, q *hand.CopyRequest) (*hand.Empty, error) {
	if !path.IsAbs(q.Path) || !path.IsAbs(q.Socket) {
		return nil, invalid(fmt.Errorf("copy files of %q: path %.256q, socket %.256q: want absolute ones", q.Container, q.Path, q.Socket))
	}
	p, err := s.living(q.Container)
	if err != nil {
		return nil, err
	}
	d := net.Dialer{Timeout: dialTime}
	conn, err := d.DialContext(ctx, "unix", q.Socket)
	if err != nil {
		return nil, fmt.Errorf("copy files of %q: %w", q.Container, err)
	}
	defer conn.Close()
	// A caller that leaves ends the copy, also one that the guest holds up.
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if q.Out {
		err = p.process().CopyOut(ctx, q.Path, conn)
	} else if err = p.process().CopyIn(ctx, q.Path, conn); err == nil {
		_, err = io.Copy(io.Discard, conn) // what pads a tar is nobody's, but must be taken
	}
	if err != nil {
		return nil, errors.Join(err, context.Cause(ctx))
	}
	return &hand.Empty{}, nil
}

// Top lists what runs in a container.
func (s *service) Top(ctx context.Context, q *hand.TopRequest) (*hand.TopReply, error) {
	p, err := s.living(q.Container)
	if err != nil {
		return nil, err
	}
	list, err := p.process().Top(ctx)
	if err != nil {
		return nil, err
	}
	out := &hand.TopReply{Tasks: []hand.Task{}}
	for _, t := range list {
		out.Tasks = append(out.Tasks, hand.Task{
			PID: t.PID, Parent: t.Parent, UID: t.UID, Resident: t.Resident, CPUMicros: t.CPUMicros, Name: t.Name,
		})
	}
	return out, nil
}
