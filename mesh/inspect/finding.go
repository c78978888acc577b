package inspect

import (
	"fmt"
	"strings"
)

// Kind names a finding.
type Kind uint8

// The kinds: what a value holds, how a caller behaves, and what a learnt route
// has not seen.
const (
	SQL Kind = iota
	Shell
	Traversal
	Template
	SSRF
	Script
	Gadget
	Scan
	Spread
	Exfiltration
	Hijack
	NewRoute
	NewMethod
	NewCaller
	NewArgument
	ArgumentType
	LargeRequest
	Rate
	Errors
	kinds
)

// known are the names and weights of the kinds. What one finding weighs is what
// it says by itself: a signature that was confirmed is hardly ever ordinary, a
// new argument mostly is.
var known = [kinds]struct {
	name   string
	weight int
}{
	SQL: {"sql", 40}, Shell: {"shell", 50}, Traversal: {"traversal", 40}, Template: {"template", 50}, SSRF: {"ssrf", 40},
	Script: {"script", 25}, Gadget: {"gadget", 60},
	Scan: {"scan", 40}, Spread: {"spread", 40}, Exfiltration: {"exfiltration", 50}, Hijack: {"hijack", 60},
	NewRoute: {"new-route", 5}, NewMethod: {"new-method", 10}, NewCaller: {"new-caller", 15}, NewArgument: {"new-argument", 4},
	ArgumentType: {"argument-type", 8}, LargeRequest: {"large-request", 10}, Rate: {"rate", 15}, Errors: {"errors", 5},
}

func (k Kind) String() string { return known[k].name }

// Weight is what one finding of the kind adds to a score.
func (k Kind) Weight() int { return known[k].weight }

// Finding is one reason of a score. A request has at most one of each kind.
type Finding struct {
	Kind   Kind
	Detail string
}

// Action is what is to be done about a request or its caller.
type Action uint8

// The actions, each harder than the one before.
const (
	None Action = iota
	Observe
	Shed
	Challenge
	Cut
	Incident
	actions
)

var actionNames = [actions]string{"none", "observe", "shed", "challenge", "cut", "incident"}

func (a Action) String() string { return actionNames[a] }

// Verdict is a score and its reasons.
type Verdict struct {
	Action Action
	// Own is what would be done without what is Hijack: of two that claim to be
	// one, it is not known who lies, so nobody is named for that.
	Own Action
	// Score is the sum of the weights of Findings, and of what is left of those
	// of the caller's requests before.
	Score    int
	Findings []Finding
	// Before is what is left of earlier findings, by kind.
	Before [kinds]float32
	// Quiet says that an event of this caller was told a moment ago; Held that
	// so many were not.
	Quiet bool
	Held  int
}

// Names are the kinds found, for a rule.
func (v *Verdict) Names() string {
	names := make([]string, len(v.Findings))
	for i, f := range v.Findings {
		names[i] = f.Kind.String()
	}
	return strings.Join(names, " ")
}

// String is the sum of the score.
func (v *Verdict) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s at score %d:", v.Action, v.Score)
	sep := " "
	for _, f := range v.Findings {
		fmt.Fprintf(&b, "%s%s %d (%s)", sep, f.Kind, f.Kind.Weight(), f.Detail)
		sep = " + "
	}
	for k, left := range v.Before {
		if left >= 1 {
			fmt.Fprintf(&b, "%s%s %d before", sep, Kind(k), int(left))
			sep = " + "
		}
	}
	if v.Held > 0 {
		fmt.Fprintf(&b, "; %d more were not told", v.Held)
	}
	return b.String()
}
