package deploy

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"hauberk.dev/api/admin"
	"hauberk.dev/api/spec"
	"hauberk.dev/evidence"
)

const shop = `# A comment that stays.
kind: Application
metadata: {name: shop, namespace: s}
spec:
  accounts:
  - {name: dana, roles: [developer, reviewer]}
  - name: ruth
    roles: [reviewer]
    key: ${KEY_ruth}
  - name: omar
    roles: [owner]
    key: already
---
---
kind: ReleasePolicy
metadata: {name: p, namespace: s}
spec:
  applications: [other]
  builders: [https://example.com/other]
---
kind: ReleasePolicy
metadata: {name: q, namespace: s}
spec:
  applications: ["*"]
  builders: [https://example.com/builder]
---
kind: Workload
metadata: {name: web, namespace: s}
spec:
  replicas: 2
  ports:
  - {port: 80, protocol: http, publish: ${WEB_PORT}}
  - {port: 81}
`

// settings answers for the placeholders of shop.
func settings(name string) (string, error) {
	switch name {
	case "KEY_ruth":
		return strconv.Quote("-----BEGIN PUBLIC KEY-----\nkey\n-----END PUBLIC KEY-----\n"), nil
	case "WEB_PORT":
		return "8080", nil
	}
	return "", errors.New("nothing is set for " + name)
}

func parse(t *testing.T, text string) []*document {
	t.Helper()
	text, err := substitute(text, settings)
	if err != nil {
		t.Fatal(err)
	}
	docs, err := documents([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return docs
}

func TestDocuments(t *testing.T) {
	x := &Example{docs: parse(t, shop)}
	if len(x.docs) != 4 {
		t.Fatalf("%d documents", len(x.docs))
	}
	if doors := x.Doors(); len(doors) != 1 || doors[0] != (Door{"web", "http://127.0.0.1:8080"}) {
		t.Errorf("doors are %v", doors)
	}
	for _, c := range []struct {
		role spec.Role
		not  string
		want string
	}{{spec.RoleReviewer, "dana", "ruth"}, {spec.RoleReviewer, "", "dana"}, {spec.RoleOwner, "", "omar"}, {spec.RoleBuilder, "", ""}} {
		got, err := holder(x.docs, "s", "shop", c.role, c.not)
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%s but %q is %q, %v", c.role, c.not, got, err)
		}
	}
	if _, err := holder(x.docs, "s", "absent", spec.RoleOwner, ""); err == nil {
		t.Error("an absent application has an owner")
	}
}

func TestSubstitute(t *testing.T) {
	docs := parse(t, shop)
	raw, err := encode(docs, func(d *document) bool { return d.Kind != "Workload" })
	if err != nil {
		t.Fatal(err)
	}
	var again struct {
		Spec struct{ Accounts []struct{ Key string } }
	}
	if err := yaml.Unmarshal(raw[4:], &again); err != nil {
		t.Fatal(err)
	}
	if a := again.Spec.Accounts; a[1].Key != "-----BEGIN PUBLIC KEY-----\nkey\n-----END PUBLIC KEY-----\n" || a[2].Key != "already" {
		t.Errorf("keys are %q", a)
	}
	if n := strings.Count(string(raw), "---\n"); n != 3 {
		t.Errorf("%d documents passed", n)
	}
	_, err = substitute("${A} ${B} $C ${} ${d-e}", settings)
	if err == nil || err.Error() != "nothing is set for A\nnothing is set for B" {
		t.Errorf("error is %v", err)
	}
}

func TestDocumentsRefuse(t *testing.T) {
	for _, text := range []string{"a: [", "kind: {}", "kind: X\nspec: {ports: 7}", "\tkind: X"} {
		if docs, err := documents([]byte(text)); err == nil {
			t.Errorf("%q is %v", text, docs)
		}
	}
}

func FuzzDocuments(f *testing.F) {
	f.Add([]byte(shop))
	f.Add([]byte("&a [*a]"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		docs, err := documents(raw)
		if err != nil {
			return
		}
		_, _ = encode(docs, func(*document) bool { return true })
	})
}

func TestSigner(t *testing.T) {
	d := &Deployer{Accounts: t.TempDir()}
	one, err := d.signer("ruth")
	if err != nil {
		t.Fatal(err)
	}
	two, err := d.signer("ruth")
	if err != nil || one.KeyID() != two.KeyID() {
		t.Errorf("the key changed: %v", err)
	}
	env, err := evidence.Sign("text/plain", []byte("x"), two)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := evidence.Verify(env, one.Key()); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"", "../x", "a/b", "/etc/x"} {
		if _, err := d.signer(name); err == nil {
			t.Errorf("account %q has a key", name)
		}
	}
}

func TestJudge(t *testing.T) {
	want := map[string]int{"web": 2, "ledger": 1, "batch": 0}
	run := func(w, phase string) admin.Instance { return admin.Instance{Workload: w, Phase: phase} }
	missing, err := judge(want, []admin.Instance{run("web", "Running"), run("web", "Pending"), run("ledger", "Running"), run("old", "Refused")})
	if err != nil || strings.Join(missing, ",") != "web" {
		t.Errorf("%v, %v", missing, err)
	}
	if missing, err := judge(want, []admin.Instance{run("web", "Running"), run("web", "Running"), run("ledger", "Running")}); err != nil || len(missing) != 0 {
		t.Errorf("%v, %v", missing, err)
	}
	for _, phase := range []string{"Refused", "Contained", "Failed"} {
		if _, err := judge(want, []admin.Instance{run("web", phase)}); err == nil || !strings.Contains(err.Error(), phase) {
			t.Errorf("%s: %v", phase, err)
		}
		if _, err := judge(want, []admin.Instance{run("web", phase), run("web", "Pending")}); err != nil {
			t.Errorf("%s and replaced: %v", phase, err)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	dir, d := t.TempDir(), &Deployer{Accounts: t.TempDir()}
	if _, err := d.Open(dir); err == nil || !strings.Contains(err.Error(), "examples/bank") {
		t.Errorf("empty directory: %v", err)
	}
	recipe := `{"version":1,"builder":"https://example.com/builder","repository":"https://example.com/shop","author":"dana","namespace":"s","images":[{"name":"shop/web:1","application":"shop","programs":[{"package":"./web","path":"/web"}],"entrypoint":["/web"]}]}`
	if err := os.WriteFile(filepath.Join(dir, "shop.json"), []byte(recipe), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Open(dir); err == nil || !strings.Contains(err.Error(), "no *.yaml") {
		t.Errorf("no YAML: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "a.yaml"), []byte("a: ["), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Open(dir); err == nil || !strings.Contains(err.Error(), "a.yaml") {
		t.Errorf("bad YAML: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "a.yaml"), []byte("a: ${NOWHERE}"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Open(dir); err == nil || !strings.Contains(err.Error(), "--set NOWHERE=VALUE") {
		t.Errorf("placeholder: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "b.json"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Open(dir); err == nil || !strings.Contains(err.Error(), "2 files *.json") {
		t.Errorf("two recipes: %v", err)
	}
}
