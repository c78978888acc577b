// Package unixsock opens Unix sockets between programs of one machine, says who is
// at the other end, and carries open files there and back (SCM_RIGHTS, unix(7)).
//
// What is said on them is for those who talk.
package unixsock

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Listen opens the socket at path, of whole messages (SOCK_SEQPACKET), for its owner
// alone. One that nobody listens on any more is replaced; one that somebody does is
// an error, and so is what is no socket.
func Listen(path string) (*net.UnixListener, error) { return listen("unixpacket", path) }

// ListenStream is Listen for a stream of bytes.
func ListenStream(path string) (*net.UnixListener, error) { return listen("unix", path) }

func listen(network, path string) (*net.UnixListener, error) {
	if err := removeStale(network, path); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	// The file has the mode of the socket from the beginning.
	private := func(_, _ string, raw syscall.RawConn) (err error) {
		if cerr := raw.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); cerr != nil {
			return cerr
		}
		return err
	}
	ln, err := (&net.ListenConfig{Control: private}).Listen(context.Background(), network, path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return ln.(*net.UnixListener), nil
}

// removeStale removes a socket that nobody listens on. Whoever dials a file that is
// none is refused too.
func removeStale(network, path string) error {
	c, err := net.Dial(network, path)
	if err == nil {
		c.Close()
		return errors.New("another program is there")
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return nil // what is wrong, listening tells
	}
	info, err := os.Lstat(path)
	if err == nil && info.Mode().Type() != fs.ModeSocket {
		return errors.New("there is a file that is no socket: remove it, or name another path")
	}
	if err == nil {
		err = os.Remove(path)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
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
