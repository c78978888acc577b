// Package wire is a TCP connection, or one end of a pair of Unix sockets, that can
// be put down between any two bytes and taken up again, here or in another process.
//
// While a connection is frozen its reads return ErrFrozen and its writes do not
// fail: what cannot be sent any more is kept and counts as written. So whoever
// moves bytes stops at its next read, with everything it has decided on done.
// What is left then is plain data (State) and the descriptor. The package knows
// nothing of what the bytes mean, and moves nothing to another process itself.
package wire

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// ErrFrozen is what reads return while a connection is frozen. Whoever gets it
// returns it up, and neither closes nor tells anybody anything.
var ErrFrozen = errors.New("connection is frozen")

// MaxHeld bounds what a State may hold for each direction.
const MaxHeld = 8 << 20

// tail is how long the rest of a closed connection may take to be sent.
const tail = 10 * time.Second

// State is a frozen connection without its descriptor.
type State struct {
	Unread []byte `json:"unread,omitempty"` // read from the peer, not used yet
	Unsent []byte `json:"unsent,omitempty"` // written, not sent yet
	// Ended is our half closed; Ending that it is to be, after Unsent.
	Ended  bool `json:"ended,omitempty"`
	Ending bool `json:"ending,omitempty"`
}

// Check says what is wrong with a state that comes from outside.
func (s *State) Check() error {
	switch {
	case len(s.Unread) > MaxHeld || len(s.Unsent) > MaxHeld:
		return fmt.Errorf("state of a connection: %d bytes unread and %d unsent, want at most %d", len(s.Unread), len(s.Unsent), MaxHeld)
	case s.Ended && (s.Ending || len(s.Unsent) > 0):
		return errors.New("state of a connection: something is unsent after its end")
	}
	return nil
}

// Socket is what is below a Conn: a *net.TCPConn, or a *net.UnixConn of a stream.
type Socket interface {
	net.Conn
	syscall.Conn
	CloseWrite() error
	File() (*os.File, error)
}

// Conn is a net.Conn. One goroutine may read while others write. A Conn that is
// never frozen costs a lock for each write that nobody else holds.
type Conn struct {
	socket Socket
	frozen atomic.Bool
	unread []byte // for who reads

	writing sync.Mutex // held while something is written
	now     *Now       // under writing
	unsent  []byte     // under writing
	failed  error      // under writing: sending what was unsent failed

	mu     sync.Mutex // held for moments
	ending bool
	ended  bool
	behind bool // there is something unsent
	given  bool // the state is out, or not in yet: what is unsent is another's
	closed bool // nobody uses it any more, but something is unsent
	read   time.Time
	write  time.Time
}

// New wraps a connection. It is the Conn's from now on.
func New(c Socket) *Conn { return &Conn{socket: c} }

// Resume makes a frozen Conn of a descriptor and the state it had. Thaw sets it
// going.
func Resume(c Socket, s State) *Conn {
	w := &Conn{socket: c, unread: s.Unread, unsent: s.Unsent, ended: s.Ended, ending: s.Ending, given: true}
	w.frozen.Store(true)
	return w
}

// Socket is what is below.
func (c *Conn) Socket() Socket { return c.socket }

// TCP is the connection below, nil if that is not TCP.
func (c *Conn) TCP() *net.TCPConn {
	tcp, _ := c.socket.(*net.TCPConn)
	return tcp
}

// Freeze stops the connection. Reads and writes that wait return.
func (c *Conn) Freeze() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	c.frozen.Store(true)
	c.socket.SetDeadline(time.Unix(1, 0))
}

// Frozen tells whether the connection is frozen.
func (c *Conn) Frozen() bool { return c.frozen.Load() }

// State is what is left of a frozen connection once nobody uses it any more. It
// may be resumed while this Conn is only let go of.
func (c *Conn) State() State {
	c.writing.Lock()
	defer c.writing.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.given = true
	return State{Unread: c.unread, Unsent: c.unsent, Ended: c.ended, Ending: c.ending}
}

// Thaw sets a frozen connection going. What is unsent is sent first, by a
// goroutine that ends with it, or with the connection, or when that is frozen
// again.
func (c *Conn) Thaw() {
	c.writing.Lock()
	c.mu.Lock()
	c.given = false
	c.socket.SetReadDeadline(c.read)
	c.socket.SetWriteDeadline(c.write)
	c.behind = len(c.unsent) > 0 || c.ending
	behind := c.behind
	c.frozen.Store(false)
	c.mu.Unlock()
	if !behind {
		c.writing.Unlock()
		return
	}
	go c.catchUp()
}

// catchUp sends what is unsent. It holds the lock for writing from Thaw on.
func (c *Conn) catchUp() {
	defer c.writing.Unlock()
	b := c.unsent
	c.unsent = nil
	c.failed = c.sendLocked(b)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failed == nil && len(c.unsent) > 0 {
		return // frozen again
	}
	c.behind = false
	if c.ending && !c.frozen.Load() {
		c.ending, c.ended = false, true
		c.socket.CloseWrite()
	}
	if c.closed {
		c.socket.Close()
	}
}

// Read reads from the peer; first what was unread.
func (c *Conn) Read(p []byte) (int, error) {
	if c.frozen.Load() {
		return 0, ErrFrozen
	}
	if len(c.unread) > 0 {
		n := copy(p, c.unread)
		if c.unread = c.unread[n:]; len(c.unread) == 0 {
			c.unread = nil
		}
		return n, nil
	}
	n, err := c.socket.Read(p)
	if err != nil && c.frozen.Load() && errors.Is(err, os.ErrDeadlineExceeded) {
		err = ErrFrozen
	}
	return n, err
}

// Unread gives back what was read ahead of its use. It is for who reads, after
// ErrFrozen.
func (c *Conn) Unread(b []byte) {
	if len(b) > 0 {
		c.unread = append(append(make([]byte, 0, len(b)+len(c.unread)), b...), c.unread...)
	}
}

// Write sends p, or keeps what of it a frozen connection cannot send.
func (c *Conn) Write(p []byte) (int, error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	if c.failed != nil {
		return 0, c.failed
	}
	if c.frozen.Load() {
		c.unsent = append(c.unsent, p...)
		return len(p), nil
	}
	if err := c.sendLocked(p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// WriteNow sends what of p there is room for at once, and keeps nothing.
func (c *Conn) WriteNow(p []byte) int {
	if !c.writing.TryLock() {
		return 0
	}
	defer c.writing.Unlock()
	if c.failed != nil || c.frozen.Load() {
		return 0
	}
	if c.now == nil {
		c.now = NewNow(c.socket)
	}
	return c.now.Write(p)
}

// sendLocked sends p and keeps the rest when the connection freezes meanwhile.
func (c *Conn) sendLocked(p []byte) error {
	n, err := c.socket.Write(p)
	if err != nil && c.frozen.Load() && errors.Is(err, os.ErrDeadlineExceeded) {
		c.unsent = append(c.unsent, p[n:]...)
		return nil
	}
	return err
}

// CloseWrite ends our half, after what is unsent.
func (c *Conn) CloseWrite() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.ended || c.ending:
		return nil
	case c.frozen.Load() || c.behind:
		c.ending = true
		return nil
	}
	c.ended = true
	return c.socket.CloseWrite()
}

// Close closes the connection, after what was kept while it was frozen. One
// whose state is out is let go of: if its descriptor is open elsewhere too, the
// peer does not notice.
func (c *Conn) Close() error {
	if c.late() {
		return nil
	}
	return c.socket.Close()
}

// late leaves the closing to who sends what is unsent. While the connection is
// frozen that is nobody, and nobody is left to take its state.
func (c *Conn) late() bool {
	if !c.frozen.Load() {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.behind && c.lateLocked()
	}
	c.writing.Lock() // soon: who writes to a frozen connection does not wait
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.unsent) == 0 || !c.lateLocked() {
		c.writing.Unlock()
		return false
	}
	c.frozen.Store(false)
	go c.catchUp()
	return true
}

func (c *Conn) lateLocked() bool {
	if c.given || c.closed {
		return false
	}
	c.closed, c.behind = true, true
	c.socket.SetDeadline(time.Now().Add(tail))
	return true
}

// Abort ends both halves at once: with a reset where there are resets.
func (c *Conn) Abort() {
	if tcp := c.TCP(); tcp != nil {
		tcp.SetLinger(0)
	}
	c.socket.Close()
}

// LocalAddr is this end's address.
func (c *Conn) LocalAddr() net.Addr { return c.socket.LocalAddr() }

// RemoteAddr is the peer's address.
func (c *Conn) RemoteAddr() net.Addr { return c.socket.RemoteAddr() }

// SetDeadline bounds reads and writes. While the connection is frozen it is kept
// for later.
func (c *Conn) SetDeadline(t time.Time) error { return c.bound(&t, &t) }

// SetReadDeadline bounds reads.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.bound(&t, nil) }

// SetWriteDeadline bounds writes.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.bound(nil, &t) }

func (c *Conn) bound(read, write *time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var err error
	if read != nil {
		if c.read = *read; !c.frozen.Load() {
			err = c.socket.SetReadDeadline(*read)
		}
	}
	if write != nil {
		if c.write = *write; !c.frozen.Load() {
			err = errors.Join(err, c.socket.SetWriteDeadline(*write))
		}
	}
	return err
}
