package node

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	api "hauberk.dev/api/mesh"
	wire "hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/plan"
)

// judged is a plan in which what is sent to api-1 may be an incident.
func judged(score int) plan.Mesh {
	return plan.Mesh{Generation: 1, Sandboxes: []plan.Sandbox{{Instance: "api-1", Service: "api", Namespace: "bank"}},
		Services: []plan.Service{{Name: "api", Namespace: "bank", Inspect: &plan.Inspect{Observe: 10, Incident: score}}}}
}

// TestIncidentOfTheMesh: who attacks another over the mesh is frozen and
// reported, if the plan asks for that.
func TestIncidentOfTheMesh(t *testing.T) {
	incident := api.Event{Kind: api.EventIncident, Instance: "api-1", Offender: "web-1", Rule: "sql", Reason: "score 100"}
	for name, c := range map[string]struct {
		change func(*Node, *api.Event)
		frozen bool
	}{
		"asked for":        {frozen: true},
		"not asked for":    {change: func(n *Node, _ *api.Event) { n.mesh.setPlan(judged(0)) }},
		"foreign victim":   {change: func(_ *Node, e *api.Event) { e.Instance = "other-1" }},
		"an event only":    {change: func(_ *Node, e *api.Event) { e.Kind = api.EventFinding }},
		"nobody is named":  {change: func(_ *Node, e *api.Event) { e.Offender = "" }},
		"too many of late": {change: func(n *Node, _ *api.Event) { accuseMany(n) }},
	} {
		t.Run(name, func(t *testing.T) {
			b := &fakeBody{}
			stage(t, entry{Phase: wire.PhasePending}, b, false, func(n *Node, a *actor) {
				n.actors["web-1"], n.actors["api-1"] = a, a
				n.mesh.setPlan(judged(100))
				e := incident
				if c.change != nil {
					c.change(n, &e)
				}
				n.mesh.event(e)
				n.mesh.event(e) // again: it is done once
				synctest.Wait()
				if b.freezes > 0 != c.frozen || b.freezes > 1 {
					t.Errorf("%d freezes", b.freezes)
				}
				if !c.frozen {
					for len(n.alarms) > 0 {
						if r := <-n.alarms; r.Instance == "web-1" {
							t.Errorf("report %+v", r)
						}
					}
					return
				}
				wantPhase(t, a, wire.PhaseContained, "Contained")
				if len(n.alarms) != 1 {
					t.Fatalf("%d alarms", len(n.alarms))
				}
				r := <-n.alarms
				if r.Instance != "web-1" || r.Victim != "api-1" || r.Severity != spec.SeverityCritical || !r.Denied || r.Cause != "mesh" || !strings.Contains(r.Rule, "sql") {
					t.Errorf("report %+v", r)
				}
			})
		})
	}
}

func accuseMany(n *Node) {
	for i := range maxAccused {
		n.mesh.event(api.Event{Kind: api.EventIncident, Instance: "api-1", Offender: fmt.Sprintf("far-%d", i)})
	}
}

// TestIncidentElsewhere: an instance on another node is the control plane's to
// contain.
func TestIncidentElsewhere(t *testing.T) {
	stage(t, entry{Phase: wire.PhasePending}, &fakeBody{}, false, func(n *Node, a *actor) {
		n.actors["api-1"] = a
		n.mesh.setPlan(judged(100))
		n.mesh.event(api.Event{Kind: api.EventIncident, Instance: "api-1", Offender: "far-1", Rule: "scan"})
		if len(n.alarms) != 1 {
			t.Fatalf("%d alarms", len(n.alarms))
		}
		if r := <-n.alarms; r.Instance != "far-1" || r.Victim != "api-1" {
			t.Errorf("report %+v", r)
		}
		// One that cannot be handed on now is told as any event, and tried again.
		for range cap(n.alarms) {
			n.alarms <- wire.Report{}
		}
		n.mesh.event(api.Event{Kind: api.EventIncident, Instance: "api-1", Offender: "far-2", Rule: "scan"})
		if len(n.reports) != 1 {
			t.Errorf("%d reports of what could not be handed on", len(n.reports))
		}
		<-n.alarms
		n.mesh.event(api.Event{Kind: api.EventIncident, Instance: "api-1", Offender: "far-2", Rule: "scan"})
		for range cap(n.alarms) - 1 {
			<-n.alarms
		}
		if r := <-n.alarms; r.Instance != "far-2" {
			t.Errorf("the second time: %+v", r)
		}
	})
}
