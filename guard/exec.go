package guard

import (
	"encoding/binary"
	"fmt"

	"hauberk.dev/api/spec"
)

// Aspects of struct exec_lists, as in bpf/src/policy.h. Each policy has a list of
// its own of what is lifted, so that no policy can lift what another refuses.
const (
	aspectOrigin = iota
	aspectMemory
	aspectProgram
	aspectScript
	aspectInline
	aspectShell
	aspects = 8
)

const (
	maxExecLists = 32
	maxParents   = 16

	// Sections of the blob.
	sectionExecLists = 0x10
	sectionPrograms  = 0x11

	// Bits of policy.listed.
	listedDenied = 1
	listedKnown  = 2
)

// aspectLists is struct aspect_lists.
type aspectLists struct {
	deny, audit uint32
	rule        [maxExecLists]reference
}

func (a *aspectLists) set(list int, r reference) {
	a.rule[list] = r
	if r&denies != 0 {
		a.deny |= 1 << list
	} else {
		a.audit |= 1 << list
	}
}

// programKind is what an entry of the section of programs says of its path.
type programKind uint16

const (
	programAllowed programKind = iota + 1
	programLimited             // to some parents
	programJIT
	programScript
	programInline
	programVolume // the path is a mount of a container
)

// programEntry says something of a path for some lists.
type programEntry struct {
	kind        programKind
	lists       uint32
	rule        reference // to name if the path is not there
	path        string
	parents     []string
	code, value uint64 // of an interpreter: letters of its options
}

// execLists is what all policies say of programs.
type execLists struct {
	used    int
	aspect  [aspects]aspectLists
	entries []programEntry
}

func (c *compiler) exec(e *spec.GuardExec) {
	defer c.lower(e.Audit)()
	c.severity("exec.severity", e.Severity)
	if c.execs.used == maxExecLists {
		c.faults = append(c.faults, fmt.Errorf("policy %q: exec: more than %d policies about programs hold for one workload: join some", c.name, maxExecLists))
		return
	}
	list := c.execs.used
	c.execs.used++
	if c.oneOf("exec.origin", e.Origin, "image", "any") {
		r := c.set(onOrigin, "only programs and libraries of the image, unchanged, may run", e.Severity)
		c.execs.aspect[aspectOrigin].set(list, r)
	}
	if c.oneOf("exec.anonymousMemory", e.AnonymousMemory, "deny", "allow") {
		r := c.set(onMemory, "memory that was written may not be executed", e.Severity)
		c.execs.aspect[aspectMemory].set(list, r)
		c.programs("exec.jit", e.JIT, programEntry{kind: programJIT, lists: 1 << list, rule: r})
	}
	if c.oneOf("exec.shellOnSocket", e.ShellOnSocket, "deny", "allow") {
		c.set(onShell, "no program may start with a network socket as its input or output", e.Severity)
	}
	for i, p := range e.Deny {
		if c.path(fmt.Sprintf("exec.deny[%d]", i), p) {
			c.denied = append(c.denied, pathRule{path: p, rule: c.rule(p+" may not run", e.Severity)})
		}
	}
	c.allow(list, e)
}

// lower makes rules report, if audit is set, until what it returns is called.
func (c *compiler) lower(audit bool) func() {
	before := c.enforce
	c.enforce = c.enforce && !audit
	return func() { c.enforce = before }
}

// programs says one thing of several paths.
func (c *compiler) programs(field string, paths []string, e programEntry) {
	for i, p := range paths {
		if c.path(fmt.Sprintf("%s[%d]", field, i), p) {
			e.path = p
			c.execs.entries = append(c.execs.entries, e)
		}
	}
}

// allow reads the list of the only programs that may run. One that is on it
// twice may be started by the parents of both.
func (c *compiler) allow(list int, e *spec.GuardExec) {
	if e.Allow == nil {
		return
	}
	r := c.set(onUnlisted, "only the listed programs may run, and only for whom they are listed", e.Severity)
	c.execs.aspect[aspectProgram].set(list, r)
	for i, p := range e.Allow {
		field := fmt.Sprintf("exec.allow[%d]", i)
		entry := programEntry{kind: programAllowed, lists: 1 << list, rule: r, path: p.Path}
		if !c.path(field+".path", p.Path) {
			continue
		}
		if len(p.Parents) > maxParents {
			c.fault(field+".parents", fmt.Sprint(len(p.Parents)), fmt.Sprintf("want at most %d", maxParents))
			continue
		}
		for j, parent := range p.Parents {
			if c.path(fmt.Sprintf("%s.parents[%d]", field, j), parent) {
				entry.kind = programLimited
				entry.parents = append(entry.parents, parent)
			}
		}
		c.execs.entries = append(c.execs.entries, entry)
	}
}

// listedBits tell the programs what there is to look up.
func (c *compiler) listedBits() (bits uint32) {
	if len(c.denied) > 0 {
		bits |= listedDenied
	}
	if len(c.execs.entries) > 0 {
		bits |= listedKnown
	}
	return bits
}

// execSections lays out what the lists say, if they say anything.
func (c *compiler) execSections() {
	if c.execs.used == 0 {
		return
	}
	le := binary.LittleEndian
	var lists, programs []byte
	for _, a := range c.execs.aspect {
		lists = le.AppendUint32(le.AppendUint32(lists, a.deny), a.audit)
		for _, r := range a.rule {
			lists = le.AppendUint32(lists, uint32(r))
		}
	}
	programs = le.AppendUint32(programs, uint32(len(c.execs.entries)))
	for _, e := range c.execs.entries {
		programs = le.AppendUint16(programs, uint16(e.kind))
		programs = le.AppendUint32(programs, e.lists)
		programs = le.AppendUint32(programs, uint32(e.rule))
		programs = le.AppendUint64(programs, e.code)
		programs = le.AppendUint64(programs, e.value)
		programs = appendText(programs, e.path)
		programs = le.AppendUint16(programs, uint16(len(e.parents)))
		for _, p := range e.parents {
			programs = appendText(programs, p)
		}
	}
	c.sections = append(c.sections, section{sectionExecLists, lists}, section{sectionPrograms, programs})
}
