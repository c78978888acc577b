package kernel

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"strings"
)

// archive writes a cpio archive in the "newc" form the kernel unpacks. The
// same entries give the same bytes: no times, no owners, numbered inodes.
type archive struct {
	w     *bufio.Writer
	inode uint32
	err   error
}

func newArchive(w io.Writer) *archive { return &archive{w: bufio.NewWriter(w)} }

// File is a file of an initramfs.
type File struct {
	Name string // without a leading slash
	Mode uint32 // permissions
	Data []byte
}

// Archive makes an initramfs of files. The same files give the same bytes.
func Archive(files ...File) ([]byte, error) {
	var buf bytes.Buffer
	a := newArchive(&buf)
	for _, f := range files {
		a.file(f.Name, f.Mode&0o7777, f.Data)
	}
	err := a.close()
	return buf.Bytes(), err
}

const (
	modeDir  = 0o040000
	modeFile = 0o100000
)

func (a *archive) dir(name string) { a.entry(name, modeDir|0o755, nil) }

func (a *archive) file(name string, mode uint32, data []byte) {
	a.entry(name, modeFile|mode, data)
}

func (a *archive) entry(name string, mode uint32, data []byte) {
	if a.err != nil {
		return
	}
	if name == "" || strings.HasPrefix(name, "/") || strings.ContainsRune(name, 0) {
		a.err = fmt.Errorf("write archive: bad name %q", name)
		return
	}
	if uint64(len(data)) > 1<<31 {
		a.err = fmt.Errorf("write archive: %q has %d bytes", name, len(data))
		return
	}
	a.inode++
	links := 1
	if mode&modeDir != 0 {
		links = 2
	}
	fmt.Fprintf(a.w, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		a.inode, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name)
	a.pad(110 + len(name) + 1)
	a.w.Write(data)
	a.pad(len(data))
}

func (a *archive) pad(n int) {
	a.w.Write(make([]byte, pad4(uint64(n))-uint64(n)))
}

// close writes the trailer and reports the first error of all.
func (a *archive) close() error {
	if a.err == nil {
		a.inode = 0
		a.entry("TRAILER!!!", 0, nil)
	}
	if err := a.w.Flush(); a.err == nil {
		a.err = err
	}
	return a.err
}
