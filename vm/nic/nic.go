// Package nic puts a guest into the place of a network namespace: it gives the
// machine a device for each of its links, and tells the agent what
// internal/netns found there.
//
// It knows no pod and no plugins.
package nic

import (
	"context"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/internal/netns"
	"hauberk.dev/vm"
)

// Enter puts a machine that runs into the namespace at a path, with as many
// devices as that has links. Its first device's tap must lead nowhere yet. For
// a machine that is in the namespace already it says everything once more.
func Enter(ctx context.Context, m *vm.Machine, c *vm.Channel, path string, o netns.JoinOptions) error {
	o.Taps = Taps(m)
	j, err := netns.Join(path, o)
	if err != nil {
		return err
	}
	defer j.Close()
	told, err := Message(j)
	if err != nil {
		return err
	}
	added := false
	for i, l := range j.Links {
		switch {
		case l.Tap == nil:
		case i == 0 && len(o.Taps) == 0:
			return fmt.Errorf("enter %s: no machine has the tap of %s", path, l.Name)
		case i > 0:
			if err := m.AttachNetwork(ctx, i, l.Tap); err != nil {
				return err
			}
			added = true
		}
	}
	if added {
		if err := c.Rescan(ctx); err != nil {
			return err
		}
	}
	return c.Network(ctx, told)
}

// Networks gives a machine the taps of j, in the order that Message relies on.
// The files stay j's. Those of machines that run already are not among them.
func Networks(j *netns.Joined) (list []vm.Network) {
	for _, l := range j.Links {
		if l.Tap != nil {
			list = append(list, vm.Network{Tap: l.Tap})
		}
	}
	return list
}

// Taps are the taps of a machine that was made before its namespace was known,
// for netns.JoinOptions: one, or none.
func Taps(m *vm.Machine) []*os.File {
	if t := m.Tap(); t != nil {
		return []*os.File{t}
	}
	return nil
}

// Message is what the guest is told. Its n-th network device is at the n-th link.
func Message(j *netns.Joined) (m guestproto.Network, err error) {
	if len(j.Links) > vm.MaxNetworks {
		return m, fmt.Errorf("describe network: %d links are more than the %d of a guest", len(j.Links), vm.MaxNetworks)
	}
	if n := len(j.Routes); n > guestproto.MaxRoutes-1 || len(j.Neighbours) > guestproto.MaxRoutes-1 {
		return m, fmt.Errorf("describe network: more than %d routes or neighbours", guestproto.MaxRoutes-1)
	}
	for i, l := range j.Links {
		f := guestproto.Interface{
			Device: guestproto.DeviceMAC(i), Name: l.Name, MAC: [6]byte(l.MAC), MTU: uint32(l.MTU),
			NoIPv6: l.NoIPv6, LocalNet: l.LocalNet,
		}
		if len(l.Addresses) > guestproto.MaxAddresses {
			return m, fmt.Errorf("describe network: %s has more than %d addresses", l.Name, guestproto.MaxAddresses)
		}
		for _, p := range l.Addresses {
			// Routes are all named below, those of prefixes too.
			f.Addresses = append(f.Addresses, guestproto.Address{Prefix: prefix(p), NoRoute: true})
		}
		m.Interfaces = append(m.Interfaces, f)
		if l.LocalNet {
			m.Routes = append(m.Routes, guestproto.Route{Kind: guestproto.RouteUnicast, Interface: l.Name, Scope: unix.RT_SCOPE_LINK,
				Destination: prefix(netip.PrefixFrom(netns.HostEnd, netns.HostEnd.BitLen()))})
			m.Neighbours = append(m.Neighbours, guestproto.Neighbour{Interface: l.Name, IP: ip(netns.HostEnd), MAC: [6]byte(netns.HostEndMAC)})
		}
	}
	for _, r := range j.Routes {
		m.Routes = append(m.Routes, guestproto.Route{
			Kind: guestproto.RouteKind(r.Type), Interface: r.Link, Destination: prefix(r.To), Gateway: ip(r.Gateway), Source: ip(r.Source),
			Scope: uint8(r.Scope), Metric: uint32(r.Metric), MTU: uint32(r.MTU), OnLink: r.OnLink,
		})
	}
	for _, n := range j.Neighbours {
		m.Neighbours = append(m.Neighbours, guestproto.Neighbour{Interface: n.Link, IP: ip(n.IP), MAC: [6]byte(n.MAC)})
	}
	return m, nil
}

func ip(a netip.Addr) guestproto.IP { return guestproto.IPOf(a.AsSlice()) }

func prefix(p netip.Prefix) guestproto.Prefix {
	return guestproto.Prefix{IP: ip(p.Addr()), Bits: uint8(p.Bits())}
}
