package vm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"hauberk.dev/api/guestproto"
)

// Monitor is what a machine asks of its monitor.
type Monitor interface {
	// Pause stops the guest's processors; Resume lets them go on.
	Pause(context.Context) error
	Resume(context.Context) error
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

	done    chan struct{} // closed when the process has ended
	watched chan struct{} // closed when the machine watches it no more
	copied  sync.WaitGroup

	mu     sync.Mutex
	err    error
	killed bool
	let    bool // go of
}

// NewMachine makes a machine of a monitor's process that a driver started or
// found, with its journal in state ready. child is nil if the process is not
// ours. The machine owns dir and monitor from then on, even if it fails.
func NewMachine(ctx context.Context, dir *RunDir, child *os.Process, monitor Monitor) (*Machine, error) {
	m := &Machine{dir: dir, monitor: monitor, done: make(chan struct{}), watched: make(chan struct{})}
	err := m.open(ctx, child)
	if err != nil {
		if m.handle != nil {
			m.handle.close()
		}
		return nil, errors.Join(fmt.Errorf("take machine in %s: %w", dir.Path, err), monitor.Close(), dir.Close())
	}
	m.copied.Go(func() { keepConsole(m.console, m.dir) })
	go m.watch()
	return m, nil
}

func (m *Machine) open(ctx context.Context, child *os.Process) (err error) {
	if m.journal, err = ReadJournal(m.dir.Path); err != nil {
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

// ID is the machine's name.
func (m *Machine) ID() string { return m.journal.ID }

// Dir is the machine's run directory.
func (m *Machine) Dir() string { return m.dir.Path }

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
	return Dial(ctx, m.dir.name(AgentSocket), onRecord)
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
	return errors.Join(os.RemoveAll(m.Dir()), m.Release())
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
	err := errors.Join(m.handle.close(), m.monitor.Close(), m.console.Close())
	<-m.watched
	m.copied.Wait()
	return errors.Join(err, m.dir.Close())
}
