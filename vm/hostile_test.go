package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"hauberk.dev/api/guestproto"
)

// greeted is a channel whose guest has answered the hello.
func greeted(t testing.TB, onRecord func([]byte)) (*Channel, *fakeGuest) {
	t.Helper()
	c, g := newFakeGuest(t, onRecord)
	done := make(chan struct{})
	go func() { defer close(done); g.greet(nil, onRecord != nil) }()
	if _, err := c.Hello(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-done
	return c, g
}

// TestHalfFrame: a guest that stops in the middle of a frame costs who asks
// their patience, and Close nothing.
func TestHalfFrame(t *testing.T) {
	whole := frame(1, guestproto.VerbReply, make([]byte, 100))
	for _, n := range []int{1, guestproto.HeaderSize - 1, guestproto.HeaderSize, guestproto.HeaderSize + 1, len(whole) - 1} {
		c, g := greeted(t, nil)
		go func() { g.next(); g.conn.Write(whole[:n]) }()
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		if err := c.Ping(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("after %d bytes: %v", n, err)
		}
		cancel()
		began := time.Now()
		c.Close()
		if took := time.Since(began); took > 20*time.Second {
			t.Errorf("after %d bytes Close takes %v", n, took)
		}
	}
}

// TestWrongReplies answers under numbers that nobody asked for, or twice, or a
// question with the answer to another.
func TestWrongReplies(t *testing.T) {
	for name, tt := range map[string]struct {
		want string
		say  func(g *fakeGuest, id uint32)
	}{
		"another number": {"nothing was asked under number", func(g *fakeGuest, id uint32) { g.say(id+1, guestproto.VerbReply, nil) }},
		"number zero":    {"nothing was asked under number 0", func(g *fakeGuest, _ uint32) { g.say(0, guestproto.VerbReply, nil) }},
		"twice": {"nothing was asked under number", func(g *fakeGuest, id uint32) {
			g.say(id, guestproto.VerbReply, nil)
			g.say(id, guestproto.VerbReply, nil)
		}},
		"reply and refusal": {"nothing was asked under number", func(g *fakeGuest, id uint32) {
			g.say(id, guestproto.VerbReply, nil)
			g.say(id, guestproto.VerbError, (&guestproto.Refusal{Errno: 5, Text: "no"}).Append(nil))
		}},
		"the answer to another": {"ping reply", func(g *fakeGuest, id uint32) { g.say(id, guestproto.VerbReply, (&guestproto.Stats{}).Append(nil)) }},
	} {
		t.Run(name, func(t *testing.T) {
			c, g := greeted(t, nil)
			go func() { h, _ := g.next(); tt.say(g, h.ID) }()
			c.Ping(t.Context())
			select {
			case <-c.Done():
			case <-time.After(time.Minute):
				t.Fatal("the channel is open still")
			}
			if err := c.Err(); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("closed by %v, want %q", err, tt.want)
			}
		})
	}
}

// TestStubbornCopy: a guest that neither goes on with a copy nor ends it when it
// is told to keeps nobody.
func TestStubbornCopy(t *testing.T) {
	c, g := greeted(t, nil)
	go func() {
		g.begin(5)
		for {
			h, _ := g.next()
			switch h.Verb {
			case 0:
				return
			case guestproto.VerbCopy:
				g.say(h.ID, guestproto.VerbReply, (&guestproto.ProcessID{Process: 6}).Append(nil))
				g.next() // credit for both streams
				g.next()
				g.say(0, guestproto.VerbOutput, output(6, 1, []byte("half a head")))
			}
		}
	}()
	p, err := c.Create(t.Context(), guestproto.Create{Program: sh})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	began := time.Now()
	if err := p.CopyOut(ctx, "/x", io.Discard); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("it took %v", took)
	}
}

// TestManyEnds lets a guest end more processes than it may have while nothing
// it is asked gets an answer: neither its frames nor Close may wait for that.
func TestManyEnds(t *testing.T) {
	c, g := greeted(t, nil)
	refuse := (&guestproto.Refusal{Errno: 5, Text: "no"}).Append(nil)
	go func() {
		for {
			h, b := g.next()
			switch h.Verb {
			case 0:
				return
			case guestproto.VerbAttach:
				m, _ := guestproto.ParseProcessID(h.Verb, b)
				g.say(0, guestproto.VerbExit, (&guestproto.Exit{Process: m.Process}).Append(nil))
				g.say(0, guestproto.VerbOutput, output(m.Process, 1, nil))
				g.say(0, guestproto.VerbOutput, output(m.Process, 2, nil))
				g.say(h.ID, guestproto.VerbError, refuse)
			}
		}
	}()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for i := range uint32(4 * guestproto.MaxProcesses) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			_, _ = c.Attach(ctx, guestproto.ProcessInfo{Process: i + 10, Container: 1})
			cancel()
		}
		c.Close()
	}()
	select {
	case <-ended:
	case <-time.After(time.Minute):
		b := make([]byte, 1<<20)
		t.Fatalf("the channel does not close:\n%s", b[:runtime.Stack(b, true)])
	}
}

// TestFloodsCostNothing lets many guests send as much as they can, each in its
// way, and looks at what the host's heap is afterwards and in between.
func TestFloodsCostNothing(t *testing.T) {
	const guests, each = 8, 24 << 20
	exit := frame(0, guestproto.VerbExit, (&guestproto.Exit{Process: 5}).Append(nil))
	text := frame(0, guestproto.VerbOutput, output(5, 1, make([]byte, guestproto.MaxChunk)))
	record := frame(0, guestproto.VerbGuardEvents, guestproto.AppendRecord(nil, make([]byte, 4000)))
	long := frame(0, guestproto.VerbReply, make([]byte, guestproto.MaxPayload))
	for name, flood := range map[string][]byte{
		"leftovers":    bytes.Repeat([]byte("boot message without end\n"), 1<<12),
		"exits":        bytes.Repeat(exit, 1<<10),
		"output":       bytes.Repeat(text, 8),
		"records":      bytes.Repeat(record, 16),
		"long replies": long,
		"headers":      bytes.Repeat([]byte{0xff, 0xff, 3, 0, 1, 0, 0, 0, 0x80}, 1000),
	} {
		t.Run(name, func(t *testing.T) {
			var before, now runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			var wg sync.WaitGroup
			for range guests {
				wg.Go(func() {
					here, there := net.Pipe()
					defer there.Close()
					c := NewChannel(here)
					defer c.Close()
					c.Events(func([]byte) { time.Sleep(time.Millisecond) }) // who reads is slow
					g := &fakeGuest{t, there}
					go func() {
						if name != "leftovers" {
							g.greet(nil, true)
							g.begin(5)
						}
						go io.Copy(io.Discard, there)
						for sent := 0; sent < each; sent += len(flood) {
							if _, err := there.Write(flood); err != nil {
								return
							}
						}
						there.Close()
					}()
					ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
					defer cancel()
					if _, err := c.Hello(ctx); err == nil {
						_, _ = c.Create(ctx, guestproto.Create{Program: sh}) // its output is not read
					}
					select {
					case <-c.Done():
					case <-ctx.Done():
						t.Error("a guest that floods is heard on")
					}
				})
			}
			wg.Wait()
			runtime.ReadMemStats(&now)
			if grown := int64(now.HeapSys) - int64(before.HeapSys); grown > 64<<20 {
				t.Errorf("the heap has grown by %d KiB", grown>>10)
			}
			runtime.GC()
			runtime.ReadMemStats(&now)
			if kept := int64(now.HeapAlloc) - int64(before.HeapAlloc); kept > 2<<20 {
				t.Errorf("%d KiB are kept", kept>>10)
			}
		})
	}
}

// FuzzConversation plays a guest by script: for each question of the host the
// next bytes say what it does. Whatever that is, every call ends, the channel
// closes, and nothing beyond the windows is kept.
func FuzzConversation(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12})
	f.Add([]byte("\x06\x00\x05hello\x07\x00\x08\x03abc\x09"))
	f.Add(bytes.Repeat([]byte{4, 16, 1}, 40))
	f.Fuzz(func(t *testing.T, script []byte) {
		here, there := net.Pipe()
		c := NewChannel(here)
		c.Events(func([]byte) {})
		g := &fakeGuest{t, there}
		played := make(chan struct{})
		go func() {
			defer close(played)
			defer there.Close()
			g.greet(nil, true)
			g.play(script)
		}()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := c.Hello(ctx); err != nil {
			t.Fatal(err)
		}
		p := ask(ctx, c)
		_ = c.Close() // the guest may wait for more questions
		<-played
		if c.Err() == nil {
			t.Error("the channel gives no reason")
		}
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			t.Error("it took as long as one waits for a guest")
		}
		if p != nil && (len(p.stdout.buf) > OutputWindow || len(p.stderr.buf) > OutputWindow || len(c.pending) > RecordWindow) {
			t.Errorf("kept: %d and %d bytes of output, %d of records", len(p.stdout.buf), len(p.stderr.buf), len(c.pending))
		}
	})
}

// ask asks everything there is to ask.
func ask(ctx context.Context, c *Channel) *Process {
	p, err := c.Create(ctx, guestproto.Create{Program: sh})
	if err != nil {
		p = nil
	}
	for _, f := range []func() error{
		func() error { return c.Ping(ctx) },
		func() error { _, err := c.Stats(ctx); return err },
		func() error { _, err := c.Interfaces(ctx); return err },
		func() error { _, err := c.Routes(ctx); return err },
		func() error { _, err := c.Processes(ctx); return err },
		func() error { _, err := c.MountRoot(ctx, guestproto.MountRoot{}); return err },
		func() error { _, err := c.GuardStatus(ctx); return err },
	} {
		_ = f()
	}
	if p == nil {
		return nil
	}
	_ = p.Start(ctx)
	_, _ = p.Top(ctx)
	_, _ = p.Logs(ctx)
	ctx, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	_ = p.CopyOut(ctx, "/x", io.Discard)
	_ = p.CopyIn(ctx, "/x", strings.NewReader(""))
	return p
}

// play does what a script says, one step for each frame of the host, and hangs
// up when the script or the host ends.
func (g *fakeGuest) play(script []byte) {
	take := func() byte {
		if len(script) == 0 {
			return 0
		}
		b := script[0]
		script = script[1:]
		return b
	}
	id := func(n uint32) []byte { return (&guestproto.ProcessID{Process: n}).Append(nil) }
	lost := false // the host may be in the middle of a frame: it will say nothing
	for len(script) > 0 {
		h, _ := g.next()
		switch h.Verb {
		case 0:
			return
		case guestproto.VerbCredit:
			continue
		}
		for more := true; more && len(script) > 0; {
			more = lost
			switch n := take(); n % 12 {
			case 0:
				g.say(h.ID, guestproto.VerbReply, nil)
			case 1:
				g.say(h.ID, guestproto.VerbReply, id(uint32(n/12)))
			case 2:
				g.say(h.ID+uint32(take()), guestproto.VerbReply, nil)
			case 3:
				g.say(h.ID, guestproto.VerbError, (&guestproto.Refusal{Errno: uint32(take()), Text: fmt.Sprint(n)}).Append(nil))
			case 4:
				g.say(0, guestproto.VerbOutput, output(uint32(take()), guestproto.Stream(1+n/12%2), make([]byte, int(take())<<6)))
				more = true
			case 5:
				g.say(0, guestproto.VerbExit, (&guestproto.Exit{Process: uint32(take()), Code: n}).Append(nil))
				more = true
			case 6:
				n := min(int(take()), len(script))
				g.say(h.ID, guestproto.VerbReply, script[:n])
				script = script[n:]
			case 7:
				g.say(0, guestproto.VerbGuardEvents, guestproto.AppendRecord(nil, make([]byte, int(take())<<4)))
				more = true
			case 8:
				n := min(int(take()), len(script))
				g.conn.Write(script[:n])
				script = script[n:]
				lost, more = true, true
			case 9:
				g.say(0, guestproto.VerbOOM, (&guestproto.OOM{Process: uint32(take()), Kills: 1}).Append(nil))
				more = true
			case 10:
				g.say(h.ID, guestproto.VerbReply, bytes.Repeat([]byte{n}, int(take())))
			case 11: // no answer
				return
			}
		}
	}
}
