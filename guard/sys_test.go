package guard

import (
	"fmt"
	"strings"
	"testing"

	"hauberk.dev/api/node"
	"hauberk.dev/api/spec"
)

// callScenarios are the named operations beyond those of strict, each by every
// way in, and capabilities.
func callScenarios() []scenario {
	var list []attempt
	add := func(o spec.GuardOperation, items string, runs ...string) {
		for _, run := range runs {
			list = append(list, attempt{run, operations[o].text, OpOperation, items})
		}
	}
	add("setns", "B15 T1611", "setns", "setns32")
	add("unshare", "B15 T1611", "unshare", "unsharenet", "clonens", "unshare32")
	add("chroot", "B5 T1611", "chrootonly", "chroot32")
	add("keyctl", "T1552", "addkey", "keyring")
	add("perf", "T1068", "perfopen")
	add("userfaultfd", "T1068", "userfault")
	add("time", "T1070.006", "settime", "adjtime", "stime32")
	add("swap", "T1499", "swapon", "swapoff", "swapon32")
	add("quota", "T1499", "quota")
	add("syslog", "T1082", "klog", "klogread")
	add("memfd", "P6 B10 T1620", "memfdcreate", "memfd32")
	add("setuid", "T1548.001", "setuid", "setresuid", "setgid", "setgroups", "setuid32", "suid")
	add("hostname", "T1036", "hostname", "domainname", "hostname32")
	add("nice", "T1496", "nice", "ioprio", "batch")
	list = append(list,
		attempt{"reboot=2", operations["reboot"].text, OpSetting, "T1529"},
		attempt{"module32", operations["module"].text, OpModule, "B23 T1547.006"})
	const kept = "no capability may be used but NET_BIND_SERVICE, SETUID"
	return []scenario{
		{
			name: "calls", policy: spec.GuardPolicy{Sys: &spec.GuardSys{Deny: allOperations()}}, before: []string{"file /tmp/kept"},
			attacks: list, benign: []string{"affinity", "sameids", "own=20"},
		},
		{
			name:    "caps",
			policy:  spec.GuardPolicy{Sys: &spec.GuardSys{Capabilities: &spec.GuardCapabilities{Keep: []string{"NET_BIND_SERVICE", "SETUID"}}}},
			attacks: []attempt{{"own=3", kept, OpCapability, "T1222.002"}, {"hostname=3", kept, OpCapability, "T1036"}, {"mount=30", kept, OpCapability, "T1611"}},
			benign:  []string{"setuid=30", "connect=30 127.0.0.1:80", "write=30 /tmp/caps"},
		},
	}
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
