package rollout

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"hauberk.dev/api/admin"
	"hauberk.dev/test/installation"
)

const (
	namespace = "fleet"
	policy    = "fleet/idle"
	fleetSize = 20
	// patience is for a machine that does other things too; nothing is measured.
	patience = 5 * time.Minute
)

// town is an installation with twenty sandboxes of one workload.
type town struct {
	*testing.T
	in *installation.Installation
}

// TestRollout is one story, told to one installation.
func TestRollout(t *testing.T) {
	f := town{t, installation.New(t)}
	if r := f.in.Up(10*time.Minute, filepath.Join(f.in.Tree, "test", "rollout", "testdata", "fleet")); r.Code != 0 {
		t.Fatal(r)
	}
	f.reach("twenty sandboxes run under the first policy", func(p admin.GuardPolicy) bool {
		return p.Generation == 1 && p.Eligible == fleetSize && p.Applied == fleetSize
	})
	all := f.instances()
	f.may(all[0], "/opt/x", true)
	f.may(all[0], "/data/x", true)
	f.may(all[0], "/srv/x", false) // the floor

	t.Log("a policy that would keep the workload from starting is refused")
	f.apply("exec: {origin: image, deny: [/bin/idle]}")
	p := f.reach("the refusal", func(p admin.GuardPolicy) bool { return !p.Accepted })
	for _, want := range []string{"exec.deny[0]", "/bin/idle", "take it out", "generation 1 stays in force"} {
		if !strings.Contains(p.Message, want) {
			t.Errorf("the pre-check does not say %q: %s", want, p.Message)
		}
	}

	t.Log("a good change goes out in three stages")
	f.apply("exec: {origin: image}", "files: [{path: /opt, deny: w}]")
	p = f.reach("stage 1 waits", waits(1, 2))
	first := p.Rollout.Instances
	f.may(first[0], "/opt/x", false)
	f.may(f.other(first), "/opt/x", true)
	f.hauberk("guard", "rollout", "confirm", policy, "--as=ann")
	p = f.reach("stage 2 waits", waits(2, 10))
	f.may(f.other(p.Rollout.Instances), "/opt/x", true)
	f.hauberk("guard", "rollout", "confirm", policy, "--as=ann")
	f.reach("the change is everywhere", func(p admin.GuardPolicy) bool {
		return p.Rollout == nil && p.Generation == 2 && p.Applied == fleetSize
	})
	f.may(f.other(first), "/opt/x", false)

	t.Log("a bad change halts by itself: the workload writes where it may no more")
	f.apply("exec: {origin: image}", "files: [{path: /opt, deny: w}, {path: /data, deny: w}]")
	p = f.reach("the halt", func(p admin.GuardPolicy) bool { return p.Rollout != nil && p.Rollout.Phase == "Halted" })
	if len(p.Rollout.Instances) != 2 || p.Rollout.Stage != 1 || !strings.Contains(p.Rollout.Message, "denials") {
		t.Errorf("halted with %+v", p.Rollout)
	}
	f.may(f.other(p.Rollout.Instances), "/data/x", true)
	if r := f.in.Hauberk(time.Minute, "guard", "rollout", "confirm", policy); r.Code == 0 || !strings.Contains(r.Stderr, "Halted") {
		t.Errorf("a halted rollout was confirmed: %s", r)
	}
	hurt := p.Rollout.Instances[0]
	f.hauberk("guard", "rollout", "abort", policy, "--as=ann", "--reason=it denies what the workload does")
	f.reach("all are back", func(p admin.GuardPolicy) bool {
		return p.Rollout == nil && p.Generation == 2 && p.Applied == fleetSize
	})
	f.may(hurt, "/data/x", true)

	f.degrade(all[0], all[1])

	t.Log("one command goes back")
	f.hauberk("guard", "rollback", policy, "--as=ann", "--reason=opt is needed")
	f.reach("the first content is everywhere", func(p admin.GuardPolicy) bool {
		return p.Rollout == nil && p.Accepted && p.Generation > 2 && p.Applied == fleetSize
	})
	f.may(all[0], "/opt/x", true)
	f.may(all[0], "/srv/x", false)
	f.ledger()
}

// degrade lowers policies of a workload and of an instance; the floor holds.
func (f town) degrade(one, two string) {
	f.Log("policies are lowered, and hold again")
	if r := f.in.Hauberk(time.Minute, "guard", "degrade", "--workload=fleet/idle", "--to=audit"); r.Code == 0 || !strings.Contains(r.Stderr, "--reason") {
		f.Errorf("lowered without a reason: %s", r)
	}
	f.hauberk("guard", "degrade", "--workload=fleet/idle", "--to=audit", "--for=1h", "--reason=incident 4711", "--as=bob")
	f.settled()
	f.may(one, "/opt/x", true)
	f.may(one, "/srv/x", false)
	st, err := f.in.Status()
	if err != nil || len(st.Degraded) != 1 || st.Degraded[0].To != "audit" || st.Degraded[0].Reason != "incident 4711" {
		f.Errorf("status says %+v, %v", st.Degraded, err)
	}
	if r := f.in.Hauberk(time.Minute, "why", "fleet/idle"); !strings.Contains(r.Stdout, "incident 4711") {
		f.Errorf("why does not tell of it: %s", r)
	}
	f.hauberk("guard", "restore", "--workload=fleet/idle", "--as=bob")
	f.settled()
	f.may(one, "/opt/x", false)

	f.hauberk("guard", "degrade", "--instance="+two, "--to=off", "--for=20s", "--reason=a look inside", "--as=bob")
	f.until("the switch ends by itself", func() bool {
		st, err := f.in.Status()
		return err == nil && len(st.Degraded) == 0
	})
	f.settled()
	f.may(two, "/opt/x", false)
	f.hauberk("guard", "degrade", "--cluster", "--to=off", "--for=1h", "--reason=the building burns", "--as=bob")
	f.settled()
	f.may(two, "/srv/y", true)
	f.hauberk("guard", "restore", "--cluster", "--as=bob")
	f.settled()
	f.may(two, "/srv/y", false)
}

func (f town) hauberk(args ...string) installation.Result {
	f.Helper()
	r := f.in.Hauberk(2*time.Minute, args...)
	if r.Code != 0 {
		f.Fatal(r)
	}
	return r
}

// apply gives the policy a new content.
func (f town) apply(lines ...string) {
	f.Helper()
	name := filepath.Join(f.in.Root, "policy.yaml")
	text := "apiVersion: hauberk.dev/v1alpha1\nkind: GuardPolicy\nmetadata: {name: idle, namespace: fleet}\nspec:\n" +
		"  rollout: {stages: [10, 50, 100], soakSeconds: 3, denialsPerMinute: 2}\n  " + strings.Join(lines, "\n  ") + "\n"
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		f.Fatal(err)
	}
	f.hauberk("apply", "-f", name)
}

// may checks whether a program in an instance may write a file.
func (f town) may(instance, path string, want bool) {
	f.Helper()
	// What follows the dashes is the program's; it reads no further than the path.
	r := f.in.Hauberk(2*time.Minute, "exec", "--state="+f.in.State, "--run="+f.in.Run, namespace+"/"+instance, "--", "/bin/idle", "write", path)
	if r.Code > 1 || (r.Code == 0) != want {
		f.Errorf("write %s in %s: want %v: %s", path, instance, want, r)
	}
}

// other is an instance that is not among those.
func (f town) other(than []string) string {
	f.Helper()
	for _, name := range f.instances() {
		if !slices.Contains(than, name) {
			return name
		}
	}
	f.Fatal("all instances have the change")
	return ""
}

func (f town) instances() (names []string) {
	f.Helper()
	list, err := f.in.Instances(namespace)
	if err != nil {
		f.Fatal(err)
	}
	for _, i := range list {
		names = append(names, i.Name)
	}
	return names
}

func (f town) until(what string, holds func() bool) {
	f.Helper()
	for end := time.Now().Add(patience); !holds(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			f.Fatalf("never came: %s: %s", what, f.in.Hauberk(time.Minute, "guard", "status"))
		}
	}
}

// reach waits until the policy is as wanted.
func (f town) reach(what string, is func(admin.GuardPolicy) bool) (p admin.GuardPolicy) {
	f.Helper()
	f.until(what, func() bool {
		var g admin.GuardState
		if err := f.in.Ask(admin.PathGuard, nil, &g); err != nil {
			return false
		}
		i := slices.IndexFunc(g.Policies, func(p admin.GuardPolicy) bool { return p.Name == policy })
		if i < 0 {
			return false
		}
		p = g.Policies[i]
		return is(p)
	})
	return p
}

// settled waits until every instance has what it was given last.
func (f town) settled() {
	f.Helper()
	f.reach("all have what they were given", func(p admin.GuardPolicy) bool { return p.Settled && p.Applied == fleetSize })
}

func waits(stage, instances int) func(admin.GuardPolicy) bool {
	return func(p admin.GuardPolicy) bool {
		return p.Rollout != nil && p.Rollout.Phase == "Waiting" && p.Rollout.Stage == stage && len(p.Rollout.Instances) == instances
	}
}

// ledger reads that every act was recorded, by whom and why.
func (f town) ledger() {
	f.Helper()
	entries, err := f.in.Ledger(0)
	if err != nil {
		f.Fatal(err)
	}
	var lines []string
	for _, e := range entries {
		var entry struct{ Kind, Actor, Text string }
		if err := json.Unmarshal(e.Entry, &entry); err != nil {
			f.Fatal(err)
		}
		lines = append(lines, fmt.Sprintf("%s|%s|%s", entry.Kind, entry.Actor, entry.Text))
	}
	for _, want := range [][3]string{
		{"guard.policy", "hauberkd", "cluster/floor: generation 1"},
		{"guard.policy", "hauberkd", "fleet/idle: generation 1"},
		{"guard.refused", "hauberkd", "exec.deny[0]"},
		{"guard.policy", "hauberkd", "generation 2 (content"},
		{"guard.policy", "hauberkd", "stage 1 of 3 of generation 2 soaked without anomaly"},
		{"guard.policy", "ann (uid 0)", "confirmed stage 1 of 3 of generation 2"},
		{"guard.policy", "ann (uid 0)", "confirmed stage 2 of 3 of generation 2"},
		{"guard.policy", "hauberkd", "generation 2 is in force in all 20 instances"},
		{"guard.policy", "hauberkd", "rollout of generation 3 halted at stage 1 of 3"},
		{"guard.policy", "ann (uid 0)", "aborted the rollout of generation 3"},
		{"guard.degrade", "bob (uid 0)", "workload fleet/idle: audit by bob (uid 0) until "},
		{"guard.degrade", "bob (uid 0)", "restored it from audit"},
		{"guard.degrade", "bob (uid 0)", ": off by bob (uid 0) until "},
		{"guard.degrade", "hauberkd", "off expired"},
		{"guard.degrade", "bob (uid 0)", "cluster: off by bob (uid 0) until "},
		{"guard.policy", "ann (uid 0)", "rolled it back: generation 4 has the content of generation 1"},
	} {
		if !slices.ContainsFunc(lines, func(l string) bool {
			return strings.HasPrefix(l, want[0]+"|"+want[1]+"|") && strings.Contains(l, want[2])
		}) {
			f.Errorf("the ledger does not have %v:\n%s", want, strings.Join(lines, "\n"))
		}
	}
}
