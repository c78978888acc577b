package qemu

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"hauberk.dev/vm"
	"hauberk.dev/vm/cgroup"
)

// confined checks what the kernel says of a machine's monitor.
func confined(t testing.TB, m *vm.Machine) {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/", m.PID())
	raw, err := os.ReadFile(dir + "status")
	if err != nil {
		t.Fatal(err)
	}
	status := map[string]string{}
	for line := range strings.Lines(string(raw)) {
		name, value, _ := strings.Cut(line, ":")
		status[name] = strings.Join(strings.Fields(value), " ")
	}
	for name, want := range map[string]string{
		"CapEff": "0000000000000000", "CapPrm": "0000000000000000", "CapBnd": "0000000000000000",
		"CapInh": "0000000000000000", "CapAmb": "0000000000000000", "NoNewPrivs": "1", "Seccomp": "2",
	} {
		if status[name] != want {
			t.Errorf("monitor has %s %q, want %q", name, status[name], want)
		}
	}
	if strings.HasPrefix(status["Uid"], "0 ") || strings.HasPrefix(status["Gid"], "0 ") {
		t.Errorf("monitor runs as root: uid %s, gid %s", status["Uid"], status["Gid"])
	}
	for _, ns := range []string{"mnt", "net", "pid", "ipc", "uts"} {
		ours, _ := os.Readlink("/proc/self/ns/" + ns)
		theirs, err := os.Readlink(dir + "ns/" + ns)
		if err != nil || ours == theirs {
			t.Errorf("monitor shares our %s namespace (%v)", ns, err)
		}
	}
	if _, err := cgroup.Find(); err == nil {
		groups, err := os.ReadFile(dir + "cgroup")
		if err != nil || !strings.Contains(string(groups), "/hauberk/hauberk-") {
			t.Errorf("monitor is in no cgroup of its own: %s, %v", groups, err)
		}
	}
	if _, err := os.Stat(dir + "root/etc/passwd"); err == nil {
		t.Error("monitor can see /etc/passwd")
	}
	if fi, err := os.Stat(m.Dir()); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("run directory: %v, %v", fi.Mode(), err)
	}
}
