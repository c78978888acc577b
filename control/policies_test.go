package control

import (
	"strings"
	"testing"

	"hauberk.dev/api/spec"
	"hauberk.dev/api/v1alpha1"
	"hauberk.dev/control/rollout"
)

func TestPoliciesThatMakeNoSenseAreNotAccepted(t *testing.T) {
	w := bank()
	w.releases = map[key]spec.ReleasePolicy{
		{"bank", "sound"}:    {Applications: []string{"*"}, Rules: []spec.ReleaseRule{{Expression: "author != ''", Message: "no author"}}},
		{"bank", "dangling"}: {Applications: []string{"nobody"}},
		{"bank", "broken"}:   {Applications: []string{"*"}, Rules: []spec.ReleaseRule{{Expression: "author !=", Message: "x"}}},
	}
	w.access[key{"bank", "dangling"}] = spec.AccessPolicy{Workload: "nobody"}
	w.guards[key{"bank", "dangling"}] = guardPolicy{spec: spec.GuardPolicy{Net: &spec.GuardNet{Egress: []spec.GuardEgress{{Service: "nobody"}}}}}
	cases := []struct {
		name   string
		got    verdict
		reason string
		words  string
	}{
		{"access", w.accessVerdict(key{"bank", "ledger"}), "Accepted", ""},
		{"dangling access", w.accessVerdict(key{"bank", "dangling"}), "WorkloadNotFound", `"nobody"`},
		{"release", w.releaseVerdict(key{"bank", "sound"}), "Accepted", ""},
		{"dangling release", w.releaseVerdict(key{"bank", "dangling"}), "ApplicationNotFound", `"nobody"`},
		{"broken release", w.releaseVerdict(key{"bank", "broken"}), "RuleInvalid", ""},
		{"guard", w.danglingService(key{"bank", "web"}), "Accepted", ""},
		{"dangling guard", w.danglingService(key{"bank", "dangling"}), "ServiceNotFound", `"nobody"`},
	}
	for _, c := range cases {
		if c.got.reason != c.reason || c.got.accepted != (c.reason == "Accepted") || !strings.Contains(c.got.message, c.words) {
			t.Errorf("%s: %+v, want %s", c.name, c.got, c.reason)
		}
	}
}

func TestAppliedCountsOnlyTheNewestGeneration(t *testing.T) {
	w := bank()
	n := rollout.Name{Namespace: "bank", Name: "web"}
	for generation, want := range map[uint64]int32{2: 0, 3: 1} {
		i := w.instances[key{"bank", "web-1"}]
		i.guard, i.status.Guard.Generation, i.status.Guard.Programs = 3, generation, 44
		w.instances[key{"bank", "web-1"}] = i
		var got v1alpha1.GuardPolicyStatus
		w.guardStatus(n, spec.GuardSelect{}, &got)
		if got.Applied != want || got.Eligible != 1 || got.Workloads != 1 {
			t.Errorf("generation %d: %+v, want %d applied", generation, got, want)
		}
	}
}
