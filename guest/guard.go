package guest

import (
	"strconv"
	"syscall"

	"hauberk.dev/guest/guard"
)

// attached is the Guard of this kernel, once there is one. There is one
// kernel and one PID 1, which is a single thread of control.
var attached *guard.Guard

// guardStart attaches the programs of the bundle. The agent calls it once,
// before it serves the port, and drops the bundle when it returns.
func guardStart(bundle []byte) error {
	g, err := guard.Attach(bundle)
	if err != nil {
		return fromGuard(err)
	}
	attached = g
	return nil
}

// guardRoot tells the Guard of a root file system: its path, and the device
// numbers (as the kernel holds them: major<<20 | minor) of the overlay and of
// the erofs below it. An error refuses the mount.
func guardRoot(path string, overlay, lower uint32) error {
	if attached == nil {
		return nil
	}
	return fromGuard(attached.Root(path, overlay, lower))
}

// guardUnroot makes the Guard let go of a root that is about to be unmounted.
func guardUnroot(path string) error {
	if attached == nil {
		return nil
	}
	return fromGuard(attached.Unroot(path))
}

// guardDevice lets the processes of a cgroup open a device.
func guardDevice(cgroup int, kind, major, minor uint32) error {
	if attached == nil {
		return nil
	}
	var st syscall.Stat_t
	if err := syscall.Fstat(cgroup, &st); err != nil {
		return fail("stat", "cgroup", err)
	}
	return fromGuard(attached.Give(st.Ino, kind, major, minor))
}

// guardNoDevices takes back what guardDevice gave.
func guardNoDevices(cgroup int) {
	var st syscall.Stat_t
	if attached != nil && syscall.Fstat(cgroup, &st) == nil {
		attached.TakeBack(st.Ino)
	}
}

// guardMount tells of what is mounted in the container of a cgroup; fd is the
// Guard's then.
func guardMount(cgroup int, path string, fd int) error {
	return guardHand(cgroup, fd, func(id uint64) error { return attached.Mounted(id, path, fd) })
}

// guardPlace tells of what is at a path of the container of a cgroup, now that
// all is mounted, and last of its root; fd is the Guard's then.
func guardPlace(cgroup int, path string, fd int) error {
	return guardHand(cgroup, fd, func(id uint64) error { return attached.Place(id, path, fd) })
}

func guardHand(cgroup, fd int, hand func(id uint64) error) error {
	if attached == nil {
		_ = syscall.Close(fd)
		return nil
	}
	var st syscall.Stat_t
	if err := syscall.Fstat(cgroup, &st); err != nil {
		_ = syscall.Close(fd)
		return fail("stat", "cgroup", err)
	}
	return fromGuard(hand(st.Ino))
}

// guardPolicy puts a policy in force.
func guardPolicy(generation uint64, blob []byte) (reply []byte, err error) {
	if attached == nil {
		return nil, fail("put in force guard policy", strconv.FormatUint(generation, 10), syscall.ENOSYS)
	}
	reply, err = attached.Policy(generation, blob)
	return reply, fromGuard(err)
}

// guardStatus appends the state of the Guard to buf; nothing without one. Each
// time it is asked, how often records were repeated is to be told too.
func guardStatus(buf []byte) []byte {
	if attached == nil {
		return buf
	}
	attached.Recount()
	return attached.Status(buf)
}

// guardRecounts says whether repetitions are still to be told.
func guardRecounts() bool { return attached != nil && attached.Recounts() }

// guardRing is the descriptor the agent polls for events, or -1.
func guardRing() int {
	if attached == nil {
		return -1
	}
	return attached.Ring()
}

// guardDrain hands records to emit until there are none left or emit says
// there is no room; a record that emit refused stays in the ring.
func guardDrain(emit func(record []byte) bool) {
	if attached != nil {
		attached.Drain(emit)
	}
}

// fromGuard keeps the number of an error for the host.
func fromGuard(err error) error {
	if e, ok := err.(*guard.Error); ok {
		return &failure{e.Errno, e.Error()}
	}
	return err
}
