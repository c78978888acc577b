package guard

import (
	"slices"

	"hauberk.dev/api/spec"
)

// ReadyPolicy is a policy that has a name, and the reason for it in a sentence.
type ReadyPolicy struct {
	Name string           `json:"name"`
	Why  string           `json:"why"`
	Spec spec.GuardPolicy `json:"spec"`
}

// Ready lists the policies that have a name, in the order in which they are
// offered. None but the last is weaker than the baseline, save that a database may
// use io_uring. docs/guard.md says more of each.
func Ready() []ReadyPolicy {
	return []ReadyPolicy{
		{baselineName, "only the image's own programs run, and none does what a service does not do", Baseline()},
		{"web", "for a server: as baseline, no code is made in memory, and its programs and settings stay as they are", web()},
		{"batch", "for a job that ends: as baseline, its programs and settings stay as they are, and nobody connects to it", batch()},
		{"agent", "for code that was not written by people: the image's files stay as they are, and nothing is reached that is not named", agent()},
		{"database", "for a store of data: its programs and settings stay as they are, and it calls nobody", database()},
		{"dev", "for trying things: what was written may run, shells on sockets too; the kernel stays out of reach", dev()},
	}
}

// FindReady finds one by name.
func FindReady(name string) (ReadyPolicy, bool) {
	list := Ready()
	i := slices.IndexFunc(list, func(r ReadyPolicy) bool { return r.Name == name })
	if i < 0 {
		return ReadyPolicy{}, false
	}
	return list[i], true
}

// baselineName is what the baseline is called in events.
const baselineName = "baseline"

// Baseline is the policy of a workload that has none: nothing runs but what
// the image brought, and nothing is done that an ordinary service does not do.
// Executable anonymous memory stays allowed, for without it no just-in-time
// compiler works and Java or Node programs would not start unchanged.
func Baseline() spec.GuardPolicy {
	return spec.GuardPolicy{
		Mode: "enforce",
		Exec: &spec.GuardExec{Origin: "image", AnonymousMemory: "allow", ShellOnSocket: "deny", Severity: spec.SeverityWarning},
		Sys:  &spec.GuardSys{Deny: notAService(), Severity: spec.SeverityWarning},
	}
}

// Privileged is the policy of a sandbox without one that holds a privileged
// container: the baseline, but what is the container's own to mount it may
// mount. What may be mounted at all is no policy's to say (bpf/system.h).
func Privileged() spec.GuardPolicy {
	p := Baseline()
	p.Sys.Deny = slices.DeleteFunc(p.Sys.Deny, func(o spec.GuardOperation) bool { return o == "mount" })
	return p
}

func web() spec.GuardPolicy {
	p := Baseline()
	p.Exec.AnonymousMemory = "deny"
	p.Files = unchanged()
	p.Sys.Deny = append(p.Sys.Deny, theMachines()...)
	return p
}

func batch() spec.GuardPolicy {
	p := Baseline()
	p.Files = unchanged()
	p.Net = &spec.GuardNet{Ingress: []spec.GuardIngress{}, Severity: spec.SeverityWarning}
	p.Sys.Deny = append(p.Sys.Deny, theMachines()...)
	return p
}

// agent leaves its own loopback, and what is added by name: an allow list has no
// room for an internal network.
func agent() spec.GuardPolicy {
	p := Baseline()
	p.Exec.Severity, p.Sys.Severity = spec.SeverityCritical, spec.SeverityCritical
	p.Files = append(unchanged(), spec.GuardFile{Path: "/boot", Deny: "w"}, spec.GuardFile{Path: "/opt", Deny: "w"})
	p.Net = &spec.GuardNet{Egress: []spec.GuardEgress{{CIDR: "127.0.0.0/8"}}, Severity: spec.SeverityCritical}
	p.Sys.Deny = append(p.Sys.Deny, theMachines()...)
	return p
}

// database lets code be made in memory, for PostgreSQL compiles expensive queries,
// and io_uring be used, for MariaDB reads and writes by it: what rings ask for is
// judged as any other request.
func database() spec.GuardPolicy {
	p := Baseline()
	p.Sys.Deny = slices.DeleteFunc(p.Sys.Deny, func(o spec.GuardOperation) bool { return o == "iouring" })
	p.Exec.Preload = "deny"
	p.Files = unchanged()
	p.Net = &spec.GuardNet{Egress: []spec.GuardEgress{{CIDR: "127.0.0.0/8"}}, Severity: spec.SeverityWarning}
	p.Sys.Deny = append(p.Sys.Deny, theMachines()...)
	return p
}

func dev() spec.GuardPolicy {
	return spec.GuardPolicy{
		Exec: &spec.GuardExec{Origin: "any", AnonymousMemory: "allow", ShellOnSocket: "allow"},
		Sys:  &spec.GuardSys{Deny: []spec.GuardOperation{"bpf", "module"}},
	}
}

// notAService is what no ordinary service does.
func notAService() []spec.GuardOperation {
	return []spec.GuardOperation{"bpf", "module", "ptrace", "mount", "rawsocket", "mknod", "iouring", "userns"}
}

// theMachines are operations on the whole machine or out of the container, which
// a debugger or an installer may want and a workload with one task does not.
func theMachines() []spec.GuardOperation {
	return []spec.GuardOperation{"setns", "unshare", "perf", "userfaultfd", "time", "reboot", "swap", "quota", "syslog", "hostname"}
}

// unchanged protects where images keep programs, libraries and settings.
func unchanged() (out []spec.GuardFile) {
	for _, p := range []string{"/bin", "/sbin", "/lib", "/lib64", "/usr", "/etc"} {
		out = append(out, spec.GuardFile{Path: p, Deny: "w"})
	}
	return out
}
