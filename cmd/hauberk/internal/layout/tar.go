// Package layout packs an OCI image layout for the gate, and unpacks what the
// control plane exports.
//
// It judges nothing: what is in a layout is for the gate to verify. It only
// makes sure that what is sent is a layout, plain files, and of bounded size.
package layout

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"time"
)

// Bounds of what is sent.
const (
	MaxFiles = 100_000
	MaxBytes = 8 << 30
)

// Pack writes the layout in dir as a tar. The same files give the same bytes.
func Pack(w io.Writer, dir fs.FS) error {
	for _, name := range []string{"oci-layout", "index.json"} {
		if _, err := fs.Stat(dir, name); err != nil {
			return fmt.Errorf("read image layout: %w: build it with hauberk build", err)
		}
	}
	t := tar.NewWriter(w)
	files, total := 0, int64(0)
	err := fs.WalkDir(dir, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if files++; files > MaxFiles {
			return fmt.Errorf("more than %d files", MaxFiles)
		}
		if !d.Type().IsRegular() { // a link may name anything on this machine
			return fmt.Errorf("%s is a %v, not a plain file", name, d.Type())
		}
		n, err := pack(t, dir, name, MaxBytes-total)
		total += n
		return err
	})
	if err != nil {
		return fmt.Errorf("pack image layout: %w", err)
	}
	return t.Close()
}

func pack(t *tar.Writer, dir fs.FS, name string, most int64) (int64, error) {
	f, err := dir.Open(name)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	fi, err := f.Stat()
	switch {
	case err != nil:
		return 0, err
	case fi.Size() > most:
		return 0, fmt.Errorf("more than %d bytes", int64(MaxBytes))
	}
	h := &tar.Header{Typeflag: tar.TypeReg, Name: path.Clean(name), Size: fi.Size(), Mode: 0o644, ModTime: time.Unix(0, 0), Format: tar.FormatPAX}
	if err := t.WriteHeader(h); err != nil {
		return 0, err
	}
	return io.Copy(t, f)
}

// Unpack writes the plain files of a tar below dir, which must exist. Names
// that would leave it, links and devices are refused.
func Unpack(r io.Reader, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	t := tar.NewReader(io.LimitReader(r, MaxBytes))
	for files := 0; ; files++ {
		h, err := t.Next()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("unpack: %w", err)
		case files >= MaxFiles:
			return fmt.Errorf("unpack: more than %d files", MaxFiles)
		case h.Typeflag == tar.TypeDir:
			continue
		case h.Typeflag != tar.TypeReg:
			return fmt.Errorf("unpack %q: not a plain file", h.Name)
		}
		if err := place(root, path.Clean(h.Name), t); err != nil {
			return fmt.Errorf("unpack %q: %w", h.Name, err)
		}
	}
}

// place writes one file. The root refuses every name that leads out of it.
func place(root *os.Root, name string, r io.Reader) error {
	if err := root.MkdirAll(path.Dir(name), 0o700); err != nil {
		return err
	}
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
}
