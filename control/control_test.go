package control

import (
	"encoding/json"
	"net/url"
	"strings"
	"testing"
	"time"

	"hauberk.dev/api/admin"
	wire "hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/api/v1alpha1"
	"hauberk.dev/evidence"
	"hauberk.dev/kube"
)

func one(d wire.Desired) bool { return len(d.Instances) == 1 }

// TestLifeOfAWorkload goes from an image nobody released to a contained
// instance, over a restart of the control plane.
func TestLifeOfAWorkload(t *testing.T) {
	tn := newTown(t)
	n := tn.join("n1")
	n.hello()
	tn.found()
	tn.until("the refusal in the workload's status", func() bool {
		o, err := kube.Get[v1alpha1.Workload](t.Context(), tn.c.store, "bank", "web")
		if err != nil {
			return false
		}
		c := kube.FindCondition(o, v1alpha1.ConditionAccepted)
		return c != nil && c.Reason == "NotReleased"
	})
	tn.apply(`
apiVersion: hauberk.dev/v1alpha1
kind: AccessPolicy
metadata: {name: web, namespace: bank}
spec: {workload: web, allow: [{from: ["*"]}]}
`) // another round
	if got := tn.entries(kindLaunchDenied); len(got) != 1 {
		t.Errorf("refused launches in the ledger: %q", got)
	}
	digest := tn.release()
	d := n.ordered("the instance", one)
	i := d.Instances[0]
	tk, err := evidence.VerifyTicket(i.Ticket, time.Now(), []evidence.Key{tn.c.tickets.Key()})
	if err != nil || tk.Instance != i.ID || tk.Digest != digest || tk.Node != "n1" || tk.Measurement != n.measurement() {
		t.Errorf("ticket %+v, %v", tk, err)
	}
	if recorded := tn.entries(kindTicket); len(recorded) != 1 {
		t.Errorf("tickets in the ledger: %q", recorded)
	}
	if i.Identity != "spiffe://hauberk.test/ns/bank/sa/web" || i.Guard.Generation == 0 || len(i.Guard.Policies) != 1 {
		t.Errorf("ordered %+v", i)
	}

	tn.refused("identity before a heartbeat", n.askIdentity(i, wire.GuardHeartbeat{}), "GuardSilent")
	stranger := tn.join("n2")
	beat := n.running(i).Guard
	tn.refused("identity of another node's instance", stranger.askIdentity(i, beat), "WrongNode")
	n.say(n.running(i))
	if err := n.askIdentity(i, beat); err != nil {
		t.Error(err)
	}
	tn.until("the boot in the ledger", func() bool { return len(tn.entries(kindBoot)) == 1 })

	tn.apply(guardPolicy443(8443))
	changed := n.ordered("the new policy", func(d wire.Desired) bool {
		return one(d) && d.Instances[0].Guard.Generation > i.Guard.Generation
	})
	if e := changed.Instances[0].Guard.Policies[0].Spec.Net.Egress; len(e) != 1 || e[0].Ports[0] != 8443 || changed.Instances[0].ID != i.ID {
		t.Errorf("the policy changed to %+v for %s", e, changed.Instances[0].ID)
	}

	foreign := wire.Report{Instance: i.ID, Severity: spec.SeverityCritical, Denied: true, Cause: "guard", Rule: "r", Observed: time.Now()}
	tn.refused("report of another node", stranger.call(wire.PathReport, foreign, nil), "UnknownInstance")
	stranger.say(wire.InstanceStatus{ID: i.ID, Phase: wire.PhaseExited})

	tn.contain(n, i)
	tn.survive(n, i)
	tn.remove(i)
}

// contain reports a violation and gives the receipts.
func (tn *town) contain(n *fakeNode, i wire.Instance) {
	tn.Helper()
	r := wire.Report{Instance: i.ID, Severity: spec.SeverityCritical, Denied: true, Cause: "odd", Rule: strings.Repeat("r", 9000),
		Detail: "run \"/tmp/x\"\xff" + strings.Repeat("x", 1<<17), Observed: time.Now()}
	n.mustCall(wire.PathReport, r, nil)
	n.mustCall(wire.PathReport, r, nil) // again: the same incident
	n.ordered("the epoch", func(d wire.Desired) bool {
		return d.Epoch.Number == 1 && len(d.Epoch.Instances) == 1 && d.Epoch.Instances[0] == i.ID
	})
	s := n.running(i)
	s.Phase, s.Reason = wire.PhaseContained, "Contained"
	tn.refused("identity of a revoked instance", n.askIdentity(i, s.Guard), "Revoked")
	n.say(s)
	tn.refused("receipt of the future", n.receipt(wire.Receipt{Epoch: 9, Point: "mesh", Act: "cut"}), "EpochUnknown")
	forged := wire.Receipt{Epoch: 1, Point: "mesh", Act: "cut", Node: "n1", At: time.Now(), Signature: "AAAA"}
	tn.refused("forged receipt", n.call(wire.PathReceipt, forged, nil), "ReceiptInvalid")
	forged.Node = "n7"
	tn.refused("foreign receipt", n.call(wire.PathReceipt, forged, nil), "ForeignReceipt")
	for _, p := range []string{"mesh", "sandbox"} {
		if err := n.receipt(wire.Receipt{Epoch: 1, Instance: i.ID, Point: p, Act: "done"}); err != nil {
			tn.Fatal(err)
		}
	}
	tn.until("the incident is contained", func() bool {
		all, err := kube.List[v1alpha1.Incident](tn.Context(), tn.c.store, "bank")
		return err == nil && len(all) == 1 && all[0].Status.State == v1alpha1.IncidentContained && all[0].Status.ContainedMillis != nil && len(all[0].Status.Receipts) == 2
	})
}

// survive restarts the control plane: book, instances and answers are kept.
func (tn *town) survive(n *fakeNode, i wire.Instance) {
	tn.Helper()
	tn.stop()
	tn.start()
	again := tn.join("n1")
	again.hello()
	d := again.ordered("the instance after a restart", one)
	if d.Instances[0].ID != i.ID || d.Epoch.Number != 1 {
		tn.Errorf("after a restart: instance %s, epoch %+v", d.Instances[0].ID, d.Epoch)
	}
	var all []admin.Incident
	if err := tn.ask("GET", admin.PathIncidents, nil, nil, &all); err != nil || len(all) != 1 || all[0].State != "Contained" || all[0].Instance != i.ID {
		tn.Errorf("incidents after a restart: %+v, %v", all, err)
	}
	var ps []admin.Instance
	if err := tn.ask("GET", admin.PathInstances, url.Values{"namespace": {"bank"}}, nil, &ps); err != nil || len(ps) != 1 || ps[0].Phase != "Contained" {
		tn.Errorf("instances after a restart: %+v, %v", ps, err)
	}
	var why admin.Story
	if err := tn.ask("GET", admin.PathWhy, url.Values{"namespace": {"bank"}, "subject": {i.ID}}, nil, &why); err != nil {
		tn.Fatal(err)
	}
	told := map[string]bool{}
	for _, c := range why.Chapter {
		told[c.Link] = true
	}
	for _, link := range []string{"own", "release", "launch", "boot", "identity", "break"} {
		if !told[link] {
			tn.Errorf("the story of %s does not tell of link %q: %+v", i.ID, link, why.Chapter)
		}
	}
	if !strings.Contains(why.Answer, "was contained") {
		tn.Errorf("answer %q", why.Answer)
	}
}

// remove deletes the workload, and its instance with it.
func (tn *town) remove(i wire.Instance) {
	tn.Helper()
	n := tn.join("n1")
	n.hello()
	n.ordered("the held instance", one)
	err := tn.ask("POST", admin.PathDelete, nil, []byte(`{"apiVersion":"hauberk.dev/v1alpha1","kind":"Workload","metadata":{"name":"web","namespace":"bank"}}`), nil)
	if err != nil {
		tn.Fatal(err)
	}
	n.ordered("the end of the instance", func(d wire.Desired) bool { return len(d.Instances) == 0 && d.Epoch.Number == 1 })
	tn.refused("identity of a deleted instance", n.askIdentity(i, n.running(i).Guard), "TicketNotLive")
}

// TestDeskAnswers: bad questions get reasons and fixes.
func TestDeskAnswers(t *testing.T) {
	tn := newTown(t)
	bad := func(q ...string) url.Values {
		v := url.Values{}
		for n := 0; n < len(q); n += 2 {
			v.Set(q[n], q[n+1])
		}
		return v
	}
	huge := []byte(strings.Repeat("#", maxApply+1))
	for _, c := range []struct {
		method, path string
		q            url.Values
		body         []byte
		reason       string
	}{
		{"GET", admin.PathWhy, bad(), nil, "NoSubject"},
		{"GET", admin.PathWhy, bad("subject", "nobody"), nil, "Unknown"},
		{"GET", admin.PathWhy, bad("subject", "4711"), nil, "Unknown"},
		{"GET", admin.PathLedger, bad("from", "-1"), nil, "BadNumber"},
		{"POST", admin.PathApply, nil, huge, "TooLarge"},
		{"POST", admin.PathApply, nil, []byte("kind: ["), "Invalid"},
		{"POST", admin.PathRestart, bad("workload", "nobody"), nil, "UnknownWorkload"},
		{"POST", admin.PathExec, nil, []byte(`{"workload":"web"}`), "NoCommand"},
		{"POST", admin.PathExec, nil, []byte(`{"workload":"web","args":["sh"]}`), "NotRunning"},
		{"GET", admin.PathLogs, bad("workload", "web"), nil, "NotRunning"},
	} {
		tn.refused(c.method+" "+c.path, tn.ask(c.method, c.path, c.q, c.body, nil), c.reason)
	}
	for _, body := range []string{"", "{", `{"node":"n1","root":true}`, `{"node":"../n1"}`} {
		if err := tn.ask("POST", admin.PathJoin, nil, []byte(body), nil); err == nil {
			t.Errorf("join %q was accepted", body)
		}
	}
	var s admin.Status
	if err := tn.ask("GET", admin.PathStatus, nil, nil, &s); err != nil {
		t.Fatal(err)
	}
	for _, l := range s.Links {
		if l.State == "ok" && l.Name != "break" {
			t.Errorf("link %q of an empty control plane is ok: %s", l.Name, l.Detail)
		}
	}

	n := tn.join("n1")
	for name, in := range map[string]any{
		"unknown field": map[string]any{"node": "n1", "root": true},
		"unknown phase": wire.Status{Instances: []wire.InstanceStatus{{ID: "a", Phase: "Dancing"}}},
		"wordy reason":  wire.Status{Instances: []wire.InstanceStatus{{ID: "a", Phase: wire.PhaseFailed, Reason: "not a word"}}},
		"no spares":     wire.Status{Spares: wire.Spares{Machines: -1}},
		"too large":     wire.Status{Node: strings.Repeat("n", maxRequest)},
	} {
		if err := n.call(wire.PathStatus, in, nil); err == nil {
			t.Errorf("status with %s was accepted", name)
		}
	}
	tn.refused("hello of another", n.call(wire.PathHello, wire.Hello{Version: wire.Version, Node: "n2"}, nil), "HelloRefused")
	tn.strangers(t)
}

// TestHandMadeInstanceGetsNoTicket: an Instance object that the control plane
// did not order is not signed for, whatever it says.
func TestHandMadeInstanceGetsNoTicket(t *testing.T) {
	tn := newTown(t)
	n := tn.join("n1")
	n.hello()
	tn.found()
	tn.release()
	d := n.ordered("the instance", one)
	i := d.Instances[0]
	w, err := tn.c.read(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	before := len(tn.entries(kindTicket))
	k := key{"bank", "web-evil"}
	evil := w.instances[key{"bank", i.ID}]
	tn.ahead.Store(int64(ticketLife * 2 / 3))
	for _, ticket := range []string{string(i.Ticket), "{}", ""} {
		evil.ticket = []byte(ticket)
		if err := tn.c.renewTicket(t.Context(), w, k, evil); err == nil {
			t.Errorf("ticket %.20q was renewed for an instance made by hand", ticket)
		}
	}
	if got := len(tn.entries(kindTicket)); got != before {
		t.Errorf("%d tickets were recorded for it", got-before)
	}
	for _, later := range []time.Duration{ticketLife * 2 / 3, 3 * ticketLife} { // past half, expired
		tn.ahead.Store(int64(later))
		k := key{"bank", i.ID}
		if err := tn.c.renewTicket(t.Context(), w, k, w.instances[k]); err != nil {
			t.Fatal(err)
		}
		fresh, err := kube.Get[v1alpha1.Instance](t.Context(), tn.c.store, "bank", i.ID)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := evidence.VerifyTicket(json.RawMessage(fresh.Spec.Ticket), tn.c.now(), []evidence.Key{tn.c.tickets.Key()}); err != nil {
			t.Errorf("after %s: %v", later, err)
		}
	}
}
