package control

import (
	"hauberk.dev/api/spec"
	"hauberk.dev/plan"
)

// inspection adds what one policy says to what others have: the lowest scores
// hold. A harder action is never done before a softer one.
func inspection(p *plan.Inspect, s *spec.Inspect) *plan.Inspect {
	if s == nil {
		return p
	}
	if p == nil {
		p = &plan.Inspect{}
	}
	last := 0
	for _, c := range [...]struct {
		have *int
		want int32
	}{{&p.Observe, s.Observe}, {&p.Shed, s.Shed}, {&p.Challenge, s.Challenge}, {&p.Cut, s.Cut}, {&p.Incident, s.Incident}, {&p.Learn, s.Learn}} {
		if want := int(c.want); want > 0 && (*c.have == 0 || want < *c.have) {
			*c.have = want
		}
		if c.have == &p.Learn {
			break
		}
		if *c.have > 0 {
			*c.have = max(*c.have, last)
			last = *c.have
		}
	}
	p.Frozen = p.Frozen || s.Frozen
	return p
}

// mayAccuse tells whether the mesh may have others contained for what they send
// to an instance of a workload: a policy of the workload says so, and is not
// tried out only.
func (w world) mayAccuse(namespace, workload string) bool {
	for k, a := range w.access {
		if k.Namespace == namespace && a.Workload == workload && a.Mode != modeAudit && a.Inspect != nil && a.Inspect.Incident > 0 {
			return true
		}
	}
	return false
}
