// Package loopback finds where programs that are measured may listen, and keeps
// others away from there. It opens nothing that is measured.
package loopback

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"syscall"
)

// Ports are taken from below those that Linux gives to whoever asks for any, so that
// no connection comes in between.
const (
	lowest  = 20000
	highest = 32000
	tries   = 100
)

// Held are addresses that nobody else is given while they are held: not by this
// process for another program, not by another run beside it. A program that sets
// SO_REUSEADDR, as servers do, may listen there all the same.
type Held struct {
	Addresses []string
	sockets   []int
}

// Hold finds loopback addresses at which nobody listens, and at which nothing is left
// of who did.
func Hold(n int) (*Held, error) {
	h := &Held{}
	for range tries * n {
		if len(h.sockets) == n {
			return h, nil
		}
		port := lowest + rand.IntN(highest-lowest)
		s, err := bind(port)
		if errors.Is(err, syscall.EADDRINUSE) {
			continue // another's
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("hold port %d: %w", port, err), h.Close())
		}
		h.sockets, h.Addresses = append(h.sockets, s), append(h.Addresses, fmt.Sprintf("127.0.0.1:%d", port))
	}
	if len(h.sockets) < n {
		return nil, errors.Join(fmt.Errorf("hold %d ports between %d and %d: %d are free", n, lowest, highest, len(h.sockets)), h.Close())
	}
	return h, nil
}

// bind takes a port for a socket that never listens. It is asked for without
// SO_REUSEADDR, so that whoever else is bound there is in the way, listening or not,
// and left with it, so that who listens later is not.
func bind(port int) (int, error) {
	s, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	err = syscall.Bind(s, &syscall.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}})
	if err == nil {
		err = syscall.SetsockoptInt(s, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1)
	}
	if err != nil {
		syscall.Close(s)
		return 0, err
	}
	return s, nil
}

// Close lets go of the ports.
func (h *Held) Close() (err error) {
	for _, s := range h.sockets {
		err = errors.Join(err, syscall.Close(s))
	}
	h.sockets = nil
	return err
}

// Taken says whether a program's own words are that somebody listens where it wants
// to. No error of ours is at hand: it is another process.
func Taken(said string) bool {
	return strings.Contains(strings.ToLower(said), "address already in use")
}
