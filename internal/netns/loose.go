package netns

import (
	"crypto/rand"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Nowhere is a network namespace without a name that holds taps until they are
// taken to where they belong. It ends with its last tap.
type Nowhere struct {
	mu   sync.Mutex
	file *os.File
}

// OpenNowhere makes an empty namespace.
func OpenNowhere() (*Nowhere, error) {
	n := &Nowhere{}
	err := onThread(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		n.file, err = os.Open(threadNS())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("make namespace for loose taps: %w", err)
	}
	return n, nil
}

// Tap makes a tap that is down and has no address. It goes with the last holder
// of its descriptor.
func (n *Nowhere) Tap() (tap *os.File, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.file == nil {
		return nil, fmt.Errorf("make loose tap: %w", os.ErrClosed)
	}
	name := "hb" + strings.ToLower(rand.Text()[:10]) // of no link where it will go
	err = within(n.file, func() (err error) {
		tap, err = openTap(name, 0)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("make loose tap: %w", err)
	}
	return tap, nil
}

// Close forgets the namespace. Taps in it stay.
func (n *Nowhere) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.file == nil {
		return nil
	}
	err := n.file.Close()
	n.file = nil
	return err
}

// within runs f on a thread in a namespace.
func within(file *os.File, f func() error) error {
	return onThread(func() error {
		err := unix.Setns(int(file.Fd()), unix.CLONE_NEWNET)
		runtime.KeepAlive(file)
		if err != nil {
			return fmt.Errorf("enter namespace: %w", err)
		}
		return f()
	})
}

// Adopt takes a loose tap into the namespace and does with it what Tap does
// with one of its own.
func (ns *Namespace) Adopt(tap *os.File, g Guest) error {
	err := g.check()
	if err == nil {
		err = ns.Do(func() error {
			raw, err := tap.SyscallConn()
			if err != nil {
				return err
			}
			var moved error
			if err := raw.Control(func(fd uintptr) { moved = moveTap(int(fd), ns, Device) }); err != nil {
				return err
			}
			if moved != nil {
				return moved
			}
			return enclose(Device, g)
		})
	}
	if err != nil {
		return fmt.Errorf("adopt tap in %q: %w", ns.name, err)
	}
	ns.enclosed = true
	return nil
}
