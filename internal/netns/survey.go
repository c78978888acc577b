package netns

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// unbridgeable names kinds of links that carry no frames of a second hardware
// address, or none at all.
var unbridgeable = map[string]string{
	"ipvlan": "it shares the hardware address of its parent",
	"netkit": "it carries no hardware addresses",
	"bridge": "a bridge cannot be a port of another",
}

// survey reads what the namespace of the calling thread has, without what Join
// made. It is fresh if Join made nothing yet.
func survey() (j *Joined, fresh bool, err error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, false, fmt.Errorf("list links: %w", err)
	}
	slices.SortFunc(links, func(a, b netlink.Link) int { return cmp.Compare(a.Attrs().Index, b.Attrs().Index) })
	j, fresh = &Joined{}, true
	names := map[int]string{}
	for _, l := range links {
		if ours(l.Attrs().Name) {
			fresh = false
			continue
		}
		v, ok, err := linkOf(l)
		if err != nil {
			return nil, fresh, fmt.Errorf("link %s: %w", l.Attrs().Name, err)
		}
		if ok {
			names[l.Attrs().Index] = v.Name
			j.Links = append(j.Links, v)
		}
	}
	if j.Routes, err = routes(names); err != nil {
		return nil, fresh, err
	}
	j.Neighbours, err = neighbours(names)
	return j, fresh, err
}

// linkOf reads one link; ok is false for one that no guest needs.
func linkOf(l netlink.Link) (v Link, ok bool, err error) {
	a := l.Attrs()
	if a.Flags&net.FlagLoopback != 0 {
		return v, false, nil
	}
	v = Link{Name: a.Name, MAC: a.HardwareAddr, MTU: a.MTU}
	if v.Addresses, err = addresses(l); err != nil {
		return v, false, err
	}
	if len(v.Addresses) == 0 && a.Flags&net.FlagUp == 0 {
		return v, false, nil // a tunnel that the kernel puts into every namespace
	}
	if why := unbridgeable[l.Type()]; why != "" {
		return v, false, fmt.Errorf("kind %s: %s", l.Type(), why)
	}
	if a.EncapType != "ether" || len(a.HardwareAddr) != 6 {
		return v, false, fmt.Errorf("it is not Ethernet but %s", a.EncapType)
	}
	off, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + a.Name + "/disable_ipv6")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return v, false, err
	}
	v.NoIPv6 = err != nil || strings.TrimSpace(string(off)) == "1"
	return v, true, nil
}

// addresses lists those of a link, but for the link-local one that the guest
// makes itself of the same hardware address.
func addresses(l netlink.Link) (list []netip.Prefix, err error) {
	all, err := netlink.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range all {
		p, ok := prefixOf(a.IPNet)
		if !ok || p.Addr() == linkLocal(l.Attrs().HardwareAddr) {
			continue
		}
		if a.Flags&unix.IFA_F_DADFAILED != 0 {
			return nil, fmt.Errorf("address %s is taken by another host", p)
		}
		if a.Peer != nil && !a.Peer.IP.Equal(a.IP) { // its route says the rest
			p = netip.PrefixFrom(p.Addr(), p.Addr().BitLen())
		}
		list = append(list, p)
	}
	return list, nil
}

// routes lists the main tables, what needs no gateway first, as a guest must
// add them. What the tables below main say would be lost on it, so such a
// namespace is refused.
func routes(names map[int]string) (list []Route, err error) {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rules, err := netlink.RuleList(family)
		if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
			return nil, fmt.Errorf("list rules: %w", err)
		}
		for _, r := range rules {
			if r.Table != unix.RT_TABLE_LOCAL && r.Table != unix.RT_TABLE_MAIN && r.Table != unix.RT_TABLE_DEFAULT {
				return nil, fmt.Errorf("rule %q: routing by rules is not supported", r)
			}
		}
		all, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range all {
			v, ok, err := routeOf(r, family, names)
			if err != nil {
				return nil, fmt.Errorf("route %q: %w", r, err)
			}
			if ok {
				list = append(list, v)
			}
		}
	}
	slices.SortStableFunc(list, func(a, b Route) int {
		return cmp.Compare(btoi(a.Gateway.IsValid()), btoi(b.Gateway.IsValid()))
	})
	return list, nil
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// routeOf reads one route; ok is false for one that is not the guest's.
func routeOf(r netlink.Route, family int, names map[int]string) (v Route, ok bool, err error) {
	v = Route{Type: r.Type, Scope: int(r.Scope), Metric: r.Priority, MTU: r.MTU, OnLink: r.Flags&int(netlink.FLAG_ONLINK) != 0}
	if v.To, ok = prefixOf(r.Dst); !ok {
		v.To = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if family == netlink.FAMILY_V6 {
			v.To = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
	}
	if v.To.Addr().IsLinkLocalUnicast() && r.Protocol == unix.RTPROT_KERNEL && family == netlink.FAMILY_V6 {
		return v, false, nil // the guest's kernel makes it too
	}
	v.Gateway, _ = netip.AddrFromSlice(r.Gw)
	v.Source, _ = netip.AddrFromSlice(r.Src)
	if family == netlink.FAMILY_V4 {
		v.Gateway, v.Source = v.Gateway.Unmap(), v.Source.Unmap()
	}
	switch {
	case len(r.MultiPath) > 0:
		return v, false, errors.New("more than one next hop is not supported")
	case r.Encap != nil || r.Via != nil:
		return v, false, errors.New("neither encapsulation nor a next hop of another family is supported")
	case r.Type == unix.RTN_BLACKHOLE, r.Type == unix.RTN_UNREACHABLE, r.Type == unix.RTN_PROHIBIT:
		return v, true, nil
	case r.Type != unix.RTN_UNICAST:
		return v, false, nil
	}
	v.Link, ok = names[r.LinkIndex]
	return v, ok, nil
}

func neighbours(names map[int]string) (list []Neighbour, err error) {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		all, err := netlink.NeighList(0, family)
		if err != nil {
			return nil, fmt.Errorf("list neighbours: %w", err)
		}
		for _, n := range all {
			ip, ok := netip.AddrFromSlice(n.IP)
			if name := names[n.LinkIndex]; ok && name != "" && n.State&netlink.NUD_PERMANENT != 0 && len(n.HardwareAddr) == 6 {
				list = append(list, Neighbour{name, ip.Unmap(), n.HardwareAddr})
			}
		}
	}
	return list, nil
}

func prefixOf(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	bits, size := n.Mask.Size()
	if ok && size == 32 {
		a = a.Unmap()
	}
	return netip.PrefixFrom(a, bits), ok && size == a.BitLen()
}

// linkLocal is the address that IPv6 makes of a hardware address.
func linkLocal(mac net.HardwareAddr) netip.Addr {
	if len(mac) != 6 {
		return netip.Addr{}
	}
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: mac[0] ^ 2, 9: mac[1], 10: mac[2], 11: 0xff, 12: 0xfe, 13: mac[3], 14: mac[4], 15: mac[5]})
}
