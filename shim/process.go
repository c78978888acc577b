package shim

import (
	"errors"
	"sync"
	"syscall"
	"time"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/vm"
)

// lostStatus is the exit status of a process whose machine ended.
const lostStatus = 128 + int(syscall.SIGKILL)

// notRun is the exit status of an exec whose program could not be run, as
// shells have it: 127 if it is not there.
func notRun(err error) int {
	if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ENOTDIR) {
		return 127
	}
	return 126
}

// phase of a process' life.
type phase int

const (
	phaseCreated phase = iota
	phaseRunning
	phaseStopped
)

// running is a process in a container, or one that will be or was.
type running struct {
	container string
	id        string // of an exec; none is the container's first
	program   guestproto.Program
	io        *stdio
	done      chan struct{} // closed when it has ended

	// announcing is held while a process starts, so that its end is told
	// after its start.
	announcing sync.Mutex

	mu     sync.Mutex
	phase  phase
	guest  *vm.Process // nil until it is made, and always of a pause
	status int
	at     time.Time
}

func newRunning(container, exec string, p guestproto.Program, names streams) *running {
	return &running{container: container, id: exec, program: p, io: &stdio{names: names}, done: make(chan struct{})}
}

func (r *running) state() (p phase, status int, at time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.phase, r.status, r.at
}

func (r *running) process() *vm.Process {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.guest
}

func (r *running) setProcess(p *vm.Process) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.guest = p
}

// started notes that a process runs, unless it has ended already.
func (r *running) started() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.phase == phaseCreated {
		r.phase = phaseRunning
	}
}

// finish notes the end of a process, once.
func (r *running) finish(status int) (first bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.phase == phaseStopped {
		return false
	}
	r.phase, r.status, r.at = phaseStopped, status, time.Now()
	close(r.done)
	return true
}

// exit is how a process ended.
type exit struct {
	status int
	at     time.Time
}
