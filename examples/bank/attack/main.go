// Command attack does to its own sandbox what an intruder would, one attack at
// a time, and says honestly whether it worked.
//
// It prints one line of JSON. An attack has succeeded only if the intruder got
// what was wanted; each step says what the kernel or the network answered. It
// is meant for sandboxes that can be thrown away: where nothing stops it, it
// does what it says.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
)

// Result is the line that is printed.
type Result struct {
	Attack    string `json:"attack"`
	Succeeded bool   `json:"succeeded"`
	// Seen sums the steps up for people.
	Seen  string `json:"seen"`
	Steps []Step `json:"steps"`
}

// Step is one try.
type Step struct {
	Try string `json:"try"`
	// Reached is whether this step got what the attack wants.
	Reached bool   `json:"reached"`
	Seen    string `json:"seen"`
}

// attack is a list of steps. args are what follows its name.
type attack struct {
	name string
	run  func(args []string) []Step
}

// attacks in the order they are listed to people.
var attacks = []attack{
	{"drop-and-execute", dropAndExecute},
	{"memfd", memfd},
	{"tmpfs-exec", tmpfsExec},
	{"reverse-shell", reverseShell},
	{"ld-preload", ldPreload},
	{"write-protected", writeProtected},
	{"exfiltrate", exfiltrate},
	{"bypass", bypass},
	{"unload-guard", unloadGuard},
}

func main() {
	if len(os.Args) == 3 && os.Args[1] == "proof" {
		fmt.Println(os.Args[2]) // what a dropped copy does to show that it ran
		return
	}
	i := -1
	if len(os.Args) > 1 {
		i = slices.IndexFunc(attacks, func(a attack) bool { return a.name == os.Args[1] })
	}
	if i < 0 {
		var names []string
		for _, a := range attacks {
			names = append(names, a.name)
		}
		fmt.Fprintf(os.Stderr, "usage: attack NAME [ARGUMENT...]\nattacks: %s\n", strings.Join(names, ", "))
		os.Exit(2)
	}
	json.NewEncoder(os.Stdout).Encode(sum(attacks[i].name, attacks[i].run(os.Args[2:])))
}

func sum(name string, steps []Step) Result {
	r := Result{Attack: name, Steps: steps}
	var seen []string
	for _, s := range steps {
		r.Succeeded = r.Succeeded || s.Reached
		seen = append(seen, s.Try+": "+s.Seen)
	}
	if r.Seen = strings.Join(seen, "; "); r.Seen == "" {
		r.Seen = "nothing to try here"
	}
	return r
}
