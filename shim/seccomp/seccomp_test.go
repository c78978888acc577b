package seccomp

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
)

// entry is struct seccomp_data, without the instruction pointer.
type entry struct {
	number, arch uint32
	args         [6]uint64
}

// run is classic BPF as the kernel runs it, as far as filters use it.
func run(program []Instruction, e entry) (uint32, error) {
	var a uint32
	for pc, steps := 0, 0; pc < len(program); steps++ {
		i := program[pc]
		pc++
		jump := func(holds bool) {
			if holds {
				pc += int(i.JT)
			} else {
				pc += int(i.JF)
			}
		}
		switch i.Code {
		case opLoad:
			switch {
			case i.K == offNumber:
				a = e.number
			case i.K == offArch:
				a = e.arch
			case i.K >= offArgs && i.K < offArgs+48 && i.K%4 == 0:
				a = uint32(e.args[(i.K-offArgs)/8] >> (8 * ((i.K - offArgs) % 8)))
			default:
				return 0, fmt.Errorf("load of %d", i.K)
			}
		case opAnd:
			a &= i.K
		case opJump:
			pc += int(i.K)
		case opEqual:
			jump(a == i.K)
		case opAbove:
			jump(a > i.K)
		case opAtOr:
			jump(a >= i.K)
		case opRet:
			return i.K, nil
		default:
			return 0, fmt.Errorf("code %#x", i.Code)
		}
	}
	return 0, fmt.Errorf("the program does not end")
}

// decide is what a profile says of a call, as the package's comments have it,
// written without regard to how filters work.
func decide(p *Profile, e entry) uint32 {
	act := func(name string, errno *uint) uint32 {
		v, err := action("", name, errno)
		if err != nil {
			panic(err)
		}
		return v
	}
	byDefault := act(p.DefaultAction, p.DefaultErrnoRet)
	amd := e.arch == archX8664
	switch {
	case e.arch != archX8664 && e.arch != archI386, !amd && !slices.Contains(p.Architectures, "SCMP_ARCH_X86"):
		return retKillProcess
	case amd && e.number >= x32:
		return retErrno | enosys
	}
	newest := -1
	var always, sometimes []uint32
	for _, s := range p.Syscalls {
		act := act(s.Action, s.ErrnoRet)
		for _, name := range s.Names {
			number := int(numberOf(name, amd))
			newest = max(newest, number)
			if number == int(e.number) && act != byDefault {
				if len(s.Args) == 0 {
					always = append(always, act)
				} else if matches(s.Args, e, amd) {
					sometimes = append(sometimes, act)
				}
			}
			if amd {
				continue
			}
			for _, m := range multiplexed {
				by := numberOf(m.by, false)
				if m.name != name || len(s.Args) > 0 && !stricter(act, byDefault) {
					continue
				}
				newest = max(newest, int(by))
				if int(by) == int(e.number) && e.args[0]&0xffff == m.number && act != byDefault {
					sometimes = append(sometimes, act)
				}
			}
		}
	}
	switch {
	case newest >= 0 && int64(e.number) > int64(newest) && byDefault != retAllow && byDefault != retLog:
		return retErrno | enosys
	case len(always) > 0:
		return always[0]
	case len(sometimes) > 0:
		return sometimes[0]
	}
	return byDefault
}

func numberOf(name string, amd bool) int16 {
	c, _ := find(name)
	if amd {
		return c.amd
	}
	return c.i86
}

func matches(args []Arg, e entry, amd bool) bool {
	all, any, seen, twice := true, false, map[uint]bool{}, false
	for _, a := range args {
		have, v, two := e.args[a.Index], a.Value, a.ValueTwo
		if !amd {
			have, v, two = uint64(uint32(have)), uint64(uint32(v)), uint64(uint32(two))
		}
		holds := map[string]bool{
			"SCMP_CMP_NE": have != v, "SCMP_CMP_LT": have < v, "SCMP_CMP_LE": have <= v, "SCMP_CMP_EQ": have == v,
			"SCMP_CMP_GE": have >= v, "SCMP_CMP_GT": have > v, "SCMP_CMP_MASKED_EQ": have&v == two&v,
		}[a.Op]
		all, any = all && holds, any || holds
		twice = twice || seen[a.Index]
		seen[a.Index] = true
	}
	return all && !twice || any && twice
}

// probe asks filter and profile about a call and compares.
func probe(t *testing.T, p *Profile, f Filter, e entry) {
	t.Helper()
	got, err := run(f.Instructions, e)
	if want := decide(p, e); err != nil || got != want {
		t.Fatalf("call %d of %#x with %#x: %#x, %v, want %#x", e.number, e.arch, e.args, got, err, want)
	}
}

// sweep probes every number of every ABI, with arguments at and around every
// value that the profile names.
func sweep(t *testing.T, p *Profile, f Filter, r *rand.Rand) {
	t.Helper()
	values := []uint64{0, 1, 1 << 31, 1<<32 - 1, 1 << 32, 1<<64 - 1}
	named := map[uint32]int{} // with conditions
	for _, s := range p.Syscalls {
		for _, name := range s.Names {
			if len(s.Args) > 0 {
				named[uint32(numberOf(name, true))], named[uint32(numberOf(name, false))] = 1, 1
			}
		}
		for _, a := range s.Args {
			values = append(values, a.Value, a.Value-1, a.Value+1, a.ValueTwo, a.Value^1<<40, a.ValueTwo|r.Uint64()&^a.Value)
		}
	}
	numbers := []uint32{500, 0x7fffffff, 0xffffffff, x32, x32 + 1, x32 + 512}
	for n := range uint32(480) {
		numbers = append(numbers, n)
	}
	for _, arch := range []uint32{archX8664, archI386, 0xc00000b7, 0} {
		for _, n := range numbers {
			for range 2 + 30*named[n] {
				e := entry{number: n, arch: arch}
				for i := range e.args {
					e.args[i] = values[r.IntN(len(values))]
				}
				probe(t, p, f, e)
			}
		}
	}
}

func engineProfile(t testing.TB) *Profile {
	t.Helper()
	raw, err := os.ReadFile("testdata/engine.json")
	if err != nil {
		t.Fatal(err)
	}
	var p Profile
	if err := json.Unmarshal(raw, &p); err != nil {
		t.Fatal(err)
	}
	return &p
}

// TestEngineProfile compiles a profile such as container engines give.
func TestEngineProfile(t *testing.T) {
	p := engineProfile(t)
	f, err := Compile(p)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d instructions", len(f.Instructions))
	if n := len(f.Instructions); n > 600 || len(f.Bytes()) != 8*n {
		t.Errorf("%d instructions, %d bytes", n, len(f.Bytes()))
	}
	sweep(t, p, f, rand.New(rand.NewPCG(1, 2)))
	const eperm, enosys = retErrno | eperm, retErrno | enosys
	for _, c := range []struct {
		name string
		args [6]uint64
		amd  uint32
		i386 uint32
	}{
		{"read", [6]uint64{}, retAllow, retAllow},
		{"mount", [6]uint64{}, eperm, eperm},
		{"clone", [6]uint64{0x11}, retAllow, retAllow},
		{"clone", [6]uint64{0x10000000}, eperm, eperm},
		{"clone3", [6]uint64{}, enosys, enosys},
		{"socket", [6]uint64{2}, retAllow, retAllow},
		{"socket", [6]uint64{40}, eperm, eperm},
		{"personality", [6]uint64{0xffffffff}, retAllow, retAllow},
		{"personality", [6]uint64{0x1ffffffff}, eperm, retAllow}, // an argument has 32 bits there
		{"personality", [6]uint64{1}, eperm, eperm},
		{"ptrace", [6]uint64{16}, retAllow, retAllow},
	} {
		for arch, want := range map[uint32]uint32{archX8664: c.amd, archI386: c.i386} {
			got, err := run(f.Instructions, entry{uint32(numberOf(c.name, arch == archX8664)), arch, c.args})
			if err != nil || got != want {
				t.Errorf("%s %#x on %#x: %#x, %v, want %#x", c.name, c.args, arch, got, err, want)
			}
		}
	}
}

// TestSocketcall: what a profile refuses cannot be had by the call that
// multiplexes.
func TestSocketcall(t *testing.T) {
	p := &Profile{
		DefaultAction: "SCMP_ACT_ALLOW", Architectures: []string{"SCMP_ARCH_X86"},
		Syscalls: []Syscall{
			{Names: []string{"socket"}, Action: "SCMP_ACT_ERRNO", Args: []Arg{{Index: 0, Value: 16, Op: "SCMP_CMP_EQ"}}},
			{Names: []string{"shmget"}, Action: "SCMP_ACT_KILL"},
		},
	}
	f, err := Compile(p)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		arg  uint64
		want uint32
	}{
		{"socketcall", 1, retErrno | eperm}, {"socketcall", 2, retAllow},
		{"ipc", 23, retKillThread}, {"ipc", 1<<16 | 23, retKillThread}, {"ipc", 24, retAllow},
	} {
		got, err := run(f.Instructions, entry{uint32(numberOf(c.name, false)), archI386, [6]uint64{c.arg}})
		if err != nil || got != c.want {
			t.Errorf("%s %#x: %#x, %v, want %#x", c.name, c.arg, got, err, c.want)
		}
	}
}

func number(n uint) *uint { return &n }

func TestRefuses(t *testing.T) {
	for _, c := range []struct {
		p    Profile
		want string
	}{
		{Profile{}, `defaultAction "": there is no such action`},
		{Profile{DefaultAction: "SCMP_ACT_TRACE"}, `defaultAction "SCMP_ACT_TRACE": nobody traces`},
		{Profile{DefaultAction: "SCMP_ACT_NOTIFY"}, "cannot be handed"},
		{Profile{DefaultAction: "SCMP_ACT_ERRNO", DefaultErrnoRet: number(4096)}, "defaultErrnoRet 4096"},
		{Profile{DefaultAction: "SCMP_ACT_ALLOW", DefaultErrnoRet: number(1)}, "defaultErrnoRet 1: SCMP_ACT_ALLOW gives no error"},
		{Profile{DefaultAction: "SCMP_ACT_ALLOW", Architectures: []string{"SCMP_ARCH_Z80"}}, `architectures[0] "SCMP_ARCH_Z80"`},
		{Profile{DefaultAction: "SCMP_ACT_ALLOW", Flags: []string{"X"}}, `flags[0] "X"`},
		{Profile{DefaultAction: "SCMP_ACT_ALLOW", Flags: []string{"SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"}}, "flags[0]"},
		{Profile{DefaultAction: "SCMP_ACT_ALLOW", ListenerPath: "/x"}, "listenerPath"},
		{Profile{DefaultAction: "SCMP_ACT_ALLOW", Syscalls: make([]Syscall, maxRules+1)}, "4097 rules"},
		{Profile{DefaultAction: "SCMP_ACT_ALLOW", Syscalls: []Syscall{{}}}, "syscalls[0].names"},
		{Profile{DefaultAction: "SCMP_ACT_ALLOW", Syscalls: []Syscall{{Names: []string{"read"}, Action: "no"}}}, `syscalls[0].action "no"`},
		{Profile{DefaultAction: "SCMP_ACT_ALLOW", Syscalls: []Syscall{{Names: []string{"raed"}, Action: "SCMP_ACT_ERRNO"}}}, `syscalls[0].names[0] "raed"`},
		{Profile{DefaultAction: "SCMP_ACT_ALLOW", Syscalls: []Syscall{{Names: []string{"read"}, Action: "SCMP_ACT_ERRNO",
			Args: []Arg{{Index: 6, Op: "SCMP_CMP_EQ"}}}}}, "syscalls[0].args[0].index 6"},
		{Profile{DefaultAction: "SCMP_ACT_ALLOW", Syscalls: []Syscall{{Names: []string{"read"}, Action: "SCMP_ACT_ERRNO",
			Args: []Arg{{Op: "=="}}}}}, `syscalls[0].args[0].op "=="`},
		{Profile{DefaultAction: "SCMP_ACT_ALLOW", Syscalls: []Syscall{{Names: slices.Repeat([]string{"read"}, maxSize+1), Action: "SCMP_ACT_ERRNO"}}}, "names together"},
		{Profile{DefaultAction: "SCMP_ACT_ALLOW", Syscalls: []Syscall{{Names: []string{"read"}, Action: "SCMP_ACT_ERRNO",
			Args: slices.Repeat([]Arg{{Op: "SCMP_CMP_EQ"}}, maxSize)}}}, "the filter has"},
	} {
		if _, err := Compile(&c.p); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v, want %q", err, c.want)
		}
	}
	// A name of another machine is no reason to refuse, and neither is one that
	// nobody knows where not letting it through is what happens.
	for _, s := range []Syscall{
		{Names: []string{"s390_pci_mmio_read"}, Action: "SCMP_ACT_KILL"}, {Names: []string{"invented"}, Action: "SCMP_ACT_ALLOW"},
	} {
		if _, err := Compile(&Profile{DefaultAction: "SCMP_ACT_ERRNO", Syscalls: []Syscall{s}}); err != nil {
			t.Error(err)
		}
	}
}

// random makes a profile of few calls and values, so that rules meet.
func random(r *rand.Rand) *Profile {
	pick := func(list []string) string { return list[r.IntN(len(list))] }
	actions := []string{"SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_LOG", "SCMP_ACT_TRAP", "SCMP_ACT_KILL_PROCESS"}
	names := []string{"read", "write", "clone", "socket", "socketcall", "shmat", "ipc", "semtimedop_time64", "personality", "listns", "execveat"}
	values := []uint64{0, 1, 2, 40, 1 << 31, 1<<32 - 1, 1 << 32, 1<<40 + 5, 1<<64 - 1, 0x7e020000}
	p := &Profile{DefaultAction: pick(actions)}
	if r.IntN(2) == 0 {
		p.Architectures = []string{"SCMP_ARCH_X86"}
	}
	for range r.IntN(12) {
		s := Syscall{Action: pick(actions)}
		for range 1 + r.IntN(3) {
			s.Names = append(s.Names, pick(names))
		}
		if s.Action == "SCMP_ACT_ERRNO" && r.IntN(2) == 0 {
			s.ErrnoRet = number(uint(r.IntN(4096)))
		}
		for range r.IntN(4) {
			s.Args = append(s.Args, Arg{uint(r.IntN(6)), values[r.IntN(len(values))], values[r.IntN(len(values))], pick(operators)})
		}
		p.Syscalls = append(p.Syscalls, s)
	}
	return p
}

// TestRandomProfiles compares filters with what their profiles say.
func TestRandomProfiles(t *testing.T) {
	for seed := range uint64(40) {
		r := rand.New(rand.NewPCG(seed, 0))
		p := random(r)
		f, err := Compile(p)
		if err != nil {
			t.Fatal(err)
		}
		sweep(t, p, f, r)
	}
}

// FuzzCompile: what compiles is what the kernel takes and decides as said.
func FuzzCompile(f *testing.F) {
	raw, err := os.ReadFile("testdata/engine.json")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw, uint32(56), uint32(archX8664), uint64(0x10000000))
	for seed := range uint64(8) {
		raw, err := json.Marshal(random(rand.New(rand.NewPCG(seed, 0))))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw, uint32(0), uint32(archI386), uint64(40))
	}
	f.Fuzz(func(t *testing.T, raw []byte, call, arch uint32, arg uint64) {
		var p Profile
		if json.Unmarshal(raw, &p) != nil {
			return
		}
		filter, err := Compile(&p)
		if err != nil {
			return
		}
		if n := len(filter.Instructions); n == 0 || n > MaxInstructions {
			t.Fatalf("%d instructions", n)
		}
		for pc, i := range filter.Instructions { // the kernel's own check
			left := len(filter.Instructions) - pc - 1
			if i.Code&7 == opJump && (i.Code == opJump && int(i.K) >= left || i.Code != opJump && (int(i.JT) >= left || int(i.JF) >= left)) {
				t.Fatalf("instruction %d jumps past the end", pc)
			}
		}
		probe(t, &p, filter, entry{call, arch, [6]uint64{arg, arg, arg, arg, arg, arg}})
	})
}
