package guestproto

const (
	// MaxInterfaces is how many interfaces a guest is given, and how many one
	// reply lists.
	MaxInterfaces = 32
	// MaxAddresses is the most addresses of one interface.
	MaxAddresses = 64
	// MaxRoutes is the most routes, and the most neighbours, of a guest.
	MaxRoutes = 512
	// MaxInterfaceName is the longest name the kernel gives an interface.
	MaxInterfaceName = 15
)

// ValidInterface says whether an interface may have the name here. The kernel
// takes a few more, which nobody wants in a path or on a terminal.
func ValidInterface(name string) bool {
	ok := name != "" && len(name) <= MaxInterfaceName && name != "." && name != ".."
	for i := range len(name) {
		ok = ok && name[i] > ' ' && name[i] < 0x7f && name[i] != '/' && name[i] != ':'
	}
	return ok
}

// IP is an IPv4 or an IPv6 address, or none.
type IP struct {
	Bytes  [16]byte // the first Length of them
	Length uint8    // 0, 4 or 16
}

// IPOf makes an IP of four or sixteen bytes, in the order of the network; of
// any other number it makes none.
func IPOf(b []byte) (a IP) {
	if len(b) == 4 || len(b) == 16 {
		a.Length = uint8(copy(a.Bytes[:], b))
	}
	return a
}

// Slice is the address' bytes, none if it is none.
func (a *IP) Slice() []byte { return a.Bytes[:a.Length] }

// Prefix is an address and how many of its bits name its network.
type Prefix struct {
	IP   IP
	Bits uint8
}

// Interface is one network interface of a sandbox. Everything in it is static:
// no address is asked for, learned or probed for.
type Interface struct {
	// Device is the hardware address that the machine gave the device, by which
	// the guest finds it, whatever it was changed to since.
	Device [6]byte
	Name   string
	MAC    [6]byte // to change to; zero: Device's own
	MTU    uint32  // 0: the device's own
	// NoIPv6 turns IPv6 off, link-local addresses included.
	NoIPv6 bool
	// LocalNet lets the other end of the link reach 127.0.0.0/8 of the guest. It
	// must keep everybody else from doing so.
	LocalNet  bool
	Addresses []Address
}

// Address is one address of an interface.
type Address struct {
	Prefix
	// NoRoute keeps the kernel from adding the route to the prefix.
	NoRoute bool
}

// RouteKind says what becomes of a packet; the numbers are the kernel's.
type RouteKind uint8

// The kinds of routes.
const (
	RouteUnicast     RouteKind = 1
	RouteBlackhole   RouteKind = 6
	RouteUnreachable RouteKind = 7
	RouteProhibit    RouteKind = 8
)

// Route is an entry of the main routing table.
type Route struct {
	Kind        RouteKind
	Interface   string // by name; none unless RouteUnicast
	Destination Prefix // of all bits zero: everything of that family
	Gateway     IP     // none: on the link
	Source      IP     // preferred
	Scope       uint8  // as the kernel numbers them; 0 is global
	Metric      uint32
	MTU         uint32 // 0: the link's
	// OnLink says that the gateway is on the link, whatever the addresses say.
	OnLink bool
}

// Neighbour is the hardware address of a host on the link, for good.
type Neighbour struct {
	Interface string
	IP        IP
	MAC       [6]byte
}

// Network is all the network of a sandbox: loopback, which is always brought
// up, and what is named here. It can be given again; what is there then is
// replaced, and what is not named stays. Routes are added in their order.
type Network struct {
	Interfaces []Interface
	Routes     []Route
	Neighbours []Neighbour
}

// SoleInterface is the network of a sandbox that has one IPv4 address, nothing
// else on its link, and a gateway that is there all the same. The device gets
// the hardware address mac.
func SoleInterface(device, mac [6]byte, address, gateway [4]byte, mtu uint32) Network {
	const name, linkScope = "eth0", 253
	to, every := IPOf(gateway[:]), IPOf([]byte{0, 0, 0, 0})
	return Network{
		Interfaces: []Interface{{Device: device, MAC: mac, Name: name, MTU: mtu, NoIPv6: true,
			Addresses: []Address{{Prefix: Prefix{IPOf(address[:]), 32}}}}},
		Routes: []Route{
			{Kind: RouteUnicast, Interface: name, Destination: Prefix{to, 32}, Scope: linkScope},
			{Kind: RouteUnicast, Interface: name, Destination: Prefix{every, 0}, Gateway: to, OnLink: true},
		},
	}
}

// Append appends the payload to b.
func (m *Network) Append(b []byte) []byte {
	b = appendU16(b, uint16(len(m.Interfaces)))
	for i := range m.Interfaces {
		f := &m.Interfaces[i]
		b = append(b, f.Device[:]...)
		b = append(appendString(b, f.Name), f.MAC[:]...)
		b = appendBool(appendBool(appendU32(b, f.MTU), f.NoIPv6), f.LocalNet)
		b = appendAddresses(b, f.Addresses)
	}
	b = AppendRoutes(b, m.Routes)
	b = appendU16(b, uint16(len(m.Neighbours)))
	for i := range m.Neighbours {
		n := &m.Neighbours[i]
		b = appendIP(appendString(b, n.Interface), n.IP)
		b = append(b, n.MAC[:]...)
	}
	return b
}

// ParseNetwork reads the payload of a network.
func ParseNetwork(b []byte) (m Network, err error) {
	r := reader{b: b}
	n := r.atMost(MaxInterfaces, 6+2+6+4+1+1+2, "interfaces")
	for range n {
		var f Interface
		copy(f.Device[:], r.take(6))
		f.Name = r.interfaceName()
		copy(f.MAC[:], r.take(6))
		f.MTU, f.NoIPv6, f.LocalNet = r.u32(), r.bool(), r.bool()
		f.Addresses = r.addresses()
		if f.MAC[0]&1 != 0 {
			r.fail("a hardware address is a group's")
		}
		m.Interfaces = append(m.Interfaces, f)
	}
	m.Routes = r.routes()
	n = r.atMost(MaxRoutes, 2+1+6, "neighbours")
	for range n {
		v := Neighbour{Interface: r.interfaceName(), IP: r.ip()}
		copy(v.MAC[:], r.take(6))
		if v.IP.Length == 0 {
			r.fail("a neighbour has no address")
		}
		m.Neighbours = append(m.Neighbours, v)
	}
	return m, r.end("network")
}

// InterfaceState is an interface as it is, with what it carried since it was
// made. Of an interface with more than MaxAddresses the rest is left out.
type InterfaceState struct {
	Name      string
	MAC       [6]byte
	MTU       uint32
	Up        bool
	Addresses []Address
	Received  Traffic
	Sent      Traffic
}

// Traffic counts one direction of an interface.
type Traffic struct{ Bytes, Packets, Errors, Dropped uint64 }

// AppendInterfaces appends the reply to interfaces to b.
func AppendInterfaces(b []byte, list []InterfaceState) []byte {
	b = appendU16(b, uint16(len(list)))
	for i := range list {
		s := &list[i]
		b = append(appendString(b, s.Name), s.MAC[:]...)
		b = appendBool(appendU32(b, s.MTU), s.Up)
		b = appendAddresses(b, s.Addresses)
		for _, t := range [...]*Traffic{&s.Received, &s.Sent} {
			b = appendU64(appendU64(b, t.Bytes), t.Packets)
			b = appendU64(appendU64(b, t.Errors), t.Dropped)
		}
	}
	return b
}

// ParseInterfaces reads the reply to interfaces.
func ParseInterfaces(b []byte) (list []InterfaceState, err error) {
	r := reader{b: b}
	for range r.atMost(MaxInterfaces, 2+6+4+1+2+64, "interfaces") {
		var s InterfaceState
		s.Name = r.interfaceName()
		copy(s.MAC[:], r.take(6))
		s.MTU, s.Up = r.u32(), r.bool()
		s.Addresses = r.addresses()
		for _, t := range [...]*Traffic{&s.Received, &s.Sent} {
			*t = Traffic{r.u64(), r.u64(), r.u64(), r.u64()}
		}
		list = append(list, s)
	}
	return list, r.end("interfaces reply")
}

// AppendRoutes appends the reply to routes to b.
func AppendRoutes(b []byte, list []Route) []byte {
	b = appendU16(b, uint16(len(list)))
	for i := range list {
		v := &list[i]
		b = appendString(append(b, byte(v.Kind)), v.Interface)
		b = append(appendIP(b, v.Destination.IP), v.Destination.Bits)
		b = append(appendIP(appendIP(b, v.Gateway), v.Source), v.Scope)
		b = appendBool(appendU32(appendU32(b, v.Metric), v.MTU), v.OnLink)
	}
	return b
}

// ParseRoutes reads the reply to routes.
func ParseRoutes(b []byte) (list []Route, err error) {
	r := reader{b: b}
	list = r.routes()
	return list, r.end("routes reply")
}

func (r *reader) routes() (list []Route) {
	for range r.atMost(MaxRoutes, 1+2+2+1+1+1+4+4+1, "routes") {
		v := Route{Kind: RouteKind(r.u8())}
		if v.Kind == RouteUnicast {
			v.Interface = r.interfaceName()
		} else if r.string() != "" {
			r.fail("a route that leads nowhere names an interface")
		}
		v.Destination = r.prefix()
		v.Gateway, v.Source = r.ip(), r.ip()
		v.Scope, v.Metric, v.MTU, v.OnLink = r.u8(), r.u32(), r.u32(), r.bool()
		for _, a := range [...]IP{v.Gateway, v.Source} {
			if a.Length != 0 && a.Length != v.Destination.IP.Length {
				r.fail("a route mixes IPv4 with IPv6")
			}
		}
		switch v.Kind {
		case RouteUnicast, RouteBlackhole, RouteUnreachable, RouteProhibit:
		default:
			r.fail("no such kind of route")
		}
		list = append(list, v)
	}
	return list
}

func appendAddresses(b []byte, list []Address) []byte {
	b = appendU16(b, uint16(len(list)))
	for i := range list {
		b = appendBool(append(appendIP(b, list[i].IP), list[i].Bits), list[i].NoRoute)
	}
	return b
}

func (r *reader) addresses() (list []Address) {
	for range r.atMost(MaxAddresses, 1+4+1+1, "addresses") {
		list = append(list, Address{r.prefix(), r.bool()})
	}
	return list
}

func appendIP(b []byte, a IP) []byte { return append(append(b, a.Length), a.Slice()...) }

func (r *reader) ip() (a IP) {
	switch n := r.u8(); n {
	case 0, 4, 16:
		a.Length = n
		copy(a.Bytes[:], r.take(int(n)))
	default:
		r.fail("an address has neither 4 nor 16 bytes")
	}
	return a
}

func (r *reader) prefix() (p Prefix) {
	p.IP, p.Bits = r.ip(), r.u8()
	if p.IP.Length == 0 {
		r.fail("a prefix has no address")
	}
	if p.Bits > p.IP.Length*8 {
		r.fail("a prefix is longer than its address")
	}
	return p
}

func (r *reader) interfaceName() string {
	s := r.string()
	if !ValidInterface(s) {
		r.fail("an interface has a name that is none")
		return ""
	}
	return s
}

// atMost reads the length of a list of at most limit entries of size bytes or
// more.
func (r *reader) atMost(limit, size int, what string) int {
	n := r.count(size)
	if n > limit {
		r.fail("more " + what + " than a guest has")
		return 0
	}
	return n
}
