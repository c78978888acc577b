// Command attack does one thing a workload should not do, or one it should,
// and says how it went: exit 0 if it worked, 10 if it was refused, 11 if the
// attempt itself could not be made and so proves nothing.
package main

import (
	"errors"
	"fmt"
	"os"
	"sort"
	"strings"
)

// errVoid says that the attempt could not be made.
var errVoid = errors.New("void")

func void(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w: %w", errVoid, err)
}

// all gives every attack by its name.
func all() map[string]func([]string) error {
	attacks := map[string]func([]string) error{"named": named, "thread": inThread}
	for _, more := range []map[string]func([]string) error{execAttacks, memoryAttacks, fileAttacks, netAttacks, relayAttacks, systemAttacks, callAttacks, peerAttacks, clearAttacks, wayAttacks} {
		for name, f := range more {
			attacks[name] = f
		}
	}
	return attacks
}

// do makes the attempt that words say.
func do(words []string) error {
	name, _, _ := strings.Cut(words[0], "=") // "write=5" is write, run once more
	attacks := all()
	f, ok := attacks[name]
	if !ok {
		names := []string{}
		for n := range attacks {
			names = append(names, n)
		}
		sort.Strings(names)
		return void(fmt.Errorf("no such attack; there are %v", names))
	}
	return f(words[1:])
}

func main() {
	if os.Getenv("OPTIONS") != "" { // as an interpreter: what it is told lies among them
		fmt.Println("worked")
		return
	}
	switch err := do(os.Args[1:]); {
	case errors.Is(err, errVoid):
		fmt.Println(err)
		os.Exit(11)
	case err != nil:
		fmt.Println("refused:", err)
		os.Exit(10)
	}
	fmt.Println("worked")
}
