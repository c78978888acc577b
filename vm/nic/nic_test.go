package nic

import (
	"net"
	"net/netip"
	"reflect"
	"testing"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/internal/netns"
)

func TestMessage(t *testing.T) {
	j := &netns.Joined{
		Links: []netns.Link{
			{Name: "eth0", MAC: net.HardwareAddr{2, 0, 0, 0, 0, 5}, MTU: 1400, LocalNet: true,
				Addresses: []netip.Prefix{netip.MustParsePrefix("10.1.0.5/24"), netip.MustParsePrefix("fd01::5/64")}},
			{Name: "net1", MAC: net.HardwareAddr{2, 0, 0, 0, 0, 6}, MTU: 1500, NoIPv6: true},
		},
		Routes: []netns.Route{
			{Type: 1, Link: "eth0", To: netip.MustParsePrefix("10.1.0.0/24"), Source: netip.MustParseAddr("10.1.0.5"), Scope: 253},
			{Type: 1, Link: "eth0", To: netip.MustParsePrefix("::/0"), Gateway: netip.MustParseAddr("fd01::1"), Metric: 1024, MTU: 1300, OnLink: true},
			{Type: 7, To: netip.MustParsePrefix("192.0.2.0/24")},
		},
		Neighbours: []netns.Neighbour{{Link: "eth0", IP: netip.MustParseAddr("10.1.0.1"), MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}}},
	}
	m, err := Message(j)
	if err != nil {
		t.Fatal(err)
	}
	four, six := guestproto.IPOf([]byte{10, 1, 0, 5}), guestproto.IPOf([]byte{0xfd, 1, 15: 5})
	want := guestproto.Network{
		Interfaces: []guestproto.Interface{
			{Device: guestproto.DeviceMAC(0), Name: "eth0", MAC: [6]byte{2, 0, 0, 0, 0, 5}, MTU: 1400, LocalNet: true, Addresses: []guestproto.Address{
				{Prefix: guestproto.Prefix{IP: four, Bits: 24}, NoRoute: true}, {Prefix: guestproto.Prefix{IP: six, Bits: 64}, NoRoute: true}}},
			{Device: guestproto.DeviceMAC(1), Name: "net1", MAC: [6]byte{2, 0, 0, 0, 0, 6}, MTU: 1500, NoIPv6: true},
		},
		Routes: []guestproto.Route{
			{Kind: guestproto.RouteUnicast, Interface: "eth0", Destination: guestproto.Prefix{IP: guestproto.IPOf([]byte{169, 254, 77, 1}), Bits: 32}, Scope: 253},
			{Kind: guestproto.RouteUnicast, Interface: "eth0", Destination: guestproto.Prefix{IP: guestproto.IPOf([]byte{10, 1, 0, 0}), Bits: 24}, Source: four, Scope: 253},
			{Kind: guestproto.RouteUnicast, Interface: "eth0", Destination: guestproto.Prefix{IP: guestproto.IPOf(make([]byte, 16))},
				Gateway: guestproto.IPOf([]byte{0xfd, 1, 15: 1}), Metric: 1024, MTU: 1300, OnLink: true},
			{Kind: guestproto.RouteUnreachable, Destination: guestproto.Prefix{IP: guestproto.IPOf([]byte{192, 0, 2, 0}), Bits: 24}},
		},
		Neighbours: []guestproto.Neighbour{
			{Interface: "eth0", IP: guestproto.IPOf([]byte{169, 254, 77, 1}), MAC: [6]byte(netns.HostEndMAC)},
			{Interface: "eth0", IP: guestproto.IPOf([]byte{10, 1, 0, 1}), MAC: [6]byte{2, 0, 0, 0, 0, 1}},
		},
	}
	if !reflect.DeepEqual(m, want) {
		t.Errorf("got  %+v\nwant %+v", m, want)
	}
	if again, err := guestproto.ParseNetwork(m.Append(nil)); err != nil || !reflect.DeepEqual(again, m) {
		t.Errorf("the agent reads %+v, %v", again, err)
	}
	j.Links = append(j.Links, j.Links...)
	j.Links = append(j.Links, j.Links...)
	if _, err := Message(j); err == nil {
		t.Error("more links than a guest has devices")
	}
}
