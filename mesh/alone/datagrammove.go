package alone

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"hauberk.dev/mesh/balance"
	"hauberk.dev/mesh/handover"
)

// datagramState is a session of UDP without its socket.
type datagramState struct {
	Listener string         `json:"listener"` // key
	From     netip.AddrPort `json:"from"`
	To       netip.Addr     `json:"to"` // none: the listener has one address
	Control  []byte         `json:"control,omitempty"`
	Upstream string         `json:"upstream"`
	Endpoint string         `json:"endpoint"` // address
	Asked    uint64         `json:"asked"`
	Answered uint64         `json:"answered"`
	Quiet    time.Duration  `json:"quiet"` // since the last datagram
}

func (s *datagramState) check() error {
	if !s.From.IsValid() || len(s.Control) > maxControl || s.Quiet < 0 {
		return errors.New("a session of UDP that cannot be")
	}
	return nil
}

type takenSession struct {
	datagramState
	file *os.File
}

// freeze has nobody read, neither what clients send nor what is answered to them; the
// kernel keeps it. What was read before is on its way.
func (d *datagrams) freeze() {
	past := time.Unix(1, 0)
	d.frozen.Store(true)
	d.conn.SetReadDeadline(past)
	d.receiving.Wait()
	d.mu.Lock()
	for _, f := range d.sessions {
		f.conn.SetReadDeadline(past)
	}
	d.mu.Unlock()
	d.readers.Wait()
}

// holdSessions adds the sessions of a listener that is frozen, the one that was quiet
// for the longest first. One whose descriptor cannot be had stays behind.
func (p *Proxy) holdSessions(l *listener, load *handover.Load) {
	d := l.udp
	d.mu.Lock()
	defer d.mu.Unlock()
	for at := d.order.Back(); at != nil; at = at.Prev() {
		f := at.Value.(*datagramFlow)
		body, err := json.Marshal(datagramState{Listener: l.address, From: f.key.from, To: f.key.to, Control: f.control[:f.length], Upstream: f.up.name,
			Endpoint: f.at.e.address, Asked: f.asked, Answered: f.answered, Quiet: time.Since(d.began) - time.Duration(f.last.Load())})
		var file *os.File
		if err == nil {
			file, err = f.conn.File()
		}
		if err != nil {
			p.log.Warn("a session of UDP stays behind", "client", f.key.from, "err", err)
			continue
		}
		load.Items = append(load.Items, handover.Item{Kind: itemSession, Body: body, Files: []*os.File{file}})
	}
}

// resumeSession goes on with a session of the process before, unless the configuration
// has no place for it: then it ends, as a reload would have it.
func (p *Proxy) resumeSession(s *takenSession) {
	defer s.file.Close()
	p.mu.Lock()
	l := p.listeners[s.Listener]
	p.mu.Unlock()
	if l == nil || l.udp == nil {
		return
	}
	if err := l.udp.resume(s); err != nil {
		p.log.Info("a session of UDP ends with the process before", "client", s.From, "err", err)
	}
}

func (d *datagrams) resume(s *takenSession) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	site := d.l.site.Load()
	if site.tcp.name != s.Upstream || len(d.sessions) >= site.l.Sessions {
		return errNoServer
	}
	at, srv := site.world.named(s.Upstream, s.Endpoint)
	if at.e == nil {
		return errNoServer
	}
	c, err := net.FileConn(s.file)
	if err == nil {
		if u, ok := c.(*net.UDPConn); ok {
			f := &datagramFlow{key: flowKey{from: s.From, to: s.To}, up: srv.up, at: at, conn: u, blocks: &d.blocks, asked: s.Asked, answered: s.Answered}
			if f.raw, err = u.SyscallConn(); err == nil && d.sessions[f.key] == nil {
				f.up.open.Add(1)
				f.at.e.active.Add(1)
				d.open.Add(1)
				f.length = copy(f.control[:], s.Control)
				f.look = f.receive
				f.place = d.order.PushFront(f)
				f.last.Store(int64(time.Since(d.began) - s.Quiet))
				d.sessions[f.key] = f
				return nil
			}
		}
		c.Close()
	}
	at.Done(srv.up.clock.Now(), balance.Cancelled)
	return errors.Join(err, fmt.Errorf("session of %s: %w", s.From, errNoServer))
}
