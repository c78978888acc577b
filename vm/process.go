package vm

import (
	"context"
	"fmt"
	"io"
	"math"
	"slices"
	"sync"
	"syscall"

	"hauberk.dev/api/guestproto"
)

// ExitStatus is how a process ended.
type ExitStatus struct {
	Code   int // its own, or 128 + Signal
	Signal syscall.Signal
}

// Process is one in a guest, of this host's asking.
//
// Its exit and its output are told apart: Wait returns when it ended, a stream
// gives io.EOF when its last writer left, which may be a child that lives on.
// Output that nobody reads stops, in the end, whoever writes it; Discard what
// is not wanted.
type Process struct {
	c         *Channel
	id        uint32
	container uint32
	tty       bool
	transient bool // forgotten in the guest as soon as all of it was heard

	input  sync.Mutex // one write is under way at a time
	stdout stream
	stderr stream

	mu     sync.Mutex
	exited chan struct{} // closed when status or err stands
	status ExitStatus
	err    error // of the channel, if it closed first
	open   int   // streams that have not ended
}

func newProcess(c *Channel, container uint32, tty bool) *Process {
	return &Process{c: c, container: container, tty: tty, exited: make(chan struct{}), open: 2}
}

// ID is the process' number in the guest, never used twice in one boot of it.
func (p *Process) ID() uint32 { return p.id }

// Stdout reads what the process writes; with a terminal, all of it.
func (p *Process) Stdout() io.Reader { return &p.stdout }

// Stderr reads the process' errors; with a terminal there are none.
func (p *Process) Stderr() io.Reader { return &p.stderr }

// Discard lets a process write what nobody will read.
func (p *Process) Discard() {
	p.stdout.discard()
	p.stderr.discard()
}

// Wait returns when the process ended, ctx did, or the channel closed.
func (p *Process) Wait(ctx context.Context) (ExitStatus, error) {
	select {
	case <-p.exited:
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.status, p.err
	case <-ctx.Done():
		return ExitStatus{}, fmt.Errorf("wait for process %d: %w", p.id, context.Cause(ctx))
	}
}

// Write gives the process input and returns when it took all of it.
func (p *Process) Write(b []byte) (int, error) { return p.WriteContext(context.Background(), b) }

// WriteContext is Write until ctx ends. What was under way then may still be
// taken.
func (p *Process) WriteContext(ctx context.Context, b []byte) (n int, err error) {
	p.input.Lock()
	defer p.input.Unlock()
	for len(b) > n {
		chunk := b[n:min(len(b), n+guestproto.MaxChunk)]
		if _, err := p.c.ask(ctx, guestproto.VerbStdin, &guestproto.Stdin{Process: p.id, Data: chunk}, nil); err != nil {
			return n, err
		}
		n += len(chunk)
	}
	return n, nil
}

// CloseStdin ends the process' input.
func (p *Process) CloseStdin(ctx context.Context) error {
	p.input.Lock()
	defer p.input.Unlock()
	return p.c.do(ctx, guestproto.VerbCloseStdin, &guestproto.ProcessID{Process: p.id})
}

// Start lets the first process of a container exec. Its refusal says why the
// program could not be run; the process has ended then.
func (p *Process) Start(ctx context.Context) error {
	return p.c.do(ctx, guestproto.VerbStart, &guestproto.ProcessID{Process: p.id})
}

// Signal sends a signal to the process.
func (p *Process) Signal(ctx context.Context, s syscall.Signal) error { return p.signal(ctx, s, false) }

// SignalAll sends a signal to every process of its container.
func (p *Process) SignalAll(ctx context.Context, s syscall.Signal) error {
	return p.signal(ctx, s, true)
}

func (p *Process) signal(ctx context.Context, s syscall.Signal, all bool) error {
	if s < 0 || s > 64 {
		return fmt.Errorf("signal process %d: no signal %d", p.id, s)
	}
	return p.c.do(ctx, guestproto.VerbSignal, &guestproto.Signal{Process: p.id, Number: uint8(s), All: all})
}

// Update changes the limits of the container whose first process this is.
func (p *Process) Update(ctx context.Context, r guestproto.Resources) error {
	return p.c.do(ctx, guestproto.VerbUpdate, &guestproto.Update{Container: p.id, Resources: r})
}

// Freeze stops every process of the container whose first process this is, and
// returns when they stand still.
func (p *Process) Freeze(ctx context.Context) error { return p.freeze(ctx, true) }

// Thaw lets them go on.
func (p *Process) Thaw(ctx context.Context) error { return p.freeze(ctx, false) }

func (p *Process) freeze(ctx context.Context, frozen bool) error {
	return p.c.do(ctx, guestproto.VerbFreeze, &guestproto.Freeze{Container: p.id, Frozen: frozen})
}

// Top lists what runs in the container whose first process this is.
func (p *Process) Top(ctx context.Context) ([]guestproto.Task, error) {
	b, err := p.c.call(ctx, guestproto.VerbTop, &guestproto.ProcessID{Process: p.id})
	if err != nil {
		return nil, err
	}
	list, err := guestproto.ParseTasks(b)
	return parsed(p.c, list, err)
}

// Resize sets the size of the process' terminal.
func (p *Process) Resize(ctx context.Context, rows, cols uint16) error {
	return p.c.do(ctx, guestproto.VerbResize, &guestproto.Resize{Process: p.id, Rows: rows, Cols: cols})
}

// Logs gives the last of its output, if it was created to keep that.
func (p *Process) Logs(ctx context.Context) ([]byte, error) {
	return p.c.call(ctx, guestproto.VerbLogs, &guestproto.ProcessID{Process: p.id})
}

// Forget frees what the guest keeps of a process that ended: until then a host
// that attaches anew can still learn how. A process of Exec is forgotten by
// itself once it ended and its output did.
func (p *Process) Forget(ctx context.Context) error { return p.c.forget(ctx, p.id) }

// Create makes a container and its first process, up to the exec.
func (c *Channel) Create(ctx context.Context, m guestproto.Create) (*Process, error) {
	if err := checkCreate(&m); err != nil {
		return nil, fmt.Errorf("create container: %w", err)
	}
	p := newProcess(c, 0, m.Program.TTY)
	return p, c.begin(ctx, guestproto.VerbCreate, &m, p)
}

// Exec runs one more process in the container of a process that Create gave.
func (c *Channel) Exec(ctx context.Context, container *Process, program guestproto.Program) (*Process, error) {
	if err := checkProgram(&program); err != nil {
		return nil, fmt.Errorf("exec: %w", err)
	}
	p := newProcess(c, container.id, program.TTY)
	p.transient = true
	return p, c.begin(ctx, guestproto.VerbExec, &guestproto.Exec{Container: container.id, Program: program}, p)
}

// begin asks for a process and gives its streams their first credit.
func (c *Channel) begin(ctx context.Context, v guestproto.Verb, m message, p *Process) error {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, callDeadline)
		defer cancel()
	}
	p.stdout.init(p, guestproto.StreamStdout)
	p.stderr.init(p, guestproto.StreamStderr)
	if _, err := c.ask(ctx, v, m, p); err != nil {
		return err
	}
	return p.openStreams(ctx)
}

// openStreams gives both streams their first credit.
func (p *Process) openStreams(ctx context.Context) error {
	if err := p.stdout.grant(ctx, OutputWindow); err != nil {
		return err
	}
	return p.stderr.grant(ctx, OutputWindow)
}

// checkProgram refuses what a frame has no room to say.
func checkProgram(p *guestproto.Program) error {
	switch {
	case len(p.Args) == 0:
		return fmt.Errorf("run program: none is named")
	case len(p.Args) > guestproto.MaxList || len(p.Env) > guestproto.MaxList || len(p.Groups) > guestproto.MaxList || len(p.Rlimits) > guestproto.MaxList:
		return fmt.Errorf("run program %q: more than %d arguments, variables, groups or limits", p.Args[0], guestproto.MaxList)
	case len(p.Cwd) > math.MaxUint16 || len(p.User) > math.MaxUint16:
		return fmt.Errorf("run program %q: the directory's or the user's name is too long", p.Args[0])
	}
	return nil
}

// checkCreate does so for a container.
func checkCreate(m *guestproto.Create) error {
	for what, n := range map[string]int{
		"files": len(m.Files), "mounts": len(m.Mounts), "masked paths": len(m.Masked), "read-only paths": len(m.ReadOnly),
		"devices": len(m.Devices), "sysctls": len(m.Sysctls), "files of its cgroup": len(m.Resources.Unified),
	} {
		if n > guestproto.MaxList {
			return fmt.Errorf("%d %s are more than %d", n, what, guestproto.MaxList)
		}
	}
	long := func(list ...string) bool {
		return slices.ContainsFunc(list, func(s string) bool { return len(s) > math.MaxUint16 })
	}
	for _, f := range m.Files {
		if long(f.Path) {
			return fmt.Errorf("the path of a file has %d bytes", len(f.Path))
		}
	}
	for _, f := range m.Mounts {
		if long(f.Target, f.Source, f.FS, f.Data) {
			return fmt.Errorf("mount at %.64q: a string is too long", f.Target)
		}
	}
	for _, d := range m.Devices {
		if long(d.Path, d.Serial) {
			return fmt.Errorf("device %.64q: a string is too long", d.Path)
		}
	}
	for _, s := range slices.Concat(m.Sysctls, m.Resources.Unified) {
		if long(s.Name, s.Value) {
			return fmt.Errorf("setting %.64q: a string is too long", s.Name)
		}
	}
	if long(m.Hostname, m.Domainname, m.Resources.CPUs, m.Resources.Nodes) {
		return fmt.Errorf("a name or a list of processors is too long")
	}
	return checkProgram(&m.Program)
}

// Processes lists what runs in the guest, or ran and was not forgotten.
func (c *Channel) Processes(ctx context.Context) ([]guestproto.ProcessInfo, error) {
	b, err := c.call(ctx, guestproto.VerbProcesses, nil)
	if err != nil {
		return nil, err
	}
	list, err := guestproto.ParseProcesses(b)
	return parsed(c, list, err)
}

// Attach takes up a process that an earlier session made: output from where
// that stopped reading, and its exit, even if it is long past. What the earlier
// host had credit for and did not read is lost, but for Logs.
func (c *Channel) Attach(ctx context.Context, info guestproto.ProcessInfo) (*Process, error) {
	p := newProcess(c, info.Container, info.TTY)
	p.transient = info.Container != info.Process
	p.stdout.init(p, guestproto.StreamStdout)
	p.stderr.init(p, guestproto.StreamStderr)
	if err := c.register(p, info.Process); err != nil {
		return nil, fmt.Errorf("attach to process %d: %w", info.Process, err)
	}
	if err := c.do(ctx, guestproto.VerbAttach, &guestproto.ProcessID{Process: p.id}); err != nil {
		c.mu.Lock()
		delete(c.processes, p.id)
		c.mu.Unlock()
		return nil, err
	}
	return p, p.openStreams(ctx)
}

func (p *Process) hearExit(m guestproto.Exit) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.exited:
		return &guestproto.MalformedError{What: "exit", Cause: fmt.Sprintf("process %d ended before", p.id)}
	default:
	}
	p.status = ExitStatus{Code: int(m.Code), Signal: syscall.Signal(m.Signal)}
	close(p.exited)
	p.heardLocked()
	return nil
}

func (p *Process) hearOutput(m guestproto.Output) error {
	s := &p.stdout
	if m.Stream == guestproto.StreamStderr {
		s = &p.stderr
	}
	if len(m.Data) > 0 {
		return s.hear(m.Data)
	}
	if err := s.end(io.EOF); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.open--
	p.heardLocked()
	return nil
}

// heardLocked frees a transient process when nothing more can come of it.
func (p *Process) heardLocked() {
	select {
	case <-p.exited:
	default:
		return
	}
	if p.transient && p.open == 0 {
		select {
		case p.c.reaped <- p.id:
		default: // more than a guest has, so one that lies: its table stays full
		}
	}
}

// lost ends what waits for the process: the channel closed.
func (p *Process) lost(err error) {
	_ = p.stdout.end(err)
	_ = p.stderr.end(err)
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.exited:
	default:
		p.err = fmt.Errorf("wait for process %d: %w", p.id, err)
		close(p.exited)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

// stream holds what the guest sent of an output and nobody read yet, within
// the credit it was given.
type stream struct {
	p    *Process
	kind guestproto.Stream

	mu        sync.Mutex
	more      *sync.Cond
	buf       []byte
	granted   int // the guest may still send
	taken     int // read since the last grant
	err       error
	left      error // its reader is gone, and why
	discarded bool
}

func (s *stream) init(p *Process, kind guestproto.Stream) {
	s.p, s.kind = p, kind
	s.more = sync.NewCond(&s.mu)
}

func (s *stream) hear(data []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil || len(data) > s.granted {
		return &guestproto.MalformedError{What: "output", Cause: fmt.Sprintf("process %d is beyond its credit or its end", s.p.id)}
	}
	s.granted -= len(data)
	s.buf = append(s.buf, data...)
	s.more.Broadcast()
	return nil
}

// end sets what a reader gets after what is there; only the first counts.
func (s *stream) end(err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return &guestproto.MalformedError{What: "output", Cause: fmt.Sprintf("process %d ends a stream twice", s.p.id)}
	}
	s.err = err
	s.more.Broadcast()
	return nil
}

// cut ends the stream for its reader, not for the guest.
func (s *stream) cut(why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.left = why
	s.more.Broadcast()
}

// Read waits for output. The guest gets credit for what was read when that is
// half a window.
func (s *stream) Read(b []byte) (int, error) {
	s.mu.Lock()
	for len(s.buf) == 0 && s.err == nil && s.left == nil {
		s.more.Wait()
	}
	if err := s.left; err != nil {
		s.mu.Unlock()
		return 0, err
	}
	s.mu.Unlock()
	return s.read(b)
}

// read is Read also of a stream that was cut. Each stream has one reader.
func (s *stream) read(b []byte) (int, error) {
	s.mu.Lock()
	for len(s.buf) == 0 && s.err == nil {
		s.more.Wait()
	}
	n := copy(b, s.buf)
	if s.buf = s.buf[n:]; len(s.buf) == 0 {
		s.buf = nil
	}
	s.taken += n
	credit := 0
	if s.taken >= OutputWindow/2 && s.err == nil {
		credit, s.taken = s.taken, 0
	}
	err := s.err
	s.mu.Unlock()
	if credit > 0 {
		_ = s.grant(context.Background(), credit) // a closed channel shows at the next read
	}
	if n > 0 || len(b) == 0 {
		return n, nil
	}
	return 0, err
}

// grant lets the guest send n more bytes.
func (s *stream) grant(ctx context.Context, n int) error {
	s.mu.Lock()
	s.granted += n
	s.mu.Unlock()
	return s.p.c.credit(ctx, guestproto.Credit{Process: s.p.id, Stream: s.kind, Bytes: uint32(n)})
}

// discard reads the stream to its end, once.
func (s *stream) discard() {
	s.mu.Lock()
	again := s.discarded
	s.discarded = true
	s.mu.Unlock()
	if !again {
		go io.Copy(io.Discard, readerFunc(s.read)) // ends with the stream, at the latest with the channel
	}
}
