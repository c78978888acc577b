package netns

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// HandAddress is the address of every sandbox that is run by hand. They do not
// meet: each has its own two namespaces, and no link leads out of them.
var HandAddress = netip.MustParseAddr("198.18.0.2")

// Hand is the network of a sandbox that is run without a cluster: a namespace
// for the guest, as CNI plugins would leave it, and one that encloses it, whose
// sockets are all there is of the outside.
type Hand struct {
	Pod  *Namespace // for Join
	Gate *Namespace
}

func handNames(name string) (pod, gate string) { return name + ".pod", name + ".gate" }

// CreateHand makes both in dir. From the UDP ports in answers the guest may
// answer what asked it through the gate.
func CreateHand(dir, name string, answers []uint16) (*Hand, error) {
	pod, gate := handNames(name)
	g, err := Create(dir, gate)
	if err != nil {
		return nil, err
	}
	p, err := create(dir, pod, preparePod)
	if err != nil {
		return nil, errors.Join(err, g.Delete())
	}
	mac := make(net.HardwareAddr, 6)
	rand.Read(mac) // never fails
	mac[0] = mac[0]&^1 | 2
	if err := g.veth(Guest{Address: HandAddress, MAC: mac, Answers: answers}, p, "eth0"); err != nil {
		return nil, errors.Join(err, g.Delete(), p.Delete())
	}
	return &Hand{Pod: p, Gate: g}, nil
}

// preparePod leaves a namespace as plugins do, without IPv6.
func preparePod() error {
	for _, key := range []string{"ipv6/conf/all/disable_ipv6", "ipv6/conf/default/disable_ipv6"} {
		if err := sysctl(key, "1"); err != nil {
			return err
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	return netlink.LinkSetUp(lo)
}

// OpenHand finds what CreateHand made, also in an earlier process.
func OpenHand(dir, name string) (*Hand, error) {
	pod, gate := handNames(name)
	h := &Hand{}
	var err1, err2 error
	h.Pod, err1 = Open(dir, pod)
	h.Gate, err2 = Open(dir, gate)
	if err := errors.Join(err1, err2); err != nil {
		return nil, errors.Join(err, h.Close())
	}
	return h, nil
}

// RemoveHand removes both, or what there is of them.
func RemoveHand(dir, name string) error {
	pod, gate := handNames(name)
	return errors.Join(Remove(dir, pod), Remove(dir, gate))
}

// Close forgets the namespaces without removing them.
func (h *Hand) Close() error {
	var errs []error
	for _, ns := range []*Namespace{h.Pod, h.Gate} {
		if ns != nil {
			errs = append(errs, ns.Close())
		}
	}
	return errors.Join(errs...)
}

// Inside opens sockets in a namespace, also when its process has given up the
// right to enter one.
type Inside struct {
	work chan func()
	done chan struct{}
}

// Inside starts a thread that stays in the namespace until Close.
func (ns *Namespace) Inside() (*Inside, error) {
	in := &Inside{work: make(chan func()), done: make(chan struct{})}
	entered := make(chan error, 1)
	go func() {
		defer close(in.done)
		runtime.LockOSThread() // and never unlocked: the thread ends with this
		err := unix.Setns(int(ns.file.Fd()), unix.CLONE_NEWNET)
		if entered <- err; err != nil {
			return
		}
		for f := range in.work {
			f()
		}
	}()
	if err := <-entered; err != nil {
		return nil, fmt.Errorf("enter namespace %q: %w", ns.name, err)
	}
	return in, nil
}

// Dial connects from inside the namespace. network is tcp4 or udp4.
func (in *Inside) Dial(ctx context.Context, network string, to netip.AddrPort) (net.Conn, error) {
	type socket struct {
		fd  int
		err error
	}
	kind := unix.SOCK_STREAM
	if network == "udp4" {
		kind = unix.SOCK_DGRAM
	}
	made := make(chan socket, 1)
	in.work <- func() {
		fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		made <- socket{fd, err}
	}
	s := <-made
	if s.err != nil {
		return nil, fmt.Errorf("open socket for %s: %w", to, s.err)
	}
	if err := connect(ctx, s.fd, to); err != nil {
		unix.Close(s.fd)
		return nil, fmt.Errorf("connect to %s: %w", to, err)
	}
	f := os.NewFile(uintptr(s.fd), "socket")
	defer f.Close()
	return net.FileConn(f)
}

// connect waits for a connection of a socket that does not block.
func connect(ctx context.Context, fd int, to netip.AddrPort) error {
	err := unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())})
	if !errors.Is(err, unix.EINPROGRESS) {
		return err
	}
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		polled := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		n, err := unix.Poll(polled, int((100 * time.Millisecond).Milliseconds()))
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if n > 0 {
			break
		}
	}
	code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && code != 0 {
		err = unix.Errno(code)
	}
	return err
}

// Close ends the thread. Sockets that it made live on.
func (in *Inside) Close() error {
	close(in.work)
	<-in.done
	return nil
}
