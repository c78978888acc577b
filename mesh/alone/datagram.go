package alone

import (
	"container/list"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"hauberk.dev/mesh/balance"
)

const (
	maxDatagram      = 64 << 10 // none of UDP is as long
	mostSessions     = 100_000  // that a configuration may ask for
	defaultSessions  = 10_000
	defaultQuiet     = 60 * time.Second
	datagramsWaiting = 1 << 20 // bytes in the kernel's queue of a listener, if it grants them
)

// datagrams is a socket of UDP that clients send to, and the sessions of these. A
// session is a client's address and port, with a socket of its own that is connected
// to one endpoint: the kernel lets nobody else answer. One goroutine reads what
// clients send; each session has one that reads answers. Nothing is allocated for a
// datagram of a session that is there.
type datagrams struct {
	l      *listener
	log    *slog.Logger
	conn   *net.UDPConn
	began  time.Time
	blocks sync.Pool // of *datagram

	mu                 sync.Mutex
	sessions           map[flowKey]*datagramFlow
	order              list.List // of sessions; the one that is quiet for the longest is the last
	started            func(func())
	closed             bool
	frozen             atomic.Bool    // nobody reads; see freeze
	receiving, readers sync.WaitGroup // serve, and who read answers

	open      atomic.Int64
	begun     atomic.Uint64
	displaced atomic.Uint64 // sessions that made room for others
	moved     atomic.Uint64 // sessions that went on at another endpoint
	received  atomic.Uint64 // from clients
	sent      atomic.Uint64 // to clients
	dropped   atomic.Uint64 // either way
}

type datagram [maxDatagram]byte

// flowKey is whose session it is. to is the address of ours that is asked, where the
// socket has several.
type flowKey struct {
	from netip.AddrPort
	to   netip.Addr
}

// datagramFlow is a session.
type datagramFlow struct {
	key     flowKey
	control [maxControl]byte // has answers leave from the address that was asked
	length  int              // of control
	up      *upstream
	at      chosen
	conn    *net.UDPConn
	raw     syscall.RawConn
	blocks  *sync.Pool
	look    func(uintptr) bool

	// Of the datagram at hand; of the goroutine that reads answers alone.
	got *datagram
	n   int
	err error

	last atomic.Int64 // when a datagram last went either way, since datagrams.began

	// Behind datagrams.mu.
	place    *list.Element
	tried    []*balance.Host // that could not be reached, since an answer came
	asked    uint64
	answered uint64
	over     bool
}

// listenDatagrams opens the socket of a listener, or takes that of another process.
func listenDatagrams(l *listener, address string, from *os.File, log *slog.Logger) (*datagrams, error) {
	var c net.PacketConn
	var err error
	if from != nil {
		c, err = net.FilePacketConn(from)
	} else {
		c, err = net.ListenPacket("udp", address)
	}
	if err != nil {
		return nil, err
	}
	conn, ok := c.(*net.UDPConn)
	if !ok {
		c.Close()
		return nil, errors.New("no socket of UDP")
	}
	d := &datagrams{l: l, log: log, conn: conn, began: time.Now(), sessions: map[flowKey]*datagramFlow{}}
	d.blocks.New = func() any { return new(datagram) }
	d.conn.SetReadBuffer(datagramsWaiting)
	if a := d.conn.LocalAddr().(*net.UDPAddr); a.IP.IsUnspecified() {
		if err := tellDestination(d.conn); err != nil {
			c.Close()
			return nil, err
		}
	}
	return d, nil
}

// serve passes on what clients send, until the socket is closed. Sessions run by
// start, and end with it.
func (d *datagrams) serve(start func(func())) {
	d.mu.Lock()
	d.started = func(read func()) {
		d.readers.Add(1)
		start(func() { defer d.readers.Done(); read() })
	}
	for _, f := range d.sessions { // of the process before
		d.started(func() { d.answer(f) })
	}
	d.mu.Unlock()
	defer d.receiving.Done() // who starts it has counted it in
	b, control := new(datagram), make([]byte, maxControl)
	for {
		n, cn, _, from, err := d.conn.ReadMsgUDPAddrPort(b[:], control)
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				d.endAll()
				return
			}
			if d.frozen.Load() {
				return
			}
			d.log.Warn("receive", "listener", d.l.name(), "err", err)
			time.Sleep(acceptPause)
			continue
		}
		d.received.Add(1)
		if err := d.pass(b[:n], control[:cn], from); err != nil {
			d.dropped.Add(1)
			d.log.Debug("datagram dropped", "listener", d.l.name(), "client", from, "err", err)
		}
	}
}

var errNoPort = errors.New("nobody can be answered at port 0")

// pass sends a datagram to the endpoint of its session.
func (d *datagrams) pass(b, control []byte, from netip.AddrPort) error {
	if from.Port() == 0 {
		return errNoPort
	}
	key := flowKey{from: from, to: destination(control)}
	if !key.to.IsValid() {
		control = nil
	}
	err := errNoServer
	for range maxAttempts {
		f, ferr := d.flow(key, control)
		if ferr != nil {
			return ferr
		}
		if _, err = f.conn.Write(b); err == nil {
			return nil
		}
		if unreachable(err) { // what was sent before did not arrive, and this was not sent
			d.elsewhere(f)
		} else if !errors.Is(err, net.ErrClosed) && !errors.Is(err, syscall.EMSGSIZE) {
			return err // else the session has ended meanwhile, or was told of the way's width
		}
	}
	return err
}

// flow is the session of a client, with one more datagram.
func (d *datagrams) flow(key flowKey, control []byte) (f *datagramFlow, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if f = d.sessions[key]; f == nil {
		if f, err = d.beginLocked(key, control, nil); err != nil {
			return nil, err
		}
	}
	f.asked++
	d.touchLocked(f)
	return f, nil
}

func (d *datagrams) touchLocked(f *datagramFlow) {
	f.last.Store(int64(time.Since(d.began)))
	d.order.MoveToFront(f.place)
}

// beginLocked makes a session, with an endpoint that was not tried.
func (d *datagrams) beginLocked(key flowKey, control []byte, tried []*balance.Host) (*datagramFlow, error) {
	if d.closed {
		return nil, net.ErrClosed
	}
	site := d.l.site.Load()
	for len(d.sessions) >= site.l.Sessions {
		d.displaced.Add(1)
		d.endLocked(d.order.Back().Value.(*datagramFlow), balance.Cancelled)
	}
	up := site.tcp
	at, err := up.pick(balance.Hash(key.from.Addr().Unmap().String()), tried)
	if err != nil {
		return nil, err
	}
	f := &datagramFlow{key: key, up: up, at: at, tried: tried, blocks: &d.blocks}
	if err := f.dial(); err != nil {
		outcome := balance.Cancelled
		if unreachable(err) {
			outcome = balance.Unreachable
		}
		at.Done(up.clock.Now(), outcome)
		return nil, err
	}
	f.length = copy(f.control[:], control)
	f.look = f.receive
	f.place = d.order.PushFront(f)
	d.touchLocked(f)
	d.sessions[key] = f
	d.open.Add(1)
	d.begun.Add(1)
	at.e.requests.Add(1)
	at.e.active.Add(1)
	d.started(func() { d.answer(f) })
	return f, nil
}

// dial makes the session's socket.
func (f *datagramFlow) dial() error {
	if n := f.up.open.Add(1); f.up.config.Connections > 0 && n > int64(f.up.config.Connections) {
		f.up.open.Add(-1)
		return errBusy
	}
	ap, err := netip.ParseAddrPort(f.at.e.address)
	if err == nil {
		f.at.e.connects.Add(1)
		f.conn, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(ap))
	}
	if err == nil {
		if f.raw, err = f.conn.SyscallConn(); err != nil {
			f.conn.Close()
		}
	}
	if err != nil {
		f.up.open.Add(-1)
		f.at.e.failures.Add(1)
		return fmt.Errorf("connect to %s: %w", f.at.e.address, err)
	}
	return nil
}

// answer passes on what the endpoint sends, to the end of the session.
func (d *datagrams) answer(f *datagramFlow) {
	f.conn.SetReadDeadline(time.Now().Add(time.Duration(d.l.site.Load().l.Idle)))
	for {
		err := f.await(d)
		switch {
		case err != nil && d.frozen.Load() && errors.Is(err, os.ErrDeadlineExceeded):
			return
		case errors.Is(err, syscall.EMSGSIZE): // the way is narrower, which the kernel knows now
			continue
		case unreachable(err):
			d.elsewhere(f)
			return
		case err != nil:
			d.quiet(f)
			return
		}
		more := d.answeredOne(f)
		_, _, err = d.conn.WriteMsgUDPAddrPort(f.got[:f.n], f.control[:f.length], f.key.from)
		f.blocks.Put(f.got)
		f.got = nil
		if err != nil {
			d.dropped.Add(1)
		} else {
			d.sent.Add(1)
		}
		if !more {
			return
		}
	}
}

// await waits for a datagram of the endpoint, as long as there is any either way.
func (f *datagramFlow) await(d *datagrams) error {
	for {
		if d.frozen.Load() { // seen here, or by the deadline
			return os.ErrDeadlineExceeded
		}
		err := f.raw.Read(f.look)
		if err == nil {
			return f.err
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) || d.frozen.Load() {
			return err
		}
		now := time.Now()
		until := d.began.Add(time.Duration(f.last.Load())).Add(time.Duration(d.l.site.Load().l.Idle))
		if !until.After(now) {
			return err
		}
		f.conn.SetReadDeadline(until)
	}
}

// receive reads a datagram, if there is one: no memory is held while there is none.
func (f *datagramFlow) receive(fd uintptr) bool {
	b := f.blocks.Get().(*datagram)
	for {
		n, err := syscall.Read(int(fd), b[:])
		if err == syscall.EINTR {
			continue
		}
		f.n, f.err = n, nil
		if err == nil {
			f.got = b
			return true
		}
		f.blocks.Put(b)
		f.err = err
		return err != syscall.EAGAIN
	}
}

// answeredOne counts an answer, and says whether the session goes on.
func (d *datagrams) answeredOne(f *datagramFlow) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if f.over {
		return false
	}
	if f.answered == 0 {
		f.at.Report(f.up.clock.Now(), balance.Success)
	}
	f.answered++
	f.tried = nil
	d.touchLocked(f)
	if n := uint64(d.l.site.Load().l.Responses); n > 0 && f.answered >= n*f.asked {
		d.endLocked(f, balance.Cancelled)
		return false
	}
	return true
}

// quiet ends a session whose time is over. An endpoint that owed an answer and gave
// none has failed.
func (d *datagrams) quiet(f *datagramFlow) {
	d.mu.Lock()
	defer d.mu.Unlock()
	outcome := balance.Cancelled
	if f.asked > 0 && f.answered == 0 && d.l.site.Load().l.Responses > 0 && !f.over {
		outcome = balance.Failure
		f.at.e.failures.Add(1)
	}
	d.endLocked(f, outcome)
}

// elsewhere has a session whose endpoint could not be reached go on at another.
func (d *datagrams) elsewhere(f *datagramFlow) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if f.over {
		return
	}
	f.at.e.failures.Add(1)
	d.endLocked(f, balance.Unreachable)
	tried := append(f.tried, f.at.Host())
	if len(tried) >= maxAttempts {
		return
	}
	if _, err := d.beginLocked(f.key, f.control[:f.length], tried); err == nil {
		d.moved.Add(1)
	} // else the client's next datagram tries again
}

// endLocked ends a session. outcome is what is to be said of its endpoint that was
// not said yet.
func (d *datagrams) endLocked(f *datagramFlow, outcome balance.Outcome) {
	if f.over {
		return
	}
	f.over = true
	delete(d.sessions, f.key)
	d.order.Remove(f.place)
	f.conn.Close()
	f.at.Done(f.up.clock.Now(), outcome)
	f.at.e.active.Add(-1)
	f.up.open.Add(-1)
	d.open.Add(-1)
}

func (d *datagrams) endAll() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	for _, f := range d.sessions {
		d.endLocked(f, balance.Cancelled)
	}
}

// settle ends the sessions whose endpoint the configuration does not name any more.
func (d *datagrams) settle() {
	d.mu.Lock()
	defer d.mu.Unlock()
	named := map[*endpoint]bool{}
	for _, e := range d.l.site.Load().tcp.endpoints {
		named[e] = true
	}
	for _, f := range d.sessions {
		if !named[f.at.e] {
			d.endLocked(f, balance.Cancelled)
		}
	}
}

// sweep ends the sessions whose endpoint is left out, if there is one to go to: the
// client's next datagram begins another.
func (d *datagrams) sweep() {
	well := false
	for _, h := range d.l.site.Load().tcp.set.Hosts() {
		well = well || h.Up()
	}
	if !well {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.frozen.Load() {
		return
	}
	for _, f := range d.sessions {
		if !f.at.Host().Up() {
			d.moved.Add(1)
			d.endLocked(f, balance.Cancelled)
		}
	}
}

// unreachable says that an error means nobody listens there, or that no way leads
// there.
func unreachable(err error) bool {
	return err != nil && (errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EHOSTUNREACH) || errors.Is(err, syscall.ENETUNREACH))
}
