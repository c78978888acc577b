package balance

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"
)

// Million is the whole of a fault's share.
const Million = 1_000_000

// Fault is what goes wrong on purpose (Envoy: "Fault injection"). Shares are of
// a million requests.
type Fault struct {
	Abort, Delay uint32        // shares that are refused, and that wait
	For          time.Duration // they wait
	Status       int           // of the refusal, in the protocol's own numbers
	Active       int64         // faults at once; 0 is no limit
}

// Faults decides which requests go wrong.
type Faults struct {
	fault  Fault
	active atomic.Int64
}

// NewFaults checks a fault.
func NewFaults(f Fault) (*Faults, error) {
	switch {
	case f.Abort > Million || f.Delay > Million:
		return nil, fmt.Errorf("fault for %d and %d; want at most %d", f.Abort, f.Delay, Million)
	case f.Delay > 0 && (f.For <= 0 || f.For > maxDuration):
		return nil, fmt.Errorf("fault of %v; want more than 0, up to %v", f.For, maxDuration)
	case f.Abort > 0 && f.Status <= 0:
		return nil, errors.New("fault without a status")
	case f.Active < 0:
		return nil, fmt.Errorf("%d faults at once", f.Active)
	}
	return &Faults{fault: f}, nil
}

// Injury is what happens to one request: it waits, and then is refused if Abort
// is set. One that is not the zero value ends with Faults.Over.
type Injury struct {
	Wait   time.Duration
	Abort  bool
	Status int
}

// Next decides for one request. Waiting and refusal are drawn by themselves.
func (f *Faults) Next(random uint64) (i Injury) {
	const half = 1<<32 - 1
	if uint32(below(random<<32, Million)) < f.fault.Delay {
		i.Wait = f.fault.For
	}
	if uint32(below(random&^half, Million)) < f.fault.Abort {
		i.Abort, i.Status = true, f.fault.Status
	}
	if i == (Injury{}) {
		return i
	}
	if n := f.active.Add(1); f.fault.Active > 0 && n > f.fault.Active {
		f.active.Add(-1)
		return Injury{}
	}
	return i
}

// Over says that an injured request is over.
func (f *Faults) Over() { f.active.Add(-1) }
