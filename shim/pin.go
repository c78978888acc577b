package shim

import (
	"fmt"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// pins are the processors of the host that a pod's containers are to run on. A
// guest's processors are no host's: what can be kept to some of those is the
// machine, which runs on all that its containers name, and on any while one
// of them names none.
type pins struct {
	mu    sync.Mutex
	wants map[string][]int // by container; nil is any
	whole *unix.CPUSet     // what the machine had before it was kept to anything
}

// set notes what a container wants and keeps its machine's threads to it.
func (p *pins) set(container string, cpus []int, machine int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	old, had := p.wants[container]
	if p.wants == nil {
		p.wants = map[string][]int{}
	}
	p.wants[container] = cpus
	err := p.apply(machine)
	if err == nil {
		return nil
	}
	if delete(p.wants, container); had {
		p.wants[container] = old
	}
	return status.Errorf(codes.FailedPrecondition, "keep container %q to processors %v: %v", container, cpus, err)
}

// drop forgets a container that has ended.
func (p *pins) drop(container string, machine int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, ok := p.wants[container]; !ok {
		return nil
	}
	delete(p.wants, container)
	if len(p.wants) == 0 {
		return nil // the next one will say
	}
	return p.apply(machine)
}

func (p *pins) apply(machine int) error {
	var want unix.CPUSet
	free := false
	for _, cpus := range p.wants {
		free = free || len(cpus) == 0
		for _, n := range cpus {
			want.Set(n)
		}
	}
	if free && p.whole == nil {
		return nil // it runs where it always did
	}
	if p.whole == nil {
		p.whole = &unix.CPUSet{}
		if err := unix.SchedGetaffinity(machine, p.whole); err != nil {
			p.whole = nil
			return err
		}
	}
	if free {
		want = *p.whole
	}
	return keepTo(machine, &want)
}

// keepTo keeps all threads of a process to some processors. One that is started
// meanwhile has what the one that starts it has, so it is over when a look at
// all of them finds none that was not seen.
func keepTo(process int, cpus *unix.CPUSet) error {
	seen := map[int]bool{}
	for {
		threads, err := os.ReadDir("/proc/" + strconv.Itoa(process) + "/task")
		if err != nil {
			return err
		}
		more := false
		for _, t := range threads {
			id, err := strconv.Atoi(t.Name())
			if err != nil || seen[id] {
				continue
			}
			if err := unix.SchedSetaffinity(id, cpus); err != nil && err != unix.ESRCH {
				return fmt.Errorf("thread %d: %w", id, err)
			}
			seen[id], more = true, true
		}
		if !more {
			return nil
		}
	}
}
