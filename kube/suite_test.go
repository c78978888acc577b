package kube_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"crypto/tls"
	"crypto/x509"

	admissionreviewv1 "k8s.io/api/admission/v1"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"hauberk.dev/api/spec"
	"hauberk.dev/api/v1alpha1"
	"hauberk.dev/kube"
	"hauberk.dev/kube/kubetest"
)

// fixture is one API with a store on it.
type fixture struct {
	config *rest.Config
	client *kubernetes.Clientset
	store  *kube.Store
}

// suite says what every API that Hauberk uses must do, whoever serves it.
func suite(t *testing.T, access kube.Access) {
	config, err := kube.Config(access)
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{config: config}
	if f.client, err = kubernetes.NewForConfig(config); err != nil {
		t.Fatal(err)
	}
	if f.store, err = kube.Connect(t.Context(), access); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- f.store.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	if err := f.store.Filled(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Run("Refusals", f.refusals)
	t.Run("Apply", f.apply)
	t.Run("Status", f.status)
	t.Run("Watch", f.watch)
	t.Run("Immutable", f.immutable)
	t.Run("BuiltIn", f.builtIn)
	t.Run("Webhooks", f.webhooks)
	t.Run("Policies", f.policies)
	t.Run("AdmissionFaults", f.admissionFaults)
	t.Run("NamespaceDeletion", f.namespaceDeletion)
	t.Run("Foreground", f.foreground)
	t.Run("Events", f.events)
}

// namespace makes a namespace for one test.
func (f *fixture) namespace(t *testing.T) string {
	t.Helper()
	name := "t-" + strings.ToLower(strings.NewReplacer("/", "-", "_", "-", "#", "-").Replace(t.Name()))
	if err := f.store.EnsureNamespace(t.Context(), name); err != nil {
		t.Fatal(err)
	}
	return name
}

// doc is a manifest of one resource of hauberk.dev.
func doc(kind, namespace, name, spec string) string {
	return fmt.Sprintf("apiVersion: hauberk.dev/v1alpha1\nkind: %s\nmetadata: {namespace: %s, name: %s}\nspec: %s\n", kind, namespace, name, spec)
}

const goodWorkload = `{application: bank, image: "bank/web:1"}`

func (f *fixture) refusals(t *testing.T) {
	ns := f.namespace(t)
	key := `"-----BEGIN PUBLIC KEY-----"`
	tests := []struct {
		name, manifest string
		want           []string // parts of the message
	}{
		{"port out of range", doc("Workload", ns, "w", `{application: bank, image: "bank/web:1", ports: [{port: 70000}]}`), []string{"document 1 (Workload " + ns + "/w)", "spec.ports[0].port", "70000", "65535"}},
		{"negative replicas", doc("Workload", ns, "w", `{application: bank, image: "bank/web:1", replicas: -1}`), []string{"spec.replicas", "-1", "greater than or equal to 0"}},
		{"memory too small", doc("Workload", ns, "w", `{application: bank, image: "bank/web:1", sandbox: {memoryMiB: 8}}`), []string{"spec.sandbox.memoryMiB", "8", "96"}},
		{"wrong image reference", doc("Workload", ns, "w", `{application: bank, image: "Bank/Web"}`), []string{"spec.image", `"Bank/Web"`, "should match"}},
		{"missing field", doc("Workload", ns, "w", `{application: bank}`), []string{"spec.image", "Required"}},
		{"unknown field", doc("Workload", ns, "w", `{application: bank, image: "bank/web:1", imagePullPolicy: Never}`), []string{"spec.imagePullPolicy", "document 1"}},
		{"unknown sandbox class", doc("Workload", ns, "w", `{application: bank, image: "bank/web:1", sandbox: {class: runc}}`), []string{"spec.sandbox.class", `"runc"`, `"vm"`}},
		{"port twice", doc("Workload", ns, "w", `{application: bank, image: "bank/web:1", ports: [{port: 80}, {port: 80}]}`), []string{"spec.ports", "80"}},
		{"published twice", doc("Workload", ns, "w", `{application: bank, image: "bank/web:1", ports: [{port: 80, publish: 8080}, {port: 81, publish: 8080}]}`), []string{"spec", "two ports publish the same port of the node"}},
		{"policy twice", doc("Workload", ns, "w", `{application: bank, image: "bank/web:1", guardPolicies: [a, a]}`), []string{"spec.guardPolicies", `"a"`}},
		{"bad name", doc("Workload", ns, "Web_1", goodWorkload), []string{"metadata.name", "Web_1"}},
		{"name too long for a host", doc("Workload", ns, strings.Repeat("w", 64), goodWorkload), []string{"DNS label", "63"}},
		{"dotted name", doc("Workload", ns, "web.bank", goodWorkload), []string{"DNS label"}},
		{"wrong type", doc("Workload", ns, "w", `{application: bank, image: "bank/web:1", replicas: "two"}`), []string{"spec.replicas"}},
		{"signer without key", doc("Application", ns, "bank", `{repositories: ["https://git"], accounts: [{name: ann, roles: [owner]}]}`), []string{"spec.accounts[0]", "set key"}},
		{"unknown role", doc("Application", ns, "bank", `{repositories: ["https://git"], accounts: [{name: ann, roles: [king], key: `+key+`}]}`), []string{"spec.accounts[0].roles[0]", `"king"`}},
		{"account twice", doc("Application", ns, "bank", `{repositories: ["https://git"], accounts: [{name: ann, roles: [developer]}, {name: ann, roles: [developer]}]}`), []string{"spec.accounts", "ann"}},
		{"no repository", doc("Application", ns, "bank", `{repositories: [], accounts: [{name: ann, roles: [developer]}]}`), []string{"spec.repositories"}},
		{"egress of two kinds", doc("GuardPolicy", ns, "g", `{net: {egress: [{service: web, cidr: 10.0.0.0/8}]}}`), []string{"spec.net.egress[0]", "exactly one of service, cidr and name"}},
		{"bad range", doc("GuardPolicy", ns, "g", `{net: {egress: [{cidr: 10.0.0.0/99}]}}`), []string{"spec.net.egress[0]", "address range"}},
		{"relative path", doc("GuardPolicy", ns, "g", `{files: [{path: etc, deny: w}]}`), []string{"spec.files[0].path", `"etc"`}},
		{"unknown operation", doc("GuardPolicy", ns, "g", `{sys: {deny: [coffee]}}`), []string{"spec.sys.deny[0]", `"coffee"`}},
		{"nobody", doc("AccessPolicy", ns, "a", `{workload: web, allow: [{from: []}]}`), []string{"spec.allow[0].from"}},
		{"bad method", doc("AccessPolicy", ns, "a", `{workload: web, allow: [{from: ["*"], methods: ["G T"]}]}`), []string{"spec.allow[0].methods[0]", `"G T"`}},
		{"no reviewer", doc("ReleasePolicy", ns, "r", `{applications: ["*"], builders: ["b"], reviewers: 0}`), []string{"spec.reviewers", "0", "1"}},
		{"missing namespace", doc("Workload", "nowhere", "w", goodWorkload), []string{"metadata.namespace", `"nowhere"`, "create it first"}},
		{"same object twice", doc("Workload", ns, "w", goodWorkload) + "---\n" + doc("Workload", ns, "w", goodWorkload), []string{"document 2", "repeats document 1"}},
		{"two faults", doc("Workload", ns, "w", `{application: bank, image: "X"}`) + "---\n" + doc("Workload", ns, "v", `{application: bank, image: "Y"}`), []string{"document 1", `"X"`, "document 2", `"Y"`}},
		{"key twice", "apiVersion: hauberk.dev/v1alpha1\nkind: Workload\nmetadata: {name: w}\nspec: {application: a}\nspec: {application: b}\n", []string{"document 1", "spec", "already"}},
		{"unknown kind", "apiVersion: v1\nkind: Pod\nmetadata: {name: w}\n", []string{"document 1 (Pod", "no Pod"}},
		{"no kind", "apiVersion: v1\nmetadata: {name: w}\n", []string{"document 1", "kind: missing"}},
		{"no name", "apiVersion: v1\nkind: ConfigMap\n", []string{"metadata.name: missing"}},
		{"not an object", "- a\n- b\n", []string{"document 1", "object with apiVersion"}},
		{"broken YAML", "a: [", []string{"document 1", "read YAML"}},
		{"nothing", "---\n# only words\n", []string{"no document"}},
		{"too large", strings.Repeat(" ", 5<<20), []string{"5242880 bytes"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			done, err := f.store.Apply(t.Context(), []byte(test.manifest))
			if err == nil || len(done) > 0 {
				t.Fatalf("applied: %v, error %v", done, err)
			}
			for _, part := range test.want {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("message does not say %q:\n%v", part, err)
				}
			}
		})
	}
	left, err := kube.List[v1alpha1.Workload](t.Context(), f.store, ns)
	if err != nil || len(left) != 0 {
		t.Errorf("a refusal left %d workloads, error %v", len(left), err)
	}
}

func (f *fixture) apply(t *testing.T) {
	manifest := doc("Workload", "t-fresh", "web", goodWorkload) + "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: t-fresh}\n---\n" +
		"apiVersion: v1\nkind: Secret\nmetadata: {namespace: t-fresh, name: s}\nstringData: {password: hunter2}\n---\n" + doc("GuardPolicy", "t-fresh", "g", `{exec: {}}`)
	faulty := manifest + "---\n" + doc("Workload", "t-fresh", "bad", `{application: bank, image: "BAD"}`)
	if done, err := f.store.Apply(t.Context(), []byte(faulty)); err == nil || len(done) != 0 {
		t.Fatalf("a faulty manifest was applied: %v", done)
	}
	if _, err := f.client.CoreV1().Namespaces().Get(t.Context(), "t-fresh", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("a faulty manifest left its namespace: %v", err)
	}
	results := func(manifest string) (out []string) {
		done, err := f.store.Apply(t.Context(), []byte(manifest))
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range done {
			out = append(out, d.Kind+" "+d.Result)
		}
		return out
	}
	want := []string{"Namespace created", "Workload created", "Secret created", "GuardPolicy created"}
	if got := results(manifest); !slices.Equal(got, want) {
		t.Errorf("first: %q, want %q", got, want)
	}
	want = []string{"Namespace unchanged", "Workload unchanged", "Secret unchanged", "GuardPolicy unchanged"}
	if got := results(manifest); !slices.Equal(got, want) {
		t.Errorf("again: %q, want %q", got, want)
	}
	if got := results(strings.Replace(manifest, "web:1", "web:2", 1)); !slices.Contains(got, "Workload configured") || !slices.Contains(got, "Secret unchanged") {
		t.Errorf("changed: %q", got)
	}
	w, err := kube.Get[v1alpha1.Workload](t.Context(), f.store, "t-fresh", "web")
	for deadline := time.Now().Add(5 * time.Second); (err != nil || w.Spec.Image != "bank/web:2") && time.Now().Before(deadline); {
		time.Sleep(5 * time.Millisecond) // what a manifest changes reaches the cache soon
		w, err = kube.Get[v1alpha1.Workload](t.Context(), f.store, "t-fresh", "web")
	}
	if err != nil {
		t.Fatal(err)
	}
	if w.Spec.Image != "bank/web:2" || *w.Spec.Replicas != 1 || w.Spec.Sandbox != (spec.Sandbox{Class: "vm", MemoryMiB: 160, CPUs: 1}) || w.Spec.OnContain != "Hold" {
		t.Errorf("stored with defaults: %+v", w.Spec)
	}
	g, err := kube.Get[v1alpha1.GuardPolicy](t.Context(), f.store, "t-fresh", "g")
	if err != nil {
		t.Fatal(err)
	}
	if e := g.Spec.Exec; g.Spec.Mode != "enforce" || e == nil || e.Origin != "image" || e.AnonymousMemory != "deny" || e.ShellOnSocket != "deny" || e.Severity != spec.SeverityWarning {
		t.Errorf("guard policy without words is not strict: %+v", g.Spec)
	}
	secret, err := f.client.CoreV1().Secrets("t-fresh").Get(t.Context(), "s", metav1.GetOptions{})
	if err != nil || string(secret.Data["password"]) != "hunter2" || secret.StringData != nil {
		t.Errorf("secret: %v, error %v", secret, err)
	}
	for _, result := range []string{"deleted", "absent"} {
		done, err := f.store.Remove(t.Context(), []byte(doc("GuardPolicy", "t-fresh", "g", "{}")))
		if err != nil || len(done) != 1 || done[0].Result != result {
			t.Errorf("remove: %v, error %v, want %s", done, err, result)
		}
	}
}

func (f *fixture) status(t *testing.T) {
	ctx, ns := t.Context(), f.namespace(t)
	w := &v1alpha1.Workload{ObjectMeta: kube.ObjectMeta{Namespace: ns, Name: "web"}, Spec: spec.Workload{Application: "bank", Image: "bank/web:1"}}
	if err := kube.Create(ctx, f.store, w); err != nil {
		t.Fatal(err)
	}
	if err := kube.Create(ctx, f.store, w.DeepCopy()); !kube.Exists(err) {
		// the copy carries a version, which the server refuses first
		again := &v1alpha1.Workload{ObjectMeta: kube.ObjectMeta{Namespace: ns, Name: "web"}, Spec: w.Spec}
		if err := kube.Create(ctx, f.store, again); !kube.Exists(err) {
			t.Errorf("created twice: %v", err)
		}
	}
	// Two writers change the status at once, again and again: nothing is lost.
	const rounds = 20
	errs := make(chan error, 2)
	for range 2 {
		go func() {
			for range rounds {
				err := kube.UpdateStatus(ctx, f.store, ns, "web", func(w *v1alpha1.Workload) {
					w.Status.Instances++
					kube.SetCondition(w, v1alpha1.ConditionReady, false, "Starting", "one of the instances starts")
				})
				if err != nil {
					errs <- err
					return
				}
			}
			errs <- nil
		}()
	}
	for range 2 {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	got, err := kube.Get[v1alpha1.Workload](ctx, f.store, ns, "web")
	if err != nil {
		t.Fatal(err)
	}
	c := kube.FindCondition(got, v1alpha1.ConditionReady)
	if got.Status.Instances != 2*rounds || c == nil || c.Reason != "Starting" || c.ObservedGeneration != got.Generation || got.Status.ObservedGeneration != 1 {
		t.Errorf("status after %d updates: %+v", 2*rounds, got.Status)
	}
	if err := kube.Update(ctx, f.store, ns, "web", func(w *v1alpha1.Workload) { w.Spec.Image, w.Status.Instances = "bank/web:2", 0 }); err != nil {
		t.Fatal(err)
	}
	got, err = kube.Get[v1alpha1.Workload](ctx, f.store, ns, "web")
	if err != nil || got.Generation != 2 || got.Spec.Image != "bank/web:2" || got.Status.Instances != 2*rounds {
		t.Errorf("a change of the specification is seen at once and leaves the status: %+v, error %v", got, err)
	}
	before := got.ResourceVersion
	if err := kube.UpdateStatus(ctx, f.store, ns, "web", func(*v1alpha1.Workload) {}); err != nil {
		t.Fatal(err)
	}
	if got, _ = kube.Get[v1alpha1.Workload](ctx, f.store, ns, "web"); got.ResourceVersion != before {
		t.Error("a status without a difference was written")
	}
	if err := kube.Delete[v1alpha1.Workload](ctx, f.store, ns, "web"); err != nil {
		t.Fatal(err)
	}
	if _, err := kube.Get[v1alpha1.Workload](ctx, f.store, ns, "web"); !kube.NotFound(err) {
		t.Errorf("deleted, but: %v", err)
	}
	if err := kube.Delete[v1alpha1.Workload](ctx, f.store, ns, "web"); err != nil {
		t.Errorf("deleting what is not there: %v", err)
	}
}

func (f *fixture) watch(t *testing.T) {
	ns := f.namespace(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	calls, running := 0, atomic.Int32{}
	err := f.store.Watch(ctx, func(ctx context.Context) {
		if running.Add(1) > 1 {
			t.Error("two calls at once")
		}
		defer running.Add(-1)
		calls++
		list, err := kube.List[v1alpha1.AccessPolicy](ctx, f.store, ns)
		if err != nil {
			t.Error(err)
		}
		switch {
		case calls == 1:
			for i := range 20 {
				p := &v1alpha1.AccessPolicy{ObjectMeta: kube.ObjectMeta{Namespace: ns, Name: fmt.Sprintf("p%02d", i)}, Spec: spec.AccessPolicy{Workload: "web"}}
				if err := kube.Create(ctx, f.store, p); err != nil {
					t.Error(err)
				}
			}
		case len(list) == 20:
			if list[0].Name != "p00" || list[19].Name != "p19" {
				t.Errorf("not in order: %s … %s", list[0].Name, list[19].Name)
			}
			cancel()
		}
	})
	if err != nil || calls < 2 || calls > 30 {
		t.Errorf("%d calls, error %v", calls, err)
	}
}

func (f *fixture) immutable(t *testing.T) {
	ctx, ns := t.Context(), f.namespace(t)
	inc := &v1alpha1.Incident{ObjectMeta: kube.ObjectMeta{Namespace: ns, Name: "i"}, Spec: spec.Incident{Instance: "web-1", Workload: "web", Application: "bank", Node: "n", Identity: "spiffe://d/ns/b/sa/web", Cause: "guard", Rule: "exec", Observed: "2026-01-01T00:00:00Z"}}
	if err := kube.Create(ctx, f.store, inc); err != nil {
		t.Fatal(err)
	}
	err := kube.Update(ctx, f.store, ns, "i", func(i *v1alpha1.Incident) { i.Spec.Rule = "none" })
	if !kube.Invalid(err) || !strings.Contains(err.Error(), "evidence") {
		t.Errorf("an incident was rewritten: %v", err)
	}
	err = kube.UpdateStatus(ctx, f.store, ns, "i", func(i *v1alpha1.Incident) {
		millis := int64(12)
		i.Status.State, i.Status.Epoch, i.Status.ContainedMillis = v1alpha1.IncidentContained, 3, &millis
		i.Status.Receipts = append(i.Status.Receipts, v1alpha1.Receipt{Point: "mesh", Node: "n", Act: "cut 3 connections", At: metav1.NowMicro()})
	})
	if err != nil {
		t.Errorf("write receipts: %v", err)
	}
	inst := &v1alpha1.Instance{ObjectMeta: kube.ObjectMeta{Namespace: ns, Name: "web-1"}, Spec: v1alpha1.InstanceSpec{
		Workload: "web", Application: "bank", Node: "n", Repository: "bank/web", Digest: "sha256:" + strings.Repeat("0", 64),
		Address: "10.88.0.2", Identity: "spiffe://d/ns/b/sa/web", Ticket: `{"payload":"e30="}`, GuardGeneration: 1, Launch: spec.Workload{Application: "bank", Image: "bank/web:1"},
	}}
	if err := kube.Create(ctx, f.store, inst); err != nil {
		t.Fatal(err)
	}
	if err := kube.Update(ctx, f.store, ns, "web-1", func(i *v1alpha1.Instance) { i.Spec.GuardGeneration = 2 }); err != nil {
		t.Errorf("raise the generation: %v", err)
	}
	err = kube.Update(ctx, f.store, ns, "web-1", func(i *v1alpha1.Instance) { i.Spec.Digest = "sha256:" + strings.Repeat("1", 64) })
	if !kube.Invalid(err) || !strings.Contains(err.Error(), "new instance") {
		t.Errorf("an instance got another image: %v", err)
	}
	err = kube.UpdateStatus(ctx, f.store, ns, "web-1", func(i *v1alpha1.Instance) { i.Status.Phase = "Dreaming" })
	if !kube.Invalid(err) || !strings.Contains(err.Error(), "Dreaming") {
		t.Errorf("unknown phase stored: %v", err)
	}
}

func (f *fixture) builtIn(t *testing.T) {
	ctx, ns := t.Context(), f.namespace(t)
	maps := f.client.CoreV1().ConfigMaps(ns)
	yes := true
	for name, m := range map[string]*corev1.ConfigMap{
		"Bad_Name": {ObjectMeta: metav1.ObjectMeta{Name: "Bad_Name"}},
		"a key":    {ObjectMeta: metav1.ObjectMeta{Name: "a"}, Data: map[string]string{"a key": ""}},
		"too long": {ObjectMeta: metav1.ObjectMeta{Name: "b"}, Data: map[string]string{"k": strings.Repeat("x", 1<<20+1)}},
		"both":     {ObjectMeta: metav1.ObjectMeta{Name: "c"}, Data: map[string]string{"both": ""}, BinaryData: map[string][]byte{"both": nil}},
	} {
		_, err := maps.Create(ctx, m, metav1.CreateOptions{})
		if !apierrors.IsInvalid(err) || !strings.Contains(strings.ToLower(err.Error()), strings.ToLower(name)) {
			t.Errorf("%s: %v", name, err)
		}
	}
	m, err := maps.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "m"}, Data: map[string]string{"k": "v"}, Immutable: &yes}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	m.Data["k"] = "w"
	if _, err := maps.Update(ctx, m, metav1.UpdateOptions{}); !apierrors.IsInvalid(err) {
		t.Errorf("an immutable map was changed: %v", err)
	}
	raw := []byte(fmt.Sprintf(`{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"ssa","namespace":%q},"data":{"a":"1"}}`, ns))
	for _, manager := range []string{"one", "two"} {
		patch := bytes.ReplaceAll(raw, []byte(`"1"`), []byte(`"`+manager+`"`))
		got, err := maps.Patch(ctx, "ssa", types.ApplyPatchType, patch, metav1.PatchOptions{FieldManager: manager})
		switch {
		case manager == "one" && (err != nil || len(got.ManagedFields) != 1):
			t.Errorf("server-side apply: %v, error %v", got, err)
		case manager == "two" && !apierrors.IsConflict(err):
			t.Errorf("another's field was taken: %v", err)
		}
	}
	if _, err := f.client.CoreV1().ConfigMaps("nowhere").Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "m"}}, metav1.CreateOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("created in no namespace: %v", err)
	}
	who, err := f.client.AuthenticationV1().SelfSubjectReviews().Create(ctx, selfReview(), metav1.CreateOptions{})
	if err != nil || !slices.Contains(who.Status.UserInfo.Groups, kube.GroupMasters) {
		t.Errorf("who am I: %v, error %v", who, err)
	}
}

// hookServer is a peer that reviews admissions.
type hookServer struct {
	url   string
	roots []byte
	calls atomic.Int32
	close func()
}

func newHookServer(t *testing.T, review func(*admissionreviewv1.AdmissionRequest) *admissionreviewv1.AdmissionResponse) *hookServer {
	h := &hookServer{}
	authority := kubetest.NewAuthority(t)
	cert, key := authority.Issue(func(c *x509.Certificate) {
		c.IPAddresses = []net.IP{netip.MustParseAddr("127.0.0.1").AsSlice()}
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	})
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.calls.Add(1)
		var in admissionreviewv1.AdmissionReview
		body, _ := io.ReadAll(r.Body)
		if err := json.Unmarshal(body, &in); err != nil {
			t.Error(err)
		}
		in.Response = review(in.Request)
		in.Response.UID, in.Request = in.Request.UID, nil
		_ = json.NewEncoder(w).Encode(in)
	}))
	s.TLS = &tls.Config{Certificates: []tls.Certificate{pair}}
	s.StartTLS()
	t.Cleanup(s.Close)
	h.url, h.roots, h.close = s.URL, authority.Roots(), s.Close
	return h
}

// create tries to create an object of a kind; names are used once.
func (f *fixture) create(ctx context.Context, kind, ns, name string) error {
	if kind == "configmaps" {
		_, err := f.client.CoreV1().ConfigMaps(ns).Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		return err
	}
	return kube.Create(ctx, f.store, &v1alpha1.Workload{ObjectMeta: kube.ObjectMeta{Namespace: ns, Name: name}, Spec: spec.Workload{Application: "bank", Image: "bank/web:1"}})
}

// eventually asks until the answer is yes: admission configuration takes
// effect a moment after it is stored.
func eventually(t *testing.T, what string, ask func(round int) error) {
	t.Helper()
	var err error
	for i, deadline := 0, time.Now().Add(15*time.Second); time.Now().Before(deadline); i++ {
		if err = ask(i); err == nil {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatalf("%s: %v", what, err)
}

// webhooks proves that a webhook written without selectors, policies and
// timeouts is called, for built-in kinds and custom resources, may refuse and
// change, and that nothing passes when its peer is down.
func (f *fixture) webhooks(t *testing.T) {
	none := admissionv1.SideEffectClassNone
	for kind, group := range map[string]string{"configmaps": "", "workloads": "hauberk.dev"} {
		t.Run(kind, func(t *testing.T) {
			ctx, ns := t.Context(), f.namespace(t)
			rules := []admissionv1.RuleWithOperations{{Operations: []admissionv1.OperationType{"CREATE"}, Rule: admissionv1.Rule{APIGroups: []string{group}, APIVersions: []string{"*"}, Resources: []string{kind}}}}
			peer := newHookServer(t, func(r *admissionreviewv1.AdmissionRequest) *admissionreviewv1.AdmissionResponse {
				if strings.HasPrefix(r.Name, "bad") && r.Namespace == ns {
					return &admissionreviewv1.AdmissionResponse{Result: &metav1.Status{Message: "no bad names"}}
				}
				return &admissionreviewv1.AdmissionResponse{Allowed: true}
			})
			hooks := f.client.AdmissionregistrationV1().ValidatingWebhookConfigurations()
			made, err := hooks.Create(ctx, &admissionv1.ValidatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: "deny-" + kind}, Webhooks: []admissionv1.ValidatingWebhook{{
				Name: "deny.hauberk.dev", Rules: rules, SideEffects: &none, AdmissionReviewVersions: []string{"v1"},
				ClientConfig: admissionv1.WebhookClientConfig{URL: &peer.url, CABundle: peer.roots},
			}}}, metav1.CreateOptions{})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = hooks.Delete(context.WithoutCancel(ctx), made.Name, metav1.DeleteOptions{}) }()
			w := made.Webhooks[0]
			if *w.FailurePolicy != admissionv1.Fail || *w.MatchPolicy != admissionv1.Equivalent || w.NamespaceSelector == nil || w.ObjectSelector == nil || *w.TimeoutSeconds != 10 || *w.Rules[0].Scope != admissionv1.AllScopes {
				t.Errorf("stored without defaults: %+v", w)
			}
			eventually(t, "the webhook refuses", func(i int) error {
				err := f.create(ctx, kind, ns, fmt.Sprintf("bad-%d", i))
				if err != nil && strings.Contains(err.Error(), "no bad names") {
					return nil
				}
				return fmt.Errorf("created, error %v", err)
			})
			if err := f.create(ctx, kind, ns, "good"); err != nil || peer.calls.Load() == 0 {
				t.Errorf("%d calls, a good name was refused: %v", peer.calls.Load(), err)
			}
			peer.close()
			if err := f.create(ctx, kind, ns, "good-too"); err == nil || !strings.Contains(err.Error(), "failed calling webhook") {
				t.Errorf("with the peer down: %v", err)
			}
		})
		t.Run("mutating "+kind, func(t *testing.T) {
			ctx, ns := t.Context(), f.namespace(t)
			rules := []admissionv1.RuleWithOperations{{Operations: []admissionv1.OperationType{"CREATE"}, Rule: admissionv1.Rule{APIGroups: []string{group}, APIVersions: []string{"*"}, Resources: []string{kind}}}}
			patch := admissionreviewv1.PatchTypeJSONPatch
			peer := newHookServer(t, func(r *admissionreviewv1.AdmissionRequest) *admissionreviewv1.AdmissionResponse {
				return &admissionreviewv1.AdmissionResponse{Allowed: true, PatchType: &patch, Patch: []byte(`[{"op":"add","path":"/metadata/labels","value":{"seen":"yes"}}]`)}
			})
			hooks := f.client.AdmissionregistrationV1().MutatingWebhookConfigurations()
			made, err := hooks.Create(ctx, &admissionv1.MutatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: "mark-" + kind}, Webhooks: []admissionv1.MutatingWebhook{{
				Name: "mark.hauberk.dev", Rules: rules, SideEffects: &none, AdmissionReviewVersions: []string{"v1"},
				ClientConfig: admissionv1.WebhookClientConfig{URL: &peer.url, CABundle: peer.roots},
			}}}, metav1.CreateOptions{})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = hooks.Delete(context.WithoutCancel(ctx), made.Name, metav1.DeleteOptions{}) }()
			w := made.Webhooks[0]
			if *w.FailurePolicy != admissionv1.Fail || w.NamespaceSelector == nil || w.ObjectSelector == nil || w.ReinvocationPolicy == nil || *w.ReinvocationPolicy != admissionv1.NeverReinvocationPolicy || *w.TimeoutSeconds != 10 {
				t.Errorf("stored without defaults: %+v", w)
			}
			eventually(t, "the webhook changes", func(i int) error {
				name := fmt.Sprintf("m-%d", i)
				if err := f.create(ctx, kind, ns, name); err != nil {
					return err
				}
				labels, err := f.labels(ctx, kind, ns, name)
				if err != nil || labels["seen"] != "yes" {
					return fmt.Errorf("labels %v, error %v", labels, err)
				}
				return nil
			})
			peer.close()
			if err := f.create(ctx, kind, ns, "late"); err == nil || !strings.Contains(err.Error(), "failed calling webhook") {
				t.Errorf("with the peer down: %v", err)
			}
		})
	}
	eventually(t, "without webhooks everything passes again", func(i int) error {
		return f.create(t.Context(), "configmaps", "default", fmt.Sprintf("free-%d", i))
	})
}

func (f *fixture) labels(ctx context.Context, kind, ns, name string) (map[string]string, error) {
	if kind == "configmaps" {
		m, err := f.client.CoreV1().ConfigMaps(ns).Get(ctx, name, metav1.GetOptions{})
		return m.GetLabels(), err
	}
	w, err := kube.Get[v1alpha1.Workload](ctx, f.store, ns, name)
	if err != nil {
		return nil, err
	}
	return w.Labels, nil
}

// policies proves that an admission policy and its binding, written with only
// what they must have, refuse what they should and nothing else.
func (f *fixture) policies(t *testing.T) {
	ctx, ns := t.Context(), f.namespace(t)
	rules := []admissionv1.NamedRuleWithOperations{{RuleWithOperations: admissionv1.RuleWithOperations{Operations: []admissionv1.OperationType{"CREATE"}, Rule: admissionv1.Rule{APIGroups: []string{"hauberk.dev"}, APIVersions: []string{"*"}, Resources: []string{"workloads"}}}}}
	api := f.client.AdmissionregistrationV1()
	_, err := api.ValidatingAdmissionPolicies().Create(ctx, &admissionv1.ValidatingAdmissionPolicy{ObjectMeta: metav1.ObjectMeta{Name: "no-bad"}, Spec: admissionv1.ValidatingAdmissionPolicySpec{
		MatchConstraints: &admissionv1.MatchResources{ResourceRules: rules},
		Validations:      []admissionv1.Validation{{Expression: "!object.metadata.name.startsWith('bad')", Message: "bad names are not for workloads"}},
	}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = api.ValidatingAdmissionPolicyBindings().Create(ctx, &admissionv1.ValidatingAdmissionPolicyBinding{ObjectMeta: metav1.ObjectMeta{Name: "no-bad"}, Spec: admissionv1.ValidatingAdmissionPolicyBindingSpec{
		PolicyName: "no-bad", ValidationActions: []admissionv1.ValidationAction{admissionv1.Deny}, MatchResources: &admissionv1.MatchResources{},
	}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = api.MutatingAdmissionPolicies().Create(ctx, &admissionv1.MutatingAdmissionPolicy{ObjectMeta: metav1.ObjectMeta{Name: "mark"}, Spec: admissionv1.MutatingAdmissionPolicySpec{
		MatchConstraints: &admissionv1.MatchResources{ResourceRules: rules},
		Mutations:        []admissionv1.Mutation{{PatchType: admissionv1.PatchTypeApplyConfiguration, ApplyConfiguration: &admissionv1.ApplyConfiguration{Expression: `Object{metadata: Object.metadata{labels: {"policy": "seen"}}}`}}},
	}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = api.MutatingAdmissionPolicyBindings().Create(ctx, &admissionv1.MutatingAdmissionPolicyBinding{ObjectMeta: metav1.ObjectMeta{Name: "mark"}, Spec: admissionv1.MutatingAdmissionPolicyBindingSpec{PolicyName: "mark"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the policy refuses", func(i int) error {
		err := f.create(ctx, "workloads", ns, fmt.Sprintf("bad-%d", i))
		if err != nil && strings.Contains(err.Error(), "bad names are not for workloads") {
			return nil
		}
		return fmt.Errorf("created, error %v", err)
	})
	eventually(t, "the policy changes", func(i int) error {
		name := fmt.Sprintf("good-%d", i)
		if err := f.create(ctx, "workloads", ns, name); err != nil {
			return err
		}
		if l, err := f.labels(ctx, "workloads", ns, name); err != nil || l["policy"] != "seen" {
			return fmt.Errorf("labels %v, error %v", l, err)
		}
		return nil
	})
	for _, err := range []error{
		api.ValidatingAdmissionPolicyBindings().Delete(ctx, "no-bad", metav1.DeleteOptions{}), api.ValidatingAdmissionPolicies().Delete(ctx, "no-bad", metav1.DeleteOptions{}),
		api.MutatingAdmissionPolicyBindings().Delete(ctx, "mark", metav1.DeleteOptions{}), api.MutatingAdmissionPolicies().Delete(ctx, "mark", metav1.DeleteOptions{}),
	} {
		if err != nil {
			t.Error(err)
		}
	}
}

// admissionFaults proves that configuration which would refuse nothing is
// itself refused.
func (f *fixture) admissionFaults(t *testing.T) {
	head := "apiVersion: admissionregistration.k8s.io/v1\nmetadata: {name: faulty}\nkind: "
	rules := `rules: [{operations: [CREATE], apiGroups: [""], apiVersions: [v1], resources: [secrets]}]`
	rest := `sideEffects: None, admissionReviewVersions: [v1], clientConfig: {url: "https://127.0.0.1:1/"}`
	for name, test := range map[string]struct{ manifest, want string }{
		"service":           {head + "ValidatingWebhookConfiguration\nwebhooks: [{name: a.b.c, " + rules + `, sideEffects: None, admissionReviewVersions: [v1], clientConfig: {service: {namespace: a, name: b}}}]`, "this server has no services"},
		"plain http":        {head + "ValidatingWebhookConfiguration\nwebhooks: [{name: a.b.c, " + rules + `, sideEffects: None, admissionReviewVersions: [v1], clientConfig: {url: "http://127.0.0.1:1/"}}]`, "https"},
		"no operation":      {head + "MutatingWebhookConfiguration\nwebhooks: [{name: a.b.c, " + rest + `, rules: [{apiGroups: [""], apiVersions: [v1], resources: [secrets]}]}]`, "operations"},
		"unknown operation": {head + "MutatingWebhookConfiguration\nwebhooks: [{name: a.b.c, " + rest + `, rules: [{operations: [Create], apiGroups: [""], apiVersions: [v1], resources: [secrets]}]}]`, `"Create"`},
		"short name":        {head + "MutatingWebhookConfiguration\nwebhooks: [{name: a, " + rest + ", " + rules + "}]", "webhooks[0].name"},
		"name twice":        {head + "ValidatingWebhookConfiguration\nwebhooks: [{name: a.b.c, " + rest + ", " + rules + "}, {name: a.b.c, " + rest + ", " + rules + "}]", "webhooks"},
		"slow":              {head + "ValidatingWebhookConfiguration\nwebhooks: [{name: a.b.c, timeoutSeconds: 60, " + rest + ", " + rules + "}]", "between 1 and 30"},
		"no constraints":    {head + "ValidatingAdmissionPolicy\nspec: {validations: [{expression: 'true'}]}", "matchConstraints"},
		"no validation":     {head + "ValidatingAdmissionPolicy\nspec: {matchConstraints: {resourceRules: [{operations: [CREATE], apiGroups: [\"\"], apiVersions: [v1], resources: [secrets]}]}}", "refuses nothing"},
		"no action":         {head + "ValidatingAdmissionPolicyBinding\nspec: {policyName: p}", "refuses nothing"},
		"no mutation":       {head + "MutatingAdmissionPolicy\nspec: {matchConstraints: {resourceRules: [{operations: [CREATE], apiGroups: [\"\"], apiVersions: [v1], resources: [secrets]}]}}", "changes nothing"},
		"no policy":         {head + "MutatingAdmissionPolicyBinding\nspec: {}", "policyName"},
		"unknown field":     {head + "ValidatingWebhookConfiguration\nwebhooks: [{name: a.b.c, failPolicy: Fail, " + rest + ", " + rules + "}]", "failPolicy"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := f.store.Apply(t.Context(), []byte(test.manifest)); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("want %q, got: %v", test.want, err)
			}
		})
	}
}

func (f *fixture) namespaceDeletion(t *testing.T) {
	ctx, ns := t.Context(), f.namespace(t)
	for i := range 5 {
		for _, kind := range []string{"configmaps", "workloads"} {
			if err := f.create(ctx, kind, ns, fmt.Sprintf("o%d", i)); err != nil {
				t.Fatal(err)
			}
		}
	}
	// One object holds on to its finalizer: the namespace must wait for it.
	held, err := f.client.CoreV1().ConfigMaps(ns).Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "held", Finalizers: []string{"hauberk.dev/test"}}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.client.CoreV1().Namespaces().Delete(ctx, ns, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "only the held object is left", func(int) error {
		list, err := f.client.CoreV1().ConfigMaps(ns).List(ctx, metav1.ListOptions{})
		if err != nil || len(list.Items) != 1 {
			return fmt.Errorf("%d left, error %v", len(list.Items), err)
		}
		return nil
	})
	if err := f.create(ctx, "configmaps", ns, "late"); !apierrors.IsForbidden(err) {
		t.Errorf("created in a namespace that is being deleted: %v", err)
	}
	got, err := f.client.CoreV1().Namespaces().Get(ctx, ns, metav1.GetOptions{})
	if err != nil || got.Status.Phase != corev1.NamespaceTerminating {
		t.Fatalf("gone before it is empty: %v, error %v", got.Status, err)
	}
	if _, err := f.client.CoreV1().ConfigMaps(ns).Patch(ctx, held.Name, types.MergePatchType, []byte(`{"metadata":{"finalizers":null}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the namespace is gone", func(int) error {
		_, err := f.client.CoreV1().Namespaces().Get(ctx, ns, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("still there, error %v", err)
	})
	// A new one of the same name starts empty.
	if err := f.store.EnsureNamespace(ctx, ns); err != nil {
		t.Fatal(err)
	}
	list, err := kube.List[v1alpha1.Workload](ctx, f.store, ns)
	if err != nil || len(list) != 0 {
		t.Errorf("the new namespace has %d workloads, error %v", len(list), err)
	}
	for _, name := range []string{"default", "kube-system"} {
		if err := f.client.CoreV1().Namespaces().Delete(ctx, name, metav1.DeleteOptions{}); !apierrors.IsForbidden(err) {
			t.Errorf("namespace %s may be deleted: %v", name, err)
		}
	}
}

// foreground proves that no deletion hangs for want of a garbage collector.
func (f *fixture) foreground(t *testing.T) {
	ctx, ns := t.Context(), f.namespace(t)
	for i, policy := range []metav1.DeletionPropagation{metav1.DeletePropagationForeground, metav1.DeletePropagationOrphan, metav1.DeletePropagationBackground} {
		name := fmt.Sprintf("o%d", i)
		for _, kind := range []string{"configmaps", "workloads"} {
			if err := f.create(ctx, kind, ns, name); err != nil {
				t.Fatal(err)
			}
		}
		if err := f.client.CoreV1().ConfigMaps(ns).Delete(ctx, name, metav1.DeleteOptions{PropagationPolicy: &policy}); err != nil {
			t.Error(err)
		}
		path := fmt.Sprintf("/apis/hauberk.dev/v1alpha1/namespaces/%s/workloads/%s", ns, name)
		if err := f.client.Discovery().RESTClient().Delete().AbsPath(path).Param("propagationPolicy", string(policy)).Do(ctx).Error(); err != nil {
			t.Error(err)
		}
		if _, err := f.client.CoreV1().ConfigMaps(ns).Get(ctx, name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			t.Errorf("%s left the map: %v", policy, err)
		}
		if err := f.client.Discovery().RESTClient().Get().AbsPath(path).Do(ctx).Error(); !apierrors.IsNotFound(err) {
			t.Errorf("%s left the workload: %v", policy, err)
		}
	}
}

func (f *fixture) events(t *testing.T) {
	ctx, ns := t.Context(), f.namespace(t)
	if err := f.create(ctx, "workloads", ns, "web"); err != nil {
		t.Fatal(err)
	}
	w, err := kube.Get[v1alpha1.Workload](ctx, f.store, ns, "web")
	if err != nil {
		t.Fatal(err)
	}
	if err := f.store.Record(ctx, w, true, "Refused", "no release of bank/web:1"); err != nil {
		t.Fatal(err)
	}
	core, err := f.client.CoreV1().Events(ns).List(ctx, metav1.ListOptions{FieldSelector: "involvedObject.name=web,involvedObject.kind=Workload,involvedObject.uid=" + string(w.UID)})
	if err != nil || len(core.Items) != 1 || core.Items[0].Message != "no release of bank/web:1" || core.Items[0].Type != "Warning" {
		t.Fatalf("events of the workload: %v, error %v", core, err)
	}
	other, err := f.client.EventsV1().Events(ns).List(ctx, metav1.ListOptions{FieldSelector: "regarding.name=web"})
	if err != nil || len(other.Items) != 1 || other.Items[0].Note != core.Items[0].Message || other.Items[0].Regarding.UID != w.UID || other.Items[0].UID != core.Items[0].UID {
		t.Errorf("the same event in the other version: %v, error %v", other, err)
	}
	none, err := f.client.CoreV1().Events(ns).List(ctx, metav1.ListOptions{FieldSelector: "involvedObject.name=db"})
	if err != nil || len(none.Items) != 0 {
		t.Errorf("events of another: %v, error %v", none, err)
	}
	if _, err := f.client.CoreV1().Events(ns).List(ctx, metav1.ListOptions{FieldSelector: "color=red"}); err == nil {
		t.Error("selected by a field that is none")
	}
}

func selfReview() *authenticationv1.SelfSubjectReview { return &authenticationv1.SelfSubjectReview{} }
