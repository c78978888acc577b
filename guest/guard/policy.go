package guard

import (
	"strconv"
	"syscall"
)

// A policy blob, as package guard compiles it, and its limits.
const (
	policyMagic    = "HBPOLCY\x02"
	policySize     = 416 // struct policy of guard/bpf/src/policy.h
	policySlot     = 8   // where its slot stands
	policyApplied  = 276 // how many there were
	policyPlace    = 280 // where it stands in the maps
	policyOwner    = 284 // and whose it is
	destSize       = 24
	listsSize      = 12 // struct lists
	maxProgramDeny = 16 << 10
	maxEgress      = 16 << 10

	sectionLimits = 0x40

	kindOverlay = 1
	kindAgent   = 2
	denies      = 1 << 31

	atCwd = -100
)

type programRule struct {
	rule uint32
	path string
}

type policy struct {
	generation uint64
	digest     [32]byte
	fixed      []byte
	files      []fileRule
	lists      [][]string // of programs, for files
	open       []span     // rules that may be put aside if they cannot be held
	programs   []programRule
	egress     []byte // entries of destSize+listsSize
	execs      []byte // struct exec_lists
	entries    []programEntry
	domains    []domain

	auditPerSecond uint32
}

func parsePolicy(b []byte) (*policy, error) {
	c := &cursor{b: b}
	if string(c.take(uint32(len(policyMagic)))) != policyMagic {
		return nil, fail("read", "guard policy", syscall.EPROTONOSUPPORT)
	}
	p := &policy{generation: c.u64()}
	copy(p.digest[:], c.take(32))
	p.fixed = c.take(policySize)
	for range c.count(c.u32(), maxProgramDeny) {
		if c.bad {
			break
		}
		p.programs = append(p.programs, programRule{c.u32(), c.text()})
	}
	p.egress = c.take(uint32(c.count(c.u32(), maxEgress)) * (destSize + listsSize))
	for !c.bad && len(c.b) > 0 {
		tag := uint16(c.u16())
		if data := c.take(c.u32()); !c.bad {
			if err := p.section(tag, data); err != nil {
				return nil, err
			}
		}
	}
	if c.bad {
		return nil, fail("read", "guard policy", syscall.EBADMSG)
	}
	if inside := (&cursor{b: p.fixed}).u64(); inside != p.generation {
		return nil, fail("read", "guard policy", syscall.EBADMSG)
	}
	return p, nil
}

// section reads a part that only some policies have. One that is not known holds
// what this agent cannot.
func (p *policy) section(tag uint16, data []byte) error {
	switch tag {
	case sectionExecLists:
		if p.execs = data; len(data) != execListsSize {
			return fail("read", "guard policy's lists of programs", syscall.EBADMSG)
		}
		return nil
	case sectionDomains:
		return p.parseDomains(data)
	case sectionPrograms:
		return p.parsePrograms(data)
	case sectionLimits:
		return p.auditRate(data)
	case sectionFiles:
		return p.parseFiles(data)
	case sectionOpen:
		return p.parseOpen(data)
	default:
		return fail("read", "section "+strconv.Itoa(int(tag))+" of guard policy", syscall.EPROTONOSUPPORT)
	}
}

// mark is what the kernel keeps beside an inode. The agent holds a descriptor
// of each, for the mark goes when the inode leaves memory.
type mark struct {
	fd   int
	id   uint32
	kind uint32
	slot [2]meaning
}

const markSize = 72 // struct mark of guard/bpf/src/policy.h

type meaning struct {
	generation                               uint64
	rules, home, exec, anchor, names, volume uint32
}

func (m *mark) bytes(b []byte) []byte {
	b = append32(append32(b, m.kind), m.id)
	for _, s := range m.slot {
		b = append64(b, s.generation)
		for _, v := range [...]uint32{s.rules, s.home, s.exec, s.anchor, s.names, s.volume} {
			b = append32(b, v)
		}
	}
	return b
}

// Policy puts a policy in force: everything it needs is made beside the
// one in force, then one pointer changes, and the kernel waits until nothing
// reads the old one. The reply lists rules of which a path was not there. If one
// cannot be held that must be, the reply says that the policy is refused, and
// the one before it stays in force.
func (g *Guard) Policy(generation uint64, blob []byte) (reply []byte, err error) {
	blob, workload, why, err := g.trust.open(blob, generation, g.generation)
	if err != nil {
		g.refuse(why, generation)
		return nil, err
	}
	p, err := parsePolicy(blob)
	if err != nil {
		return nil, err
	}
	if p.generation != generation {
		return nil, fail("match generation", strconv.FormatUint(p.generation, 10), syscall.EBADMSG)
	}
	if generation < g.generation || generation == g.generation && p.digest != g.digest {
		return nil, fail("replace generation "+strconv.FormatUint(g.generation, 10)+" by", "an older or different one", syscall.ESTALE)
	}
	n, err := g.apply(append([]byte(nil), blob...))
	if err != nil {
		return nil, err
	}
	if g.trust.key != nil && !n.refused {
		g.trust.workload = string(append([]byte(nil), workload...))
	}
	return n.reply(), nil
}

// again applies the policy in force to the roots that there are now.
func (g *Guard) again() error {
	n, err := g.apply(g.blob)
	if err != nil {
		return err
	}
	var fatal error
	var unheld []absent
	for _, a := range n.absent {
		if fatal == nil && n.p.fatal(a) {
			fatal = fail("hold rule", strconv.FormatUint(uint64(a.rule), 10), a.errno)
		}
		if a.why == absentLost && a.errno != syscall.ENOENT {
			unheld = append(unheld, a)
		}
	}
	same := len(unheld) == len(g.told)
	for i := range unheld {
		same = same && unheld[i] == g.told[i]
	}
	if !same {
		g.unheld, g.told = unheld, unheld
	}
	return fatal
}

// apply makes blob the policy in force, unless it is refused.
func (g *Guard) apply(blob []byte) (*next, error) {
	p, err := parsePolicy(blob)
	if err != nil {
		return nil, err
	}
	n := &next{g: g, p: p, slot: 1 - g.slot}
	defer n.close()
	if err := n.prepare(); err != nil {
		return nil, err
	}
	for _, a := range n.absent {
		n.refused = n.refused || p.fatal(a)
	}
	if n.refused {
		return n, nil
	}
	if err := n.swap(); err != nil {
		return nil, err
	}
	g.slot, g.generation, g.digest, g.blob, g.fileRules = n.slot, p.generation, p.digest, blob, len(p.files)
	g.inShares = n.inShares
	g.forget()
	g.volumes = g.volumes[:0]
	for _, e := range p.entries {
		if e.kind == entryVolume {
			g.volumes = append(g.volumes, e.path)
		}
	}
	return n, nil
}

// reply says what became of a policy, as guard.DecodeApplied reads it.
func (n *next) reply() []byte {
	const version = 2
	refused := byte(0)
	if n.refused {
		refused = 1
	}
	b := append(append64([]byte{version}, n.p.generation), refused)
	most := min(len(n.absent), 1<<16-1)
	b = append16(b, uint16(most))
	for _, a := range n.absent[:most] {
		b = append16(append(append32(b, a.rule), a.why), uint16(a.errno))
	}
	return b
}

// absent is a rule of which a path could not be followed to its end.
type absent struct {
	rule  uint32
	why   byte // absentName: creating it is refused; absentLost: cannot be held
	errno syscall.Errno
}

const (
	absentName = 1
	absentLost = 2
)

// span is a range of rules.
type span struct{ first, last uint32 }

// sectionOpen lists the rules of policies that would rather be held in part
// than not at all.
const (
	sectionOpen = 33
	maxSpans    = 1 << 10
)

func (p *policy) parseOpen(data []byte) error {
	c := &cursor{b: data}
	for range c.count(c.u32(), maxSpans) {
		p.open = append(p.open, span{c.u32(), c.u32()})
		if c.bad {
			break
		}
	}
	if c.bad || len(c.b) != 0 {
		return fail("read", "rules that may fail of guard policy", syscall.EBADMSG)
	}
	return nil
}

// fatal says whether the policy must not be in force because of a rule. A
// program that is not there cannot run; so that is none.
func (p *policy) fatal(a absent) bool {
	if a.why != absentLost || a.errno == syscall.ENOENT {
		return false
	}
	for _, s := range p.open {
		if s.first <= a.rule && a.rule <= s.last {
			return false
		}
	}
	return true
}

// next is a policy on its way.
type next struct {
	g      *Guard
	p      *policy
	slot   uint32
	held   map[*mark]*holding
	names  map[string]*holding // by key of the names map
	groups map[string]*group
	setIDs map[string]uint32 // struct fileset -> its key
	// Key of the trusted map -> the rule that trusts.
	trusted map[string]uint32
	listed  map[string]*program // key of the listed map
	kin     map[string]uint32   // key of the kin map -> lists
	absent  []absent
	noted   map[absent]bool
	refused bool
	// inShares: a rule is about what is in a share of the host's files.
	inShares bool
	sets     uint32 // of names
	opened   []int  // descriptors of inner maps
	inner    struct{ policy, egress, names, filesets, trusted, listed, kin, execs, domains int }
}

func (n *next) close() {
	for _, fd := range n.opened {
		syscall.Close(fd)
	}
	n.opened = nil
}

func (n *next) prepare() error {
	n.held, n.names, n.groups, n.noted = map[*mark]*holding{}, map[string]*holding{}, map[string]*group{}, map[absent]bool{}
	n.setIDs, n.trusted, n.listed, n.kin = map[string]uint32{}, map[string]uint32{}, map[string]*program{}, map[string]uint32{}
	for _, m := range n.g.marks {
		m.slot[n.slot] = meaning{} // left by a policy that did not get through
	}
	for _, root := range n.g.roots {
		if err := n.protectFiles(root.overlay); err != nil {
			return err
		}
		if err := n.trust(root); err != nil {
			return err
		}
		for _, d := range n.p.programs {
			if err := n.list(root, d); err != nil {
				return fail("deny program", strconv.Quote(d.path), err)
			}
		}
		for i := range n.p.entries {
			if err := n.entry(root, &n.p.entries[i]); err != nil {
				return fail("list program", strconv.Quote(n.p.entries[i].path), err)
			}
		}
	}
	if err := n.protectPlaces(); err != nil {
		return err
	}
	for i := range n.p.entries {
		if e := &n.p.entries[i]; e.kind == entryVolume {
			if err := n.volume(e); err != nil {
				return err
			}
		}
	}
	if err := n.mean(); err != nil {
		return err
	}
	for _, m := range n.g.marks {
		if m.slot[n.slot].generation != 0 || m.slot[1-n.slot].generation != 0 {
			if err := n.g.write(m); err != nil {
				return fail("mark", "protected object", err)
			}
		}
	}
	return n.fillMaps()
}

func (n *next) fillMaps() (err error) {
	if err := n.limit(); err != nil {
		return err
	}
	fixed := append([]byte(nil), n.p.fixed...)
	put32(fixed[policySlot:], n.slot)
	n.g.applied++
	put32(fixed[policyApplied:], n.g.applied)
	put32(fixed[policyPlace:], n.g.place(n.slot))
	put32(fixed[policyOwner:], n.g.owner)
	var zero [4]byte
	if n.inner.policy, err = n.create("current", 1); err != nil {
		return err
	}
	if err := updateMap(n.inner.policy, zero[:], fixed); err != nil {
		return fail("fill", "guard policy", err)
	}
	if n.inner.egress, err = n.create("egress", len(n.p.egress)/(destSize+listsSize)); err != nil {
		return err
	}
	for e := n.p.egress; len(e) > 0; e = e[destSize+listsSize:] {
		if err := updateMap(n.inner.egress, e[:destSize], e[destSize:destSize+listsSize]); err != nil {
			return fail("allow", "destination", err)
		}
	}
	if err := n.fillFiles(); err != nil {
		return err
	}
	if err := n.fillDomains(); err != nil {
		return err
	}
	return n.fillPrograms()
}

// create makes an inner map for the outer map of that name.
func (n *next) create(name string, entries int) (int, error) {
	shape := *n.g.maps[name].inner
	shape.max = uint32(max(entries, 1))
	fd, err := createMap(shape, name, 0, 0, [2]uint32{})
	if err != nil {
		return -1, fail("create guard map", name, err)
	}
	n.opened = append(n.opened, fd)
	return fd, nil
}

// swap puts the inner maps in place, the policy last.
func (n *next) swap() error {
	own := n.g.place(n.slot)
	for _, m := range [...]struct {
		name  string
		index uint32
		fd    int
	}{
		{"egress", own, n.inner.egress},
		{"names", own, n.inner.names},
		{"domains", own, n.inner.domains},
		{"filesets", own, n.inner.filesets},
		{"trusted", own, n.inner.trusted},
		{"listed", own, n.inner.listed},
		{"kin", own, n.inner.kin},
		{"execs", own, n.inner.execs},
		{"current", n.g.owner % owners, n.inner.policy},
	} {
		var key, value [4]byte
		put32(key[:], m.index)
		put32(value[:], uint32(m.fd))
		if err := updateMap(n.g.maps[m.name].fd, key[:], value[:]); err != nil {
			return fail("swap guard map", m.name, err)
		}
	}
	return nil
}

// forget drops what only the last policy marked.
func (g *Guard) forget() {
	for id, m := range g.marks {
		m.slot[1-g.slot] = meaning{}
		if m.kind != 0 || m.slot[g.slot].generation != 0 {
			_ = g.write(m)
			continue
		}
		var key [4]byte
		put32(key[:], uint32(m.fd))
		_ = deleteMap(g.maps["marks"].fd, key[:])
		syscall.Close(m.fd)
		delete(g.marks, id)
	}
}

func (g *Guard) write(m *mark) error {
	var key [4]byte
	var buf [128]byte
	put32(key[:], uint32(m.fd))
	return updateMap(g.maps["marks"].fd, key[:], m.bytes(buf[:0]))
}

// take gives the mark of the object behind fd, and fd to the mark. The object
// itself says which it is: numbers would not do, for the overlay shows one
// number for several of its inodes.
func (g *Guard) take(fd int) (*mark, error) {
	var key [4]byte
	var value [markSize]byte
	put32(key[:], uint32(fd))
	switch err := lookupMap(g.maps["marks"].fd, key[:], value[:]); err {
	case nil:
		c := &cursor{b: value[4:8]}
		id := c.u32()
		if m := g.marks[id]; m != nil {
			syscall.Close(fd)
			return m, nil
		}
		if g.taken != nil && g.taken(id) {
			// Another owner's, whose rules would be overwritten.
			syscall.Close(fd)
			return nil, syscall.EBUSY
		}
	case syscall.ENOENT:
	default:
		syscall.Close(fd)
		return nil, err
	}
	m := &mark{fd: fd, id: g.nextMark()}
	if err := g.write(m); err != nil {
		syscall.Close(fd)
		return nil, err
	}
	g.marks[m.id] = m
	return m, nil
}

func (g *Guard) setKind(fd int, kind uint32) error {
	m, err := g.take(fd)
	if err != nil {
		return err
	}
	m.kind = kind
	return g.write(m)
}

// markAgent lets a child of the agent run the agent's own program and stay
// what it is.
func (g *Guard) markAgent() error {
	fd, err := openPath(atCwd, "/proc/self/exe", 0)
	if err == nil {
		err = g.setKind(fd, kindAgent)
	}
	if err != nil {
		return fail("mark", "the agent's program", err)
	}
	return nil
}
