package guard

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"hauberk.dev/api/node"
	"hauberk.dev/api/spec"
)

// judgeForTest judges as compileForTest compiles.
func judgeForTest(t testing.TB, generation uint64, policies ...spec.GuardPolicy) *Judge {
	t.Helper()
	g := node.Guard{Generation: generation, Services: map[string]string{"ledger": "198.51.100.7"}}
	for _, p := range policies {
		g.Policies = append(g.Policies, node.NamedGuardPolicy{Name: "policy-0", Spec: p})
	}
	j, err := NewJudge(g, JudgeFacts{
		CompileFacts: CompileFacts{Gateway: netip.MustParseAddr("192.0.2.1"), FilesWith: filesForTest},
		Same: func(path string) []string { // the image's hard links
			return map[string][]string{"/bin/curl": {"/bin/curl-too"}, "/bin/curl-too": {"/bin/curl"}}[path]
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return j
}

// renamed are acts whose records name an object as no rule does: who has changed
// its root tells paths from there, and a file is also what a mount or a hard link
// elsewhere shows it as. The kernel knows the object; the judge has its name only.
func renamed(act string) bool {
	return slices.ContainsFunc([]string{"chroot", "bindwrite", "write=linked"}, func(p string) bool { return strings.HasPrefix(act, p) })
}

// holdJudge holds the judge to the kernel: for every record of the corpus its
// verdict and its rule are those that the kernel gave.
func holdJudge(t *testing.T, s scenario, mode string, c *Compiled, o outcome) {
	t.Helper()
	policies := append([]spec.GuardPolicy{s.policy}, s.also...)
	for i := range policies {
		policies[i].Mode = mode
	}
	j := judgeForTest(t, c.Generation, policies...)
	var events []Event
	for name, list := range o.events {
		for _, e := range list {
			if e.Generation == c.Generation && !renamed(name) {
				events = append(events, e)
			}
		}
	}
	slices.SortFunc(events, func(a, b Event) int { return int(a.SinceBoot - b.SinceBoot) })
	known, unknown := 0, 0
	for _, e := range events {
		j.Learn(e)
		got := j.Judge(e)
		switch {
		case e.Op == OpRepeated:
		case got.Verdict == Unknown:
			unknown++
			t.Logf("%s: not known, for want of %s: %s", s.name, got.Lacks, e)
		case e.Verdict == Allowed && got.Verdict < Denied: // what was reported is told of as done, besides
			known++
		case got.Verdict != e.Verdict || got.Rule.ID != e.Rule:
			t.Errorf("%s, %s: the judge says %s by rule %d %q of: %s at %v", s.name, mode, got.Verdict, got.Rule.ID, got.Rule.Text, e, e.SinceBoot)
		default:
			known++
		}
	}
	t.Logf("%s, %s: %d verdicts are the kernel's, %d are not known", s.name, mode, known, unknown)
	if unknown > known {
		t.Errorf("%s, %s: %d verdicts are not known, beside %d that are", s.name, mode, unknown, known)
	}
}
