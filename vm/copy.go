package vm

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"syscall"
	"time"

	"hauberk.dev/api/guestproto"
)

// maxComplaint is the most that is kept of why a copy was not done.
const maxComplaint = 4 << 10

// CopyIn puts the files of a tar stream below a directory of the container.
func (p *Process) CopyIn(ctx context.Context, dir string, files io.Reader) error {
	err := p.copy(ctx, false, dir, func(q *Process) error {
		w := bufio.NewWriterSize(contextWriter{ctx, q}, guestproto.MaxChunk)
		if err := writeEntries(w, tar.NewReader(files)); err != nil {
			return err
		}
		if err := w.Flush(); err != nil {
			return err
		}
		// One that has read the last entry may have ended, and been forgotten: how
		// it ended says whether all is well.
		if err := q.CloseStdin(ctx); err != nil && !errors.Is(err, syscall.ESRCH) {
			return err
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("copy into container at %q: %w", dir, err)
	}
	return nil
}

// CopyOut writes what a path of the container names as a tar stream, by its
// last name. What the stream holds is the guest's word, but for its paths: they
// stay below that name.
func (p *Process) CopyOut(ctx context.Context, from string, files io.Writer) error {
	err := p.copy(ctx, true, from, func(q *Process) error {
		w := tar.NewWriter(files)
		if err := readEntries(bufio.NewReaderSize(q.Stdout(), guestproto.MaxChunk), w); err != nil {
			return err
		}
		return w.Close()
	})
	if err != nil {
		return fmt.Errorf("copy out of container from %q: %w", from, err)
	}
	return nil
}

type contextWriter struct {
	ctx context.Context
	p   *Process
}

func (w contextWriter) Write(b []byte) (int, error) { return w.p.WriteContext(w.ctx, b) }

// copy runs the guest's end of a copy, and f as this one.
func (p *Process) copy(ctx context.Context, out bool, at string, f func(*Process) error) error {
	if len(at) > guestproto.MaxCopyPath {
		return fmt.Errorf("the path has %d bytes", len(at))
	}
	q := newProcess(p.c, p.id, false)
	q.transient = true
	if err := p.c.begin(ctx, guestproto.VerbCopy, &guestproto.Copy{Container: p.id, Out: out, Path: at}, q); err != nil {
		return err
	}
	complaint := make(chan string, 1)
	go func() { // ends with the process' output, at the latest with the channel
		b, _ := io.ReadAll(io.LimitReader(q.Stderr(), maxComplaint))
		complaint <- string(b)
		q.stderr.discard()
	}()
	stop := context.AfterFunc(ctx, func() {
		q.stdout.cut(context.Cause(ctx)) // the guest may not care that it is to end
		q.end()
	})
	defer stop()
	err := f(q)
	if err != nil && ctx.Err() == nil { // else it has been told to
		q.end()
	}
	q.stdout.discard()
	status, waitErr := q.Wait(ctx)
	switch {
	case waitErr != nil:
		return errors.Join(err, waitErr)
	case status.Code != 0 && status.Signal == 0:
		return fmt.Errorf("the guest says: %q", <-complaint)
	case status.Code != 0 && err == nil:
		return fmt.Errorf("the guest's end was killed by signal %d", status.Signal)
	}
	return err
}

// end kills what a copy that was given up left running.
func (p *Process) end() {
	ctx, cancel := context.WithTimeout(context.Background(), callDeadline)
	defer cancel()
	_ = p.Signal(ctx, 9) // it may have ended by itself
	p.Discard()
}

// writeEntries turns a tar stream into that of a copy.
func writeEntries(w io.Writer, files *tar.Reader) error {
	var head []byte
	for {
		h, err := files.Next()
		if err == io.EOF {
			_, err := w.Write((&guestproto.CopyEntry{}).Append(head[:0]))
			return err
		}
		if err != nil {
			return fmt.Errorf("read tar stream: %w", err)
		}
		e, ok, err := entryOf(h)
		if err != nil {
			return fmt.Errorf("read tar stream: %q: %w", h.Name, err)
		}
		if !ok {
			continue
		}
		if _, err := w.Write(e.Append(head[:0])); err != nil {
			return err
		}
		if _, err := io.CopyN(w, files, int64(e.Size)); err != nil {
			return err
		}
	}
}

// entryOf makes an entry of a tar header; ok is false for one that says nothing
// of a file.
func entryOf(h *tar.Header) (e guestproto.CopyEntry, ok bool, err error) {
	name, err := inside(h.Name)
	if err != nil {
		return e, false, err
	}
	e = guestproto.CopyEntry{
		Mode: uint32(h.Mode) & 0o7777, UID: uint32(h.Uid), GID: uint32(h.Gid),
		UnixNanos: h.ModTime.UnixNano(), Path: name,
	}
	switch h.Typeflag {
	case tar.TypeReg:
		e.Kind, e.Size = guestproto.CopyRegular, uint64(h.Size)
	case tar.TypeDir:
		e.Kind = guestproto.CopyDir
		if name == "." {
			return e, false, nil // the directory itself, which is there
		}
	case tar.TypeSymlink:
		e.Kind, e.Link = guestproto.CopySymlink, h.Linkname
	case tar.TypeLink:
		if e.Link, err = inside(h.Linkname); err != nil {
			return e, false, fmt.Errorf("link %w", err)
		}
		e.Kind = guestproto.CopyLink
	case tar.TypeXGlobalHeader:
		return e, false, nil
	default:
		return e, false, fmt.Errorf("type %q cannot be copied", h.Typeflag)
	}
	if len(e.Path) > guestproto.MaxCopyPath || len(e.Link) > guestproto.MaxCopyPath {
		return e, false, errors.New("its path is too long")
	}
	if e.Kind == guestproto.CopySymlink && e.Link == "" {
		return e, false, errors.New("it leads nowhere")
	}
	return e, true, nil
}

// inside cleans a path that must not lead out of where it starts.
func inside(name string) (string, error) {
	clean := path.Clean(name)
	if name == "" || path.IsAbs(clean) || clean == ".." || strings.HasPrefix(clean, "../") || strings.Contains(clean, "\x00") {
		return "", fmt.Errorf("path %q is not below a directory", name)
	}
	return clean, nil
}

// readEntries turns the stream of a copy, which the guest wrote, into a tar
// stream.
func readEntries(r io.Reader, files *tar.Writer) error {
	buf := make([]byte, guestproto.CopyHead+2*guestproto.MaxCopyPath)
	for {
		if _, err := io.ReadFull(r, buf[:guestproto.CopyHead]); err != nil {
			return fmt.Errorf("read guest's copy: %w", err)
		}
		e, nameLen, linkLen, err := guestproto.ParseCopyHead(buf[:guestproto.CopyHead])
		if err != nil {
			return err
		}
		if e.Kind == guestproto.CopyEnd {
			return nil
		}
		names := buf[guestproto.CopyHead:][:nameLen+linkLen]
		if _, err := io.ReadFull(r, names); err != nil {
			return fmt.Errorf("read guest's copy: %w", err)
		}
		e.Path, e.Link = string(names[:nameLen]), string(names[nameLen:])
		h, err := headerOf(&e)
		if err != nil {
			return fmt.Errorf("read guest's copy: %w", err)
		}
		if err := files.WriteHeader(h); err != nil {
			return fmt.Errorf("write tar stream: %w", err)
		}
		if _, err := io.CopyN(files, r, int64(e.Size)); err != nil {
			return fmt.Errorf("copy %q: %w", e.Path, err)
		}
	}
}

// headerOf makes a tar header of an entry of the guest's.
func headerOf(e *guestproto.CopyEntry) (*tar.Header, error) {
	name, err := inside(e.Path)
	if err != nil {
		return nil, err
	}
	h := &tar.Header{
		Name: name, Mode: int64(e.Mode), Uid: int(e.UID), Gid: int(e.GID), Size: int64(e.Size),
		ModTime: time.Unix(0, e.UnixNanos), Linkname: e.Link, Format: tar.FormatPAX,
	}
	switch e.Kind {
	case guestproto.CopyDir:
		h.Typeflag, h.Name = tar.TypeDir, name+"/"
	case guestproto.CopyRegular:
		h.Typeflag = tar.TypeReg
	case guestproto.CopySymlink:
		h.Typeflag = tar.TypeSymlink
	case guestproto.CopyLink:
		h.Typeflag = tar.TypeLink
		if h.Linkname, err = inside(e.Link); err != nil {
			return nil, err
		}
	}
	return h, nil
}
