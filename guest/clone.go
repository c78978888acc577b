package guest

import (
	"strconv"
	"syscall"

	"hauberk.dev/api/guestproto"
)

// reseed makes this clone of a template itself: entropy, clock and names.
func (a *agent) reseed(payload []byte) error {
	m, err := guestproto.ParseReseed(payload)
	if err != nil {
		return err
	}
	fd, err := syscall.Open("/dev/urandom", syscall.O_WRONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return fail("open", "/dev/urandom", err)
	}
	err = addEntropy(fd, &m.Entropy)
	_ = syscall.Close(fd)
	if err != nil {
		return fail("reseed", "/dev/urandom", err)
	}
	tv := syscall.NsecToTimeval(m.UnixNanos)
	if err := syscall.Settimeofday(&tv); err != nil {
		return fail("set", "clock", err)
	}
	if len(m.MachineID) > 64 {
		return fail("set machine id", strconv.Quote(m.MachineID), syscall.EINVAL)
	}
	a.machineID = m.MachineID
	if m.Hostname != "" {
		if err := syscall.Sethostname([]byte(m.Hostname)); err != nil {
			return fail("set hostname", strconv.Quote(m.Hostname), err)
		}
	}
	if m.BootID == "" {
		return nil
	}
	return setBootID(m.BootID)
}

// setBootID puts a boot id over the one that all clones of a template share.
// Every container binds the same file.
func setBootID(id string) error {
	if len(id) != 36 {
		return fail("set boot id", strconv.Quote(id), syscall.EINVAL)
	}
	const kernels = "/proc/sys/kernel/random/boot_id"
	bound := true
	var st syscall.Stat_t
	if syscall.Stat(bootIDPath, &st) == syscall.ENOENT {
		bound = false
		if err := replaceFile(bootIDPath, nil, 0o444); err != nil {
			return err
		}
	}
	if err := writeFile(bootIDPath, id+"\n"); err != nil {
		return err
	}
	if bound {
		return nil
	}
	if err := syscall.Mount(bootIDPath, kernels, "", syscall.MS_BIND, ""); err != nil {
		return fail("bind", kernels, err)
	}
	return nil
}
