// Package attest turns evidence into a verdict under a policy.
//
// It decides, it does not collect: measurements and the reference they are
// held against are arguments, so a verdict can be repeated years later from
// the ledger. What it judges today is what a node says its guest booted from,
// which no hardware vouches for; the verdict says so in its level.
package attest

import (
	"fmt"
	"slices"

	"hauberk.dev/api/node"
)

// Level is how much stands behind the evidence.
type Level string

// LevelNone: a node's own word, without a TPM or a TEE behind it.
const LevelNone Level = "none"

// Reference is what a guest may boot from: SHA-256 in lower-case hexadecimal,
// any of each list. An empty list accepts nothing.
type Reference struct {
	Kernels      []string `json:"kernels"`
	Initrds      []string `json:"initrds"`
	CommandLines []string `json:"commandLines"`
	Agents       []string `json:"agents"`
	Guards       []string `json:"guards"`
}

// Exactly is the reference that accepts one measurement.
func Exactly(m node.Measurement) Reference {
	return Reference{[]string{m.Kernel}, []string{m.Initrd}, []string{m.CommandLine}, []string{m.Agent}, []string{m.Guard}}
}

// Claim is one part of the evidence and how it was judged.
type Claim struct {
	Name  string `json:"name"`
	Value string `json:"value"`
	// Matched is the reference value it equals, or "".
	Matched string `json:"matched,omitempty"`
	OK      bool   `json:"ok"`
}

// Verdict on a guest.
type Verdict struct {
	OK     bool    `json:"ok"`
	Level  Level   `json:"level"`
	Claims []Claim `json:"claims"`
	// Reason for people, when not OK: the first claim that failed.
	Reason string `json:"reason,omitempty"`
}

// Judge holds what a guest booted from against a reference. A guest whose
// Guard was switched off never passes, whatever else it shows.
func Judge(m node.Measurement, r Reference) Verdict {
	v := Verdict{OK: true, Level: LevelNone}
	for _, c := range []struct {
		name, value string
		accepted    []string
	}{
		{"kernel", m.Kernel, r.Kernels},
		{"initrd", m.Initrd, r.Initrds},
		{"commandLine", m.CommandLine, r.CommandLines},
		{"agent", m.Agent, r.Agents},
		{"guard", m.Guard, r.Guards},
	} {
		claim := Claim{Name: c.name, Value: c.value}
		// An unmeasured part is never accepted, even if a reference has "".
		if c.value != "" && slices.Contains(c.accepted, c.value) {
			claim.Matched, claim.OK = c.value, true
		} else {
			v.fail(fmt.Sprintf("%s %.80q is none of the %d accepted; boot the released guest, or accept it in the reference", c.name, c.value, len(c.accepted)))
		}
		v.Claims = append(v.Claims, claim)
	}
	on := Claim{Name: "guardOn", Value: fmt.Sprint(!m.GuardOff), OK: !m.GuardOff}
	if on.OK {
		on.Matched = on.Value
	} else {
		v.fail("the Guard was switched off by a test flag; start the node without it")
	}
	v.Claims = append(v.Claims, on)
	return v
}

func (v *Verdict) fail(reason string) {
	v.OK = false
	if v.Reason == "" {
		v.Reason = reason
	}
}
