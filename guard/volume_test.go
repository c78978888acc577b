package guard

import (
	"context"
	"errors"
	"os"
	"strings"
	"syscall"
	"testing"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/api/spec"
	"hauberk.dev/vm"
)

// volumes: rules for files hold in what is mounted in a container: in a file
// system of the kernel, a directory of the pod and a disk; for a name that is not
// there yet; below a directory that a rule covers; and by any name of a mount.
func (s *sandbox) volumes(t *testing.T, ctx context.Context, generation uint64) {
	t.Helper()
	if err := s.c.MountShare(ctx, "share"); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(s.shared+"/data/dir/deep", 0o755); err != nil {
		t.Fatal(err)
	}
	open := compileForTest(t, generation, spec.GuardPolicy{Exec: &spec.GuardExec{Origin: "any"}})
	closed := compileForTest(t, generation+1, spec.GuardPolicy{Exec: &spec.GuardExec{Origin: "any"}, Files: []spec.GuardFile{
		{Path: "/vol/mem", Deny: "w"}, {Path: "/vol/pod/kept", Deny: "rw"}, {Path: "/vol/disk/dir/later", Deny: "w"},
		{Path: "/srv", Deny: "w"}, {Path: "/vol/link/aimed", Deny: "w"}, {Path: "/vol/share/dir/deep", Deny: "rw"}, {Path: "/vol/share/later", Deny: "w"},
	}})
	put := func(c Compiled) {
		t.Helper()
		if _, err := s.c.GuardPolicy(ctx, c.Generation, c.Blob); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.c.MakeDir(ctx, guestproto.Dir{Name: "held"}); err != nil {
		t.Fatal(err)
	}
	start := func() *vm.Process {
		t.Helper()
		p, err := s.c.Create(ctx, guestproto.Create{
			Mounts: []guestproto.Mount{
				{Target: "/proc", FS: "proc"}, {Target: "/vol/mem", FS: "tmpfs"}, {Kind: guestproto.MountPod, Target: "/vol/pod", Source: "held"},
				{Kind: guestproto.MountDisk, Target: "/vol/disk", Source: "w0", FS: "ext4"}, {Target: "/srv/below", FS: "tmpfs"},
				{Kind: guestproto.MountShare, Target: "/vol/share", Source: "share/data"},
				{Kind: guestproto.MountBind, Target: "/vol/again", Source: "/vol/pod"}, {Kind: guestproto.MountBind, Target: "/vol/link", Source: "/vol/mem"},
			},
			Program: guestproto.Program{Args: []string{"/attack", "serve"}},
		})
		if err == nil {
			err = p.Start(ctx)
		}
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	check := func(when string, in *vm.Process, code int, runs ...string) {
		t.Helper()
		for _, run := range runs {
			if got := s.run(t, ctx, in, run); got != code {
				t.Errorf("%s: %s: exit %d, want %d", when, run, got, code)
			}
		}
	}
	put(open)
	box := start()
	check("without rules", box, 0, "mkdir /vol/disk/dir", "write /vol/pod/kept", "write /vol/mem/here", "write /srv/below/here", "write /vol/pod/free", "write /vol/share/dir/deep/file")
	held := []string{
		"write /vol/mem/here", "write /vol/mem/new", "truncate /vol/mem/here", "unlink /vol/mem/here", "rename /vol/mem/here /vol/mem/there", "chmod /vol/mem/here", "mkdir /vol/mem/dir",
		"read /vol/pod/kept", "write /vol/again/kept", "unlink /vol/pod/kept", "link /vol/pod/kept /vol/pod/other", "overwith /vol/pod/mine /vol/pod/kept",
		"write /vol/disk/dir/later", "mkdir /vol/disk/dir/later", "symlink /vol/disk/dir/later", "rename /vol/disk/dir /vol/disk/moved", "overwith /vol/disk/mine /vol/disk/dir/later",
		"write /srv/below/here", "write /srv/below/new", "write /proc/self/root/srv/below/new", "write /vol/link/aimed",
		"write /vol/share/dir/deep/file", "read /vol/share/dir/deep/file", "unlink /vol/share/dir/deep/file", "rename /vol/share/dir /vol/share/moved", "overwith /vol/share/mine /vol/share/dir/deep/file",
		"write /vol/share/later", "mkdir /vol/share/later", "symlink /vol/share/later",
	}
	put(closed)
	check("rules that came later", box, 10, held...)
	check("beside the rules", box, 0, "write /vol/pod/free", "write /vol/disk/free", "write /vol/disk/dir/free", "write /tmp/free", "write /vol/share/dir/free")
	// The host replaces what a rule is about, then a directory on the way to it.
	for _, move := range [][2]string{{"dir/deep", "dir/old"}, {"dir", "old"}} {
		if err := errors.Join(os.Rename(s.shared+"/data/"+move[0], s.shared+"/data/"+move[1]), os.MkdirAll(s.shared+"/data/dir/deep", 0o755)); err != nil {
			t.Fatal(err)
		}
		s.settled(t, ctx, box, "write /vol/share/dir/deep/replaced")
	}
	end := func(p *vm.Process) {
		t.Helper()
		_ = p.Signal(ctx, syscall.SIGKILL)
		p.Discard()
		if _, err := p.Wait(ctx); err != nil {
			t.Fatal(err)
		}
		if err := p.Forget(ctx); err != nil {
			t.Fatal(err)
		}
	}
	end(box)
	// Another container's memory is new, and held as well.
	box = start()
	check("rules that were there", box, 10, "write /vol/mem/new", "read /vol/pod/kept", "write /vol/disk/dir/later", "write /srv/below/new", "overwith /vol/disk/mine /vol/disk/dir/later")
	check("beside the rules that were there", box, 0, "write /vol/disk/dir/free", "write /vol/pod/free")
	end(box)

	// What cannot be held in a container keeps it from being made.
	strict := compileForTest(t, generation+2, spec.GuardPolicy{Exec: &spec.GuardExec{Origin: "any"}, Files: []spec.GuardFile{{Path: "/vol/pod/free/below", Deny: "w"}}})
	put(strict)
	if p, err := s.c.Create(ctx, guestproto.Create{
		Mounts:  []guestproto.Mount{{Kind: guestproto.MountPod, Target: "/vol/pod", Source: "held"}},
		Program: guestproto.Program{Args: []string{"/attack", "serve"}},
	}); err == nil {
		t.Error("a container was made in which a rule cannot be held")
		end(p)
	} else if !strings.Contains(err.Error(), "hold rule") {
		t.Errorf("%v; want it to name the rule", err)
	}
	lax := compileForTest(t, generation+3, spec.GuardPolicy{OnFailure: "open", Exec: &spec.GuardExec{Origin: "any"}, Files: []spec.GuardFile{{Path: "/vol/pod/free/below", Deny: "w"}}})
	put(lax)
	box = start()
	if e := s.told(t, OpUnheld, Reported); e.Rule < firstRule || syscall.Errno(e.Detail) != syscall.ENOTDIR {
		t.Errorf("%s; want the rule that is not held", e)
	}
	end(box)
	put(compileForTest(t, generation+4, spec.GuardPolicy{Exec: &spec.GuardExec{Origin: "any"}}))
}

// settled asks for the Guard's state, as a heartbeat does, until an act is
// refused: the guest's cache may know a little longer what the host had.
func (s *sandbox) settled(t *testing.T, ctx context.Context, in *vm.Process, run string) {
	t.Helper()
	for {
		s.guardStatus(t, ctx)
		got := s.run(t, ctx, in, run)
		if got == 10 {
			return
		}
		if ctx.Err() != nil || t.Failed() {
			t.Fatalf("%s: exit %d, want 10", run, got)
		}
	}
}
