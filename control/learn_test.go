package control

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"testing"
	"time"

	"hauberk.dev/api/admin"
	wire "hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/api/v1alpha1"
	"hauberk.dev/guard"
	"hauberk.dev/image"
	"hauberk.dev/kube"
)

// learnt is what a node tells of an instance that ran and was called.
func (f *fleet) learnt(instance string, since time.Time, lost uint64, program string) {
	f.Helper()
	var l guard.Learner
	l.Began(since)
	l.Lost(lost)
	for n, e := range []guard.Event{
		{Op: guard.OpUnlisted, Path: program}, {Op: guard.OpBind, Target: netip.MustParseAddrPort("0.0.0.0:8080"), Exe: program},
		{Op: guard.OpEgress, Target: netip.MustParseAddrPort("192.0.2.7:443"), Exe: program}, {Op: guard.OpExec, Why: 1, Path: "/tmp/x", Exe: program},
	} {
		e.Verdict = guard.Reported
		l.Add(e, 1, since.Add(time.Duration(n)*time.Second))
	}
	body, err := json.Marshal(l.Observation())
	if err != nil {
		f.Fatal(err)
	}
	f.mustCall(wire.PathLearnt, wire.Learnt{Instance: instance, Observation: body}, nil)
}

func (f *fleet) proposal() (p admin.Proposal, g guard.Proposal) {
	f.Helper()
	if err := f.ask("GET", admin.PathProposal, url.Values{"policy": {"bank/web"}}, nil, &p); err != nil {
		f.Fatal(err)
	}
	if err := json.Unmarshal(p.Proposal, &g); err != nil {
		f.Fatal(err)
	}
	return p, g
}

func (f *fleet) promote(in admin.Promote) error {
	in.Policy, in.By = "bank/web", "ann"
	return f.ask("POST", admin.PathPromote, nil, f.json(in), nil)
}

const learningPolicy = `apiVersion: hauberk.dev/v1alpha1
kind: GuardPolicy
metadata: {name: web, namespace: bank}
spec: {mode: learn, rollout: {stages: [20, 100], soakSeconds: 0, denialsPerMinute: 3}}
`

// TestLearning follows a policy through learn: what the nodes tell becomes a
// proposal, over a restart, and a person makes it the policy; nobody else does.
func TestLearning(t *testing.T) {
	f := newFleet(t)
	err := f.ask("GET", admin.PathProposal, url.Values{"policy": {"bank/web"}}, nil, nil)
	f.refused("the proposal of a policy that enforces", err, "NotLearning")
	f.apply(learningPolicy)
	f.reach("stage 1 waits", waiting(1))
	f.mustAct("confirm")
	f.reach("all learn", func(p admin.GuardPolicy) bool { return p.Rollout == nil && p.Mode == "learn" && p.Applied == replicas })
	for id, i := range f.have {
		if len(i.Guard.Policies) != 2 || !slices.ContainsFunc(i.Guard.Policies, func(p wire.NamedGuardPolicy) bool { return p.Name == "baseline" }) {
			t.Errorf("%s has %+v: the baseline holds beside a policy that only watches", id, i.Guard.Policies)
		}
	}
	names := make([]string, 0, replicas)
	for id := range f.have {
		names = append(names, id)
	}
	slices.Sort(names)
	began := time.Now().Add(-time.Hour).UTC()
	f.learnt(names[0], began, 0, "/bin/web")
	f.learnt(names[1], began, 7, "/bin/web")
	seen := func() bool { f.obey(); p, _ := f.proposal(); return p.Acts == 8 && p.Instances == 2 }
	f.until("both are learnt from", seen)
	// Told again, an instance counts once; begun anew, twice.
	f.learnt(names[0], began, 0, "/bin/web")
	f.learnt(names[1], began.Add(time.Minute), 0, "/bin/other")
	f.until("a turn before is kept", func() bool { f.obey(); p, _ := f.proposal(); return p.Acts == 12 && p.Lost == 7 })
	f.ahead.Add(int64(2 * keepEvery))
	f.learnt(names[0], began, 0, "/bin/web")
	f.until("it is written down", func() bool {
		f.obey()
		f.c.lessons.mu.Lock()
		defer f.c.lessons.mu.Unlock()
		for _, at := range f.c.lessons.workloads {
			return !at.dirty
		}
		return false
	})
	f.stop()
	f.start()
	again := f.join("n1")
	again.hello()
	f.fakeNode = again
	f.until("it is known after a restart", func() bool {
		f.obey()
		var p admin.Proposal
		return f.ask("GET", admin.PathProposal, url.Values{"policy": {"bank/web"}}, nil, &p) == nil && p.Acts == 12
	})
	p, g := f.proposal()
	if len(g.Spec.Exec.Allow) != 2 || g.Spec.Net.Egress[0].CIDR != "192.0.2.7/32" || g.Spec.Net.Ingress[0].Ports[0] != 8080 || len(g.Refuses) != 1 {
		t.Errorf("proposal %+v", g)
	}
	if got := f.state("bank/web"); got.WouldDeny != 3 || got.Mode != "learn" || got.Rollout != nil {
		t.Errorf("by itself it is %+v; want it to learn on, and to tell of 3 acts that it would deny", got)
	}
	o, err := kube.Get[v1alpha1.GuardPolicy](t.Context(), f.c.store, "bank", "web")
	if err != nil || o.Status.Learning == nil || o.Status.Learning.Whole || o.Status.Learning.Digest != p.Digest || len(o.Status.Learning.Evidence) == 0 || *o.Status.WouldDeny != 3 {
		t.Errorf("the object's status is %+v, %v", o.Status.Learning, err)
	}
	f.refused("a proposal that was not read", f.promote(admin.Promote{Mode: "enforce", Digest: "other", Lossy: true}), "Changed")
	f.refused("a proposal with gaps", f.promote(admin.Promote{Mode: "enforce", Digest: p.Digest}), "Lossy")
	f.refused("a proposal as what it is not", f.promote(admin.Promote{Mode: "learn", Digest: p.Digest, Lossy: true}), "BadMode")
	if err := f.promote(admin.Promote{Mode: "audit", Digest: p.Digest, Lossy: true, Reason: "read"}); err != nil {
		t.Fatal(err)
	}
	f.reach("stage 1 of the promotion waits", waiting(1))
	f.mustAct("confirm")
	f.reach("it is in force", func(p admin.GuardPolicy) bool { return p.Rollout == nil && p.Mode == "audit" && p.Applied == replicas })
	for n := range 4 {
		f.mustCall(wire.PathReport, wire.Report{Instance: names[0], Severity: spec.SeverityWarning, Policy: "web", Cause: "guard", Rule: "r", Detail: fmt.Sprint(n), Observed: time.Now()}, nil)
	}
	if got := f.state("bank/web"); got.WouldDeny != 4 {
		t.Errorf("in audit it would deny %d, want 4", got.WouldDeny)
	}
	f.said("guard.promoted", "ann (uid ", "learnt from 12 acts", "read")
}

// TestLearntOfStrangers: a node tells only of what runs on it.
func TestLearntOfStrangers(t *testing.T) {
	f := newFleet(t)
	f.refused("an instance that is not", f.call(wire.PathLearnt, wire.Learnt{Instance: "nobody", Observation: []byte(`{}`)}, nil), "UnknownInstance")
	for id := range f.have {
		f.refused("no observation", f.call(wire.PathLearnt, wire.Learnt{Instance: id, Observation: []byte(`[]`)}, nil), "BadRequest")
		break
	}
}

// TestDigestsAreOfTheWatched: a workload of the same name in another namespace has
// no word in what a program is.
func TestDigestsAreOfTheWatched(t *testing.T) {
	// Who asks for the image of another finds no content.
	c := &Control{indexes: map[string]*image.Index{"bank/web@sha256:1": nil}}
	w := world{instances: map[key]instance{
		{"bank", "web-1"}: {workload: "web", repository: "bank/web", digest: "sha256:1"},
		{"evil", "web-1"}: {workload: "web", repository: "evil/web", digest: "sha256:2"},
	}}
	defer func() {
		if recover() != nil {
			t.Error("the image of another namespace was asked for")
		}
	}()
	if got := c.digests(w, []key{{"bank", "web"}})("/bin/web"); got != "" {
		t.Error(got)
	}
}
