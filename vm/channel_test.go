package vm

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"hauberk.dev/api/guestproto"
)

// fakeGuest is the other end of a channel: what it sends is the test's.
type fakeGuest struct {
	t    testing.TB
	conn net.Conn
}

func newFakeGuest(t testing.TB, onRecord func([]byte)) (*Channel, *fakeGuest) {
	here, there := net.Pipe()
	c := NewChannel(here)
	c.Events(onRecord)
	t.Cleanup(func() {
		there.Close()
		c.Close()
	})
	return c, &fakeGuest{t, there}
}

// next reads a frame of the host.
func (g *fakeGuest) next() (guestproto.Header, []byte) {
	var header [guestproto.HeaderSize]byte
	if _, err := io.ReadFull(g.conn, header[:]); err != nil {
		return guestproto.Header{}, nil
	}
	h, err := guestproto.ParseHeader(header[:])
	if err != nil {
		g.t.Error(err)
	}
	b := make([]byte, h.Payload())
	if _, err := io.ReadFull(g.conn, b); err != nil {
		return guestproto.Header{}, nil
	}
	return h, b
}

func frame(id uint32, v guestproto.Verb, payload []byte) []byte {
	b := append(guestproto.Begin(nil, id, v), payload...)
	guestproto.End(b, 0)
	return b
}

func (g *fakeGuest) say(id uint32, v guestproto.Verb, payload []byte) {
	g.conn.Write(frame(id, v, payload)) // fails once the host has hung up
}

// greet answers the hello, with leftover before it, and takes the host's first
// credit if it gives one.
func (g *fakeGuest) greet(leftover []byte, records bool) {
	h, b := g.next()
	m, err := guestproto.ParseHelloRequest(b)
	if err != nil || h.Verb != guestproto.VerbHello {
		g.t.Errorf("the host begins with %v, %v", h, err)
	}
	g.conn.Write(append(leftover, m.Nonce[:]...))
	g.say(h.ID, guestproto.VerbReply, (&guestproto.Hello{Version: guestproto.Version, Release: "6.1"}).Append(nil))
	if records {
		if h, _ := g.next(); h.Verb != guestproto.VerbCredit {
			g.t.Errorf("after the hello the host says %v", h.Verb)
		}
	}
}

// begin answers create or exec with a number and takes the streams' credit.
func (g *fakeGuest) begin(process uint32) {
	h, _ := g.next()
	g.say(h.ID, guestproto.VerbReply, (&guestproto.ProcessID{Process: process}).Append(nil))
	g.next()
	g.next()
}

func output(process uint32, s guestproto.Stream, data []byte) []byte {
	m := guestproto.Output{Process: process, Stream: s}
	return append(m.AppendPrefix(nil), data...)
}

var sh = guestproto.Program{Args: []string{"sh"}}

func TestChannelSkipsLeftovers(t *testing.T) {
	c, g := newFakeGuest(t, nil)
	go g.greet(bytes.Repeat([]byte{1, 2, 0xff}, 5000), false)
	m, err := c.Hello(t.Context())
	if err != nil || m.Release != "6.1" {
		t.Errorf("got %+v, %v", m, err)
	}
}

func TestChannelGivesUpOnLeftovers(t *testing.T) {
	c, g := newFakeGuest(t, nil)
	go func() {
		g.next()
		for {
			if _, err := g.conn.Write(make([]byte, 64<<10)); err != nil {
				return
			}
		}
	}()
	if _, err := c.Hello(t.Context()); err == nil || !strings.Contains(err.Error(), "no session after") {
		t.Errorf("got %v", err)
	}
}

// TestBrokenGuests shows that whatever breaks the protocol closes the channel,
// with an error that names what.
func TestBrokenGuests(t *testing.T) {
	reply := guestproto.VerbReply
	for _, tt := range []struct {
		name   string
		want   string
		breaks func(g *fakeGuest)
	}{
		{"length", "parse frame: length", func(g *fakeGuest) { g.conn.Write([]byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0x80}) }},
		{"reply to nothing", "nothing was asked under number 77", func(g *fakeGuest) { g.say(77, reply, nil) }},
		{"request", "does not say stats", func(g *fakeGuest) { g.say(0, guestproto.VerbStats, nil) }},
		{"unknown verb", "does not say verb 222", func(g *fakeGuest) { g.say(0, 222, nil) }},
		{"event with id", "an event has an id", func(g *fakeGuest) { g.say(3, guestproto.VerbExit, nil) }},
		{"short exit", "parse exit", func(g *fakeGuest) { g.say(0, guestproto.VerbExit, []byte{1}) }},
		{"foreign exit", "process 9 is not ours", func(g *fakeGuest) { g.say(0, guestproto.VerbExit, (&guestproto.Exit{Process: 9}).Append(nil)) }},
		{"foreign output", "process 9 is not ours", func(g *fakeGuest) { g.say(0, guestproto.VerbOutput, output(9, 1, []byte("x"))) }},
		{"exit twice", "ended before", func(g *fakeGuest) {
			g.say(0, guestproto.VerbExit, (&guestproto.Exit{Process: 5}).Append(nil))
			g.say(0, guestproto.VerbExit, (&guestproto.Exit{Process: 5}).Append(nil))
		}},
		{"end twice", "ends a stream twice", func(g *fakeGuest) {
			g.say(0, guestproto.VerbOutput, output(5, 1, nil))
			g.say(0, guestproto.VerbOutput, output(5, 1, nil))
		}},
		{"output after its end", "beyond its credit or its end", func(g *fakeGuest) {
			g.say(0, guestproto.VerbOutput, output(5, 2, nil))
			g.say(0, guestproto.VerbOutput, output(5, 2, []byte("x")))
		}},
		{"output beyond credit", "beyond its credit", func(g *fakeGuest) {
			for range OutputWindow/guestproto.MaxChunk + 1 {
				g.say(0, guestproto.VerbOutput, output(5, 1, make([]byte, guestproto.MaxChunk)))
			}
		}},
		{"records without credit", "beyond their credit", func(g *fakeGuest) {
			g.say(0, guestproto.VerbGuardEvents, guestproto.AppendRecord(nil, []byte("x")))
		}},
		{"cut record", "parse guard events", func(g *fakeGuest) { g.say(0, guestproto.VerbGuardEvents, []byte{9, 0, 1}) }},
		{"no records", "or none", func(g *fakeGuest) { g.say(0, guestproto.VerbGuardEvents, nil) }},
		{"long refusal", "parse error reply", func(g *fakeGuest) {
			go g.answerNext(guestproto.VerbError, []byte{1})
		}},
		{"long ping", "ping reply", func(g *fakeGuest) { go g.answerNext(reply, []byte{1}) }},
		{"ooms", "more than 4096", func(g *fakeGuest) {
			for range maxOOMs + 1 {
				g.say(0, guestproto.VerbOOM, (&guestproto.OOM{Process: 5, Kills: 1}).Append(nil))
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, g := newFakeGuest(t, nil)
			go func() {
				g.greet(nil, false)
				g.begin(5)
				tt.breaks(g)
			}()
			if _, err := c.Hello(t.Context()); err != nil {
				t.Fatal(err)
			}
			p, err := c.Create(t.Context(), guestproto.Create{Program: sh})
			if err != nil {
				t.Fatal(err)
			}
			go c.Ping(t.Context()) // some faults need a question
			select {
			case <-c.Done():
			case <-time.After(time.Minute):
				t.Fatal("the channel is open still")
			}
			if err := c.Err(); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("closed by %v, want %q", err, tt.want)
			}
			if _, err := p.Wait(t.Context()); err == nil && !strings.Contains(tt.name, "exit") {
				t.Error("wait does not say that the channel closed")
			}
			if err := c.Ping(t.Context()); err == nil {
				t.Error("a closed channel pings")
			}
		})
	}
}

// answerNext answers the next request.
func (g *fakeGuest) answerNext(v guestproto.Verb, payload []byte) {
	h, _ := g.next()
	g.say(h.ID, v, payload)
}

// TestBadReplies gives every question a reply that is not one.
func TestBadReplies(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), callDeadline/2)
	defer cancel()
	for name, ask := range map[string]func(c *Channel) error{
		"hello":      func(c *Channel) error { _, err := c.Hello(ctx); return err },
		"mount root": func(c *Channel) error { _, err := c.MountRoot(ctx, guestproto.MountRoot{}); return err },
		"stats":      func(c *Channel) error { _, err := c.Stats(ctx); return err },
		"processes":  func(c *Channel) error { _, err := c.Processes(ctx); return err },
		"create":     func(c *Channel) error { _, err := c.Create(ctx, guestproto.Create{Program: sh}); return err },
		"rescan":     func(c *Channel) error { return c.Rescan(ctx) },
	} {
		t.Run(name, func(t *testing.T) {
			c, g := newFakeGuest(t, nil)
			go func() {
				h, b := g.next()
				if m, err := guestproto.ParseHelloRequest(b); err == nil {
					g.conn.Write(m.Nonce[:])
				} else {
					g.conn.Write(c.nonce[:])
				}
				g.say(h.ID, guestproto.VerbReply, []byte{1, 2, 3})
			}()
			if err := ask(c); err == nil || errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("three bytes are a reply, or none: %v", err)
			}
			<-c.Done()
			if c.Err() == nil {
				t.Error("the channel gives no reason")
			}
		})
	}
}

func TestRefusal(t *testing.T) {
	c, g := newFakeGuest(t, nil)
	go func() {
		g.greet(nil, false)
		g.answerNext(guestproto.VerbError, (&guestproto.Refusal{Errno: uint32(syscall.ENODEV), Text: "no\x1b[2J"}).Append(nil))
		g.answerNext(guestproto.VerbReply, nil)
	}()
	if _, err := c.Hello(t.Context()); err != nil {
		t.Fatal(err)
	}
	err := c.Rescan(t.Context())
	var refused *RefusedError
	if !errors.As(err, &refused) || !errors.Is(err, syscall.ENODEV) || strings.Contains(err.Error(), "\x1b") {
		t.Errorf("got %v", err)
	}
	if err := c.Ping(t.Context()); err != nil {
		t.Errorf("after a refusal: %v", err)
	}
}

// TestSlowConsumer leaves one process unread while another and a question get
// their answers.
func TestSlowConsumer(t *testing.T) {
	c, g := newFakeGuest(t, nil)
	const full = OutputWindow
	go func() {
		g.greet(nil, false)
		g.begin(1)
		g.begin(2)
		for range full / guestproto.MaxChunk {
			g.say(0, guestproto.VerbOutput, output(1, 1, make([]byte, guestproto.MaxChunk)))
		}
		g.say(0, guestproto.VerbOutput, output(2, 1, []byte("two")))
		g.say(0, guestproto.VerbOutput, output(2, 1, nil))
		g.answerNext(guestproto.VerbReply, nil)
		h, b := g.next()
		m, err := guestproto.ParseCredit(b)
		if h.Verb != guestproto.VerbCredit || err != nil || m.Process != 1 || m.Bytes < full/2 {
			t.Errorf("after reading the host says %v %+v, %v", h.Verb, m, err)
		}
		g.say(0, guestproto.VerbOutput, output(1, 1, make([]byte, full/4)))
		g.say(0, guestproto.VerbOutput, output(1, 1, nil))
		g.say(0, guestproto.VerbExit, (&guestproto.Exit{Process: 1, Code: 137, Signal: 9}).Append(nil))
		for {
			if h, _ := g.next(); h.Verb == 0 {
				return
			}
		}
	}()
	if _, err := c.Hello(t.Context()); err != nil {
		t.Fatal(err)
	}
	slow, err := c.Create(t.Context(), guestproto.Create{Program: sh})
	if err != nil {
		t.Fatal(err)
	}
	quick, err := c.Exec(t.Context(), slow, sh)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(quick.Stdout()); string(b) != "two" || err != nil {
		t.Errorf("got %q, %v", b, err)
	}
	if err := c.Ping(t.Context()); err != nil {
		t.Error(err)
	}
	if b, err := io.ReadAll(slow.Stdout()); len(b) != full+full/4 || err != nil {
		t.Errorf("got %d bytes, %v", len(b), err)
	}
	if s, err := slow.Wait(t.Context()); err != nil || s != (ExitStatus{137, syscall.SIGKILL}) {
		t.Errorf("got %+v, %v", s, err)
	}
}

// TestRecords shows that records come in order, that a callback that stops
// stops the guest's credit, and nothing else.
func TestRecords(t *testing.T) {
	hold, got := make(chan struct{}), make(chan string, 10)
	c, g := newFakeGuest(t, func(record []byte) { <-hold; got <- string(record) })
	credited := make(chan struct{})
	go func() {
		defer close(credited)
		g.greet(nil, true)
		for _, r := range []string{"a", "", "ccc"} {
			g.say(0, guestproto.VerbGuardEvents, guestproto.AppendRecord(guestproto.AppendRecord(nil, []byte(r)), []byte("-")))
		}
		g.answerNext(guestproto.VerbReply, nil)
		const sent = 6*guestproto.RecordPrefix + len("a-"+"-"+"ccc-")
		for credit := 0; credit < sent; {
			h, b := g.next()
			m, err := guestproto.ParseCredit(b)
			if h.Verb != guestproto.VerbCredit || err != nil || m.Stream != guestproto.StreamGuard {
				t.Errorf("the host says %v %+v, %v", h.Verb, m, err)
				return
			}
			credit += int(m.Bytes)
		}
	}()
	if _, err := c.Hello(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.Ping(t.Context()); err != nil {
		t.Error(err)
	}
	close(hold)
	var all []string
	for range 6 {
		all = append(all, <-got)
	}
	if s := strings.Join(all, ","); s != "a,-,,-,ccc,-" {
		t.Errorf("got %q", s)
	}
	<-credited
}

// TestDeafGuest asks a guest that reads nothing: calls end with their context,
// and Close with everything.
func TestDeafGuest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		here, there := net.Pipe()
		defer there.Close()
		c := NewChannel(here)
		begun := time.Now()
		var all sync.WaitGroup
		for range maxCalls {
			all.Go(func() {
				if err := c.Ping(t.Context()); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("got %v", err)
				}
			})
		}
		all.Wait()
		if d := time.Since(begun); d != callDeadline {
			t.Errorf("calls without a deadline took %v", d)
		}
		c.Close()
		if err := c.Ping(t.Context()); !errors.Is(err, ErrClosed) {
			t.Errorf("after close: %v", err)
		}
	})
}

// TestTooManyCalls shows that questions which a guest never answers run out.
func TestTooManyCalls(t *testing.T) {
	c, g := newFakeGuest(t, nil)
	go func() {
		g.greet(nil, false)
		io.Copy(io.Discard, g.conn)
	}()
	if _, err := c.Hello(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range maxCalls * 3 {
		if err := c.Ping(ctx); err == nil {
			t.Fatal("a ping that nobody answered")
		}
	}
	c.mu.Lock()
	n := len(c.calls)
	c.mu.Unlock()
	if n > maxCalls {
		t.Errorf("%d questions are kept", n)
	}
}

func TestUnsayable(t *testing.T) {
	c, g := newFakeGuest(t, nil)
	go g.greet(nil, false)
	if _, err := c.Hello(t.Context()); err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("x", 1<<16)
	for name, m := range map[string]guestproto.Create{
		"no program": {},
		"arguments":  {Program: guestproto.Program{Args: make([]string, guestproto.MaxList+1)}},
		"directory":  {Program: guestproto.Program{Args: []string{"sh"}, Cwd: long}},
		"file":       {Files: []guestproto.File{{Path: long}}, Program: sh},
		"frame":      {Files: []guestproto.File{{Path: "/f", Data: make([]byte, guestproto.MaxFrame)}}, Program: sh},
	} {
		if _, err := c.Create(t.Context(), m); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// FuzzReply lets a guest say whatever it wants after the greeting. The channel
// must end, and keep no more than its windows.
func FuzzReply(f *testing.F) {
	exit := frame(0, guestproto.VerbExit, (&guestproto.Exit{Process: 5, Code: 1}).Append(nil))
	f.Add(exit)
	f.Add(append(exit, exit...))
	f.Add(frame(0, guestproto.VerbOutput, output(5, 1, []byte("text"))))
	f.Add(frame(0, guestproto.VerbOutput, output(5, 2, nil)))
	f.Add(frame(0, guestproto.VerbGuardEvents, guestproto.AppendRecord(nil, []byte("record"))))
	f.Add(frame(0, guestproto.VerbOOM, (&guestproto.OOM{Process: 5, Kills: 1}).Append(nil)))
	f.Add(frame(3, guestproto.VerbReply, (&guestproto.Stats{}).Append(nil)))
	f.Add(frame(3, guestproto.VerbError, (&guestproto.Refusal{Errno: 1, Text: "no"}).Append(nil)))
	f.Add(frame(3, guestproto.VerbReply, guestproto.AppendProcesses(nil, make([]guestproto.ProcessInfo, 2))))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0x80})
	f.Fuzz(func(t *testing.T, said []byte) {
		here, there := net.Pipe()
		c := NewChannel(here)
		c.Events(func([]byte) {})
		g := &fakeGuest{t, there}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		go func() {
			g.greet(nil, true)
			g.begin(5)
			g.next() // the question below: its number is 3
			go io.Copy(io.Discard, there)
			there.Write(said)
			there.Close()
		}()
		if _, err := c.Hello(ctx); err != nil {
			t.Fatal(err)
		}
		p, err := c.Create(ctx, guestproto.Create{Program: sh})
		if err != nil {
			t.Fatal(err)
		}
		_, _ = c.Stats(ctx)
		<-c.Done()
		if c.Err() == nil {
			t.Error("the channel gives no reason")
		}
		_ = c.Close()
		for _, s := range []*stream{&p.stdout, &p.stderr} {
			if len(s.buf) > OutputWindow {
				t.Errorf("a stream keeps %d bytes", len(s.buf))
			}
		}
		if len(c.pending) > RecordWindow {
			t.Errorf("%d bytes of records are kept", len(c.pending))
		}
		if _, err := p.Wait(ctx); errors.Is(err, context.DeadlineExceeded) {
			t.Error("wait outlives the channel")
		}
	})
}
