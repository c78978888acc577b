package wire

import "syscall"

// Now writes to a connection without waiting, beside nobody.
type Now struct {
	raw syscall.RawConn
	try func(fd uintptr) bool
	p   []byte
	n   int
}

// NewNow makes the Now of a connection. It owns nothing.
func NewNow(c syscall.Conn) *Now {
	w := &Now{}
	w.raw, _ = c.SyscallConn() // nil for one that was never opened
	w.try = w.once
	return w
}

// Write writes what of p there is room for at once. Why that is not all, the
// connection's own Write says.
func (w *Now) Write(p []byte) int {
	if w.raw == nil {
		return 0
	}
	w.p, w.n = p, 0
	w.raw.Write(w.try)
	w.p = nil
	return w.n
}

func (w *Now) once(fd uintptr) bool {
	for {
		n, err := syscall.Write(int(fd), w.p)
		if err == syscall.EINTR {
			continue
		}
		w.n = max(n, 0)
		return true
	}
}
