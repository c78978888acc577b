package alone

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
)

// maxLooks is how often a connection at rest is read: enough for the words of TLS's
// own that may have come meanwhile, such as tickets.
const maxLooks = 16

// beneath is what lies under a connection of TLS to a server. TLS reads ahead: what a
// server said unasked may be no longer with the kernel, and not decrypted yet.
type beneath struct {
	net.Conn
	raw  syscall.RawConn
	head [5]byte // of a record: RFC 8446, section 5.1
	n    int     // bytes of head that have come
	left int     // bytes behind it that have not
	look bool    // do not wait
	most int     // looks that are left
}

// NetConn is the connection itself.
func (r *beneath) NetConn() net.Conn { return r.Conn }

func (r *beneath) Read(b []byte) (n int, err error) {
	if r.look {
		n, err = r.glance(b)
	} else {
		n, err = r.Conn.Read(b)
	}
	r.pass(b[:n])
	return n, err
}

// glance reads what is there. That nothing is there is a time that is over: TLS does
// not take it for an end.
func (r *beneath) glance(b []byte) (n int, err error) {
	if r.most--; r.most < 0 {
		return 0, io.ErrNoProgress
	}
	cerr := r.raw.Control(func(fd uintptr) { n, _, err = syscall.Recvfrom(int(fd), b, syscall.MSG_DONTWAIT) })
	switch {
	case cerr != nil:
		return 0, cerr
	case err == syscall.EAGAIN:
		return 0, os.ErrDeadlineExceeded
	case err != nil:
		return 0, err
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

// pass notes where in a record the bytes that came end.
func (r *beneath) pass(b []byte) {
	for len(b) > 0 {
		if r.left > 0 {
			n := min(r.left, len(b))
			r.left, b = r.left-n, b[n:]
			continue
		}
		n := copy(r.head[r.n:], b)
		if r.n, b = r.n+n, b[n:]; r.n == len(r.head) {
			r.n, r.left = 0, int(r.head[3])<<8|int(r.head[4])
		}
	}
}

// rests says that the server has neither ended the connection of TLS above nor said
// a word, or part of one, that nobody has read.
func (r *beneath) rests(above io.Reader) bool {
	r.look, r.most = true, maxLooks
	n, err := above.Read(make([]byte, 1))
	r.look = false
	return n == 0 && errors.Is(err, os.ErrDeadlineExceeded) && r.n == 0 && r.left == 0
}
