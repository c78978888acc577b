package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"time"
)

const (
	kib      = 1024
	rate     = 1000 // calls a second
	turns    = 3
	parallel = 8 // connections, used in rotation
	warm     = 100
)

// hops times calls of 1 KiB, answered by 1 KiB, a thousand a second: straight,
// through both sides of a hauberk-mesh, and, on the loopback device, straight
// and through both sides of an HAProxy that does mutual TLS with itself. What a
// proxy adds is its figure less that of the straight path beside it.
//
// Both proxies are one process that takes both sides. Ours crosses two veth
// pairs where the straight path crosses one, as that is where it stands; and it
// judges the caller's identity, which HAProxy here does not.
func hops(ctx context.Context, l *lab) (_ []figure, err error) {
	ca, err := newAuthority()
	if err != nil {
		return nil, err
	}
	w, err := openWorld(ctx, l, ca, false)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	rival, err := openHAProxy(ctx, l, ca)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, rival.Close()) }()
	paths := []*path{
		{what: "straight, one veth pair", dial: w.straight},
		{what: "hauberk-mesh, both sides", dial: w.meshed, pid: w.proxy.Process.Pid},
		{what: "straight, loopback", dial: rival.straight},
		{what: "HAProxy, both sides", dial: rival.proxied, pid: rival.process.Process.Pid},
	}
	for _, p := range paths {
		defer p.close()
		if err := p.open(); err != nil {
			return nil, fmt.Errorf("dial %s: %w", p.what, err)
		}
	}
	for range turns {
		for _, p := range paths {
			if err := p.turn(ctx, l.calls); err != nil {
				return nil, fmt.Errorf("call through %s: %w", p.what, err)
			}
		}
	}
	return told(paths), nil
}

// told makes figures of straight, ours, straight and theirs.
func told(p []*path) []figure {
	var f [4]figure
	for i, one := range p {
		f[i] = spread("round trip, "+one.what, "us", "", one.took)
	}
	ours := f[1].minus(f[0], "added by hauberk-mesh, mTLS", "difference of the distributions")
	theirs := f[3].minus(f[2], "added by HAProxy, mTLS", "difference of the distributions")
	ours.Note = ours.ratio(theirs) + "; " + within(ours, f[0])
	cpuOurs, cpuTheirs := p[1].processor("hauberk-mesh"), p[3].processor("HAProxy")
	cpuOurs.Note = cpuOurs.ratio(cpuTheirs)
	return append([]figure{ours, theirs, cpuOurs, cpuTheirs}, f[:]...)
}

// What a hop may add at the median and at the 99th of a hundred, in microseconds.
const (
	mayP50 = 200
	mayP99 = 500
)

// within says whether that is met, if it can be told beside what the straight path
// takes itself.
func within(added, straight figure) string {
	met := func(v, without, most float64) string {
		switch {
		case without > most:
			return "cannot be told"
		case v <= most:
			return "met"
		}
		return "MISSED"
	}
	return fmt.Sprintf("at most %d p50: %s, %d p99: %s", mayP50, met(added.P50, straight.P50, mayP50), mayP99, met(added.P99, straight.P99, mayP99))
}

// path is one way from a caller to its callee.
type path struct {
	what string
	dial func() (net.Conn, error)
	pid  int // of the proxy, if there is one

	conns []net.Conn
	took  []float64
	ticks uint64
}

func (p *path) open() error {
	for range parallel {
		c, err := p.dial()
		if err != nil {
			return err
		}
		p.conns = append(p.conns, c)
	}
	b := make([]byte, kib)
	for i := range warm {
		if _, err := p.call(p.conns[i%parallel], b); err != nil {
			return err
		}
	}
	return nil
}

func (p *path) close() {
	for _, c := range p.conns {
		c.Close()
	}
}

func (p *path) call(c net.Conn, b []byte) (time.Duration, error) {
	began := time.Now() // the lateness of a timer is nobody's
	if err := c.SetDeadline(began.Add(5 * time.Second)); err != nil {
		return 0, err
	}
	if _, err := c.Write(b); err != nil {
		return 0, err
	}
	_, err := io.ReadFull(c, b)
	return time.Since(began), err
}

// turn calls at the rate, whatever the answers take.
func (p *path) turn(ctx context.Context, calls int) error {
	before, err := p.spent()
	if err != nil {
		return err
	}
	b := make([]byte, kib)
	begin := time.Now()
	for i := range calls {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		time.Sleep(time.Until(begin.Add(time.Duration(i) * time.Second / rate)))
		d, err := p.call(p.conns[i%parallel], b)
		if err != nil {
			return err
		}
		p.took = append(p.took, us(d))
	}
	after, err := p.spent()
	p.ticks += after - before
	return err
}

// spent is the processor time of the proxy so far, in ticks.
func (p *path) spent() (uint64, error) {
	if p.pid == 0 {
		return 0, nil
	}
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(raw), ") ")
	f := strings.Fields(rest)
	if len(f) < 13 {
		return 0, fmt.Errorf("read time of process %d: %q", p.pid, raw)
	}
	user, err := strconv.ParseUint(f[11], 10, 64)
	if err != nil {
		return 0, err
	}
	system, err := strconv.ParseUint(f[12], 10, 64)
	return user + system, err
}

// tick is what Linux counts processor time in, for programs, on amd64.
const tick = 10 * time.Millisecond

func (p *path) processor(name string) figure {
	each := us(time.Duration(p.ticks)*tick) / float64(max(1, len(p.took)))
	return single("processor time a call, "+name, "us", "", each)
}

// echo answers each KiB with a KiB.
func echo(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			b := make([]byte, kib)
			for {
				if _, err := io.ReadFull(c, b); err != nil {
					return
				}
				if _, err := c.Write(b); err != nil {
					return
				}
			}
		}()
	}
}
