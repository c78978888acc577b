package seccomp

import "slices"

// Codes of classic BPF, and what of struct seccomp_data is at which offset.
const (
	opLoad  = 0x20 // A = data[K:]
	opAnd   = 0x54 // A &= K
	opJump  = 0x05
	opEqual = 0x15
	opAbove = 0x25 // A > K
	opAtOr  = 0x35 // A >= K
	opRet   = 0x06

	offNumber = 0
	offArch   = 4
	offArgs   = 16

	archX8664 = 0xc000003e
	archI386  = 0x40000003
	x32       = 0x40000000 // bit of the number of an x32 call
)

// span is what becomes of calls from a number up to the next span's.
type span struct {
	from uint32
	code []Instruction // ends in every case
}

// program decides by architecture, then by number, then by arguments. Its parts
// are pieces of code that end in every case, so they can be put one behind the
// other; jumps go forward only.
func (c *checked) program() []Instruction {
	amd := append([]Instruction{{opLoad, 0, 0, offNumber}}, search(c.spans(true))...)
	i386 := ret(retKillProcess)
	if c.i386 {
		i386 = append([]Instruction{{opLoad, 0, 0, offNumber}}, search(c.spans(false))...)
	}
	out := []Instruction{{opLoad, 0, 0, offArch}}
	rest := branch(opEqual, archI386, i386, ret(retKillProcess))
	return append(out, branch(opEqual, archX8664, amd, rest)...)
}

func ret(act uint32) []Instruction { return []Instruction{{opRet, 0, 0, act}} }

// branch goes on with yes if A and k compare, else with no.
func branch(op uint16, k uint32, yes, no []Instruction) []Instruction {
	head := []Instruction{{op, uint8(len(no) & 0xff), 0, k}}
	if len(no) > 255 {
		head = []Instruction{{op, 0, 1, k}, {opJump, 0, 0, uint32(len(no))}}
	}
	return slices.Concat(head, no, yes)
}

// search finds the span of the number in A by halves.
func search(spans []span) []Instruction {
	if len(spans) == 1 {
		return spans[0].code
	}
	half := len(spans) / 2
	return branch(opAtOr, spans[half].from, search(spans[half:]), search(spans[:half]))
}

// spans cuts the numbers of an ABI into ranges that are treated alike.
func (c *checked) spans(amd bool) []span {
	byNumber := map[uint32][]rule{}
	for _, r := range c.rules {
		for _, name := range r.names {
			for number, when := range c.numbers(name, r, amd) {
				byNumber[number] = append(byNumber[number], rule{act: r.act, when: when})
			}
		}
	}
	var out []span
	add := func(from uint32, code []Instruction) {
		if len(out) > 0 && slices.Equal(out[len(out)-1].code, code) {
			return
		}
		out = append(out, span{from, code})
	}
	last := uint32(0)
	for number := range byNumber {
		last = max(last, number)
	}
	for n := range last + 1 {
		add(n, c.decide(byNumber[n], amd))
	}
	if len(byNumber) > 0 { // else nothing is newer than what is named
		add(last+1, ret(c.unheard()))
	}
	if amd {
		// The guest's kernel has no x32, and would say so.
		add(x32, ret(retErrno|enosys))
	}
	return out
}

// unheard is what becomes of calls newer than any the profile names. As with
// runc, what is not let through is not there: a C library then goes on with an
// older call, where a refusal would end it.
func (c *checked) unheard() uint32 {
	if c.byDefault == retAllow || c.byDefault == retLog {
		return c.byDefault
	}
	return retErrno | enosys
}

// numbers are those that a rule for a name decides, each with its conditions.
func (c *checked) numbers(name string, r rule, amd bool) map[uint32][][]Arg {
	out := map[uint32][][]Arg{}
	entry, _ := find(name)
	if amd {
		if entry.amd >= 0 {
			out[uint32(entry.amd)] = r.when
		}
		return out
	}
	if entry.i86 >= 0 {
		out[uint32(entry.i86)] = r.when
	}
	for _, m := range multiplexed {
		// The arguments of such a call lie in memory, where no filter sees
		// them: what refuses some refuses all, what permits some permits none.
		if m.name != name || r.when != nil && !stricter(r.act, c.byDefault) {
			continue
		}
		by, _ := find(m.by)
		out[uint32(by.i86)] = [][]Arg{{{Index: 0, Value: 0xffff, ValueTwo: m.number, Op: "SCMP_CMP_MASKED_EQ"}}}
	}
	return out
}

// decide is the code for one number. As with libseccomp, a rule without
// conditions decides alone; else the first in the profile that holds.
func (c *checked) decide(rules []rule, amd bool) []Instruction {
	rules = slices.DeleteFunc(slices.Clone(rules), func(r rule) bool { return r.act == c.byDefault })
	for _, r := range rules {
		if r.when == nil {
			return ret(r.act)
		}
	}
	var out []Instruction
	for _, r := range rules {
		for _, all := range r.when {
			out = append(out, conditions(all, r.act, amd)...)
		}
	}
	return append(out, ret(c.byDefault)...)
}

// conditions ends with act if all hold, and else goes on behind itself.
func conditions(all []Arg, act uint32, amd bool) []Instruction {
	code := ret(act)
	for _, a := range slices.Backward(all) {
		code = append(compare(a, uint8(len(code)), amd), code...)
	}
	return code
}

// compare goes on behind itself if a holds, and else fail instructions further.
// The arguments of a 32-bit call have 32 bits, and so has then the value.
func compare(a Arg, fail uint8, amd bool) []Instruction {
	value, mask := a.Value, ^uint64(0)
	if a.Op == "SCMP_CMP_MASKED_EQ" {
		value, mask = a.ValueTwo&a.Value, a.Value
	}
	low := half(a, offArgs+8*uint32(a.Index), uint32(mask))
	low = append(low, final(a.Op, uint32(value), fail))
	if !amd {
		return low
	}
	// The upper half decides alone unless it is equal.
	upper, high := uint32(value>>32), half(a, offArgs+8*uint32(a.Index)+4, uint32(mask>>32))
	holds, fails := uint8(len(low)), uint8(len(low))+fail
	switch a.Op {
	case "SCMP_CMP_NE":
		high = append(high, Instruction{opEqual, 0, holds, upper})
	case "SCMP_CMP_GT", "SCMP_CMP_GE":
		high = append(high, Instruction{opAbove, holds + 1, 0, upper}, Instruction{opEqual, 0, fails, upper})
	case "SCMP_CMP_LT", "SCMP_CMP_LE":
		high = append(high, Instruction{opAbove, fails + 1, 0, upper}, Instruction{opEqual, 0, holds, upper})
	default:
		high = append(high, Instruction{opEqual, 0, fails, upper})
	}
	return append(high, low...)
}

// half loads half of an argument.
func half(a Arg, offset, mask uint32) []Instruction {
	code := []Instruction{{opLoad, 0, 0, offset}}
	if a.Op == "SCMP_CMP_MASKED_EQ" {
		code = append(code, Instruction{opAnd, 0, 0, mask})
	}
	return code
}

// final compares the lower halves when the upper are equal.
func final(op string, value uint32, fail uint8) Instruction {
	switch op {
	case "SCMP_CMP_NE":
		return Instruction{opEqual, fail, 0, value}
	case "SCMP_CMP_GT":
		return Instruction{opAbove, 0, fail, value}
	case "SCMP_CMP_GE":
		return Instruction{opAtOr, 0, fail, value}
	case "SCMP_CMP_LT":
		return Instruction{opAtOr, fail, 0, value}
	case "SCMP_CMP_LE":
		return Instruction{opAbove, fail, 0, value}
	}
	return Instruction{opEqual, 0, fail, value}
}
