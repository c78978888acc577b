package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	api "hauberk.dev/api/mesh"
	wire "hauberk.dev/api/node"
	"hauberk.dev/mesh"
	"hauberk.dev/mesh/inspect"
	"hauberk.dev/mesh/link"
	"hauberk.dev/plan"
)

// proxyEnv makes the test's program a proxy at that socket, until its input ends.
const proxyEnv = "HAUBERK_TEST_PROXY_AT"

func TestMain(m *testing.M) {
	if path := os.Getenv(proxyEnv); path != "" {
		if err := proxyMain(path); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func proxyMain(path string) error {
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	return mesh.New(mesh.Options{}).Run(ctx, ln)
}

// startProxy starts a proxy of its own; kill is kill -9.
func startProxy(t *testing.T, path string) (kill func()) {
	t.Helper()
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	c := exec.Command(os.Args[0])
	c.Env, c.Stderr = append(os.Environ(), proxyEnv+"="+path), os.Stderr
	in, err := c.StdinPipe()
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	kill = func() {
		once.Do(func() {
			c.Process.Kill()
			c.Wait()
			in.Close()
		})
	}
	t.Cleanup(kill)
	return kill
}

// until waits for a condition, for as long as the slowest machine needs.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("never " + what)
		}
	}
}

var learntSince = time.Date(2026, 11, 2, 3, 4, 5, 6, time.UTC)

// taught is a schema of that many requests.
func taught(t testing.TB, times int) []byte {
	t.Helper()
	s := inspect.New(inspect.Config{})
	s.Begin(learntSince)
	c := s.Caller(inspect.CallerKey{Identity: "spiffe://test.local/ns/bank/sa/web"}, 0)
	var q inspect.Query
	for range times {
		q.Begin(s, 80, 0)
		inspect.Target(&q, "GET", "/accounts")
		q.Judge(c)
	}
	b, err := s.Export()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// looking is a plan in which requests to some workloads are looked at.
func looking(generation uint64, names ...string) plan.Mesh {
	p := plan.Mesh{Generation: generation, TrustDomain: "test.local"}
	for _, name := range names {
		p.Services = append(p.Services, plan.Service{Name: name, Namespace: "bank", Identity: "spiffe://test.local/ns/bank/sa/" + name, Inspect: &plan.Inspect{Observe: 1}})
	}
	return p
}

// lines is a log.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) has(s string) bool { return l.count(s) > 0 }

func (l *lines) count(s string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), s)
}

// meshNode is a node as far as its mesh goes.
type meshNode struct {
	*Node
	log   *lines
	stop  context.CancelFunc
	ended chan error
}

func startNode(t *testing.T, state, path string) *meshNode {
	t.Helper()
	n := &meshNode{log: &lines{}, ended: make(chan error, 1)}
	n.Node = &Node{conf: Config{State: state, MeshLink: path, Gateway: "127.0.0.1:0"}, slog: slog.New(slog.NewTextHandler(n.log, nil)),
		actors: map[string]*actor{}, reports: make(chan wire.Report, 16)}
	n.mesh = newMeshPart(n.Node)
	n.mesh.normals.every = 5 * time.Millisecond
	ctx, stop := context.WithCancel(t.Context())
	n.stop = sync.OnceFunc(func() {
		stop()
		if err := <-n.ended; err != nil {
			t.Error(err)
		}
	})
	go func() { n.ended <- n.mesh.run(ctx) }()
	t.Cleanup(n.stop)
	return n
}

// knows is what the proxy says of a workload.
func (n *meshNode) knows(service string) (a api.Analysis) {
	n.mesh.mu.Lock()
	l := n.mesh.link
	n.mesh.mu.Unlock()
	if l == nil {
		return a
	}
	s, err := l.Stats(context.Background())
	if err != nil {
		return a
	}
	return s.Analysis[service]
}

// What a proxy has learnt is kept by the node, outlives the proxy and the node, and
// ends with the workload.
func TestNormalsOutliveEverybody(t *testing.T) {
	dir := t.TempDir()
	path, state := filepath.Join(dir, "mesh.sock"), filepath.Join(dir, "state")
	kill := startProxy(t, path)
	// It learns from somebody else, in place of traffic.
	var l *link.Link
	until(t, "a link", func() bool {
		var err error
		l, err = link.Dial(t.Context(), path, link.Handlers{Sign: func(context.Context, string, []byte) ([][]byte, []byte, error) { return nil, nil, nil },
			Sockets: func(string, int) ([]*os.File, error) { return nil, nil }, Event: func(api.Event) {}})
		return err == nil
	})
	if err := errors.Join(l.Relearn(t.Context(), "bank/api", taught(t, 50)), l.SetPlan(t.Context(), looking(1, "api", "web")), l.Close()); err != nil {
		t.Fatal(err)
	}

	n := startNode(t, state, path)
	n.mesh.setPlan(looking(2, "api", "web"))
	file := n.mesh.normals.path("bank/api")
	until(t, "kept", func() bool { _, err := os.Stat(file); return err == nil })
	goesOn := func(what string) {
		t.Helper()
		until(t, what, func() bool { a := n.knows("bank/api"); return a.Learnt == 50 && a.Since.Equal(learntSince) })
	}
	kill()
	kill = startProxy(t, path)
	goesOn("gone on with by another proxy")
	n.stop()
	kill() // and both at once, with a writer in the middle of it
	if err := os.WriteFile(filepath.Join(filepath.Dir(file), ".x.learnt.1234"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	kill = startProxy(t, path)
	n = startNode(t, state, path)
	n.mesh.setPlan(looking(3, "api", "web"))
	goesOn("gone on with by another node and another proxy")
	if all, err := os.ReadDir(filepath.Dir(file)); err != nil || len(all) != 1 {
		t.Errorf("there are %v, %v", all, err)
	}
	if fi, err := os.Stat(file); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	var metrics strings.Builder
	n.mesh.normals.WriteTo(&metrics)
	if !strings.Contains(metrics.String(), `hauberk_learnt_kept_seconds{workload="bank/api"} 1`) || n.log.has("of no use") {
		t.Errorf("metrics %s\nlog %s", &metrics, &n.log.b)
	}

	// One that is not looked at any more is forgotten, and is another later.
	n.mesh.setPlan(looking(4, "web"))
	if _, err := os.Stat(file); !os.IsNotExist(err) {
		t.Errorf("the file of what is not looked at: %v", err)
	}
	n.mesh.setPlan(looking(5, "api", "web"))
	kill()
	kill = startProxy(t, path)
	until(t, "learnt anew", func() bool { a := n.knows("bank/api"); return a.Since.After(learntSince) && a.Learnt == 0 })
	kill()
}

// A file that is not whole, foreign, or of another version is refused aloud, and
// learning begins anew. It is put aside, and told of once.
func TestNormalsRefused(t *testing.T) {
	good, err := marshalNormal(normal{Service: "bank/api", Since: learntSince, Requests: 50}, taught(t, 50))
	if err != nil {
		t.Fatal(err)
	}
	schema, err := marshalNormal(normal{Service: "bank/api", Since: learntSince}, []byte(`{"version":99}`))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		file []byte
		why  string
	}{
		"cut short":         {good[:len(good)-9], "cut short or changed"},
		"changed":           {bytes.Replace(good, []byte("accounts"), []byte("Accounts"), 1), "cut short or changed"},
		"empty":             {nil, "no file of what was learnt"},
		"foreign":           {[]byte("{}\n{}"), "no file of what was learnt"},
		"another version":   {bytes.Replace(good, []byte(`"version":1`), []byte(`"version":2`), 1), "version 2; 1 is read"},
		"another workload":  {bytes.Replace(good, []byte("bank/api"), []byte("bank/web"), 1), `bank/web`},
		"a schema of later": {schema, "version 99"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "mesh.sock")
			defer startProxy(t, path)()
			k := newNormals(filepath.Join(dir, "learnt"), slog.New(slog.DiscardHandler), nil)
			if err := errors.Join(os.MkdirAll(k.dir, 0o700), os.WriteFile(k.path("bank/api"), c.file, 0o600)); err != nil {
				t.Fatal(err)
			}
			n := startNode(t, dir, path)
			told := make(chan string, 10)
			n.mesh.normals.anew = func(service, why string) { told <- service + ": " + why }
			n.mesh.setPlan(looking(1, "api"))
			select {
			case s := <-told:
				if !strings.HasPrefix(s, "bank/api: ") || !strings.Contains(s, c.why) {
					t.Errorf("told %q", s)
				}
			case <-time.After(time.Minute):
				t.Fatal("nothing is told")
			}
			until(t, "planned", func() bool { return n.knows("bank/api").Since.After(learntSince) })
			if b, err := os.ReadFile(k.path("bank/api") + refusedSuffix); err != nil || !bytes.Equal(b, c.file) || !n.log.has(c.why) {
				t.Errorf("put aside are %d bytes, %v\n%s", len(b), err, &n.log.b)
			}
		})
	}
}

// scripted is a proxy that knows what a test says.
type scripted struct {
	mu     sync.Mutex
	all    map[string]api.Analysis
	schema map[string][]byte
	asked  func(service string)
	given  map[string][]byte
	take   func(ctx context.Context, service string) error
}

func (s *scripted) Stats(context.Context) (api.Stats, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return api.Stats{Analysis: s.all}, nil
}

func (s *scripted) Learnt(_ context.Context, service string) ([]byte, error) {
	if s.asked != nil {
		s.asked(service)
	}
	return s.schema[service], nil
}

func (s *scripted) Relearn(ctx context.Context, service string, schema []byte) error {
	if s.take != nil {
		if err := s.take(ctx, service); err != nil {
			return err
		}
	}
	s.given[service] = schema
	return nil
}

// A proxy is asked for what is in the plan only, and for what is new; and what is
// forgotten meanwhile is not written after that.
func TestNormalsFollowThePlan(t *testing.T) {
	log := &lines{}
	k := newNormals(t.TempDir(), slog.New(slog.NewTextHandler(log, nil)), func(service, why string) { t.Error(service, why) })
	var asked []string
	s := &scripted{all: map[string]api.Analysis{"bank/api": {Since: learntSince, Learnt: 7}, "bank/none": {Since: learntSince},
		"../../etc/passwd": {Since: learntSince, Learnt: 7}}, schema: map[string][]byte{"bank/api": []byte("known")}, given: map[string][]byte{}}
	s.asked = func(service string) { asked = append(asked, service) }
	ctx := t.Context()
	k.follow(looking(1, "api", "none"))
	k.keep(ctx, s)
	if len(asked) > 0 {
		t.Error("a proxy that was given nothing yet is believed")
	}
	if err := k.give(ctx, s); err != nil {
		t.Fatal(err)
	}
	k.keep(ctx, s)
	k.keep(ctx, s)
	if len(asked) != 1 || asked[0] != "bank/api" {
		t.Errorf("asked for %q", asked)
	}
	// The next knows nothing, or has learnt for less long.
	for _, now := range []map[string]api.Analysis{nil, {"bank/api": {Since: learntSince.Add(1)}}} {
		next := &scripted{all: now, given: map[string][]byte{}}
		if err := k.give(ctx, next); err != nil || string(next.given["bank/api"]) != "known" {
			t.Errorf("%v: given %q, %v", now, next.given, err)
		}
	}
	// Forgotten while it is asked for, and looked at again.
	s.all["bank/api"] = api.Analysis{Since: learntSince, Learnt: 8}
	s.asked = func(string) {
		k.follow(looking(2))
		k.follow(looking(3, "api"))
	}
	if err := k.give(ctx, s); err != nil {
		t.Fatal(err)
	}
	k.keep(ctx, s)
	if _, _, err := k.read("bank/api"); !os.IsNotExist(err) {
		t.Errorf("what was forgotten is kept: %v", err)
	}
	if log.has("WARN") {
		t.Error(&log.b)
	}
}

// A file that cannot be removed is given to nobody.
func TestNormalsThatStay(t *testing.T) {
	k := newNormals(t.TempDir(), slog.New(slog.DiscardHandler), func(service, why string) { t.Error(service, why) })
	b, err := marshalNormal(normal{Service: "bank/api", Since: learntSince}, []byte("old"))
	if err != nil {
		t.Fatal(err)
	}
	path := k.path("bank/api")
	k.follow(looking(1, "api"))
	if err := errors.Join(os.Mkdir(path, 0o700), os.WriteFile(filepath.Join(path, "x"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	k.follow(looking(2))
	k.follow(looking(3, "api"))
	if err := errors.Join(os.RemoveAll(path), os.WriteFile(path, b, 0o600)); err != nil {
		t.Fatal(err)
	}
	s := &scripted{given: map[string][]byte{}}
	if err := k.give(t.Context(), s); err != nil || len(s.given) > 0 {
		t.Errorf("given %q, %v", s.given, err)
	}
	k.follow(looking(4, "api"))
	if _, err := os.Stat(path); !os.IsNotExist(err) || len(k.looked()) != 1 {
		t.Errorf("still there: %v", err)
	}
}

// The instances of a workload whose normal is learnt anew have it in their story.
func TestLearntAnew(t *testing.T) {
	n := &Node{slog: slog.New(slog.DiscardHandler), actors: map[string]*actor{"api-1": {id: "api-1"}, "web-1": {id: "web-1"}}, reports: make(chan wire.Report, 4)}
	n.mesh = newMeshPart(n)
	for _, name := range []string{"api", "web"} {
		n.mesh.sandboxes[name+"-1"] = &meshSandbox{plan: plan.Sandbox{Instance: name + "-1", Namespace: "bank", Service: name}}
	}
	n.mesh.learntAnew("bank/api", "it was cut short")
	if r := <-n.reports; len(n.reports) > 0 || r.Instance != "api-1" || r.Rule != "LearntAnew" || critical(r) || !strings.Contains(r.Detail, "cut short") {
		t.Errorf("%+v", r)
	}
}

// On a full disk the old file stays, the node goes on, and says so once.
func TestNormalsOnAFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("a disk that is full needs root: %v", err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	log := &lines{}
	k := newNormals(filepath.Join(dir, "learnt"), slog.New(slog.NewTextHandler(log, nil)), nil)
	s := &scripted{all: map[string]api.Analysis{"bank/api": {Since: learntSince, Learnt: 7}}, schema: map[string][]byte{"bank/api": []byte("small")}}
	learn := func(n int, b []byte) {
		s.all["bank/api"], s.schema["bank/api"] = api.Analysis{Since: learntSince, Learnt: uint64(n)}, b
		k.keep(t.Context(), s)
	}
	k.follow(looking(1, "api"))
	if err := k.give(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	k.keep(t.Context(), s)
	for n := range 3 {
		learn(10+n, make([]byte, 80<<10))
	}
	if h, schema, err := k.read("bank/api"); err != nil || string(schema) != "small" || h.Requests != 7 {
		t.Errorf("%+v, %q, %v", h, schema, err)
	}
	var metrics strings.Builder
	k.WriteTo(&metrics)
	if log.count("no space left") != 1 || !strings.Contains(metrics.String(), "failures_total 3\n") {
		t.Errorf("log %s\nmetrics %s", &log.b, &metrics)
	}
	learn(20, []byte("larger"))
	if h, schema, err := k.read("bank/api"); err != nil || string(schema) != "larger" || h.Requests != 20 || !log.has("kept again") {
		t.Errorf("%+v, %q, %v", h, schema, err)
	}
	if all, err := os.ReadDir(k.dir); err != nil || len(all) != 1 {
		t.Errorf("left are %v, %v", all, err)
	}
}

// Of all that proxies may give, more than is kept is refused, and what is there
// stays.
func TestNormalsBounded(t *testing.T) {
	log := &lines{}
	k := newNormals(t.TempDir(), slog.New(slog.NewTextHandler(log, nil)), nil)
	k.follow(looking(1, "api", "web"))
	s := &scripted{all: map[string]api.Analysis{"bank/api": {Since: learntSince, Learnt: 1}}, schema: map[string][]byte{"bank/api": []byte("x")}}
	if err := k.give(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	k.kept["bank/web"] = normal{Bytes: maxNormals}
	k.keep(t.Context(), s)
	if _, err := os.Stat(k.path("bank/api")); !os.IsNotExist(err) || !log.has("at most") {
		t.Errorf("%v\n%s", err, &log.b)
	}
}

// FuzzNormal: what is read is just what would be written.
func FuzzNormal(f *testing.F) {
	b, err := marshalNormal(normal{Service: "bank/api", Since: learntSince, Requests: 50, Written: learntSince}, taught(f, 3))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(b[:len(b)/2])
	f.Add([]byte(`{"format":"hauberk-learnt","version":1}` + "\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, schema, err := parseNormal(b, "bank/api")
		if err != nil {
			if refused := refusedNormal(""); !errors.As(err, &refused) {
				t.Fatalf("%T", err)
			}
			return
		}
		if again, err := marshalNormal(h, schema); err != nil || !bytes.Equal(again, b) {
			t.Fatalf("%q is written as %q, %v", b, again, err)
		}
	})
}

// keptOf has a file of each workload be there.
func keptOf(t *testing.T, log *lines, names ...string) *normals {
	t.Helper()
	k := newNormals(t.TempDir(), slog.New(slog.NewTextHandler(log, nil)), func(service, why string) { t.Error(service, why) })
	for i, name := range names {
		b, err := marshalNormal(normal{Service: "bank/" + name, Since: learntSince, Requests: 5, Written: learntSince.Add(time.Duration(i))}, []byte("old"))
		if err := errors.Join(err, os.WriteFile(k.path("bank/"+name), b, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	k.follow(looking(1, names...))
	return k
}

// What takes too long is given after the plan, with what has no instance here, and
// until then its file stays as it is; what takes too long once no plan waits for again.
func TestNormalsGivenLater(t *testing.T) {
	log := &lines{}
	k := keptOf(t, log, "a", "b", "c")
	k.one = 20 * time.Millisecond
	k.here = func() map[string]bool { return map[string]bool{"bank/a": true, "bank/b": true} }
	stuck := true
	s := &scripted{given: map[string][]byte{}, schema: map[string][]byte{"bank/a": []byte("new")},
		all: map[string]api.Analysis{}}
	var asked []string
	s.take = func(ctx context.Context, service string) error {
		if asked = append(asked, service); service == "bank/a" && stuck {
			<-ctx.Done()
			return ctx.Err()
		}
		return nil
	}
	if err := k.give(t.Context(), s); err != nil || fmt.Sprint(asked) != "[bank/a bank/b]" || !k.gave(s) {
		t.Fatalf("%v, asked %q", err, asked)
	}
	s.all["bank/a"] = api.Analysis{Since: learntSince.Add(1), Learnt: 1}
	k.keep(t.Context(), s)
	if _, schema, err := k.read("bank/a"); err != nil || string(schema) != "old" {
		t.Errorf("kept is %q, %v", schema, err)
	}
	for range 9 {
		k.later(t.Context(), s)
	}
	if fmt.Sprint(asked) != "[bank/a bank/b bank/a bank/c]" && fmt.Sprint(asked) != "[bank/a bank/b bank/c bank/a]" {
		t.Errorf("asked %q", asked)
	}
	// Another link: the plan does not wait for it.
	asked, stuck = nil, false
	next := &scripted{given: map[string][]byte{}, take: s.take}
	if err := k.give(t.Context(), next); err != nil || fmt.Sprint(asked) != "[bank/b]" {
		t.Errorf("%v, asked %q", err, asked)
	}
	for range 9 {
		k.later(t.Context(), next)
	}
	if len(next.given) != 3 || len(k.late) > 0 || len(k.slow) > 0 || log.count("WARN") != 1 {
		t.Errorf("given %q, late %q, slow %v\n%s", next.given, k.late, k.slow, &log.b)
	}
}

// A refusal that is not for the schema's sake leaves the file where it is.
func TestNormalsRefusedByAnOlderProxy(t *testing.T) {
	log := &lines{}
	k := keptOf(t, log, "a", "b")
	s := &scripted{given: map[string][]byte{}}
	s.take = func(_ context.Context, service string) error {
		if service == "bank/a" {
			return fmt.Errorf("give: %w", &link.RefusedError{Kind: api.KindRelearn, Reason: `message "relearn": unknown kind`})
		}
		return nil
	}
	if err := k.give(t.Context(), s); err != nil || len(s.given) != 1 || !log.has("the file stays") {
		t.Errorf("%v, given %q\n%s", err, s.given, &log.b)
	}
	if _, schema, err := k.read("bank/a"); err != nil || string(schema) != "old" {
		t.Errorf("kept is %q, %v", schema, err)
	}
}

// For want of room workloads without an instance here are let go of, the oldest first.
func TestNormalsAwayGoFirst(t *testing.T) {
	log := &lines{}
	k := keptOf(t, log, "a", "b", "c", "d")
	if err := k.give(t.Context(), &scripted{given: map[string][]byte{}}); err != nil {
		t.Fatal(err)
	}
	k.here = func() map[string]bool { return map[string]bool{"bank/a": true, "bank/d": true} }
	s := &scripted{given: map[string][]byte{}, schema: map[string][]byte{"bank/b": []byte("new"), "bank/d": []byte("new")},
		all: map[string]api.Analysis{"bank/b": {Since: learntSince, Learnt: 9}, "bank/d": {Since: learntSince, Learnt: 9}}}
	k.given = s
	b := k.kept["bank/b"]
	b.Bytes = maxNormals - 8
	b.Requests = 9
	k.kept["bank/b"] = b
	k.keep(t.Context(), s)
	k.keep(t.Context(), s)
	for name, want := range map[string]string{"a": "old", "b": "", "c": "old", "d": "new"} {
		if _, schema, err := k.read("bank/" + name); string(schema) != want || want == "" && !os.IsNotExist(err) {
			t.Errorf("of %s %q is kept, %v", name, schema, err)
		}
	}
	if log.count("let go of") != 1 || log.has("WARN") {
		t.Error(&log.b)
	}
}

// stuckProxy answers all but Relearn, which never ends; plans are those it got.
func stuckProxy(t *testing.T, path string) (plans chan uint64) {
	t.Helper()
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	plans = make(chan uint64, 16)
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	handle := func(ctx context.Context, m *api.Message, files []*os.File) (*api.Message, []*os.File, error) {
		for _, f := range files {
			f.Close()
		}
		switch m.Kind {
		case api.KindHello:
			return &api.Message{Hello: &api.Hello{Version: api.Version}}, nil, nil
		case api.KindCut:
			return &api.Message{Receipt: &api.Receipt{Epoch: m.Epoch.Number}}, nil, nil
		case api.KindStats:
			return &api.Message{Stats: &api.Stats{}}, nil, nil
		case api.KindRelearn:
			<-ctx.Done()
		case api.KindPlan:
			plans <- m.Plan.Generation
		}
		return nil, nil, nil
	}
	running.Go(func() {
		for {
			c, err := ln.AcceptUnix()
			if err != nil {
				return
			}
			running.Go(func() { link.NewSession(api.NewConn(c, 1<<20), handle, 16).Run(ctx) })
		}
	})
	t.Cleanup(func() {
		ln.Close()
		stop()
		running.Wait()
	})
	return plans
}

// A proxy that never takes what was kept gets its plans nevertheless, and what was
// kept stays.
func TestNormalsDoNotHoldUpPlans(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "mesh.sock")
	plans := stuckProxy(t, path)
	k := newNormals(filepath.Join(dir, "learnt"), slog.New(slog.DiscardHandler), nil)
	if err := os.MkdirAll(k.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	names := []string{"a", "b", "c", "d"}
	for _, name := range names {
		b, err := marshalNormal(normal{Service: "bank/" + name, Since: learntSince, Requests: 50}, taught(t, 50))
		if err := errors.Join(err, os.WriteFile(k.path("bank/"+name), b, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	null, err := os.Open(os.DevNull) // in place of its sockets
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	n := startNode(t, dir, path)
	n.mesh.mu.Lock()
	n.mesh.sandboxes["a-1"] = &meshSandbox{plan: plan.Sandbox{Instance: "a-1", Namespace: "bank", Service: "a", Address: netip.MustParseAddr("10.0.0.1")},
		tcp: null, udp: null, dns: null}
	n.mesh.mu.Unlock()
	for generation := range uint64(2) {
		n.mesh.setPlan(looking(1+generation, names...))
		select {
		case got := <-plans:
			if got != 1+generation {
				t.Errorf("plan %d", got)
			}
		case <-time.After(30 * time.Second):
			t.Fatalf("no plan\n%s", &n.log.b)
		}
	}
	n.stop()
	for _, name := range names {
		if _, _, err := k.read("bank/" + name); err != nil {
			t.Error(err)
		}
	}
}
