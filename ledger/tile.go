package ledger

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/mod/sumdb/tlog"
)

// Tiles are 256 hashes wide, as tlog-tiles fixes it.
const (
	tileHeight = 8
	tileWidth  = 1 << tileHeight
)

// entriesLevel marks an entry bundle instead of a tile of hashes.
const entriesLevel = -1

// tilePath is the path of a tile as tlog-tiles spells it:
// tile/<L>/<N>[.p/<W>], N in groups of three digits, all but the last
// prefixed with x.
func tilePath(t tlog.Tile) string {
	n := fmt.Sprintf("%03d", t.N%1000)
	for rest := t.N / 1000; rest > 0; rest /= 1000 {
		n = fmt.Sprintf("x%03d/%s", rest%1000, n)
	}
	level := "entries"
	if t.L != entriesLevel {
		level = fmt.Sprint(t.L)
	}
	path := "tile/" + level + "/" + n
	if t.W < tileWidth {
		path += fmt.Sprintf(".p/%d", t.W)
	}
	return path
}

// treeTile is tile n of a level in a tree of the given size, at the width it
// has there; its width is 0 if the tree has no such tile.
func treeTile(level int, n, size int64) tlog.Tile {
	hashes := size
	if level > 0 {
		hashes >>= tileHeight * level
	}
	return tlog.Tile{H: tileHeight, L: level, N: n, W: int(max(0, min(tileWidth, hashes-n*tileWidth)))}
}

// treeTiles calls f for every tile of a tree, entry bundles first, then level
// by level.
func treeTiles(size int64, f func(tlog.Tile) error) error {
	for level := entriesLevel; level <= 63/tileHeight; level++ {
		for n := int64(0); ; n++ {
			t := treeTile(level, n, size)
			if t.W == 0 {
				break
			}
			if err := f(t); err != nil {
				return err
			}
		}
	}
	return nil
}

// edgeTiles are the partial tiles of a tree: at most one for each level.
func edgeTiles(size int64) []tlog.Tile {
	var out []tlog.Tile
	for level := entriesLevel; level <= 63/tileHeight; level++ {
		hashes := size
		if level > 0 {
			hashes >>= tileHeight * level
		}
		if t := treeTile(level, hashes/tileWidth, size); t.W > 0 {
			out = append(out, t)
		}
	}
	return out
}

// appendBundle adds an entry to a bundle: its length in two bytes, then it.
func appendBundle(bundle, entry []byte) []byte {
	bundle = binary.BigEndian.AppendUint16(bundle, uint16(len(entry)))
	return append(bundle, entry...)
}

// splitBundle reads an entry bundle of exactly n entries.
func splitBundle(bundle []byte, n int) ([][]byte, error) {
	out := make([][]byte, 0, max(0, min(n, tileWidth)))
	rest := bundle
	for len(rest) > 0 {
		if len(out) == n {
			return nil, fmt.Errorf("has %d bytes behind its %d entries", len(rest), n)
		}
		if len(rest) < 2 {
			return nil, fmt.Errorf("is cut off in the length of entry %d of %d", len(out), n)
		}
		size := int(binary.BigEndian.Uint16(rest))
		if rest = rest[2:]; len(rest) < size {
			return nil, fmt.Errorf("is cut off in entry %d of %d: %d bytes of %d", len(out), n, len(rest), size)
		}
		out, rest = append(out, rest[:size:size]), rest[size:]
	}
	if len(out) != n {
		return nil, fmt.Errorf("is cut off: it has %d entries of %d", len(out), n)
	}
	return out, nil
}
