package bpf

import (
	"bytes"
	"debug/elf"
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
)

//go:generate clang -O2 -g -Wall -Werror -target bpf -D__TARGET_ARCH_x86 -fdebug-prefix-map=$PWD=. -fdebug-compilation-dir=. -I/usr/include/x86_64-linux-gnu -c src/guard.bpf.c -o src/guard.o
//go:generate llvm-strip -g src/guard.o

//go:embed src/guard.o
var object []byte

// The head of a bundle. The number rises with every change that an older
// guest would misread.
//
//	1  2026-11: first.
//	2  2026-11: names of the functions of programs that the kernel calls back.
const (
	bundleMagic   = "HBGUARD\x02"
	maxBundleText = 255
)

// Link fits the programs to one guest kernel and gives the bundle that the
// guest's agent loads: no BTF of the kernel is needed any more where it runs.
// Each source of type information is either bare (.BTF) or an ELF file that
// holds it, such as the kernel itself or overlay.ko; overlayModuleBTF is nil
// where overlay is built into the kernel. buildID is the GNU build
// id of that kernel in hexadecimal; the agent refuses to load the bundle into
// any other.
func Link(guestBTF, overlayModuleBTF io.ReaderAt, buildID string) (bundle []byte, err error) {
	return link(guestBTF, overlayModuleBTF, buildID, nil)
}

// ForShared stands behind the build id in bundles of LinkShared.
const ForShared = " shared"

// LinkShared is Link for a kernel that others share, such as a node's: the
// programs judge only tasks of bound cgroups, each by its owner's policy. No
// guest loads what it gives.
func LinkShared(kernelBTF, overlayModuleBTF io.ReaderAt, buildID string) (bundle []byte, err error) {
	mode, err := sharedTypes()
	if err != nil {
		return nil, fmt.Errorf("link guard: %w", err)
	}
	if buildID != "" {
		buildID += ForShared
	}
	return link(kernelBTF, overlayModuleBTF, buildID, mode)
}

// sharedTypes hold the type by which the programs know such a kernel.
func sharedTypes() (*btf.Spec, error) {
	number := &btf.Int{Name: "int", Size: 4, Encoding: btf.Signed}
	b, err := btf.NewBuilder([]btf.Type{&btf.Struct{Name: "hauberk_shared", Size: 4, Members: []btf.Member{{Name: "yes", Type: number}}}}, nil)
	if err != nil {
		return nil, err
	}
	raw, err := b.Marshal(nil, &btf.MarshalOptions{Order: binary.LittleEndian})
	if err != nil {
		return nil, err
	}
	return btf.LoadSpecFromReader(bytes.NewReader(raw))
}

func link(guestBTF, overlayModuleBTF io.ReaderAt, buildID string, mode *btf.Spec) (bundle []byte, err error) {
	if buildID == "" || len(buildID) > maxBundleText {
		return nil, fmt.Errorf("link guard: build id %q: want the kernel's, in hexadecimal", buildID)
	}
	guestBTF, err = bare(guestBTF)
	if err != nil {
		return nil, fmt.Errorf("link guard: read the guest's kernel: %w", err)
	}
	kernel, err := btf.LoadSpecFromReader(guestBTF)
	if err != nil {
		return nil, fmt.Errorf("link guard: read BTF of the guest's kernel: %w", err)
	}
	overlay, err := overlayTypes(overlayModuleBTF, kernel)
	if err != nil {
		return nil, err
	}
	if err := checkOverlay(overlay); err != nil {
		return nil, fmt.Errorf("link guard: %w", err)
	}
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(object))
	if err != nil {
		return nil, fmt.Errorf("link guard: read object: %w", err)
	}
	l := linker{kernel: kernel, overlay: overlay, mode: mode, spec: spec}
	return l.bundle(buildID)
}

// overlayTypes are those of the overlay module, or of the kernel that holds it.
func overlayTypes(module io.ReaderAt, kernel *btf.Spec) (*btf.Spec, error) {
	if module == nil {
		return kernel, nil
	}
	module, err := bare(module)
	if err != nil {
		return nil, fmt.Errorf("link guard: read the overlay module: %w", err)
	}
	overlay, err := btf.LoadSplitSpecFromReader(module, kernel)
	if err != nil {
		return nil, fmt.Errorf("link guard: read BTF of the overlay module: %w", err)
	}
	return overlay, nil
}

// bare gives the type information of an ELF file, or r if it is none.
func bare(r io.ReaderAt) (io.ReaderAt, error) {
	var magic [len(elf.ELFMAG)]byte
	if _, err := r.ReadAt(magic[:], 0); err != nil {
		return nil, err
	}
	if string(magic[:]) != elf.ELFMAG {
		return r, nil
	}
	f, err := elf.NewFile(r)
	if err != nil {
		return nil, err
	}
	s := f.Section(".BTF")
	if s == nil {
		return nil, errors.New("it has no type information (section .BTF)")
	}
	return s, nil
}

// checkOverlay makes sure that the overlay's inode can be told from its upper
// layer, without which no file could be said to come from the image.
func checkOverlay(overlay *btf.Spec) error {
	var inode *btf.Struct
	if err := overlay.TypeByName("ovl_inode", &inode); err != nil {
		return fmt.Errorf("find overlay's inode: %w", err)
	}
	has := func(name string) bool {
		return slices.ContainsFunc(inode.Members, func(m btf.Member) bool { return m.Name == name })
	}
	for _, want := range []string{"vfs_inode", "__upperdentry"} {
		if !has(want) {
			return fmt.Errorf("overlay's inode has no %s: the origin of a file cannot be told on this kernel", want)
		}
	}
	if !has("lowerpath") && !has("oe") { // up to 6.4, and from 6.5
		return errors.New("overlay's inode has neither lowerpath nor oe: the origin of a file cannot be told on this kernel")
	}
	return nil
}

type linker struct {
	kernel, overlay *btf.Spec
	mode            *btf.Spec // what says that the kernel is shared; nil for a guest's
	spec            *ebpf.CollectionSpec
	maps            []string // by index
	types           *btf.Builder
	proto           *btf.FuncProto
	functions       map[string]btf.TypeID // by name
	out             []byte
}

func (l *linker) bundle(buildID string) ([]byte, error) {
	l.maps = slices.Sorted(maps.Keys(l.spec.Maps))
	ids, err := l.storageTypes()
	if err != nil {
		return nil, err
	}
	programs, err := l.programs()
	if err != nil {
		return nil, err
	}
	// The programs first: their functions are among the types.
	for _, name := range slices.Sorted(maps.Keys(programs)) {
		if err := l.program(name, programs[name]); err != nil {
			return nil, fmt.Errorf("link guard: program %s: %w", name, err)
		}
	}
	code := l.out
	types, err := l.types.Marshal(nil, &btf.MarshalOptions{Order: binary.LittleEndian})
	if err != nil {
		return nil, fmt.Errorf("link guard: encode types: %w", err)
	}
	l.out = []byte(bundleMagic)
	l.text(buildID)
	l.u32(uint32(len(types)))
	l.out = append(l.out, types...)
	l.u16(uint16(len(l.maps)))
	for _, name := range l.maps {
		l.oneMap(name, ids[name])
	}
	l.u16(uint16(len(programs)))
	return append(l.out, code...), nil
}

// target is a program and the kernel's function that it is attached to; one
// that sees packets is attached to none.
type target struct {
	*ebpf.ProgramSpec
	hook *btf.Func
}

// programs gives each program by its name. Where a hook's arguments differ
// between kernels there is a variant for each number of them, which stands
// after three underscores; this kernel's is taken.
func (l *linker) programs() (map[string]target, error) {
	found := map[string]target{}
	for full, p := range l.spec.Programs {
		name, number, varies := strings.Cut(full, "___")
		if l.no32(p) {
			continue
		}
		if p.Type == ebpf.CGroupSKB {
			found[name] = target{p, nil}
			continue
		}
		hook, err := l.hook(p)
		if err != nil {
			return nil, fmt.Errorf("link guard: program %s: %w", full, err)
		}
		if proto, ok := hook.Type.(*btf.FuncProto); varies && (!ok || strconv.Itoa(len(proto.Params)) != number) {
			if _, ok := found[name]; !ok {
				found[name] = target{}
			}
			continue
		}
		found[name] = target{p, hook}
	}
	for name, t := range found {
		if t.ProgramSpec == nil {
			return nil, fmt.Errorf("link guard: program %s: its hook has other arguments on this kernel than any variant", name)
		}
	}
	return found, nil
}

// no32 says that a program watches a call of 32-bit programs, which this kernel
// does not run.
func (l *linker) no32(p *ebpf.ProgramSpec) bool {
	if !strings.HasPrefix(p.AttachTo, "__ia32_") {
		return false
	}
	var f *btf.Func
	return errors.Is(l.kernel.TypeByName("__ia32_sys_execve", &f), btf.ErrNotFound)
}

// hook finds the kernel's function that a program is attached to.
func (l *linker) hook(p *ebpf.ProgramSpec) (*btf.Func, error) {
	name := p.AttachTo
	if p.Type == ebpf.LSM {
		name = "bpf_lsm_" + name
	}
	var f *btf.Func
	if err := l.kernel.TypeByName(name, &f); err != nil {
		return nil, fmt.Errorf("attach to %s: this kernel has no such function: %w", name, err)
	}
	return f, nil
}

// storageTypes makes the BTF that storage maps want of their key and value.
func (l *linker) storageTypes() (ids map[string][2]btf.TypeID, err error) {
	if l.types, err = btf.NewBuilder(nil, nil); err != nil {
		return nil, fmt.Errorf("link guard: %w", err)
	}
	number := &btf.Int{Name: "int", Size: 4, Encoding: btf.Signed}
	l.proto, l.functions = &btf.FuncProto{Return: number}, map[string]btf.TypeID{}
	key, err := l.types.Add(number)
	if err != nil {
		return nil, fmt.Errorf("link guard: %w", err)
	}
	ids = map[string][2]btf.TypeID{}
	for _, name := range l.maps {
		m := l.spec.Maps[name]
		if m.Type != ebpf.InodeStorage && m.Type != ebpf.TaskStorage {
			continue
		}
		value, err := l.types.Add(&btf.Struct{Name: name + "_value", Size: m.ValueSize})
		if err != nil {
			return nil, fmt.Errorf("link guard: %w", err)
		}
		ids[name] = [2]btf.TypeID{key, value}
	}
	return ids, nil
}

// functionsOf lists the functions of a program, as pairs of place and type, if
// the kernel wants to know them: it calls some back, or some are to be looked at
// by themselves, which those are that are not static. Only of these it is told
// what they take; the program's own first is called by nobody.
func (l *linker) functionsOf(code asm.Instructions) (functions []uint32, err error) {
	wanted := slices.ContainsFunc(code, func(i asm.Instruction) bool { return i.IsLoadOfFunctionPointer() })
	for iter := code.Iterate(); iter.Next(); {
		f := btf.FuncMetadata(iter.Ins)
		if f == nil {
			continue
		}
		alone := iter.Offset != 0 && f.Linkage == btf.GlobalFunc
		wanted = wanted || alone
		id, err := l.function(f, alone)
		if err != nil {
			return nil, fmt.Errorf("name function %s: %w", f.Name, err)
		}
		functions = append(functions, uint32(iter.Offset), uint32(id))
	}
	if !wanted {
		return nil, nil
	}
	return functions, nil
}

// function gives the type of a function, which is made once.
func (l *linker) function(f *btf.Func, alone bool) (btf.TypeID, error) {
	if id, ok := l.functions[f.Name]; ok {
		return id, nil
	}
	t := &btf.Func{Name: f.Name, Type: l.proto, Linkage: btf.StaticFunc}
	if proto, ok := f.Type.(*btf.FuncProto); ok && alone {
		own := &btf.FuncProto{Return: l.proto.Return}
		for _, p := range proto.Params {
			taken, err := plain(p.Type)
			if err != nil {
				return 0, err
			}
			own.Params = append(own.Params, btf.FuncParam{Name: p.Name, Type: taken})
		}
		t.Type, t.Linkage = own, btf.GlobalFunc
	}
	id, err := l.types.Add(t)
	l.functions[f.Name] = id
	return id, err
}

// plain is what the kernel needs to know of a parameter: a number's size, or
// that of what lies at an address.
func plain(t btf.Type) (btf.Type, error) {
	switch v := btf.UnderlyingType(t).(type) {
	case *btf.Int:
		return &btf.Int{Name: v.Name, Size: v.Size, Encoding: v.Encoding}, nil
	case *btf.Pointer:
		if s, ok := btf.UnderlyingType(v.Target).(*btf.Struct); ok {
			return &btf.Pointer{Target: &btf.Struct{Name: s.Name, Size: s.Size}}, nil
		}
	}
	return nil, fmt.Errorf("parameter of type %v: want a number or the address of a structure", t)
}

func (l *linker) oneMap(name string, ids [2]btf.TypeID) {
	m := l.spec.Maps[name]
	l.text(name)
	l.shape(m)
	l.u32(uint32(ids[0]))
	l.u32(uint32(ids[1]))
	if m.InnerMap == nil {
		l.u16(0)
		return
	}
	l.u16(1)
	l.shape(m.InnerMap)
}

func (l *linker) shape(m *ebpf.MapSpec) {
	for _, v := range []uint32{uint32(m.Type), m.KeySize, m.ValueSize, m.MaxEntries, m.Flags} {
		l.u32(v)
	}
}

func (l *linker) program(name string, p target) error {
	var id btf.TypeID
	if p.hook != nil {
		var err error
		if id, err = l.kernel.TypeID(p.hook); err != nil {
			return fmt.Errorf("attach to %s: %w", p.hook.Name, err)
		}
	}
	if err := l.relocate(p.Instructions); err != nil {
		return err
	}
	slots, err := l.mapLoads(p.Instructions)
	if err != nil {
		return err
	}
	functions, err := l.functionsOf(p.Instructions)
	if err != nil {
		return err
	}
	var code bytes.Buffer
	if err := p.Instructions.Marshal(&code, binary.LittleEndian); err != nil {
		return fmt.Errorf("encode: %w", err)
	}
	l.text(name)
	l.text(p.License)
	for _, v := range []uint32{uint32(p.Type), uint32(p.AttachType), p.Flags, uint32(id), uint32(code.Len() / asm.InstructionSize), uint32(len(slots) / 2), uint32(len(functions) / 2)} {
		l.u32(v)
	}
	l.out = append(l.out, code.Bytes()...)
	for _, v := range append(slots, functions...) {
		l.u32(v)
	}
	return nil
}

// relocate puts this kernel's offsets into the instructions. A field that this
// kernel lacks is an error here: nothing that cannot be decided is loaded. A
// field of an alternative may be missing. What reads it is then a call of no
// function: the kernel loads that only where it proves that it cannot be
// reached.
func (l *linker) relocate(code asm.Instructions) error {
	var relos []*btf.CORERelocation
	var at []*asm.Instruction
	for i := range code {
		if r := btf.CORERelocationMetadata(&code[i]); r != nil {
			relos, at = append(relos, r), append(at, &code[i])
		}
	}
	if len(relos) == 0 {
		return nil
	}
	// No type of our own reaches the kernel, so any number will do for one.
	local := func(btf.Type) (btf.TypeID, error) { return 0, nil }
	fixups, err := btf.CORERelocate(relos, l.known(), binary.LittleEndian, local)
	if err != nil {
		return fmt.Errorf("relocate: %w", err)
	}
	for i := range fixups {
		if err := fixups[i].Apply(at[i]); err != nil {
			return fmt.Errorf("relocate: %w", err)
		}
		if f := asm.BuiltinFunc(badRelocation); at[i].IsBuiltinCall() && at[i].Constant == int64(f) {
			if alternative(relos[i]) {
				continue
			}
			return fmt.Errorf("relocate %s: this kernel has no such field", relos[i])
		}
	}
	return nil
}

// known are where the fields that programs read are looked up.
func (l *linker) known() []*btf.Spec {
	known := []*btf.Spec{l.kernel}
	if l.overlay != l.kernel {
		known = append(known, l.overlay)
	}
	if l.mode != nil {
		known = append(known, l.mode)
	}
	return known
}

// alternative says whether a relocation is of one of several shapes of a
// structure, which the programs choose between by what the kernel has. Three
// underscores name a shape, as CO-RE has it.
func alternative(r *btf.CORERelocation) bool { return strings.Contains(r.String(), "___") }

// badRelocation is the call that stands where a relocation found nothing.
const badRelocation = 0xbad2310

// mapLoads lists pairs of slot and map for every load of a map, and clears the
// place where the guest puts the descriptor.
func (l *linker) mapLoads(code asm.Instructions) (slots []uint32, err error) {
	slot := uint32(0)
	for i := range code {
		ins := &code[i]
		if ins.IsLoadFromMap() {
			index, ok := slices.BinarySearch(l.maps, ins.Reference())
			if !ok {
				return nil, fmt.Errorf("load of unknown map %q", ins.Reference())
			}
			slots = append(slots, slot, uint32(index))
			ins.Constant = 0
		}
		slot += uint32(ins.Width())
	}
	return slots, nil
}

func (l *linker) u16(v uint16)  { l.out = binary.LittleEndian.AppendUint16(l.out, v) }
func (l *linker) u32(v uint32)  { l.out = binary.LittleEndian.AppendUint32(l.out, v) }
func (l *linker) text(s string) { l.u16(uint16(len(s))); l.out = append(l.out, s...) }
