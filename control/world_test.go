package control

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	wire "hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/control/rollout"
	"hauberk.dev/plan"
)

func bank() world {
	web, ledger := key{"bank", "web"}, key{"bank", "ledger"}
	w := world{
		trustDomain: "hauberk.local",
		workloads: map[key]workload{
			web: {address: netip.MustParseAddr("10.99.0.1"), spec: spec.Workload{Application: "web", GuardPolicies: []string{"web"},
				Ports: []spec.Port{{Port: 8080, Protocol: "http", Publish: 18080}}}},
			ledger: {address: netip.MustParseAddr("10.99.0.2"), spec: spec.Workload{Application: "ledger",
				Ports: []spec.Port{{Port: 12200, Protocol: "tcp"}}}},
		},
		guards: map[key]guardPolicy{{"bank", "web"}: {spec: spec.GuardPolicy{Net: &spec.GuardNet{Egress: []spec.GuardEgress{
			{Service: "ledger", Ports: []int32{12200}}, {CIDR: "192.0.2.0/24", Ports: []int32{443}}}}}}},
		access: map[key]spec.AccessPolicy{{"bank", "ledger"}: {Workload: "ledger", Allow: []spec.AccessRule{{From: []string{"web"}}}}},
		instances: map[key]instance{
			{"bank", "web-1"}: {workload: "web", node: "n1", address: netip.MustParseAddr("10.88.0.1"), status: wire.InstanceStatus{Phase: wire.PhaseRunning},
				spec: spec.Workload{GuardPolicies: []string{"web"}}, specHash: launchHash(spec.Workload{Application: "web", GuardPolicies: []string{"web"}, Ports: []spec.Port{{Port: 8080, Protocol: "http", Publish: 18080}}}, "d")},
			{"bank", "ledger-1"}: {workload: "ledger", node: "n2", address: netip.MustParseAddr("10.88.0.2"), status: wire.InstanceStatus{Phase: wire.PhaseRunning}},
		},
		nodes: map[string]nodeState{
			"n1": {hello: wire.Hello{Gateway: "127.0.0.1:15008"}, ready: true},
			"n2": {hello: wire.Hello{Gateway: "127.0.0.2:15008"}, ready: true},
		},
	}
	w.inForce()
	return w
}

// inForce makes what the objects say what is in force.
func (w *world) inForce() {
	w.book = rollout.State{}
	for k, g := range w.guards {
		w.book = w.book.With(rollout.Name{Namespace: k.Namespace, Name: k.Name}, spec.ClusterGuardPolicy{GuardPolicy: g.spec})
	}
	for name, f := range w.floors {
		w.book = w.book.With(rollout.Name{Name: name, Floor: true}, f.spec)
	}
}

func TestNodeSeesOnlyItsOwnInstancesAndEveryService(t *testing.T) {
	d := bank().desired("n1")
	if len(d.Instances) != 1 || d.Instances[0].ID != "web-1" || len(d.Mesh.Sandboxes) != 1 {
		t.Fatalf("n1 was told of %+v", d.Instances)
	}
	if got := d.Instances[0].Guard.Services["ledger"]; got != "10.99.0.2" {
		t.Errorf("service name in the policy resolved to %q", got)
	}
	if len(d.Mesh.Services) != 2 || d.Mesh.Services[0].Name != "ledger" {
		t.Fatalf("services %+v", d.Mesh.Services)
	}
	ledger := d.Mesh.Services[0]
	if len(ledger.Allow) != 1 || ledger.Allow[0].From[0] != "spiffe://hauberk.local/ns/bank/sa/web" {
		t.Errorf("rules of ledger: %+v", ledger.Allow)
	}
	if len(ledger.Endpoints) != 1 || ledger.Endpoints[0].Gateway != netip.MustParseAddrPort("127.0.0.2:15008") {
		t.Errorf("endpoints of ledger: %+v", ledger.Endpoints)
	}
	if e := d.Mesh.Sandboxes[0].Egress; len(e) != 1 || e[0].Prefix.String() != "192.0.2.0/24" {
		t.Errorf("egress of web: %+v", e)
	}
}

func TestRevokedInstanceIsNoEndpoint(t *testing.T) {
	w := bank()
	w.epoch = plan.Epoch{Number: 3, Instances: []string{"ledger-1"}}
	if s := w.desired("n1").Mesh.Services[0]; len(s.Endpoints) != 0 {
		t.Errorf("a revoked instance is still an endpoint: %+v", s.Endpoints)
	}
}

func TestDecide(t *testing.T) {
	now := time.Now()
	web := key{"bank", "web"}
	set := func(w world, change func(*instance)) world {
		i := w.instances[key{"bank", "web-1"}]
		change(&i)
		w.instances[key{"bank", "web-1"}] = i
		return w
	}
	replace := func(w world) world {
		wl := w.workloads[web]
		wl.spec.OnContain = "Replace"
		w.workloads[web] = wl
		return w
	}
	cases := []struct {
		name           string
		w              world
		retry          retry
		create, remove int
		waits          bool
	}{
		{name: "complete", w: bank()},
		{name: "missing", w: set(bank(), func(i *instance) { i.workload = "other" }), create: 1},
		{name: "failed is replaced", w: set(bank(), func(i *instance) { i.status.Phase = wire.PhaseFailed }), create: 1, remove: 1},
		{name: "failed waits", w: set(bank(), func(i *instance) { i.status.Phase = wire.PhaseFailed }), retry: retry{failures: 3, last: now}, remove: 1, waits: true},
		{name: "outdated starts the new one first", w: set(bank(), func(i *instance) { i.specHash = "old" }), create: 1},
		{name: "contained is held", w: set(bank(), func(i *instance) { i.status.Phase = wire.PhaseContained })},
		{name: "contained is replaced if asked", w: replace(set(bank(), func(i *instance) { i.status.Phase = wire.PhaseContained })), create: 1},
		{name: "deleting does not count", w: set(bank(), func(i *instance) { i.deleting = true }), create: 1},
	}
	for _, c := range cases {
		d := c.w.decide(web, "d", c.retry, now)
		if d.create != c.create || len(d.remove) != c.remove || (d.wait > 0) != c.waits {
			t.Errorf("%s: %+v", c.name, d)
		}
	}
}

// TestFailureIsRemembered: the instance that failed is gone when a person asks.
func TestFailureIsRemembered(t *testing.T) {
	now, web := time.Now(), key{"bank", "web-1"}
	w := bank()
	i := w.instances[web]
	i.status = wire.InstanceStatus{Phase: wire.PhaseFailed, Message: "user \"root\": /etc/passwd is not there"}
	r := retry{failures: 1, last: now}.failed(web, i, now)
	delete(w.instances, web)
	d := w.decide(key{"bank", "web"}, "d", r, now)
	if d.reason != "Failed" || d.message != "web-1: user \"root\": /etc/passwd is not there; failures so far: 2" {
		t.Errorf("%q, %q", d.reason, d.message)
	}
	i.status = wire.InstanceStatus{Phase: wire.PhaseRunning}
	w.instances[web] = i
	if d := w.decide(key{"bank", "web"}, "d", r, now); d.reason != "" {
		t.Errorf("it runs, and still %q", d.reason)
	}
}

func TestScaleDownToZero(t *testing.T) {
	w, zero := bank(), int32(0)
	wl := w.workloads[key{"bank", "web"}]
	wl.spec.Replicas = &zero
	w.workloads[key{"bank", "web"}] = wl
	if d := w.decide(key{"bank", "web"}, "d", retry{}, time.Now()); len(d.remove) != 1 || d.create != 0 {
		t.Errorf("%+v", d)
	}
}

func TestBackoffDoublesToAMinute(t *testing.T) {
	now := time.Now()
	for n, want := range map[int]time.Duration{1: time.Second, 2: 2 * time.Second, 6: 32 * time.Second, 7: time.Minute, 100: time.Minute} {
		if got := (retry{failures: n, last: now}).after().Sub(now); got != want {
			t.Errorf("after %d failures: %v, want %v", n, got, want)
		}
	}
}

func TestEgressListsIntersect(t *testing.T) {
	p := netip.MustParsePrefix
	a := []plan.Egress{{Prefix: p("10.0.0.0/8"), Ports: []uint16{443, 80}}}
	cases := []struct {
		b    []plan.Egress
		want []plan.Egress
	}{
		{[]plan.Egress{{Prefix: p("10.1.0.0/16")}}, []plan.Egress{{Prefix: p("10.1.0.0/16"), Ports: []uint16{443, 80}}}},
		{[]plan.Egress{{Prefix: p("10.0.0.0/8"), Ports: []uint16{22}}}, nil},
		{[]plan.Egress{{Prefix: p("192.0.2.0/24")}}, nil},
		{nil, nil},
	}
	for _, c := range cases {
		got := intersect(a, c.b)
		if !slices.EqualFunc(got, c.want, func(x, y plan.Egress) bool { return x.Prefix == y.Prefix && slices.Equal(x.Ports, y.Ports) }) {
			t.Errorf("with %v: %v, want %v", c.b, got, c.want)
		}
	}
}

func TestAllotDoesNotReuseAtOnce(t *testing.T) {
	p := netip.MustParsePrefix("10.0.0.0/29")
	taken, last := map[netip.Addr]bool{}, netip.Addr{}
	var got []string
	for range 6 {
		a, err := allot(p, last, taken)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, a.String())
		taken[a], last = true, a
	}
	if want := []string{"10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6"}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if _, err := allot(p, last, taken); err == nil {
		t.Error("an address was allotted twice")
	}
	delete(taken, netip.MustParseAddr("10.0.0.2"))
	if a, err := allot(p, last, taken); err != nil || a.String() != "10.0.0.2" {
		t.Errorf("%v %v", a, err)
	}
}
