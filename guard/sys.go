package guard

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"hauberk.dev/api/spec"
)

// capabilityNames are those of Linux, by number.
var capabilityNames = strings.Fields(`CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP
	LINUX_IMMUTABLE NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT
	SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE
	AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE`)

func (c *compiler) sys(s *spec.GuardSys) {
	defer c.lower(s.Audit)()
	c.severity("sys.severity", s.Severity)
	for i, name := range s.Deny {
		op, ok := operations[name]
		if !ok {
			c.fault(fmt.Sprintf("sys.deny[%d]", i), string(name), fmt.Sprintf("want one of %v", slices.Sorted(maps.Keys(operations))))
			continue
		}
		c.set(op.index, op.text, s.Severity)
	}
	if s.Capabilities != nil {
		c.capabilities(s)
	}
}

func (c *compiler) capabilities(s *spec.GuardSys) {
	var keep uint64
	for i, name := range s.Capabilities.Keep {
		n := slices.Index(capabilityNames, name)
		if n < 0 {
			c.fault(fmt.Sprintf("sys.capabilities.keep[%d]", i), name, "want the name of a capability in capitals and without CAP_, such as NET_BIND_SERVICE")
			continue
		}
		keep |= 1 << n
	}
	rule, bits, text := onCapability, capsDenied, "no capability may be used"
	if len(s.Capabilities.Keep) > 0 {
		text = "no capability may be used but " + strings.Join(s.Capabilities.Keep, ", ")
	}
	if !c.enforce {
		rule, bits = onCapabilityAudit, capsReported
	}
	c.set(rule, text, s.Severity)
	c.fixed[bits] |= reference(uint32(^keep))
	c.fixed[bits+1] |= reference(uint32(^keep >> 32))
}

// operationText says what the rule of an index is about.
func operationText(index uint64) string {
	for name, op := range operations {
		if uint64(op.index) == index {
			return string(name) + " (" + op.text + ")"
		}
	}
	return fmt.Sprint("operation ", index)
}

func capabilityName(n uint64) string {
	if n < uint64(len(capabilityNames)) {
		return capabilityNames[n]
	}
	return fmt.Sprint(n)
}
