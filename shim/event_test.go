package shim

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/containerd/containerd/api/events"
	forward "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/ttrpc"
)

// hearer takes events as containerd does, and fails the first calls.
type hearer struct {
	mu    sync.Mutex
	fail  int
	heard []string
}

func (h *hearer) Forward(_ context.Context, r *forward.ForwardRequest) (*emptypb.Empty, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.fail > 0 {
		h.fail--
		return nil, errors.New("not now")
	}
	e := r.Envelope
	h.heard = append(h.heard, e.Namespace+" "+e.Topic+" "+e.Event.TypeUrl)
	return &emptypb.Empty{}, nil
}

// listenEvents serves events on a socket until the test ends.
func listenEvents(t *testing.T, h *hearer) (address string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "events")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	forward.RegisterTTRPCEventsService(server, h)
	done := make(chan struct{})
	go func() { defer close(done); server.Serve(context.Background(), ln) }()
	t.Cleanup(func() { server.Close(); <-done })
	return path
}

// TestEventsAreInOrder: also when containerd does not take one at once.
func TestEventsAreInOrder(t *testing.T) {
	h := &hearer{fail: 2}
	p := startPublisher(scheme+listenEvents(t, h), "space", slog.New(slog.NewTextHandler(io.Discard, nil)))
	all := []proto.Message{&events.TaskCreate{}, &events.TaskStart{}, &events.TaskExecAdded{}, &events.TaskExecStarted{},
		&events.TaskPaused{}, &events.TaskResumed{}, &events.TaskExit{}, &events.TaskDelete{}}
	var want []string
	for _, m := range all {
		want = append(want, "space "+topic(m)+" containerd.events."+string(m.ProtoReflect().Descriptor().Name()))
	}
	p.publish(all[0])
	waitFor(t, func() bool { h.mu.Lock(); defer h.mu.Unlock(); return len(h.heard) == 1 })
	for _, m := range all[1:] {
		p.publish(m)
	}
	p.Close()
	p.publish(all[0]) // after the end: dropped
	p.Close()
	if !slices.Equal(h.heard, want) {
		t.Errorf("heard %q, want %q", h.heard, want)
	}
}

// TestEventsWaitForNobody: without containerd an end is quick all the same.
func TestEventsWaitForNobody(t *testing.T) {
	for _, address := range []string{"", "/no/such/socket"} {
		p := startPublisher(address, "space", slog.New(slog.NewTextHandler(io.Discard, nil)))
		for range 10 {
			p.publish(&events.TaskExit{})
		}
		p.Close()
	}
}
