// Package admin is the protocol between people's tools and the control plane:
// HTTP with JSON bodies on a Unix socket that only its owner may open.
//
// It is for what a person does and reads. Resources themselves are read and
// written through the Kubernetes-style API.
package admin

import (
	"encoding/json"
	"time"
)

// Paths. GET unless noted.
const (
	PathStatus    = "/v1/status"
	PathInstances = "/v1/instances"
	PathIncidents = "/v1/incidents"
	PathWhy       = "/v1/why"           // ?subject=<incident|workload|instance|refusal|digest>&namespace=
	PathApply     = "/v1/apply"         // POST, YAML documents
	PathDelete    = "/v1/delete"        // POST, YAML documents
	PathRelease   = "/v1/release"       // POST, tar of an OCI layout with its evidence; ?namespace=&application=&image=
	PathExec      = "/v1/exec"          // POST Exec; upgraded to the stream of package admin
	PathLogs      = "/v1/logs"          // ?namespace=&workload=&instance=&follow=
	PathEvents    = "/v1/events"        // ?namespace=&workload=&instance=&follow= : records of guard/trail, one a line
	PathTap       = "/v1/tap"           // ?namespace=&workload=&instance= : requests of api/mesh as they pass, one a line
	PathRestart   = "/v1/restart"       // POST ?namespace=&workload= : replace every instance
	PathLedger    = "/v1/ledger"        // ?from=&limit= : LedgerEntry list
	PathJoin      = "/v1/join"          // POST Join, by root on this machine
	PathGuard     = "/v1/guard"         // GuardState: policies, rollouts and switches
	PathProposal  = "/v1/guard/learnt"  // ?policy: Proposal of a policy in learn
	PathPromote   = "/v1/guard/promote" // Promote: what was learnt becomes the policy
	PathRollout   = "/v1/guard/rollout" // POST Rollout
	PathDegrade   = "/v1/guard/degrade" // POST Degrade
	PathLedgerTar = "/v1/ledger.tar"    // the whole log and its public key, for offline verification
)

// Status is the health of the chain, link by link.
type Status struct {
	Version     string    `json:"version"`
	TrustDomain string    `json:"trustDomain"`
	StartedAt   time.Time `json:"startedAt"`
	API         string    `json:"api"` // URL of the Kubernetes-style API
	Kubeconfig  string    `json:"kubeconfig"`
	Links       []Link    `json:"links"`
	Nodes       []Node    `json:"nodes"`
	Ledger      Ledger    `json:"ledger"`
	// Degraded are the switches that lower guard policies now.
	Degraded []GuardSwitch `json:"degraded,omitempty"`
}

// Link is one link of the chain. State is "ok", "broken" or "absent" (not
// adopted; never shown as passed).
type Link struct {
	Name   string `json:"name"`
	State  string `json:"state"`
	Detail string `json:"detail"`
}

// Node is a machine and the programs on it.
type Node struct {
	Name        string    `json:"name"`
	Ready       bool      `json:"ready"`
	Accelerator string    `json:"accelerator"`
	GuardOff    bool      `json:"guardOff,omitempty"`
	LastSeen    time.Time `json:"lastSeen"`
	Instances   int       `json:"instances"`
	// Spares are machines kept ahead of demand, and the memory they take.
	Spares    int `json:"spares,omitempty"`
	SparesMiB int `json:"sparesMiB,omitempty"`
}

// Ledger is the head of the log.
type Ledger struct {
	Size uint64 `json:"size"`
	Root string `json:"root"` // base64
}

// Instance is one running (or ended) sandbox.
type Instance struct {
	Name        string    `json:"name"`
	Namespace   string    `json:"namespace"`
	Workload    string    `json:"workload"`
	Application string    `json:"application"`
	Node        string    `json:"node"`
	Phase       string    `json:"phase"`
	Reason      string    `json:"reason,omitempty"`
	Message     string    `json:"message,omitempty"`
	Address     string    `json:"address"`
	Image       string    `json:"image"`
	Digest      string    `json:"digest"`
	Identity    string    `json:"identity"`
	Serial      string    `json:"serial,omitempty"`
	StartedAt   time.Time `json:"startedAt,omitzero"`
	ReadyMillis int64     `json:"readyMillis,omitempty"`
	Guard       string    `json:"guard"` // "generation 3, 34 programs, 0 lost"
	ExitCode    *int      `json:"exitCode,omitempty"`
	// Degraded says which switches lower its guard policies.
	Degraded []string `json:"degraded,omitempty"`
}

// Incident as people read it.
type Incident struct {
	Name      string    `json:"name"`
	Namespace string    `json:"namespace"`
	Instance  string    `json:"instance"`
	Workload  string    `json:"workload"`
	Cause     string    `json:"cause"`
	Rule      string    `json:"rule"`
	Detail    string    `json:"detail"`
	Observed  time.Time `json:"observed"`
	Epoch     uint64    `json:"epoch"`
	State     string    `json:"state"` // Containing, Contained
	// ContainedMillis is from observation to the last receipt.
	ContainedMillis int64     `json:"containedMillis,omitempty"`
	Receipts        []Receipt `json:"receipts"`
}

// Receipt of an enforcement point.
type Receipt struct {
	Point string    `json:"point"`
	Node  string    `json:"node"`
	Act   string    `json:"act"`
	At    time.Time `json:"at"`
}

// Story answers why: what happened to a subject, in order.
type Story struct {
	Subject string    `json:"subject"`
	Answer  string    `json:"answer"` // one sentence
	Chapter []Chapter `json:"chapters"`
}

// Chapter is one fact of a story.
type Chapter struct {
	At   time.Time `json:"at"`
	Link string    `json:"link"` // own, release, launch, boot, identity, talk, break
	Text string    `json:"text"`
	// Index of the ledger entry that proves it; -1 if none does.
	Index int64 `json:"index"`
}

// Applied says what became of one document.
type Applied struct {
	Kind      string `json:"kind"`
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	Result    string `json:"result"` // created, configured, unchanged, deleted
}

// Released is the decision on a release.
type Released struct {
	Image       string `json:"image"`
	Digest      string `json:"digest"`
	Application string `json:"application"`
	Index       uint64 `json:"index"`
	// Checks lists what was verified, in order.
	Checks []string `json:"checks"`
}

// Exec asks for a process in a running instance of a workload.
type Exec struct {
	Namespace string   `json:"namespace"`
	Workload  string   `json:"workload"`
	Instance  string   `json:"instance,omitempty"`
	Args      []string `json:"args"`
	TTY       bool     `json:"tty,omitempty"`
	Rows      uint16   `json:"rows,omitempty"`
	Cols      uint16   `json:"cols,omitempty"`
}

// LedgerEntry is one entry of the log.
type LedgerEntry struct {
	Index uint64          `json:"index"`
	Entry json.RawMessage `json:"entry"`
}

// Join asks that this machine's agent be admitted as a node. On one machine
// the kernel's word that root asks is the attestation.
type Join struct {
	Node    string `json:"node"`
	Request []byte `json:"request"` // PKCS #10, DER
}

// Joined is a node's certificate.
type Joined struct {
	Chain       [][]byte  `json:"chain"` // DER, leaf first
	Roots       string    `json:"roots"` // PEM
	TrustDomain string    `json:"trustDomain"`
	NotAfter    time.Time `json:"notAfter"`
}

// GuardState is what of the guard policies is in force, on its way or lowered.
type GuardState struct {
	Policies []GuardPolicy `json:"policies"`
	Switches []GuardSwitch `json:"switches"`
}

// GuardPolicy is a policy and how far a change of it is.
type GuardPolicy struct {
	// Name is "namespace/name", or "cluster/name" for a ClusterGuardPolicy.
	Name       string `json:"name"`
	Generation uint64 `json:"generation"` // in force; 0 is none
	Digest     string `json:"digest,omitempty"`
	Accepted   bool   `json:"accepted"`
	Message    string `json:"message,omitempty"` // why not, if not
	Eligible   int    `json:"eligible"`
	Applied    int    `json:"applied"`
	// Settled means that every instance was given what is meant for it now.
	Settled bool `json:"settled"`
	// Mode of what is in force.
	Mode string `json:"mode,omitempty"`
	// WouldDeny counts, of a policy in audit or learn, what it would deny.
	WouldDeny uint64 `json:"wouldDeny,omitempty"`
	// Past generations that can be rolled back to, the newest first.
	Past    []uint64      `json:"past,omitempty"`
	Rollout *GuardRollout `json:"rollout,omitempty"`
}

// GuardRollout is a change that is on its way.
type GuardRollout struct {
	Generation uint64   `json:"generation"`
	Phase      string   `json:"phase"` // Applying, Soaking, Waiting, Paused, Halted
	Stage      int      `json:"stage"` // from 1
	Stages     int      `json:"stages"`
	Percent    int      `json:"percent"`
	Instances  []string `json:"instances"`
	Waiting    int      `json:"waiting"` // instances that later stages are for
	Message    string   `json:"message"`
}

// GuardSwitch lowers policies until it expires.
type GuardSwitch struct {
	Scope  string    `json:"scope"`            // instance, workload, node, cluster
	Target string    `json:"target,omitempty"` // none for the cluster
	To     string    `json:"to"`               // quiet, audit, off
	By     string    `json:"by"`
	Reason string    `json:"reason"`
	Since  time.Time `json:"since"`
	Until  time.Time `json:"until"`
}

// Rollout is what a person does about a policy. By is what the person is
// called; who asks over the socket is recorded beside it as the kernel says.
type Rollout struct {
	Policy string `json:"policy"` // as GuardPolicy.Name
	Act    string `json:"act"`    // confirm, pause, resume, abort, rollback
	By     string `json:"by,omitempty"`
	Reason string `json:"reason,omitempty"`
}

// Degrade turns a switch, or with To "full" turns it back.
type Degrade struct {
	Scope   string `json:"scope"`
	Target  string `json:"target,omitempty"`
	To      string `json:"to"`
	By      string `json:"by,omitempty"`
	Reason  string `json:"reason"`
	Seconds int64  `json:"seconds,omitempty"`
}

// Proposal is what was learnt under a policy.
type Proposal struct {
	Policy    string    `json:"policy"`    // as GuardPolicy.Name
	Workloads []string  `json:"workloads"` // that were watched
	Instances int       `json:"instances"`
	Since     time.Time `json:"since"`
	Until     time.Time `json:"until"`
	Acts      uint64    `json:"acts"`
	Lost      uint64    `json:"lost"`
	Beyond    uint64    `json:"beyond"`
	Denied    uint64    `json:"denied"`
	// Digest names the proposal's content.
	Digest   string          `json:"digest"`
	Proposal json.RawMessage `json:"proposal"` // a guard.Proposal
}

// Promote makes a proposal the policy: by the person who read it.
type Promote struct {
	Policy string `json:"policy"`
	Mode   string `json:"mode"` // enforce or audit
	// Digest of the proposal that was read; another is not promoted.
	Digest string `json:"digest"`
	// Lossy takes what was learnt from a record with gaps.
	Lossy  bool   `json:"lossy,omitempty"`
	By     string `json:"by,omitempty"`
	Reason string `json:"reason,omitempty"`
}

// Error is the body of every refusal: what is wrong and what to do next.
type Error struct {
	Reason  string `json:"reason"`
	Message string `json:"message"`
	Fix     string `json:"fix,omitempty"`
}

func (e *Error) Error() string { return e.Message }

// Stream frames of an exec, after the upgrade: one byte of kind, four bytes
// of big-endian length, payload. At most 64 KiB of payload.
const (
	FrameStdin  = 0 // client to server; empty payload closes it
	FrameStdout = 1
	FrameStderr = 2
	FrameResize = 3 // rows, cols: two big-endian uint16
	FrameExit   = 4 // server to client, last: big-endian int32
	FrameError  = 5 // server to client, last: JSON Error
)
