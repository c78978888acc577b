package main

import (
	"errors"
	"net"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

var peerAttacks = map[string]func([]string) error{
	"dialfrom":     func(a []string) error { return dialFrom(a[0], a[1]) },
	"udpfrom":      func(a []string) error { return udpFrom(a[0], a[1], false) },
	"answer":       func(a []string) error { return udpFrom(a[0], a[1], true) },
	"listen":       listen,
	"bindudp":      bindUDP,
	"sourceroute":  sourceRoute,
	"uringconnect": ringConnect,
	"vsock":        func([]string) error { return socket(40, syscall.SOCK_STREAM, 0) },
	"udplite":      func([]string) error { return socket(syscall.AF_INET, syscall.SOCK_DGRAM, 136) },
	"mptcp":        multipath,
	"resolve":      resolve,
	"unasked":      unasked,
	"tcp6":         func(a []string) error { return dialFrom("::1", a[0]) },
}

const patience = 6 * time.Second

// dialFrom is a peer that connects, and who listens for it.
func dialFrom(own, at string) error {
	l, err := net.Listen("tcp", at)
	if err != nil {
		return void(err)
	}
	defer l.Close()
	d := net.Dialer{Timeout: patience, LocalAddr: &net.TCPAddr{IP: net.ParseIP(own)}}
	if own == "::1" {
		d.LocalAddr = nil
	}
	c, err := d.Dial("tcp", at)
	if err != nil {
		return err
	}
	defer c.Close()
	in, err := l.Accept()
	if err != nil {
		return err
	}
	return in.Close()
}

// udpFrom is a peer that sends a datagram, and who waits for it, and perhaps
// answers.
func udpFrom(own, at string, answer bool) error {
	server, err := net.ListenPacket("udp", at)
	if err != nil {
		return err
	}
	defer server.Close()
	client, err := net.ListenPacket("udp", net.JoinHostPort(own, "0"))
	if err != nil {
		return void(err)
	}
	defer client.Close()
	end := time.Now().Add(patience)
	if err := errors.Join(server.SetDeadline(end), client.SetDeadline(end)); err != nil {
		return void(err)
	}
	if _, err := client.WriteTo([]byte("x"), server.LocalAddr()); err != nil {
		return void(err)
	}
	b := make([]byte, 16)
	_, peer, err := server.ReadFrom(b)
	if err != nil || !answer {
		return err
	}
	if _, err := server.WriteTo([]byte("y"), peer); err != nil {
		return err
	}
	_, _, err = client.ReadFrom(b)
	return err
}

func listen(a []string) error {
	l, err := net.Listen("tcp", a[0])
	if err != nil {
		return err
	}
	return l.Close()
}

func bindUDP(a []string) error {
	l, err := net.ListenPacket("udp", a[0])
	if err != nil {
		return err
	}
	return l.Close()
}

// sourceRoute sends to a[1] by way of a[0]: no socket is ever asked about a[0].
func sourceRoute(a []string) error {
	addr, port, err := parse(a[1])
	if err != nil {
		return err
	}
	via := net.ParseIP(a[0]).To4()
	s, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM, 0)
	if err != nil {
		return void(err)
	}
	const loose = 131
	options := append([]byte{loose, 7, 4}, via...)
	options = append(options, 1) // to a multiple of four
	if err := syscall.SetsockoptString(s, syscall.IPPROTO_IP, syscall.IP_OPTIONS, string(options)); err != nil {
		return void(err)
	}
	return syscall.Sendto(s, []byte("x"), 0, &syscall.SockaddrInet4{Port: port, Addr: addr})
}

// multipath connects with multipath TCP.
func multipath(a []string) error {
	l, err := net.Listen("tcp4", a[0])
	if err != nil {
		return void(err)
	}
	defer l.Close()
	addr, port, err := parse(a[0])
	if err != nil {
		return err
	}
	s, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 262)
	if err != nil {
		return void(err)
	}
	return syscall.Connect(s, &syscall.SockaddrInet4{Port: port, Addr: addr})
}

// ringConnect connects through io_uring, where no call names the address; with
// "poll" a thread of the kernel does it.
func ringConnect(a []string) error {
	addr, port, err := parse(a[0])
	if err != nil {
		return err
	}
	var params [120]byte
	at := func(n int) *uint32 { return (*uint32)(unsafe.Pointer(&params[n])) }
	const polled, wake = 2, 2
	flags := uintptr(1) // of waiting for what is done
	if len(a) > 1 {
		*at(8) = polled
		flags |= wake
	}
	ring, _, errno := syscall.Syscall(425, 4, uintptr(unsafe.Pointer(&params)), 0)
	if errno != 0 {
		return void(errno)
	}
	area := func(offset int64) ([]byte, error) {
		return syscall.Mmap(int(ring), offset, 4096, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED|syscall.MAP_POPULATE)
	}
	queue, err1 := area(0)
	done, err2 := area(0x8000000)
	entries, err3 := area(0x10000000)
	if err := errors.Join(err1, err2, err3); err != nil {
		return void(err)
	}
	s, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM, 0)
	if err != nil {
		return void(err)
	}
	raw := &[16]byte{syscall.AF_INET, 0, byte(port >> 8), byte(port), addr[0], addr[1], addr[2], addr[3]}
	const connect = 16
	entries[0] = connect
	*(*int32)(unsafe.Pointer(&entries[4])) = int32(s)
	*(*uint64)(unsafe.Pointer(&entries[8])) = 16 // its size, where an offset stands
	*(*uint64)(unsafe.Pointer(&entries[16])) = uint64(uintptr(unsafe.Pointer(raw)))
	*(*uint32)(unsafe.Pointer(&queue[*at(40 + 24)])) = 0 // the first of the array is entry 0
	*(*uint32)(unsafe.Pointer(&queue[*at(40 + 4)])) = 1  // tail
	if _, _, errno := syscall.Syscall6(426, ring, 1, 1, flags, 0, 0); errno != 0 {
		return void(errno)
	}
	result := *(*int32)(unsafe.Pointer(&done[*at(80 + 20)+8]))
	if result < 0 {
		return syscall.Errno(-result)
	}
	return nil
}

// question is a message that asks for the addresses of a name, in which a
// backslash makes a dot part of a label.
func question(name string) []byte {
	b := []byte{0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0}
	for label := range strings.SplitSeq(strings.ReplaceAll(name, "\\.", "\x00"), ".") {
		label = strings.ReplaceAll(label, "\x00", ".")
		b = append(append(b, byte(len(label))), label...)
	}
	return append(b, 0, 0, 1, 0, 1)
}

// resolve asks for a name and connects at once to an address of it.
func resolve(a []string) error {
	c, err := net.Dial("udp4", "10.9.0.53:53")
	if err != nil {
		return void(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return void(err)
	}
	if _, err := c.Write(question(a[0])); err != nil {
		return void(err)
	}
	if _, err := c.Read(make([]byte, 4096)); err != nil {
		return void(err)
	}
	return connect("udp4", a[1])
}

// unasked gets an answer that it never asked for: to a port from which it spoke
// to the server of something else.
func unasked(a []string) error {
	c, err := net.Dial("udp4", "10.9.0.53:53")
	if err != nil {
		return void(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return void(err)
	}
	if _, err := c.Write([]byte("unasked")); err != nil {
		return void(err)
	}
	if _, err := c.Read(make([]byte, 4096)); err != nil {
		return void(err)
	}
	return connect("udp4", a[0])
}
