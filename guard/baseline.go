package guard

import "hauberk.dev/api/spec"

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

// baselineName is what the baseline is called in events.
const baselineName = "baseline"
