package spec

// GuardPolicy says what may run, be touched and be reached inside a sandbox.
// An absent section leaves its field unrestricted. Deny beats allow beats
// default; several policies on one workload intersect.
type GuardPolicy struct {
	// Mode: enforce denies, audit only reports.
	// +kubebuilder:validation:Enum=audit;enforce
	// +kubebuilder:default=enforce
	// +optional
	Mode string `json:"mode,omitempty"`
	// +optional
	Exec *GuardExec `json:"exec,omitempty"`
	// +optional
	// +kubebuilder:validation:MaxItems=512
	Files []GuardFile `json:"files,omitempty"`
	// +optional
	Net *GuardNet `json:"net,omitempty"`
	// +optional
	Sys *GuardSys `json:"sys,omitempty"`
}

// GuardExec restricts what code may run.
type GuardExec struct {
	// Origin of programs and of memory mapped executable. "image": only the
	// released image's own, unchanged files; "any": no restriction.
	// +kubebuilder:validation:Enum=image;any
	// +kubebuilder:default=image
	// +optional
	Origin string `json:"origin,omitempty"`
	// AnonymousMemory says whether memory without a file may be executable
	// (just-in-time compilers need it).
	// +kubebuilder:validation:Enum=deny;allow
	// +kubebuilder:default=deny
	// +optional
	AnonymousMemory string `json:"anonymousMemory,omitempty"`
	// Deny lists programs, by absolute path in the image, that may not run
	// whatever they are called or linked as.
	// +optional
	// +kubebuilder:validation:MaxItems=512
	// +kubebuilder:validation:items:Pattern=`^/`
	// +kubebuilder:validation:items:MaxLength=4095
	// +listType=set
	Deny []string `json:"deny,omitempty"`
	// ShellOnSocket says whether a program may start with standard input or
	// output connected to a network socket, as a reverse shell does.
	// +kubebuilder:validation:Enum=deny;allow
	// +kubebuilder:default=deny
	// +optional
	ShellOnSocket string `json:"shellOnSocket,omitempty"`
	// Severity of a denial in this section.
	// +kubebuilder:default=warning
	// +optional
	Severity Severity `json:"severity,omitempty"`
}

// GuardFile protects files.
type GuardFile struct {
	// Path in the container, absolute; a directory covers what is below it.
	// +kubebuilder:validation:Pattern=`^/`
	// +kubebuilder:validation:MaxLength=4095
	Path string `json:"path"`
	// Deny names what nobody may do: w (write, create, delete, rename, link,
	// change attributes) or rw.
	// +kubebuilder:validation:Enum=w;rw
	Deny string `json:"deny"`
	// +kubebuilder:default=warning
	// +optional
	Severity Severity `json:"severity,omitempty"`
}

// GuardNet restricts the network seen from inside the guest.
type GuardNet struct {
	// Egress is an allow list: anything else is refused, and so is everything
	// if it is empty. Names of workloads of the same namespace are allowed by
	// "service".
	// +optional
	// +kubebuilder:validation:MaxItems=256
	Egress []GuardEgress `json:"egress,omitempty"`
	// +kubebuilder:default=warning
	// +optional
	Severity Severity `json:"severity,omitempty"`
}

// GuardEgress is one allowed destination: either a service or a range.
// +kubebuilder:validation:XValidation:rule="has(self.service) != has(self.cidr)",message="set exactly one of service and cidr"
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
	// Ports allowed there; none means all.
	// +optional
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:Minimum=1
	// +kubebuilder:validation:items:Maximum=65535
	Ports []int32 `json:"ports,omitempty"`
}

// GuardSys denies named operations.
type GuardSys struct {
	// Deny lists operations the workload may not do.
	// +kubebuilder:validation:MaxItems=16
	// +listType=set
	Deny []GuardOperation `json:"deny"`
	// +kubebuilder:default=warning
	// +optional
	Severity Severity `json:"severity,omitempty"`
}

// GuardOperation is an operation the Guard can deny.
// +kubebuilder:validation:Enum=bpf;module;ptrace;mount;rawsocket;mknod;iouring;userns
type GuardOperation string

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
