package guestproto

// MountRoot mounts an erofs image, read-only, with a writable overlay whose
// upper layer is a tmpfs or a disk.
type MountRoot struct {
	Root       uint8  // number the host gives it, below MaxRoots
	Serial     string // of the virtio-blk device
	UpperBytes uint64 // most the upper layer may hold; 0: half of memory
	// UpperSerial, if there is one, is the disk that holds the upper layer, and
	// UpperFS its file system: its size is the limit.
	UpperSerial string
	UpperFS     string
}

// Append appends the payload to b.
func (m *MountRoot) Append(b []byte) []byte {
	b = appendString(append(b, m.Root), m.Serial)
	b = appendU64(b, m.UpperBytes)
	return appendString(appendString(b, m.UpperSerial), m.UpperFS)
}

// ParseMountRoot reads the payload of a mount root.
func ParseMountRoot(b []byte) (m MountRoot, err error) {
	r := reader{b: b}
	m.Root, m.Serial, m.UpperBytes = r.u8(), r.string(), r.u64()
	m.UpperSerial, m.UpperFS = r.string(), r.string()
	if m.Root >= MaxRoots {
		r.fail("the root's number is too high")
	}
	return m, r.end("mount root")
}

// MountedRoot names the superblocks of a root as the kernel does:
// major<<20 | minor.
type MountedRoot struct {
	Overlay uint32
	Lower   uint32
}

// Append appends the payload to b.
func (m *MountedRoot) Append(b []byte) []byte { return appendU32(appendU32(b, m.Overlay), m.Lower) }

// ParseMountedRoot reads the reply to a mount root.
func ParseMountedRoot(b []byte) (m MountedRoot, err error) {
	r := reader{b: b}
	m.Overlay, m.Lower = r.u32(), r.u32()
	return m, r.end("mount root reply")
}

// UnmountRoot gives a root's number and its disks free. EBUSY says that a
// container on it was not forgotten yet, or that the kernel still holds it:
// then it is worth another try soon.
type UnmountRoot struct{ Root uint8 }

// Append appends the payload to b.
func (m *UnmountRoot) Append(b []byte) []byte { return append(b, m.Root) }

// ParseUnmountRoot reads the payload of an unmount root.
func ParseUnmountRoot(b []byte) (m UnmountRoot, err error) {
	r := reader{b: b}
	if m.Root = r.u8(); m.Root >= MaxRoots {
		r.fail("the root's number is too high")
	}
	return m, r.end("unmount root")
}

// Dir makes a directory of the pod, which containers mount by its name and
// which lives until it is removed. It is a tmpfs of Bytes, or, with a Serial,
// that disk's file system. The owner and the mode of what a disk holds stay.
type Dir struct {
	Name     string // 1 to 128 of a-z A-Z 0-9 . _ - ~, no dot first
	Bytes    uint64 // most it may hold; 0: half of memory
	Files    uint64 // most files it may hold; 0: one for each 4 KiB of Bytes
	Mode     uint32
	UID, GID uint32
	Serial   string
	FS       string
}

// Append appends the payload to b.
func (m *Dir) Append(b []byte) []byte {
	b = appendU64(appendU64(appendString(b, m.Name), m.Bytes), m.Files)
	b = appendU32(appendU32(appendU32(b, m.Mode), m.UID), m.GID)
	return appendString(appendString(b, m.Serial), m.FS)
}

// ParseDir reads the payload of a make directory.
func ParseDir(b []byte) (m Dir, err error) {
	r := reader{b: b}
	m.Name, m.Bytes, m.Files = r.string(), r.u64(), r.u64()
	m.Mode, m.UID, m.GID = r.u32(), r.u32(), r.u32()
	m.Serial, m.FS = r.string(), r.string()
	r.checkName(m.Name)
	if m.Mode&^0o7777 != 0 {
		r.fail("the mode is none")
	}
	return m, r.end("make directory")
}

// checkName refuses a name that could be mistaken for a path.
func (r *reader) checkName(name string) {
	ok := len(name) > 0 && len(name) <= 128 && name[0] != '.'
	for i := range len(name) {
		c := name[i]
		ok = ok && (c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' ||
			c == '.' || c == '_' || c == '-' || c == '~')
	}
	if !ok {
		r.fail("the name is none")
	}
}

// Name is the payload of remove directory and of mount share: a directory of
// the pod, or the tag of a virtio file system. EBUSY says that it is in use.
type Name struct{ Name string }

// Append appends the payload to b.
func (m *Name) Append(b []byte) []byte { return appendString(b, m.Name) }

// ParseName reads a payload that is one name; v names it in errors.
func ParseName(v Verb, b []byte) (m Name, err error) {
	r := reader{b: b}
	m.Name = r.string()
	r.checkName(m.Name)
	return m, r.end(v.String())
}

// PushFile is a file, or the next part of one, that is pushed into a directory
// of the pod.
type PushFile struct {
	Path     string // below the directory
	Mode     uint32
	UID, GID uint32
	More     bool   // Data goes behind what an earlier entry of this push wrote
	Data     []byte // lies in what was parsed
}

// Push writes files into a directory of the pod that is a tmpfs.
//
// With a Stamp it replaces all that was pushed before at once, as kubelet does:
// the files of the frames from First to Last gather in the new directory Stamp;
// then the link ..data is swapped to it by a rename, the links to the first
// names of the paths are made to lead through ..data, and the old directory
// goes. One push with a Stamp is under way per directory; First drops one that
// was not brought to its end.
//
// Without one, each file is written in place: its inode stays, so that it
// changes where it is mounted by itself.
type Push struct {
	Dir         string
	Stamp       string // starts with "..": the name of the new directory
	First, Last bool
	Files       []PushFile
}

// Append appends the payload to b.
func (m *Push) Append(b []byte) []byte {
	b = appendString(appendString(b, m.Dir), m.Stamp)
	b = appendBool(appendBool(b, m.First), m.Last)
	b = appendU16(b, uint16(len(m.Files)))
	for i := range m.Files {
		f := &m.Files[i]
		b = appendU32(appendU32(appendU32(appendString(b, f.Path), f.Mode), f.UID), f.GID)
		b = appendBytes(appendBool(b, f.More), f.Data)
	}
	return b
}

// PushFileSize is what a file costs in a push beyond its path and data.
const PushFileSize = 2 + 3*4 + 1 + 4

// ParsePush reads the payload of a push.
func ParsePush(b []byte) (m Push, err error) {
	r := reader{b: b}
	m.Dir, m.Stamp = r.string(), r.string()
	m.First, m.Last = r.bool(), r.bool()
	if n := r.count(PushFileSize); n > 0 {
		m.Files = make([]PushFile, n)
		for i := range m.Files {
			f := &m.Files[i]
			*f = PushFile{r.string(), r.u32(), r.u32(), r.u32(), r.bool(), r.bytes()}
			if f.Mode&^0o777 != 0 || !goodPath(f.Path) {
				r.fail("a file's path or mode is none")
			}
		}
	}
	r.checkName(m.Dir)
	if m.Stamp != "" {
		if len(m.Stamp) < 3 || m.Stamp[:2] != ".." || m.Stamp == "..data" || m.Stamp == "..data_tmp" {
			r.fail("the stamp is none")
		} else {
			r.checkName(m.Stamp[2:])
		}
	}
	return m, r.end("push")
}

// Pull asks for the end of a file that a container may have written into a
// directory of the pod: the last MaxChunk bytes are the reply.
type Pull struct{ Dir, Path string }

// Append appends the payload to b.
func (m *Pull) Append(b []byte) []byte { return appendString(appendString(b, m.Dir), m.Path) }

// ParsePull reads the payload of a pull.
func ParsePull(b []byte) (m Pull, err error) {
	r := reader{b: b}
	m.Dir, m.Path = r.string(), r.string()
	r.checkName(m.Dir)
	if !goodPath(m.Path) {
		r.fail("the path is none")
	}
	return m, r.end("pull")
}

// goodPath says whether a path stays below where it starts, in at most 16
// steps, and off the names that a push with a stamp uses itself.
func goodPath(path string) bool {
	steps := 0
	for start := 0; start <= len(path); steps++ {
		end := start
		for end < len(path) && path[end] != '/' {
			if path[end] == 0 {
				return false
			}
			end++
		}
		name := path[start:end]
		if name == "" || name == "." || len(name) > 255 || steps >= 16 || len(name) >= 2 && name[:2] == ".." {
			return false
		}
		start = end + 1
	}
	return len(path) < 4096
}

// Copy starts a copy of files into or out of a container that runs. The reply
// is a ProcessID: the files are its input or output, in the form of CopyEntry;
// what it has to say for itself is on StreamStderr. Out gives what Path names,
// by its last name; in writes below the directory Path. It is the host's act:
// the container's user and the Guard's policy have no say in it.
type Copy struct {
	Container uint32
	Out       bool
	Path      string // in the container, absolute; links are followed there
}

// Append appends the payload to b.
func (m *Copy) Append(b []byte) []byte {
	return appendString(appendBool(appendU32(b, m.Container), m.Out), m.Path)
}

// ParseCopy reads the payload of a copy.
func ParseCopy(b []byte) (m Copy, err error) {
	r := reader{b: b}
	m.Container, m.Out, m.Path = r.u32(), r.bool(), r.string()
	return m, r.end("copy")
}

// CopyKind says what a copied entry is. CopyEnd, with nothing else, ends the
// stream.
type CopyKind uint8

// The kinds of copied entries.
const (
	CopyEnd CopyKind = iota
	CopyDir
	CopyRegular // followed by Size bytes
	CopySymlink // Link is where it leads
	CopyLink    // Link is the path of another entry of the stream
)

// CopyEntry is the head of one file in the stream of a copy.
type CopyEntry struct {
	Kind      CopyKind
	Mode      uint32 // with set-id and sticky bits
	UID, GID  uint32
	UnixNanos int64 // of its last change
	Size      uint64
	Path      string // "name" or "name/below"
	Link      string
}

// CopyHead is the length of an entry's head without its path and link, which
// follow it, in this order, in as many bytes as ParseCopyHead says.
const CopyHead = 1 + 3*4 + 2*8 + 2*2

// MaxCopyPath is the most bytes a path or a link may have.
const MaxCopyPath = 4095

// Append appends the head to b.
func (m *CopyEntry) Append(b []byte) []byte {
	b = appendU32(appendU32(appendU32(append(b, byte(m.Kind)), m.Mode), m.UID), m.GID)
	b = appendU64(appendU64(b, uint64(m.UnixNanos)), m.Size)
	b = appendU16(appendU16(b, uint16(len(m.Path))), uint16(len(m.Link)))
	return append(append(b, m.Path...), m.Link...)
}

// ParseCopyHead reads the CopyHead bytes of b, and how long the path and the
// link are that follow.
func ParseCopyHead(b []byte) (m CopyEntry, path, link int, err error) {
	r := reader{b: b}
	m.Kind = CopyKind(r.u8())
	m.Mode, m.UID, m.GID = r.u32(), r.u32(), r.u32()
	m.UnixNanos, m.Size = int64(r.u64()), r.u64()
	path, link = int(r.u16()), int(r.u16())
	switch {
	case m.Kind > CopyLink || m.Mode&^0o7777 != 0:
		r.fail("no such kind or mode")
	case path > MaxCopyPath || link > MaxCopyPath || m.Size > 1<<62:
		r.fail("it is too long")
	case (path == 0) != (m.Kind == CopyEnd), (link > 0) != (m.Kind == CopySymlink || m.Kind == CopyLink), m.Size > 0 && m.Kind != CopyRegular:
		r.fail("it does not hold what its kind does")
	}
	return m, path, link, r.end("copied entry")
}
