package kernel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

// Bounds on a kernel image. Debian's is 14 MB packed and 53 MB unpacked.
const (
	maxPacked   = 128 << 20
	maxUnpacked = 512 << 20
	lz4Block    = 8 << 20 // of the legacy frame format
)

var errShort = errors.New("image ends early")

// Magic numbers that payloads begin with.
const (
	magicLZ4  = 0x184c2102 // the legacy frame format, as lz4 -l makes it
	magicZstd = 0xfd2fb528 // RFC 8878
)

// Unpack returns the ELF kernel inside a bzImage (x86 boot protocol 2.08 or
// newer) whose payload is an LZ4 legacy frame, as in Debian's 6.1, or a
// Zstandard frame, as in its 6.12. Booting it directly saves the guest the
// emulated decompression.
func Unpack(image []byte) ([]byte, error) {
	payload, err := bzPayload(image)
	if err != nil {
		return nil, fmt.Errorf("unpack kernel: %w", err)
	}
	elf, err := unpackPayload(payload)
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

// unpackPayload undoes a compressed payload followed by the unpacked size,
// which the kernel's build appends and which must agree.
func unpackPayload(payload []byte) (out []byte, err error) {
	if len(payload) < 8 {
		return nil, errShort
	}
	frame, trailer := payload[:len(payload)-4], payload[len(payload)-4:]
	want := binary.LittleEndian.Uint32(trailer)
	if want > maxUnpacked {
		return nil, fmt.Errorf("image says it unpacks to %d bytes, at most %d are accepted", want, maxUnpacked)
	}
	switch magic := binary.LittleEndian.Uint32(payload); magic {
	case magicLZ4:
		out, err = unpackLZ4(frame[4:], want)
	case magicZstd:
		out, err = unpackZstd(frame, want)
	default:
		err = fmt.Errorf("payload begins with %08x: only LZ4 legacy frames (%08x) and Zstandard (%08x) are understood", magic, magicLZ4, magicZstd)
	}
	if err == nil && uint32(len(out)) != want {
		err = fmt.Errorf("image unpacks to %d bytes and says %d", len(out), want)
	}
	return out, err
}

// unpackLZ4 undoes the blocks of an LZ4 legacy frame. It grows by blocks that
// really unpack: the claimed size buys no memory.
func unpackLZ4(frame []byte, want uint32) (out []byte, err error) {
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
	return out, nil
}

// unpackZstd undoes a Zstandard frame.
func unpackZstd(frame []byte, want uint32) ([]byte, error) {
	z, err := zstd.NewReader(bytes.NewReader(frame), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxUnpacked))
	if err != nil {
		return nil, err
	}
	defer z.Close()
	out, err := io.ReadAll(io.LimitReader(z, int64(want)+1))
	if err != nil {
		return nil, fmt.Errorf("read Zstandard frame at %d bytes: %w", len(out), err)
	}
	if len(out) > int(want) {
		return nil, fmt.Errorf("image unpacks to more than the %d bytes it says", want)
	}
	return out, nil
}
