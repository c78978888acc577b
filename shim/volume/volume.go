// Package volume brings what a container mounts from the host into its guest.
//
// Small files and the directories that kubelet keeps up to date are pushed
// through the guest's channel and followed, each view whole and none older
// than the one before. emptyDir volumes are the guest's own memory. Everything
// else is a share: a file server per pod, confined to the pod's volumes and
// nothing else of the host. Disks are attached to the machine.
//
// The guest is hostile: it gets copies, or a server that can reach no more
// than it may. The package starts no machine and knows no containerd.
package volume

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/shim/oci"
)

// Guest is what volumes ask of a pod's guest.
type Guest interface {
	MakeDir(ctx context.Context, m guestproto.Dir) error
	Push(ctx context.Context, dir, stamp string, files []guestproto.PushFile) error
	Pull(ctx context.Context, dir, path string) ([]byte, error)
	// Rescan lets the guest look for new devices.
	Rescan(ctx context.Context) error
	MountShare(ctx context.Context, tag string) error
}

// Machine is what they ask of its machine.
type Machine interface {
	// Share gives the guest a virtio file system with a tag, served by who is
	// at the other end of the connection. It closes the connection.
	Share(ctx context.Context, tag string, server *os.File) error
	// Attach gives the guest a disk and says by which serial it finds it. The
	// file stays the caller's.
	Attach(ctx context.Context, disk *os.File, writable bool) (serial string, err error)
	// Detach takes a disk away.
	Detach(ctx context.Context, serial string) error
}

// ErrNoShare is what a Machine gives whose memory no file server can reach: it
// was not started for it.
var ErrNoShare = errors.New("the machine was not started for shares")

// Config is what a pod's volumes need.
type Config struct {
	Guest   Guest
	Machine Machine
	Log     *slog.Logger
	// UID is the pod's, by which kubelet names its directories; may be empty.
	UID string
	// Failed is told, once, why the volumes of the pod are lost. It may be
	// told when the machine ends before Close, for the server ends with it.
	Failed func(error)
	// MemoryMiB of the machine bounds what its emptyDir volumes may hold.
	MemoryMiB int
	// ServerLog, if not nil, is what the file server says.
	ServerLog *os.File
}

// Pod holds the volumes of a pod's containers.
type Pod struct {
	conf Config

	mu    sync.Mutex
	dirs  map[string]string // guest's directory by the host's
	lives []*live
	made  bool // the directory for single files
	singles
	follow *follower
	share  *share
	users  map[string][]*use // by container
	closed bool
}

// use is what one container has of the pod's volumes.
type use struct {
	single *single
	serial string // of a disk
}

// New prepares for the volumes of a pod.
func New(c Config) *Pod {
	return &Pod{conf: c, dirs: map[string]string{}, users: map[string][]*use{}, singles: singles{byPath: map[string]*single{}}}
}

// Add brings the volumes of a container, and completes its mounts and devices
// with where the guest finds them.
func (p *Pod) Add(ctx context.Context, container string, create *guestproto.Create, volumes []oci.Volume) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return errors.New("add volumes: the pod has ended")
	}
	if _, ok := p.users[container]; ok {
		return fmt.Errorf("add volumes: container %q has some already", container)
	}
	p.users[container] = nil
	for _, v := range volumes {
		if err := p.add(ctx, container, create, v); err != nil {
			return errors.Join(fmt.Errorf("add volume %s %.256q: %w", v.Field, v.Source, err), p.remove(ctx, container))
		}
	}
	create.Mounts = slices.DeleteFunc(create.Mounts, func(m guestproto.Mount) bool { return m.Target == noMount })
	return nil
}

func (p *Pod) add(ctx context.Context, container string, create *guestproto.Create, v oci.Volume) error {
	if v.Device >= 0 {
		d := &create.Devices[v.Device]
		return p.addDevice(ctx, container, d, v.ReadOnly)
	}
	s, err := open(v, p.conf.UID)
	if err != nil {
		return err
	}
	defer s.close()
	if v.Later && s.kind == kindScratch {
		return errors.New("it lives in the guest: what another mounts there is not seen: leave out the propagation")
	}
	m := &create.Mounts[v.Mount]
	m.Kind = guestproto.MountPod
	switch s.kind {
	case kindLive:
		m.Source, err = p.addLive(ctx, s)
	case kindScratch:
		m.Source, err = p.addScratch(ctx, s)
	case kindSingle, kindReturned:
		m.Source, err = p.addSingle(ctx, container, s)
	case kindDisk:
		return p.addDiskFile(ctx, container, create, v, s)
	case kindNode:
		node(create, v, s, guestproto.Device{Kind: 'c', Major: unix.Major(s.stat.Rdev), Minor: unix.Minor(s.stat.Rdev)})
	default:
		m.Kind = guestproto.MountShare
		m.Source, err = p.addShared(ctx, m, s, v)
	}
	return err
}

// dir gives the guest's directory for one of the host, made if it is new.
func (p *Pod) dir(ctx context.Context, path string, m guestproto.Dir) (name string, isNew bool, err error) {
	if name, ok := p.dirs[path]; ok {
		return name, false, nil
	}
	m.Name = "v" + strconv.Itoa(len(p.dirs))
	if err := p.conf.Guest.MakeDir(ctx, m); err != nil {
		return "", false, err
	}
	p.dirs[path] = m.Name
	return m.Name, true, nil
}

// addScratch makes an emptyDir, or the memory that the containers of a pod
// share, in the guest.
func (p *Pod) addScratch(ctx context.Context, s *source) (string, error) {
	m := guestproto.Dir{Bytes: s.limit, Mode: s.stat.Mode & 0o7777, UID: s.stat.Uid, GID: s.stat.Gid}
	if half := uint64(p.conf.MemoryMiB) << 19; m.Bytes > half && half > 0 {
		m.Bytes = half
	}
	name, _, err := p.dir(ctx, s.volume, m)
	return filepath.Join(name, s.below), err
}

// addDevice attaches the disk of the host that has a device's number.
func (p *Pod) addDevice(ctx context.Context, container string, d *guestproto.Device, readOnly bool) error {
	f, err := openDisk(d.Major, d.Minor, readOnly)
	if err != nil {
		return err
	}
	defer f.Close()
	d.Serial, err = p.attach(ctx, container, f, readOnly)
	d.Major, d.Minor = 0, 0 // the host's mean nothing in the guest
	return err
}

// addDiskFile turns a mount of a disk's node into a node of the guest's.
func (p *Pod) addDiskFile(ctx context.Context, container string, create *guestproto.Create, v oci.Volume, s *source) error {
	f, err := openDisk(unix.Major(s.stat.Rdev), unix.Minor(s.stat.Rdev), v.ReadOnly)
	if err != nil {
		return err
	}
	defer f.Close()
	serial, err := p.attach(ctx, container, f, v.ReadOnly)
	if err != nil {
		return err
	}
	node(create, v, s, guestproto.Device{Kind: 'b', Serial: serial})
	return nil
}

// node puts a device in the place of a mount of one of the host's nodes.
func node(create *guestproto.Create, v oci.Volume, s *source, d guestproto.Device) {
	d.Path, d.Mode, d.UID, d.GID = v.Target, s.stat.Mode&0o777, s.stat.Uid, s.stat.Gid
	create.Devices = append(create.Devices, d)
	create.Mounts[v.Mount] = guestproto.Mount{Target: noMount}
}

// noMount is the target of a mount that is none any more. It keeps its place
// until all volumes are there, for others are numbered by theirs.
const noMount = "-"

func (p *Pod) attach(ctx context.Context, container string, f *os.File, readOnly bool) (string, error) {
	serial, err := p.conf.Machine.Attach(ctx, f, !readOnly)
	if err == nil {
		p.users[container] = append(p.users[container], &use{serial: serial})
	}
	return serial, err
}

// openDisk opens a block device of the host by its number, whatever its nodes
// are called.
func openDisk(major, minor uint32, readOnly bool) (*os.File, error) {
	dir, err := os.MkdirTemp("", "hauberk-disk-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	node := filepath.Join(dir, "disk")
	if err := unix.Mknod(node, unix.S_IFBLK|0o600, int(unix.Mkdev(major, minor))); err != nil {
		return nil, fmt.Errorf("make node of disk %d:%d: %w", major, minor, err)
	}
	flags := os.O_RDWR
	if readOnly {
		flags = os.O_RDONLY
	}
	f, err := os.OpenFile(node, flags|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open disk %d:%d of the host: %w", major, minor, errors.Unwrap(err))
	}
	return f, nil
}

// Collect writes what a container left in files that go back to the host. It
// is for when the container has ended, before anybody is told.
func (p *Pod) Collect(ctx context.Context, container string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	for _, u := range p.users[container] {
		if u.single != nil {
			errs = append(errs, p.giveBack(ctx, u.single))
		}
	}
	return errors.Join(errs...)
}

// Remove lets go of what only this container had. Directories stay for the
// pod's others.
func (p *Pod) Remove(ctx context.Context, container string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.remove(ctx, container)
}

func (p *Pod) remove(ctx context.Context, container string) error {
	var errs []error
	for _, u := range p.users[container] {
		if u.single != nil {
			p.drop(u.single)
		}
		if u.serial != "" {
			errs = append(errs, p.conf.Machine.Detach(ctx, u.serial))
		}
	}
	delete(p.users, container)
	return errors.Join(errs...)
}

// Close ends following and the file server. The guest must be gone, or have
// let go.
func (p *Pod) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	p.closed = true
	follow, share := p.follow, p.share
	p.mu.Unlock()
	// Not under the lock: what is under way may wait for it.
	var errs []error
	if follow != nil {
		errs = append(errs, follow.close())
	}
	if share != nil {
		errs = append(errs, share.close())
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.byPath {
		errs = append(errs, s.file.Close())
	}
	for _, l := range p.lives {
		errs = append(errs, l.file.Close())
	}
	clear(p.byPath)
	p.lives = nil
	return errors.Join(errs...)
}
