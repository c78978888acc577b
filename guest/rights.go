package guest

import (
	"strconv"
	"syscall"

	"hauberk.dev/api/guestproto"
)

// keptCaps are what root of a container may do if the host does not say: the
// common default of container engines without MKNOD and SYS_CHROOT.
const keptCaps = 1<<0 | // CHOWN
	1<<1 | // DAC_OVERRIDE
	1<<3 | // FOWNER
	1<<4 | // FSETID
	1<<5 | // KILL
	1<<6 | // SETGID
	1<<7 | // SETUID
	1<<8 | // SETPCAP
	1<<10 | // NET_BIND_SERVICE
	1<<13 | // NET_RAW
	1<<29 | // AUDIT_WRITE
	1<<31 // SETFCAP

const (
	openFiles    = 1 << 20
	limitNoFile  = 7
	defaultUmask = 0o022
)

// rights are what a program is left with, made ready while the setup stage can
// still take memory.
type rights struct {
	who           identity
	caps          guestproto.Rights
	newPrivileges bool
	filter        []byte // none if empty
	filterFlags   uint32
	limits        []guestproto.Rlimit
	umask         int
}

func newRights(p *guestproto.Program, who identity) (*rights, error) {
	r := rights{who: who, caps: p.Rights, newPrivileges: p.NewPrivileges, umask: defaultUmask}
	if p.UmaskGiven {
		r.umask = int(p.Umask)
	}
	if !r.caps.Given {
		r.caps.Bounding = keptCaps
		if who.uid == 0 {
			r.caps.Effective, r.caps.Permitted = keptCaps, keptCaps
		}
	}
	r.limits = append([]guestproto.Rlimit{{Kind: limitNoFile, Soft: openFiles, Hard: openFiles}}, p.Rlimits...)
	switch p.Seccomp.Mode {
	case guestproto.SeccompDefault:
		r.filter = syscallFilter()
	case guestproto.SeccompFilter:
		// A thread of the setup stage other than this ends with the exec; so
		// there is nothing to bring in step.
		const inStep, log, specAllow = 1, 2, 4
		r.filter, r.filterFlags = p.Seccomp.Filter, p.Seccomp.Flags&^inStep
		if r.filterFlags&^(log|specAllow) != 0 {
			return nil, fail("set", "seccomp flags "+strconv.FormatUint(uint64(r.filterFlags), 16), syscall.EINVAL)
		}
	}
	return &r, nil
}

// apply gives up every right that the program must not have, on this thread;
// the exec ends the others. The filter comes last, unless only the rights of
// root may set it: then the calls in between must be in it.
func (r *rights) apply() error {
	for _, l := range r.limits {
		if err := setLimit(l.Kind, l.Soft, l.Hard); err != nil {
			return fail("set", "resource limit "+strconv.Itoa(int(l.Kind)), err)
		}
	}
	if !r.newPrivileges {
		if err := prctl(prSetNoNewPrivs, 1); err != nil {
			return fail("set", "no_new_privs", err)
		}
	}
	for c := uintptr(0); c < 64; c++ {
		if r.caps.Bounding>>c&1 == 1 {
			continue
		}
		if err := prctl(prCapbsetDrop, c); err == syscall.EINVAL {
			break // past the last the kernel knows
		} else if err != nil {
			return fail("drop", "capability "+strconv.Itoa(int(c)), err)
		}
	}
	if err := prctl(prCapAmbient, prCapAmbientWipe); err != nil {
		return fail("drop", "ambient capabilities", err)
	}
	if r.newPrivileges {
		if err := r.setFilter(); err != nil {
			return err
		}
	}
	if err := r.become(); err != nil {
		return err
	}
	syscall.Umask(r.umask)
	if r.newPrivileges {
		return nil
	}
	return r.setFilter()
}

// become takes the program's user, groups and capabilities.
func (r *rights) become() error {
	if err := setGroups(r.who.groups); err != nil {
		return fail("set", "groups", err)
	}
	gid, uid := uintptr(r.who.gid), uintptr(r.who.uid)
	if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESGID, gid, gid, gid); errno != 0 {
		return fail("set", "gid "+strconv.Itoa(int(gid)), errno)
	}
	if err := prctl(prSetKeepCaps, 1); err != nil {
		return fail("keep", "capabilities", err)
	}
	if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, uid, uid, uid); errno != 0 {
		return fail("set", "uid "+strconv.Itoa(int(uid)), errno)
	}
	if err := prctl(prSetKeepCaps, 0); err != nil {
		return fail("keep", "capabilities", err)
	}
	if err := setCaps(r.caps.Effective, r.caps.Permitted, r.caps.Inheritable); err != nil {
		return fail("set", "capabilities", err)
	}
	for c := uintptr(0); c < 64; c++ {
		if r.caps.Ambient>>c&1 == 0 {
			continue
		}
		if err := prctl2(prCapAmbient, prCapAmbientRaise, c); err != nil {
			return fail("raise", "ambient capability "+strconv.Itoa(int(c)), err)
		}
	}
	return nil
}

func (r *rights) setFilter() error {
	if len(r.filter) == 0 {
		return nil
	}
	if err := setSeccomp(r.filter, r.filterFlags); err != nil {
		return fail("set", "seccomp filter", err)
	}
	return nil
}

// filterInsn is one instruction of classic BPF.
type filterInsn struct {
	code   uint16
	jt, jf uint8
	k      uint32
}

// syscallFilter refuses, with EPERM, the few system calls that have no place in
// a container and that no hook of the kernel's LSM sees: kernel keys,
// userfaultfd, and whatever is not of the 64-bit ABI. What the Guard can refuse,
// and report, is left to it.
func syscallFilter() (code []byte) {
	for _, i := range syscallInsns() {
		code = append(code, byte(i.code), byte(i.code>>8), i.jt, i.jf)
		code = append(code, byte(i.k), byte(i.k>>8), byte(i.k>>16), byte(i.k>>24))
	}
	return code
}

func syscallInsns() []filterInsn {
	const (
		load, jumpEq, jumpGe, ret = 0x20, 0x15, 0x35, 0x06
		offNumber, offArch        = 0, 4
		archX8664, x32            = 0xc000003e, 0x40000000
		allow, refuse             = 0x7fff0000, 0x00050001
	)
	numbers := []uint32{248, 249, 250, 323} // add_key, request_key, keyctl, userfaultfd
	n := uint8(len(numbers))
	f := []filterInsn{
		{load, 0, 0, offArch},
		{jumpEq, 0, n + 3, archX8664},
		{load, 0, 0, offNumber},
		{jumpGe, n + 1, 0, x32},
	}
	for i, number := range numbers {
		f = append(f, filterInsn{jumpEq, n - uint8(i), 0, number})
	}
	return append(f, filterInsn{ret, 0, 0, allow}, filterInsn{ret, 0, 0, refuse})
}
