package guest

import (
	"syscall"

	"hauberk.dev/api/guestproto"
)

// Attributes of the kernel's answers that package syscall lacks.
const (
	linkStats = 23 // IFLA_STATS64
	linkBorn  = 54 // IFLA_PERM_ADDRESS
	routeTab  = 15 // RTA_TABLE
	cloned    = 0x200
)

// interfaces appends what every interface but lo is and carried.
func (a *agent) interfaces() error {
	n, err := openNetlink()
	if err != nil {
		return err
	}
	defer syscall.Close(n.fd)
	links := n.links()
	n.addresses(links)
	if n.err != nil {
		return n.err
	}
	list := make([]guestproto.InterfaceState, 0, guestproto.MaxInterfaces)
	for i := range links {
		s := &links[i].state
		if links[i].index != loopback && len(list) < cap(list) && guestproto.ValidInterface(s.Name) {
			list = append(list, *s)
		}
	}
	a.tx = guestproto.AppendInterfaces(a.tx, list)
	return nil
}

// routes appends the main tables of IPv4 and IPv6.
func (a *agent) routes() error {
	n, err := openNetlink()
	if err != nil {
		return err
	}
	defer syscall.Close(n.fd)
	links := n.links()
	var list []guestproto.Route
	n.dump("list routes", syscall.RTM_GETROUTE, make([]byte, syscall.SizeofRtMsg), func(b []byte) {
		if r, ok := readRoute(links, b); ok && len(list) < guestproto.MaxRoutes {
			list = append(list, r)
		}
	})
	if n.err != nil {
		return n.err
	}
	a.tx = guestproto.AppendRoutes(a.tx, list)
	return nil
}

// links lists the interfaces, without their addresses.
func (n *netlink) links() (list []link) {
	n.dump("list interfaces", syscall.RTM_GETLINK, make([]byte, syscall.SizeofIfInfomsg), func(b []byte) {
		if len(b) < syscall.SizeofIfInfomsg {
			return
		}
		l := link{index: get32(b[4:]), flags: get32(b[8:])}
		born := false
		eachAttribute(b[syscall.SizeofIfInfomsg:], func(kind uint16, v []byte) {
			switch {
			case kind == syscall.IFLA_IFNAME && len(v) > 0:
				l.state.Name = string(v[:len(v)-1])
			case kind == syscall.IFLA_ADDRESS && len(v) == 6:
				l.state.MAC = [6]byte(v)
			case kind == linkBorn && len(v) == 6:
				l.born, born = [6]byte(v), true
			case kind == syscall.IFLA_MTU && len(v) == 4:
				l.state.MTU = get32(v)
			case kind == linkStats && len(v) >= 8*8:
				l.state.Received = guestproto.Traffic{Bytes: get64(v[16:]), Packets: get64(v), Errors: get64(v[32:]), Dropped: get64(v[48:])}
				l.state.Sent = guestproto.Traffic{Bytes: get64(v[24:]), Packets: get64(v[8:]), Errors: get64(v[40:]), Dropped: get64(v[56:])}
			}
		})
		if !born {
			l.born = l.state.MAC
		}
		l.state.Up = l.flags&isUp != 0
		list = append(list, l)
	})
	return list
}

// addresses adds to links the addresses they have.
func (n *netlink) addresses(links []link) {
	n.dump("list addresses", syscall.RTM_GETADDR, make([]byte, syscall.SizeofIfAddrmsg), func(b []byte) {
		if len(b) < syscall.SizeofIfAddrmsg {
			return
		}
		var local, address guestproto.IP
		var flags uint32
		eachAttribute(b[syscall.SizeofIfAddrmsg:], func(kind uint16, v []byte) {
			switch {
			case kind == syscall.IFA_LOCAL:
				local = guestproto.IPOf(v)
			case kind == syscall.IFA_ADDRESS:
				address = guestproto.IPOf(v)
			case kind == addrFlags && len(v) == 4:
				flags = get32(v)
			}
		})
		if local.Length == 0 {
			local = address
		}
		if b[1] > local.Length*8 || local.Length == 0 {
			return
		}
		for i := range links {
			s := &links[i].state
			if links[i].index == get32(b[4:]) && len(s.Addresses) < guestproto.MaxAddresses {
				s.Addresses = append(s.Addresses, guestproto.Address{
					Prefix: guestproto.Prefix{IP: local, Bits: b[1]}, NoRoute: flags&noRoute != 0})
			}
		}
	})
}

// readRoute reads one entry of a dump; ok is false for what is not in the main
// table or has more than one way.
func readRoute(links []link, b []byte) (r guestproto.Route, ok bool) {
	if len(b) < syscall.SizeofRtMsg || get32(b[8:])&cloned != 0 {
		return r, false
	}
	r.Kind, r.Scope, r.OnLink = guestproto.RouteKind(b[7]), b[6], get32(b[8:])&onLink != 0
	table := uint32(b[4])
	size := 4
	if b[0] == syscall.AF_INET6 {
		size = 16
	}
	r.Destination = guestproto.Prefix{IP: guestproto.IPOf(make([]byte, size)), Bits: b[1]}
	eachAttribute(b[syscall.SizeofRtMsg:], func(kind uint16, v []byte) {
		switch {
		case kind == syscall.RTA_DST && len(v) == size:
			r.Destination.IP = guestproto.IPOf(v)
		case kind == syscall.RTA_GATEWAY && len(v) == size:
			r.Gateway = guestproto.IPOf(v)
		case kind == syscall.RTA_PREFSRC && len(v) == size:
			r.Source = guestproto.IPOf(v)
		case kind == syscall.RTA_PRIORITY && len(v) == 4:
			r.Metric = get32(v)
		case kind == syscall.RTA_METRICS:
			eachAttribute(v, func(kind uint16, v []byte) {
				if kind == mtuMetric && len(v) == 4 {
					r.MTU = get32(v)
				}
			})
		case kind == routeTab && len(v) == 4:
			table = get32(v)
		case kind == syscall.RTA_OIF && len(v) == 4:
			for i := range links {
				if links[i].index == get32(v) {
					r.Interface = links[i].state.Name
				}
			}
		}
	})
	switch r.Kind {
	case guestproto.RouteUnicast:
		ok = guestproto.ValidInterface(r.Interface)
	case guestproto.RouteBlackhole, guestproto.RouteUnreachable, guestproto.RouteProhibit:
		r.Interface, ok = "", true
	}
	return r, ok && table == mainTable && int(r.Destination.Bits) <= size*8 && (b[0] == syscall.AF_INET || b[0] == syscall.AF_INET6)
}

// dump asks for a list and calls each for the body of every entry.
func (n *netlink) dump(what string, kind uint16, body []byte, each func(b []byte)) {
	if n.err != nil {
		return
	}
	err := n.send(kind, syscall.NLM_F_DUMP, body)
	buf := make([]byte, 32<<10)
	for done := false; err == nil && !done; {
		var got int
		if got, _, err = syscall.Recvfrom(n.fd, buf, 0); err == nil {
			done, err = n.entries(buf[:got], each)
		}
	}
	if err != nil {
		n.err = fail(what, "by netlink", err)
	}
}

// entries reads one datagram of a dump and says whether it was the last.
func (n *netlink) entries(b []byte, each func(b []byte)) (done bool, err error) {
	for len(b) >= syscall.NLMSG_HDRLEN {
		size := int(get32(b))
		if size < syscall.NLMSG_HDRLEN || size > len(b) {
			return false, syscall.EBADMSG
		}
		kind, body := uint16(b[4])|uint16(b[5])<<8, b[syscall.NLMSG_HDRLEN:size]
		if get32(b[8:]) == n.seq {
			switch kind {
			case syscall.NLMSG_DONE:
				return true, nil
			case syscall.NLMSG_ERROR:
				if len(body) < 4 {
					return false, syscall.EBADMSG
				}
				return true, answered(body)
			}
			each(body)
		}
		b = b[min(len(b), (size+3)&^3):]
	}
	return false, nil
}

func eachAttribute(b []byte, f func(kind uint16, v []byte)) {
	for len(b) >= 4 {
		size := int(b[0]) | int(b[1])<<8
		if size < 4 || size > len(b) {
			return
		}
		f(uint16(b[2])|uint16(b[3])<<8, b[4:size])
		b = b[min(len(b), (size+3)&^3):]
	}
}

func get64(b []byte) uint64 { return uint64(get32(b)) | uint64(get32(b[4:]))<<32 }
