package guard

import "syscall"

// Loaded is what loading one program cost.
type Loaded struct {
	Name   string
	Said   string // the verifier's own words: time, instructions it went through, states
	Native uint32 // bytes of machine code
}

// Measure loads the programs of a bundle beside those that may stand, attaches
// none, and lets go of them again.
func Measure(b []byte, each func(Loaded)) error {
	parsed, err := parseBundle(b)
	if err != nil {
		return err
	}
	g := &Guard{maps: map[string]guardMap{}}
	types, err := loadTypes(parsed.types)
	if err != nil {
		return fail("load", "guard's types", err)
	}
	defer syscall.Close(types)
	if err := g.createMaps(parsed, types); err != nil {
		return err
	}
	for i := range parsed.programs {
		p := &parsed.programs[i]
		log := make([]byte, 1<<10)
		if err := g.load(p, parsed.maps, types, log); err != nil {
			return err
		}
		var info [20]byte // type, id, tag, size of the machine code
		fd := g.programs[len(g.programs)-1]
		if err := objectInfo(fd, info[:]); err != nil {
			return fail("ask about guard program", p.name, err)
		}
		c := &cursor{b: info[16:]}
		each(Loaded{p.name, lastLines(log), c.u32()})
		syscall.Close(fd)
	}
	for _, m := range g.maps {
		syscall.Close(m.fd)
	}
	return nil
}
