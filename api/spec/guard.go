package spec

// GuardPolicy says what may run, be touched and be reached inside a sandbox.
// An absent section leaves its field unrestricted. Deny beats allow beats
// default; several policies on one workload intersect, and a list of what is
// allowed refuses only what its own section is about.
type GuardPolicy struct {
	// Mode: enforce denies, audit only reports, learn reports too and gathers all
	// that the workload does: status.learning has the policy that allows just this,
	// for a person to promote. A policy in learn or audit never weakens another
	// that enforces.
	// +kubebuilder:validation:Enum=learn;audit;enforce
	// +kubebuilder:default=enforce
	// +optional
	Mode string `json:"mode,omitempty"`
	// OnFailure says what becomes of a rule that cannot be held in the guest,
	// such as one about a file behind a directory that is no directory: closed
	// refuses the policy, and the one before it stays in force; open puts the rest
	// in force and reports the rule as not held.
	// +kubebuilder:validation:Enum=closed;open
	// +kubebuilder:default=closed
	// +optional
	OnFailure string `json:"onFailure,omitempty"`
	// +optional
	Exec *GuardExec `json:"exec,omitempty"`
	// +optional
	// +kubebuilder:validation:MaxItems=512
	Files []GuardFile `json:"files,omitempty"`
	// +optional
	Net *GuardNet `json:"net,omitempty"`
	// +optional
	Sys *GuardSys `json:"sys,omitempty"`
	// +optional
	Limits *GuardLimits `json:"limits,omitempty"`
	// Rollout says how a change of the policy reaches the instances that run.
	// +optional
	Rollout *GuardRollout `json:"rollout,omitempty"`
}

// ClusterGuardPolicy is a floor: it holds for every workload it selects beside
// the workload's own policies, and none of them weakens it.
type ClusterGuardPolicy struct {
	// Select says which workloads; an empty selector, or none, means every
	// workload of every namespace.
	// +optional
	Select GuardSelect `json:"select,omitempty"`

	GuardPolicy `json:",inline"`
}

// GuardSelect chooses workloads. What is set must all match.
type GuardSelect struct {
	// Namespaces by name; none means all.
	// +optional
	// +kubebuilder:validation:MaxItems=256
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=63
	// +listType=set
	Namespaces []string `json:"namespaces,omitempty"`
	// WorkloadLabels are labels that the Workload must carry; none means all.
	// +optional
	// +kubebuilder:validation:MaxProperties=16
	WorkloadLabels map[string]string `json:"workloadLabels,omitempty"`
}

// GuardRollout bounds what a change of a policy can do at once.
type GuardRollout struct {
	// Stages are the shares of the instances, in percent, that have the change
	// after each stage. The last is 100. A person confirms each stage before the
	// next begins. None means 10, 50 and 100; where only one instance runs, it
	// has the change at once.
	// +optional
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:items:Minimum=1
	// +kubebuilder:validation:items:Maximum=100
	// +kubebuilder:validation:XValidation:rule="self.size() == 0 || self.isSorted() && self[self.size()-1] == 100",message="stages must rise and end with 100"
	Stages []int32 `json:"stages,omitempty"`
	// SoakSeconds is how long a stage is watched, after all its instances have
	// the change, before it can be confirmed.
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=604800
	// +kubebuilder:default=300
	// +optional
	SoakSeconds *int32 `json:"soakSeconds,omitempty"`
	// DenialsPerMinute is how many denials a minute, of all instances of the
	// stage together and beyond what they had before the change, halt it.
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=100000
	// +kubebuilder:default=5
	// +optional
	DenialsPerMinute *int32 `json:"denialsPerMinute,omitempty"`
}

// GuardExec restricts what code may run.
type GuardExec struct {
	// Audit reports what this section would deny, whatever the policy's mode.
	// +optional
	Audit bool `json:"audit,omitempty"`
	// Origin of programs and of memory mapped executable. "image": only the
	// released image's own, unchanged files; "any": no restriction.
	// +kubebuilder:validation:Enum=image;any
	// +kubebuilder:default=image
	// +optional
	Origin string `json:"origin,omitempty"`
	// Volumes are places, as absolute paths of mounts in the container, whose
	// files may run besides the image's.
	// +optional
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:items:Pattern=`^/`
	// +kubebuilder:validation:items:MaxLength=4095
	// +listType=set
	Volumes []string `json:"volumes,omitempty"`
	// AnonymousMemory says whether memory without a file may be executable
	// (just-in-time compilers need it).
	// +kubebuilder:validation:Enum=deny;allow
	// +kubebuilder:default=deny
	// +optional
	AnonymousMemory string `json:"anonymousMemory,omitempty"`
	// JIT lists programs, by absolute path in the image, that may make memory
	// executable although the others may not.
	// +optional
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:Pattern=`^/`
	// +kubebuilder:validation:items:MaxLength=4095
	// +listType=set
	JIT []string `json:"jit,omitempty"`
	// Allow lists the only programs that may run.
	// +optional
	// +kubebuilder:validation:MaxItems=512
	Allow []GuardProgram `json:"allow,omitzero"`
	// Deny lists programs, by absolute path in the image or as "sha256:" and the
	// digest of the file in lower-case hexadecimal, that may not run whatever they
	// are called or linked as. A program with the digest is denied where it is
	// in the image; what is not of the image is a matter of origin.
	// +optional
	// +kubebuilder:validation:MaxItems=512
	// +kubebuilder:validation:items:Pattern=`^(/|sha256:[0-9a-f]{64}$)`
	// +kubebuilder:validation:items:MaxLength=4095
	// +listType=set
	Deny []string `json:"deny,omitempty"`
	// +optional
	Scripts *GuardScripts `json:"scripts,omitempty"`
	// Preload says whether a program may start with LD_PRELOAD or LD_AUDIT in
	// its environment.
	// +kubebuilder:validation:Enum=deny;allow
	// +kubebuilder:default=allow
	// +optional
	Preload string `json:"preload,omitempty"`
	// ShellOnSocket says whether a program may start with standard input or
	// output connected to a network socket, as a reverse shell does; and, if it
	// is a listed interpreter, with one relayed to it through a pipe or terminal
	// by a process that holds such a socket.
	// +kubebuilder:validation:Enum=deny;allow
	// +kubebuilder:default=deny
	// +optional
	ShellOnSocket string `json:"shellOnSocket,omitempty"`
	// Severity of a denial in this section.
	// +kubebuilder:default=warning
	// +optional
	Severity Severity `json:"severity,omitempty"`
}

// GuardProgram is a program that may run.
// +kubebuilder:validation:XValidation:rule="has(self.path) != has(self.sha256)",message="set exactly one of path and sha256"
type GuardProgram struct {
	// Path in the image, absolute.
	// +optional
	// +kubebuilder:validation:Pattern=`^/`
	// +kubebuilder:validation:MaxLength=4095
	Path string `json:"path,omitempty"`
	// SHA256 of the file, in lower-case hexadecimal.
	// +optional
	// +kubebuilder:validation:Pattern=`^[0-9a-f]{64}$`
	SHA256 string `json:"sha256,omitempty"`
	// Parents are the only programs, by path in the image, whose processes may
	// start this one; none means all. What the agent starts has no parent and
	// is allowed.
	// +optional
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:items:Pattern=`^/`
	// +kubebuilder:validation:items:MaxLength=4095
	// +listType=set
	Parents []string `json:"parents,omitempty"`
}

// GuardScripts restricts what interpreters are handed.
type GuardScripts struct {
	// Interpreters of the image, by absolute path. Those of a script's first
	// line are always known.
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:Pattern=`^/`
	// +kubebuilder:validation:items:MaxLength=4095
	// +listType=set
	Interpreters []string `json:"interpreters"`
	// Origin of the files that an interpreter opens for reading: "image" allows
	// it no others outside /proc, /sys and /dev, or those of exec.volumes.
	// +kubebuilder:validation:Enum=image;any
	// +kubebuilder:default=any
	// +optional
	Origin string `json:"origin,omitempty"`
	// Inline code, as in sh -c and python -e. It is found in the arguments of a
	// listed interpreter, with best effort: one that reads its input is not
	// found out.
	// +kubebuilder:validation:Enum=deny;allow
	// +kubebuilder:default=allow
	// +optional
	Inline string `json:"inline,omitempty"`
}

// GuardFile protects files.
// +kubebuilder:validation:XValidation:rule="has(self.deny) || has(self.allow) || (has(self.fim) && self.fim) || (has(self.bait) && self.bait)",message="set deny, allow, fim or bait"
// +kubebuilder:validation:XValidation:rule="!has(self.by) || has(self.allow)",message="by says who has what allow says: set allow"
type GuardFile struct {
	// Path in the container, absolute, as its processes see it when it starts; a
	// directory covers what is below it. What the container has mounted there, such
	// as a volume, is covered like the rest, by whatever other mount it is reached.
	// In a share of the host's files a rule holds what its path leads to when the
	// container starts or the policy comes; if the host puts another directory on the
	// way to it, from the next heartbeat. In one policy the rules of the deepest path decide; of
	// several with that path each denies what it denies, and what any of those with
	// allow allows is allowed by all of them.
	// +kubebuilder:validation:Pattern=`^/`
	// +kubebuilder:validation:MaxLength=4095
	Path string `json:"path"`
	// Deny names what nobody may do but whom Allow lets: r (read), w (write,
	// create, delete, rename, link, change attributes) or rw. It is rw if it is not
	// set and Allow is.
	// +kubebuilder:validation:Enum=r;w;rw
	// +optional
	Deny string `json:"deny,omitempty"`
	// By lists the programs, by absolute path in the image, that may do what
	// Allow names; if it is not set, all may. A script is its interpreter. No
	// other process traces one that is on a list.
	// +optional
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:items:Pattern=`^/`
	// +kubebuilder:validation:items:MaxLength=4095
	// +listType=set
	By []string `json:"by,omitempty"`
	// Allow names what may be done all the same: r, w or rw.
	// +kubebuilder:validation:Enum=r;w;rw
	// +optional
	Allow string `json:"allow,omitempty"`
	// FIM records every change of what the path covers, and denies nothing: who
	// created, opened for writing, cut, removed, renamed or linked it or changed
	// its attributes; and when a file of the root file system was written, its
	// SHA-256 before and after. Files of up to 1 MiB are digested, 8 MiB in a
	// second, and the last digests of 1,024 are remembered; what was the image's
	// is known without. A digest that could not be taken is told as that, with why.
	// +optional
	FIM bool `json:"fim,omitempty"`
	// Bait files are for nobody: reading or changing one is denied, as rw, and
	// told with severity critical unless another is set.
	// +optional
	Bait bool `json:"bait,omitempty"`
	// Audit reports what this rule would deny, whatever the policy's mode.
	// +optional
	Audit bool `json:"audit,omitempty"`
	// Severity of a denial; warning if it is not said.
	// +optional
	Severity Severity `json:"severity,omitempty"`
}

// GuardNet restricts the network seen from inside the guest.
type GuardNet struct {
	// Audit reports what this section would deny, whatever the policy's mode.
	// +optional
	Audit bool `json:"audit,omitempty"`
	// Egress is an allow list: anything else is refused, and so is everything
	// if it is empty. Names of workloads of the same namespace are allowed by
	// "service".
	// +optional
	// +kubebuilder:validation:MaxItems=256
	Egress []GuardEgress `json:"egress,omitzero"`
	// Ingress is an allow list of who may connect in, and where: a listening
	// port that it does not name cannot be opened.
	// +optional
	// +kubebuilder:validation:MaxItems=256
	Ingress []GuardIngress `json:"ingress,omitzero"`
	// +optional
	DNS *GuardDNS `json:"dns,omitempty"`
	// +kubebuilder:default=warning
	// +optional
	Severity Severity `json:"severity,omitempty"`
}

// GuardEgress is one allowed destination: a service, a range or a name.
// +kubebuilder:validation:XValidation:rule="(has(self.service) ? 1 : 0) + (has(self.cidr) ? 1 : 0) + (has(self.name) ? 1 : 0) == 1",message="set exactly one of service, cidr and name"
// +kubebuilder:validation:XValidation:rule="!has(self.cidr) || isCIDR(self.cidr)",message="cidr must be an address range such as 10.0.0.0/8"
type GuardEgress struct {
	// Service is "workload" or "workload.namespace".
	// +optional
	// +kubebuilder:validation:Pattern=`^[a-z]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)?$`
	// +kubebuilder:validation:MaxLength=127
	Service string `json:"service,omitempty"`
	// CIDR is an address range such as 10.0.0.0/8.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	CIDR string `json:"cidr,omitempty"`
	// Name is a DNS name, or "*." and one for all below it. Its addresses are
	// those of answers that the sandbox was given by its name servers, for as long
	// as they say.
	// +optional
	// +kubebuilder:validation:Pattern=`^(\*\.)?([a-z0-9_]([-a-z0-9_]*[a-z0-9])?\.)*[a-z0-9]([-a-z0-9]*[a-z0-9])?$`
	// +kubebuilder:validation:MaxLength=253
	Name string `json:"name,omitempty"`
	// Protocol is tcp, udp or, if it is not set, both.
	// +optional
	// +kubebuilder:validation:Enum=tcp;udp
	Protocol string `json:"protocol,omitempty"`
	// Ports allowed there; none means all.
	// +optional
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:Minimum=1
	// +kubebuilder:validation:items:Maximum=65535
	Ports []int32 `json:"ports,omitempty"`
}

// GuardIngress is who may connect to which ports.
// +kubebuilder:validation:XValidation:rule="!has(self.cidr) || isCIDR(self.cidr)",message="cidr must be an address range such as 10.0.0.0/8"
type GuardIngress struct {
	// CIDR of the peers; none means all.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	CIDR string `json:"cidr,omitempty"`
	// Protocol is tcp, udp or, if it is not set, both.
	// +optional
	// +kubebuilder:validation:Enum=tcp;udp
	Protocol string `json:"protocol,omitempty"`
	// Ports of the workload.
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:Minimum=1
	// +kubebuilder:validation:items:Maximum=65535
	Ports []int32 `json:"ports"`
}

// GuardDNS restricts whom a workload asks for names.
type GuardDNS struct {
	// Servers are the only addresses to which port 53 is open; none means the
	// sandbox's own name server. Ports of encrypted DNS (853) are closed.
	// +optional
	// +kubebuilder:validation:MaxItems=8
	// +kubebuilder:validation:items:MaxLength=45
	// +listType=set
	Servers []string `json:"servers,omitempty"`
	// Audit records questions and answers.
	// +optional
	Audit bool `json:"audit,omitempty"`
}

// GuardSys denies named operations.
type GuardSys struct {
	// Audit reports what this section would deny, whatever the policy's mode.
	// +optional
	Audit bool `json:"audit,omitempty"`
	// Deny lists operations the workload may not do.
	// +optional
	// +kubebuilder:validation:MaxItems=64
	// +listType=set
	Deny []GuardOperation `json:"deny,omitempty"`
	// Capabilities, if set, are the only ones the workload may use, whatever its
	// container was given; by name without CAP_, in capitals.
	// +optional
	Capabilities *GuardCapabilities `json:"capabilities,omitempty"`
	// +kubebuilder:default=warning
	// +optional
	Severity Severity `json:"severity,omitempty"`
}

// GuardCapabilities is what remains of Linux' capabilities.
type GuardCapabilities struct {
	// Keep names those that stay usable.
	// +kubebuilder:validation:MaxItems=41
	// +kubebuilder:validation:items:Pattern=`^[A-Z_]+$`
	// +listType=set
	Keep []string `json:"keep"`
}

// GuardOperation is an operation the Guard can deny.
// +kubebuilder:validation:Enum=bpf;module;ptrace;mount;rawsocket;mknod;iouring;userns;setns;unshare;chroot;keyctl;perf;userfaultfd;time;reboot;swap;quota;syslog;memfd;setuid;hostname;nice
type GuardOperation string

// GuardLimits bounds what is recorded of what is allowed. What is denied is
// always counted, and never less recorded for these.
type GuardLimits struct {
	// AuditPerSecond is how many records of allowed acts are sent in a second;
	// the rest is counted. None means what the agent can carry.
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=100000
	AuditPerSecond int32 `json:"auditPerSecond,omitempty"`
}

// Severity says what a denial means. Critical opens an Incident and contains
// the instance.
// +kubebuilder:validation:Enum=info;warning;critical
type Severity string

// The severities, weakest first.
const (
	SeverityInfo     Severity = "info"
	SeverityWarning  Severity = "warning"
	SeverityCritical Severity = "critical"
)
