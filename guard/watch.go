package guard

import (
	"fmt"
	"maps"
	"slices"

	"hauberk.dev/api/spec"
)

// watched is what is watched of a workload in learn: everything that a policy can
// deny and that can be proposed.
func watched() spec.GuardPolicy {
	const s = spec.SeverityInfo
	return spec.GuardPolicy{
		Exec:  &spec.GuardExec{Origin: "image", AnonymousMemory: "deny", ShellOnSocket: "deny", Preload: "deny", Allow: []spec.GuardProgram{}, Severity: s},
		Files: []spec.GuardFile{{Path: "/", Deny: "rw", Severity: s}},
		Net:   &spec.GuardNet{Egress: []spec.GuardEgress{}, Ingress: []spec.GuardIngress{}, Severity: s},
		Sys:   &spec.GuardSys{Deny: slices.Sorted(maps.Keys(operations)), Capabilities: &spec.GuardCapabilities{Keep: []string{}}, Severity: s},
	}
}

// watch makes a policy in learn report all that a workload does: what the
// strictest policy would deny. The rules are the observer's, and deny nothing.
func (c *compiler) watch(index int) {
	first := len(c.rules)
	w := watched()
	c.exec(w.Exec)
	for i, f := range w.Files {
		c.file(index|watches, fmt.Sprintf("files[%d]", i), f)
	}
	c.net(w.Net)
	c.sys(w.Sys)
	c.fixed[dnsAudit] = 1 // which name an address was given for
	for i := first; i < len(c.rules); i++ {
		c.rules[i].Learn, c.rules[i].Text = true, "it is watched: "+c.rules[i].Text
	}
}

// watches sets the rules for files of the observer apart from the policy's own.
const watches = 1 << 15
