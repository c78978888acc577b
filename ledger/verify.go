package ledger

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/tlog"
)

// Report is what an offline verification saw.
type Report struct {
	Origin string    `json:"origin"`
	Size   uint64    `json:"size"`
	Root   tlog.Hash `json:"root"`
	Tiles  int       `json:"tiles"`
	First  time.Time `json:"first,omitzero"`
	Last   time.Time `json:"last,omitzero"`
}

// BadError names the first tile or entry that is not what it should be.
type BadError struct {
	Path  string
	Index int64 // of the entry, or -1
	Why   string
}

func (e *BadError) Error() string {
	if e.Index >= 0 {
		return fmt.Sprintf("%s: entry %d: %s", e.Path, e.Index, e.Why)
	}
	return fmt.Sprintf("%s: %s", e.Path, e.Why)
}

// VerifyDir verifies a log, or a copy of one, that nobody is writing. It takes
// no lock, asks nobody and changes nothing.
func VerifyDir(dir, verifierKey string) (Report, error) { return VerifyFS(os.DirFS(dir), verifierKey) }

// maxBundle is the largest entry bundle there can be.
const maxBundle = tileWidth * (2 + MaxEntry)

// VerifyFS checks everything: the signature of the checkpoint, every entry
// against its hash, every tile against the one below, the root against all of
// them. The error names the first that is bad.
func VerifyFS(fsys fs.FS, verifierKey string) (Report, error) {
	read := func(p string) ([]byte, error) { return readBounded(fsys, p) }
	raw, err := read(checkpointName)
	if err != nil {
		return Report{}, fmt.Errorf("verify ledger: %w", err)
	}
	head, err := ParseCheckpoint(raw, verifierKey)
	if err != nil {
		return Report{}, fmt.Errorf("verify ledger: %w", err)
	}
	if head.Size > math.MaxInt64>>tileHeight {
		return Report{}, fmt.Errorf("verify ledger: size %d is out of range", head.Size)
	}
	r := Report{Origin: head.Origin, Size: head.Size, Root: head.Root}
	if err := verifyTiles(read, int64(head.Size), &r); err != nil {
		return r, fmt.Errorf("verify ledger: %w", err)
	}
	root, err := tlog.TreeHash(int64(head.Size), tileReader(read, int64(head.Size)))
	if err != nil {
		return r, fmt.Errorf("verify ledger: %w", err)
	}
	if root != head.Root {
		return r, fmt.Errorf("verify ledger: %w", &BadError{Path: checkpointName, Index: -1,
			Why: fmt.Sprintf("root is %s, but the entries hash to %s", head.Root, root)})
	}
	return r, nil
}

func verifyTiles(read func(string) ([]byte, error), size int64, r *Report) error {
	return treeTiles(size, func(t tlog.Tile) error {
		r.Tiles++
		switch t.L {
		case entriesLevel:
			return verifyEntries(read, t.N, size, r)
		case 0:
			return nil // checked with its entries
		}
		return verifyParent(read, t, size)
	})
}

func verifyEntries(read func(string) ([]byte, error), n, size int64, r *Report) error {
	leaves, err := checkBundle(read, n, size)
	if err != nil {
		return err
	}
	for i, leaf := range leaves {
		at := n*tileWidth + int64(i)
		e, err := decodeEntry(leaf)
		if err != nil {
			return &BadError{Path: tilePath(treeTile(entriesLevel, n, size)), Index: at, Why: err.Error()}
		}
		if at == 0 {
			r.First = e.Time
		}
		r.Last = e.Time
	}
	return nil
}

// checkBundle reads an entry bundle and checks each entry against the tile
// that holds its hash.
func checkBundle(read func(string) ([]byte, error), n, size int64) ([][]byte, error) {
	bundle := treeTile(entriesLevel, n, size)
	leaves, err := readBundle(read, bundle)
	if err != nil {
		return nil, err
	}
	tile := treeTile(0, n, size)
	hashes, err := readTile(read, tile)
	if err != nil {
		return nil, err
	}
	for i, leaf := range leaves {
		if h := tlog.RecordHash(leaf); h != tlog.Hash(hashes[i*tlog.HashSize:][:tlog.HashSize]) {
			return nil, &BadError{Path: tilePath(bundle), Index: n*tileWidth + int64(i),
				Why: fmt.Sprintf("hashes to %s, but %s says otherwise: one of the two was changed", h, tilePath(tile))}
		}
	}
	return leaves, nil
}

// verifyParent checks each hash of a tile against the full tile below it.
func verifyParent(read func(string) ([]byte, error), t tlog.Tile, size int64) error {
	data, err := readTile(read, t)
	if err != nil {
		return err
	}
	for i := range t.W {
		below := treeTile(t.L-1, t.N*tileWidth+int64(i), size)
		child, err := readTile(read, below)
		if err != nil {
			return err
		}
		if want := tileRoot(child); want != tlog.Hash(data[i*tlog.HashSize:][:tlog.HashSize]) {
			return &BadError{Path: tilePath(t), Index: -1,
				Why: fmt.Sprintf("hash %d differs from that of %s, which is %s: one of the two was changed", i, tilePath(below), want)}
		}
	}
	return nil
}

// tileRoot is the hash over a full tile.
func tileRoot(data []byte) tlog.Hash {
	row := make([]tlog.Hash, len(data)/tlog.HashSize)
	for i := range row {
		row[i] = tlog.Hash(data[i*tlog.HashSize:][:tlog.HashSize])
	}
	for len(row) > 1 {
		for i := range len(row) / 2 {
			row[i] = tlog.NodeHash(row[2*i], row[2*i+1])
		}
		row = row[:len(row)/2]
	}
	return row[0]
}

// tileReader reads stored hashes from the tiles of a tree.
func tileReader(read func(string) ([]byte, error), size int64) tlog.HashReader {
	return tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, len(indexes))
		for i, at := range indexes {
			want := tlog.TileForIndex(tileHeight, at)
			t := treeTile(want.L, want.N, size)
			data, err := readTile(read, t)
			if err != nil {
				return nil, err
			}
			if out[i], err = tlog.HashFromTile(t, data, at); err != nil {
				return nil, err
			}
		}
		return out, nil
	})
}

func readBounded(fsys fs.FS, p string) ([]byte, error) {
	f, err := fsys.Open(p)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxBundle+1))
	if err == nil && len(data) > maxBundle {
		err = fmt.Errorf("%s is larger than %d bytes", p, maxBundle)
	}
	return data, err
}

// parseTilePath reads what tilePath prints, and nothing else.
func parseTilePath(p string) (tlog.Tile, error) {
	bad := fmt.Errorf("%.120q is not the path of a tile", p)
	full, width, partial := strings.Cut(p, ".p/")
	parts := strings.Split(full, "/")
	if len(parts) < 3 || len(parts) > 8 || parts[0] != "tile" {
		return tlog.Tile{}, bad
	}
	t := tlog.Tile{H: tileHeight, L: entriesLevel, W: tileWidth}
	var errs error
	if parts[1] != "entries" {
		t.L, errs = strconv.Atoi(parts[1])
	}
	for _, g := range parts[2:] {
		n, err := strconv.ParseInt(strings.TrimPrefix(g, "x"), 10, 64)
		errs = errors.Join(errs, err)
		t.N = t.N*1000 + n
	}
	if partial {
		var err error
		t.W, err = strconv.Atoi(width)
		errs = errors.Join(errs, err)
	}
	if errs != nil || t.L > 63 || t.W < 1 || t.W > tileWidth || t.N < 0 || tilePath(t) != p {
		return tlog.Tile{}, bad
	}
	return t, nil
}
