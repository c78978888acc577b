package guard

import (
	"strconv"
	"syscall"
)

// What a bundle may hold at most; the host's linker stays far below.
const (
	bundleMagic   = "HBGUARD\x02"
	maxTypes      = 64 << 10
	maxMaps       = 64
	maxPrograms   = 256
	maxCode       = 64 << 10 // instructions
	maxFunctions  = 256
	maxMapEntries = 1 << 22
)

// mapShape is what a map is, without its name.
type mapShape struct{ kind, key, value, max, flags uint32 }

type bundleMap struct {
	name  string
	shape mapShape
	ids   [2]uint32 // of key and value in the bundle's types
	inner *mapShape
}

type bundleProgram struct {
	name, licence                 string
	kind, attach, flags, attachID uint32
	code                          []byte
	maps                          []mapUse
	functions                     []byte // pairs of place and type, if the kernel calls some back
}

// functionSize is struct bpf_func_info.
const functionSize = 8

// mapUse is a place in the code where a map's descriptor belongs.
type mapUse struct{ slot, index uint32 }

type bundle struct {
	kernel   string // build id it was linked for
	types    []byte
	maps     []bundleMap
	programs []bundleProgram
	trust    trust
}

// cursor reads little-endian values off the front of b. Once something is
// missing it gives zeros and bad stays true.
type cursor struct {
	b   []byte
	bad bool
}

func (c *cursor) take(n uint32) []byte {
	if c.bad || uint64(n) > uint64(len(c.b)) {
		c.bad = true
		return nil
	}
	v := c.b[:n:n]
	c.b = c.b[n:]
	return v
}

func (c *cursor) u16() uint32 {
	if b := c.take(2); b != nil {
		return uint32(b[0]) | uint32(b[1])<<8
	}
	return 0
}

func (c *cursor) u32() uint32 {
	if b := c.take(4); b != nil {
		return uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 | uint32(b[3])<<24
	}
	return 0
}

func (c *cursor) u64() uint64 {
	lo := c.u32()
	return uint64(lo) | uint64(c.u32())<<32
}

func (c *cursor) text() string { return string(c.take(c.u16())) }

// count reads a number of things, of which there may be at most most.
func (c *cursor) count(n, most uint32) int {
	if n > most {
		c.bad = true
	}
	if c.bad {
		return 0
	}
	return int(n)
}

func (c *cursor) shape() mapShape {
	m := mapShape{c.u32(), c.u32(), c.u32(), c.u32(), c.u32()}
	if m.max > maxMapEntries || m.key > 512 || m.value > 16<<10 {
		c.bad = true
	}
	return m
}

func parseBundle(b []byte) (*bundle, error) {
	c := &cursor{b: b}
	if string(c.take(uint32(len(bundleMagic)))) != bundleMagic {
		return nil, fail("read", "guard bundle", syscall.EPROTONOSUPPORT)
	}
	out := &bundle{kernel: c.text()}
	out.types = c.take(uint32(c.count(c.u32(), maxTypes)))
	for range c.count(c.u16(), maxMaps) {
		m := bundleMap{name: c.text(), shape: c.shape(), ids: [2]uint32{c.u32(), c.u32()}}
		if c.u16() != 0 {
			inner := c.shape()
			m.inner = &inner
		}
		out.maps = append(out.maps, m)
	}
	for range c.count(c.u16(), maxPrograms) {
		out.programs = append(out.programs, c.program(uint32(len(out.maps))))
	}
	if c.bad {
		return nil, fail("read", "guard bundle", syscall.EBADMSG)
	}
	var err error
	out.trust, err = parseTrust(c.b, out.kernel)
	return out, err
}

func (c *cursor) program(maps uint32) bundleProgram {
	p := bundleProgram{name: c.text(), licence: c.text(), kind: c.u32(), attach: c.u32(), flags: c.u32(), attachID: c.u32()}
	instructions := uint32(c.count(c.u32(), maxCode))
	uses := c.count(c.u32(), maxCode)
	functions := uint32(c.count(c.u32(), maxFunctions))
	p.code = c.take(instructions * 8)
	for range uses {
		u := mapUse{c.u32(), c.u32()}
		if u.slot >= instructions || u.index >= maps {
			c.bad = true
		}
		if c.bad {
			break
		}
		p.maps = append(p.maps, u)
	}
	p.functions = c.take(functions * functionSize)
	return p
}

// checkKernel refuses a bundle that was linked for another kernel: its
// offsets would read the wrong memory. kind stands behind the build id of one
// for kernels that others share.
func (b *bundle) checkKernel(kind string) error {
	notes, err := readNotes()
	if err != nil {
		return err
	}
	if id := buildID(notes) + kind; id != b.kernel {
		return fail("load guard linked for kernel "+strconv.Quote(b.kernel)+" into", strconv.Quote(id), syscall.ENOEXEC)
	}
	return nil
}

// KernelID is the build id of the kernel that runs here.
func KernelID() (string, error) {
	notes, err := readNotes()
	if err != nil {
		return "", err
	}
	id := buildID(notes)
	if id == "" {
		return "", fail("find", "build id of the kernel", syscall.ENODATA)
	}
	return id, nil
}

func readNotes() ([]byte, error) {
	const path = "/sys/kernel/notes"
	fd, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, fail("open", path, err)
	}
	defer syscall.Close(fd)
	buf := make([]byte, 4096)
	n, err := syscall.Read(fd, buf)
	if err != nil {
		return nil, fail("read", path, err)
	}
	return buf[:n], nil
}

// buildID finds the GNU build id among ELF notes and gives it in hexadecimal.
func buildID(notes []byte) string {
	const gnuBuildID, digits = 3, "0123456789abcdef"
	for c := (&cursor{b: notes}); !c.bad && len(c.b) > 0; {
		nameSize, idSize, kind := c.u32(), c.u32(), c.u32()
		if nameSize > 256 || idSize > 4096 {
			return ""
		}
		name, id := c.take((nameSize+3)&^3), c.take((idSize+3)&^3)
		if c.bad || kind != gnuBuildID || string(name) != "GNU\x00" {
			continue
		}
		text := make([]byte, 0, 2*idSize)
		for _, v := range id[:idSize] {
			text = append(text, digits[v>>4], digits[v&15])
		}
		return string(text)
	}
	return ""
}
