package image

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
)

// Types of a file as Linux has them in a mode.
const (
	modeType    = 0o170000
	modeFIFO    = 0o010000
	modeDir     = 0o040000
	modeRegular = 0o100000
	modeSymlink = 0o120000
)

// file is an inode: what hard links share.
type file struct {
	mode   uint16 // type and permissions, as Linux has them
	uid    uint32
	gid    uint32
	sec    int64
	nsec   uint32
	xattrs map[string]string
	target string // of a symbolic link
	// start and size of a regular file's data in the spool.
	start, size int64

	entries map[string]*entry // of a directory
}

func (f *file) isDir() bool { return f.mode&modeType == modeDir }

// entry is a name in a directory, with the layer that last set it.
type entry struct {
	file  *file
	layer int
}

// tree is the merged content of the layers so far.
type tree struct {
	root  *entry
	limit limits
	made  int // entries made so far
	text  int // bytes of names, link targets and attributes kept so far
	work  int // entries looked at for whiteouts
}

func newTree(lim limits) *tree {
	return &tree{root: &entry{file: newDir()}, limit: lim}
}

// charge counts an entry that is about to be kept. A short name can make a
// thousand directories, so it is not enough to count what the layers hold.
func (t *tree) charge(name string, f *file) error {
	t.made++
	t.text += len(name) + len(f.target)
	for k, v := range f.xattrs {
		t.text += len(k) + len(v)
	}
	if t.made > t.limit.entries {
		return fmt.Errorf("more than %d files", t.limit.entries)
	}
	if t.text > t.limit.text {
		return fmt.Errorf("names and attributes of more than %d bytes", t.limit.text)
	}
	return nil
}

func newDir() *file {
	return &file{mode: modeDir | 0o755, entries: map[string]*entry{}}
}

// cleanName returns the elements of a name in a layer. The root has none.
func (t *tree) cleanName(name string) ([]string, error) {
	if len(name) > t.limit.path {
		return nil, fmt.Errorf("name is %d bytes long, at most %d are taken", len(name), t.limit.path)
	}
	if strings.ContainsRune(name, 0) {
		return nil, fmt.Errorf("name %q holds a zero byte", name)
	}
	if path.IsAbs(name) {
		return nil, fmt.Errorf("name %q is absolute", name)
	}
	var out []string
	for e := range strings.SplitSeq(name, "/") {
		switch {
		case e == "" || e == ".":
		case e == "..":
			return nil, fmt.Errorf("name %q climbs with %q", name, "..")
		case len(e) > 255:
			return nil, fmt.Errorf("name %q has an element longer than 255 bytes", name)
		default:
			out = append(out, e)
		}
	}
	return out, nil
}

// dir returns the directory the elements lead to, and makes directories that no
// layer mentions.
func (t *tree) dir(elems []string, layer int) (*file, error) {
	return t.walk(elems, func(at *file, name string) (*entry, error) {
		e := &entry{file: newDir(), layer: layer}
		if err := t.charge(name, e.file); err != nil {
			return nil, err
		}
		at.entries[name] = e
		return e, nil
	})
}

// existing is dir that makes nothing.
func (t *tree) existing(elems []string) (*file, error) {
	return t.walk(elems, func(_ *file, name string) (*entry, error) {
		return nil, fmt.Errorf("%q: %w", name, fs.ErrNotExist)
	})
}

// walk returns the directory the elements lead to, following symbolic links
// inside the image as a container's kernel would. A link that climbs above the
// root is refused.
func (t *tree) walk(elems []string, missing func(at *file, name string) (*entry, error)) (*file, error) {
	stack := []*file{t.root.file}
	links := 0
	rest := append([]string(nil), elems...)
	for len(rest) > 0 {
		e := rest[0]
		rest = rest[1:]
		if e == "" || e == "." {
			continue
		}
		if e == ".." {
			if len(stack) == 1 {
				return nil, fmt.Errorf("%q passes a symbolic link that leads out of the image", path.Join(elems...))
			}
			stack = stack[:len(stack)-1]
			continue
		}
		at := stack[len(stack)-1]
		next, ok := at.entries[e]
		switch {
		case !ok:
			made, err := missing(at, e)
			if err != nil {
				return nil, err
			}
			stack = append(stack, made.file)
		case next.file.isDir():
			stack = append(stack, next.file)
		case next.file.mode&modeType == modeSymlink:
			if links++; links > 40 {
				return nil, fmt.Errorf("%q passes more than 40 symbolic links", path.Join(elems...))
			}
			if path.IsAbs(next.file.target) {
				stack = stack[:1]
			}
			rest = append(strings.Split(next.file.target, "/"), rest...)
		default:
			return nil, fmt.Errorf("%q: %q is not a directory", path.Join(elems...), e)
		}
		if len(stack) > 1024 {
			return nil, fmt.Errorf("%q is more than 1024 directories deep", path.Join(elems...))
		}
	}
	return stack[len(stack)-1], nil
}

// put names a file. A directory put on a directory keeps its entries.
func (t *tree) put(elems []string, f *file, layer int) error {
	if len(elems) == 0 {
		if !f.isDir() {
			return fmt.Errorf("the root is not a directory")
		}
		f.entries = t.root.file.entries
		t.root = &entry{file: f, layer: layer}
		return nil
	}
	at, err := t.dir(elems[:len(elems)-1], layer)
	if err != nil {
		return err
	}
	name := elems[len(elems)-1]
	if old, ok := at.entries[name]; ok && old.file.isDir() && f.isDir() {
		f.entries = old.file.entries
	}
	if err := t.charge(name, f); err != nil {
		return err
	}
	at.entries[name] = &entry{file: f, layer: layer}
	return nil
}

// find returns the file the elements name, without following a link in the
// last one.
func (t *tree) find(elems []string) (*file, error) {
	if len(elems) == 0 {
		return t.root.file, nil
	}
	at, err := t.existing(elems[:len(elems)-1])
	if err != nil {
		return nil, err
	}
	e, ok := at.entries[elems[len(elems)-1]]
	if !ok {
		return nil, fmt.Errorf("%q: %w", path.Join(elems...), fs.ErrNotExist)
	}
	return e.file, nil
}

// whiteout removes what lower layers put under a name; what this layer put
// there stays, whatever the order of the entries.
func (t *tree) whiteout(dir []string, name string, layer int) error {
	at, err := t.existing(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // nothing to remove, and nothing to make for that
	}
	if err != nil {
		return err
	}
	if e, ok := at.entries[name]; ok && t.prune(e, layer) {
		delete(at.entries, name)
	}
	return t.worked()
}

// opaque removes what lower layers put into a directory.
func (t *tree) opaque(dir []string, layer int) error {
	at, err := t.existing(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for name, e := range at.entries {
		if t.prune(e, layer) {
			delete(at.entries, name)
		}
	}
	return t.worked()
}

// prune removes what is below an entry and older than layer, and says whether
// the entry itself has gone with it.
func (t *tree) prune(e *entry, layer int) bool {
	t.work++
	for name, child := range e.file.entries {
		if t.prune(child, layer) {
			delete(e.file.entries, name)
		}
	}
	return e.layer < layer && len(e.file.entries) == 0
}

// worked refuses layers whose whiteouts, repeated, cost more than any honest
// image.
func (t *tree) worked() error {
	if t.work > 16*t.limit.entries {
		return fmt.Errorf("whiteouts that look at more than %d files", 16*t.limit.entries)
	}
	return nil
}
