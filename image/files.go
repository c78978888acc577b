package image

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"hauberk.dev/internal/atomicfile"
)

// Bounds of what is read of an image.
const (
	maxFiles = 4 << 20
	maxDepth = 1024
)

// FilesWith gives the paths of the files of an image, by the SHA-256 of what they
// hold in lower-case hexadecimal, for those that are asked for. The files are
// digested once; what came of it lies beside the image, in the same cache.
func FilesWith(ctx context.Context, img string, digests []string) (map[string][]string, error) {
	found := map[string][]string{}
	if len(digests) == 0 {
		return found, nil
	}
	index := indexOf(img)
	if _, err := os.Stat(index); errors.Is(err, fs.ErrNotExist) {
		if err := digestFiles(ctx, img, index); err != nil {
			return nil, fmt.Errorf("digest files of %s: %w", img, err)
		}
	}
	f, err := os.Open(index)
	if err != nil {
		return nil, fmt.Errorf("read digests of %s: %w", img, err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 64<<10)
	for lines.Scan() {
		digest, quoted, _ := strings.Cut(lines.Text(), " ")
		if !slices.Contains(digests, digest) {
			continue
		}
		p, err := strconv.Unquote(quoted)
		if err != nil {
			return nil, fmt.Errorf("read digests of %s: line %q: %w", img, lines.Text(), err)
		}
		found[digest] = append(found[digest], p)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read digests of %s: %w", img, err)
	}
	return found, nil
}

// indexOf is where the digests of an image's files lie.
func indexOf(img string) string { return strings.TrimSuffix(img, ".erofs") + ".files" }

// digestFiles writes the digest and path of every file of an image.
func digestFiles(ctx context.Context, img, index string) error {
	f, err := os.Open(img)
	if err != nil {
		return err
	}
	defer f.Close()
	// Two at once write the same; the name begins as what a killed process left.
	temporary, err := os.CreateTemp(filepath.Dir(img), ".files-")
	if err != nil {
		return err
	}
	defer os.Remove(temporary.Name())
	defer temporary.Close()
	err = atomicfile.WriteFrom(temporary.Name(), 0o400, func(w io.Writer) error {
		known := map[uint64]string{}
		r := reader{ctx: ctx, f: f}
		return r.walk(func(p string, nid uint64, n stored) error {
			digest, ok := known[nid]
			if !ok {
				sum := sha256.New()
				if _, err := io.Copy(sum, n.data); err != nil {
					return err
				}
				digest = hex.EncodeToString(sum.Sum(nil))
				known[nid] = digest
			}
			_, err := fmt.Fprintf(w, "%s %s\n", digest, strconv.Quote(p))
			return err
		})
	})
	if err != nil {
		return err
	}
	return os.Rename(temporary.Name(), index)
}

// reader reads what this package writes: erofs without compression. It takes
// nothing it reads for granted.
type reader struct {
	ctx   context.Context
	f     io.ReaderAt
	files int
}

// stored is an inode of an image.
type stored struct {
	mode uint16
	size int64
	data *io.SectionReader
}

var errForeign = errors.New("not an image of this package")

// walk shows every regular file by its path.
func (r *reader) walk(each func(p string, nid uint64, n stored) error) error {
	var super [superSize]byte
	if _, err := r.f.ReadAt(super[:], superOffset); err != nil {
		return err
	}
	if binary.LittleEndian.Uint32(super[:]) != superMagic {
		return errForeign
	}
	return r.directory("/", uint64(binary.LittleEndian.Uint16(super[14:])), 0, each)
}

// inode reads an inode and says where its data lies: in blocks of its own, or
// all of it beside the inode.
func (r *reader) inode(nid uint64) (n stored, err error) {
	le := binary.LittleEndian
	var b [inodeSize]byte
	if nid > 1<<40 {
		return n, errForeign
	}
	at := int64(nid) * slotSize
	if _, err := r.f.ReadAt(b[:], at); err != nil {
		return n, err
	}
	format := le.Uint16(b[0:])
	n.mode, n.size = le.Uint16(b[4:]), int64(le.Uint64(b[8:]))
	if format&1 == 0 || n.size < 0 {
		return n, errForeign
	}
	switch format >> 1 {
	case layoutPlain:
		at = int64(le.Uint32(b[16:])) * blockSize
	case layoutInline:
		if n.size >= blockSize {
			return n, errForeign
		}
		at += inodeSize
		if attrs := int64(le.Uint16(b[2:])); attrs > 0 {
			at += xattrHeader + (attrs-1)*4
		}
	default:
		return n, errForeign
	}
	n.data = io.NewSectionReader(r.f, at, n.size)
	return n, nil
}

func (r *reader) directory(name string, nid uint64, depth int, each func(string, uint64, stored) error) error {
	dir, err := r.inode(nid)
	if err != nil {
		return err
	}
	if dir.mode&modeType != modeDir || depth > maxDepth {
		return errForeign
	}
	var block [blockSize]byte
	for at := int64(0); at < dir.size; at += blockSize {
		n := min(dir.size-at, blockSize)
		if _, err := dir.data.ReadAt(block[:n], at); err != nil {
			return err
		}
		if err := r.entries(name, block[:n], depth, each); err != nil {
			return err
		}
	}
	return nil
}

// entries reads one block of a directory: entries, then their names.
func (r *reader) entries(dir string, b []byte, depth int, each func(string, uint64, stored) error) error {
	le := binary.LittleEndian
	if len(b) < direntSize {
		return errForeign
	}
	count := int(le.Uint16(b[8:])) / direntSize
	if count == 0 || count*direntSize > len(b) {
		return errForeign
	}
	for i := range count {
		if err := r.ctx.Err(); err != nil {
			return err
		}
		if r.files++; r.files > maxFiles {
			return fmt.Errorf("more than %d files", maxFiles)
		}
		e := b[i*direntSize:]
		from, to := int(le.Uint16(e[8:])), len(b)
		if i+1 < count {
			to = int(le.Uint16(e[direntSize+8:]))
		}
		if from > to || to > len(b) {
			return errForeign
		}
		text, _, _ := strings.Cut(string(b[from:to]), "\x00")
		if text == "." || text == ".." {
			continue
		}
		if text == "" || strings.Contains(text, "/") {
			return errForeign
		}
		nid, p := le.Uint64(e), path.Join(dir, text)
		n, err := r.inode(nid)
		if err != nil {
			return err
		}
		switch n.mode & modeType {
		case modeDir:
			err = r.directory(p, nid, depth+1, each)
		case modeRegular:
			err = each(p, nid, n)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
