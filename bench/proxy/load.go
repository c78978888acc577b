package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"sync"
	"time"
)

const (
	connections = 32 // of a way
	patience    = 10 * time.Second
)

// origin answers GET /N by N KiB. It parses no more than it must: what it takes
// is part of every way alike.
type origin struct{ ln net.Listener }

func openOrigin() (*origin, error) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	o := &origin{ln}
	answers := map[byte][]byte{}
	for _, kib := range sizes {
		head := fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\n", kib<<10)
		answers[strconv.Itoa(kib)[0]] = append([]byte(head), bytes.Repeat([]byte("x"), kib<<10)...)
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go answer(c, answers)
		}
	}()
	return o, nil
}

func (o *origin) address() string { return o.ln.Addr().String() }
func (o *origin) Close() error    { return o.ln.Close() }

func answer(c net.Conn, answers map[byte][]byte) {
	defer c.Close()
	in := bufio.NewReader(c)
	for {
		var wanted byte
		for first := true; ; first = false {
			line, err := in.ReadSlice('\n')
			if err != nil {
				return
			}
			if first && len(line) > 5 {
				wanted = line[5] // of "GET /N"
			}
			if len(line) <= 2 {
				break
			}
		}
		if _, err := c.Write(answers[wanted]); err != nil {
			return
		}
	}
}

// way is one to the origin, with connections of its own.
type way struct {
	name, address string
	spoken        string
	kib           int
	shown         *tls.Certificate // to who demands one
	proxy         *proxy           // nil if it is straight

	conns []caller
	took  time.Duration
	spent time.Duration // by the proxy
	times []time.Duration
	fault error
}

func (w *way) open(ctx context.Context) error {
	for range connections {
		c, err := open(ctx, w.spoken, w.address, w.kib, w.shown)
		if err != nil {
			return err
		}
		w.conns = append(w.conns, c)
		for range 20 { // all is warm before it counts
			if err := c.call(); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *way) close() {
	for _, c := range w.conns {
		c.Close()
	}
}

// turn asks for a while: at a rate over all connections, or each as soon as it
// has its answer.
func (w *way) turn(ctx context.Context, length time.Duration, rate int) error {
	before, err := w.proxy.spent()
	if err != nil {
		return err
	}
	began := time.Now()
	var wg sync.WaitGroup
	faults := make([]error, len(w.conns))
	took := make([][]time.Duration, len(w.conns))
	for i, c := range w.conns {
		wg.Go(func() {
			if rate == 0 {
				took[i], faults[i] = flood(ctx, c, began.Add(length))
				return
			}
			each := time.Duration(len(w.conns)) * time.Second / time.Duration(rate)
			took[i], faults[i] = paced(ctx, c, began.Add(each*time.Duration(i)/time.Duration(len(w.conns))), each, began.Add(length))
		})
	}
	wg.Wait()
	w.took += time.Since(began)
	w.times = append(w.times, slices.Concat(took...)...)
	after, err := w.proxy.spent()
	w.spent += after - before
	return errors.Join(append(faults, err, context.Cause(ctx))...)
}

func (w *way) cell() cell {
	if w.fault == nil && len(w.times) == 0 {
		w.fault = errors.New("nothing was answered")
	}
	if w.fault != nil {
		return cell{Name: w.name, Fault: w.fault.Error()}
	}
	slices.Sort(w.times)
	at := func(q float64) float64 {
		return float64(w.times[min(len(w.times)-1, int(q*float64(len(w.times))))].Nanoseconds()) / 1000
	}
	n := len(w.times)
	return cell{Name: w.name, P50: at(.5), P99: at(.99), P999: at(.999), PerSec: float64(n) / w.took.Seconds(),
		CPU: float64(w.spent.Nanoseconds()) / 1000 / float64(n), Requests: n}
}

// client is a connection that asks.
type client struct {
	net.Conn
	in      *bufio.Reader
	request []byte
}

func dial(ctx context.Context, address string, secure bool, kib int) (*client, error) {
	conn, err := (&net.Dialer{Timeout: patience}).DialContext(ctx, "tcp4", address)
	if err != nil {
		return nil, err
	}
	if secure {
		// Who answers is known here: it was started by this program.
		conn = tls.Client(conn, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, ServerName: "localhost"})
	}
	return &client{Conn: conn, in: bufio.NewReaderSize(conn, 16<<10), request: fmt.Appendf(nil, "GET /%d HTTP/1.1\r\nHost: localhost\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n", kib)}, nil
}

var (
	lengthField = []byte("content-length:")
	ok          = []byte("HTTP/1.1 200")
)

// call asks once and reads the whole answer.
func (c *client) call() error {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := c.Write(c.request); err != nil {
		return err
	}
	length := -1
	for first := true; ; first = false {
		line, err := c.in.ReadSlice('\n')
		if err != nil {
			return err
		}
		if first && !bytes.HasPrefix(line, ok) {
			return fmt.Errorf("the answer is %.100q", line)
		}
		if len(line) > len(lengthField) && bytes.EqualFold(line[:len(lengthField)], lengthField) {
			if length, err = strconv.Atoi(string(bytes.TrimSpace(line[len(lengthField):]))); err != nil {
				return err
			}
		}
		if len(line) <= 2 {
			break
		}
	}
	if length < 0 {
		return errors.New("the answer has no length")
	}
	_, err := io.CopyN(io.Discard, c.in, int64(length))
	return err
}

func flood(ctx context.Context, c caller, end time.Time) (took []time.Duration, err error) {
	for now := time.Now(); now.Before(end) && ctx.Err() == nil; {
		if err := c.call(); err != nil {
			return took, err
		}
		after := time.Now()
		took, now = append(took, after.Sub(now)), after
	}
	return took, nil
}

// paced asks when it is due. What waited for the answer before it waited since
// it was due; the lateness of a timer is nobody's.
func paced(ctx context.Context, c caller, due time.Time, each time.Duration, end time.Time) (took []time.Duration, err error) {
	for ; due.Before(end) && ctx.Err() == nil; due = due.Add(each) {
		began := due
		if wait := time.Until(due); wait > 0 {
			time.Sleep(wait)
			began = time.Now()
		}
		if err := c.call(); err != nil {
			return took, err
		}
		took = append(took, time.Since(began))
	}
	return took, nil
}
