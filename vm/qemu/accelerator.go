package qemu

import (
	"os"
	"strconv"
	"syscall"
)

// Accelerator is how QEMU runs a guest's instructions.
type Accelerator string

// The accelerators: the processor itself, or translation, which runs
// everywhere and is slow.
const (
	KVM Accelerator = "kvm"
	TCG Accelerator = "tcg"
)

func (a Accelerator) arguments(cacheMiB int) []string {
	if a == KVM {
		return []string{"-accel", "kvm", "-cpu", "host"}
	}
	return []string{"-accel", "tcg,tb-size=" + strconv.Itoa(cacheMiB), "-cpu", "max"}
}

// devices are what the accelerator needs of the host, below /dev.
func (a Accelerator) devices() []string {
	if a == KVM {
		return []string{"kvm"}
	}
	return nil
}

// groups may open them.
func (a Accelerator) groups() []uint32 {
	var groups []uint32
	for _, name := range a.devices() {
		if fi, err := os.Stat("/dev/" + name); err == nil {
			if st, ok := fi.Sys().(*syscall.Stat_t); ok && st.Gid != 0 {
				groups = append(groups, st.Gid)
			}
		}
	}
	return groups
}
