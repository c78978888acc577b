package mesh

import (
	"net"
	"sync"

	api "hauberk.dev/api/mesh"
)

// carried knows every connection of this proxy in the namespaces of sandboxes,
// those that are not decided upon yet among them: what the kernel sees there and
// is not here is not the proxy's.
type carried struct {
	mu  sync.Mutex
	all map[api.Connection]*net.TCPConn
	// sweep is at how many those that have ended are next forgotten.
	sweep int
}

// carriedSweep is the least number at which those that have ended are looked for.
const carriedSweep = 1024

// add takes a connection in. It is forgotten some time after it was closed.
func (k *carried) add(c *net.TCPConn) {
	at := api.Connection{Local: addrPort(c.LocalAddr()), Remote: addrPort(c.RemoteAddr())}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.all == nil {
		k.all, k.sweep = map[api.Connection]*net.TCPConn{}, carriedSweep
	}
	if k.all[at] = c; len(k.all) < k.sweep {
		return
	}
	for at, c := range k.all {
		if !open(c) {
			delete(k.all, at)
		}
	}
	k.sweep = max(carriedSweep, 2*len(k.all))
}

// strange are those of some connections that are not here.
func (k *carried) strange(some []api.Connection) (out []api.Connection) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, at := range some {
		if c := k.all[at]; c == nil || !open(c) {
			out = append(out, at)
		}
	}
	return out
}

// open tells whether a connection has not been closed here.
func open(c *net.TCPConn) bool {
	raw, err := c.SyscallConn()
	return err == nil && raw.Control(func(uintptr) {}) == nil
}

// by is a listener whose connections are taken in as they are accepted.
func (k *carried) by(ln net.Listener) net.Listener { return &carrying{ln, k} }

type carrying struct {
	net.Listener
	k *carried
}

func (l *carrying) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if tcp, ok := c.(*net.TCPConn); ok && err == nil {
		l.k.add(tcp)
	}
	return c, err
}
