package node

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	api "hauberk.dev/api/mesh"
	wire "hauberk.dev/api/node"
	"hauberk.dev/internal/netns"
	"hauberk.dev/mesh"
	"hauberk.dev/mesh/link"
	"hauberk.dev/plan"
)

// fencedWorld is a sandbox's namespace with its rules, one that plays its guest,
// and a real proxy that has its sockets.
type fencedWorld struct {
	*testing.T
	n         *Node
	box       *meshSandbox
	ns, guest *netns.Namespace
	door      netip.AddrPort // leads to port 8080 of the guest
}

func newFencedWorld(t *testing.T) *fencedWorld {
	if os.Geteuid() != 0 {
		t.Skip("making network namespaces needs root")
	}
	dir := t.TempDir()
	w := &fencedWorld{T: t, n: &Node{slog: slog.New(slog.DiscardHandler)}}
	for name, to := range map[string]**netns.Namespace{"box": &w.ns, "guest": &w.guest} {
		var err error
		if *to, err = netns.Create(dir, name); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { (*to).Delete() })
	}
	address := netip.MustParseAddr("10.88.0.5")
	if err := w.ns.Veth(fencedGuest(address), w.guest); err != nil {
		t.Fatal(err)
	}
	w.n.mesh = newMeshPart(w.n)
	w.connect(plan.Sandbox{Instance: "api-1", Address: address, Identity: "spiffe://test.local/ns/bank/sa/api", Service: "api", Namespace: "bank"})
	return w
}

// connect starts a proxy and gives it the sandbox.
func (w *fencedWorld) connect(s plan.Sandbox) {
	w.Helper()
	path := filepath.Join(w.TempDir(), "m")
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		w.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- mesh.New(mesh.Options{}).Run(ctx, ln) }()
	w.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			w.Error(err)
		}
	})
	l, err := link.Dial(ctx, path, link.Handlers{Sockets: w.n.mesh.sockets, Event: func(api.Event) {},
		Sign: func(context.Context, string, []byte) ([][]byte, []byte, error) {
			return nil, nil, errors.New("nobody signs here")
		}})
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() { l.Close() })
	w.n.mesh.link = l
	if err := w.n.mesh.add(ctx, s, w.ns); err != nil {
		w.Fatal(err)
	}
	w.box = w.n.mesh.sandboxes[s.Instance]
	door, at := tcpFile(w.T)
	w.door = at
	if err := errors.Join(l.SetPublish(ctx, []link.Published{{PublishedPort: api.PublishedPort{Namespace: "bank", Service: "api", Port: 8080}, Listener: door}}),
		l.SetPlan(ctx, plan.Mesh{Generation: 1, TrustDomain: "test.local", Sandboxes: []plan.Sandbox{s},
			Services: []plan.Service{{Name: "api", Namespace: "bank", Address: netip.MustParseAddr("10.99.0.1"), Identity: s.Identity,
				Ports: []plan.Port{{Port: 8080, Protocol: "http"}}, Allow: []plan.Rule{{Name: "open", From: []string{"anonymous"}}}}}})); err != nil {
		w.Fatal(err)
	}
}

func (w *fencedWorld) listen(ns *netns.Namespace, at string) (ln net.Listener) {
	w.Helper()
	if err := ns.Do(func() (err error) { ln, err = net.Listen("tcp4", at); return err }); err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() { ln.Close() })
	return ln
}

func (w *fencedWorld) dial(ns *netns.Namespace, to string) (c net.Conn, err error) {
	err = errors.Join(ns.Do(func() (err error) {
		// A literal address and no fallback: one socket, made on this thread.
		c, err = (&net.Dialer{Timeout: time.Minute, FallbackDelay: -1}).Dial("tcp4", to)
		return err
	}))
	if err == nil {
		w.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(2 * time.Minute))
	}
	return c, err
}

// lookUntil looks until so many reports have come.
func (w *fencedWorld) lookUntil(r *rounds, reports int) (all []wire.Report) {
	w.Helper()
	for end := time.Now().Add(2 * time.Minute); len(all) < reports && time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		all = append(all, w.round(r)...)
	}
	return all
}

// round looks at everything once.
func (w *fencedWorld) round(r *rounds) (all []wire.Report) {
	r.round(w.Context(), w.n.mesh.fenced(), w.n.mesh.link, func(_ string, r wire.Report) { all = append(all, r) })
	return all
}

// asksName asks the proxy's name server over a connection that stays.
func asksName(c net.Conn) error {
	query := []byte("\x00\x00\x00\x07\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03api\x04bank\x03svc\x07cluster\x05local\x00\x00\x01\x00\x01")
	binary.BigEndian.PutUint16(query, uint16(len(query)-2))
	if _, err := c.Write(query); err != nil {
		return err
	}
	var size [2]byte
	if _, err := io.ReadFull(c, size[:]); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, binary.BigEndian.Uint16(size[:])))
	return err
}

// ordinary opens what the proxy carries: a request to the guest that is being
// answered, and one of the guest's connections to its name server. The function
// returned tells whether both go on.
func (w *fencedWorld) ordinary() (goesOn func()) {
	w.Helper()
	release := make(chan struct{})
	serve := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		io.WriteString(rw, "one ")
		http.NewResponseController(rw).Flush()
		<-release
		io.WriteString(rw, "two")
	})}
	ln := w.listen(w.guest, "10.88.0.5:8080")
	go serve.Serve(ln)
	w.Cleanup(func() { serve.Close() })
	resp, err := http.Get(fmt.Sprintf("http://%s/", w.door))
	if err != nil {
		w.Fatal(err)
	}
	names, err := w.dial(w.guest, netns.Gateway.String()+":53")
	if err == nil {
		err = asksName(names)
	}
	if err != nil {
		w.Fatal(err)
	}
	return func() {
		w.Helper()
		// On a slow machine it may have been idle for too long: that ends otherwise.
		if err := asksName(names); errors.Is(err, unix.ECONNRESET) {
			w.Errorf("the connection to the name server: %v", err)
		}
		close(release)
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || string(body) != "one two" {
			w.Errorf("the request under way: %q, %v", body, err)
		}
	}
}

// dialMapped dials IPv4 by a socket of IPv6.
func (w *fencedWorld) dialMapped(ns *netns.Namespace, to string) (c net.Conn) {
	w.Helper()
	at := netip.MustParseAddrPort(to)
	err := ns.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		f := os.NewFile(uintptr(fd), "socket")
		defer f.Close()
		if err := unix.Connect(fd, &unix.SockaddrInet6{Port: int(at.Port()), Addr: at.Addr().As16()}); err != nil {
			return err
		}
		c, err = net.FileConn(f)
		return err
	})
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() { c.Close() })
	return c
}

// TestConnectionsAroundTheProxy opens, beside ordinary connections, three that the
// proxy does not carry: one of the guest's whose diversion was removed, and two
// to the guest out of its namespace, by a socket of either family. All are found
// and cut; the others go on.
func TestConnectionsAroundTheProxy(t *testing.T) {
	w := newFencedWorld(t)
	r := &rounds{n: w.n}
	goesOn := w.ordinary()
	if reports := w.round(r); len(reports) > 0 {
		t.Fatalf("of ordinary connections: %+v", reports)
	}

	err := w.ns.Do(func() error {
		out, err := exec.Command("sh", "-c", "nft flush chain ip hauberk prerouting && ip addr add 192.0.2.1/32 dev lo").CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	rogue := w.listen(w.ns, "192.0.2.1:80")
	out, err := w.dial(w.guest, "192.0.2.1:80")
	if err != nil {
		t.Fatal(err)
	}
	took, err := rogue.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer took.Close()
	in, err := w.dial(w.ns, "10.88.0.5:8080")
	if err != nil {
		t.Fatal(err)
	}

	mapped := w.dialMapped(w.ns, "10.88.0.5:8080")

	reports := w.lookUntil(r, 4)
	reports = append(reports, w.round(r)...) // nothing twice
	if len(reports) != 4 || reports[0].Rule != "network fence" || critical(reports[0]) || !strings.Contains(reports[0].Detail, "rule of ip hauberk prerouting is gone") {
		t.Fatalf("reported %+v", reports)
	}
	for _, want := range []string{out.LocalAddr().String() + " to 192.0.2.1:80", "10.88.0.5:8080 to " + in.LocalAddr().String(),
		"10.88.0.5:8080 to " + mapped.LocalAddr().String()} {
		if !slices.ContainsFunc(reports[1:], func(r wire.Report) bool {
			return r.Cause == "bypass" && critical(r) && strings.Contains(r.Detail, want) && strings.Contains(r.Detail, "it was cut")
		}) {
			t.Errorf("nothing about %s: %+v", want, reports)
		}
	}
	for name, c := range map[string]net.Conn{"accepted": took, "dialled": in, "dialled by IPv6": mapped} {
		c.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, io.EOF) {
			t.Errorf("what was %s lives: %v", name, err)
		}
	}
	// What dials that address now reaches the proxy, which refuses it.
	if c, err := w.dial(w.guest, "192.0.2.1:80"); err == nil {
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the proxy let it through: %v", err)
		}
	}
	goesOn()
	var metrics strings.Builder
	w.n.views.WriteTo(&metrics)
	for _, line := range []string{"hauberk_bypass_connections_total 3\n", "hauberk_fence_changes_total 1\n"} {
		if !strings.Contains(metrics.String(), line) {
			t.Errorf("no %s in %s", line, &metrics)
		}
	}
}

// deaf is a proxy that knows nothing, or does not answer.
type deaf struct{ err error }

func (d deaf) Carried(_ context.Context, _ string, all []api.Connection) ([]api.Connection, error) {
	return all, d.err
}

func (deaf) Process() int { return 1 }

// TestCompareWaits shows that a connection is not taken for one around the proxy
// before it has been strange for long enough and often enough, nor while the
// proxy does not answer.
func TestCompareWaits(t *testing.T) {
	w := newFencedWorld(t)
	w.listen(w.guest, "10.88.0.5:8080")
	if _, err := w.dial(w.ns, "10.88.0.5:8080"); err != nil {
		t.Fatal(err)
	}
	v, at := newViews(w.box.watch), time.Now()
	for i, step := range []struct {
		proxy deaf
		after time.Duration
		found int
	}{
		{deaf{}, 0, 0}, {deaf{}, time.Hour, 0}, {deaf{errors.New("busy")}, 2 * time.Hour, 0}, {deaf{}, 2 * time.Hour, 1}, {deaf{}, 3 * time.Hour, 0},
	} {
		around, err := v.compare(t.Context(), step.proxy, "api-1", at.Add(step.after))
		if len(around) != step.found || (err != nil) != (step.proxy.err != nil) {
			t.Errorf("step %d: %v, %v", i, around, err)
		}
	}
	v = newViews(w.box.watch)
	for i := range 2 * strangeTimes {
		if around, err := v.compare(t.Context(), deaf{}, "api-1", at.Add(strangeTime-time.Duration(2*strangeTimes-i))); err != nil || len(around) > 0 {
			t.Errorf("too soon: %v, %v", around, err)
		}
	}
}

// answering is a proxy that knows every connection, or none.
type answering struct {
	process int
	knows   bool
}

func (a answering) Carried(_ context.Context, _ string, all []api.Connection) ([]api.Connection, error) {
	if a.knows {
		return nil, nil
	}
	return all, nil
}

func (a answering) Process() int { return a.process }

// TestCompareAfterHandOver has a proxy keep a connection from the one that took
// its place: what was known of the one is asked of the other, which is given the
// time in which the first one ends.
func TestCompareAfterHandOver(t *testing.T) {
	all := []netns.Connection{{Cookie: 1, Local: netip.MustParseAddrPort("192.0.2.1:1"), Remote: netip.MustParseAddrPort("10.88.0.5:8080")}}
	for _, kept := range []bool{true, false} {
		v, at, found := newViews(nil), time.Now(), 0
		for i := range time.Duration(12) {
			proxy := answering{1, i == 0}
			if i > 1 { // at 6 s
				proxy = answering{2, !kept && i > 4}
			}
			around, err := v.among(t.Context(), all, proxy, "api-1", at.Add(i*strangeTime))
			if found += len(around); err != nil || i*strangeTime < 2*strangeTime+leaveTime+strangeTime && found > 0 {
				t.Errorf("round %d: %v, %v", i, around, err)
			}
		}
		if want := map[bool]int{true: 1}[kept]; found != want {
			t.Errorf("found %d times, want %d", found, want)
		}
	}
}

// TestTapTaken has a tap moved into another namespace, or renamed, while its
// machine runs: the sandbox is contained. That of a machine which has ended is not
// missed.
func TestTapTaken(t *testing.T) {
	for name, step := range map[string]struct {
		command string
		died    bool
	}{
		"moved":   {"ip link set tap0 netns %s", false},
		"renamed": {"ip link set tap0 down && ip link set tap0 name tap9 && ip link set tap9 up # %s", false},
		"ended":   {"ip link del tap0 # %s", true},
	} {
		t.Run(name, func(t *testing.T) {
			w := newFencedWorld(t)
			body := &fakeBody{died: make(chan struct{})}
			w.n.actors = map[string]*actor{"api-1": newActor(w.n, entry{Instance: wire.Instance{ID: "api-1"}}, body)}
			elsewhere, err := netns.Create(t.TempDir(), "elsewhere")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { elsewhere.Delete() })
			r := &rounds{n: w.n}
			if reports := w.round(r); len(reports) > 0 {
				t.Fatalf("of an ordinary one: %+v", reports)
			}
			err = w.ns.Do(func() error {
				out, err := exec.Command("sh", "-c", fmt.Sprintf(step.command, elsewhere.Path())).CombinedOutput()
				if err != nil {
					return fmt.Errorf("%w: %s", err, out)
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			if step.died {
				close(body.died)
			}
			v := r.views["api-1"]
			v.tapless = suspect{since: time.Now().Add(-strangeTime), times: strangeTimes - 1} // as after so long
			reports := append(w.round(r), w.round(r)...)
			if step.died {
				if len(reports) > 0 {
					t.Errorf("of a machine that has ended: %+v", reports)
				}
				return
			}
			if len(reports) != 1 || !critical(reports[0]) || reports[0].Cause != "bypass" || !strings.Contains(reports[0].Detail, "tap is not in its namespace") {
				t.Errorf("reported %+v", reports)
			}
		})
	}
}

// TestCompareInParts has a proxy answer of some connections and not of others:
// what it has answered counts, and no connection is told of twice.
func TestCompareInParts(t *testing.T) {
	var all []netns.Connection
	for i := range uint16(api.MaxConnections + 1) {
		all = append(all, netns.Connection{Cookie: 1 + uint64(i), Local: netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), 1+i),
			Remote: netip.MustParseAddrPort("10.88.0.5:8080")})
	}
	for _, busy := range []int{0, strangeTimes - 1} { // from which round on
		v, at, found := newViews(nil), time.Now(), map[uint64]int{}
		for i := range 3 * strangeTimes {
			var proxy carrier = deaf{}
			if i >= busy {
				proxy = &half{}
			}
			around, err := v.among(t.Context(), all, proxy, "api-1", at.Add(time.Duration(i)*strangeTime))
			// The one it gave no answer for is the only one asked for after that.
			if fails := i >= busy && i < strangeTimes; fails != (err != nil) {
				t.Errorf("busy from %d, round %d: %v", busy, i, err)
			}
			for _, c := range around {
				found[c.Cookie]++
			}
			if i == strangeTimes-1 && len(found) != api.MaxConnections {
				t.Errorf("busy from %d: %d found around the proxy, it has answered of %d", busy, len(found), api.MaxConnections)
			}
		}
		for _, c := range all {
			if n := found[c.Cookie]; n != 1 {
				t.Fatalf("busy from %d: %s was found %d times", busy, c, n)
			}
		}
	}
}

// half is a proxy that knows nothing and answers once.
type half struct{ asked bool }

func (h *half) Carried(_ context.Context, _ string, all []api.Connection) ([]api.Connection, error) {
	if h.asked {
		return nil, errors.New("busy")
	}
	h.asked = true
	return all, nil
}

func (*half) Process() int { return 1 }

// stopped is a proxy that never answers.
type stopped struct {
	asked func(ctx context.Context, instance string)
}

func (s stopped) Carried(ctx context.Context, instance string, _ []api.Connection) ([]api.Connection, error) {
	s.asked(ctx, instance)
	<-ctx.Done()
	return nil, ctx.Err()
}

func (stopped) Process() int { return 1 }

// TestFenceDoesNotWait has two sandboxes and a proxy that does not answer: their
// fences are put right before it is asked at all, a round waits for one answer
// and not for long, and each sandbox has its turn.
func TestFenceDoesNotWait(t *testing.T) {
	w := newFencedWorld(t)
	w.listen(w.guest, "10.88.0.5:8080")
	w.around(w.ns, "10.88.0.5:8080")
	w.around(w.second(), "10.88.0.6:8080")
	for _, s := range w.n.mesh.fenced() {
		err := s.ns.Do(func() error {
			out, err := exec.Command("nft", "flush", "chain", "ip", "hauberk", "prerouting").CombinedOutput()
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	var repaired, asked []string
	proxy := stopped{func(ctx context.Context, instance string) {
		if end, ok := ctx.Deadline(); !ok || time.Until(end) > viewsEvery {
			t.Errorf("a round may wait until %v", end)
		}
		if asked = append(asked, instance); len(repaired) != 2 {
			t.Errorf("asked of %s when %q were repaired", instance, repaired)
		}
	}}
	r := &rounds{n: w.n}
	for range 3 {
		r.round(t.Context(), w.n.mesh.fenced(), proxy, func(id string, report wire.Report) { repaired = append(repaired, id) })
	}
	if want := []string{"api-1", "api-2", "api-1"}; !slices.Equal(asked, want) || len(repaired) != 2 {
		t.Errorf("asked of %q, want %q; repaired %q", asked, want, repaired)
	}
}

// second adds another sandbox, in which nothing is connected.
func (w *fencedWorld) second() (ns *netns.Namespace) {
	w.Helper()
	dir, address := w.TempDir(), netip.MustParseAddr("10.88.0.6")
	var made [2]*netns.Namespace
	for i, name := range []string{"box", "guest"} {
		ns, err := netns.Create(dir, name)
		if err != nil {
			w.Fatal(err)
		}
		w.Cleanup(func() { ns.Delete() })
		made[i] = ns
	}
	err := made[0].Veth(fencedGuest(address), made[1])
	if err == nil {
		err = w.n.mesh.add(w.Context(), plan.Sandbox{Instance: "api-2", Address: address, Identity: "spiffe://test.local/ns/bank/sa/api", Service: "api", Namespace: "bank"}, made[0])
	}
	if err != nil {
		w.Fatal(err)
	}
	w.listen(made[1], "10.88.0.6:8080")
	return made[0]
}

// around opens a connection around the proxy.
func (w *fencedWorld) around(ns *netns.Namespace, to string) {
	w.Helper()
	if _, err := w.dial(ns, to); err != nil {
		w.Fatal(err)
	}
}

// older plays a proxy that does not know the question: it ends the link.
func older(t *testing.T, process int) (dial func() *link.Link, asked *atomic.Int32) {
	path := filepath.Join(t.TempDir(), "m")
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	asked = new(atomic.Int32)
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := ln.AcceptUnix()
			if err != nil {
				return
			}
			serving.Go(func() {
				link.NewSession(api.NewConn(c, 1<<20), func(_ context.Context, m *api.Message, _ []*os.File) (*api.Message, []*os.File, error) {
					if m.Kind == api.KindCarried {
						asked.Add(1)
						c.Close()
					}
					return &api.Message{Hello: &api.Hello{Version: api.Version, Process: process}}, nil, nil
				}, 0).Run(t.Context())
			})
		}
	})
	t.Cleanup(func() { ln.Close(); serving.Wait() })
	return func() *link.Link {
		l, err := link.Dial(t.Context(), path, link.Handlers{Event: func(api.Event) {},
			Sockets: func(string, int) ([]*os.File, error) { return nil, errors.New("none") },
			Sign: func(context.Context, string, []byte) ([][]byte, []byte, error) {
				return nil, nil, errors.New("nobody signs here")
			}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return l
	}, asked
}

// TestOlderProxy shows that a proxy which ends its link when it is asked of
// connections is left alone after two times, so that it can carry them, and that
// the next one is asked. That other sandboxes have no connections is no answer.
func TestOlderProxy(t *testing.T) {
	w := newFencedWorld(t)
	w.second()
	w.listen(w.guest, "10.88.0.5:8080")
	w.around(w.ns, "10.88.0.5:8080")
	var log strings.Builder
	w.n.slog = slog.New(slog.NewTextHandler(&log, nil))
	r := &rounds{n: w.n}
	for process := 7; process < 9; process++ {
		dial, asked := older(t, process)
		for range 5 {
			l := dial()
			r.round(t.Context(), w.n.mesh.fenced(), l, func(_ string, found wire.Report) { t.Errorf("reported %+v", found) })
			l.Close()
		}
		if n := asked.Load(); n != unheardTimes {
			t.Errorf("process %d was asked %d times", process, n)
		}
	}
	if n := strings.Count(log.String(), "level=ERROR"); n != 2 {
		t.Errorf("%d errors in the log, want one for each process:\n%s", n, &log)
	}
}

// TestUnheardInARow shows that an answer between two failures lets a proxy be
// asked on.
func TestUnheardInARow(t *testing.T) {
	r := &rounds{n: &Node{slog: slog.New(slog.DiscardHandler)}}
	for i, step := range []struct {
		err  error
		want int
	}{{link.ErrClosed, 1}, {nil, 0}, {link.ErrClosed, 1}, {context.DeadlineExceeded, 1}, {&link.RefusedError{Reason: "unknown kind"}, 2}} {
		if r.heard(7, step.err); r.unheard != step.want {
			t.Errorf("step %d: %d, want %d", i, r.unheard, step.want)
		}
	}
}

// TestDropsAreCountedOnce has the rules made anew while their counters are read:
// what was dropped since is reported once.
func TestDropsAreCountedOnce(t *testing.T) {
	for name, during := range map[string]uint64{"begun before, done meanwhile": 1, "begun and done meanwhile": 2, "begun before, not done": 0} {
		made, reports := 2-during%2, []wire.Report(nil)
		if during == 0 {
			made = 1
		}
		dropped := func() (netns.Drops, error) {
			made += during
			return netns.Drops{Spoofed: 5}, nil
		}
		now, r := since(reading{drops: netns.Drops{Spoofed: 3}}, func() uint64 { return made }, dropped)
		reports = append(reports, r...)
		if during = 0; made%2 != 0 {
			made++
		}
		for range 2 {
			now, r = since(now, func() uint64 { return made }, dropped)
			reports = append(reports, r...)
		}
		if len(reports) != 1 || !strings.HasPrefix(reports[0].Detail, "5 frames") {
			t.Errorf("%s: reported %+v", name, reports)
		}
	}
}
