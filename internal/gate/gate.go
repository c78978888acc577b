// Package gate carries what a sandbox that is run by hand may say and hear
// across the edge of its network: to the destinations on a list, and from the
// ports of this machine that were published for it. Without a list nothing goes
// out, and no name is resolved.
//
// It works with sockets alone: no rule, no route and no setting of this machine
// is changed, and what ends the process ends the traffic. Only TCP goes out,
// and names are asked for at the gateway; UDP comes in where it was published.
//
// Open needs privileges, Run none.
package gate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"hauberk.dev/internal/netns"
)

const (
	maxConnections = 1024
	dialPatience   = 15 * time.Second
)

// Options say what may pass.
type Options struct {
	Egress  []Destination
	Publish []Publication
	// Denied, if not nil, is told what the guest was refused: an address with its
	// port, or a name. It must not block.
	Denied func(what string)
}

// Gate is an open gate. Run it, or Close it.
type Gate struct {
	o         Options
	inside    *netns.Inside
	intercept net.Listener
	names     *names
	doors     []*door
	slots     chan struct{}
	wg        sync.WaitGroup
	// dial connects to the outside; tests replace it.
	dial func(ctx context.Context, to netip.AddrPort) (net.Conn, error)
}

// door is one published port.
type door struct {
	p Publication
	l net.Listener   // of TCP
	u net.PacketConn // of UDP
}

// Open opens every socket of a gate: those in h, and those that are published on
// this machine.
func Open(h *netns.Hand, o Options) (_ *Gate, err error) {
	var dialer net.Dialer
	g := &Gate{o: o, slots: make(chan struct{}, maxConnections)}
	g.dial = func(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
		return dialer.DialContext(ctx, "tcp", to.String())
	}
	defer func() {
		if err != nil {
			g.Close()
		}
	}()
	if g.inside, err = h.Gate.Inside(); err != nil {
		return nil, err
	}
	f, err := h.Gate.ListenTransparent()
	if err != nil {
		return nil, err
	}
	if g.intercept, err = listener(f); err != nil {
		return nil, err
	}
	udp, tcp, err := h.Gate.ListenDNS()
	if err != nil {
		return nil, err
	}
	if g.names, err = newNames(udp, tcp, o); err != nil {
		return nil, err
	}
	for _, p := range o.Publish {
		d, err := p.open()
		if err != nil {
			return nil, err
		}
		g.doors = append(g.doors, d)
	}
	return g, nil
}

func listener(f *os.File) (net.Listener, error) {
	defer f.Close()
	return net.FileListener(f)
}

// Published lists the published ports; one that was asked for as 0 has its
// number.
func (g *Gate) Published() (list []Publication) {
	for _, d := range g.doors {
		list = append(list, d.p)
	}
	return list
}

// Close closes every socket, and waits until nothing of the gate runs.
func (g *Gate) Close() error {
	var errs []error
	closing := func(c io.Closer) { errs = append(errs, c.Close()) }
	if g.intercept != nil {
		closing(g.intercept)
	}
	if g.names != nil {
		closing(g.names)
	}
	for _, d := range g.doors {
		if d.l != nil {
			closing(d.l)
		} else {
			closing(d.u)
		}
	}
	g.wg.Wait()
	if g.inside != nil {
		closing(g.inside)
		g.inside = nil
	}
	return errors.Join(errs...)
}

// Run carries traffic until ctx ends, and then closes the gate.
func (g *Gate) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g.wg.Go(func() { g.accept(ctx, g.intercept, g.out) })
	g.wg.Go(func() { g.names.serveUDP(ctx) })
	g.wg.Go(func() { g.names.serveTCP(ctx) })
	for _, d := range g.doors {
		if d.l != nil {
			g.wg.Go(func() { g.accept(ctx, d.l, func(ctx context.Context, c *net.TCPConn) { g.in(ctx, c, d.p.Guest) }) })
		} else {
			g.wg.Go(func() { g.datagrams(ctx, d) })
		}
	}
	<-ctx.Done()
	return g.Close()
}

// accept serves the connections of a listener, each on its own, within the
// gate's bound: beyond it they wait in the listener's queue.
func (g *Gate) accept(ctx context.Context, l net.Listener, serve func(context.Context, *net.TCPConn)) {
	for {
		select {
		case g.slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		c, err := l.Accept()
		if err != nil {
			<-g.slots
			if errors.Is(err, net.ErrClosed) {
				return
			}
			select {
			case <-time.After(50 * time.Millisecond): // out of descriptors, say
				continue
			case <-ctx.Done():
				return
			}
		}
		g.wg.Go(func() {
			defer func() { <-g.slots }()
			serve(ctx, c.(*net.TCPConn))
		})
	}
}

// out carries a connection of the guest to where it wanted to go.
func (g *Gate) out(ctx context.Context, c *net.TCPConn) {
	to := c.LocalAddr().(*net.TCPAddr).AddrPort()
	to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	if !g.names.allows(to) {
		g.denied(to.String())
		refuse(c)
		return
	}
	dialing, cancel := context.WithTimeout(ctx, dialPatience)
	far, err := g.dial(dialing, to)
	cancel()
	if err != nil {
		refuse(c)
		return
	}
	pipe(ctx, c, far)
}

// in carries a connection from a published port to the guest.
func (g *Gate) in(ctx context.Context, c *net.TCPConn, port uint16) {
	dialing, cancel := context.WithTimeout(ctx, dialPatience)
	far, err := g.inside.Dial(dialing, "tcp4", netip.AddrPortFrom(netns.HandAddress, port))
	cancel()
	if err != nil {
		refuse(c)
		return
	}
	pipe(ctx, c, far)
}

func (g *Gate) denied(what string) {
	if g.o.Denied != nil {
		g.o.Denied(what)
	}
}

// refuse resets a connection: it was accepted before anybody knew its fate.
func refuse(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
}

// pipe copies both ways until both sides have ended, one is broken, or ctx ends.
func pipe(ctx context.Context, a *net.TCPConn, far net.Conn) {
	b, ok := far.(*net.TCPConn)
	if !ok {
		a.Close()
		far.Close()
		return
	}
	stop := context.AfterFunc(ctx, func() { refuse(a); refuse(b) })
	defer stop()
	var wg sync.WaitGroup
	for _, way := range [][2]*net.TCPConn{{a, b}, {b, a}} {
		wg.Go(func() {
			if _, err := io.Copy(way[1], way[0]); err != nil {
				refuse(a)
				refuse(b)
				return
			}
			way[1].CloseWrite()
		})
	}
	wg.Wait()
	a.Close()
	b.Close()
}

// What datagrams of a published port may hold.
const (
	maxPeers    = 256
	peerIdle    = time.Minute
	maxDatagram = 64 << 10
)

// datagrams carries those of a published port: each peer has a socket of its
// own to the guest, until it is silent for a while.
func (g *Gate) datagrams(ctx context.Context, d *door) {
	var mu sync.Mutex
	peers := map[netip.AddrPort]net.Conn{}
	buf := make([]byte, maxDatagram)
	for {
		n, from, err := d.u.(*net.UDPConn).ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) || ctx.Err() != nil {
			break
		}
		if err != nil {
			continue // an answer to a peer found nobody
		}
		mu.Lock()
		c := peers[from]
		full := len(peers) >= maxPeers
		mu.Unlock()
		if c == nil {
			if full {
				continue
			}
			if c, err = g.inside.Dial(ctx, "udp4", netip.AddrPortFrom(netns.HandAddress, d.p.Guest)); err != nil {
				continue
			}
			mu.Lock()
			peers[from] = c
			mu.Unlock()
			g.wg.Go(func() {
				answers(d.u.(*net.UDPConn), from, c)
				mu.Lock()
				delete(peers, from)
				mu.Unlock()
				c.Close()
			})
		}
		c.SetReadDeadline(time.Now().Add(peerIdle))
		_, _ = c.Write(buf[:n])
	}
	mu.Lock()
	defer mu.Unlock()
	for _, c := range peers {
		c.Close()
	}
}

// answers sends what the guest says back to a peer.
func answers(out *net.UDPConn, to netip.AddrPort, guest net.Conn) {
	buf := make([]byte, maxDatagram)
	for {
		n, err := guest.Read(buf)
		if err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, net.ErrClosed) || errors.Is(err, io.EOF) {
				return
			}
			continue // nobody listens in the guest yet
		}
		guest.SetReadDeadline(time.Now().Add(peerIdle))
		if _, err := out.WriteToUDPAddrPort(buf[:n], to); errors.Is(err, net.ErrClosed) {
			return
		}
	}
}

// open opens the port on this machine.
func (p Publication) open() (*door, error) {
	d := &door{p: p}
	var err error
	if p.UDP {
		if d.u, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(p.Host)); err == nil {
			d.p.Host = d.u.LocalAddr().(*net.UDPAddr).AddrPort()
		}
	} else if d.l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(p.Host)); err == nil {
		d.p.Host = d.l.Addr().(*net.TCPAddr).AddrPort()
	}
	if err != nil {
		return nil, fmt.Errorf("publish port %s: %w", p, err)
	}
	return d, nil
}
