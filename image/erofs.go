package image

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"math"
	"slices"
	"strings"
)

// The on-disk format is the kernel's fs/erofs/erofs_fs.h, of which this
// writer uses the oldest part: uncompressed data in whole blocks, small data
// beside its inode, extended inodes, attributes beside the inode. Every kernel
// since 5.4 mounts it.
const (
	blockSize = 4096
	slotSize  = 32 // an inode number counts slots
	inodeSize = 64

	superOffset = 1024
	superMagic  = 0xE0F5E1E2
	superSize   = 128

	layoutPlain  = 0
	layoutInline = 2

	// inlineMax is the most data kept beside an inode: more would leave holes
	// in the blocks of inodes.
	inlineMax = 1024

	direntSize  = 12
	xattrHeader = 12
)

// inode is a file with its place in the image.
type inode struct {
	*file
	number uint32
	nlink  uint32
	parent *inode // of a directory
	body   []byte // of a directory or a symbolic link
	length int64  // of the body or of the data
	attrs  []byte // attributes, encoded
	inline bool
	at     int64 // of the inode
	block  int64 // first block of the data
}

func (n *inode) head() int64 { return inodeSize + int64(len(n.attrs)) }

// plan is an image laid out, before a byte of it is written.
type plan struct {
	inodes []*inode // in the order of their places
	byFile map[*file]*inode
	meta   int64 // end of the inodes
	blocks int64
	uuid   [16]byte
}

// layOut gives every file of a tree its place. The order is that of the names,
// so a tree has one image.
func layOut(root *file, uuid [16]byte) (*plan, error) {
	p := &plan{byFile: map[*file]*inode{}, uuid: uuid}
	p.number(root, nil)
	if len(p.inodes) > math.MaxUint32 {
		return nil, errors.New("lay out image: too many files")
	}
	at := int64(blockSize) // the super block has the first block
	for _, n := range p.inodes {
		at = p.place(n, at)
	}
	// Numbers are known only now, and names refer to them.
	for _, n := range p.inodes {
		if n.isDir() {
			n.body = p.dirents(n)
		}
	}
	p.meta = at
	next := (at + blockSize - 1) / blockSize
	for _, n := range p.inodes {
		if n.inline || n.length == 0 {
			continue
		}
		n.block = next
		next += (n.length + blockSize - 1) / blockSize
	}
	if next > math.MaxUint32 {
		return nil, errors.New("lay out image: too large")
	}
	p.blocks = next
	return p, nil
}

// number walks a tree breadth first, counting links.
func (p *plan) number(root *file, parent *inode) {
	add := func(f *file, parent *inode) *inode {
		n := &inode{file: f, number: uint32(len(p.inodes) + 1), parent: parent}
		p.byFile[f] = n
		p.inodes = append(p.inodes, n)
		return n
	}
	top := add(root, parent)
	top.parent = top
	for i := 0; i < len(p.inodes); i++ {
		n := p.inodes[i]
		if !n.isDir() {
			continue
		}
		n.nlink += 2
		for _, name := range slices.Sorted(maps.Keys(n.entries)) {
			f := n.entries[name].file
			child, seen := p.byFile[f]
			if !seen {
				child = add(f, n)
			}
			if f.isDir() {
				n.nlink++
			} else {
				child.nlink++
			}
		}
	}
}

// place puts an inode at or after at, and returns where the next may stand.
func (p *plan) place(n *inode, at int64) int64 {
	n.attrs = encodeXattrs(n.xattrs)
	switch n.mode & modeType {
	case modeDir:
		n.length = direntLength(n)
	case modeSymlink:
		n.body = []byte(n.target)
		n.length = int64(len(n.body))
	default:
		n.length = n.size
	}
	end := n.head()
	if n.length > 0 && n.length <= inlineMax {
		// Data beside an inode may not cross into the next block.
		if crosses(at+end, n.length) {
			at = alignUp(at, blockSize)
		}
		if !crosses(at+end, n.length) {
			n.inline = true
			end += n.length
		}
	}
	n.at = at
	return alignUp(at+end, slotSize)
}

func crosses(at, length int64) bool { return at/blockSize != (at+length-1)/blockSize }

func alignUp(n, to int64) int64 { return (n + to - 1) / to * to }

// nid is the number by which names refer to an inode. It counts from the start
// of the image, so none is zero: tools take a name with number zero for a
// deleted one.
func (n *inode) nid() uint64 { return uint64(n.at) / slotSize }

// names returns the names of a directory as the format wants them: sorted by
// byte, with itself and its parent among them.
func (n *inode) names() []string {
	all := append(slices.Collect(maps.Keys(n.entries)), ".", "..")
	slices.Sort(all)
	return all
}

// direntBlocks splits the names of a directory over blocks.
func direntBlocks(names []string) [][]string {
	var out [][]string
	used := 0
	for _, name := range names {
		need := direntSize + len(name)
		if len(out) == 0 || used+need > blockSize {
			out = append(out, nil)
			used = 0
		}
		used += need
		out[len(out)-1] = append(out[len(out)-1], name)
	}
	return out
}

// direntLength is the size of a directory: whole blocks, and the used part of
// the last one.
func direntLength(n *inode) int64 {
	blocks := direntBlocks(n.names())
	used := int64(0)
	for _, name := range blocks[len(blocks)-1] {
		used += direntSize + int64(len(name))
	}
	return int64(len(blocks)-1)*blockSize + used
}

// dirents encodes a directory.
func (p *plan) dirents(dir *inode) []byte {
	var out []byte
	for _, names := range direntBlocks(dir.names()) {
		out = append(out, make([]byte, alignUp(int64(len(out)), blockSize)-int64(len(out)))...)
		offset := len(names) * direntSize
		for _, name := range names {
			to := dir
			switch name {
			case ".":
			case "..":
				to = dir.parent
			default:
				to = p.byFile[dir.entries[name].file]
			}
			out = binary.LittleEndian.AppendUint64(out, to.nid())
			out = binary.LittleEndian.AppendUint16(out, uint16(offset))
			out = append(out, direntType(to.mode), 0)
			offset += len(name)
		}
		for _, name := range names {
			out = append(out, name...)
		}
	}
	return out
}

func direntType(mode uint16) byte {
	switch mode & modeType {
	case modeRegular:
		return 1
	case modeDir:
		return 2
	case modeFIFO:
		return 5
	case modeSymlink:
		return 7
	}
	return 0
}

// write writes the image. Data of regular files comes from the spool.
func (p *plan) write(w io.Writer, spool io.ReaderAt) error {
	out := &placed{w: w}
	if err := out.put(0, p.super()); err != nil {
		return err
	}
	for _, n := range p.inodes {
		if err := p.writeInode(out, n, spool); err != nil {
			return err
		}
	}
	for _, n := range p.inodes {
		if n.block == 0 {
			continue
		}
		if err := out.pad(n.block * blockSize); err != nil {
			return err
		}
		if err := n.writeBody(out, spool); err != nil {
			return err
		}
	}
	return out.pad(p.blocks * blockSize)
}

func (p *plan) writeInode(out *placed, n *inode, spool io.ReaderAt) error {
	if err := out.put(n.at, n.encode()); err != nil {
		return err
	}
	if !n.inline {
		return nil
	}
	return n.writeBody(out, spool)
}

func (n *inode) writeBody(out *placed, spool io.ReaderAt) error {
	var body io.Reader = bytes.NewReader(n.body)
	if n.mode&modeType == modeRegular {
		body = io.NewSectionReader(spool, n.start, n.size)
	}
	written, err := io.Copy(out, body)
	if err == nil && written != n.length {
		err = fmt.Errorf("inode %d has %d bytes, was laid out with %d", n.number, written, n.length)
	}
	return err
}

// encode returns an extended inode and its attributes.
func (n *inode) encode() []byte {
	le := binary.LittleEndian
	format := uint16(1) | layoutPlain<<1
	if n.inline {
		format = 1 | layoutInline<<1
	}
	b := make([]byte, inodeSize, n.head())
	le.PutUint16(b[0:], format)
	if len(n.attrs) > 0 {
		le.PutUint16(b[2:], uint16((len(n.attrs)-xattrHeader)/4+1))
	}
	le.PutUint16(b[4:], n.mode)
	le.PutUint64(b[8:], uint64(n.length))
	le.PutUint32(b[16:], uint32(n.block))
	le.PutUint32(b[20:], n.number)
	le.PutUint32(b[24:], n.uid)
	le.PutUint32(b[28:], n.gid)
	le.PutUint64(b[32:], uint64(n.sec))
	le.PutUint32(b[40:], n.nsec)
	le.PutUint32(b[44:], n.nlink)
	return append(b, n.attrs...)
}

// super returns the first block.
func (p *plan) super() []byte {
	le := binary.LittleEndian
	b := make([]byte, blockSize)
	s := b[superOffset : superOffset+superSize]
	le.PutUint32(s[0:], superMagic)
	le.PutUint32(s[8:], 1) // the checksum counts
	s[12] = 12             // log2 of the block size
	le.PutUint16(s[14:], uint16(p.inodes[0].nid()))
	le.PutUint64(s[16:], uint64(len(p.inodes)))
	le.PutUint32(s[36:], uint32(p.blocks))
	le.PutUint32(s[40:], 0) // inode numbers count from the first block
	copy(s[48:], p.uuid[:])
	// The kernel's CRC-32C starts from all ones and does not invert the end.
	le.PutUint32(s[4:], ^crc32.Checksum(b[superOffset:], crc32.MakeTable(crc32.Castagnoli)))
	return b
}

// placed writes at rising offsets, with zeros between.
type placed struct {
	w  io.Writer
	at int64
}

func (p *placed) Write(b []byte) (int, error) {
	n, err := p.w.Write(b)
	p.at += int64(n)
	return n, err
}

func (p *placed) put(at int64, b []byte) error {
	if err := p.pad(at); err != nil {
		return err
	}
	_, err := p.Write(b)
	return err
}

func (p *placed) pad(to int64) error {
	if to < p.at {
		return fmt.Errorf("write image: place %d was already written", to)
	}
	_, err := io.CopyN(p, zeros{}, to-p.at)
	return err
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) {
	clear(b)
	return len(b), nil
}

// xattrPrefix splits the name of an attribute as the format numbers it.
func xattrPrefix(name string) (index byte, rest string, ok bool) {
	switch name {
	case "system.posix_acl_access":
		return 2, "", true
	case "system.posix_acl_default":
		return 3, "", true
	}
	for _, p := range []struct {
		prefix string
		index  byte
	}{{"user.", 1}, {"trusted.", 4}, {"security.", 6}} {
		if rest, ok := strings.CutPrefix(name, p.prefix); ok && rest != "" && len(rest) <= 255 {
			return p.index, rest, true
		}
	}
	return 0, "", false
}

// encodeXattrs returns the attributes of an inode, sorted by name.
func encodeXattrs(attrs map[string]string) []byte {
	if len(attrs) == 0 {
		return nil
	}
	b := make([]byte, xattrHeader)
	for _, name := range slices.Sorted(maps.Keys(attrs)) {
		index, rest, _ := xattrPrefix(name)
		value := attrs[name]
		b = append(b, byte(len(rest)), index)
		b = binary.LittleEndian.AppendUint16(b, uint16(len(value)))
		b = append(b, rest...)
		b = append(b, value...)
		b = append(b, make([]byte, alignUp(int64(len(b)), 4)-int64(len(b)))...)
	}
	return b
}
