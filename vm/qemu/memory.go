package qemu

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// copyMemory copies a guest's memory into a file of its own, without what was
// never touched.
func copyMemory(from *os.File) (*os.File, error) {
	fi, err := from.Stat()
	if err != nil {
		return nil, fmt.Errorf("copy memory: %w", err)
	}
	to, err := memfd("guest", fi.Size())
	if err != nil {
		return nil, fmt.Errorf("copy memory: %w", err)
	}
	if err := eachExtent(from, fi.Size(), func(at, n int64) error { return copyExtent(to, from, at, n) }); err != nil {
		return nil, errors.Join(fmt.Errorf("copy memory: %w", err), to.Close())
	}
	return to, nil
}

// eachExtent calls f for each part of a file that is no hole.
func eachExtent(file *os.File, size int64, f func(at, n int64) error) error {
	fd := int(file.Fd())
	for at := int64(0); at < size; {
		start, err := unix.Seek(fd, at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // nothing but a hole is left
		}
		if err != nil {
			return err
		}
		end, err := unix.Seek(fd, start, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		if err := f(start, min(end, size)-start); err != nil {
			return err
		}
		at = end
	}
	return nil
}

// copyExtent copies n bytes at a place, inside the kernel.
func copyExtent(to, from *os.File, at, n int64) error {
	if _, err := unix.Seek(int(to.Fd()), at, io.SeekStart); err != nil {
		return err
	}
	for n > 0 {
		sent, err := unix.Sendfile(int(to.Fd()), int(from.Fd()), &at, int(min(n, 1<<30)))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && sent == 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
		n -= int64(sent)
	}
	return nil
}
