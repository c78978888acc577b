// Package seccomp compiles the seccomp profile of an OCI configuration into
// the filter that a guest's kernel runs: classic BPF for x86-64, with the
// 32-bit ABI beside it.
//
// It is not libseccomp: it knows one machine, has no state and refuses what it
// cannot do as asked. What it accepts decides as runc with libseccomp decides,
// so a profile that was tried there holds here.
package seccomp

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Profile is linux.seccomp of an OCI configuration.
type Profile struct {
	DefaultAction    string    `json:"defaultAction"`
	DefaultErrnoRet  *uint     `json:"defaultErrnoRet"`
	Architectures    []string  `json:"architectures"`
	Flags            []string  `json:"flags"`
	ListenerPath     string    `json:"listenerPath"`
	ListenerMetadata string    `json:"listenerMetadata"`
	Syscalls         []Syscall `json:"syscalls"`
}

// Syscall is one rule: what becomes of calls of these names if all arguments
// are as said.
type Syscall struct {
	Names    []string `json:"names"`
	Action   string   `json:"action"`
	ErrnoRet *uint    `json:"errnoRet"`
	Args     []Arg    `json:"args"`
}

// Arg compares an argument of a call.
type Arg struct {
	Index    uint   `json:"index"`
	Value    uint64 `json:"value"`
	ValueTwo uint64 `json:"valueTwo"`
	Op       string `json:"op"`
}

// Filter is what seccomp(2) takes.
type Filter struct {
	// Flags of SECCOMP_SET_MODE_FILTER.
	Flags        uint32
	Instructions []Instruction
}

// Instruction is one of classic BPF: struct sock_filter.
type Instruction struct {
	Code   uint16
	JT, JF uint8
	K      uint32
}

// Bytes is the program as an array of struct sock_filter.
func (f Filter) Bytes() []byte {
	b := make([]byte, 0, 8*len(f.Instructions))
	for _, i := range f.Instructions {
		b = append(b, byte(i.Code), byte(i.Code>>8), i.JT, i.JF, byte(i.K), byte(i.K>>8), byte(i.K>>16), byte(i.K>>24))
	}
	return b
}

// Bounds on a profile. The kernel takes no longer program.
const (
	MaxInstructions = 4096
	maxRules        = 4096
	maxSize         = 4096 // names times conditions
	maxErrno        = 4095
)

// What a filter says, for a call: the action in the upper half, with data.
const (
	retKillThread  = 0x00000000
	retTrap        = 0x00030000
	retErrno       = 0x00050000
	retLog         = 0x7ffc0000
	retAllow       = 0x7fff0000
	retKillProcess = 0x80000000

	eperm  = 1
	enosys = 38
)

// Flags of the system call.
const (
	flagLog       = 1 << 1
	flagSpecAllow = 1 << 2
)

// Compile makes the filter of a profile. An error names the field, below
// linux.seccomp, that cannot be done.
func Compile(p *Profile) (Filter, error) {
	c, err := check(p)
	if err != nil {
		return Filter{}, err
	}
	f := Filter{Flags: c.flags, Instructions: c.program()}
	if n := len(f.Instructions); n > MaxInstructions {
		return Filter{}, fmt.Errorf("syscalls: the filter has %d instructions, the kernel takes %d: use fewer conditions", n, MaxInstructions)
	}
	return f, nil
}

// checked is a profile that can be done.
type checked struct {
	byDefault uint32
	flags     uint32
	i386      bool // the profile speaks of 32-bit calls too
	rules     []rule
}

// rule is one way to decide a call of one number.
type rule struct {
	names []string
	act   uint32
	// when holds alternatives: one whose conditions all hold is enough. None:
	// always.
	when [][]Arg
}

func check(p *Profile) (checked, error) {
	var c checked
	var errs []error
	fault := func(err error) {
		if err != nil {
			errs = append(errs, err)
		}
	}
	var err error
	c.byDefault, err = action("default", p.DefaultAction, p.DefaultErrnoRet)
	fault(err)
	c.i386, err = architectures(p.Architectures)
	fault(err)
	c.flags, err = flags(p.Flags)
	fault(err)
	if p.ListenerPath != "" || p.ListenerMetadata != "" {
		fault(errors.New("listenerPath: calls of a sandbox cannot be handed to a process of the host: remove it"))
	}
	if len(p.Syscalls) > maxRules {
		return c, fmt.Errorf("syscalls: %d rules are more than %d", len(p.Syscalls), maxRules)
	}
	size := 0
	for i, s := range p.Syscalls {
		if size += len(s.Names) * max(1, len(s.Args)); size > maxSize {
			return c, fmt.Errorf("syscalls: they have more than %d names together, times conditions", maxSize)
		}
		r, err := c.rule(s)
		if err != nil {
			fault(fmt.Errorf("syscalls[%d].%w", i, err))
		}
		c.rules = append(c.rules, r)
	}
	return c, errors.Join(errs...)
}

// action reads the name of one. which is "default" or empty.
func action(which, name string, errnoRet *uint) (uint32, error) {
	field, errnoField := "action", "errnoRet"
	if which != "" {
		field, errnoField = which+"Action", which+"ErrnoRet"
	}
	var act uint32
	switch name {
	case "SCMP_ACT_ERRNO":
		errno := uint(eperm)
		if errnoRet != nil {
			errno = *errnoRet
		}
		if errno > maxErrno {
			return 0, fmt.Errorf("%s %d: no error has a number above %d", errnoField, errno, maxErrno)
		}
		return retErrno | uint32(errno), nil
	case "SCMP_ACT_ALLOW":
		act = retAllow
	case "SCMP_ACT_LOG":
		act = retLog
	case "SCMP_ACT_TRAP":
		act = retTrap
	case "SCMP_ACT_KILL", "SCMP_ACT_KILL_THREAD":
		act = retKillThread
	case "SCMP_ACT_KILL_PROCESS":
		act = retKillProcess
	case "SCMP_ACT_TRACE":
		return 0, fmt.Errorf("%s %q: nobody traces the processes of a sandbox: use SCMP_ACT_ERRNO", field, name)
	case "SCMP_ACT_NOTIFY":
		return 0, fmt.Errorf("%s %q: calls of a sandbox cannot be handed to a process of the host: use SCMP_ACT_ERRNO", field, name)
	default:
		return 0, fmt.Errorf("%s %.64q: there is no such action", field, name)
	}
	if errnoRet != nil && *errnoRet != 0 {
		return 0, fmt.Errorf("%s %d: %s gives no error: remove it", errnoField, *errnoRet, name)
	}
	return act, nil
}

// others are the architectures of the specification that no call of this
// machine can be of.
var others = strings.Fields("SCMP_ARCH_ARM SCMP_ARCH_AARCH64 SCMP_ARCH_MIPS SCMP_ARCH_MIPS64 SCMP_ARCH_MIPS64N32 " +
	"SCMP_ARCH_MIPSEL SCMP_ARCH_MIPSEL64 SCMP_ARCH_MIPSEL64N32 SCMP_ARCH_PPC SCMP_ARCH_PPC64 SCMP_ARCH_PPC64LE SCMP_ARCH_S390 " +
	"SCMP_ARCH_S390X SCMP_ARCH_PARISC SCMP_ARCH_PARISC64 SCMP_ARCH_RISCV64 SCMP_ARCH_LOONGARCH64 SCMP_ARCH_M68K SCMP_ARCH_SH SCMP_ARCH_SHEB")

// architectures says whether 32-bit calls are decided by the rules too; else
// they kill. The machine's own ABI always is.
func architectures(list []string) (i386 bool, err error) {
	for i, a := range list {
		switch {
		case a == "SCMP_ARCH_X86":
			i386 = true
		case a == "SCMP_ARCH_X86_64", a == "SCMP_ARCH_X32", slices.Contains(others, a):
		default:
			return false, fmt.Errorf("architectures[%d] %.64q: there is no such architecture", i, a)
		}
	}
	return i386, nil
}

func flags(list []string) (bits uint32, err error) {
	for i, f := range list {
		switch f {
		case "SECCOMP_FILTER_FLAG_TSYNC": // the program's exec ends other threads
		case "SECCOMP_FILTER_FLAG_LOG":
			bits |= flagLog
		case "SECCOMP_FILTER_FLAG_SPEC_ALLOW":
			bits |= flagSpecAllow
		case "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV":
			return 0, fmt.Errorf("flags[%d] %q: it is for filters that notify, which are not possible: remove it", i, f)
		default:
			return 0, fmt.Errorf("flags[%d] %.64q: there is no such flag", i, f)
		}
	}
	return bits, nil
}

func (c *checked) rule(s Syscall) (r rule, err error) {
	if len(s.Names) == 0 {
		return r, errors.New("names: a rule needs one")
	}
	if r.act, err = action("", s.Action, s.ErrnoRet); err != nil {
		return r, err
	}
	for i, name := range s.Names {
		// A call that no table has cannot be held back by its number. One that
		// is only let through then gets the default, which is what holds it.
		if !known(name) && stricter(r.act, c.byDefault) {
			return r, fmt.Errorf("names[%d] %.64q: there is no such system call, so it cannot be refused: remove it", i, name)
		}
	}
	r.names = s.Names
	r.when, err = alternatives(s.Args)
	return r, err
}

// stricter says whether a stops more than b does.
func stricter(a, b uint32) bool {
	order := []uint32{retAllow, retLog, retErrno, retTrap, retKillThread, retKillProcess}
	rank := func(act uint32) int { return slices.Index(order, act&0xffff0000) }
	return rank(a) > rank(b)
}

// alternatives reads the conditions of a rule. As with runc, all must hold,
// unless two are of one argument: then each is enough.
func alternatives(args []Arg) ([][]Arg, error) {
	seen, twice := [6]bool{}, false
	for i, a := range args {
		if a.Index > 5 {
			return nil, fmt.Errorf("args[%d].index %d: a system call has arguments 0 to 5", i, a.Index)
		}
		if !slices.Contains(operators, a.Op) {
			return nil, fmt.Errorf("args[%d].op %.64q: there is no such comparison", i, a.Op)
		}
		twice = twice || seen[a.Index]
		seen[a.Index] = true
	}
	switch {
	case len(args) == 0:
		return nil, nil
	case !twice:
		return [][]Arg{args}, nil
	}
	var each [][]Arg
	for _, a := range args {
		each = append(each, []Arg{a})
	}
	return each, nil
}

var operators = strings.Fields("SCMP_CMP_NE SCMP_CMP_LT SCMP_CMP_LE SCMP_CMP_EQ SCMP_CMP_GE SCMP_CMP_GT SCMP_CMP_MASKED_EQ")
