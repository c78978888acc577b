package guard

import (
	"slices"
	"testing"
)

// container is the number of the one that the attacks of a corpus are in, as
// testdata/init names its cgroup.
const container = 77

// Where there is no process to name, a record says what there is: docs/guard.md
// lists these.
const (
	// peers is what another machine sent: the record has its address.
	peers = iota + 1
	// packet is judged on its way out, where the kernel gives the number of the
	// process and nothing more.
	packet
)

var withoutProcess = map[string]int{"dialfrom": peers, "udpfrom": peers, "sourceroute": packet}

// attributed says whether a record names who did it: the process that the
// machine started for the attack, or one that this led to; its container and
// its program; and the policy, its generation and digest, which the guest told
// of when it came in force.
func attributed(t *testing.T, s scenario, a attempt, c *Compiled, e Event, o outcome) bool {
	t.Helper()
	run, ok := name(a.run), true
	want := func(is bool, format string, args ...any) {
		if !is {
			ok = false
			t.Errorf("%s: "+format+"\n%s of %q, of processes %v, in container %d", append(append([]any{a.run}, args...), e, e.Exe, e.Lineage, e.Container)...)
		}
	}
	rule, known := c.Rule(e.Rule)
	want(known && (rule.Policy == s.name || rule.Policy == builtIn), "rule %d is of policy %q; want one of %q", e.Rule, rule.Policy, s.name)
	stood := o.stood[e.Generation]
	want(e.Generation == c.Generation && stood.Digest == c.Digest, "generation %d with digest %s was in force; want %d with %s", e.Generation, stood.Digest, c.Generation, c.Digest)
	own := o.pids[run]
	switch withoutProcess[run] {
	case peers:
		want(e.PID == 0 && e.Target.IsValid(), "it is attributed to process %d; want none, and the peer", e.PID)
		return false
	case packet:
		want(e.PID == own, "it is attributed to process %d; want %d", e.PID, own)
		return false
	}
	its := e.PID == own || slices.ContainsFunc(e.Lineage, func(f Ancestor) bool { return f.PID == own })
	want(own != 0 && its, "it is attributed to process %d; want %d, or one that this led to", e.PID, own)
	want(e.Container == container, "it is attributed to container %d; want %d", e.Container, container)
	want(e.Exe != "" && e.Start > 0, "no program is named")
	if e.PID == own {
		want(e.Exe == "/attack" && len(e.Lineage) == 0, "its program is %q after %v; want /attack, after none", e.Exe, e.Lineage)
	} else {
		want(len(e.Lineage) > 0 && e.Lineage[len(e.Lineage)-1].PID == own && e.Parent != "", "what led to it is %v; want process %d first", e.Lineage, own)
	}
	return ok
}
