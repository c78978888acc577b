// Package secretfile creates and reads files that only their owner may see.
//
// A secret that others could have read or replaced is refused rather than
// used: the mode and the owner of the open file are checked, and a symbolic
// link is never followed.
package secretfile

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"hauberk.dev/internal/atomicfile"
)

// maxSize of a secret; keys are far smaller.
const maxSize = 64 << 10

// Create writes a new file with mode 0600. If the path exists in any form the
// error is fs.ErrExist and the file is untouched; a reader sees all of the
// content or no file.
func Create(path string, data []byte) (err error) {
	tmp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+"."+rand.Text())
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("create %s: %w", path, err)
	}
	defer os.Remove(tmp)
	_, err = f.Write(data)
	if err := errors.Join(err, f.Chmod(0o600), f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("create %s: %w", path, err)
	}
	// A link, unlike a rename, never replaces what another process made.
	if err := os.Link(tmp, path); err != nil {
		return fmt.Errorf("create %s: %w", path, err)
	}
	return atomicfile.SyncDir(filepath.Dir(path))
}

// Read returns the content of a secret file after checking that nobody else
// could have seen or written it.
func Read(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, syscall.ELOOP) {
		return nil, fmt.Errorf("read %s: is a symbolic link; put the file itself there", path)
	}
	if err != nil {
		return nil, fmt.Errorf("read secret: %w", err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if err := check(fi); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if len(data) > maxSize {
		return nil, fmt.Errorf("read %s: is larger than %d bytes", path, maxSize)
	}
	return data, nil
}

func check(fi fs.FileInfo) error {
	switch {
	case !fi.Mode().IsRegular():
		return fmt.Errorf("is not a regular file (mode %v)", fi.Mode())
	case fi.Mode().Perm()&0o077 != 0:
		return fmt.Errorf("has mode %04o, so others can reach it; replace the secret, then chmod 600", fi.Mode().Perm())
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return errors.New("has no owner this system can name")
	}
	if me := os.Geteuid(); int(st.Uid) != me && me != 0 {
		return fmt.Errorf("belongs to user %d, not to user %d who runs this program; chown it", st.Uid, me)
	}
	return nil
}
