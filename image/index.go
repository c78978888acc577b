package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"path"
	"strings"
)

// Index says what files an image has, without keeping what is in them.
type Index struct {
	// Config of the process that the image starts. Its user is not resolved.
	Config Config

	root  *file
	heads map[*file]head
}

// head is what is kept of a program.
type head struct {
	sha256      string
	interpreter string
}

// Program is an executable file of an image.
type Program struct {
	// Path without symbolic links.
	Path string
	// SHA256 of the file, in lower-case hexadecimal.
	SHA256 string
	// Interpreter that its first line names, if it is a script.
	Interpreter string
}

// maxLine is how much of a script's first line Linux reads.
const maxLine = 256

// ReadIndex reads the layers of an image once, using dir for a temporary file.
func ReadIndex(ctx context.Context, from Blobs, manifestDigest, dir string) (*Index, error) {
	x, err := readIndex(ctx, from, manifestDigest, dir, standard)
	if err != nil {
		return nil, fmt.Errorf("index %q: %w", manifestDigest, err)
	}
	return x, nil
}

func readIndex(ctx context.Context, from Blobs, manifestDigest, dir string, lim limits) (*Index, error) {
	raw, err := read(ctx, from, manifestDigest, -1, lim.manifest)
	if err != nil {
		return nil, err
	}
	m, err := parseManifest(raw, lim)
	if err != nil {
		return nil, err
	}
	if raw, err = read(ctx, from, m.config.digest, m.config.size, lim.config); err != nil {
		return nil, err
	}
	conf, diffs, err := parseConfig(raw, len(m.layers))
	if err != nil {
		return nil, err
	}
	spool, err := newSpool(dir)
	if err != nil {
		return nil, err
	}
	defer spool.Close()
	t, err := merge(ctx, from, m, diffs, spool, lim)
	if err != nil {
		return nil, err
	}
	x := &Index{Config: conf, root: t.root.file, heads: map[*file]head{}}
	return x, x.keep(ctx, x.root, spool)
}

// keep notes the heads of all programs below a directory.
func (x *Index) keep(ctx context.Context, d *file, spool io.ReaderAt) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	for _, e := range d.entries {
		f := e.file
		if f.isDir() {
			if err := x.keep(ctx, f, spool); err != nil {
				return err
			}
			continue
		}
		if _, seen := x.heads[f]; seen || f.mode&modeType != modeRegular || f.mode&0o111 == 0 {
			continue
		}
		h, err := readHead(io.NewSectionReader(spool, f.start, f.size))
		if err != nil {
			return err
		}
		x.heads[f] = h
	}
	return nil
}

func readHead(r *io.SectionReader) (h head, err error) {
	first := make([]byte, maxLine)
	n, err := r.ReadAt(first, 0)
	if err != nil && err != io.EOF {
		return h, fmt.Errorf("read program: %w", err)
	}
	if line, ok := bytes.CutPrefix(first[:n], []byte("#!")); ok {
		line, _, _ = bytes.Cut(line, []byte("\n"))
		if words := strings.Fields(string(line)); len(words) > 0 {
			h.interpreter = words[0]
		}
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, r); err != nil {
		return h, fmt.Errorf("read program: %w", err)
	}
	h.sha256 = hex.EncodeToString(sum.Sum(nil))
	return h, nil
}

// Real follows the symbolic links of an absolute path inside the image.
func (x *Index) Real(name string) (real string, ok bool) {
	_, real, ok = x.find(name)
	return real, ok
}

// Program finds an executable file by absolute path, through symbolic links.
func (x *Index) Program(name string) (Program, bool) {
	f, real, ok := x.find(name)
	if !ok {
		return Program{}, false
	}
	h, ok := x.heads[f]
	return Program{Path: real, SHA256: h.sha256, Interpreter: h.interpreter}, ok
}

// find walks as a container's kernel would.
func (x *Index) find(name string) (*file, string, bool) {
	at, names := []*file{x.root}, []string{}
	rest := strings.Split(name, "/")
	for links := 0; len(rest) > 0; {
		e := rest[0]
		rest = rest[1:]
		switch e {
		case "", ".":
			continue
		case "..":
			if len(names) > 0 {
				at, names = at[:len(at)-1], names[:len(names)-1]
			}
			continue
		}
		next, ok := at[len(at)-1].entries[e]
		switch {
		case !ok || len(at) > 1024:
			return nil, "", false
		case next.file.mode&modeType == modeSymlink:
			if links++; links > 40 {
				return nil, "", false
			}
			if path.IsAbs(next.file.target) {
				at, names = at[:1], names[:0]
			}
			rest = append(strings.Split(next.file.target, "/"), rest...)
		default:
			at, names = append(at, next.file), append(names, e)
		}
	}
	return at[len(at)-1], "/" + strings.Join(names, "/"), true
}
