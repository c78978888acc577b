package divert

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"hauberk.dev/internal/netns"
	"hauberk.dev/test/cgroup"
)

// playSocket takes one socket through steps, as nobody, and says what came of each.
func playSocket(steps string) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	if err == nil {
		err = syscall.Setresuid(65534, 65534, 65534)
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	for _, step := range strings.Fields(steps) {
		verb, at, _ := strings.Cut(step, "@")
		fmt.Println(verb, socketStep(fd, verb, at))
	}
}

func socketStep(fd int, verb, at string) any {
	a, _ := netip.ParseAddrPort(at)
	to := &unix.SockaddrInet4{Port: int(a.Port())}
	if a.IsValid() {
		to.Addr = a.Addr().As4()
	}
	switch verb {
	case "bind":
		return unix.Bind(fd, to)
	case "connect":
		return unix.Connect(fd, to)
	case "port":
		own, err := unix.Getsockname(fd)
		if err != nil {
			return err
		}
		return own.(*unix.SockaddrInet4).Port
	case "write":
		_, err := unix.Write(fd, []byte("x"))
		return err
	case "abort":
		if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
			return err
		}
		return unix.Close(fd)
	case "read":
		answer, err := io.ReadAll(os.NewFile(uintptr(fd), "socket"))
		return fmt.Sprintf("%q %v", answer, err)
	}
	return "no such step"
}

// playServer tells who dials it and who sends it datagrams, at every address.
func playServer() {
	ln, err1 := net.Listen("tcp4", ":0")
	pc, err2 := net.ListenPacket("udp4", ":0")
	if err1 != nil || err2 != nil {
		fmt.Println(err1, err2)
		os.Exit(1)
	}
	fmt.Println(ln.Addr().(*net.TCPAddr).Port, pc.LocalAddr().(*net.UDPAddr).Port)
	go func() {
		io.Copy(io.Discard, os.Stdin) // ends with the test
		os.Exit(0)
	}()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			fmt.Println("tcp", c.RemoteAddr().(*net.TCPAddr).IP)
			c.Close()
		}
	}()
	for b := make([]byte, 16); ; {
		_, from, err := pc.ReadFrom(b)
		if err != nil {
			return
		}
		fmt.Println("udp", from.(*net.UDPAddr).IP)
	}
}

// pair is two instances with a listener each, and the cgroups of them and of a
// stranger.
type pair struct {
	a, b, out        string
	listenA, listenB netip.AddrPort
}

func newPair(t *testing.T, listener string) *pair {
	t.Helper()
	p := &pair{a: cgroup.New(t, "a"), b: cgroup.New(t, "b"), out: cgroup.New(t, "out")}
	mesh := cgroup.New(t, "mesh")
	p.listenA, p.listenB = proxy(t, mesh, "127.77.0.5:0"+listener), proxy(t, mesh, "127.77.0.6:0"+listener)
	for _, o := range []Options{
		{Cgroup: p.a, Opener: mesh, Listener: p.listenA, Source: netip.MustParseAddr("127.88.0.5")},
		{Cgroup: p.b, Opener: mesh, Listener: p.listenB, Source: netip.MustParseAddr("127.88.0.6")},
	} {
		d, err := Attach(o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { d.Close() })
	}
	return p
}

// steps takes a socket through steps in a cgroup.
func steps(t *testing.T, dir, all string) string {
	t.Helper()
	said, err := play(t, dir, "socket "+all).Output()
	if err != nil {
		t.Fatalf("%s: %v: %s", all, err, said)
	}
	return string(said)
}

// portOf is what the step of that name has said.
func portOf(t *testing.T, said string) (port int) {
	t.Helper()
	_, rest, _ := strings.Cut(said, "port ")
	if _, err := fmt.Sscan(rest, &port); err != nil || port == 0 {
		t.Fatalf("no port: %s", said)
	}
	return port
}

// TestStranger has a process of no instance call from the address and port of a
// diverted connection that has ended.
func TestStranger(t *testing.T) {
	p := newPair(t, "")
	said := steps(t, p.a, "connect@192.0.2.7:443 port read")
	if !strings.Contains(said, `read "127.88.0.5>192.0.2.7:443" <nil>`) {
		t.Fatalf("the instance itself: %s", said)
	}
	got := steps(t, p.out, fmt.Sprintf("bind@127.88.0.5:%d connect@%s read", portOf(t, said), p.listenA))
	if !strings.Contains(got, "bind <nil>\nconnect <nil>\n") || !strings.Contains(got, `read "127.88.0.5: no original destination`) {
		t.Errorf("a stranger speaks as the instance: %s", got)
	}
}

// TestStrangerAfterAbort is the same of a connection that ended before the
// listener had it.
func TestStrangerAfterAbort(t *testing.T) {
	p := newPair(t, ",late")
	said := steps(t, p.a, "connect@192.0.2.7:443 port abort")
	if !strings.Contains(said, "connect <nil>") || !strings.Contains(said, "abort <nil>") {
		t.Fatalf("the instance itself: %s", said)
	}
	got := steps(t, p.out, fmt.Sprintf("bind@127.88.0.5:%d connect@%s write read", portOf(t, said), p.listenA))
	if !strings.Contains(got, "bind <nil>\nconnect <nil>\n") || !strings.Contains(got, `read "127.88.0.5: no original destination`) {
		t.Errorf("a stranger speaks as the instance: %s", got)
	}
	if said = steps(t, p.a, "connect@192.0.2.7:443 write read"); !strings.Contains(said, `read "127.88.0.5>192.0.2.7:443" `) {
		t.Errorf("the instance itself: %s", said)
	}
}

// TestOtherInstance has a process of one instance call the listener of another from
// the other's address, with a socket that was refused a destination before.
func TestOtherInstance(t *testing.T) {
	p := newPair(t, "")
	for _, from := range []string{"127.88.0.6", "127.88.0.5"} {
		for _, listener := range []netip.AddrPort{p.listenA, p.listenB} {
			got := steps(t, p.a, fmt.Sprintf("bind@%s:0 connect@192.0.2.7:443 connect@%s read", from, listener))
			if !strings.Contains(got, "connect operation not permitted\nconnect <nil>\n") || !strings.Contains(got, `: no original destination`) {
				t.Errorf("from %s to %s: %s", from, listener, got)
			}
		}
	}
}

// TestNothingComesIn has a server of the cgroup called and sent to from another
// machine, before it is diverted and after.
func TestNothingComesIn(t *testing.T) {
	app, other, mesh := cgroup.New(t, "app"), cgroup.New(t, "other"), cgroup.New(t, "mesh")
	here, outside := namespaces(t)
	cmd := play(t, app, "server")
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	if err := here.Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); cmd.Wait() })
	lines := bufio.NewScanner(out)
	next := func() string {
		t.Helper()
		if !lines.Scan() {
			t.Fatal("the server has ended")
		}
		return lines.Text()
	}
	var tcp, udp int
	if _, err := fmt.Sscan(next(), &tcp, &udp); err != nil {
		t.Fatal(err)
	}
	call := func(from *netns.Namespace, address, verbs string) string {
		t.Helper()
		c := play(t, other, fmt.Sprintf("%s udp4/%s:%d tcp4/%s:%d", verbs, address, udp, address, tcp))
		var said []byte
		if err := from.Do(func() (err error) { said, err = c.Output(); return err }); err != nil {
			t.Fatalf("%v: %s", err, said)
		}
		return string(said)
	}
	heard := func(who string) {
		t.Helper()
		got := []string{next(), next()}
		if want := "udp " + who; got[0] != want && got[1] != want {
			t.Errorf("heard %q, not %q", got, want)
		}
		if want := "tcp " + who; got[0] != want && got[1] != want {
			t.Errorf("heard %q, not %q", got, want)
		}
	}
	call(outside, "192.0.2.1", "process")
	heard("192.0.2.7")
	d, err := Attach(Options{Cgroup: app, Opener: mesh, Listener: netip.MustParseAddrPort("127.77.0.5:1"), Source: netip.MustParseAddr("127.88.0.5")})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if said := call(outside, "192.0.2.1", "brief"); !strings.Contains(said, "i/o timeout") {
		t.Errorf("a call from outside: %s", said)
	}
	call(here, "127.0.0.1", "process")
	heard("127.0.0.1") // and nobody before
}

// namespaces are one that plays this machine, 192.0.2.1, and another, 192.0.2.7.
func namespaces(t *testing.T) (here, outside *netns.Namespace) {
	t.Helper()
	dir := t.TempDir()
	for name, to := range map[string]**netns.Namespace{"here": &here, "outside": &outside} {
		ns, err := netns.Create(dir, name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ns.Delete() })
		*to = ns
	}
	run := func(ns *netns.Namespace, command string) {
		t.Helper()
		err := ns.Do(func() error {
			out, err := exec.Command("sh", "-c", command).CombinedOutput()
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
		if err != nil {
			t.Fatalf("%s: %v", command, err)
		}
	}
	run(here, "ip link set lo up && ip link add out type veth peer name in netns "+outside.Path()+" && ip addr add 192.0.2.1/24 dev out && ip link set out up")
	run(outside, "ip addr add 192.0.2.7/24 dev in && ip link set in up")
	return here, outside
}
