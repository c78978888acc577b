package wire_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"hauberk.dev/mesh/wire"
)

// end is one end of a connection, as the tests use it.
type end interface {
	wire.Socket
	SetWriteBuffer(int) error
}

// kind makes the two ends of a connection.
type kind func(t *testing.T) (a, b end)

// kinds runs a test for each of them.
func kinds(t *testing.T, test func(t *testing.T, pair kind)) {
	t.Run("tcp", func(t *testing.T) { test(t, overTCP) })
	t.Run("unix", func(t *testing.T) { test(t, overUnix) })
}

func overTCP(t *testing.T) (a, b end) {
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
	return c.(end), d.(end)
}

func overUnix(t *testing.T) (a, b end) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]end
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "end")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		ends[i] = c.(end)
	}
	return ends[0], ends[1]
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
	f, err := c.Socket().File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	return wire.Resume(n.(end), s)
}

// A connection that echoes is moved again and again while its peer writes and
// reads at its own pace; each byte comes back once, and then the end.
func TestMovedAtAnyMoment(t *testing.T) { kinds(t, movedAtAnyMoment) }

func movedAtAnyMoment(t *testing.T, pair kind) {
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

func TestDeadlinesSurvive(t *testing.T) { kinds(t, deadlinesSurvive) }

func deadlinesSurvive(t *testing.T, pair kind) {
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
func TestUnsentIsNotLostSilently(t *testing.T) { kinds(t, unsentIsNotLostSilently) }

func unsentIsNotLostSilently(t *testing.T, pair kind) {
	near, far := pair(t)
	c := wire.New(far)
	c.Freeze()
	c.Write(make([]byte, 1<<20))
	if tcp, ok := near.(*net.TCPConn); ok {
		tcp.SetLinger(0)
	}
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

func TestPlainPathAllocatesNothing(t *testing.T) { kinds(t, plainPathAllocatesNothing) }

func plainPathAllocatesNothing(t *testing.T, pair kind) {
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
func TestClosedWithARest(t *testing.T) { kinds(t, closedWithARest) }

func closedWithARest(t *testing.T, pair kind) {
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
func TestWriteNow(t *testing.T) { kinds(t, writeNow) }

func writeNow(t *testing.T, pair kind) {
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

// A severed connection carries nothing more: not what this end has yet to read,
// nor what either end sends from then on.
func TestSever(t *testing.T) { kinds(t, sever) }

func sever(t *testing.T, pair kind) {
	near, far := pair(t)
	c := wire.New(far)
	for _, from := range []end{near, far} {
		if _, err := from.Write(make([]byte, 100<<10)); err != nil {
			t.Fatal(err)
		}
	}
	c.Sever()
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("the cut end reads %d bytes, %v", n, err)
	}
	if n, err := c.Write([]byte("x")); err == nil {
		t.Errorf("the cut end writes %d bytes", n)
	}
	near.SetDeadline(time.Now().Add(time.Minute))
	if n, err := io.Copy(io.Discard, near); n > 100<<10 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the other end reads %d bytes, then %v", n, err)
	}
	if _, err := near.Write([]byte("x")); err == nil {
		t.Error("the other end writes")
	}
	c.Sever() // once more is once
	c.Close()
	c.Sever()
}

// A severed connection wakes who waits at either end of it.
func TestSeverWakes(t *testing.T) { kinds(t, severWakes) }

func severWakes(t *testing.T, pair kind) {
	near, far := pair(t)
	c := wire.New(far)
	var waiting sync.WaitGroup
	for _, r := range []io.Reader{near, c} {
		waiting.Go(func() { io.Copy(io.Discard, r) })
	}
	for _, w := range []io.Writer{near, c} {
		waiting.Go(func() {
			for b := make([]byte, 64<<10); ; {
				if _, err := w.Write(b); err != nil {
					return
				}
			}
		})
	}
	c.Sever()
	waiting.Wait()
}

// Pairs that are frozen in any order, with bytes on their way, are found among each
// other and go on over TCP: each byte once, and what has ended ends.
func TestTwinsExchanged(t *testing.T) {
	type pair struct{ near, far *wire.Conn }
	var pairs []pair
	var all []*wire.Conn
	for i := range 5 {
		a, b := overUnix(t)
		p := pair{wire.New(a), wire.New(b)}
		if _, err := p.near.Write([]byte(fmt.Sprint("sent ", i))); err != nil {
			t.Fatal(err)
		}
		if i == 1 || i == 2 {
			p.near.CloseWrite()
		}
		if i == 2 {
			p.far.CloseWrite()
		}
		p.near.Freeze()
		p.far.Freeze()
		if i == 0 {
			p.near.Write([]byte(", kept"))
		}
		pairs, all = append(pairs, p), append(all, p.far, p.near)
	}
	pairs[4].near.Close() // and so it is not among them
	all = all[:len(all)-1]
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	for _, c := range all {
		c.State()
	}
	twins := wire.Twins(all)
	for i, p := range pairs {
		if i != 2 && i != 4 && (twins[p.near] != p.far || twins[p.far] != p.near) {
			t.Fatalf("pair %d is not found", i)
		}
	}
	if twins[pairs[2].near] != nil || twins[pairs[4].far] != nil {
		t.Fatal("who cannot be told of is found")
	}
	for i, p := range pairs[:2] {
		a, b := overTCP(t)
		p.near.Exchange(a)
		p.far.Exchange(b)
		near, far := moved(t, p.near), moved(t, p.far)
		near.Thaw()
		far.Thaw()
		near.CloseWrite()
		far.SetDeadline(time.Now().Add(time.Minute))
		want := []string{"sent 0, kept", "sent 1"}[i]
		if got, err := io.ReadAll(far); err != nil || string(got) != want {
			t.Errorf("pair %d: %q, %v; want %q", i, got, err, want)
		}
		if _, err := far.Write([]byte("back")); err != nil {
			t.Error(err)
		}
		far.Close()
		near.SetDeadline(time.Now().Add(time.Minute))
		if got, err := io.ReadAll(near); err != nil || string(got) != "back" {
			t.Errorf("pair %d: back comes %q, %v", i, got, err)
		}
	}
}
