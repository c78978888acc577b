package guard

import (
	"fmt"

	"hauberk.dev/api/spec"
)

// Rule is one thing a policy forbids. Its number stands in every event.
type Rule struct {
	ID       uint32        `json:"id"`
	Policy   string        `json:"policy"` // "built in" if no policy can switch it off
	Field    string        `json:"field,omitempty"`
	Text     string        `json:"text"`
	Severity spec.Severity `json:"severity"`
	// Learn: the rule only watches, for a policy in learn.
	Learn bool `json:"learn,omitempty"`
}

func (r Rule) String() string { return fmt.Sprintf("%s (%s)", r.Text, r.Policy) }

// builtIn is the policy of the rules that always hold.
const builtIn = "built in"

// builtInRules keep the Guard itself, the agent and the kernel out of a
// workload's reach, and refuse what cannot be decided. Numbers as in
// bpf/src/policy.h.
func builtInRules() []Rule {
	return []Rule{
		{ID: 1, Policy: builtIn, Text: "nothing may be done before a policy is in force", Severity: spec.SeverityWarning},
		{ID: 2, Policy: builtIn, Text: "eBPF programs and maps are out of reach", Severity: spec.SeverityCritical},
		{ID: 3, Policy: builtIn, Text: "the kernel's modules are out of reach", Severity: spec.SeverityCritical},
		{ID: 4, Policy: builtIn, Text: "the agent and the kernel may not be signalled, traced or limited", Severity: spec.SeverityCritical},
		{ID: 5, Policy: builtIn, Text: "no device but null, zero, full, random, urandom, tty, terminals and those that the container was given may be used", Severity: spec.SeverityWarning},
		{ID: 6, Policy: builtIn, Text: "the kernel's settings may not be changed", Severity: spec.SeverityWarning},
		{ID: 7, Policy: builtIn, Text: "the kernel may not start programs for anyone", Severity: spec.SeverityCritical},
		{ID: 8, Policy: builtIn, Text: "a file deeper than 96 directories, or in none, cannot be checked against the rules for files", Severity: spec.SeverityWarning},
		{ID: 9, Policy: builtIn, Text: "the machine's own host is out of reach", Severity: spec.SeverityCritical},
	}
}

// firstRule is the number of the first rule a policy brings.
const firstRule = 16

// Reference to a rule: its number, and whether it denies or only reports.
type reference uint32

const denies reference = 1 << 31

// Indexes of struct policy's rules, as in bpf/src/policy.h.
const (
	onOrigin = iota
	onMemory
	onShell
	onBPF
	onModule
	onPtrace
	onMount
	onRawSocket
	onMknod
	onIOUring
	onUserNS
	onUnlisted
	onPreload
	onScript
	onInline
	ruleIndexes = 64
)

// Indexes of named operations and of capabilities, as in bpf/src/policy.h.
const (
	onSetNS = iota + 32
	onUnshare
	onChroot
	onKeyctl
	onPerf
	onUserfaultFD
	onTime
	onReboot
	onSwap
	onQuota
	onSyslog
	onMemfd
	onSetUID
	onHostname
	onNice
	onCapability
	onCapabilityAudit
	capsDenied   // two words of bits
	capsReported = capsDenied + 2
	ingressDeny  = capsReported + 2 // masks of lists, as the rest
	ingressAudit = ingressDeny + 1
	dnsLists     = ingressDeny + 2
	hasNames     = ingressDeny + 3
	dnsAudit     = ingressDeny + 4
)

// operations says what each name of a policy's sys.deny stands for.
var operations = map[spec.GuardOperation]struct {
	index int
	text  string
}{
	"bpf":       {onBPF, "eBPF may not be used"},
	"module":    {onModule, "kernel modules may not be loaded or unloaded"},
	"ptrace":    {onPtrace, "no process may be traced or have its memory written"},
	"mount":     {onMount, "nothing may be mounted or unmounted"},
	"rawsocket": {onRawSocket, "only TCP, UDP, Unix, routing and audit sockets may be made"},
	"mknod":     {onMknod, "no device file may be made"},
	"iouring":   {onIOUring, "io_uring may not be used"},
	"userns":    {onUserNS, "no user namespace may be made"},

	"setns":       {onSetNS, "no namespace may be entered"},
	"unshare":     {onUnshare, "no namespace may be made"},
	"chroot":      {onChroot, "no process may change its root directory"},
	"keyctl":      {onKeyctl, "the kernel's keys may not be used"},
	"perf":        {onPerf, "performance events may not be used"},
	"userfaultfd": {onUserfaultFD, "userfaultfd may not be used"},
	"time":        {onTime, "the clock may not be set"},
	"reboot":      {onReboot, "the kernel may not be rebooted or replaced"},
	"swap":        {onSwap, "swapping may not be started or stopped"},
	"quota":       {onQuota, "quotas may not be used"},
	"syslog":      {onSyslog, "the kernel's log may not be used"},
	"memfd":       {onMemfd, "no file without a name may be made in memory"},
	"setuid":      {onSetUID, "no process may change its users and groups"},
	"hostname":    {onHostname, "the host's name may not be changed"},
	"nice":        {onNice, "no process may be scheduled otherwise"},
}

// strength orders severities, weakest first.
func strength(s spec.Severity) int {
	switch s {
	case spec.SeverityCritical:
		return 2
	case spec.SeverityInfo:
		return 0
	}
	return 1
}
