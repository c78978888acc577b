package kernel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/pierrec/lz4/v4"
)

// Bounds on a kernel image. Debian's is 14 MB packed and 53 MB unpacked.
const (
	maxPacked   = 128 << 20
	maxUnpacked = 512 << 20
	lz4Block    = 8 << 20 // of the legacy frame format
)

var errShort = errors.New("image ends early")

// Unpack returns the ELF kernel inside a bzImage (x86 boot protocol 2.08 or
// newer) whose payload is an LZ4 legacy frame. Booting it directly saves the
// guest the emulated decompression.
func Unpack(image []byte) ([]byte, error) {
	payload, err := bzPayload(image)
	if err != nil {
		return nil, fmt.Errorf("unpack kernel: %w", err)
	}
	elf, err := unpackLZ4(payload)
	if err != nil {
		return nil, fmt.Errorf("unpack kernel: %w", err)
	}
	if !bytes.HasPrefix(elf, []byte("\x7fELF")) {
		return nil, errors.New("unpack kernel: the payload is no ELF file")
	}
	return elf, nil
}

// bzPayload finds the compressed kernel by the setup header.
func bzPayload(image []byte) ([]byte, error) {
	if len(image) < 0x250 {
		return nil, errShort
	}
	if string(image[0x202:0x206]) != "HdrS" {
		return nil, errors.New("no x86 boot header")
	}
	if v := binary.LittleEndian.Uint16(image[0x206:]); v < 0x208 {
		return nil, fmt.Errorf("boot protocol %d.%02d has no payload fields, 2.08 has", v>>8, v&0xff)
	}
	sectors := uint64(image[0x1f1])
	if sectors == 0 {
		sectors = 4 // the boot protocol says so
	}
	start := (sectors+1)*512 + uint64(binary.LittleEndian.Uint32(image[0x248:]))
	size := uint64(binary.LittleEndian.Uint32(image[0x24c:]))
	if start+size > uint64(len(image)) {
		return nil, errShort
	}
	return image[start : start+size], nil
}

// unpackLZ4 undoes an LZ4 legacy frame followed by the unpacked size, which
// the kernel's build appends and which must agree.
func unpackLZ4(payload []byte) ([]byte, error) {
	if len(payload) < 8 {
		return nil, errShort
	}
	if magic := binary.LittleEndian.Uint32(payload); magic != 0x184c2102 {
		return nil, fmt.Errorf("payload begins with %08x: only LZ4 legacy frames (184c2102) are understood", magic)
	}
	frame, trailer := payload[4:len(payload)-4], payload[len(payload)-4:]
	want := binary.LittleEndian.Uint32(trailer)
	if want > maxUnpacked {
		return nil, fmt.Errorf("image says it unpacks to %d bytes, at most %d are accepted", want, maxUnpacked)
	}
	// Grow by blocks that really unpack: the claimed size buys no memory.
	var out []byte
	block := make([]byte, lz4Block)
	for len(frame) > 0 {
		if len(frame) < 4 {
			return nil, errShort
		}
		n := uint64(binary.LittleEndian.Uint32(frame))
		frame = frame[4:]
		if n == 0 || n > uint64(len(frame)) {
			return nil, errShort
		}
		got, err := lz4.UncompressBlock(frame[:n], block)
		if err != nil {
			return nil, fmt.Errorf("LZ4 block at %d bytes: %w", len(out), err)
		}
		frame = frame[n:]
		if uint64(len(out))+uint64(got) > uint64(want) {
			return nil, fmt.Errorf("image unpacks to more than the %d bytes it says", want)
		}
		out = append(out, block[:got]...)
	}
	if uint32(len(out)) != want {
		return nil, fmt.Errorf("image unpacks to %d bytes and says %d", len(out), want)
	}
	return out, nil
}
