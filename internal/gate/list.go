package gate

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
)

// Destination is where a guest may go: any place, a network or a name, at one
// port or at all of them.
type Destination struct {
	Any    bool
	Prefix netip.Prefix
	Name   string // lower case, without a dot at its end
	Port   uint16 // 0: every port
}

var nameRE = regexp.MustCompile(`^(\*\.)?[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*$`)

// ParseDestination reads any, ADDRESS, ADDRESS/BITS or NAME, each with :PORT
// if need be; an IPv6 address with a port is in brackets. *.NAME is
// everything below a name.
func ParseDestination(s string) (d Destination, err error) {
	host, port := s, ""
	if a, err := netip.ParseAddr(s); err == nil && a.Is6() {
		host = s // its colons are its own
	} else if i := strings.LastIndexByte(s, ':'); i >= 0 {
		host, port = s[:i], s[i+1:]
		if d.Port, err = parsePort(port); err != nil {
			return Destination{}, fmt.Errorf("destination %q: %w", s, err)
		}
		if strings.HasPrefix(host, "[") && strings.HasSuffix(host, "]") {
			host = host[1 : len(host)-1]
		}
	}
	if d.Any = host == "any"; d.Any {
		return d, nil
	}
	if a, err := netip.ParseAddr(host); err == nil && a.Zone() == "" {
		a = a.Unmap()
		d.Prefix = netip.PrefixFrom(a, a.BitLen())
		return d, nil
	}
	if p, err := netip.ParsePrefix(host); err == nil {
		if p != p.Masked() {
			return Destination{}, fmt.Errorf("destination %q: the network is %s", s, p.Masked())
		}
		d.Prefix = p
		return d, nil
	}
	d.Name = strings.ToLower(strings.TrimSuffix(host, "."))
	if d.Name == "any" { // what a program writes again must mean the same
		return Destination{}, fmt.Errorf("destination %q: a machine of that name cannot be told from any: write any, or its address", s)
	}
	if !nameRE.MatchString(d.Name) || len(d.Name) > 253 || strings.Trim(d.Name, "0123456789.") == "" {
		return Destination{}, fmt.Errorf("destination %q: want any, ADDRESS, ADDRESS/BITS or NAME, each with :PORT if need be", s)
	}
	return d, nil
}

func (d Destination) String() string {
	host := d.Name
	switch {
	case d.Any:
		host = "any"
	case d.Prefix.IsValid() && d.Prefix.IsSingleIP():
		host = d.Prefix.Addr().String()
	case d.Prefix.IsValid():
		host = d.Prefix.String()
	}
	if d.Port == 0 {
		return host
	}
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	return host + ":" + strconv.Itoa(int(d.Port))
}

// address says whether d allows an address by itself, without a name.
func (d Destination) address(to netip.AddrPort) bool {
	if d.Port != 0 && d.Port != to.Port() {
		return false
	}
	a := to.Addr()
	if d.Any {
		// What only this machine and its link can reach is on no list unless it
		// is named: its own services, and a cloud's metadata.
		return !a.IsLoopback() && !a.IsLinkLocalUnicast() && !a.IsMulticast() && !a.IsUnspecified()
	}
	return d.Prefix.IsValid() && d.Prefix.Contains(a)
}

// named says whether d allows a name, at whatever port.
func (d Destination) named(name string) bool {
	if below, ok := strings.CutPrefix(d.Name, "*"); ok {
		return strings.HasSuffix(name, below)
	}
	return d.Any || d.Name != "" && d.Name == name
}

// Publication is a port of this machine that leads into the guest.
type Publication struct {
	Host  netip.AddrPort // port 0: any that is free
	Guest uint16
	UDP   bool
}

// ParsePublication reads [ADDRESS:]PORT:PORT[/tcp|/udp], first this machine's and
// then the guest's. Without an address it is 127.0.0.1.
func ParsePublication(s string) (p Publication, err error) {
	rest, protocol, _ := strings.Cut(s, "/")
	switch protocol {
	case "udp":
		p.UDP = true
	case "tcp":
	case "":
		if rest != s {
			return Publication{}, fmt.Errorf("publish %q: no protocol is named", s)
		}
	default:
		return Publication{}, fmt.Errorf("publish %q: protocol %q is neither tcp nor udp", s, protocol)
	}
	wrong := fmt.Errorf("publish %q: want [ADDRESS:]PORT:PORT[/udp]", s)
	i := strings.LastIndexByte(rest, ':')
	if i < 0 {
		return Publication{}, wrong
	}
	if p.Guest, err = parsePort(rest[i+1:]); err != nil {
		return Publication{}, fmt.Errorf("publish %q: %w", s, err)
	}
	host := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	port := rest[:i]
	if j := strings.LastIndexByte(port, ':'); j >= 0 {
		address := strings.TrimSuffix(strings.TrimPrefix(port[:j], "["), "]")
		if host, err = netip.ParseAddr(address); err != nil || strings.Contains(address, ":") != strings.HasPrefix(port, "[") {
			return Publication{}, wrong
		}
		port = port[j+1:]
	}
	n := uint16(0)
	if port != "0" {
		if n, err = parsePort(port); err != nil {
			return Publication{}, fmt.Errorf("publish %q: %w", s, err)
		}
	}
	p.Host = netip.AddrPortFrom(host, n)
	return p, nil
}

func (p Publication) String() string {
	s := p.Host.String() + ":" + strconv.Itoa(int(p.Guest))
	if p.UDP {
		s += "/udp"
	}
	return s
}

// Answers are the guest's ports that netns.CreateHand must let answer.
func Answers(list []Publication) (ports []uint16) {
	for _, p := range list {
		if p.UDP {
			ports = append(ports, p.Guest)
		}
	}
	return ports
}

func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 || s[0] == '+' {
		return 0, errors.New(strconv.Quote(s) + " is no port")
	}
	return uint16(n), nil
}
