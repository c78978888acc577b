package build

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"debug/buildinfo"
	"debug/elf"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"hauberk.dev/evidence"
)

// placedFile is a file with its place in the image. One of from, text and
// link holds its content, unless it is a directory.
type placedFile struct {
	path string // absolute
	mode int64
	dir  bool
	from string // a file of this machine
	text []byte
	link string
}

// directories are in every image: a container's kernel file systems are
// mounted on some of them.
var directories = map[string]int64{"/bin": 0o755, "/dev": 0o755, "/etc": 0o755, "/proc": 0o755, "/run": 0o755, "/sys": 0o755, "/tmp": 0o1777}

// collect builds the programs of an image and gathers its files.
func collect(ctx context.Context, s Spec, work string) (*layer, error) {
	c := &collector{files: map[string]placedFile{}, materials: map[string]evidence.Resource{}}
	for p, mode := range directories {
		c.files[p] = placedFile{path: p, mode: mode, dir: true}
	}
	for _, p := range s.Image.Programs {
		bin := filepath.Join(work, filepath.FromSlash(p.Path))
		if err := compile(ctx, s.Dir, p.Package, bin); err != nil {
			return nil, err
		}
		if err := c.program(p.Path, bin); err != nil {
			return nil, err
		}
	}
	for _, f := range s.Image.Files {
		if err := c.add(f); err != nil {
			return nil, fmt.Errorf("file %s: %w", f.Path, err)
		}
	}
	files, err := c.sorted()
	if err != nil {
		return nil, err
	}
	l := &layer{files: files, toolchain: c.toolchain}
	for _, uri := range slices.Sorted(maps.Keys(c.materials)) {
		l.materials = append(l.materials, c.materials[uri])
	}
	return l, nil
}

// compile builds one program that depends on nothing of this machine but the
// Go toolchain.
func compile(ctx context.Context, dir, pkg, out string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-mod=readonly",
		"-ldflags", "-s -w -buildid=", "-o", out, pkg)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+runtime.GOARCH, "GOFLAGS=", "GOWORK=off", "GOEXPERIMENT=")
	cmd.WaitDelay = 5 * time.Second
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("go build %s in %s: %w\n%s", pkg, dir, err, lastLines(stderr.String(), 30))
	}
	return nil
}

func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// collector gathers files, each path once, and what they were made from.
type collector struct {
	files     map[string]placedFile
	materials map[string]evidence.Resource
	toolchain string
}

// program adds a built program and the modules it was built from.
func (c *collector) program(at, bin string) error {
	info, err := buildinfo.ReadFile(bin)
	if err != nil {
		return err
	}
	c.toolchain = info.GoVersion
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		r := evidence.Resource{URI: "pkg:golang/" + m.Path + "@" + m.Version}
		if sum, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(m.Sum, "h1:")); err == nil && m.Sum != "" {
			r.Digest = map[string]string{"dirHash": hex.EncodeToString(sum)}
		}
		c.materials[r.URI] = r
	}
	return c.put(placedFile{path: at, mode: 0o755, from: bin})
}

func (c *collector) put(f placedFile) error {
	if old, ok := c.files[f.path]; ok && !(old.dir && f.dir) {
		return fmt.Errorf("%s is there twice", f.path)
	}
	c.files[f.path] = f
	return nil
}

// add adds a file that is not built.
func (c *collector) add(f File) error {
	p := placedFile{path: f.Path}
	switch {
	case f.Text != nil:
		p.text, p.mode = []byte(*f.Text), 0o644
	case f.Link != "":
		p.link, p.mode = f.Link, 0o777
	case f.Directory:
		p.dir, p.mode = true, 0o755
	default:
		return c.copied(f)
	}
	if f.Mode != "" {
		p.mode, _ = parseMode(f.Mode) // was checked
	}
	return c.put(p)
}

// copied adds a file of this machine and, if asked, what it needs to run.
func (c *collector) copied(f File) error {
	if err := c.copyFile(f.Copy, f.Path, f.Mode); err != nil {
		return err
	}
	if !f.Libraries {
		return nil
	}
	needs, err := libraries(f.Copy)
	if err != nil {
		return err
	}
	for _, lib := range needs {
		if _, there := c.files[lib]; there {
			continue // another program needed it
		}
		if err := c.copyFile(lib, lib, ""); err != nil {
			return err
		}
	}
	return nil
}

func (c *collector) copyFile(from, to, mode string) error {
	st, err := os.Stat(from)
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("%s is not a regular file", from)
	}
	perm := int64(st.Mode().Perm())
	if mode != "" {
		perm, _ = parseMode(mode) // was checked
	}
	sum, err := hashFile(from)
	if err != nil {
		return err
	}
	uri := "file://" + from
	c.materials[uri] = evidence.Resource{URI: uri, Digest: map[string]string{"sha256": sum}}
	return c.put(placedFile{path: to, mode: perm, from: from})
}

func hashFile(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

// parseMode reads octal permissions.
func parseMode(s string) (int64, error) {
	n, err := strconv.ParseInt(s, 8, 64)
	if err != nil || n < 0 || n > 0o7777 {
		return 0, fmt.Errorf("mode %q is not octal permissions", s)
	}
	return n, nil
}

// sorted returns the files, parents before children, adding the directories
// that nobody named.
func (c *collector) sorted() ([]placedFile, error) {
	for p := range maps.Clone(c.files) {
		for d := path.Dir(p); d != "/"; d = path.Dir(d) {
			f, ok := c.files[d]
			if ok && !f.dir {
				return nil, fmt.Errorf("%s is below %s, which is not a directory", p, d)
			}
			if !ok {
				c.files[d] = placedFile{path: d, mode: 0o755, dir: true}
			}
		}
	}
	out := slices.Collect(maps.Values(c.files))
	slices.SortFunc(out, func(a, b placedFile) int { return strings.Compare(a.path, b.path) })
	return out, nil
}

// writeTar writes a layer. Owners are root and times are zero, so only content
// counts.
func writeTar(name string, files []placedFile) (v1.Descriptor, error) {
	out, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return v1.Descriptor{}, err
	}
	defer out.Close()
	sum := sha256.New()
	w := tar.NewWriter(io.MultiWriter(out, sum))
	for _, f := range files {
		if err := f.write(w); err != nil {
			return v1.Descriptor{}, fmt.Errorf("write %s: %w", f.path, err)
		}
	}
	if err := errors.Join(w.Close(), out.Sync()); err != nil {
		return v1.Descriptor{}, err
	}
	st, err := out.Stat()
	if err != nil {
		return v1.Descriptor{}, err
	}
	return v1.Descriptor{
		MediaType: v1.MediaTypeImageLayer, Size: st.Size(),
		Digest: digest.Digest("sha256:" + hex.EncodeToString(sum.Sum(nil))),
	}, out.Close()
}

func (f placedFile) write(w *tar.Writer) error {
	h := &tar.Header{Name: strings.TrimPrefix(f.path, "/"), Mode: f.mode, Typeflag: tar.TypeReg, Format: tar.FormatPAX, ModTime: time.Unix(0, 0)}
	var body io.Reader = bytes.NewReader(f.text)
	h.Size = int64(len(f.text))
	switch {
	case f.dir:
		h.Typeflag, h.Name = tar.TypeDir, h.Name+"/"
	case f.link != "":
		h.Typeflag, h.Linkname = tar.TypeSymlink, f.link
	case f.from != "":
		in, err := os.Open(f.from)
		if err != nil {
			return err
		}
		defer in.Close()
		st, err := in.Stat()
		if err != nil {
			return err
		}
		h.Size, body = st.Size(), in
	}
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	n, err := io.Copy(w, body)
	if err == nil && n != h.Size {
		err = fmt.Errorf("it changed while it was read")
	}
	return err
}

// libraries returns what a dynamic program needs: its loader, and every
// library, as far as they need each other.
func libraries(program string) ([]string, error) {
	var out []string
	queue := []string{program}
	seen := map[string]bool{program: true}
	add := func(p string) {
		if !seen[p] {
			seen[p] = true
			out, queue = append(out, p), append(queue, p)
		}
	}
	for len(queue) > 0 {
		loader, needed, err := needs(queue[0])
		if err != nil {
			return nil, fmt.Errorf("read what %s needs: %w", queue[0], err)
		}
		queue = queue[1:]
		if loader != "" {
			add(loader)
		}
		for _, name := range needed {
			p, err := findLibrary(name)
			if err != nil {
				return nil, err
			}
			add(p)
		}
	}
	slices.Sort(out)
	return out, nil
}

func needs(name string) (loader string, needed []string, err error) {
	f, err := elf.Open(name)
	if err != nil {
		return "", nil, err
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP && p.Filesz < 4096 {
			raw, err := io.ReadAll(p.Open())
			if err != nil {
				return "", nil, err
			}
			loader = strings.TrimRight(string(raw), "\x00")
		}
	}
	needed, err = f.ImportedLibraries()
	return loader, needed, err
}

func findLibrary(name string) (string, error) {
	triple := map[string]string{"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}[runtime.GOARCH]
	for _, dir := range []string{"/lib/" + triple, "/usr/lib/" + triple, "/lib64", "/usr/lib64", "/lib", "/usr/lib"} {
		p := path.Join(dir, name)
		if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() {
			return p, nil
		}
	}
	return "", fmt.Errorf("find library %q: not in this machine's library directories", name)
}

// parameters are what a provenance says was asked of the builder.
type parameters struct {
	Image    Image `json:"image"`
	Modified bool  `json:"modified"`
}

// provenance says how an image was built.
func (s Spec) provenance(l *layer) evidence.Provenance {
	p := evidence.NewProvenance(s.Builder, BuildType, s.Source)
	// Both are plain structures, which always marshal.
	p.BuildDefinition.ExternalParameters, _ = json.Marshal(parameters{Image: s.Image, Modified: s.Modified})
	p.BuildDefinition.InternalParameters, _ = json.Marshal(map[string]string{"goos": "linux", "goarch": runtime.GOARCH})
	p.BuildDefinition.ResolvedDependencies = append(p.BuildDefinition.ResolvedDependencies, l.materials...)
	p.RunDetails.Builder.Version = map[string]string{"go": l.toolchain}
	return p
}
