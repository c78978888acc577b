package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/guard/divert"
	"hauberk.dev/internal/netns"
	"hauberk.dev/mesh"
	"hauberk.dev/mesh/link"
	"hauberk.dev/plan"
	"hauberk.dev/test/cgroup"
)

// hostRole makes TestHostProcesses play a part of itself in a cgroup of its own.
const hostRole = "HAUBERK_HOST_ROLE"

// playHost serves a proxy at a socket, or dials addresses and says what came of it.
func playHost(role, with string) {
	if role == "proxy" {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
		defer stop()
		ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: with, Net: "unixpacket"})
		if err == nil {
			fmt.Println("listening")
			err = mesh.New(mesh.Options{}).Run(ctx, ln)
		}
		if err != nil {
			fmt.Println(err)
		}
		return
	}
	for _, to := range strings.Fields(with) {
		if kind, to, ok := strings.Cut(to, "/"); ok {
			fmt.Printf("%s %s: %v\n", kind, to, sendTo(kind, to))
			continue
		}
		c, err := net.DialTimeout("tcp4", to, time.Minute)
		if err != nil {
			fmt.Printf("%s %v\n", to, err)
			continue
		}
		c.SetDeadline(time.Now().Add(time.Minute))
		answer, err := io.ReadAll(c)
		fmt.Printf("%s peer %s answered %q %v\n", to, c.RemoteAddr(), answer, err)
		c.Close()
	}
}

// sendTo sends one packet without connecting first, by "datagram" or "raw".
func sendTo(kind, to string) error {
	at, err := netip.ParseAddrPort(to)
	if err != nil {
		return err
	}
	network, dst := "udp4", net.Addr(net.UDPAddrFromAddrPort(at))
	if kind == "raw" {
		network, dst = "ip4:253", &net.IPAddr{IP: at.Addr().AsSlice()}
	}
	c, err := net.ListenPacket(network, "")
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.WriteTo([]byte("x"), dst)
	return err
}

// moveInto moves this program into a cgroup while the test lasts, as what it opens
// belongs there.
func moveInto(t *testing.T, path string) {
	t.Helper()
	was, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	home := filepath.Dir(path)
	for line := range strings.Lines(string(was)) {
		if in, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			home = filepath.Join(home, in)
		}
	}
	move := func(to string) {
		if err := os.WriteFile(filepath.Join(to, "cgroup.procs"), []byte("0"), 0); err != nil {
			t.Errorf("move to %s: %v", to, err)
		}
	}
	move(path)
	t.Cleanup(func() { move(home) })
}

// inCgroup is this program, playing a part in a cgroup.
func inCgroup(t *testing.T, path, role, with string) *exec.Cmd {
	t.Helper()
	return cgroup.Command(t, path, hostRole+"="+role+" "+with, "-test.run", "^TestHostProcesses$")
}

// TestHostProcesses has processes without a machine of their own call out of
// their cgroup: as a guest's, what they dial reaches the proxy, which lets
// through what the plan allows, under the address they wanted and no other.
func TestHostProcesses(t *testing.T) {
	if role, with, ok := strings.Cut(os.Getenv(hostRole), " "); ok {
		playHost(role, with)
		os.Exit(0)
	}
	if os.Geteuid() != 0 {
		t.Skip("making network namespaces and cgroups needs root")
	}
	dir := t.TempDir()
	host, outside := hostNamespaces(t, dir)
	ln := listenIn(t, outside, "192.0.2.7:443")
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			fmt.Fprintf(c, "hello %s", c.RemoteAddr().(*net.TCPAddr).IP)
			c.Close()
		}
	}()

	app, own := cgroup.New(t, "app"), cgroup.New(t, "node")
	moveInto(t, own)
	events := make(chan api.Event, 64)
	l := hostProxy(t, host, inCgroup(t, own, "proxy", filepath.Join(dir, "m")), filepath.Join(dir, "m"), events)
	listener, source := netip.MustParseAddrPort("127.77.0.5:15001"), netip.MustParseAddr("127.88.0.5")
	s := plan.Sandbox{Instance: "batch-1", Address: source, Identity: "spiffe://test.local/ns/bank/sa/batch", Service: "batch", Namespace: "bank",
		Egress: []plan.Egress{{Prefix: netip.MustParsePrefix("192.0.2.0/24"), Ports: []uint16{443}}}}
	files := hostSockets(t, host, listener)
	if err := errors.Join(l.AddSandbox(t.Context(), s, files[0], files[1], files[2]),
		l.SetPlan(t.Context(), plan.Mesh{Generation: 1, TrustDomain: "test.local", Sandboxes: []plan.Sandbox{s}})); err != nil {
		t.Fatal(err)
	}
	run := func(with string) string {
		t.Helper()
		cmd := inCgroup(t, app, "dial", with)
		var said []byte
		if err := host.Do(func() (err error) { said, err = cmd.Output(); return err }); err != nil {
			t.Fatalf("%v: %s", err, said)
		}
		return string(said)
	}
	const packets = "datagram/192.0.2.7:53 raw/192.0.2.7:0"
	if said := run(packets); strings.Count(said, ": <nil>") != 2 {
		t.Errorf("before, it says\n%s", said)
	}
	d, err := divert.Attach(divert.Options{Cgroup: app, Opener: own, Listener: listener, Source: source})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()

	said := run("192.0.2.7:443 192.0.2.7:80 198.51.100.1:443 127.77.0.5:15001 " + packets)
	if want := `192.0.2.7:443 peer 192.0.2.7:443 answered "hello 192.0.2.1" <nil>`; !strings.Contains(said, want) || strings.Count(said, "hello") != 1 {
		t.Errorf("want %s in\n%s", want, said)
	}
	if strings.Count(said, "operation not permitted") != 2 {
		t.Errorf("packets left:\n%s", said)
	}
	around, err := d.Around()
	for _, want := range []divert.Attempt{{Protocol: 17, Destination: netip.MustParseAddrPort("192.0.2.7:53"), Count: 1},
		{Protocol: 253, Destination: netip.MustParseAddrPort("192.0.2.7:0"), Count: 1}} {
		if err != nil || !slices.Contains(around, want) {
			t.Errorf("nothing of %+v in %+v, %v", want, around, err)
		}
	}
	refused := map[string]bool{"192.0.2.7:80": false, "198.51.100.1:443": false, listener.String(): false}
	for range refused {
		select {
		case e := <-events:
			if _, ok := refused[e.Destination]; !ok || e.Kind != api.EventEgressRefused || e.Destination != listener.String() && !strings.HasPrefix(e.Source, source.String()+":") {
				t.Errorf("told %+v", e)
			}
			refused[e.Destination] = true
		case <-time.After(time.Minute):
			t.Fatalf("told only %v", refused)
		}
	}
}

// hostNamespaces are one that plays a node, or the pod of runc, and one outside.
func hostNamespaces(t *testing.T, dir string) (host, outside *netns.Namespace) {
	t.Helper()
	for name, to := range map[string]**netns.Namespace{"host": &host, "outside": &outside} {
		ns, err := netns.Create(dir, name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ns.Delete() })
		*to = ns
	}
	for _, c := range []struct {
		ns      *netns.Namespace
		command string
	}{
		{host, "ip link add out type veth peer name in netns " + outside.Path() + " && ip addr add 192.0.2.1/24 dev out && ip link set out up"},
		{outside, "ip addr add 192.0.2.7/24 dev in && ip link set in up"},
	} {
		err := c.ns.Do(func() error {
			out, err := exec.Command("sh", "-c", c.command).CombinedOutput()
			if err != nil {
				return fmt.Errorf("%s: %w: %s", c.command, err, out)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return host, outside
}

func listenIn(t *testing.T, ns *netns.Namespace, at string) (ln net.Listener) {
	t.Helper()
	if err := ns.Do(func() (err error) { ln, err = net.Listen("tcp4", at); return err }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

// hostSockets are what the node opens for the proxy, where the processes are.
func hostSockets(t *testing.T, ns *netns.Namespace, at netip.AddrPort) (files [3]*os.File) {
	t.Helper()
	names := netip.AddrPortFrom(at.Addr(), 53).String()
	var udp net.PacketConn
	if err := ns.Do(func() (err error) { udp, err = net.ListenPacket("udp4", names); return err }); err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	for i, s := range []interface{ File() (*os.File, error) }{listenIn(t, ns, at.String()).(*net.TCPListener), udp.(*net.UDPConn), listenIn(t, ns, names).(*net.TCPListener)} {
		f, err := s.File()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		files[i] = f
	}
	return files
}

// hostProxy starts a proxy in its cgroup and where the processes are.
func hostProxy(t *testing.T, ns *netns.Namespace, cmd *exec.Cmd, path string, events chan<- api.Event) *link.Link {
	t.Helper()
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = ns.Do(cmd.Start)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Signal(os.Interrupt); cmd.Wait() })
	if n, err := io.ReadFull(out, make([]byte, len("listening\n"))); err != nil {
		t.Fatalf("the proxy said %d bytes: %v", n, err)
	}
	l, err := link.Dial(t.Context(), path, link.Handlers{Event: func(e api.Event) {
		if e.Kind != api.EventNoIdentity { // it has none, as nobody signs
			events <- e
		}
	},
		Sign: func(context.Context, string, []byte) ([][]byte, []byte, error) {
			return nil, nil, errors.New("nobody signs here")
		},
		Sockets: func(string, int) ([]*os.File, error) { return nil, errors.New("nobody calls in here") },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}
