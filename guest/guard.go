package guest

import (
	"strconv"
	"syscall"
)

// The Guard's programs and maps live in the kernel; guard holds on to them.
// Closing a link would detach its program, so nothing here is ever closed.
type guard struct {
	maps     map[string]guardMap
	programs []int // descriptors
	links    []int
	denials  ring
	audit    ring
	poll     int // epoll descriptor that is readable when either ring is
	roots    []int

	generation uint64
	digest     [32]byte
	slot       uint32
	blob       []byte // of the policy in force
	marks      map[object]*mark
	images     map[uint32]bool
}

type guardMap struct {
	fd    int
	inner *mapShape
}

// theGuard is the kernel's; there is one kernel and one PID 1.
var theGuard *guard

// guardStart attaches the programs of the bundle. The agent calls it once,
// before it serves the port, and drops the bundle when it returns. On an error
// nothing may be run: some programs may be attached, and they refuse.
func guardStart(b []byte) error {
	parsed, err := parseBundle(b)
	if err != nil {
		return err
	}
	if err := parsed.checkKernel(); err != nil {
		return err
	}
	g := &guard{poll: -1, maps: map[string]guardMap{}, marks: map[object]*mark{}, images: map[uint32]bool{}}
	if err := g.createMaps(parsed); err != nil {
		return err
	}
	if err := g.markAgent(); err != nil {
		return err
	}
	for i := range parsed.programs {
		if err := g.load(&parsed.programs[i], parsed.maps); err != nil {
			return err
		}
	}
	// Attached only when all are loaded: half a Guard never stands.
	for i, program := range g.programs {
		link, err := attachProgram(program, parsed.programs[i].attach)
		if err != nil {
			return fail("attach guard program", parsed.programs[i].name, err)
		}
		g.links = append(g.links, link)
	}
	if err := g.openRings(parsed.maps); err != nil {
		return err
	}
	theGuard = g
	return nil
}

func (g *guard) createMaps(b *bundle) error {
	types, err := loadTypes(b.types)
	if err != nil {
		return fail("load", "guard's types", err)
	}
	defer syscall.Close(types)
	for _, m := range b.maps {
		inner, btf := 0, 0
		if m.ids[0] != 0 {
			btf = types
		}
		if m.inner != nil {
			if inner, err = createMap(*m.inner, m.name, 0, 0, [2]uint32{}); err != nil {
				return fail("create what is inside guard map", m.name, err)
			}
		}
		fd, err := createMap(m.shape, m.name, inner, btf, m.ids)
		if m.inner != nil {
			syscall.Close(inner) // only the pattern of those to come
		}
		if err != nil {
			return fail("create guard map", m.name, err)
		}
		g.maps[m.name] = guardMap{fd, m.inner}
	}
	for _, name := range []string{"labels", "marks", "current", "egress", "names", "listed", "images", "denials", "audit", "counters"} {
		if _, ok := g.maps[name]; !ok {
			return fail("find guard map", name, syscall.ENOENT)
		}
	}
	return nil
}

// load puts the descriptors of maps into a program and gives it to the kernel.
func (g *guard) load(p *bundleProgram, maps []bundleMap) error {
	for _, u := range p.maps {
		put32(p.code[u.slot*8+4:], uint32(g.maps[maps[u.index].name].fd))
	}
	fd, err := loadProgram(p, nil)
	if err != nil {
		log := make([]byte, 64<<10)
		_, _ = loadProgram(p, log)
		return fail("load guard program", p.name, &failure{errnoOf(err), err.Error() + ": " + lastLines(log)})
	}
	g.programs = append(g.programs, fd)
	return nil
}

func errnoOf(err error) syscall.Errno {
	if e, ok := err.(syscall.Errno); ok {
		return e
	}
	return syscall.EINVAL
}

// lastLines is the end of the verifier's log, where it says what it minds.
func lastLines(log []byte) string {
	const enough = 1500
	n := 0
	for n < len(log) && log[n] != 0 {
		n++
	}
	return string(log[max(0, n-enough):n])
}

func (g *guard) openRings(maps []bundleMap) (err error) {
	if g.poll, err = syscall.EpollCreate1(syscall.EPOLL_CLOEXEC); err != nil {
		return fail("create", "epoll", err)
	}
	for _, m := range maps {
		var r *ring
		switch m.name {
		case "denials":
			r = &g.denials
		case "audit":
			r = &g.audit
		default:
			continue
		}
		fd := g.maps[m.name].fd
		if *r, err = openRing(fd, m.shape.max); err != nil {
			return fail("map guard ring", m.name, err)
		}
		event := syscall.EpollEvent{Events: pollIn, Fd: int32(fd)}
		if err := syscall.EpollCtl(g.poll, syscall.EPOLL_CTL_ADD, fd, &event); err != nil {
			return fail("watch guard ring", m.name, err)
		}
	}
	return nil
}

// guardStatus appends the state of the Guard to buf: version, attached
// programs, generation, digest of the policy, counters, and the tag of every
// program as the kernel computed it.
func guardStatus(buf []byte) []byte {
	const version = 1
	g := theGuard
	buf = append(buf, version)
	if g == nil {
		return append(buf, 0)
	}
	buf = append(buf, 1)
	buf = append16(buf, uint16(g.attached()))
	buf = append64(buf, g.generation)
	buf = append(buf, g.digest[:]...)
	var key [4]byte
	var counters [32]byte // sequence and loss of denials, then of the audit
	_ = lookupMap(g.maps["counters"].fd, key[:], counters[:])
	buf = append(buf, counters[:]...)
	buf = append16(buf, uint16(len(g.programs)))
	for _, fd := range g.programs {
		var info [16]byte // type, id, tag
		_ = objectInfo(fd, info[:])
		buf = append(buf, info[8:]...)
	}
	return buf
}

// attached counts the links that the kernel still knows.
func (g *guard) attached() (n int) {
	for _, fd := range g.links {
		var info [16]byte
		if objectInfo(fd, info[:]) == nil {
			n++
		}
	}
	return n
}

// guardRing is the descriptor the agent polls for events, or -1.
func guardRing() int {
	if theGuard == nil {
		return -1
	}
	return theGuard.poll
}

// guardDrain hands records to emit until there are none left or emit says
// there is no room; a record that emit refused stays in the ring. Denials go
// before the record of what was allowed.
func guardDrain(emit func(record []byte) bool) {
	if g := theGuard; g != nil && g.denials.drain(emit) {
		g.audit.drain(emit)
	}
}

// guardRoot tells the Guard of a root file system: its path, and the device
// numbers (as the kernel holds them: major<<20 | minor) of the overlay and of
// the erofs below it. An error refuses the mount.
func guardRoot(path string, overlay, lower uint32) error {
	g := theGuard
	if g == nil {
		return nil
	}
	fd, err := openPath(-100, path, syscall.O_DIRECTORY) // AT_FDCWD
	if err != nil {
		return fail("guard root", strconv.Quote(path), err)
	}
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		return fail("guard root", strconv.Quote(path), err)
	}
	if kernelDevice(st.Dev) != overlay {
		return fail("guard root", strconv.Quote(path), syscall.EXDEV)
	}
	var key, one [4]byte
	put32(key[:], lower)
	one[0] = 1
	if err := updateMap(g.maps["images"].fd, key[:], one[:]); err != nil {
		return fail("guard image of", strconv.Quote(path), err)
	}
	g.images[lower] = true
	if err := g.setKind(fd, kindOverlay); err != nil {
		return fail("guard root", strconv.Quote(path), err)
	}
	if fd, err = openPath(-100, path, syscall.O_DIRECTORY); err != nil {
		return fail("guard root", strconv.Quote(path), err)
	}
	g.roots = append(g.roots, fd)
	if g.blob == nil {
		return nil
	}
	_, err = g.apply(g.blob) // its paths mean something in the new root too
	return err
}

// kernelDevice turns stat's device number into the kernel's own.
func kernelDevice(dev uint64) uint32 {
	major := uint32(dev>>8)&0xfff | uint32(dev>>32)&^0xfff
	minor := uint32(dev)&0xff | uint32(dev>>12)&0xffffff00
	return major<<20 | minor&0xfffff
}

func put32(b []byte, v uint32) { b[0], b[1], b[2], b[3] = byte(v), byte(v>>8), byte(v>>16), byte(v>>24) }

func append16(b []byte, v uint16) []byte { return append(b, byte(v), byte(v>>8)) }

func append32(b []byte, v uint32) []byte {
	return append(b, byte(v), byte(v>>8), byte(v>>16), byte(v>>24))
}

func append64(b []byte, v uint64) []byte { return append32(append32(b, uint32(v)), uint32(v>>32)) }
