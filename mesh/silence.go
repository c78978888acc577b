package mesh

import (
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// defaultSilence is how long a guest may leave its kernel's answers out: one
// that is paused, hangs or has no processor left. TCP alone would go on for a
// quarter of an hour.
const defaultSilence = 30 * time.Second

// listenFor has the kernel ask the guest behind c for a sign of life, while
// there is nothing to send it.
func (p *Proxy) listenFor(c *net.TCPConn) {
	const times = 3
	each := max(p.silence/(2*times), time.Second)
	c.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: max(p.silence-times*each, time.Second), Interval: each, Count: times})
}

// giveUpSilent ends connections to guests that acknowledge nothing of what was
// sent them. Keep-alive is silent then, and TCP_USER_TIMEOUT would also end those
// to a guest whose program is slow to read.
func (p *Proxy) giveUpSilent() {
	for _, e := range p.registry.all() {
		if e.guest == nil {
			continue
		}
		if c := e.guest(); c != nil && silent(c, p.silence) {
			abortTCP(c) // whoever moves bytes tells the other end
		}
	}
}

// silent tells whether nothing has been heard of the other end for that long
// although it was asked: by data sent again, or for room to send more.
func silent(c *net.TCPConn, than time.Duration) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	var info *unix.TCPInfo
	cerr := raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.SOL_TCP, unix.TCP_INFO) })
	if cerr != nil || err != nil {
		return false
	}
	heard := time.Duration(info.Last_ack_recv) * time.Millisecond
	return heard > than && (info.Retransmits >= 2 || info.Probes >= 2)
}

// abortTCP ends both halves of a connection at once, with a reset.
func abortTCP(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
}
