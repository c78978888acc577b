// Package mesh is the data plane of a node: it makes a plan true.
//
// It takes every TCP connection of the sandboxes on its node, from outside
// the guests. A connection to a service goes, under mutual TLS with the
// sandbox's own identity, to the proxy of the node that runs an endpoint; one
// to a listed destination outside goes there; any other is refused. Where
// connections arrive, the access rules of the service are applied to the
// identity the caller has proved: per request where the port speaks HTTP, SOFABolt,
// Dubbo or Redis, else per connection. A peer without an identity gets nothing.
//
// The package opens no socket in a sandbox, signs nothing and stores nothing:
// sockets and certificates come from the node over the link (api/mesh). Private keys
// are made here and never leave the process; the secrets of live connections go to
// the process that takes its place (mesh/handover), and nowhere else.
package mesh

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/balance"
	"hauberk.dev/mesh/link"
	"hauberk.dev/plan"
)

// Bounds and patience.
const (
	defaultConnections = 1024 // open at once, per sandbox and direction
	maxHandshakes      = 256  // at once, over all
	handshakeTimeout   = 5 * time.Second
	connectTimeout     = 5 * time.Second
	identityWait       = 10 * time.Second // for a sandbox's first certificate
	planWait           = 5 * time.Second
	poolIdle           = 5 * time.Minute
	flowIdle           = 2 * time.Hour
	janitorPeriod      = time.Minute
	silencePeriod      = 5 * time.Second
	maxPlan            = 64 << 20 // bytes
)

// Options of a Proxy. The zero value is usable.
type Options struct {
	Log *slog.Logger
	// Requests takes the log of requests, if a plan wants one; nil drops it.
	Requests io.Writer
	// Connections open at once per sandbox and direction; 0 means 1024.
	Connections int

	silence     time.Duration // of a guest, before it is given up; 0 means 30 s
	tapPatience time.Duration // with who taps and does not ask; 0 means 5 s
}

// Proxy is the data plane of one node.
type Proxy struct {
	log     *slog.Logger
	limit   int
	silence time.Duration // of a guest's kernel
	started time.Time

	directory atomic.Pointer[directory]
	traffic   traffic
	analysis  analysis
	planned   chan struct{} // closed when there is a plan
	plans     sync.Once
	registry  registry
	carried   carried
	pool      pool
	events    *events
	observer  observer
	requests  io.Writer
	node      atomic.Pointer[link.Session] // nil while no node is connected

	world   atomic.Pointer[plan.Mesh] // the plan in force, as it was told
	still   *still
	changes sync.RWMutex    // held by what the node asks for; whole, by hold
	leaves  context.Context // until all has been given to another process
	leave   context.CancelFunc

	mu        sync.Mutex
	nodes     *net.UnixListener // where nodes connect
	door      *net.UnixListener // where who takes this one's place does
	ports     []api.PublishedPort
	ctx       context.Context // of Run
	sandboxes map[string]*sandbox
	byAddress map[netip.Addr]*sandbox
	gateway   net.Listener
	published []net.Listener
	turn      atomic.Uint32
	held      atomic.Int64 // bytes of frames that wait to be judged
	running   sync.WaitGroup
	shakes    chan struct{}
}

// New makes a proxy that does nothing yet.
func New(o Options) *Proxy {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Connections == 0 {
		o.Connections = defaultConnections
	}
	if o.silence == 0 {
		o.silence = defaultSilence
	}
	if o.tapPatience == 0 {
		o.tapPatience = tapPatience
	}
	if o.Requests == nil {
		o.Requests = io.Discard
	}
	p := &Proxy{
		requests: o.Requests,
		log:      o.Log, limit: o.Connections, silence: o.silence, started: time.Now(), events: newEvents(),
		sandboxes: map[string]*sandbox{}, byAddress: map[netip.Addr]*sandbox{},
		still:  newStill(),
		shakes: make(chan struct{}, maxHandshakes), planned: make(chan struct{}),
		analysis: newAnalysis(),
		observer: observer{patience: o.tapPatience},
		traffic:  traffic{clock: balance.NewClock(), sets: map[string]*balance.Set{}},
	}
	p.directory.Store(&directory{})
	p.leaves, p.leave = context.WithCancel(context.Background())
	return p
}

// Run serves the node that connects to ln, and the traffic, until ctx ends.
// One node at a time: the newest connection replaces the one before. While no
// node is connected, traffic goes on with what there is.
func (p *Proxy) Run(ctx context.Context, ln *net.UnixListener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	p.mu.Lock()
	p.ctx, p.nodes = ctx, ln
	p.mu.Unlock()
	defer context.AfterFunc(p.leaves, func() {
		ln.SetUnlinkOnClose(false) // it is another's
		cancel()
	})()
	p.running.Go(func() { p.janitor(ctx) })
	p.running.Go(func() { p.sendEvents(ctx) })
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()

	endLast, waitLast := context.CancelFunc(func() {}), func() {}
	var err error
	for {
		var socket *net.UnixConn
		if socket, err = ln.AcceptUnix(); errors.Is(err, net.ErrClosed) {
			break
		}
		if err != nil {
			p.pause("accept a node", err)
			continue
		}
		endLast()
		waitLast()
		session, end := context.WithCancel(ctx)
		done := make(chan struct{})
		endLast, waitLast = end, func() { <-done }
		go func() {
			defer close(done)
			defer end()
			p.serveNode(session, socket)
		}()
	}
	endLast()
	waitLast()
	if ctx.Err() != nil && errors.Is(err, net.ErrClosed) {
		err = nil
	}
	cancel()
	p.shut()
	p.running.Wait()
	return err
}

// shut closes everything.
func (p *Proxy) shut() {
	p.mu.Lock()
	boxes := p.sandboxes
	p.sandboxes, p.byAddress = map[string]*sandbox{}, map[netip.Addr]*sandbox{}
	p.mu.Unlock()
	p.replaceGateway(nil)
	p.replacePublished(nil, nil)
	for _, sb := range boxes {
		sb.close()
	}
	p.registry.closeAll()
	p.analysis.close()
	p.observer.close()
}

// serveNode serves one connection from the node.
func (p *Proxy) serveNode(ctx context.Context, socket *net.UnixConn) {
	conn := api.NewConn(socket, maxPlan)
	uid, err := conn.PeerUID()
	if err != nil || uid != 0 && uid != os.Geteuid() {
		p.log.Warn("refuse link", "uid", uid, "err", err)
		conn.Close()
		return
	}
	c := &control{p: p, kept: map[string]bool{}}
	c.session = link.NewSession(conn, c.handle, 0)
	err = c.session.Run(ctx)
	p.node.CompareAndSwap(c.session, nil)
	p.log.Info("link ended", "err", err)
}

var errNoNode = errors.New("no node is connected")

// ask sends a request to the node.
func (p *Proxy) ask(ctx context.Context, m *api.Message) (*api.Message, []*os.File, error) {
	s := p.node.Load()
	if s == nil {
		return nil, nil, errNoNode
	}
	return s.Call(ctx, m)
}

// janitor closes what has been idle or silent for too long.
func (p *Proxy) janitor(ctx context.Context) {
	tick := time.NewTicker(janitorPeriod)
	defer tick.Stop()
	often := time.NewTicker(min(silencePeriod, p.silence/4))
	defer often.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			p.pool.sweep(now)
			p.registry.sweep(now)
			p.directory.Load().readKeysAgain(p.log)
			p.observer.sweep(now)
		case <-often.C:
			p.giveUpSilent()
			p.analyse()
		}
	}
}

// plan returns the plan in force. Connections may be there before it, when a
// proxy takes the place of another: they wait a moment.
func (p *Proxy) plan() *directory {
	select {
	case <-p.planned:
	default:
		select {
		case <-p.planned:
		case <-p.context().Done():
		case <-time.After(planWait):
		}
	}
	return p.directory.Load()
}

// start runs a task until it is stopped.
func (p *Proxy) start(run func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	p.running.Go(func() {
		defer cancel()
		if err := run(ctx); err != nil {
			p.log.Warn("ended", "err", err)
		}
	})
	return cancel
}

func (p *Proxy) context() context.Context {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ctx
}

func (p *Proxy) sandboxAt(a netip.Addr) *sandbox {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.byAddress[a]
}

// localEndpoint picks a sandbox of a service on this node, in turn.
func (p *Proxy) localEndpoint(namespace, service string) *sandbox {
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []*sandbox
	for _, sb := range p.sandboxes {
		f := sb.facts.Load()
		if f.Namespace == namespace && f.Service == service && !p.registry.revoked(party{instance: f.Instance, identity: f.Identity}) {
			all = append(all, sb)
		}
	}
	if len(all) == 0 {
		return nil
	}
	return all[int(p.turn.Add(1))%len(all)]
}

// accept runs an accept loop until the listener is closed. It counts itself and
// what it has accepted, so that nothing is overlooked between the two; serve takes
// its count back.
func (p *Proxy) accept(ln net.Listener, count func(int), serve func(net.Conn)) {
	defer count(-1)
	for {
		c, err := ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			p.pause("accept at "+ln.Addr().String(), err)
			continue
		}
		count(1)
		p.running.Go(func() { serve(c) })
	}
}

// pause waits a moment after an error of accept. Out of descriptors, most likely:
// let some be closed.
func (p *Proxy) pause(what string, err error) {
	p.log.Warn(what, "err", err)
	time.Sleep(20 * time.Millisecond)
}

// serveOn serves the connections that ln accepts.
func (p *Proxy) serveOn(ln net.Listener, serve func(net.Conn)) {
	p.still.moves(1)
	p.running.Go(func() {
		p.accept(ln, p.still.moves, func(c net.Conn) {
			defer p.still.moves(-1)
			serve(c)
		})
	})
}

func listener(f *os.File) (net.Listener, error) {
	ln, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("take listener: %w", err)
	}
	return ln, nil
}
