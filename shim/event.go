package shim

import (
	"context"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/containerd/containerd/api/events"
	forward "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/ttrpc"
)

const (
	maxEvents = 1024
	eventTry  = 5 * time.Second
	eventRest = 100 * time.Millisecond
	// eventLife is how long an event waits for a containerd that restarts.
	eventLife = 30 * time.Second
)

// topics of what happens to a task.
func topic(m proto.Message) string {
	switch m.(type) {
	case *events.TaskCreate:
		return "/tasks/create"
	case *events.TaskStart:
		return "/tasks/start"
	case *events.TaskExecAdded:
		return "/tasks/exec-added"
	case *events.TaskExecStarted:
		return "/tasks/exec-started"
	case *events.TaskExit:
		return "/tasks/exit"
	case *events.TaskDelete:
		return "/tasks/delete"
	case *events.TaskPaused:
		return "/tasks/paused"
	case *events.TaskResumed:
		return "/tasks/resumed"
	case *events.TaskOOM:
		return "/tasks/oom"
	}
	return "/tasks/unknown"
}

// publisher tells containerd what happened, in the order it did. Nobody waits
// for it; what containerd does not take within half a minute is dropped, and
// said in the log.
type publisher struct {
	address   string
	namespace string
	log       *slog.Logger
	queue     chan *types.Envelope
	done      chan struct{}

	mu     sync.Mutex
	closed bool
	client *ttrpc.Client
}

// startPublisher gives a publisher. Its Close tells what is still to be told.
func startPublisher(address, namespace string, log *slog.Logger) *publisher {
	p := &publisher{
		address: strings.TrimPrefix(address, scheme), namespace: namespace, log: log,
		queue: make(chan *types.Envelope, maxEvents), done: make(chan struct{}),
	}
	go p.run()
	return p
}

// publish never blocks.
func (p *publisher) publish(m proto.Message) {
	value, err := proto.Marshal(m)
	if err != nil {
		p.log.Error("encode event", "err", err)
		return
	}
	// containerd's own names of types have no host before them.
	e := &types.Envelope{
		Timestamp: timestamppb.Now(), Namespace: p.namespace, Topic: topic(m),
		Event: &anypb.Any{TypeUrl: string(m.ProtoReflect().Descriptor().FullName()), Value: value},
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	select {
	case p.queue <- e:
	default:
		p.log.Error("event is lost: containerd takes none", "topic", e.Topic)
	}
}

func (p *publisher) run() {
	defer close(p.done)
	for e := range p.queue {
		if err := p.deliver(e); err != nil {
			p.log.Error("event is lost", "topic", e.Topic, "err", err)
		}
	}
	p.hangUp()
}

func (p *publisher) deliver(e *types.Envelope) error {
	if p.address == "" {
		return nil // nobody asked
	}
	for began := time.Now(); ; time.Sleep(eventRest) {
		err := p.try(e)
		if err == nil || time.Since(began) > eventLife || p.ending() {
			return err
		}
		p.hangUp()
	}
}

func (p *publisher) ending() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.closed
}

func (p *publisher) try(e *types.Envelope) error {
	ctx, cancel := context.WithTimeout(context.Background(), eventTry)
	defer cancel()
	if p.client == nil {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", p.address)
		if err != nil {
			return err
		}
		p.client = ttrpc.NewClient(conn)
	}
	_, err := forward.NewTTRPCEventsClient(p.client).Forward(ctx, &forward.ForwardRequest{Envelope: e})
	return err
}

func (p *publisher) hangUp() {
	if p.client != nil {
		_ = p.client.Close()
		p.client = nil
	}
}

// Close delivers what is queued, each event once, and ends.
func (p *publisher) Close() {
	p.mu.Lock()
	if !p.closed {
		p.closed = true
		close(p.queue)
	}
	p.mu.Unlock()
	<-p.done
}
