package guard

import "syscall"

// What the agent adds to the record that the content of a watched file is
// another: struct content_event of bpf/src/file.h.
const (
	opContent   = 67
	contentSize = 912
	namesAt     = 80
	namesEnd    = 336
	idAt        = 816
	imageAt     = 824
	deviceAt    = 832
	flagsAt     = 836
	knownAt     = 840
	digestsAt   = 848

	contentNew  = 1
	contentGone = 4
)

// What is known of a content.
const (
	contentUnknown   = 0 // nothing was known of it, for it was not of the image nor looked at before
	contentDigest    = 1
	contentNone      = 2 // there was no such file
	contentLarge     = 3
	contentTooMuch   = 4 // too much was to be read in one second
	contentMoved     = 5 // another file, or none, was at the path when it was looked at
	contentElsewhere = 6 // the file is in no root
	contentDeep      = 7 // its path is too long for a record
	contentUnread    = 8
)

const (
	mostContent = 1 << 20 // bytes of one file
	mostASecond = 8 << 20
	mostWatched = 1024 // files whose last digest is remembered
)

// contents is what the agent knows of watched files.
type contents struct {
	last   map[[16]byte][digestSize]byte // by digest of device and path
	second uint64
	read   int
	// made is the completed record that had no room, of the sequence.
	made     []byte
	sequence uint64
	buf      []byte
}

// complete fills in a record from the ring of what was allowed. One that was
// filled in and found no room is given as it was.
func (g *Guard) complete(record []byte) []byte {
	if len(record) != contentSize || record[1] != opContent {
		return record
	}
	c := &g.contents
	sequence := (&cursor{b: record[24:]}).u64()
	if c.made != nil && c.sequence == sequence {
		return c.made
	}
	c.made, c.sequence = append(c.made[:0], record...), sequence
	// From here on another end of writing has a record of its own.
	_ = deleteMap(g.maps["written_unseen"].fd, record[idAt:idAt+8])
	before, after := g.compare(record, c.made[digestsAt:digestsAt+digestSize], c.made[digestsAt+digestSize:])
	c.made[knownAt], c.made[knownAt+1] = before, after
	return c.made
}

// compare finds the two digests and says what is known of each.
func (g *Guard) compare(record, before, after []byte) (byte, byte) {
	at := func(i int) uint32 { return (&cursor{b: record[i:]}).u32() }
	path, flags := pathOf(record[namesAt:namesEnd]), at(flagsAt)
	if path == "" {
		return contentUnknown, contentDeep
	}
	var root *guardedRoot
	for i := range g.roots {
		if g.roots[i].own == at(deviceAt) {
			root = &g.roots[i]
		}
	}
	if root == nil {
		return contentUnknown, contentElsewhere
	}
	key := placeKey(at(deviceAt), path)
	was := g.before(root, path, key, flags, record[imageAt:imageAt+8], before)
	if flags&contentGone != 0 {
		delete(g.contents.last, key)
		return was, contentNone
	}
	fd, err := openFile(root.overlay, path)
	if err != nil {
		delete(g.contents.last, key)
		return was, contentMoved
	}
	defer syscall.Close(fd)
	is := byte(contentMoved)
	if g.isWatched(fd, record[idAt:idAt+8]) {
		is = g.contents.digest(fd, after)
	}
	if is == contentDigest {
		g.contents.remember(key, [digestSize]byte(after))
	} else {
		delete(g.contents.last, key)
	}
	return was, is
}

// before finds what the file at a path had: what was last seen there, or what it
// has in the image, if it was the image's until now.
func (g *Guard) before(root *guardedRoot, path string, key [16]byte, flags uint32, image, digest []byte) byte {
	if flags&contentNew != 0 {
		return contentNone
	}
	if last, ok := g.contents.last[key]; ok {
		copy(digest, last[:])
		return contentDigest
	}
	ino := (&cursor{b: image}).u64()
	if ino == 0 {
		return contentUnknown
	}
	fd, err := openFile(root.image, path)
	if err != nil {
		return contentUnknown
	}
	defer syscall.Close(fd)
	var st syscall.Stat_t
	if syscall.Fstat(fd, &st) != nil || st.Ino != ino {
		return contentUnknown
	}
	return g.contents.digest(fd, digest)
}

// isWatched says whether the file is the one that a record is about.
func (g *Guard) isWatched(fd int, id []byte) bool {
	var key [4]byte
	var value [16]byte // struct watched
	put32(key[:], uint32(fd))
	return lookupMap(g.maps["watched"].fd, key[:], value[:]) == nil && string(value[:8]) == string(id)
}

func (c *contents) remember(key [16]byte, digest [digestSize]byte) {
	if c.last == nil {
		c.last = map[[16]byte][digestSize]byte{}
	}
	if _, known := c.last[key]; !known && len(c.last) >= mostWatched {
		for other := range c.last {
			delete(c.last, other)
			break
		}
	}
	c.last[key] = digest
}

// digest reads a file of bounded size, as long as there were not too many in
// this second.
func (c *contents) digest(fd int, digest []byte) byte {
	var st syscall.Stat_t
	if syscall.Fstat(fd, &st) != nil || st.Mode&syscall.S_IFMT != syscall.S_IFREG {
		return contentUnread
	}
	if st.Size > mostContent {
		return contentLarge
	}
	if now := sinceBoot() / 1e9; now != c.second {
		c.second, c.read = now, 0
	}
	if c.read+int(st.Size) > mostASecond {
		return contentTooMuch
	}
	if c.buf == nil {
		c.buf = make([]byte, 16<<10)
	}
	d := newDigester()
	for {
		n, err := syscall.Read(fd, c.buf)
		switch {
		case err == syscall.EINTR:
			continue
		case err != nil:
			return contentUnread
		case n == 0:
			sum := d.sum()
			copy(digest, sum[:])
			return contentDigest
		}
		c.read += n
		if d.size+uint64(n) > mostContent {
			return contentLarge // it grew
		}
		d.write(c.buf[:n])
	}
}

// pathOf is the path that a record's names make, or none if they are cut.
func pathOf(text []byte) string {
	const most, room = 12, 256 - 64
	var names [most]string
	n, at := 0, 0
	for at < len(text) && text[at] != 0 {
		end := at
		for end < len(text) && text[end] != 0 {
			end++
		}
		if n == most-1 || end == len(text) {
			return ""
		}
		names[n] = string(text[at:end])
		if len(names[n]) >= 63 {
			return "" // as much of a name as there is room for
		}
		n++
		at = end + 1
	}
	if at >= room {
		return ""
	}
	path := ""
	for i := n - 1; i >= 0; i-- {
		path += names[i]
		if i > 0 {
			path += "/"
		}
	}
	return path
}

// openFile opens a file to be read without following any link.
func openFile(root int, path string) (int, error) {
	dir, err := openPath(root, ".", 0)
	if err != nil {
		return -1, err
	}
	defer func() { syscall.Close(dir) }()
	for {
		var name string
		name, path = cutName(path)
		if onlySlashes(path) {
			const quietly = syscall.O_NOFOLLOW | syscall.O_NONBLOCK | syscall.O_NOCTTY | syscall.O_NOATIME
			return syscall.Openat(dir, name, syscall.O_RDONLY|syscall.O_CLOEXEC|quietly, 0)
		}
		next, err := openPath(dir, name, syscall.O_NOFOLLOW|syscall.O_DIRECTORY)
		if err != nil {
			return -1, err
		}
		syscall.Close(dir)
		dir = next
	}
}

// placeKey names a path of a file system in few bytes.
func placeKey(device uint32, path string) [16]byte {
	d := newDigester()
	d.write(append32(nil, device))
	d.write([]byte(path))
	sum := d.sum()
	return [16]byte(sum[:16])
}
