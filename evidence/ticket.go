package evidence

import (
	"encoding/json"
	"fmt"
	"regexp"
	"time"

	"hauberk.dev/api/node"
	"hauberk.dev/internal/strictjson"
)

// TicketType is the payload type of a launch ticket.
const TicketType = "application/vnd.hauberk.ticket.v1+json"

// MaxTicketLifetime bounds what one signature can permit. A longer-lived
// instance gets its ticket signed again.
const MaxTicketLifetime = 24 * time.Hour

const maxTicket = 16 << 10

// Ticket is the permission to launch one instance of one image on one node.
type Ticket struct {
	ID           string `json:"id"`
	Instance     string `json:"instance"`
	Namespace    string `json:"namespace"`
	Workload     string `json:"workload"`
	Application  string `json:"application"`
	Repository   string `json:"repository"`
	Digest       string `json:"digest"`
	SandboxClass string `json:"sandboxClass"`
	Node         string `json:"node"`
	// Measurement the guest must boot with.
	Measurement node.Measurement `json:"measurement"`
	// GuardGeneration is the oldest policy generation the guest may enforce.
	GuardGeneration uint64 `json:"guardGeneration"`
	// LedgerIndex is the entry that recorded the launch before it was signed.
	LedgerIndex uint64    `json:"ledgerIndex"`
	NotBefore   time.Time `json:"notBefore"`
	NotAfter    time.Time `json:"notAfter"`
}

var (
	digestPattern = regexp.MustCompile(`^sha256:[a-f0-9]{64}$`)
	hexPattern    = regexp.MustCompile(`^[a-f0-9]{64}$`)
	labelPattern  = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`)
	repoPattern   = regexp.MustCompile(`^[a-z0-9]+([._/-][a-z0-9]+)*$`)
	namePattern   = regexp.MustCompile(`^[A-Za-z0-9]([-A-Za-z0-9._]*[A-Za-z0-9])?$`)
)

// Validate checks that every field is there and in range.
func (t Ticket) Validate() error {
	for _, f := range []struct {
		name, value string
		pattern     *regexp.Regexp
		max         int
	}{
		{"id", t.ID, namePattern, 128},
		{"instance", t.Instance, namePattern, 128},
		{"namespace", t.Namespace, labelPattern, 63},
		{"workload", t.Workload, labelPattern, 63},
		{"application", t.Application, labelPattern, 63},
		{"repository", t.Repository, repoPattern, 255},
		{"digest", t.Digest, digestPattern, 71},
		{"sandboxClass", t.SandboxClass, labelPattern, 32},
		{"node", t.Node, namePattern, 253},
		{"measurement.kernel", t.Measurement.Kernel, hexPattern, 64},
		{"measurement.initrd", t.Measurement.Initrd, hexPattern, 64},
		{"measurement.commandLine", t.Measurement.CommandLine, hexPattern, 64},
		{"measurement.agent", t.Measurement.Agent, hexPattern, 64},
		{"measurement.guard", t.Measurement.Guard, hexPattern, 64},
	} {
		if len(f.value) > f.max || !f.pattern.MatchString(f.value) {
			return fmt.Errorf("ticket: field %s: %q is not of the form %s, at most %d bytes", f.name, f.value, f.pattern, f.max)
		}
	}
	switch life := t.NotAfter.Sub(t.NotBefore); {
	case life <= 0:
		return fmt.Errorf("ticket: field notAfter: %s is not after notBefore %s", t.NotAfter.Format(time.RFC3339), t.NotBefore.Format(time.RFC3339))
	case life > MaxTicketLifetime:
		return fmt.Errorf("ticket: field notAfter: lifetime %s, at most %s is allowed", life, MaxTicketLifetime)
	}
	return nil
}

// SignTicket validates and signs a ticket; the result is what travels.
func SignTicket(t Ticket, s Signer) (json.RawMessage, error) {
	if err := t.Validate(); err != nil {
		return nil, fmt.Errorf("sign %w", err)
	}
	payload, err := json.Marshal(t)
	if err != nil {
		return nil, fmt.Errorf("sign ticket: %w", err)
	}
	env, err := Sign(TicketType, payload, s)
	if err != nil {
		return nil, fmt.Errorf("sign ticket: %w", err)
	}
	return env.Raw(), nil
}

// ExpiredError says a statement was used outside its time.
type ExpiredError struct {
	What, Subject  string
	Key            KeyID
	Now, From, End time.Time
}

func (e *ExpiredError) Error() string {
	when, fix := "expired at "+e.End.Format(time.RFC3339), "ask the control plane for a fresh one"
	if e.Now.Before(e.From) {
		when, fix = "is good only from "+e.From.Format(time.RFC3339), "check this machine's clock"
	}
	return fmt.Sprintf("%s for %s, signed by key %s, %s and it is %s; %s",
		e.What, e.Subject, e.Key.Short(), when, e.Now.Format(time.RFC3339), fix)
}

// VerifyTicket returns a ticket that one of the keys signed and that is good
// at now.
func VerifyTicket(raw []byte, now time.Time, keys []Key) (Ticket, error) {
	env, err := ParseEnvelope(raw)
	if err != nil {
		return Ticket{}, fmt.Errorf("verify ticket: %w", err)
	}
	if env.PayloadType != TicketType {
		return Ticket{}, fmt.Errorf("verify ticket: payload type is %q, want %q", env.PayloadType, TicketType)
	}
	payload, by, err := Verify(env, keys...)
	if err != nil {
		return Ticket{}, fmt.Errorf("verify ticket: %w", err)
	}
	t, err := parseTicket(payload)
	if err != nil {
		return Ticket{}, fmt.Errorf("verify ticket: %w", err)
	}
	if now.Before(t.NotBefore) || !now.Before(t.NotAfter) {
		return Ticket{}, fmt.Errorf("verify ticket: %w", &ExpiredError{
			What: "ticket " + t.ID, Subject: "instance " + t.Instance, Key: by[0], Now: now, From: t.NotBefore, End: t.NotAfter})
	}
	return t, nil
}

func parseTicket(payload []byte) (Ticket, error) {
	var t Ticket
	if err := strictjson.Decode(payload, maxTicket, &t); err != nil {
		return Ticket{}, fmt.Errorf("parse ticket: %w", err)
	}
	return t, t.Validate()
}
