package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"
)

// store is a set of blobs in memory.
type store map[string][]byte

func (s store) Open(_ context.Context, digest string) (io.ReadCloser, error) {
	b, ok := s[digest]
	if !ok {
		return nil, os.ErrNotExist
	}
	return io.NopCloser(bytes.NewReader(b)), nil
}

func (s store) put(b []byte) string {
	sum := sha256.Sum256(b)
	d := "sha256:" + hex.EncodeToString(sum[:])
	s[d] = b
	return d
}

// image makes an image of tars, compressing every other one, and returns the
// digest of its manifest.
func (s store) image(t testing.TB, tars ...[]byte) string {
	t.Helper()
	type desc = map[string]any
	var layers []desc
	var diffs []string
	for i, raw := range tars {
		diffs = append(diffs, store{}.put(raw))
		kind := "application/vnd.oci.image.layer.v1.tar"
		if i%2 == 0 {
			raw, kind = zip(raw), kind+"+gzip"
		}
		layers = append(layers, desc{"mediaType": kind, "digest": s.put(raw), "size": len(raw)})
	}
	conf := encode(desc{
		"os": "linux", "architecture": runtime.GOARCH,
		"rootfs": desc{"type": "layers", "diff_ids": diffs},
		"config": desc{"Entrypoint": []string{"/bin/app"}, "User": "app", "Env": []string{"A=b"}},
	})
	return s.put(encode(desc{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": desc{"mediaType": "application/vnd.oci.image.config.v1+json", "digest": s.put(conf), "size": len(conf)},
		"layers": layers,
	}))
}

func encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

func zip(raw []byte) []byte {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	z.Write(raw)
	z.Close()
	return b.Bytes()
}

// archive makes a tar. Headers without a type are regular files whose content
// is their Uname.
func archive(t testing.TB, headers ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		body := h.Uname
		h.Uname = ""
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
			h.Size = int64(len(body))
		}
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			io.WriteString(w, body)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

var passwd = tar.Header{Name: "etc/passwd", Uname: "root:x:0:0::/:\napp:x:1000:1001::/:\n"}
var group = tar.Header{Name: "etc/group", Uname: "root:x:0:\napp:x:1001:\nlog:x:44:x,app\n"}

func pullForTest(t testing.TB, s store, digest string) Image {
	t.Helper()
	img, err := Pull(t.Context(), s, digest, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// mount attaches an erofs file to this machine's kernel.
func mount(t *testing.T, path string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "erofs", "-o", "loop,ro", path, dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// list describes everything below a directory as the kernel sees it. Hard
// links are told by the first name of their inode.
func list(t *testing.T, root string) []string {
	t.Helper()
	var out []string
	first := map[uint64]string{}
	err := filepath.WalkDir(root, func(p string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		line := fmt.Sprintf("%s mode=%o owner=%d:%d nlink=%d", rel, st.Mode, st.Uid, st.Gid, st.Nlink)
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			if _, ok := first[st.Ino]; !ok {
				first[st.Ino] = rel
			}
			line += " size=" + fmt.Sprint(st.Size) + " same=" + first[st.Ino]
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			raw, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" mtime=%d.%d sha256=%x", st.Mtim.Sec, st.Mtim.Nsec, sha256.Sum256(raw))
		case unix.S_IFLNK:
			to, err := os.Readlink(p)
			if err != nil {
				return err
			}
			line += " -> " + to
		}
		for _, name := range xattrNames(t, p) {
			buf := make([]byte, 70000)
			n, err := unix.Lgetxattr(p, name, buf)
			if err != nil {
				return fmt.Errorf("%s %s: %w", p, name, err)
			}
			line += fmt.Sprintf(" %s=%x", name, buf[:n])
		}
		out = append(out, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func xattrNames(t *testing.T, p string) []string {
	t.Helper()
	buf := make([]byte, 1<<16)
	n, err := unix.Llistxattr(p, buf)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, name := range strings.Split(strings.TrimRight(string(buf[:n]), "\x00"), "\x00") {
		if name != "" && !strings.HasPrefix(name, "trusted.overlay.") {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

func same(t *testing.T, got, want []string) {
	t.Helper()
	if len(want) < 2 {
		t.Fatalf("the oracle saw only %d files", len(want))
	}
	for i := range max(len(got), len(want)) {
		g, w := "(nothing)", "(nothing)"
		if i < len(got) {
			g = got[i]
		}
		if i < len(want) {
			w = want[i]
		}
		if g != w {
			t.Fatalf("entry %d:\n got %s\nwant %s", i, g, w)
		}
	}
}

// TestAgainstTar compares an image with what tar unpacks of the same layer.
func TestAgainstTar(t *testing.T) {
	src := t.TempDir()
	script := `set -e
cd "$1"
mkdir -p bin usr/lib many deep empty 'sp ace'
for i in $(seq 700); do echo "$i" > "many/a-rather-long-file-name-to-fill-directory-blocks-$i"; done
for s in 0 1 1023 1024 1025 4095 4096 4097 100000; do head -c $s /dev/urandom > usr/lib/size-$s; done
head -c 3000000 /dev/urandom > bin/app; chmod 4755 bin/app; chown 12:34 bin/app
ln bin/app bin/app2; ln bin/app usr/app3
ln -s ../usr/lib usr/up; ln -s /bin/app abs; ln -s "$(printf 'x%.0s' $(seq 2000))" long
ln -s a 'sp ace/link'; chown -h 5:6 abs
d=deep; for i in $(seq 60); do d=$d/d; done; mkdir -p $d; echo bottom > $d/file
mkfifo pipe; chmod 1777 empty; chmod 700 deep; chown 4294967290:4294967290 empty
setfattr -n user.note -v hello bin/app || true
setfattr -n security.capability -v 0x0100000200040000000000000000000000000000 usr/lib/size-1024
setfattr -n trusted.big -v "$(head -c 700 /dev/zero | tr '\0' z)" usr/lib/size-1
setfattr -n user.dir -v d many
touch -d '2001-02-03 04:05:06.789' bin/app
: > 'utf8-é'`
	if out, err := exec.Command("sh", "-c", script, "sh", src).CombinedOutput(); err != nil {
		t.Fatalf("make tree: %v: %s", err, out)
	}
	layer, err := exec.Command("tar", "--xattrs", "--xattrs-include=*", "--format=pax", "--numeric-owner", "-C", src, "-c", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	oracle := t.TempDir()
	untar := exec.Command("tar", "--xattrs", "--xattrs-include=*", "--numeric-owner", "--same-owner", "-p", "-C", oracle, "-x")
	untar.Stdin = bytes.NewReader(layer)
	if out, err := untar.CombinedOutput(); err != nil {
		t.Fatalf("tar: %v: %s", err, out)
	}
	s := store{}
	img := pullForTest(t, s, s.image(t, layer, archive(t, passwd)))
	// The second layer brings /etc/passwd, so the oracle gets it too.
	os.Mkdir(filepath.Join(oracle, "etc"), 0o755)
	os.WriteFile(filepath.Join(oracle, "etc/passwd"), []byte(passwd.Uname), 0o755)
	os.Chtimes(filepath.Join(oracle, "etc/passwd"), time.Unix(0, 0), time.Unix(0, 0))
	same(t, list(t, mount(t, img.Path)), list(t, oracle))
	fsck(t, img.Path)
}

// fsck asks the two other readers of the format that can be had.
func fsck(t *testing.T, path string) {
	t.Helper()
	if out, err := exec.Command("fsck.erofs", path).CombinedOutput(); err != nil {
		t.Errorf("fsck.erofs: %v: %s", err, out)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	img, err := erofs.Open(f)
	if err != nil {
		t.Fatalf("go-erofs: %v", err)
	}
	dir, err := img.Open("bin")
	if err != nil {
		t.Fatalf("go-erofs: %v", err)
	}
	dir.Close()
}

// TestAgainstOverlay makes the second layer from what the kernel's overlay
// wrote to its upper directory, and compares the image with the overlay.
func TestAgainstOverlay(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting an overlay needs root")
	}
	base := t.TempDir()
	if err := unix.Mount("none", base, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(base, 0) })
	dir := func(n string) string { p := filepath.Join(base, n); os.Mkdir(p, 0o755); return p }
	lower, upper, work, view := dir("lower"), dir("upper"), dir("work"), dir("view")
	sh := func(at, script string) {
		t.Helper()
		c := exec.Command("sh", "-ec", script)
		c.Dir = at
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	sh(lower, `mkdir -p bin etc a/b/c gone/x turn keep; echo 1 >a/1; echo 2 >a/b/2; echo 3 >a/b/c/3; echo g >gone/x/g
		echo t >turn/t; echo f >file; ln -s a link; echo k >keep/k; echo 'app:x:7:8::/:' >etc/passwd`)
	if err := unix.Mount("overlay", view, "overlay", 0, "lowerdir="+lower+",upperdir="+upper+",workdir="+work); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(view, 0) })
	first, err := exec.Command("tar", "--format=pax", "--numeric-owner", "-C", lower, "-c", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	sh(view, `rm a/1; rm -r a/b; mkdir a/b; echo new >a/b/new; rm -r gone; rm -r turn; echo now-a-file >turn
		rm file; mkdir file; echo in >file/in; rm link; echo l >link; chmod 700 keep; echo more >keep/more`)
	s := store{}
	img := pullForTest(t, s, s.image(t, first, upperTar(t, upper)))
	// An overlay does not count the links of merged directories.
	links := regexp.MustCompile(`( mode=4\d+ .*) nlink=\d+`)
	plain := func(l []string) []string {
		for i := range l {
			l[i] = links.ReplaceAllString(l[i], "$1")
		}
		return l
	}
	same(t, plain(list(t, mount(t, img.Path))), plain(list(t, view)))
	if img.Config.UID != 7 || img.Config.GID != 8 {
		t.Errorf("owner is %d:%d", img.Config.UID, img.Config.GID)
	}
}

// upperTar writes an overlay's upper directory as a layer.
func upperTar(t *testing.T, upper string) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err := filepath.WalkDir(upper, func(p string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(upper, p)
		info, err := d.Info()
		if err != nil {
			return err
		}
		if info.Mode()&os.ModeCharDevice != 0 {
			return w.WriteHeader(&tar.Header{Name: filepath.Join(filepath.Dir(rel), ".wh."+filepath.Base(rel)), Typeflag: tar.TypeReg})
		}
		h, err := tar.FileInfoHeader(info, "")
		if err != nil {
			return err
		}
		h.Name, h.Format = rel, tar.FormatPAX
		h.AccessTime, h.ChangeTime = time.Time{}, time.Time{}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		if d.Type().IsRegular() {
			raw, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			w.Write(raw)
		}
		var flag [8]byte
		if n, err := unix.Lgetxattr(p, "trusted.overlay.opaque", flag[:]); err == nil && n == 1 && flag[0] == 'y' {
			return w.WriteHeader(&tar.Header{Name: filepath.Join(rel, ".wh..wh..opq"), Typeflag: tar.TypeReg})
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
	return b.Bytes()
}

func TestPull(t *testing.T) {
	s := store{}
	d := s.image(t, archive(t, passwd, group, tar.Header{Name: "bin/app", Uname: "one"}), archive(t, tar.Header{Name: "b", Uname: "two"}))
	a, b := pullForTest(t, s, d), pullForTest(t, s, d)
	if a.ErofsSHA256 != b.ErofsSHA256 || a.Size != b.Size {
		t.Errorf("the same image twice: %+v and %+v", a, b)
	}
	if err := Verify(a.Path, a.ErofsSHA256); err != nil {
		t.Error(err)
	}
	if c := a.Config; c.UID != 1000 || c.GID != 1001 || !slices.Equal(c.Groups, []uint32{44}) || c.WorkingDir != "/" || c.Entrypoint[0] != "/bin/app" {
		t.Errorf("configuration is %+v", c)
	}
	if st, err := os.Stat(filepath.Dir(a.Path)); err != nil || st.Mode().Perm()&0o022 != 0 {
		t.Errorf("cache directory: %v, %v", st.Mode(), err)
	}
}

// TestCache shows that the cache serves without layers, notices that a file
// was changed, makes it again, and clears what a killed Pull left.
func TestCache(t *testing.T) {
	s := store{}
	d := s.image(t, archive(t, passwd))
	dir := t.TempDir()
	img, err := Pull(t.Context(), s, d, dir)
	if err != nil {
		t.Fatal(err)
	}
	small := store{}
	for k, v := range s {
		if v[0] == '{' {
			small[k] = v
		}
	}
	if again, err := Pull(t.Context(), small, d, dir); err != nil || again.ErofsSHA256 != img.ErofsSHA256 {
		t.Fatalf("from the cache: %+v, %v", again, err)
	}
	if err := os.Chmod(img.Path, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(img.Path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteAt([]byte{0xff}, 5000)
	f.Close()
	if err := Verify(img.Path, img.ErofsSHA256); err == nil {
		t.Error("a changed file verifies")
	}
	if _, err := Pull(t.Context(), small, d, dir); err == nil {
		t.Error("a changed file was served")
	}
	os.WriteFile(filepath.Join(dir, ".spool-left"), nil, 0o600)
	again, err := Pull(t.Context(), s, d, dir)
	if err != nil || again.ErofsSHA256 != img.ErofsSHA256 {
		t.Fatalf("made again: %+v, %v", again, err)
	}
	left, _ := filepath.Glob(filepath.Join(dir, ".spool*"))
	if len(left) != 0 {
		t.Errorf("left over: %q", left)
	}
}

func TestPullTogether(t *testing.T) {
	s := store{}
	d := s.image(t, archive(t, passwd, tar.Header{Name: "x", Uname: strings.Repeat("x", 1<<20)}))
	dir := t.TempDir()
	sums := make(chan string, 8)
	for range cap(sums) {
		go func() {
			img, err := Pull(context.Background(), s, d, dir)
			if err != nil {
				t.Error(err)
			}
			sums <- img.ErofsSHA256
		}()
	}
	first := <-sums
	for range cap(sums) - 1 {
		if got := <-sums; got != first {
			t.Errorf("got %s and %s", first, got)
		}
	}
}

// TestFullDisk makes an image where there is too little room for it.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=1m,mode=700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, 0) })
	s := store{}
	for _, size := range []int{700 << 10, 4 << 20} { // the spool fits and the image does not; neither fits
		d := s.image(t, archive(t, passwd, tar.Header{Name: "x", Uname: strings.Repeat("x", size)}))
		if _, err := Pull(t.Context(), s, d, dir); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("got %v", err)
		}
		if left, _ := filepath.Glob(filepath.Join(dir, "[^.]*")); len(left) != 0 {
			t.Errorf("left over: %q", left)
		}
	}
	if _, err := Pull(t.Context(), s, s.image(t, archive(t, passwd)), dir); err != nil {
		t.Errorf("a small image after it: %v", err)
	}
}

func TestOpenCache(t *testing.T) {
	dir := t.TempDir()
	os.Chmod(dir, 0o777)
	s := store{}
	if _, err := Pull(t.Context(), s, s.image(t, archive(t, passwd)), dir); err == nil || !strings.Contains(err.Error(), "others may write") {
		t.Errorf("got %v", err)
	}
}

func TestPrune(t *testing.T) {
	s := store{}
	dir := t.TempDir()
	var images []Image
	for _, body := range []string{"one", "two"} {
		img, err := Pull(t.Context(), s, s.image(t, archive(t, passwd, tar.Header{Name: "x", Uname: body})), dir)
		if err != nil {
			t.Fatal(err)
		}
		images = append(images, img)
	}
	if err := Prune(t.Context(), dir, []string{images[1].Path}); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "[^.]*")); len(left) != 2 || !slices.Contains(left, images[1].Path) {
		t.Errorf("left: %q", left)
	}
	if err := Prune(t.Context(), filepath.Join(dir, "none"), nil); err != nil {
		t.Error(err)
	}
}

// TestRegistry pulls over HTTP, and sees a refusal with its reason.
func TestRegistry(t *testing.T) {
	s := store{}
	d := s.image(t, archive(t, passwd))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rest, ours := strings.CutPrefix(r.URL.Path, "/v2/bank/web/")
		kind, digest, _ := strings.Cut(rest, "/")
		content, there := s[digest]
		switch {
		case !ours:
			w.WriteHeader(http.StatusForbidden)
			io.WriteString(w, `{"errors":[{"code":"DENIED","message":"no release"}]}`)
		case !there || (kind == "manifests") != (digest == d):
			w.WriteHeader(http.StatusNotFound)
		default:
			w.Write(content)
		}
	}))
	defer srv.Close()
	r := Registry{Client: srv.Client(), URL: srv.URL, Repository: "bank/web"}
	if _, err := Pull(t.Context(), r, d, t.TempDir()); err != nil {
		t.Error(err)
	}
	if _, err := Pull(t.Context(), r, store{}.put([]byte("other")), t.TempDir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	r.Repository = "bank"
	if _, err := Pull(t.Context(), r, d, t.TempDir()); err == nil || !strings.Contains(err.Error(), "no release") {
		t.Errorf("got %v", err)
	}
}

func TestLayoutNames(t *testing.T) {
	one, two := store{}.put([]byte("1")), store{}.put([]byte("2"))
	for name, test := range map[string]struct{ index, ask, want string }{
		"named":     {`{"manifests":[{"digest":"` + one + `","annotations":{"org.opencontainers.image.ref.name":"a:1"}},{"digest":"` + two + `"}]}`, "a:1", one},
		"only one":  {`{"manifests":[{"digest":"` + two + `"}]}`, "", two},
		"ambiguous": {`{"manifests":[{"digest":"` + one + `"},{"digest":"` + two + `"}]}`, "", ""},
		"missing":   {`{"manifests":[]}`, "a:1", ""},
		"no digest": {`{"manifests":[{"digest":"../../etc"}]}`, "", ""},
		"no JSON":   {`{`, "", ""},
	} {
		dir := t.TempDir()
		os.WriteFile(filepath.Join(dir, "index.json"), []byte(test.index), 0o644)
		got, err := Layout(dir).Manifest(test.ask)
		if (err != nil) != (test.want == "") || err == nil && got != test.want {
			t.Errorf("%s: got %q, %v", name, got, err)
		}
	}
}

func TestRefusedLayers(t *testing.T) {
	ok := []tar.Header{passwd}
	for name, test := range map[string]struct {
		headers []tar.Header
		want    string
	}{
		"absolute":          {[]tar.Header{{Name: "/etc/shadow"}}, "absolute"},
		"climbs":            {[]tar.Header{{Name: "a/../../b"}}, "climbs"},
		"long element":      {[]tar.Header{{Name: strings.Repeat("x", 256)}}, "longer than 255"},
		"device":            {[]tar.Header{{Name: "sda", Typeflag: tar.TypeBlock}}, "device"},
		"whiteout device":   {[]tar.Header{{Name: "sda", Typeflag: tar.TypeChar}}, "device"},
		"link escapes":      {[]tar.Header{{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "../../etc"}, {Name: "l/x"}}, "out of the image"},
		"link loop":         {[]tar.Header{{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "l"}, {Name: "l/x"}}, "40 symbolic links"},
		"below a file":      {[]tar.Header{{Name: "f"}, {Name: "f/x"}}, "not a directory"},
		"hard link out":     {[]tar.Header{{Name: "h", Typeflag: tar.TypeLink, Linkname: "../etc/passwd"}}, "climbs"},
		"hard link void":    {[]tar.Header{{Name: "h", Typeflag: tar.TypeLink, Linkname: "none"}}, "not exist"},
		"hard link dir":     {[]tar.Header{{Name: "h", Typeflag: tar.TypeLink, Linkname: "etc"}}, "directory"},
		"root is a file":    {[]tar.Header{{Name: "./"[:1]}}, "root"},
		"empty whiteout":    {[]tar.Header{{Name: "a/.wh."}}, "names nothing"},
		"dot whiteout":      {[]tar.Header{{Name: "a/.wh..."}}, "names nothing"},
		"overlay steered":   {[]tar.Header{{Name: "a", PAXRecords: map[string]string{"SCHILY.xattr.trusted.overlay.opaque": "y"}}}, "steer"},
		"unknown xattr":     {[]tar.Header{{Name: "a", PAXRecords: map[string]string{"SCHILY.xattr.odd.name": "y"}}}, "known kind"},
		"whiteout escapes":  {[]tar.Header{{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "../../etc"}, {Name: "l/.wh.passwd"}}, "out of the image"},
		"opaque escapes":    {[]tar.Header{{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "a/../../.."}, {Name: "l/.wh..wh..opq"}, {Name: "a", Typeflag: tar.TypeDir}, {Name: "l/.wh..wh..opq"}}, "out of the image"},
		"hard link escapes": {[]tar.Header{{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "/../etc"}, {Name: "h", Typeflag: tar.TypeLink, Linkname: "l/passwd"}}, "out of the image"},
		"renamed link":      {[]tar.Header{{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "../.."}, {Name: "m", Typeflag: tar.TypeLink, Linkname: "l"}, {Name: "m/x"}}, "out of the image"},
		"long path":         {[]tar.Header{{Name: strings.Repeat("dir/", 1024) + "f"}}, "at most 4095"},
		"too deep":          {[]tar.Header{{Name: strings.Repeat("d/", 600) + "f"}, {Name: "l", Typeflag: tar.TypeSymlink, Linkname: strings.Repeat("d/", 600)}, {Name: "l/" + strings.Repeat("e/", 600) + "f"}}, "1024 directories deep"},
		"link to nothing":   {[]tar.Header{{Name: "l", Typeflag: tar.TypeSymlink}}, "symbolic link"},
		"large attributes":  {[]tar.Header{{Name: "a", PAXRecords: map[string]string{"SCHILY.xattr.user.a": strings.Repeat("x", 64<<10)}}}, "larger than"},
		"contiguous file":   {[]tar.Header{{Name: "a", Typeflag: tar.TypeCont}}, "not known"},
		"owner":             {[]tar.Header{{Name: "a", Uid: 1<<32 - 1}}, "out of range"},
	} {
		t.Run(name, func(t *testing.T) {
			s := store{}
			dir := t.TempDir()
			_, err := Pull(t.Context(), s, s.image(t, archive(t, append(ok, test.headers...)...)), dir)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("got %v, want %q", err, test.want)
			}
			if left, _ := filepath.Glob(filepath.Join(dir, "*.erofs")); len(left) != 0 {
				t.Errorf("a refused image left %q", left)
			}
		})
	}
}

func TestLinkedParent(t *testing.T) {
	s := store{}
	img := pullForTest(t, s, s.image(t,
		archive(t, passwd, tar.Header{Name: "usr/lib", Typeflag: tar.TypeDir}, tar.Header{Name: "lib", Typeflag: tar.TypeSymlink, Linkname: "/usr/lib"}),
		archive(t, tar.Header{Name: "lib/so", Uname: "so"})))
	if raw, err := os.ReadFile(filepath.Join(mount(t, img.Path), "usr/lib/so")); err != nil || string(raw) != "so" {
		t.Errorf("got %q, %v", raw, err)
	}
}

// TestBounds runs small limits into layers that are larger.
func TestBounds(t *testing.T) {
	bomb := archive(t, passwd, tar.Header{Name: "zeros", Uname: strings.Repeat("\x00", 8<<20)})
	deep := archive(t, passwd, tar.Header{Name: strings.Repeat("d/", 200) + "f"})
	for name, test := range map[string]struct {
		layer []byte
		set   func(*limits)
		want  error
	}{
		"decompression bomb": {bomb, func(l *limits) { l.unpacked = 1 << 20 }, errTooLarge},
		"entries":            {archive(t, passwd, group), func(l *limits) { l.entries = 2 }, nil},
		"implied entries":    {deep, func(l *limits) { l.entries = 100 }, nil},
		"names":              {deep, func(l *limits) { l.text = 100 }, nil},
		"stored size":        {bomb, func(l *limits) { l.blob = 10 }, nil},
		"layers":             {bomb, func(l *limits) { l.layers = 0 }, nil},
		"manifest":           {bomb, func(l *limits) { l.manifest = 10 }, nil},
		"configuration":      {bomb, func(l *limits) { l.config = 10 }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			lim := standard
			s := store{}
			d := s.image(t, test.layer)
			if _, err := pull(t.Context(), s, d, t.TempDir(), lim); err != nil {
				t.Fatalf("within the standard limits: %v", err)
			}
			test.set(&lim)
			_, err := pull(t.Context(), s, d, t.TempDir(), lim)
			if err == nil || test.want != nil && !errors.Is(err, test.want) {
				t.Fatalf("got %v", err)
			}
		})
	}
}

// TestWhiteoutsOfNothing: they remove nothing, and make nothing.
func TestWhiteoutsOfNothing(t *testing.T) {
	s := store{}
	img := pullForTest(t, s, s.image(t, archive(t, passwd), archive(t, tar.Header{Name: "never/.wh.was"}, tar.Header{Name: "nor/this/.wh..wh..opq"})))
	var got []string
	for _, line := range list(t, mount(t, img.Path)) {
		name, _, _ := strings.Cut(line, " ")
		got = append(got, name)
	}
	if want := []string{".", "etc", "etc/passwd"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TestManyWhiteouts: those of one file each cost what they look like; those
// that search the same tree again and again are stopped.
func TestManyWhiteouts(t *testing.T) {
	full := []tar.Header{passwd}
	for i := range 4000 {
		full = append(full, tar.Header{Name: fmt.Sprintf("d/e/%d", i)})
	}
	var each, again []tar.Header
	for i := range 10_000 {
		each = append(each, tar.Header{Name: fmt.Sprintf("d/e/.wh.%d", i)})
		// What this layer has put there stays, and is looked at each time.
		again = append(again, tar.Header{Name: fmt.Sprintf("d/e/%d", i%4000)}, tar.Header{Name: "d/.wh..wh..opq"})
	}
	lim := standard
	lim.entries = 40_000
	s := store{}
	if _, err := pull(t.Context(), s, s.image(t, archive(t, full...), archive(t, each...)), t.TempDir(), lim); err != nil {
		t.Errorf("ten thousand whiteouts: %v", err)
	}
	began := time.Now()
	_, err := pull(t.Context(), s, s.image(t, archive(t, full...), archive(t, again...)), t.TempDir(), lim)
	if err == nil || !strings.Contains(err.Error(), "whiteouts that look at more than") {
		t.Errorf("got %v", err)
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("it took %v", took)
	}
}

// TestTooManyLayers has one layer more than an image may.
func TestTooManyLayers(t *testing.T) {
	layers := [][]byte{archive(t, passwd)}
	for range standard.layers - 1 {
		layers = append(layers, archive(t, tar.Header{Name: "same", Uname: "x"}))
	}
	s := store{}
	pullForTest(t, s, s.image(t, layers...))
	if _, err := Pull(t.Context(), s, s.image(t, append(layers, layers[1])...), t.TempDir()); err == nil || !strings.Contains(err.Error(), "layers") {
		t.Errorf("got %v", err)
	}
}

// TestBombs has layers of a few kilobytes that say they are more than anybody
// has: with the standard limits they must be refused before they are written.
func TestBombs(t *testing.T) {
	claimed := archive(t, passwd, tar.Header{Name: "big", Uname: "x"})
	// A sparse file of 64 GiB with no data at all, as GNU tar 1.0 in pax writes.
	var sparse bytes.Buffer
	w := tar.NewWriter(&sparse)
	sizes := "1\n68719476736\n0\n"
	block := sizes + strings.Repeat("\x00", 512-len(sizes))
	record := func(k, v string) string { return fmt.Sprintf("%d %s=%s\n", len(k)+len(v)+5, k, v) }
	pax := record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0") + record("GNU.sparse.name", "big") + record("GNU.sparse.realsize", "68719476736")
	w.WriteHeader(&tar.Header{Name: "x", Typeflag: tar.TypeReg, Size: int64(len(pax)), Mode: 0o644})
	io.WriteString(w, pax)
	w.WriteHeader(&tar.Header{Name: "big", Typeflag: tar.TypeReg, Size: 512, Mode: 0o644})
	io.WriteString(w, block)
	w.Close()
	holes := sparse.Bytes()
	holes[156] = tar.TypeXHeader // which the writer does not write by itself
	sum := 0
	copy(holes[148:], "        ")
	for _, c := range holes[:512] {
		sum += int(c)
	}
	copy(holes[148:], fmt.Sprintf("%06o\x00 ", sum))
	// The size field of "big" in a plain header, 17 GiB in base 256.
	at := bytes.Index(claimed, []byte("big\x00"))
	copy(claimed[at+124:], []byte{0x80, 0, 0, 0, 0, 0, 0, 4, 0x40, 0, 0, 0})
	sum = 0
	copy(claimed[at+148:], "        ")
	for _, c := range claimed[at : at+512] {
		sum += int(c)
	}
	copy(claimed[at+148:], fmt.Sprintf("%06o\x00 ", sum))
	for name, layer := range map[string][]byte{"sparse": holes, "claimed size": claimed} {
		t.Run(name, func(t *testing.T) {
			s := store{}
			began := time.Now()
			_, err := Pull(t.Context(), s, s.image(t, layer), t.TempDir())
			if !errors.Is(err, errTooLarge) {
				t.Errorf("got %v", err)
			}
			if took := time.Since(began); took > 10*time.Second {
				t.Errorf("it took %v", took)
			}
		})
	}
}

// TestCorruptBlobs changes or cuts every blob of an image, one at a time.
func TestCorruptBlobs(t *testing.T) {
	s := store{}
	d := s.image(t, archive(t, passwd), archive(t, tar.Header{Name: "b", Uname: "two"}))
	for victim, content := range s {
		flipped := slices.Clone(content)
		flipped[len(flipped)/2] ^= 1
		for what, bad := range map[string][]byte{"flipped": flipped, "cut": content[:len(content)-1], "longer": append(slices.Clone(content), 0), "empty": {}} {
			broken := store{}
			for k, v := range s {
				broken[k] = v
			}
			broken[victim] = bad
			if _, err := Pull(t.Context(), broken, d, t.TempDir()); err == nil {
				t.Errorf("%s %s was taken", victim, what)
			}
		}
		missing := store{}
		for k, v := range s {
			if k != victim {
				missing[k] = v
			}
		}
		if _, err := Pull(t.Context(), missing, d, t.TempDir()); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s missing: %v", victim, err)
		}
	}
}

// TestWrongDiff has a layer that matches its descriptor but not the
// configuration.
func TestWrongDiff(t *testing.T) {
	s := store{}
	good := s.image(t, archive(t, passwd))
	var m map[string]any
	json.Unmarshal(s[good], &m)
	other := zip(archive(t, passwd, tar.Header{Name: "evil", Uname: "x"}))
	m["layers"] = []any{map[string]any{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": s.put(other), "size": len(other)}}
	if _, err := Pull(t.Context(), s, s.put(encode(m)), t.TempDir()); err == nil || !strings.Contains(err.Error(), "configuration says") {
		t.Errorf("got %v", err)
	}
}

func TestCancel(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s := store{}
	if _, err := Pull(ctx, s, s.image(t, archive(t, passwd)), t.TempDir()); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestResolveUser(t *testing.T) {
	for user, want := range map[string]string{
		"": "0:0 []", "app": "1000:1001 [44]", "1000": "1000:1001 [44]", "55": "55:0 []", "app:log": "1000:44 []",
		"55:66": "55:66 []", "nobody": "error", "app:none": "error", "4294967295": "error",
	} {
		c := Config{User: user}
		got := "error"
		if err := c.resolve(passwd.Uname, group.Uname); err == nil {
			got = fmt.Sprintf("%d:%d %v", c.UID, c.GID, c.Groups)
		}
		if got != want {
			t.Errorf("%q: got %s, want %s", user, got, want)
		}
	}
}

func FuzzManifest(f *testing.F) {
	s := store{}
	f.Add(s[s.image(f, archive(f, passwd))])
	for _, b := range s {
		if b[0] == '{' {
			f.Add(b)
		}
	}
	f.Add([]byte(`{"schemaVersion":2,"layers":[{"size":-1}]}`))
	f.Add([]byte(`{"schemaVersion":2} {}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		m, err := parseManifest(raw, standard)
		if err == nil {
			for _, b := range append(m.layers, m.config) {
				if _, err := parseDigest(b.digest); err != nil || b.size < 0 || b.size > standard.blob {
					t.Errorf("took %+v", b)
				}
			}
			if len(m.layers) == 0 || len(m.layers) > standard.layers {
				t.Errorf("took %d layers", len(m.layers))
			}
		}
		if c, diffs, err := parseConfig(raw, 1); err == nil && (len(diffs) != 1 || !filepath.IsAbs(c.WorkingDir)) {
			t.Errorf("took %+v, %q", c, diffs)
		}
	})
}

// FuzzLayer merges arbitrary tars and reads the image back with another
// implementation.
func FuzzLayer(f *testing.F) {
	f.Add(archive(f, passwd), archive(f, tar.Header{Name: "etc/.wh.passwd"}))
	f.Add(archive(f, tar.Header{Name: "a/b", Uname: "x"}, tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: "a/b"}),
		archive(f, tar.Header{Name: "a/.wh..wh..opq"}, tar.Header{Name: "a/c", Uname: strings.Repeat("y", 5000)}))
	f.Add(archive(f, tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "/d"}, tar.Header{Name: "d", Typeflag: tar.TypeDir}),
		archive(f, tar.Header{Name: "l/x", PAXRecords: map[string]string{"SCHILY.xattr.user.a": "b"}}))
	lim := limits{unpacked: 4 << 20, entries: 2000, text: 1 << 20, path: 4095, xattrs: 1 << 16}
	f.Fuzz(func(t *testing.T, one, two []byte) {
		var spool bytes.Buffer
		m := newMerger(&spool, lim)
		for _, raw := range [][]byte{one, two} {
			m.layer++
			if err := m.read(tar.NewReader(bytes.NewReader(raw))); err != nil {
				return
			}
		}
		p, err := layOut(m.tree.root.file, [16]byte{})
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		if err := p.write(&out, bytes.NewReader(spool.Bytes())); err != nil {
			t.Fatal(err)
		}
		if int64(out.Len()) != p.blocks*blockSize {
			t.Fatalf("image has %d bytes, %d were laid out", out.Len(), p.blocks*blockSize)
		}
		readBack(t, out.Bytes(), m.tree)
	})
}

// readBack walks an image with go-erofs and compares names and contents.
func readBack(t *testing.T, raw []byte, want *tree) {
	img, err := erofs.Open(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	var walk func(name string, f *file)
	walk = func(name string, f *file) {
		if !f.isDir() {
			return
		}
		d, err := img.Open(name)
		if err != nil {
			t.Fatalf("open %q: %v", name, err)
		}
		defer d.Close()
		names, err := d.(interface {
			ReadDir(int) ([]os.DirEntry, error)
		}).ReadDir(-1)
		if err != nil || len(names) != len(f.entries) {
			t.Fatalf("%q: read %d names, want %d: %v", name, len(names), len(f.entries), err)
		}
		for _, n := range names {
			e, ok := f.entries[n.Name()]
			if !ok {
				t.Fatalf("%q: unexpected %q", name, n.Name())
			}
			if len(name) < 200 {
				walk(strings.TrimPrefix(name+"/"+n.Name(), "./"), e.file)
			}
		}
	}
	walk(".", want.root.file)
}
