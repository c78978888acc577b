package inspect

import "time"

const sentWindow = 10 * time.Second

// Tick ends windows of time: it is to be called every few seconds. It returns
// who was sent far more than is usual, with the verdict.
func (s *Service) Tick(now time.Duration, tell func(*Caller, Verdict)) {
	s.mu.RLock()
	all := make([]*Caller, 0, len(s.callers))
	for _, c := range s.callers {
		all = append(all, c)
	}
	s.mu.RUnlock()
	frozen := s.conf.Load().Frozen
	for _, c := range all {
		if v, found := s.tick(c, now, frozen); found {
			tell(c, v)
		}
	}
}

// tick compares what a caller was sent in this window with what is usual, and
// learns from it when the window is over.
func (s *Service) tick(c *Caller, now time.Duration, frozen bool) (v Verdict, found bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	w := int64(now / sentWindow)
	if c.window == 0 {
		c.window, c.before = w, 0
	}
	sent := float64(c.sent.Load() - c.before)
	usual, most, known := s.usual(c.Identity)
	if known && sent > leastExfil && sent > exfilTimes*usual && sent > 2*most {
		v.Findings = []Finding{{Exfiltration, sizeText(int64(sent)) + " sent to it in " + sentWindow.String() + ", where " + sizeText(int64(most)) + " was the most"}}
		c.sumLocked(&v, now)
		c.window, c.before = w, c.sent.Load()
		return v, true
	}
	if w != c.window {
		if sent > 0 && !frozen {
			s.learnSent(c.Identity, sent)
		}
		c.window, c.before = w, c.sent.Load()
	}
	return v, false
}

// usual is what a caller of that identity is sent in a window, or any caller if
// too little is known of it.
func (s *Service) usual(identity string) (usual, most float64, known bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	b := s.normal[identity]
	if b == nil || b.count < exfilAfter {
		b = &s.typical
	}
	return b.mean + 3*sqrt(b.variance), b.most, b.count >= exfilAfter
}

func (s *Service) learnSent(identity string, sent float64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.normal[identity]
	if b == nil && len(s.normal) < MaxCallers {
		b = &baseline{}
		s.normal[identity] = b
	}
	for _, b := range [...]*baseline{b, &s.typical} {
		if b != nil {
			b.add(sent)
			b.most = max(b.most, sent)
		}
	}
}

// peer is where an instance that calls has its connections from.
type peer struct {
	identity, from string
	open           int
}

// Arrive notes a connection of an instance at an address, for which a proxy at
// another speaks. An instance is in one place: who has connections from one, and
// then one from elsewhere or under another name, is two. The result says so. Who
// is surely there, by the plan, outranks a name that was only claimed before.
func (s *Service) Arrive(address, identity, from string, sure bool) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.peers[address]
	if p == nil {
		if len(s.peers) >= MaxCallers {
			s.Counts.CallersOver.Add(1)
			return ""
		}
		p = &peer{identity: identity, from: from}
		s.peers[address] = p
	}
	p.open++
	switch {
	case p.identity != identity && sure:
		p.identity, p.from = identity, from
	case p.identity != identity:
		return "its address " + address + " has connections as " + p.identity
	case p.from != from:
		return "its address " + address + " has connections by way of " + p.from + ", and this one by " + from
	}
	return ""
}

// Depart says that a connection that arrived has ended.
func (s *Service) Depart(address string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.peers[address]; p != nil {
		if p.open--; p.open <= 0 {
			delete(s.peers, address)
		}
	}
}
