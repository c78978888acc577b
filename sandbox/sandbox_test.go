package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/image"
	"hauberk.dev/shim/client"
)

// hostForTest has a shim that only says yes, or no.
func hostForTest(t *testing.T, shim string) *Host {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("sandboxes are root's")
	}
	dir, err := os.MkdirTemp("", "hand") // short, for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	h, err := Open(Config{State: filepath.Join(dir, "s"), Run: filepath.Join(dir, "r"), Shim: shim})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func imageForTest() Image {
	return Image{Name: "oci:/x", Image: image.Image{Path: "/x.erofs", ErofsSHA256: strings.Repeat("0", 64), Digest: "sha256:1", Config: image.Config{
		Entrypoint: []string{"/app"}, Cmd: []string{"serve"}, Env: []string{"PATH=/bin", "A=image"}, WorkingDir: "/srv", UID: 7, GID: 8, Home: "/home/x", StopSignal: "SIGQUIT",
	}}}
}

// claimed makes what lies on the disk of a sandbox before its shim starts.
func claimed(t *testing.T, h *Host, name string) *Sandbox {
	t.Helper()
	o := Options{Name: name, Image: "oci:/x"}
	b, held, err := h.claim(t.Context(), &o, imageForTest(), process{Args: []string{"x"}}, origin{})
	if err != nil {
		t.Fatal(err)
	}
	held.Close()
	return b
}

func TestProcess(t *testing.T) {
	none, sh := "", "/bin/sh"
	for name, test := range map[string]struct {
		o    Options
		args []string
	}{
		"image's":             {Options{}, []string{"/app", "serve"}},
		"other command":       {Options{Args: []string{"check"}}, []string{"/app", "check"}},
		"other entry":         {Options{Entrypoint: &sh}, []string{"/bin/sh"}},
		"other entry and all": {Options{Entrypoint: &sh, Args: []string{"-c", "x"}}, []string{"/bin/sh", "-c", "x"}},
		"no entry":            {Options{Entrypoint: &none, Args: []string{"x"}}, []string{"x"}},
	} {
		p, err := test.o.process(imageForTest())
		if err != nil || !slices.Equal(p.Args, test.args) {
			t.Errorf("%s: %q, %v, want %q", name, p.Args, err, test.args)
		}
	}
	o := Options{Env: []string{"A=mine", "B="}, WorkingDir: "/w", Terminal: true}
	p, err := o.process(imageForTest())
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"PATH=/bin", "A=mine", "HOME=/home/x", "TERM=xterm", "B="}; !slices.Equal(p.Env, want) {
		t.Errorf("environment %q, want %q", p.Env, want)
	}
	if p.Cwd != "/w" || p.UID != 7 || p.GID != 8 || p.stopSignal() != syscall.SIGQUIT {
		t.Errorf("%+v", p)
	}
	if _, err := (&Options{Entrypoint: &none}).process(imageForTest()); err == nil || !strings.Contains(err.Error(), "names nothing to run") {
		t.Errorf("nothing to run: %v", err)
	}
}

func TestConfiguration(t *testing.T) {
	o := Options{
		Hostname: "h", Terminal: true, Rows: 3, Cols: 4, Memory: 64 << 20, CPUs: 1.5, Pids: 9, ReadOnly: true,
		Volumes: []Volume{{"/a", "/b", true}, {"/c", "/d", false}}, Tmpfs: []string{"/t"},
		CapDrop: []string{"all", "chown"}, CapAdd: []string{"net_raw", "CAP_CHOWN", "NET_RAW"},
		Policy: []node.NamedGuardPolicy{{Name: "p", Spec: spec.GuardPolicy{Mode: "audit"}}},
	}
	p, err := o.process(imageForTest())
	if err != nil {
		t.Fatal(err)
	}
	raw, err := o.configuration("id", p, network{path: "/run/n/id.pod", resolv: "/b/resolv.conf"})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`"hostname": "h"`, `"readonly": true`, `"limit": 67108864`, `"quota": 150000`, `"height": 3`, `"uid": 7`,
		`"path": "/run/n/id.pod"`, `"source": "/b/resolv.conf"`,
		`"hauberk.dev/guard-policy": "{\"generation\":2,\"policies\":[{\"name\":\"p\",\"spec\":{\"mode\":\"audit\"}}]}"`,
	} {
		if !strings.Contains(string(raw), want) {
			t.Errorf("no %s in %s", want, raw)
		}
	}
	var c configuration
	if err := json.Unmarshal(raw, &c); err != nil {
		t.Fatal(err)
	}
	if len(c.Process.Capabilities.Effective) > 0 || !slices.Equal(c.Process.Capabilities.Bounding, []string{"CAP_NET_RAW", "CAP_CHOWN"}) {
		t.Errorf("who is not root has %+v", c.Process.Capabilities)
	}
	if other, err := (&Options{CapDrop: []string{"MKNOD"}}).process(imageForTest()); err != nil || len(other.Capabilities) != 13 {
		t.Errorf("one dropped leaves %q, %v", other.Capabilities, err)
	}
	last := c.Mounts[len(c.Mounts)-2:]
	if !slices.Contains(last[0].Options, "ro") || slices.Contains(last[1].Options, "ro") || last[1].Destination != "/d" {
		t.Errorf("volumes are %+v", last)
	}
}

func TestOptionsRefused(t *testing.T) {
	for want, o := range map[string]Options{
		`name "a/b"`:            {Name: "a/b"},
		`looks like an ID`:      {Name: "0123456789ab"},
		`name "../x"`:           {Name: "../x"},
		`environment "x"`:       {Env: []string{"x"}},
		`environment "=x"`:      {Env: []string{"=x"}},
		`working directory "w"`: {WorkingDir: "w"},
		`memory 5 bytes`:        {Memory: 5},
		`-1 processors`:         {CPUs: -1},
		`65 processors`:         {CPUs: 65},
		`-3 processes`:          {Pids: -3},
		`hostname "a b"`:        {Hostname: "a b"},
		`volume /a:/:`:          {Volumes: []Volume{{Source: "/a", Target: "/"}}},
		`volume a:/b:`:          {Volumes: []Volume{{Source: "a", Target: "/b"}}},
		`tmpfs "t"`:             {Tmpfs: []string{"t"}},
		`pull "sometimes"`:      {Pull: "sometimes"},
		`destination "a b"`:     {Egress: []string{"any", "a b"}},
		`publish "80"`:          {Publish: []string{"80"}},
		`holds a zero byte`:     {Args: []string{"a\x00b"}},
	} {
		if err := o.check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %q", o, err, want)
		}
	}
}

func TestParseSignal(t *testing.T) {
	for s, want := range map[string]syscall.Signal{"TERM": 15, "sigquit": 3, "9": 9, "64": 64, "usr1": 10} {
		if got, err := ParseSignal(s); err != nil || got != want {
			t.Errorf("%s: %v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "0", "65", "-1", "SIG", "TERMINATE"} {
		if got, err := ParseSignal(s); err == nil {
			t.Errorf("%q is %v", s, got)
		}
	}
}

// TestNamesAreUnique has many make sandboxes of one name at once.
func TestNamesAreUnique(t *testing.T) {
	h := hostForTest(t, "/bin/true")
	var wg sync.WaitGroup
	var mu sync.Mutex
	made, taken := 0, 0
	for range 16 {
		wg.Go(func() {
			o := Options{Name: "one"}
			_, held, err := h.claim(context.Background(), &o, imageForTest(), process{}, origin{})
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				held.Close()
				made++
			case errors.Is(err, ErrTaken):
				taken++
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if made != 1 || taken != 15 {
		t.Errorf("%d were made, %d refused", made, taken)
	}
	for range 20 { // made up names differ
		claimed(t, h, "")
	}
	if list, err := h.List(t.Context()); err != nil || len(list) != 21 {
		t.Errorf("%d are listed, %v", len(list), err)
	}
}

func TestFind(t *testing.T) {
	h := hostForTest(t, "/bin/true")
	b := claimed(t, h, "web")
	for _, name := range []string{"web", b.ID(), b.ID()[:3]} {
		if got, err := h.Find(name); err != nil || got.ID() != b.ID() {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, name := range []string{"", "we", "../web", "x/web", b.ID() + "0", "zzz"} {
		if got, err := h.Find(name); !errors.Is(err, ErrNotFound) {
			t.Errorf("%q: %v, %v", name, got, err)
		}
	}
	other := h.box(b.ID()[:11] + "x")
	if b.ID()[11] == '0' {
		other.id = b.ID()[:11] + "1"
	} else {
		other.id = b.ID()[:11] + "0"
	}
	if err := os.Mkdir(filepath.Join(h.boxes(), other.id), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Find(b.ID()[:11]); err == nil || !strings.Contains(err.Error(), "2 sandboxes") {
		t.Errorf("an ambiguous one: %v", err)
	}
}

// TestLeftHalfDone removes what programs that were killed at one moment or
// another have left, again and again.
func TestLeftHalfDone(t *testing.T) {
	for name, kill := range map[string]func(*testing.T, *Sandbox){
		"before the record": func(t *testing.T, b *Sandbox) { must(t, os.Remove(b.recordFile())) },
		"before the name":   func(t *testing.T, b *Sandbox) { must(t, os.Remove(filepath.Join(b.host.names(), "x"))) },
		"before the shim":   func(t *testing.T, b *Sandbox) { must(t, os.MkdirAll(b.bundle(), 0o700)) },
		"with a dead shim": func(t *testing.T, b *Sandbox) {
			must(t, os.MkdirAll(b.bundle(), 0o700))
			must(t, os.WriteFile(filepath.Join(b.bundle(), "address"), []byte("unix:///none"), 0o600))
			must(t, os.WriteFile(filepath.Join(b.bundle(), "shim.pid"), []byte("1"), 0o600))
		},
		"while removed": func(t *testing.T, b *Sandbox) { must(t, os.RemoveAll(b.bundle())) },
	} {
		t.Run(name, func(t *testing.T) {
			h := hostForTest(t, "/bin/true")
			b := claimed(t, h, "x")
			kill(t, b)
			list, err := h.List(t.Context())
			if err != nil || len(list) != 1 || list[0].ID != b.ID() || list[0].Phase != Broken {
				t.Errorf("listed as %+v, %v", list, err)
			}
			if err := b.Start(t.Context()); err == nil {
				t.Error("it was started")
			}
			must(t, b.Remove(t.Context(), false))
			if err := b.Remove(t.Context(), true); !errors.Is(err, ErrNotFound) {
				t.Errorf("removed again: %v", err)
			}
			claimed(t, h, "x") // the name is free
		})
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestShimThatHangs ends a shim that takes calls and answers none, and no other
// process that has its number.
func TestShimThatHangs(t *testing.T) {
	h := hostForTest(t, "/bin/true")
	// Started again and again, it has no arguments at many moments, as one
	// that is started just now.
	starting := filepath.Join(h.conf.State, "shim")
	must(t, os.WriteFile(starting, []byte("#!/bin/sh\nexec \"$0\" \"$@\"\n"), 0o700))
	for name, ours := range map[string]bool{"ours": true, "another's": false} {
		t.Run(name, func(t *testing.T) {
			b := claimed(t, h, "")
			must(t, os.MkdirAll(b.bundle(), 0o700))
			id := "other"
			if ours {
				id = b.ID()
			}
			cmd := exec.Command(starting, "-id", id)
			must(t, cmd.Start())
			defer cmd.Process.Kill()
			must(t, os.WriteFile(filepath.Join(b.bundle(), "shim.pid"), []byte(itoa(cmd.Process.Pid)), 0o600))
			for range 500 {
				p, err := b.process()
				must(t, err)
				p.close()
				if (p != nil) != ours {
					t.Fatalf("found %+v", p)
				}
			}
			p, err := b.process()
			must(t, err)
			must(t, p.kill(t.Context()))
			p.close()
			must(t, cmd.Process.Signal(syscall.SIGTERM))
			err = cmd.Wait()
			if want := map[bool]string{true: "killed", false: "terminated"}[ours]; err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("it ended with %v, want %s", err, want)
			}
			if p, err = b.process(); p != nil || err != nil {
				t.Errorf("who has ended is found: %+v, %v", p, err)
			}
		})
	}
}

func itoa(n int) string { raw, _ := json.Marshal(n); return string(raw) }

// TestCreateFails leaves nothing of a sandbox whose shim does not start.
func TestCreateFails(t *testing.T) {
	h := hostForTest(t, filepath.Join(t.TempDir(), "shim"))
	script := "#!/bin/sh\ncase \"$*\" in *delete) exit 0;; esac\necho no machine today >&2; exit 1\n"
	must(t, os.WriteFile(h.conf.Shim, []byte(script), 0o700))
	o := Options{Name: "x", Image: "oci:/x"}
	img := imageForTest()
	b, held, err := h.claim(t.Context(), &o, img, process{Args: []string{"x"}}, origin{})
	must(t, err)
	err = b.make(t.Context(), o, img, process{Args: []string{"x"}}, origin{}, held)
	if err == nil || !strings.Contains(err.Error(), "no machine today") {
		t.Errorf("got %v", err)
	}
	must(t, b.removeLocked(t.Context()))
	held.Close()
	for _, dir := range []string{h.boxes(), h.names(), h.sockets()} {
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("%s holds %v, %v", dir, left, err)
		}
	}
	if left, err := os.ReadDir(b.run); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s holds %v, %v", b.run, left, err)
	}
}

func TestStep(t *testing.T) {
	for line, want := range map[string]string{
		`time=x level=INFO msg=y step="boot a template"` + "\n": "boot a template",
		`level=INFO msg=y step=boot shim=z` + "\n":              "boot",
		`level=INFO msg=y` + "\n":                               "",
		`step="` + "\n":                                         "",
	} {
		if got, ok := stepOf(line); got != want && ok {
			t.Errorf("%s: %q", line, got)
		}
	}
	path := filepath.Join(t.TempDir(), "log")
	must(t, os.WriteFile(path, nil, 0o600))
	var mu sync.Mutex
	var told []string
	stop := follow(path, func(s string) { mu.Lock(); told = append(told, s); mu.Unlock() })
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	must(t, err)
	for _, l := range []string{"msg=a step=one\nmsg=b st", "ep=two\n", "msg=c step=three\n", "step=unfinished"} {
		_, err := io.WriteString(f, l)
		must(t, err)
		time.Sleep(30 * time.Millisecond)
	}
	must(t, f.Close())
	stop()
	stop()
	if !slices.Equal(told, []string{"one", "two", "three"}) {
		t.Errorf("told %q", told)
	}
}

func TestOpenRefuses(t *testing.T) {
	if os.Getuid() != 0 {
		if _, err := Open(Config{}); !errors.Is(err, os.ErrPermission) {
			t.Errorf("who is not root: %v", err)
		}
		return
	}
	dir := t.TempDir()
	h, err := Open(Config{State: dir + "/s", Run: dir + "/" + strings.Repeat("x", maxRun)})
	if err != nil {
		t.Fatal(err)
	}
	file := h.ref(image.Reference{From: image.FromRegistry, Host: "docker.io", Repository: "library/x", Tag: "latest"})
	must(t, os.WriteFile(file, []byte(`{"path":"/dev/null","digest":"","erofsSHA256":"","size":0,"config":{"cmd":["x"],"uid":0,"gid":0,"workingDir":"/"},"name":"","pulled":"2026-11-22T10:00:00Z"}`), 0o600))
	if _, err := h.Create(t.Context(), Options{Image: "x"}); err == nil || !strings.Contains(err.Error(), "its name has more than") {
		t.Errorf("a name too long for sockets: %v", err)
	}
}

// TestRecordRefused reads no record of another version, or with more in it.
func TestRecordRefused(t *testing.T) {
	h := hostForTest(t, "/bin/true")
	b := claimed(t, h, "x")
	for _, raw := range []string{"", "{}", `{"version":2}`, `{"version":1,"more":1}`, "nonsense"} {
		must(t, os.WriteFile(b.recordFile(), []byte(raw), 0o600))
		if _, err := b.read(); err == nil {
			t.Errorf("%q was read", raw)
		}
	}
	list, err := h.List(t.Context())
	if err != nil || len(list) != 1 || list[0].Phase != Broken || list[0].Reason == "" {
		t.Errorf("listed as %+v, %v", list, err)
	}
	must(t, b.Remove(t.Context(), true))
}

// TestAttachNobody says that what does not run cannot be joined.
func TestAttachNobody(t *testing.T) {
	h := hostForTest(t, "/bin/true")
	b := claimed(t, h, "x")
	if _, err := b.Attach(t.Context()); !errors.Is(err, ErrNotRunning) {
		t.Errorf("got %v", err)
	}
	must(t, os.MkdirAll(b.run, 0o700))
	ln, err := net.Listen("unix", b.socket())
	must(t, err)
	defer ln.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := client.Attach(ctx, b.socket(), false); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("who never greets: %v", err)
	}
	for name, err := range map[string]error{
		"pause": b.Pause(t.Context()), "kill": b.Kill(t.Context(), syscall.SIGTERM), "resize": b.Resize(t.Context(), 1, 1),
	} {
		if !errors.Is(err, ErrNotRunning) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
