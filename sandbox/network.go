package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"hauberk.dev/internal/atomicfile"
	"hauberk.dev/internal/gate"
	"hauberk.dev/internal/netns"
)

// gateUser is the user of the processes that carry traffic of sandboxes. They
// have no right but their open sockets.
const gateUser = 64390

// network is what a container's configuration must know of its network.
type network struct {
	path string // of the namespace; none if there is no network
	// Files of the bundle for /etc/resolv.conf, if there is a network, and for
	// /etc/hosts and /etc/hostname.
	resolv, hosts, hostname string
}

// spec reads what was asked for; nothing is no network at all.
func (o *Options) spec() (s gate.Spec, err error) {
	var errs []error
	for _, text := range o.Egress {
		d, err := gate.ParseDestination(text)
		errs = append(errs, err)
		s.Egress = append(s.Egress, d)
	}
	for _, text := range o.Publish {
		p, err := gate.ParsePublication(text)
		errs = append(errs, err)
		s.Publish = append(s.Publish, p)
	}
	return s, errors.Join(errs...)
}

func (h *Host) networks() string { return filepath.Join(h.conf.Run, "n") }

// openNetwork makes the network of a sandbox, and gives the published ports
// their numbers.
func (b *Sandbox) openNetwork(ctx context.Context, o Options) (n network, ports []string, err error) {
	s, err := o.spec()
	if err != nil {
		return n, nil, err
	}
	connected := len(s.Egress)+len(s.Publish) > 0
	if err := b.name(&n, cmp.Or(o.Hostname, b.id), connected); err != nil || !connected {
		return n, nil, err
	}
	s.Dir, s.Name, s.UID, s.GID = b.host.networks(), b.id, gateUser, gateUser
	n.resolv = filepath.Join(b.bundle(), "resolv.conf")
	if err := atomicfile.Write(n.resolv, []byte(fmt.Sprintf("nameserver %s\n", netns.Gateway)), 0o644); err != nil {
		return n, nil, err
	}
	log, err := os.OpenFile(b.gateLog(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return n, nil, err
	}
	defer log.Close()
	pod, published, err := gate.Start(ctx, []string{b.host.conf.Shim, "gate"}, s, log)
	if err != nil {
		return n, nil, err
	}
	n.path = pod
	for _, p := range published {
		ports = append(ports, p.String())
	}
	return n, ports, nil
}

// name writes the files that say what the sandbox is called. Its name means its
// address, so that a server that listens on it is reached.
func (b *Sandbox) name(n *network, hostname string, connected bool) error {
	address := netip.MustParseAddr("127.0.0.1")
	if connected {
		address = netns.HandAddress
	}
	n.hosts, n.hostname = filepath.Join(b.bundle(), "hosts"), filepath.Join(b.bundle(), "hostname")
	hosts := fmt.Sprintf("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n%s\t%s\n", address, hostname)
	return errors.Join(atomicfile.Write(n.hosts, []byte(hosts), 0o644), atomicfile.Write(n.hostname, []byte(hostname+"\n"), 0o644))
}

// closeNetwork ends what openNetwork began, if anything. The machine must have
// ended.
func (b *Sandbox) closeNetwork(ctx context.Context) error {
	return gate.Stop(ctx, b.host.networks(), b.id)
}

// gateLog says what the sandbox was refused.
func (b *Sandbox) gateLog() string { return filepath.Join(b.dir, "network.log") }
