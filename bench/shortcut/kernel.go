package main

import (
	"errors"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// bytesReceived is what TCP says it has taken in.
func bytesReceived(c *net.TCPConn) (n uint64, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var said error
	err = raw.Control(func(s uintptr) {
		var info *unix.TCPInfo
		if info, said = unix.GetsockoptTCPInfo(int(s), unix.IPPROTO_TCP, unix.TCP_INFO); said == nil {
			n = info.Bytes_received
		}
	})
	return n, errors.Join(err, said)
}

// unread is how many bytes wait to be read.
func unread(c conn) (n int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var said error
	err = raw.Control(func(s uintptr) { n, said = unix.IoctlGetInt(int(s), unix.TIOCINQ) })
	return n, errors.Join(err, said)
}

// pass sends a connection's descriptor through a Unix socket, and is what comes out.
func pass(c conn) (conn, error) {
	f, err := c.File()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(ends[0])
	defer unix.Close(ends[1])
	if err := unix.Sendmsg(ends[0], []byte{0}, unix.UnixRights(int(f.Fd())), nil, 0); err != nil {
		return nil, err
	}
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(ends[1], make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) != 1 {
		return nil, errors.Join(err, errors.New("pass a descriptor: it did not come"))
	}
	got, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(got) != 1 {
		return nil, errors.Join(err, errors.New("pass a descriptor: none came"))
	}
	return adopt(got[0])
}

func adopt(fd int) (conn, error) {
	f := os.NewFile(uintptr(fd), "connection")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return c.(conn), nil
}
