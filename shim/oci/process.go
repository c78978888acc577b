package oci

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/shim/seccomp"
)

type process struct {
	Terminal    bool `json:"terminal"`
	ConsoleSize *struct {
		Height uint `json:"height"`
		Width  uint `json:"width"`
	} `json:"consoleSize"`
	User struct {
		UID            uint32   `json:"uid"`
		GID            uint32   `json:"gid"`
		Umask          *uint32  `json:"umask"`
		AdditionalGids []uint32 `json:"additionalGids"`
	} `json:"user"`
	Args            []string      `json:"args"`
	Env             []string      `json:"env"`
	Cwd             string        `json:"cwd"`
	Capabilities    *capabilities `json:"capabilities"`
	Rlimits         []rlimit      `json:"rlimits"`
	NoNewPrivileges bool          `json:"noNewPrivileges"`
	ApparmorProfile string        `json:"apparmorProfile"`
	OOMScoreAdj     *int          `json:"oomScoreAdj"`
}

type capabilities struct {
	Bounding    []string `json:"bounding"`
	Effective   []string `json:"effective"`
	Inheritable []string `json:"inheritable"`
	Permitted   []string `json:"permitted"`
	Ambient     []string `json:"ambient"`
}

type rlimit struct {
	Type string `json:"type"`
	Hard uint64 `json:"hard"`
	Soft uint64 `json:"soft"`
}

const maxPath = 4095

// program is a process as the guest's agent takes it, but for its filter.
func (p *process) program() (guestproto.Program, error) {
	out := guestproto.Program{
		Args: p.Args, Env: p.Env, Cwd: p.Cwd, TTY: p.Terminal,
		UID: p.User.UID, GID: p.User.GID, Groups: p.User.AdditionalGids, NewPrivileges: !p.NoNewPrivileges,
	}
	errs := p.faults()
	if s := p.ConsoleSize; s != nil {
		if s.Height > 1<<16-1 || s.Width > 1<<16-1 {
			errs = append(errs, fmt.Errorf("process.consoleSize %d by %d: no terminal is that large", s.Width, s.Height))
		}
		out.Rows, out.Cols = uint16(s.Height), uint16(s.Width)
	}
	if u := p.User.Umask; u != nil {
		if *u > 0o777 {
			errs = append(errs, fmt.Errorf("process.user.umask %#o: want at most 0777", *u))
		}
		out.Umask, out.UmaskGiven = *u, true
	}
	if n := p.OOMScoreAdj; n != nil {
		if *n < -1000 || *n > 1000 {
			errs = append(errs, fmt.Errorf("process.oomScoreAdj %d: want -1000 to 1000", *n))
		}
		out.OOMScoreAdj = int32(*n)
	}
	var err error
	out.Rights, err = p.Capabilities.rights()
	errs = append(errs, err)
	out.Rlimits, err = limits(p.Rlimits)
	errs = append(errs, err)
	return out, errors.Join(errs...)
}

// guards are profiles that engines give to whoever chose none. What they do is
// done by the guest's Guard.
var guards = []string{"", "unconfined", "cri-containerd.apparmor.d", "docker-default", "nerdctl-default"}

func (p *process) faults() (errs []error) {
	fault := func(format string, a ...any) { errs = append(errs, fmt.Errorf("process."+format, a...)) }
	switch {
	case len(p.Args) == 0:
		fault("args: nothing to run is named")
	case len(p.Args) > guestproto.MaxList || len(p.Env) > guestproto.MaxList || len(p.User.AdditionalGids) > guestproto.MaxList:
		fault("args, process.env, process.user.additionalGids: more than %d entries", guestproto.MaxList)
	}
	if !path.IsAbs(p.Cwd) || len(p.Cwd) > maxPath {
		fault("cwd %.256q: want an absolute path", p.Cwd)
	}
	if strings.ContainsRune(strings.Join(slices.Concat(p.Args, p.Env, []string{p.Cwd}), ""), 0) {
		fault("args, process.env, process.cwd: a value holds a NUL")
	}
	if !slices.Contains(guards, p.ApparmorProfile) {
		fault("apparmorProfile %.128q: the guest's kernel has the Guard instead: use a policy of it, or unconfined", p.ApparmorProfile)
	}
	return errs
}

// capabilityNames are in the order of their numbers.
var capabilityNames = strings.Fields(`CAP_CHOWN CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_FOWNER CAP_FSETID CAP_KILL CAP_SETGID
	CAP_SETUID CAP_SETPCAP CAP_LINUX_IMMUTABLE CAP_NET_BIND_SERVICE CAP_NET_BROADCAST CAP_NET_ADMIN CAP_NET_RAW CAP_IPC_LOCK
	CAP_IPC_OWNER CAP_SYS_MODULE CAP_SYS_RAWIO CAP_SYS_CHROOT CAP_SYS_PTRACE CAP_SYS_PACCT CAP_SYS_ADMIN CAP_SYS_BOOT
	CAP_SYS_NICE CAP_SYS_RESOURCE CAP_SYS_TIME CAP_SYS_TTY_CONFIG CAP_MKNOD CAP_LEASE CAP_AUDIT_WRITE CAP_AUDIT_CONTROL
	CAP_SETFCAP CAP_MAC_OVERRIDE CAP_MAC_ADMIN CAP_SYSLOG CAP_WAKE_ALARM CAP_BLOCK_SUSPEND CAP_AUDIT_READ CAP_PERFMON CAP_BPF
	CAP_CHECKPOINT_RESTORE`)

// rights are what a process may do. Asking for nothing is asking for none.
func (c *capabilities) rights() (guestproto.Rights, error) {
	out := guestproto.Rights{Given: true}
	if c == nil {
		return out, nil
	}
	var errs []error
	for _, set := range []struct {
		name string
		list []string
		bits *uint64
	}{
		{"bounding", c.Bounding, &out.Bounding}, {"effective", c.Effective, &out.Effective}, {"permitted", c.Permitted, &out.Permitted},
		{"inheritable", c.Inheritable, &out.Inheritable}, {"ambient", c.Ambient, &out.Ambient},
	} {
		for i, name := range set.list {
			n := slices.Index(capabilityNames, name)
			if n < 0 {
				errs = append(errs, fmt.Errorf("process.capabilities.%s[%d] %.64q: the guest's kernel has no such capability", set.name, i, name))
				continue
			}
			*set.bits |= 1 << n
		}
	}
	if more := out.Effective &^ out.Permitted; more != 0 {
		errs = append(errs, fmt.Errorf("process.capabilities.effective: %s is not permitted", capabilityName(more)))
	}
	if more := out.Ambient &^ (out.Permitted & out.Inheritable); more != 0 {
		errs = append(errs, fmt.Errorf("process.capabilities.ambient: %s is not both permitted and inheritable", capabilityName(more)))
	}
	return out, errors.Join(errs...)
}

// capabilityName is the first of a set.
func capabilityName(set uint64) string {
	for n, name := range capabilityNames {
		if set>>n&1 == 1 {
			return name
		}
	}
	return ""
}

const adminBit = 1 << 21 // CAP_SYS_ADMIN

// Privileged says whether the container was asked for as the CRI and its kin
// ask for a privileged one: with the right to administer, and with nothing
// masked, write-protected or filtered.
func (c *Config) Privileged() bool {
	l, r := c.spec.Linux, c.program.Rights
	return r.Bounding&r.Effective&adminBit != 0 && !c.spec.Process.NoNewPrivileges &&
		l.Seccomp == nil && len(l.MaskedPaths) == 0 && len(l.ReadonlyPaths) == 0
}

// limitNames are in the order of their numbers.
var limitNames = strings.Fields(`RLIMIT_CPU RLIMIT_FSIZE RLIMIT_DATA RLIMIT_STACK RLIMIT_CORE RLIMIT_RSS RLIMIT_NPROC
	RLIMIT_NOFILE RLIMIT_MEMLOCK RLIMIT_AS RLIMIT_LOCKS RLIMIT_SIGPENDING RLIMIT_MSGQUEUE RLIMIT_NICE RLIMIT_RTPRIO RLIMIT_RTTIME`)

func limits(list []rlimit) (out []guestproto.Rlimit, err error) {
	var errs []error
	for i, r := range list {
		n := slices.Index(limitNames, r.Type)
		switch {
		case n < 0:
			errs = append(errs, fmt.Errorf("process.rlimits[%d].type %.64q: there is no such limit", i, r.Type))
			continue
		case r.Soft > r.Hard:
			errs = append(errs, fmt.Errorf("process.rlimits[%d].soft %d: it is above hard %d", i, r.Soft, r.Hard))
		case slices.ContainsFunc(out, func(o guestproto.Rlimit) bool { return o.Kind == uint8(n) }):
			errs = append(errs, fmt.Errorf("process.rlimits[%d].type %q: it is there twice", i, r.Type))
		}
		out = append(out, guestproto.Rlimit{Kind: uint8(n), Soft: r.Soft, Hard: r.Hard})
	}
	return out, errors.Join(errs...)
}

// filter is the container's filter of system calls. Without a profile one of
// a pod has none, for then somebody has said so; nobody has where there is no
// pod, and the agent's own, of a few calls, holds.
func (s *spec) filter() (guestproto.Seccomp, error) {
	switch {
	case s.Linux.Seccomp != nil:
	case s.Annotations[annotationKind] != "":
		return guestproto.Seccomp{Mode: guestproto.SeccompNone}, nil
	default:
		return guestproto.Seccomp{}, nil
	}
	f, err := seccomp.Compile(s.Linux.Seccomp)
	if err != nil {
		return guestproto.Seccomp{}, fmt.Errorf("linux.seccomp.%w", err)
	}
	return guestproto.Seccomp{Mode: guestproto.SeccompFilter, Flags: f.Flags, Filter: f.Bytes()}, nil
}
