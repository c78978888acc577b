package guard

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
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

// Applied is what a guest says when it has put a policy in force.
type Applied struct {
	Generation uint64
	// Absent are the rules of which a path was not there. Making it is
	// refused, unless the rule is in Lost too: then it cannot be held.
	Absent []uint32
	Lost   []uint32
}

// DecodeApplied reads the answer to a policy.
func DecodeApplied(b []byte) (Applied, error) {
	const fixed, version, entry, lost = 11, 1, 5, 2
	if len(b) < fixed || b[0] != version {
		return Applied{}, fmt.Errorf("decode answer to policy of %d bytes: %w", len(b), errStatus)
	}
	le := binary.LittleEndian
	a := Applied{Generation: le.Uint64(b[1:])}
	n := int(le.Uint16(b[9:]))
	if b = b[fixed:]; len(b) != n*entry {
		return Applied{}, fmt.Errorf("decode answer to policy with %d rules: %w", n, errStatus)
	}
	for ; len(b) > 0; b = b[entry:] {
		a.Absent = append(a.Absent, le.Uint32(b))
		if b[4] == lost {
			a.Lost = append(a.Lost, le.Uint32(b))
		}
	}
	return a, nil
}
