package shim

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/containerd/containerd/api/types"

	"hauberk.dev/image"
	"hauberk.dev/internal/atomicfile"
	"hauberk.dev/internal/strictjson"
)

// The root file system of a container comes as mounts of a snapshotter. They
// are mounted read-only on a thread with a mount namespace of its own, so that
// nothing stays mounted however the shim ends, read once, and packed by package
// image. What the layers of an overlay came to is remembered under the identity
// of their directories: a snapshotter never changes a committed layer.

const (
	formatVersion = 1
	maxLayers     = 512
	maxRecord     = 1 << 20
)

// remembered says what the layers of a root came to.
type remembered struct {
	Version int    `json:"version"`
	Layers  string `json:"layers"` // their identity
	SHA256  string `json:"sha256"` // of the image
}

// root is a root file system to be read.
type root struct {
	layers []string // directories of an overlay, the topmost first; one is no overlay
	// shared says that no container writes to the layers.
	shared bool
	// ready is an image that needs no packing, if there is one.
	ready *image.Image
}

// rootOf understands the mounts that containerd gives. A writable layer on top
// counts as one more layer: what a sandbox writes stays in the sandbox.
func rootOf(mounts []*types.Mount, directory string) (root, error) {
	if len(mounts) == 0 {
		return root{layers: []string{directory}}, nil
	}
	if len(mounts) > 1 {
		return root{}, fmt.Errorf("rootfs: %d mounts; only one is understood", len(mounts))
	}
	m := mounts[0]
	if m.Target != "" {
		return root{}, fmt.Errorf("rootfs[0].target %q: only a mount at the root is understood", m.Target)
	}
	switch m.Type {
	case "bind":
		return root{layers: []string{m.Source}}, absolute(m.Source)
	case "overlay":
		return overlayOf(m.Options)
	case "erofs":
		return imageOf(m)
	}
	return root{}, fmt.Errorf("rootfs[0].type %q: only overlay and bind are understood: use the snapshotter overlayfs or native", m.Type)
}

// digestOption of a mount of type erofs says which file is meant.
const digestOption = "hauberk.sha256="

// imageOf understands an image that is packed, as who runs a sandbox without
// containerd gives it.
func imageOf(m *types.Mount) (root, error) {
	for _, o := range m.Options {
		if sum, ok := strings.CutPrefix(o, digestOption); ok {
			return root{ready: &image.Image{Path: m.Source, ErofsSHA256: sum}}, absolute(m.Source)
		}
	}
	return root{}, fmt.Errorf("rootfs[0].type \"erofs\": %q has no option %sDIGEST", m.Source, digestOption)
}

func overlayOf(options []string) (root, error) {
	r := root{shared: true}
	var upper string
	for _, o := range options {
		name, value, _ := strings.Cut(o, "=")
		switch name {
		case "lowerdir":
			r.layers = strings.Split(value, ":")
		case "upperdir":
			upper = value
		case "workdir", "index", "ro", "rw", "volatile", "userxattr", "redirect_dir", "metacopy", "xino":
			// They say how to write, or are the kernel's to see by itself.
			if value == "on" {
				return root{}, fmt.Errorf("rootfs[0].options %q: not understood", o)
			}
		default:
			return root{}, fmt.Errorf("rootfs[0].options %q: not understood", o)
		}
	}
	if upper != "" {
		used, err := os.ReadDir(upper)
		if err != nil {
			return root{}, fmt.Errorf("rootfs[0].options: %w", err)
		}
		if len(used) > 0 {
			r.layers = slices.Insert(r.layers, 0, upper)
			r.shared = false
		}
	}
	if len(r.layers) == 0 || len(r.layers) > maxLayers {
		return root{}, fmt.Errorf("rootfs[0].options: %d layers; want 1 to %d", len(r.layers), maxLayers)
	}
	return r, absolute(r.layers...)
}

func absolute(paths ...string) error {
	for _, p := range paths {
		if !filepath.IsAbs(p) || strings.ContainsAny(p, "\\,:\x00") {
			return fmt.Errorf("rootfs[0]: path %q: want an absolute one, without comma, colon and backslash", p)
		}
	}
	return nil
}

// identity of a root's layers, or "" if it may change. A directory is known by
// its device, number and time of birth: names are used again.
func (r root) identity() (string, error) {
	if !r.shared {
		return "", nil
	}
	h := sha256.New()
	for _, l := range r.layers {
		var st unix.Statx_t
		if err := unix.Statx(unix.AT_FDCWD, l, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st); err != nil {
			return "", fmt.Errorf("stat layer %s: %w", l, err)
		}
		if st.Mask&unix.STATX_BTIME == 0 {
			return "", nil // this file system does not tell
		}
		fmt.Fprintf(h, "%d:%s %d:%d %d %d.%09d %d.%09d\n", len(l), l, st.Dev_major, st.Dev_minor, st.Ino,
			st.Btime.Sec, st.Btime.Nsec, st.Ctime.Sec, st.Ctime.Nsec)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// pack gives the image of a root, made if it is not known yet.
func (r root) pack(ctx context.Context, dir string) (image.Image, error) {
	if r.ready != nil {
		return *r.ready, nil // who boots it checks it
	}
	id, err := r.identity()
	if err != nil {
		return image.Image{}, fmt.Errorf("pack root: %w", err)
	}
	record := filepath.Join(dir, "layers-"+id+".json")
	if id != "" {
		if img, err := recall(dir, record, id); err == nil {
			return img, nil // whatever else is wrong with it, packing anew is the cure
		}
	}
	img, err := r.packAnew(ctx, dir)
	if err != nil || id == "" {
		return img, err
	}
	raw, err := json.Marshal(remembered{Version: formatVersion, Layers: id, SHA256: img.ErofsSHA256})
	if err != nil {
		return image.Image{}, fmt.Errorf("pack root: %w", err)
	}
	return img, atomicfile.Write(record, raw, 0o600)
}

// recall finds the image of layers seen before, and checks it.
func recall(dir, record, id string) (image.Image, error) {
	raw, err := readFile(record, maxRecord)
	if err != nil {
		return image.Image{}, err
	}
	var r remembered
	if err := strictjson.Decode(raw, maxRecord, &r); err != nil {
		return image.Image{}, err
	}
	sum, err := hex.DecodeString(r.SHA256)
	if r.Version != formatVersion || r.Layers != id || err != nil || len(sum) != sha256.Size {
		return image.Image{}, errors.New("the record is of something else")
	}
	img := image.Image{Path: filepath.Join(dir, r.SHA256+".erofs"), ErofsSHA256: r.SHA256}
	return img, image.Verify(img.Path, img.ErofsSHA256)
}

// packAnew reads a root where nobody else sees it mounted.
func (r root) packAnew(ctx context.Context, dir string) (image.Image, error) {
	reader, writer := io.Pipe()
	go func() {
		var err error
		onOwnThread(func() { err = r.archive(ctx, writer) })
		writer.CloseWithError(err)
	}()
	img, err := image.Pack(ctx, reader, dir)
	return img, errors.Join(err, reader.Close()) // a writer that is still at it ends now
}

// onOwnThread runs f on a thread that ends with it and is not the main one,
// which is what /proc/self shows of the whole process.
func onOwnThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			onOwnThread(f) // while this one keeps the main thread
			runtime.UnlockOSThread()
			return
		}
		f() // never unlocked
	}()
	<-done
}

// archive mounts a root and writes it as a tar. The calling thread is lost.
func (r root) archive(ctx context.Context, w io.Writer) error {
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
		return fmt.Errorf("mount root: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("mount root: %w", err)
	}
	// The layers' names are taken below their common directory: a mount's
	// options have one page.
	base := commonDirectory(r.layers)
	if err := unix.Chdir(base); err != nil {
		return fmt.Errorf("mount root: %w", err)
	}
	const at = "/mnt" // seen by this thread alone
	flags := uintptr(unix.MS_RDONLY | unix.MS_NODEV | unix.MS_NOSUID | unix.MS_NOEXEC)
	if len(r.layers) == 1 {
		if err := bindReadOnly(r.layers[0], at, flags); err != nil {
			return fmt.Errorf("mount root: %w", err)
		}
		return writeTree(ctx, at, w)
	}
	var names []string
	for _, l := range r.layers {
		name, err := filepath.Rel(base, l)
		if err != nil {
			return fmt.Errorf("mount root: %w", err)
		}
		names = append(names, name)
	}
	if err := unix.Mount("overlay", at, "overlay", flags, "lowerdir="+strings.Join(names, ":")); err != nil {
		return fmt.Errorf("mount root of %d layers: %w", len(names), err)
	}
	return writeTree(ctx, at, w)
}

func bindReadOnly(from, to string, flags uintptr) error {
	if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	return unix.Mount("", to, "", unix.MS_BIND|unix.MS_REMOUNT|flags, "")
}

// commonDirectory of absolute paths; of one path, its parent.
func commonDirectory(paths []string) string {
	dir := filepath.Dir(paths[0])
	for _, p := range paths[1:] {
		for dir != "/" && !strings.HasPrefix(p, dir+"/") {
			dir = filepath.Dir(dir)
		}
	}
	return dir
}

// tree writes the files below a directory as a tar.
type tree struct {
	ctx  context.Context
	top  string
	out  *tar.Writer
	seen map[[2]uint64]string // files of several names
}

func writeTree(ctx context.Context, top string, w io.Writer) error {
	t := &tree{ctx: ctx, top: top, out: tar.NewWriter(w), seen: map[[2]uint64]string{}}
	if err := filepath.WalkDir(top, t.visit); err != nil {
		return fmt.Errorf("read root: %w", err)
	}
	return t.out.Close()
}

func (t *tree) visit(name string, d fs.DirEntry, err error) error {
	if err == nil {
		err = t.ctx.Err()
	}
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Lstat(name, &st); err != nil {
		return fmt.Errorf("stat %q: %w", name, err)
	}
	info, err := d.Info()
	if err != nil {
		return err
	}
	if info.Mode().Type() == fs.ModeSocket {
		return nil // nobody listens
	}
	var target string
	if info.Mode().Type() == fs.ModeSymlink {
		if target, err = os.Readlink(name); err != nil {
			return err
		}
	}
	h, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return fmt.Errorf("%q: %w", name, err)
	}
	// What names whom is for the image to say, not for this host.
	h.Uname, h.Gname, h.Format = "", "", tar.FormatPAX
	h.Uid, h.Gid = int(st.Uid), int(st.Gid)
	if h.Name, err = filepath.Rel(t.top, name); err != nil {
		return err
	}
	if h.PAXRecords, err = attributes(name); err != nil {
		return err
	}
	return t.add(name, h, &st)
}

func (t *tree) add(name string, h *tar.Header, st *unix.Stat_t) error {
	if h.Typeflag != tar.TypeDir && st.Nlink > 1 {
		key := [2]uint64{uint64(st.Dev), st.Ino}
		if first, ok := t.seen[key]; ok {
			return t.out.WriteHeader(&tar.Header{Name: h.Name, Typeflag: tar.TypeLink, Linkname: first, Format: tar.FormatPAX})
		}
		t.seen[key] = h.Name
	}
	if err := t.out.WriteHeader(h); err != nil {
		return fmt.Errorf("%q: %w", name, err)
	}
	if h.Typeflag != tar.TypeReg {
		return nil
	}
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	_, err = io.Copy(t.out, f)
	return errors.Join(err, f.Close())
}

// kept are the extended attributes that mean something inside a sandbox.
func kept(name string) bool {
	switch name {
	case "security.capability", "system.posix_acl_access", "system.posix_acl_default":
		return true
	}
	return strings.HasPrefix(name, "user.") && !strings.HasPrefix(name, "user.overlay.")
}

func attributes(name string) (map[string]string, error) {
	const most = 64 << 10 // of the kernel
	buf := make([]byte, most)
	n, err := unix.Llistxattr(name, buf)
	if errors.Is(err, unix.ENOTSUP) || n == 0 && err == nil {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list attributes of %q: %w", name, err)
	}
	out := map[string]string{}
	for key := range strings.SplitSeq(strings.TrimRight(string(buf[:n]), "\x00"), "\x00") {
		if !kept(key) {
			continue
		}
		value := make([]byte, most)
		n, err := unix.Lgetxattr(name, key, value)
		if err != nil {
			return nil, fmt.Errorf("read attribute %q of %q: %w", key, name, err)
		}
		out["SCHILY.xattr."+key] = string(value[:n])
	}
	return out, nil
}
