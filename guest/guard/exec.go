package guard

import "syscall"

// Parts of a policy about programs, as package guard compiles them.
const (
	sectionExecLists = 0x10
	sectionPrograms  = 0x11

	execListsSize = 8 * (2 + 32) * 4 // struct exec_lists of guard/bpf/src/policy.h
	programSize   = 40               // struct program
	maxEntries    = 16 << 10
	maxParents    = 16

	entryAllowed = 1
	entryLimited = 2
	entryJIT     = 3
	entryScript  = 4
	entryInline  = 5
	entryVolume  = 6
)

// programEntry says something of a path for some lists.
type programEntry struct {
	kind, lists, rule uint32
	code, value       uint64
	path              string
	parents           []string
}

func (p *policy) parsePrograms(data []byte) error {
	c := &cursor{b: data}
	for range c.count(c.u32(), maxEntries) {
		e := programEntry{kind: c.u16(), lists: c.u32(), rule: c.u32(), code: c.u64(), value: c.u64(), path: c.text()}
		for range c.count(c.u16(), maxParents) {
			e.parents = append(e.parents, c.text())
		}
		if e.kind < entryAllowed || e.kind > entryVolume {
			c.bad = true
		}
		if c.bad {
			break
		}
		p.entries = append(p.entries, e)
	}
	if c.bad || len(c.b) != 0 {
		return fail("read", "guard policy's programs", syscall.EBADMSG)
	}
	return nil
}

// program is what the kernel looks up of a program of an image.
type program struct {
	denied, allowed, limited, jit, script, inlined uint32
	code, value                                    uint64
}

func (p *program) bytes() []byte {
	b := make([]byte, 0, programSize)
	for _, v := range [...]uint32{p.denied, p.allowed, p.limited, p.jit, p.script, p.inlined} {
		b = append32(b, v)
	}
	return append64(append64(b, p.code), p.value)
}

// object gives what an object of a root's image is known by, if it is of it. In
// erofs stat shows the number the kernel uses, and it is never given to another.
func (g *Guard) object(root guardedRoot, fd int) (key string, err error) {
	if g.owner != 0 {
		return g.shownObject(fd)
	}
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		return "", err
	}
	return objectKey(root.device, st.Ino), nil
}

// objectKey is struct object of guard/bpf/src/policy.h.
func objectKey(device uint32, ino uint64) string {
	return string(append64(append32(append32(nil, device), 0), ino))
}

func (n *next) program(key string) *program {
	p := n.listed[key]
	if p == nil {
		p = &program{}
		n.listed[key] = p
	}
	return p
}

// find gives the object of the image that a path leads to, or none.
func (n *next) find(root guardedRoot, path string) (key string, err error) {
	w := walker{root: root.image, top: &place{}, absent: func(*place, string) error { return nil }}
	w.step = func(fd int, _ *place, last bool) error {
		defer syscall.Close(fd)
		if !last {
			return nil
		}
		var err error
		key, err = n.g.object(root, fd)
		return err
	}
	switch err := w.walk(path); err {
	case syscall.ENOTDIR, syscall.ELOOP, syscall.ENAMETOOLONG: // it is not there
		return "", nil
	default:
		return key, err
	}
}

// entry says of the program that a path leads to what the entry says. A program
// that is not there needs no leave to run.
func (n *next) entry(root guardedRoot, e *programEntry) error {
	if e.kind == entryVolume {
		return nil // of a container, not of a root
	}
	key, err := n.find(root, e.path)
	if err != nil {
		return err
	}
	if key == "" {
		n.note(e.rule, absentName, 0)
		return nil
	}
	p := n.program(key)
	switch e.kind {
	case entryAllowed:
		p.allowed |= e.lists
	case entryJIT:
		p.jit |= e.lists
	case entryScript, entryInline:
		p.script |= e.lists
		if e.kind == entryInline {
			p.inlined |= e.lists
		}
		p.code |= e.code
		p.value |= e.value
	case entryLimited:
		p.limited |= e.lists
		for _, parent := range e.parents {
			who, err := n.find(root, parent)
			if err != nil {
				return err
			}
			if who != "" {
				n.kin[key+who] |= e.lists
			}
		}
	}
	return nil
}

// fillPrograms makes the maps of what is said of programs.
func (n *next) fillPrograms() (err error) {
	if n.inner.listed, err = n.create("listed", len(n.listed)); err != nil {
		return err
	}
	for key, p := range n.listed {
		if err := updateMap(n.inner.listed, []byte(key), p.bytes()); err != nil {
			return fail("list", "program", err)
		}
	}
	if n.inner.kin, err = n.create("kin", len(n.kin)); err != nil {
		return err
	}
	for key, lists := range n.kin {
		if err := updateMap(n.inner.kin, []byte(key), append32(nil, lists)); err != nil {
			return fail("list", "parent of a program", err)
		}
	}
	if n.inner.execs, err = n.create("execs", 1); err != nil {
		return err
	}
	if n.p.execs == nil {
		return nil
	}
	var zero [4]byte
	if err := updateMap(n.inner.execs, zero[:], n.p.execs); err != nil {
		return fail("fill", "lists of programs", err)
	}
	return nil
}
