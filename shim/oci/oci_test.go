package oci

import (
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/vm"
)

var update = flag.Bool("update", false, "rewrite what was translated, and the table in docs/oci.md")

func read(t testing.TB, name string) []byte {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("testdata", name+".json"))
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// pods are what the recorded configurations are told of their pods.
var pods = map[string]Facts{
	"cri16-container":          {Root: 1, PIDs: map[uint32]uint32{18056: 0}},
	"cri24-container":          {Root: 1, PIDs: map[uint32]uint32{13004: 0}},
	"cri16-sandbox":            {Network: "/var/run/netns/cni-85da5dfa-1e18-222d-68e8-3b393961633e"},
	"cri24-sandbox":            {Network: "/var/run/netns/cni-fe888c2a-55e7-285a-efe2-dda4f19829f6"},
	"cri16-privileged-sandbox": {Network: "/var/run/netns/cni-c9ba348f-9c67-aea0-30d9-e506bc121fc5"},
	"cri24-privileged-sandbox": {Network: "/var/run/netns/cni-8794c248-9b57-53df-268b-3ba4579cec4f"},
	"ctr16":                    {}, "ctr24": {}, "ctr16-more": {}, "ctr24-more": {},
}

// TestRecorded translates what ctr and the CRI of containerd 1.6.20 and 2.4.2
// wrote for runc, and compares it with what was agreed to be right.
func TestRecorded(t *testing.T) {
	for _, name := range slices.Sorted(maps.Keys(pods)) {
		t.Run(name, func(t *testing.T) {
			c, err := Parse(read(t, name))
			if err != nil {
				t.Fatal(err)
			}
			create, volumes, err := c.Create(pods[name])
			if err != nil {
				t.Fatal(err)
			}
			pod, err := c.Pod()
			if err != nil {
				t.Fatal(err)
			}
			size, err := c.Size(Options{}, 8)
			if err != nil {
				t.Fatal(err)
			}
			if n := len(create.Program.Seccomp.Filter); n > 0 { // package seccomp shows what it does
				create.Program.Seccomp.Filter = nil
				if n < 800 || n%8 != 0 {
					t.Errorf("a filter of %d bytes", n)
				}
			}
			got, err := json.MarshalIndent(map[string]any{
				"create": create, "volumes": volumes, "pod": pod, "size": size, "network": c.Network(),
			}, "", " ")
			if err != nil {
				t.Fatal(err)
			}
			golden(t, filepath.Join("testdata", name+".golden"), string(got)+"\n")
		})
	}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(name, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs, got\n%s", name, got)
	}
}

// TestPrivileged: a privileged container without the host's devices runs, one
// with them is told what to set.
func TestPrivileged(t *testing.T) {
	raw := read(t, "cri24-privileged")
	_, err := Parse(raw)
	if err == nil || !strings.Contains(err.Error(), "linux.devices: a sandbox does not have the host's") || !strings.Contains(err.Error(), "privileged_without_host_devices") {
		t.Fatalf("%v", err)
	}
	if len(err.Error()) > 1000 {
		t.Errorf("the error has %d bytes", len(err.Error()))
	}
	c, err := Parse(edit(t, raw, "linux.devices", nil))
	if err != nil {
		t.Fatal(err)
	}
	create, _, err := c.Create(Facts{PIDs: map[uint32]uint32{17995: 0}})
	if err != nil {
		t.Fatal(err)
	}
	r := create.Program.Rights
	if r.Bounding>>21&1 != 1 || r.Effective != r.Permitted || create.PID != guestproto.PIDPod || create.Program.Seccomp.Mode != guestproto.SeccompNone || !create.Program.NewPrivileges {
		t.Errorf("rights %+v, pid mode %d, seccomp %d", r, create.PID, create.Program.Seccomp.Mode)
	}
	if !c.Privileged() {
		t.Error("it does not count as privileged")
	}
	for field, value := range map[string]any{
		"linux.maskedPaths": list{"/proc/kcore"}, "linux.readonlyPaths": list{"/proc/sys"}, "process.noNewPrivileges": true,
		"linux.seccomp": object{"defaultAction": "SCMP_ACT_ALLOW"}, "process.capabilities.effective": list{"CAP_NET_ADMIN"}, "process.capabilities": nil,
	} {
		c, err := Parse(edit(t, edit(t, raw, "linux.devices", nil), field, value))
		if err != nil || c.Privileged() {
			t.Errorf("with %s = %v it counts as privileged (%v)", field, value, err)
		}
	}
	if c, err := Parse(read(t, "cri24-container")); err != nil || c.Privileged() {
		t.Errorf("any container counts as privileged (%v)", err)
	}
}

// edit sets a field of a configuration; nil removes it.
func edit(t testing.TB, raw []byte, path string, value any) []byte {
	t.Helper()
	var v map[string]any
	if err := json.Unmarshal(raw, &v); err != nil {
		t.Fatal(err)
	}
	at := v
	steps := strings.Split(path, ".")
	for _, s := range steps[:len(steps)-1] {
		next, ok := at[s].(map[string]any)
		if !ok {
			next = map[string]any{}
			at[s] = next
		}
		at = next
	}
	if last := steps[len(steps)-1]; value == nil {
		delete(at, last)
	} else {
		at[last] = value
	}
	out, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

type (
	object = map[string]any
	list   = []any
)

var ownNamespaces = list{object{"type": "pid"}, object{"type": "ipc"}, object{"type": "uts"}, object{"type": "mount"}, object{"type": "network"}}

func TestRefuses(t *testing.T) {
	with := func(n ...any) list { return append(slices.Clone(ownNamespaces), n...) }
	for _, c := range []struct {
		path  string
		value any
		want  string
	}{
		{"hooks", object{"prestart": list{object{"path": "/bin/true"}}}, "hooks"},
		{"hooks", object{"startContainer": list{object{"path": "/bin/true"}}}, "hooks"},
		{"hostname", strings.Repeat("x", 65), "hostname"},
		{"root.readOnly", true, `"root.readOnly true": this runtime does not know the field`},
		{"invented", 1, `"invented 1": this runtime does not know the field`},
		{"linux.invented.deep", "x", `"linux.invented {`},
		{"linux.resources.invented", "x", `"linux.resources.invented`},
		{"linux.namespaces", with(object{"type": "cgroup", "mode": 1}), `"linux.namespaces.mode 1"`},
		{"linux.seccomp", object{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": list{object{"names": list{"read"}, "action": "SCMP_ACT_LOG", "args": list{object{"mask": 1}}}}}, `"linux.seccomp.syscalls.args.mask 1"`},
		{"linux.seccomp", object{"defaultAction": "SCMP_ACT_NOTIFY"}, `linux.seccomp.defaultAction "SCMP_ACT_NOTIFY"`},
		{"linux.seccomp", object{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": list{object{"names": list{"raed"}, "action": "SCMP_ACT_ERRNO"}}}, `linux.seccomp.syscalls[0].names[0] "raed"`},
		{"linux.resources.memory.limit", 5, "linux.resources.memory.limit 5"},
		{"linux.resources.memory.disableOOMKiller", true, "disableOOMKiller"},
		{"linux.resources.pids.limit", -7, "linux.resources.pids.limit -7"},
		{"linux.resources.cpu", object{"quota": 100000, "period": 1}, "linux.resources.cpu.period 1"},
		{"linux.resources.cpu", object{"quota": 5}, "linux.resources.cpu.quota 5"},
		{"linux.resources.cpu.cpus", "one", "linux.resources.cpu.cpus"},
		{"linux.resources.cpu.idle", 2, "linux.resources.cpu.idle 2"},
		{"linux.resources.hugepageLimits", list{object{"pageSize": "2MB", "limit": 1 << 21}}, "hugepageLimits[0]"},
		{"linux.resources.blockIO", object{"weight": 10}, "linux.resources.blockIO"},
		{"linux.resources.unified", object{"cgroup.procs": "0"}, `linux.resources.unified["cgroup.procs"]`},
		{"linux.resources.unified", object{"memory.max/../x": "0"}, "linux.resources.unified"},
		{"linux.resources.devices", list{object{"allow": false, "type": "c", "major": 1, "minor": 3}}, "linux.resources.devices[0] 1:3"},
		{"linux.devices", list{object{"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}}, `linux.devices: a sandbox does not have the host's "/dev/kvm" (1 in all)`},
		{"linux.devices", list{object{"path": "dev/x", "type": "b", "major": 8, "minor": 0}}, "linux.devices[0].path"},
		{"linux.devices", list{object{"path": "/dev/x", "type": "b", "major": -8, "minor": 0}}, "linux.devices[0] -8:0"},
		{"linux.sysctl", object{"kernel.modprobe": "/x"}, `linux.sysctl["kernel.modprobe"] "/x"`},
		{"linux.sysctl", object{"net/../kernel/modprobe": "/x"}, "linux.sysctl"},
		{"linux.sysctl", object{"kernel.hostname": "x"}, "use hostname"},
		{"linux.uidMappings", list{object{"size": 1}}, "linux.uidMappings"},
		{"linux.rootfsPropagation", "public", `linux.rootfsPropagation "public"`},
		{"linux.maskedPaths", list{"etc/shadow"}, "linux.maskedPaths[0]"},
		{"linux.readonlyPaths", list{"/"}, "linux.readonlyPaths[0]"},
		{"linux.personality", object{"domain": "LINUX32"}, "linux.personality"},
		{"linux.namespaces", ownNamespaces[:4], `linux.namespaces: no "network": a sandbox cannot use the host's network`},
		{"linux.namespaces", ownNamespaces[1:], `linux.namespaces: no "pid": a sandbox cannot see the host's processes`},
		{"linux.namespaces", with(object{"type": "user"}), "linux.namespaces[5].type"},
		{"linux.namespaces", with(object{"type": "time"}), "linux.namespaces[5].type"},
		{"linux.namespaces", with(object{"type": "pid"}), "twice"},
		{"linux.namespaces", with(object{"type": "cgroup", "path": "/proc/1/ns/cgroup"}), "linux.namespaces[5].path"},
		{"linux.mountLabel", "l", "linux.mountLabel"},
		{"mounts", list{object{"destination": "/", "type": "tmpfs"}}, "mounts[0].destination"},
		{"mounts", list{object{"destination": "data", "type": "tmpfs"}}, "mounts[0].destination"},
		{"mounts", list{object{"destination": "/data", "type": "bind", "source": "etc"}}, "mounts[0].source"},
		{"mounts", list{object{"destination": "/data", "type": "ext4", "source": "/dev/sda"}}, `mounts[0].type "ext4"`},
		{"mounts", list{object{"destination": "/data", "type": "debugfs"}}, `mounts[0].type "debugfs"`},
		{"mounts", list{object{"destination": "/data", "type": "bind", "source": "/x", "options": list{"size=1"}}}, "does not understand"},
		{"mounts", list{object{"destination": "/data", "type": "tmpfs", "options": list{"uid=1,exec"}}}, "mounts[0].options[0]"},
		{"mounts", list{object{"destination": "/data", "type": "tmpfs", "options": list{"upperdir=/"}}}, "tmpfs does not understand"},
		{"mounts", list{object{"destination": "/data", "type": "bind", "source": "/x", "options": list{"idmap"}}}, "maps no users"},
		{"mounts", list{object{"destination": "/data", "type": "bind", "source": "/x", "uidMappings": list{object{"size": 1}}}}, "maps no users"},
		{"process.args", list{}, "process.args"},
		{"process.args", list{"a\x00b"}, "NUL"},
		{"process.cwd", "here", "process.cwd"},
		{"process.user.umask", 0o1777, "process.user.umask 01777"},
		{"process.user.username", "root", "process.user.username"},
		{"process.apparmorProfile", "localhost-mine", `process.apparmorProfile "localhost-mine"`},
		{"process.selinuxLabel", "l", "process.selinuxLabel"},
		{"process.oomScoreAdj", 1001, "process.oomScoreAdj 1001"},
		{"process.rlimits", list{object{"type": "RLIMIT_LUCK", "hard": 0}}, "process.rlimits[0]"},
		{"process.rlimits", list{object{"type": "RLIMIT_CORE", "hard": 1, "soft": 2}}, "process.rlimits[0].soft 2"},
		{"process.rlimits", list{object{"type": "RLIMIT_CORE"}, object{"type": "RLIMIT_CORE"}}, "process.rlimits[1]"},
		{"process.consoleSize", object{"height": 1 << 20}, "process.consoleSize"},
		{"process.capabilities.bounding", list{"CAP_FLY"}, `process.capabilities.bounding[0] "CAP_FLY"`},
		{"process.capabilities", object{"effective": list{"CAP_KILL"}}, "process.capabilities.effective: CAP_KILL"},
		{"process.capabilities", object{"ambient": list{"CAP_KILL"}, "permitted": list{"CAP_KILL"}}, "process.capabilities.ambient: CAP_KILL"},
		{"mounts", list{object{"destination": "/v", "type": "bind", "source": "/v", "options": list{"rbind", "rshared"}}}, "mounts[0].options: what a sandbox mounts does not come out of it"},
		{"mounts", list{object{"destination": "/v", "type": "bind", "source": "/v", "options": list{"rbind", "rslave", "rro"}}}, "mounts[0].options: what the host mounts later"},
		{"windows", object{"layerFolders": list{"x"}}, "windows"},
		{"vm", object{"kernel": object{"path": "/x"}}, "vm"},
		{"process", nil, "it needs process and linux"},
	} {
		_, err := Parse(edit(t, read(t, "ctr24"), c.path, c.value))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s %v: %v, want %q", c.path, c.value, err, c.want)
		}
	}
	for text, want := range map[string]string{
		`[]`: "no object", `{"process":{},"process":{}}`: "twice", `{} {}`: "behind", "{\"hostname\":\"\xff\"}": "UTF-8",
		`{"hostname":"` + strings.Repeat("x", MaxConfig) + `"}`: "at most",
	} {
		if _, err := Parse([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40s: %v, want %q", text, err, want)
		}
	}
}

func TestTakes(t *testing.T) {
	for _, c := range []struct {
		path  string
		value any
		is    func(guestproto.Create) any
		want  any
	}{
		{"hooks", object{}, nil, nil},
		{"linux.devices", list{}, nil, nil},
		{"annotations.anything", "at all", nil, nil},
		{"linux.personality", object{"domain": "LINUX"}, nil, nil},
		{"linux.resources.memory.swap", 5, nil, nil},
		{"process.apparmorProfile", "cri-containerd.apparmor.d", nil, nil},
		{"process.capabilities", nil, func(c guestproto.Create) any { return c.Program.Rights }, guestproto.Rights{Given: true}},
		{"process.capabilities.ambient", list{}, func(c guestproto.Create) any { return c.Program.Rights.Bounding }, uint64(0xa80425fb)},
		{"process.user.umask", 0o027, func(c guestproto.Create) any { return c.Program.Umask }, uint32(0o027)},
		{"process.oomScoreAdj", -998, func(c guestproto.Create) any { return c.Program.OOMScoreAdj }, int32(-998)},
		{"process.rlimits", list{object{"type": "RLIMIT_RTTIME", "hard": uint64(1<<64 - 1), "soft": 7}},
			func(c guestproto.Create) any { return c.Program.Rlimits }, []guestproto.Rlimit{{Kind: 15, Soft: 7, Hard: 1<<64 - 1}}},
		{"process.noNewPrivileges", false, func(c guestproto.Create) any { return c.Program.NewPrivileges }, true},
		{"root.readonly", true, func(c guestproto.Create) any { return c.ReadOnlyRoot }, true},
		{"domainname", "d", func(c guestproto.Create) any { return c.Domainname }, "d"},
		{"linux.rootfsPropagation", "rslave", func(c guestproto.Create) any { return c.RootPropagation }, uint32(unix.MS_SLAVE | unix.MS_REC)},
		{"linux.sysctl", object{"net.core.somaxconn": "5", "fs/mqueue/msg_max": "6"},
			func(c guestproto.Create) any { return c.Sysctls }, []guestproto.Setting{{Name: "fs/mqueue/msg_max", Value: "6"}, {Name: "net.core.somaxconn", Value: "5"}}},
		{"linux.resources.memory", object{"limit": 64 << 20, "reservation": 1 << 20},
			func(c guestproto.Create) any { return [2]uint64{c.Resources.MemoryMax, c.Resources.MemoryLow} }, [2]uint64{64 << 20, 1 << 20}},
		{"linux.resources.memory.limit", -1, func(c guestproto.Create) any { return c.Resources.MemoryMax }, uint64(guestproto.Unlimited)},
		{"linux.resources.cpu", object{"shares": 1024, "quota": -1, "period": 50000, "burst": 3, "idle": 1}, func(c guestproto.Create) any { return c.Resources },
			guestproto.Resources{CPUWeight: 39, CPUQuota: guestproto.Unlimited, CPUPeriod: 50000,
				Unified: []guestproto.Setting{{Name: "cpu.max.burst", Value: "3"}, {Name: "cpu.idle", Value: "1"}}}},
		{"linux.resources.pids.limit", -1, func(c guestproto.Create) any { return c.Resources.PidsMax }, uint32(guestproto.UnlimitedPids)},
		{"linux.resources.unified", object{"memory.high": "5"}, func(c guestproto.Create) any { return c.Resources.Unified }, []guestproto.Setting{{Name: "memory.high", Value: "5"}}},
		{"linux.devices", list{object{"path": "/dev/null", "type": "c", "major": 1, "minor": 3}, object{"path": "/dev/pipe", "type": "p", "fileMode": 0o10600}},
			func(c guestproto.Create) any { return c.Devices }, []guestproto.Device{{Path: "/dev/pipe", Kind: 'p', Mode: 0o600}}},
		{"linux.devices", list{object{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}, object{"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200, "fileMode": 0o600}},
			func(c guestproto.Create) any { return c.Devices }, []guestproto.Device{{Path: "/dev/fuse", Kind: 'c', Major: 10, Minor: 229, Mode: 0o666}, {Path: "/dev/net/tun", Kind: 'c', Major: 10, Minor: 200, Mode: 0o600}}},
		{"mounts", list{object{"destination": "/t", "type": "tmpfs", "source": "t", "options": list{"size=1m", "ro", "rw", "noexec", "noatime", "relatime", "rslave", "rro", "mode=700"}}},
			func(c guestproto.Create) any { return c.Mounts }, []guestproto.Mount{{Target: "/t", FS: "tmpfs", Data: "size=1m,mode=700",
				Flags: unix.MS_NOEXEC | unix.MS_RELATIME, Recursive: unix.MS_RDONLY, Propagation: unix.MS_SLAVE | unix.MS_REC}}},
	} {
		conf, err := Parse(edit(t, read(t, "ctr24"), c.path, c.value))
		if err != nil {
			t.Errorf("%s %v: %v", c.path, c.value, err)
			continue
		}
		create, _, err := conf.Create(Facts{})
		if err != nil || c.is != nil && !reflect.DeepEqual(c.is(create), c.want) {
			t.Errorf("%s %v: got %+v, %v, want %+v", c.path, c.value, c.is(create), err, c.want)
		}
	}
}

// TestDisks: the rules of resources.devices decide whether a disk is written.
func TestDisks(t *testing.T) {
	raw := edit(t, read(t, "ctr24"), "linux.devices", list{
		object{"path": "/dev/data", "type": "b", "major": 8, "minor": 16}, object{"path": "/dev/seed", "type": "b", "major": 8, "minor": 32},
	})
	raw = edit(t, raw, "linux.resources.devices", list{
		object{"allow": false, "access": "rwm"}, object{"allow": true, "type": "b", "major": 8, "minor": 16, "access": "rwm"},
		object{"allow": true, "type": "b", "major": 8, "minor": 32, "access": "r"},
	})
	c, err := Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	create, volumes, err := c.Create(Facts{})
	if err != nil {
		t.Fatal(err)
	}
	want := []Volume{
		{Field: "linux.devices[0]", Mount: -1, Device: 0, Target: "/dev/data"},
		{Field: "linux.devices[1]", Mount: -1, Device: 1, Target: "/dev/seed", ReadOnly: true},
	}
	if !slices.Equal(volumes, want) || create.Devices[1].Major != 8 || create.Devices[1].Minor != 32 || create.Devices[0].Mode != 0o666 {
		t.Errorf("%+v of %+v", volumes, create.Devices)
	}
}

// TestNamespacesOfOthers: only those of the pod can be joined.
func TestNamespacesOfOthers(t *testing.T) {
	for path, want := range map[string]string{
		"/proc/7/ns/pid": "", "/proc/9/ns/pid": "", "/proc/8/ns/pid": "not of this pod", "/proc/7/ns/ipc": "not of this pod",
		"/proc/self/ns/pid": "not of this pod", "/run/x": "not of this pod", "/proc/7/../1/ns/pid": "not of this pod",
	} {
		namespaces := slices.Clone(ownNamespaces)
		namespaces[0] = object{"type": "pid", "path": path}
		c, err := Parse(edit(t, read(t, "ctr24"), "linux.namespaces", namespaces))
		if err != nil {
			t.Fatal(err)
		}
		create, _, err := c.Create(Facts{PIDs: map[uint32]uint32{7: 0, 9: 5}})
		if want == "" && err == nil {
			mode := map[string]guestproto.PIDMode{"/proc/7/ns/pid": guestproto.PIDPod, "/proc/9/ns/pid": guestproto.PIDContainer}[path]
			if create.PID != mode || create.PIDOf != map[bool]uint32{true: 5}[mode == guestproto.PIDContainer] {
				t.Errorf("%s: mode %d of %d", path, create.PID, create.PIDOf)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), want) || want == "" {
			t.Errorf("%s: %v, want %q", path, err, want)
		}
	}
	namespaces := slices.Clone(ownNamespaces)
	namespaces[4] = object{"type": "network", "path": "/run/netns/a"}
	c, err := Parse(edit(t, read(t, "ctr24"), "linux.namespaces", namespaces))
	if err != nil || c.Network() != "/run/netns/a" {
		t.Fatalf("%q, %v", c.Network(), err)
	}
	if _, _, err := c.Create(Facts{Network: "/run/netns/b"}); err == nil {
		t.Error("the network of another pod is taken")
	}
	if _, _, err := c.Create(Facts{Network: "/run/netns/a"}); err != nil {
		t.Error(err)
	}
}

// TestExec: an exec has rights of its own and the container's filter.
func TestExec(t *testing.T) {
	c, err := Parse(read(t, "cri24-container"))
	if err != nil {
		t.Fatal(err)
	}
	p, err := c.Exec([]byte(`{"args":["id"],"cwd":"/","user":{"uid":5,"umask":63},"capabilities":{"bounding":["CAP_KILL"]},"noNewPrivileges":true,"terminal":true,"consoleSize":{"height":4,"width":5}}`))
	if err != nil {
		t.Fatal(err)
	}
	if p.Seccomp.Mode != guestproto.SeccompFilter || len(p.Seccomp.Filter) == 0 || p.Rights != (guestproto.Rights{Given: true, Bounding: 1 << 5}) ||
		p.UID != 5 || p.Umask != 63 || p.NewPrivileges || !p.TTY || p.Rows != 4 || p.Cols != 5 {
		t.Errorf("%+v", p)
	}
	if _, err := c.Exec([]byte(`{"args":["id"],"cwd":"/","invented":1}`)); err == nil || !strings.Contains(err.Error(), "process.invented") {
		t.Error(err)
	}
	if p, err := ParseProcess([]byte(`{"args":["id"],"cwd":"/"}`)); err != nil || p.Seccomp.Mode != guestproto.SeccompDefault {
		t.Errorf("%+v, %v", p, err)
	}
}

func TestResources(t *testing.T) {
	r, cpus, err := ParseResources(resourcesType, []byte(`{"memory":{"limit":1048576,"swap":1048576},"cpu":{"shares":2,"quota":0,"cpus":"5,0-2,1"},"hugepageLimits":[{"pageSize":"2MB","limit":0}]}`))
	if err != nil || r.MemoryMax != 1<<20 || r.CPUWeight != 1 || r.CPUQuota != 0 || r.CPUs != "" || !slices.Equal(cpus, []int{0, 1, 2, 5}) {
		t.Errorf("%+v, %v, %v", r, cpus, err)
	}
	for text, want := range map[string]string{
		`{"memory":{"limit":7}}`:      "memory.limit 7",
		`{"invented":1}`:              "linux.resources.invented 1",
		`{"cpu":{"cpus":"3-1"}}`:      "cpu.cpus",
		`{"cpu":{"cpus":"0-9000"}}`:   "cpu.cpus",
		`{"cpu":{"cpus":"0,,1"}}`:     "cpu.cpus",
		`{"cpu":{"cpus":"-1"}}`:       "cpu.cpus",
		`{"cpu":{"mems":"0"}}`:        "linux.resources.cpu.mems",
		`{"memory":{"limit":1e400}}`:  "",
		`{"memory":{"limit":"lots"}}`: "",
	} {
		if _, _, err := ParseResources(resourcesType, []byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
	if _, _, err := ParseResources("windows", nil); err == nil {
		t.Error("another type is taken")
	}
}

func TestPod(t *testing.T) {
	raw := read(t, "ctr24")
	for kind, want := range map[string]string{"sandbox": "has no id", "container": "has no id", "pod": "want sandbox or container"} {
		c, err := Parse(edit(t, raw, "annotations", object{annotationKind: kind}))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Pod(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", kind, err, want)
		}
	}
}

func TestSize(t *testing.T) {
	sandbox := object{annotationKind: "sandbox", annotationID: "x"}
	with := func(more object) object {
		all := maps.Clone(sandbox)
		maps.Copy(all, more)
		return all
	}
	for _, c := range []struct {
		annotations object
		resources   object
		options     Options
		want        Size
	}{
		{nil, object{}, Options{}, Size{defaultMemoryMiB, 1}},
		{nil, object{"memory": object{"limit": 64<<20 + 1}, "cpu": object{"quota": 150000, "period": 100000}}, Options{}, Size{65 + ownMiB, 2}},
		{nil, object{"cpu": object{"quota": 150000}}, Options{}, Size{defaultMemoryMiB, 2}},
		{nil, object{"memory": object{"limit": -1}, "cpu": object{"quota": -1, "shares": 3000}}, Options{}, Size{defaultMemoryMiB, 3}},
		{nil, object{"memory": object{"limit": 64 << 20}, "cpu": object{"quota": 1 << 30}}, Options{Version: 1, MemoryMiB: 512, Processors: 2}, Size{512, 2}},
		{nil, object{"cpu": object{"quota": 1 << 30}}, Options{}, Size{defaultMemoryMiB, 4}},
		{with(object{annotationMemory: "402653184", annotationQuota: "150000", annotationPeriod: "100000", annotationShares: "512"}), object{"cpu": object{"shares": 2}}, Options{}, Size{384 + ownMiB, 2}},
		{with(object{annotationMemory: "0", annotationQuota: "-1", annotationShares: "4096"}), object{}, Options{}, Size{defaultMemoryMiB, 4}},
	} {
		raw := edit(t, edit(t, read(t, "ctr24"), "linux.resources", c.resources), "annotations", c.annotations)
		conf, err := Parse(raw)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := conf.Size(c.options, 4); err != nil || got != c.want {
			t.Errorf("%v %v: %+v, %v, want %+v", c.annotations, c.resources, got, err, c.want)
		}
	}
	for _, text := range []string{"many", "99999999999999999999", fmt.Sprint(maxMemory + 1)} {
		conf, err := Parse(edit(t, read(t, "ctr24"), "annotations", with(object{annotationMemory: text})))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conf.Size(Options{}, 4); err == nil || !strings.Contains(err.Error(), "sandbox-memory") {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// TestFits: what a machine has no room for is said.
func TestFits(t *testing.T) {
	s := Size{MemoryMiB: 256, Processors: 2}
	for _, c := range []struct {
		memory, quota, period int64
		want                  string
	}{
		{0, 0, 0, ""}, {160 << 20, 200000, 100000, ""}, {-1, -1, 0, ""}, {1, 1, 0, ""},
		{160<<20 + 1, 0, 0, "would need 257"}, {0, 200001, 100000, "would need 3"}, {0, 300000, 0, "would need 3"},
	} {
		err := s.Fits(c.memory, c.quota, c.period, 8)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%+v: %v", c, err)
		}
	}
	if err := s.Fits(0, 900000, 100000, 2); err != nil {
		t.Errorf("more processors than the host has: %v", err)
	}
}

func TestOptions(t *testing.T) {
	o, err := ParseOptions([]byte(`{"version": 1, "memoryMiB": 512, "processors": 2}`))
	if err != nil || o.MemoryMiB != 512 || o.Processors != 2 {
		t.Errorf("%+v, %v", o, err)
	}
	if o, err := ParseOptions(nil); err != nil || o != (Options{}) {
		t.Errorf("%+v, %v", o, err)
	}
	for text, want := range map[string]string{
		`{"memoryMiB": 512}`:                  "version 0",
		`{"version": 1, "memoryMiB": 1}`:      "memoryMiB 1",
		`{"version": 1, "processors": 65}`:    "processors 65",
		`{"version": 1, "guard": false}`:      "unknown field",
		`{"version": 1, "version": 1}`:        "version",
		"version = 1":                         "want JSON",
		`{"version": 1, "processors": "all"}`: "processors",
	} {
		if _, err := ParseOptions([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

// FuzzParse: what is taken is a message that the agent takes.
func FuzzParse(f *testing.F) {
	for name := range pods {
		f.Add(read(f, name))
	}
	f.Add([]byte(`{"process":{"args":["x"],"cwd":"/"},"linux":{}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		c, err := Parse(raw)
		if err != nil {
			return
		}
		_, _ = c.Pod()
		if s, err := c.Size(Options{}, 4); err == nil && (s.MemoryMiB < vm.MinMemoryMiB || s.Processors < 1) {
			t.Errorf("size %+v of %q", s, raw)
		}
		create, volumes, err := c.Create(Facts{Network: c.Network()})
		if err != nil {
			return
		}
		for _, v := range volumes {
			if (v.Mount < 0) == (v.Device < 0) || v.Mount >= len(create.Mounts) || v.Device >= len(create.Devices) {
				t.Errorf("volume %+v", v)
			}
		}
		b := create.Append(nil)
		if len(b) > guestproto.MaxPayload {
			return // the channel refuses it
		}
		if _, err := guestproto.ParseCreate(b); err != nil {
			t.Errorf("%v: from %q", err, raw)
		}
	})
}

func FuzzProcess(f *testing.F) {
	f.Add([]byte(`{"args":["sh"],"cwd":"/","user":{"uid":1000,"gid":1000},"env":["A=b"],"noNewPrivileges":true}`))
	f.Add([]byte(`{"args":["sh"],"cwd":"/","capabilities":{"bounding":["CAP_SYS_ADMIN"]}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		p, err := ParseProcess(raw)
		if err != nil {
			return
		}
		x := guestproto.Exec{Container: 1, Program: p}
		if b := x.Append(nil); len(b) <= guestproto.MaxPayload {
			if _, err := guestproto.ParseExec(b); err != nil {
				t.Errorf("%v: from %q", err, raw)
			}
		}
	})
}

func FuzzResources(f *testing.F) {
	f.Add([]byte(`{"memory":{"limit":1048576,"swap":1048576},"cpu":{"shares":2,"quota":0}}`))
	f.Add([]byte(`{"unified":{"memory.high":"5"}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		r, _, err := ParseResources(resourcesType, raw)
		if err != nil {
			return
		}
		if r.CPUWeight > 10000 || r.CPUPeriod > maxPeriod {
			t.Errorf("%+v of %q", r, raw)
		}
	})
}
