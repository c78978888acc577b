package netns

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const pluginDir = "/usr/lib/cni"

// plain makes a namespace as containerd makes one for a pod: nothing in it but
// lo, which is up.
func plain(t testing.TB, name string) *Namespace {
	t.Helper()
	needRoot(t)
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, nil, 0o400); err != nil {
		t.Fatal(err)
	}
	ns := &Namespace{name: name, path: path}
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		if err := unix.Mount(threadNS(), path, "", unix.MS_BIND, ""); err != nil {
			return err
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		ns.file, err = os.Open(path)
		return errors.Join(err, netlink.LinkSetUp(lo))
	})
	t.Cleanup(func() {
		if err := ns.Delete(); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return ns
}

// cni plays containerd: it runs plugins in the namespace that plays the host.
type cni struct {
	testing.TB
	host, pod *Namespace
	data      string
}

func newCNI(t testing.TB) *cni {
	t.Helper()
	c := &cni{TB: t, host: plain(t, "host"), pod: plain(t, "pod"), data: t.TempDir()}
	if _, err := os.Stat(filepath.Join(pluginDir, "bridge")); err != nil {
		t.Skip("no CNI plugins: install containernetworking-plugins")
	}
	return c
}

// call runs one plugin with a configuration in which DATA is the folder of the
// addresses; previous is the result of the one before.
func (c *cni) call(command, device, config string, previous json.RawMessage) json.RawMessage {
	c.Helper()
	var conf map[string]any
	if err := json.Unmarshal([]byte(strings.ReplaceAll(config, "DATA", c.data)), &conf); err != nil {
		c.Fatal(err)
	}
	conf["cniVersion"], conf["name"] = "0.4.0", "net-"+device
	if previous != nil {
		conf["prevResult"] = previous
	}
	in, err := json.Marshal(conf)
	if err != nil {
		c.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(pluginDir, conf["type"].(string)))
	cmd.Env = append(os.Environ(), "CNI_COMMAND="+command, "CNI_CONTAINERID=pod1", "CNI_NETNS="+c.pod.path, "CNI_IFNAME="+device, "CNI_PATH="+pluginDir)
	cmd.Stdin = bytes.NewReader(in)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := c.host.Do(cmd.Run); err != nil {
		c.Fatalf("%s %s: %v: %s", conf["type"], command, err, &out)
	}
	return json.RawMessage(bytes.Clone(out.Bytes()))
}

const (
	bridgeConf = `{"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "mtu": 1400, "ipam": {"type": "host-local",
		"dataDir": "DATA", "ranges": [[{"subnet": "10.61.0.0/24"}], [{"subnet": "fd61::/64"}]],
		"routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}, {"dst": "192.0.2.0/24", "gw": "10.61.0.9"}]}}`
	portmapConf = `{"type": "portmap", "capabilities": {"portMappings": true}, "snat": true,
		"runtimeConfig": {"portMappings": [{"hostPort": 8081, "containerPort": 80, "protocol": "tcp"}]}}`
	ptpConf = `{"type": "ptp", "mtu": 1500, "ipam": {"type": "host-local",
		"dataDir": "DATA", "ranges": [[{"subnet": "10.62.0.0/24"}], [{"subnet": "fd62::/64"}]], "routes": [{"dst": "198.51.100.0/24", "gw": "10.62.0.1"}]}}`
)

// standIn plays a guest: a namespace whose links are taps, with their frames
// carried to and from the taps of j, and configured as the agent would do it.
func standIn(t testing.TB, j *Joined) *Namespace {
	t.Helper()
	guest := plain(t, "guest")
	err := guest.Do(func() error {
		for _, l := range j.Links {
			tap, err := openTap(l.Name, 0)
			if err != nil {
				return err
			}
			carry(t, tap, l.Tap)
			if err := play(l); err != nil {
				return fmt.Errorf("%s: %w", l.Name, err)
			}
		}
		for _, r := range j.Routes {
			if err := playRoute(r); err != nil {
				return fmt.Errorf("%+v: %w", r, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return guest
}

// carry takes frames from each tap to the other until the test ends.
func carry(t testing.TB, a, b *os.File) {
	ends := make(chan struct{}, 2)
	for _, way := range [][2]*os.File{{a, b}, {b, a}} {
		go func() {
			defer func() { ends <- struct{}{} }()
			buf := make([]byte, 1<<17)
			for {
				n, err := way[0].Read(buf)
				if errors.Is(err, os.ErrClosed) || errors.Is(err, unix.EBADFD) {
					return
				}
				if err == nil {
					_, err = way[1].Write(buf[:n])
				}
				if errors.Is(err, os.ErrClosed) {
					return
				}
			}
		}()
	}
	t.Cleanup(func() {
		a.Close()
		b.Close()
		<-ends
		<-ends
	})
}

func play(l Link) error {
	link, err := netlink.LinkByName(l.Name)
	if err != nil {
		return err
	}
	local := "0"
	if l.LocalNet {
		local = "1"
	}
	errs := []error{
		sysctl("ipv6/conf/"+l.Name+"/accept_dad", "0"),
		sysctl("ipv6/conf/"+l.Name+"/accept_ra", "0"),
		sysctl("ipv4/conf/"+l.Name+"/route_localnet", local),
		netlink.LinkSetHardwareAddr(link, l.MAC),
		netlink.LinkSetMTU(link, l.MTU),
		netlink.LinkSetUp(link),
	}
	for _, p := range l.Addresses {
		errs = append(errs, netlink.AddrAdd(link, &netlink.Addr{IPNet: ipNet(p), Flags: unix.IFA_F_NODAD | unix.IFA_F_NOPREFIXROUTE}))
	}
	if l.LocalNet {
		errs = append(errs,
			netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: host(HostEnd), Scope: netlink.SCOPE_LINK}),
			netlink.NeighSet(&netlink.Neigh{LinkIndex: link.Attrs().Index, Family: unix.AF_INET, State: netlink.NUD_PERMANENT,
				IP: HostEnd.AsSlice(), HardwareAddr: HostEndMAC}))
	}
	return errors.Join(errs...)
}

func playRoute(r Route) error {
	link, err := netlink.LinkByName(r.Link)
	if err != nil {
		return err
	}
	v := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(r.To), Src: r.Source.AsSlice(), Gw: r.Gateway.AsSlice(),
		Scope: netlink.Scope(r.Scope), Priority: r.Metric, MTU: r.MTU}
	if r.OnLink {
		v.Flags = int(netlink.FLAG_ONLINK)
	}
	return netlink.RouteAdd(v)
}

// serve answers on an address of a namespace with a name and who asked.
func serve(t testing.TB, ns *Namespace, address, name string) {
	t.Helper()
	var ln net.Listener
	if err := ns.Do(func() (err error) { ln, err = net.Listen("tcp", address); return err }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			fmt.Fprintf(c, "%s to %s", name, c.RemoteAddr().(*net.TCPAddr).IP)
			c.Close()
		}
	}()
}

// asks dials from a namespace and compares what it is told.
func asks(t testing.TB, ns *Namespace, address, want string) {
	t.Helper()
	c, err := dialIn(ns, "tcp", address)
	if err != nil {
		t.Errorf("dial %s: %v", address, err)
		return
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	got, err := io.ReadAll(c)
	if err != nil || string(got) != want {
		t.Errorf("dial %s: got %q, %v; want %q", address, got, err, want)
	}
}

// shell runs a command in a namespace.
func shell(t testing.TB, ns *Namespace, args ...string) (string, error) {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := ns.Do(cmd.Run)
	return out.String(), err
}

// TestJoinCNI gives a guest what Debian's plugins made: a bridged network with a
// published port, and a routed one, each with two stacks.
func TestJoinCNI(t *testing.T) {
	c := newCNI(t)
	before := tables(t, c.pod)
	result := c.call("ADD", "eth0", bridgeConf, nil)
	c.call("ADD", "eth0", portmapConf, result)
	second := c.call("ADD", "net1", ptpConf, nil)

	spare, err := SpareTap(0)
	if err != nil {
		t.Fatal(err)
	}
	defer spare.Close()
	j, err := Join(c.pod.path, JoinOptions{Taps: []*os.File{spare}})
	if err != nil {
		t.Fatal(err)
	}
	if len(j.Links) != 2 || j.Links[0].Name != "eth0" || j.Links[0].MTU != 1400 || j.Links[1].MTU != 1500 || j.Links[0].NoIPv6 {
		t.Fatalf("joined %+v", j.Links)
	}
	for i, want := range []string{"10.61.0.2/24 fd61::2/64", "10.62.0.2/24 fd62::2/64"} {
		if got := strings.Trim(fmt.Sprint(j.Links[i].Addresses), "[]"); got != want {
			t.Errorf("addresses of %s: %s, want %s", j.Links[i].Name, got, want)
		}
	}
	guest := standIn(t, j)
	serve(t, c.host, "[::]:70", "host")
	serve(t, guest, "[::]:80", "guest")

	t.Run("reach", func(t *testing.T) { testReach(t, c, guest) })
	t.Run("port-forward", func(t *testing.T) { testPortForward(t, c, guest) })
	t.Run("again", func(t *testing.T) {
		again, err := Join(c.pod.path, JoinOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer again.Close()
		if again.Links[0].Tap != nil || again.Links[1].Tap != nil || len(again.Links) != 2 || fmt.Sprint(again.Routes) != fmt.Sprint(j.Routes) {
			t.Errorf("joined again: %+v\nfirst: %+v", again, j)
		}
		asks(t, guest, "10.61.0.1:70", "host to 10.61.0.2")
	})
	// What the plugins made is still there for them to see and to remove.
	c.call("CHECK", "eth0", bridgeConf, result)
	c.call("CHECK", "net1", ptpConf, second)
	if err := Leave(c.pod.path); err != nil {
		t.Fatal(err)
	}
	if now := tables(t, c.pod); !slices.Equal(now, before) {
		t.Errorf("lo and rules after leaving: %q, before joining %q", now, before)
	}
	c.call("DEL", "net1", ptpConf, nil)
	c.call("DEL", "eth0", portmapConf, result)
	c.call("DEL", "eth0", bridgeConf, nil)
	for ns, want := range map[*Namespace]string{c.pod: "lo", c.host: "lo cni0"} {
		if got := linkNames(t, ns); got != want {
			t.Errorf("links after DEL in %s: %s, want %s", ns.name, got, want)
		}
	}
	if err := Leave(c.pod.path); err != nil {
		t.Errorf("leave twice: %v", err)
	}
}

func testReach(t *testing.T, c *cni, guest *Namespace) {
	asks(t, guest, "10.61.0.1:70", "host to 10.61.0.2")
	asks(t, guest, "[fd61::1]:70", "host to fd61::2")
	asks(t, guest, "10.62.0.1:70", "host to 10.62.0.2")
	asks(t, guest, "[fd62::1]:70", "host to fd62::2")
	asks(t, c.host, "10.61.0.2:80", "guest to 10.61.0.1")
	asks(t, c.host, "[fd61::2]:80", "guest to fd61::1")
	asks(t, c.host, "10.62.0.2:80", "guest to 10.62.0.1")
	asks(t, c.host, "10.61.0.1:8081", "guest to 10.61.0.1")
	for _, size := range []string{"56", "1372"} {
		if out, err := shell(t, guest, "busybox", "ping", "-c1", "-W3", "-s", size, "10.61.0.1"); err != nil {
			t.Errorf("ping of %s bytes: %v\n%s", size, err, out)
		}
	}
	if out, err := shell(t, guest, "ip", "route", "get", "192.0.2.1"); err != nil || !strings.Contains(out, "via 10.61.0.9 dev eth0") {
		t.Errorf("route of the configuration: %s, %v", out, err)
	}
}

// testPortForward dials as containerd does for kubectl port-forward.
func testPortForward(t *testing.T, c *cni, guest *Namespace) {
	serve(t, guest, "127.0.0.1:81", "loopback of guest")
	asks(t, c.pod, "localhost:80", "guest to "+HostEnd.String())
	asks(t, c.pod, "127.0.0.1:81", "loopback of guest to "+HostEnd.String())
	begin := time.Now()
	if conn, err := dialIn(c.pod, "tcp4", "127.0.0.1:82"); err == nil || !errors.Is(err, unix.ECONNREFUSED) || time.Since(begin) > 2*time.Second {
		t.Errorf("dial a port nobody listens on: %v, %v after %v", conn, err, time.Since(begin))
	}
	testNobodyElse(t, c, guest)
}

// testNobodyElse sends a datagram to 127.0.0.1 at the guest's hardware address,
// and one to its address behind it: only the second arrives.
func testNobodyElse(t *testing.T, c *cni, guest *Namespace) {
	var listeners [2]net.PacketConn
	err := guest.Do(func() (err error) {
		for i, address := range []string{"127.0.0.1:9", "10.61.0.2:9"} {
			if listeners[i], err = net.ListenPacket("udp4", address); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	defer listeners[0].Close()
	defer listeners[1].Close()
	j, err := Join(c.pod.path, JoinOptions{})
	if err != nil {
		t.Fatal(err)
	}
	err = c.host.Do(func() error {
		ifi, err := net.InterfaceByName("cni0")
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for _, to := range [][4]byte{{127, 0, 0, 1}, {10, 61, 0, 2}} {
			f := ipv4(ifi.HardwareAddr, [4]byte{10, 61, 0, 1}, to, unix.IPPROTO_UDP)
			copy(f, j.Links[0].MAC)
			if err := unix.Sendto(fd, f, 0, &unix.SockaddrLinklayer{Ifindex: ifi.Index}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	listeners[1].SetReadDeadline(time.Now().Add(3 * time.Second))
	if _, _, err := listeners[1].ReadFrom(make([]byte, 8)); err != nil {
		t.Errorf("datagram to the guest's address: %v", err)
	}
	listeners[0].SetReadDeadline(time.Now().Add(time.Millisecond))
	if _, from, err := listeners[0].ReadFrom(make([]byte, 8)); err == nil {
		t.Errorf("the network (%s) reached 127.0.0.1 of the guest", from)
	}
}

func linkNames(t *testing.T, ns *Namespace) string {
	t.Helper()
	var names []string
	err := ns.Do(func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			names = append(names, l.Attrs().Name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(names, " ")
}

// tables is what Join changes beside links: routes of lo, and rules.
func tables(t *testing.T, ns *Namespace) []string {
	t.Helper()
	routes, err := shell(t, ns, "ip", "route", "show", "table", "local", "dev", "lo")
	if err != nil {
		t.Fatal(err)
	}
	rules, err := shell(t, ns, "nft", "list", "tables")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(routes+rules, "\n")
	for i := range lines {
		lines[i] = strings.TrimSpace(lines[i])
	}
	slices.Sort(lines)
	return lines
}

// TestHand gives a guest the network of a sandbox that is run by hand.
func TestHand(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	h, err := CreateHand(dir, "box", []uint16{53})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := CreateHand(dir, "box", nil); err == nil {
		t.Error("the same was made twice")
	}
	h.Close()
	if h, err = OpenHand(dir, "box"); err != nil {
		t.Fatal(err)
	}
	j, err := Join(h.Pod.Path(), JoinOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(j.Links) != 1 || j.Links[0].Name != "eth0" || fmt.Sprint(j.Links[0].Addresses) != "[198.18.0.2/32]" || !j.Links[0].NoIPv6 {
		t.Errorf("joined %+v", j.Links)
	}
	guest := standIn(t, j)
	f, err := h.Gate.ListenTransparent()
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.FileListener(f)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			fmt.Fprintf(c, "%s>%s", c.RemoteAddr().(*net.TCPAddr).IP, c.LocalAddr())
			c.Close()
		}
	}()
	asks(t, guest, "192.0.2.7:443", "198.18.0.2>192.0.2.7:443")
	serve(t, guest, "127.0.0.1:81", "loopback of guest")
	asks(t, h.Pod, "127.0.0.1:81", "loopback of guest to "+HostEnd.String())

	if err := errors.Join(Leave(h.Pod.Path()), h.Close(), RemoveHand(dir, "box"), RemoveHand(dir, "box")); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left %v, %v", left, err)
	}
}

// BenchmarkJoin joins and leaves a namespace with one link, as a pod has it.
func BenchmarkJoin(b *testing.B) {
	pod, far := plain(b, "pod"), plain(b, "far")
	err := pod.Do(func() error {
		la := netlink.NewLinkAttrs()
		la.Name = "eth0"
		err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: la, PeerName: "far", PeerNamespace: netlink.NsFd(int(far.file.Fd()))})
		if err != nil {
			return err
		}
		link, err := netlink.LinkByName("eth0")
		return errors.Join(err, netlink.LinkSetUp(link))
	})
	if err != nil {
		b.Fatal(err)
	}
	var joining, leaving time.Duration
	for range b.N {
		begin := time.Now()
		j, err := Join(pod.path, JoinOptions{})
		if err != nil {
			b.Fatal(err)
		}
		joining += time.Since(begin)
		j.Close()
		begin = time.Now()
		if err := Leave(pod.path); err != nil {
			b.Fatal(err)
		}
		leaving += time.Since(begin)
	}
	b.ReportMetric(float64(joining.Microseconds())/1000/float64(b.N), "ms/join")
	b.ReportMetric(float64(leaving.Microseconds())/1000/float64(b.N), "ms/leave")
}
