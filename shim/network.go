package shim

import (
	"context"
	"fmt"
	"os"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/internal/netns"
	"hauberk.dev/vm/nic"
)

// network puts the guest into the pod's network namespace: its tap moves there,
// and it takes the place of the namespace. Without one it has a loopback
// interface alone.
func (p *pod) network(ctx context.Context) error {
	if p.netns == "" {
		return p.channel.Network(ctx, guestproto.Network{})
	}
	var o netns.JoinOptions
	if tap := p.machine.Tap(); tap != nil {
		o.Taps = []*os.File{tap}
	}
	j, err := netns.Join(p.netns, o)
	if err != nil {
		return err
	}
	defer j.Close()
	if n := len(j.Links); n > 1 {
		return fmt.Errorf("join %s: it has %d links, and a pod one interface", p.netns, n)
	}
	m, err := nic.Message(j)
	if err != nil {
		return err
	}
	return p.channel.Network(ctx, m)
}
