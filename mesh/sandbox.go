package mesh

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/dns"
	"hauberk.dev/plan"
)

// sandbox is one local instance: its sockets, its identity, its counters.
type sandbox struct {
	p      *Proxy
	facts  atomic.Pointer[plan.Sandbox]
	svid   *svid
	stock  stock
	cancel context.CancelFunc
	ctx    context.Context

	mu      sync.Mutex
	sockets []interface{ Close() error }

	open     [2]atomic.Int64 // by direction: out, in
	total    atomic.Uint64
	refused  atomic.Uint64
	trials   trials        // what rules in audit would have refused
	bytesIn  atomic.Uint64 // of flows that have ended
	bytesOut atomic.Uint64
}

const (
	out = iota
	in
)

func (p *Proxy) newSandbox(s plan.Sandbox) *sandbox {
	sb := &sandbox{p: p, svid: newSVID()}
	sb.facts.Store(&s)
	sb.ctx, sb.cancel = context.WithCancel(p.ctx)
	sb.stock = stock{instance: s.Instance, p: p, changed: make(chan struct{})}
	p.running.Go(func() { sb.svid.run(sb.ctx, p, s.Instance, func() string { return sb.facts.Load().Identity }) })
	return sb
}

// listen serves on the three sockets, in place of those it had.
func (sb *sandbox) listen(files []*os.File) error {
	tcp, err := listener(files[0])
	if err != nil {
		return err
	}
	names, err := net.FilePacketConn(files[1])
	if err != nil {
		return errors.Join(fmt.Errorf("take DNS socket: %w", err), tcp.Close())
	}
	namesTCP, err := listener(files[2])
	if err != nil {
		return errors.Join(err, tcp.Close(), names.Close())
	}
	sb.mu.Lock()
	old := sb.sockets
	sb.sockets = []interface{ Close() error }{tcp, names, namesTCP}
	sb.mu.Unlock()
	for _, s := range old {
		s.Close()
	}
	d := &dns.Server{
		Namespace: func() string { return sb.facts.Load().Namespace },
		Lookup: func(service, namespace string) (netip.Addr, bool) {
			return sb.p.directory.Load().lookup(service, namespace)
		},
	}
	run := &sb.p.running
	sb.p.serveOn(sb.p.carried.by(tcp), sb.outbound)
	run.Go(func() { d.ServeUDP(names) })
	run.Go(func() { d.ServeTCP(sb.p.carried.by(namesTCP)) })
	return nil
}

// close cuts all and gives the sockets up.
func (sb *sandbox) close() {
	sb.cancel()
	sb.closeSockets()
	instance := sb.facts.Load().Instance
	sb.p.registry.cutIf(func(e *entry) bool { return e.instance == instance })
	sb.stock.close()
}

// closeSockets takes no connection of the guest any more.
func (sb *sandbox) closeSockets() {
	sb.mu.Lock()
	sockets := sb.sockets
	sb.sockets = nil
	sb.mu.Unlock()
	for _, s := range sockets {
		s.Close()
	}
}

// register puts a connection of this sandbox into the registry. One that was
// still being made when the sandbox was closed does not outlive it, nor does one
// that was allowed by a plan before: a plan in force cuts what is registered, and
// what comes later finds it here.
func (sb *sandbox) register(e *entry) error {
	if err := sb.p.registry.add(e); err != nil {
		return err
	}
	if sb.ctx.Err() != nil {
		sb.p.registry.remove(e)
		return net.ErrClosed
	}
	if !e.allowedBy(sb.p.directory.Load()) {
		sb.p.registry.remove(e)
		return errForbidden
	}
	return nil
}

// enter counts a connection in, if there is room.
func (sb *sandbox) enter(direction int) bool {
	if sb.open[direction].Add(1) > int64(sb.p.limit) {
		sb.open[direction].Add(-1)
		sb.refuse(api.Event{Kind: api.EventLimit, Reason: fmt.Sprintf("%d connections are open at once", sb.p.limit)})
		return false
	}
	sb.total.Add(1)
	return true
}

func (sb *sandbox) leave(direction int) { sb.open[direction].Add(-1) }

// ended adds up what a flow has moved.
func (sb *sandbox) ended(e *entry) {
	sb.bytesOut.Add(e.sent.Load())
	sb.bytesIn.Add(e.received.Load())
}

// refuse counts and tells what was refused to a caller, who may be looking around.
func (sb *sandbox) refuse(ev api.Event) {
	sb.tellRefused(ev)
	sb.p.analysis.refused(sb, ev)
}

// tellRefused counts and tells what was refused.
func (sb *sandbox) tellRefused(ev api.Event) {
	sb.refused.Add(1)
	ev.Instance = sb.facts.Load().Instance
	sb.p.events.add(ev)
}

func (sb *sandbox) stats() api.InstanceStats {
	s := api.InstanceStats{
		Open: int(sb.open[out].Load() + sb.open[in].Load()), Total: sb.total.Load(), Refused: sb.refused.Load(), WouldDeny: sb.trials.count.Load(),
		BytesIn: sb.bytesIn.Load(), BytesOut: sb.bytesOut.Load(),
	}
	i, err := sb.svid.current()
	if err != nil {
		s.Identity = err.Error()
		return s
	}
	s.Serial, s.NotAfter = i.serial, i.cred.Certificate.Leaf.NotAfter
	return s
}

// connect opens a connection to a port of the guest.
func (sb *sandbox) connect(ctx context.Context, port uint16) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	f, err := sb.stock.take(ctx)
	if err != nil {
		return nil, fmt.Errorf("connect to guest: %w", err)
	}
	defer f.Close()
	c, err := connect(ctx, f, netip.AddrPortFrom(sb.facts.Load().Address, port))
	if err != nil {
		return nil, fmt.Errorf("connect to guest port %d: %w", port, err)
	}
	sb.p.carried.add(c)
	sb.p.listenFor(c)
	return c, nil
}

// connect connects a socket made elsewhere, as the net package does its own.
func connect(ctx context.Context, f *os.File, to netip.AddrPort) (*net.TCPConn, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	if deadline, ok := ctx.Deadline(); ok {
		if err := f.SetWriteDeadline(deadline); err != nil {
			return nil, err
		}
	}
	stop := context.AfterFunc(ctx, func() { f.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	started := false
	var result error
	err = raw.Write(func(fd uintptr) bool {
		if !started {
			started = true
			result = unix.Connect(int(fd), &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()})
			if result != unix.EINPROGRESS {
				return true
			}
			result = nil
			return false
		}
		code, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		if err != nil || code != 0 {
			if result = err; code != 0 {
				result = unix.Errno(code)
			}
			return true
		}
		_, err = unix.Getpeername(int(fd))
		return err == nil // else the wake-up was for nothing
	})
	if err = errors.Join(err, result); err != nil {
		return nil, err
	}
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

const (
	stockLow  = 16 // ask for more below this
	stockFill = 48 // and for so many
)

// stock holds sockets made by the node in the sandbox's namespace, ahead of
// need.
type stock struct {
	instance string
	p        *Proxy

	mu      sync.Mutex
	files   []*os.File
	asking  bool
	closed  bool
	failure error
	changed chan struct{} // closed and replaced at each change
}

func (s *stock) take(ctx context.Context) (*os.File, error) {
	for {
		s.mu.Lock()
		if s.closed {
			s.mu.Unlock()
			return nil, net.ErrClosed
		}
		if len(s.files) < stockLow && !s.asking {
			s.asking = true
			go s.fill()
		}
		if n := len(s.files); n > 0 {
			f := s.files[n-1]
			s.files = s.files[:n-1]
			s.mu.Unlock()
			return f, nil
		}
		changed := s.changed
		s.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			s.mu.Lock()
			defer s.mu.Unlock()
			return nil, errors.Join(errors.New("no socket was given by the node"), s.failure, ctx.Err())
		}
	}
}

func (s *stock) fill() {
	ctx, cancel := context.WithTimeout(context.Background(), connectTimeout)
	defer cancel()
	_, files, err := s.p.ask(ctx, &api.Message{Kind: api.KindSockets, Instance: s.instance, Count: stockFill})
	if err != nil {
		time.Sleep(50 * time.Millisecond) // before those who wait ask again
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asking = false
	s.failure = err
	if s.closed {
		closeAll(files)
		files = nil
	}
	s.files = append(s.files, files...)
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *stock) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	closeAll(s.files)
	s.files = nil
	close(s.changed)
	s.changed = make(chan struct{})
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
