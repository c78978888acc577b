package guestproto

// HelloRequest opens a session. The agent drops what it had queued, takes all
// credit back, and answers with the nonce, raw, followed by the reply: the
// host skips whatever an earlier session left in the pipe until it sees it.
type HelloRequest struct {
	Version uint32
	Nonce   [NonceSize]byte
}

// helloPad ends the request, so that an agent that took the start of it for
// the end of an older frame finds no length in the rest that it would accept.
const helloPad = 32

// Append appends the payload to b.
func (m *HelloRequest) Append(b []byte) []byte {
	b = append(appendU32(b, m.Version), m.Nonce[:]...)
	for range helloPad {
		b = append(b, 0xff)
	}
	return b
}

// ParseHelloRequest reads the payload of a hello.
func ParseHelloRequest(b []byte) (m HelloRequest, err error) {
	r := reader{b: b}
	m.Version = r.u32()
	copy(m.Nonce[:], r.take(NonceSize))
	for _, c := range r.take(helloPad) {
		if c != 0xff {
			r.fail("the padding is not 0xff")
		}
	}
	return m, r.end("hello")
}

// GuardState says whether the Guard's programs are attached.
type GuardState uint8

// The states of the Guard.
const (
	GuardAbsent   GuardState = iota // the initramfs carried no bundle
	GuardAttached                   // attached before anything else ran
	GuardFailed                     // there was a bundle; nothing will be run
)

// Hello is what the agent says of itself and of its kernel.
type Hello struct {
	Version   uint32
	Release   string // of the kernel
	BootID    string
	Build     string // of the agent
	Guard     GuardState
	GuardText string // why it failed
	// BootMicros is the kernel's uptime when the agent began to serve.
	BootMicros uint64
}

// Append appends the payload to b.
func (m *Hello) Append(b []byte) []byte {
	b = appendU32(b, m.Version)
	b = appendString(b, m.Release)
	b = appendString(b, m.BootID)
	b = appendString(b, m.Build)
	b = append(b, byte(m.Guard))
	b = appendString(b, m.GuardText)
	return appendU64(b, m.BootMicros)
}

// ParseHello reads the reply to a hello.
func ParseHello(b []byte) (m Hello, err error) {
	r := reader{b: b}
	m.Version = r.u32()
	m.Release, m.BootID, m.Build = r.string(), r.string(), r.string()
	m.Guard, m.GuardText = GuardState(r.u8()), r.string()
	m.BootMicros = r.u64()
	if m.Guard > GuardFailed {
		r.fail("no such state of the Guard")
	}
	return m, r.end("hello reply")
}

// Reseed makes a clone different from its template.
type Reseed struct {
	Entropy   [64]byte
	UnixNanos int64
	MachineID string // 32 hexadecimal digits, or none
	BootID    string // a UUID
	Hostname  string
}

// Append appends the payload to b.
func (m *Reseed) Append(b []byte) []byte {
	b = append(b, m.Entropy[:]...)
	b = appendU64(b, uint64(m.UnixNanos))
	b = appendString(b, m.MachineID)
	b = appendString(b, m.BootID)
	return appendString(b, m.Hostname)
}

// ParseReseed reads the payload of a reseed.
func ParseReseed(b []byte) (m Reseed, err error) {
	r := reader{b: b}
	copy(m.Entropy[:], r.take(len(m.Entropy)))
	m.UnixNanos = int64(r.u64())
	m.MachineID, m.BootID, m.Hostname = r.string(), r.string(), r.string()
	return m, r.end("reseed")
}

// ProcessID is the payload of start, close stdin, attach, forget and logs, and
// the reply to create and exec. A number is never used twice in one boot.
type ProcessID struct{ Process uint32 }

// Append appends the payload to b.
func (m *ProcessID) Append(b []byte) []byte { return appendU32(b, m.Process) }

// ParseProcessID reads a payload that is one process; v names it in errors.
func ParseProcessID(v Verb, b []byte) (m ProcessID, err error) {
	r := reader{b: b}
	m.Process = r.u32()
	return m, r.end(v.String())
}

// Signal goes to a process, or to all of its container.
type Signal struct {
	Process uint32
	Number  uint8
	All     bool
}

// Append appends the payload to b.
func (m *Signal) Append(b []byte) []byte {
	return appendBool(append(appendU32(b, m.Process), m.Number), m.All)
}

// ParseSignal reads the payload of a signal.
func ParseSignal(b []byte) (m Signal, err error) {
	r := reader{b: b}
	m.Process, m.Number, m.All = r.u32(), r.u8(), r.bool()
	if m.Number > 64 {
		r.fail("no such signal")
	}
	return m, r.end("signal")
}

// Resize sets the size of a process' terminal.
type Resize struct {
	Process    uint32
	Rows, Cols uint16
}

// Append appends the payload to b.
func (m *Resize) Append(b []byte) []byte {
	return appendU16(appendU16(appendU32(b, m.Process), m.Rows), m.Cols)
}

// ParseResize reads the payload of a resize.
func ParseResize(b []byte) (m Resize, err error) {
	r := reader{b: b}
	m.Process, m.Rows, m.Cols = r.u32(), r.u16(), r.u16()
	return m, r.end("resize")
}

// Stdin carries input, at most MaxChunk bytes. It is answered when the process
// has taken all of them, and one may be under way per process: that is the
// flow control. EPIPE says the process closed its end.
type Stdin struct {
	Process uint32
	Data    []byte // lies in what was parsed
}

// Append appends the payload to b.
func (m *Stdin) Append(b []byte) []byte { return append(appendU32(b, m.Process), m.Data...) }

// ParseStdin reads the payload of a stdin.
func ParseStdin(b []byte) (m Stdin, err error) {
	r := reader{b: b}
	m.Process = r.u32()
	m.Data = r.take(len(r.b))
	if len(m.Data) > MaxChunk {
		r.fail("more than a chunk")
	}
	return m, r.end("stdin")
}

// GuardPolicy puts a policy in force. What the reply holds is the Guard's.
type GuardPolicy struct {
	Generation uint64
	Blob       []byte // lies in what was parsed
}

// Append appends the payload to b.
func (m *GuardPolicy) Append(b []byte) []byte { return append(appendU64(b, m.Generation), m.Blob...) }

// ParseGuardPolicy reads the payload of a guard policy.
func ParseGuardPolicy(b []byte) (m GuardPolicy, err error) {
	r := reader{b: b}
	m.Generation = r.u64()
	m.Blob = r.take(len(r.b))
	return m, r.end("guard policy")
}

// Phase is how far a process has come.
type Phase uint8

// The phases of a process.
const (
	PhaseSetup   Phase = iota // being made
	PhaseCreated              // waits for start
	PhaseRunning
	PhaseExited
)

// ProcessInfo is one process in the reply to processes.
type ProcessInfo struct {
	Process   uint32
	Container uint32 // its own number if it is a container's first process
	PID       uint32 // as the agent sees it
	Phase     Phase
	TTY       bool
	Code      uint8
	Signal    uint8
}

// AppendProcesses appends the reply to processes to b.
func AppendProcesses(b []byte, list []ProcessInfo) []byte {
	b = appendU16(b, uint16(len(list)))
	for i := range list {
		p := &list[i]
		b = appendU32(appendU32(appendU32(b, p.Process), p.Container), p.PID)
		b = appendBool(append(b, byte(p.Phase)), p.TTY)
		b = append(b, p.Code, p.Signal)
	}
	return b
}

// ParseProcesses reads the reply to processes.
func ParseProcesses(b []byte) (list []ProcessInfo, err error) {
	r := reader{b: b}
	n := r.count(16)
	if n > MaxProcesses {
		r.fail("more processes than a guest keeps")
		n = 0
	}
	for range n {
		list = append(list, ProcessInfo{r.u32(), r.u32(), r.u32(), Phase(r.u8()), r.bool(), r.u8(), r.u8()})
		if list[len(list)-1].Phase > PhaseExited {
			r.fail("no such phase")
		}
	}
	return list, r.end("processes reply")
}

// Credit lets the guest send so many more bytes of a stream. It has no reply.
// Bytes count payload: of output its data, of the Guard's records the batch.
type Credit struct {
	Process uint32 // 0 with StreamGuard
	Stream  Stream
	Bytes   uint32
}

// Append appends the payload to b.
func (m *Credit) Append(b []byte) []byte {
	return appendU32(append(appendU32(b, m.Process), byte(m.Stream)), m.Bytes)
}

// ParseCredit reads the payload of a credit.
func ParseCredit(b []byte) (m Credit, err error) {
	r := reader{b: b}
	m.Process, m.Stream, m.Bytes = r.u32(), Stream(r.u8()), r.u32()
	if m.Stream > StreamStderr || m.Bytes > MaxWindow {
		r.fail("no such stream, or more than a window")
	}
	return m, r.end("credit")
}

// Refusal is the payload of an error reply.
type Refusal struct {
	Errno uint32
	Text  string // verb object: cause
}

// Append appends the payload to b.
func (m *Refusal) Append(b []byte) []byte { return appendString(appendU32(b, m.Errno), m.Text) }

// ParseRefusal reads the payload of an error reply.
func ParseRefusal(b []byte) (m Refusal, err error) {
	r := reader{b: b}
	m.Errno, m.Text = r.u32(), r.string()
	return m, r.end("error reply")
}

// Exit says that a process ended. Its output may still follow.
type Exit struct {
	Process uint32
	Code    uint8 // its own, or 128 + Signal
	Signal  uint8 // that ended it, or 0
}

// Append appends the payload to b.
func (m *Exit) Append(b []byte) []byte { return append(appendU32(b, m.Process), m.Code, m.Signal) }

// ParseExit reads the payload of an exit.
func ParseExit(b []byte) (m Exit, err error) {
	r := reader{b: b}
	m.Process, m.Code, m.Signal = r.u32(), r.u8(), r.u8()
	return m, r.end("exit")
}

// Output carries what a process wrote; without data it is the stream's end.
type Output struct {
	Process uint32
	Stream  Stream
	Data    []byte // lies in what was parsed
}

// OutputPrefix is how many bytes of an output's payload precede the data.
const OutputPrefix = 5

// AppendPrefix appends all but the data.
func (m *Output) AppendPrefix(b []byte) []byte {
	return append(appendU32(b, m.Process), byte(m.Stream))
}

// ParseOutput reads the payload of an output.
func ParseOutput(b []byte) (m Output, err error) {
	r := reader{b: b}
	m.Process, m.Stream = r.u32(), Stream(r.u8())
	m.Data = r.take(len(r.b))
	if m.Stream != StreamStdout && m.Stream != StreamStderr {
		r.fail("no such stream")
	}
	if len(m.Data) > MaxChunk {
		r.fail("more than a chunk")
	}
	return m, r.end("output")
}

// OOM says that the kernel killed in a container for want of memory.
type OOM struct {
	Process uint32
	Kills   uint32 // since the container was made
}

// Append appends the payload to b.
func (m *OOM) Append(b []byte) []byte { return appendU32(appendU32(b, m.Process), m.Kills) }

// ParseOOM reads the payload of an oom.
func ParseOOM(b []byte) (m OOM, err error) {
	r := reader{b: b}
	m.Process, m.Kills = r.u32(), r.u32()
	return m, r.end("oom")
}

// AppendRecord appends one record of the Guard to a batch.
func AppendRecord(b, record []byte) []byte {
	return append(appendU16(b, uint16(len(record))), record...)
}

// RecordPrefix is what a record costs in a batch beyond its bytes.
const RecordPrefix = 2

// ParseRecords calls f for every record of a batch; they lie in b.
func ParseRecords(b []byte, f func(record []byte)) error {
	for r := (reader{b: b}); len(r.b) > 0; {
		record := r.take(int(r.u16()))
		if r.cause != "" {
			return r.end("guard events")
		}
		f(record)
	}
	return nil
}
