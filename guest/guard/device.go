package guard

import "strconv"

// deviceKey is the size of struct device of guard/bpf/policy.h.
const deviceKey = 16

// Give lets the processes of a container, which is the cgroup of that number,
// open one device besides the usual ones. kind is S_IFCHR or S_IFBLK.
func (g *Guard) Give(cgroup uint64, kind, major, minor uint32) error {
	number := major<<20 | minor
	key := [deviceKey]byte(append32(append32(append64(nil, cgroup), kind), number))
	if err := updateMap(g.maps["devices"].fd, key[:], []byte{1, 0, 0, 0}); err != nil {
		return fail("give", "device "+strconv.FormatUint(uint64(major), 10)+":"+strconv.FormatUint(uint64(minor), 10), err)
	}
	g.given = append(g.given, key)
	return nil
}

// TakeBack ends what was given to a container.
func (g *Guard) TakeBack(cgroup uint64) {
	kept := g.given[:0]
	for _, key := range g.given {
		if (&cursor{b: key[:]}).u64() != cgroup {
			kept = append(kept, key)
			continue
		}
		_ = deleteMap(g.maps["devices"].fd, key[:])
	}
	g.given = kept
	g.unmounted(cgroup)
}
