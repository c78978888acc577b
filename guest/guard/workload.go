package guard

import (
	"strconv"
	"syscall"
)

const (
	magicOverlay = 0x794c7630
	magicCgroup  = 0x63677270
	maxLevel     = 16 // a cgroup that lies deeper is not found by the programs
)

// bound is a workload.
type bound struct {
	owner  uint32
	g      *Guard // its policy; nil if it was bound before this process
	cgroup int
	id     uint64 // of the cgroup
	gone   bool   // it was bound before this process, and its cgroup is no more
	links  []int
}

// Workload is what Bind binds. Its descriptors are Bind's from the call on.
type Workload struct {
	Root    int // O_PATH, of the directory that is or will be the root
	Cgroup  int // the directory of its cgroup
	Devices [][3]uint32
}

// Reserve gives the number of an owner to be. Its policy's generations begin
// with that number, which stands in their upper half.
func (s *Shared) Reserve() (uint32, error) {
	s.Sweep()
	for place := range s.bound {
		if s.bound[place] == nil {
			s.turn++
			return s.turn<<placeBits | uint32(place), nil
		}
	}
	return 0, fail("bind", "one more than "+strconv.Itoa(owners)+" workloads", syscall.ENOSPC)
}

// Bind holds the processes of a cgroup, of which only the runtime's first may be
// there, to a policy. An error, or a reply that says the policy is refused,
// leaves nothing behind.
func (s *Shared) Bind(owner uint32, w Workload, generation uint64, blob []byte) (reply []byte, err error) {
	b := &bound{owner: owner, cgroup: w.Cgroup, g: s.guard(owner)}
	defer func() {
		if err != nil {
			s.drop(b)
		}
	}()
	if owner == 0 || s.bound[owner%owners] != nil {
		syscall.Close(w.Root)
		return nil, fail("bind", "owner "+strconv.FormatUint(uint64(owner), 10), syscall.EEXIST)
	}
	if b.id, err = cgroupID(w.Cgroup); err != nil {
		syscall.Close(w.Root)
		return nil, err
	}
	if err := b.g.sharedRoot(w.Root); err != nil {
		return nil, err
	}
	for _, d := range w.Devices {
		if err := b.g.Give(uint64(owner), d[0], d[1], d[2]); err != nil {
			return nil, err
		}
	}
	if reply, err = s.policy(b, generation, blob); err != nil || refused(reply) {
		if err == nil {
			s.drop(b)
		}
		return reply, err
	}
	if err := s.attachPackets(b); err != nil {
		return nil, err
	}
	if err := updateMap(s.g.maps["bound"].fd, append64(nil, b.id), append32(nil, owner)); err != nil {
		return nil, fail("bind", "cgroup", err)
	}
	s.bound[owner%owners] = b
	return reply, nil
}

// refused says whether a reply is that of a policy that is not in force.
func refused(reply []byte) bool { return len(reply) > 9 && reply[9] != 0 }

// Policy puts another policy of an owner in force.
func (s *Shared) Policy(owner uint32, generation uint64, blob []byte) (reply []byte, err error) {
	b := s.bound[owner%owners]
	if b == nil || b.owner != owner {
		return nil, fail("find", "owner "+strconv.FormatUint(uint64(owner), 10), syscall.ESRCH)
	}
	if b.g == nil {
		return nil, fail("change the policy of", "a workload that was bound before the loader started", syscall.EOWNERDEAD)
	}
	return s.policy(b, generation, blob)
}

func (s *Shared) policy(b *bound, generation uint64, blob []byte) ([]byte, error) {
	// Marks of two owners are told apart by it.
	if uint32(generation>>32) != b.owner {
		return nil, fail("match generation", strconv.FormatUint(generation, 10), syscall.EBADMSG)
	}
	return b.g.Policy(generation, blob)
}

// guard is what holds one owner's policy in the maps of all.
func (s *Shared) guard(owner uint32) *Guard {
	// A mark of one who is gone, left when its loader ended, is nobody's.
	taken := func(id uint32) bool {
		place := id >> (32 - placeBits)
		return id != 0 && place != owner%owners && s.bound[place] != nil
	}
	return &Guard{owner: owner, taken: taken, maps: s.g.maps, marks: map[uint32]*mark{}, lastMark: uint32(sinceBoot() >> 10)}
}

// attachPackets lets the programs that see packets see those of a cgroup.
func (s *Shared) attachPackets(b *bound) error {
	for i, program := range s.g.programs {
		if s.kinds[i] != seesPackets {
			continue
		}
		link, err := attachProgram(program, b.cgroup, s.hooks[i])
		if err != nil {
			return fail("attach guard program", s.names[i], err)
		}
		b.links = append(b.links, link)
		if err := pinObject(link, s.packetPin(b.owner, s.names[i])); err != nil {
			return fail("pin guard program", s.names[i], err)
		}
	}
	if err := updateMap(s.g.maps["packet_owner"].fd, append64(nil, b.id), append32(nil, b.owner)); err != nil {
		return fail("bind", "packets", err)
	}
	return nil
}

func (s *Shared) packetPin(owner uint32, name string) string {
	return s.pins + "/c_" + strconv.FormatUint(uint64(owner), 10) + "_" + name
}

// Bound says whether an owner is bound.
func (s *Shared) Bound(owner uint32) bool {
	b := s.bound[owner%owners]
	return b != nil && b.owner == owner
}

// Unbind forgets an owner. Processes of it that are still there may do nothing
// any more.
func (s *Shared) Unbind(owner uint32) error {
	b := s.bound[owner%owners]
	if b == nil || b.owner != owner {
		return fail("find", "owner "+strconv.FormatUint(uint64(owner), 10), syscall.ESRCH)
	}
	s.drop(b)
	return nil
}

// Sweep forgets the owners whose cgroups are gone, and says which.
func (s *Shared) Sweep() (gone []uint32) {
	for _, b := range s.bound {
		if b == nil {
			continue
		}
		if b.gone {
			gone = append(gone, b.owner)
			s.drop(b)
			continue
		}
		fd, err := syscall.Openat(b.cgroup, "cgroup.procs", syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
		if err == nil {
			syscall.Close(fd)
			continue
		}
		gone = append(gone, b.owner)
		s.drop(b)
	}
	return gone
}

func (s *Shared) drop(b *bound) {
	if b.id != 0 {
		var value [4]byte
		key := append64(nil, b.id)
		if lookupMap(s.g.maps["bound"].fd, key, value[:]) == nil && (&cursor{b: value[:]}).u32() == b.owner {
			_ = deleteMap(s.g.maps["bound"].fd, key)
		}
	}
	place := b.owner % owners
	if s.bound[place] == nil || s.bound[place] == b {
		_ = deleteMap(s.g.maps["current"].fd, append32(nil, place))
		s.bound[place] = nil
	}
	for i, name := range s.names {
		if s.kinds[i] == seesPackets {
			_ = syscall.Unlink(s.packetPin(b.owner, name))
		}
	}
	for _, link := range b.links {
		syscall.Close(link)
	}
	if b.cgroup >= 0 {
		syscall.Close(b.cgroup)
	}
	if b.g != nil {
		b.g.dropShared()
	}
}

// dropShared lets go of what an owner had.
func (g *Guard) dropShared() {
	g.TakeBack(uint64(g.owner))
	for id, m := range g.marks {
		_ = deleteMap(g.maps["marks"].fd, append32(nil, uint32(m.fd)))
		syscall.Close(m.fd)
		delete(g.marks, id)
	}
	for _, r := range g.roots {
		syscall.Close(r.overlay)
		syscall.Close(r.image)
	}
	g.roots = nil
}

// sharedRoot takes a container's root, which must be an overlay: only of that is
// known what is of the image.
func (g *Guard) sharedRoot(fd int) error {
	var fs syscall.Statfs_t
	if err := syscall.Fstatfs(fd, &fs); err != nil || fs.Type != magicOverlay {
		syscall.Close(fd)
		if err == nil {
			err = syscall.EMEDIUMTYPE
		}
		return fail("guard root", "which must be an overlay", err)
	}
	r := guardedRoot{path: "/", overlay: fd, image: -1}
	g.roots = append(g.roots, r)
	image, err := openPath(fd, ".", 0)
	if err != nil {
		return fail("guard", "root", err)
	}
	g.roots[0].image = image
	own, err := openPath(fd, ".", 0)
	if err == nil {
		err = g.setKind(own, kindOverlay)
	}
	if err != nil {
		return fail("guard", "root", err)
	}
	return nil
}

// cgroupID is the number of a cgroup in which nothing but the runtime's first
// process runs, and which the programs can find.
func cgroupID(fd int) (uint64, error) {
	var fs syscall.Statfs_t
	var st syscall.Stat_t
	if err := syscall.Fstatfs(fd, &fs); err != nil {
		return 0, fail("look at", "cgroup", err)
	}
	if fs.Type != magicCgroup {
		return 0, fail("bind", "a cgroup that is not of version 2", syscall.EMEDIUMTYPE)
	}
	if err := syscall.Fstat(fd, &st); err != nil {
		return 0, fail("look at", "cgroup", err)
	}
	if n, err := levelOf(fd); err != nil || n < 1 || n > maxLevel {
		if err == nil {
			err = syscall.ERANGE
		}
		return 0, fail("bind", "a cgroup at level "+strconv.Itoa(n), err)
	}
	return st.Ino, firstAlone(fd)
}

// levelOf counts the cgroups above one.
func levelOf(fd int) (n int, err error) {
	const first = 1 // the number of the cgroup that has all
	at, err := openPath(fd, ".", syscall.O_DIRECTORY)
	if err != nil {
		return 0, err
	}
	defer func() { syscall.Close(at) }()
	for ; n <= maxLevel; n++ {
		var st syscall.Stat_t
		if err := syscall.Fstat(at, &st); err != nil {
			return 0, err
		}
		if st.Ino == first {
			break
		}
		if at, err = replace(at, at, ".."); err != nil {
			return 0, err
		}
	}
	return n, nil
}

// firstAlone refuses a cgroup in which more than the runtime's first process
// runs: what runs there already would not be held to anything.
func firstAlone(cgroup int) error {
	fd, err := syscall.Openat(cgroup, "cgroup.procs", syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return fail("look into", "cgroup", err)
	}
	defer syscall.Close(fd)
	buf := make([]byte, 4096)
	n, err := syscall.Read(fd, buf)
	if err != nil {
		return fail("look into", "cgroup", err)
	}
	lines := 0
	for _, c := range buf[:n] {
		if c == '\n' {
			lines++
		}
	}
	if lines != 1 {
		return fail("bind", "a cgroup with "+strconv.Itoa(lines)+" processes; only the runtime's first may be there", syscall.EBUSY)
	}
	return nil
}
