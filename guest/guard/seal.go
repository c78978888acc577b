package guard

import (
	"strconv"
	"syscall"
)

// A bundle may end with whose policies the guest takes: it lies in what was
// measured when the guest booted. Then a policy is taken only under a seal:
// signed by that key, for this kernel and workload, and newer than the one
// before. What is signed begins with words of its own, so that it is no other
// message of that key.
const (
	trustMagic  = "HBTRUST\x01"
	sealMagic   = "HBSEAL1\x01"
	sealWords   = "hauberk.dev guard policy 1\x00"
	keySize     = 32
	sealSize    = 64
	maxWorkload = 255
)

// trust is whose policies are taken.
type trust struct {
	key      []byte // none: anybody's who reaches the agent's port
	kernel   string
	workload string // empty: that of the first policy
	least    uint64 // generation
}

// parseTrust reads what follows the programs of a bundle.
func parseTrust(b []byte, kernel string) (t trust, err error) {
	if len(b) == 0 {
		return t, nil
	}
	c := &cursor{b: b}
	if string(c.take(uint32(len(trustMagic)))) != trustMagic {
		return t, fail("read", "trust of guard bundle", syscall.EPROTONOSUPPORT)
	}
	t = trust{key: append([]byte(nil), c.take(keySize)...), kernel: string(append([]byte(nil), kernel...)), least: c.u64()}
	t.workload = string(append([]byte(nil), c.text()...))
	if c.bad || len(c.b) != 0 || len(t.workload) > maxWorkload {
		return trust{}, fail("read", "trust of guard bundle", syscall.EBADMSG)
	}
	return t, nil
}

// Why a sealed policy was not taken, as package guard names it.
const (
	sealMissing = iota + 1
	sealUnread
	sealSignature
	sealKernel
	sealWorkload
	sealOld
)

// sealed is a policy under a seal.
type sealed struct {
	kernel, workload string
	generation       uint64
	blob             []byte
}

func parseSealed(b []byte) (s sealed, message, signature []byte, ok bool) {
	c := &cursor{b: b}
	c.take(uint32(len(sealMagic)))
	signature = c.take(sealSize)
	message = append([]byte(sealWords), c.b...)
	s = sealed{kernel: c.text(), workload: c.text(), generation: c.u64()}
	s.blob = c.take(c.u32())
	return s, message, signature, !c.bad && len(c.b) == 0 && s.workload != "" && len(s.workload) <= maxWorkload
}

// open takes the policy out of its seal, if there must be one. Nothing in it is
// believed before the signature is.
func (t *trust) open(b []byte, generation, now uint64) (blob []byte, workload string, why uint32, err error) {
	if t.key == nil {
		return b, "", 0, nil
	}
	refuse := func(why uint32, verb, object string, cause syscall.Errno) ([]byte, string, uint32, error) {
		return nil, "", why, fail(verb, object, cause)
	}
	if len(b) < len(sealMagic) || string(b[:len(sealMagic)]) != sealMagic {
		return refuse(sealMissing, "take", "a policy that is not signed", syscall.ENOKEY)
	}
	s, message, signature, ok := parseSealed(b)
	switch {
	case !verify(t.key, message, signature):
		return refuse(sealSignature, "take", "a policy that another key signed, or that was changed", syscall.EKEYREJECTED)
	case !ok:
		return refuse(sealUnread, "read", "sealed policy", syscall.EBADMSG)
	case s.kernel != t.kernel:
		return refuse(sealKernel, "take a policy that was signed for kernel", strconv.Quote(s.kernel), syscall.ENOEXEC)
	case t.workload != "" && s.workload != t.workload:
		return refuse(sealWorkload, "take a policy that was signed for", strconv.Quote(s.workload), syscall.EXDEV)
	case s.generation != generation || s.generation < t.least || s.generation < now:
		return refuse(sealOld, "take", "policy "+strconv.FormatUint(s.generation, 10)+" again, or out of its turn", syscall.ESTALE)
	}
	return s.blob, s.workload, 0, nil
}

const (
	opSeal       = 121
	maxRefusals  = 16
	verdictDeny  = 2
	refusalBytes = repeatedSize
)

// refusal is a policy that was not taken, to be told.
type refusal struct {
	why        uint32
	generation uint64
	at         uint64
}

// refuse notes a policy that was not taken. A host that sends many fills the
// room, and the rest is only counted.
func (g *Guard) refuse(why uint32, generation uint64) {
	g.refused++
	if len(g.refusals) < maxRefusals {
		g.refusals = append(g.refusals, refusal{why, generation, sinceBoot()})
	}
}

// tellRefusals hands them to emit as records. It says whether emit may be asked
// again.
func (g *Guard) tellRefusals(emit func(record []byte) bool) bool {
	for len(g.refusals) > 0 {
		r := g.refusals[0]
		b := make([]byte, 0, refusalBytes)
		b = append(b, eventVersion, opSeal, verdictDeny, 0, 0, byte(r.why), 0, 0)
		b = append32(append32(b, 0), 0)
		b = append64(append64(append64(b, 0), g.refused), r.at)
		if !emit(append64(b, r.generation)) {
			return false
		}
		g.refusals = g.refusals[1:]
	}
	g.refusals = nil
	return true
}
