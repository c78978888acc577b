package node

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	wire "hauberk.dev/api/node"
	"hauberk.dev/guard"
	"hauberk.dev/image"
	"hauberk.dev/internal/kernel"
	"hauberk.dev/internal/netns"
	"hauberk.dev/vm"
	"hauberk.dev/vm/pool"
)

// needGuests opens guests of a node that has joined nothing.
func needGuests(t *testing.T) *guests {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("machines need root")
	}
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skipf("not installed: %v", err)
	}
	if _, err := kernel.Find("/", kernel.Flavour); errors.Is(err, kernel.ErrMissing) {
		t.Skip(err)
	}
	dir, err := os.MkdirTemp("", "node") // short, for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	agent := filepath.Join(dir, "hauberk-guest")
	build := exec.Command("go", "build", "-o", agent, "hauberk.dev/cmd/hauberk-guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v: %s", err, out)
	}
	n := &Node{
		conf: Config{State: dir + "/s", Run: dir + "/r", GuestAgent: agent, Spares: 1}, slog: slog.New(slog.NewTextHandler(io.Discard, nil)),
		news: make(chan struct{}, 1), actors: map[string]*actor{},
	}
	if err := os.Mkdir(n.conf.Run, 0o711); err != nil {
		t.Fatal(err)
	}
	g, err := openGuests(t.Context(), n)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	return g
}

// TestSpare keeps a machine ahead, which is nobody's and holds nothing; gives it
// to an instance, whose it is then as a clone would be; and sweeps one that a
// node left when it died.
func TestSpare(t *testing.T) {
	g := needGuests(t)
	spec := g.guest.Template(int(standard.MemoryMiB), int(standard.CPUs), "test")
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	stop, stopped := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- g.spares.Run(stop) }()
	g.spares.Want(spec)
	for g.spares.Ready(spec) == 0 {
		if ctx.Err() != nil {
			t.Fatal("no spare machine was made")
		}
		time.Sleep(20 * time.Millisecond)
	}
	if s := g.spare(); s.Machines != 1 || s.MiB < 1 {
		t.Errorf("it tells of %+v", s)
	}
	m := g.spares.Take(spec)
	if m == nil {
		t.Fatal("the spare machine is gone")
	}
	o := vm.OrphanIn(m.Dir())
	if o.Err != nil || !o.Alive || o.Adoptable() || !o.Journal.Scratch || o.Journal.UID < firstSpareUser || o.Journal.UID >= firstSpareUser+spareUsers {
		t.Errorf("while it waits: %+v", o)
	}
	if _, err := g.adopt(ctx, filepath.Base(m.Dir())); !errors.Is(err, vm.ErrUnfinished) {
		t.Errorf("it was adopted: %v", err)
	}
	given(t, ctx, g, m)

	stopped()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	left, err := g.makeSpare(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := left.Release(); err != nil { // as the end of the node does
		t.Fatal(err)
	}
	if err := g.sweep(nil); err != nil {
		t.Fatal(err)
	}
	if found, err := vm.Orphans(g.machines); err != nil || len(found) > 0 {
		t.Errorf("left: %+v, %v", found, err)
	}
	// Our child, though it was let go of, is not left to be reaped.
	for err == nil && ctx.Err() == nil {
		_, err = os.Stat("/proc/" + strconv.Itoa(left.PID()))
		time.Sleep(5 * time.Millisecond)
	}
	if !errors.Is(err, os.ErrNotExist) {
		t.Errorf("process %d is there still: %v", left.PID(), err)
	}
}

// given makes a spare machine that of an instance, and runs a program in it.
func given(t *testing.T, ctx context.Context, g *guests, m *vm.Machine) {
	t.Helper()
	archive, err := pool.Archive()
	if err != nil {
		t.Fatal(err)
	}
	img, err := image.Pack(ctx, bytes.NewReader(archive), g.images)
	if err != nil {
		t.Fatal(err)
	}
	address := netip.MustParseAddr("10.88.3.4")
	i := wire.Instance{ID: "web-1", Namespace: "test", Workload: "web", Address: address.String()}
	i.Guard.Generation, i.Spec.Sandbox, i.Spec.Command = wire.FirstGeneration, standard, []string{"/rehearse"}
	s := g.newBody(i.ID).(*sandbox)
	defer func() {
		if err := s.Stop(context.WithoutCancel(ctx), 0); err != nil {
			t.Error(err)
		}
		if names, err := netns.List(g.namespaces); err != nil || len(names) > 0 {
			t.Errorf("namespaces left: %v, %v", names, err)
		}
	}()
	if err := s.openConsole(); err != nil {
		t.Fatal(err)
	}
	if err := s.network(address, m); err != nil {
		t.Fatal(err)
	}
	if err := s.boot(ctx, i, img, address, m); err != nil {
		t.Fatal(err)
	}
	if o := vm.OrphanIn(filepath.Join(g.machines, i.ID)); !o.Adoptable() || o.Journal.Template == "" || m.ID() != i.ID {
		t.Errorf("when it is given: %+v", o)
	}
	raw, err := s.channel.GuardStatus(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := guard.DecodeStatus(raw); err != nil || st.Programs == 0 || st.Generation != wire.FirstGeneration-1 || st.Sequence != 0 {
		t.Errorf("before its first policy the Guard says %+v, %v", st, err)
	}
	if err := s.Enforce(ctx, wire.Guard{Generation: wire.FirstGeneration}); err != nil {
		t.Fatal(err)
	}
	links, err := s.channel.Interfaces(ctx)
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, l := range links {
		found = found || bytes.Equal(l.MAC[:], guestMAC(address))
	}
	if !found {
		t.Errorf("it has interfaces %+v, none with %v", links, guestMAC(address))
	}
	if dropped, err := s.ns.Dropped(); err != nil || len(dropped.Bypass) > 0 || dropped.Spoofed > 0 || dropped.Rest > 0 {
		t.Errorf("it sent what was dropped: %+v, %v", dropped, err)
	}
	if err := s.spawn(ctx, i, img); err != nil {
		t.Fatal(err)
	}
	select {
	case code := <-s.Exited():
		if code != 0 {
			t.Errorf("its program ended with %d", code)
		}
	case <-ctx.Done():
		t.Error("its program does not end")
	}
}
