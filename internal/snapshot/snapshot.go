// Package snapshot is the directory of a saved machine: the state that a monitor
// wrote, and the manifest that says what it is of, whether it is whole, and what
// it can be restored with.
//
// It starts no machine and knows no monitor; package vm does. Digests tell damage,
// not malice: who can write the directory can write another. So a file that others
// could have changed is not read.
package snapshot

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"hauberk.dev/internal/atomicfile"
)

// Version of a manifest.
const Version = 2

const (
	manifestName = "snapshot.json"
	stateName    = "state"
	maxManifest  = 8 << 20
)

// ErrDamaged says that a snapshot is not what was written.
var ErrDamaged = errors.New("snapshot is damaged")

// Manifest says what a saved state is of. The state holds all of a guest's
// memory, its secrets included.
type Manifest struct {
	Version int `json:"version"`
	// Key is a digest of everything a state depends on, as of a template; Origin
	// says what that was.
	Key    string `json:"key"`
	Origin Origin `json:"origin,omitzero"`
	// Slots of the machine had disks, which the state does not hold; Networks is the number of
	// network devices. Who restores the state must give as many of the same.
	Slots    []string `json:"slots,omitempty"`
	Networks int      `json:"networks"`
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

// Differences names what of another origin is not the same.
func (o Origin) Differences(other Origin) string {
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

// sum is the digest of a manifest.
func (s Manifest) sum() (string, error) {
	s.Sum = ""
	raw, err := json.Marshal(s)
	sum := sha256.Sum256(raw)
	return hex.EncodeToString(sum[:]), err
}

// Create makes the directory, with a state that save writes and a manifest that it
// gives. It is there whole or not at all.
func Create(dir string, save func(io.Writer) (Manifest, error)) (s Manifest, err error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return s, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	f, err := os.OpenFile(filepath.Join(dir, stateName), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return s, err
	}
	s, err = save(f)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return s, err
	}
	if s.Sum, err = s.sum(); err != nil {
		return s, err
	}
	raw, err := json.MarshalIndent(s, "", "\t")
	if err != nil {
		return s, err
	}
	return s, atomicfile.Write(filepath.Join(dir, manifestName), append(raw, '\n'), 0o600)
}

// Open opens a manifest and its state, and checks that both are whole and as they
// were.
func Open(dir string) (Manifest, *os.File, error) {
	s, f, err := open(dir)
	if err != nil {
		return Manifest{}, nil, fmt.Errorf("open snapshot %s: %w", dir, err)
	}
	return s, f, nil
}

func open(dir string) (Manifest, *os.File, error) {
	s, err := read(dir)
	if err != nil {
		return Manifest{}, nil, err
	}
	f, err := openOwn(filepath.Join(dir, stateName))
	if err != nil {
		return Manifest{}, nil, err
	}
	if err := s.verify(f); err != nil {
		return Manifest{}, nil, errors.Join(err, f.Close())
	}
	return s, f, nil
}

// Read reads a manifest, without the state.
func Read(dir string) (Manifest, error) {
	s, err := read(dir)
	if err != nil {
		return Manifest{}, fmt.Errorf("read snapshot %s: %w", dir, err)
	}
	return s, nil
}

func read(dir string) (Manifest, error) {
	manifest, err := openOwn(filepath.Join(dir, manifestName))
	if err != nil {
		return Manifest{}, err
	}
	raw, err := io.ReadAll(io.LimitReader(manifest, maxManifest+1))
	if err = errors.Join(err, manifest.Close()); err != nil {
		return Manifest{}, err
	}
	s, err := parse(raw)
	if err != nil {
		return Manifest{}, fmt.Errorf("%s: %w", manifestName, err)
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

func (s Manifest) verify(f *os.File) error {
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

func parse(raw []byte) (Manifest, error) {
	var s Manifest
	if len(raw) > maxManifest {
		return s, fmt.Errorf("more than %d bytes", maxManifest)
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		return Manifest{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	switch {
	case s.Version != Version:
		return Manifest{}, fmt.Errorf("version %d, this program knows %d", s.Version, Version)
	case s.Bytes <= 0 || len(s.SHA256) != 64 || s.Key == "" || s.Networks < 1:
		return Manifest{}, fmt.Errorf("%w: it describes no state", ErrDamaged)
	}
	if sum, err := s.sum(); err != nil || sum != s.Sum {
		return Manifest{}, fmt.Errorf("%w: it was changed: its digest is %.12s, not %.12s", ErrDamaged, sum, s.Sum)
	}
	return s, nil
}
