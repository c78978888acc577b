package shim

import (
	"context"
	"errors"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/internal/netns"
	"hauberk.dev/vm"
	"hauberk.dev/vm/nic"
)

// network puts the guest into the pod's network namespace: it takes the place
// of what is there. Without one it has a loopback interface alone.
func (p *pod) network(ctx context.Context) error {
	if p.netns == "" {
		return p.channel.Network(ctx, guestproto.Network{})
	}
	m, ok := p.machine.(*vm.Machine)
	if !ok {
		return errors.New("join network namespace: this machine has no network devices")
	}
	return nic.Enter(ctx, m, p.channel, p.netns, netns.JoinOptions{})
}
