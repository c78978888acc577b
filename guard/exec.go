package guard

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"path"
	"slices"
	"strings"

	"hauberk.dev/api/node"
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
	listedVolume = 4
	listedRelays = 8
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
		c.fault("exec", "", fmt.Sprintf("more than %d policies about programs hold for one workload: join some", maxExecLists))
		return
	}
	list := c.execs.used
	c.execs.used++
	if c.oneOf("exec.origin", e.Origin, "image", "any") {
		r := c.set(onOrigin, "only programs and libraries of the image, unchanged, may run", e.Severity)
		c.execs.aspect[aspectOrigin].set(list, r)
		c.programs("exec.volumes", e.Volumes, programEntry{kind: programVolume, lists: 1 << list, rule: r})
	}
	if c.oneOf("exec.anonymousMemory", e.AnonymousMemory, "deny", "allow") {
		r := c.set(onMemory, "memory that was written may not be executed", e.Severity)
		c.execs.aspect[aspectMemory].set(list, r)
		c.programs("exec.jit", e.JIT, programEntry{kind: programJIT, lists: 1 << list, rule: r})
	}
	if c.oneOf("exec.shellOnSocket", e.ShellOnSocket, "deny", "allow") {
		r := c.set(onShell, "no program may start with a network socket as its input or output, nor an interpreter have one relayed", e.Severity)
		if e.Scripts != nil && len(e.Scripts.Interpreters) > 0 {
			c.execs.aspect[aspectShell].set(list, r)
		}
	}
	c.oneOf("exec.preload", e.Preload, "allow", "deny")
	if e.Preload == "deny" {
		c.set(onPreload, "no program may start with LD_PRELOAD or LD_AUDIT set", e.Severity)
	}
	if e.Scripts != nil {
		c.scripts(list, e.Scripts, e.Severity)
	}
	for i, p := range e.Deny {
		field := fmt.Sprintf("exec.deny[%d]", i)
		digest, isDigest := strings.CutPrefix(p, digestPrefix)
		switch {
		case isDigest:
			r := c.rule("what has the digest "+p+" may not run", e.Severity)
			for _, found := range c.filesWith(field, digest) {
				c.denied = append(c.denied, pathRule{path: found, rule: r})
			}
		case c.path(field, p):
			c.denied = append(c.denied, pathRule{path: p, rule: c.rule(p+" may not run", e.Severity)})
		}
	}
	c.allow(list, e)
}

const (
	digestPrefix = "sha256:"
	maxFilesWith = 1024 // files with one digest
)

// findDigests asks where in the image the files are that policies name by what
// they hold. The files of an image cannot change, so a digest is as good as the
// objects that have it, and no program need be read when it starts.
func (c *compiler) findDigests(policies []node.NamedGuardPolicy, facts CompileFacts) {
	var digests []string
	for _, p := range policies {
		if p.Spec.Exec == nil {
			continue
		}
		for _, d := range p.Spec.Exec.Deny {
			if digest, ok := strings.CutPrefix(d, digestPrefix); ok {
				digests = append(digests, digest)
			}
		}
		for _, a := range p.Spec.Exec.Allow {
			if a.SHA256 != "" {
				digests = append(digests, a.SHA256)
			}
		}
	}
	if len(digests) == 0 || facts.FilesWith == nil {
		return
	}
	var err error
	if c.digests, err = facts.FilesWith(digests); err != nil {
		c.faults = append(c.faults, fmt.Errorf("find programs by digest: %w", err))
	}
	if c.digests == nil {
		c.digests = map[string][]string{}
	}
}

// filesWith gives the paths of the files of the image with a digest.
func (c *compiler) filesWith(field, digest string) []string {
	raw, err := hex.DecodeString(digest)
	switch {
	case err != nil || len(raw) != sha256.Size || strings.ToLower(digest) != digest:
		c.fault(field, digest, "want 64 lower-case hexadecimal digits")
	case c.digests == nil:
		c.fault(field, digest, "the files of the image are not known here: name a path")
	case len(c.digests[digest]) == 0:
		c.unsupported = append(c.unsupported, fmt.Sprintf("policy %q: %s %q: no file of the image has this digest", c.name, field, digest))
	case len(c.digests[digest]) > maxFilesWith:
		c.fault(field, digest, fmt.Sprintf("%d files of the image have this digest, at most %d are taken", len(c.digests[digest]), maxFilesWith))
	default:
		return c.digests[digest]
	}
	return nil
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
		entry := programEntry{kind: programAllowed, lists: 1 << list, rule: r}
		paths := []string{p.Path}
		switch {
		case (p.Path == "") == (p.SHA256 == ""):
			c.fault(field, p.Path+p.SHA256, "set exactly one of path and sha256")
			continue
		case p.SHA256 != "":
			paths = c.filesWith(field+".sha256", p.SHA256)
		case !c.path(field+".path", p.Path):
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
		for _, entry.path = range paths {
			c.execs.entries = append(c.execs.entries, entry)
		}
	}
}

// scripts reads what interpreters are held to.
func (c *compiler) scripts(list int, s *spec.GuardScripts, severity spec.Severity) {
	entry := programEntry{kind: programScript, lists: 1 << list}
	c.oneOf("exec.scripts.origin", s.Origin, "any", "image")
	if s.Origin == "image" {
		entry.rule = c.set(onScript, "interpreters may read only files of the image", severity)
		c.execs.aspect[aspectScript].set(list, entry.rule)
	}
	c.oneOf("exec.scripts.inline", s.Inline, "allow", "deny")
	if s.Inline == "deny" {
		entry.kind = programInline
		entry.rule = c.set(onInline, "interpreters may be given no code in their arguments", severity)
		c.execs.aspect[aspectInline].set(list, entry.rule)
	}
	for i, p := range s.Interpreters {
		if c.path(fmt.Sprintf("exec.scripts.interpreters[%d]", i), p) {
			entry.path = p
			entry.code, entry.value = options(path.Base(p))
			c.execs.entries = append(c.execs.entries, entry)
		}
	}
}

// dialects are the options of interpreters, by the beginning of their names:
// those that bring code, and those that take a value, which may look like
// another option's. A lone dash, which is the input, brings it to all.
var dialects = []struct{ name, code, value string }{
	{"python", "c", "WXQ"},
	{"pypy", "c", "WXQ"},
	{"perl", "eE", "IMmFixDVC"},
	{"ruby", "e", "rIEFixKTWC"},
	{"node", "ep", "rC"},
	{"php", "rBREF", "cdzft"},
	{"lua", "e", "l"},
	{"", "cs", "oO"}, // a shell, or what is like one
}

// options gives the letters of an interpreter's options as struct program has
// them.
func options(name string) (code, value uint64) {
	i := slices.IndexFunc(dialects, func(d struct{ name, code, value string }) bool { return strings.HasPrefix(name, d.name) })
	return letters(dialects[i].code), letters(dialects[i].value)
}

func letters(list string) (bits uint64) {
	for _, l := range []byte(list) {
		bits |= 1 << (l - 'A')
	}
	return bits
}

// listedBits tell the programs what there is to look up.
func (c *compiler) listedBits() (bits uint32) {
	if len(c.denied) > 0 {
		bits |= listedDenied
	}
	if shell := &c.execs.aspect[aspectShell]; shell.deny|shell.audit != 0 {
		bits |= listedRelays
	}
	for _, e := range c.execs.entries {
		if e.kind == programVolume {
			bits |= listedVolume
		} else {
			bits |= listedKnown
		}
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
