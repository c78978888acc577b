package ledger

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"golang.org/x/mod/sumdb/tlog"
)

// bundle reads the leaves of one entry bundle of the head, and how many
// entries the head has.
func (l *Log) bundle(n int64) (leaves [][]byte, size int64, err error) {
	// The lock keeps the partial bundle of this head from being dropped.
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.closed {
		return nil, 0, ErrClosed
	}
	size = int64(l.head.Size)
	t := treeTile(entriesLevel, n, size)
	if t.W == 0 {
		return nil, size, nil
	}
	leaves, err = readBundle(l.disk.read, t)
	return leaves, size, err
}

func readBundle(read func(string) ([]byte, error), t tlog.Tile) ([][]byte, error) {
	p := tilePath(t)
	data, err := read(p)
	if err != nil {
		return nil, &BadError{Path: p, Index: -1, Why: err.Error()}
	}
	leaves, err := splitBundle(data, t.W)
	if err != nil {
		return nil, &BadError{Path: p, Index: -1, Why: err.Error()}
	}
	return leaves, nil
}

// Scan calls f with each entry from an index on, in order, up to the head. The
// log may grow meanwhile. An error of f ends the scan and is returned.
func (l *Log) Scan(from uint64, f func(uint64, Entry) error) error {
	if from >= l.Checkpoint().Size {
		return nil
	}
	for at := int64(from); ; {
		leaves, _, err := l.bundle(at / tileWidth)
		if err != nil {
			return fmt.Errorf("scan ledger: %w", err)
		}
		first := at % tileWidth
		if int64(len(leaves)) <= first {
			return nil
		}
		for _, leaf := range leaves[first:] {
			e, err := decodeEntry(leaf)
			if err != nil {
				return fmt.Errorf("scan ledger: index %d: %w", at, err)
			}
			if err := f(uint64(at), e); err != nil {
				return err
			}
			at++
		}
		if len(leaves) < tileWidth {
			return nil
		}
	}
}

// Read returns one entry.
func (l *Log) Read(at uint64) (Entry, error) {
	leaf, err := l.leaf(at)
	if err != nil {
		return Entry{}, fmt.Errorf("read ledger entry %d: %w", at, err)
	}
	return decodeEntry(leaf)
}

func (l *Log) leaf(at uint64) ([]byte, error) {
	if at >= l.Checkpoint().Size {
		return nil, ErrRange
	}
	leaves, _, err := l.bundle(int64(at) / tileWidth)
	if err != nil {
		return nil, err
	}
	return leaves[at%tileWidth], nil
}

// Proof shows that an entry is in the log, to somebody who has nothing but
// the log's public key.
type Proof struct {
	Index      uint64      `json:"index"`
	Leaf       []byte      `json:"leaf"` // the entry as it is logged
	Hashes     []tlog.Hash `json:"hashes"`
	Checkpoint string      `json:"checkpoint"`
}

// Proof proves that the entry at an index is covered by the head.
func (l *Log) Proof(at uint64) (Proof, error) {
	leaf, err := l.leaf(at)
	if err != nil {
		return Proof{}, fmt.Errorf("prove ledger entry %d: %w", at, err)
	}
	l.mu.RLock()
	defer l.mu.RUnlock()
	hashes, err := tlog.ProveRecord(int64(l.head.Size), int64(at), l.hashReader(nil))
	if err != nil {
		return Proof{}, fmt.Errorf("prove ledger entry %d: %w", at, err)
	}
	return Proof{Index: at, Leaf: leaf, Hashes: hashes, Checkpoint: string(l.head.Note)}, nil
}

// CheckProof returns the entry that a proof proves.
func CheckProof(p Proof, verifierKey string) (Entry, error) {
	head, err := ParseCheckpoint([]byte(p.Checkpoint), verifierKey)
	if err != nil {
		return Entry{}, fmt.Errorf("check proof: %w", err)
	}
	if p.Index >= head.Size || len(p.Hashes) > 64 {
		return Entry{}, fmt.Errorf("check proof: index %d is not below size %d, or there are too many hashes", p.Index, head.Size)
	}
	if err := tlog.CheckRecord(p.Hashes, int64(head.Size), head.Root, int64(p.Index), tlog.RecordHash(p.Leaf)); err != nil {
		return Entry{}, fmt.Errorf("check proof of entry %d: %w", p.Index, err)
	}
	return decodeEntry(p.Leaf)
}

// ConsistencyProof proves that the head contains the log as it was at an
// older size, unchanged. CheckConsistency reads it.
func (l *Log) ConsistencyProof(old uint64) ([]tlog.Hash, error) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if old == 0 || old > l.head.Size {
		return nil, fmt.Errorf("prove consistency with size %d: %w", old, ErrRange)
	}
	proof, err := tlog.ProveTree(int64(l.head.Size), int64(old), l.hashReader(nil))
	if err != nil {
		return nil, fmt.Errorf("prove consistency with size %d: %w", old, err)
	}
	return proof, nil
}

// CheckConsistency checks that the newer checkpoint extends the older one.
func CheckConsistency(proof []tlog.Hash, older, newer Checkpoint) error {
	if older.Size == 0 || older.Size > newer.Size || len(proof) > 128 {
		return fmt.Errorf("check consistency: sizes %d and %d with %d hashes", older.Size, newer.Size, len(proof))
	}
	if err := tlog.CheckTree(proof, int64(newer.Size), newer.Root, int64(older.Size), older.Root); err != nil {
		return fmt.Errorf("check consistency of size %d with %d: %w", older.Size, newer.Size, err)
	}
	return nil
}

// Archive writes the log as a tar that VerifyFS accepts when unpacked. It
// holds the head of this moment, however long the writing takes.
func (l *Log) Archive(w io.Writer) error {
	tw := tar.NewWriter(w)
	head, edge, err := l.edgeFiles()
	if err != nil {
		return fmt.Errorf("archive ledger: %w", err)
	}
	add := func(name string, data []byte) error {
		h := &tar.Header{Name: name, Mode: 0o644, Size: int64(len(data)), Format: tar.FormatPAX}
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		_, err := tw.Write(data)
		return err
	}
	err = errors.Join(add(checkpointName, head.Note), treeTiles(int64(head.Size), func(t tlog.Tile) error {
		p := tilePath(t)
		data, ok := edge[p]
		if !ok { // full, so it never changes
			var err error
			if data, err = l.disk.read(p); err != nil {
				return err
			}
		}
		return add(p, data)
	}))
	if err := errors.Join(err, tw.Close()); err != nil {
		return fmt.Errorf("archive ledger: %w", err)
	}
	return nil
}

// edgeFiles reads the files of the head that the next batch may drop.
func (l *Log) edgeFiles() (Checkpoint, map[string][]byte, error) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.closed {
		return Checkpoint{}, nil, ErrClosed
	}
	files := map[string][]byte{}
	for _, t := range edgeTiles(int64(l.head.Size)) {
		data, err := l.disk.read(tilePath(t))
		if err != nil {
			return Checkpoint{}, nil, err
		}
		files[tilePath(t)] = data
	}
	return l.head, files, nil
}

// indexed is how many of the newest entries the index covers, at least; it
// holds about 100 bytes for each, so at most some 200 MB. Older entries are
// found by reading.
const indexed = 1 << 20

// index finds entries by what they are about. It holds numbers, not entries.
type index struct {
	from  uint64 // first entry covered
	next  uint64
	words map[string][]uint64
}

func newIndex() index { return index{words: map[string][]uint64{}} }

func (x *index) add(at uint64, e Entry) {
	for _, w := range words(e) {
		x.words[w] = append(x.words[w], at)
	}
	x.next = at + 1
	if x.next-x.from < 2*indexed {
		return
	}
	x.from = x.next - indexed
	for w, list := range x.words {
		i, _ := slices.BinarySearch(list, x.from)
		if i == len(list) {
			delete(x.words, w)
		} else {
			x.words[w] = slices.Clone(list[i:])
		}
	}
}

// words are what an entry is found by: every name in it, once.
func words(e Entry) []string {
	list := []string{e.Subject, e.Namespace, e.Application, e.Workload, e.Instance, e.Incident, e.Node, e.Digest, e.Kind}
	slices.Sort(list)
	list = slices.Compact(list)
	if list[0] == "" {
		list = list[1:]
	}
	for i, w := range list {
		list[i] = strings.Clone(w) // not the whole entry it was cut from
	}
	return list
}

// Query says what entries to find; every field that is set must be equal.
type Query struct {
	Kind, Subject, Namespace, Application, Workload, Instance, Incident, Node, Digest string
	// Limit keeps the newest so many; 0 means 10,000.
	Limit int
}

func (q Query) matches(e Entry) bool {
	eq := func(want, got string) bool { return want == "" || want == got }
	return eq(q.Kind, e.Kind) && eq(q.Subject, e.Subject) && eq(q.Namespace, e.Namespace) &&
		eq(q.Application, e.Application) && eq(q.Workload, e.Workload) && eq(q.Instance, e.Instance) &&
		eq(q.Incident, e.Incident) && eq(q.Node, e.Node) && eq(q.Digest, e.Digest)
}

// Find returns the entries a query matches, oldest first.
func (l *Log) Find(q Query) ([]Record, error) {
	limit := q.Limit
	if limit <= 0 {
		limit = 10000
	}
	candidates, from := l.candidates(q)
	var found []Record // newest first
	for i := len(candidates) - 1; i >= 0 && len(found) < limit; i-- {
		e, err := l.Read(candidates[i])
		if err != nil {
			return nil, err
		}
		if q.matches(e) {
			found = append(found, Record{candidates[i], e})
		}
	}
	slices.Reverse(found)
	if from == 0 || len(found) >= limit {
		return found, nil
	}
	old, err := l.findOld(q, from, limit-len(found))
	return append(old, found...), err
}

// candidates are the indexed entries that have the query's rarest word, and
// the first entry that is indexed.
func (l *Log) candidates(q Query) ([]uint64, uint64) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	var best []uint64
	asked := false
	for _, w := range []string{q.Kind, q.Subject, q.Namespace, q.Application, q.Workload, q.Instance, q.Incident, q.Node, q.Digest} {
		if w == "" {
			continue
		}
		if list := l.index.words[w]; !asked || len(list) < len(best) {
			best, asked = list, true
		}
	}
	if asked {
		return slices.Clone(best), l.index.from
	}
	var all []uint64
	for at := l.index.from; at < l.index.next; at++ {
		all = append(all, at)
	}
	return all, l.index.from
}

var errEnough = errors.New("enough")

func (l *Log) findOld(q Query, before uint64, limit int) ([]Record, error) {
	var found []Record
	err := l.Scan(0, func(at uint64, e Entry) error {
		if at >= before {
			return errEnough
		}
		if q.matches(e) {
			if found = append(found, Record{at, e}); len(found) > limit {
				found = found[1:]
			}
		}
		return nil
	})
	if errors.Is(err, errEnough) {
		err = nil
	}
	return found, err
}

// buildIndex reads the newest entries into the index, checking each against
// the tile that holds its hash.
func (l *Log) buildIndex() error {
	size := int64(l.head.Size)
	start := max(0, size-indexed) / tileWidth
	l.index.from = uint64(start * tileWidth)
	l.index.next = l.index.from
	for n := start; n*tileWidth < size; n++ {
		leaves, err := checkBundle(l.disk.read, n, size)
		if err != nil {
			return err
		}
		for i, leaf := range leaves {
			at := uint64(n*tileWidth) + uint64(i)
			e, err := decodeEntry(leaf)
			if err != nil {
				return &BadError{Path: tilePath(treeTile(entriesLevel, n, size)), Index: int64(at), Why: err.Error()}
			}
			l.index.add(at, e)
		}
	}
	return nil
}
