package share

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"hauberk.dev/guard/bpf"
	loader "hauberk.dev/guest/guard"
)

// Supported says whether the kernel of a node lets the Guard in; root is what the
// node's / holds. The error names everything that is missing.
func Supported(root fs.FS) error {
	var faults []error
	missing := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	lsm, err := fs.ReadFile(root, "sys/kernel/security/lsm")
	switch {
	case err != nil:
		missing("read which security modules there are: %w: mount securityfs", err)
	case !slices.Contains(strings.Split(strings.TrimSpace(string(lsm)), ","), "bpf"):
		missing("this kernel starts without BPF LSM (it has %s): add bpf to lsm= on its command line", strings.TrimSpace(string(lsm)))
	}
	if _, err := fs.Stat(root, "sys/kernel/btf/vmlinux"); err != nil {
		missing("this kernel has no type information (CONFIG_DEBUG_INFO_BTF): %w", err)
	}
	release, err := fs.ReadFile(root, "proc/sys/kernel/osrelease")
	if err != nil {
		missing("read the kernel's release: %w", err)
	} else if old(string(release)) {
		missing("kernel %s is too old: the Guard's programs are for 6.1 and newer", strings.TrimSpace(string(release)))
	}
	if _, err := fs.Stat(root, "sys/fs/cgroup/cgroup.controllers"); err != nil {
		missing("cgroups are not of version 2 alone: %w: boot with systemd.unified_cgroup_hierarchy=1", err)
	}
	mode, err := fs.ReadFile(root, "sys/kernel/security/lockdown")
	if err == nil && strings.Contains(string(mode), "[confidentiality]") {
		missing("the kernel is locked down for confidentiality, which keeps programs from reading what they judge: use lockdown=integrity")
	}
	if len(faults) > 0 {
		return fmt.Errorf("hold containers on this kernel: %w", errors.Join(faults...))
	}
	return nil
}

func old(release string) bool {
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		return true
	}
	return major < 6 || major == 6 && minor < 1
}

// Link fits the programs to the kernel that runs here. It needs no privilege.
func Link() (bundle []byte, err error) {
	const dir = "/sys/kernel/btf/"
	id, err := loader.KernelID()
	if err != nil {
		return nil, err
	}
	types, err := os.ReadFile(dir + "vmlinux")
	if err != nil {
		return nil, err
	}
	overlay, err := os.ReadFile(dir + "overlay")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read the types of overlay file systems: %w: load the module first (modprobe overlay)", err)
	}
	if err != nil {
		return nil, err
	}
	return bpf.LinkShared(bytes.NewReader(types), bytes.NewReader(overlay), id)
}
