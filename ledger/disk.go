package ledger

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// Names in the directory beside the tiles.
const (
	checkpointName = "checkpoint"
	journalName    = "journal"
	lockName       = "lock"
)

// disk does the file work of a log. Every system call that changes a file
// goes through it, so that a test can make each of them fail once, or be the
// last the process does.
type disk struct {
	dir     string
	lock    *os.File
	journal *os.File
	before  func(op, path string) error // nil outside tests
}

// openDisk takes the directory for this process alone.
func openDisk(dir string) (*disk, error) {
	if err := os.MkdirAll(filepath.Join(dir, "tile"), 0o700); err != nil {
		return nil, fmt.Errorf("open ledger: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open ledger: %w", err)
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		holder, _ := io.ReadAll(io.LimitReader(lock, 64))
		lock.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("open ledger %s: process %s is writing it and a log has one writer; stop that process or name another directory: %w", dir, strings.TrimSpace(string(holder)), ErrLocked)
		}
		return nil, fmt.Errorf("open ledger %s: lock: %w", dir, err)
	}
	journal, err := os.OpenFile(filepath.Join(dir, journalName), os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		lock.Close()
		return nil, fmt.Errorf("open ledger: %w", err)
	}
	d := &disk{dir: dir, lock: lock, journal: journal}
	if err := errors.Join(lock.Truncate(0), writeString(lock, fmt.Sprintf("%d\n", os.Getpid())), d.syncDir(".")); err != nil {
		d.close()
		return nil, fmt.Errorf("open ledger %s: %w", dir, err)
	}
	return d, nil
}

func writeString(f *os.File, s string) error {
	_, err := f.WriteAt([]byte(s), 0)
	return err
}

func (d *disk) close() error { return errors.Join(d.journal.Close(), d.lock.Close()) }

func (d *disk) step(op, path string) error {
	if d.before == nil {
		return nil
	}
	return d.before(op, path)
}

func (d *disk) read(path string) ([]byte, error) {
	return os.ReadFile(filepath.Join(d.dir, filepath.FromSlash(path)))
}

// write writes and syncs a file that no checkpoint speaks of yet; what a
// killed writer left there is overwritten.
func (d *disk) write(path string, data []byte) (err error) {
	full := filepath.Join(d.dir, filepath.FromSlash(path))
	if err := d.step("open", path); err != nil {
		return err
	}
	f, err := os.OpenFile(full, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := d.step("write", path); err != nil {
		return err
	}
	if _, err := f.Write(data); err != nil {
		return err
	}
	if err := d.step("sync", path); err != nil {
		return err
	}
	return f.Sync()
}

// mkdir makes a directory and what is above it, and syncs each parent that
// got a new name.
func (d *disk) mkdir(path string) error {
	if fi, err := os.Stat(filepath.Join(d.dir, path)); err == nil && fi.IsDir() {
		return nil
	}
	if err := d.mkdir(filepath.Dir(path)); err != nil {
		return err
	}
	if err := d.step("mkdir", path); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(d.dir, path), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return d.syncDir(filepath.Dir(path))
}

func (d *disk) syncDir(path string) error {
	if err := d.step("syncdir", path); err != nil {
		return err
	}
	f, err := os.Open(filepath.Join(d.dir, path))
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func (d *disk) rename(from, to string) error {
	if err := d.step("rename", to); err != nil {
		return err
	}
	return os.Rename(filepath.Join(d.dir, from), filepath.Join(d.dir, to))
}

// remove drops a file that is no longer needed. Its failure costs space, not
// truth.
func (d *disk) remove(path string) {
	if d.step("remove", path) == nil {
		os.Remove(filepath.Join(d.dir, filepath.FromSlash(path)))
	}
}

// writeJournal replaces the journal and syncs it.
func (d *disk) writeJournal(data []byte) error {
	if err := d.step("journal-write", journalName); err != nil {
		return err
	}
	if _, err := d.journal.WriteAt(data, 0); err != nil {
		return err
	}
	if err := d.step("journal-truncate", journalName); err != nil {
		return err
	}
	if err := d.journal.Truncate(int64(len(data))); err != nil {
		return err
	}
	if err := d.step("journal-sync", journalName); err != nil {
		return err
	}
	return d.journal.Sync()
}

// clearJournal takes back what writeJournal wrote. It needs no space.
func (d *disk) clearJournal() error {
	if err := d.step("journal-clear", journalName); err != nil {
		return err
	}
	if err := d.journal.Truncate(0); err != nil {
		return err
	}
	if err := d.step("journal-clear-sync", journalName); err != nil {
		return err
	}
	return d.journal.Sync()
}

func (d *disk) readJournal() ([]byte, error) {
	return io.ReadAll(io.NewSectionReader(d.journal, 0, int64(maxJournal)+1))
}
