package guard

import (
	"strconv"
	"syscall"
)

// Guard is what is attached to this kernel. Closing a link would detach its
// program, so nothing of it is ever closed.
type Guard struct {
	owner    uint32               // of a kernel that others share; 0 in a guest
	taken    func(id uint32) bool // there: whether a mark is another's
	maps     map[string]guardMap
	programs []int // descriptors
	links    []int
	denials  ring
	audit    ring
	poll     int // epoll descriptor that is readable when either ring is
	roots    []guardedRoot

	generation uint64
	digest     [32]byte
	slot       uint32
	applied    uint32 // policies, those that did not get through included
	blob       []byte // of the policy in force
	marks      map[uint32]*mark
	lastMark   uint32
	given      [][deviceKey]byte // devices of containers
	repeats    repeats
	trust      trust
	refusals   []refusal // of policies, still to be told
	refused    uint64    // so far
	contents   contents
	mounts     []mounted // of containers
	volumes    []string  // of the policy in force
	places     []mounted // of containers: their mounts and, as "/", their roots
	fileRules  int       // of the policy in force
	inShares   bool      // rules are about what is in shares of the host's files
	unheld     []absent  // rules that hold not everywhere, to be told
	told       []absent  // the same, as of the last time
}

// guardedRoot is a container's root and the image below it.
type guardedRoot struct {
	path           string
	overlay, image int    // O_PATH descriptors
	own, device    uint32 // numbers of the two
}

type guardMap struct {
	fd    int
	inner *mapShape
}

// Attach loads and attaches the programs of a bundle. It is called once,
// before anything but PID 1 runs; b may be dropped afterwards. After an error
// nothing may be run: some programs may be attached, and they refuse.
func Attach(b []byte) (*Guard, error) {
	parsed, err := parseBundle(b)
	if err != nil {
		return nil, err
	}
	if err := parsed.checkKernel(""); err != nil {
		return nil, err
	}
	g := &Guard{poll: -1, maps: map[string]guardMap{}, marks: map[uint32]*mark{}, trust: parsed.trust}
	types, err := loadTypes(parsed.types)
	if err != nil {
		return nil, fail("load", "guard's types", err)
	}
	defer syscall.Close(types)
	if err := g.createMaps(parsed, types); err != nil {
		return nil, err
	}
	if err := g.markAgent(); err != nil {
		return nil, err
	}
	for i := range parsed.programs {
		if err := g.load(&parsed.programs[i], parsed.maps, types, nil); err != nil {
			return nil, err
		}
	}
	// Attached only when all are loaded: half a Guard never stands.
	if err := g.attach(parsed.programs); err != nil {
		return nil, err
	}
	if err := g.openRings(parsed.maps); err != nil {
		return nil, err
	}
	return g, nil
}

const seesPackets = 8 // BPF_PROG_TYPE_CGROUP_SKB

// attach links the programs. Those that see packets hang on the first of all
// cgroups, which no process can leave.
func (g *Guard) attach(programs []bundleProgram) error {
	const top = "/sys/fs/cgroup"
	cgroup, err := syscall.Open(top, syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return fail("open", top, err)
	}
	defer syscall.Close(cgroup)
	for i, program := range g.programs {
		target := 0
		if programs[i].kind == seesPackets {
			target = cgroup
		}
		link, err := attachProgram(program, target, programs[i].attach)
		if err != nil {
			return fail("attach guard program", programs[i].name, err)
		}
		g.links = append(g.links, link)
	}
	return nil
}

func (g *Guard) createMaps(b *bundle, types int) (err error) {
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
	for _, name := range []string{"labels", "marks", "current", "egress", "names", "domains", "filesets", "trusted", "listed", "kin", "execs", "written", "watched", "written_unseen", "images", "devices", "denials", "audit", "counters", "tallies", "repeats", "limits"} {
		if _, ok := g.maps[name]; !ok {
			return fail("find guard map", name, syscall.ENOENT)
		}
	}
	return nil
}

// load puts the descriptors of maps into a program and gives it to the kernel.
// What that cost is written to stats, if there is room.
func (g *Guard) load(p *bundleProgram, maps []bundleMap, types int, stats []byte) error {
	for _, u := range p.maps {
		put32(p.code[u.slot*8+4:], uint32(g.maps[maps[u.index].name].fd))
	}
	fd, err := loadProgram(p, types, logStats, stats)
	if err != nil {
		log := make([]byte, 4<<20)
		_, _ = loadProgram(p, types, logAll, log)
		return fail("load guard program", p.name, &Error{errnoOf(err), err.Error() + ": " + lastLines(log)})
	}
	g.programs = append(g.programs, fd)
	return nil
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

func (g *Guard) openRings(maps []bundleMap) (err error) {
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
		event := syscall.EpollEvent{Events: syscall.EPOLLIN, Fd: int32(fd)}
		if err := syscall.EpollCtl(g.poll, syscall.EPOLL_CTL_ADD, fd, &event); err != nil {
			return fail("watch guard ring", m.name, err)
		}
	}
	return nil
}

// Status appends the state of the Guard to buf: version, attached programs,
// generation, digest of the policy, counters, and the tag of every program as
// the kernel computed it, and the tally of every operation that was told of.
func (g *Guard) Status(buf []byte) []byte {
	const version = 2
	buf = append16(append(buf, version), uint16(g.attached()))
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
	return g.appendTallies(buf)
}

// attached counts the links that the kernel still knows.
func (g *Guard) attached() (n int) {
	for _, fd := range g.links {
		var info [16]byte
		if objectInfo(fd, info[:]) == nil {
			n++
		}
	}
	return n
}

// Ring is the descriptor to poll for events.
func (g *Guard) Ring() int { return g.poll }

// Drain hands records to emit until there are none left or emit says there is
// no room; a record that emit refused stays in its ring. Denials go before the
// record of what was allowed, and what was asked for by Recount between them.
func (g *Guard) Drain(emit func(record []byte) bool) {
	if g.denials.drain(emit) && g.tellRefusals(emit) && g.tellRepeats(emit) && g.tellUnheld(emit) {
		g.audit.drain(func(record []byte) bool { return emit(g.complete(record)) })
	}
}

// Root tells the Guard of a root file system: its path, and the device
// numbers (as the kernel holds them: major<<20 | minor) of the overlay and of
// the erofs below it, which is mounted at "image" beside it. An error refuses
// the mount.
func (g *Guard) Root(path string, overlay, lower uint32) error {
	r, err := openRoot(path, overlay, lower)
	if err != nil {
		return fail("guard root", strconv.Quote(path), err)
	}
	var key, one [4]byte
	put32(key[:], lower)
	one[0] = 1
	if err := updateMap(g.maps["images"].fd, key[:], one[:]); err != nil {
		return fail("guard image of", strconv.Quote(path), err)
	}
	own, err := openPath(r.overlay, ".", 0)
	if err == nil {
		err = g.setKind(own, kindOverlay)
	}
	if err != nil {
		return fail("guard root", strconv.Quote(path), err)
	}
	g.roots = append(g.roots, r)
	if g.blob == nil {
		return nil
	}
	return g.again() // its paths mean something in the new root too
}

// Unroot lets go of a root whose containers are gone, so that it can be
// unmounted: what the policy in force marked there is unmarked, and its image
// is one no more. After an error it is to be asked again.
func (g *Guard) Unroot(path string) error {
	for i, r := range g.roots {
		if r.path != path {
			continue
		}
		var key [4]byte
		put32(key[:], r.device)
		if err := deleteMap(g.maps["images"].fd, key[:]); err != nil && err != syscall.ENOENT {
			return fail("unguard image of", strconv.Quote(path), err)
		}
		own, err := openPath(r.overlay, ".", 0)
		if err == nil {
			err = g.setKind(own, 0)
		}
		if err != nil {
			return fail("unguard root", strconv.Quote(path), err)
		}
		g.roots = append(g.roots[:i], g.roots[i+1:]...)
		syscall.Close(r.overlay)
		syscall.Close(r.image)
		break
	}
	if g.blob == nil {
		g.forget()
		return nil
	}
	return g.again() // for the roots that are left; what only this one had is forgotten
}

func openRoot(path string, overlay, lower uint32) (r guardedRoot, err error) {
	image := path[:max(0, len(path)-len("root"))] + "image"
	if r.overlay, err = openPath(atCwd, path, syscall.O_DIRECTORY); err != nil {
		return r, err
	}
	if r.image, err = openPath(atCwd, image, syscall.O_DIRECTORY); err != nil {
		syscall.Close(r.overlay)
		return r, err
	}
	for _, want := range [...]struct {
		path   string
		device uint32
	}{{path, overlay}, {image, lower}} {
		var st syscall.Stat_t
		err := syscall.Stat(want.path, &st)
		if err == nil && kernelDevice(st.Dev) != want.device {
			err = syscall.EXDEV
		}
		if err != nil {
			syscall.Close(r.overlay)
			syscall.Close(r.image)
			return r, err
		}
	}
	r.path, r.own, r.device = path, overlay, lower
	return r, nil
}

// kernelDevice turns stat's device number into the kernel's own.
func kernelDevice(dev uint64) uint32 {
	major := uint32(dev>>8) & 0xfff
	minor := uint32(dev&0xff) | uint32(dev>>12)&0xfff00
	return major<<20 | minor
}

func put32(b []byte, v uint32) {
	b[0], b[1], b[2], b[3] = byte(v), byte(v>>8), byte(v>>16), byte(v>>24)
}

func append16(b []byte, v uint16) []byte { return append(b, byte(v), byte(v>>8)) }

func append32(b []byte, v uint32) []byte {
	return append(b, byte(v), byte(v>>8), byte(v>>16), byte(v>>24))
}

func append64(b []byte, v uint64) []byte { return append32(append32(b, uint32(v)), uint32(v>>32)) }
