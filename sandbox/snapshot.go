package sandbox

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"hauberk.dev/api/hand"
	"hauberk.dev/internal/flock"
	"hauberk.dev/internal/gate"
	"hauberk.dev/internal/snapshot"
	"hauberk.dev/internal/strictjson"
	"hauberk.dev/shim/client"
)

// maxForks is how many copies one call makes.
const maxForks = 64

// kept is what a snapshot says of its sandbox.
type kept struct {
	Version int    `json:"version"`
	ID      string `json:"id"`
	Record  record `json:"record"`
}

// Snapshot saves a running sandbox, its memory included, into a directory, which
// is made and must not be there yet. The sandbox stands still meanwhile, for a
// second or so, and goes on. All that its processes hold is in the files of the
// directory, secrets too: they are root's, and whoever restores one has them.
func (b *Sandbox) Snapshot(ctx context.Context, dir string) error { return b.save(ctx, dir, false) }

// Suspend is Snapshot, and ends the sandbox where it was saved.
func (b *Sandbox) Suspend(ctx context.Context, dir string) error { return b.save(ctx, dir, true) }

func (b *Sandbox) save(ctx context.Context, dir string, end bool) error {
	r, err := b.read()
	if err != nil {
		return err
	}
	switch {
	case r.Exit != nil:
		return fmt.Errorf("save %s: %w", b.id, ErrNotRunning)
	case len(r.Options.Volumes) > 0:
		return fmt.Errorf("save %s: it has volumes of this machine, which a snapshot cannot hold", b.id)
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return fmt.Errorf("save %s: %w", b.id, err)
	}
	if _, err := os.Lstat(dir); err == nil {
		return fmt.Errorf("save %s: %s: %w", b.id, dir, fs.ErrExist)
	}
	note, err := json.Marshal(kept{Version: recordVersion, ID: b.id, Record: r})
	if err != nil {
		return fmt.Errorf("save %s: %w", b.id, err)
	}
	return b.with(ctx, "save", func(s *client.Shim) error {
		_, err := s.Snapshot(ctx, b.id, dir, end, note)
		return err
	})
}

// Restore makes a sandbox that goes on from where another was saved. It has
// another name, other addresses, and random numbers of its own. Of the options
// Name, Remove and Labels are heeded, and Egress and Publish in place of those it
// had, if it had a network; others must be empty, for they are as they were. It
// is refused on a machine that cannot go on from the snapshot: the error says
// what differs. The error is ErrDamaged if the snapshot is not what was written.
func (h *Host) Restore(ctx context.Context, dir string, o Options) (*Sandbox, error) {
	b, err := h.restore(ctx, dir, o)
	if err != nil {
		if errors.Is(err, snapshot.ErrDamaged) || errors.Is(err, client.ErrDamaged) {
			err = damagedError{err}
		}
		return nil, fmt.Errorf("restore sandbox: %w", err)
	}
	return b, nil
}

// damagedError is ErrDamaged as well, and says so already.
type damagedError struct{ error }

func (e damagedError) Is(target error) bool { return target == ErrDamaged }
func (e damagedError) Unwrap() error        { return e.error }

func (h *Host) restore(ctx context.Context, dir string, o Options) (*Sandbox, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	k, err := readKept(dir)
	if err != nil {
		return nil, err
	}
	if o, err = k.options(o); err != nil {
		return nil, err
	}
	if err := o.check(); err != nil {
		return nil, err
	}
	img, err := h.still(k.Record.Image)
	if err != nil {
		return nil, err
	}
	return h.create(ctx, o, img, k.Record.Process, origin{dir: dir, id: k.ID})
}

// readKept reads what a snapshot says of its sandbox.
func readKept(dir string) (kept, error) {
	s, err := snapshot.Read(dir)
	if err != nil {
		return kept{}, err
	}
	var saved hand.Saved
	if err := strictjson.Decode(s.Note, 2*maxRecord, &saved); err != nil {
		return kept{}, fmt.Errorf("%w: its note: %w", ErrDamaged, err)
	}
	return parseKept(saved.Caller)
}

func parseKept(raw []byte) (k kept, err error) {
	if len(raw) == 0 {
		return kept{}, errors.New("the snapshot is of no sandbox that was run by hand")
	}
	if err := strictjson.Decode(raw, maxRecord, &k); err != nil {
		return kept{}, fmt.Errorf("%w: its sandbox: %w", ErrDamaged, err)
	}
	if k.Version != recordVersion {
		return kept{}, fmt.Errorf("the snapshot's record has version %d: want %d", k.Version, recordVersion)
	}
	if !validID.MatchString(k.ID) || len(k.Record.Process.Args) == 0 {
		return kept{}, fmt.Errorf("%w: it describes no sandbox", ErrDamaged)
	}
	return k, nil
}

// options are those of the sandbox that was saved, under a name of its own.
func (k kept) options(o Options) (Options, error) {
	out := k.Record.Options
	connected := len(out.Egress)+len(out.Publish) > 0
	if !connected && len(o.Egress)+len(o.Publish) > 0 {
		return Options{}, errors.New("it was saved without a network, and can be given none")
	}
	// What programs in it know it by stays.
	out.Hostname = cmp.Or(out.Hostname, k.ID)
	out.Name, out.Remove = o.Name, o.Remove
	if len(o.Labels) > 0 {
		out.Labels = o.Labels
	}
	if len(o.Egress)+len(o.Publish) > 0 {
		out.Egress, out.Publish = o.Egress, o.Publish
	}
	o.Name, o.Remove, o.Labels, o.Egress, o.Publish = "", false, nil, nil, nil
	if fixed := set(o); len(fixed) > 0 {
		return Options{}, fmt.Errorf("%s: as it was when it was saved, and not to be changed", strings.Join(fixed, ", "))
	}
	return out, nil
}

// set lists the options that are not empty.
func set(o Options) (names []string) {
	v := reflect.ValueOf(o)
	for i := range v.NumField() {
		if !v.Field(i).IsZero() {
			names = append(names, v.Type().Field(i).Name)
		}
	}
	return names
}

// still finds a packed image that was here once.
func (h *Host) still(img Image) (Image, error) {
	if _, err := os.Stat(img.Path); err == nil {
		return img, nil
	}
	list, err := h.Images()
	if err != nil {
		return Image{}, err
	}
	if i := slices.IndexFunc(list, func(other Image) bool { return other.ErofsSHA256 == img.ErofsSHA256 }); i >= 0 {
		return list[i], nil
	}
	return Image{}, fmt.Errorf("image %s with digest %s is not here any more: pull it", img.Name, img.Digest)
}

// Fork makes n copies of a running sandbox, which go on from where it is. It
// stands still meanwhile and goes on. Ports that it publishes lead into the
// copies from free ones. There are n copies, or none.
func (b *Sandbox) Fork(ctx context.Context, n int) (out []*Sandbox, err error) {
	if n < 1 || n > maxForks {
		return nil, fmt.Errorf("fork %s: %d copies: want 1 to %d", b.id, n, maxForks)
	}
	r, err := b.read()
	if err != nil {
		return nil, err
	}
	again := Options{Remove: r.Options.Remove, Egress: r.Options.Egress}
	if again.Publish, err = freePorts(r.Options.Publish); err != nil {
		return nil, fmt.Errorf("fork %s: %w", b.id, err)
	}
	dir, done, err := b.host.scratch(ctx)
	if err != nil {
		return nil, fmt.Errorf("fork %s: %w", b.id, err)
	}
	defer func() {
		if err = errors.Join(err, done()); err != nil {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanup)
			defer cancel()
			for _, f := range out {
				err = errors.Join(err, f.Remove(ctx, true))
			}
			out = nil
		}
	}()
	state := filepath.Join(dir, "state")
	if err := b.Snapshot(ctx, state); err != nil {
		return nil, err
	}
	for range n {
		f, err := b.host.Restore(ctx, state, again)
		if err != nil {
			return out, fmt.Errorf("fork %s: %w", b.id, err)
		}
		out = append(out, f)
	}
	return out, nil
}

// freePorts publishes the same from ports that are free.
func freePorts(publish []string) (out []string, err error) {
	for _, text := range publish {
		p, err := gate.ParsePublication(text)
		if err != nil {
			return nil, err
		}
		p.Host = netip.AddrPortFrom(p.Host.Addr(), 0)
		out = append(out, p.String())
	}
	return out, nil
}

// scratch makes a directory that lasts until done is called, at most until this
// process ends and another asks for one.
func (h *Host) scratch(ctx context.Context) (dir string, done func() error, err error) {
	unlock, err := h.lock(ctx)
	if err != nil {
		return "", nil, err
	}
	defer unlock()
	left, err := os.ReadDir(h.forks())
	if err != nil {
		return "", nil, err
	}
	for _, e := range left {
		path := filepath.Join(h.forks(), e.Name())
		if free, err := flock.Try(filepath.Join(path, lockName)); err == nil && free != nil {
			err = os.RemoveAll(path)
			free()
			if err != nil {
				return "", nil, err
			}
		}
	}
	if dir, err = os.MkdirTemp(h.forks(), ""); err != nil {
		return "", nil, err
	}
	mine, err := flock.Take(ctx, filepath.Join(dir, lockName))
	if err != nil {
		return "", nil, errors.Join(err, os.RemoveAll(dir))
	}
	return dir, func() error { defer mine(); return os.RemoveAll(dir) }, nil
}
