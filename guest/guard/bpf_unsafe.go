package guard

import (
	"runtime"
	"sync/atomic"
	"syscall"
	"unsafe"
)

// bpf(2) on amd64: its number, its commands, and what of bpf_attr each reads.
const (
	sysBPF = 321

	bpfMapCreate  = 0
	bpfMapUpdate  = 2
	bpfMapDelete  = 3
	bpfMapNext    = 4
	bpfProgLoad   = 5
	bpfObjectInfo = 15
	bpfObjectPin  = 6
	bpfObjectGet  = 7
	bpfBTFLoad    = 18
	bpfLinkCreate = 28
	bpfMapLookup  = 1
)

type mapCreateAttr struct {
	kind, key, value, max, flags, inner, numa uint32
	name                                      [16]byte
	ifindex, btf, btfKey, btfValue            uint32
	_                                         [12]byte
}

type elementAttr struct {
	fd    uint32
	_     uint32
	key   unsafe.Pointer
	value unsafe.Pointer
	flags uint64
}

type progLoadAttr struct {
	kind, count        uint32
	code, licence      unsafe.Pointer
	logLevel, logSize  uint32
	log                unsafe.Pointer
	version, flags     uint32
	name               [16]byte
	ifindex, expected  uint32
	types, recordSize  uint32 // BTF, and the size of a record of a function
	functions          unsafe.Pointer
	records            uint32
	_                  uint32 // lines
	_                  [8]byte
	_                  uint32
	attachID, attachFD uint32
	_                  [12]byte
}

type btfLoadAttr struct {
	data, log               unsafe.Pointer
	size, logSize, logLevel uint32
	_                       uint32
}

type linkCreateAttr struct {
	program, target, kind, flags uint32
	_                            [48]byte
}

type infoAttr struct {
	fd, size uint32
	info     unsafe.Pointer
}

func bpf(command uintptr, attr unsafe.Pointer, size uintptr) (int, error) {
	for {
		r, _, errno := syscall.Syscall(sysBPF, command, uintptr(attr), size)
		switch errno {
		case 0:
			return int(r), nil
		case syscall.EAGAIN, syscall.EINTR: // the verifier was interrupted
		default:
			return -1, errno
		}
	}
}

func createMap(m mapShape, name string, inner, btf int, ids [2]uint32) (int, error) {
	a := mapCreateAttr{kind: m.kind, key: m.key, value: m.value, max: m.max, flags: m.flags, inner: uint32(inner), btf: uint32(btf), btfKey: ids[0], btfValue: ids[1]}
	copy(a.name[:15], name)
	return bpf(bpfMapCreate, unsafe.Pointer(&a), unsafe.Sizeof(a))
}

// updateMap sets an entry; key and value have the sizes of the map.
func updateMap(fd int, key, value []byte) error {
	a := elementAttr{fd: uint32(fd), key: unsafe.Pointer(unsafe.SliceData(key)), value: unsafe.Pointer(unsafe.SliceData(value))}
	_, err := bpf(bpfMapUpdate, unsafe.Pointer(&a), unsafe.Sizeof(a))
	return err
}

// lookupMap reads an entry into value.
func lookupMap(fd int, key, value []byte) error {
	a := elementAttr{fd: uint32(fd), key: unsafe.Pointer(unsafe.SliceData(key)), value: unsafe.Pointer(unsafe.SliceData(value))}
	_, err := bpf(bpfMapLookup, unsafe.Pointer(&a), unsafe.Sizeof(a))
	return err
}

func deleteMap(fd int, key []byte) error {
	a := elementAttr{fd: uint32(fd), key: unsafe.Pointer(unsafe.SliceData(key))}
	_, err := bpf(bpfMapDelete, unsafe.Pointer(&a), unsafe.Sizeof(a))
	return err
}

// nextKey gives the key after one, or the first without one. One that is not
// there any more is as none.
func nextKey(fd int, key, next []byte) error {
	a := elementAttr{fd: uint32(fd), value: unsafe.Pointer(unsafe.SliceData(next))}
	if key != nil {
		a.key = unsafe.Pointer(unsafe.SliceData(key))
	}
	_, err := bpf(bpfMapNext, unsafe.Pointer(&a), unsafe.Sizeof(a))
	return err
}

// sinceBoot is the clock of the programs, in nanoseconds.
func sinceBoot() uint64 {
	const boot = 7
	var t syscall.Timespec
	_, _, _ = syscall.RawSyscall(syscall.SYS_CLOCK_GETTIME, boot, uintptr(unsafe.Pointer(&t)), 0)
	return uint64(t.Sec)*1e9 + uint64(t.Nsec)
}

func loadTypes(types []byte) (int, error) {
	a := btfLoadAttr{data: unsafe.Pointer(unsafe.SliceData(types)), size: uint32(len(types))}
	return bpf(bpfBTFLoad, unsafe.Pointer(&a), unsafe.Sizeof(a))
}

// How much the verifier says.
const (
	logAll   = 1
	logStats = 4
)

// loadProgram gives a program to the verifier; log, if not empty, takes what
// it has to say.
func loadProgram(p *bundleProgram, types int, level uint32, log []byte) (int, error) {
	licence := append([]byte(p.licence), 0)
	a := progLoadAttr{kind: p.kind, count: uint32(len(p.code) / 8), code: unsafe.Pointer(unsafe.SliceData(p.code)),
		licence: unsafe.Pointer(unsafe.SliceData(licence)), flags: p.flags, expected: p.attach, attachID: p.attachID}
	copy(a.name[:15], p.name)
	if len(p.functions) > 0 {
		a.types, a.recordSize, a.functions, a.records = uint32(types), functionSize, unsafe.Pointer(unsafe.SliceData(p.functions)), uint32(len(p.functions)/functionSize)
	}
	if len(log) > 0 {
		a.logLevel, a.logSize, a.log = level, uint32(len(log)), unsafe.Pointer(unsafe.SliceData(log))
	}
	return bpf(bpfProgLoad, unsafe.Pointer(&a), unsafe.Sizeof(a))
}

// attachProgram attaches a program; target is the cgroup of one that sees
// packets, and else 0.
func attachProgram(program, target int, kind uint32) (int, error) {
	a := linkCreateAttr{program: uint32(program), target: uint32(target), kind: kind}
	return bpf(bpfLinkCreate, unsafe.Pointer(&a), unsafe.Sizeof(a))
}

type pinAttr struct {
	path      unsafe.Pointer
	fd, flags uint32
}

// pinObject gives a map, program or link a name in a BPF file system, which keeps
// it there.
func pinObject(fd int, path string) error {
	name := append([]byte(path), 0)
	a := pinAttr{path: unsafe.Pointer(unsafe.SliceData(name)), fd: uint32(fd)}
	_, err := bpf(bpfObjectPin, unsafe.Pointer(&a), unsafe.Sizeof(a))
	runtime.KeepAlive(name)
	return err
}

func pinnedObject(path string) (int, error) {
	name := append([]byte(path), 0)
	a := pinAttr{path: unsafe.Pointer(unsafe.SliceData(name))}
	fd, err := bpf(bpfObjectGet, unsafe.Pointer(&a), unsafe.Sizeof(a))
	runtime.KeepAlive(name)
	return fd, err
}

// openCgroup gives a descriptor of the cgroup of a number; ESTALE if there is none.
func openCgroup(id uint64) (int, error) {
	const top, openByHandle, ofKernfs = "/sys/fs/cgroup", 304, 0xfe
	mount, err := syscall.Open(top, syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer syscall.Close(mount)
	handle := struct {
		size, kind uint32
		id         uint64
	}{8, ofKernfs, id}
	fd, _, errno := syscall.Syscall(openByHandle, uintptr(mount), uintptr(unsafe.Pointer(&handle)), syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

// openProcess gives a descriptor of a process.
func openProcess(pid int) (int, error) {
	const pidfdOpen = 434
	fd, _, errno := syscall.Syscall(pidfdOpen, uintptr(pid), 0, 0)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

// objectInfo fills info with what the kernel says of a program or link.
func objectInfo(fd int, info []byte) error {
	a := infoAttr{fd: uint32(fd), size: uint32(len(info)), info: unsafe.Pointer(unsafe.SliceData(info))}
	_, err := bpf(bpfObjectInfo, unsafe.Pointer(&a), unsafe.Sizeof(a))
	return err
}

// ring is one BPF ring buffer: positions that the kernel and the agent share,
// and the data, mapped twice in a row so that no record wraps.
type ring struct {
	consumer []byte // page with the agent's position
	producer []byte // page with the kernel's position, then the data
	size     uint64
}

func openRing(fd int, size uint32) (ring, error) {
	page := syscall.Getpagesize()
	consumer, err := syscall.Mmap(fd, 0, page, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	if err != nil {
		return ring{}, err
	}
	producer, err := syscall.Mmap(fd, int64(page), page+2*int(size), syscall.PROT_READ, syscall.MAP_SHARED)
	if err != nil {
		return ring{}, err
	}
	return ring{consumer, producer, uint64(size)}, nil
}

// drain hands records to emit until there are none or emit refuses one, which
// then stays. It says whether emit may be asked again.
func (r *ring) drain(emit func(record []byte) bool) bool {
	const busy, discarded, head = 1 << 31, 1 << 30, 8
	if r.size == 0 {
		return true
	}
	data := r.producer[syscall.Getpagesize():]
	at := (*uint64)(unsafe.Pointer(unsafe.SliceData(r.consumer)))
	end := (*uint64)(unsafe.Pointer(unsafe.SliceData(r.producer)))
	for pos := atomic.LoadUint64(at); pos < atomic.LoadUint64(end); {
		off := pos & (r.size - 1)
		length := atomic.LoadUint32((*uint32)(unsafe.Pointer(&data[off])))
		if length&busy != 0 {
			break
		}
		size := uint64(length &^ (busy | discarded))
		if length&discarded == 0 && !emit(data[off+head:off+head+size]) {
			return false
		}
		pos += (size + head + 7) &^ 7
		atomic.StoreUint64(at, pos)
	}
	runtime.KeepAlive(r)
	return true
}

// raiseFileLimit lets the agent hold a descriptor for every protected object.
func raiseFileLimit() {
	const most = 1 << 16
	limit := syscall.Rlimit{Cur: most, Max: most}
	_, _, _ = syscall.RawSyscall6(syscall.SYS_PRLIMIT64, 0, syscall.RLIMIT_NOFILE, uintptr(unsafe.Pointer(&limit)), 0, 0, 0)
}

// readLink reads the target of the symbolic link fd is an O_PATH descriptor of.
func readLink(fd int, buf []byte) (int, error) {
	var empty [1]byte
	n, _, errno := syscall.Syscall6(syscall.SYS_READLINKAT, uintptr(fd), uintptr(unsafe.Pointer(&empty)), uintptr(unsafe.Pointer(unsafe.SliceData(buf))), uintptr(len(buf)), 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}
