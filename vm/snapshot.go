package vm

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"slices"
	"time"

	"hauberk.dev/internal/snapshot"
)

// besideMemory is what a state may have beside the guest's memory.
const besideMemory = 64 << 20

// Snapshot says what a saved state is of, and Origin what it can be restored with.
type (
	Snapshot = snapshot.Manifest
	Origin   = snapshot.Origin
)

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
	slots := make([]string, 0, len(saved.Slots))
	for _, slot := range saved.Slots {
		slots = append(slots, string(slot))
	}
	return Snapshot{
		Version: snapshot.Version, Key: m.journal.Key, Origin: m.journal.Origin, Slots: slots, Networks: saved.Networks,
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
func (m *Machine) Snapshot(ctx context.Context, dir string, note []byte) (Snapshot, error) {
	s, err := snapshot.Create(dir, func(w io.Writer) (Snapshot, error) {
		s, err := m.save(ctx, w)
		s.Note = note
		return s, err
	})
	if err != nil {
		return Snapshot{}, fmt.Errorf("save machine %s: %w", m.ID(), err)
	}
	return s, nil
}

// OpenSnapshot opens what Snapshot left, and checks that it is whole and as it
// was.
func OpenSnapshot(dir string) (Snapshot, *os.File, error) { return snapshot.Open(dir) }

// CheckOrigin says what of a machine to be is not as it was when the state was
// saved. The key decides; the rest explains.
func CheckOrigin(s Snapshot, key string, o Origin) error {
	if s.Key == key {
		return nil
	}
	if why := s.Origin.Differences(o); why != "" {
		return fmt.Errorf("%w: %s", ErrWrongTemplate, why)
	}
	return fmt.Errorf("%w: the state's key is %.12s, the machine needs %.12s", ErrWrongTemplate, s.Key, key)
}

// CheckFit says what of a machine to be does not fit the state.
func CheckFit(s Snapshot, spec Spec) error {
	if n := max(len(spec.Networks), 1); n != s.Networks {
		return fmt.Errorf("%w: it had %d network devices, the machine gets %d", ErrWrongTemplate, s.Networks, n)
	}
	if len(spec.Disks) != len(s.Slots) {
		return fmt.Errorf("%w: it had disks in %q, the machine gets %d", ErrWrongTemplate, s.Slots, len(spec.Disks))
	}
	for _, d := range spec.Disks {
		if !slices.Contains(s.Slots, string(d.Slot)) {
			return fmt.Errorf("%w: it had no disk in slot %q", ErrWrongTemplate, string(d.Slot))
		}
	}
	return nil
}
