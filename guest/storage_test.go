package guest_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/md5"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"hauberk.dev/api/guestproto"
)

// must ends the test at the first error.
func (g *guest) must(errs ...error) {
	g.Helper()
	if err := errors.Join(errs...); err != nil {
		g.Fatal(err)
	}
}

func pod(source, target string) guestproto.Mount {
	return guestproto.Mount{Kind: guestproto.MountPod, Source: source, Target: target}
}

// testDirectories shares directories of the pod among containers.
func testDirectories(t *testing.T, g *guest) {
	ctx := g.ctx()
	g.must(g.c.MakeDir(ctx, guestproto.Dir{Name: "empty", Bytes: 1 << 20, Mode: 0o2775, UID: 5, GID: 6}),
		g.c.MakeDir(ctx, guestproto.Dir{Name: "free", Mode: 0o1777}),
		g.c.MakeDir(ctx, guestproto.Dir{Name: "disk", Serial: "w1", FS: "ext4"}))
	for name, m := range map[string]guestproto.Dir{
		"twice": {Name: "empty"}, "no such disk": {Name: "x", Serial: "none", FS: "ext4"}, "no such file system": {Name: "x", Serial: "w0", FS: "proc"},
	} {
		if err := g.c.MakeDir(ctx, m); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	all := mounts(pod("empty", "/empty"), pod("disk", "/disk"), pod("empty/sub/path", "/sub"),
		guestproto.Mount{Kind: guestproto.MountPod, Source: "empty", Target: "/read", Flags: syscall.MS_RDONLY})
	one := g.start(guestproto.Create{Mounts: all, Program: sleeps("1000")})
	two := g.start(guestproto.Create{Mounts: all, Program: sleeps("1000")})
	a, b := &guest{t, g.c, one, g.m}, &guest{t, g.c, two, g.m}
	a.wants("stat -c '%a %u:%g' /empty", "2775 5:6")
	a.run("sh", "-c", "echo hello > /empty/file; echo kept > /disk/file; echo low > /sub/file; ln -s /etc /empty/out; sync")
	b.wants("cat /empty/file /disk/file /read/file /empty/sub/path/file", "hello", "kept", "low")
	b.wants("touch /read/x 2>&1", "touch: /read/x: Read-only file system")
	a.wants("dd if=/dev/zero of=/empty/big bs=4k count=300 2>&1 | grep -o 'No space.*'; rm /empty/big", "No space left on device")
	a.wants("for i in $(seq 1 300); do touch /empty/sub/$i 2>&1; done | tail -n1 | grep -o 'No space.*'; rm -r /empty/sub/[0-9]*", "No space left on device")
	// What the pod puts there leads nowhere.
	_, err := g.c.Create(ctx, guestproto.Create{Root: 3, Mounts: mounts(pod("empty/out", "/etc2")), Program: shell("true")})
	if !errors.Is(err, syscall.ELOOP) {
		t.Errorf("a link of the pod's as a source: %v", err)
	}
	s, err := g.c.Stats(ctx)
	g.must(err)
	seen := map[string]guestproto.DirStats{}
	for _, d := range s.Dirs {
		seen[d.Name] = d
	}
	if d := seen["empty"]; len(seen) != 3 || d.Bytes != 1<<20 || d.Used == 0 || d.Files == 0 || seen["disk"].Bytes < 16<<20 {
		t.Errorf("statistics of directories: %+v", s.Dirs)
	}
	// Containers keep what they have; a disk is busy as long.
	g.must(g.c.RemoveDir(ctx, "empty"))
	a.wants("cat /empty/file", "hello")
	if err := g.c.RemoveDir(ctx, "disk"); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("a disk that containers use: %v", err)
	}
	g.stop(one)
	g.stop(two)
	g.must(g.c.RemoveDir(ctx, "disk"), g.c.RemoveDir(ctx, "free"))
	if err := g.c.RemoveDir(ctx, "free"); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("removed twice: %v", err)
	}
	// What the disk held stays.
	out, _ := g.containerOutput(guestproto.Create{Program: shell("cat /disk/file"), Mounts: mounts(
		guestproto.Mount{Kind: guestproto.MountDisk, Source: "w1", FS: "ext4", Target: "/disk"})})
	g.has("disk", out, "kept")
	// Every name at once, and one more.
	for i := range guestproto.MaxDirs + 1 {
		err = g.c.MakeDir(ctx, guestproto.Dir{Name: fmt.Sprint("d", i), Bytes: 4096})
		if (err == nil) != (i < guestproto.MaxDirs) {
			t.Errorf("directory %d: %v", i, err)
		}
	}
	if !errors.Is(err, syscall.EAGAIN) {
		t.Errorf("one directory too many: %v", err)
	}
	for i := range guestproto.MaxDirs {
		g.must(g.c.RemoveDir(ctx, fmt.Sprint("d", i)))
	}
}

// testPushes replaces files under a container's eyes.
func testPushes(t *testing.T, g *guest) {
	ctx := g.ctx()
	file := func(path, data string) guestproto.PushFile {
		return guestproto.PushFile{Path: path, Mode: 0o640, UID: 3, GID: 4, Data: []byte(data)}
	}
	g.must(g.c.MakeDir(ctx, guestproto.Dir{Name: "live", Bytes: 4 << 20, Mode: 0o755}), g.c.MakeDir(ctx, guestproto.Dir{Name: "flat", Bytes: 1 << 20, Mode: 0o755}),
		g.c.Push(ctx, "live", "..1", []guestproto.PushFile{file("a", "a1"), file("b", "b1"), file("dir/c", "c1")}),
		g.c.Push(ctx, "flat", "", []guestproto.PushFile{file("hosts", "old\n"), file("deep/er", "x")}))
	p := g.start(guestproto.Create{Program: sleeps("1000"), Mounts: mounts(pod("live", "/live"), pod("flat/hosts", "/etc/hosts"), pod("flat", "/flat"))})
	in := &guest{t, g.c, p, g.m}
	in.wants("cd /live; cat a b dir/c; echo; readlink ..data; readlink a; readlink dir; stat -L -c '%a %u:%g' a; ls -a | wc -l",
		"a1b1c1", "..1", "..data/a", "..data/dir", "640 3:4", "7") // . .. ..1 ..data a b dir
	// A reader that never sees half of it: both files are of one push.
	watch, err := g.c.Exec(ctx, p, shell("cd /live; for i in $(seq 1 60); do d=$(readlink ..data); x=$(cat ..data/a)$(cat $d/b 2>/dev/null); case $x in a?b?|a?) ;; *) echo torn $x;; esac; cat a > /dev/null || echo gone; done; echo done"))
	g.must(err)
	for i := 2; i <= 9; i++ {
		n := fmt.Sprint(i)
		g.must(g.c.Push(ctx, "live", ".."+n, []guestproto.PushFile{file("a", "a"+n), file("b", "b"+n), file("new"+n, "")}))
	}
	out, err := io.ReadAll(watch.Stdout())
	if err != nil || string(out) != "done\n" {
		t.Errorf("the reader says %q, %v", out, err)
	}
	watch.Discard()
	in.wants("cd /live; cat a b; echo; echo $(ls -a)", "a9b9", ". .. ..9 ..data a b new9")
	// In place: the file that is mounted by itself changes.
	inode, _, _ := in.run("stat", "-c", "%i", "/etc/hosts")
	g.must(g.c.Push(ctx, "flat", "", []guestproto.PushFile{file("hosts", "new and longer\n")}))
	in.wants("cat /etc/hosts; cat /flat/deep/er", "new and longer", "x")
	if now, _, _ := in.run("stat", "-c", "%i", "/etc/hosts"); now != inode || inode == "" {
		t.Errorf("inode %q became %q", inode, now)
	}
	// More than a frame holds, in one file and in many.
	big := bytes.Repeat([]byte("0123456789abcdef"), 60<<10)
	files := []guestproto.PushFile{{Path: "big", Mode: 0o600, Data: big}}
	for i := range 400 {
		files = append(files, file(fmt.Sprintf("many/%03d", i), strings.Repeat("x", 1000)))
	}
	g.must(g.c.Push(ctx, "live", "..big", files))
	in.wants("cd /live; wc -c < big; md5sum < big; ls many | wc -l; cat many/* | wc -c; ls -a | wc -l",
		"983040", fmt.Sprintf("%x -", md5.Sum(big)), "400", "400000", "6") // . .. ..big ..data big many

	// What a container puts in the way is no way out, and no way in.
	in.run("sh", "-c", "cd /flat; rm hosts; ln -s /etc/passwd hosts; mkfifo pipe; ln -s /etc link; cd /live; rm a; ln -s ../../etc/passwd big2; mkdir ..junk")
	for _, path := range []string{"hosts", "pipe", "link/x"} {
		if err := g.c.Push(ctx, "flat", "", []guestproto.PushFile{file(path, "x")}); err == nil {
			t.Errorf("%s: no error", path)
		}
	}
	g.must(g.c.Push(ctx, "live", "..last", []guestproto.PushFile{file("a", "again"), file("big2", "mine")}))
	in.wants("cd /live; cat a; echo; cat big2; echo; echo $(ls -a)", "again", "mine", ". .. ..data ..last a big2")
	// Too much is refused, and what was there stays.
	if err := g.c.Push(ctx, "live", "..toomuch", []guestproto.PushFile{{Path: "a", Mode: 0o600, Data: make([]byte, 5<<20)}}); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("more than the directory holds: %v", err)
	}
	in.wants("cat /live/a", "again")
	g.must(g.c.Push(ctx, "live", "..end", []guestproto.PushFile{file("a", "fits")}))
	in.wants("cat /live/a; echo; echo $(ls -a /live)", "fits", ". .. ..data ..end a")
	if err := g.c.Push(ctx, "none", "", nil); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("unknown directory: %v", err)
	}
	g.stop(p)
	g.must(g.c.RemoveDir(ctx, "live"), g.c.RemoveDir(ctx, "flat"))
}

// testShare mounts what the host serves, with a server that stands still
// meanwhile: nobody else may wait for it.
func testShare(t *testing.T, g *guest) {
	ctx := g.ctx()
	share := filepath.Join(g.m.dir, "share")
	g.must(os.MkdirAll(share+"/vol/deep", 0o755), os.WriteFile(share+"/vol/file", []byte("from the host\n"), 0o644),
		os.WriteFile(share+"/secret", []byte("another's\n"), 0o644), os.Symlink("../secret", share+"/vol/out"), os.Symlink("/", share+"/root"))
	from := func(source, target string, flags uint32) guestproto.Mount {
		return guestproto.Mount{Kind: guestproto.MountShare, Source: source, Target: target, Recursive: flags}
	}
	g.must(g.c.MountShare(ctx, "share"))
	reader := g.start(guestproto.Create{Mounts: mounts(from("share", "/s", 0)), Program: shell("while read line; do cat /s/$line; done")})
	g.must(g.m.files.Process.Signal(syscall.SIGSTOP))
	_, err := reader.WriteContext(ctx, []byte("vol/file\n"))
	g.must(err)
	created, frozen := make(chan error, 1), make(chan error, 1)
	go func() { // a setup stage that waits for the server
		p, err := g.c.Create(ctx, guestproto.Create{Root: 3, Mounts: mounts(from("share/vol/deep", "/s", 0)), Program: shell("true")})
		if err == nil {
			err = errors.Join(p.Signal(ctx, syscall.SIGKILL), func() error { _, err := p.Wait(ctx); return err }(), p.Forget(ctx))
		}
		created <- err
	}()
	for i := 0; ; i++ { // until it waits for the server, too
		list, err := reader.Top(ctx)
		g.must(err)
		if len(list) == 2 && list[1].Name == "cat" && i > 10 {
			break
		}
		if i == 200 {
			t.Fatalf("the reader does not read: %+v", list)
		}
		time.Sleep(20 * time.Millisecond)
	}
	go func() { frozen <- reader.Freeze(ctx) }() // an errand that does so
	worst := time.Duration(0)
	for begun := time.Now(); time.Since(begun) < time.Second; {
		begun := time.Now()
		g.must(g.c.Ping(ctx))
		p, err := g.c.Exec(ctx, g.root, sleeps("1000"))
		g.must(err, p.Signal(ctx, syscall.SIGKILL))
		_, err = p.Wait(ctx)
		g.must(err)
		worst = max(worst, time.Since(begun))
	}
	if len(created)+len(frozen) > 0 {
		t.Errorf("while the server of a share stands still, a container on it stands (%d) or is frozen (%d)", len(created), len(frozen))
	}
	t.Logf("exec, signal and exit beside verbs that hang: at worst %v", worst)
	g.must(g.m.files.Process.Signal(syscall.SIGCONT), <-created, <-frozen, reader.Thaw(ctx))
	line := make([]byte, len("from the host\n"))
	if _, err := io.ReadFull(reader.Stdout(), line); err != nil || string(line) != "from the host\n" {
		t.Errorf("the reader says %q, %v", line, err)
	}
	g.stop(reader)
	if err := g.c.MountShare(ctx, "share"); !errors.Is(err, syscall.EEXIST) {
		t.Errorf("mounted twice: %v", err)
	}
	if err := g.c.MountShare(ctx, "none"); !errors.Is(err, syscall.EINVAL) && !errors.Is(err, syscall.ENODEV) {
		t.Errorf("unknown tag: %v", err)
	}
	for _, source := range []string{"share/vol/out", "share/root", "share/root/etc", "share/vol/../secret"} {
		if p, err := g.c.Create(ctx, guestproto.Create{Root: 3, Program: shell("true"), Mounts: mounts(from(source, "/a", 0))}); err == nil {
			t.Errorf("%s: no error", source)
			g.stop(p)
		}
	}
	out, _ := g.containerOutput(guestproto.Create{
		Mounts:  mounts(from("share/vol", "/vol", 0), from("share/vol/file", "/etc/hosts", syscall.MS_RDONLY), from("share/vol", "/read", syscall.MS_RDONLY)),
		Program: shell("exec 2>&1; cat /vol/file /etc/hosts; echo back > /vol/deep/back; touch /read/x; echo x > /etc/hosts; cat /vol/out"),
	})
	g.has("share", out, "from the host", "touch: /read/x: Read-only file system", "sh: can't create /etc/hosts: Read-only file system",
		"cat: can't open '/vol/out': No such file or directory")
	if b, err := os.ReadFile(share + "/vol/deep/back"); err != nil || string(b) != "back\n" {
		t.Errorf("the host reads %q, %v", b, err)
	}
}

// testDisks writes to a root whose upper layer is a disk, to its limit, and
// unmounts and mounts roots.
func testDisks(t *testing.T, g *guest) {
	ctx := g.ctx()
	before, err := g.c.Stats(ctx)
	g.must(err)
	upper := guestproto.MountRoot{Root: 1, Serial: "root1", UpperSerial: "w0", UpperFS: "ext4"}
	for round := range 4 {
		if _, err := g.c.MountRoot(ctx, upper); err != nil {
			t.Fatal(err)
		}
		p, err := g.c.Create(ctx, guestproto.Create{Root: 1, Program: shell(
			"cat /kept; echo kept > /kept; dd if=/dev/zero of=/big bs=64k count=1000 2>&1 | grep -o 'No space.*'; rm /big; sleep 1000")})
		g.must(err, p.Start(ctx))
		b := make([]byte, 64)
		said := ""
		for !strings.Contains(said, "No space") {
			n, err := p.Stdout().Read(b)
			g.must(err)
			said += string(b[:n])
		}
		if strings.Contains(said, "kept") != (round > 0) {
			t.Errorf("round %d: the disk has %q", round, said)
		}
		if err := g.c.UnmountRoot(ctx, 1); !errors.Is(err, syscall.EBUSY) {
			t.Errorf("a root with a container on it: %v", err)
		}
		g.stop(p)
		g.must(g.c.UnmountRoot(ctx, 1))
	}
	if _, err := g.c.Create(ctx, guestproto.Create{Root: 1, Program: shell("true")}); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("a container on a root that is gone: %v", err)
	}
	if err := g.c.UnmountRoot(ctx, 1); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("unmounted twice: %v", err)
	}
	if err := g.c.UnmountRoot(ctx, 3); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("a root in use: %v", err)
	}
	upper.UpperFS = "sysfs"
	if _, err := g.c.MountRoot(ctx, upper); !errors.Is(err, syscall.ENODEV) {
		t.Errorf("an upper layer of the kernel's own: %v", err)
	}
	after, err := g.c.Stats(ctx)
	g.must(err)
	if before.AgentMounts != after.AgentMounts || before.AgentFiles != after.AgentFiles {
		t.Errorf("%d mounts and %d descriptors became %d and %d", before.AgentMounts, before.AgentFiles, after.AgentMounts, after.AgentFiles)
	}
}

// testCopies moves files in and out of a container, and tries to leave it.
func testCopies(t *testing.T, g *guest) {
	ctx := g.ctx()
	p := g.start(guestproto.Create{Program: sleeps("1000")})
	defer g.stop(p)
	in := &guest{t, g.c, p, g.m}
	in.run("sh", "-c", "ln -s /home /link; ln -s /etc/passwd /home/evil; mkdir /home/dir; ln -s /etc /home/dir/up; mkfifo /home/pipe")
	changed := time.Unix(1700000000, 123456789)
	big := bytes.Repeat([]byte("hauberk!"), 512<<10)
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(h tar.Header, data []byte) {
		h.Size, h.Format, h.ModTime = int64(len(data)), tar.FormatPAX, changed
		g.must(w.WriteHeader(&h))
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	add(tar.Header{Typeflag: tar.TypeDir, Name: "t/", Mode: 0o1750, Uid: 11, Gid: 12}, nil)
	add(tar.Header{Typeflag: tar.TypeReg, Name: "t/big", Mode: 0o4755, Uid: 1, Gid: 2}, big)
	add(tar.Header{Typeflag: tar.TypeReg, Name: "t/empty"}, nil)
	add(tar.Header{Typeflag: tar.TypeSymlink, Name: "t/sym", Linkname: "/nowhere/../x", Mode: 0o777, Uid: 5}, nil)
	add(tar.Header{Typeflag: tar.TypeLink, Name: "t/hard", Linkname: "t/big", Mode: 0o4755, Uid: 1, Gid: 2}, nil)
	add(tar.Header{Typeflag: tar.TypeReg, Name: "evil", Mode: 0o600}, []byte("mine")) // in place of the link
	add(tar.Header{Typeflag: tar.TypeReg, Name: "t/sub/made/name ü", Mode: 0o644}, []byte("x"))
	g.must(w.Close())
	g.must(p.CopyIn(ctx, "/link", &b)) // the path itself is followed, inside
	in.wants("cd /home; stat -c '%n %F %a %u:%g' t t/big t/sym; md5sum < t/big; stat -c %h t/hard; cat evil; echo; head -n1 /etc/passwd; stat -c %Y t/big; readlink t/sym",
		"t directory 1750 11:12", "t/big regular file 4755 1:2", "t/sym symbolic link 777 5:0", fmt.Sprintf("%x -", md5.Sum(big)), "2",
		"mine", "root:x:0:0:root:/root:/bin/sh", "1700000000", "/nowhere/../x")

	var out bytes.Buffer
	g.must(p.CopyOut(ctx, "/link/t", &out))
	var names []string
	for r := tar.NewReader(&out); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		g.must(err)
		names = append(names, fmt.Sprintf("%s %c %o %d:%d %d %s", h.Name, h.Typeflag, h.Mode, h.Uid, h.Gid, h.Size, h.Linkname))
		if h.Name == "t/big" {
			data, err := io.ReadAll(r)
			if err != nil || !bytes.Equal(data, big) || !h.ModTime.Equal(changed) {
				t.Errorf("%s came back with %d bytes of %v, %v", h.Name, len(data), h.ModTime, err)
			}
		}
	}
	g.has("copy out", strings.Join(names, "\n"), "t/ 5 1750 11:12 0", "t/big 0 4755 1:2 4194304", "t/empty 0 0 0:0 0", "t/sym 2 777 5:0 0 /nowhere/../x",
		"t/hard 0 4755 1:2 4194304", "t/sub/made/name ü 0 644 0:0 1")

	// The whole root, where /proc and /sys have no end.
	g.must(p.CopyOut(ctx, "/", io.Discard))
	tarOf := func(h tar.Header) io.Reader {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		h.Mode = 0o644
		_ = w.WriteHeader(&h)
		_ = w.Close()
		return &b
	}
	for name, err := range map[string]error{
		"link on the way":  p.CopyIn(ctx, "/home", tarOf(tar.Header{Typeflag: tar.TypeReg, Name: "dir/up/owned"})),
		"climbs":           p.CopyIn(ctx, "/home", tarOf(tar.Header{Typeflag: tar.TypeReg, Name: "../owned"})),
		"absolute":         p.CopyIn(ctx, "/home", tarOf(tar.Header{Typeflag: tar.TypeReg, Name: "/owned"})),
		"hard link out":    p.CopyIn(ctx, "/home", tarOf(tar.Header{Typeflag: tar.TypeLink, Name: "a", Linkname: "dir/up/passwd"})),
		"hard link climbs": p.CopyIn(ctx, "/home", tarOf(tar.Header{Typeflag: tar.TypeLink, Name: "a", Linkname: "../etc/passwd"})),
		"device":           p.CopyIn(ctx, "/home", tarOf(tar.Header{Typeflag: tar.TypeChar, Name: "a"})),
		"by /proc":         p.CopyIn(ctx, "/proc/1/root/home", tarOf(tar.Header{Typeflag: tar.TypeReg, Name: "a"})),
		"into a file":      p.CopyIn(ctx, "/etc/passwd", tarOf(tar.Header{Typeflag: tar.TypeReg, Name: "a"})),
		"out of nowhere":   p.CopyOut(ctx, "/none", io.Discard),
		"relative":         p.CopyOut(ctx, "etc", io.Discard),
		"cut":              p.CopyIn(ctx, "/home", strings.NewReader(strings.Repeat("x", 700))),
		"broken writer":    p.CopyOut(ctx, "/home", brokenWriter{}),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		} else {
			t.Logf("%s: %v", name, err)
		}
	}
	in.wants("ls /etc/owned /owned 2>&1 | grep -c 'No such'", "2")
	// One that is given up leaves nothing behind.
	cancelled, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancel()
	r, still := io.Pipe()
	defer still.Close()
	go func() {
		<-cancelled.Done()
		still.CloseWithError(cancelled.Err())
	}()
	if err := p.CopyIn(cancelled, "/home", r); err == nil {
		t.Error("a copy that was given up went well")
	}
	for i := 0; ; i++ {
		list, err := g.c.Processes(ctx)
		g.must(err)
		left := 0
		for _, q := range list {
			if q.Container == p.ID() && q.Process != p.ID() {
				left++
			}
		}
		if left == 0 {
			break
		}
		if i == 100 {
			t.Fatalf("%d processes are left of copies: %+v", left, list)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, errors.New("disk full") }

// testControl changes a container's limits, freezes it and looks at it.
func testControl(t *testing.T, g *guest) {
	ctx := g.ctx()
	p := g.start(guestproto.Create{
		Resources: guestproto.Resources{MemoryMax: 64 << 20, PidsMax: 50, CPUQuota: 20000, CPUPeriod: 100000},
		Program:   shell("while :; do i=$((i+1)); done & echo ready; dd if=/dev/zero of=/dev/shm/x bs=1M count=8 2>/dev/null; cat /bin/busybox > /dev/null; while :; do echo tick; sleep 0.02; done"),
	})
	defer g.stop(p)
	in := &guest{t, g.c, p, g.m}
	b := make([]byte, 6)
	if _, err := io.ReadFull(p.Stdout(), b); err != nil {
		t.Fatal(err)
	}
	s := in.stats()
	for i := 0; i < 100 && (s.Shmem < 8<<20 || s.Throttled == 0); i++ {
		time.Sleep(50 * time.Millisecond)
		s = in.stats()
	}
	if s.Memory < 8<<20 || s.MemoryPeak != 0 && s.MemoryPeak < s.Memory || s.Shmem < 8<<20 || s.Anonymous == 0 || s.File == 0 || s.Kernel == 0 || s.Faults == 0 ||
		s.CPU == 0 || s.CPUUser == 0 || s.CPUSystem == 0 || s.CPU < s.CPUUser || s.Periods == 0 || s.Throttled == 0 || s.ThrottledTime == 0 || s.Pids < 2 || s.UpperFiles == 0 {
		t.Errorf("statistics %+v", s)
	}
	g.must(p.Update(ctx, guestproto.Resources{MemoryMax: 32 << 20, PidsMax: 10, CPUQuota: guestproto.Unlimited, CPUWeight: 50}))
	in.wants("cd /sys/fs/cgroup; cat memory.max pids.max cpu.max cpu.weight", "33554432", "10", "max 100000", "50")
	g.must(p.Update(ctx, guestproto.Resources{MemoryMax: guestproto.Unlimited, PidsMax: guestproto.UnlimitedPids, CPUPeriod: 50000}))
	in.wants("cd /sys/fs/cgroup; cat memory.max pids.max cpu.max cpu.weight", "max", "max", "max 50000", "50")
	if err := p.Update(ctx, guestproto.Resources{CPUs: "7"}); err == nil {
		in.wants("cat /sys/fs/cgroup/cpuset.cpus", "7") // the kernel takes it, and uses those that are there
	}
	list, err := p.Top(ctx)
	g.must(err)
	if len(list) < 2 || list[0].Name != "sh" || list[0].Resident == 0 || list[0].PID == 0 {
		t.Errorf("top: %+v", list)
	}
	// Frozen it uses no time, and can be killed all the same.
	g.must(p.Freeze(ctx))
	used := in.stats().CPU
	time.Sleep(300 * time.Millisecond)
	if now := in.stats().CPU; now != used {
		t.Errorf("a frozen container used %d µs", now-used)
	}
	g.must(p.Freeze(ctx), p.Thaw(ctx))
	time.Sleep(300 * time.Millisecond)
	if in.stats().CPU == used {
		t.Error("it stands still after its thaw")
	}
	g.must(p.Freeze(ctx))
	if err := g.root.Update(ctx, guestproto.Resources{Unified: []guestproto.Setting{{Name: "memory.max", Value: "x"}}}); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("update by nonsense: %v", err)
	}
	// A host that asks for statistics all the time delays no signal.
	flood, done := context.WithCancel(ctx)
	asked := make(chan int)
	go func() {
		n := 0
		for flood.Err() == nil {
			if _, err := g.c.Stats(ctx); err != nil {
				t.Error(err)
				break
			}
			n++
		}
		asked <- n
	}()
	worst := time.Duration(0)
	for range 10 {
		e, err := g.c.Exec(ctx, g.root, sleeps("1000"))
		g.must(err)
		begun := time.Now()
		g.must(e.Signal(ctx, syscall.SIGKILL))
		_, err = e.Wait(ctx)
		g.must(err)
		worst = max(worst, time.Since(begun))
	}
	done()
	t.Logf("signal to exit beside %d statistics: at worst %v", <-asked, worst)
	if worst > 5*time.Second {
		t.Errorf("a signal took %v", worst)
	}
}

// stats gives those of the guest's container.
func (g *guest) stats() guestproto.ContainerStats {
	g.Helper()
	s, err := g.c.Stats(g.ctx())
	g.must(err)
	for _, c := range s.Containers {
		if c.Process == g.root.ID() {
			return c
		}
	}
	g.Fatalf("no statistics of %d", g.root.ID())
	return guestproto.ContainerStats{}
}

// testCycles makes and removes containers again and again: nothing of them may
// be left.
func testCycles(t *testing.T, g *guest) {
	ctx := g.ctx()
	g.must(g.c.MakeDir(ctx, guestproto.Dir{Name: "dir", Bytes: 1 << 20}))
	cgroups := func() string {
		out, _, _ := g.run("sh", "-c", "grep ^memory /proc/cgroups | { read n h c e; echo $c; }")
		return strings.TrimSpace(out)
	}
	cycle := func(i int) {
		if i%10 == 0 {
			if _, err := g.c.MountRoot(ctx, guestproto.MountRoot{Root: 2, Serial: "root1", UpperBytes: 8 << 20}); err != nil {
				t.Fatal(err)
			}
		}
		mode := guestproto.PIDMode(i % 2)
		p, err := g.c.Create(ctx, guestproto.Create{Root: 2, PID: mode, KeepLog: i%3 == 0, Mounts: mounts(pod("dir", "/dir")), Program: shell("sleep 1000 & echo x > /file; exit 3")})
		g.must(err)
		if i%5 == 4 { // one that is never started
			g.must(p.Signal(ctx, syscall.SIGKILL))
		} else {
			g.must(p.Start(ctx))
		}
		p.Discard()
		status, err := p.Wait(ctx)
		g.must(err)
		if want := map[bool]int{false: 3, true: 137}[i%5 == 4]; status.Code != want {
			t.Fatalf("cycle %d: %+v", i, status)
		}
		g.must(p.Forget(ctx))
		if i%10 == 9 {
			g.must(g.c.UnmountRoot(ctx, 2))
		}
	}
	for i := range 10 {
		cycle(i)
	}
	time.Sleep(300 * time.Millisecond)
	before, err := g.c.Stats(ctx)
	g.must(err)
	groups := cgroups()
	for i := range 50 {
		cycle(i)
	}
	var after guestproto.Stats
	for i := 0; ; i++ { // the last cgroup may take a moment
		after, err = g.c.Stats(ctx)
		g.must(err)
		if now := cgroups(); now == groups {
			break
		} else if i == 50 {
			t.Fatalf("%s cgroups became %s", groups, now)
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Logf("agent before: %d kB, %d descriptors, %d mounts; after 50 cycles: %d kB, %d, %d; guest available %d and %d kB", before.AgentPrivate>>10, before.AgentFiles, before.AgentMounts,
		after.AgentPrivate>>10, after.AgentFiles, after.AgentMounts, before.MemoryAvailable>>10, after.MemoryAvailable>>10)
	if after.AgentFiles != before.AgentFiles || after.AgentMounts != before.AgentMounts || len(after.Containers) != len(before.Containers) {
		t.Errorf("before: %+v\nafter: %+v", before, after)
	}
	if grown := int64(after.AgentPrivate) - int64(before.AgentPrivate); grown > 128<<10 {
		t.Errorf("50 containers cost the agent %d bytes", grown)
	}
	if after.AgentPrivate > 2<<20 {
		t.Errorf("after some hundred containers the agent has %d kB of its own", after.AgentPrivate>>10)
	}
	g.must(g.c.RemoveDir(ctx, "dir"))
}
