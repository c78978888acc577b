package control

import (
	"maps"
	"reflect"
	"slices"
	"testing"
	"time"

	wire "hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/api/v1alpha1"
	"hauberk.dev/kube"
	"hauberk.dev/plan"
)

// TestAccused: a node may have an instance of another node contained for what it
// has sent to one of its own, if a policy of that one's workload says so.
func TestAccused(t *testing.T) {
	tn := newTown(t)
	var all []*fleet
	for _, name := range []string{"n1", "n2"} {
		n := tn.join(name)
		n.hello()
		all = append(all, &fleet{fakeNode: n, have: map[string]wire.Instance{}})
	}
	tn.found()
	tn.apply(`
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {name: web, namespace: bank}
spec: {application: bank, image: "bank/web:1", guardPolicies: [web], replicas: 2, ports: [{port: 8080, protocol: http}]}
`)
	tn.release()
	tn.until("an instance on each node", func() bool {
		for _, f := range all {
			f.obey()
		}
		return len(all[0].have) == 1 && len(all[1].have) == 1
	})
	one := func(f *fleet) string {
		for id := range f.have {
			return id
		}
		return ""
	}
	victim, offender := one(all[0]), one(all[1])
	r := wire.Report{Instance: offender, Victim: victim, Severity: spec.SeverityCritical, Denied: true, Cause: "mesh", Rule: "incident: sql", Observed: time.Now()}
	tn.refused("nobody has asked for it", all[0].call(wire.PathReport, r, nil), "NotAsked")
	tn.apply(`
apiVersion: hauberk.dev/v1alpha1
kind: AccessPolicy
metadata: {name: web, namespace: bank}
spec: {workload: web, inspect: {observe: 20, incident: 90}}
`)
	all[0].ordered("the scores", func(d wire.Desired) bool {
		return len(d.Mesh.Services) == 1 && reflect.DeepEqual(d.Mesh.Services[0].Inspect, &plan.Inspect{Observe: 20, Incident: 90})
	})
	tn.refused("the victim is another node's", all[1].call(wire.PathReport, r, nil), "UnknownInstance")
	unknown := r
	unknown.Instance = "nobody"
	tn.refused("nobody of that name", all[0].call(wire.PathReport, unknown, nil), "UnknownInstance")
	all[0].mustCall(wire.PathReport, r, nil)
	all[1].ordered("that the offender is revoked", func(d wire.Desired) bool { return slices.Equal(d.Epoch.Instances, []string{offender}) })
	tn.until("the incident is shown", func() bool {
		got, err := kube.List[v1alpha1.Incident](tn.Context(), tn.c.store, "bank")
		return err == nil && len(got) == 1 && got[0].Spec.Instance == offender && got[0].Spec.Cause == "mesh" && got[0].Spec.Node == "n2"
	})
}

// TestAccusedTooMany: a node has eight instances of other nodes contained in a
// minute, and no ninth.
func TestAccusedTooMany(t *testing.T) {
	tn := newTown(t)
	var all []*fleet
	for _, name := range []string{"n1", "n2"} {
		n := tn.join(name)
		n.hello()
		all = append(all, &fleet{fakeNode: n, have: map[string]wire.Instance{}})
	}
	tn.found()
	tn.apply(`
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {name: web, namespace: bank}
spec: {application: bank, image: "bank/web:1", guardPolicies: [web], replicas: 18, ports: [{port: 8080, protocol: http}]}
---
apiVersion: hauberk.dev/v1alpha1
kind: AccessPolicy
metadata: {name: web, namespace: bank}
spec: {workload: web, inspect: {incident: 90}}
`)
	tn.release()
	tn.until("nine instances on each node", func() bool {
		for _, f := range all {
			f.obey()
		}
		return len(all[0].have) == 9 && len(all[1].have) == 9
	})
	victim, offenders := slices.Sorted(maps.Keys(all[0].have))[0], slices.Sorted(maps.Keys(all[1].have))
	r := wire.Report{Victim: victim, Severity: spec.SeverityCritical, Denied: true, Cause: "mesh", Rule: "incident: sql", Observed: time.Now()}
	for i, offender := range offenders {
		r.Instance = offender
		if i == maxAccused {
			break
		}
		all[0].mustCall(wire.PathReport, r, nil)
	}
	tn.refused("the ninth", all[0].call(wire.PathReport, r, nil), "TooMany")
	r.Instance = offenders[0]
	all[0].mustCall(wire.PathReport, r, nil) // the same again is no other
	r.Instance = slices.Sorted(maps.Keys(all[0].have))[1]
	all[0].mustCall(wire.PathReport, r, nil) // its own: it could stop it anyway
	tn.ahead.Store(int64(time.Minute))
	r.Instance = offenders[maxAccused]
	all[0].mustCall(wire.PathReport, r, nil)
}

// TestInspection: the lowest of several policies' scores hold, and never is a
// harder action done before a softer one.
func TestInspection(t *testing.T) {
	p := inspection(nil, nil)
	p = inspection(p, &spec.Inspect{Observe: 30, Cut: 100, Learn: 500})
	p = inspection(p, nil)
	p = inspection(p, &spec.Inspect{Observe: 50, Shed: 20, Cut: 80, Frozen: true})
	if want := (&plan.Inspect{Observe: 20, Shed: 20, Cut: 80, Learn: 500, Frozen: true}); !reflect.DeepEqual(p, want) {
		t.Errorf("%+v, want %+v", p, want)
	}
	p = inspection(inspection(nil, &spec.Inspect{Incident: 150}), &spec.Inspect{Observe: 100000, Cut: 200})
	if want := (&plan.Inspect{Observe: 150, Cut: 150, Incident: 150}); !reflect.DeepEqual(p, want) {
		t.Errorf("another policy's softer scores: %+v, want %+v", p, want)
	}
	w := bank()
	if w.mayAccuse("bank", "ledger") {
		t.Error("a policy without scores makes incidents")
	}
	w.access[key{"bank", "x"}] = spec.AccessPolicy{Workload: "ledger", Mode: modeAudit, Inspect: &spec.Inspect{Incident: 5}}
	if w.mayAccuse("bank", "ledger") {
		t.Error("a policy in audit makes incidents")
	}
	for _, s := range w.desired("n1").Mesh.Services {
		if s.Inspect != nil {
			t.Errorf("a policy in audit has %s looked at: %+v", s.Name, s.Inspect)
		}
	}
	w.access[key{"bank", "x"}] = spec.AccessPolicy{Workload: "ledger", Inspect: &spec.Inspect{Incident: 5}}
	if !w.mayAccuse("bank", "ledger") || w.mayAccuse("bank", "web") || w.mayAccuse("other", "ledger") {
		t.Error("who may be accused is not what the policies say")
	}
	for _, s := range w.desired("n1").Mesh.Services {
		if (s.Inspect != nil) != (s.Name == "ledger") {
			t.Errorf("%s is looked at: %+v", s.Name, s.Inspect)
		}
	}
}
