package shim

import (
	"encoding/json"
	"os"
	"strings"
	"testing"
)

// ctrRun is what ctr of containerd 1.6 makes of a plain "ctr run".
func ctrRun(t testing.TB) []byte {
	t.Helper()
	raw, err := os.ReadFile("testdata/ctr-run.json")
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// edit sets one field of a configuration, by path.
func edit(t *testing.T, raw []byte, path string, value any) []byte {
	t.Helper()
	var c map[string]any
	if err := json.Unmarshal(raw, &c); err != nil {
		t.Fatal(err)
	}
	at := c
	names := strings.Split(path, ".")
	for _, n := range names[:len(names)-1] {
		next, ok := at[n].(map[string]any)
		if !ok {
			next = map[string]any{}
			at[n] = next
		}
		at = next
	}
	at[names[len(names)-1]] = value
	out, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestConfigurationOfCtr(t *testing.T) {
	c, err := parseConfiguration(ctrRun(t))
	if err != nil {
		t.Fatal(err)
	}
	p := c.Process.program()
	if len(p.Args) == 0 || p.Cwd != "/" || p.UID != 0 || p.TTY {
		t.Errorf("program %+v", p)
	}
	if s := sizeOf(options{}, c.Linux); s.memoryMiB != defaultMemoryMiB || s.processors != 1 || s.limit != 0 {
		t.Errorf("size %+v", s)
	}
}

// TestConfigurationRefuses asks for what a sandbox cannot do, one thing at a
// time. The error names the field.
func TestConfigurationRefuses(t *testing.T) {
	type list = []any
	type object = map[string]any
	own := list{object{"type": "pid"}, object{"type": "ipc"}, object{"type": "uts"}, object{"type": "mount"}}
	for _, c := range []struct {
		path  string
		value any
		want  string
	}{
		{"hooks", object{"prestart": list{object{"path": "/bin/true"}}}, "hooks"},
		{"domainname", "x", `domainname "x"`},
		{"root.readonly", true, "root.readonly true"},
		{"root.readOnly", true, `"root.readOnly true": this shim does not know the field`},
		{"invented", 1, `"invented 1": this shim does not know the field`},
		{"linux.invented.deep", "x", `"linux.invented {`},
		{"linux.resources.invented", "x", `"linux.resources.invented`},
		{"linux.resources.memory.reservation", 5, `"linux.resources.memory.reservation 5"`},
		{"linux.resources.memory.limit", 5, "linux.resources.memory.limit 5"},
		{"linux.resources.pids.limit", -7, "linux.resources.pids.limit -7"},
		{"linux.resources.cpu", object{"quota": 100000}, "linux.resources.cpu.period 0"},
		{"linux.resources.cpu", object{"quota": 1 << 30, "period": 1}, "linux.resources.cpu.quota"},
		{"linux.resources.cpu.cpus", "0-1", "linux.resources.cpu.cpus"},
		{"linux.resources.devices", list{object{"allow": true, "access": "rwm"}}, "linux.resources.devices[0].allow"},
		{"linux.resources.devices", list{object{"allow": true, "type": "c", "major": 10, "minor": 200}}, "linux.resources.devices[0].allow"},
		{"linux.devices", list{object{"path": "/dev/fuse"}}, "linux.devices"},
		{"linux.seccomp", object{"defaultAction": "SCMP_ACT_ERRNO"}, "linux.seccomp"},
		{"linux.sysctl", object{"kernel.shmmax": "1"}, "linux.sysctl"},
		{"linux.uidMappings", list{object{"size": 1}}, "linux.uidMappings"},
		{"linux.rootfsPropagation", "shared", `linux.rootfsPropagation "shared"`},
		{"linux.maskedPaths", list{"/proc/../etc/shadow"}, "linux.maskedPaths"},
		{"linux.readonlyPaths", list{"/data"}, "linux.readonlyPaths"},
		{"linux.namespaces", own, `linux.namespaces: no "network"`},
		{"linux.namespaces", append(own, object{"type": "network", "path": "/run/netns/x"}), "linux.namespaces[4].path"},
		{"linux.namespaces", append(own, object{"type": "network"}, object{"type": "user"}), "linux.namespaces[5].type"},
		{"mounts", list{object{"destination": "/data", "type": "bind", "source": "/etc"}}, "mounts[0]"},
		{"mounts", list{object{"destination": "/proc", "type": "bind", "source": "/etc"}}, "mounts[0]"},
		{"mounts", list{object{"destination": "/dev/shm", "type": "tmpfs", "options": list{"size=1g"}}}, "mounts[0]"},
		{"process.args", list{}, "process.args"},
		{"process.args", list{"a\x00b"}, "NUL"},
		{"process.cwd", "here", "process.cwd"},
		{"process.user.umask", 0o077, "process.user.umask 077"},
		{"process.user.username", "root", "process.user.username"},
		{"process.apparmorProfile", "p", "process.apparmorProfile"},
		{"process.selinuxLabel", "l", "process.selinuxLabel"},
		{"process.rlimits", list{object{"type": "RLIMIT_CORE", "hard": 0}}, "process.rlimits[0]"},
		{"process.rlimits", list{object{"type": "RLIMIT_NOFILE", "hard": 1 << 30}}, "process.rlimits[0]"},
		{"process.capabilities", nil, "process.capabilities.bounding"},
		{"process.capabilities.bounding", list{"CAP_KILL"}, "process.capabilities.bounding: CAP_CHOWN cannot be taken"},
		{"process.capabilities.effective", list{"CAP_SYS_ADMIN"}, `process.capabilities.effective: "CAP_SYS_ADMIN"`},
		{"windows", object{"layerFolders": list{"x"}}, "windows"},
	} {
		_, err := parseConfiguration(edit(t, ctrRun(t), c.path, c.value))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s %v: %v, want %q", c.path, c.value, err, c.want)
		}
	}
}

func TestConfigurationAllows(t *testing.T) {
	for _, c := range []struct {
		path  string
		value any
	}{
		{"hooks", map[string]any{}},
		{"linux.seccomp", nil},
		{"linux.devices", []any{}},
		{"process.oomScoreAdj", -998},
		{"process.user.umask", 0o022},
		{"linux.resources.memory.limit", 64 << 20},
		{"linux.resources.cpu", map[string]any{"quota": 150000, "period": 100000, "shares": 2}},
		{"annotations.anything", "at all"},
	} {
		if _, err := parseConfiguration(edit(t, ctrRun(t), c.path, c.value)); err != nil {
			t.Errorf("%s %v: %v", c.path, c.value, err)
		}
	}
	// Who is not root has no capability, so it may ask for fewer.
	raw := edit(t, edit(t, ctrRun(t), "process.user.uid", 1000), "process.capabilities", nil)
	if _, err := parseConfiguration(raw); err != nil {
		t.Errorf("a user without capabilities: %v", err)
	}
}

func TestSize(t *testing.T) {
	var l linux
	l.Resources.Memory.Limit, l.Resources.Pids.Limit = 64<<20+1, 100
	if s := sizeOf(options{}, &l); s.memoryMiB != 65+ownMiB || s.limit != 64<<20+1 || s.pids != 100 {
		t.Errorf("%+v", s)
	}
	if s := sizeOf(options{MemoryMiB: 512}, &l); s.memoryMiB != 512 || s.limit != 64<<20+1 {
		t.Errorf("%+v", s)
	}
	for _, c := range []struct {
		quota  int64
		period uint64
		want   int
	}{{0, 0, 0}, {-1, 100, 0}, {1, 100, 1}, {100, 100, 1}, {101, 100, 2}, {1 << 40, 1, 1 << 40}} {
		if got := processors(c.quota, c.period); got != c.want {
			t.Errorf("%d in %d: %d processors, want %d", c.quota, c.period, got, c.want)
		}
	}
}

func TestOptions(t *testing.T) {
	o, err := parseOptionsText([]byte(`{"version": 1, "memoryMiB": 512, "processors": 2}`))
	if err != nil || o.MemoryMiB != 512 || o.Processors != 2 {
		t.Errorf("%+v, %v", o, err)
	}
	for text, want := range map[string]string{
		`{"memoryMiB": 512}`:                  "version 0",
		`{"version": 1, "memoryMiB": 1}`:      "memoryMiB 1",
		`{"version": 1, "processors": 65}`:    "processors 65",
		`{"version": 1, "guard": false}`:      "unknown field",
		`{"version": 1, "version": 1}`:        "version",
		"version = 1":                         "want JSON",
		`{"version": 1, "memoryMiB": 1e9}`:    "memoryMiB",
		`{"version": 1, "processors": "all"}`: "processors",
	} {
		if _, err := parseOptionsText([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

// FuzzConfiguration: what is taken can be run, and says nothing that is not
// honoured.
func FuzzConfiguration(f *testing.F) {
	f.Add(ctrRun(f))
	f.Add([]byte(`{"process":{"args":["x"],"cwd":"/"},"linux":{}}`))
	f.Add([]byte(`{"Process":{"args":["x"],"cwd":"/"},"linux":{}}`))
	f.Add([]byte(`{"process":{"args":["x"],"cwd":"/"},"process":{},"linux":{}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		c, err := parseConfiguration(raw)
		if err != nil {
			return
		}
		if len(c.Process.Args) == 0 || !strings.HasPrefix(c.Process.Cwd, "/") {
			t.Errorf("took %q", raw)
		}
		s := sizeOf(options{}, c.Linux)
		if s.memoryMiB < 1 || s.processors < 1 {
			t.Errorf("size %+v of %q", s, raw)
		}
		for _, n := range c.Linux.Namespaces {
			if n.Path != "" {
				t.Errorf("took the namespace %q", n.Path)
			}
		}
	})
}

func FuzzProcess(f *testing.F) {
	f.Add([]byte(`{"args":["sh"],"cwd":"/","user":{"uid":1000,"gid":1000},"env":["A=b"],"noNewPrivileges":true}`))
	f.Add([]byte(`{"args":["sh"],"cwd":"/","capabilities":{"bounding":["CAP_SYS_ADMIN"]}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		p, err := parseProcess(raw)
		if err == nil && (len(p.Args) == 0 || p.Capabilities != nil && len(p.Capabilities.Ambient) > 0 && p.User.UID != 0) {
			t.Errorf("took %q", raw)
		}
	})
}

func FuzzOptions(f *testing.F) {
	f.Add([]byte(`{"version": 1, "memoryMiB": 512, "processors": 2}`))
	f.Add([]byte(`{"version": 1}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		o, err := parseOptionsText(raw)
		if err == nil && (o.Version != 1 || o.MemoryMiB < 0 || o.Processors < 0) {
			t.Errorf("took %q: %+v", raw, o)
		}
	})
}
