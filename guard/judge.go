package guard

import (
	"cmp"
	"math/bits"
	"net/netip"
	"slices"
	"strings"

	"hauberk.dev/api/node"
)

// Judge says what the kernel's programs decide of an act that a record tells of.
// It is their reference: the corpus holds the two to one verdict. A record has
// texts where the kernel has objects, so where a fact is not in it the verdict is
// Unknown, and says which. What Same knows are names of one file.
type Judge struct {
	c        *compiler
	programs map[string]*judged
	same     func(path string) []string
	mounted  bool
	names    map[netip.Addr][]learntName
}

// JudgeFacts is what is known besides the policies.
type JudgeFacts struct {
	CompileFacts
	// Same gives other paths of a file of the image: links. It may be nil.
	Same func(path string) []string
	// Mounted says that paths lie on the mounts that they seem to lie on. A record
	// does not tell: something may be mounted over a volume.
	Mounted bool
}

// Judgement is a verdict, the rule behind it, and what was not known.
type Judgement struct {
	Verdict Verdict
	Rule    Rule // none if it is allowed
	Lacks   string
}

// judged is what the lists say of one program, as struct program.
type judged struct {
	allowed, limited, jit, script, inlined uint32
	parents                                map[string]uint32
}

// NewJudge reads the policies as Compile does, and refuses what it refuses.
func NewJudge(g node.Guard, facts JudgeFacts) (*Judge, error) {
	c, err := gather(g, facts.CompileFacts)
	if err != nil {
		return nil, err
	}
	slices.SortStableFunc(c.denied, func(a, b pathRule) int { return c.compare(a.rule, b.rule) })
	slices.SortStableFunc(c.files, func(a, b fileRule) int { return c.compare(a.ref, b.ref) })
	j := &Judge{c: c, programs: map[string]*judged{}, same: facts.Same, mounted: facts.Mounted, names: map[netip.Addr][]learntName{}}
	for _, e := range c.execs.entries {
		j.list(e)
	}
	return j, nil
}

// Rules lists every rule, those built in first.
func (j *Judge) Rules() []Rule { return j.c.rules }

func (j *Judge) list(e programEntry) {
	if e.kind == programVolume {
		return
	}
	for _, name := range j.aliases(e.path) {
		p := j.programs[name]
		if p == nil {
			p = &judged{parents: map[string]uint32{}}
			j.programs[name] = p
		}
		switch e.kind {
		case programAllowed:
			p.allowed |= e.lists
		case programJIT:
			p.jit |= e.lists
		case programInline:
			p.inlined |= e.lists
			fallthrough
		case programScript:
			p.script |= e.lists
		case programLimited:
			p.limited |= e.lists
			for _, parent := range e.parents {
				for _, who := range j.aliases(parent) {
					p.parents[who] |= e.lists
				}
			}
		}
	}
}

// aliases are all names of a file.
func (j *Judge) aliases(path string) []string {
	if j.same == nil {
		return []string{path}
	}
	return append([]string{path}, j.same(path)...)
}

func (j *Judge) program(path string) judged {
	if p := j.programs[path]; p != nil {
		return *p
	}
	return judged{}
}

// answer turns a reference into a judgement; with a kill where the kernel has
// nothing else.
func (j *Judge) answer(r reference, kills bool) Judgement {
	if r == 0 {
		return Judgement{}
	}
	out := Judgement{Verdict: Reported, Rule: j.rule(r)}
	if r&denies != 0 {
		out.Verdict = Denied
		if kills {
			out.Verdict = Killed
		}
	}
	return out
}

func (j *Judge) rule(r reference) Rule {
	i := slices.IndexFunc(j.c.rules, func(known Rule) bool { return known.ID == uint32(r&^denies) })
	return j.c.rules[i]
}

func lacks(what string) Judgement { return Judgement{Verdict: Unknown, Lacks: what} }

// always is a rule that holds whatever a policy says, unless the policy's own
// denies and so has the better name.
func (j *Judge) always(own, builtin reference) Judgement {
	if own&denies != 0 {
		return j.answer(own, false)
	}
	return j.answer(builtin|denies, false)
}

// Judge gives the verdict on what an event tells of, by the same check that told
// of it.
func (j *Judge) Judge(e Event) Judgement {
	fixed := func(index int) Judgement { return j.answer(j.c.fixed[index], false) }
	switch e.Op {
	case OpExec, OpMap:
		return j.origin(e)
	case OpListed:
		return j.listed(e.Path)
	case OpUnlisted:
		return j.unlisted(e.Path, e)
	case OpStarted:
		return j.started(e)
	case OpMemory:
		return j.memory(e)
	case OpShell:
		return j.shell(e)
	case OpPreload:
		return j.answer(j.c.fixed[onPreload], true)
	case OpEnvironment:
		if e.Detail&codeLoading == 0 {
			return Judgement{}
		}
		return j.answer(j.c.fixed[onPreload], true)
	case OpScript:
		return j.script(e)
	case OpInline:
		if j.c.fixed[onInline] == 0 {
			return Judgement{}
		}
		p := j.program(e.Exe)
		if p.inlined == 0 {
			return Judgement{}
		}
		return j.answer(j.missing(aspectInline, ^p.inlined), true)
	case OpIntoVolume:
		if j.c.fixed[onOrigin] == 0 || !j.hasVolumes() {
			return Judgement{}
		}
		return lacks("the mounts that the two names are in")
	case OpWrite, OpChanged:
		if e.Op == OpChanged && e.Path == "/" && e.Why == openedToWrite {
			return Judgement{} // no directory is opened to be written: the file has no name
		}
		return j.file(e, wantWrite)
	case OpContent, OpPolicy, OpUnheld:
		return Judgement{} // told of, and nothing that anybody does
	case OpRead:
		return j.file(e, wantRead)
	case OpMknod:
		return fixed(onMknod)
	case OpMount, OpMounted:
		return fixed(onMount)
	case OpIOUring:
		return fixed(onIOUring)
	case OpUserNS:
		return fixed(onUserNS)
	}
	if j.isNetwork(e.Op) {
		return j.network(e)
	}
	return j.system(e)
}

// codeLoading are the bits of an environment's record for what exec.preload is
// about.
const codeLoading = 1 | 2 | 16

// missing is list_ref of bpf/src/exec.h: the first list that lifts nothing.
func (j *Judge) missing(aspect int, lifted uint32) reference {
	l := &j.c.execs.aspect[aspect]
	left := l.deny &^ lifted
	if left == 0 {
		left = l.audit &^ lifted
	}
	if left == 0 {
		return 0
	}
	return l.rule[bits.TrailingZeros32(left)]
}

const (
	fromImage = iota
	fromChange
	fromElsewhere
)

func (j *Judge) origin(e Event) Judgement {
	if e.Why == fromImage || j.c.fixed[onOrigin] == 0 {
		return Judgement{}
	}
	lifted := uint32(0)
	if e.Why == fromElsewhere {
		lifted = j.volumes(e.Path)
		if !j.mounted && (lifted != 0 || j.hasVolumes() && (e.Truncated || e.Op == OpMap)) {
			return lacks("the mount that the file is in")
		}
	}
	return j.answer(j.missing(aspectOrigin, lifted), false)
}

func (j *Judge) hasVolumes() bool {
	return slices.ContainsFunc(j.c.execs.entries, func(e programEntry) bool { return e.kind == programVolume })
}

// volumes are the lists that let files of the mount run in which a path lies.
func (j *Judge) volumes(path string) (lists uint32) {
	for _, e := range j.c.execs.entries {
		if e.kind == programVolume && below(path, e.path) {
			lists |= e.lists
		}
	}
	return lists
}

// below says whether a path is in a directory, or is it.
func below(path, dir string) bool {
	return path == dir || dir == "/" && strings.HasPrefix(path, "/") || strings.HasPrefix(path, dir+"/")
}

// listed judges a program by the list of those that may not run.
func (j *Judge) listed(path string) Judgement {
	ref := j.denied(path)
	if ref == 0 && !strings.HasPrefix(path, digestPrefix) && slices.ContainsFunc(j.c.denied, func(d pathRule) bool { return strings.HasPrefix(d.path, digestPrefix) }) {
		return lacks("the digest of the program")
	}
	return j.answer(ref, false)
}

func (j *Judge) denied(path string) reference {
	names := j.aliases(path)
	for _, d := range j.c.denied {
		if slices.Contains(names, d.path) {
			return d.rule
		}
	}
	return 0
}

// unlisted is unlisted_ref of bpf/src/exec.h, of a program that a process which
// runs e.Exe starts. What has no program yet was made by the agent.
func (j *Judge) unlisted(path string, e Event) Judgement {
	if j.c.fixed[onUnlisted] == 0 {
		return Judgement{}
	}
	p := j.program(path)
	lists := p.allowed
	if p.limited&^lists != 0 {
		if e.Exe == "" {
			lists |= p.limited
		} else {
			lists |= p.parents[e.Exe]
		}
	}
	out := j.answer(j.missing(aspectProgram, lists), false)
	if out.Verdict != Allowed && j.programs[path] == nil && j.namesDigests() {
		return lacks("the digest of the program")
	}
	return out
}

// namesDigests says whether a list has programs of which only the digest is known.
func (j *Judge) namesDigests() bool {
	return slices.ContainsFunc(j.c.execs.entries, func(e programEntry) bool { return strings.HasPrefix(e.path, digestPrefix) })
}

// started judges a program that was started by all that is said of programs. The
// record tells what ran, not the script that it ran for.
func (j *Judge) started(e Event) Judgement {
	before := e // as it was when it was asked: the process still ran its parent's program
	before.Exe = e.Parent
	if e.Truncated || strings.HasPrefix(e.Path, "...") {
		return lacks("the whole path of the program")
	}
	out := worst(j.listed(e.Path), j.unlisted(e.Path, before))
	before.Op, before.Why = OpExec, e.Why
	return worst(out, j.origin(before))
}

// Whole judges an act by every check that its record has the facts for, not only
// by the one that told of it: what one policy refused for one reason another may
// refuse for another.
func (j *Judge) Whole(e Event) Judgement {
	out := j.Judge(e)
	switch e.Op {
	case OpExec, OpListed, OpUnlisted:
		listed, allowed := e, e
		listed.Op, allowed.Op = OpListed, OpUnlisted
		out = worst(out, worst(j.Judge(listed), j.Judge(allowed)))
		if e.Op != OpExec && j.c.fixed[onOrigin] != 0 && out.Verdict < Denied {
			return worst(out, lacks("whether the program is of the image"))
		}
	}
	return out
}

// worst is the judgement that decides of two: one that denies, then one that is
// not known, then one that reports.
func worst(a, b Judgement) Judgement {
	order := func(j Judgement) int {
		switch j.Verdict {
		case Denied, Killed:
			return 3
		case Unknown:
			return 2
		case Reported:
			return 1
		}
		return 0
	}
	if cmp.Compare(order(b), order(a)) > 0 {
		return b
	}
	return a
}

// Why a record tells of memory.
const (
	memoryProc    = 4
	memoryPersona = 5
)

func (j *Judge) memory(e Event) Judgement {
	switch {
	case j.c.fixed[onMemory] == 0:
		return Judgement{}
	case e.Why == memoryProc, e.Why == memoryPersona:
		return j.answer(j.c.fixed[onMemory], e.Why == memoryPersona)
	}
	return j.answer(j.missing(aspectMemory, j.program(e.Exe).jit), false)
}

func (j *Judge) shell(e Event) Judgement {
	if e.Why != relayed || e.Path == "" {
		return j.answer(j.c.fixed[onShell], false)
	}
	p := j.program(e.Path)
	if p.script == 0 {
		return Judgement{}
	}
	return j.answer(j.missing(aspectShell, ^p.script), false)
}

// script judges what an interpreter reads. One that runs a script by its first
// line is held by every list, which the record does not tell.
func (j *Judge) script(e Event) Judgement {
	if j.c.fixed[onScript] == 0 || e.Why == fromImage {
		return Judgement{}
	}
	in := uint32(0)
	if e.Why == fromElsewhere {
		in = j.volumes(e.Path)
	}
	first := j.answer(j.missing(aspectScript, in), false)
	p := j.program(e.Exe)
	if p.script == 0 {
		return first
	}
	named := j.answer(j.missing(aspectScript, in|^p.script), false)
	if named.Verdict != first.Verdict {
		return lacks("whether the interpreter runs a script by its first line")
	}
	return named
}

// system judges operations on the system.
func (j *Judge) system(e Event) Judgement {
	const (
		ruleBPF, ruleModule, ruleAgent, ruleDevice, ruleSetting, ruleHelper, ruleHost = 2, 3, 4, 5, 6, 7, 9

		capBoot = 22
	)
	switch e.Op {
	case OpBPF:
		if onlyLooks(e.Detail) {
			return j.answer(j.c.fixed[onBPF], false)
		}
		return j.always(j.c.fixed[onBPF], ruleBPF)
	case OpModule:
		return j.always(j.c.fixed[onModule], ruleModule)
	case OpPtrace:
		return j.ptrace()
	case OpAgent:
		return j.answer(ruleAgent|denies, false)
	case OpDevice:
		return j.answer(ruleDevice|denies, false)
	case OpSetting:
		if e.Why == 1 && e.Detail == capBoot {
			return j.always(j.c.fixed[onReboot], ruleSetting)
		}
		return j.answer(ruleSetting|denies, false)
	case OpHelper:
		return j.answer(ruleHelper|denies, false)
	case OpHost:
		return j.answer(ruleHost|denies, false)
	case OpOperation:
		if e.Detail >= ruleIndexes {
			return lacks("which operation it was")
		}
		return j.answer(j.c.fixed[e.Detail], false)
	case OpCapability:
		return j.capability(e.Detail)
	}
	return lacks("what operation " + opText(e.Op) + " is")
}

// onlyLooks is only_looks of bpf/src/system.h: what is allowed of bpf(2) even so.
func onlyLooks(command uint64) bool {
	return slices.Contains([]uint64{11, 12, 23, 31, 15, 16}, command)
}

func (j *Judge) ptrace() Judgement {
	ref := j.c.fixed[onPtrace]
	memory := j.c.fixed[onMemory]
	if ref&denies == 0 && len(j.c.programLists) > 0 {
		return lacks("which program was traced, and rules for files trust some")
	}
	if ref&denies == 0 && (ref == 0 || memory&denies != 0) {
		ref = memory
	}
	return j.answer(ref, false)
}

func (j *Judge) capability(n uint64) Judgement {
	among := func(at int) bool {
		return n < 64 && (uint64(j.c.fixed[at])|uint64(j.c.fixed[at+1])<<32)>>n&1 != 0
	}
	switch {
	case among(capsDenied):
		return j.answer(j.c.fixed[onCapability], false)
	case among(capsReported):
		return j.answer(j.c.fixed[onCapabilityAudit], false)
	}
	return Judgement{}
}
