package guest_test

import (
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"hauberk.dev/api/guestproto"
)

// nicMAC is what the machine of these tests gives its network device.
var nicMAC = [6]byte{0x52, 0x54, 0, 0x12, 0x34, 0x56}

func ip(s string) guestproto.IP { return guestproto.IPOf(netip.MustParseAddr(s).AsSlice()) }

func prefix(s string) guestproto.Prefix {
	p := netip.MustParsePrefix(s)
	return guestproto.Prefix{IP: guestproto.IPOf(p.Addr().AsSlice()), Bits: uint8(p.Bits())}
}

// testNetwork gives the one device another name, hardware address and stack,
// reads it back, and gives it the first ones again.
func testNetwork(t *testing.T, g *guest) {
	const name = "net1"
	want := guestproto.Network{
		Interfaces: []guestproto.Interface{{
			Device: nicMAC, Name: name, MAC: [6]byte{2, 0, 0, 0, 0, 7}, MTU: 1420, LocalNet: true,
			Addresses: []guestproto.Address{{Prefix: prefix("10.77.0.5/24"), NoRoute: true}, {Prefix: prefix("fd77::5/64")}},
		}},
		Routes: []guestproto.Route{
			{Kind: guestproto.RouteUnicast, Interface: name, Destination: prefix("10.77.0.0/24"), Source: ip("10.77.0.5"), Scope: 253, Metric: 9},
			{Kind: guestproto.RouteUnicast, Interface: name, Destination: prefix("0.0.0.0/0"), Gateway: ip("10.77.0.1"), MTU: 1300},
			{Kind: guestproto.RouteUnicast, Interface: name, Destination: prefix("::/0"), Gateway: ip("fe80::1"), Metric: 50},
			{Kind: guestproto.RouteBlackhole, Destination: prefix("192.0.2.0/24")},
		},
		Neighbours: []guestproto.Neighbour{{Interface: name, IP: ip("10.77.0.1"), MAC: [6]byte{2, 0, 0, 0, 0, 1}}},
	}
	for range 2 { // the second time changes nothing
		if err := g.c.Network(g.ctx(), want); err != nil {
			t.Fatal(err)
		}
	}
	own := guestproto.Address{Prefix: prefix("fe80::ff:fe00:7/64")} // given by the kernel, which then says so to the network
	var state guestproto.InterfaceState
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		list, err := g.c.Interfaces(g.ctx())
		if err != nil || len(list) != 1 {
			t.Fatalf("interfaces %+v, %v; want one", list, err)
		}
		if state = list[0]; slices.Contains(state.Addresses, own) && state.Sent.Packets > 0 || time.Now().After(end) {
			break
		}
	}
	if state.Name != name || state.MAC != want.Interfaces[0].MAC || state.MTU != 1420 || !state.Up || state.Sent.Packets == 0 {
		t.Errorf("interface %+v", state)
	}
	for _, a := range append(want.Interfaces[0].Addresses, own) {
		if !slices.Contains(state.Addresses, a) {
			t.Errorf("address %v is not among %v", a, state.Addresses)
		}
	}
	routes, err := g.c.Routes(g.ctx())
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range want.Routes {
		if !slices.ContainsFunc(routes, func(have guestproto.Route) bool { return reflect.DeepEqual(have, r) }) {
			t.Errorf("route %+v is not among %+v", r, routes)
		}
	}
	g.wants("ip neigh | grep -o 'lladdr.*01 \\|PERMANENT'", "lladdr 02:00:00:00:00:01", "PERMANENT")
	g.wants("cat /proc/sys/net/ipv4/conf/net1/route_localnet /proc/sys/net/ipv6/conf/net1/accept_ra", "1", "0")
	g.wants("ip -6 addr show dev net1 | grep -c tentative", "0")

	if err := g.c.Network(g.ctx(), guestproto.SoleInterface(nicMAC, nicMAC, [4]byte{10, 88, 1, 2}, [4]byte{169, 254, 1, 1}, 1400)); err != nil {
		t.Fatal(err)
	}
	g.wants("ip addr show dev eth0 | grep -o 'link/ether [^ ]*'", "link/ether 52:54:00:12:34:56")
	g.wants("ip -6 addr show dev eth0 | wc -l; cat /proc/sys/net/ipv4/conf/eth0/route_localnet", "0", "0")
}
