package control

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"hauberk.dev/api/admin"
	wire "hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/api/v1alpha1"
	"hauberk.dev/kube"
)

// fleet is a workload with several instances on a node that obeys at once,
// and does what its test says.
type fleet struct {
	*fakeNode
	have map[string]wire.Instance
	beat map[string]func(*wire.InstanceStatus)
}

const replicas = 10

func newFleet(t *testing.T) *fleet {
	t.Helper()
	tn := newTown(t)
	n := tn.join("n1")
	n.hello()
	tn.found()
	tn.apply(`
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {name: web, namespace: bank, labels: {tier: front}}
spec: {application: bank, image: "bank/web:1", guardPolicies: [web], replicas: ` + fmt.Sprint(replicas) + `, ports: [{port: 8080}]}
`)
	tn.release()
	f := &fleet{fakeNode: n, have: map[string]wire.Instance{}, beat: map[string]func(*wire.InstanceStatus){}}
	f.until("all instances run", func() bool {
		f.obey()
		return len(f.have) == replicas && f.state("bank/web").Eligible == replicas && f.state("bank/web").Applied == replicas
	})
	return f
}

// obey takes the newest orders and reports them done.
func (f *fleet) obey() {
	f.Helper()
	for {
		select {
		case d := <-f.orders:
			f.have = map[string]wire.Instance{}
			for _, i := range d.Instances {
				f.have[i.ID] = i
			}
			continue
		default:
		}
		break
	}
	var all []wire.InstanceStatus
	for _, i := range f.have {
		s := f.running(i)
		if change := f.beat[i.ID]; change != nil {
			change(&s)
		}
		all = append(all, s)
	}
	f.say(all...)
}

func (f *fleet) state(policy string) admin.GuardPolicy {
	f.Helper()
	var g admin.GuardState
	if err := f.ask("GET", admin.PathGuard, nil, nil, &g); err != nil {
		f.Fatal(err)
	}
	i := slices.IndexFunc(g.Policies, func(p admin.GuardPolicy) bool { return p.Name == policy })
	if i < 0 {
		return admin.GuardPolicy{}
	}
	return g.Policies[i]
}

// reach waits until a rollout is where the test wants it.
func (f *fleet) reach(what string, is func(admin.GuardPolicy) bool) admin.GuardPolicy {
	f.Helper()
	var p admin.GuardPolicy
	for end := time.Now().Add(60 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		f.obey()
		if p = f.state("bank/web"); is(p) {
			return p
		}
		if time.Now().After(end) {
			f.Fatalf("never came: %s; last %+v, rollout %+v", what, p, p.Rollout)
		}
	}
}

// begun waits for a change to be on its way, and obeys nothing meanwhile.
func (f *fleet) begun() (p admin.GuardPolicy) {
	f.Helper()
	for end := time.Now().Add(60 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if p = f.state("bank/web"); p.Rollout != nil && p.Rollout.Phase == "Applying" {
			return p
		}
		if time.Now().After(end) {
			f.Fatalf("the change is not on its way: %+v, rollout %+v", p, p.Rollout)
		}
	}
}

func waiting(stage int) func(admin.GuardPolicy) bool {
	return func(p admin.GuardPolicy) bool {
		return p.Rollout != nil && p.Rollout.Phase == "Waiting" && p.Rollout.Stage == stage
	}
}

func (f *fleet) act(act string) error {
	return f.ask("POST", admin.PathRollout, nil, f.json(admin.Rollout{Policy: "bank/web", Act: act, By: "ann", Reason: "the test says so"}), nil)
}

func (f *fleet) mustAct(act string) {
	f.Helper()
	if err := f.act(act); err != nil {
		f.Fatal(err)
	}
}

// with counts the instances that are ordered to allow a port.
func (f *fleet) with(port int32) (n int) {
	for _, i := range f.have {
		for _, p := range i.Guard.Policies {
			if p.Name == "web" && p.Spec.Net != nil && p.Spec.Net.Egress[0].Ports[0] == port {
				n++
			}
		}
	}
	return n
}

func stagedPolicy(port int) string {
	return guardPolicy443(port) + "  rollout: {stages: [20, 50, 100], soakSeconds: 0, denialsPerMinute: 3}\n"
}

func (f *fleet) said(kind string, words ...string) {
	f.Helper()
	all := strings.Join(f.entries(kind), "\n")
	for _, w := range words {
		if !strings.Contains(all, w) {
			f.Errorf("no entry of %s says %q:\n%s", kind, w, all)
		}
	}
}

// TestRolloutGoesOutInStages follows a change from its first stage to its end,
// over a restart of the control plane, and back in one command.
func TestRolloutGoesOutInStages(t *testing.T) {
	f := newFleet(t)
	if p := f.state("bank/web"); p.Generation != 1 || p.Rollout != nil {
		t.Fatalf("before the change: %+v", p)
	}
	f.apply(stagedPolicy(8443))
	p := f.reach("stage 1 waits", waiting(1))
	if len(p.Rollout.Instances) != 2 || p.Rollout.Waiting != 8 || f.with(8443) != 2 || f.with(443) != 8 || p.Generation != 1 {
		t.Errorf("stage 1: %+v; %d have the change, %d not", p.Rollout, f.with(8443), f.with(443))
	}
	f.stop()
	f.start()
	again := f.join("n1")
	again.hello()
	f.fakeNode = again
	p = f.reach("stage 1 waits after a restart", waiting(1))
	if f.with(8443) != 2 {
		t.Errorf("after a restart %d have the change", f.with(8443))
	}
	f.mustAct("confirm")
	p = f.reach("stage 2 waits", waiting(2))
	if len(p.Rollout.Instances) != 5 || f.with(8443) != 5 {
		t.Errorf("stage 2: %+v", p.Rollout)
	}
	f.mustAct("pause")
	f.refused("confirm of a pause", f.act("confirm"), "NotNow")
	f.mustAct("resume")
	f.reach("stage 2 waits again", waiting(2))
	f.mustAct("confirm")
	p = f.reach("the rollout is complete", func(p admin.GuardPolicy) bool { return p.Rollout == nil && p.Generation == 2 && p.Applied == replicas })
	if f.with(8443) != replicas {
		t.Errorf("%d have the change: %+v", f.with(8443), p)
	}
	highest := f.highest()
	f.refused("confirm of nothing", f.act("confirm"), "None")
	f.mustAct("rollback")
	p = f.reach("it is rolled back", func(p admin.GuardPolicy) bool {
		return p.Generation == 3 && p.Applied == replicas && f.with(443) == replicas
	})
	if p.Rollout != nil || !p.Accepted {
		t.Errorf("after the rollback: %+v", p)
	}
	for _, i := range f.have {
		if i.Guard.Generation <= highest {
			t.Errorf("%s went back from generation %d to %d", i.ID, highest, i.Guard.Generation)
		}
	}
	o, err := kube.Get[v1alpha1.GuardPolicy](t.Context(), f.c.store, "bank", "web")
	if err != nil || o.Spec.Net.Egress[0].Ports[0] != 443 {
		t.Errorf("the object says %+v, %v", o, err)
	}
	f.said("guard.policy", "stage 1 of 3", "ann (uid ", "confirmed stage 1", "confirmed stage 2", "paused", "resumed", "complete", "rolled it back: generation 3 has the content of generation 1")
}

func (f *fleet) highest() (g uint64) {
	for _, i := range f.have {
		g = max(g, i.Guard.Generation)
	}
	return g
}

// TestRolloutHalts on everything that can be wrong with an instance of the
// stage, and never by itself goes on.
func TestRolloutHalts(t *testing.T) {
	f := newFleet(t)
	for port, c := range []struct {
		name  string
		spoil func(id string)
		words string
	}{
		{"denials", func(id string) {
			for n := range 5 {
				f.mustCall(wire.PathReport, wire.Report{Instance: id, Severity: spec.SeverityWarning, Denied: true, Cause: "guard", Rule: "r", Detail: fmt.Sprint(n), Observed: time.Now()}, nil)
			}
		}, "denials within a minute"},
		{"refused", func(id string) {
			f.beat[id] = func(s *wire.InstanceStatus) {
				s.Refused, s.RefusedReason, s.Guard.Generation = s.Guard.Generation, "no such hook", s.Guard.Generation-1
			}
		}, "no such hook"},
		{"silent", func(id string) {
			f.beat[id] = func(s *wire.InstanceStatus) { s.Guard.Generation = 0 }
			f.reach("it is waited for", func(p admin.GuardPolicy) bool { return p.Rollout != nil && p.Rollout.Phase == "Applying" })
			f.ahead.Add(int64(applyPatience + time.Second))
		}, "does not have the change"},
		{"crash", func(id string) {
			f.beat[id] = func(s *wire.InstanceStatus) { s.Phase, s.Message = wire.PhaseFailed, "out of memory" }
		}, "out of memory"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f.apply(stagedPolicy(9000 + port))
			late := c.name == "refused" || c.name == "silent"
			var p admin.GuardPolicy
			if late {
				p = f.begun()
			} else {
				p = f.reach("stage 1 waits", waiting(1))
			}
			c.spoil(p.Rollout.Instances[0])
			p = f.reach("the halt", func(p admin.GuardPolicy) bool { return p.Rollout != nil && p.Rollout.Phase == "Halted" })
			if !strings.Contains(p.Rollout.Message, c.words) || f.with(int32(9000+port)) > 2 {
				t.Errorf("halted with %+v", p.Rollout)
			}
			f.refused("confirm of a halt", f.act("confirm"), "NotNow")
			clear(f.beat)
			f.mustAct("abort")
			f.reach("all are back", func(p admin.GuardPolicy) bool {
				return p.Rollout == nil && !p.Accepted && p.Applied == replicas && f.with(443) == replicas
			})
		})
	}
	f.said("guard.policy", "halted", "aborted the rollout")
}
