package shim

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"hauberk.dev/guard"
	"hauberk.dev/image"
	"hauberk.dev/internal/flock"
	"hauberk.dev/vm"
	"hauberk.dev/vm/boot"
)

const (
	// uidBase is the first of the users that machines run as, far from those
	// of hauberk-node.
	uidBase  = 0x48480000
	uidCount = 1 << 16
	// upperShare of the guest's memory may be written to the root.
	upperShare = 4
	// agentTime bounds the first answer of a guest's agent after a cold boot.
	agentTime = 60 * time.Second
)

// guests makes machines. Several shims share its directories.
type guests struct {
	conf  config
	guest *boot.Guest
}

// directories of a shim.
func (c config) machines() string { return filepath.Join(c.run, "vm") }
func (c config) images() string   { return filepath.Join(c.state, "images") }

// machineID names the machine of a container on this host.
func machineID(a arguments) string {
	sum := sha256.Sum256([]byte(a.address + "\x00" + a.namespace + "\x00" + a.id))
	return "c-" + hex.EncodeToString(sum[:12])
}

// openGuests prepares kernel, agent and Guard, and finds out what boots.
func openGuests(ctx context.Context, c config, log *slog.Logger) (*guests, error) {
	for _, dir := range []string{c.run, c.images()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("open guests: %w", err)
		}
	}
	guest, err := boot.Open(ctx, boot.Config{State: c.state, Run: c.machines(), User: uidBase, Link: guard.Link})
	if err != nil {
		return nil, err
	}
	if guest.Notice != "" {
		log.Debug(guest.Notice) // true of every container: not worth a line each
	}
	return &guests{conf: c, guest: guest}, nil
}

// boot starts a machine. The lock lasts until the machine's journal names its
// user, so no two machines have the same.
func (g *guests) boot(ctx context.Context, id string, w wish) (*vm.Machine, error) {
	spec := vm.Spec{ID: id, Template: g.guest.Template(w.size.memoryMiB, w.size.processors, "containerd")}
	if img := w.first; img.Path != "" {
		if err := image.Verify(img.Path, img.ErofsSHA256); err != nil {
			return nil, err
		}
		disk, err := os.Open(img.Path)
		if err != nil {
			return nil, fmt.Errorf("boot %s: %w", id, err)
		}
		defer disk.Close()
		spec.Disks = []vm.Disk{{File: disk, Slot: vm.ReadOnlySlot(0)}}
	}
	unlock, err := flock.Take(ctx, filepath.Join(g.conf.run, ".lock"))
	if err != nil {
		return nil, fmt.Errorf("boot %s: %w", id, err)
	}
	defer unlock()
	user, err := freeUser(g.conf.machines())
	if err != nil {
		return nil, fmt.Errorf("boot %s: %w", id, err)
	}
	spec.UID, spec.GID = user, user
	return g.guest.Driver.Boot(ctx, spec)
}

// freeUser finds a user that no machine has. Nothing runs before its journal
// stands; one that cannot be read could name anybody.
func freeUser(machines string) (uint32, error) {
	found, err := vm.Orphans(machines)
	if err != nil {
		return 0, err
	}
	var taken []uint32
	for _, o := range found {
		if errors.Is(o.Err, fs.ErrNotExist) {
			continue
		}
		if o.Journal.UID == 0 {
			return 0, fmt.Errorf("find a free user: run directory %s: %w", o.Dir, o.Err)
		}
		taken = append(taken, o.Journal.UID)
	}
	for n := uint32(1); n < uidCount; n++ {
		if !slices.Contains(taken, uidBase+n) {
			return uidBase + n, nil
		}
	}
	return 0, errors.New("find a free user: all are taken")
}

// Close frees the driver. Machines run on.
func (g *guests) Close() error { return g.guest.Close() }
