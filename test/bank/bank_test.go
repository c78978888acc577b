package bank

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"hauberk.dev/api/admin"
	"hauberk.dev/kube/kubetest"
	"hauberk.dev/test/installation"
)

const namespace = "bank"

var (
	links   = []string{"own", "release", "launch", "boot", "identity", "talk", "break"}
	attacks = []string{"drop-and-execute", "memfd", "reverse-shell", "ld-preload", "write-protected-file",
		"unlisted-destination", "unsigned-image", "stolen-svid", "around-the-proxy", "unload-guard"}
)

// result of one check, as up --check prints it.
type result struct {
	Name   *string `json:"name"`
	OK     *bool   `json:"ok"`
	Seen   *string `json:"seen"`
	Millis *int64  `json:"millis"`
}

type report struct {
	OK      bool     `json:"ok"`
	Links   []result `json:"links"`
	Attacks []result `json:"attacks"`
}

// TestBank brings the bank up, proves its links and attacks it, uses and
// misuses it, and takes it down. The steps share one installation.
func TestBank(t *testing.T) {
	in := installation.New(t)
	r := in.Bank(15*time.Minute, "--check", "-o", "json")
	if r.Code != 0 {
		t.Fatal(r)
	}
	for _, c := range checked(t, r.Stdout, true) {
		t.Logf("%-22s %6d ms  %s", *c.Name, *c.Millis, *c.Seen)
		if !*c.OK {
			t.Errorf("%s: not ok: %s", *c.Name, *c.Seen)
		}
	}
	teller := in.Teller(30 * time.Second)
	defer teller.Close()
	t.Run("payment", func(t *testing.T) { payment(t, teller) })
	t.Run("kubectl", func(t *testing.T) { kubectl(t, in) })
	t.Run("resources", func(t *testing.T) { resources(t, in) })
	t.Run("unsigned", func(t *testing.T) { unsigned(t, in) })
	t.Run("unreleased", func(t *testing.T) { unreleased(t, in) })
	t.Run("twice", func(t *testing.T) {
		if r := in.Up(time.Minute); r.Code != 0 || !strings.Contains(r.Stderr, "already running") {
			t.Errorf("up of what is up: %s", r)
		}
	})
	t.Run("learn", func(t *testing.T) { learn(t, in, teller) })
	if r := in.Hauberk(2*time.Minute, "down"); r.Code != 0 {
		t.Fatal(r)
	}
	for _, l := range in.Leaks() {
		t.Errorf("left behind: %s", l)
	}
}

// TestWithoutGuard proves that the checks are honest: with the Guard switched
// off they say what was not stopped.
func TestWithoutGuard(t *testing.T) {
	in := installation.New(t)
	r := in.Bank(20*time.Minute, "--check", "--without-guard", "-o", "json")
	if r.Code != 1 {
		t.Fatalf("want exit code 1: %s", r)
	}
	through := map[string]bool{}
	for _, c := range checked(t, r.Stdout, false) {
		t.Logf("%-22s %-5v %6d ms  %s", *c.Name, *c.OK, *c.Millis, *c.Seen)
		through[*c.Name] = !*c.OK
	}
	// What only the Guard stops; the others meet other walls as well.
	for _, name := range []string{"drop-and-execute", "memfd", "reverse-shell", "ld-preload", "write-protected-file", "unload-guard"} {
		if !through[name] {
			t.Errorf("%s is reported as stopped although nothing could stop it", name)
		}
	}
}

// checked reads the one object that up --check prints.
func checked(t *testing.T, text string, ok bool) []result {
	t.Helper()
	d := json.NewDecoder(strings.NewReader(text))
	d.DisallowUnknownFields()
	var r report
	if err := d.Decode(&r); err != nil {
		t.Fatalf("read the report: %v: %s", err, text)
	}
	if d.More() {
		t.Errorf("more than one object on standard output: %s", text)
	}
	if r.OK != ok {
		t.Errorf("ok is %v, want %v", r.OK, ok)
	}
	if got := names(t, r.Links); !slices.Equal(got, links) {
		t.Errorf("links are %v, want %v", got, links)
	}
	if got := names(t, r.Attacks); !slices.Equal(got, attacks) {
		t.Errorf("attacks are %v, want %v", got, attacks)
	}
	return append(r.Links, r.Attacks...)
}

func names(t *testing.T, all []result) (got []string) {
	t.Helper()
	for _, c := range all {
		if c.Name == nil || c.OK == nil || c.Seen == nil || c.Millis == nil || *c.Seen == "" {
			t.Fatalf("a check does not say name, ok, seen and millis: %+v", c)
		}
		got = append(got, *c.Name)
	}
	return got
}

// payment moves money once, however often it is asked for.
func payment(t *testing.T, teller *installation.Teller) {
	before := balances(t, teller)
	p := installation.Payment{ID: fmt.Sprintf("test-%d", time.Now().UnixNano()), From: "alice", To: "bob", Amount: 25}
	for _, when := range []string{"first", "asked for again"} {
		if err := teller.Pay(t.Context(), p); err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		want := maps.Clone(before)
		want["alice"] -= 25
		want["bob"] += 25
		if got := balances(t, teller); !maps.Equal(got, want) {
			t.Errorf("%s: accounts hold %v, want %v", when, got, want)
		}
	}
	after := balances(t, teller)
	p.Amount = 26
	if err := teller.Pay(t.Context(), p); err == nil {
		t.Error("an id that was used for another payment was taken")
	}
	if err := teller.Pay(t.Context(), installation.Payment{ID: p.ID + "-much", From: "dave", To: "bob", Amount: 1_000_000}); err == nil {
		t.Error("money that is not there was paid")
	}
	if got := balances(t, teller); !maps.Equal(got, after) {
		t.Errorf("refused payments moved money: %v became %v", after, got)
	}
}

func balances(t *testing.T, teller *installation.Teller) map[string]int64 {
	t.Helper()
	b, err := teller.Balances(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// kubectl works against the kubeconfig that up has written.
func kubectl(t *testing.T, in *installation.Installation) {
	program := kubetest.Kubectl(t)
	run := func(args ...string) string {
		cmd := exec.CommandContext(t.Context(), program, append([]string{"--kubeconfig=" + in.Kubeconfig()}, args...)...)
		cmd.Env = append(os.Environ(), "HOME="+in.Root)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("kubectl %v: %v: %s", args, err, out)
		}
		return string(out)
	}
	for what, words := range map[string][]string{
		"explain workload.spec":         {"application", "image", "guardPolicies", "replicas"},
		"get incidents -A":              {namespace, "assistant", "Contained"},
		"get workloads -n bank":         {"web", "transfer", "ledger", "Running"},
		"describe workload web -n bank": {"Conditions", "Released"},
	} {
		out := run(strings.Fields(what)...)
		for _, w := range words {
			if !strings.Contains(out, w) {
				t.Errorf("kubectl %s does not say %q:\n%s", what, w, out)
			}
		}
	}
}

const workload = `apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {name: stray, namespace: bank}
spec:
  application: %s
  image: %s
  %s
`

// resources that make no sense are refused, or say in their status what is
// wrong: field, value and fix.
func resources(t *testing.T, in *installation.Installation) {
	for _, c := range []struct {
		name, yaml string
		words      []string
	}{
		{"unknown field", fmt.Sprintf(workload, "payments", "bank/web:1", "replikas: 2"), []string{"replikas"}},
		{"image", fmt.Sprintf(workload, "payments", `"Bank//web:"`, ""), []string{"spec.image", "Bank//web:"}},
		{"out of range", fmt.Sprintf(workload, "payments", "bank/web:1", "replicas: -1"), []string{"spec.replicas", "-1"}},
		{"no kind", "apiVersion: hauberk.dev/v1alpha1\nmetadata: {name: x}\n", []string{"kind"}},
		{"no YAML", "kind: [", []string{"YAML"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := apply(t, in, c.yaml)
			if r.Code != 1 {
				t.Errorf("want exit code 1: %s", r)
			}
			said(t, r.Stderr, append(c.words, "fix:")...)
		})
	}
	t.Run("dangling application", func(t *testing.T) {
		r := apply(t, in, fmt.Sprintf(workload, "nobody", "bank/web:1", ""))
		if r.Code != 0 { // refused at once is as good
			said(t, r.Stderr, "spec.application", "nobody", "fix:")
			return
		}
		defer remove(t, in)
		said(t, standing(t, in, "ApplicationNotFound"), "spec.application", `"nobody"`, "create the Application or correct the name")
	})
}

func apply(t *testing.T, in *installation.Installation, yaml string) installation.Result {
	t.Helper()
	name := filepath.Join(in.Root, "apply.yaml")
	if err := os.WriteFile(name, []byte(yaml), 0o600); err != nil {
		t.Fatal(err)
	}
	return in.Hauberk(time.Minute, "apply", "-f", name)
}

func remove(t *testing.T, in *installation.Installation) {
	t.Helper()
	if r := in.Hauberk(time.Minute, "delete", "-f", filepath.Join(in.Root, "apply.yaml")); r.Code != 0 {
		t.Error(r)
	}
}

func said(t *testing.T, text string, words ...string) {
	t.Helper()
	for _, w := range words {
		if !strings.Contains(text, w) {
			t.Errorf("it does not say %q: %s", w, text)
		}
	}
}

// standing waits until the workload stray has a reason not to run, and returns
// what its Ready condition says.
func standing(t *testing.T, in *installation.Installation, reason string) string {
	t.Helper()
	var got string
	for began := time.Now(); time.Since(began) < 30*time.Second; time.Sleep(200 * time.Millisecond) {
		cmd := exec.CommandContext(t.Context(), kubetest.Kubectl(t), "--kubeconfig="+in.Kubeconfig(), "-n", namespace, "get", "workload", "stray",
			"-o", `jsonpath={range .status.conditions[?(@.type=="Ready")]}{.status} {.reason} {.message}{end}`)
		cmd.Env = append(os.Environ(), "HOME="+in.Root)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if got = string(out); strings.HasPrefix(got, "False "+reason) {
			return got
		}
	}
	t.Fatalf("the workload's Ready condition is %q, want reason %s", got, reason)
	return ""
}

// unsigned: a layout without evidence does not pass the gate.
func unsigned(t *testing.T, in *installation.Installation) {
	from := filepath.Join(in.State, "layouts", "bank_web_1")
	bare := filepath.Join(in.Root, "bare")
	if err := os.CopyFS(bare, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(bare, "evidence")); err != nil {
		t.Fatal(err)
	}
	r := in.Hauberk(time.Minute, "release", "-n", namespace, "--application=payments", "--image=bank/web:2", bare)
	if r.Code != 1 {
		t.Errorf("want exit code 1: %s", r)
	}
	said(t, r.Stderr, "provenance", "fix:")
}

// unreleased: what never passed the gate is not launched, and why says so.
func unreleased(t *testing.T, in *installation.Installation) {
	digest := "bank/web@sha256:" + strings.Repeat("0123456789abcdef", 4)
	if r := apply(t, in, fmt.Sprintf(workload, "payments", digest, "")); r.Code != 0 {
		t.Fatal(r)
	}
	defer remove(t, in)
	said(t, standing(t, in, ""), "release")
	list, err := in.Instances(namespace)
	if err != nil || slices.ContainsFunc(list, func(i admin.Instance) bool { return i.Workload == "stray" }) {
		t.Errorf("it was launched: %+v, %v", list, err)
	}
	r := in.Hauberk(time.Minute, "why", namespace+"/stray")
	if r.Code != 0 {
		t.Fatal(r)
	}
	said(t, r.Stdout, "does not run", "release")
}

// TestNotStarted proves that what cannot start says why, and starts nothing.
func TestNotStarted(t *testing.T) {
	in := installation.New(t)
	r := in.Hauberk(time.Minute, "ps")
	if r.Code != 1 {
		t.Errorf("want exit code 1: %s", r)
	}
	said(t, r.Stderr, "fix: start it with: hauberk up")
	r = in.Hauberk(time.Minute, "build", filepath.Join(in.Tree, "docs"))
	if r.Code != 1 {
		t.Errorf("want exit code 1: %s", r)
	}
	said(t, r.Stderr, "*.json", "docs", "examples/bank")
	ln, err := net.Listen("tcp", in.Gateway)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	in.Ignore(in.Gateway)
	r = in.Up(time.Minute)
	if r.Code != 1 {
		t.Errorf("want exit code 1: %s", r)
	}
	said(t, r.Stderr, "--gateway", in.Gateway, "address already in use", "fix:")
	for _, l := range in.Leaks() {
		t.Errorf("left behind: %s", l)
	}
	if _, err := os.Stat(in.State); err == nil {
		t.Error("a state directory was made for nothing")
	}
}
