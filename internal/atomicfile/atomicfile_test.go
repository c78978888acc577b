package atomicfile_test

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"hauberk.dev/internal/atomicfile"
)

func TestWriteReplaces(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o077))
	path := filepath.Join(t.TempDir(), "key")
	for _, c := range []struct {
		data string
		mode fs.FileMode
	}{{"one", 0o600}, {"two, longer", 0o644}, {"", 0o600}} {
		if err := atomicfile.Write(path, []byte(c.data), c.mode); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil || string(got) != c.data {
			t.Errorf("content is %q, %v; want %q", got, err, c.data)
		}
		fi, err := os.Stat(path)
		if err != nil || fi.Mode() != c.mode {
			t.Errorf("mode is %v, %v; want %v", fi.Mode(), err, c.mode)
		}
	}
	onlyFile(t, path)
}

func TestFailureLeavesTheOldFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	if err := atomicfile.Write(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	full := errors.New("no space left")
	err := atomicfile.WriteFrom(path, 0o600, func(w io.Writer) error {
		io.WriteString(w, "half of the n")
		return full
	})
	if !errors.Is(err, full) {
		t.Errorf("error is %v", err)
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != "old" {
		t.Errorf("content is %q, %v", got, err)
	}
	onlyFile(t, path)
}

func TestSweep(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.json")
	for _, name := range []string{"a.json", ".a.json.8723", ".hidden", "b.12"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o400); err != nil {
			t.Fatal(err)
		}
	}
	err := atomicfile.WriteFrom(path, 0o600, func(w io.Writer) error {
		if err := atomicfile.Sweep(dir); err != nil {
			return err
		}
		_, err := w.Write([]byte("kept"))
		return err
	})
	if got, readErr := os.ReadFile(path); err != nil || readErr != nil || string(got) != "kept" {
		t.Errorf("swept while it was written: %q, %v, %v", got, err, readErr)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 3 || left[0].Name() != ".hidden" || left[1].Name() != "a.json" || left[2].Name() != "b.12" {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestSweepsAtOnce has writers and sweeps in each other's way.
func TestSweepsAtOnce(t *testing.T) {
	dir := t.TempDir()
	var writers sync.WaitGroup
	for range 4 {
		writers.Go(func() {
			for range 50 {
				if err := atomicfile.Write(filepath.Join(dir, "a"), []byte("x"), 0o600); err != nil {
					t.Error(err)
				}
			}
		})
	}
	stop := make(chan struct{})
	var sweeps sync.WaitGroup
	for range 2 {
		sweeps.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := atomicfile.Sweep(dir); err != nil {
					t.Error(err)
				}
			}
		})
	}
	writers.Wait()
	close(stop)
	sweeps.Wait()
	onlyFile(t, filepath.Join(dir, "a"))
}

func TestWriteOverADirectory(t *testing.T) {
	path := filepath.Join(t.TempDir(), "dir")
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := atomicfile.Write(path, nil, 0o600); err == nil {
		t.Error("a directory was replaced by a file")
	}
	onlyFile(t, path)
}

func TestWriteNowhere(t *testing.T) {
	err := atomicfile.Write(filepath.Join(t.TempDir(), "absent", "file"), nil, 0o600)
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error is %v", err)
	}
}

// onlyFile reports anything left beside path.
func onlyFile(t *testing.T, path string) {
	t.Helper()
	names, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		if n.Name() != filepath.Base(path) {
			t.Errorf("left behind: %s", n.Name())
		}
	}
}
