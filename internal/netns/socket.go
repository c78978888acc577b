package netns

import (
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// MaxDialers bounds one call of Dialers; it is also what one SCM_RIGHTS message
// can carry with room to spare.
const MaxDialers = 128

// ListenTransparent opens the listener that gets every TCP connection of the
// guest. The local address of an accepted connection is where the guest wanted
// to go. Sockets may be opened again while old ones live (after a restart of
// the opener): the newest also accepts.
func (ns *Namespace) ListenTransparent() (*os.File, error) {
	return ns.listen("intercept", unix.SOCK_STREAM, netip.AddrPortFrom(netip.IPv4Unspecified(), InterceptPort), true)
}

// ListenDNS opens the name server's sockets on the gateway address.
func (ns *Namespace) ListenDNS() (udp, tcp *os.File, err error) {
	at := netip.AddrPortFrom(Gateway, 53)
	if udp, err = ns.listen("dns-udp", unix.SOCK_DGRAM, at, false); err != nil {
		return nil, nil, err
	}
	if tcp, err = ns.listen("dns-tcp", unix.SOCK_STREAM, at, false); err != nil {
		udp.Close()
		return nil, nil, err
	}
	return udp, tcp, nil
}

// Dialers opens n unconnected TCP sockets. Whoever holds one can connect it to
// the guest once, and to nothing else, as there is nothing else in reach.
func (ns *Namespace) Dialers(n int) (files []*os.File, err error) {
	if n < 1 || n > MaxDialers {
		return nil, fmt.Errorf("open %d sockets in %q: want 1 to %d", n, ns.name, MaxDialers)
	}
	err = ns.Do(func() error {
		for range n {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
			if err != nil {
				return err
			}
			files = append(files, os.NewFile(uintptr(fd), "dialer"))
		}
		return nil
	})
	if err != nil {
		for _, f := range files {
			f.Close()
		}
		return nil, fmt.Errorf("open sockets in %q: %w", ns.name, err)
	}
	return files, nil
}

func (ns *Namespace) listen(name string, kind int, at netip.AddrPort, transparent bool) (f *os.File, err error) {
	err = ns.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return err
		}
		f = os.NewFile(uintptr(fd), name)
		if transparent {
			if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1); err != nil {
				return fmt.Errorf("set IP_TRANSPARENT: %w", err)
			}
		}
		for _, opt := range []int{unix.SO_REUSEADDR, unix.SO_REUSEPORT} {
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, opt, 1); err != nil {
				return err
			}
		}
		if err := unix.Bind(fd, &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()}); err != nil {
			return err
		}
		if kind == unix.SOCK_STREAM {
			return unix.Listen(fd, 1024)
		}
		return nil
	})
	if err != nil {
		if f != nil {
			f.Close()
		}
		return nil, fmt.Errorf("listen on %s in %q: %w", at, ns.name, err)
	}
	return f, nil
}
