package guard

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"syscall"
)

// Status is what a guest says of its Guard.
type Status struct {
	Programs   int // attached
	Generation uint64
	Digest     string // of the policy in force, as Compiled has it; empty before the first
	Sequence   uint64 // of the last denial or report
	Lost       uint64
	// AuditSequence and AuditLost count the record of what was allowed.
	AuditSequence uint64
	AuditLost     uint64
	Tags          []string // of the loaded programs, as the kernel computed them
	// Tallies are what became of the acts of each operation that was ever told.
	Tallies map[Op]Tally
}

// Tally is what became of the acts of one operation. Every act is in Happened
// and in just one of the others, but for those that are on their way.
type Tally struct {
	Happened uint64 `json:"happened"`
	Sent     uint64 `json:"sent"`
	Merged   uint64 `json:"merged"` // only counted, in the record of a series
	Lost     uint64 `json:"lost"`   // nobody drained the ring fast enough
	Held     uint64 `json:"held"`   // by limits.auditPerSecond
}

const tallySize = 1 + 5*8

var errStatus = errors.New("not a status of the guard")

// DecodeStatus reads the answer to a guest's status verb. No bytes at all mean
// a guest without a Guard, which is an error.
func DecodeStatus(b []byte) (Status, error) {
	const fixed, version, tag = 1 + 2 + 8 + 32 + 32 + 2, 2, 8
	if len(b) < fixed || b[0] != version {
		return Status{}, fmt.Errorf("decode status of %d bytes: %w", len(b), errStatus)
	}
	le := binary.LittleEndian
	s := Status{
		Programs: int(le.Uint16(b[1:])), Generation: le.Uint64(b[3:]),
		Sequence: le.Uint64(b[43:]), Lost: le.Uint64(b[51:]), AuditSequence: le.Uint64(b[59:]), AuditLost: le.Uint64(b[67:]),
	}
	if s.Generation != 0 {
		s.Digest = hex.EncodeToString(b[11:43])
	}
	n := int(le.Uint16(b[75:]))
	if b = b[fixed:]; len(b) < n*tag+2 {
		return Status{}, fmt.Errorf("decode status with %d tags: %w", n, errStatus)
	}
	for range n {
		s.Tags = append(s.Tags, hex.EncodeToString(b[:tag]))
		b = b[tag:]
	}
	n = int(le.Uint16(b))
	if b = b[2:]; len(b) != n*tallySize {
		return Status{}, fmt.Errorf("decode status with %d tallies: %w", n, errStatus)
	}
	s.Tallies = map[Op]Tally{}
	for ; len(b) > 0; b = b[tallySize:] {
		s.Tallies[Op(b[0])] = Tally{le.Uint64(b[1:]), le.Uint64(b[9:]), le.Uint64(b[17:]), le.Uint64(b[25:]), le.Uint64(b[33:])}
	}
	return s, nil
}

// Applied is what a guest says of a policy that it was given.
type Applied struct {
	Generation uint64
	// Refused: the policy is not in force, because a rule in Lost cannot be held
	// and its policy would rather not hold at all. The one before it is.
	Refused bool
	// Absent are the rules of which a path, or a program that they name, was not
	// there. They hold for what will be.
	Absent []uint32
	// Lost are the rules that cannot be held in this guest.
	Lost []LostRule
}

// LostRule is a rule that cannot be held, and the guest's reason.
type LostRule struct {
	ID     uint32
	Reason syscall.Errno
}

// DecodeApplied reads the answer to a policy.
func DecodeApplied(b []byte) (Applied, error) {
	const fixed, version, entry, absent, lost = 12, 2, 7, 1, 2
	if len(b) < fixed || b[0] != version {
		return Applied{}, fmt.Errorf("decode answer to policy of %d bytes: %w", len(b), errStatus)
	}
	le := binary.LittleEndian
	a := Applied{Generation: le.Uint64(b[1:]), Refused: b[9] != 0}
	n := int(le.Uint16(b[10:]))
	if b = b[fixed:]; len(b) != n*entry {
		return Applied{}, fmt.Errorf("decode answer to policy with %d rules: %w", n, errStatus)
	}
	for ; len(b) > 0; b = b[entry:] {
		switch b[4] {
		case absent:
			a.Absent = append(a.Absent, le.Uint32(b))
		case lost:
			a.Lost = append(a.Lost, LostRule{le.Uint32(b), syscall.Errno(le.Uint16(b[5:]))})
		default:
			return Applied{}, fmt.Errorf("decode answer to policy: rule in state %d: %w", b[4], errStatus)
		}
	}
	return a, nil
}

// ErrRefused says that a guest did not put a policy in force, and that the one
// before it still is.
var ErrRefused = errors.New("the policy is refused and the one before it stays in force")

// Applied reads the answer to this policy. An error that wraps ErrRefused names
// every rule that kept the guest from it.
func (c *Compiled) Applied(reply []byte) (Applied, error) {
	a, err := DecodeApplied(reply)
	if err != nil {
		return Applied{}, err
	}
	if a.Generation != c.Generation {
		return a, fmt.Errorf("decode answer to policy generation %d: it is about %d: %w", c.Generation, a.Generation, errStatus)
	}
	if !a.Refused {
		return a, nil
	}
	faults := []error{ErrRefused}
	for _, l := range a.Lost {
		faults = append(faults, errors.New(c.Why(l)))
	}
	return a, errors.Join(faults...)
}

// Why says in words which rule cannot be held, and why.
func (c *Compiled) Why(l LostRule) string {
	r, ok := c.Rule(l.ID)
	if !ok {
		return fmt.Sprintf("rule %d: %s", l.ID, l.Reason)
	}
	return fmt.Sprintf("policy %q: %s: %q cannot be held: %s", r.Policy, r.Field, r.Text, l.Reason)
}
