package wire_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"hauberk.dev/mesh/wire"
)

// pair is two ends of a TCP connection.
func pair(t *testing.T) (a, b *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	d, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); d.Close() })
	return c.(*net.TCPConn), d.(*net.TCPConn)
}

// moved is the connection as another process gets it: a copy of the descriptor,
// and the state by way of JSON.
func moved(t *testing.T, c *wire.Conn) *wire.Conn {
	t.Helper()
	b, err := json.Marshal(c.State())
	if err != nil {
		t.Fatal(err)
	}
	var s wire.State
	if err := errors.Join(json.Unmarshal(b, &s), s.Check()); err != nil {
		t.Fatal(err)
	}
	f, err := c.TCP().File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	return wire.Resume(n.(*net.TCPConn), s)
}

// A connection that echoes is moved again and again while its peer writes and
// reads at its own pace; each byte comes back once, and then the end.
func TestMovedAtAnyMoment(t *testing.T) {
	near, far := pair(t)
	want := make([]byte, 4<<20)
	random := rand.NewChaCha8([32]byte{1})
	random.Read(want)

	var got []byte
	var peer sync.WaitGroup
	peer.Go(func() {
		for b := want; len(b) > 0; {
			n := min(len(b), 1+rand.IntN(64<<10))
			if _, err := near.Write(b[:n]); err != nil {
				t.Error(err)
				return
			}
			b = b[n:]
		}
		near.CloseWrite()
	})
	peer.Go(func() {
		b := make([]byte, 32<<10)
		for {
			n, err := near.Read(b[:1+rand.IntN(len(b))])
			got = append(got, b[:n]...)
			if err == io.EOF {
				return
			}
			if err != nil {
				t.Errorf("after %d bytes: %v", len(got), err)
				return
			}
			if rand.IntN(64) == 0 {
				time.Sleep(time.Millisecond) // so that the echo meets a full window
			}
		}
	})

	c := wire.New(far)
	far.SetWriteBuffer(8 << 10)
	moves := 0
	for over := false; !over; {
		done := make(chan error, 1)
		go func() { done <- echo(c) }()
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			over = true
		case <-time.After(time.Duration(rand.IntN(3000)) * time.Microsecond):
			c.Freeze()
			if err := <-done; err == nil {
				over = true
			} else if !errors.Is(err, wire.ErrFrozen) {
				t.Fatal(err)
			}
			c = moved(t, c)
			c.Thaw()
			moves++
		}
	}
	peer.Wait()
	c.Close()
	if !bytes.Equal(got, want) {
		t.Fatalf("%d bytes came back of %d, or others", len(got), len(want))
	}
	if moves == 0 {
		t.Fatal("it was never moved")
	}
	t.Logf("moved %d times", moves)
}

// echo works as an engine does: it reads ahead, and gives back what it has not
// used.
func echo(c *wire.Conn) error {
	b := make([]byte, 16<<10)
	for {
		n, err := c.Read(b)
		if use := n / 2; c.Frozen() && use > 0 {
			c.Unread(b[use:n])
			n = use
		}
		if n > 0 {
			if _, werr := c.Write(b[:n]); werr != nil {
				return werr
			}
		}
		switch {
		case err == io.EOF:
			return c.CloseWrite()
		case err != nil:
			return err
		}
	}
}

func TestDeadlinesSurvive(t *testing.T) {
	_, far := pair(t)
	c := wire.New(far)
	c.Freeze()
	c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, wire.ErrFrozen) {
		t.Fatalf("a frozen read returns %v", err)
	}
	c.Thaw()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("a read beyond its deadline returns %v", err)
	}
}

// What a peer's reset leaves unsent is an error of the next write, not silence.
func TestUnsentIsNotLostSilently(t *testing.T) {
	near, far := pair(t)
	c := wire.New(far)
	c.Freeze()
	c.Write(make([]byte, 1<<20))
	near.SetLinger(0)
	near.Close()
	c.Thaw()
	if _, err := c.Write([]byte("x")); err == nil {
		t.Fatal("written to nobody")
	}
}

func TestCheck(t *testing.T) {
	for name, s := range map[string]wire.State{
		"too much":      {Unread: make([]byte, wire.MaxHeld+1)},
		"after the end": {Ended: true, Unsent: []byte("x")},
		"ended twice":   {Ended: true, Ending: true},
	} {
		if s.Check() == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

func TestPlainPathAllocatesNothing(t *testing.T) {
	near, far := pair(t)
	c, b := wire.New(far), make([]byte, 512)
	if n := testing.AllocsPerRun(100, func() {
		near.Write(b)
		io.ReadFull(c, b)
		c.Write(b)
		io.ReadFull(near, b)
	}); n > 0 {
		t.Fatalf("%v allocations", n)
	}
	runtime.KeepAlive(c)
}

// What was kept is sent before the connection closes, whether it is frozen, on
// its way, or neither; but not by who has given its state away.
func TestClosedWithARest(t *testing.T) {
	want := bytes.Repeat([]byte("0123456789"), 1<<20) // more than buffers hold
	for name, end := range map[string]func(*wire.Conn){
		"frozen":     func(c *wire.Conn) { c.Close() },
		"on its way": func(c *wire.Conn) { c.Thaw(); c.Close() },
		"ending":     func(c *wire.Conn) { c.CloseWrite(); c.Close(); c.Freeze() },
	} {
		t.Run(name, func(t *testing.T) {
			near, far := pair(t)
			c := wire.New(far)
			c.Freeze()
			if _, err := c.Write(want); err != nil {
				t.Fatal(err)
			}
			end(c)
			near.SetDeadline(time.Now().Add(time.Minute))
			if got, err := io.ReadAll(near); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes of %d, %v", len(got), len(want), err)
			}
		})
	}
	t.Run("given", func(t *testing.T) {
		near, far := pair(t)
		c := wire.New(far)
		c.Freeze()
		c.Write([]byte("another's"))
		again := moved(t, c)
		again.Close() // built, and not used
		near.SetDeadline(time.Now().Add(time.Minute))
		if got, err := io.ReadAll(near); err != nil || len(got) > 0 {
			t.Errorf("%q, %v", got, err)
		}
	})
}

// What is written at once is what there is room for: nothing waits, nothing is
// kept, and while the connection is frozen or closed it is nothing.
func TestWriteNow(t *testing.T) {
	a, b := pair(t)
	c := wire.New(a)
	defer c.Close()
	p := bytes.Repeat([]byte("now"), 100_000)
	var sent []byte
	for i := 0; ; i++ {
		n := c.WriteNow(p[i%3:])
		sent = append(sent, p[i%3:i%3+n]...)
		if n < len(p)-i%3 {
			break
		}
	}
	if n := c.WriteNow(p); n != 0 {
		sent = append(sent, p[:n]...) // the receiver has made room meanwhile
	}
	c.Freeze()
	if n := c.WriteNow(p); n != 0 || len(c.State().Unsent) != 0 {
		t.Errorf("%d bytes written while frozen, %d kept", n, len(c.State().Unsent))
	}
	c.Thaw()
	go func() {
		if _, err := c.Write([]byte("end")); err != nil {
			t.Error(err)
		}
		c.CloseWrite()
	}()
	got, err := io.ReadAll(b)
	if err != nil || string(got) != string(sent)+"end" {
		t.Errorf("%d of %d bytes, %v", len(got), len(sent)+3, err)
	}
	c.Abort()
	if n := c.WriteNow(p); n != 0 {
		t.Errorf("%d bytes written to nobody", n)
	}
}
