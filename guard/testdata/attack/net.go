package main

import (
	"errors"
	"net"
	"os"
	"syscall"
	"time"
	"unsafe"
)

var netAttacks = map[string]func([]string) error{
	"connect":     func(a []string) error { return connect("tcp4", a[0]) },
	"connect6":    connectMapped,
	"udp":         func(a []string) error { return connect("udp4", a[0]) },
	"sendto":      func(a []string) error { return sendto(a[0], syscall.AF_INET) },
	"sendtoblank": func(a []string) error { return sendto(a[0], syscall.AF_UNSPEC) },
	"fastopen":    fastOpen,
	"raw":         func([]string) error { return socket(syscall.AF_INET, syscall.SOCK_RAW, syscall.IPPROTO_ICMP) },
	"packet":      func([]string) error { return socket(syscall.AF_PACKET, syscall.SOCK_RAW, 0x0300) },
	"generic":     func([]string) error { return socket(syscall.AF_NETLINK, syscall.SOCK_RAW, 16) },
	"uevent":      func([]string) error { return socket(syscall.AF_NETLINK, syscall.SOCK_RAW, 15) },
	"route":       func([]string) error { return socket(syscall.AF_NETLINK, syscall.SOCK_RAW, 0) },
	"auditsocket": auditSocket,
	"unixpair":    unixPair,
}

// auditSocket is what PAM asks for: a kernel that records nothing has none.
func auditSocket([]string) error {
	err := socket(syscall.AF_NETLINK, syscall.SOCK_RAW, 9)
	if errors.Is(err, syscall.EPROTONOSUPPORT) {
		return nil
	}
	return err
}

func socket(family, kind, protocol int) error {
	s, err := syscall.Socket(family, kind, protocol)
	if err == nil {
		syscall.Close(s)
	}
	return err
}

// connect listens where it connects to, so that only the Guard can refuse.
func connect(network, to string) error {
	if network == "tcp4" {
		l, err := net.Listen(network, to)
		if err != nil {
			return void(err)
		}
		defer l.Close()
	}
	c, err := net.DialTimeout(network, to, 10*time.Second)
	if err != nil {
		return err
	}
	return c.Close()
}

func parse(to string) (addr [4]byte, port int, err error) {
	a, err := net.ResolveUDPAddr("udp4", to)
	if err != nil {
		return addr, 0, void(err)
	}
	copy(addr[:], a.IP.To4())
	return addr, a.Port, nil
}

// connectMapped reaches an IPv4 address through an IPv6 socket.
func connectMapped(a []string) error {
	l, err := net.Listen("tcp4", a[0])
	if err != nil {
		return void(err)
	}
	defer l.Close()
	addr, port, err := parse(a[0])
	if err != nil {
		return err
	}
	s, err := syscall.Socket(syscall.AF_INET6, syscall.SOCK_STREAM, 0)
	if err != nil {
		return void(err)
	}
	six := syscall.SockaddrInet6{Port: port}
	six.Addr[10], six.Addr[11] = 0xff, 0xff
	copy(six.Addr[12:], addr[:])
	return syscall.Connect(s, &six)
}

// sendto sends without connecting, under the given family's name.
func sendto(to string, family uint16) error {
	addr, port, err := parse(to)
	if err != nil {
		return err
	}
	s, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM, 0)
	if err != nil {
		return void(err)
	}
	var raw [16]byte
	raw[0], raw[2], raw[3] = byte(family), byte(port>>8), byte(port)
	copy(raw[4:], addr[:])
	text := []byte("x")
	if _, _, errno := syscall.Syscall6(syscall.SYS_SENDTO, uintptr(s), uintptr(unsafe.Pointer(&text[0])), 1, 0, uintptr(unsafe.Pointer(&raw)), 16); errno != 0 {
		return errno
	}
	return nil
}

// fastOpen sends data with the first packet, which needs no connect.
func fastOpen(a []string) error {
	const fastopen = 0x20000000
	l, err := net.Listen("tcp4", a[0])
	if err != nil {
		return void(err)
	}
	defer l.Close()
	addr, port, err := parse(a[0])
	if err != nil {
		return err
	}
	s, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err != nil {
		return void(err)
	}
	return syscall.Sendto(s, []byte("x"), fastopen, &syscall.SockaddrInet4{Port: port, Addr: addr})
}

func unixPair([]string) error {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	path := "/tmp/sock"
	os.Remove(path)
	l, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	return errors.Join(c.Close(), l.Close(), syscall.Close(fds[0]), syscall.Close(fds[1]))
}
