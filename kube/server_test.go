package kube_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"hauberk.dev/kube"
	"hauberk.dev/kube/kubetest"
)

// caller is an HTTP client with an account.
func caller(t *testing.T, a kube.Access) *http.Client {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(a.Roots)
	config := &tls.Config{RootCAs: roots}
	if a.Certificate != nil {
		pair, err := tls.X509KeyPair(a.Certificate, a.Key)
		if err != nil {
			t.Fatal(err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 10 * time.Second}
}

func get(t *testing.T, a kube.Access, path string) (int, string) {
	t.Helper()
	resp, err := caller(t, a).Get(a.Server + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func TestMain(m *testing.M) {
	kube.SetLog(nil)
	os.Exit(m.Run())
}

// TestEmbedded runs the suite against the server of embedded mode.
func TestEmbedded(t *testing.T) {
	start := time.Now()
	api := kubetest.Start(t)
	t.Logf("ready after %v", time.Since(start))
	suite(t, api.Admin())
}

// TestAccess proves who gets in, and how far.
func TestAccess(t *testing.T) {
	api := kubetest.Start(t)
	foreign := kubetest.NewAuthority(t)
	anonymous := kube.Access{Server: api.URL, Roots: api.Authority.Roots()}
	issued := func(by *kubetest.Authority, change func(*x509.Certificate)) kube.Access {
		a := anonymous
		a.Certificate, a.Key = by.Issue(change)
		return a
	}
	masters := pkix.Name{CommonName: "eve", Organization: []string{kube.GroupMasters}}
	accounts := map[string]kube.Access{
		"anonymous": anonymous,
		"foreign":   issued(foreign, func(c *x509.Certificate) { c.Subject = masters }),
		"expired": issued(api.Authority, func(c *x509.Certificate) {
			c.Subject, c.NotAfter = masters, time.Now().Add(-time.Minute)
		}),
		"server": issued(api.Authority, func(c *x509.Certificate) {
			c.Subject, c.ExtKeyUsage = masters, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}),
		"workload": issued(api.Authority, func(c *x509.Certificate) {
			c.Subject, c.URIs = masters, []*url.URL{{Scheme: "spiffe", Host: "hauberk.local", Path: "/ns/bank/sa/web"}}
		}),
		"node": issued(api.Authority, func(c *x509.Certificate) {
			c.Subject, c.URIs = masters, []*url.URL{{Scheme: "spiffe", Host: "hauberk.local", Path: "/hauberk/node/n1"}}
		}),
		"nameless": issued(api.Authority, func(c *x509.Certificate) { c.Subject = pkix.Name{Organization: masters.Organization} }),
		"stranger": api.Account("stranger"),
		"viewer":   api.Account("ann", kube.GroupViewer),
		"admin":    api.Admin(),
	}
	const workloads = "/apis/hauberk.dev/v1alpha1/workloads"
	tests := []struct {
		account, path string
		code          int
		message       string
	}{
		{"anonymous", workloads, 401, ""},
		{"anonymous", "/readyz", 401, ""},
		{"anonymous", "/version", 401, ""},
		{"anonymous", "/openapi/v3", 401, ""},
		{"anonymous", "/apis", 401, ""},
		{"foreign", workloads, 401, ""},
		{"expired", workloads, 401, ""},
		{"server", workloads, 401, ""},
		{"workload", workloads, 401, ""},
		{"node", workloads, 401, ""},
		{"nameless", workloads, 401, ""},
		{"stranger", workloads, 403, `account \"stranger\" is in no group`},
		{"stranger", "/version", 200, "v1.37"},
		{"stranger", "/apis", 200, "hauberk.dev/v1alpha1"},
		{"stranger", "/metrics", 403, "open to group system:masters only"},
		{"stranger", "/", 403, ""},
		{"viewer", workloads, 200, "WorkloadList"},
		{"viewer", "/api/v1/configmaps", 200, "ConfigMapList"},
		{"viewer", "/api/v1/secrets", 403, "everything but secrets"},
		{"viewer", "/api/v1/namespaces/default/secrets/s", 403, "everything but secrets"},
		{"viewer", "/metrics", 403, ""},
		{"admin", workloads, 200, "WorkloadList"},
		{"admin", "/api/v1/secrets", 200, "SecretList"},
		{"admin", "/readyz", 200, "ok"},
	}
	for _, test := range tests {
		code, body := get(t, accounts[test.account], test.path)
		if code != test.code || !strings.Contains(body, test.message) {
			t.Errorf("%s reads %s: %d %.300s, want %d %q", test.account, test.path, code, body, test.code, test.message)
		}
	}
	resp, err := caller(t, accounts["viewer"]).Post(api.URL+"/api/v1/namespaces/default/configmaps", "application/json", strings.NewReader(`{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"m"}}`))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, _ := io.ReadAll(resp.Body); resp.StatusCode != 403 || !strings.Contains(string(body), "only reads") {
		t.Errorf("viewer writes: %d %s", resp.StatusCode, body)
	}
	if code := impersonate(t, accounts["viewer"]); code != 403 {
		t.Errorf("viewer acts as another: %d", code)
	}
	old := caller(t, accounts["admin"])
	old.Transport.(*http.Transport).TLSClientConfig.MaxVersion = tls.VersionTLS12
	if _, err := old.Get(api.URL + "/version"); err == nil {
		t.Error("spoke TLS 1.2")
	}
}

func impersonate(t *testing.T, a kube.Access) int {
	r, err := http.NewRequest(http.MethodGet, a.Server+"/api/v1/secrets", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Impersonate-User", "root")
	r.Header.Set("Impersonate-Group", kube.GroupMasters)
	resp, err := caller(t, a).Do(r)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode
}

// TestOpenRefusals proves that a server that cannot work does not start, says
// why, and what to do.
func TestOpenRefusals(t *testing.T) {
	api := kubetest.Start(t)
	host := strings.TrimPrefix(api.URL, "https://")
	good := api.Options
	good.Dir = filepath.Join(t.TempDir(), "d")
	tests := map[string]struct {
		change func(*kube.Options)
		want   []string
	}{
		"occupied port":    {func(o *kube.Options) { o.Address = host }, []string{host, "another program uses this address", "choose another port"}},
		"outside address":  {func(o *kube.Options) { o.Address = "0.0.0.0:0" }, []string{"0.0.0.0:0", "loopback"}},
		"no port":          {func(o *kube.Options) { o.Address = "127.0.0.1" }, []string{"127.0.0.1", "host:port"}},
		"no folder":        {func(o *kube.Options) { o.Dir = "" }, []string{"name a folder"}},
		"long folder":      {func(o *kube.Options) { o.Dir = "/tmp/" + strings.Repeat("long", 30) }, []string{"sockets", "shorter folder"}},
		"folder is a file": {func(o *kube.Options) { o.Dir = "/dev/null/x" }, []string{"/dev/null"}},
		"no certificate":   {func(o *kube.Options) { o.Certificate = nil }, []string{"certificate"}},
		"foreign key":      {func(o *kube.Options) { _, o.Key = api.Authority.Issue(func(*x509.Certificate) {}) }, []string{"private key"}},
		"no client roots":  {func(o *kube.Options) { o.ClientRoots = nil }, []string{"client roots", "nobody could ever log in"}},
		"broken roots": {func(o *kube.Options) {
			o.ClientRoots = []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
		}, []string{"client roots", "certificate 1"}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			o := good
			test.change(&o)
			s, err := kube.Open(o)
			if err == nil {
				_ = s.Close()
				t.Fatal("opened")
			}
			for _, part := range test.want {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("message does not say %q: %v", part, err)
				}
			}
		})
	}
	t.Run("folder in use", func(t *testing.T) {
		o := api.Options
		s, err := kube.Open(o)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "another API server uses it") {
			t.Errorf("ran in a folder that is in use: %v", err)
		}
	})
	t.Run("modes", func(t *testing.T) {
		err := filepath.WalkDir(api.Options.Dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			info, err := d.Info()
			if err != nil {
				return err
			}
			// What is inside the folder is behind its own mode.
			if d.IsDir() && info.Mode().Perm()&0o077 != 0 || path == api.Options.Dir && info.Mode().Perm() != 0o700 {
				t.Errorf("%s has mode %v", path, info.Mode())
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	})
}

// TestKubeconfig proves that the written file opens the API, and only to its
// owner.
func TestKubeconfig(t *testing.T) {
	api := kubetest.Start(t)
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if err := kube.WriteKubeconfig(path, api.Admin()); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, error %v", info.Mode(), err)
	}
	if _, err := kube.Connect(t.Context(), kube.Access{Kubeconfig: path}); err != nil {
		t.Error(err)
	}
	if _, err := kube.Connect(t.Context(), api.Account("stranger")); err == nil || !strings.Contains(err.Error(), "in no group") {
		t.Errorf("connected without rights: %v", err)
	}
	gone := api.Admin()
	api.Stop()
	if _, err := kube.Connect(t.Context(), gone); err == nil || !strings.Contains(err.Error(), api.URL) {
		t.Errorf("connected to nothing: %v", err)
	}
}

// TestRestart proves that what a client was told is stored survives the
// hardest end of the server: kill -9 while it writes.
func TestRestart(t *testing.T) {
	if raw := os.Getenv("KUBE_TEST_SERVER"); raw != "" {
		serveChild(t, raw)
		return
	}
	api := kubetest.Start(t)
	api.Stop() // the folder has a first life already
	raw, err := json.Marshal(api.Options)
	if err != nil {
		t.Fatal(err)
	}
	stored := map[string]bool{}
	for round := range 2 {
		child := exec.Command(os.Args[0], "-test.run=^TestRestart$")
		child.Env = append(os.Environ(), "KUBE_TEST_SERVER="+string(raw))
		child.Stderr = os.Stderr
		out, err := child.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		line, err := bufio.NewReader(out).ReadString('\n')
		if err != nil {
			t.Fatalf("the server did not start: %v", err)
		}
		api.URL = strings.TrimSpace(line)
		client := caller(t, api.Admin())
		kill := time.AfterFunc(time.Duration(300+400*round)*time.Millisecond, func() { _ = child.Process.Kill() })
		for i := 0; ; i++ {
			name := fmt.Sprintf("m-%d-%d", round, i)
			resp, err := client.Post(api.URL+"/api/v1/namespaces/default/configmaps", "application/json", strings.NewReader(`{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"`+name+`"}}`))
			if err != nil {
				break // it is dead
			}
			resp.Body.Close()
			if resp.StatusCode != http.StatusCreated {
				t.Fatalf("create %s: %d", name, resp.StatusCode)
			}
			stored[name] = true
		}
		kill.Stop()
		_ = child.Wait()
	}
	if len(stored) < 10 {
		t.Fatalf("only %d objects were stored before the ends", len(stored))
	}
	api.Run()
	_, body := get(t, api.Admin(), "/api/v1/namespaces/default/configmaps")
	for name := range stored {
		if !strings.Contains(body, `"name":"`+name+`"`) {
			t.Errorf("%s was stored and is gone", name)
		}
	}
	t.Logf("%d objects survived two ends by kill -9", len(stored))
}

// serveChild is the server that TestRestart kills.
func serveChild(t *testing.T, raw string) {
	var o kube.Options
	if err := json.Unmarshal([]byte(raw), &o); err != nil {
		t.Fatal(err)
	}
	s, err := kube.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		<-s.Ready()
		fmt.Println(s.URL())
	}()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := s.Run(ctx); err != nil {
		t.Fatal(err)
	}
}

// TestShutdown proves that a server ends soon, even with a watcher connected,
// and leaves nothing running that would add up.
func TestShutdown(t *testing.T) {
	left := func() int {
		api := kubetest.Start(t)
		client := caller(t, api.Admin())
		client.Timeout = 0
		resp, err := client.Get(api.URL + "/api/v1/namespaces?watch=true")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		start := time.Now()
		api.Stop()
		if took := time.Since(start); took > 10*time.Second {
			t.Errorf("it took %v to end", took)
		}
		client.CloseIdleConnections()
		return runtime.NumGoroutine()
	}
	first := left() // what the libraries start once per process stays
	for deadline := time.Now().Add(20 * time.Second); ; {
		now := left()
		if now <= first+5 {
			return
		}
		if time.Now().After(deadline) {
			stacks := make([]byte, 1<<20)
			t.Fatalf("%d goroutines, after the first server %d:\n%s", now, first, stacks[:runtime.Stack(stacks, true)])
		}
		first = min(first, now)
	}
}

// TestFullDisk proves that a server without room for its objects says so.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a small disk takes root to mount")
	}
	dir, err := os.MkdirTemp("", "full")
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size=16m"); err != nil {
		t.Skipf("this machine mounts no tmpfs: %v", err)
	}
	defer func() {
		if err := errors.Join(syscall.Unmount(dir, 0), os.Remove(dir)); err != nil {
			t.Error(err)
		}
	}()
	api := kubetest.Start(t)
	o := api.Options
	o.Dir = filepath.Join(dir, "kube")
	s, err := kube.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	err = s.Run(t.Context())
	if !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "make room") {
		t.Errorf("ran on a full disk: %v", err)
	}
}

// TestDocuments proves what clients read to find their way.
func TestDocuments(t *testing.T) {
	api := kubetest.Start(t)
	admin := api.Admin()
	for path, wants := range map[string][]string{
		"/version":                              {`"major":"1"`, `"minor":"37"`, `"gitVersion":"v1.37`},
		"/apis":                                 {`"APIGroupList"`, `"hauberk.dev/v1alpha1"`, `"coordination.k8s.io/v1"`, `"apiextensions.k8s.io/v1"`},
		"/api/v1":                               {`"shortNames":["ns"]`, `"shortNames":["cm"]`},
		"/openapi/v3":                           {`"apis/hauberk.dev/v1alpha1"`, `"api/v1"`, `"apis/apiextensions.k8s.io/v1"`},
		"/openapi/v3/":                          {`"apis/hauberk.dev/v1alpha1"`},
		"/openapi/v3/apis/hauberk.dev/v1alpha1": {`Publish opens the port`, `dev.hauberk.v1alpha1.Workload`},
		"/openapi/v3/apis/admissionregistration.k8s.io/v1":                {`ValidatingAdmissionPolicy`},
		"/apis/hauberk.dev/v1alpha1":                                      {`"shortNames":["wl"]`, `"categories":["hauberk"]`, `"workloads/status"`},
		"/openapi/v2":                                                     {`io.k8s.api.core.v1.ConfigMap`},
		"/apis/hauberk.dev/v1alpha1/namespaces/default/workloads/nowhere": {`workloads.hauberk.dev \"nowhere\" not found`},
	} {
		_, body := get(t, admin, path)
		for _, want := range wants {
			if !strings.Contains(body, want) {
				t.Errorf("%s does not say %s: %.200s", path, want, body)
			}
		}
	}
}

// TestKubectl proves that the real client finds its way.
func TestKubectl(t *testing.T) {
	kubectl := kubetest.Kubectl(t)
	api := kubetest.Start(t)
	dir := t.TempDir()
	config, viewer := filepath.Join(dir, "admin"), filepath.Join(dir, "viewer")
	if err := errors.Join(kube.WriteKubeconfig(config, api.Admin()), kube.WriteKubeconfig(viewer, api.Account("ann", kube.GroupViewer))); err != nil {
		t.Fatal(err)
	}
	run := func(stdin string, args ...string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		c := exec.CommandContext(ctx, kubectl, args...)
		c.Stdin = strings.NewReader(stdin)
		c.Env = append(os.Environ(), "KUBECONFIG="+config, "HOME="+dir)
		out, err := c.CombinedOutput()
		return string(out), err
	}
	workload := doc("Workload", "bank", "web", `{application: bank, image: "bank/web:1", ports: [{port: 8080, protocol: http}]}`)
	incident := doc("Incident", "bank", "inc-1", `{instance: web-1, workload: web, application: bank, node: node1, identity: "spiffe://hauberk.local/ns/bank/sa/web", cause: guard, rule: exec.origin, observed: "2026-01-01T00:00:00Z"}`)
	steps := []struct {
		name, stdin, args string
		fails             bool
		want              []string
	}{
		{"version", "", "version", false, []string{"Client Version: v1.37.2", "Server Version: v1.37.2+hauberk.dev"}},
		{"explain", "", "explain workload.spec", false, []string{"GROUP:      hauberk.dev", "application\t<string> -required-", "repository with tag or digest", "guardPolicies"}},
		{"explain deep", "", "explain guardpolicy.spec.exec.origin", false, []string{"ENUM:", "unchanged files"}},
		{"explain built-in", "", "explain configmap.data", false, []string{"VERSION:    v1"}},
		{"create namespace", "", "create namespace bank", false, []string{"namespace/bank created"}},
		{"apply", workload, "apply -f -", false, []string{"workload.hauberk.dev/web created"}},
		{"apply again", workload, "apply -f -", false, []string{"workload.hauberk.dev/web unchanged"}},
		{"server-side", workload, "apply --server-side --force-conflicts -f -", false, []string{"serverside-applied"}},
		{"server-side built-in", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c, namespace: bank}\ndata: {a: b}\n", "apply --server-side -f -", false, []string{"configmap/c serverside-applied"}},
		{"columns", "", "get wl -n bank", false, []string{"NAME", "APPLICATION", "READY", "WANTED", "IMAGE", "bank/web:1"}},
		{"category", "", "get hauberk -A", false, []string{"workload.hauberk.dev/web"}},
		{"incident", incident, "create -f -", false, []string{"incident.hauberk.dev/inc-1 created"}},
		{"incidents", "", "get incidents -n bank", false, []string{"CAUSE", "RULE", "STATE", "inc-1", "guard", "exec.origin"}},
		{"describe", "", "describe workload web -n bank", false, []string{"Kind:         Workload", "bank/web:1", "Events:"}},
		{"short names", "", "get ns,cm,sa,ev -n bank", false, []string{"namespace/bank", "Active", "configmap/c"}},
		{"unknown field", strings.Replace(workload, "image:", "imagge:", 1), "apply -f -", true, []string{"strict decoding error", `unknown field "spec.imagge"`}},
		{"bad value", strings.Replace(workload, "8080", "80800", 1), "apply -f -", true, []string{"spec.ports[0].port", "80800", "65535"}},
		{"missing namespace", strings.Replace(workload, "bank, name", "nowhere, name", 1), "apply -f -", true, []string{`namespaces "nowhere" not found`}},
		{"no pods", "", "get pods", true, []string{`doesn't have a resource type "pods"`}},
		{"who", "", "auth whoami", false, []string{"admin", "system:masters"}},
		{"can", "", "auth can-i delete workloads.hauberk.dev", false, []string{"yes"}},
		{"viewer can", "", "--kubeconfig " + viewer + " auth can-i list workloads.hauberk.dev", false, []string{"yes"}},
		{"viewer cannot", "", "--kubeconfig " + viewer + " auth can-i delete workloads.hauberk.dev", true, []string{"no", "only reads"}},
		{"viewer list", "", "--kubeconfig " + viewer + " auth can-i --list", false, []string{"*.hauberk.dev"}},
		{"viewer reads", "", "--kubeconfig " + viewer + " get wl -n bank", false, []string{"bank/web:1"}},
		{"viewer writes", "", "--kubeconfig " + viewer + " delete wl web -n bank --timeout=10s", true, []string{"Forbidden", "only reads"}},
		{"foreground", "", "delete wl web -n bank --cascade=foreground --timeout=10s", false, []string{`"web" deleted`}},
		{"delete namespace", "", "delete namespace bank --timeout=20s", false, []string{`namespace "bank" deleted`}},
		{"gone", "", "get incidents -A", false, []string{"No resources found"}},
		{"api-resources", "", "api-resources --api-group=hauberk.dev", false, []string{"accesspolicies", "applications", "guardpolicies", "incidents", "instances", "releasepolicies", "workloads"}},
	}
	for _, step := range steps {
		out, err := run(step.stdin, strings.Fields(step.args)...)
		if (err != nil) != step.fails {
			t.Errorf("%s: kubectl %s: %v\n%s", step.name, step.args, err, out)
			continue
		}
		for _, want := range step.want {
			if !strings.Contains(out, want) {
				t.Errorf("%s: kubectl %s does not say %q:\n%s", step.name, step.args, want, out)
			}
		}
	}
}
