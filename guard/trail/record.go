package trail

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"hauberk.dev/api/spec"
	"hauberk.dev/guard"
)

// Schema names the shape of a Record. It changes only when a field changes its
// meaning or goes; new fields may come.
const Schema = "hauberk.dev/guard-event/1"

// Record is an event of the Guard and where it was, one JSON line.
type Record struct {
	Schema  string    `json:"schema"`
	Time    time.Time `json:"time"` // when the host heard of it
	Op      string    `json:"op"`
	Verdict string    `json:"verdict"` // allowed, reported, denied, killed; lost
	// Severity, Policy and Text are the rule's.
	Severity   spec.Severity `json:"severity,omitempty"`
	Policy     string        `json:"policy,omitempty"`
	Rule       uint32        `json:"rule,omitempty"`
	RuleText   string        `json:"ruleText,omitempty"`
	Generation uint64        `json:"generation,omitempty"`
	Digest     string        `json:"policyDigest,omitempty"`
	// Count is how many acts this record stands for.
	Count    uint64        `json:"count"`
	Series   uint64        `json:"series,omitempty"` // of records about the same
	Sequence uint64        `json:"sequence,omitempty"`
	Lost     uint64        `json:"lost,omitempty"`
	Boot     time.Duration `json:"sinceBoot,omitempty"` // by the guest's clock

	Process Process `json:"process,omitzero"`
	Path    string  `json:"path,omitempty"`
	// PathCut: the path begins with "...": the rest was too long.
	PathCut bool   `json:"pathCut,omitempty"`
	Target  string `json:"target,omitempty"` // address and port
	// Before and After are the SHA-256 of a watched file, or why there is none.
	Before string `json:"before,omitempty"`
	After  string `json:"after,omitempty"`
	Detail uint64 `json:"detail,omitempty"`
	Why    uint8  `json:"why,omitempty"`
	// Value is an argument or variable that a program was given.
	Value string       `json:"value,omitempty"`
	Names *guard.Names `json:"names,omitempty"` // a message of DNS
	// Again: the record only counts more acts of its series.
	Again bool   `json:"again,omitempty"`
	Text  string `json:"text"` // the same in words
	// Redacted is how many secrets were taken out of the texts.
	Redacted int `json:"redacted,omitempty"`

	Sandbox Sandbox `json:"sandbox"`
}

// Process is who did it.
type Process struct {
	PID       uint32        `json:"pid"`
	Name      string        `json:"name"` // its own name for itself
	Exe       string        `json:"exe,omitempty"`
	Args      []string      `json:"args,omitempty"`
	UID       uint32        `json:"uid"`
	Start     time.Duration `json:"start,omitempty"` // since boot
	Container string        `json:"container,omitempty"`
	PPID      uint32        `json:"ppid,omitempty"`
	Parent    string        `json:"parent,omitempty"` // its program
	// Lineage is nearest first, up to what the agent started.
	Lineage []guard.Ancestor `json:"lineage,omitempty"`
	Cut     bool             `json:"lineageCut,omitempty"`
}

// Sandbox is where it was, by the host's knowledge.
type Sandbox struct {
	ID          string `json:"id"`
	Image       string `json:"image,omitempty"`
	ImageDigest string `json:"imageDigest,omitempty"`
	Node        string `json:"node,omitempty"`
	Namespace   string `json:"namespace,omitempty"`
	Workload    string `json:"workload,omitempty"`
	Application string `json:"application,omitempty"`
}

// VerdictLost is the verdict of a record that tells of records that were lost.
const VerdictLost = "lost"

// names of the operations. They are part of the schema.
var names = map[guard.Op]string{
	guard.OpExec: "exec", guard.OpMap: "map", guard.OpMemory: "memory", guard.OpListed: "listed", guard.OpShell: "shell",
	guard.OpWrite: "write", guard.OpRead: "read", guard.OpEgress: "egress", guard.OpRawSocket: "rawsocket", guard.OpBPF: "bpf",
	guard.OpModule: "module", guard.OpPtrace: "ptrace", guard.OpMount: "mount", guard.OpMknod: "mknod", guard.OpIOUring: "iouring",
	guard.OpUserNS: "userns", guard.OpAgent: "agent", guard.OpDevice: "device", guard.OpSetting: "setting", guard.OpHelper: "helper",
	guard.OpUnlisted: "unlisted", guard.OpPreload: "preload", guard.OpScript: "script", guard.OpInline: "inline",
	guard.OpOperation: "operation", guard.OpCapability: "capability", guard.OpIngress: "ingress", guard.OpBind: "bind", guard.OpHost: "host",
	guard.OpStarted: "started", guard.OpConnected: "connected", guard.OpListening: "listening", guard.OpAccepted: "accepted", guard.OpNames: "dns",
	guard.OpPolicy:  "policy",
	guard.OpChanged: "changed", guard.OpContent: "content", guard.OpMounted: "mounted", guard.OpUnheld: "unheld",
	44: "intovolume", 80: "environment",
}

// OpName is the word for an operation.
func OpName(op guard.Op) string {
	if n, ok := names[op]; ok {
		return n
	}
	return fmt.Sprintf("op%d", op)
}

// Policy finds the rule of an event in the policies that are or were in force.
type Policy interface {
	Rule(id uint32) (guard.Rule, bool)
}

// Trail turns the events of one sandbox into records.
type Trail struct {
	Sandbox Sandbox
	// Container gives the name of one of the agent's containers; it may be nil.
	Container func(number uint32) string

	series seriesCounts
	lost   map[guard.Op]uint64
}

// Record makes the record of an event under a policy, and takes the secrets out
// of it.
func (t *Trail) Record(e guard.Event, policy Policy, digest string, now time.Time) Record {
	redacted := 0
	e.Args, redacted = Redact(e.Args)
	if e.Value != "" {
		value, more := RedactText(e.Value)
		e.Value, redacted = value, redacted+more
	}
	op := e.Op
	if op == guard.OpRepeated {
		op = guard.Op(e.Detail)
	}
	r := Record{
		Schema: Schema, Time: now.UTC(), Op: OpName(op), Verdict: e.Verdict.String(), Rule: e.Rule, Generation: e.Generation, Digest: digest,
		Count: t.series.acts(e), Series: e.Series, Sequence: e.Sequence, Lost: e.Lost, Boot: e.SinceBoot,
		Path: e.Path, PathCut: e.Truncated, Before: e.Before, After: e.After, Detail: e.Detail, Why: e.Why, Value: e.Value, Names: e.Names, Again: e.Op == guard.OpRepeated, Text: e.String(), Redacted: redacted, Sandbox: t.Sandbox,
		Process: Process{PID: e.PID, Name: e.Command, Exe: e.Exe, Args: e.Args, UID: e.UID, Start: e.Start, PPID: e.PPID, Parent: e.Parent, Lineage: e.Lineage, Cut: e.Cut},
	}
	if e.Target.IsValid() {
		r.Target = e.Target.String()
	}
	if e.Container != 0 {
		r.Process.Container = fmt.Sprint(e.Container)
		if t.Container != nil {
			r.Process.Container = t.Container(e.Container)
		}
	}
	if e.Rule != 0 && policy != nil {
		if rule, ok := policy.Rule(e.Rule); ok {
			r.Policy, r.RuleText, r.Severity = rule.Policy, rule.Text, rule.Severity
		}
	}
	return r
}

// Losses makes a record of each operation that lost records since it was last
// asked: a loss is an event.
func (t *Trail) Losses(tallies map[guard.Op]guard.Tally, now time.Time) (records []Record) {
	if t.lost == nil {
		t.lost = map[guard.Op]uint64{}
	}
	for op, n := range tallies {
		gone := n.Lost + n.Held
		if gone <= t.lost[op] {
			continue
		}
		records = append(records, Record{Schema: Schema, Time: now.UTC(), Op: OpName(op), Verdict: VerdictLost, Severity: spec.SeverityWarning,
			Count: gone - t.lost[op], Lost: n.Lost, Sandbox: t.Sandbox,
			Text: fmt.Sprintf("%d records of operation %s were not sent: %d of %d in all found no room, %d were held back", gone-t.lost[op], OpName(op), n.Lost, n.Happened, n.Held)})
		t.lost[op] = gone
	}
	return records
}

// seriesCounts knows how many acts of each series were told.
type seriesCounts struct {
	told  map[uint64]uint64
	order []uint64
}

// maxSeries is how many series are known at once; it is above what a guest
// counts.
const maxSeries = 4096

// acts says how many acts an event adds to what is known.
func (s *seriesCounts) acts(e guard.Event) uint64 {
	if e.Series == 0 {
		return 1
	}
	if s.told == nil {
		s.told = map[uint64]uint64{}
	}
	before, known := s.told[e.Series]
	if !known {
		if len(s.order) == maxSeries {
			delete(s.told, s.order[0])
			s.order = s.order[1:]
		}
		s.order = append(s.order, e.Series)
		if e.Op != guard.OpRepeated && e.Series != e.Sequence {
			before = e.Count - min(e.Count, 1) // it was forgotten, or began before this process: only this act is known
		}
	}
	if e.Count <= before {
		return 0 // another processor's record came first and told of this one too
	}
	s.told[e.Series] = e.Count
	return e.Count - before
}

var errRecord = errors.New("not a record of this schema")

// maxLine bounds a record's line.
const maxLine = 64 << 10

// Parse reads one line.
func Parse(line []byte) (r Record, err error) {
	if len(line) > maxLine {
		return r, fmt.Errorf("read record of %d bytes: %w", len(line), errRecord)
	}
	if err := json.Unmarshal(line, &r); err != nil {
		return r, fmt.Errorf("read record: %w", err)
	}
	if r.Schema != Schema {
		return r, fmt.Errorf("read record of schema %q: %w", r.Schema, errRecord)
	}
	return r, nil
}

// Filter says which records are wanted; empty fields want all.
type Filter struct {
	Verdict, Op, Workload, Sandbox string
	Since                          time.Time
}

// Wants says whether the filter lets a record through.
func (f Filter) Wants(r Record) bool {
	return (f.Verdict == "" || r.Verdict == f.Verdict || f.Verdict == "denied" && r.Verdict == "killed") && (f.Op == "" || r.Op == f.Op) &&
		(f.Workload == "" || r.Sandbox.Workload == f.Workload) && (f.Sandbox == "" || r.Sandbox.ID == f.Sandbox) && !r.Time.Before(f.Since)
}

// Known says whether an operation or verdict of a filter exists.
func (f Filter) Known() error {
	switch f.Verdict {
	case "", "allowed", "reported", "denied", "killed", VerdictLost:
	default:
		return fmt.Errorf("verdict %q: want allowed, reported, denied, killed or lost", f.Verdict)
	}
	if f.Op == "" || strings.HasPrefix(f.Op, "op") {
		return nil
	}
	for _, n := range names {
		if n == f.Op {
			return nil
		}
	}
	return fmt.Errorf("operation %q is not known: see docs/events.md", f.Op)
}
