package mesh

import (
	"net"
	"time"

	"golang.org/x/sys/unix"

	"hauberk.dev/mesh/wire"
)

// aheadFor is how long a connection to the guest that was made ahead is used for
// the first request: a server may close one that asks nothing.
const aheadFor = time.Second

// early is a connection to the guest made before it is needed.
type early struct {
	conn *wire.Conn
	at   time.Time
}

// meetGuest connects to the guest before a connection of another proxy is
// accepted, although nothing is to be sent yet: while nothing was accepted, that
// proxy can still try another endpoint, and its client never knows. A caller that
// no rule allows anything costs the guest nothing.
func (a *arrival) meetGuest(s *service, e *entry) error {
	if _, ok := a.client.(streamSide); !ok || !mayCall(s, a.call()) {
		return nil
	}
	c, err := a.connect(e)
	if err != nil {
		return err
	}
	a.early = &early{c, time.Now()}
	return nil
}

// metGuest is the connection made ahead, if it still serves.
func (a *arrival) metGuest() *wire.Conn {
	if a.early == nil {
		return nil
	}
	m := a.early
	a.early = nil
	if time.Since(m.at) > aheadFor || !untouched(m.conn.TCP(), a.streams.Load() != nil) {
		m.conn.Close()
		return nil
	}
	return m.conn
}

// leaveGuest closes a connection made ahead that was not needed.
func (a *arrival) leaveGuest() {
	if a.early != nil {
		a.early.conn.Close()
		a.early = nil
	}
}

// untouched tells whether the other end has neither said nor ended anything. One
// that greets, as servers of HTTP/2 may, can have said something.
func untouched(c *net.TCPConn, greets bool) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	var got error
	var n int
	var b [1]byte
	if err := raw.Control(func(fd uintptr) {
		n, _, got = unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	}); err != nil {
		return false
	}
	return got == unix.EAGAIN || greets && got == nil && n > 0
}
