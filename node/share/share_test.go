package share

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
)

func file(text string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(text)} }

func goodNode() fstest.MapFS {
	return fstest.MapFS{
		"sys/kernel/security/lsm":              file("lockdown,capability,bpf\n"),
		"sys/kernel/security/lockdown":         file("none [integrity] confidentiality\n"),
		"sys/kernel/btf/vmlinux":               file("types"),
		"sys/fs/cgroup/cgroup.controllers":     file("cpu memory\n"),
		"proc/sys/kernel/osrelease":            file("6.1.0-56-cloud-amd64\n"),
		"sys/kernel/btf/overlay":               file("types"),
		"sys/fs/cgroup/cgroup.subtree_control": file("\n"),
	}
}

// Each thing that a kernel lacks is named, and all of them at once.
func TestSupported(t *testing.T) {
	if err := Supported(goodNode()); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, path, text, want string
	}{
		{"no BPF LSM", "sys/kernel/security/lsm", "lockdown,capability,bpfilter\n", "without BPF LSM"},
		{"no securityfs", "sys/kernel/security/lsm", "", "mount securityfs"},
		{"no types", "sys/kernel/btf/vmlinux", "", "CONFIG_DEBUG_INFO_BTF"},
		{"old kernel", "proc/sys/kernel/osrelease", "5.15.0-1\n", "too old"},
		{"a release that is none", "proc/sys/kernel/osrelease", "mine\n", "too old"},
		{"cgroups of version 1", "sys/fs/cgroup/cgroup.controllers", "", "unified_cgroup_hierarchy"},
		{"confidential", "sys/kernel/security/lockdown", "none integrity [confidentiality]\n", "lockdown=integrity"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := goodNode()
			if delete(n, tt.path); tt.text != "" {
				n[tt.path] = file(tt.text)
			}
			if err := Supported(n); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v; want %q in it", err, tt.want)
			}
		})
	}
	err := Supported(fstest.MapFS{})
	for _, want := range []string{"securityfs", "BTF", "release", "cgroups"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q in it", err, want)
		}
	}
}

func TestReadPolicies(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"web":   `[{"name":"web","spec":{"exec":{"origin":"image"}}}]`,
		"empty": `[]`, "more": `[{"name":"web","spec":{}}] x`, "typo": `[{"name":"web","spec":{"exek":{}}}]`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name+".json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if p, err := ReadPolicies(dir, "web"); err != nil || len(p) != 1 || p[0].Spec.Exec.Origin != "image" {
		t.Errorf("%+v, %v", p, err)
	}
	if p, err := ReadPolicies(dir, ""); err != nil || p != nil {
		t.Errorf("no name: %+v, %v; want the baseline", p, err)
	}
	for name, want := range map[string]string{"missing": "no such file", "empty": "no policy", "more": "follows", "typo": "exek", "../web": "plain file name", "a/b": "plain file name"} {
		if _, err := ReadPolicies(dir, name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v; want %q in it", name, err, want)
		}
	}
}

// A hook that cannot say what to bind, or whom to ask, fails.
func TestHookFails(t *testing.T) {
	bundle := t.TempDir()
	if err := os.WriteFile(bundle+"/config.json", []byte(`{"root":{"path":"rootfs"}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	h := Hook{Socket: t.TempDir() + "/sock", Policies: bundle}
	for name, state := range map[string]string{
		"nothing": "", "no process": `{"id":"a","bundle":"` + bundle + `"}`, "no bundle": `{"id":"a","pid":1}`,
		"no configuration": `{"id":"a","pid":1,"bundle":"/nowhere"}`,
		"no policy":        `{"id":"a","pid":1,"bundle":"` + bundle + `","annotations":{"` + PolicyAnnotation + `":"missing"}}`,
		"no loader":        `{"id":"a","pid":` + jsonNumber(os.Getpid()) + `,"bundle":"` + bundle + `"}`,
	} {
		if _, err := h.Bind(strings.NewReader(state)); err == nil {
			t.Errorf("%s: the hook succeeded", name)
		}
	}
	if err := h.Unbind(strings.NewReader(`{"id":"a"}`)); err == nil {
		t.Error("no loader: unbinding succeeded")
	}
}

func jsonNumber(n int) string {
	b, _ := json.Marshal(n)
	return string(b)
}

func TestConfig(t *testing.T) {
	dir := t.TempDir()
	text := `{"root":{"path":"rootfs"},"linux":{"devices":[{"type":"c","major":10,"minor":229},{"type":"b","major":8,"minor":1},{"type":"p"}]},"more":1}`
	if err := os.WriteFile(dir+"/config.json", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := readConfig(dir)
	if err != nil {
		t.Fatal(err)
	}
	if got := c.root("/b"); got != "/b/rootfs" {
		t.Errorf("root %q", got)
	}
	if d := c.devices(); len(d) != 2 || d[0] != [3]uint32{0o020000, 10, 229} || d[1] != [3]uint32{0o060000, 8, 1} {
		t.Errorf("devices %v", d)
	}
}

func FuzzCgroupPath(f *testing.F) {
	for _, s := range []string{"0::/a/b\n", "0::/\n", "1:cpu:/x\n0::/y\n", "0::/../x\n", "", "0::x"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		p, err := cgroupPath(raw)
		if err == nil && (!strings.HasPrefix(p, "/") || len(p) < 2 || strings.Contains(p+"/", "/../") || filepath.Clean(p) != p) {
			t.Errorf("%q", p)
		}
	})
}

func FuzzRequest(f *testing.F) {
	for _, s := range []string{`{"op":"bind","id":"a","devices":[[1,2,3]]}`, `{"op":"bind","id":"../x"}`, `{"op":"x","id":"a"} {}`, `{"id":"a","what":1}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		r, err := parseRequest(raw)
		if err == nil && (!containerID.MatchString(r.ID) || strings.ContainsAny(r.ID, "/\x00")) {
			t.Errorf("%q", r.ID)
		}
	})
}
