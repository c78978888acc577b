package guard

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"hauberk.dev/api/node"
	"hauberk.dev/api/spec"
)

// calls are the named operations beyond those of strict, each by every way in.
func calls() []attempt {
	text := func(o spec.GuardOperation) string { return operations[o].text }
	var list []attempt
	add := func(o spec.GuardOperation, runs ...string) {
		for _, run := range runs {
			list = append(list, attempt{run, text(o), OpOperation})
		}
	}
	add("setns", "setns", "setns32")                                // B15
	add("unshare", "unshare", "unsharenet", "clonens", "unshare32") // B15
	add("chroot", "chrootonly", "chroot32")
	add("keyctl", "addkey", "keyring")
	add("perf", "perfopen")
	add("userfaultfd", "userfault")
	add("time", "settime", "adjtime", "stime32")
	add("swap", "swapon", "swapoff", "swapon32")
	add("quota", "quota")
	add("syslog", "klog", "klogread")
	add("memfd", "memfdcreate", "memfd32") // P6
	add("setuid", "setuid", "setresuid", "setgid", "setgroups", "setuid32", "suid")
	add("hostname", "hostname", "domainname", "hostname32")
	add("nice", "nice", "ioprio", "batch")
	return append(list,
		attempt{"reboot", text("reboot"), OpSetting},
		attempt{"module32", text("module"), OpModule})
}

var benignCalls = []string{"affinity", "sameids", "own=20"}

// Every operation that a policy can name works without the Guard, is reported by
// a section that audits, and refused by one that enforces.
func TestNamedOperations(t *testing.T) {
	deny := allOperations()
	audit := compileForTest(t, 1, spec.GuardPolicy{Sys: &spec.GuardSys{Audit: true, Deny: deny, Capabilities: &spec.GuardCapabilities{}}})
	enforce := compileForTest(t, 2, spec.GuardPolicy{Sys: &spec.GuardSys{Deny: deny}})
	keep := compileForTest(t, 3, spec.GuardPolicy{Sys: &spec.GuardSys{Capabilities: &spec.GuardCapabilities{Keep: []string{"NET_BIND_SERVICE", "SETUID"}}}})
	files := imageFiles()
	files[".audit"], files[".enforce"], files[".keep"] = audit.Blob, enforce.Blob, keep.Blob
	list := calls()
	again := func(steps []string, nth string) []string {
		for _, a := range list {
			steps = append(steps, "run "+a.run+nth)
		}
		for _, b := range benignCalls {
			steps = append(steps, "run "+b+nth)
		}
		return steps
	}
	guarded := again([]string{"file /tmp/kept", "policy .audit"}, "=1")
	guarded = append(again(append(guarded, "policy .enforce"), "=2"), "policy .keep", "run own=3", "run hostname=3", "run setuid=3", "run connect=3 127.0.0.1:80", "status")
	open := boot(t, false, imageFiles(), again([]string{"file /tmp/kept"}, "=0")...)
	o := boot(t, true, files, guarded...)
	for _, a := range list {
		for nth, ran := range map[string]outcome{"=0": open, "=1": o} {
			// The Guard itself keeps these back, whatever is audited.
			if nth == "=1" && (a.op == OpSetting || a.op == OpModule) {
				continue
			}
			if got := ran.ran[a.run+nth]; !strings.HasPrefix(got, "exit 0 ") {
				t.Errorf("%s: %s; want it to work", a.run+nth, got)
			}
			if nth == "=1" && !slices.ContainsFunc(o.events[a.run+nth], func(e Event) bool { return e.Verdict == Reported && e.Op == a.op && isAbout(&audit, e, a.rule) }) {
				t.Errorf("%s: %v; want it reported by %q", a.run+nth, o.events[a.run+nth], a.rule)
			}
		}
		checkRefused(t, &enforce, attempt{a.run + "=2", a.rule, a.op}, o)
	}
	for _, b := range benignCalls {
		for _, nth := range []string{"=0", "=1", "=2"} {
			ran := o
			if nth == "=0" {
				ran = open
			}
			if got := ran.ran[b+nth]; !strings.HasPrefix(got, "exit 0 ") {
				t.Errorf("%s: %s; want it to work", b+nth, got)
			}
		}
		wantNoWord(t, b+"=2", o)
	}
	const kept = "no capability may be used but NET_BIND_SERVICE, SETUID"
	checkRefused(t, &keep, attempt{"own=3", kept, OpCapability}, o)
	checkRefused(t, &keep, attempt{"hostname=3", kept, OpCapability}, o)
	for _, b := range []string{"setuid=3", "connect=3"} {
		if got := o.ran[b]; !strings.HasPrefix(got, "exit 0 ") {
			t.Errorf("%s: %s; want it to work", b, got)
		}
	}
	checkSequence(t, o, o.status[0].Sequence)
}

func isAbout(c *Compiled, e Event, text string) bool {
	r, ok := c.Rule(e.Rule)
	return ok && strings.Contains(r.Text, text)
}

func TestCompileCapabilities(t *testing.T) {
	caps := func(audit bool, keep ...string) spec.GuardPolicy {
		return spec.GuardPolicy{Sys: &spec.GuardSys{Audit: audit, Capabilities: &spec.GuardCapabilities{Keep: keep}}}
	}
	c := compileForTest(t, 1, caps(false, "CHOWN", "KILL"), caps(false, "KILL", "CHECKPOINT_RESTORE"), caps(true))
	p := parse(t, c.Blob)
	bits := func(i int) uint64 { return uint64(p.rule(i)) | uint64(p.rule(i+1))<<32 }
	if got, want := bits(capsDenied), ^uint64(1<<5); got != want {
		t.Errorf("denied %x, want all but KILL, %x", got, want)
	}
	if got := bits(capsReported); got != ^uint64(0) {
		t.Errorf("reported %x, want all", got)
	}
	if r, ok := c.Rule(p.rule(onCapability) &^ uint32(denies)); !ok || p.rule(onCapability)&uint32(denies) == 0 || r.Policy != "policy-0" {
		t.Errorf("rule %+v; want the first one's", r)
	}
	_, err := Compile(node.Guard{Generation: 1, Policies: []node.NamedGuardPolicy{{Name: "p", Spec: caps(false, "CAP_CHOWN", "chown")}}}, CompileFacts{})
	for _, want := range []string{`sys.capabilities.keep[0] "CAP_CHOWN"`, `sys.capabilities.keep[1] "chown"`} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want it to say %s", err, want)
		}
	}
}

// Every operation of the API is one that the compiler knows.
func TestEveryOperationIsHeld(t *testing.T) {
	names := strings.Split("bpf;module;ptrace;mount;rawsocket;mknod;iouring;userns;setns;unshare;chroot;keyctl;perf;userfaultfd;time;reboot;swap;quota;syslog;memfd;setuid;hostname;nice", ";")
	if len(names) != len(operations) {
		t.Errorf("%d operations, want %d", len(operations), len(names))
	}
	seen := map[int]bool{}
	for _, n := range names {
		op, ok := operations[spec.GuardOperation(n)]
		if !ok || seen[op.index] || op.index >= ruleIndexes {
			t.Errorf("%s: %+v; want an index of its own", n, op)
		}
		seen[op.index] = true
	}
	if fmt.Sprint(len(capabilityNames)) != "41" {
		t.Errorf("%d capabilities, want 41", len(capabilityNames))
	}
}
