package guard

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"hauberk.dev/api/node"
	"hauberk.dev/api/spec"
)

// attempt is one attack: it works on a machine without the Guard, or it proves
// nothing; under the strict policy it is refused by the rule.
type attempt struct {
	run  string // name and arguments of testdata/attack
	rule string // part of the rule's text
	op   Op
	// What it is an instance of: P and B of the list in docs/guard.md, T of MITRE
	// ATT&CK.
	items string
}

func attempts() []attempt {
	const (
		image   = "only programs and libraries of the image"
		memory  = "memory that was written"
		kept    = "/etc/app may not be changed"
		bait    = "/srv/bait may be neither read nor changed"
		preload = "/etc/ld.so.preload may not be changed"
		shm     = "/shm/a/b/secret may not be changed"
		agent   = "the agent and the kernel"
		device  = "no device but"
		setting = "settings"
		mount   = "nothing may be mounted"
		raw     = "only TCP, UDP"
		listed  = "only the listed destinations"
		modules = "kernel modules may not"
		traced  = "no process may be traced"
	)
	list := []attempt{
		{"drop /tmp/x", image, OpExec, "P1 B7 T1105"},
		{"drop=2 /shm/x", image, OpExec, "P1 B7 T1105"},
		{"execthread", image, OpExec, "P1 T1105"},
		{"memfd", image, OpExec, "P6 B10 T1620"},
		{"script", image, OpExec, "P1 B12 T1059"},
		{"exec=1 /bin/curl", "/bin/curl may not run", OpListed, "P2 B3 T1059"},
		{"exec=2 /bin/curl-too", "/bin/curl may not run", OpListed, "P2 B3 T1059"},
		{"exec=digest /bin/digested", "what has the digest sha256:a1", OpListed, "P2 B7 T1036"},
		{"exec=digest2 /opt/digested", "what has the digest sha256:a1", OpListed, "P2 B7 T1036"},
		{"maplisted", "/bin/curl may not run", OpListed, "P2 B8 T1574"},
		{"revshell", "network socket as its input", OpShell, "P3 T1059.004"},

		{"mapwritten", image, OpMap, "P1 B8 T1574"},
		{"protectwritten", image, OpMap, "B24 P1 B9 T1055"},
		{"mapshm", image, OpMap, "B10 T1574"},
		{"mapzero", image, OpMap, "B9 T1620"},
		{"memfdmap", image, OpMap, "P6 B10 T1620"},
		{"shmexec", image, OpMap, "B10 T1620"},
		{"rwximage", memory, OpMemory, "B9 T1055"},
		{"protectrwx", memory, OpMemory, "B9 T1055"},
		{"anonymous", memory, OpMemory, "B9 T1620"},
		{"rwx", memory, OpMemory, "B9 T1620"},
		{"patch", memory, OpMemory, "B9 T1055"},
		{"procmem", memory, OpMemory, "B13 T1055.009"},
		{"persona", memory, OpMemory, "B9 T1620"},

		{"write /etc/app/1", kept, OpWrite, "P8 B4 T1565"},
		{"write=2 /proc/self/root/etc/app/2", kept, OpWrite, "P8 B4 T1565"},
		{"write=3 /etc/link/3", kept, OpWrite, "P8 B4 T1565"},
		{"write=4 /etc/app/new", kept, OpWrite, "P8 B4 T1565"},
		{"truncate /etc/app/4", kept, OpWrite, "P8 T1565"},
		{"chmod /etc/app/5", kept, OpWrite, "P8 T1222"},
		{"chown /etc/app/6", kept, OpWrite, "P8 T1222"},
		{"utimes /etc/app/7", kept, OpWrite, "P8 T1070.006"},
		{"unlink /etc/app/8", kept, OpWrite, "P8 T1070.004"},
		{"rename /etc/app/9 /tmp/9", kept, OpWrite, "P8 B7 T1036.003"},
		{"rename=2 /etc/app/10 /etc/app/11", kept, OpWrite, "P8 B7 T1036.003"},
		{"exchange /etc/app/12 /tmp/kept", kept, OpWrite, "P8 B7 T1565"},
		{"over /etc/app/13", kept, OpWrite, "P8 T1565"},
		{"link /etc/app/14 /tmp/14", kept, OpWrite, "P8 B3 T1565"},
		{"linkdrop /etc/app/dropped", kept, OpWrite, "P8 B3 T1574"},
		{"symlink /etc/app/symlink", kept, OpWrite, "P8 B4 T1547"},
		{"mkdir /etc/app/dir", kept, OpWrite, "P8 T1565"},
		{"mkfifo /etc/app/fifo", kept, OpWrite, "P8 T1565"},
		{"setxattr /etc/app/15", kept, OpWrite, "P8 T1564"},
		{"chroot /etc/app/16", kept, OpWrite, "P8 B5 T1565"},
		{"chattr /shm/a/b/secret", shm, OpWrite, "P8 T1222"},
		{"rename=3 /shm/a /shm/moved", shm, OpWrite, "P8 B7 T1036.003"},
		{"read /srv/bait/deep/er/coin", bait, OpRead, "P9 B4 T1005"},
		{"read=2 /srv/bait", bait, OpRead, "P9 B4 T1005"},
		{"write=5 /srv/bait/deep/er/coin", bait, OpWrite, "P8 B4 T1565"},
		{"write=6 /etc/ld.so.preload", preload, OpWrite, "P8 B4 T1565"},
		{"over=2 /etc/ld.so.preload", preload, OpWrite, "P8 T1565"},
		{"linkdrop=2 /opt/three", "/opt/three may not be changed", OpWrite, "P8 B3 T1574"},
		{"mkdir=2 /opt/app", "/opt/app/conf may not be changed", OpWrite, "P8 T1565"},
		{"symlink=2 /opt/two", "/opt/two/conf may not be changed", OpWrite, "P8 B4 T1547"},
		{"deep /tmp", "deeper than 96", OpWrite, "B6 T1565"},

		{"connect 192.0.2.1:81", listed, OpEgress, "P7 T1041"},
		{"connect6 192.0.2.1:82", listed, OpEgress, "P7 B19 T1041"},
		{"udp 192.0.2.1:54", listed, OpEgress, "P7 T1095"},
		{"sendto 192.0.2.1:55", listed, OpEgress, "P7 B19 T1095"},
		{"sendtoblank 192.0.2.1:56", listed, OpEgress, "P7 B19 T1095"},
		{"fastopen 192.0.2.1:83", listed, OpEgress, "P7 T1041"},
		{"raw", raw, OpRawSocket, "P7 T1095"},
		{"packet", raw, OpRawSocket, "P7 T1040"},
		{"generic", raw, OpRawSocket, "P7 T1095"},
		{"uevent", raw, OpRawSocket, "T1082"},

		{"bpfmap", "eBPF may not be used", OpBPF, "B23 T1014"},
		{"bpfopen", "eBPF may not be used", OpBPF, "B23 T1562.001"},
		{"bpflist", "eBPF may not be used", OpBPF, "B23 T1518.001"},
		{"delmodule", modules, OpModule, "B23 T1562.001"},
		{"newmodule", modules, OpModule, "B23 T1547.006"},
		{"ptrace", traced, OpPtrace, "B13 T1055.008"},
		{"traceme", traced, OpPtrace, "B13 T1055.008"},
		{"vmwrite", traced, OpPtrace, "B13 T1055"},
		{"mount", mount, OpMount, "B3 T1611"},
		{"bind /etc", mount, OpMount, "B3 T1564"},
		{"remount", mount, OpMount, "B3 T1611"},
		{"fsmount", mount, OpMount, "B3 T1611"},
		{"pivot", mount, OpMount, "B3 B5 T1611"},
		{"mknod", "no device file", OpMknod, "T1611"},
		{"iouring", "io_uring", OpIOUring, "B1 T1562"},
		{"userns", "user namespace", OpUserNS, "B15 T1611"},
		{"open /dev/disk", device, OpDevice, "T1611"},
		{"open=2 /dev/port", device, OpDevice, "T1611"},
		{"killagent", agent, OpAgent, "B23 T1562.001"},
		{"traceagent", agent, OpAgent, "B23 T1562.001"},
		{"limitagent", agent, OpAgent, "B23 T1562.001"},
		{"niceagent", agent, OpAgent, "B23 T1562.001"},
		{"setting", setting, OpSetting, "T1562"},
		{"sysfs", setting, OpSetting, "T1562"},
		{"reboot", setting, OpSetting, "T1529"},
		{"ioperm", setting, OpSetting, "B22 T1014"},
		{"umount", mount, OpMount, "B23 T1562.001"},
		// These change the tool that others run.
		{"touched", image, OpExec, "P1 B25 T1554"},
		{"unlinked", image, OpExec, "B10 T1070.004"},
	}
	return list
}

// mounting is refused even where mounting is allowed.
func mounting() []attempt {
	const device, image = "no device but", "only programs and libraries of the image"
	return []attempt{
		{"mountnew=1 none devtmpfs", device, OpDevice, "B11 T1611"}, {"fsmount=1 devtmpfs", device, OpDevice, "B3 T1611"},
		{"mountnew=2 none debugfs", device, OpDevice, "B11 T1611"}, {"mountnew=3 /dev/disk erofs", device, OpDevice, "B11 T1611"},
		{"mountover", image, OpExec, "B11 T1574"}, {"drop=3 /mnt/y", image, OpExec, "P1 B7 T1105"},
	}
}

// benign is what a service does: it works with and without the Guard.
var benign = []string{
	"exec /bin/tool", "pipeshell", "mapimage", "protectimage", "personaquery",
	"write=20 /tmp/file", "read=20 /etc/app/1", "write=21 /etc/other", "rename=20 /tmp/file /tmp/file2", "unlink=20 /tmp/file2",
	"mkdir=20 /tmp/dir", "rmdir=20 /tmp/dir", "write=22 /shm/file", "whiteout", "mkfifo=20 /tmp/fifo", "mknodreg",
	"connect=20 192.0.2.1:80", "connect=21 127.0.0.1:4000", "connect=22 198.51.100.7:5000", "udp=20 192.0.2.1:53", "sendto=20 192.0.2.1:53",
	"route", "auditsocket", "unixpair", "killown", "open=20 /dev/null", "open=21 /dev/urandom", "ownproc", "utsns", "read=21 /proc/1/stat", "read=22 /proc/self/maps",
}

func allOperations() []spec.GuardOperation { return slices.Sorted(maps.Keys(operations)) }

// strict denies all that a policy can deny.
func strict() spec.GuardPolicy {
	return spec.GuardPolicy{
		Mode: "enforce",
		Exec: &spec.GuardExec{Origin: "image", AnonymousMemory: "deny", ShellOnSocket: "deny", Deny: []string{"/bin/curl", "sha256:" + digestForTest}, Severity: spec.SeverityCritical},
		Files: []spec.GuardFile{
			{Path: "/etc/app", Deny: "w", Severity: spec.SeverityWarning},
			{Path: "/srv/bait", Deny: "rw", Severity: spec.SeverityCritical},
			{Path: "/etc/ld.so.preload", Deny: "w"},
			{Path: "/shm/a/b/secret", Deny: "w"},
			{Path: "/opt/app/conf", Deny: "w"},
			{Path: "/opt/two/conf", Deny: "w"},
			{Path: "/opt/three", Deny: "w"},
		},
		Net: &spec.GuardNet{Egress: []spec.GuardEgress{{CIDR: "192.0.2.0/24", Ports: []int32{80}}, {Service: "ledger"}}},
		Sys: &spec.GuardSys{Deny: Baseline().Sys.Deny, Severity: spec.SeverityWarning},
	}
}

// compileForTest compiles policies of one generation.
func compileForTest(t testing.TB, generation uint64, policies ...spec.GuardPolicy) Compiled {
	t.Helper()
	var named []node.NamedGuardPolicy
	for i, p := range policies {
		named = append(named, node.NamedGuardPolicy{Name: fmt.Sprint("policy-", i), Spec: p})
	}
	return compileNamed(t, generation, named...)
}

func compileNamed(t testing.TB, generation uint64, policies ...node.NamedGuardPolicy) Compiled {
	t.Helper()
	g := node.Guard{Generation: generation, Services: map[string]string{"ledger": "198.51.100.7"}, Policies: policies}
	c, err := Compile(g, CompileFacts{Gateway: netip.MustParseAddr("192.0.2.1"), FilesWith: filesForTest})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// filesForTest knows one digest, of two programs of the image.
func filesForTest([]string) (map[string][]string, error) {
	return map[string][]string{digestForTest: {"/bin/digested", "/opt/digested"}}, nil
}

var digestForTest = strings.Repeat("a1", 32)

// imageFiles are what the attempts find in the image.
func imageFiles() map[string][]byte {
	files := map[string][]byte{"etc/other": []byte("x"), "bin/script": []byte("#!/bin/curl nothing\n"), "srv/bait/deep/er/coin": []byte("x"), "opt/gone": []byte("x")}
	for i := range 20 {
		files[fmt.Sprint("etc/app/", i)] = []byte("kept")
	}
	for _, name := range []string{"vault/x", "vault/open/y", "vault/open/closed/z", "key", "own", "trap/coin", "secret/a", "secret/b", "secret/c", "secret/d"} {
		files["srv/"+name] = []byte("kept")
	}
	return files
}

func name(run string) string {
	n, _, _ := strings.Cut(run, " ")
	return n
}

// quiet are refused without a word: programs do such things without meaning
// harm.
var quiet = []string{"readagent", "securityxattr /etc/other"}

func wantNoWord(t *testing.T, run string, o outcome) {
	t.Helper()
	for _, e := range o.events[name(run)] {
		if e.Verdict != Allowed {
			t.Errorf("%s: %s; want no word of it", run, e)
		}
	}
}

func checkRefused(t *testing.T, c *Compiled, a attempt, o outcome) {
	t.Helper()
	got := o.ran[name(a.run)]
	if !strings.HasPrefix(got, "exit 10 ") {
		t.Errorf("%s: %s; want it refused", a.run, got)
	}
	for _, e := range o.events[name(a.run)] {
		r, ok := c.Rule(e.Rule)
		if e.Verdict >= Denied && e.Op == a.op && ok && strings.Contains(r.Text, a.rule) && e.Generation == c.Generation {
			t.Logf("%s", e)
			return
		}
	}
	t.Errorf("%s: no event of operation %d by rule %q in %v", a.run, a.op, a.rule, o.events[name(a.run)])
}

// checkSequence wants every denial to have been told, in order.
func checkSequence(t *testing.T, o outcome, last uint64) {
	t.Helper()
	seen := map[uint64]bool{}
	for _, events := range o.events {
		for _, e := range events {
			if e.Verdict != Allowed {
				seen[e.Sequence] = true
			}
		}
	}
	for i := uint64(1); i <= last; i++ {
		if !seen[i] {
			t.Errorf("denial %d of %d was never told", i, last)
		}
	}
}

// With nothing but a policy that allows everything, the Guard, the agent and
// the kernel stay out of reach.
func TestBuiltInRulesHoldUnderAnyPolicy(t *testing.T) {
	compiled := compileForTest(t, 1, spec.GuardPolicy{Exec: &spec.GuardExec{Origin: "any", AnonymousMemory: "allow", ShellOnSocket: "allow"}})
	files := imageFiles()
	files[".open"] = compiled.Blob
	list := []attempt{
		{"bpfmap", "eBPF programs and maps", OpBPF, "B23 T1014"}, {"bpfopen", "eBPF programs and maps", OpBPF, "B23 T1562.001"},
		{"delmodule", "the kernel's modules", OpModule, "B23 T1562.001"}, {"newmodule", "the kernel's modules", OpModule, "B23 T1547.006"},
		{"killagent", "the agent", OpAgent, "B23 T1562.001"}, {"traceagent", "the agent", OpAgent, "B23 T1562.001"}, {"limitagent", "the agent", OpAgent, "B23 T1562.001"}, {"niceagent", "the agent", OpAgent, "B23 T1562.001"},
		{"open /dev/disk", "no device but", OpDevice, "T1611"}, {"open=2 /dev/port", "no device but", OpDevice, "T1611"},
		{"setting", "settings", OpSetting, "T1562"}, {"sysfs", "settings", OpSetting, "T1562"}, {"reboot", "settings", OpSetting, "T1529"}, {"ioperm", "settings", OpSetting, "B22 T1014"},
	}
	allowed := []string{"drop /tmp/x", "memfd", "rwx", "patch", "procmem", "persona", "revshell", "ptrace", "mount", "raw", "mknod", "iouring", "userns", "bpflist",
		"write /etc/app/1", "connect 192.0.2.1:81", "deep /tmp"}
	steps := append([]string{"file /shm/a/b/secret", "file /tmp/kept"}, "policy .open")
	for _, a := range list {
		steps = append(steps, "run "+a.run)
	}
	for _, a := range allowed {
		steps = append(steps, "run "+a)
	}
	// A process that dies of a fault has the kernel start this program.
	steps = append(steps, "setting /proc/sys/kernel/core_pattern |/run/roots/0/root/bin/tool nothing", "run coredump")
	o := boot(t, true, files, steps...)
	for _, a := range list {
		checkRefused(t, &compiled, a, o)
	}
	for _, a := range allowed {
		if got := o.ran[name(a)]; !strings.HasPrefix(got, "exit 0 ") {
			t.Errorf("%s: %s; want it to work", a, got)
		}
	}
	helper := slices.IndexFunc(o.events["coredump"], func(e Event) bool { return e.Op == OpHelper && e.Verdict == Denied && e.Rule == 7 })
	if helper < 0 {
		t.Errorf("a program the kernel starts for a dying process: %v; want it refused", o.events["coredump"])
	}
}

// A rule for a file holds where mounting is allowed; and a privileged container,
// which may mount, gains nothing else by it.
func TestProtectedFilesHoldAgainstMounts(t *testing.T) {
	privileged := compileForTest(t, 4, Privileged())
	compiled := compileForTest(t, 3, spec.GuardPolicy{Files: []spec.GuardFile{{Path: "/etc/app", Deny: "w"}, {Path: "/srv/bait", Deny: "rw"}}})
	files := imageFiles()
	files["etc/app/secret"] = []byte("kept")
	files[".files"], files[".privileged"] = compiled.Blob, privileged.Blob
	list := []attempt{
		{"bind /etc/app", "/etc/app may not be changed", OpWrite, "B3 T1564"},
		{"bindover /etc/app", "/etc/app may not be changed", OpWrite, "B3"},
		{"bindover=2 /etc", "/etc/app may not be changed", OpWrite, "B3"},
		{"chroot /etc/app/secret", "/etc/app may not be changed", OpWrite, "P8 B5 T1565"},
	}
	steps := []string{"policy .files"}
	for _, a := range list {
		steps = append(steps, "run "+a.run)
	}
	steps = append(steps, "run bindover=3 /mnt", "run mount", "policy .privileged")
	still := append(mounting(),
		attempt{"bpfmap", "eBPF may not be used", OpBPF, "B23 T1014"}, attempt{"delmodule", "kernel modules may not", OpModule, "B23 T1562.001"},
		attempt{"killagent", "the agent", OpAgent, "B23 T1562.001"}, attempt{"traceagent", "the agent", OpAgent, "B23 T1562.001"}, attempt{"raw", "only TCP, UDP", OpRawSocket, "P7 T1095"},
		attempt{"mknod", "no device file", OpMknod, "T1611"}, attempt{"open /dev/port", "no device but", OpDevice, "T1611"}, attempt{"userns", "user namespace", OpUserNS, "B15 T1611"},
		attempt{"setting", "settings", OpSetting, "T1562"}, attempt{"drop=4 /tmp/x", "only programs and libraries of the image", OpExec, "P1 B7 T1105"})
	for _, a := range still {
		steps = append(steps, "run "+a.run)
	}
	o := boot(t, true, files, append(steps, "run bindover=4 /etc", "run mount=2", "run umount", "run mountnew=4 none proc")...)
	for _, a := range list {
		checkRefused(t, &compiled, a, o)
	}
	for _, a := range still {
		checkRefused(t, &privileged, a, o)
	}
	for _, b := range []string{"bindover=3", "mount", "bindover=4", "mount=2", "umount", "mountnew=4"} {
		if got := o.ran[b]; !strings.HasPrefix(got, "exit 0 ") {
			t.Errorf("%s: %s; want it to work", b, got)
		}
	}
}

// In audit mode everything works and everything is told; a policy that
// enforces wins over one that only reports.
func TestAuditReportsAndEnforceWins(t *testing.T) {
	audit := strict()
	audit.Mode = "audit"
	alone := compileForTest(t, 1, audit)
	both := compileForTest(t, 2, audit, spec.GuardPolicy{Sys: &spec.GuardSys{Deny: []spec.GuardOperation{"mount"}}})
	files := imageFiles()
	files[".audit"], files[".both"] = alone.Blob, both.Blob
	list := []string{"drop /tmp/x", "rwx", "persona", "write /etc/app/1", "read /srv/bait", "connect 192.0.2.1:81", "raw", "ptrace", "iouring"}
	steps := []string{"policy .audit"}
	for _, a := range list {
		steps = append(steps, "run "+a)
	}
	o := boot(t, true, files, append(steps, "run mount", "policy .both", "run mount=2", "run rwx=2")...)
	for _, a := range append(list, "mount", "rwx=2") {
		if got := o.ran[name(a)]; !strings.HasPrefix(got, "exit 0 ") {
			t.Errorf("%s: %s; want it to work", a, got)
		}
		if !slices.ContainsFunc(o.events[name(a)], func(e Event) bool { return e.Verdict == Reported }) {
			t.Errorf("%s: %v; want it reported", a, o.events[name(a)])
		}
	}
	checkRefused(t, &both, attempt{"mount=2", "nothing may be mounted", OpMount, "B3 T1611"}, o)
}
