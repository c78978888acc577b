package shim

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	bootstrap "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/containerd/api/types"
)

var caller = arguments{namespace: "k8s.io", id: "web-1", address: "/run/containerd/containerd.sock"}

// TestStartProtocol compares, byte for byte, what a caller of each kind reads.
func TestStartProtocol(t *testing.T) {
	params := func(id, dir string) []byte {
		p := &bootstrap.BootstrapParams{InstanceID: id, Namespace: "k8s.io", ContainerdVersion: "2.4.2"}
		if dir != "" {
			p.SocketDir = &dir
		}
		raw, err := proto.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	for what, c := range map[string]struct {
		stdin []byte
		want  string // hexadecimal if it is a message
	}{
		"1.6 says nothing":      {nil, "unix:///run/containerd/s/SUM"},
		"1.6 says options":      {[]byte("\x0a\x03abc\x12\x00"), "unix:///run/containerd/s/SUM"},
		"2.4":                   {params("web-1", ""), "0803 1259 HEX(unix:///run/containerd/s/SUM) 1a05 7474727063"},
		"2.4 with a directory":  {params("web-1", "/run/x"), "0803 124e HEX(unix:///run/x/SUM) 1a05 7474727063"},
		"parameters of another": {params("web-2", ""), "unix:///run/containerd/s/SUM"},
	} {
		t.Run(what, func(t *testing.T) {
			p, err := readBootstrap(bytes.NewReader(c.stdin), caller)
			if err != nil {
				t.Fatal(err)
			}
			socket, err := socketPath(caller, p)
			if err != nil {
				t.Fatal(err)
			}
			got, err := answer(p, socket)
			if err != nil {
				t.Fatal(err)
			}
			if want := golden(t, c.want); string(got) != want {
				t.Errorf("answer %q, want %q", got, want)
			}
		})
	}
}

// sum is the SHA-256 of "/run/containerd/containerd.sock/k8s.io/web-1", by
// another program.
const sum = "f584ec2740b3f1866089a3d3cc055d405fab7e0faf16258890f45bf7d733bad4"

// golden spells an answer out.
func golden(t *testing.T, s string) string {
	t.Helper()
	s = strings.ReplaceAll(s, "SUM", sum)
	before, rest, ok := strings.Cut(s, "HEX(")
	if !ok {
		return s
	}
	text, after, _ := strings.Cut(rest, ")")
	out := ""
	for _, part := range []string{before, hex.EncodeToString([]byte(text)), after} {
		raw, err := hex.DecodeString(strings.ReplaceAll(part, " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		out += string(raw)
	}
	return out
}

func TestSocketDirectoryRefused(t *testing.T) {
	for _, dir := range []string{"relative", "/" + strings.Repeat("x", 60)} {
		if path, err := socketPath(caller, &bootstrap.BootstrapParams{SocketDir: &dir}); err == nil {
			t.Errorf("socket at %s", path)
		}
	}
}

func TestArguments(t *testing.T) {
	a, err := parseArguments(strings.Fields("-namespace default -address /run/c.sock -publish-binary /usr/bin/containerd -id a.b-c -debug start"), io.Discard)
	want := arguments{action: "start", namespace: "default", id: "a.b-c", address: "/run/c.sock", publish: "/usr/bin/containerd", debug: true}
	if err != nil || a != want {
		t.Errorf("%+v, %v", a, err)
	}
	for _, line := range []string{
		"-namespace default -id x stop", "-namespace default -id x start now", "-id x start", "-namespace default start",
		"-namespace default -id ../x start", "-namespace a/b -id x start", "-namespace default -id x -unknown start",
		"-namespace default -id " + strings.Repeat("x", 77) + " start",
	} {
		if a, err := parseArguments(strings.Fields(line), io.Discard); err == nil {
			t.Errorf("%s: %+v", line, a)
		}
	}
}

func TestEnvironment(t *testing.T) {
	for value, want := range map[string]string{"": defaultRun, "/x/run": "/x/run", "run": "", "/x/../run": ""} {
		c, err := environment(func(name string) string {
			if name == "HAUBERK_SHIM_RUN" {
				return value
			}
			return ""
		})
		if (err == nil) != (want != "") || c.run != want {
			t.Errorf("%q: %+v, %v", value, c, err)
		}
	}
}

// TestListenTwice: a living shim keeps its socket, a dead one's is taken.
func TestListenTwice(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s", "socket")
	first, err := listen(socket)
	if err != nil || first == nil {
		t.Fatal(first, err)
	}
	if again, err := listen(socket); err != nil || again != nil {
		t.Errorf("a socket that is served was opened again: %v, %v", again, err)
	}
	first.Close()
	second, err := listen(socket)
	if err != nil || second == nil {
		t.Fatalf("the socket of a dead shim was not taken: %v", err)
	}
	defer second.Close()
	ln, err := net.FileListener(second)
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	if fi, err := os.Stat(socket); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi, err)
	}
}

// TestOwnSocket: a shim that ends late leaves its successor's socket alone.
func TestOwnSocket(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "socket")
	open := func() {
		t.Helper()
		f, err := listen(socket)
		if err != nil || f == nil {
			t.Fatal(f, err)
		}
		t.Cleanup(func() { f.Close() })
	}
	open()
	late, prompt := ownSocket(socket), ownSocket(socket)
	prompt()
	if _, err := os.Lstat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
	open()
	prompt()
	late()
	if _, err := os.Lstat(socket); err != nil {
		t.Errorf("the next shim's socket is gone: %v", err)
	}
}

// TestRemoveNothing: deletion without anything made is no error, and leaves
// alone what is not a socket.
func TestRemoveNothing(t *testing.T) {
	bundle, run := t.TempDir(), t.TempDir()
	other := filepath.Join(bundle, "file")
	if err := os.WriteFile(other, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bundle, addressFile), []byte(scheme+other), 0o600); err != nil {
		t.Fatal(err)
	}
	a := caller
	a.bundle = bundle
	for range 2 {
		r, err := remove(t.Context(), a, config{run: run})
		if err != nil || r.ExitStatus != 137 || r.Pid != 0 {
			t.Errorf("%+v, %v", r, err)
		}
	}
	if _, err := os.Stat(other); err != nil {
		t.Error(err)
	}
}

// TestGroup reads whose pod a container is of.
func TestGroup(t *testing.T) {
	const kind, pod = `"io.kubernetes.cri.container-type": "`, `"io.kubernetes.cri.sandbox-id": "`
	bundle := t.TempDir()
	if got, err := readBundle(bundle, "web-1"); got.pod != "web-1" || got.role != roleAlone || err != nil {
		t.Errorf("no configuration: %+v, %v", got, err)
	}
	for text, want := range map[string]struct {
		pod  string
		role role
		err  string
	}{
		`{}`:                                   {pod: "web-1"},
		`{"annotations": {` + pod + `web-1"}}`: {pod: "web-1"},
		`{"annotations": {` + kind + `sandbox", ` + pod + `web-1"}}`:                                                    {pod: "web-1", role: roleSandbox},
		`{"annotations": {` + kind + `container", ` + pod + `pod-7"}}`:                                                  {pod: "pod-7", role: roleMember},
		`{"annotations": {` + pod + `pod-7"}}`:                                                                          {pod: "pod-7", role: roleMember},
		`{"annotations": {"io.kubernetes.cri-o.ContainerType": "container", "io.kubernetes.cri-o.SandboxID": "pod-7"}}`: {pod: "pod-7", role: roleMember},
		`{"annotations": {` + kind + `container", ` + pod + `web-1"}}`:                                                  {err: "contradict"},
		`{"annotations": {` + kind + `sandbox", ` + pod + `pod-7"}}`:                                                    {err: "contradict"},
		`{"annotations": {` + kind + `other"}}`:                                                                         {err: "contradict"},
		`{"annotations": {` + pod + `../x"}}`:                                                                           {err: "names no pod"},
		`{`:                                                                                                             {err: "config.json"},
	} {
		if err := os.WriteFile(filepath.Join(bundle, "config.json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := readBundle(bundle, "web-1")
		if got.pod != want.pod || got.role != want.role || (err == nil) != (want.err == "") || err != nil && !strings.Contains(err.Error(), want.err) {
			t.Errorf("%s: %+v, %v, want %+v", text, got, err, want)
		}
	}
}

// TestInfo: what the shim says of itself is what containerd reads.
func TestInfo(t *testing.T) {
	var out bytes.Buffer
	if err := Main(t.Context(), []string{"-info"}, nil, &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	var info types.RuntimeInfo
	if err := proto.Unmarshal(out.Bytes(), &info); err != nil || info.Name != Name {
		t.Fatal(&info, err)
	}
	var f struct {
		MountOptions []string `json:"mountOptions"`
		Linux        struct {
			Seccomp struct {
				Enabled bool `json:"enabled"`
			} `json:"seccomp"`
		} `json:"linux"`
	}
	if err := json.Unmarshal(info.Features.GetValue(), &f); err != nil || info.Features.GetTypeUrl() != featuresURL || !slices.Contains(f.MountOptions, "rro") || !f.Linux.Seccomp.Enabled {
		t.Errorf("%s, %v", info.Features, err)
	}
}

// FuzzBootstrap: parameters count only if they say what the flags say.
func FuzzBootstrap(f *testing.F) {
	raw, err := proto.Marshal(&bootstrap.BootstrapParams{InstanceID: caller.id, Namespace: caller.namespace})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, raw []byte) {
		p, err := readBootstrap(bytes.NewReader(raw), caller)
		if err != nil || p == nil {
			return
		}
		if p.GetInstanceID() != caller.id || p.GetNamespace() != caller.namespace {
			t.Errorf("took %q", raw)
		}
		if socket, err := socketPath(caller, p); err == nil && (len(socket) > 106 || !filepath.IsAbs(socket)) {
			t.Errorf("socket %q", socket)
		}
	})
}

func FuzzArguments(f *testing.F) {
	f.Add("-namespace\x00default\x00-id\x00x\x00start")
	f.Add("-info")
	f.Fuzz(func(t *testing.T, line string) {
		a, err := parseArguments(strings.Split(line, "\x00"), io.Discard)
		if err == nil && !a.info && !a.version && (strings.ContainsAny(a.id+a.namespace, "/\x00") || a.id == "" || a.namespace == "") {
			t.Errorf("took %q: %+v", line, a)
		}
	})
}

func FuzzJournal(f *testing.F) {
	f.Add([]byte(`{"version": 1, "id": "x", "machine": "c-0", "run": "/run/hauberk-shim/vm"}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		j, err := parseJournal(raw)
		if err == nil && (strings.ContainsAny(j.Machine, "/\x00") || !filepath.IsAbs(j.Run)) {
			t.Errorf("took %q", raw)
		}
	})
}

func TestHowMachinesStart(t *testing.T) {
	for text, want := range map[string]config{
		"": {pool: defaultPool}, "pool": {pool: defaultPool}, "pool:0": {}, "pool:64": {pool: 64}, "clone": {}, "cold": {cold: true},
	} {
		var c config
		if err := c.parseStart(text); err != nil || c != want {
			t.Errorf("%q: %+v, %v; want %+v", text, c, err, want)
		}
	}
	for _, text := range []string{"pool:", "pool:-1", "pool:65", "pool:x", "5", "warm"} {
		if err := new(config).parseStart(text); err == nil {
			t.Errorf("%q was taken", text)
		}
	}
}
