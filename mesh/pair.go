package mesh

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"hauberk.dev/mesh/wire"
)

// reach connects to a gateway. The one of this proxy is itself, by a pair of
// sockets; everything above them is as it is between two nodes.
func (p *Proxy) reach(ctx context.Context, gateway netip.AddrPort) (*wire.Conn, error) {
	if c := p.reachItself(gateway); c != nil {
		return c, nil
	}
	raw, err := new(net.Dialer).DialContext(ctx, "tcp", gateway.String())
	if err != nil {
		return nil, err
	}
	return wire.New(raw.(*net.TCPConn)), nil
}

// reachItself is nil unless this proxy listens at exactly that address, as the
// kernel says of the listener that the node has given: then TCP would lead here
// too. Nothing that a peer or a plan says can make it so. The port of the far
// end's source is 0: there is none.
func (p *Proxy) reachItself(gateway netip.AddrPort) *wire.Conn {
	p.mu.Lock() // until the far end is counted: who holds all takes the listener away first
	defer p.mu.Unlock()
	if p.gateway == nil || addrPort(p.gateway.Addr()) != gateway {
		return nil
	}
	near, far, err := socketPair()
	if err != nil {
		return nil // what is wrong here, TCP says as well
	}
	p.still.shakes(1)
	p.running.Go(func() { p.welcome(wire.New(far), netip.AddrPortFrom(gateway.Addr(), 0).String()) })
	return wire.New(near)
}

// socketPair is a connection of this process to itself: a Unix stream socket each.
func socketPair() (near, far *net.UnixConn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make a pair of sockets: %w", err)
	}
	a, b := os.NewFile(uintptr(fds[0]), "near"), os.NewFile(uintptr(fds[1]), "far")
	defer a.Close()
	defer b.Close()
	if near, err = unixConn(a); err != nil {
		return nil, nil, err
	}
	if far, err = unixConn(b); err != nil {
		near.Close()
		return nil, nil, err
	}
	return near, far, nil
}

var errNoSocket = errors.New("a descriptor is no connection of TCP or of a pair of sockets")

// socketOf is a connection with a copy of a descriptor.
func socketOf(f *os.File) (wire.Socket, error) {
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	if s, ok := c.(wire.Socket); ok && (c.LocalAddr().Network() == "tcp" || c.LocalAddr().Network() == "unix") {
		return s, nil
	}
	c.Close()
	return nil, errNoSocket
}

func unixConn(f *os.File) (*net.UnixConn, error) {
	s, err := socketOf(f)
	if err != nil {
		return nil, err
	}
	c, ok := s.(*net.UnixConn)
	if !ok {
		s.Close()
		return nil, errNoSocket
	}
	return c, nil
}

// firstOfPairs is the version of a hand-over from which on there are pairs.
const firstOfPairs = 3

// unpair puts loopback connections in the place of pairs under links that are held,
// for a process that knows TCP only. An end whose other end is gone finds it gone.
func (p *Proxy) unpair(links []*entry) {
	var ends []*wire.Conn
	for _, e := range links {
		if raw := e.link.raw; raw.TCP() == nil {
			raw.State() // nothing more is sent from here on
			ends = append(ends, raw)
		}
	}
	twins := wire.Twins(ends)
	for _, c := range ends {
		if c.TCP() != nil {
			continue // by its twin
		}
		near, far, err := loopback()
		if err != nil {
			p.log.Error("a pair of sockets cannot be replaced", "err", err)
			continue // which the other process refuses
		}
		c.Exchange(near)
		if twin := twins[c]; twin != nil {
			twin.Exchange(far)
		} else {
			far.Close()
		}
	}
}

// loopback is a connection of this process to itself, by TCP.
func loopback() (near, far *net.TCPConn, err error) {
	ln, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return nil, nil, err
	}
	defer ln.Close()
	c, err := net.DialTimeout("tcp4", ln.Addr().String(), connectTimeout)
	if err != nil {
		return nil, nil, err
	}
	ln.SetDeadline(time.Now().Add(connectTimeout))
	for {
		if far, err = ln.AcceptTCP(); err != nil {
			c.Close()
			return nil, nil, err
		}
		if far.RemoteAddr().String() == c.LocalAddr().String() {
			return c.(*net.TCPConn), far, nil
		}
		far.Close() // somebody else was faster
	}
}
