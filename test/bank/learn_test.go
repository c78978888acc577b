package bank

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"hauberk.dev/api/admin"
	"hauberk.dev/api/spec"
	"hauberk.dev/guard"
	"hauberk.dev/guard/trail"
	"hauberk.dev/kube/kubetest"
	"hauberk.dev/test/installation"
)

var bankWorkloads = []string{"assistant", "ledger", "risk", "transfer", "vault", "web"}

// patience bounds every wait of the test. Nothing depends on how fast it goes.
const patience = 4 * time.Minute

// learn takes every policy of the bank away, watches it work, and promotes what
// was learnt: then payments go on, and attacks are stopped, also by who holds a
// program that may run.
func learn(t *testing.T, in *installation.Installation, teller *installation.Teller) {
	watch(t, in)
	ordinary(t, in, teller)
	promote(t, in)
	payment(t, teller)
	ordinary(t, in, teller)
	victim := victim(t, in)
	for _, a := range []struct {
		name string
		args []string
	}{
		{"drop-and-execute", nil}, {"memfd", nil}, {"tmpfs-exec", nil}, {"reverse-shell", nil}, {"ld-preload", nil},
		{"write-protected", []string{"/etc/passwd"}}, {"exfiltrate", nil}, {"bypass", []string{address(t, in, "ledger") + ":12200"}},
	} {
		t.Run(a.name, func(t *testing.T) { attackStopped(t, in, victim, a.name, a.args...) })
	}
	// What of the corpus a shell can do: it was never learnt that one is started.
	for _, line := range []string{
		"/bin/sh -c 'echo x >/etc/passwd'", "/bin/sh -c /bin/true", "/bin/true", "/bin/ash -c 'exec /usr/bin/attack proof x'",
		"/bin/touch /bin/new", "/bin/mkdir /srv", "/bin/rm /etc/group", "/bin/touch /var/tmp/x", "/bin/nc -w 2 203.0.113.7 443",
	} {
		t.Run(strings.Fields(line)[0][5:], func(t *testing.T) { refused(t, in, victim, line) })
	}
	// Last, for it attacks the agent, which contains the sandbox.
	t.Run("unload-guard", func(t *testing.T) { attackStopped(t, in, victim, "unload-guard") })
}

const learning = `apiVersion: hauberk.dev/v1alpha1
kind: GuardPolicy
metadata: {name: learnt-%s, namespace: bank}
spec:
  mode: learn
  rollout: {stages: [100], soakSeconds: 0}
---
`

// watch puts each workload under a policy of its own in learn, and starts it anew:
// how it starts is to be seen, too.
func watch(t *testing.T, in *installation.Installation) {
	t.Helper()
	docs := ""
	for _, w := range bankWorkloads {
		docs += fmt.Sprintf(learning, w)
	}
	if r := apply(t, in, docs); r.Code != 0 {
		t.Fatal(r)
	}
	before, err := in.Instances(namespace)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range bankWorkloads {
		patch := fmt.Sprintf(`{"spec":{"guardPolicies":["learnt-%s"]}}`, w)
		cmd := exec.CommandContext(t.Context(), kubetest.Kubectl(t), "--kubeconfig="+in.Kubeconfig(), "-n", namespace, "patch", "workload", w, "--type=merge", "-p", patch)
		cmd.Env = append(os.Environ(), "HOME="+in.Root)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	settled(t, in, "learn")
	var wg sync.WaitGroup
	for _, w := range bankWorkloads {
		wg.Go(func() {
			if r := in.Hauberk(patience, "restart", namespace+"/"+w); r.Code != 0 {
				t.Error(r)
			}
		})
	}
	wg.Wait()
	until(t, "every workload runs anew", func() bool {
		list, err := in.Instances(namespace)
		running := map[string]bool{}
		for _, i := range list {
			old := slices.ContainsFunc(before, func(o admin.Instance) bool { return o.Name == i.Name })
			running[i.Workload] = running[i.Workload] || i.Phase == "Running" && !old
		}
		return err == nil && !slices.ContainsFunc(bankWorkloads, func(w string) bool { return !running[w] })
	})
	settled(t, in, "learn")
}

// until waits for what is sure to come.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for began := time.Now(); !ok(); time.Sleep(250 * time.Millisecond) {
		if time.Since(began) > patience {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// settled waits until every learnt policy is in force, in a mode.
func settled(t *testing.T, in *installation.Installation, mode string) {
	t.Helper()
	var g admin.GuardState
	until(t, "policies in "+mode, func() bool {
		if err := in.Ask(admin.PathGuard, nil, &g); err != nil {
			return false
		}
		n := 0
		for _, p := range g.Policies {
			if strings.HasPrefix(p.Name, namespace+"/learnt-") && p.Mode == mode && p.Rollout == nil && p.Settled && p.Eligible == 1 && p.Applied == 1 {
				n++
			}
		}
		return n == len(bankWorkloads)
	})
}

// ordinary is what the bank does all day, and what its people do in it.
func ordinary(t *testing.T, in *installation.Installation, teller *installation.Teller) {
	t.Helper()
	until(t, "the bank answers", func() bool { _, err := teller.Balances(t.Context()); return err == nil })
	before := balances(t, teller)
	for n := range 6 {
		p := installation.Payment{ID: fmt.Sprintf("learn-%d-%d", time.Now().UnixNano(), n), From: "alice", To: "bob", Amount: 3}
		if n%2 == 1 {
			p.From, p.To = p.To, p.From
		}
		if err := teller.Pay(t.Context(), p); err != nil {
			t.Fatalf("payment %d: %v", n, err)
		}
	}
	if after := balances(t, teller); !maps.Equal(before, after) {
		t.Errorf("money was made or lost: %v became %v", before, after)
	}
	for _, line := range []string{"/bin/cat /etc/nsswitch.conf", "/bin/wget -q -O - http://web:8080/healthz", "/usr/bin/attack proof hello"} {
		if out, err := inside(t, in, strings.Fields(line)...); err != nil {
			t.Errorf("%s: %v: %s", line, err, out)
		}
	}
}

// promote makes every proposal the policy, once it has what was seen.
func promote(t *testing.T, in *installation.Installation) {
	t.Helper()
	for _, w := range bankWorkloads {
		until(t, "what "+w+" did is proposed", func() bool {
			r := in.Hauberk(time.Minute, "guard", "propose", namespace+"/"+w, "-o", "json")
			var list []admin.Proposal
			var p guard.Proposal
			if r.Code != 0 || json.Unmarshal([]byte(r.Stdout), &list) != nil || len(list) != 1 || json.Unmarshal(list[0].Proposal, &p) != nil {
				return false
			}
			return p.Spec.Exec != nil && len(p.Spec.Exec.Allow) >= map[string]int{"assistant": 4}[w] && learnt(p, w)
		})
		r := in.Hauberk(time.Minute, "guard", "propose", namespace+"/"+w)
		if r.Code != 0 {
			t.Fatal(r)
		}
		t.Log(r.Stdout)
		// It can be checked, and what happened so far would all pass.
		file := filepath.Join(in.Root, "learnt-"+w+".yaml")
		if err := os.WriteFile(file, []byte(r.Stdout), 0o600); err != nil {
			t.Fatal(err)
		}
		if r := in.Hauberk(time.Minute, "guard", "check", file); r.Code != 0 {
			t.Error(r)
		}
		until(t, "promote "+w, func() bool {
			r = in.Hauberk(time.Minute, "guard", "promote", namespace+"/learnt-"+w)
			return r.Code == 0 || !strings.Contains(r.Stderr, "more was learnt")
		})
		if r.Code != 0 {
			t.Fatal(r)
		}
	}
	settled(t, in, "enforce")
}

// learnt tells whether a proposal has what the workload is known to do.
func learnt(p guard.Proposal, w string) bool {
	starts := slices.ContainsFunc(p.Spec.Exec.Allow, func(a spec.GuardProgram) bool { return a.Path == "/bin/"+w })
	calls := map[string][]string{"web": {"transfer"}, "transfer": {"ledger", "risk", "vault"}, "assistant": {"web"}}[w]
	for _, c := range calls {
		if !slices.ContainsFunc(p.Spec.Net.Egress, func(e spec.GuardEgress) bool { return e.Service == c }) {
			return false
		}
	}
	return starts
}

// inside runs a command in the assistant's sandbox. What follows the command is its
// own, so that flags stand before.
func inside(t *testing.T, in *installation.Installation, args ...string) (out []byte, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(in.Programs, "hauberk"), append([]string{"--state=" + in.State, "--run=" + in.Run, "exec", namespace + "/assistant"}, args...)...)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err = cmd.Output()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, &said)
	}
	return out, err
}

func victim(t *testing.T, in *installation.Installation) string {
	t.Helper()
	return running(t, in, "assistant").Name
}

func address(t *testing.T, in *installation.Installation, w string) string {
	t.Helper()
	return running(t, in, w).Address
}

func running(t *testing.T, in *installation.Installation, w string) (found admin.Instance) {
	t.Helper()
	until(t, w+" runs", func() bool {
		list, err := in.Instances(namespace)
		for _, i := range list {
			if i.Workload == w && i.Phase == "Running" {
				found = i
			}
		}
		return err == nil && found.Name != ""
	})
	return found
}

// denials counts what was refused in an instance so far.
func denials(t *testing.T, in *installation.Installation, instance string) (n int) {
	t.Helper()
	r := in.Hauberk(time.Minute, "events", namespace+"/assistant", "-i", instance, "--verdict", "denied", "-o", "json")
	if r.Code != 0 {
		t.Fatal(r)
	}
	for line := range strings.Lines(r.Stdout) {
		if _, err := trail.Parse([]byte(strings.TrimSpace(line))); err != nil {
			t.Fatal(err)
		}
		n++
	}
	return n
}

// attackStopped runs the attack program, which may run: it was seen to.
func attackStopped(t *testing.T, in *installation.Installation, instance, name string, args ...string) {
	before := denials(t, in, instance)
	out, err := inside(t, in, append([]string{"/usr/bin/attack", name}, args...)...)
	var o struct {
		Succeeded bool   `json:"succeeded"`
		Seen      string `json:"seen"`
	}
	if json.Unmarshal(out, &o) != nil && name != "unload-guard" {
		t.Fatalf("it said nothing: %v: %s", err, out)
	}
	if o.Succeeded {
		t.Errorf("it worked: %s", o.Seen)
	}
	until(t, "a record of "+name, func() bool { return denials(t, in, instance) > before })
	t.Log(o.Seen)
}

func refused(t *testing.T, in *installation.Installation, instance, line string) {
	before := denials(t, in, instance)
	args := strings.Fields(line)
	if i := strings.Index(line, "'"); i >= 0 {
		args = append(strings.Fields(line[:i]), strings.Trim(line[i:], "'"))
	}
	if out, err := inside(t, in, args...); err == nil {
		t.Errorf("%s worked: %s", line, out)
	}
	until(t, "a record of "+line, func() bool { return denials(t, in, instance) > before })
}
