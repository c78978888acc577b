package unpack

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// layer is a tar, or what is wrong with making it.
type layer func(t *testing.T) []byte

// sample is an image both sides are given.
type sample struct {
	name   string
	layers []layer
	// implied says that directories are not mentioned: their times are the
	// unpacker's own affair.
	implied bool
	// plain is for entries umoci does not know: tar itself unpacks the one layer.
	plain bool
}

// item is an entry of a layer with its data.
type item struct {
	tar.Header
	body string
}

var when = time.Date(2020, 2, 3, 4, 5, 6, 0, time.UTC)

func file(name, body string) item {
	return item{tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, ModTime: when}, body}
}

func dir(name string) item {
	return item{tar.Header{Name: name + "/", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: when}, ""}
}

func link(name, to string) item {
	return item{tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: to, Mode: 0o777, ModTime: when}, ""}
}

func hard(name, to string) item {
	return item{tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: to, Mode: 0o644, ModTime: when}, ""}
}

func gone(name string) item {
	return file(filepath.Join(filepath.Dir(name), ".wh."+filepath.Base(name)), "")
}
func emptied(name string) item { return file(name+"/.wh..wh..opq", "") }

func (i item) with(change func(*tar.Header)) item { change(&i.Header); return i }

func owned(i item, uid, gid int) item {
	return i.with(func(h *tar.Header) { h.Uid, h.Gid = uid, gid })
}

func mode(i item, m int64) item { return i.with(func(h *tar.Header) { h.Mode = m }) }

func attributes(i item, pairs ...string) item {
	return i.with(func(h *tar.Header) {
		h.PAXRecords = map[string]string{}
		for k := 0; k < len(pairs); k += 2 {
			h.PAXRecords["SCHILY.xattr."+pairs[k]] = pairs[k+1]
		}
	})
}

func at(i item, m time.Time) item {
	return i.with(func(h *tar.Header) { h.ModTime, h.Format = m, tar.FormatPAX })
}

// of makes a layer of entries.
func of(items ...item) layer {
	return func(t *testing.T) []byte {
		t.Helper()
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, i := range items {
			i.Size = int64(len(i.body))
			if err := w.WriteHeader(&i.Header); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write([]byte(i.body)); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
}

// made makes a layer of what a script leaves in a directory, with GNU tar.
func made(script string, options ...string) layer {
	return func(t *testing.T) []byte {
		t.Helper()
		at := t.TempDir()
		c := exec.Command("sh", "-ec", script)
		c.Dir = at
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("make tree: %v: %s", err, out)
		}
		c = exec.Command("tar", append(append([]string{"--numeric-owner", "--mtime=@1600000000"}, options...), "-C", at, "-c", ".")...)
		out, err := c.Output()
		if err != nil {
			t.Fatalf("tar: %v", err)
		}
		return out
	}
}

func numbered(n int, make func(i int) item) (all []item) {
	for i := range n {
		all = append(all, make(i))
	}
	return all
}

func samples() []sample {
	long := strings.Repeat("n", 255)
	capability := "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	base := of(dir("."), dir("etc"), dir("usr"), dir("usr/lib"), dir("var"), dir("var/lib"), file("etc/passwd", "root:x:0:0::/:\n"),
		file("usr/lib/a", "a"), file("usr/lib/b", "b"), link("lib", "usr/lib"), link("abs", "/usr/lib"), file("var/lib/data", "data"))
	return []sample{
		{name: "plain", layers: []layer{base}},
		{name: "from GNU tar", layers: []layer{made(`mkdir -p bin lib; for s in 0 1 511 512 513 4095 4096 4097 70000; do head -c $s /dev/zero | tr '\0' $((s%10)) >lib/$s; done
			cp /bin/true bin/true; ln bin/true bin/yes; ln -s true bin/no`, "--format=gnu")}},
		{name: "old tar", layers: []layer{made(`mkdir -p a/b; echo x >a/b/c; ln -s c a/b/l; ln a/b/c a/hard`, "--format=v7")}},
		{name: "ustar prefixes", layers: []layer{made(`p=$(printf 'p%.0s' $(seq 90)); mkdir -p $p/$p; echo x >$p/$p/file`, "--format=ustar")}},
		{name: "hard links", layers: []layer{
			of(dir("a"), dir("b"), file("a/one", "shared"), hard("b/two", "a/one"), hard("a/three", "b/two"), link("a/soft", "one"), hard("b/soft", "a/soft")),
			of(hard("b/later", "a/one"), file("a/three", "alone now")),
		}, implied: true},
		{name: "hard link through a link", layers: []layer{base, of(file("lib/c", "c"), hard("lib/d", "lib/c"), hard("etc/e", "abs/a"))}, implied: true},
		{name: "attributes", layers: []layer{of(
			attributes(file("noted", "x"), "user.note", "hello", "user.binary", "\x01\x02\xff"),
			attributes(file("able", "x"), "security.capability", capability),
			attributes(dir("d"), "user.dir", strings.Repeat("v", 900)))}},
		{name: "sparse, GNU", layers: []layer{made(`truncate -s 1M s; printf x | dd of=s bs=1 seek=500000 conv=notrunc status=none; truncate -s 300000 all-hole`, "--sparse", "--format=gnu")}, plain: true},
		{name: "sparse, PAX 1.0", layers: []layer{made(`truncate -s 1M s; printf x | dd of=s bs=1 seek=700000 conv=notrunc status=none`, "--sparse", "--format=pax", "--sparse-version=1.0")}},
		{name: "sparse, PAX 0.1", layers: []layer{made(`truncate -s 1M s; printf x | dd of=s bs=1 seek=100000 conv=notrunc status=none`, "--sparse", "--format=pax", "--sparse-version=0.1")}},
		{name: "odd owners", layers: []layer{of(owned(file("high", "x"), 4294967290, 4294967290), owned(file("base256", "x"), 1<<21+5, 1<<30),
			owned(dir("d"), 65534, 7), owned(link("l", "high"), 12, 34), owned(mode(file("suid", "x"), 0o4755), 1000, 1001))}},
		{name: "modes", layers: []layer{of(mode(file("suid", "x"), 0o4755), mode(file("sgid", "x"), 0o2711), mode(dir("sticky"), 0o1777), mode(dir("sgiddir"), 0o2775),
			mode(file("none", "x"), 0), mode(dir("closed"), 0), file("closed/in", "x"), item{tar.Header{Name: "fifo", Typeflag: tar.TypeFifo, Mode: 0o600, ModTime: when}, ""})}},
		{name: "whiteouts", layers: []layer{base, of(gone("usr/lib/a"), gone("lib"), gone("var"), gone("never/was"), gone("etc/never"))}, implied: true},
		{name: "opaque directory", layers: []layer{base, of(dir("usr"), emptied("usr"), dir("usr/bin"), file("usr/bin/new", "n"))}, implied: true},
		{name: "opaque mark comes last", layers: []layer{base, of(dir("usr"), dir("usr/lib"), file("usr/lib/new", "n"), emptied("usr/lib"))}, implied: true},
		{name: "removed and made again", layers: []layer{base, of(gone("usr/lib/a"), gone("var")), of(file("usr/lib/a", "again"), dir("var"), file("var/x", "x"))}, implied: true},
		{name: "one kind replaces another", layers: []layer{
			of(dir("dir-file"), file("dir-file/in", "x"), file("file-dir", "x"), dir("dir-link"), file("dir-link/in", "x"), link("link-dir", "file-dir"), link("link-file", "file-dir"), file("file-link", "f"), file("file-fifo", "x")),
			of(file("dir-file", "now a file"), dir("file-dir"), file("file-dir/in", "x"), link("dir-link", "file-dir"), dir("link-dir"), file("link-dir/in", "y"), file("link-file", "not through"), link("file-link", "/nowhere"),
				item{tar.Header{Name: "file-fifo", Typeflag: tar.TypeFifo, Mode: 0o600, ModTime: when}, ""}),
		}, implied: true},
		{name: "through links of lower layers", layers: []layer{base, of(file("lib/c", "c"), file("abs/d", "d"), gone("lib/a"))}, implied: true},
		{name: "implied directories", layers: []layer{of(file("not/mentioned/anywhere", "x"))}, implied: true},
		{name: "spellings", layers: []layer{of(dir("./a"), file("./a//b", "x"), file("a/./c", "y"), dir("d//"), file("d///e", "z"))}, implied: true},
		{name: "the same name twice", layers: []layer{of(file("f", "first"), file("f", "second"), dir("d"), file("d/x", "kept"), mode(dir("d"), 0o700))}, implied: true},
		{name: "names", layers: []layer{of(file(long, "x"), file("-rf", "x"), file("new\nline", "x"), file("sp ace", "x"), file("ümläut", "x"), file("*", "x"), file("...", "x"), file(".wh", "x"), file("\\", "x"))}},
		{name: "long paths and targets", layers: []layer{of(append(numbered(12, func(i int) item { return dir(strings.Repeat("/"+strings.Repeat("d", 200), i+1)[1:]) }),
			file(strings.Repeat("/"+strings.Repeat("d", 200), 12)[1:]+"/end", "x"), link("far", strings.Repeat("t", 3000)))...)}},
		{name: "deep", layers: []layer{of(append(numbered(120, func(i int) item { return dir(strings.Repeat("/e", i+1)[1:]) }), file(strings.Repeat("/e", 120)[1:]+"/end", "x"))...)}},
		{name: "many files", layers: []layer{of(append([]item{dir("m")}, numbered(3000, func(i int) item { return file(fmt.Sprintf("m/a-name-of-some-length-%d", i), fmt.Sprint(i)) })...)...)}},
		{name: "many whiteouts", layers: []layer{
			of(append([]item{dir("m")}, numbered(2000, func(i int) item { return file(fmt.Sprintf("m/%d", i), "x") })...)...),
			of(numbered(10_000, func(i int) item { return gone(fmt.Sprintf("m/%d", i)) })...)}, implied: true},
		{name: "many layers", layers: func() (all []layer) {
			for i := range 60 {
				all = append(all, of(dir("."), file("same", fmt.Sprint(i)), file(fmt.Sprintf("own-%d", i), "x"), gone(fmt.Sprintf("own-%d", i-3))))
			}
			return all
		}(), implied: true},
		{name: "times", layers: []layer{of(at(file("nanoseconds", "x"), time.Unix(1e9, 123456789)), at(file("far", "x"), time.Unix(1<<33, 0)), at(file("epoch", "x"), time.Unix(0, 0)))}},
	}
}
