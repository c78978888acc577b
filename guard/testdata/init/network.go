package main

import (
	"encoding/binary"
	"fmt"
	"net"
	"strings"
	"syscall"
	"unsafe"
)

// network is the world beyond this machine: 10.9.0.0/24, where 10.9.0.53 knows
// names. Whatever else is sent there is lost.
func network() error {
	// Not by package os: what it waits with would know the device as it is
	// before it has an interface, and hear of no packet.
	f, err := syscall.Open("/dev/net/tun", syscall.O_RDWR|syscall.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /dev/net/tun: %w", err)
	}
	const setIff, tun, noInfo = 0x400454ca, 1, 0x1000
	var req [40]byte
	copy(req[:], "tun0")
	binary.LittleEndian.PutUint16(req[16:], tun|noInfo)
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(f), setIff, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return errno
	}
	s, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(s)
	for _, set := range []struct {
		what uintptr
		addr string
	}{{syscall.SIOCSIFADDR, "10.9.0.1"}, {syscall.SIOCSIFNETMASK, "255.255.255.0"}, {syscall.SIOCSIFFLAGS, ""}} {
		clear(req[16:])
		if set.addr == "" {
			req[16] = syscall.IFF_UP | syscall.IFF_RUNNING
		} else {
			req[16] = syscall.AF_INET
			copy(req[20:], net.ParseIP(set.addr).To4())
		}
		if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(s), set.what, uintptr(unsafe.Pointer(&req))); errno != 0 {
			return fmt.Errorf("set %x: %w", set.what, errno)
		}
	}
	go func() {
		packet := make([]byte, 4096)
		for {
			n, err := syscall.Read(f, packet)
			if err == syscall.EINTR || err == syscall.EAGAIN {
				continue
			}
			if err != nil {
				fmt.Println("the world ended:", err)
				return
			}
			if reply := answer(packet[:n]); reply != nil {
				if _, err := syscall.Write(f, reply); err != nil {
					fmt.Println("an answer is lost:", err)
				}
			}
		}
	}()
	return nil
}

// answer answers a question for a name, and nothing else.
func answer(p []byte) []byte {
	const head, udp = 20, 17
	be := binary.BigEndian
	if len(p) < head+8+1 || p[0] != 0x45 || p[9] != udp || be.Uint16(p[head+2:]) != 53 {
		return nil
	}
	m := p[head+8:]
	var reply []byte
	if string(m) == "unasked" {
		reply = []byte{0x77, 0x77, 0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0}
		reply = append(reply, "\x03api\x07example\x00\x00\x01\x00\x01"...)
		reply = append(reply, 0xc0, 0x0c, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 10, 9, 0, 84)
	} else {
		if len(m) < 12+5 {
			return nil
		}
		name, addrs := strings.ToLower(string(m[12:len(m)-4])), [][4]byte{}
		switch {
		case strings.HasPrefix(name, "\x03api"):
			addrs = append(addrs, [4]byte{10, 9, 0, 80})
		case strings.HasPrefix(name, "\x04evil"):
			addrs = append(addrs, [4]byte{10, 9, 0, 66})
		case strings.HasPrefix(name, "\x04wild"):
			addrs = append(addrs, [4]byte{10, 9, 0, 82})
		case strings.HasPrefix(name, "\x04meta"):
			addrs = append(addrs, [4]byte{169, 254, 169, 254})
		case strings.HasPrefix(name, "\x03big"):
			for i := range byte(60) {
				addrs = append(addrs, [4]byte{10, 9, 0, 160 + i})
			}
		case strings.HasPrefix(name, "\x01a\x01b"):
			addrs = append(addrs, [4]byte{10, 9, 0, 81})
		default:
			addrs = append(addrs, [4]byte{10, 9, 0, 83})
		}
		reply = append(reply, m...)
		reply[2], reply[3], reply[7] = 0x81, 0x80, byte(len(addrs))
		for _, a := range addrs {
			reply = append(append(reply, 0xc0, 0x0c, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4), a[:]...)
		}
	}
	out := make([]byte, head+8, head+8+len(reply))
	copy(out, p[:head])
	copy(out[12:], p[16:20])
	copy(out[16:], p[12:16])
	be.PutUint16(out[2:], uint16(head+8+len(reply)))
	be.PutUint16(out[10:], 0)
	sum := uint32(0)
	for i := 0; i < head; i += 2 {
		sum += uint32(be.Uint16(out[i:]))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	be.PutUint16(out[10:], ^uint16(sum))
	copy(out[head:], []byte{0, 53, p[head], p[head+1]})
	be.PutUint16(out[head+4:], uint16(8+len(reply)))
	return append(out, reply...)
}
