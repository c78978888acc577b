package ledger

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"sync"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// Errors to branch on.
var (
	ErrLocked = errors.New("the ledger is locked")
	ErrClosed = errors.New("the ledger is closed")
	ErrRange  = errors.New("the ledger has no such entry")
)

// Log is an open log. Its methods may be called at the same time.
type Log struct {
	disk     *disk
	signer   *Signer
	verifier note.Verifier

	commitMu sync.Mutex // one batch at a time; held before mu
	stale    []string   // partial tiles of the checkpoint before this one

	queueMu sync.Mutex
	queue   []*waiting

	mu     sync.RWMutex
	head   Checkpoint
	edge   map[tlog.Tile][]byte // hash tiles at the right edge, by tile without width
	index  index
	closed bool
	broken error // a sync failed: nobody knows what the disk holds
}

// waiting is an entry whose Append has not returned.
type waiting struct {
	entry Entry
	leaf  []byte
	done  bool
	at    uint64
	err   error
}

// Open takes the log in dir, or begins one there, for this process alone. A
// batch that a crash interrupted is completed. Every entry is read and
// checked; a log that does not verify does not open.
func Open(dir, origin string, signer *Signer) (*Log, error) {
	return open(dir, origin, signer, nil)
}

func open(dir, origin string, signer *Signer, before func(op, path string) error) (_ *Log, err error) {
	if signer == nil || signer.Name() != origin {
		return nil, fmt.Errorf("open ledger %s: there is no signing key for origin %q", dir, origin)
	}
	v, err := note.NewVerifier(signer.VerifierKey())
	if err != nil {
		return nil, fmt.Errorf("open ledger %s: %w", dir, err)
	}
	d, err := openDisk(dir)
	if err != nil {
		return nil, err
	}
	d.before = before
	l := &Log{disk: d, signer: signer, verifier: v, edge: map[tlog.Tile][]byte{}, index: newIndex()}
	if err := l.recover(); err != nil {
		return nil, errors.Join(fmt.Errorf("open ledger %s: %w", dir, err), d.close())
	}
	return l, nil
}

// Close waits for the batch under way and lets the directory go.
func (l *Log) Close() error {
	l.commitMu.Lock()
	defer l.commitMu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	return l.disk.close()
}

// recover brings memory to the state of the directory, and the directory to
// the state of the journal.
func (l *Log) recover() error {
	if err := l.loadHead(); err != nil {
		return err
	}
	raw, err := l.disk.readJournal()
	if err != nil {
		return err
	}
	j, err := parseJournal(raw)
	whole, size := err == nil, int64(l.head.Size) // not whole: never acknowledged
	interrupted := whole && j.base == size && j.root == l.head.Root
	if whole && j.base >= size && !interrupted {
		return fmt.Errorf("the checkpoint has %d entries but the journal follows entry %d: an older checkpoint was put back; restore the whole directory", size, j.base)
	}
	if err := l.loadEdge(); err != nil {
		return err
	}
	if interrupted {
		if err := l.install(j.entries); err != nil {
			return fmt.Errorf("complete the batch at entry %d: %w", j.base, err)
		}
	}
	l.sweep()
	return l.buildIndex()
}

func (l *Log) loadHead() error {
	raw, err := l.disk.read(checkpointName)
	if errors.Is(err, fs.ErrNotExist) {
		return l.begin()
	}
	if err != nil {
		return err
	}
	l.head, err = ParseCheckpoint(raw, l.signer.VerifierKey())
	return err
}

// loadEdge reads the right edge and checks it against the checkpoint.
func (l *Log) loadEdge() error {
	size := int64(l.head.Size)
	for _, t := range edgeTiles(size) {
		if t.L == entriesLevel {
			continue
		}
		data, err := readTile(l.disk.read, t)
		if err != nil {
			return err
		}
		l.edge[edgeKey(t)] = data
	}
	root, err := tlog.TreeHash(size, l.hashReader(nil))
	if err != nil {
		return err
	}
	if root != l.head.Root {
		return fmt.Errorf("the tiles hash to %s, the checkpoint says %s; find the bad tile with ledger verify and restore it from a copy", root, l.head.Root)
	}
	return nil
}

// begin signs the empty log. Tiles without a checkpoint are the remains of a
// log that lost it, and must not be silently written over.
func (l *Log) begin() error {
	tiles, err := os.ReadDir(path.Join(l.disk.dir, "tile"))
	if err != nil {
		return err
	}
	if len(tiles) > 0 {
		return errors.New("there are tiles but no checkpoint; restore the checkpoint from a copy, or name an empty directory")
	}
	root, err := tlog.TreeHash(0, nil)
	if err != nil {
		return err
	}
	head, err := l.signer.checkpoint(0, root)
	if err != nil {
		return err
	}
	l.head = head
	return l.publish(head)
}

// publish makes a checkpoint the head on the disk: from its rename on, the
// batch is in the log.
func (l *Log) publish(head Checkpoint) error {
	if err := l.disk.write("."+checkpointName, head.Note); err != nil {
		return err
	}
	if err := l.disk.rename("."+checkpointName, checkpointName); err != nil {
		return err
	}
	if err := l.disk.syncDir("."); err != nil {
		return &unsureError{err}
	}
	return nil
}

// unsureError is a failure after which nobody knows what the disk holds.
type unsureError struct{ cause error }

func (e *unsureError) Error() string { return e.cause.Error() }
func (e *unsureError) Unwrap() error { return e.cause }

// Append adds an entry and returns its index once it is durable and covered
// by a durable checkpoint. Entries that arrive while a batch is being written
// share the next one. After an error the entry is not in the log, unless the
// error says that the log must be opened again to know.
//
// The context is looked at before the entry is queued, not after: once begun,
// an append has an outcome and the caller gets it.
func (l *Log) Append(ctx context.Context, e Entry) (uint64, error) {
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	e.Time = e.Time.UTC()
	leaf, err := e.encode()
	if err != nil {
		return 0, fmt.Errorf("append to ledger: %w", err)
	}
	if err := ctx.Err(); err != nil {
		return 0, fmt.Errorf("append to ledger: %w", err)
	}
	w := &waiting{entry: e, leaf: leaf}
	l.queueMu.Lock()
	l.queue = append(l.queue, w)
	l.queueMu.Unlock()

	l.commitMu.Lock()
	defer l.commitMu.Unlock()
	for !w.done { // else the one before us has written our entry too
		l.commit()
	}
	if w.err != nil {
		return 0, fmt.Errorf("append to ledger: %w", w.err)
	}
	return w.at, nil
}

// commit writes one batch from the queue. The caller holds commitMu.
func (l *Log) commit() {
	l.queueMu.Lock()
	n := min(len(l.queue), maxBatch)
	batch := l.queue[:n:n]
	l.queue = l.queue[n:]
	l.queueMu.Unlock()

	base := l.head.Size // only commit changes it
	leaves := make([][]byte, n)
	for i, w := range batch {
		leaves[i] = w.leaf
	}
	err := l.add(leaves)
	for i, w := range batch {
		w.done, w.at, w.err = true, base+uint64(i), err
	}
	if err == nil {
		l.mu.Lock()
		for _, w := range batch {
			l.index.add(w.at, w.entry)
		}
		l.mu.Unlock()
	}
}

// add journals and installs a batch, or leaves the log as it was.
func (l *Log) add(leaves [][]byte) error {
	if l.closed {
		return ErrClosed
	}
	if l.broken != nil {
		return fmt.Errorf("an earlier write failed and left the disk in doubt, open the log again: %w", l.broken)
	}
	j := journal{base: int64(l.head.Size), root: l.head.Root, entries: leaves}
	err := l.disk.writeJournal(j.encode())
	if err == nil {
		err = l.install(leaves)
	}
	if err == nil {
		return nil
	}
	var unsure *unsureError
	if errors.As(err, &unsure) {
		l.broken = err
		return fmt.Errorf("write: %w; the entry may or may not be in the log, open it again to know", err)
	}
	// Nothing refers to the batch but the journal: without it, it never was.
	if undo := l.disk.clearJournal(); undo != nil {
		l.broken = err
		return fmt.Errorf("write: %w; and taking it back: %w; the entry may or may not be in the log, open it again to know", err, undo)
	}
	return fmt.Errorf("write: %w; nothing was added", err)
}

// install writes the tiles of a batch, then the checkpoint that covers them,
// and only then lets memory follow.
func (l *Log) install(leaves [][]byte) error {
	base := int64(l.head.Size)
	size := base + int64(len(leaves))
	fresh, err := l.hash(base, leaves)
	if err != nil {
		return err
	}
	reader := l.hashReader(fresh)
	files := map[string][]byte{}
	edge := map[tlog.Tile][]byte{}
	for _, t := range tlog.NewTiles(tileHeight, base, size) {
		data, err := tlog.ReadTileData(t, reader)
		if err != nil {
			return err
		}
		files[tilePath(t)] = data
		edge[edgeKey(t)] = data
	}
	if err := l.bundles(base, leaves, files); err != nil {
		return err
	}
	root, err := tlog.TreeHash(size, reader)
	if err != nil {
		return err
	}
	head, err := l.signer.checkpoint(size, root)
	if err != nil {
		return err
	}
	if err := l.writeFiles(files); err != nil {
		return err
	}
	if err := l.publish(head); err != nil {
		return err
	}
	l.follow(head, edge)
	return nil
}

// hash computes what tlog stores for a batch, by storage index.
func (l *Log) hash(base int64, leaves [][]byte) (map[int64]tlog.Hash, error) {
	fresh := map[int64]tlog.Hash{}
	reader := l.hashReader(fresh)
	for i, leaf := range leaves {
		n := base + int64(i)
		hashes, err := tlog.StoredHashes(n, leaf, reader)
		if err != nil {
			return nil, err
		}
		for j, h := range hashes {
			fresh[tlog.StoredHashIndex(0, n)+int64(j)] = h
		}
	}
	return fresh, nil
}

// bundles puts the entry bundles that a batch changes into files.
func (l *Log) bundles(base int64, leaves [][]byte, files map[string][]byte) error {
	var bundle []byte
	if base%tileWidth != 0 {
		var err error
		if bundle, err = l.disk.read(tilePath(treeTile(entriesLevel, base/tileWidth, base))); err != nil {
			return err
		}
	}
	for i, leaf := range leaves {
		bundle = appendBundle(bundle, leaf)
		size := base + int64(i) + 1
		if size%tileWidth == 0 || i == len(leaves)-1 {
			files[tilePath(treeTile(entriesLevel, (size-1)/tileWidth, size))] = bundle
			bundle = nil
		}
	}
	return nil
}

func (l *Log) writeFiles(files map[string][]byte) error {
	dirs := map[string]bool{}
	for _, p := range slices.Sorted(maps.Keys(files)) {
		if err := l.disk.mkdir(path.Dir(p)); err != nil {
			return err
		}
		if err := l.disk.write(p, files[p]); err != nil {
			return err
		}
		dirs[path.Dir(p)] = true
	}
	for _, dir := range slices.Sorted(maps.Keys(dirs)) {
		if err := l.disk.syncDir(dir); err != nil {
			return err
		}
	}
	return nil
}

// follow makes the published head the one readers see, and drops the partial
// tiles of the checkpoint before the last: whoever copies the directory while
// it grows finds the tiles of the checkpoint he read.
func (l *Log) follow(head Checkpoint, edge map[tlog.Tile][]byte) {
	l.mu.Lock()
	old := l.head
	l.head = head
	maps.Copy(l.edge, edge)
	current := map[tlog.Tile]bool{}
	keep := map[string]bool{}
	for _, t := range edgeTiles(int64(head.Size)) {
		current[edgeKey(t)] = true
		keep[tilePath(t)] = true
	}
	maps.DeleteFunc(l.edge, func(t tlog.Tile, _ []byte) bool { return !current[t] })
	l.mu.Unlock()

	drop := l.stale
	l.stale = nil
	for _, t := range edgeTiles(int64(old.Size)) {
		if p := tilePath(t); !keep[p] {
			l.stale = append(l.stale, p)
		}
	}
	for _, p := range drop {
		if !keep[p] && !slices.Contains(l.stale, p) {
			l.disk.remove(p)
			l.disk.remove(path.Dir(p)) // the .p directory, if that was its last
		}
	}
}

// sweep removes what killed writers left: files that the head does not need.
func (l *Log) sweep() {
	keep := map[string]bool{}
	for _, t := range edgeTiles(int64(l.head.Size)) {
		keep[tilePath(t)] = true
	}
	fsys := os.DirFS(l.disk.dir)
	fs.WalkDir(fsys, "tile", func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || keep[p] {
			return nil
		}
		if path.Ext(path.Dir(p)) == ".p" || !l.covers(p) {
			l.disk.remove(p)
		}
		return nil
	})
	l.disk.remove("." + checkpointName)
}

// covers says whether the head has the full tile at path p.
func (l *Log) covers(p string) bool {
	t, err := parseTilePath(p)
	return err == nil && treeTile(t.L, t.N, int64(l.head.Size)).W == tileWidth
}

// edgeKey is a tile whatever its width.
func edgeKey(t tlog.Tile) tlog.Tile { t.W = 0; return t }

// hashReader finds stored hashes in fresh, then at the edge, then on disk.
func (l *Log) hashReader(fresh map[int64]tlog.Hash) tlog.HashReader {
	size := int64(l.head.Size)
	return tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, len(indexes))
		for i, at := range indexes {
			h, ok := fresh[at]
			if !ok {
				var err error
				if h, err = l.storedHash(at, size); err != nil {
					return nil, err
				}
			}
			out[i] = h
		}
		return out, nil
	})
}

func (l *Log) storedHash(at, size int64) (tlog.Hash, error) {
	want := tlog.TileForIndex(tileHeight, at)
	t := treeTile(want.L, want.N, size)
	data, ok := l.edge[edgeKey(t)]
	if !ok {
		var err error
		if data, err = readTile(l.disk.read, t); err != nil {
			return tlog.Hash{}, err
		}
	}
	return tlog.HashFromTile(t, data, at)
}

// readTile reads a tile of hashes and checks its size.
func readTile(read func(string) ([]byte, error), t tlog.Tile) ([]byte, error) {
	p := tilePath(t)
	data, err := read(p)
	if err != nil {
		return nil, &BadError{Path: p, Index: -1, Why: err.Error()}
	}
	if len(data) != t.W*tlog.HashSize {
		return nil, &BadError{Path: p, Index: -1, Why: fmt.Sprintf("is %d bytes, want %d", len(data), t.W*tlog.HashSize)}
	}
	return data, nil
}

// Checkpoint is the head of the log.
func (l *Log) Checkpoint() Checkpoint {
	l.mu.RLock()
	defer l.mu.RUnlock()
	c := l.head
	c.Note = bytes.Clone(c.Note)
	return c
}

// VerifierKey is what the log is verified with.
func (l *Log) VerifierKey() string { return l.signer.VerifierKey() }
