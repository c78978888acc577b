package vm

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"hauberk.dev/api/guestproto"
)

// What a channel holds of a guest's bytes is the sum of these windows, whatever
// the guest sends.
const (
	// OutputWindow is how much of a stream the guest may send ahead of its
	// reader.
	OutputWindow = 64 << 10
	// RecordWindow is the same for the Guard's records.
	RecordWindow = 256 << 10

	maxCalls     = 256
	maxOOMs      = 4096
	maxLeftover  = 4 << 20 // of an earlier session, before the nonce
	callDeadline = 30 * time.Second
)

// ErrClosed is why calls on a channel fail after Close.
var ErrClosed = errors.New("channel is closed")

// RefusedError is an answer of the agent that is not the one asked for. It
// unwraps to the guest's errno.
type RefusedError struct {
	Verb  guestproto.Verb
	Errno syscall.Errno
	Text  string // as the guest says; not to be trusted
}

func (e *RefusedError) Error() string { return fmt.Sprintf("ask guest to %s: %q", e.Verb, e.Text) }

// Unwrap gives the errno.
func (e *RefusedError) Unwrap() error { return e.Errno }

// Channel is the host's end of the line to the agent in a guest.
//
// The guest is taken to be hostile: what it sends costs bounded memory, and a
// frame that breaks the protocol closes the channel with an error that says
// how. Streams are under credit: a reader that is slow stops its own stream, in
// the end the process that writes it, and nothing else; nothing is dropped.
//
// A channel is safe for concurrent use. Calls whose context has no deadline get
// one of thirty seconds.
type Channel struct {
	conn   net.Conn
	nonce  [guestproto.NonceSize]byte
	writes chan []byte
	reaped chan uint32 // processes whose slot in the guest can be freed
	done   chan struct{}
	wg     sync.WaitGroup

	onRecord func(record []byte)
	onOOM    func(process uint32, kills uint32)
	arrived  chan struct{} // records are pending

	mu        sync.Mutex
	err       error
	leaving   bool // the connection outlives the channel
	lastID    uint32
	calls     map[uint32]*call
	processes map[uint32]*Process
	pending   []byte // records not delivered yet, within the window
	granted   int    // bytes of records the guest may still send
	ooms      int
}

// call is a request under way. One that was given up stays until its reply
// comes, for a reply to nothing breaks the protocol.
type call struct {
	verb    guestproto.Verb
	process *Process // to be entered when the reply names it
	answer  chan answer
}

type answer struct {
	payload []byte
	err     error
}

// NewChannel makes a channel of a connection, which is the channel's from then
// on. Events must be set before Hello, and Hello called before anything else.
func NewChannel(conn net.Conn) *Channel {
	c := &Channel{
		conn:      conn,
		writes:    make(chan []byte, 64),
		reaped:    make(chan uint32, guestproto.MaxProcesses),
		done:      make(chan struct{}),
		arrived:   make(chan struct{}, 1),
		calls:     make(map[uint32]*call),
		processes: make(map[uint32]*Process),
	}
	rand.Read(c.nonce[:]) // never fails
	c.wg.Add(4)
	go c.run(c.read)
	go c.run(c.write)
	go c.run(c.deliver)
	go c.run(c.free)
	return c
}

// Dial connects to the socket of a guest's port and opens a session, trying
// again until ctx ends: a QEMU that has just started has no socket yet, and an
// agent may be in the middle of a frame of a host that died. onRecord may be
// nil.
func Dial(ctx context.Context, path string, onRecord func(record []byte)) (*Channel, guestproto.Hello, error) {
	const attempt, rest = 2 * time.Second, 10 * time.Millisecond
	var last error
	for {
		c, hello, err := dialOnce(ctx, path, onRecord, attempt)
		if err == nil {
			return c, hello, nil
		}
		var refused *RefusedError
		if errors.As(err, &refused) {
			return nil, hello, fmt.Errorf("dial guest at %s: %w", path, err)
		}
		last = err
		select {
		case <-ctx.Done():
			return nil, hello, fmt.Errorf("dial guest at %s: %w (%w)", path, last, context.Cause(ctx))
		case <-time.After(rest):
		}
	}
}

func dialOnce(ctx context.Context, path string, onRecord func([]byte), patience time.Duration) (*Channel, guestproto.Hello, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, guestproto.Hello{}, err
	}
	return openOn(ctx, conn, onRecord, patience)
}

// openOn opens a session on a connection, which is the channel's from then on.
func openOn(ctx context.Context, conn net.Conn, onRecord func([]byte), patience time.Duration) (*Channel, guestproto.Hello, error) {
	c := NewChannel(conn)
	c.Events(onRecord)
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	hello, err := c.Hello(ctx)
	if err != nil {
		c.Close()
		return nil, hello, err
	}
	return c, hello, nil
}

// Events sets what is called for every record of the Guard, in order, from one
// goroutine. A call that takes long makes the guest keep its records, and count
// what it loses once its ring is full.
func (c *Channel) Events(onRecord func(record []byte)) { c.onRecord = onRecord }

// OutOfMemory sets what is called when the kernel killed in a container, with
// the kills so far. It must not block.
func (c *Channel) OutOfMemory(f func(process, kills uint32)) { c.onOOM = f }

// Done is closed when the channel is.
func (c *Channel) Done() <-chan struct{} { return c.done }

// Err says why the channel closed: nil while it is open, ErrClosed after Close.
func (c *Channel) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Close ends the session. Processes run on, and another channel can attach to
// them. It returns when nothing of the channel runs any more, so it must not be
// called from a callback.
func (c *Channel) Close() error {
	c.fail(ErrClosed)
	c.wg.Wait()
	return nil
}

// leave ends the channel but not the connection, which another channel can take
// up: the guest sees no host go, and none come. Nothing may be under way.
func (c *Channel) leave() (net.Conn, error) {
	c.mu.Lock()
	if err := c.err; err != nil {
		c.mu.Unlock()
		return nil, err
	}
	c.leaving = true
	c.mu.Unlock()
	err := c.conn.SetDeadline(time.Unix(1, 0)) // ends the reader
	c.fail(ErrClosed)
	c.wg.Wait()
	if err = errors.Join(err, c.conn.SetDeadline(time.Time{})); err != nil {
		return nil, errors.Join(err, c.conn.Close())
	}
	return c.conn, nil
}

func (c *Channel) run(f func() error) {
	defer c.wg.Done()
	if err := f(); err != nil {
		c.fail(err)
	}
}

// fail closes the channel with the first reason given.
func (c *Channel) fail(err error) {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	c.err = err
	leaving := c.leaving
	calls, processes := c.calls, c.processes
	c.calls, c.processes = nil, nil
	c.mu.Unlock()
	close(c.done)
	if !leaving {
		c.conn.Close()
	}
	for _, k := range calls {
		k.answer <- answer{err: err}
	}
	for _, p := range processes {
		p.lost(err)
	}
}

// write sends frames one after the other. A guest that does not read blocks it,
// and with it calls until their context ends.
func (c *Channel) write() error {
	for {
		select {
		case <-c.done:
			return nil
		case frame := <-c.writes:
			if _, err := c.conn.Write(frame); err != nil {
				return fmt.Errorf("write to guest: %w", err)
			}
		}
	}
}

func (c *Channel) send(ctx context.Context, frame []byte) error {
	select {
	case c.writes <- frame:
		return nil
	case <-c.done:
		return c.Err()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// message is what can be a request's payload.
type message interface{ Append(b []byte) []byte }

// ask sends a request and waits for its reply. p, if not nil, is entered under
// the number that the reply has, before anything that follows is read.
func (c *Channel) ask(ctx context.Context, v guestproto.Verb, m message, p *Process) ([]byte, error) {
	frame := guestproto.Begin(nil, 0, v)
	if m != nil {
		frame = m.Append(frame)
	}
	if len(frame)-guestproto.HeaderSize > guestproto.MaxPayload {
		return nil, fmt.Errorf("ask guest to %s: %d bytes are more than the %d of a frame", v, len(frame), guestproto.MaxPayload)
	}
	id, k, err := c.enter(v, p)
	if err != nil {
		return nil, fmt.Errorf("ask guest to %s: %w", v, err)
	}
	frame[4], frame[5], frame[6], frame[7] = byte(id), byte(id>>8), byte(id>>16), byte(id>>24)
	guestproto.End(frame, 0)
	if err := c.send(ctx, frame); err != nil {
		c.unsend(id)
		return nil, fmt.Errorf("ask guest to %s: %w", v, err)
	}
	select {
	case a := <-k.answer:
		var refused *RefusedError
		if a.err != nil && !errors.As(a.err, &refused) {
			return nil, fmt.Errorf("ask guest to %s: %w", v, a.err)
		}
		return a.payload, a.err
	case <-ctx.Done():
		return nil, fmt.Errorf("ask guest to %s: %w", v, context.Cause(ctx))
	}
}

// enter makes a request known. Numbers may come round: one in use is passed
// over.
func (c *Channel) enter(v guestproto.Verb, p *Process) (uint32, *call, error) {
	k := &call{verb: v, process: p, answer: make(chan answer, 1)}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return 0, nil, c.err
	}
	if len(c.calls) >= maxCalls {
		return 0, nil, fmt.Errorf("%d requests are under way already", maxCalls)
	}
	for {
		c.lastID++
		if _, taken := c.calls[c.lastID]; c.lastID != 0 && !taken {
			c.calls[c.lastID] = k
			return c.lastID, k, nil
		}
	}
}

// unsend forgets a request that was never sent.
func (c *Channel) unsend(id uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.calls, id)
}

// read takes frames off the connection until it breaks or they do.
func (c *Channel) read() error {
	r := bufio.NewReaderSize(c.conn, 32<<10)
	if err := c.findNonce(r); err != nil {
		return err
	}
	var header [guestproto.HeaderSize]byte
	var payload []byte
	for {
		if _, err := io.ReadFull(r, header[:]); err != nil {
			return fmt.Errorf("read from guest: %w", err)
		}
		h, err := guestproto.ParseHeader(header[:])
		if err != nil {
			return fmt.Errorf("hear guest: %w", err)
		}
		if cap(payload) < h.Payload() || cap(payload) > 4*guestproto.MaxChunk {
			payload = make([]byte, max(h.Payload(), guestproto.MaxChunk+64))
		}
		payload = payload[:h.Payload()]
		if _, err := io.ReadFull(r, payload); err != nil {
			return fmt.Errorf("read from guest: %w", err)
		}
		if err := c.hear(h, payload); err != nil {
			return fmt.Errorf("hear guest: %w", err)
		}
	}
}

// findNonce skips what an earlier session left in the pipe.
func (c *Channel) findNonce(r *bufio.Reader) error {
	for skipped := 0; skipped <= maxLeftover; skipped++ {
		seen, err := r.Peek(guestproto.NonceSize)
		if err != nil {
			return fmt.Errorf("read from guest: %w", err)
		}
		if bytes.Equal(seen, c.nonce[:]) {
			r.Discard(guestproto.NonceSize)
			return nil
		}
		r.Discard(1)
	}
	return fmt.Errorf("hear guest: no session after %d bytes", maxLeftover)
}

// hear takes in one frame. payload is the reader's: what is kept is copied.
func (c *Channel) hear(h guestproto.Header, payload []byte) error {
	switch h.Verb {
	case guestproto.VerbReply, guestproto.VerbError:
		return c.hearReply(h, payload)
	}
	if h.ID != 0 {
		return &guestproto.MalformedError{What: h.Verb.String(), Cause: "an event has an id"}
	}
	switch h.Verb {
	case guestproto.VerbOutput:
		m, err := guestproto.ParseOutput(payload)
		if err != nil {
			return err
		}
		p, err := c.known(h.Verb, m.Process)
		if err != nil {
			return err
		}
		return p.hearOutput(m)
	case guestproto.VerbExit:
		m, err := guestproto.ParseExit(payload)
		if err != nil {
			return err
		}
		p, err := c.known(h.Verb, m.Process)
		if err != nil {
			return err
		}
		return p.hearExit(m)
	case guestproto.VerbGuardEvents:
		return c.hearRecords(payload)
	case guestproto.VerbOOM:
		return c.hearOOM(payload)
	}
	return &guestproto.MalformedError{What: "frame", Cause: "a guest does not say " + h.Verb.String()}
}

// known gives the process that an event is about.
func (c *Channel) known(v guestproto.Verb, id uint32) (*Process, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.processes[id]; p != nil {
		return p, nil
	}
	return nil, &guestproto.MalformedError{What: v.String(), Cause: fmt.Sprintf("process %d is not ours", id)}
}

func (c *Channel) hearReply(h guestproto.Header, payload []byte) error {
	c.mu.Lock()
	k := c.calls[h.ID]
	delete(c.calls, h.ID)
	c.mu.Unlock()
	if k == nil {
		return &guestproto.MalformedError{What: h.Verb.String(), Cause: fmt.Sprintf("nothing was asked under number %d", h.ID)}
	}
	a, err := c.take(k, h.Verb, payload)
	if err != nil {
		a = answer{err: err} // the channel is about to close, and k no longer on its list
	}
	k.answer <- a
	return err
}

// take makes an answer of a reply to k.
func (c *Channel) take(k *call, v guestproto.Verb, payload []byte) (answer, error) {
	if v == guestproto.VerbError {
		m, err := guestproto.ParseRefusal(payload)
		return answer{err: &RefusedError{k.verb, syscall.Errno(m.Errno), m.Text[:min(len(m.Text), 1024)]}}, err
	}
	if k.process != nil {
		m, err := guestproto.ParseProcessID(k.verb, payload)
		if err == nil {
			err = c.register(k.process, m.Process)
		}
		if err != nil {
			return answer{}, err
		}
	}
	return answer{payload: bytes.Clone(payload)}, nil
}

// register enters a process under the number that the guest gave it.
func (c *Channel) register(p *Process, id uint32) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return c.err
	}
	if id == 0 || c.processes[id] != nil || len(c.processes) >= guestproto.MaxProcesses {
		return &guestproto.MalformedError{What: "process", Cause: fmt.Sprintf("number %d is taken, or one too many", id)}
	}
	p.id = id
	c.processes[id] = p
	return nil
}

func (c *Channel) hearRecords(payload []byte) error {
	if err := guestproto.ParseRecords(payload, func([]byte) {}); err != nil {
		return err
	}
	c.mu.Lock()
	c.granted -= len(payload)
	if c.granted < 0 || len(payload) == 0 {
		c.mu.Unlock()
		return &guestproto.MalformedError{What: "guard events", Cause: "they are beyond their credit, or none"}
	}
	c.pending = append(c.pending, payload...)
	c.mu.Unlock()
	select {
	case c.arrived <- struct{}{}:
	default:
	}
	return nil
}

func (c *Channel) hearOOM(payload []byte) error {
	m, err := guestproto.ParseOOM(payload)
	if err != nil {
		return err
	}
	if _, err := c.known(guestproto.VerbOOM, m.Process); err != nil {
		return err
	}
	if c.ooms++; c.ooms > maxOOMs {
		return &guestproto.MalformedError{What: "oom", Cause: fmt.Sprintf("more than %d", maxOOMs)}
	}
	if c.onOOM != nil {
		c.onOOM(m.Process, m.Kills)
	}
	return nil
}

// deliver hands records over and gives the guest credit for more.
func (c *Channel) deliver() error {
	for {
		select {
		case <-c.done:
			return nil
		case <-c.arrived:
			c.mu.Lock()
			batch := c.pending
			c.pending = nil
			c.mu.Unlock()
			if len(batch) == 0 {
				continue
			}
			if err := guestproto.ParseRecords(batch, c.onRecord); err != nil {
				return fmt.Errorf("hear guest: %w", err)
			}
			if err := c.grantRecords(context.Background(), len(batch)); err != nil {
				return nil // closed
			}
		}
	}
}

func (c *Channel) grantRecords(ctx context.Context, n int) error {
	c.mu.Lock()
	c.granted += n
	c.mu.Unlock()
	return c.credit(ctx, guestproto.Credit{Stream: guestproto.StreamGuard, Bytes: uint32(n)})
}

func (c *Channel) credit(ctx context.Context, m guestproto.Credit) error {
	frame := m.Append(guestproto.Begin(nil, 0, guestproto.VerbCredit))
	guestproto.End(frame, 0)
	return c.send(ctx, frame)
}

// free tells the guest to forget processes of which everything was heard.
func (c *Channel) free() error {
	for {
		select {
		case <-c.done:
			return nil
		case id := <-c.reaped:
			ctx, cancel := context.WithTimeout(context.Background(), callDeadline)
			_ = c.forget(ctx, id) // at worst the guest's table stays full
			cancel()
		}
	}
}

func (c *Channel) forget(ctx context.Context, id uint32) error {
	if _, err := c.ask(ctx, guestproto.VerbForget, &guestproto.ProcessID{Process: id}, nil); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.processes, id)
	return nil
}

// call is ask with the default deadline.
func (c *Channel) call(ctx context.Context, v guestproto.Verb, m message) ([]byte, error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, callDeadline)
		defer cancel()
	}
	return c.ask(ctx, v, m, nil)
}

// do is a call whose reply says nothing.
func (c *Channel) do(ctx context.Context, v guestproto.Verb, m message) error {
	b, err := c.call(ctx, v, m)
	if err == nil && len(b) > 0 {
		err = &guestproto.MalformedError{What: v.String() + " reply", Cause: "it is not empty"}
		c.fail(err)
	}
	return err
}

// parsed gives a reply's value, and closes the channel if it is malformed.
func parsed[T any](c *Channel, m T, err error) (T, error) {
	if err != nil {
		c.fail(fmt.Errorf("hear guest: %w", err))
	}
	return m, err
}
