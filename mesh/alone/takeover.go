package alone

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"

	"hauberk.dev/internal/unixsock"
	"hauberk.dev/mesh/handover"
)

// taken is what another process has given, until it is known whether it is ours.
type taken struct {
	state     *aloneState
	line      *line
	door      *net.UnixListener
	admin     *net.UnixListener
	adminPath string
	limits    []limitState
	sessions  []takenSession
	sockets   map[string]*os.File // of listeners, by key
}

// TakeOver is Open for a process that takes the place of the one which gives it at
// path: the sockets that c names and the other has are taken, those it has not are
// opened. Afterwards Run and GiveOver are to be called, this with door. If it fails
// the other goes on as if nobody had asked.
func TakeOver(ctx context.Context, path string, c *Config, log *slog.Logger) (p *Proxy, door *net.UnixListener, err error) {
	if p, err = prepare(c, log); err != nil {
		return nil, nil, err
	}
	if err := p.identities.await(ctx, p.world.Load(), awaitTime); err != nil {
		p.world.Load().close(nil)
		return nil, nil, fmt.Errorf("take over: %w", err)
	}
	var t *taken
	err = handover.Take(ctx, path, func(load *handover.Load) (func(), error) {
		if t, err = p.unpack(load); err == nil {
			err = p.adopt(ctx, t.state.Config, c.dir)
		}
		if err == nil {
			err = p.settleIn(t)
		}
		return func() { p.begin(t) }, err
	})
	if err != nil {
		p.Close()
		if t != nil {
			t.close()
		}
		p.world.Load().close(nil)
		return nil, nil, err
	}
	return p, t.door, nil
}

func (t *taken) close() {
	if t.line != nil {
		t.line.conn.Close()
	}
	for _, ln := range []*net.UnixListener{t.door, t.admin} {
		if ln != nil {
			ln.Close()
		}
	}
}

// unpack reads what another process gives. It changes nothing.
func (p *Proxy) unpack(load *handover.Load) (t *taken, err error) {
	t = &taken{sockets: map[string]*os.File{}}
	for n, i := range load.Items {
		if (n == 0) != (i.Kind == itemAlone) {
			return t, fmt.Errorf("what is there is no proxy that serves alone: item %d is %v", n, i)
		}
		if err := t.item(&i); err != nil {
			return t, fmt.Errorf("item %d, %v: %w", n, i, err)
		}
	}
	if t.state == nil || t.line == nil || t.door == nil {
		return t, errors.New("what is there is no proxy that serves alone, or says not all")
	}
	return t, nil
}

func (t *taken) item(i *handover.Item) (err error) {
	files := 1
	switch i.Kind {
	case itemAlone:
		t.state = &aloneState{}
		if err = strictly(i.Body, t.state); err == nil && len(i.Files) == files {
			t.line, err = lineOf(i.Files[0])
		}
	case itemDoor:
		if len(i.Files) == files {
			t.door, err = unixListener(i.Files[0])
		}
	case itemAdmin:
		var a adminState
		if err = strictly(i.Body, &a); err == nil && len(i.Files) == files {
			t.adminPath = a.Path
			t.admin, err = unixListener(i.Files[0])
		}
	case itemListener:
		var l listenerState
		if err = strictly(i.Body, &l); err == nil && len(i.Files) == files {
			t.sockets[l.Key] = i.Files[0]
		}
	case itemLimit:
		var l limitState
		err, files = strictly(i.Body, &l), 0
		t.limits = append(t.limits, l)
	case itemSession:
		var s datagramState
		if err = strictly(i.Body, &s); err == nil {
			err = s.check()
		}
		if err == nil && len(i.Files) == files {
			t.sessions = append(t.sessions, takenSession{s, i.Files[0]})
		}
	default:
		return errors.New("nothing of that kind is known here")
	}
	if err == nil && len(i.Files) != files {
		err = fmt.Errorf("%d files; want %d", len(i.Files), files)
	}
	return err
}

func strictly(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("trailing data")
	}
	return nil
}

func unixListener(f *os.File) (*net.UnixListener, error) {
	defer f.Close()
	ln, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	u, ok := ln.(*net.UnixListener)
	if !ok {
		ln.Close()
		return nil, errors.New("no Unix socket")
	}
	return u, nil
}

// adopt puts a configuration in place of the file's that the process before was told
// over the admin socket: whoever told it does not know of another process.
func (p *Proxy) adopt(ctx context.Context, text []byte, dir string) error {
	if len(text) == 0 {
		return nil
	}
	if len(text) > maxConfig {
		return fmt.Errorf("a configuration of %d bytes; at most %d", len(text), maxConfig)
	}
	c, err := Parse("config", dir, text)
	if err != nil {
		return fmt.Errorf("the configuration that was put over the admin socket: %w", err)
	}
	before := p.world.Load()
	if c.Identities != before.config.Identities {
		return errors.New("the configuration that was put over the admin socket has other identities than the file")
	}
	c.told = text
	w, err := newWorld(c, nil, p.stats, p.identities)
	if err != nil {
		return err
	}
	if err := p.identities.await(ctx, w, awaitToldTime); err != nil {
		w.close(nil)
		return fmt.Errorf("the configuration that was put over the admin socket: %w", err)
	}
	p.world.Store(w)
	p.cache.Resize(int64(c.Cache.Memory))
	before.close(nil)
	return nil
}

// settleIn has everything ready to serve, and serves nothing: the other process still
// may go on.
func (p *Proxy) settleIn(t *taken) error {
	w := p.world.Load()
	added, err := p.listen(w, t.sockets)
	if err != nil {
		return err
	}
	for _, l := range added {
		p.listeners[l.address] = l
	}
	path := w.config.Admin
	switch {
	case path != "" && t.admin != nil && path == t.adminPath:
		p.admin, t.admin = t.admin, nil
	case path != "":
		admin, err := unixsock.ListenStream(path)
		if err != nil {
			return err
		}
		p.admin = admin
	}
	return w.commit()
}

// begin makes ours what is ours from now on.
func (p *Proxy) begin(t *taken) {
	t.door.SetUnlinkOnClose(true)
	if p.admin != nil {
		p.admin.SetUnlinkOnClose(true)
	}
	if t.admin != nil {
		t.admin.Close()
		os.Remove(t.adminPath)
	}
	for _, f := range t.sockets {
		f.Close()
	}
	for i := range t.sessions {
		p.resumeSession(&t.sessions[i])
	}
	p.stats.generation.Store(t.state.Generation + 1)
	p.add(t.state.Tally)
	limiters := p.world.Load().limiters()
	for _, s := range t.limits {
		if l := limiters[s.Key]; l != nil {
			l.resume(s.Buckets)
		}
	}
	p.before = t.line
}

// listenTo takes what the process before hands on, until that has ended or ctx ends.
func (p *Proxy) listenTo(ctx context.Context, l *line) {
	defer l.conn.Close()
	defer context.AfterFunc(ctx, func() { l.conn.Close() })()
	in := unixsock.NewInbox(maxParcel, maxParcelFiles)
	for {
		m, files, err := l.receive(in)
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				p.log.Error("the process before hands on what cannot be read; the rest ends there", "err", err)
			}
			return
		}
		p.add(m.Tally)
		if m.Limit != "" {
			if l := p.world.Load().limiters()[m.Limit]; l != nil {
				l.debit(m.Spent)
			}
		}
		switch {
		case m.Session != nil:
			p.goOn(m.Session, files[0])
		case m.Stream != nil:
			p.goBetween(m.Stream, files[0], files[1])
		case m.Calls != nil:
			p.goCalling(m.Calls, files[0])
		}
		for _, f := range files {
			f.Close()
		}
	}
}
