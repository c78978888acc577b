package mesh

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"hauberk.dev/mesh/inspect"
)

// Bounds of a mirror: what an analyser has not taken yet is at most 4 MiB.
const (
	mirrorPiece   = 4 << 10
	mirrorQueue   = 1024 // pieces
	mirrorDial    = 5 * time.Second
	mirrorWrite   = 10 * time.Second
	mirrorAgain   = time.Second // before it is dialled again
	maxMirrorPath = 100         // bytes of the path of a socket
)

// mirrorAddress reads where a mirror goes: a socket, or a literal address.
func mirrorAddress(s string) (network, address string, err error) {
	network, address, _ = strings.Cut(s, ":")
	switch network {
	case "unix":
		if filepath.IsAbs(address) && len(address) <= maxMirrorPath {
			return network, address, nil
		}
	case "tcp":
		if _, err := netip.ParseAddrPort(address); err == nil {
			return network, address, nil
		}
	}
	return "", "", fmt.Errorf("inspect: mirror %.128q; want \"unix:/path\" or \"tcp:address:port\"", s)
}

type piece struct {
	kind inspect.MirrorKind
	conn uint64
	buf  *[mirrorPiece]byte
	n    int
	text []byte // in place of buf
}

var pieces = sync.Pool{New: func() any { return new([mirrorPiece]byte) }}

// mirror copies what callers send to an analyser. It never waits for it: what
// has no room is not sent, and counted.
type mirror struct {
	network, address string
	queue            chan piece
	// life rises with each connection to the analyser; odd is connected.
	life         atomic.Uint64
	next         atomic.Uint64 // number of a caller's connection
	sent, missed atomic.Uint64
	stop         context.CancelFunc
}

// run keeps a connection to the analyser.
func (m *mirror) run(ctx context.Context) {
	for ctx.Err() == nil {
		d := net.Dialer{Timeout: mirrorDial}
		if c, err := d.DialContext(ctx, m.network, m.address); err == nil {
			stop := context.AfterFunc(ctx, func() { c.Close() })
			m.life.Add(1)
			m.copy(ctx, c)
			m.life.Add(1)
			stop()
			c.Close()
		}
		for len(m.queue) > 0 {
			m.free(<-m.queue)
		}
		select {
		case <-ctx.Done():
		case <-time.After(mirrorAgain):
		}
	}
}

// free gives a piece back that was not sent.
func (m *mirror) free(p piece) {
	if p.buf != nil {
		m.missed.Add(uint64(p.n))
		pieces.Put(p.buf)
	}
}

func (m *mirror) copy(ctx context.Context, c net.Conn) {
	out := bufio.NewWriterSize(c, 64<<10)
	out.WriteString(inspect.MirrorMagic)
	var head [inspect.MirrorHeader]byte
	for {
		var p piece
		select {
		case p = <-m.queue:
		default:
			if out.Flush() != nil {
				return
			}
			select {
			case p = <-m.queue:
			case <-ctx.Done():
				return
			}
		}
		c.SetWriteDeadline(time.Now().Add(mirrorWrite))
		b := p.text
		if p.buf != nil {
			b = p.buf[:p.n]
		}
		out.Write(inspect.AppendMirror(head[:0], p.kind, p.conn, len(b)))
		if _, err := out.Write(b); err != nil {
			m.free(p)
			return
		}
		if p.buf != nil {
			m.sent.Add(uint64(p.n))
			pieces.Put(p.buf)
		}
	}
}

func (m *mirror) offer(p piece) bool {
	select {
	case m.queue <- p:
		return true
	default:
		return false
	}
}

// mirrored is one connection of a caller, for the goroutine that reads it.
type mirrored struct {
	m      *mirror
	number uint64
	life   uint64 // of the mirror in which it was opened
	lost   uint64
}

// opening is what a mirror says of a connection.
type mirrorOpening struct {
	Service  string `json:"service"`
	Port     uint16 `json:"port"`
	Protocol string `json:"protocol"`
	Caller   string `json:"caller"`
	Instance string `json:"instance,omitempty"`
	Source   string `json:"source"`
}

// mirror copies what was read.
func (w *watch) mirror(b []byte) {
	if w == nil || len(b) == 0 {
		return
	}
	s := w.a.p.directory.Load().services[w.key]
	if s == nil || s.mirror == nil {
		return
	}
	c := &w.copied
	if c.m != s.mirror {
		c.end()
		*c = mirrored{m: s.mirror, number: s.mirror.next.Add(1)}
	}
	life := c.m.life.Load()
	if life&1 == 0 || !c.ready(life, func() []byte { return w.opening(s) }) {
		c.m.missed.Add(uint64(len(b)))
		c.lost += uint64(len(b))
		return
	}
	for len(b) > 0 {
		buf := pieces.Get().(*[mirrorPiece]byte)
		n := copy(buf[:], b)
		if !c.m.offer(piece{kind: inspect.MirrorData, conn: c.number, buf: buf, n: n}) {
			pieces.Put(buf)
			c.m.missed.Add(uint64(len(b)))
			c.lost += uint64(len(b))
			return
		}
		b = b[n:]
	}
}

// ready makes sure the analyser knows the connection, and what it has missed of it.
func (c *mirrored) ready(life uint64, open func() []byte) bool {
	if c.life != life {
		if !c.m.offer(piece{kind: inspect.MirrorOpen, conn: c.number, text: open()}) {
			return false
		}
		c.life = life
	}
	if c.lost > 0 {
		if !c.m.offer(piece{kind: inspect.MirrorLost, conn: c.number, text: binary.BigEndian.AppendUint64(nil, c.lost)}) {
			return false
		}
		c.lost = 0
	}
	return true
}

// end says that no more comes. An analyser that is too slow to hear it learns
// from the end of its own connection.
func (c *mirrored) end() {
	if c.m != nil && c.life == c.m.life.Load() {
		c.m.offer(piece{kind: inspect.MirrorEnd, conn: c.number})
	}
	*c = mirrored{}
}

func (w *watch) opening(s *service) []byte {
	b, err := json.Marshal(mirrorOpening{Service: s.String(), Port: w.a.port, Protocol: s.ports[w.a.port].Protocol,
		Caller: w.a.who.peerIdentity, Instance: w.a.who.peerInstance, Source: w.a.ev.Source})
	if err != nil {
		return nil
	}
	return b
}

// close ends the mirrors. Those of a proxy that took over would go on when it
// gives over in turn: their context is older than Run's.
func (n *analysis) close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for name, m := range n.mirrors {
		m.stop()
		delete(n.mirrors, name)
	}
}

// mirrors starts the mirrors that a plan names, and stops those it does not. The
// lock is held.
func (n *analysis) mirrorsLocked(p *Proxy, d *directory) {
	wanted := map[string]bool{}
	for _, s := range d.services {
		if s.Inspect == nil || s.Inspect.Mirror == "" {
			continue
		}
		name := s.Inspect.Mirror
		wanted[name] = true
		m := n.mirrors[name]
		if m == nil {
			m = &mirror{queue: make(chan piece, mirrorQueue)}
			m.network, m.address, _ = mirrorAddress(name) // checked with the plan
			ctx, stop := context.WithCancel(p.context())
			m.stop = stop
			n.mirrors[name] = m
			p.running.Go(func() { m.run(ctx) })
		}
		s.mirror = m
	}
	for name, m := range n.mirrors {
		if !wanted[name] {
			m.stop()
			delete(n.mirrors, name)
		}
	}
}
