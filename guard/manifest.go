package guard

import (
	"crypto/sha1" // the kernel's name for a program, not a seal
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
)

// Manifest is what a bundle holds, as far as a heartbeat is compared with it.
type Manifest struct {
	// BuildID of the kernel it was linked for.
	BuildID  string
	Programs []Program
	// Trust is whose policies guests with the bundle take; nil is anybody's.
	Trust *Trust
}

// Program of a bundle.
type Program struct {
	Name string
	// Tag is what the kernel calls its code, in lower-case hexadecimal.
	Tag string
}

var errBundle = errors.New("not a bundle of the guard")

// ReadManifest reads a bundle that package guard/bpf linked.
func ReadManifest(bundle []byte) (Manifest, error) {
	const magic, shape, instruction, use = "HBGUARD\x02", 5 * 4, 8, 2 * 4
	c := bundleCursor{b: bundle}
	if string(c.take(len(magic))) != magic {
		return Manifest{}, fmt.Errorf("read bundle of %d bytes: %w", len(bundle), errBundle)
	}
	m := Manifest{BuildID: c.text()}
	c.take(int(c.u32())) // types
	for range c.u16() {
		c.text()
		c.take(shape + 2*4)
		if c.u16() != 0 {
			c.take(shape)
		}
		if c.bad {
			break
		}
	}
	for range c.u16() {
		p := Program{Name: c.text()}
		c.text()      // licence
		c.take(4 * 4) // kind, attachment, flags, hook
		instructions, uses, functions := c.u32(), c.u32(), c.u32()
		code := c.take(int(instructions) * instruction)
		c.take(int(uses) * use)
		c.take(int(functions) * use)
		if c.bad {
			break
		}
		// The descriptors of maps are still 0 in the code, as the kernel takes
		// them for its tag.
		tag := sha1.Sum(code)
		p.Tag = hex.EncodeToString(tag[:8])
		m.Programs = append(m.Programs, p)
	}
	m.Trust = c.trust()
	if c.bad || len(c.b) != 0 {
		return Manifest{}, fmt.Errorf("read bundle of %d bytes: %w", len(bundle), errBundle)
	}
	return m, nil
}

// bundleCursor takes values off the front; once something is missing it gives
// zeros and bad stays true.
type bundleCursor struct {
	b   []byte
	bad bool
}

func (c *bundleCursor) take(n int) []byte {
	if c.bad || n < 0 || n > len(c.b) {
		c.bad = true
		return nil
	}
	v := c.b[:n]
	c.b = c.b[n:]
	return v
}

func (c *bundleCursor) u16() uint16 {
	if b := c.take(2); b != nil {
		return binary.LittleEndian.Uint16(b)
	}
	return 0
}

func (c *bundleCursor) u32() uint32 {
	if b := c.take(4); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

func (c *bundleCursor) text() string { return string(c.take(int(c.u16()))) }
