package shim

import (
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// standIn is a thread of this process that does nothing and whose number stands
// for a container of a pod: containerd names containers to each other by the
// numbers of their processes, and the host knows but one for the whole pod. It
// is in the pod's network namespace, so that whoever looks for that by the
// number finds it and never the host's.
type standIn struct {
	pid  uint32
	stop func()
}

// openStandIn starts a thread in a network namespace; without a path it gets
// one of its own, which is empty.
func openStandIn(netns string) (*standIn, error) {
	began, end := make(chan error, 1), make(chan struct{})
	s := &standIn{stop: sync.OnceFunc(func() { close(end) })}
	go onOwnThread(func() { // which ends with it
		if err := enter(netns); err != nil {
			began <- fmt.Errorf("stand in for container: %w", err)
			return
		}
		s.pid = uint32(unix.Gettid())
		began <- nil
		<-end
	})
	return s, <-began
}

// enter moves the calling thread, which must be given up afterwards.
func enter(netns string) error {
	if netns == "" {
		return unix.Unshare(unix.CLONE_NEWNET)
	}
	f, err := os.Open(netns)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Setns(int(f.Fd()), unix.CLONE_NEWNET)
}
