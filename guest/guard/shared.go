package guard

import (
	"strconv"
	"syscall"
)

// owners is how many workloads a shared kernel has room for: OWNERS of
// guard/bpf/src/policy.h.
const (
	owners    = 64
	placeBits = 6

	forShared = " shared" // behind the build id in a bundle for such a kernel

	labelAgent = 1
	fromImage  = 0
)

// Shared is the Guard of a kernel that others share, such as a node's with
// runc's containers. Only tasks of bound cgroups are held to a policy, and each
// of them to its owner's. It is for one thread, which must be the first of its
// process: the kernel tells that thread what it opens.
type Shared struct {
	g     *Guard   // what all have in common: maps, programs, rings
	kinds []uint32 // of programs
	hooks []uint32 // what those that see packets are attached as
	names []string
	pins  string
	bound [owners]*bound
	turn  uint32 // of numbers of owners
}

// AttachShared loads and attaches the programs of a bundle and pins all of it in
// a directory of a BPF file system, so that it stays in force if this process
// ends. Where something is pinned already it is taken over, if it is of the same
// bundle: who was bound stays held to what was last said, and cannot be told
// anything else.
func AttachShared(b []byte, pins string) (*Shared, error) {
	parsed, err := parseBundle(b)
	if err != nil {
		return nil, err
	}
	if err := parsed.checkKernel(forShared); err != nil {
		return nil, err
	}
	s := &Shared{pins: pins, g: &Guard{poll: -1, maps: map[string]guardMap{}, marks: map[uint32]*mark{}}}
	for _, p := range parsed.programs {
		s.kinds, s.hooks, s.names = append(s.kinds, p.kind), append(s.hooks, p.attach), append(s.names, p.name)
	}
	sum := sumName(b) // before descriptors are written into it
	err = s.open(parsed, sum)
	if err == syscall.ENOENT {
		err = s.make(parsed, sum)
	}
	if err != nil {
		return nil, err
	}
	if err := s.g.openRings(parsed.maps); err != nil {
		return nil, err
	}
	return s, s.labelLoader(parsed)
}

// make loads everything afresh. The mark of the bundle is pinned last, so what
// is half made is known for that.
func (s *Shared) make(b *bundle, sum string) error {
	types, err := loadTypes(b.types)
	if err != nil {
		return fail("load", "guard's types", err)
	}
	defer syscall.Close(types)
	for i := range b.maps {
		widen(&b.maps[i])
	}
	if err := s.g.createMaps(b, types); err != nil {
		return err
	}
	for i := range b.programs {
		if err := s.g.load(&b.programs[i], b.maps, types, nil); err != nil {
			return err
		}
	}
	for i := range b.programs {
		if s.kinds[i] == seesPackets {
			s.g.links = append(s.g.links, -1)
			continue
		}
		link, err := attachProgram(s.g.programs[i], 0, b.programs[i].attach)
		if err != nil {
			return fail("attach guard program", s.names[i], err)
		}
		s.g.links = append(s.g.links, link)
	}
	return s.pin(b, sum)
}

// widen gives a map room for all owners.
func widen(m *bundleMap) {
	switch m.name {
	case "current":
		m.shape.max = owners
	case "egress", "names", "domains", "filesets", "trusted", "listed", "kin", "execs", "limits":
		m.shape.max = 2 * owners
	}
}

func (s *Shared) pin(b *bundle, sum string) error {
	for _, m := range b.maps {
		if err := pinObject(s.g.maps[m.name].fd, s.pins+"/m_"+m.name); err != nil {
			return fail("pin guard map", m.name, err)
		}
	}
	for i, name := range s.names {
		if err := pinObject(s.g.programs[i], s.pins+"/p_"+name); err != nil {
			return fail("pin guard program", name, err)
		}
		if s.g.links[i] < 0 {
			continue
		}
		if err := pinObject(s.g.links[i], s.pins+"/l_"+name); err != nil {
			return fail("pin guard program", name, err)
		}
	}
	if err := pinObject(s.g.maps["bound"].fd, s.pins+"/"+sum); err != nil {
		return fail("pin", "guard", err)
	}
	return nil
}

// open takes over what is pinned. ENOENT: nothing is.
func (s *Shared) open(b *bundle, sum string) error {
	fd, err := pinnedObject(s.pins + "/m_bound")
	if err == syscall.ENOENT {
		return err
	}
	if err != nil {
		return fail("open pins in", s.pins, err)
	}
	syscall.Close(fd)
	if fd, err = pinnedObject(s.pins + "/" + sum); err != nil {
		return fail("take over the guard pinned in "+s.pins, "which is of another bundle, or not whole: end the containers and remove it", syscall.EEXIST)
	}
	syscall.Close(fd)
	for _, m := range b.maps {
		if fd, err = pinnedObject(s.pins + "/m_" + m.name); err != nil {
			return fail("open guard map", m.name, err)
		}
		s.g.maps[m.name] = guardMap{fd, m.inner}
	}
	for i, name := range s.names {
		if fd, err = pinnedObject(s.pins + "/p_" + name); err != nil {
			return fail("open guard program", name, err)
		}
		s.g.programs = append(s.g.programs, fd)
		fd = -1
		if s.kinds[i] != seesPackets {
			if fd, err = pinnedObject(s.pins + "/l_" + name); err != nil {
				return fail("open guard program", name, err)
			}
		}
		s.g.links = append(s.g.links, fd)
	}
	return s.left()
}

// left keeps the places of who was bound before this process: their policies
// stay in force.
func (s *Shared) left() error {
	var key, next [8]byte
	var from []byte
	for nextKey(s.g.maps["bound"].fd, from, next[:]) == nil {
		key = next
		from = key[:]
		var value [4]byte
		if lookupMap(s.g.maps["bound"].fd, key[:], value[:]) != nil {
			continue
		}
		owner := (&cursor{b: value[:]}).u32()
		b := &bound{owner: owner, id: (&cursor{b: key[:]}).u64()}
		var err error
		if b.cgroup, err = openCgroup(b.id); err == syscall.ESTALE {
			b.gone = true
		} else if err != nil {
			return fail("open", "cgroup "+strconv.FormatUint(b.id, 10), err)
		}
		s.bound[owner%owners] = b
		s.turn = max(s.turn, owner>>placeBits)
	}
	return nil
}

// sumName names a bundle: a pin of that name says what the others are of.
func sumName(raw []byte) string {
	h := uint64(14695981039346656037) // FNV-1a: to tell bundles apart, no seal
	for _, b := range raw {
		h = (h ^ uint64(b)) * 1099511628211
	}
	return "b_" + strconv.FormatUint(h, 16)
}

// labelLoader makes this thread known to the programs: it is told what lies
// below the files that it opens.
func (s *Shared) labelLoader(b *bundle) error {
	pid := syscall.Getpid()
	if syscall.Gettid() != pid {
		return fail("attach guard from", "a thread that is not the first", syscall.EINVAL)
	}
	fd, err := openProcess(pid)
	if err != nil {
		return fail("open process", strconv.Itoa(pid), err)
	}
	defer syscall.Close(fd)
	for _, m := range b.maps {
		if m.name != "labels" {
			continue
		}
		value := make([]byte, m.shape.value)
		put32(value, labelAgent)
		if err := updateMap(s.g.maps["labels"].fd, append32(nil, uint32(fd)), value); err != nil {
			return fail("label", "the loader", err)
		}
	}
	return nil
}

// shownObject gives what lies below a file of an overlay, as the programs see it
// when it is opened; nothing if that is not the image's.
func (g *Guard) shownObject(fd int) (key string, err error) {
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil || st.Mode&syscall.S_IFMT != syscall.S_IFREG {
		return "", err
	}
	before, err := g.lastShown()
	if err != nil {
		return "", err
	}
	opened, err := syscall.Open("/proc/self/fd/"+strconv.Itoa(fd), syscall.O_RDONLY|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	syscall.Close(opened)
	after, err := g.lastShown()
	if err != nil {
		return "", err
	}
	if after.times == before.times {
		return "", fail("be shown", "a file of the image", syscall.EPROTO)
	}
	if after.origin != fromImage {
		return "", nil
	}
	return objectKey(after.device, after.ino), nil
}

// shown is struct shown of guard/bpf/src/shared.h.
type shown struct {
	device, origin, times uint32
	ino                   uint64
}

func (g *Guard) lastShown() (s shown, err error) {
	var key [4]byte
	var value [24]byte
	if err := lookupMap(g.maps["shown"].fd, key[:], value[:]); err != nil {
		return s, fail("look at", "what was shown", err)
	}
	c := &cursor{b: value[:]}
	s.device = c.u32()
	c.u32()
	s.ino, s.origin, s.times = c.u64(), c.u32(), c.u32()
	return s, nil
}

// Ring is the descriptor to poll for events.
func (s *Shared) Ring() int { return s.g.Ring() }

// Drain is Guard's: the records of all owners.
func (s *Shared) Drain(emit func(record []byte) bool) { s.g.Drain(emit) }

// Recount is Guard's.
func (s *Shared) Recount() { s.g.Recount() }

// Status appends the state of what holds an owner, as Guard's does.
func (s *Shared) Status(owner uint32, buf []byte) []byte {
	whole := Guard{maps: s.g.maps, programs: s.g.programs}
	for _, l := range s.g.links {
		if l >= 0 {
			whole.links = append(whole.links, l)
		}
	}
	if b := s.bound[owner%owners]; b != nil && b.owner == owner {
		whole.links = append(whole.links, b.links...)
		if b.g != nil {
			whole.generation, whole.digest = b.g.generation, b.g.digest
		}
	}
	return whole.Status(buf)
}

// place is where the maps of a slot stand, of those that have one for each.
func (g *Guard) place(slot uint32) uint32 { return slot | g.owner%owners<<1 }

// nextMark gives a number to a mark. Of a shared kernel, owners tell theirs apart
// by it.
func (g *Guard) nextMark() uint32 {
	g.lastMark++
	if g.owner == 0 {
		return g.lastMark
	}
	return g.owner%owners<<(32-placeBits) | g.lastMark&(1<<(32-placeBits)-1)
}
