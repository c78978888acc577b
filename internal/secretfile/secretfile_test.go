package secretfile_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"hauberk.dev/internal/secretfile"
)

func TestCreateOnce(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0))
	path := filepath.Join(t.TempDir(), "key")
	var wg sync.WaitGroup
	var mu sync.Mutex
	made := 0
	for i := range 8 {
		wg.Go(func() {
			err := secretfile.Create(path, []byte{byte(i)})
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				made++
			} else if !errors.Is(err, fs.ErrExist) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if made != 1 {
		t.Errorf("%d of 8 created the file", made)
	}
	if data, err := secretfile.Read(path); err != nil || len(data) != 1 {
		t.Errorf("read %v, %v", data, err)
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), ".*")); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestReadRefuses(t *testing.T) {
	dir := t.TempDir()
	good := filepath.Join(dir, "good")
	if err := secretfile.Create(good, []byte("s")); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		make func(path string) error
		want string
	}{
		{"symlink", func(p string) error { return os.Symlink(good, p) }, "symbolic link"},
		{"group", func(p string) error { return os.WriteFile(p, nil, 0o640) }, "0640"},
		{"directory", func(p string) error { return os.Mkdir(p, 0o700) }, "regular"},
		{"fifo", func(p string) error { return syscall.Mkfifo(p, 0o600) }, "regular"},
		{"huge", func(p string) error { return os.WriteFile(p, make([]byte, 65<<10), 0o600) }, "larger"},
		{"absent", func(string) error { return nil }, "no such file"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := filepath.Join(dir, c.name)
			if err := c.make(p); err != nil {
				t.Fatal(err)
			}
			if _, err := secretfile.Read(p); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v, want %q", err, c.want)
			}
		})
	}
}
