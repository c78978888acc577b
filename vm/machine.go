package vm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/vm/cgroup"
)

// Monitor is what a machine asks of its monitor.
type Monitor interface {
	// Pause stops the guest's processors; Resume lets them go on.
	Pause(context.Context) error
	Resume(context.Context) error
	// AttachNetwork gives the guest its i-th network device.
	AttachNetwork(ctx context.Context, i int, tap *os.File) error
	// Attach puts a disk into an empty slot, Detach empties a slot.
	Attach(context.Context, Disk) error
	Detach(context.Context, Slot) error
	// Share gives the guest the file system of a server.
	Share(ctx context.Context, tag string, server *os.File) error
	// Save writes the guest's state, memory included; the guest stands still
	// meanwhile and goes on if it ran.
	Save(ctx context.Context, state *os.File) (Saved, error)
	// Close ends the connection, not the machine.
	Close() error
}

// Machine is a running guest and its monitor.
type Machine struct {
	journal Journal
	dir     *RunDir
	handle  *handle
	monitor Monitor
	console net.Conn
	tap     *os.File // may be nil
	line    net.Conn // to the agent, parked; nil if there is none

	done    chan struct{} // closed when the process has ended
	watched chan struct{} // closed when the machine watches it no more
	bound   sync.WaitGroup
	copied  sync.WaitGroup

	mu     sync.Mutex
	err    error
	killed bool
	let    bool // go of
}

// Parts are what a driver makes a machine of.
type Parts struct {
	// Dir holds a journal in state ready.
	Dir *RunDir
	// Process is nil if the monitor's is not our child.
	Process *os.Process
	Monitor Monitor
	// Tap is that of the first network device if it leads nowhere yet.
	Tap *os.File
}

// NewMachine makes a machine of a monitor's process that a driver started or
// found. The machine owns the parts from then on, even if it fails.
func NewMachine(ctx context.Context, p Parts) (*Machine, error) {
	m := &Machine{dir: p.Dir, monitor: p.Monitor, tap: p.Tap, done: make(chan struct{}), watched: make(chan struct{})}
	err := m.open(ctx, p.Process)
	if err != nil {
		if m.handle != nil {
			m.handle.close()
		}
		return nil, errors.Join(fmt.Errorf("take machine in %s: %w", m.dir.Path(), err), m.monitor.Close(), m.closeTap(), m.dir.Close())
	}
	m.copied.Go(func() { keepConsole(m.console, m.dir) })
	go m.watch()
	m.bound.Go(m.boundLog)
	return m, nil
}

func (m *Machine) open(ctx context.Context, child *os.Process) (err error) {
	if m.journal, err = ReadJournal(m.dir.Path()); err != nil {
		return err
	}
	if m.journal.State != StateReady {
		return ErrUnfinished
	}
	if boot, err := bootID(); err != nil || boot != m.journal.BootID {
		return errors.Join(ErrGone, err)
	}
	if m.handle, err = openHandle(m.journal.PID, m.journal.Start, child); err != nil {
		return err
	}
	m.console, err = m.dir.Dial(ctx, ConsoleSocket)
	return err
}

// watch waits for the process to end.
func (m *Machine) watch() {
	defer close(m.watched)
	how, err := m.handle.wait()
	if err != nil {
		return // released
	}
	m.copied.Wait() // its last words
	m.mu.Lock()
	switch {
	case m.killed:
		m.err = ErrKilled
	default:
		m.err = fmt.Errorf("%w: %s", ErrGone, how)
		if said := m.dir.Tail(MonitorLog, 1024); said != "" {
			m.err = fmt.Errorf("%w: monitor says %s", m.err, said)
		}
	}
	m.mu.Unlock()
	close(m.done)
}

// boundLog keeps the monitor's log short until the machine has ended or is let go
// of: what a guest does may make its monitor complain without end.
func (m *Machine) boundLog() {
	t := time.NewTicker(logTime)
	defer t.Stop()
	for {
		select {
		case <-m.watched:
			return
		case <-t.C:
			_ = m.dir.trim(MonitorLog, maxMonitorLog) // there is no one to tell, and a next time
		}
	}
}

const (
	logTime       = 10 * time.Second
	maxMonitorLog = 256 << 10
)

// ID is the machine's name.
func (m *Machine) ID() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.journal.ID
}

// Become makes a spare machine somebody's: it gets a name and a run directory of
// that name below parent, on the same file system. Before it returns the machine
// is nobody's and cannot be adopted; a name that is taken leaves it so.
func (m *Machine) Become(parent, id string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !idPattern.MatchString(id) {
		return fmt.Errorf("name machine %q: it is not letters, digits and hyphens, at most 63", id)
	}
	if !m.journal.Scratch {
		return fmt.Errorf("name machine %s to be %s: it is somebody's", m.journal.ID, id)
	}
	// While the directory has its old name the journal is in the wrong place,
	// and whoever sweeps there ends the machine.
	j := m.journal
	j.ID, j.Scratch = id, false
	if err := j.Write(m.dir.Path()); err != nil {
		return fmt.Errorf("name machine %s: %w", id, err)
	}
	if err := m.dir.move(filepath.Join(parent, id)); err != nil {
		return errors.Join(fmt.Errorf("name machine %s: %w", id, err), m.journal.Write(m.dir.Path()))
	}
	m.journal = j
	return nil
}

// Dir is the machine's run directory.
func (m *Machine) Dir() string { return m.dir.Path() }

// PID is the number of the monitor's process.
func (m *Machine) PID() int { return m.journal.PID }

// Template is the key of the template the machine was cloned from, empty after
// a cold boot.
func (m *Machine) Template() string { return m.journal.Template }

// Created is when the machine was started.
func (m *Machine) Created() time.Time { return m.journal.Created }

// Done is closed when the machine has ended.
func (m *Machine) Done() <-chan struct{} { return m.done }

// Err says why the machine ended; nil while it runs.
func (m *Machine) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// Console returns the end of what the guest printed, quoted.
func (m *Machine) Console() string { return m.dir.Tail(consoleLog, 4096) }

// Agent connects to the agent's port. The port takes one connection at a time:
// another waits until the first is closed.
func (m *Machine) Agent(ctx context.Context) (net.Conn, error) {
	return m.dir.Dial(ctx, AgentSocket)
}

// Channel connects to the agent and opens a session, trying again until ctx
// ends: after a cold boot the agent is not there yet. onRecord is called for
// every record of the Guard, in order; it may be nil.
func (m *Machine) Channel(ctx context.Context, onRecord func(record []byte)) (*Channel, guestproto.Hello, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := make(chan struct{})
	defer close(stop)
	go func() { // a machine that has ended answers no more
		select {
		case <-m.done:
			cancel(m.Err())
		case <-stop:
		}
	}()
	m.mu.Lock()
	line := m.line
	m.line = nil
	m.mu.Unlock()
	if line != nil {
		if c, hello, err := openOn(ctx, line, onRecord, callDeadline); err == nil {
			return c, hello, nil
		}
	}
	return Dial(ctx, m.dir.name(AgentSocket), onRecord)
}

// Park ends a channel and freezes the guest. The connection is kept for the next
// channel, which then is there at once: a guest that wakes up and finds one host
// gone and another there may well mistake one for the other.
func (m *Machine) Park(ctx context.Context, c *Channel) error {
	line, err := c.leave()
	if err == nil {
		m.SetLine(line)
		err = m.monitor.Pause(ctx)
	}
	if err != nil {
		return fmt.Errorf("park machine %s: %w", m.ID(), err)
	}
	return nil
}

// Line is the connection of a parked machine to its agent, nil if there is none.
func (m *Machine) Line() net.Conn {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.line
}

// SetLine gives a machine the connection that it had when it was parked.
func (m *Machine) SetLine(line net.Conn) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.line = line
}

// Pause freezes the guest: not one more of its instructions runs.
func (m *Machine) Pause(ctx context.Context) error {
	if err := m.monitor.Pause(ctx); err != nil {
		return fmt.Errorf("pause machine %s: %w", m.ID(), err)
	}
	return nil
}

// Resume lets a paused guest go on.
func (m *Machine) Resume(ctx context.Context) error {
	if err := m.monitor.Resume(ctx); err != nil {
		return fmt.Errorf("resume machine %s: %w", m.ID(), err)
	}
	return nil
}

// Tap is the tap of the first network device if the machine was given none: in
// a namespace that nothing else is in, until it is moved. It is nil else, and
// for a machine that was adopted, unless SetTap gave it back. The file is closed
// with the machine.
func (m *Machine) Tap() *os.File { return m.tap }

// SetTap gives an adopted machine the tap that it lost. It must be called before
// anything that uses it.
func (m *Machine) SetTap(tap *os.File) { m.tap = tap }

func (m *Machine) closeTap() error {
	if m.tap == nil {
		return nil
	}
	return m.tap.Close()
}

// AttachNetwork gives the guest its i-th network device, from 1 on. The guest
// finds it by a rescan. The file stays the caller's.
func (m *Machine) AttachNetwork(ctx context.Context, i int, tap *os.File) error {
	err := error(nil)
	if i < 1 || i >= MaxNetworks || tap == nil {
		err = fmt.Errorf("it needs a tap, and devices 1 to %d can be added", MaxNetworks-1)
	} else {
		err = m.monitor.AttachNetwork(ctx, i, tap)
	}
	if err != nil {
		return fmt.Errorf("attach network %d to machine %s: %w", i, m.ID(), err)
	}
	return nil
}

// Share gives the guest a virtio file system with a tag, served over a vhost-user
// connection by who is at its other end. The guest finds it a moment later. A
// machine has one; the connection is closed here.
func (m *Machine) Share(ctx context.Context, tag string, server *os.File) error {
	err := m.monitor.Share(ctx, tag, server)
	if err := errors.Join(err, server.Close()); err != nil {
		return fmt.Errorf("share %q with machine %s: %w", tag, m.ID(), err)
	}
	return nil
}

// Attach puts a disk into an empty slot of the guest, running or paused.
func (m *Machine) Attach(ctx context.Context, d Disk) error {
	err := d.Slot.Check()
	if err == nil && d.File == nil {
		err = errors.New("the disk has no file")
	}
	if err == nil {
		err = m.monitor.Attach(ctx, d)
	}
	if err != nil {
		return fmt.Errorf("attach disk to slot %q of machine %s: %w", string(d.Slot), m.ID(), err)
	}
	return nil
}

// Detach empties a slot; an empty one stays so. The guest must have let go of
// the disk: what it still reads there is zeros.
func (m *Machine) Detach(ctx context.Context, s Slot) error {
	err := s.Check()
	if err == nil {
		err = m.monitor.Detach(ctx, s)
	}
	if err != nil {
		return fmt.Errorf("empty slot %q of machine %s: %w", string(s), m.ID(), err)
	}
	return nil
}

// Memory is what the machine takes of the host now.
func (m *Machine) Memory() (Memory, error) {
	select {
	case <-m.done:
		return Memory{}, m.Err()
	default:
	}
	return readMemory(m.PID())
}

// Kill ends the machine, waits until its process is gone and removes its run
// directory. It may be called again, and for a machine that ended by itself.
// A machine that was released is not killed.
func (m *Machine) Kill(ctx context.Context) error {
	m.mu.Lock()
	if m.let {
		m.mu.Unlock()
		return nil
	}
	m.killed = true
	err := m.handle.kill()
	m.mu.Unlock()
	if err != nil {
		return fmt.Errorf("kill machine %s: %w", m.ID(), err)
	}
	select {
	case <-m.done:
	case <-ctx.Done():
		return fmt.Errorf("kill machine %s: %w", m.ID(), context.Cause(ctx))
	}
	return errors.Join(cgroup.Remove(m.journal.Cgroups), os.RemoveAll(m.dir.Path()), m.Release())
}

// Release lets go of the machine, which runs on and can be adopted. It may be
// called again.
func (m *Machine) Release() error {
	m.mu.Lock()
	if m.let {
		m.mu.Unlock()
		return nil
	}
	m.let = true
	m.mu.Unlock()
	letGo := m.handle.letGo
	select {
	case <-m.done: // and reaped
		letGo = m.handle.close
	default:
	}
	err := errors.Join(letGo(), m.monitor.Close(), m.console.Close(), m.closeTap())
	if line := m.Line(); line != nil {
		err = errors.Join(err, line.Close())
	}
	<-m.watched
	m.copied.Wait()
	m.bound.Wait() // or it would look into a directory that is closed
	return errors.Join(err, m.dir.Close())
}
