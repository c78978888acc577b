package node

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	wire "hauberk.dev/api/node"
	"hauberk.dev/guard"
)

// maxLearnt bounds what is sent of one instance, in bytes, below what the control
// plane takes.
const maxLearnt = 768 << 10

// learn begins to gather, or ends it, as the policies in force say.
func (s *sandbox) learn(c guard.Compiled) {
	s.trail.mu.Lock()
	defer s.trail.mu.Unlock()
	switch {
	case !c.Learns:
		s.trail.learner = nil
	case s.trail.learner == nil:
		s.trail.learner = &guard.Learner{}
		s.trail.learner.Began(time.Now().UTC())
		s.trail.news = true
	}
}

// tellLearnt hands on what was gathered since the last time. If there is no room
// for it now, the next heartbeat tries again.
func (s *sandbox) tellLearnt() {
	s.trail.mu.Lock()
	defer s.trail.mu.Unlock()
	if s.trail.learner == nil || !s.trail.news {
		return
	}
	body, err := observation(s.trail.learner.Observation())
	if err != nil {
		s.g.n.note(err)
		return
	}
	select {
	case s.g.n.learnt <- wire.Learnt{Instance: s.id, Observation: body}:
		s.trail.news = false
	default:
	}
}

// observation encodes one. Examples are the first to go where it is too long.
func observation(o guard.Observation) (json.RawMessage, error) {
	body, err := json.Marshal(o)
	if err == nil && len(body) > maxLearnt {
		for i := range o.Facts {
			o.Facts[i].Example = ""
		}
		body, err = json.Marshal(o)
	}
	if err == nil && len(body) > maxLearnt {
		err = fmt.Errorf("it takes %d bytes, at most %d are sent", len(body), maxLearnt)
	}
	if err != nil {
		return nil, fmt.Errorf("tell what was learnt: %w", err)
	}
	return body, nil
}

// learntLoop tells the control plane what was learnt. What fails is told again
// with what follows: an observation holds all that came before it.
func (n *Node) learntLoop(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case l := <-n.learnt:
			n.note(n.uplink.call(ctx, wire.PathLearnt, l, nil))
		}
	}
}
