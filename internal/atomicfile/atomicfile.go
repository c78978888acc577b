// Package atomicfile replaces files so that a reader, and a machine that lost
// power, sees the old content or the new, never a part.
//
// It keeps no two writers apart: of both, the last counts.
package atomicfile

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"syscall"
)

// Write replaces the file at path with data under the given mode, whatever the
// umask says. When it returns nil the new content is on the disk under its
// name; when it fails the old file, if any, is untouched.
func Write(path string, data []byte, mode fs.FileMode) error {
	return WriteFrom(path, mode, func(w io.Writer) error {
		_, err := w.Write(data)
		return err
	})
}

// WriteFrom is Write for content too large to hold: fill writes it.
func WriteFrom(path string, mode fs.FileMode, fill func(io.Writer) error) (err error) {
	dir := filepath.Dir(path)
	f, err := create(dir, filepath.Base(path))
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer func() {
		f.Close()
		if err != nil {
			os.Remove(f.Name())
			err = fmt.Errorf("write %s: %w", path, err)
		}
	}()
	if err := f.Chmod(mode); err != nil {
		return err
	}
	if err := fill(f); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return SyncDir(dir)
}

// create makes the file that is to replace name. The leading dot keeps what a
// killed writer left out of globs, the lock what is being written from Sweep.
func create(dir, name string) (*os.File, error) {
	for {
		f, err := os.CreateTemp(dir, "."+name+".*")
		if err != nil {
			return nil, err
		}
		var at syscall.Stat_t
		err = errors.Join(syscall.Flock(int(f.Fd()), syscall.LOCK_EX), syscall.Fstat(int(f.Fd()), &at))
		if err == nil && at.Nlink > 0 {
			return f, nil
		}
		f.Close()
		if err != nil {
			os.Remove(f.Name())
			return nil, err
		} // else a sweep came between
	}
}

// Sweep removes from a directory what killed writers left there, and nothing
// that somebody writes.
func Sweep(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("sweep %s: %w", dir, err)
	}
	for _, e := range entries {
		if leftover.MatchString(e.Name()) && e.Type().IsRegular() {
			if err := sweep(filepath.Join(dir, e.Name())); err != nil {
				return fmt.Errorf("sweep %s: %w", dir, err)
			}
		}
	}
	return nil
}

// leftover is what os.CreateTemp makes of the pattern in create.
var leftover = regexp.MustCompile(`^\..+\.[0-9]+$`)

func sweep(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|syscall.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); errors.Is(err, syscall.EWOULDBLOCK) {
		return nil
	} else if err != nil {
		return err
	}
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// SyncDir makes the names in a directory as durable as the files behind them.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
