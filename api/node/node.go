// Package node is the protocol between the control plane and the agent of a
// node: HTTPS with certificates on both sides, JSON bodies.
//
// The node dials the control plane, says Hello, then holds one Watch open, on
// which the control plane sends its whole desired state whenever it changes.
// A node sees only what runs on it. The control plane dials the node only for
// what a person asks of a running instance (exec, logs, attack checks).
package node

import (
	"encoding/json"
	"time"

	"hauberk.dev/api/spec"
	"hauberk.dev/plan"
)

// Version of the protocol. It rises with every change that an older peer
// would misread.
//
//	1  2026-11: first.
//	2  2026-11: nodes say what their guests are, and why a policy was refused.
const Version = 2

// Paths on the control plane's node door. Methods are POST, except the watch
// and the registry, which are GET.
const (
	PathHello    = "/v1/hello"
	PathWatch    = "/v1/watch"
	PathStatus   = "/v1/status"
	PathCSR      = "/v1/csr"
	PathReport   = "/v1/report"
	PathReceipt  = "/v1/receipt"
	PathLearnt   = "/v1/learnt"
	PathRegistry = "/v2/" // OCI distribution, read only
)

// Paths on the node's door, called by the control plane.
const (
	PathExec   = "/v1/exec"   // upgraded to a stream of Frames
	PathLogs   = "/v1/logs"   // chunked text
	PathTap    = "/v1/tap"    // chunked requests of api/mesh as they pass, one a line; ?instance=
	PathEvents = "/v1/events" // chunked records of guard/trail, one a line; ?instance=&follow=
)

// Hello introduces a node.
type Hello struct {
	Version int    `json:"version"`
	Node    string `json:"node"`
	// Door is the host:port the node's own door listens on.
	Door string `json:"door"`
	// Gateway is the host:port of its mesh (HBONE).
	Gateway string `json:"gateway"`
	// Accelerator that really booted a guest: "kvm" or "tcg".
	Accelerator string `json:"accelerator"`
	// Measurement of the guest this node boots.
	Measurement Measurement `json:"measurement"`
	// Guest says what a policy can be held by.
	Guest GuestFacts `json:"guest"`
}

// GuestFacts is what the guests of a node are, in words of their own.
type GuestFacts struct {
	// Kernel is the release of the guests' kernel.
	Kernel string `json:"kernel,omitempty"`
	// Programs of the Guard that this kernel takes, by name; none if the guests
	// boot without it.
	Programs []string `json:"programs,omitempty"`
}

// Measurement names, by SHA-256 in lower-case hexadecimal, everything a
// sandbox boots from.
type Measurement struct {
	Kernel      string `json:"kernel"`
	Initrd      string `json:"initrd"`
	CommandLine string `json:"commandLine"`
	Agent       string `json:"agent"`
	Guard       string `json:"guard"`
	// GuardOff is true only under the flag that switches the Guard off to
	// prove that the checks notice.
	GuardOff bool `json:"guardOff,omitempty"`
}

// Desired is everything a node should be doing. It replaces the last one.
type Desired struct {
	Mesh      plan.Mesh  `json:"mesh"`
	Epoch     plan.Epoch `json:"epoch"`
	Instances []Instance `json:"instances"`
	// Roots are the PEM certificates identities chain to.
	Roots string `json:"roots"`
	// TicketKeys are the PEM public keys that sign tickets.
	TicketKeys []string `json:"ticketKeys"`
}

// Instance is one sandbox a node should run.
type Instance struct {
	ID        string        `json:"id"`
	Namespace string        `json:"namespace"`
	Workload  string        `json:"workload"`
	Spec      spec.Workload `json:"spec"`
	// Digest of the image, as the ticket has it.
	Digest string `json:"digest"`
	// Repository the digest is pulled from.
	Repository string `json:"repository"`
	Address    string `json:"address"` // of the guest
	Identity   string `json:"identity"`
	// Ticket is the signed permission to launch (a DSSE envelope).
	Ticket json.RawMessage `json:"ticket"`
	Guard  Guard           `json:"guard"`
}

// FirstGeneration is that of a workload's first policies. The one before is what a
// machine that is kept ahead of demand rehearses under: a Guard takes no policy in
// place of another of the same generation.
const FirstGeneration = 2

// Guard is the policy of an instance, already intersected and resolved.
type Guard struct {
	Generation uint64             `json:"generation"`
	Policies   []NamedGuardPolicy `json:"policies"`
	// Services resolves the service names in the policies to addresses.
	Services map[string]string `json:"services,omitempty"`
	// Kernel is the digest of the guest kernel that the policies were checked
	// against; a node whose guests have another refuses them. Empty is any.
	Kernel string `json:"kernel,omitempty"`
}

// NamedGuardPolicy is a policy with the name it has in the API.
type NamedGuardPolicy struct {
	Name string           `json:"name"`
	Spec spec.GuardPolicy `json:"spec"`
}

// Phase of an instance on its node.
type Phase string

// The phases. Refused, Failed and Exited are final for an instance;
// Contained ends only by a person.
const (
	PhasePending   Phase = "Pending"
	PhaseRunning   Phase = "Running"
	PhaseRefused   Phase = "Refused"
	PhaseFailed    Phase = "Failed"
	PhaseExited    Phase = "Exited"
	PhaseContained Phase = "Contained"
)

// Status is the state of every instance on a node, sent on change and at
// least every five seconds (it is also the heartbeat).
type Status struct {
	Node      string           `json:"node"`
	At        time.Time        `json:"at"`
	Instances []InstanceStatus `json:"instances"`
	Spares    Spares           `json:"spares,omitzero"`
}

// Spares are machines that a node keeps ahead of demand: they are nobody's.
type Spares struct {
	Machines int `json:"machines"`
	MiB      int `json:"mib"` // of the node's memory, theirs alone
}

// InstanceStatus is what a node says of one instance.
type InstanceStatus struct {
	ID     string `json:"id"`
	Phase  Phase  `json:"phase"`
	Reason string `json:"reason,omitempty"` // one CamelCase word
	// Message is for people: what failed and what to do.
	Message   string    `json:"message,omitempty"`
	StartedAt time.Time `json:"startedAt,omitzero"`
	ExitCode  *int      `json:"exitCode,omitempty"`
	// ReadyMillis is the time from clone to first workload process.
	ReadyMillis int64 `json:"readyMillis,omitempty"`
	// Serial of the certificate in use.
	Serial string         `json:"serial,omitempty"`
	Guard  GuardHeartbeat `json:"guard"`
	// Refused is the generation of the last order of policies that was not put in
	// force, if none was since, and why; what held before it still holds.
	Refused       uint64 `json:"refused,omitempty"`
	RefusedReason string `json:"refusedReason,omitempty"`
	// Unsupported says what of the policies in force is not held as written.
	Unsupported []string `json:"unsupported,omitempty"`
}

// GuardHeartbeat is what the guest says of its Guard.
type GuardHeartbeat struct {
	At         time.Time `json:"at,omitzero"`
	Generation uint64    `json:"generation"`
	Digest     string    `json:"digest,omitempty"` // of the policy in force
	Programs   int       `json:"programs"`         // attached
	Sequence   uint64    `json:"sequence"`         // of the last event
	Lost       uint64    `json:"lost"`             // events dropped
	// AuditSequence and AuditLost count the records of what was allowed.
	AuditSequence uint64 `json:"auditSequence,omitempty"`
	AuditLost     uint64 `json:"auditLost,omitempty"`
	// AgentKiB is the agent's private memory, as last asked for.
	AgentKiB int `json:"agentKiB,omitempty"`
}

// CSR asks for an identity. The key never leaves the mesh process.
type CSR struct {
	Instance    string          `json:"instance"`
	Ticket      json.RawMessage `json:"ticket"`
	Request     []byte          `json:"request"` // PKCS #10, DER
	Guard       GuardHeartbeat  `json:"guard"`
	Measurement Measurement     `json:"measurement"`
}

// Certificate is an issued identity.
type Certificate struct {
	Chain    [][]byte  `json:"chain"` // DER, leaf first
	Serial   string    `json:"serial"`
	NotAfter time.Time `json:"notAfter"`
}

// Learnt is all that an instance did so far under policies in learn.
type Learnt struct {
	Instance    string          `json:"instance"`
	Observation json.RawMessage `json:"observation"` // a guard.Observation
}

// Report is a violation, sent at once.
type Report struct {
	Instance string        `json:"instance"`
	Severity spec.Severity `json:"severity"`
	Cause    string        `json:"cause"` // as spec.Incident.Cause
	Rule     string        `json:"rule"`
	Detail   string        `json:"detail"`
	Sequence uint64        `json:"sequence"`
	Lost     uint64        `json:"lost"`
	Observed time.Time     `json:"observed"`
	Denied   bool          `json:"denied"` // false: seen in audit mode
	// Policy whose rule it is, by the name it has in NamedGuardPolicy.
	Policy string `json:"policy,omitempty"`
	// Victim is an instance on the reporting node that Instance, which runs
	// there or elsewhere, has attacked over the mesh.
	Victim string `json:"victim,omitempty"`
}

// Receipt says an enforcement point has applied an epoch.
type Receipt struct {
	Epoch    uint64 `json:"epoch"`
	Instance string `json:"instance,omitempty"`
	// Point is who applied it: "mesh", "sandbox".
	Point string `json:"point"`
	Node  string `json:"node"`
	// Act in words: "cut 3 connections", "paused".
	Act string    `json:"act"`
	At  time.Time `json:"at"`
	// Signature over the receipt by the node's key, base64 ASN.1.
	Signature string `json:"signature"`
}

// Exec asks for a process in a running instance.
type Exec struct {
	Instance string   `json:"instance"`
	Args     []string `json:"args"`
	Env      []string `json:"env,omitempty"`
	TTY      bool     `json:"tty,omitempty"`
	Rows     uint16   `json:"rows,omitempty"`
	Cols     uint16   `json:"cols,omitempty"`
}

// Error is the body of every refusal.
type Error struct {
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

func (e *Error) Error() string { return e.Message }
