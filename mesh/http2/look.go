package http2

import "hauberk.dev/mesh/h2frame"

// Refuse ends a request, in the middle of its body maybe: with an answer if none
// has begun, and else with a reset. What its server has of it is not whole.
func (s *Stream) Refuse(fields []Field, body []byte) {
	mate := s.mate.Load()
	s.Answer(fields, body)
	if mate == nil {
		return
	}
	mate.abandon(h2frame.CodeCancel)
	s.c.mu.Lock()
	ours := s.stopping
	s.c.mu.Unlock()
	if !ours { // the server's answer had begun
		s.abandon(h2frame.CodeSecurity)
	}
}

// answered shows what a server has said.
func (c *Conn) answered(s *Stream, status int, fields []Field) {
	if c.o.Answered != nil {
		c.o.Answered(s, status, fields)
	}
}
