package main

import (
	"io"
	"net"
	"sync"
	"time"
)

// half is one direction of a connection that never leaves the process. What is not
// read is bounded.
type half struct {
	mu          sync.Mutex
	read, write sync.Cond
	b           []byte
	start       int
	closed      bool
}

func newHalf() *half {
	h := &half{b: make([]byte, 0, largest)}
	h.read.L, h.write.L = &h.mu, &h.mu
	return h
}

func (h *half) Read(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for h.start == len(h.b) {
		if h.closed {
			return 0, io.EOF
		}
		h.read.Wait()
	}
	n := copy(p, h.b[h.start:])
	if h.start += n; h.start == len(h.b) {
		h.b, h.start = h.b[:0], 0
	}
	h.write.Signal()
	return n, nil
}

func (h *half) Write(p []byte) (sum int, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for len(p) > 0 {
		if h.closed {
			return sum, io.ErrClosedPipe
		}
		n := min(len(p), cap(h.b)-len(h.b))
		if n == 0 {
			h.write.Wait()
			continue
		}
		h.b = append(h.b, p[:n]...)
		p, sum = p[n:], sum+n
		h.read.Signal()
	}
	return sum, nil
}

func (h *half) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	h.read.Signal()
	h.write.Signal()
}

// inMemory is a connection of two halves, without deadlines: what is measured is no
// more than bytes changing hands.
type inMemory struct {
	net.Conn // none: nothing else is asked of it
	in, out  *half
}

func memoryPair() (a, b net.Conn, err error) {
	there, back := newHalf(), newHalf()
	return inMemory{in: back, out: there}, inMemory{in: there, out: back}, nil
}

func (m inMemory) Read(p []byte) (int, error)       { return m.in.Read(p) }
func (m inMemory) Write(p []byte) (int, error)      { return m.out.Write(p) }
func (m inMemory) SetDeadline(time.Time) error      { return nil }
func (m inMemory) SetReadDeadline(time.Time) error  { return nil }
func (m inMemory) SetWriteDeadline(time.Time) error { return nil }

func (m inMemory) Close() error {
	m.in.close()
	m.out.close()
	return nil
}
