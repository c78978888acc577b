package alone

import (
	"encoding/binary"
	"net"
	"net/netip"
	"syscall"
)

// Layout of the control message that tells where a datagram came to: a cmsghdr, and
// in it an in_pktinfo (index, address of ours, address in the header) or an
// in6_pktinfo (address, index). The kernel takes the same to say where one leaves from.
const (
	controlHead = syscall.SizeofCmsghdr
	sizeInfo4   = 12
	sizeInfo6   = 20
	maxControl  = controlHead + (sizeInfo6+7)&^7
)

// tellDestination has the kernel tell of each datagram which address it came to.
func tellDestination(c *net.UDPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var fault error
	err = raw.Control(func(fd uintptr) {
		var own syscall.Sockaddr
		if own, fault = syscall.Getsockname(int(fd)); fault != nil {
			return
		}
		if _, six := own.(*syscall.SockaddrInet6); six { // which takes IPv4 too, in its words
			fault = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IPV6, syscall.IPV6_RECVPKTINFO, 1)
		} else {
			fault = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IP, syscall.IP_PKTINFO, 1)
		}
	})
	if err != nil {
		return err
	}
	return fault
}

// destination is the address of ours that a control message tells, none if it tells
// none that an answer may leave from. It makes the message one for the answer: by
// whatever interface leads to the client.
func destination(control []byte) (to netip.Addr) {
	if len(control) < controlHead+sizeInfo4 {
		return to
	}
	level, kind := binary.NativeEndian.Uint32(control[controlHead-8:]), binary.NativeEndian.Uint32(control[controlHead-4:])
	info := control[controlHead:]
	switch {
	case level == syscall.IPPROTO_IP && kind == syscall.IP_PKTINFO:
		to = netip.AddrFrom4([4]byte(info[4:8]))
		clear(info[:4])
	case level == syscall.IPPROTO_IPV6 && kind == syscall.IPV6_PKTINFO && len(info) >= sizeInfo6:
		to = netip.AddrFrom16([16]byte(info[:16]))
		if !to.IsLinkLocalUnicast() { // which is of one interface
			clear(info[16:20])
		}
	}
	if to.IsMulticast() {
		return netip.Addr{}
	}
	return to
}
