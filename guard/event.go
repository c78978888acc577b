package guard

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Op is what a task tried or did.
type Op uint8

// The operations, as in bpf/src/event.h.
const (
	OpExec Op = iota + 1
	OpMap
	OpMemory
	OpListed
	OpShell
	OpWrite
	OpRead
	OpEgress
	OpRawSocket
	OpBPF
	OpModule
	OpPtrace
	OpMount
	OpMknod
	OpIOUring
	OpUserNS
	OpAgent
	OpDevice
	OpSetting
	OpHelper
	OpUnlisted    Op = 40
	OpPreload     Op = 41
	OpScript      Op = 42
	OpInline      Op = 43
	OpIntoVolume  Op = 44
	OpOperation   Op = 50 // one of a policy's sys.deny
	OpCapability  Op = 51
	OpIngress     Op = 52 // somebody tried to reach the workload
	OpBind        Op = 53
	OpHost        Op = 54
	OpStarted     Op = 64
	OpConnected   Op = 65
	OpChanged     Op = 66 // a file; of a watched one, under its rule
	OpContent     Op = 67 // what a watched file holds after a change
	OpMounted     Op = 68
	OpListening   Op = 70
	OpAccepted    Op = 71
	OpNames       Op = 72 // a message of DNS
	OpEnvironment Op = 80 // the loader's variables
	// OpRepeated is the agent's: a record of denials was repeated.
	OpRepeated Op = 120
	// OpPolicy is the agent's, too: it was given a policy that it does not take.
	OpPolicy Op = 121
	// OpUnheld is the agent's, too: a rule does not hold in a container that came
	// after its policy. Detail is the kernel's number of why.
	OpUnheld Op = 122
)

// Verdict is what came of it.
type Verdict uint8

// The verdicts.
const (
	Allowed  Verdict = iota // for the record only
	Reported                // the rule is in audit mode
	Denied
	Killed // where nothing but the task's end could stop it
	// Unknown is no verdict of the kernel: a Judge's, where a record lacks a fact.
	Unknown Verdict = 255
)

func (v Verdict) String() string {
	switch v {
	case Allowed:
		return "allowed"
	case Reported:
		return "reported"
	case Denied:
		return "denied"
	case Killed:
		return "killed"
	case Unknown:
		return "unknown"
	}
	return fmt.Sprintf("verdict %d", uint8(v))
}

// Event is one record of the Guard. Texts come from the workload and are not
// to be trusted; they never take part in a verdict.
type Event struct {
	Op         Op            `json:"op"`
	Verdict    Verdict       `json:"verdict"`
	Why        uint8         `json:"why,omitempty"`
	Rule       uint32        `json:"rule,omitempty"`
	Generation uint64        `json:"generation"`
	Sequence   uint64        `json:"sequence"` // a gap is a loss; the record of what was allowed counts by itself
	Lost       uint64        `json:"lost"`     // so far, of this kind
	SinceBoot  time.Duration `json:"sinceBoot"`
	PID        uint32        `json:"pid"`
	PPID       uint32        `json:"ppid"`
	UID        uint32        `json:"uid"`
	Command    string        `json:"command"` // the task's own name for itself
	Path       string        `json:"path,omitempty"`
	// Truncated: the path is longer, and begins with "...".
	Truncated bool           `json:"truncated,omitempty"`
	Target    netip.AddrPort `json:"target,omitzero"`
	// Value is an argument or variable that a program was given.
	Value  string   `json:"value,omitempty"`
	Names  *Names   `json:"names,omitempty"`
	Args   []string `json:"args,omitempty"`
	Detail uint64   `json:"detail,omitempty"`
	// Series is the sequence of the first of records about the same: one rule
	// and verdict, one program, one target. Count is how many such acts there
	// were so far; many have no record of their own. 0: of no series.
	Series uint64 `json:"series,omitempty"`
	Count  uint64 `json:"count,omitempty"`
	// Before and After are the SHA-256 of a watched file, in hexadecimal, or in
	// parentheses why there is none.
	Before string `json:"before,omitempty"`
	After  string `json:"after,omitempty"`

	// Exe is the program that the process runs, Parent what its parent ran when
	// it made the process. A path that was too long is the file's name alone,
	// after ".../".
	Exe       string        `json:"exe,omitempty"`
	Parent    string        `json:"parent,omitempty"`
	Start     time.Duration `json:"start,omitempty"`     // since boot, of the program
	Container uint32        `json:"container,omitempty"` // the agent's number of it
	// Lineage is what led to the process, nearest first, up to what the agent
	// started. Cut: some before the last are missing.
	Lineage []Ancestor `json:"lineage,omitempty"`
	Cut     bool       `json:"cut,omitempty"`
}

// Ancestor is a process and the name of the file that it ran.
type Ancestor struct {
	PID  uint32 `json:"pid"`
	Name string `json:"name"`
}

const (
	eventVersion = 2
	eventSize    = 816
	whoOffset    = 352
	exeSize      = 128
	ancestors    = 8
	ancestorSize = 20
	startedSize  = eventSize + argsSize
	contentSize  = eventSize + 96
	textSize     = 256
	argsSize     = 256

	textPath   = 1
	textNames  = 2
	textTarget = 3
	textValue  = 4
)

var errRecord = errors.New("not a record of the guard")

// DecodeEvents reads one record. Whatever the bytes are, it ends, and holds no
// more than they do.
func DecodeEvents(record []byte) (Event, error) {
	if len(record) == repeatedSize && record[0] == eventVersion && (Op(record[1]) == OpRepeated || Op(record[1]) == OpUnheld) {
		return repeated(record)
	}
	if len(record) == repeatedSize && record[0] == eventVersion && Op(record[1]) == OpPolicy {
		return untaken(record)
	}
	if len(record) < eventSize || record[0] != eventVersion {
		return Event{}, fmt.Errorf("decode event of %d bytes: %w", len(record), errRecord)
	}
	le := binary.LittleEndian
	e := Event{
		Op: Op(record[1]), Verdict: Verdict(record[2]), Why: record[5],
		Rule: le.Uint32(record[8:]), PID: le.Uint32(record[12:]), PPID: le.Uint32(record[16:]), UID: le.Uint32(record[20:]),
		Sequence: le.Uint64(record[24:]), SinceBoot: time.Duration(le.Uint64(record[32:])), Generation: le.Uint64(record[40:]),
		Lost: le.Uint64(record[48:]), Detail: le.Uint64(record[56:]), Command: cString(record[64:80]),
	}
	want := eventSize
	switch e.Op {
	case OpStarted:
		want = startedSize
	case OpContent:
		want = contentSize
	case OpNames:
		want += min(int(uint32(e.Detail)), namesShown)
	}
	// The ring rounds nothing up, so a record has exactly its size.
	if len(record) != want || e.Verdict > Killed {
		return Event{}, fmt.Errorf("decode event %d of %d bytes: %w", e.Op, len(record), errRecord)
	}
	if err := e.text(record[4], record[80:80+textSize]); err != nil {
		return Event{}, err
	}
	e.Series, e.Count = le.Uint64(record[336:]), le.Uint64(record[344:])
	e.who(record[whoOffset:eventSize])
	if e.Op == OpStarted {
		e.Args = arguments(record[eventSize:], e.Detail, le.Uint16(record[6:]))
		e.Detail = 0
	}
	if e.Op == OpContent {
		e.contents(record[eventSize:])
	}
	if e.Op == OpNames {
		if err := e.names(record[eventSize:], le.Uint16(record[6:])); err != nil {
			return Event{}, err
		}
	}
	return e, nil
}

// contents reads what the agent found out of struct content_event of
// bpf/src/file.h.
func (e *Event) contents(b []byte) {
	const known, digests = 24, 32
	content := func(i int) string {
		if b[known+i] == 1 {
			return hex.EncodeToString(b[digests+i*sha256.Size:][:sha256.Size])
		}
		if why, ok := noDigest[b[known+i]]; ok {
			return why
		}
		return fmt.Sprintf("(not known: %d)", b[known+i])
	}
	e.Before, e.After = content(0), content(1)
	e.Detail = uint64(e.Why)
}

// Why a content has no digest.
var noDigest = map[byte]string{
	0: "(not known)",
	2: "(no file)",
	3: "(more than 1 MiB)",
	4: "(more than 8 MiB changed in a second)",
	5: "(not at its path any more)",
	6: "(in a volume)",
	7: "(its path is too long)",
	8: "(cannot be read)",
}

// repeatedSize is the length of the agent's record of repetitions.
const repeatedSize = 48

// repeated reads what the agent says of a series: not what happened, but how
// often, for the reader to set beside the record that has the series' number.
func repeated(record []byte) (Event, error) {
	le := binary.LittleEndian
	e := Event{Op: Op(record[1]), Verdict: Verdict(record[2]), Why: record[5], Rule: le.Uint32(record[8:]), PID: le.Uint32(record[12:]),
		Series: le.Uint64(record[16:]), Count: le.Uint64(record[24:]), SinceBoot: time.Duration(le.Uint64(record[32:])), Detail: le.Uint64(record[40:])}
	if e.Op == OpUnheld {
		e.Series, e.Count = 0, 0
	}
	if e.Verdict > Killed || e.Op == OpRepeated && e.Detail >= uint64(OpRepeated) || e.Detail > 4095 {
		return Event{}, fmt.Errorf("decode repetition of operation %d: %w", e.Detail, errRecord)
	}
	return e, nil
}

// who reads struct lineage of bpf/src/lineage.h.
func (e *Event) who(b []byte) {
	le := binary.LittleEndian
	e.Start, e.Container = time.Duration(le.Uint64(b)), le.Uint32(b[20:])
	e.Exe, e.Parent = program(b[24], b[48:48+exeSize]), program(b[25], b[176:176+exeSize])
	e.Cut = b[27] != 0
	for i := range min(int(b[26]), ancestors) {
		at := b[304+i*ancestorSize:]
		e.Lineage = append(e.Lineage, Ancestor{le.Uint32(at), cString(at[4:ancestorSize])})
	}
}

// program is a program's path, or what there is of it.
func program(cut byte, text []byte) string {
	if name := cString(text); cut == 0 || name == "" {
		return name
	}
	return ".../" + cString(text)
}

func (e *Event) text(kind byte, text []byte) error {
	switch kind {
	case 0:
	case textPath:
		e.Path = cString(text)
	case textNames:
		e.Path, e.Truncated = joinNames(text)
	case textTarget:
		var addr [16]byte
		copy(addr[:], text[8:24])
		e.Target = netip.AddrPortFrom(netip.AddrFrom16(addr).Unmap(), binary.BigEndian.Uint16(text[6:]))
	case textValue:
		e.Value = cString(text)
	default:
		return fmt.Errorf("decode event with text of kind %d: %w", kind, errRecord)
	}
	return nil
}

// cString is what stands before the first NUL.
func cString(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return strings.ToValidUTF8(string(b), "\uFFFD")
}

// joinNames turns names, innermost first, into a path. The kernel writes at
// most 12 and stops when little room is left.
func joinNames(text []byte) (path string, truncated bool) {
	const most, room = 12, textSize - 64
	var names []string
	used := 0
	for used < len(text) && text[used] != 0 {
		name := cString(text[used:])
		n := bytes.IndexByte(text[used:], 0)
		if n < 0 {
			n = len(text) - used - 1
		}
		names = append(names, name)
		used += n + 1
	}
	slices.Reverse(names)
	path = "/" + strings.Join(names, "/")
	if len(names) >= most || used >= room {
		return "..." + path, true
	}
	return path, false
}

// arguments takes count strings off b, of which size bytes are the task's.
// What follows them is its environment and is not told.
func arguments(b []byte, size uint64, count uint16) (args []string) {
	b = b[:min(size, uint64(len(b)))]
	for range count {
		if len(b) == 0 {
			break
		}
		args = append(args, cString(b))
		end := bytes.IndexByte(b, 0)
		if end < 0 {
			break
		}
		b = b[end+1:]
	}
	return args
}

// relayed says why a shell was refused: by what stands between it and a socket.
const relayed = 2

// Why an exec or mapping was refused, and why memory was.
var (
	originWhy = map[uint8]string{
		1: ", which was added or changed since the image was released",
		2: ", which lies on a file system of its own, not in the image",
		3: ", which has no name any more",
	}
	memoryWhy = map[uint8]string{
		1: "make memory executable that came from no file",
		2: "have memory writable and executable at once",
		3: "execute memory of a file after writing to it",
		4: "write its code through /proc/PID/mem",
		5: "make all its memory executable",
	}
)

// String says in plain words what happened.
func (e Event) String() string {
	if e.Op == OpPolicy {
		return fmt.Sprintf("%s: policy of generation %d was not taken: %s (%d so far)", e.Verdict, e.Generation, sealWhy[e.Why], e.Count)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %q (pid %d, uid %d) %s", e.Verdict, e.Command, e.PID, e.UID, e.what())
	if e.Rule != 0 {
		fmt.Fprintf(&b, " [rule %d, generation %d]", e.Rule, e.Generation)
	}
	return b.String()
}

func (e Event) what() string {
	switch e.Op {
	case OpRepeated:
		again := e
		again.Op, again.Detail = Op(e.Detail), 0
		return fmt.Sprintf("did the same %d times in all: %s", e.Count, again.what())
	case OpUnheld:
		return "is not held to the rule everywhere: " + syscall.Errno(e.Detail).Error()
	case OpStarted:
		return fmt.Sprintf("started %q with arguments %q", e.Path, e.Args)
	case OpEnvironment:
		return fmt.Sprintf("started with %q in its environment", e.Value)
	case OpConnected:
		return fmt.Sprintf("connected to %s", e.Target)
	case OpNames:
		if e.Names == nil {
			return "exchanged names with " + e.Target.String()
		}
		if e.Why != 0 {
			return fmt.Sprintf("heard from %s %s", e.Target, e.Names)
		}
		return fmt.Sprintf("asked %s for %s", e.Target, e.Names)
	case OpListening:
		return fmt.Sprintf("listens at %s", e.Target)
	case OpAccepted:
		return fmt.Sprintf("let %s in", e.Target)
	case OpChanged:
		return e.changed()
	case OpContent:
		text := fmt.Sprintf("left %q with %s, where it was %s", e.Path, e.After, e.Before)
		if e.Why&contentMapped != 0 {
			text += ", and may write to it through a mapping yet"
		}
		return text
	case OpMounted:
		if e.Path == "" {
			return "unmounted a file system"
		}
		return fmt.Sprintf("mounted a file system at %q", e.Path)
	case OpIngress:
		return fmt.Sprintf("was to be reached by %s at port %d", e.Target, e.Detail)
	}
	return "tried to " + e.attempt()
}

// contentMapped says that a shared mapping outlives what was closed.
const contentMapped = 2

// openedToWrite is one of the following.
const openedToWrite = 2

// What was done to a file, as in bpf/src/file.h.
var changedWhat = map[uint8]string{
	1: "created %q", 2: "opened %q to write to it", 3: "cut %q", 4: "removed %q", 5: "renamed %q", 6: "gave a file the name %q",
	7: "linked %q", 8: "changed attributes of %q", 9: "changed extended attributes of %q", 10: "changed flags of %q", 11: "mounted over %q",
}

func (e Event) changed() string {
	format, ok := changedWhat[e.Why]
	if !ok {
		format = "changed %q"
	}
	return fmt.Sprintf(format, e.Path)
}

func (e Event) attempt() string {
	switch e.Op {
	case OpExec:
		return fmt.Sprintf("run %q%s", e.Path, originWhy[e.Why])
	case OpMap:
		return fmt.Sprintf("execute code of %q%s", e.Path, originWhy[e.Why])
	case OpMemory:
		if why, ok := memoryWhy[e.Why]; ok {
			return why
		}
		return "execute memory"
	case OpListed:
		return fmt.Sprintf("run %q, which may not run", e.Path)
	case OpPreload:
		return fmt.Sprintf("start with %q in its environment", e.Value)
	case OpScript:
		return fmt.Sprintf("have an interpreter read %q%s", e.Path, originWhy[e.Why])
	case OpInline:
		return fmt.Sprintf("have an interpreter run what follows %q", e.Value)
	case OpIntoVolume:
		return fmt.Sprintf("give a file from elsewhere the name %q in a volume that may hold programs", e.Path)
	case OpUnlisted:
		return fmt.Sprintf("run %q, which is not on the list", e.Path)
	case OpShell:
		if e.Why == relayed {
			return fmt.Sprintf("relay a network socket to an interpreter %q", e.Path)
		}
		return fmt.Sprintf("run %q with a network socket as input or output", e.Path)
	case OpWrite:
		return fmt.Sprintf("change %q", e.Path)
	case OpRead:
		return fmt.Sprintf("read %q", e.Path)
	case OpEgress:
		return fmt.Sprintf("reach %s", e.Target)
	case OpBind:
		return fmt.Sprintf("open a port at %s", e.Target)
	case OpHost:
		return "speak to the machine's host"
	case OpRawSocket:
		return fmt.Sprintf("make a socket of family %d, type %d", e.Detail>>32, uint32(e.Detail))
	case OpMknod:
		return fmt.Sprintf("make device file %q", e.Path)
	case OpDevice:
		return fmt.Sprintf("open device %d:%d at %q", e.Detail>>20, e.Detail&0xfffff, e.Path)
	case OpMount:
		return fmt.Sprintf("mount or unmount at %q", e.Path)
	case OpSetting:
		if text, ok := capabilities[e.Detail]; ok && e.Why != 0 {
			return text
		}
		return fmt.Sprintf("change the kernel's setting %q", e.Path)
	case OpOperation:
		return "do what is refused: " + operationText(e.Detail)
	case OpCapability:
		return "use the capability " + capabilityName(e.Detail)
	case OpHelper:
		return fmt.Sprintf("run %q on the kernel's behalf", e.Path)
	}
	if text, ok := simply[e.Op]; ok {
		return text
	}
	return fmt.Sprintf("do operation %d", e.Op)
}

// What the capabilities are for that a workload never gets.
var capabilities = map[uint64]string{
	17: "reach the machine's ports or memory",
	22: "reboot or replace the kernel",
}

var simply = map[Op]string{
	OpBPF:     "use eBPF",
	OpModule:  "load or unload a kernel module",
	OpPtrace:  "trace a process or write its memory",
	OpIOUring: "use io_uring",
	OpUserNS:  "make a user namespace",
	OpAgent:   "signal, trace or limit the agent or the kernel",
}
