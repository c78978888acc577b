package wire

import (
	"encoding/binary"
	"syscall"
)

// Twins finds which of some frozen connections, whose States have been asked for,
// are the two ends of one pair of Unix sockets. First it takes what waits in each
// for unread, so that others may be exchanged for them; then each end is told its
// number through its socket, and the other hears it. An end without a twin has lost
// it, or neither carries anything any more.
func Twins(all []*Conn) map[*Conn]*Conn {
	for _, c := range all {
		c.unread = append(c.unread, c.waiting()...)
	}
	for n, c := range all {
		c.tell(binary.NativeEndian.AppendUint32(nil, uint32(n)))
	}
	twins := map[*Conn]*Conn{}
	for _, c := range all {
		told := c.waiting()
		if len(told) != 4 {
			continue
		}
		if n := binary.NativeEndian.Uint32(told); int(n) < len(all) {
			twins[c], twins[all[n]] = all[n], c
		}
	}
	return twins
}

// Exchange takes another socket in the place of the one there is, which is closed.
func (c *Conn) Exchange(s Socket) {
	c.socket.Close()
	c.socket, c.now = s, nil
	if c.ended {
		s.CloseWrite()
	}
}

// waiting reads what waits in the socket.
func (c *Conn) waiting() (all []byte) {
	b := make([]byte, 32<<10)
	c.control(func(fd int) {
		for {
			n, err := syscall.Read(fd, b)
			if n > 0 {
				all = append(all, b[:n]...)
			} else if err != syscall.EINTR {
				return
			}
		}
	})
	return all
}

// tell writes a few bytes to a socket whose queue is empty.
func (c *Conn) tell(b []byte) { c.control(func(fd int) { syscall.Write(fd, b) }) }

// control is for what the deadline of a frozen connection would not let by.
func (c *Conn) control(f func(fd int)) {
	if raw, err := c.socket.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { f(int(fd)) })
	}
}
