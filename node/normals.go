package node

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/internal/atomicfile"
	"hauberk.dev/internal/strictjson"
	"hauberk.dev/mesh/link"
	"hauberk.dev/plan"
)

const (
	keepEvery  = time.Minute
	maxNormals = 128 << 20 // bytes, of all workloads
	// A file of what was learnt is a line of JSON, and what the proxy gave.
	normalFormat  = "hauberk-learnt"
	normalVersion = 1
	maxNormalLine = 2 << 10
	normalSuffix  = ".learnt"
	// refusedSuffix marks what could not be read, for people.
	refusedSuffix = ".refused"
)

// learner is the proxy, as who keeps what it learns needs it.
type learner interface {
	Stats(ctx context.Context) (api.Stats, error)
	Learnt(ctx context.Context, service string) ([]byte, error)
	Relearn(ctx context.Context, service string, schema []byte) error
}

// normals keeps what the proxy learns to be normal of the requests to each
// workload that is looked at, so that a proxy that is killed does not begin anew.
// What the proxy gives is not read here: it faces the network, and its successor
// checks it.
type normals struct {
	dir   string
	every time.Duration
	log   *slog.Logger
	// anew is told of a workload whose kept normal is of no use.
	anew func(service, why string)

	mu       sync.Mutex
	given    learner           // who has got what was kept
	turns    map[string]uint64 // workloads that are looked at; one that is again has another
	turn     uint64
	swept    bool            // nothing is there of other workloads
	stale    map[string]bool // workloads whose file should be gone, and is not
	kept     map[string]normal
	failing  map[string]bool
	failures uint64
}

// normal is what a file says of what it holds.
type normal struct {
	Format   string    `json:"format"`
	Version  int       `json:"version"`
	Service  string    `json:"service"`
	Since    time.Time `json:"since"`    // when learning began
	Requests uint64    `json:"requests"` // it is learnt from
	Written  time.Time `json:"written"`
	Bytes    int       `json:"bytes"` // of the schema after the line
	Digest   string    `json:"sha256"`
}

func newNormals(dir string, log *slog.Logger, anew func(service, why string)) *normals {
	return &normals{dir: dir, every: keepEvery, log: log, anew: anew,
		turns: map[string]uint64{}, stale: map[string]bool{}, kept: map[string]normal{}, failing: map[string]bool{}}
}

// marshalNormal makes a file. Its digest is of the line without it, and of the
// schema.
func marshalNormal(h normal, schema []byte) ([]byte, error) {
	h.Format, h.Version, h.Bytes, h.Digest = normalFormat, normalVersion, len(schema), ""
	line, err := json.Marshal(h)
	if err != nil {
		return nil, err
	}
	sum := sha256.New()
	sum.Write(line)
	sum.Write(schema)
	h.Digest = hex.EncodeToString(sum.Sum(nil))
	if line, err = json.Marshal(h); err != nil {
		return nil, err
	}
	return slices.Concat(line, []byte("\n"), schema), nil
}

// refusedNormal is why a file is not gone on from.
type refusedNormal string

func (e refusedNormal) Error() string { return string(e) }

// parseNormal reads the file of a workload: just what marshalNormal writes. The
// error is a refusedNormal.
func parseNormal(b []byte, service string) (h normal, schema []byte, err error) {
	line, schema, _ := bytes.Cut(b, []byte("\n"))
	var is struct {
		Format  string `json:"format"`
		Version int    `json:"version"`
	}
	if strictjson.DecodeLoose(line, maxNormalLine, &is) != nil || is.Format != normalFormat {
		return h, nil, refusedNormal("it is no file of what was learnt")
	}
	if is.Version != normalVersion {
		return h, nil, refusedNormal(fmt.Sprintf("it is of version %d; %d is read", is.Version, normalVersion))
	}
	if err := strictjson.Decode(line, maxNormalLine, &h); err != nil {
		return h, nil, refusedNormal("its first line " + err.Error())
	}
	if h.Service != service {
		return h, nil, refusedNormal(fmt.Sprintf("it is of %q", h.Service))
	}
	if again, err := marshalNormal(h, schema); err != nil || !bytes.Equal(again, b) || len(schema) > api.MaxLearnt {
		return h, nil, refusedNormal("its digest is another's: it was cut short or changed")
	}
	return h, schema, nil
}

// path is where a workload's file is. Names may be longer than those of files.
func (k *normals) path(service string) string {
	sum := sha256.Sum256([]byte(service))
	return filepath.Join(k.dir, hex.EncodeToString(sum[:16])+normalSuffix)
}

func (k *normals) read(service string) (normal, []byte, error) {
	f, err := os.Open(k.path(service))
	if err != nil {
		return normal{}, nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, api.MaxLearnt+maxNormalLine+1))
	if err != nil {
		return normal{}, nil, err
	}
	return parseNormal(b, service)
}

// follow has only what the plan has looked at be kept: the proxy forgets the rest
// as well, and one of the same name later is another.
func (k *normals) follow(p plan.Mesh) {
	k.mu.Lock()
	defer k.mu.Unlock()
	looked := map[string]bool{}
	for _, s := range p.Services {
		if s.Inspect == nil {
			continue
		}
		key := s.Namespace + "/" + s.Name
		if looked[key] = true; k.turns[key] == 0 {
			k.turn++
			k.turns[key] = k.turn
		}
	}
	for key := range k.turns {
		if !looked[key] {
			k.dropLocked(key)
		}
	}
	if !k.swept {
		k.swept = k.sweepLocked()
	}
}

func (k *normals) dropLocked(key string) {
	delete(k.turns, key)
	delete(k.kept, key)
	delete(k.failing, key)
	os.Remove(k.path(key) + refusedSuffix)
	if err := os.Remove(k.path(key)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		k.stale[key], k.swept = true, false
		k.log.Warn("forget what was learnt: " + err.Error())
	}
}

// sweepLocked removes what is of no workload that is looked at, and what killed
// writers have left.
func (k *normals) sweepLocked() bool {
	entries, err := os.ReadDir(k.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return true
	}
	if err == nil {
		err = atomicfile.Sweep(k.dir)
	}
	ours := map[string]bool{}
	for key := range k.turns {
		if !k.stale[key] {
			ours[filepath.Base(k.path(key))] = true
		}
	}
	for _, e := range entries {
		name, _ := strings.CutSuffix(e.Name(), refusedSuffix)
		if strings.HasSuffix(name, normalSuffix) && !ours[name] {
			err = errors.Join(err, os.Remove(filepath.Join(k.dir, e.Name())))
		}
	}
	if err != nil {
		k.log.Warn("forget what was learnt: " + err.Error())
		return false
	}
	clear(k.stale)
	return true
}

// looked are the workloads that are looked at and whose files are theirs.
func (k *normals) looked() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	all := maps.Clone(k.turns)
	maps.DeleteFunc(all, func(key string, _ uint64) bool { return k.stale[key] })
	return slices.Sorted(maps.Keys(all))
}

// gave tells whether a proxy has got what was kept. Until then nothing of it is.
func (k *normals) gave(l learner) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.given == l
}

// give has a proxy go on from what was kept, before it gets its first plan. What
// it has learnt for as long itself is newer. An error is one of the link.
func (k *normals) give(ctx context.Context, l learner) error {
	if k.gave(l) {
		return nil
	}
	stats, err := l.Stats(ctx)
	if err != nil {
		return err
	}
	for _, key := range k.looked() {
		h, schema, err := k.read(key)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if now, known := stats.Analysis[key]; known && (err != nil || !h.Since.Before(now.Since)) {
			k.did(key, h, err)
			continue
		}
		if err == nil {
			err = l.Relearn(ctx, key, schema)
			if refused := (*link.RefusedError)(nil); err != nil && !errors.As(err, &refused) {
				return err
			}
		}
		if k.did(key, h, err); err != nil {
			k.refused(key, err)
			continue
		}
		k.log.Info("the mesh goes on from what was learnt", "workload", key, "since", h.Since, "requests", h.Requests, "written", h.Written)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.given = l
	return nil
}

// did notes what is in a file, if it could be read.
func (k *normals) did(key string, h normal, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.turns[key] != 0 && err == nil {
		k.kept[key] = h
	}
}

// refused says that learning begins anew, and puts the file aside.
func (k *normals) refused(key string, err error) {
	k.log.Warn("what was learnt is of no use; learning begins anew", "workload", key, "file", k.path(key), "err", err)
	if !errors.As(err, new(*fs.PathError)) { // then it is the disk's fault
		if err := os.Rename(k.path(key), k.path(key)+refusedSuffix); err != nil {
			k.log.Warn(err.Error())
		}
	}
	k.anew(key, err.Error())
}

// run keeps what l learns until ctx or the link ends.
func (k *normals) run(ctx context.Context, ended <-chan struct{}, l learner) {
	tick := time.NewTicker(k.every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ended:
			return
		case <-tick.C:
			k.keep(ctx, l)
		}
	}
}

// keep writes down what was learnt since the last time.
func (k *normals) keep(ctx context.Context, l learner) {
	if !k.gave(l) {
		return
	}
	stats, err := l.Stats(ctx)
	if err != nil && ctx.Err() == nil && !errors.Is(err, link.ErrClosed) {
		k.log.Warn("what is learnt is not kept: " + err.Error())
	}
	for _, key := range slices.Sorted(maps.Keys(stats.Analysis)) {
		now := stats.Analysis[key]
		turn, due := k.due(key, now)
		if !due {
			continue
		}
		var schema []byte
		if schema, err = l.Learnt(ctx, key); len(schema) == 0 && err == nil {
			continue
		}
		h := normal{Service: key, Since: now.Since.UTC().Round(0), Requests: now.Learnt, Written: time.Now().UTC().Round(time.Second), Bytes: len(schema)}
		if err == nil {
			err = k.write(h, turn, schema)
		}
		if ctx.Err() != nil || errors.Is(err, link.ErrClosed) {
			return
		}
		k.told(h, turn, err)
	}
}

// due tells whether more is known of a workload than was kept.
func (k *normals) due(key string, now api.Analysis) (turn uint64, due bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	turn, was := k.turns[key], k.kept[key]
	return turn, turn != 0 && now.Learnt > 0 && (was.Requests != now.Learnt || !was.Since.Equal(now.Since))
}

func (k *normals) write(h normal, turn uint64, schema []byte) error {
	k.mu.Lock()
	total := len(schema)
	for key, was := range k.kept {
		if key != h.Service {
			total += was.Bytes
		}
	}
	k.mu.Unlock()
	if total > maxNormals {
		return fmt.Errorf("%d bytes of all workloads; at most %d are kept", total, maxNormals)
	}
	b, err := marshalNormal(h, schema)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(k.dir, 0o700); err != nil {
		return err
	}
	if err := atomicfile.Write(k.path(h.Service), b, 0o600); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if delete(k.stale, h.Service); k.turns[h.Service] != turn { // forgotten meanwhile
		return os.Remove(k.path(h.Service))
	}
	return nil
}

// told notes what became of keeping a workload's, and tells of it when that changes.
func (k *normals) told(h normal, turn uint64, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.turns[h.Service] != turn {
		return
	}
	failed := k.failing[h.Service]
	if err == nil {
		delete(k.failing, h.Service)
		k.kept[h.Service] = h
		if failed {
			k.log.Info("what is learnt is kept again", "workload", h.Service)
		}
		return
	}
	k.failures++
	if k.failing[h.Service] = true; !failed {
		k.log.Warn("what is learnt is not kept; the mesh goes on, and would go back to what was kept before", "workload", h.Service, "kept", k.kept[h.Service].Written, "err", err)
	}
}

// WriteTo writes what is kept in the text format of Prometheus.
func (k *normals) WriteTo(w io.Writer) (int64, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var b bytes.Buffer
	fmt.Fprintf(&b, "# HELP hauberk_learnt_kept_failures_total How often what the mesh has learnt of a workload could not be kept.\n"+
		"# TYPE hauberk_learnt_kept_failures_total counter\nhauberk_learnt_kept_failures_total %d\n"+
		"# HELP hauberk_learnt_kept_seconds When it was last written down, as a time of Unix.\n# TYPE hauberk_learnt_kept_seconds gauge\n", k.failures)
	for _, key := range slices.Sorted(maps.Keys(k.kept)) {
		fmt.Fprintf(&b, "hauberk_learnt_kept_seconds{workload=%q} %d\n", key, k.kept[key].Written.Unix())
	}
	return b.WriteTo(w)
}
