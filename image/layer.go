package image

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"math"
	"os"
	"strings"
)

const (
	whiteout = ".wh."
	opaque   = ".wh..wh..opq"
	metadata = ".wh..wh." // of aufs, for itself
)

// merger merges layers into a tree, and their data into a spool.
type merger struct {
	tree  *tree
	spool io.Writer
	at    int64 // end of the spool

	left    int64 // bytes that may still be unpacked
	entries int   // entries that may still come
	layer   int
}

func newMerger(spool io.Writer, lim limits) *merger {
	return &merger{tree: newTree(lim), spool: spool, left: lim.unpacked, entries: lim.entries}
}

// errTooLarge is met when an image unpacks to more than it may.
var errTooLarge = errors.New("it unpacks to more than an image may hold")

// add merges one layer, checking the digest it has as stored and the one it
// has unpacked.
func (m *merger) add(ctx context.Context, from Blobs, b blob, diff string) error {
	m.layer++
	rc, err := from.Open(ctx, b.digest)
	if err != nil {
		return fmt.Errorf("open layer %s: %w", b.digest, err)
	}
	defer rc.Close()
	stored := &counted{r: io.LimitReader(rc, b.size+1), sum: sha256.New(), ctx: ctx}
	if err := m.unpack(stored, b.gzip, diff); err != nil {
		return fmt.Errorf("read layer %s: %w", b.digest, err)
	}
	if stored.n != b.size {
		return fmt.Errorf("read layer %s: it does not have the %d bytes its descriptor says", b.digest, b.size)
	}
	if got := stored.digest(); got != b.digest {
		return fmt.Errorf("read layer %s: content has digest %s", b.digest, got)
	}
	return nil
}

// unpack reads a whole layer, to the last byte, so that what was checked is
// what was used.
func (m *merger) unpack(stored *counted, zipped bool, diff string) error {
	var r io.Reader = stored
	if zipped {
		z, err := gzip.NewReader(stored)
		if err != nil {
			return fmt.Errorf("decompress: %w", err)
		}
		r = z
	}
	plain := &counted{r: io.LimitReader(r, m.left+1), sum: sha256.New(), ctx: stored.ctx}
	if err := m.read(tar.NewReader(plain)); err != nil {
		if plain.n > m.left {
			return errTooLarge
		}
		return err
	}
	if _, err := io.Copy(io.Discard, plain); err != nil { // what follows the end mark
		return fmt.Errorf("read to its end: %w", err)
	}
	if plain.n > m.left {
		return errTooLarge
	}
	m.left -= plain.n
	if _, err := io.Copy(io.Discard, stored); err != nil {
		return fmt.Errorf("read to its end: %w", err)
	}
	if got := plain.digest(); got != diff {
		return fmt.Errorf("unpacked content has digest %s, the configuration says %s", got, diff)
	}
	return nil
}

// read merges the entries of a tar.
func (m *merger) read(tr *tar.Reader) error {
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read tar: %w", err)
		}
		if m.entries--; m.entries < 0 {
			return fmt.Errorf("more than %d entries", m.tree.limit.entries)
		}
		if err := m.entry(h, tr); err != nil {
			return err
		}
	}
}

// entry merges one entry.
func (m *merger) entry(h *tar.Header, data io.Reader) error {
	elems, err := m.tree.cleanName(h.Name)
	if err != nil {
		return err
	}
	if n := len(elems); n > 0 && strings.HasPrefix(elems[n-1], whiteout) {
		return m.mark(elems[:n-1], elems[n-1])
	}
	if h.Typeflag == tar.TypeLink {
		return m.link(elems, h)
	}
	f, err := m.file(h, data)
	if err != nil {
		return fmt.Errorf("%q: %w", h.Name, err)
	}
	return m.tree.put(elems, f, m.layer)
}

// mark handles a whiteout.
func (m *merger) mark(dir []string, name string) error {
	switch {
	case name == opaque:
		return m.tree.opaque(dir, m.layer)
	case strings.HasPrefix(name, metadata):
		return nil
	}
	target := strings.TrimPrefix(name, whiteout)
	if target == "" || target == "." || target == ".." {
		return fmt.Errorf("whiteout %q names nothing", name)
	}
	return m.tree.whiteout(dir, target, m.layer)
}

// link gives a file another name.
func (m *merger) link(elems []string, h *tar.Header) error {
	to, err := m.tree.cleanName(h.Linkname)
	if err != nil {
		return fmt.Errorf("%q: hard link: %w", h.Name, err)
	}
	f, err := m.tree.find(to)
	if err != nil {
		return fmt.Errorf("%q: hard link to %w", h.Name, err)
	}
	if f.isDir() || len(elems) == 0 {
		return fmt.Errorf("%q: hard link to the directory %q", h.Name, h.Linkname)
	}
	return m.tree.put(elems, f, m.layer)
}

// file makes the inode of an entry that is not a link.
func (m *merger) file(h *tar.Header, data io.Reader) (*file, error) {
	if h.Uid < 0 || h.Uid >= math.MaxUint32 || h.Gid < 0 || h.Gid >= math.MaxUint32 {
		return nil, fmt.Errorf("owner %d:%d is out of range", h.Uid, h.Gid)
	}
	f := &file{
		mode: uint16(h.Mode & 0o7777),
		uid:  uint32(h.Uid),
		gid:  uint32(h.Gid),
	}
	if s := h.ModTime.Unix(); s > 0 {
		f.sec, f.nsec = s, uint32(h.ModTime.Nanosecond())
	}
	var err error
	if f.xattrs, err = xattrs(h.PAXRecords, m.tree.limit.xattrs); err != nil {
		return nil, err
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		f.mode |= modeRegular
		return f, m.spoolData(f, h.Size, data)
	case tar.TypeDir:
		f.mode |= modeDir
		f.entries = map[string]*entry{}
	case tar.TypeSymlink:
		f.mode |= modeSymlink | 0o777
		f.target = h.Linkname
		if f.target == "" || len(f.target) > m.tree.limit.path || strings.ContainsRune(f.target, 0) {
			return nil, fmt.Errorf("symbolic link to %q", h.Linkname)
		}
	case tar.TypeFifo:
		f.mode |= modeFIFO
	case tar.TypeChar, tar.TypeBlock:
		return nil, errors.New("it is a device; images may not bring devices")
	default:
		return nil, fmt.Errorf("entries of type %q are not known", h.Typeflag)
	}
	return f, nil
}

// spoolData keeps the data of a regular file. The size comes before the data,
// and a sparse file has little data for its size, so the size is checked too.
func (m *merger) spoolData(f *file, size int64, data io.Reader) error {
	if size < 0 || size > m.left || m.at+size > m.tree.limit.unpacked {
		return errTooLarge
	}
	n, err := io.Copy(m.spool, io.LimitReader(data, size))
	if err != nil {
		return fmt.Errorf("copy data: %w", err)
	}
	if n != size {
		return fmt.Errorf("copy data: %d bytes of %d", n, size)
	}
	f.start, f.size = m.at, size
	m.at += n
	return nil
}

// xattrs returns the extended attributes among the records of an entry.
func xattrs(records map[string]string, limit int) (map[string]string, error) {
	var out map[string]string
	total := 0
	for key, value := range records {
		name, ok := strings.CutPrefix(key, "SCHILY.xattr.")
		if !ok {
			continue
		}
		if _, _, ok := xattrPrefix(name); !ok {
			return nil, fmt.Errorf("extended attribute %q is of no known kind", name)
		}
		if strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay.") {
			return nil, fmt.Errorf("extended attribute %q would steer the guest's overlay", name)
		}
		if total += len(name) + len(value) + 8; total > limit {
			return nil, fmt.Errorf("extended attributes are larger than %d bytes", limit)
		}
		if out == nil {
			out = map[string]string{}
		}
		out[name] = value
	}
	return out, nil
}

// counted reads, counts, hashes, and stops when its context ends.
type counted struct {
	r   io.Reader
	n   int64
	sum hash.Hash
	ctx context.Context
}

func (c *counted) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := c.r.Read(p)
	c.n += int64(n)
	c.sum.Write(p[:n])
	return n, err
}

func (c *counted) digest() string { return "sha256:" + hex.EncodeToString(c.sum.Sum(nil)) }

// newSpool opens a file that nothing else can open, and that is gone when it
// is closed.
func newSpool(dir string) (*os.File, error) {
	f, err := os.CreateTemp(dir, ".spool-*")
	if err != nil {
		return nil, fmt.Errorf("make spool: %w", err)
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, fmt.Errorf("make spool: %w", err)
	}
	return f, nil
}
