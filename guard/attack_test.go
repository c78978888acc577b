package guard

import (
	"fmt"
	"maps"
	"net/netip"
	"os"
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
		{"drop /tmp/x", image, OpExec},
		{"drop=2 /shm/x", image, OpExec},
		{"execthread", image, OpExec},
		{"memfd", image, OpExec},
		{"script", image, OpExec},
		{"exec=1 /bin/curl", "/bin/curl may not run", OpListed},
		{"exec=2 /bin/curl-too", "/bin/curl may not run", OpListed},
		{"maplisted", "/bin/curl may not run", OpListed},
		{"revshell", "network socket as its input", OpShell},

		{"mapwritten", image, OpMap},
		{"protectwritten", image, OpMap},
		{"mapshm", image, OpMap},
		{"mapzero", image, OpMap},
		{"memfdmap", image, OpMap},
		{"shmexec", image, OpMap},
		{"rwximage", memory, OpMemory},
		{"protectrwx", memory, OpMemory},
		{"anonymous", memory, OpMemory},
		{"rwx", memory, OpMemory},
		{"patch", memory, OpMemory},
		{"procmem", memory, OpMemory},
		{"persona", memory, OpMemory},

		{"write /etc/app/1", kept, OpWrite},
		{"write=2 /proc/self/root/etc/app/2", kept, OpWrite},
		{"write=3 /etc/link/3", kept, OpWrite},
		{"write=4 /etc/app/new", kept, OpWrite},
		{"truncate /etc/app/4", kept, OpWrite},
		{"chmod /etc/app/5", kept, OpWrite},
		{"chown /etc/app/6", kept, OpWrite},
		{"utimes /etc/app/7", kept, OpWrite},
		{"unlink /etc/app/8", kept, OpWrite},
		{"rename /etc/app/9 /tmp/9", kept, OpWrite},
		{"rename=2 /etc/app/10 /etc/app/11", kept, OpWrite},
		{"exchange /etc/app/12 /tmp/kept", kept, OpWrite},
		{"over /etc/app/13", kept, OpWrite},
		{"link /etc/app/14 /tmp/14", kept, OpWrite},
		{"linkdrop /etc/app/dropped", kept, OpWrite},
		{"symlink /etc/app/symlink", kept, OpWrite},
		{"mkdir /etc/app/dir", kept, OpWrite},
		{"mkfifo /etc/app/fifo", kept, OpWrite},
		{"setxattr /etc/app/15", kept, OpWrite},
		{"chroot /etc/app/16", kept, OpWrite},
		{"chattr /shm/a/b/secret", shm, OpWrite},
		{"rename=3 /shm/a /shm/moved", shm, OpWrite},
		{"read /srv/bait/deep/er/coin", bait, OpRead},
		{"read=2 /srv/bait", bait, OpRead},
		{"write=5 /srv/bait/deep/er/coin", bait, OpWrite},
		{"write=6 /etc/ld.so.preload", preload, OpWrite},
		{"over=2 /etc/ld.so.preload", preload, OpWrite},
		{"linkdrop=2 /opt/three", "/opt/three may not be changed", OpWrite},
		{"mkdir=2 /opt/app", "/opt/app/conf may not be changed", OpWrite},
		{"symlink=2 /opt/two", "/opt/two/conf may not be changed", OpWrite},
		{"deep /tmp", "deeper than 96", OpWrite},

		{"connect 192.0.2.1:81", listed, OpEgress},
		{"connect6 192.0.2.1:82", listed, OpEgress},
		{"udp 192.0.2.1:54", listed, OpEgress},
		{"sendto 192.0.2.1:55", listed, OpEgress},
		{"sendtoblank 192.0.2.1:56", listed, OpEgress},
		{"fastopen 192.0.2.1:83", listed, OpEgress},
		{"raw", raw, OpRawSocket},
		{"packet", raw, OpRawSocket},
		{"generic", raw, OpRawSocket},
		{"uevent", raw, OpRawSocket},

		{"bpfmap", "eBPF may not be used", OpBPF},
		{"bpfopen", "eBPF may not be used", OpBPF},
		{"bpflist", "eBPF may not be used", OpBPF},
		{"delmodule", modules, OpModule},
		{"newmodule", modules, OpModule},
		{"ptrace", traced, OpPtrace},
		{"traceme", traced, OpPtrace},
		{"vmwrite", traced, OpPtrace},
		{"mount", mount, OpMount},
		{"bind /etc", mount, OpMount},
		{"remount", mount, OpMount},
		{"fsmount", mount, OpMount},
		{"pivot", mount, OpMount},
		{"mknod", "no device file", OpMknod},
		{"iouring", "io_uring", OpIOUring},
		{"userns", "user namespace", OpUserNS},
		{"open /dev/disk", device, OpDevice},
		{"open=2 /dev/port", device, OpDevice},
		{"killagent", agent, OpAgent},
		{"traceagent", agent, OpAgent},
		{"limitagent", agent, OpAgent},
		{"niceagent", agent, OpAgent},
		{"setting", setting, OpSetting},
		{"sysfs", setting, OpSetting},
		{"reboot", setting, OpSetting},
		{"ioperm", setting, OpSetting},
		{"umount", mount, OpMount},
		// These change the tool that others run.
		{"touched", image, OpExec},
		{"unlinked", image, OpExec},
	}
	return list
}

// mounting is refused even where mounting is allowed.
func mounting() []attempt {
	const device, image = "no device but", "only programs and libraries of the image"
	return []attempt{
		{"mountnew=1 none devtmpfs", device, OpDevice}, {"fsmount=1 devtmpfs", device, OpDevice},
		{"mountnew=2 none debugfs", device, OpDevice}, {"mountnew=3 /dev/disk erofs", device, OpDevice},
		{"mountover", image, OpExec}, {"drop=3 /mnt/y", image, OpExec},
	}
}

// benign is what a service does: it works with and without the Guard.
var benign = []string{
	"exec /bin/tool", "pipeshell", "mapimage", "protectimage", "personaquery",
	"write=20 /tmp/file", "read=20 /etc/app/1", "write=21 /etc/other", "rename=20 /tmp/file /tmp/file2", "unlink=20 /tmp/file2",
	"mkdir=20 /tmp/dir", "rmdir=20 /tmp/dir", "write=22 /shm/file", "whiteout", "mkfifo=20 /tmp/fifo", "mknodreg",
	"connect=20 192.0.2.1:80", "connect=21 127.0.0.1:4000", "connect=22 198.51.100.7:5000", "udp=20 192.0.2.1:53", "sendto=20 192.0.2.1:53",
	"route", "unixpair", "killown", "open=20 /dev/null", "open=21 /dev/urandom", "ownproc", "utsns", "read=21 /proc/1/stat", "read=22 /proc/self/maps",
}

func allOperations() []spec.GuardOperation { return slices.Sorted(maps.Keys(operations)) }

// strict denies all that a policy can deny.
func strict() spec.GuardPolicy {
	return spec.GuardPolicy{
		Mode: "enforce",
		Exec: &spec.GuardExec{Origin: "image", AnonymousMemory: "deny", ShellOnSocket: "deny", Deny: []string{"/bin/curl"}, Severity: spec.SeverityCritical},
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
		Sys: &spec.GuardSys{Deny: allOperations(), Severity: spec.SeverityWarning},
	}
}

// compileForTest compiles policies of one generation.
func compileForTest(t testing.TB, generation uint64, policies ...spec.GuardPolicy) Compiled {
	t.Helper()
	g := node.Guard{Generation: generation, Services: map[string]string{"ledger": "198.51.100.7"}}
	for i, p := range policies {
		g.Policies = append(g.Policies, node.NamedGuardPolicy{Name: fmt.Sprint("policy-", i), Spec: p})
	}
	c, err := Compile(g, CompileFacts{Gateway: netip.MustParseAddr("192.0.2.1")})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// imageFiles are what the attempts find in the image.
func imageFiles() map[string][]byte {
	files := map[string][]byte{"etc/other": []byte("x"), "srv/bait/deep/er/coin": []byte("x"), "opt/gone": []byte("x")}
	for i := range 20 {
		files[fmt.Sprint("etc/app/", i)] = []byte("kept")
	}
	return files
}

var before = []string{"file /shm/a/b/secret", "file /tmp/kept"}

func runs(list []attempt) (steps []string) {
	for _, a := range list {
		steps = append(steps, "run "+a.run)
	}
	for _, b := range benign {
		steps = append(steps, "run "+b)
	}
	return steps
}

// ordered puts what works on a tool before what spoils it.
func ordered(guarded bool) []string {
	list := attempts()
	first, last := list[:len(list)-2], list[len(list)-2:]
	steps := runs(first)
	if !guarded {
		for _, a := range mounting() { // under the strict policy nothing is mounted at all
			steps = append(steps, "run "+a.run)
		}
	}
	for _, q := range quiet {
		steps = append(steps, "run "+q)
	}
	for _, a := range last {
		steps = append(steps, "run "+a.run)
	}
	return steps
}

func name(run string) string {
	n, _, _ := strings.Cut(run, " ")
	return n
}

// quiet are refused without a word: programs do such things without meaning
// harm.
var quiet = []string{"readagent", "securityxattr /etc/other"}

// An attack that does not work on an open machine would prove nothing of one
// that is guarded.
func TestAttacksWorkWithoutGuard(t *testing.T) {
	o := boot(t, false, imageFiles(), append(slices.Clone(before), ordered(false)...)...)
	for _, a := range slices.Concat(attempts(), mounting()) {
		if got := o.ran[name(a.run)]; !strings.HasPrefix(got, "exit 0 ") {
			t.Errorf("%s: %s; want it to work", a.run, got)
		}
	}
	for _, b := range slices.Concat(benign, quiet) {
		want := "exit 0 "
		if strings.HasPrefix(b, "securityxattr") && os.Getenv("HAUBERK_TEST_KERNEL") != "" {
			want = "exit 10 refused: operation not permitted" // later kernels mended this by themselves
		}
		if got := o.ran[name(b)]; !strings.HasPrefix(got, want) {
			t.Errorf("%s: %s; want %s", b, got, want)
		}
	}
}

func TestAttacksAreRefused(t *testing.T) {
	compiled := compileForTest(t, 7, strict())
	files := imageFiles()
	files[".strict"] = compiled.Blob
	steps := append(slices.Clone(before), "run nothing", "policy .strict")
	steps = append(append(steps, ordered(true)...), "status")
	o := boot(t, true, files, steps...)
	t.Log(o.policies)
	if got := o.ran["nothing"]; !strings.HasPrefix(got, "exit 12 notstarted operation not permitted") {
		t.Errorf("before a policy: %s; want it refused", got)
	}
	if e := o.events["nothing"]; len(e) != 1 || e[0].Rule != 1 || e[0].Verdict != Denied {
		t.Errorf("before a policy: events %v; want one of rule 1", e)
	}
	for _, a := range attempts() {
		checkRefused(t, &compiled, a, o)
	}
	for _, b := range benign {
		if got := o.ran[name(b)]; !strings.HasPrefix(got, "exit 0 ") {
			t.Errorf("%s: %s; want it to work", b, got)
		}
		wantNoWord(t, b, o)
	}
	for _, q := range quiet {
		if got := o.ran[name(q)]; !strings.HasPrefix(got, "exit 10 ") {
			t.Errorf("%s: %s; want it refused", q, got)
		}
		wantNoWord(t, q, o)
	}
	if len(o.status) != 1 || o.status[0].Generation != 7 || o.status[0].Digest != compiled.Digest || o.status[0].Lost != 0 || o.status[0].Programs != len(o.status[0].Tags) || o.status[0].Programs < 40 {
		t.Errorf("status %+v; want generation 7, digest %s, nothing lost, all programs attached", o.status, compiled.Digest)
	}
	checkSequence(t, o, o.status[0].Sequence)
}

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
		{"bpfmap", "eBPF programs and maps", OpBPF}, {"bpfopen", "eBPF programs and maps", OpBPF},
		{"delmodule", "the kernel's modules", OpModule}, {"newmodule", "the kernel's modules", OpModule},
		{"killagent", "the agent", OpAgent}, {"traceagent", "the agent", OpAgent}, {"limitagent", "the agent", OpAgent}, {"niceagent", "the agent", OpAgent},
		{"open /dev/disk", "no device but", OpDevice}, {"open=2 /dev/port", "no device but", OpDevice},
		{"setting", "settings", OpSetting}, {"sysfs", "settings", OpSetting}, {"reboot", "settings", OpSetting}, {"ioperm", "settings", OpSetting},
	}
	allowed := []string{"drop /tmp/x", "memfd", "rwx", "patch", "procmem", "persona", "revshell", "ptrace", "mount", "raw", "mknod", "iouring", "userns", "bpflist",
		"write /etc/app/1", "connect 192.0.2.1:81", "deep /tmp"}
	steps := append(slices.Clone(before), "policy .open")
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
		{"bind /etc/app", "/etc/app may not be changed", OpWrite},
		{"bindover /etc/app", "/etc/app may not be changed", OpWrite},
		{"bindover=2 /etc", "/etc/app may not be changed", OpWrite},
		{"chroot /etc/app/secret", "/etc/app may not be changed", OpWrite},
	}
	steps := []string{"policy .files"}
	for _, a := range list {
		steps = append(steps, "run "+a.run)
	}
	steps = append(steps, "run bindover=3 /mnt", "run mount", "policy .privileged")
	still := append(mounting(),
		attempt{"bpfmap", "eBPF may not be used", OpBPF}, attempt{"delmodule", "kernel modules may not", OpModule},
		attempt{"killagent", "the agent", OpAgent}, attempt{"traceagent", "the agent", OpAgent}, attempt{"raw", "only TCP, UDP", OpRawSocket},
		attempt{"mknod", "no device file", OpMknod}, attempt{"open /dev/port", "no device but", OpDevice}, attempt{"userns", "user namespace", OpUserNS},
		attempt{"setting", "settings", OpSetting}, attempt{"drop=4 /tmp/x", "only programs and libraries of the image", OpExec})
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
	checkRefused(t, &both, attempt{"mount=2", "nothing may be mounted", OpMount}, o)
}

// While policies are swapped as fast as they can be, nothing slips through.
func TestSwapLeavesNoGap(t *testing.T) {
	compiled := compileForTest(t, 1, strict())
	files := imageFiles()
	files[".strict"] = compiled.Blob
	o := boot(t, true, files, "policy .strict", "swap .strict execstorm 4s", "status")
	got := o.ran["execstorm"]
	if !strings.HasPrefix(got, "exit 10 ") {
		t.Errorf("while policies were swapped: %s; want every try refused", got)
	}
	var tries, swaps int
	if _, err := fmt.Sscanf(got, "exit 10 refused: %d times swaps %d", &tries, &swaps); err != nil || tries < 20 || swaps < 20 {
		t.Errorf("%q: %d tries, %d swaps (%v); want at least 20 of each", got, tries, swaps, err)
	}
	t.Logf("%d tries, %d swaps", tries, swaps)
}

// A ring that nobody drains loses events, and says so; it never lets a
// forbidden act pass.
func TestFullRingStillRefuses(t *testing.T) {
	compiled := compileForTest(t, 1, strict())
	files := imageFiles()
	files[".strict"] = compiled.Blob
	o := boot(t, true, files, "policy .strict", "hold denystorm 2000", "hold drop /tmp/x", "status", "events", "run drop=2 /tmp/x", "status")
	for _, a := range []string{"drop", "drop=2"} {
		if got := o.ran[a]; !strings.HasPrefix(got, "exit 10 ") {
			t.Errorf("%s: %s; want it refused", a, got)
		}
	}
	if got := o.ran["denystorm"]; !strings.HasPrefix(got, "exit 10 ") {
		t.Errorf("denystorm: %s; want it refused", got)
	}
	if len(o.status) != 2 || o.status[0].Lost == 0 || o.status[0].Sequence < 2000 {
		t.Fatalf("status %+v; want losses counted among more than 2000 denials", o.status)
	}
	told := 0
	for _, e := range o.events["drop"] {
		if e.Verdict == Denied {
			told++
		}
	}
	if uint64(told)+o.status[0].Lost != o.status[0].Sequence {
		t.Errorf("%d denials told, %d lost of %d", told, o.status[0].Lost, o.status[0].Sequence)
	}
	if last := o.events["drop=2"]; len(last) == 0 || last[len(last)-1].Lost == 0 && last[0].Lost == 0 {
		t.Errorf("an event after the loss does not tell of it: %v", last)
	}
}
