package main

import (
	"fmt"

	"hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/guard"
)

// rung is a step of the ladder.
type rung struct {
	name, what string
	lsm        bool // the kernel runs BPF LSM programs
	attached   bool
	policy     *spec.GuardPolicy
}

// ladder is from the least to the most. Nothing of a workload is unbound in a
// guest, so that "attached and nothing to hold" is a policy that says nothing.
func ladder() []rung {
	open := spec.GuardExec{Origin: "any", AnonymousMemory: "allow", ShellOnSocket: "allow"}
	audit := guard.Baseline()
	audit.Mode = "audit"
	all := guard.Baseline()
	all.Mode = "audit"
	all.Files = []spec.GuardFile{{Path: "/", Deny: "rw"}}
	list := []rung{
		{name: "L0", what: "no BPF LSM"},
		{name: "L1", what: "BPF LSM, nothing attached", lsm: true},
		{name: "L2", what: "attached, a policy that says nothing", lsm: true, attached: true, policy: &spec.GuardPolicy{Exec: &open}},
		{name: "L3", what: "baseline in audit mode", lsm: true, attached: true, policy: &audit},
	}
	for _, n := range []int{1, 8, 64, 512} {
		list = append(list, rung{fmt.Sprint("L4/", n), fmt.Sprintf("enforced, %d rules of each kind", n), true, true, rules(n)})
	}
	return append(list, rung{"L5", "every open and change reported", true, true, &all})
}

// rules is the baseline with n rules for files, for programs and, as far as a
// policy takes them, for destinations.
func rules(n int) *spec.GuardPolicy {
	p := guard.Baseline()
	p.Net = &spec.GuardNet{}
	for i := range n {
		deny := "w"
		if i%2 == 1 {
			deny = "rw"
		}
		p.Files = append(p.Files, spec.GuardFile{Path: fmt.Sprint("/etc/rules/", i), Deny: deny})
		p.Exec.Deny = append(p.Exec.Deny, fmt.Sprint("/opt/programs/", i))
		if i < 256 {
			p.Net.Egress = append(p.Net.Egress, spec.GuardEgress{CIDR: fmt.Sprintf("10.%d.%d.0/24", i/256, i%256), Ports: []int32{443}})
		}
	}
	return &p
}

// blob compiles a policy for the machine.
func blob(p spec.GuardPolicy) ([]byte, error) {
	c, err := guard.Compile(node.Guard{Generation: 1, Policies: []node.NamedGuardPolicy{{Name: "bench", Spec: p}}}, guard.CompileFacts{})
	return c.Blob, err
}
