package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	api "hauberk.dev/api/mesh"
	wire "hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/internal/netns"
	"hauberk.dev/mesh/link"
)

const (
	// viewsEvery is how often each namespace is looked at.
	viewsEvery = time.Second
	// A connection that the proxy does not know is one around it only if it says
	// so as often and over as long a time: it may have been accepted just now.
	strangeTimes = 3
	strangeTime  = 3 * time.Second
	// leaveTime is how much longer it may have been another proxy's, whose place was
	// taken: that one ends within ten seconds.
	leaveTime = 15 * time.Second
)

// carrier is the proxy, as who compares needs it.
type carrier interface {
	Carried(ctx context.Context, instance string, all []api.Connection) (strange []api.Connection, err error)
	// Process tells one proxy from the next.
	Process() int
}

// views compares, for one sandbox, which connections the kernel has in its
// namespace with which the proxy says are its own.
type views struct {
	watch   *netns.Watch
	known   map[uint64]bool // by the socket's cookie
	strange map[uint64]suspect
	process int     // of the proxy that knew them
	tapless suspect // the machine runs, and its tap is not there
}

type suspect struct {
	since   time.Time
	times   int
	certain bool
}

func newViews(w *netns.Watch) *views {
	return &views{watch: w, known: map[uint64]bool{}, strange: map[uint64]suspect{}}
}

// compare returns the connections that are around the proxy for certain, each
// once. A proxy is asked only of those it has not known before.
func (v *views) compare(ctx context.Context, proxy carrier, instance string, now time.Time) (around []netns.Connection, err error) {
	all, err := v.watch.Connections()
	if err != nil {
		return nil, err
	}
	return v.among(ctx, all, proxy, instance, now)
}

// among is compare for what the kernel has listed. Of what the proxy gave no
// answer for, all stays as it is.
func (v *views) among(ctx context.Context, all []netns.Connection, proxy carrier, instance string, now time.Time) (around []netns.Connection, err error) {
	// What one proxy has carried the next has, or somebody has kept it.
	if p := proxy.Process(); p != v.process {
		for cookie := range v.known {
			v.strange[cookie] = suspect{since: now.Add(leaveTime), times: 1}
		}
		v.known, v.process = nil, p
	}
	known, strange := map[uint64]bool{}, map[uint64]suspect{}
	defer func() { v.known, v.strange = known, strange }()
	var ask []netns.Connection
	for _, c := range all {
		if v.known[c.Cookie] {
			known[c.Cookie] = true
			continue
		}
		ask = append(ask, c)
		if s, ok := v.strange[c.Cookie]; ok {
			strange[c.Cookie] = s
		}
	}
	for some := range slices.Chunk(ask, api.MaxConnections) {
		not, err := proxy.Carried(ctx, instance, asked(some))
		if err != nil {
			return around, err
		}
		for i, c := range some {
			s := strange[c.Cookie]
			certain := s.again(now)
			switch {
			case !slices.Contains(not, asked(some[i : i+1])[0]):
				known[c.Cookie] = true
			case certain:
				around = append(around, c)
				known[c.Cookie] = true // and told of
			default:
				strange[c.Cookie] = s
				continue
			}
			delete(strange, c.Cookie)
		}
	}
	return around, nil
}

func asked(some []netns.Connection) []api.Connection {
	out := make([]api.Connection, len(some))
	for i, c := range some {
		out[i] = api.Connection{Local: c.Local, Remote: c.Remote}
	}
	return out
}

// viewsLoop looks at each namespace from the side of the kernel: whether it is
// closed as it was made, and whether there are connections in it that are not
// the proxy's. The guest cannot bring about either. What was changed is put
// right and reported; a connection around the proxy is cut and contains the
// sandbox, and so does a namespace that cannot be put right.
func (n *Node) viewsLoop(ctx context.Context) error {
	r := &rounds{n: n}
	tick := time.NewTicker(viewsEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		all := n.mesh.fenced()
		maps.DeleteFunc(all, func(id string, _ *meshSandbox) bool { _, ok := n.find(id); return !ok })
		n.mesh.mu.Lock()
		l := n.mesh.link
		n.mesh.mu.Unlock()
		var proxy carrier // none has no connections; those it will be given are compared
		if l != nil {
			proxy = l
		}
		r.round(ctx, all, proxy, func(id string, report wire.Report) {
			if a, ok := n.find(id); ok {
				n.violation(a, report)
			}
		})
	}
}

// unheardTimes is how often in a row a proxy may refuse to say which connections
// are its own, or end its link when asked, before it is taken for an older one
// that does not know the question. Asked on and on it would carry nothing.
const unheardTimes = 2

// rounds looks at all namespaces again and again.
type rounds struct {
	n     *Node
	views map[string]*views
	after string // the sandbox at which the proxy failed: the next one begins
	// The proxy that did not know the question last, and how often in a row.
	process, unheard int
}

// round looks at each fence first: that does not wait for anybody. The proxy is
// then asked of one sandbox after the other until it fails or the time is up.
func (r *rounds) round(ctx context.Context, all map[string]*meshSandbox, proxy carrier, report func(id string, r wire.Report)) {
	next := map[string]*views{}
	var ids []string
	for _, id := range slices.Sorted(maps.Keys(all)) {
		v := r.views[id]
		if v == nil || v.watch != all[id].watch {
			v = newViews(all[id].watch)
		}
		next[id] = v
		found, err := r.n.look(v, all[id])
		if err == nil {
			ids = append(ids, id)
		}
		if found != nil {
			report(id, *found)
		}
	}
	r.views = next
	if proxy == nil || r.unheard >= unheardTimes && r.process == proxy.Process() {
		return
	}
	first, found := slices.BinarySearch(ids, r.after)
	if found {
		first++
	}
	ctx, cancel := context.WithTimeout(ctx, viewsEvery)
	defer cancel()
	asks := &asking{carrier: proxy, r: r}
	for _, id := range slices.Concat(ids[first:], ids[:first]) {
		reports, err := r.n.compare(ctx, next[id], all[id], asks)
		for _, found := range reports {
			report(id, found)
		}
		if err != nil {
			r.n.noteUnlessGone(err)
		}
		if asks.failed {
			r.after = id
			return
		}
	}
}

// asking is a proxy whose answers are heard by rounds, too.
type asking struct {
	carrier
	r      *rounds
	failed bool
}

func (a *asking) Carried(ctx context.Context, instance string, all []api.Connection) ([]api.Connection, error) {
	strange, err := a.carrier.Carried(ctx, instance, all)
	a.failed = err != nil
	a.r.heard(a.Process(), err)
	return strange, err
}

// heard notes how a process answered.
func (r *rounds) heard(process int, err error) {
	var refused *link.RefusedError
	if process != r.process || err == nil {
		r.process, r.unheard = process, 0
	}
	if !errors.Is(err, link.ErrClosed) && !errors.As(err, &refused) {
		return
	}
	if r.unheard++; r.unheard == unheardTimes {
		r.n.slog.Error("hauberk-mesh does not know how to say which connections are its own; is it older than this node? "+
			"Until another takes its place, nobody looks for connections around it", "pid", process, "cause", err)
	}
}

// look looks at the fence of one namespace. The error has been noted.
func (n *Node) look(v *views, s *meshSandbox) (*wire.Report, error) {
	changes, err := v.watch.Look()
	report := n.fenceReport(append(s.found, changes...), err)
	s.found = nil
	if n.tapless(v, s.plan.Instance, err) {
		n.views.changes.Add(1)
		report = &wire.Report{Severity: spec.SeverityCritical, Cause: "bypass", Rule: "network fence", Denied: true,
			Detail: "the machine runs and its tap is not in its namespace: it has another name, or is elsewhere and under no rules"}
	}
	return report, err
}

// tapless tells, once, of a tap that has been missing for so long that its machine
// cannot have ended just now: it was taken away. A tap goes with its machine, which
// is heard of a moment later.
func (n *Node) tapless(v *views, instance string, err error) bool {
	a, ok := n.find(instance)
	if !errors.Is(err, netns.ErrNoDevice) || !ok {
		v.tapless = suspect{}
		return false
	}
	select {
	case <-a.body.Died():
		v.tapless = suspect{}
		return false
	default:
	}
	return v.tapless.again(n.now())
}

// again notes one time more, and tells whether it has become certain just now.
func (s *suspect) again(now time.Time) bool {
	if s.times == 0 {
		s.since = now
	}
	was := s.certain
	s.times++
	s.certain = s.times >= strangeTimes && now.Sub(s.since) >= strangeTime
	return s.certain && !was
}

// compare compares the connections in one namespace, cuts those around the proxy
// and says what is to be reported.
func (n *Node) compare(ctx context.Context, v *views, s *meshSandbox, proxy carrier) (out []wire.Report, err error) {
	around, err := v.compare(ctx, proxy, s.plan.Instance, n.now())
	for _, c := range around {
		n.views.around.Add(1)
		text := fmt.Sprintf("connection from %s is in the kernel and not in the proxy; it was cut", c)
		if err := v.watch.Block(c); err != nil {
			text = fmt.Sprintf("connection from %s is in the kernel and not in the proxy, and could not be cut: %v", c, err)
		}
		out = append(out, wire.Report{Severity: spec.SeverityCritical, Cause: "bypass", Rule: "around the proxy", Denied: true, Detail: text})
	}
	return out, err
}

// fenceReport tells of a namespace that was not closed as it was made, nil if
// there is nothing to tell.
func (n *Node) fenceReport(changes []string, err error) *wire.Report {
	if len(changes) == 0 {
		if err != nil {
			n.noteUnlessGone(err)
		}
		return nil
	}
	n.views.changes.Add(uint64(len(changes)))
	text := strings.Join(changes, ", ")
	if err != nil {
		return &wire.Report{Severity: spec.SeverityCritical, Cause: "bypass", Rule: "network fence", Denied: true,
			Detail: fmt.Sprintf("%s; it could not be put right, and the network was shut: %v", text, err)}
	}
	return &wire.Report{Severity: spec.SeverityWarning, Cause: "mesh", Rule: "network fence", Denied: true, Detail: text + "; it was put right"}
}

// noteUnlessGone notes an error that is not the end of a sandbox.
func (n *Node) noteUnlessGone(err error) {
	if !errors.Is(err, netns.ErrNoDevice) && !errors.Is(err, fs.ErrClosed) {
		n.note(err)
	}
}

// viewCounts counts what was found, for metrics.
type viewCounts struct{ around, changes atomic.Uint64 }

// WriteTo writes the counts in the text format of Prometheus.
func (c *viewCounts) WriteTo(w io.Writer) (int64, error) {
	n, err := fmt.Fprintf(w, "# HELP hauberk_bypass_connections_total Connections that the kernel had and the proxy did not.\n"+
		"# TYPE hauberk_bypass_connections_total counter\nhauberk_bypass_connections_total %d\n"+
		"# HELP hauberk_fence_changes_total Changes to what keeps sandboxes' networks closed, each put right.\n"+
		"# TYPE hauberk_fence_changes_total counter\nhauberk_fence_changes_total %d\n", c.around.Load(), c.changes.Load())
	return int64(n), err
}
