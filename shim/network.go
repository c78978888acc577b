package shim

import (
	"context"
	"errors"
	"fmt"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/internal/netns"
	"hauberk.dev/vm"
	"hauberk.dev/vm/nic"
)

// fenceAnnotation of a pod, if it is "off", lets its guest send frames under
// other addresses than its own. containerd hands it on only if its
// configuration of the runtime names it.
const fenceAnnotation = "hauberk.dev/network-fence"

func unfenced(annotations map[string]string) (bool, error) {
	switch v := annotations[fenceAnnotation]; v {
	case "", "on":
		return false, nil
	case "off":
		return true, nil
	default:
		return false, fmt.Errorf("read annotation %s: %.32q is neither on nor off", fenceAnnotation, v)
	}
}

// network puts the guest into the pod's network namespace: it takes the place
// of what is there. Without one it has a loopback interface alone.
func (b *box) network(ctx context.Context) error {
	if b.netns == "" {
		return b.channel.Network(ctx, guestproto.Network{})
	}
	m, ok := b.machine.(*vm.Machine)
	if !ok {
		return errors.New("join network namespace: this machine has no network devices")
	}
	return nic.Enter(ctx, m, b.channel, b.netns, netns.JoinOptions{Unfenced: b.unfenced})
}
