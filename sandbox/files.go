package sandbox

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"hauberk.dev/api/hand"
	"hauberk.dev/shim/client"
)

// Bounds of what a guest may give.
const (
	maxFile    = 256 << 20 // of ReadFile
	maxCopied  = 16 << 30
	maxEntries = 1 << 20
)

// Top lists what runs in a sandbox, by its guest's word.
func (b *Sandbox) Top(ctx context.Context) (list []hand.Task, err error) {
	err = b.with(ctx, "list processes of", func(s *client.Shim) error { list, err = s.Top(ctx, b.id); return err })
	return list, err
}

// spare is a name for a socket of a copy.
func (b *Sandbox) spare() string { return filepath.Join(b.run, "c"+rand.Text()[:12]) }

// CopyOut gives what a path of the container names as a tar stream, by its last
// name. What it holds is the guest's word, but for its paths, which stay below
// that name. The Guard's policy and the container's user have no say in it.
func (b *Sandbox) CopyOut(ctx context.Context, from string, files io.Writer) error {
	return b.with(ctx, "copy files of", func(s *client.Shim) error {
		return s.CopyOut(ctx, b.id, inside(from), b.spare(), files)
	})
}

// CopyIn puts the files of a tar stream below a directory of the container.
func (b *Sandbox) CopyIn(ctx context.Context, dir string, files io.Reader) error {
	return b.with(ctx, "copy files of", func(s *client.Shim) error {
		return s.CopyIn(ctx, b.id, inside(dir), b.spare(), files)
	})
}

// inside is a path of the container, from its root.
func inside(p string) string { return path.Join("/", p) }

// errEnough ends a copy of which enough was seen.
var errEnough = errors.New("enough was seen")

// out reads the stream of what a path of the container names. What f leaves is
// not waited for.
func (b *Sandbox) out(ctx context.Context, from string, f func(*tar.Reader) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r, w := io.Pipe()
	copied := make(chan error, 1)
	go func() {
		err := b.CopyOut(ctx, from, w)
		_ = w.CloseWithError(err) // never fails; nil is the end
		copied <- err
	}()
	err := f(tar.NewReader(r))
	_ = r.CloseWithError(errEnough) // never fails
	if err != nil {
		cancel()
		<-copied
		return err
	}
	if err := <-copied; err != nil && !errors.Is(err, errEnough) {
		return err
	}
	return nil
}

// ReadFile gives the content of a file of the container, of up to 256 MiB.
func (b *Sandbox) ReadFile(ctx context.Context, name string) (content []byte, err error) {
	err = b.out(ctx, name, func(t *tar.Reader) error {
		h, err := t.Next()
		switch {
		case err != nil:
			return err
		case h.Typeflag != tar.TypeReg:
			return fmt.Errorf("read %s of %s: it is no file", name, b.id)
		case h.Size > maxFile:
			return fmt.Errorf("read %s of %s: more than %d bytes", name, b.id, maxFile)
		}
		if content, err = io.ReadAll(t); err != nil {
			return err
		}
		// The stream is read to its end: who writes it must not find it broken.
		if _, err := t.Next(); err != io.EOF {
			return errors.Join(fmt.Errorf("read %s of %s: more than one file came", name, b.id), err)
		}
		return nil
	})
	return content, err
}

// WriteFile makes a file of the container, or takes the place of one. Its
// directory must be there.
func (b *Sandbox) WriteFile(ctx context.Context, name string, content []byte, mode fs.FileMode) error {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	name = inside(name)
	err := w.WriteHeader(&tar.Header{
		Name: path.Base(name), Typeflag: tar.TypeReg, Mode: int64(mode.Perm()), Size: int64(len(content)), ModTime: time.Now(), Format: tar.FormatPAX,
	})
	if err == nil {
		_, err = w.Write(content)
	}
	if err = errors.Join(err, w.Close()); err != nil {
		return fmt.Errorf("write %s of %s: %w", name, b.id, err)
	}
	return b.CopyIn(ctx, path.Dir(name), &buf)
}

// directory says whether a path of the container names one. What cannot be
// looked at does not.
func (b *Sandbox) directory(ctx context.Context, name string) (is bool) {
	_ = b.out(ctx, name, func(t *tar.Reader) error {
		h, err := t.Next()
		is = err == nil && h.Typeflag == tar.TypeDir
		return errEnough
	})
	return is
}

// Put copies a file or directory of this machine into the container, as cp -r
// would: into a directory that is there, else under the new name. Owners become
// root.
func (b *Sandbox) Put(ctx context.Context, from, to string) error {
	st, err := os.Stat(from)
	if err != nil {
		return fmt.Errorf("copy to %s: %w", b.id, err)
	}
	dir, name := path.Split(inside(to))
	switch {
	case st.IsDir() && strings.HasSuffix(from, "/."), to == "" || inside(to) == "/", strings.HasSuffix(to, "/"), b.directory(ctx, to):
		abs, err := filepath.Abs(from)
		if err != nil {
			return fmt.Errorf("copy to %s: %w", b.id, err)
		}
		dir, name = inside(to), filepath.Base(abs)
		if st.IsDir() && strings.HasSuffix(from, "/.") {
			name = "." // what is in it
		}
	}
	r, w := io.Pipe()
	go func() {
		_ = w.CloseWithError(pack(from, name, w)) // never fails; nil is the end
	}()
	err = b.CopyIn(ctx, dir, r)
	_ = r.CloseWithError(errEnough) // whoever packs ends
	return err
}

// pack writes a file or directory as a tar, under a name.
func pack(from, name string, to io.Writer) error {
	w := tar.NewWriter(to)
	top, err := filepath.EvalSymlinks(from) // what is named is meant; links in it are links
	if err != nil {
		return err
	}
	err = filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(top, p)
		if err != nil {
			return err
		}
		return packOne(w, p, path.Join(name, filepath.ToSlash(rel)))
	})
	return errors.Join(err, w.Close())
}

func packOne(w *tar.Writer, p, name string) error {
	info, err := os.Lstat(p)
	if err != nil {
		return err
	}
	h := &tar.Header{Name: name, Mode: int64(info.Mode().Perm()), ModTime: info.ModTime(), Format: tar.FormatPAX}
	switch info.Mode().Type() {
	case 0:
		h.Typeflag, h.Size = tar.TypeReg, info.Size()
	case fs.ModeDir:
		if name == "." {
			return nil
		}
		h.Typeflag, h.Name = tar.TypeDir, name+"/"
	case fs.ModeSymlink:
		if h.Linkname, err = os.Readlink(p); err != nil {
			return err
		}
		h.Typeflag = tar.TypeSymlink
	default:
		return fmt.Errorf("copy %s: a %v cannot be copied", p, info.Mode().Type())
	}
	if err := w.WriteHeader(h); err != nil || h.Size == 0 {
		return err
	}
	f, err := os.Open(p)
	if err != nil {
		return err
	}
	_, err = io.CopyN(w, f, h.Size)
	return errors.Join(err, f.Close())
}

// Get copies a file or directory of the container to this machine, as cp -r
// would. Nothing is written outside of where it goes, whatever the guest says;
// files belong to who calls, without set-id bits.
func (b *Sandbox) Get(ctx context.Context, from, to string) error {
	dir, name := to, path.Base(inside(from))
	if st, err := os.Stat(to); err != nil || !st.IsDir() {
		if strings.HasSuffix(to, "/") {
			return fmt.Errorf("copy from %s: %s is no directory", b.id, to)
		}
		dir, name = filepath.Dir(to), filepath.Base(to)
	}
	if name == "/" || name == "." || name == ".." {
		name = b.id // the whole root
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("copy from %s: %w", b.id, err)
	}
	defer root.Close()
	return b.out(ctx, from, func(t *tar.Reader) error { return unpack(t, root, name) })
}

// unpack writes a tar of a guest's below a directory, its first name changed.
func unpack(t *tar.Reader, root *os.Root, name string) error {
	left := int64(maxCopied)
	for n := 0; ; n++ {
		h, err := t.Next()
		if errors.Is(err, io.EOF) && n > 0 {
			return nil
		}
		if err != nil {
			return err
		}
		if left -= h.Size; n >= maxEntries || left < 0 {
			return fmt.Errorf("copy files: more than %d, or than %d bytes", maxEntries, int64(maxCopied))
		}
		_, below, _ := strings.Cut(path.Clean(h.Name), "/")
		if err := unpackOne(t, h, root, path.Join(name, below), name); err != nil {
			return fmt.Errorf("copy %q: %w", h.Name, err)
		}
	}
}

func unpackOne(t *tar.Reader, h *tar.Header, root *os.Root, to, name string) error {
	mode := fs.FileMode(h.Mode) & 0o777
	switch h.Typeflag {
	case tar.TypeDir:
		if err := root.Mkdir(to, 0o700|mode); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		return nil
	case tar.TypeReg:
		if err := root.Remove(to); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		f, err := root.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, t)
		return errors.Join(err, f.Close())
	case tar.TypeSymlink:
		if err := root.Remove(to); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return root.Symlink(h.Linkname, to)
	case tar.TypeLink:
		_, below, _ := strings.Cut(path.Clean(h.Linkname), "/")
		if err := root.Remove(to); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return root.Link(path.Join(name, below), to)
	}
	return fmt.Errorf("type %q cannot be copied", h.Typeflag)
}
