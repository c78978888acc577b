// Package guestproto is what the host and the agent inside a sandbox say to
// each other over one virtio-serial port: frames, verbs and messages, and
// nothing that sends them.
//
// The host asks, the guest replies, and the guest alone sends events. Whatever
// could be long is under credit: the guest sends the output of a process or
// records of the Guard only as far as the host has given it bytes to use, so
// neither side ever holds more than it chose to.
//
// Everything is little endian. A frame is
//
//	u32 length of what follows, u32 id, u8 verb, payload
//
// with id 0 for an event or for a verb that has no reply. Both ends parse what
// the other sent without trusting it: a length is checked before it is used,
// and a payload with a byte too few or too many is refused.
//
// It is linked into PID 1 of the guest and so imports neither fmt nor
// encoding/binary; appending and parsing allocate only for strings and lists.
package guestproto

import "strconv"

// Version of the protocol. It rises with every change that an older peer
// would misread; the two ends must be equal, for they are released together.
//
//	1  2026-11-22: first.
//	2  2026-11-22: several interfaces, IPv6, routes and neighbours.
//	3  2026-11-22: containers as the OCI runtime specification has them:
//	   rights, limits, mounts, devices; directories of the pod, shares, disks;
//	   update, freeze, statistics in full, copies.
const Version = 3

const (
	// MaxFrame is the most that may follow a frame's length field.
	MaxFrame = 256 << 10
	// HeaderSize is the length of length, id and verb.
	HeaderSize = 4 + 4 + 1
	// MaxPayload is the most a payload may be.
	MaxPayload = MaxFrame - 5
	// MaxChunk is the most that one Stdin or Output frame carries.
	MaxChunk = 16 << 10
	// MaxList is the most entries a list of strings, groups or files may have.
	MaxList = 4096
	// MaxProcesses is how many processes of the host's asking a guest keeps,
	// those that ended and were not forgotten yet included.
	MaxProcesses = 64
	// MaxRoots is how many root file systems a guest has mounted at a time.
	MaxRoots = 8
	// MaxDirs is how many directories of its pod a guest keeps at a time.
	MaxDirs = 64
	// MaxShares is how many shares of the host a guest mounts.
	MaxShares = 8
	// MaxFilter is the most instructions a seccomp filter may have.
	MaxFilter = 4096
	// MaxTop is how many processes of a container are listed.
	MaxTop = 512
	// MaxWindow is the most credit a stream may have at any moment.
	MaxWindow = 1 << 20
	// LogBytes is how much of the last output of a process that keeps a log
	// the agent remembers.
	LogBytes = 64 << 10
	// NonceSize is the length of the nonce that marks the start of a session.
	NonceSize = 16
)

// Verb says what a frame is.
type Verb uint8

// Verbs the host sends. All but VerbCredit are answered.
const (
	_ Verb = iota
	VerbHello
	VerbReseed
	VerbRescan
	VerbNetwork
	VerbMountRoot
	VerbCreate
	VerbStart
	VerbExec
	VerbSignal
	VerbResize
	VerbStdin
	VerbCloseStdin
	VerbStats
	VerbGuardPolicy
	VerbGuardStatus
	VerbPing
	VerbShutdown
	VerbProcesses
	VerbAttach
	VerbForget
	VerbLogs
	VerbCredit
	VerbInterfaces
	VerbRoutes
	VerbUpdate
	VerbFreeze
	VerbTop
	VerbUnmountRoot
	VerbMakeDir
	VerbRemoveDir
	VerbPush
	VerbMountShare
	VerbCopy
	VerbPull
)

// Verbs the guest sends.
const (
	VerbReply       Verb = 0x80 // payload by the request's verb
	VerbError       Verb = 0x81 // payload is Refusal
	VerbExit        Verb = 0xc0
	VerbOutput      Verb = 0xc1
	VerbGuardEvents Verb = 0xc2
	VerbOOM         Verb = 0xc3
)

var verbNames = [...]string{
	VerbHello: "hello", VerbReseed: "reseed", VerbRescan: "rescan", VerbNetwork: "network",
	VerbMountRoot: "mount root", VerbCreate: "create", VerbStart: "start", VerbExec: "exec",
	VerbSignal: "signal", VerbResize: "resize", VerbStdin: "stdin", VerbCloseStdin: "close stdin",
	VerbStats: "stats", VerbGuardPolicy: "guard policy", VerbGuardStatus: "guard status",
	VerbPing: "ping", VerbShutdown: "shutdown", VerbProcesses: "processes", VerbAttach: "attach",
	VerbForget: "forget", VerbLogs: "logs", VerbCredit: "credit",
	VerbInterfaces: "interfaces", VerbRoutes: "routes",
	VerbUpdate: "update", VerbFreeze: "freeze", VerbTop: "top", VerbUnmountRoot: "unmount root",
	VerbMakeDir: "make directory", VerbRemoveDir: "remove directory", VerbPush: "push",
	VerbMountShare: "mount share", VerbCopy: "copy", VerbPull: "pull",
	VerbReply: "reply", VerbError: "error", VerbExit: "exit", VerbOutput: "output",
	VerbGuardEvents: "guard events", VerbOOM: "oom",
}

// String is the name of v in error texts.
func (v Verb) String() string {
	if int(v) < len(verbNames) && verbNames[v] != "" {
		return verbNames[v]
	}
	return "verb " + strconv.Itoa(int(v))
}

// Stream is one of a process' outputs.
type Stream uint8

// The streams. StreamGuard, with process 0, is the Guard's records.
const (
	StreamGuard  Stream = 0
	StreamStdout Stream = 1
	StreamStderr Stream = 2
)

// Header is the start of a frame.
type Header struct {
	Length uint32 // of what follows the length field
	ID     uint32
	Verb   Verb
}

// Payload is how many bytes follow the header.
func (h Header) Payload() int { return int(h.Length) - 5 }

// ParseHeader reads the first HeaderSize bytes of b, which must be there.
func ParseHeader(b []byte) (Header, error) {
	h := Header{Length: u32(b), ID: u32(b[4:]), Verb: Verb(b[8])}
	if h.Length < 5 || h.Length > MaxFrame {
		return h, &MalformedError{"frame", "length " + strconv.FormatUint(uint64(h.Length), 10) +
			" is not from 5 to " + strconv.Itoa(MaxFrame)}
	}
	return h, nil
}

// Begin appends a header to b. End must be called when the payload stands.
func Begin(b []byte, id uint32, v Verb) []byte {
	b = append(b, 0, 0, 0, 0)
	b = appendU32(b, id)
	return append(b, byte(v))
}

// End writes the length of the frame that begins at start and goes on to the
// end of b.
func End(b []byte, start int) {
	n := uint32(len(b) - start - 4)
	b[start], b[start+1], b[start+2], b[start+3] = byte(n), byte(n>>8), byte(n>>16), byte(n>>24)
}

// MalformedError says what was wrong with what the other side sent.
type MalformedError struct {
	What  string // the message
	Cause string
}

func (e *MalformedError) Error() string { return "parse " + e.What + ": " + e.Cause }

func u32(b []byte) uint32 {
	_ = b[3]
	return uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 | uint32(b[3])<<24
}

func appendU16(b []byte, v uint16) []byte { return append(b, byte(v), byte(v>>8)) }

func appendU32(b []byte, v uint32) []byte {
	return append(b, byte(v), byte(v>>8), byte(v>>16), byte(v>>24))
}

func appendU64(b []byte, v uint64) []byte {
	return appendU32(appendU32(b, uint32(v)), uint32(v>>32))
}

func appendBool(b []byte, v bool) []byte {
	if v {
		return append(b, 1)
	}
	return append(b, 0)
}

func appendBytes(b, v []byte) []byte { return append(appendU32(b, uint32(len(v))), v...) }

// appendString cuts what does not fit a u16; the writer of a long value uses
// appendBytes.
func appendString(b []byte, s string) []byte {
	if len(s) > 1<<16-1 {
		s = s[:1<<16-1]
	}
	return append(appendU16(b, uint16(len(s))), s...)
}

func appendStrings(b []byte, list []string) []byte {
	b = appendU16(b, uint16(len(list)))
	for _, s := range list {
		b = append(appendU32(b, uint32(len(s))), s...)
	}
	return b
}

// reader takes values off the front of b. After the first that is not there
// it gives zeros and remembers why.
type reader struct {
	b     []byte
	cause string
	// dry checks everything and keeps nothing that would take memory: no
	// string and no list.
	dry bool
}

func (r *reader) take(n int) []byte {
	if r.cause != "" || n < 0 || n > len(r.b) {
		if r.cause == "" {
			r.cause = "ends " + strconv.Itoa(n-len(r.b)) + " bytes early"
		}
		r.b = nil
		return nil
	}
	v := r.b[:n:n]
	r.b = r.b[n:]
	return v
}

func (r *reader) u8() uint8 {
	if v := r.take(1); v != nil {
		return v[0]
	}
	return 0
}

func (r *reader) u16() uint16 {
	if v := r.take(2); v != nil {
		return uint16(v[0]) | uint16(v[1])<<8
	}
	return 0
}

func (r *reader) u32() uint32 {
	if v := r.take(4); v != nil {
		return u32(v)
	}
	return 0
}

func (r *reader) u64() uint64 {
	if v := r.take(8); v != nil {
		return uint64(u32(v)) | uint64(u32(v[4:]))<<32
	}
	return 0
}

func (r *reader) bool() bool {
	switch r.u8() {
	case 0:
		return false
	case 1:
		return true
	}
	r.fail("a yes or no is neither 0 nor 1")
	return false
}

func (r *reader) bytes() []byte  { return r.take(int(r.u32())) }
func (r *reader) string() string { return r.text(r.take(int(r.u16()))) }

func (r *reader) text(b []byte) string {
	if r.dry {
		return ""
	}
	return string(b)
}

// count reads the length of a list whose entries take at least size bytes.
func (r *reader) count(size int) int {
	n := int(r.u16())
	if n > MaxList || n*size > len(r.b) {
		r.fail("a list of " + strconv.Itoa(n) + " does not fit")
		return 0
	}
	return n
}

func (r *reader) strings() []string {
	n := r.count(4)
	if n == 0 {
		return nil
	}
	list := listOf[string](r, n)
	for range n {
		s := r.text(r.bytes())
		if !r.dry {
			list = append(list, s)
		}
	}
	return list
}

// listOf is room for n entries, none if the reader is dry.
func listOf[T any](r *reader, n int) []T {
	if r.dry || n == 0 {
		return nil
	}
	return make([]T, 0, n)
}

func (r *reader) fail(cause string) {
	if r.cause == "" {
		r.cause = cause
	}
	r.b = nil
}

// end is nil if everything was there and nothing is left.
func (r *reader) end(what string) error {
	if r.cause == "" && len(r.b) > 0 {
		r.cause = strconv.Itoa(len(r.b)) + " bytes too many"
	}
	if r.cause != "" {
		return &MalformedError{what, r.cause}
	}
	return nil
}
