package divert

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hauberk.dev/test/cgroup"
)

// role makes this program play a part in a cgroup of its own.
const role = "HAUBERK_DIVERT_ROLE"

func TestMain(m *testing.M) {
	switch name, at, _ := strings.Cut(os.Getenv(role), " "); name {
	case "proxy":
		playProxy(at)
	case "process":
		playProcess(at, 20*time.Second)
	case "brief":
		playProcess(at, 2*time.Second)
	case "socket":
		playSocket(at)
	case "server":
		playServer()
	default:
		os.Exit(m.Run())
	}
}

// playProxy accepts without any right and tells who calls and where to. A late one
// accepts nobody before he has said something.
func playProxy(at string) {
	at, late, _ := strings.Cut(at, ",")
	c := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		if late == "" {
			return nil
		}
		cerr := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_TCP, unix.TCP_DEFER_ACCEPT, 60) })
		return errors.Join(cerr, err)
	}}
	ln, err := c.Listen(context.Background(), "tcp4", at)
	if err == nil {
		err = syscall.Setresuid(65534, 65534, 65534)
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println(ln.Addr())
	go func() {
		io.Copy(io.Discard, os.Stdin) // ends with the test
		os.Exit(0)
	}()
	for {
		c, err := ln.Accept()
		if err != nil {
			os.Exit(1)
		}
		to, err := originalDestination(c.(*net.TCPConn))
		if err != nil {
			fmt.Fprintf(c, "%s: %v", c.RemoteAddr().(*net.TCPAddr).IP, err)
		} else {
			fmt.Fprintf(c, "%s>%s", c.RemoteAddr().(*net.TCPAddr).IP, to)
		}
		c.Close()
	}
}

func originalDestination(c *net.TCPConn) (to netip.AddrPort, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return to, err
	}
	var m *unix.IPv6Mreq // as large as a sockaddr_in, and a little larger
	cerr := raw.Control(func(fd uintptr) { m, err = unix.GetsockoptIPv6Mreq(int(fd), unix.SOL_IP, unix.SO_ORIGINAL_DST) })
	if cerr != nil || err != nil {
		return to, fmt.Errorf("no original destination: %w", err)
	}
	b := m.Multiaddr
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), binary.BigEndian.Uint16(b[2:4])), nil
}

// playProcess dials what it is told and says what came of it: the peer it sees,
// and what was answered.
func playProcess(asks string, patience time.Duration) {
	for _, ask := range strings.Fields(asks) {
		network, to, _ := strings.Cut(ask, "/")
		c, err := dial(network, to, patience)
		if err != nil {
			fmt.Printf("%s %v\n", ask, err)
			continue
		}
		if strings.HasPrefix(network, "udp") {
			_, err := c.Write([]byte("x"))
			fmt.Printf("%s sent, %v\n", ask, err)
			c.Close()
			continue
		}
		c.SetDeadline(time.Now().Add(20 * time.Second))
		answer, err := io.ReadAll(c)
		fmt.Printf("%s peer %s answered %q %v\n", ask, peer(c), answer, err)
		c.Close()
	}
}

// dial dials; "mapped" is IPv4 by a socket of IPv6.
func dial(network, to string, patience time.Duration) (net.Conn, error) {
	if network != "mapped" {
		return (&net.Dialer{Timeout: patience}).Dial(network, to)
	}
	a, err := netip.ParseAddrPort(to)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	if err := unix.Connect(fd, &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}); err != nil {
		return nil, err
	}
	return net.FileConn(f)
}

// peer asks the kernel, as RemoteAddr has noted whom Dial asked for.
func peer(c net.Conn) (text string) {
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		return err.Error()
	}
	raw.Control(func(fd uintptr) {
		switch a, err := unix.Getpeername(int(fd)); a := a.(type) {
		case *unix.SockaddrInet4:
			text = netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port)).String()
		case *unix.SockaddrInet6:
			text = netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port)).String()
		default:
			text = fmt.Sprint(err)
		}
	})
	return text
}

// play starts this program in a cgroup.
func play(t *testing.T, dir, part string) *exec.Cmd {
	t.Helper()
	return cgroup.Command(t, dir, role+"="+part)
}

// proxy starts one without rights at an address, in its cgroup.
func proxy(t *testing.T, path, at string) netip.AddrPort {
	t.Helper()
	cmd := play(t, path, "proxy "+at)
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); cmd.Wait() })
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	a, err := netip.ParseAddrPort(strings.TrimSpace(line))
	if err != nil {
		t.Fatalf("the proxy says %q", line)
	}
	return a
}

// TestDivert has processes of a cgroup dial, and others beside them.
func TestDivert(t *testing.T) {
	app, other, mesh := cgroup.New(t, "app"), cgroup.New(t, "other"), cgroup.New(t, "mesh")
	listener := proxy(t, mesh, "127.77.0.5:0")
	outside := proxy(t, other, "127.0.0.1:0") // somebody's own server
	d, err := Attach(Options{Cgroup: app, Opener: mesh, Listener: listener, Source: netip.MustParseAddr("127.88.0.5")})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	asks := []string{"tcp4/192.0.2.7:443", "tcp4/192.0.2.7:443", "mapped/192.0.2.8:80", "tcp6/[2001:db8::1]:80", "udp4/192.0.2.9:53",
		"tcp4/" + outside.String(), "tcp4/" + listener.String()}
	said, err := play(t, app, "process "+strings.Join(asks, " ")).Output()
	if err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	lines := strings.Split(strings.TrimSpace(string(said)), "\n")
	for i, want := range []string{
		`peer 192.0.2.7:443 answered "127.88.0.5>192.0.2.7:443" <nil>`,
		`peer 192.0.2.7:443 answered "127.88.0.5>192.0.2.7:443" <nil>`,
		`peer [::ffff:192.0.2.8]:80 answered "127.88.0.5>192.0.2.8:80" <nil>`,
		"operation not permitted",
		"operation not permitted",
		`answered "127.0.0.1: no original destination`, // its own machine's loopback
		`answered "127.0.0.1: no original destination`, // who dials the proxy itself is nobody
	} {
		if i >= len(lines) || !strings.Contains(lines[i], want) {
			t.Errorf("%s: want %s in\n%s", asks[i], want, said)
		}
	}
	around, err := d.Around()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []Attempt{{17, netip.MustParseAddrPort("192.0.2.9:53"), 1}, {6, netip.AddrPort{}, 1}} {
		if !slices.Contains(around, want) {
			t.Errorf("nothing of %+v in %+v", want, around)
		}
	}
	// Others are not held, and after the end nobody is.
	said, err = play(t, other, "process udp4/127.0.0.1:9 tcp4/"+listener.String()).Output()
	if err != nil || !strings.Contains(string(said), "sent, <nil>") || !strings.Contains(string(said), "no original destination") {
		t.Errorf("another cgroup: %s, %v", said, err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if said, err = play(t, app, "process tcp4/"+outside.String()).Output(); err != nil || !strings.Contains(string(said), "answered") {
		t.Errorf("after the end: %s, %v", said, err)
	}
}

// TestPinned ends the process that has diverted, has another divert elsewhere,
// and takes the diversion away.
func TestPinned(t *testing.T) {
	app, mesh := cgroup.New(t, "app"), cgroup.New(t, "mesh")
	kept := t.TempDir()
	if err := unix.Mount("bpf", kept, "bpf", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(kept, unix.MNT_DETACH) })
	pins := filepath.Join(kept, "app")
	for _, source := range []string{"127.88.0.5", "127.88.0.6"} {
		o := Options{Cgroup: app, Opener: mesh, Listener: proxy(t, mesh, "127.77.0.5:0"), Source: netip.MustParseAddr(source), Pins: pins}
		d, err := Attach(o)
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		said, err := play(t, app, "process tcp4/192.0.2.7:443 udp4/192.0.2.9:53").Output()
		if err != nil || !strings.Contains(string(said), `answered "`+source+`>192.0.2.7:443"`) || !strings.Contains(string(said), "operation not permitted") {
			t.Errorf("after %s has ended: %s, %v", source, said, err)
		}
	}
	// One that cannot be kept leaves the one that is there.
	if err := os.MkdirAll(filepath.Join(pins, fresh+"divert4", "in the way"), 0o700); err != nil {
		t.Fatal(err)
	}
	if d, err := Attach(Options{Cgroup: app, Opener: mesh, Listener: netip.MustParseAddrPort("127.77.0.5:1"), Source: netip.MustParseAddr("127.88.0.7"), Pins: pins}); err == nil {
		d.Close()
		t.Error("kept where something is in the way")
	}
	said, err := play(t, app, "process tcp4/192.0.2.7:443 udp4/192.0.2.9:53").Output()
	if err != nil || !strings.Contains(string(said), `answered "127.88.0.6>192.0.2.7:443"`) || !strings.Contains(string(said), "operation not permitted") {
		t.Errorf("after another could not be kept: %s, %v", said, err)
	}
	if err := errors.Join(os.Remove(filepath.Join(pins, fresh+"divert4", "in the way")), os.Remove(filepath.Join(pins, fresh+"divert4"))); err != nil {
		t.Error(err)
	}
	if left, err := filepath.Glob(filepath.Join(pins, fresh+"*")); err != nil || len(left) > 0 {
		t.Errorf("%q, %v are left", left, err)
	}
	if err := Remove(pins); err != nil {
		t.Error(err)
	}
	if err := Remove(pins); err != nil {
		t.Errorf("remove twice: %v", err)
	}
	held := true // the kernel lets go in its own time
	for end := time.Now().Add(time.Minute); held && time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		said, err := play(t, app, "process udp4/192.0.2.9:53").Output()
		if err != nil {
			t.Fatal(err)
		}
		held = strings.Contains(string(said), "operation not permitted")
	}
	if held {
		t.Error("the cgroup is held on after the end")
	}
	if d, err := Attach(Options{Cgroup: app, Opener: mesh, Listener: netip.MustParseAddrPort("127.77.0.5:1"), Source: netip.MustParseAddr("127.88.0.5"), Pins: t.TempDir()}); err == nil {
		d.Close()
		t.Error("pinned to a directory that keeps nothing")
	}
}

func TestRefusals(t *testing.T) {
	good := Options{Cgroup: "/nowhere", Opener: "/nowhere", Listener: netip.MustParseAddrPort("127.0.0.1:1"), Source: netip.MustParseAddr("127.0.0.2")}
	for name, change := range map[string]func(*Options){
		"no cgroup":       func(o *Options) { o.Cgroup = "" },
		"no opener":       func(o *Options) { o.Opener = "" },
		"listener afar":   func(o *Options) { o.Listener = netip.MustParseAddrPort("192.0.2.1:1") },
		"no port":         func(o *Options) { o.Listener = netip.AddrPortFrom(o.Listener.Addr(), 0) },
		"no source":       func(o *Options) { o.Source = netip.Addr{} },
		"source of IPv6":  func(o *Options) { o.Source = netip.IPv6Loopback() },
		"no such cgroups": func(*Options) {},
	} {
		o := good
		change(&o)
		if d, err := Attach(o); err == nil {
			d.Close()
			t.Errorf("%s: attached", name)
		}
	}
}
