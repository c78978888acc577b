package vm

import (
	"context"
	"fmt"
	"math"

	"hauberk.dev/api/guestproto"
)

// What a host asks of a guest: a method for each verb.

// Hello opens the session and lets the guest send the Guard's records.
func (c *Channel) Hello(ctx context.Context) (guestproto.Hello, error) {
	b, err := c.call(ctx, guestproto.VerbHello, &guestproto.HelloRequest{Version: guestproto.Version, Nonce: c.nonce})
	if err != nil {
		return guestproto.Hello{}, err
	}
	m, err := guestproto.ParseHello(b)
	if err != nil {
		return parsed(c, m, err)
	}
	if m.Version != guestproto.Version {
		return m, fmt.Errorf("greet guest: it speaks version %d, this host %d", m.Version, guestproto.Version)
	}
	if c.onRecord == nil {
		return m, nil
	}
	return m, c.grantRecords(ctx, RecordWindow)
}

// Reseed makes a clone different from its template: entropy, clock, names.
func (c *Channel) Reseed(ctx context.Context, m guestproto.Reseed) error {
	return c.do(ctx, guestproto.VerbReseed, &m)
}

// Rescan makes the guest find devices that its template did not have: networks
// beyond the first, and shares.
func (c *Channel) Rescan(ctx context.Context) error {
	return c.do(ctx, guestproto.VerbRescan, nil)
}

// Network gives the guest its interfaces, addresses and routes.
func (c *Channel) Network(ctx context.Context, m guestproto.Network) error {
	return c.do(ctx, guestproto.VerbNetwork, &m)
}

// Interfaces asks for the guest's interfaces and what they carried. It is the
// guest's word.
func (c *Channel) Interfaces(ctx context.Context) ([]guestproto.InterfaceState, error) {
	b, err := c.call(ctx, guestproto.VerbInterfaces, nil)
	if err != nil {
		return nil, err
	}
	list, err := guestproto.ParseInterfaces(b)
	return parsed(c, list, err)
}

// Routes asks for the guest's main routing tables. It is the guest's word.
func (c *Channel) Routes(ctx context.Context) ([]guestproto.Route, error) {
	b, err := c.call(ctx, guestproto.VerbRoutes, nil)
	if err != nil {
		return nil, err
	}
	list, err := guestproto.ParseRoutes(b)
	return parsed(c, list, err)
}

// MountRoot mounts an image for a container to come.
func (c *Channel) MountRoot(ctx context.Context, m guestproto.MountRoot) (guestproto.MountedRoot, error) {
	b, err := c.call(ctx, guestproto.VerbMountRoot, &m)
	if err != nil {
		return guestproto.MountedRoot{}, err
	}
	r, err := guestproto.ParseMountedRoot(b)
	return parsed(c, r, err)
}

// UnmountRoot gives a root's number and its disks free. EBUSY says that it is
// worth another try soon, or that a container on it was not forgotten.
func (c *Channel) UnmountRoot(ctx context.Context, root uint8) error {
	return c.do(ctx, guestproto.VerbUnmountRoot, &guestproto.UnmountRoot{Root: root})
}

// MountShare mounts the virtio file system with the tag, for containers to
// mount what is below it.
func (c *Channel) MountShare(ctx context.Context, tag string) error {
	return c.do(ctx, guestproto.VerbMountShare, &guestproto.Name{Name: tag})
}

// MakeDir makes a directory of the pod, for containers to mount.
func (c *Channel) MakeDir(ctx context.Context, m guestproto.Dir) error {
	return c.do(ctx, guestproto.VerbMakeDir, &m)
}

// RemoveDir removes one that no container uses any more.
func (c *Channel) RemoveDir(ctx context.Context, name string) error {
	return c.do(ctx, guestproto.VerbRemoveDir, &guestproto.Name{Name: name})
}

// Push writes files into a directory of the pod: with a stamp all at once in
// place of those pushed before, else each in place. Files may be larger than a
// frame. One push per directory may be under way.
func (c *Channel) Push(ctx context.Context, dir, stamp string, files []guestproto.PushFile) error {
	const most = guestproto.MaxPayload / 2 // of the data in a frame
	m := guestproto.Push{Dir: dir, Stamp: stamp, First: true}
	size := 0
	send := func() error {
		err := c.do(ctx, guestproto.VerbPush, &m)
		m.First, m.Files, size = false, m.Files[:0], 0
		return err
	}
	for _, f := range files {
		if len(f.Path) > math.MaxUint16 {
			return fmt.Errorf("push into %q: the path of a file has %d bytes", dir, len(f.Path))
		}
		for rest, first := f.Data, true; first || len(rest) > 0; first = false {
			if size >= most || size > 0 && size+len(f.Path) >= most || len(m.Files) == guestproto.MaxList {
				if err := send(); err != nil {
					return err
				}
			}
			n := min(len(rest), max(most-size, 1))
			f.Data, rest = rest[:n], rest[n:]
			m.Files = append(m.Files, f)
			f.More = true
			size += n + len(f.Path) + guestproto.PushFileSize
		}
	}
	m.Last = true
	return send()
}

// Pull reads the end of a file in a directory of the pod, at most
// guestproto.MaxChunk bytes.
func (c *Channel) Pull(ctx context.Context, dir, path string) ([]byte, error) {
	b, err := c.call(ctx, guestproto.VerbPull, &guestproto.Pull{Dir: dir, Path: path})
	if err == nil && len(b) > guestproto.MaxChunk {
		return nil, fmt.Errorf("pull %q from %q: the guest gives %d bytes", path, dir, len(b))
	}
	return b, err
}

// Stats asks what the guest uses. The figures are the guest's word.
func (c *Channel) Stats(ctx context.Context) (guestproto.Stats, error) {
	b, err := c.call(ctx, guestproto.VerbStats, nil)
	if err != nil {
		return guestproto.Stats{}, err
	}
	m, err := guestproto.ParseStats(b)
	return parsed(c, m, err)
}

// GuardPolicy puts a policy in force and gives the Guard's reply.
func (c *Channel) GuardPolicy(ctx context.Context, generation uint64, blob []byte) ([]byte, error) {
	return c.call(ctx, guestproto.VerbGuardPolicy, &guestproto.GuardPolicy{Generation: generation, Blob: blob})
}

// GuardStatus gives the state of the Guard, in its own encoding.
func (c *Channel) GuardStatus(ctx context.Context) ([]byte, error) {
	return c.call(ctx, guestproto.VerbGuardStatus, nil)
}

// Ping asks for nothing but an answer.
func (c *Channel) Ping(ctx context.Context) error {
	return c.do(ctx, guestproto.VerbPing, nil)
}

// Shutdown ends the guest. The machine stops soon after it returns.
func (c *Channel) Shutdown(ctx context.Context) error {
	return c.do(ctx, guestproto.VerbShutdown, nil)
}
