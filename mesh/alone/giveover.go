package alone

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"hauberk.dev/mesh/handover"
)

// The kinds of what is handed over. The first is always there, and comes first.
const (
	itemAlone    = "alone"    // with this end of the line for what comes later
	itemDoor     = "door"     // where the next process asks
	itemAdmin    = "admin"    // socket
	itemListener = "listener" // with its socket
	itemLimit    = "limit"    // the buckets of one rate
	itemSession  = "session"  // of UDP, with its socket
)

// aloneState is what is no socket.
type aloneState struct {
	Generation uint64  `json:"generation"`
	Tally      tallies `json:"tally"`
	Config     []byte  `json:"config,omitempty"` // that came over the admin socket: it stands in for the file
}

type adminState struct {
	Path string `json:"path"`
}

type listenerState struct {
	Key string `json:"key"`
}

type limitState struct {
	Key     string   `json:"key"`
	Buckets []bucket `json:"buckets"`
}

// reportPeriod is how often a process that has been replaced tells what it counts.
const reportPeriod = 100 * time.Millisecond

// GiveOver gives this proxy's place to each process that connects to ln and asks
// for it, until one has it: then Run lets what is under way end, and ends itself.
// One that fails before that changes nothing. It blocks until ctx ends or the place
// is given.
//
// Nothing stops meanwhile but the datagrams, which wait in the kernel: the sockets
// that listen are shared until the other says that it goes on.
func (p *Proxy) GiveOver(ctx context.Context, ln *net.UnixListener) error {
	p.mu.Lock()
	p.door = ln
	p.mu.Unlock()
	defer ln.Close()
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	for {
		c, err := ln.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			p.log.Warn("wait for another process", "err", err)
			time.Sleep(acceptPause)
			continue
		}
		began := time.Now()
		if err := handover.Give(ctx, c, p.hold, p.back, p.letGo); err != nil {
			p.log.Warn("not handed over; going on", "err", err, "took", time.Since(began))
			continue
		}
		p.log.Info("handed over; requests under way end here", "took", time.Since(began), "open", p.open.Load())
		return nil
	}
}

// hold returns what another process needs to go on. The configuration stays as it
// is until back or letGo.
func (p *Proxy) hold(version int) (*handover.Load, error) {
	p.reloading.Lock()
	load := &handover.Load{Version: version}
	if err := p.collect(load); err != nil {
		return nil, errors.Join(fmt.Errorf("hold sockets: %w", err), p.back(load))
	}
	return load, nil
}

func (p *Proxy) collect(load *handover.Load) error {
	if p.stopping.Load() || p.leaving.Load() {
		return errors.New("this process is ending")
	}
	p.mu.Lock()
	door, running := p.door, p.ctx != nil
	listeners := make([]*listener, 0, len(p.listeners))
	for _, l := range p.listeners {
		listeners = append(listeners, l)
	}
	p.mu.Unlock()
	if !running {
		return errors.New("this process does not serve yet")
	}
	line, theirs, err := newLine()
	if err != nil {
		return err
	}
	p.line = line
	w := p.world.Load()
	add := func(kind string, v any, files ...*os.File) {
		body, jerr := json.Marshal(v)
		err = errors.Join(err, jerr)
		load.Items = append(load.Items, handover.Item{Kind: kind, Body: body, Files: files})
	}
	share := func(kind string, v any, of interface{ File() (*os.File, error) }) {
		f, ferr := of.File()
		if ferr != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", kind, ferr))
			return
		}
		add(kind, v, f)
	}
	p.told = p.tally()
	add(itemAlone, aloneState{p.stats.generation.Load(), p.told, w.config.told}, theirs)
	share(itemDoor, struct{}{}, door)
	if p.admin != nil {
		share(itemAdmin, adminState{w.config.Admin}, p.admin)
	}
	for key, l := range w.limiters() {
		add(itemLimit, limitState{key, l.share()})
	}
	for _, l := range listeners {
		share(itemListener, listenerState{l.address}, l.socket())
		if l.udp != nil && err == nil {
			l.udp.freeze()
			p.holdSessions(l, load)
		}
	}
	return err
}

// back goes on with what was held.
func (p *Proxy) back(load *handover.Load) error {
	defer p.reloading.Unlock()
	closeItems(load)
	for _, l := range p.world.Load().limiters() {
		l.spent(false)
	}
	p.eachDatagrams(func(d *datagrams) {
		if d.frozen.CompareAndSwap(true, false) {
			d.conn.SetReadDeadline(time.Time{})
			d.receiving.Add(1)
			p.running.Go(func() { d.serve(p.running.Go) }) // and of the sessions there are
		}
	})
	if p.line != nil {
		p.line.conn.Close()
		p.line = nil
	}
	return nil
}

// letGo leaves the sockets to another process, and has Run end.
func (p *Proxy) letGo(load *handover.Load) {
	defer p.reloading.Unlock()
	closeItems(load)
	p.mu.Lock()
	p.door.SetUnlinkOnClose(false) // they are another's
	if p.admin != nil {
		p.admin.SetUnlinkOnClose(false)
	}
	p.mu.Unlock()
	p.leaving.Store(true)
	close(p.handed)
}

func closeItems(load *handover.Load) {
	for _, i := range load.Items {
		for _, f := range i.Files {
			f.Close()
		}
	}
	load.Items = nil
}

// drain takes no connection any more and waits for those there are, as long as the
// configuration says. Those that can go on in the other process go there.
func (p *Proxy) drain(ctx context.Context) (ended bool) {
	p.Close()
	p.accepting.Wait()                   // for connections that they had and eachClient has not
	p.eachDatagrams((*datagrams).endAll) // nobody here reads it any more
	p.eachClient((*client).part)
	done := make(chan struct{})
	go func() { p.serving.Wait(); close(done) }()
	late := time.NewTimer(time.Duration(p.world.Load().config.Limits.DrainTimeout))
	defer late.Stop()
	tick := time.NewTicker(reportPeriod)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return true
		case <-late.C:
			return false
		case <-ctx.Done():
			return false
		case <-tick.C:
			p.report()
		}
	}
}

// part has a client's connection go on in the process that has taken over, or end
// with what is under way.
func (c *client) part() {
	if s := c.stream.Load(); s != nil {
		s.flow.halt(s.conn, s.server.conn)
		return
	}
	if s := c.session.Load(); s != nil && s.part() {
		return
	}
	if x := c.two.Load(); x != nil {
		x.conn.Drain()
	}
	if x := c.rpc.Load(); x != nil {
		x.part()
	}
}

// report tells the other process what was counted and spent since the last time.
func (p *Proxy) report() {
	now := p.tally()
	more := now.since(p.told)
	p.told = now
	for key, values := range more {
		p.line.send(&parcel{Tally: tallies{key: values}})
	}
	for key, l := range p.world.Load().limiters() {
		for _, some := range l.spent(true) {
			p.line.send(&parcel{Limit: key, Spent: some})
		}
	}
}

// newLine makes the line on which a process that has been replaced gives what it is
// done with to the one in its place.
func newLine() (own *line, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make a line: %w", err)
	}
	ours := os.NewFile(uintptr(fds[0]), "line")
	theirs = os.NewFile(uintptr(fds[1]), "line")
	if own, err = lineOf(ours); err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return own, theirs, nil
}
