package main

import (
	"bytes"
	"encoding/binary"
)

// library makes a shared library whose initialiser prints a token. It is two
// pages: code, and the dynamic section, which the loader writes to.
func library(token string) ([]byte, error) {
	const page = 4096
	le := binary.LittleEndian
	// lea rsi,[rip+msg]; mov edi,1; mov edx,len; mov eax,1 (write); syscall; ret
	code := []byte{0x48, 0x8d, 0x35, 0, 0, 0, 0, 0xbf, 1, 0, 0, 0, 0xba, 0, 0, 0, 0, 0xb8, 1, 0, 0, 0, 0x0f, 0x05, 0xc3}
	message := token + "\n"
	const at = 512 // of the code
	le.PutUint32(code[3:], uint32(len(code)-7))
	le.PutUint32(code[13:], uint32(len(message)))

	var dyn bytes.Buffer
	for _, d := range [][2]uint64{
		{12, at},                 // DT_INIT
		{5, page + 256}, {10, 1}, // string table: one empty string
		{6, page + 320}, {11, 24}, // symbol table: none but the first
		{4, page + 384}, // hash table
		{0, 0},
	} {
		binary.Write(&dyn, le, d)
	}
	file := make([]byte, page+512)
	copy(file, []byte{0x7f, 'E', 'L', 'F', 2, 1, 1})
	le.PutUint16(file[16:], 3)  // ET_DYN
	le.PutUint16(file[18:], 62) // x86-64
	le.PutUint32(file[20:], 1)
	le.PutUint64(file[32:], 64) // program headers
	le.PutUint16(file[52:], 64)
	le.PutUint16(file[54:], 56)
	le.PutUint16(file[56:], 4)
	header := func(i int, kind, flags uint32, offset, size, align uint64) {
		p := file[64+56*i:]
		le.PutUint32(p[0:], kind)
		le.PutUint32(p[4:], flags)
		for j, v := range []uint64{offset, offset, offset, size, size, align} {
			le.PutUint64(p[8+8*j:], v)
		}
	}
	header(0, 1, 5, 0, page, page)              // PT_LOAD, read and execute
	header(1, 1, 6, page, 512, page)            // PT_LOAD, read and write
	header(2, 2, 6, page, uint64(dyn.Len()), 8) // PT_DYNAMIC
	header(3, 0x6474e551, 6, 0, 0, 16)          // PT_GNU_STACK: not executable
	copy(file[at:], code)
	copy(file[at+len(code):], message)
	copy(file[page:], dyn.Bytes())
	le.PutUint32(file[page+384:], 1) // hash: one bucket, one symbol
	le.PutUint32(file[page+388:], 1)
	return file, nil
}
