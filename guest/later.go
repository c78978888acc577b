package guest

import (
	"syscall"

	"hauberk.dev/api/guestproto"
)

// notYet refuses what the protocol can say and this agent does not do.
func notYet(m *guestproto.Create) error {
	r := &m.Resources
	switch {
	case len(m.Mounts) > 0 || len(m.Masked) > 0 || len(m.ReadOnly) > 0 || len(m.Devices) > 0 || len(m.Sysctls) > 0:
		return fail("create", "container with mounts, masked paths, devices or sysctls", syscall.ENOSYS)
	case m.ReadOnlyRoot || m.RootPropagation != 0 || m.PID != guestproto.PIDOwn || m.Domainname != "":
		return fail("create", "container with a read-only root, a PID mode or a domain name", syscall.ENOSYS)
	case r.MemoryHigh|r.MemoryLow|r.SwapMax|r.CPUWeight|r.CPUQuota|r.CPUPeriod != 0 || r.CPUs != "" || r.Nodes != "" || len(r.Unified) > 0:
		return fail("create", "container with limits of more than memory and processes", syscall.ENOSYS)
	}
	return programNotYet(&m.Program)
}

func programNotYet(p *guestproto.Program) error {
	if p.Rights.Given || p.NewPrivileges || len(p.Rlimits) > 0 || p.UmaskGiven || p.OOMScoreAdj != 0 || p.Seccomp.Mode != 0 {
		return fail("run", "program with rights, limits or a filter of its own", syscall.ENOSYS)
	}
	return nil
}
