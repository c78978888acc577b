package main

import (
	"errors"
	"net"
	"unsafe"

	"golang.org/x/sys/unix"
)

// sever ends a connection as package mesh does when it is revoked: by a connect to no
// address, which x/sys cannot spell, and a Unix socket does not take: that is shut.
func sever(c conn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var said error
	err = raw.Control(func(s uintptr) {
		if _, tcp := c.(*net.TCPConn); !tcp {
			said = unix.Shutdown(int(s), unix.SHUT_RDWR)
			return
		}
		nobody := unix.RawSockaddr{Family: unix.AF_UNSPEC}
		if _, _, n := unix.Syscall(unix.SYS_CONNECT, s, uintptr(unsafe.Pointer(&nobody)), unsafe.Sizeof(nobody)); n != 0 {
			said = n
		}
	})
	return errors.Join(err, said)
}
