package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	wire "hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/guard"
	"hauberk.dev/guard/trail"
	"hauberk.dev/internal/run"
)

const (
	// historyLimit bounds what is kept of the events of an instance, in bytes.
	historyLimit = 8 << 20
	// historiesKept bounds how many instances that are gone have a history.
	historiesKept = 256
)

// trailOf keeps the record of what a sandbox's Guard told.
type trailOf struct {
	mu      sync.Mutex
	trail   trail.Trail
	history *trail.History
	tallies map[guard.Op]guard.Tally
	learner *guard.Learner // while some policy is in learn
	news    bool           // that the control plane has not heard of it
}

func (g *guests) historyOf(id string) string { return filepath.Join(g.histories, id+".jsonl") }

// openTrail begins, or goes on with, the history of an instance.
func (s *sandbox) openTrail(i wire.Instance) error {
	h, err := trail.OpenHistory(s.g.historyOf(s.id), historyLimit)
	if err != nil {
		return err
	}
	s.g.n.note(s.g.forgetHistories(historiesKept, s.id))
	s.trail.mu.Lock()
	defer s.trail.mu.Unlock()
	s.trail.history = h
	s.trail.trail.Sandbox = trail.Sandbox{ID: i.ID, Image: i.Spec.Image, ImageDigest: i.Digest, Node: s.g.n.conf.Name,
		Namespace: i.Namespace, Workload: i.Workload, Application: i.Spec.Application}
	s.trail.trail.Container = func(uint32) string { return i.ID } // there is one
	return nil
}

// forgetHistories removes those of instances that are gone, but for the newest
// and that of the one that begins.
func (g *guests) forgetHistories(keep int, begins string) error {
	entries, err := os.ReadDir(g.histories)
	if err != nil {
		return fmt.Errorf("forget histories: %w", err)
	}
	gone := map[string]time.Time{} // when its history was last written
	for _, e := range entries {
		id, _, ok := strings.Cut(e.Name(), ".jsonl")
		if _, lives := g.n.find(id); lives || !ok || id == begins {
			continue
		}
		if info, err := e.Info(); err == nil && info.ModTime().After(gone[id]) {
			gone[id] = info.ModTime()
		}
	}
	oldest := slices.SortedFunc(maps.Keys(gone), func(a, b string) int { return gone[a].Compare(gone[b]) })
	var errs []error
	for _, id := range oldest[:max(0, len(oldest)-keep)] {
		for _, path := range []string{g.historyOf(id), g.historyOf(id) + ".1"} {
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, fmt.Errorf("forget history: %w", err))
			}
		}
	}
	return errors.Join(errs...)
}

func (s *sandbox) closeTrail() error {
	s.trail.mu.Lock()
	defer s.trail.mu.Unlock()
	if s.trail.history == nil {
		return nil
	}
	return s.trail.history.Close()
}

// record keeps a record of the Guard, and turns one of what was not allowed
// into a report.
func (s *sandbox) record(raw []byte) {
	e, err := guard.DecodeEvents(raw)
	if err != nil {
		s.g.n.note(fmt.Errorf("event of %s: %w", s.id, err))
		return
	}
	s.mu.Lock()
	policy := s.policy
	if s.before.Generation == e.Generation && e.Generation != 0 {
		policy = s.before
	}
	s.mu.Unlock()
	s.trail.mu.Lock()
	r := s.trail.trail.Record(e, &policy, policy.Digest, time.Now())
	s.keepLocked(r)
	if l := s.trail.learner; l != nil {
		l.Add(e, r.Count, r.Time)
		s.trail.news = true
	}
	s.trail.mu.Unlock()
	a, ok := s.g.n.find(s.id)
	// A repetition was reported when it was none.
	if !ok || e.Verdict == guard.Allowed || e.Op == guard.OpRepeated {
		return
	}
	rule, known := policy.Rule(e.Rule)
	if !known {
		rule = guard.Rule{Policy: "unknown", Text: fmt.Sprintf("rule %d", e.Rule), Severity: spec.SeverityCritical}
	}
	if rule.Learn {
		return // what is only watched is no violation
	}
	s.g.n.violation(a, wire.Report{Severity: rule.Severity, Cause: "guard", Rule: rule.String(), Detail: r.Text,
		Policy:   rule.Policy,
		Sequence: e.Sequence, Lost: e.Lost, Denied: e.Verdict != guard.Reported, Observed: r.Time})
}

// tally keeps what a heartbeat says of records that were lost.
func (s *sandbox) tally(now map[guard.Op]guard.Tally) {
	s.trail.mu.Lock()
	defer s.trail.mu.Unlock()
	for _, r := range s.trail.trail.Losses(now, time.Now()) {
		s.keepLocked(r)
		if l := s.trail.learner; l != nil {
			l.Lost(r.Count)
			s.trail.news = true
		}
	}
	s.g.n.metrics.Tally(s.trail.trail.Sandbox, s.trail.tallies, now)
	s.trail.tallies = now
}

func (s *sandbox) keepLocked(r trail.Record) {
	s.g.n.metrics.Add(r)
	if s.trail.history != nil {
		s.g.n.note(s.trail.history.Append(r))
	}
}

var instancePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{0,253}$`)

// events gives the history of an instance, line by line.
func (n *Node) events(w http.ResponseWriter, r *http.Request) {
	id := r.FormValue("instance")
	known := instancePattern.MatchString(id)
	if known {
		_, err := os.Stat(n.guests.historyOf(id))
		known = err == nil
	}
	if !known {
		refuse(w, http.StatusNotFound, "NoEvents", fmt.Errorf("instance %q left no events on %s", id, n.conf.Name))
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	rc := http.NewResponseController(w)
	follow := r.FormValue("follow") == "true"
	n.note(rc.Flush()) // a person who follows sees that it began
	n.note(trail.Read(r.Context(), n.guests.historyOf(id), follow, func(record trail.Record) error {
		line, err := json.Marshal(record)
		if err == nil {
			_, err = w.Write(append(line, '\n'))
		}
		if err == nil && follow {
			err = rc.Flush()
		}
		return err
	}))
}

// serveMetrics answers on a socket that only the node's user may open.
func (n *Node) serveMetrics(ctx context.Context) error {
	path := filepath.Join(n.conf.Run, "metrics.sock")
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("open metrics: %w", err)
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		return fmt.Errorf("open metrics: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return fmt.Errorf("open metrics: %w", errors.Join(err, ln.Close()))
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		n.metrics.WriteTo(w) // a peer that left is told nothing
		n.views.WriteTo(w)
		n.mesh.normals.WriteTo(w)
	})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, MaxHeaderBytes: 64 << 10}
	return run.HTTP("metrics", srv, ln, time.Second).Run(ctx)
}
