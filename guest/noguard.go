package guest

import "syscall"

// These stand in for the Guard until guard.go brings the real ones; that
// change deletes this file. Without them a bundle cannot be attached, and an
// initramfs that carries one makes the agent refuse to run anything.

// guardStart attaches the programs of the bundle. The agent calls it once,
// before it serves the port, and drops the bundle when it returns.
func guardStart(bundle []byte) error { return syscall.ENOSYS }

// guardRoot tells the Guard of a root file system: its path, and the device
// numbers (as the kernel holds them: major<<20 | minor) of the overlay and of
// the erofs below it. An error refuses the mount.
func guardRoot(path string, overlay, lower uint32) error { return nil }

// guardPolicy puts a policy in force.
func guardPolicy(generation uint64, blob []byte) (reply []byte, err error) {
	return nil, syscall.ENOSYS
}

// guardStatus appends the state of the Guard to buf.
func guardStatus(buf []byte) []byte { return buf }

// guardRing is the descriptor the agent polls for events, or -1.
func guardRing() int { return -1 }

// guardDrain hands records to emit until there are none left or emit says
// there is no room; a record that emit refused stays in the ring.
func guardDrain(emit func(record []byte) bool) {}
