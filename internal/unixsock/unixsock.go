// Package unixsock opens Unix sockets between programs of one machine, says who is
// at the other end, and carries open files there and back (SCM_RIGHTS, unix(7)).
//
// What is said on them is for those who talk.
package unixsock

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// Listen opens the socket at path, of whole messages (SOCK_SEQPACKET), for its owner
// alone. One that nobody listens on
// any more is replaced; one that somebody does is an error.
func Listen(path string) (*net.UnixListener, error) {
	if c, err := net.Dial("unixpacket", path); err == nil {
		c.Close()
		return nil, fmt.Errorf("listen on %s: another program is there", path)
	} else if errors.Is(err, unix.ECONNREFUSED) {
		os.Remove(path)
	}
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		ln.Close()
		return nil, err
	}
	return ln, nil
}

// OnlyRoot fails if who has connected is not root: the mode of the socket says the
// same, but a mode is changed more easily than this.
func OnlyRoot(conn *net.UnixConn) error {
	uid, err := User(conn)
	if err == nil && uid != 0 {
		err = fmt.Errorf("user %d asks, and only root may", uid)
	}
	return err
}

// SameUser fails if the other side is not of this process's own user. On the side
// that has connected it judges who listens.
func SameUser(conn *net.UnixConn) error {
	uid, err := User(conn)
	if own := os.Geteuid(); err == nil && int64(uid) != int64(own) {
		err = fmt.Errorf("user %d is there, and only user %d may be", uid, own)
	}
	return err
}

// User is the one that the other end had when it connected.
func User(conn *net.UnixConn) (uint32, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var who *unix.Ucred
	var asked error
	if err := raw.Control(func(fd uintptr) { who, asked = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, err
	}
	if asked != nil {
		return 0, fmt.Errorf("ask who asks: %w", asked)
	}
	return who.Uid, nil
}
