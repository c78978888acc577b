package guard

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Kind is what a fact is about.
type Kind string

// The kinds of facts.
const (
	FactProgram    Kind = "program"    // By started What
	FactForeign    Kind = "foreign"    // By ran or mapped What, which is not of the image
	FactMemory     Kind = "memory"     // By made memory executable
	FactPreload    Kind = "preload"    // By started something with LD_PRELOAD or LD_AUDIT
	FactShell      Kind = "shell"      // By started What on a network socket
	FactScript     Kind = "script"     // interpreter By read What, which is not of the image
	FactInline     Kind = "inline"     // interpreter By was given code in its arguments
	FactRead       Kind = "read"       // By read What
	FactWrite      Kind = "write"      // By changed What
	FactConnect    Kind = "connect"    // By reached What, an address and port
	FactName       Kind = "name"       // name What was said to be at address By
	FactListen     Kind = "listen"     // By opened port What
	FactOperation  Kind = "operation"  // By did What
	FactCapability Kind = "capability" // By used What
)

// Fact is something that a workload did, and how often.
type Fact struct {
	Kind    Kind      `json:"kind"`
	What    string    `json:"what,omitempty"`
	By      string    `json:"by,omitempty"`
	Count   uint64    `json:"count"`
	First   time.Time `json:"first"`
	Last    time.Time `json:"last"`
	Example string    `json:"example,omitempty"` // the first of them, in words
}

// Observation is what a workload did while it was watched.
type Observation struct {
	Since time.Time `json:"since"`
	Until time.Time `json:"until"`
	Acts  uint64    `json:"acts"`
	// Lost counts records that never came: from what has some, a policy may refuse
	// what the workload did unseen. Beyond counts acts for which there was no room
	// here, or of which a record had no whole path.
	Lost   uint64 `json:"lost,omitempty"`
	Beyond uint64 `json:"beyond,omitempty"`
	// Denied counts acts that another policy refused; nothing is learnt of them.
	Denied uint64 `json:"denied,omitempty"`
	Facts  []Fact `json:"facts"`
}

// Whole says whether nothing was missed.
func (o Observation) Whole() bool { return o.Lost == 0 && o.Beyond == 0 }

// What an observation holds at most.
const (
	maxFacts      = 1024 // besides files
	maxFileFacts  = 1024
	maxFactText   = 512
	maxFactSeries = 4096
)

// Learner gathers an observation in bounded memory. Its zero value has seen
// nothing. It is not safe for use by several at once.
type Learner struct {
	o      Observation
	facts  map[factKey]*Fact
	files  int
	full   bool // no files can be folded any more
	series map[uint64]*Fact
	order  []uint64
}

type factKey struct {
	kind     Kind
	what, by string
}

// Began says when watching began; it is the first of several that counts.
func (l *Learner) Began(at time.Time) {
	if l.o.Since.IsZero() {
		l.o.Since = at
	}
}

// Lost adds records that never came.
func (l *Learner) Lost(n uint64) { l.o.Lost += n }

// Add notes what an event tells, which stands for so many acts.
func (l *Learner) Add(e Event, acts uint64, at time.Time) {
	l.Began(at)
	l.o.Until = at
	if e.Op == OpRepeated {
		l.repeated(e, acts, at)
		return
	}
	l.o.Acts += acts
	if e.Verdict >= Denied {
		l.o.Denied += acts
		return
	}
	for _, k := range factsOf(e) {
		if unwhole(k.what) || unwhole(k.by) {
			l.o.Beyond += acts
			continue
		}
		f := l.fact(k, e, at)
		if f == nil {
			l.o.Beyond += acts
			continue
		}
		f.Count += acts
		f.Last = at
		if e.Series != 0 {
			l.follow(e.Series, f)
		}
	}
}

func unwhole(path string) bool { return strings.HasPrefix(path, "...") || len(path) > maxFactText }

func (l *Learner) repeated(e Event, acts uint64, at time.Time) {
	if e.Verdict >= Denied {
		l.o.Denied += acts
		return
	}
	l.o.Acts += acts
	if f := l.series[e.Series]; f != nil {
		f.Count += acts
		f.Last = at
	}
}

// follow remembers what later records of a series are about.
func (l *Learner) follow(series uint64, f *Fact) {
	if l.series == nil {
		l.series = map[uint64]*Fact{}
	}
	if _, known := l.series[series]; !known {
		if len(l.order) == maxFactSeries {
			delete(l.series, l.order[0])
			l.order = l.order[1:]
		}
		l.order = append(l.order, series)
	}
	l.series[series] = f
}

// fact finds a fact or makes room for it; nil if there is none.
func (l *Learner) fact(k factKey, e Event, at time.Time) *Fact {
	if l.facts == nil {
		l.facts = map[factKey]*Fact{}
	}
	isFile := k.kind == FactRead || k.kind == FactWrite
	if isFile && l.facts[k] == nil {
		if up, ok := l.folded(k); ok {
			k = up
		}
	}
	if f := l.facts[k]; f != nil {
		return f
	}
	if isFile && l.files >= maxFileFacts {
		l.fold()
	}
	if isFile && l.files >= maxFileFacts || !isFile && len(l.facts)-l.files >= maxFacts {
		return nil
	}
	f := &Fact{Kind: k.kind, What: k.what, By: k.by, First: at, Example: clip(e.String(), maxFactText)}
	l.facts[k] = f
	if isFile {
		l.files++
	}
	return f
}

// folded finds a directory above that stands for its files already.
func (l *Learner) folded(k factKey) (factKey, bool) {
	for dir := parentOf(k.what); dir != "/"; dir = parentOf(dir) {
		up := factKey{k.kind, dir + "/", k.by}
		if l.facts[up] != nil {
			return up, true
		}
	}
	return k, false
}

// fold makes room: every file, or directory that stands for its files already,
// becomes the directory above, where that may stand for what is in it. Records of a
// series that was folded find nobody any more; its acts are counted all the same.
func (l *Learner) fold() {
	if l.full {
		return
	}
	before := l.files
	for _, k := range slices.SortedFunc(maps.Keys(l.facts), compareKeys) {
		if k.kind != FactRead && k.kind != FactWrite {
			continue
		}
		dir := parentOf(strings.TrimSuffix(k.what, "/"))
		if !mayFold(dir) {
			continue
		}
		up, f := factKey{k.kind, dir + "/", k.by}, l.facts[k]
		delete(l.facts, k)
		if old := l.facts[up]; old != nil {
			join(old, f)
			l.files--
			continue
		}
		l.facts[up] = &Fact{Kind: up.kind, What: up.what, By: up.by, Count: f.Count, First: f.First, Last: f.Last, Example: f.Example}
	}
	l.full = l.files == before
}

func compareKeys(a, b factKey) int {
	return cmp.Or(cmp.Compare(a.kind, b.kind), cmp.Compare(a.what, b.what), cmp.Compare(a.by, b.by))
}

// join adds what another fact counted.
func join(f, other *Fact) {
	f.Count += other.Count
	if f.First.IsZero() || other.First.Before(f.First) {
		f.First, f.Example = other.First, other.Example
	}
	if other.Last.After(f.Last) {
		f.Last = other.Last
	}
}

// Observation is what was seen so far, in a settled order.
func (l *Learner) Observation() Observation {
	o := l.o
	o.Facts = make([]Fact, 0, len(l.facts))
	for _, f := range l.facts {
		o.Facts = append(o.Facts, *f)
	}
	sortFacts(o.Facts)
	return o
}

func sortFacts(facts []Fact) {
	slices.SortFunc(facts, func(a, b Fact) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.What, b.What), cmp.Compare(a.By, b.By))
	})
}

// Join makes one observation of several: of the instances of a workload.
func Join(list ...Observation) Observation {
	var l Learner
	l.facts = map[factKey]*Fact{}
	for _, o := range list {
		if !o.Since.IsZero() && (l.o.Since.IsZero() || o.Since.Before(l.o.Since)) {
			l.o.Since = o.Since
		}
		if o.Until.After(l.o.Until) {
			l.o.Until = o.Until
		}
		l.o.Acts, l.o.Lost, l.o.Beyond, l.o.Denied = l.o.Acts+o.Acts, l.o.Lost+o.Lost, l.o.Beyond+o.Beyond, l.o.Denied+o.Denied
		for _, f := range o.Facts {
			k := factKey{f.Kind, f.What, f.By}
			if old := l.facts[k]; old != nil {
				join(old, &f)
				continue
			}
			isFile := f.Kind == FactRead || f.Kind == FactWrite
			if isFile && l.files >= maxFileFacts {
				l.fold()
			}
			if isFile && l.files >= maxFileFacts || !isFile && len(l.facts)-l.files >= maxFacts {
				l.o.Beyond += f.Count
				continue
			}
			l.facts[k] = &f
			if isFile {
				l.files++
			}
		}
	}
	return l.Observation()
}

// operationOf names the operations that have a kind of event of their own.
var operationOf = map[Op]string{
	OpBPF: "bpf", OpModule: "module", OpPtrace: "ptrace", OpMount: "mount", OpRawSocket: "rawsocket",
	OpMknod: "mknod", OpIOUring: "iouring", OpUserNS: "userns",
}

// factsOf says what an event that was let through tells.
func factsOf(e Event) []factKey {
	switch e.Op {
	case OpUnlisted:
		return []factKey{{FactProgram, e.Path, e.Exe}}
	case OpExec, OpMap:
		return []factKey{{FactForeign, e.Path, e.Exe}}
	case OpMemory:
		return []factKey{{FactMemory, memoryWhy[e.Why], e.Exe}}
	case OpPreload:
		return []factKey{{FactPreload, "", e.Exe}}
	case OpShell:
		return []factKey{{FactShell, e.Path, e.Exe}}
	case OpScript:
		return []factKey{{FactScript, e.Path, e.Exe}}
	case OpInline:
		return []factKey{{FactInline, "", e.Exe}}
	case OpRead:
		return []factKey{{FactRead, e.Path, e.Exe}}
	case OpWrite:
		return []factKey{{FactWrite, e.Path, e.Exe}}
	case OpEgress:
		if e.Why != 0 { // judged as it left: no process stands behind it
			return []factKey{{FactConnect, e.Target.String(), "a packet"}}
		}
		return []factKey{{FactConnect, e.Target.String(), e.Exe}}
	case OpBind, OpListening:
		return []factKey{{FactListen, fmt.Sprint(e.Target.Port()), e.Exe}}
	case OpOperation:
		return []factKey{{FactOperation, operationName(e.Detail), e.Exe}}
	case OpCapability:
		return []factKey{{FactCapability, capabilityName(e.Detail), e.Exe}}
	case OpNames:
		return namesOf(e)
	}
	if name, ok := operationOf[e.Op]; ok {
		return []factKey{{FactOperation, name, e.Exe}}
	}
	return nil
}

// namesOf says where an answer said that a name is: the name that was asked for,
// whatever it is an alias of.
func namesOf(e Event) (out []factKey) {
	if e.Names == nil || !e.Names.Answer || len(e.Names.Questions) == 0 {
		return nil
	}
	name := strings.ToLower(strings.TrimSuffix(e.Names.Questions[0].Name, "."))
	for _, r := range e.Names.Answers {
		if a, err := netip.ParseAddr(r.Data); err == nil {
			out = append(out, factKey{FactName, name, a.String()})
		}
	}
	return out
}

// operationName finds the name of the operation whose rule has an index.
func operationName(index uint64) string {
	for _, name := range slices.Sorted(maps.Keys(operations)) {
		if uint64(operations[name].index) == index {
			return string(name)
		}
	}
	return fmt.Sprint(index)
}

// parentOf is the directory of a path.
func parentOf(path string) string {
	i := strings.LastIndexByte(path, '/')
	if i <= 0 {
		return "/"
	}
	return path[:i]
}

// settled are directories of which a policy speaks file by file: whoever may
// write anywhere in one owns the machine.
var settled = []string{"/bin", "/sbin", "/lib", "/lib32", "/lib64", "/usr", "/etc", "/boot", "/root"}

// scratches are directories near the root that are for anything.
var scratches = []string{"/tmp", "/run", "/var/tmp", "/var/run", "/var/cache", "/dev/shm"}

// mayFold says whether a directory may stand for the files in it.
func mayFold(dir string) bool {
	if slices.Contains(scratches, dir) {
		return true
	}
	within := func(top string) bool { return dir == top || strings.HasPrefix(dir, top+"/") }
	return strings.Count(dir, "/") >= 2 && !slices.ContainsFunc(settled, within)
}

// clip cuts a text at a whole character.
func clip(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "..."
}
