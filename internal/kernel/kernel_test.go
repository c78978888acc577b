package kernel

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
)

// kernelELF is a small ELF file with the two sections that matter.
func kernelELF(btf, notes []byte) []byte {
	names := "\x00.BTF\x00.notes\x00.shstrtab\x00"
	var out bytes.Buffer
	body := slices.Concat(btf, notes, []byte(names))
	h := elf.Header64{
		Ident: [16]byte{0x7f, 'E', 'L', 'F', 2, 1, 1}, Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64),
		Version: 1, Shoff: uint64(64 + len(body)), Ehsize: 64, Shentsize: 64, Shnum: 4, Shstrndx: 3,
	}
	binary.Write(&out, binary.LittleEndian, h)
	out.Write(body)
	at := uint64(64)
	sec := func(name uint32, kind elf.SectionType, n int) {
		binary.Write(&out, binary.LittleEndian, elf.Section64{Name: name, Type: uint32(kind), Off: at, Size: uint64(n), Addralign: 1})
		at += uint64(n)
	}
	binary.Write(&out, binary.LittleEndian, elf.Section64{})
	sec(1, elf.SHT_PROGBITS, len(btf))
	sec(6, elf.SHT_NOTE, len(notes))
	sec(13, elf.SHT_STRTAB, len(names))
	return out.Bytes()
}

var (
	sampleBTF   = append([]byte{0x9f, 0xeb, 1, 0, 24, 0, 0, 0}, make([]byte, 16)...)
	sampleNotes = slices.Concat(
		[]byte{6, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0}, []byte("Linux\x00\x00\x00"), []byte{9, 0, 0, 0},
		[]byte{4, 0, 0, 0, 4, 0, 0, 0, 3, 0, 0, 0}, []byte("GNU\x00"), []byte{0xde, 0xad, 0xbe, 0xef})
)

// bzImage packs an ELF the way the kernel's build does.
func bzImage(t testing.TB, elf []byte) []byte {
	t.Helper()
	block := make([]byte, lz4.CompressBlockBound(len(elf)))
	n, err := lz4.CompressBlock(elf, block, nil)
	if err != nil || n == 0 {
		t.Fatalf("pack: %d bytes, %v", n, err)
	}
	payload := binary.LittleEndian.AppendUint32(nil, 0x184c2102)
	payload = binary.LittleEndian.AppendUint32(payload, uint32(n))
	payload = append(payload, block[:n]...)
	return boot(payload, len(elf))
}

// zstdImage packs an ELF as Debian's 6.12 is packed.
func zstdImage(t testing.TB, elf []byte) []byte {
	t.Helper()
	z, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	return boot(z.EncodeAll(elf, nil), len(elf))
}

// boot puts the boot sector before a payload and the unpacked size after it.
func boot(payload []byte, size int) []byte {
	payload = binary.LittleEndian.AppendUint32(payload, uint32(size))
	image := make([]byte, 1024+16)
	image[0x1f1] = 1
	copy(image[0x202:], "HdrS\x0f\x02")
	binary.LittleEndian.PutUint32(image[0x248:], 16)
	binary.LittleEndian.PutUint32(image[0x24c:], uint32(len(payload)))
	return append(image, payload...)
}

func sampleELF() []byte {
	return append(kernelELF(sampleBTF, sampleNotes), make([]byte, 4096)...)
}

func TestUnpack(t *testing.T) {
	want := sampleELF()
	good := bzImage(t, want)
	got, err := Unpack(good)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("unpacked %d bytes, %v; want %d", len(got), err, len(want))
	}
	types, err := Types(got)
	if err != nil || !bytes.Equal(types, sampleBTF) {
		t.Errorf("types %x, %v", types, err)
	}
	if id, err := BuildID(got); err != nil || id != "deadbeef" {
		t.Errorf("build id %q, %v", id, err)
	}
}

func TestUnpackZstd(t *testing.T) {
	want := sampleELF()
	good := zstdImage(t, want)
	if got, err := Unpack(good); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("unpacked %d bytes, %v; want %d", len(got), err, len(want))
	}
	for name, c := range map[string]struct {
		image []byte
		says  string
	}{
		"corrupt":   {append(bytes.Clone(good[:1060]), good[1070:]...), "ends early"},
		"says less": {boot(good[1040:len(good)-4], len(want)-1), "more than"},
		"says more": {boot(good[1040:len(good)-4], len(want)+1), "and says"},
		"cut":       {boot(good[1040:len(good)-20], len(want)), "Zstandard frame"},
	} {
		if _, err := Unpack(c.image); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: error %v, want one that says %q", name, err, c.says)
		}
	}
}

func TestUnpackModule(t *testing.T) {
	want := bytes.Repeat([]byte("\x7fELF module "), 1000)
	var asXZ bytes.Buffer
	z, err := xz.NewWriter(&asXZ)
	if err != nil {
		t.Fatal(err)
	}
	z.Write(want)
	z.Close()
	e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	for file, packed := range map[string][]byte{"a.ko": want, "a.ko.xz": asXZ.Bytes(), "a.ko.zst": e.EncodeAll(want, nil)} {
		if got, err := unpackModule(file, packed); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v; want %d", file, len(got), err, len(want))
		}
		if plainName("kernel/fs/"+file) != "a.ko" {
			t.Errorf("%s: plain name %q", file, plainName(file))
		}
		if file == "a.ko" {
			continue
		}
		if _, err := unpackModule(file, packed[:len(packed)/2]); err == nil {
			t.Errorf("%s: half of it was accepted", file)
		}
		if _, err := unpackModule(file, want); err == nil {
			t.Errorf("%s: what is not packed was accepted", file)
		}
	}
	if _, err := unpackModule("a.ko.gz", want); err == nil {
		t.Error("an unknown compression was accepted")
	}
	bomb := e.EncodeAll(make([]byte, maxModule+1), nil)
	if _, err := unpackModule("a.ko.zst", bomb); err == nil {
		t.Error("a module of more than the bound was accepted")
	}
}

func TestUnpackRefuses(t *testing.T) {
	good := bzImage(t, sampleELF())
	edit := func(f func([]byte) []byte) []byte { return f(bytes.Clone(good)) }
	for name, c := range map[string]struct {
		image []byte
		says  string
	}{
		"empty":        {nil, "ends early"},
		"no header":    {edit(func(b []byte) []byte { b[0x202] = 'x'; return b }), "no x86 boot header"},
		"old protocol": {edit(func(b []byte) []byte { b[0x206] = 7; return b }), "boot protocol 2.07"},
		"truncated":    {good[:len(good)-1], "ends early"},
		"gzip":         {edit(func(b []byte) []byte { b[1040] = 0x1f; return b }), "only LZ4 legacy"},
		"says less":    {edit(func(b []byte) []byte { b[len(b)-3]--; return b }), "more than"},
		"says more":    {edit(func(b []byte) []byte { b[len(b)-3]++; return b }), "and says"},
		"says 3 GB":    {edit(func(b []byte) []byte { b[len(b)-1] = 0xc0; return b }), "at most"},
		"block too long": {edit(func(b []byte) []byte {
			binary.LittleEndian.PutUint32(b[1044:], 1<<30)
			return b
		}), "ends early"},
		"not ELF": {bzImage(t, bytes.Repeat([]byte("text "), 100)), "no ELF"},
	} {
		if _, err := Unpack(c.image); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: error %v, want one that says %q", name, err, c.says)
		}
	}
}

func TestFindTakesTheNewest(t *testing.T) {
	root := t.TempDir()
	_, err := Find(root, Flavour)
	if !errors.Is(err, ErrMissing) || !strings.Contains(err.Error(), "apt-get install "+Package) {
		t.Errorf("nothing installed: error %v", err)
	}
	for _, release := range []string{"6.1.0-9-cloud-amd64", "6.1.0-56-cloud-amd64", "6.12.1-1-amd64", "6.1.0-100-cloud-amd64"} {
		write(t, filepath.Join(root, "boot", "vmlinuz-"+release), "x")
		if release != "6.1.0-100-cloud-amd64" { // its modules are missing
			write(t, filepath.Join(root, "lib/modules", release, "modules.dep"), "")
		}
	}
	k, err := Find(root, Flavour)
	if err != nil || k.Release != "6.1.0-56-cloud-amd64" {
		t.Errorf("found %q, %v", k.Release, err)
	}
}

// TestFindTakesTheSeries proves that another series changes nothing for who
// did not ask for it.
func TestFindTakesTheSeries(t *testing.T) {
	root := t.TempDir()
	have := func(release string) {
		write(t, filepath.Join(root, "boot", "vmlinuz-"+release), "x")
		write(t, filepath.Join(root, "lib/modules", release, "modules.dep"), "")
	}
	want := func(flavour, release string) {
		t.Helper()
		if k, err := Find(root, flavour); err != nil || k.Release != release {
			t.Errorf("flavour %s: found %q, %v; want %q", flavour, k.Release, err, release)
		}
	}
	have("6.12.117+deb12-cloud-amd64")
	want(Flavour, "6.12.117+deb12-cloud-amd64") // there is no other
	have("6.1.0-56-cloud-amd64")
	have("6.12.9+deb12-cloud-amd64")
	want(Flavour, "6.1.0-56-cloud-amd64")
	want(Series("6.1", Flavour), "6.1.0-56-cloud-amd64")
	want(Series("6.12", Flavour), "6.12.117+deb12-cloud-amd64")
	_, err := Find(root, Series("6.13", Flavour))
	if !errors.Is(err, ErrMissing) || !strings.Contains(err.Error(), "apt-get install linux-image-6.13-cloud-amd64") {
		t.Errorf("a series that is not there: error %v", err)
	}
}

const sampleDep = `kernel/a/ring.ko:
kernel/a/virtio.ko: kernel/a/ring.ko
kernel/a/virtio-pci.ko: kernel/a/legacy.ko kernel/a/virtio.ko kernel/a/ring.ko
kernel/a/legacy.ko:
kernel/b/net.ko: kernel/a/virtio.ko kernel/a/ring.ko
`

func TestOrder(t *testing.T) {
	got, err := order([]byte(sampleDep), []byte("kernel/fs/erofs/erofs.ko\n"), []string{"virtio_pci", "erofs", "net"})
	want := []string{"kernel/a/ring.ko", "kernel/a/virtio.ko", "kernel/a/legacy.ko", "kernel/a/virtio-pci.ko", "kernel/b/net.ko"}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("order %q, %v; want %q", got, err, want)
	}
	for dep, says := range map[string]string{
		sampleDep:                 `"missing" is neither`,
		"kernel/a.ko\n":           "no colon",
		"../../etc/shadow: \n":    "not a file below",
		"/etc/shadow: \n":         "not a file below",
		"a.ko: ../x.ko\n":         "not a file below",
		"kernel/./a.ko: b/c.ko\n": "not a file below",
	} {
		if _, err := order([]byte(dep), nil, []string{"missing"}); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: error %v, want %q", dep, err, says)
		}
	}
}

// install writes a synthetic kernel package and returns it with an agent.
func install(t *testing.T) (k Installed, agent string) {
	root := t.TempDir()
	write(t, filepath.Join(root, "boot/vmlinuz-1-cloud-amd64"), string(bzImage(t, sampleELF())))
	dir := filepath.Join(root, "lib/modules/1-cloud-amd64")
	write(t, filepath.Join(dir, "modules.dep"), sampleDep)
	for _, m := range []string{"ring", "virtio", "virtio-pci", "legacy"} {
		write(t, filepath.Join(dir, "kernel/a", m+".ko"), "module "+m)
	}
	k, err := Find(root, Flavour)
	if err != nil {
		t.Fatal(err)
	}
	agent = filepath.Join(root, "agent")
	write(t, agent, "\x7fELF agent")
	return k, agent
}

func TestArtefactsAreTheSameEachTime(t *testing.T) {
	k, agent := install(t)
	var first Initrd
	for i := range 2 {
		a, err := Prepare(t.TempDir(), k, "virtio_pci")
		if err != nil {
			t.Fatal(err)
		}
		if a.BuildID != "deadbeef" || !slices.Equal(a.Modules, []string{"ring.ko", "virtio.ko", "legacy.ko", "virtio-pci.ko"}) {
			t.Errorf("build id %q, modules %q", a.BuildID, a.Modules)
		}
		got, err := a.Initrd(agent, []byte("bundle"))
		if err != nil {
			t.Fatal(err)
		}
		if i > 0 && got.Digest != first.Digest {
			t.Errorf("digest %s, the first time %s", got.Digest, first.Digest)
		}
		first = got
		raw, err := os.ReadFile(got.Path)
		if err != nil {
			t.Fatal(err)
		}
		golden(t, raw)
	}
}

// golden compares an archive with the one checked in, which GNU cpio -it and
// the kernel have read.
func golden(t *testing.T, got []byte) {
	const file = "testdata/initrd.cpio"
	if os.Getenv("UPDATE") != "" {
		write(t, file, string(got))
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("archive differs from %s (UPDATE=1 rewrites it)", file)
	}
}

func TestPrepareMendsItsCache(t *testing.T) {
	k, _ := install(t)
	cache := t.TempDir()
	a, err := Prepare(cache, k, "virtio")
	if err != nil {
		t.Fatal(err)
	}
	want, _ := os.ReadFile(a.Kernel)
	for _, spoil := range []func() error{
		func() error { return os.WriteFile(a.Kernel, []byte("\x7fELF other"), 0o644) },
		func() error { return os.Remove(a.Types) },
		func() error {
			return os.WriteFile(filepath.Join(filepath.Dir(a.Kernel), "manifest.json"), []byte("{"), 0o644)
		},
	} {
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		b, err := Prepare(cache, k, "virtio")
		if err != nil {
			t.Fatal(err)
		}
		if got, _ := os.ReadFile(b.Kernel); !bytes.Equal(got, want) || b.KernelDigest != a.KernelDigest {
			t.Errorf("a spoiled cache gave a kernel of %d bytes", len(got))
		}
	}
}

func TestInitrdRefuses(t *testing.T) {
	k, agent := install(t)
	a, err := Prepare(t.TempDir(), k, "virtio")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Initrd(filepath.Join(t.TempDir(), "none"), nil); err == nil {
		t.Error("a missing agent was accepted")
	}
	write(t, agent, "#!/bin/sh\n")
	if _, err := a.Initrd(agent, nil); err == nil || !strings.Contains(err.Error(), "no ELF") {
		t.Errorf("a script as agent: error %v", err)
	}
}

func TestInitrdsArePruned(t *testing.T) {
	k, agent := install(t)
	cache := t.TempDir()
	a, err := Prepare(cache, k, "virtio")
	if err != nil {
		t.Fatal(err)
	}
	var last Initrd
	for i := range keptInitrds + 3 {
		if last, err = a.Initrd(agent, []byte{byte(i)}); err != nil {
			t.Fatal(err)
		}
	}
	left, _ := filepath.Glob(filepath.Join(cache, "initrd-*"))
	if len(left) != keptInitrds || !slices.Contains(left, last.Path) {
		t.Errorf("%d archives left, want %d with the last", len(left), keptInitrds)
	}
}

// TestInstalledKernels reads the kernels this machine has.
func TestInstalledKernels(t *testing.T) {
	for _, series := range []string{"6.1", "6.12"} {
		t.Run(series, func(t *testing.T) {
			k, err := Find("/", Series(series, Flavour))
			if errors.Is(err, ErrMissing) {
				t.Skip(err)
			}
			if err != nil {
				t.Fatal(err)
			}
			a, err := Prepare(t.TempDir(), k, SandboxModules()...)
			if err != nil {
				t.Fatal(err)
			}
			if len(a.BuildID) != 40 {
				t.Errorf("build id %q", a.BuildID)
			}
			for _, want := range []string{"virtio_blk.ko", "virtio_net.ko", "overlay.ko", "erofs.ko"} {
				if m, err := a.Module(want); err != nil || !bytes.HasPrefix(m, []byte("\x7fELF")) {
					t.Errorf("module %s: %v", want, err)
				}
			}
			if _, err := a.Module("floppy"); err == nil || errors.Is(err, ErrBuiltIn) {
				t.Errorf("a module that nobody asked for: %v", err)
			}
			if _, err := a.Module("virtio-pci"); series == "6.12" && !errors.Is(err, ErrBuiltIn) {
				t.Errorf("a module that is built in: %v", err)
			}
		})
	}
}

func FuzzUnpack(f *testing.F) {
	f.Add(bzImage(f, sampleELF()))
	f.Add([]byte(nil))
	f.Add(make([]byte, 0x300))
	f.Fuzz(func(t *testing.T, image []byte) {
		out, err := Unpack(image)
		if err != nil {
			return
		}
		Types(out)
		if id, err := BuildID(out); err == nil && len(id) > 128 {
			t.Errorf("build id of %d characters", len(id))
		}
	})
}

func FuzzUnpackPayload(f *testing.F) {
	f.Add(bzImage(f, sampleELF())[1040:])
	f.Add(zstdImage(f, sampleELF())[1040:])
	f.Add([]byte("\x02\x21\x4c\x18\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, payload []byte) {
		out, err := unpackPayload(payload)
		if err == nil && uint32(len(out)) != binary.LittleEndian.Uint32(payload[len(payload)-4:]) {
			t.Errorf("unpacked %d bytes, not what the image says", len(out))
		}
	})
}

func FuzzKernelParts(f *testing.F) {
	f.Add(sampleELF(), sampleNotes)
	f.Fuzz(func(t *testing.T, image, notes []byte) {
		Types(image)
		BuildID(image)
		if id := buildID(notes); len(id) > 128 {
			t.Errorf("build id %q", id)
		}
	})
}

func FuzzOrder(f *testing.F) {
	f.Add([]byte(sampleDep), []byte("kernel/fs/erofs.ko\n"), "virtio_pci")
	f.Fuzz(func(t *testing.T, dep, builtin []byte, name string) {
		files, err := order(dep, builtin, []string{name})
		if err != nil {
			return
		}
		for _, file := range files {
			if !filepath.IsLocal(file) {
				t.Errorf("file %q is outside the modules folder", file)
			}
		}
	})
}

func write(t *testing.T, name, data string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(data), 0o644); err != nil {
		t.Fatal(err)
	}
}
