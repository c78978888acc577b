package guard

import (
	"slices"

	"hauberk.dev/api/spec"
)

// Baseline is the policy of a workload that has none: nothing runs but what
// the image brought, and nothing is done that an ordinary service does not do.
// Executable anonymous memory stays allowed, for without it no just-in-time
// compiler works and Java or Node programs would not start unchanged.
func Baseline() spec.GuardPolicy {
	return spec.GuardPolicy{
		Mode: "enforce",
		Exec: &spec.GuardExec{Origin: "image", AnonymousMemory: "allow", ShellOnSocket: "deny", Severity: spec.SeverityWarning},
		Sys: &spec.GuardSys{
			Deny:     []spec.GuardOperation{"bpf", "module", "ptrace", "mount", "rawsocket", "mknod", "iouring", "userns"},
			Severity: spec.SeverityWarning,
		},
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

// baselineName is what the baseline is called in events.
const baselineName = "baseline"
