package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"hauberk.dev/internal/atomicfile"
)

// formatVersion names the way a chain of layers becomes a file. It rises with
// every change of the bytes, and old files are made again.
//
//	1  2026-11: first.
//	2  2026-11: whiteouts make no directories, hard links lead through links.
const formatVersion = 2

// record says what a cached file is. It lies beside it, and is written after.
type record struct {
	Version int    `json:"version"`
	Chain   string `json:"chain"`
	SHA256  string `json:"sha256"`
	Size    int64  `json:"size"`
	// Passwd and Group of the image, so that a name of a user can be resolved
	// without reading the file system again.
	Passwd string `json:"passwd,omitempty"`
	Group  string `json:"group,omitempty"`
}

// Pull returns the image that a manifest digest names, from cacheDir if it is
// there and whole, else made from its blobs. cacheDir is made if need be and
// must belong to this process's user alone.
//
// It can be called by several processes and goroutines at once; images are
// made one at a time. A Pull that fails or is killed leaves the cache as it
// was, except for a temporary file that the next one removes.
func Pull(ctx context.Context, from Blobs, manifestDigest, cacheDir string) (Image, error) {
	img, err := pull(ctx, from, manifestDigest, cacheDir, standard)
	if err != nil {
		return Image{}, fmt.Errorf("pull %q: %w", manifestDigest, err)
	}
	return img, nil
}

func pull(ctx context.Context, from Blobs, manifestDigest, cacheDir string, lim limits) (Image, error) {
	raw, err := read(ctx, from, manifestDigest, -1, lim.manifest)
	if err != nil {
		return Image{}, err
	}
	m, err := parseManifest(raw, lim)
	if err != nil {
		return Image{}, err
	}
	if raw, err = read(ctx, from, m.config.digest, m.config.size, lim.config); err != nil {
		return Image{}, err
	}
	conf, diffs, err := parseConfig(raw, len(m.layers))
	if err != nil {
		return Image{}, err
	}
	c := cache{dir: cacheDir, chain: chainID(diffs)}
	if err := openDir(cacheDir); err != nil {
		return Image{}, err
	}
	unlock, err := lock(ctx, cacheDir)
	if err != nil {
		return Image{}, err
	}
	defer unlock()
	rec, err := c.load()
	if err != nil {
		// Whatever is wrong with a cached file, making it again is the cure.
		if rec, err = c.make(ctx, from, m, diffs, lim); err != nil {
			return Image{}, err
		}
	}
	if err := conf.resolve(rec.Passwd, rec.Group); err != nil {
		return Image{}, err
	}
	return Image{Path: c.path(), Digest: manifestDigest, ErofsSHA256: rec.SHA256, Size: rec.Size, Config: conf}, nil
}

// chainID names a stack of layers, as the OCI image specification does.
func chainID(diffs []string) string {
	chain := diffs[0]
	for _, d := range diffs[1:] {
		sum := sha256.Sum256([]byte(chain + " " + d))
		chain = "sha256:" + hex.EncodeToString(sum[:])
	}
	return chain
}

// cache is the place of one image on this machine.
type cache struct {
	dir   string
	chain string
}

func (c cache) name() string   { return strings.TrimPrefix(c.chain, "sha256:") }
func (c cache) path() string   { return filepath.Join(c.dir, c.name()+".erofs") }
func (c cache) record() string { return filepath.Join(c.dir, c.name()+".json") }

// openDir makes the cache directory, and refuses one that others write to:
// what is recorded there is believed.
func openDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	st, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if st.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("open %s: its mode is %o, others may write to it; chmod go-w it", dir, st.Mode().Perm())
	}
	return nil
}

// Prune removes every cached image whose path is not in keep. A sandbox that
// has one attached keeps what it has.
func Prune(ctx context.Context, cacheDir string, keep []string) error {
	unlock, err := lock(ctx, cacheDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("prune %s: %w", cacheDir, err)
	}
	defer unlock()
	found, err := filepath.Glob(filepath.Join(cacheDir, "*.erofs"))
	if err != nil {
		return fmt.Errorf("prune %s: %w", cacheDir, err)
	}
	var errs []error
	for _, p := range found {
		if slices.Contains(keep, p) {
			continue
		}
		// The record goes first: a file without one is made again.
		for _, name := range []string{strings.TrimSuffix(p, ".erofs") + ".json", indexOf(p), p} {
			if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// lock lets one caller at a time into a cache directory.
func lock(ctx context.Context, dir string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(dir, ".lock"), os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	// The kernel releases the lock with the descriptor, so a caller that gave
	// up waiting leaves nothing held.
	got := make(chan error, 1)
	go func() { got <- flock(f) }()
	select {
	case err := <-got:
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", dir, err)
		}
		return func() { f.Close() }, nil
	case <-ctx.Done():
		go func() { <-got; f.Close() }()
		return nil, fmt.Errorf("lock %s: %w", dir, ctx.Err())
	}
}

func flock(f *os.File) error {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// load returns the record of a cached file whose content is what was recorded.
func (c cache) load() (record, error) {
	raw, err := os.ReadFile(c.record())
	if err != nil {
		return record{}, err
	}
	var r record
	if err := json.Unmarshal(raw, &r); err != nil {
		return record{}, fmt.Errorf("read %s: %w", c.record(), err)
	}
	if r.Version != formatVersion || r.Chain != c.chain {
		return record{}, fmt.Errorf("read %s: it is of version %d and chain %q", c.record(), r.Version, r.Chain)
	}
	return r, Verify(c.path(), r.SHA256)
}

// Verify says whether a file has the SHA-256 (lower-case hexadecimal) that was
// recorded for it. Whoever attaches an image to a sandbox asks first.
func Verify(path, want string) error {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != want {
		return fmt.Errorf("verify %s: content has SHA-256 %s, recorded is %s", path, got, want)
	}
	return nil
}

// make builds the file and its record. The lock is held.
func (c cache) make(ctx context.Context, from Blobs, m manifest, diffs []string, lim limits) (record, error) {
	if err := c.sweep(); err != nil {
		return record{}, err
	}
	spool, err := newSpool(c.dir)
	if err != nil {
		return record{}, err
	}
	defer spool.Close()
	tree, err := merge(ctx, from, m, diffs, spool, lim)
	if err != nil {
		return record{}, err
	}
	rec := record{Version: formatVersion, Chain: c.chain}
	if rec.Passwd, err = tree.text64K(spool, "etc/passwd"); err != nil {
		return record{}, err
	}
	if rec.Group, err = tree.text64K(spool, "etc/group"); err != nil {
		return record{}, err
	}
	var uuid [16]byte
	if _, err := hex.Decode(uuid[:], []byte(c.name()[:32])); err != nil {
		return record{}, err
	}
	p, err := layOut(tree.root.file, uuid)
	if err != nil {
		return record{}, err
	}
	sum := sha256.New()
	err = atomicfile.WriteFrom(c.path(), 0o400, func(w io.Writer) error {
		return p.write(io.MultiWriter(w, sum), spool)
	})
	if err != nil {
		return record{}, err
	}
	rec.SHA256, rec.Size = hex.EncodeToString(sum.Sum(nil)), p.blocks*blockSize
	raw, err := json.MarshalIndent(rec, "", "  ")
	if err != nil {
		return record{}, err
	}
	return rec, atomicfile.Write(c.record(), append(raw, '\n'), 0o400)
}

// merge reads the layers of an image, lowest first.
func merge(ctx context.Context, from Blobs, m manifest, diffs []string, spool io.Writer, lim limits) (*tree, error) {
	mg := newMerger(spool, lim)
	for i, l := range m.layers {
		if err := mg.add(ctx, from, l, diffs[i]); err != nil {
			return nil, err
		}
	}
	return mg.tree, nil
}

// text64K returns the content of a small file of the image, or nothing if it
// is not there, not a file, or too large to be what its name says.
func (t *tree) text64K(spool io.ReaderAt, name string) (string, error) {
	f, err := t.find(strings.Split(name, "/"))
	if err != nil || f.mode&modeType != modeRegular || f.size > 64<<10 {
		return "", nil
	}
	raw := make([]byte, f.size)
	if _, err := spool.ReadAt(raw, f.start); err != nil && !errors.Is(err, io.EOF) {
		return "", fmt.Errorf("read %s: %w", name, err)
	}
	return string(raw), nil
}

// sweep removes what a killed Pull left. The lock is held, so nobody else is
// writing.
func (c cache) sweep() error {
	names, err := os.ReadDir(c.dir)
	if err != nil {
		return err
	}
	for _, e := range names {
		if e.Type().IsRegular() && strings.HasPrefix(e.Name(), ".") && e.Name() != ".lock" {
			if err := os.Remove(filepath.Join(c.dir, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}
