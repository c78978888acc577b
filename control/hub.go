package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"sync"
	"time"

	wire "hauberk.dev/api/node"
)

const (
	// beat is how often a quiet watch gets an empty line.
	beat = 5 * time.Second
	// lostAfter is how long a node may be silent before it is not ready.
	lostAfter = 15 * time.Second
)

// hub holds what each node last said and what it is to be told.
type hub struct {
	now func() time.Time
	// tell is called, without the lock, after a node has said something new.
	tell func()

	mu    sync.Mutex
	nodes map[string]*nodeRecord
}

type nodeRecord struct {
	hello    wire.Hello
	said     bool
	seen     time.Time
	statuses map[string]wire.InstanceStatus
	spares   wire.Spares
	desired  []byte
	changed  chan struct{} // closed and replaced when desired changes
}

func newHub(now func() time.Time, tell func()) *hub {
	return &hub{now: now, tell: tell, nodes: map[string]*nodeRecord{}}
}

func (h *hub) recordLocked(name string) *nodeRecord {
	r := h.nodes[name]
	if r == nil {
		r = &nodeRecord{statuses: map[string]wire.InstanceStatus{}, changed: make(chan struct{})}
		h.nodes[name] = r
	}
	return r
}

// hello records a node's introduction.
func (h *hub) hello(name string, in wire.Hello) error {
	switch {
	case in.Version != wire.Version:
		return fmt.Errorf("hello of %s: protocol version %d: this control plane speaks %d; run the same release on both sides", name, in.Version, wire.Version)
	case in.Node != name:
		return fmt.Errorf("hello of %s: it calls itself %q", name, in.Node)
	}
	h.mu.Lock()
	r := h.recordLocked(name)
	r.hello, r.said, r.seen = in, true, h.now()
	h.mu.Unlock()
	h.tell()
	return nil
}

// status records a node's report.
func (h *hub) status(name string, s wire.Status) {
	h.mu.Lock()
	r := h.recordLocked(name)
	r.seen, r.spares = h.now(), s.Spares
	now := make(map[string]wire.InstanceStatus, len(s.Instances))
	for _, i := range s.Instances {
		now[i.ID] = i
	}
	news := !maps.EqualFunc(r.statuses, now, sameButHeartbeat)
	r.statuses = now
	h.mu.Unlock()
	if news {
		h.tell()
	}
}

// sameButHeartbeat compares all that the control plane acts on.
func sameButHeartbeat(a, b wire.InstanceStatus) bool {
	return a.Phase == b.Phase && a.Reason == b.Reason && a.Message == b.Message && a.Serial == b.Serial &&
		a.Guard.Generation == b.Guard.Generation && a.Guard.Lost == b.Guard.Lost
}

// word names what one node says of one instance. A node's word on an instance
// of another node is nothing anybody asks for.
type word struct{ node, instance string }

// snapshot returns the state of every node and its last words.
func (h *hub) snapshot() (map[string]nodeState, map[word]wire.InstanceStatus, map[string]time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	nodes, statuses, seen := map[string]nodeState{}, map[word]wire.InstanceStatus{}, map[string]time.Time{}
	for name, r := range h.nodes {
		nodes[name] = nodeState{hello: r.hello, spares: r.spares, ready: r.said && h.now().Sub(r.seen) < lostAfter}
		seen[name] = r.seen
		for id, s := range r.statuses {
			statuses[word{name, id}] = s
		}
	}
	return nodes, statuses, seen
}

// heartbeat is the guard heartbeat of an instance as its node last gave it.
func (h *hub) heartbeat(node, id string) (wire.GuardHeartbeat, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r := h.nodes[node]
	if r == nil {
		return wire.GuardHeartbeat{}, false
	}
	s, ok := r.statuses[id]
	return s.Guard, ok
}

// order sets what a node should be doing; an unchanged order tells nobody.
func (h *hub) order(name string, desired []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r := h.recordLocked(name)
	if bytes.Equal(r.desired, desired) {
		return
	}
	r.desired = desired
	close(r.changed)
	r.changed = make(chan struct{})
}

// watch writes a node's orders, one line each, until ctx ends or a write
// fails. flush is called after every line.
func (h *hub) watch(ctx context.Context, name string, w io.Writer, flush func() error) error {
	var last []byte
	tick := time.NewTicker(beat)
	defer tick.Stop()
	for {
		h.mu.Lock()
		r := h.recordLocked(name)
		desired, changed := r.desired, r.changed
		h.mu.Unlock()
		line := []byte("\n")
		if desired != nil && !bytes.Equal(desired, last) {
			line = append(bytes.Clone(desired), '\n')
			last = desired
		}
		if _, err := w.Write(line); err != nil {
			return fmt.Errorf("watch of %s: %w", name, err)
		}
		if err := flush(); err != nil {
			return fmt.Errorf("watch of %s: %w", name, err)
		}
		select {
		case <-changed:
		case <-tick.C:
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("watch of %s: ended", name), ctx.Err())
		}
	}
}
