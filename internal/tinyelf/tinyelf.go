// Package tinyelf makes the smallest programs that Linux runs: some instructions
// and the bytes they need, for guests that have nothing else.
//
// It is no linker: the caller writes machine code for x86-64 that depends on no
// address.
package tinyelf

import "encoding/binary"

// Program is an ELF executable that begins with the first instruction of code.
// data follows code directly.
func Program(code []byte, data string) []byte {
	const at, headers = 0x400000, 64 + 56
	le := binary.LittleEndian
	p := append(make([]byte, 0, 256), "\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00"...)
	p = le.AppendUint16(p, 2)  // executable
	p = le.AppendUint16(p, 62) // x86-64
	p = le.AppendUint32(p, 1)
	p = le.AppendUint64(p, at+headers) // entry
	p = le.AppendUint64(p, 64)         // program header
	p = le.AppendUint64(p, 0)          // no sections
	p = le.AppendUint32(p, 0)
	for _, v := range []uint16{64, 56, 1, 0, 0, 0} {
		p = le.AppendUint16(p, v)
	}
	size := uint64(headers + len(code) + len(data))
	p = le.AppendUint32(p, 1) // load
	p = le.AppendUint32(p, 5) // readable, executable
	for _, v := range []uint64{0, at, at, size, size, 0x1000} {
		p = le.AppendUint64(p, v)
	}
	return append(append(p, code...), data...)
}
