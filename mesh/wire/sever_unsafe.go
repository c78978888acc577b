package wire

import (
	"net"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Sever stops the connection from carrying bytes, now, in both directions, but
// leaves the descriptor open: what has come and is not read is lost, and the peer
// is told. Unlike Close it wakes no goroutine of this end's, so thousands of
// connections are severed before the first of their goroutines competes for the
// processor.
func (c *Conn) Sever() {
	raw, err := c.socket.SyscallConn()
	if err != nil {
		return // never opened
	}
	sever := disconnect
	if _, ok := c.socket.(*net.UnixConn); ok {
		sever = empty
	}
	raw.Control(sever) // fails for one that is closed already
}

// disconnect ends a TCP connection with a reset: a connect to no address, which
// x/sys cannot spell.
func disconnect(fd uintptr) {
	nobody := unix.RawSockaddr{Family: unix.AF_UNSPEC}
	unix.Syscall(unix.SYS_CONNECT, fd, uintptr(unsafe.Pointer(&nobody)), unsafe.Sizeof(nobody))
}

// empty ends a Unix connection. The kernel takes nothing for this end any more
// once shutdown has returned, but would let what is there be read.
func empty(fd uintptr) {
	unix.Shutdown(int(fd), unix.SHUT_RDWR)
	b := make([]byte, 32<<10)
	for {
		n, _, err := unix.Recvfrom(int(fd), b, unix.MSG_DONTWAIT)
		if n <= 0 && err != unix.EINTR {
			return
		}
	}
}
