package kernel

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"hauberk.dev/internal/atomicfile"
)

const (
	maxModule = 16 << 20
	maxTable  = 16 << 20 // modules.dep and its like
	maxAgent  = 64 << 20
	maxGuard  = 16 << 20

	keptInitrds = 8

	// layout rises when what Prepare writes changes.
	layout = 1
)

// Artefacts are the files a sandbox boots from, ready in a cache. All digests
// are SHA-256 in lower-case hexadecimal.
type Artefacts struct {
	Release      string `json:"release"`
	BuildID      string `json:"buildID"`
	Kernel       string `json:"-"` // path of the uncompressed ELF kernel
	KernelDigest string `json:"kernelDigest"`
	Types        string `json:"-"` // path of its type information (.BTF)
	TypesDigest  string `json:"typesDigest"`
	// Modules in loading order, by file name.
	Modules []string `json:"-"`

	cache   string
	names   []string // that Prepare was asked for
	modules []module
}

type module struct {
	name string // file name without folder
	data []byte
}

// Initrd is an initramfs in the cache and what went into it.
type Initrd struct {
	Path        string
	Digest      string
	AgentDigest string
	GuardDigest string // empty without a Guard bundle
}

// Prepare unpacks an installed kernel into the cache folder, or finds it
// there, and reads the modules that names asks for. A cached file whose digest
// is not what was written is made again.
func Prepare(cache string, k Installed, names ...string) (*Artefacts, error) {
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, fmt.Errorf("prepare kernel: %w", err)
	}
	packed, err := readBounded(k.Image, maxPacked)
	if err != nil {
		return nil, fmt.Errorf("prepare kernel: %w", err)
	}
	dir := filepath.Join(cache, fmt.Sprintf("kernel-%d-%s", layout, digest(packed)[:32]))
	a, err := cached(dir)
	if err != nil {
		if a, err = unpackInto(dir, packed); err != nil {
			return nil, fmt.Errorf("prepare kernel %s: %w", k.Image, err)
		}
	}
	a.Release, a.cache, a.names = k.Release, cache, names
	if a.modules, err = readModules(k.Modules, names); err != nil {
		return nil, fmt.Errorf("prepare kernel: %w", err)
	}
	for _, m := range a.modules {
		a.Modules = append(a.Modules, m.name)
	}
	return a, nil
}

func (a *Artefacts) place(dir string) *Artefacts {
	a.Kernel, a.Types = filepath.Join(dir, "vmlinux"), filepath.Join(dir, "vmlinux.btf")
	return a
}

// cached reads what an earlier Prepare left, if it is whole.
func cached(dir string) (*Artefacts, error) {
	raw, err := readBounded(filepath.Join(dir, "manifest.json"), 1<<16)
	if err != nil {
		return nil, err
	}
	a := new(Artefacts).place(dir)
	if err := json.Unmarshal(raw, a); err != nil {
		return nil, err
	}
	for name, want := range map[string]string{a.Kernel: a.KernelDigest, a.Types: a.TypesDigest} {
		got, err := digestOf(name)
		if err != nil {
			return nil, err
		}
		if got != want {
			return nil, fmt.Errorf("%s is not what was written", name)
		}
	}
	return a, nil
}

// unpackInto writes the parts of a kernel; the manifest comes last, so a
// folder without one is unfinished.
func unpackInto(dir string, packed []byte) (*Artefacts, error) {
	vmlinux, err := Unpack(packed)
	if err != nil {
		return nil, err
	}
	types, err := Types(vmlinux)
	if err != nil {
		return nil, err
	}
	id, err := BuildID(vmlinux)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	a := &Artefacts{BuildID: id, KernelDigest: digest(vmlinux), TypesDigest: digest(types)}
	a.place(dir)
	manifest, err := json.Marshal(a)
	if err != nil {
		return nil, err
	}
	return a, errors.Join(
		atomicfile.Write(a.Kernel, vmlinux, 0o644),
		atomicfile.Write(a.Types, types, 0o644),
		atomicfile.Write(filepath.Join(dir, "manifest.json"), manifest, 0o644))
}

func readModules(dir string, names []string) ([]module, error) {
	dep, err := readBounded(filepath.Join(dir, "modules.dep"), maxTable)
	if err != nil {
		return nil, err
	}
	builtin, err := readBounded(filepath.Join(dir, "modules.builtin"), maxTable)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	files, err := order(dep, builtin, names)
	if err != nil {
		return nil, err
	}
	var out []module
	for _, file := range files {
		packed, err := readBounded(filepath.Join(dir, file), maxModule)
		if err != nil {
			return nil, err
		}
		data, err := unpackModule(file, packed)
		if err != nil {
			return nil, fmt.Errorf("read module %s: %w", file, err)
		}
		out = append(out, module{name: plainName(file), data: data})
	}
	return out, nil
}

// plainName is the name of a module's file without its compression.
func plainName(file string) string {
	name, _, _ := strings.Cut(filepath.Base(file), ".ko")
	return name + ".ko"
}

// unpackModule undoes the compression that the file's name tells of. The guest
// gets modules as they are loaded: it has no use for a decompressor.
func unpackModule(file string, packed []byte) ([]byte, error) {
	var r io.Reader
	switch {
	case strings.HasSuffix(file, ".ko"):
		return packed, nil
	case strings.HasSuffix(file, ".ko.xz"):
		z, err := xz.ReaderConfig{DictCap: maxModule, SingleStream: true}.NewReader(bytes.NewReader(packed))
		if err != nil {
			return nil, err
		}
		r = z
	case strings.HasSuffix(file, ".ko.zst"):
		z, err := zstd.NewReader(bytes.NewReader(packed), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxModule))
		if err != nil {
			return nil, err
		}
		defer z.Close()
		r = z
	default:
		return nil, errors.New("neither .ko nor .ko.xz nor .ko.zst")
	}
	data, err := io.ReadAll(io.LimitReader(r, maxModule+1))
	if err == nil && len(data) > maxModule {
		err = fmt.Errorf("it unpacks to more than %d bytes", maxModule)
	}
	return data, err
}

// ErrBuiltIn says that a module is part of the kernel itself.
var ErrBuiltIn = errors.New("it is built into the kernel")

// Module returns one of the modules that Prepare was asked for, unpacked.
func (a *Artefacts) Module(name string) ([]byte, error) {
	same := func(other string) bool { return moduleName(other) == moduleName(name) }
	if i := slices.IndexFunc(a.modules, func(m module) bool { return same(m.name) }); i >= 0 {
		return a.modules[i].data, nil
	}
	if slices.ContainsFunc(a.names, same) {
		return nil, fmt.Errorf("find module %q: %w", name, ErrBuiltIn)
	}
	return nil, fmt.Errorf("find module %q: it is not among those of the sandbox", name)
}

// Initrd puts an initramfs into the cache: the agent as /init, the modules and
// their order below /modules and, unless it is empty, the Guard bundle as
// /guard.bundle. The same input gives the same bytes.
func (a *Artefacts) Initrd(agent string, guard []byte) (Initrd, error) {
	init, err := readBounded(agent, maxAgent)
	if err != nil {
		return Initrd{}, fmt.Errorf("build initramfs: agent: %w", err)
	}
	if !bytes.HasPrefix(init, []byte("\x7fELF")) {
		return Initrd{}, fmt.Errorf("build initramfs: agent %s is no ELF program", agent)
	}
	if len(guard) > maxGuard {
		return Initrd{}, fmt.Errorf("build initramfs: guard bundle has %d bytes, at most %d are accepted", len(guard), maxGuard)
	}
	var buf bytes.Buffer
	if err := writeInitrd(&buf, init, a.modules, guard); err != nil {
		return Initrd{}, fmt.Errorf("build initramfs: %w", err)
	}
	out := Initrd{Digest: digest(buf.Bytes()), AgentDigest: digest(init)}
	if len(guard) > 0 {
		out.GuardDigest = digest(guard)
	}
	out.Path = filepath.Join(a.cache, "initrd-"+out.Digest[:32]+".cpio")
	if old, err := readBounded(out.Path, maxAgent*2); err == nil && digest(old) == out.Digest {
		return out, nil
	}
	if err := atomicfile.Write(out.Path, buf.Bytes(), 0o644); err != nil {
		return Initrd{}, fmt.Errorf("build initramfs: %w", err)
	}
	return out, pruneInitrds(a.cache, out.Path)
}

func writeInitrd(buf *bytes.Buffer, init []byte, modules []module, guard []byte) error {
	ar := newArchive(buf)
	for _, dir := range []string{"dev", "proc", "sys", "run", "tmp", "modules"} {
		ar.dir(dir)
	}
	ar.file("init", 0o755, init)
	var list strings.Builder
	for _, m := range modules {
		ar.file("modules/"+m.name, 0o644, m.data)
		fmt.Fprintln(&list, m.name)
	}
	ar.file("modules/order", 0o644, []byte(list.String()))
	if len(guard) > 0 {
		ar.file("guard.bundle", 0o644, guard)
	}
	return ar.close()
}

// pruneInitrds keeps the newest archives, and always the one just made: each
// new agent or Guard makes another.
func pruneInitrds(cache, keep string) error {
	names, err := filepath.Glob(filepath.Join(cache, "initrd-*.cpio"))
	if err != nil || len(names) <= keptInitrds {
		return err
	}
	age := map[string]int64{}
	for _, n := range names {
		if fi, err := os.Stat(n); err == nil {
			age[n] = fi.ModTime().UnixNano()
		}
	}
	slices.SortFunc(names, func(a, b string) int { return cmp.Compare(age[b], age[a]) })
	var errs []error
	for _, n := range names[keptInitrds:] {
		if n != keep {
			errs = append(errs, os.Remove(n))
		}
	}
	return errors.Join(errs...)
}

// digestOf reads a file without holding it: a kernel is as large as all else
// that a process which starts machines holds.
func digestOf(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, io.LimitReader(f, maxUnpacked)); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func digest(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}
