package control

import (
	"hauberk.dev/api/spec"
	"hauberk.dev/plan"
)

// inspection adds what one policy says to what others have: the lowest scores
// hold. The hardest action whose score is reached is done, so a softer one counts
// at the latest where a harder one does, and saying it so changes nothing; to
// raise the harder one would let one policy undo another.
func inspection(p *plan.Inspect, s *spec.Inspect) *plan.Inspect {
	if s == nil {
		return p
	}
	if p == nil {
		p = &plan.Inspect{}
	}
	harder := 0
	for _, c := range [...]struct {
		have *int
		want int32
	}{{&p.Incident, s.Incident}, {&p.Cut, s.Cut}, {&p.Challenge, s.Challenge}, {&p.Shed, s.Shed}, {&p.Observe, s.Observe}} {
		*c.have = lowest(*c.have, int(c.want))
		if *c.have > 0 {
			*c.have = lowest(*c.have, harder)
			harder = *c.have
		}
	}
	p.Learn = lowest(p.Learn, int(s.Learn))
	p.Frozen = p.Frozen || s.Frozen
	return p
}

// lowest of two scores, of which 0 is none.
func lowest(a, b int) int {
	if a == 0 || b == 0 {
		return max(a, b)
	}
	return min(a, b)
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
