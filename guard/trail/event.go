package trail

import (
	"net/netip"

	"hauberk.dev/guard"
)

// Event is the Guard's event that a record was made of, as far as the record
// tells. A record of losses has none.
func (r Record) Event() (e guard.Event, ok bool) {
	e = guard.Event{
		Why: r.Why, Rule: r.Rule, Generation: r.Generation, Sequence: r.Sequence, Lost: r.Lost, SinceBoot: r.Boot,
		PID: r.Process.PID, PPID: r.Process.PPID, UID: r.Process.UID, Command: r.Process.Name, Args: r.Process.Args,
		Path: r.Path, Truncated: r.PathCut, Detail: r.Detail, Value: r.Value, Names: r.Names, Series: r.Series, Count: r.Count,
		Exe: r.Process.Exe, Parent: r.Process.Parent, Start: r.Process.Start, Lineage: r.Process.Lineage, Cut: r.Process.Cut,
	}
	if at, err := netip.ParseAddrPort(r.Target); err == nil {
		e.Target = at
	}
	for op, name := range names {
		if name == r.Op {
			e.Op = op
		}
	}
	verdicts := []guard.Verdict{guard.Allowed, guard.Reported, guard.Denied, guard.Killed}
	for _, v := range verdicts {
		if v.String() == r.Verdict {
			e.Verdict = v
			ok = true
		}
	}
	return e, ok && e.Op != 0 && !r.Again
}
