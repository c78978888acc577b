package mesh

import (
	"net"
	"unsafe"

	"golang.org/x/sys/unix"
)

// severTCP ends a TCP connection with a reset, now, but leaves the descriptor
// open: a connect to no address, which x/sys cannot spell. Unlike Close it wakes
// no goroutine, so thousands of connections are severed before the first of
// their goroutines competes for the processor.
func severTCP(c *net.TCPConn) {
	raw, err := c.SyscallConn()
	if err != nil {
		return // closed already
	}
	raw.Control(func(fd uintptr) {
		nobody := unix.RawSockaddr{Family: unix.AF_UNSPEC}
		unix.Syscall(unix.SYS_CONNECT, fd, uintptr(unsafe.Pointer(&nobody)), unsafe.Sizeof(nobody))
	})
}
