// Package http2 passes HTTP/2 from one connection to another, stream by stream.
//
// It is an engine for a proxy: a Conn hands over the head of each request, and
// its owner either answers it or forwards it to another Conn. From then on the
// two streams are mates: bodies, trailers and resets go from one to the other
// without a goroutine of their own, and what one side may send is what the
// other has taken. What is accepted is passed on field for field; what RFC 9113
// calls malformed, and what a server behind could read in another way, is not.
//
// Nothing is offered that a proxy has no use for: no push, no priorities, no
// extended CONNECT (RFC 8441). The package opens no connection, knows no TLS
// and holds no policy.
package http2

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2/hpack"

	"hauberk.dev/mesh/h2frame"
	"hauberk.dev/mesh/wire"
)

// Bounds of what a peer may make this side hold or do.
const (
	// MaxStreams are open at once on one connection.
	MaxStreams = 250
	// MaxFields and MaxList bound a header list, as RFC 9113 measures it.
	MaxFields = 128
	MaxList   = 32 << 10

	maxBlock         = 64 << 10 // a header block over all its frames
	maxContinuations = 16       // frames of one block
	maxFrame         = 16 << 10 // what this side takes in one frame, the protocol's least
	maxSend          = 16 << 10 // and what it sends

	streamWindow = 128 << 10
	// connWindow is given back on receipt while less than maxHeld waits to go
	// on, so that a slow stream does not hold up the others, but many may.
	connWindow = 1 << 20
	maxHeld    = 4 << 20

	outFull       = 64 << 10  // of frames ready to be written; more wait as they are
	maxAnswers    = 64 << 10  // bytes of answers a peer may leave unread
	maxHeadsHeld  = 1 << 20   // bytes of request heads waiting for a server
	lastStream    = 1<<31 - 1 // the highest number of a stream
	maxInterim    = 8         // heads of one stream waiting to be sent
	mostInterims  = 1000      // and all before its answer
	maxEmptyData  = 100       // in a row
	rememberEnded = 256       // streams whose way to end is remembered

	prefaceTimeout = 10 * time.Second
	// pulse is how often a connection is looked at. A peer that takes longer
	// than two for one frame or one header block is given up.
	pulse      = 15 * time.Second
	lingerTime = time.Second      // for a peer to read the last frames
	drainTime  = 30 * time.Second // and for a client to read the last responses
	lingerMost = 256 << 10
)

// Preface is what a client of HTTP/2 sends first.
const Preface = h2frame.Preface

var (
	// ErrClosed is why a connection ended that was closed on this side.
	ErrClosed = errors.New("connection closed")
	// ErrBusy is returned by Forward when the server takes no more requests.
	ErrBusy = errors.New("the server takes no more requests on this connection")

	errGone    = errors.New("the peer has closed the connection")
	errDrained = errors.New("connection drained")
	errSlow    = fmt.Errorf("a frame or header block took the peer more than %v", pulse)
)

// Transport is the connection below.
type Transport interface {
	io.ReadWriter
	CloseWrite() error
	Abort()  // ends both halves at once; Read and Write return
	Finish() // lets go after both halves have ended
}

// Prompt is a Transport that can do without waiting. Where there is one request at
// a time, as on most connections, no other goroutine is woken to write.
type Prompt interface {
	Transport
	// WriteNow writes what there is room for at once, which may be nothing. It is
	// never called beside Write. What it fails at is left to Write to say.
	WriteNow(p []byte) (n int)
}

// Options of a Conn.
type Options struct {
	// Request is called for each request a server's end receives, by the
	// goroutine that reads. It must Forward or Answer it.
	Request func(*Stream, *Head)
	// Failed is called for a request that was forwarded and can get no answer
	// any more, with none begun. It must Answer it.
	Failed func(*Stream, error)
	// Malformed, if set, is told what the peer did that may not be passed on.
	Malformed func(error)
	// Draining, if set, is called when the peer takes no more requests.
	Draining func()
	// Settled, if set, is called by the goroutine that reads, when all that has
	// arrived was read.
	Settled func()
	// Data, if set, is shown what a client sends, before it goes on. It may Refuse.
	Data func(s *Stream, p []byte, end bool)
	// Answered, if set, is shown the heads and trailers of a server: s is the
	// client's stream, and status 0 that of a trailer.
	Answered func(s *Stream, status int, fields []Field)
}

// Conn is one end of an HTTP/2 connection.
type Conn struct {
	t      Transport
	prompt Prompt // t, if it is one
	client bool
	o      Options

	// For the reading goroutine.
	r       *bufio.Reader
	decode  *fieldReader
	head    Head
	block   []byte
	ahead   *readAhead // below r
	part    part       // of a frame that was not read to its end
	begun   uint8      // what of the peer's greeting has come
	touched *Conn      // has frames to write because of what was read
	own     bool       // and so has this one
	empty   int        // DATA frames without data, in a row
	cheap   allowance
	resets  allowance
	updates allowance
	sent    uint64 // frames sent that have paid for updates
	paid    uint64 // and for cheap

	// writing is held by who writes; before mu.
	writing sync.Mutex

	mid   atomic.Bool   // in the middle of a frame or header block
	stage atomic.Uint64 // counts those complete
	seen  uint64        // stage at the last pulse; for the pulse

	mu       sync.Mutex
	streams  map[uint32]*Stream
	ready    line // streams with something to send
	waiting  line // streams to be opened when the peer takes more
	blocked  line // streams waiting for the window of the connection
	out      []byte
	answers  int // bytes of out that the peer has caused
	heads    int // bytes of heads in waiting streams
	credits  []credit
	encoder  *hpack.Encoder
	encoded  blockWriter
	window   int64 // what may be sent
	credit   int64 // what the peer may send
	owed     int64 // received and not given back
	held     int64 // received and not passed on
	initial  int64 // window of a new stream
	frame    int   // payload of one frame
	most     int   // streams the peer takes
	greeted  bool  // its SETTINGS have come
	frames   uint64
	well     int    // server: streams that both sides ended and that pay for resets
	nextID   uint32 // client
	lastID   uint32 // server: highest the peer opened
	taken    uint32 // and highest that Request was or will be called for
	draining bool   // this side takes, or opens, no more streams
	ended    [rememberEnded]ending
	endedAt  int
	started  bool
	err      error
	farewell bool        // the peer is told, and has a moment to read it
	linger   *time.Timer // ends that moment
	pulsing  *time.Timer
	shut     bool // CloseWrite was called
	frozen   bool
	closing  bool           // Close was called while frozen
	busy     sync.WaitGroup // what Run waits for before it says that nothing moves

	kick    chan struct{}
	pulse   time.Duration
	done    chan struct{} // err is set
	frost   chan struct{} // frozen is set
	written chan struct{} // the writer has ended
}

// credit is data of a stream that has left this connection's mate.
type credit struct {
	to *Stream
	n  int
	of Sink // in place of a mate
}

// ending is how a stream ended.
type ending struct {
	id  uint32
	how endKind
}

type endKind uint8

const (
	endNever   endKind = iota // never opened, or forgotten
	endOrderly                // by both sides
	endTheirs                 // reset by the peer
	endOurs                   // reset by this side
)

// Server makes the server's end.
func Server(t Transport, o Options) *Conn { return newConn(t, false, o) }

// Client makes the client's end.
func Client(t Transport, o Options) *Conn { return newConn(t, true, o) }

func newConn(t Transport, client bool, o Options) *Conn {
	c := &Conn{
		t: t, client: client, o: o,
		ahead: &readAhead{t: t}, decode: newFieldReader(),
		cheap:   allowance{left: 1000, most: 1000, perSecond: 100},
		resets:  allowance{left: 500, most: 500, perSecond: 100},
		updates: allowance{left: 2000, most: 2000, perSecond: 1000},
		streams: map[uint32]*Stream{}, nextID: 1, seen: ^uint64(0),
		window: 65535, credit: connWindow, initial: 65535, frame: maxSend, most: 100,
		pulse: pulse, kick: make(chan struct{}, 1), done: make(chan struct{}), frost: make(chan struct{}), written: make(chan struct{}),
	}
	c.prompt, _ = t.(Prompt)
	c.r = bufio.NewReaderSize(c.ahead, readSize)
	c.encoder = hpack.NewEncoder(&c.encoded)
	return c
}

// hello is what either side sends first.
func (c *Conn) hello() []byte {
	var s []byte
	if c.client {
		s = h2frame.AppendSetting(s, h2frame.SettingPush, 0)
	}
	s = h2frame.AppendSetting(s, h2frame.SettingMaxStreams, MaxStreams)
	s = h2frame.AppendSetting(s, h2frame.SettingWindow, streamWindow)
	s = h2frame.AppendSetting(s, h2frame.SettingMaxList, MaxList)
	var b []byte
	if c.client {
		b = append(b, h2frame.Preface...)
	}
	b = h2frame.Append(b, h2frame.Settings, 0, 0, s)
	return h2frame.AppendWord(b, h2frame.Window, 0, connWindow-65535)
}

// Run serves the connection until it ends, and returns why. A server's end that
// its client has closed in good order, or that was drained, returns nil. One that
// was frozen returns wire.ErrFrozen.
func (c *Conn) Run() error {
	if !c.begin() {
		return wire.ErrFrozen
	}
	go c.write()
	if c.Err() == nil {
		err := c.read()
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			err = errGone
		}
		c.stop(err)
	}
	if c.Err() != nil {
		_, err := io.CopyN(io.Discard, c.t, lingerMost) // ends when the writer says so
		c.stop(err)
	}
	<-c.written
	if c.rests() {
		return wire.ErrFrozen
	}
	c.mu.Lock()
	if c.linger != nil {
		c.linger.Stop()
	}
	c.mu.Unlock()
	c.t.Finish()
	if err := c.Err(); err != errGone && err != errDrained {
		return err
	}
	return nil
}

// begin says what is said first, unless that was done, and tells whether the
// connection is to run.
func (c *Conn) begin() bool {
	c.mu.Lock()
	if c.frozen {
		c.mu.Unlock()
		return false
	}
	if !c.started {
		c.started = true // what was asked before comes after the greeting
		c.out = append(c.hello(), c.out...)
	}
	if c.err == nil {
		c.pulsing = time.AfterFunc(c.pulse, c.look)
	} else if c.farewell && c.linger == nil {
		c.lingerLocked()
	}
	c.fillLocked()
	closing := c.closing
	c.unlock()
	c.wake()
	if c.drained(); closing {
		c.end(ErrClosed)
	}
	return true
}

// Err is why the connection ended, nil while it has not.
func (c *Conn) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Done is closed when the connection has ended.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Open tells whether the connection takes requests.
func (c *Conn) Open() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err == nil && !c.draining
}

// Each calls f for each request that has been forwarded and is under way.
func (c *Conn) Each(f func(*Stream)) {
	c.mu.Lock()
	var all []*Stream
	for _, s := range c.streams {
		if s.mate.Load() != nil {
			all = append(all, s)
		}
	}
	c.mu.Unlock()
	for _, s := range all {
		f(s)
	}
}

// Drain takes no more requests; the connection ends when those under way have.
func (c *Conn) Drain() {
	c.mu.Lock()
	if !c.draining && c.err == nil {
		c.draining = true
		c.out = h2frame.AppendGoAway(c.outLocked(), c.taken, h2frame.CodeNone)
	}
	c.unlock()
	c.wake()
	c.drained()
}

// drained ends a connection that has nothing left to do.
func (c *Conn) drained() {
	c.mu.Lock()
	over := c.draining && len(c.streams) == 0 && c.waiting.first == nil && c.ready.first == nil
	c.mu.Unlock()
	if over {
		c.endUnlessFrozen(errDrained)
	}
}

// Close ends the connection and all its streams at once. One that is frozen ends
// when it is resumed.
func (c *Conn) Close() { c.endUnlessFrozen(ErrClosed) }

// look gives up a peer that is too slow with a frame. A peer may say nothing for
// as long as it likes.
func (c *Conn) look() {
	stage := c.stage.Load()
	if c.mid.Load() && stage == c.seen {
		c.endUnlessFrozen(errSlow)
		return
	}
	c.seen = stage
	if !c.mid.Load() {
		c.seen = stage - 1 // what begins now has a whole pulse
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil && !c.frozen {
		c.pulsing.Reset(c.pulse)
	}
}

// end is the one way a connection ends. It does not wait for the peer.
func (c *Conn) end(err error) {
	c.mu.Lock()
	c.endLocked(err)
}

// endLocked lets go of the lock.
func (c *Conn) endLocked(err error) {
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	c.err = err
	var ce *h2frame.Error
	told := errors.As(err, &ce)
	farewell := told || err == errGone || err == errDrained
	c.farewell = farewell
	if told {
		c.out = h2frame.AppendGoAway(c.outLocked(), c.taken, ce.Code)
	}
	if farewell && !c.frozen {
		c.lingerLocked()
	}
	if c.pulsing != nil {
		c.pulsing.Stop()
	}
	var all []*Stream
	for _, s := range c.streams {
		all = append(all, s)
	}
	for _, l := range []*line{&c.ready, &c.waiting} {
		for s := l.first; s != nil; s = s.next {
			if s.id == 0 {
				all = append(all, s)
			}
		}
	}
	for _, s := range all {
		c.dropLocked(s, endOurs)
	}
	c.unlock()
	close(c.done)
	if !farewell {
		c.t.Abort()
	}
	if told && c.o.Malformed != nil {
		c.o.Malformed(err)
	}
	for _, s := range all {
		s.lostBoth(h2frame.CodeCancel, err)
	}
	if c.o.Draining != nil {
		c.o.Draining()
	}
}

// lingerLocked leaves the peer a moment to read the last frames.
func (c *Conn) lingerLocked() {
	t := lingerTime
	if c.err == errDrained && !c.client {
		t = drainTime // who has read all closes by himself
	}
	c.linger = time.AfterFunc(t, c.giveUp)
}

// allowance bounds how often a peer may do what costs it little.
type allowance struct {
	left, most, perSecond int
	at                    time.Time
}

// spend takes one, and tells whether there was one.
func (a *allowance) spend() bool {
	if a.left == 0 {
		now := time.Now()
		if a.at.IsZero() {
			a.at = now.Add(-time.Second)
		}
		if n := int(min(now.Sub(a.at), time.Hour).Seconds() * float64(a.perSecond)); n > 0 {
			a.give(n)
			a.at = now
		}
	}
	if a.left == 0 {
		return false
	}
	a.left--
	return true
}

func (a *allowance) give(n int) { a.left = min(a.left+n, a.most) }
