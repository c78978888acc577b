package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"hauberk.dev/mesh/wire"
)

const (
	patience = 2 * time.Second        // until something counts as not coming
	still    = 300 * time.Millisecond // in which nothing moved
)

// trait is something that a proxy relies on. see is given a connection over which
// sent is on its way from a to b, and says what became of it, in words that are equal
// where the behaviour is.
type trait struct {
	name string
	what string
	sent string
	see  func(w *world, p pair) (string, error)
}

var traits = []trait{
	{"counted", "bytes are TCP's: counted by the kernel", "hello", counted},
	{"both ways", "a megabyte each way at once, in pieces of all sizes", "", bothWays},
	{"early", "what was sent before the far end was there comes first (TCP_DEFER_ACCEPT)", "", early},
	{"pending", "unread, and asked how much (FIONREAD)", "hello", pending},
	{"back pressure", "a writer whose reader sleeps, small buffers: stops after", "", backPressure},
	{"half close", "half close: answer after the end of the question", "question", halfClose},
	{"reset", "reset by the writer: the reader sees", "bytes", reset},
	{"closed unread", "the reader closes with bytes unread: the writer sees", "payment", closedUnread},
	{"severed", "cut by revocation with bytes unread: the cut end reads; the other sees", "secret", severed},
	{"spliced", "splice(2): bytes come", "", spliced},
	{"passed", "descriptor passed to another holder with bytes unread", "before", passed},
	{"moved", "frozen and moved 100 times while numbers flow (mesh/wire)", "", moved},
	{"taken away", "shortcuts taken away with bytes unread: the reader sees", "before", takenAway},
	{"afterwards", "what is sent after that", "before", afterwards},
}

// none is what became of a trait that the kind of connection does not have.
const none = "-"

// over opens a connection of a kind and says what becomes of the trait.
func (t trait) over(w *world, open opener) (string, error) {
	p, err := open()
	if err != nil {
		return "", err
	}
	defer p.Close()
	if _, err := p.a.Write([]byte(t.sent)); err != nil {
		return "", err
	}
	return t.see(w, p)
}

// compare sees all traits of all kinds of connection.
func (w *world) compare(out io.Writer) error {
	for _, t := range traits {
		if err := w.cut(); err != nil {
			return err
		}
		var saw []string
		for _, kind := range []opener{over(w.plain), over(w.short), unixPair} {
			one, err := t.over(w, kind)
			if err != nil {
				return fmt.Errorf("%s: %w, after %q", t.what, err, saw)
			}
			if len(saw) > 0 && one != saw[0] && one != none {
				one = "OTHER: " + one
			}
			saw = append(saw, one)
		}
		fmt.Fprintf(out, "%s\t%s\n", t.what, strings.Join(saw, "\t"))
	}
	return nil
}

// pieces reads so many, or tells why not.
func pieces(c net.Conn, n int) string {
	b := make([]byte, n)
	c.SetReadDeadline(time.Now().Add(patience))
	n, err := io.ReadFull(c, b)
	return said(string(b[:n]), err)
}

func said(got string, err error) string {
	switch {
	case err == nil:
		return fmt.Sprintf("%q", got)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Sprintf("%q, then nothing", got)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Sprintf("%q, then its end", got)
	case errors.Is(err, syscall.ECONNRESET):
		return fmt.Sprintf("%q, then a reset", got)
	}
	return fmt.Sprintf("%q, then %v", got, err)
}

func counted(_ *world, p pair) (string, error) {
	got := pieces(p.b, 5)
	tcp, ok := p.b.(*net.TCPConn)
	if !ok {
		return none, nil
	}
	n, err := bytesReceived(tcp)
	return fmt.Sprintf("%s, %d counted", got, n), err
}

func bothWays(_ *world, p pair) (string, error) {
	want := make([]byte, 1<<20)
	for i := range want {
		want[i] = byte(i * i >> 7)
	}
	var wg sync.WaitGroup
	saw := make([]string, 2)
	for i, c := range []conn{p.a, p.b} {
		wg.Go(func() {
			for at, n := 0, 1; at < len(want); at, n = at+n, n*3%70001+1 {
				if _, err := c.Write(want[at:min(at+n, len(want))]); err != nil {
					return
				}
			}
		})
		wg.Go(func() {
			got := make([]byte, len(want))
			c.SetReadDeadline(time.Now().Add(5 * patience))
			if n, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
				saw[i] = fmt.Sprintf("%d bytes, as sent %v, %v", n, bytes.Equal(got[:n], want[:n]), err)
			}
		})
	}
	wg.Wait()
	return fmt.Sprintf("as sent%s%s", saw[0], saw[1]), nil
}

// early has the accepted socket come into being with its first byte.
func early(_ *world, p pair) (string, error) {
	p.Close()
	if p.ln == nil {
		return none, nil
	}
	return deferred(p.ln)
}

func deferred(ln net.Listener) (_ string, err error) {
	raw, err := ln.(*net.TCPListener).SyscallConn()
	if err != nil {
		return "", err
	}
	tell := func(v int) error {
		var said error
		err := raw.Control(func(s uintptr) {
			said = syscall.SetsockoptInt(int(s), syscall.IPPROTO_TCP, syscall.TCP_DEFER_ACCEPT, v)
		})
		return errors.Join(err, said)
	}
	if err := tell(5); err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, tell(0)) }()
	a, err := net.Dial("tcp4", ln.Addr().String())
	if err != nil {
		return "", err
	}
	defer a.Close()
	for _, one := range []string{"first", "then!"} {
		if _, err := a.Write([]byte(one)); err != nil {
			return "", err
		}
	}
	b, err := ln.Accept()
	if err != nil {
		return "", err
	}
	defer b.Close()
	return pieces(b, 10), nil
}

func pending(_ *world, p pair) (string, error) {
	n, err := unread(p.b)
	return fmt.Sprint(n), err
}

// mostQueued bounds what backPressure makes the kernel hold.
const mostQueued = 64 << 20

func backPressure(_ *world, p pair) (string, error) {
	if err := errors.Join(p.a.SetWriteBuffer(64<<10), p.b.SetReadBuffer(64<<10)); err != nil {
		return "", err
	}
	b, sum := make([]byte, 64<<10), 0
	for sum < mostQueued {
		p.a.SetWriteDeadline(time.Now().Add(still))
		n, err := p.a.Write(b)
		if sum += n; errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			return fmt.Sprintf("%d KiB: %v", sum>>10, err), nil
		}
	}
	switch {
	case sum >= mostQueued:
		return "never: 64 MiB are queued", nil
	case sum <= 1<<20:
		return "less than 1 MiB", nil
	}
	return fmt.Sprintf("%d MiB", sum>>20), nil
}

func halfClose(_ *world, p pair) (string, error) {
	if err := p.a.CloseWrite(); err != nil {
		return "", err
	}
	question := pieces(p.b, 9)
	if _, err := p.b.Write([]byte("answer")); err != nil {
		return "", err
	}
	p.b.Close()
	return question + "; " + pieces(p.a, 7), nil
}

func reset(_ *world, p pair) (string, error) {
	tcp, ok := p.a.(*net.TCPConn)
	if !ok {
		return none, nil
	}
	if err := tcp.SetLinger(0); err != nil {
		return "", err
	}
	p.a.Close()
	return pieces(p.b, 6), nil
}

func closedUnread(_ *world, p pair) (string, error) {
	p.b.Close()
	return pieces(p.a, 1), nil
}

func severed(_ *world, p pair) (string, error) {
	if err := sever(p.b); err != nil {
		return "", err
	}
	return pieces(p.b, 7) + "; " + pieces(p.a, 1), nil
}

// spliced moves by the call that net takes for two TCP connections.
func spliced(w *world, from pair) (string, error) {
	to, err := over(w.plain)()
	if err != nil {
		return "", err
	}
	defer to.Close()
	go to.a.(*net.TCPConn).ReadFrom(from.b) // ends with its connections
	if _, err := from.a.Write([]byte("hello")); err != nil {
		return "", err
	}
	return pieces(to.b, 5), nil
}

func passed(_ *world, p pair) (string, error) {
	other, err := pass(p.b)
	if err != nil {
		return "", err
	}
	defer other.Close()
	p.b.Close()
	if _, err := p.a.Write([]byte(" after")); err != nil {
		return "", err
	}
	got := pieces(other, 12)
	if _, err := other.Write([]byte("answer")); err != nil {
		return "", err
	}
	return got + "; " + pieces(p.a, 6), nil
}

// moved has one end frozen at any moment, its descriptor passed on and resumed, while
// the other sends numbers.
func moved(_ *world, p pair) (string, error) {
	tcp, ok := p.b.(*net.TCPConn)
	if !ok {
		return none, nil // mesh/wire knows nothing else
	}
	const numbers = 200000
	go func() {
		b := make([]byte, 0, 8000)
		for i := range numbers {
			if b = binary.BigEndian.AppendUint64(b, uint64(i)); len(b) == cap(b) || i == numbers-1 {
				if _, err := p.a.Write(b); err != nil {
					return
				}
				b = b[:0]
			}
		}
	}()
	c := wire.New(tcp)
	defer func() { c.Close() }()
	b, held, next, moves := make([]byte, 1000), 0, uint64(0), 0
	for next < numbers {
		c.SetReadDeadline(time.Now().Add(patience))
		if next > uint64(moves)*numbers/100 {
			c.Freeze()
		}
		n, err := c.Read(b[held:])
		held += n
		at := 0
		for ; held-at >= 8; at, next = at+8, next+1 {
			if got := binary.BigEndian.Uint64(b[at:]); got != next {
				return fmt.Sprintf("%d in place of %d", got, next), nil
			}
		}
		held = copy(b, b[at:held])
		switch {
		case errors.Is(err, wire.ErrFrozen):
			other, err := pass(c.TCP())
			if err != nil {
				return "", err
			}
			tcp := other.(*net.TCPConn)
			s := c.State()
			c.TCP().Close()
			c = wire.Resume(tcp, s)
			c.Thaw()
			moves++
		case err != nil:
			return said(fmt.Sprint(next), err), nil
		}
	}
	return "all in order", nil
}

func takenAway(w *world, p pair) (string, error) {
	if err := w.forget(); err != nil {
		return "", err
	}
	return pieces(p.b, 6), nil
}

func afterwards(w *world, p pair) (string, error) {
	got := pieces(p.b, 6)
	if err := w.forget(); err != nil {
		return "", err
	}
	if _, err := p.a.Write([]byte("after")); err != nil {
		return "", err
	}
	return got + "; " + pieces(p.b, 5), nil
}
