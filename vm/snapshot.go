package vm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"hauberk.dev/internal/atomicfile"
)

const (
	snapshotVersion = 2
	manifestName    = "snapshot.json"
	maxManifest     = 8 << 20
	stateName       = "state"
	// besideMemory is what a state may have beside the guest's memory.
	besideMemory = 64 << 20
)

// Snapshot says what a saved state is of. The state holds all of a guest's
// memory, its secrets included.
type Snapshot struct {
	Version int `json:"version"`
	// Key is a digest of everything a state depends on, as of a template; Origin
	// says what that was.
	Key    string `json:"key"`
	Origin Origin `json:"origin,omitzero"`
	// Slots had disks, which the state does not hold; Networks is the number of
	// network devices. Who restores the state must give as many of the same.
	Slots    []Slot `json:"slots,omitempty"`
	Networks int    `json:"networks"`
	// Bytes and SHA256 are the state's.
	Bytes   int64     `json:"bytes"`
	SHA256  string    `json:"sha256"`
	Created time.Time `json:"created"`
	// Note is what who had it saved wants to know again.
	Note json.RawMessage `json:"note,omitempty"`
	// Sum is the digest of all of the above.
	Sum string `json:"sum"`
}

// Origin is what a state can be restored with, and nothing else.
type Origin struct {
	Monitor   string `json:"monitor"`   // its version
	Arguments string `json:"arguments"` // digest of its devices, accelerator and the guest's command line
	Kernel    string `json:"kernel"`    // digest
	Initrd    string `json:"initrd"`    // digest of agent, modules and Guard
	MemoryMiB int    `json:"memoryMiB"`
	CPUs      int    `json:"cpus"`
	// TrustDomain kept it apart.
	TrustDomain string `json:"trustDomain"`
}

// differences names what of another origin is not the same.
func (o Origin) differences(other Origin) string {
	var out []string
	note := func(what string, was, is any) {
		if was != is {
			out = append(out, fmt.Sprintf("%s was %v and is %v", what, was, is))
		}
	}
	note("monitor", quoted(o.Monitor), quoted(other.Monitor))
	note("kernel", short(o.Kernel), short(other.Kernel))
	note("initramfs of agent and Guard", short(o.Initrd), short(other.Initrd))
	note("memory in MiB", o.MemoryMiB, other.MemoryMiB)
	note("number of CPUs", o.CPUs, other.CPUs)
	note("trust domain", quoted(o.TrustDomain), quoted(other.TrustDomain))
	if len(out) == 0 { // they say the size, too
		note("digest of the monitor's arguments", short(o.Arguments), short(other.Arguments))
	}
	return strings.Join(out, ", ")
}

func quoted(s string) string { return fmt.Sprintf("%.128q", s) }

// short is as much of a digest as people compare.
func short(digest string) string { return fmt.Sprintf("%.12s", digest) }

// CheckOrigin says what of a machine to be is not as it was when the state was
// saved. The key decides; the rest explains.
func (s Snapshot) CheckOrigin(key string, o Origin) error {
	if s.Key == key {
		return nil
	}
	if why := s.Origin.differences(o); why != "" {
		return fmt.Errorf("%w: %s", ErrWrongTemplate, why)
	}
	return fmt.Errorf("%w: the state's key is %.12s, the machine needs %.12s", ErrWrongTemplate, s.Key, key)
}

// sum is the digest of a manifest.
func (s Snapshot) sum() (string, error) {
	s.Sum = ""
	raw, err := json.Marshal(s)
	sum := sha256.Sum256(raw)
	return hex.EncodeToString(sum[:]), err
}

// Saved is what a monitor says of a state it has written.
type Saved struct {
	Slots    []Slot
	Networks int
}

// Save writes the state of the guest, which stands still meanwhile and goes on
// then, if it ran before. A guest with a share cannot be saved.
func (m *Machine) Save(ctx context.Context, w io.Writer) (Snapshot, error) {
	s, err := m.save(ctx, w)
	if err != nil {
		return Snapshot{}, fmt.Errorf("save machine %s: %w", m.ID(), err)
	}
	return s, nil
}

func (m *Machine) save(ctx context.Context, w io.Writer) (Snapshot, error) {
	if m.journal.Key == "" {
		return Snapshot{}, errors.New("its journal does not say what it was started with")
	}
	r, state, err := os.Pipe()
	if err != nil {
		return Snapshot{}, err
	}
	defer r.Close()
	sum := &digester{to: w, hash: sha256.New(), most: m.journal.Memory + besideMemory}
	copied := make(chan error, 1)
	go func() {
		_, err := io.Copy(sum, r)
		r.Close() // a monitor that still writes learns that nobody reads
		copied <- err
	}()
	saved, err := m.monitor.Save(ctx, state)
	state.Close() // the monitor has let go of its own, so the copy ends
	if err != nil {
		r.Close()
	}
	if err := errors.Join(err, <-copied); err != nil {
		return Snapshot{}, err
	}
	return Snapshot{
		Version: snapshotVersion, Key: m.journal.Key, Origin: m.journal.Origin, Slots: saved.Slots, Networks: saved.Networks,
		Bytes: sum.n, SHA256: hex.EncodeToString(sum.hash.Sum(nil)), Created: time.Now().UTC(),
	}, nil
}

// digester passes on bytes, and counts and sums them.
type digester struct {
	to      io.Writer
	hash    hash.Hash
	n, most int64
}

func (d *digester) Write(b []byte) (int, error) {
	if d.n += int64(len(b)); d.n > d.most {
		return 0, fmt.Errorf("the state has more than %d bytes", d.most)
	}
	d.hash.Write(b) // never fails
	return d.to.Write(b)
}

// Snapshot saves the guest into a directory, which is made and must not be there
// yet, with a note in JSON, which may be nil. It is there whole or not at all.
func (m *Machine) Snapshot(ctx context.Context, dir string, note []byte) (s Snapshot, err error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return s, fmt.Errorf("save machine %s: %w", m.ID(), err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	f, err := os.OpenFile(filepath.Join(dir, stateName), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return s, fmt.Errorf("save machine %s: %w", m.ID(), err)
	}
	s, err = m.Save(ctx, f)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return s, err
	}
	s.Note = note
	if s.Sum, err = s.sum(); err != nil {
		return s, fmt.Errorf("save machine %s: %w", m.ID(), err)
	}
	raw, err := json.MarshalIndent(s, "", "\t")
	if err != nil {
		return s, fmt.Errorf("save machine %s: %w", m.ID(), err)
	}
	return s, atomicfile.Write(filepath.Join(dir, manifestName), append(raw, '\n'), 0o600)
}

// OpenSnapshot opens what Snapshot left, and checks that it is whole and as it
// was.
func OpenSnapshot(dir string) (Snapshot, *os.File, error) {
	s, f, err := openSnapshot(dir)
	if err != nil {
		return Snapshot{}, nil, fmt.Errorf("open snapshot %s: %w", dir, err)
	}
	return s, f, nil
}

func openSnapshot(dir string) (Snapshot, *os.File, error) {
	s, err := readSnapshot(dir)
	if err != nil {
		return Snapshot{}, nil, err
	}
	f, err := openOwn(filepath.Join(dir, stateName))
	if err != nil {
		return Snapshot{}, nil, err
	}
	if err := s.verify(f); err != nil {
		return Snapshot{}, nil, errors.Join(err, f.Close())
	}
	return s, f, nil
}

// ReadSnapshot reads what a snapshot is of, without the state.
func ReadSnapshot(dir string) (Snapshot, error) {
	s, err := readSnapshot(dir)
	if err != nil {
		return Snapshot{}, fmt.Errorf("read snapshot %s: %w", dir, err)
	}
	return s, nil
}

func readSnapshot(dir string) (Snapshot, error) {
	manifest, err := openOwn(filepath.Join(dir, manifestName))
	if err != nil {
		return Snapshot{}, err
	}
	raw, err := io.ReadAll(io.LimitReader(manifest, maxManifest+1))
	if err = errors.Join(err, manifest.Close()); err != nil {
		return Snapshot{}, err
	}
	s, err := parseSnapshot(raw)
	if err != nil {
		return Snapshot{}, fmt.Errorf("%s: %w", manifestName, err)
	}
	return s, nil
}

// openOwn opens a file of ours that nobody else could read or change.
func openOwn(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err == nil {
		st, ok := fi.Sys().(*syscall.Stat_t)
		if !ok || !fi.Mode().IsRegular() || fi.Mode().Perm()&0o077 != 0 || st.Uid != uint32(os.Geteuid()) {
			err = fmt.Errorf("%w: %s could be read or changed by others than user %d", ErrDamaged, filepath.Base(name), os.Geteuid())
		}
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func (s Snapshot) verify(f *os.File) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if fi.Size() != s.Bytes {
		return fmt.Errorf("%w: the state has %d bytes of %d", ErrDamaged, fi.Size(), s.Bytes)
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return err
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != s.SHA256 {
		return fmt.Errorf("%w: the state has digest %s, not %s", ErrDamaged, got, s.SHA256)
	}
	_, err = f.Seek(0, io.SeekStart)
	return err
}

func parseSnapshot(raw []byte) (Snapshot, error) {
	var s Snapshot
	if len(raw) > maxManifest {
		return s, fmt.Errorf("more than %d bytes", maxManifest)
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		return Snapshot{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	switch {
	case s.Version != snapshotVersion:
		return Snapshot{}, fmt.Errorf("version %d, this program knows %d", s.Version, snapshotVersion)
	case s.Bytes <= 0 || len(s.SHA256) != 64 || s.Key == "" || s.Networks < 1 || s.Networks > MaxNetworks:
		return Snapshot{}, fmt.Errorf("%w: it describes no state", ErrDamaged)
	}
	for i, slot := range s.Slots {
		if err := slot.Check(); err != nil || slices.Contains(s.Slots[:i], slot) {
			return Snapshot{}, fmt.Errorf("%w: slot %q", ErrDamaged, string(slot))
		}
	}
	if sum, err := s.sum(); err != nil || sum != s.Sum {
		return Snapshot{}, fmt.Errorf("%w: it was changed: its digest is %.12s, not %.12s", ErrDamaged, sum, s.Sum)
	}
	return s, nil
}

// Fits says what of a machine to be does not fit the state.
func (s Snapshot) Fits(spec Spec) error {
	if n := max(len(spec.Networks), 1); n != s.Networks {
		return fmt.Errorf("%w: it had %d network devices, the machine gets %d", ErrWrongTemplate, s.Networks, n)
	}
	if len(spec.Disks) != len(s.Slots) {
		return fmt.Errorf("%w: it had disks in %q, the machine gets %d", ErrWrongTemplate, s.Slots, len(spec.Disks))
	}
	for _, d := range spec.Disks {
		if !slices.Contains(s.Slots, d.Slot) {
			return fmt.Errorf("%w: it had no disk in slot %q", ErrWrongTemplate, string(d.Slot))
		}
	}
	return nil
}
