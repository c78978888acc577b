// Package ledger is the append-only log of everything Hauberk decided: a
// transparency log in C2SP's tlog-tiles format, in a directory.
//
// Append returns only when the entry, the tiles that hold it and the signed
// checkpoint that covers it are on the disk, so an act that waits for Append
// cannot happen without its record. Whoever has a copy of the directory and
// the public key can verify it without asking anybody. The package decides
// nothing about what is recorded, and has one writer: room control.
package ledger

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"hauberk.dev/internal/strictjson"
)

// MaxEntry is the size of an entry as tlog-tiles bounds it, in bytes of JSON.
const MaxEntry = 1<<16 - 1

// Entry is one fact. Time, Kind and Text are always there; the rest says what
// the fact is about, and is what Find looks for.
type Entry struct {
	Time time.Time `json:"time"`
	// Kind is "<room>.<what>": "release.intent", "identity.issue".
	Kind string `json:"kind"`
	// Actor is the account, node or part that caused it.
	Actor string `json:"actor,omitempty"`
	// Subject is what it happened to: an image, an identity, an object.
	Subject     string `json:"subject,omitempty"`
	Namespace   string `json:"namespace,omitempty"`
	Application string `json:"application,omitempty"`
	Workload    string `json:"workload,omitempty"`
	Instance    string `json:"instance,omitempty"`
	Incident    string `json:"incident,omitempty"`
	Node        string `json:"node,omitempty"`
	// Digest of the image it is about.
	Digest string `json:"digest,omitempty"`
	// Text says it to a person in one sentence.
	Text string `json:"text"`
	// Body holds the details for machines.
	Body json.RawMessage `json:"body,omitempty"`
}

// encode is the leaf of an entry. It refuses what decode would.
func (e Entry) encode() ([]byte, error) {
	if e.Kind == "" || e.Text == "" || e.Time.IsZero() {
		return nil, fmt.Errorf("entry: time, kind %q and text %q must all be set", e.Kind, e.Text)
	}
	raw, err := json.Marshal(e)
	if err != nil {
		return nil, fmt.Errorf("entry %s: %w", e.Kind, err)
	}
	if len(raw) > MaxEntry {
		return nil, fmt.Errorf("entry %s: is %d bytes of JSON, at most %d are allowed; record a digest of the large part", e.Kind, len(raw), MaxEntry)
	}
	if _, err := decodeEntry(raw); err != nil {
		return nil, err
	}
	return raw, nil
}

func decodeEntry(raw []byte) (Entry, error) {
	var e Entry
	if err := strictjson.Decode(raw, MaxEntry, &e); err != nil {
		return Entry{}, fmt.Errorf("entry: %w", err)
	}
	if e.Kind == "" || e.Text == "" {
		return Entry{}, errors.New("entry: has no kind or no text")
	}
	return e, nil
}

// Record is an entry with its place in the log.
type Record struct {
	Index uint64 `json:"index"`
	Entry Entry  `json:"entry"`
}
