// Package link is the node's end of the connection to its proxy, and the
// request and answer under both ends.
//
// It holds no state worth keeping: if the proxy or the node goes away, the
// node dials again and says everything once more. Descriptors sent over the
// link stay open on the node's side, so what waits in a listener's queue
// survives the proxy.
package link

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	api "hauberk.dev/api/mesh"
)

// ErrClosed is the end of a session.
var ErrClosed = errors.New("link closed")

// RefusedError is the other side's answer to a request it refused.
type RefusedError struct {
	Kind   api.Kind
	Reason string
}

func (e *RefusedError) Error() string { return fmt.Sprintf("%s refused: %s", e.Kind, e.Reason) }

// ErrUseless is the RefusedError of a Relearn whose schema nobody can go on from.
var ErrUseless = errors.New("what was learnt is of no use")

// Is tells a refusal for the schema's sake apart.
func (e *RefusedError) Is(target error) bool {
	return target == ErrUseless && e.Kind == api.KindRelearn && strings.HasPrefix(e.Reason, api.Useless)
}

// Handler answers a request. The files it gets are its own; those it returns
// are sent and then closed. The answer's Kind and Seq are filled in.
type Handler func(ctx context.Context, m *api.Message, files []*os.File) (*api.Message, []*os.File, error)

// Session pairs requests with answers over one connection.
type Session struct {
	conn   *api.Conn
	handle Handler
	slots  chan struct{} // requests handled at once; nil handles them in order

	mu      sync.Mutex
	next    uint64
	waiting map[uint64]chan answer
	err     error // set once, when the session ends
}

type answer struct {
	m     *api.Message
	files []*os.File
}

// NewSession wraps a connection. Requests from the other side are handled one
// after the other if parallel is 0, else up to parallel at a time, and refused
// beyond.
func NewSession(conn *api.Conn, handle Handler, parallel int) *Session {
	s := &Session{conn: conn, handle: handle, waiting: map[uint64]chan answer{}}
	if parallel > 0 {
		s.slots = make(chan struct{}, parallel)
	}
	return s
}

// Run receives until the connection or ctx ends.
func (s *Session) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var handlers sync.WaitGroup
	stop := context.AfterFunc(ctx, func() { s.conn.Close() })
	err := s.receive(ctx, &handlers)
	cancel()
	stop()
	s.conn.Close()
	s.mu.Lock()
	s.err = errors.Join(ErrClosed, err)
	for seq, ch := range s.waiting {
		close(ch)
		delete(s.waiting, seq)
	}
	s.mu.Unlock()
	handlers.Wait()
	return err
}

func (s *Session) receive(ctx context.Context, handlers *sync.WaitGroup) error {
	for {
		m, files, err := s.conn.Receive()
		if unknown := (*api.UnknownError)(nil); errors.As(err, &unknown) {
			// A newer peer is told, as it would only dial again and ask again.
			if err := s.conn.Send(&api.Message{Kind: api.KindAck, Seq: unknown.Seq, Error: bounded(err.Error())}); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return err
		}
		switch {
		case m.Kind == api.KindAck:
			s.deliver(answer{m, files})
		case s.slots == nil:
			s.answer(ctx, m, files)
		default:
			select {
			case s.slots <- struct{}{}:
				handlers.Go(func() {
					defer func() { <-s.slots }()
					s.answer(ctx, m, files)
				})
			default:
				closeAll(files)
				s.conn.Send(&api.Message{Kind: api.KindAck, Seq: m.Seq, Error: "too many requests at once"})
			}
		}
	}
}

func (s *Session) answer(ctx context.Context, m *api.Message, files []*os.File) {
	reply, out, err := s.handle(ctx, m, files)
	defer closeAll(out)
	if reply == nil {
		reply = &api.Message{}
	}
	reply.Kind, reply.Seq = api.KindAck, m.Seq
	if err != nil {
		closeAll(out)
		reply, out = &api.Message{Kind: api.KindAck, Seq: m.Seq, Error: bounded(err.Error())}, nil
	}
	if err := s.conn.Send(reply, out...); err != nil {
		s.conn.Close() // a lost ack would leave the other side waiting
	}
}

const maxWords = 2048 // bytes of a text from the other side

func bounded(s string) string {
	if s == "" {
		return "unknown error"
	}
	return s[:min(len(s), maxWords)]
}

func (s *Session) deliver(a answer) {
	s.mu.Lock()
	ch, ok := s.waiting[a.m.Seq]
	delete(s.waiting, a.m.Seq)
	s.mu.Unlock()
	if !ok {
		closeAll(a.files) // its asker gave up
		return
	}
	ch <- a
}

// Call sends a request and waits for its answer. The files sent stay the
// caller's; those returned are the caller's too.
func (s *Session) Call(ctx context.Context, m *api.Message, files ...*os.File) (*api.Message, []*os.File, error) {
	ch := make(chan answer, 1)
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		return nil, nil, s.err
	}
	s.next++
	m.Seq = s.next
	s.waiting[m.Seq] = ch
	s.mu.Unlock()
	if err := s.conn.Send(m, files...); err != nil {
		s.forget(m.Seq)
		return nil, nil, err
	}
	select {
	case a, ok := <-ch:
		return s.result(m.Kind, a, ok)
	case <-ctx.Done():
	}
	s.forget(m.Seq)
	select {
	case a, ok := <-ch: // it came at the same moment
		return s.result(m.Kind, a, ok)
	default:
		return nil, nil, fmt.Errorf("wait for the answer to %q: %w", m.Kind, ctx.Err())
	}
}

func (s *Session) result(kind api.Kind, a answer, ok bool) (*api.Message, []*os.File, error) {
	if !ok {
		s.mu.Lock()
		defer s.mu.Unlock()
		return nil, nil, s.err
	}
	if a.m.Error != "" {
		closeAll(a.files)
		return nil, nil, &RefusedError{kind, bounded(a.m.Error)}
	}
	return a.m, a.files, nil
}

func (s *Session) forget(seq uint64) {
	s.mu.Lock()
	delete(s.waiting, seq)
	s.mu.Unlock()
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// dialTimeout bounds Dial's connect and its first exchange.
const dialTimeout = 5 * time.Second

func dial(ctx context.Context, path string) (*net.UnixConn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	c, err := new(net.Dialer).DialContext(ctx, "unixpacket", path)
	if err != nil {
		return nil, err
	}
	return c.(*net.UnixConn), nil
}
