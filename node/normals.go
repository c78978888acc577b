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
	// giveTime bounds what the first plan of a proxy waits for what was kept, and
	// relearnTime one workload of it.
	giveTime    = 3 * time.Second
	relearnTime = 2 * time.Second
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
	brief time.Duration // giveTime
	one   time.Duration // relearnTime
	log   *slog.Logger
	// anew is told of a workload whose kept normal is of no use.
	anew func(service, why string)
	// here are the workloads that have an instance on this node.
	here func() map[string]bool
	// more holds something when later is to be called.
	more chan struct{}

	mu       sync.Mutex
	given    learner                 // whose first plan need not wait any more
	before   map[string]api.Analysis // what it had learnt itself
	late     []string                // workloads it is still to get; their files stay as they are
	tries    int                     // of them, until the next tick
	slow     map[string]bool         // workloads that took too long: no plan waits for them again
	away     map[string]bool         // workloads let go of for want of room
	turns    map[string]uint64       // workloads that are looked at; one that is again has another
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
	return &normals{dir: dir, every: keepEvery, brief: giveTime, one: relearnTime, log: log, anew: anew, more: make(chan struct{}, 1),
		slow: map[string]bool{}, away: map[string]bool{}, turns: map[string]uint64{}, stale: map[string]bool{}, kept: map[string]normal{}, failing: map[string]bool{}}
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
	delete(k.slow, key)
	delete(k.away, key)
	k.late = slices.DeleteFunc(k.late, func(other string) bool { return other == key })
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

// gave tells whether a proxy has got what its first plan waits for. Until then
// nothing of it is kept.
func (k *normals) gave(l learner) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.given == l
}

// hosts tells whether a workload has an instance here. It is not called with mu.
func (k *normals) hosts() func(key string) bool {
	if k.here == nil {
		return func(string) bool { return true }
	}
	all := k.here()
	return func(key string) bool { return all[key] }
}

// give has a proxy go on from what was kept, before it gets its first plan. What
// it has learnt for as long itself is newer. The plan waits for workloads with an
// instance here, and not for long: the others are for later. An error is the end of
// the link or of ctx.
func (k *normals) give(ctx context.Context, l learner) error {
	if k.gave(l) {
		return nil
	}
	brief, cancel := context.WithTimeout(ctx, k.brief)
	defer cancel()
	stats, err := l.Stats(brief)
	if over(ctx, err) {
		return err
	}
	if err != nil {
		k.log.Warn("what the mesh knows itself is not known: " + err.Error())
	}
	here, late := k.hosts(), []string(nil)
	for _, key := range k.looked() {
		if !here(key) || k.isSlow(key) || brief.Err() != nil {
			late = append(late, key)
			continue
		}
		if err := k.offer(brief, l, stats.Analysis, key); over(ctx, err) {
			return err
		} else if err != nil {
			late = append(late, key)
		}
	}
	k.mu.Lock()
	k.given, k.before, k.late = l, stats.Analysis, nil
	for _, key := range late {
		k.lateLocked(key)
	}
	k.mu.Unlock()
	k.again()
	return nil
}

// over tells whether an error is the end of the link or of ctx.
func over(ctx context.Context, err error) bool {
	return err != nil && (ctx.Err() != nil || errors.Is(err, link.ErrClosed))
}

// lateLocked notes a workload whose file is to be given later: it takes room.
func (k *normals) lateLocked(key string) {
	fi, err := os.Stat(k.path(key))
	if err != nil || k.turns[key] == 0 { // it has none, or is forgotten
		return
	}
	if _, known := k.kept[key]; !known {
		k.kept[key] = normal{Bytes: int(fi.Size())}
	}
	k.late = append(k.late, key)
}

func (k *normals) isSlow(key string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.slow[key]
}

// again has what is late be tried, each once.
func (k *normals) again() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.tries = len(k.late)
	k.nextLocked()
}

func (k *normals) nextLocked() {
	if k.tries > 0 {
		k.wake()
	}
}

func (k *normals) wake() {
	select {
	case k.more <- struct{}{}:
	default:
	}
}

// later gives what one workload had learnt to a proxy that has its plan. It is
// called between plans, as what a plan has forgotten must not be given after it.
func (k *normals) later(ctx context.Context, l learner) {
	k.mu.Lock()
	if k.given != l || len(k.late) == 0 || k.tries == 0 {
		k.mu.Unlock()
		return
	}
	k.tries--
	key, before := k.late[0], k.before
	k.mu.Unlock()
	err := k.offer(ctx, l, before, key)
	k.mu.Lock()
	defer k.mu.Unlock()
	if i := slices.Index(k.late, key); i >= 0 {
		if k.late = slices.Delete(k.late, i, i+1); err != nil {
			k.late = append(k.late, key)
		}
	}
	k.nextLocked()
}

// offer gives the proxy the file of a workload, if it has not learnt for as long
// itself before. After an error it is to be offered again.
func (k *normals) offer(ctx context.Context, l learner, before map[string]api.Analysis, key string) error {
	h, schema, err := k.read(key)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if now, known := before[key]; known && (err != nil || !h.Since.Before(now.Since)) {
		k.did(key, h, err)
		return nil
	}
	if err == nil {
		err = k.relearn(ctx, l, key, schema)
		refused := (*link.RefusedError)(nil)
		switch useless := errors.Is(err, link.ErrUseless); {
		case errors.As(err, &refused) && !useless: // by one that is older, or gives its place to another
			k.did(key, h, nil)
			k.log.Warn("the mesh does not take what was learnt; the file stays", "workload", key, "file", k.path(key), "err", err)
			return nil
		case err != nil && !useless:
			return err
		}
	}
	if err != nil {
		k.refused(key, err)
		return nil
	}
	k.did(key, h, nil)
	k.log.Info("the mesh goes on from what was learnt", "workload", key, "since", h.Since, "requests", h.Requests, "written", h.Written)
	return nil
}

// relearn notes and tells of what takes too long.
func (k *normals) relearn(ctx context.Context, l learner, key string, schema []byte) error {
	one, cancel := context.WithTimeout(ctx, k.one)
	defer cancel()
	err := l.Relearn(one, key, schema)
	k.mu.Lock()
	defer k.mu.Unlock()
	switch was := k.slow[key]; {
	case err == nil:
		delete(k.slow, key)
	case errors.Is(one.Err(), context.DeadlineExceeded) && k.turns[key] != 0 && !was:
		k.slow[key] = true
		k.log.Warn("the mesh does not take what was learnt in time; the file stays, and is given later", "workload", key, "file", k.path(key), "err", err)
	}
	return err
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
	k.mu.Lock()
	delete(k.kept, key)
	k.mu.Unlock()
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
			k.again()
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
	here := k.hosts()
	for _, key := range slices.Sorted(maps.Keys(stats.Analysis)) {
		now := stats.Analysis[key]
		turn, due := k.due(key, now, here(key))
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

// due tells whether more is known of a workload than was kept. What was kept and
// is not given yet is worth more than what its proxy has learnt since.
func (k *normals) due(key string, now api.Analysis, here bool) (turn uint64, due bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if slices.Contains(k.late, key) || k.away[key] && !here {
		return 0, false
	}
	turn, was := k.turns[key], k.kept[key]
	return turn, turn != 0 && now.Learnt > 0 && (was.Requests != now.Learnt || !was.Since.Equal(now.Since))
}

func (k *normals) write(h normal, turn uint64, schema []byte) error {
	if total := k.room(h.Service, len(schema)); total > maxNormals {
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
	delete(k.away, h.Service)
	if delete(k.stale, h.Service); k.turns[h.Service] != turn { // forgotten meanwhile
		return os.Remove(k.path(h.Service))
	}
	return nil
}

// room is how many bytes there are with those of a workload. If that is too many,
// the oldest of workloads without an instance here are let go of.
func (k *normals) room(key string, size int) (total int) {
	here := k.hosts()
	k.mu.Lock()
	defer k.mu.Unlock()
	var away []string
	total = size
	for other, was := range k.kept {
		if other == key {
			continue
		}
		if total += was.Bytes; !here(other) {
			away = append(away, other)
		}
	}
	if !here(key) { // none of these is worth more than another
		return total
	}
	slices.SortFunc(away, func(a, b string) int { return k.kept[a].Written.Compare(k.kept[b].Written) })
	for _, other := range away {
		if total <= maxNormals {
			break
		}
		k.log.Info("what was learnt is let go of for want of room: no instance is here", "workload", other, "written", k.kept[other].Written)
		total -= k.kept[other].Bytes
		turn := k.turns[other]
		k.dropLocked(other)
		k.turns[other], k.away[other] = turn, true
	}
	return total
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
		if k.kept[key].Written.IsZero() { // not read yet
			continue
		}
		fmt.Fprintf(&b, "hauberk_learnt_kept_seconds{workload=%q} %d\n", key, k.kept[key].Written.Unix())
	}
	return b.WriteTo(w)
}
