package nic_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/internal/kernel"
	"hauberk.dev/internal/netns"
	"hauberk.dev/vm"
	"hauberk.dev/vm/boot"
	"hauberk.dev/vm/nic"
)

const (
	user      = 64480
	pluginDir = "/usr/lib/cni"
	// Both stacks, a published port and an MTU that is not the usual one.
	bridgeConf = `{"cniVersion": "0.4.0", "name": "net", "type": "bridge", "bridge": "cni0", "isGateway": true, "mtu": 1400, "ipam": {"type": "host-local",
		"dataDir": "DATA", "ranges": [[{"subnet": "10.71.0.0/24"}], [{"subnet": "fd71::/64"}]], "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}}`
	ptpConf = `{"cniVersion": "0.4.0", "name": "ptp", "type": "ptp", "ipam": {"type": "host-local",
		"dataDir": "DATA", "ranges": [[{"subnet": "10.72.0.0/24"}]], "routes": [{"dst": "198.51.100.0/24", "gw": "10.72.0.1"}]}}`
)

// world is a namespace that plays the host of pods.
type world struct {
	testing.TB
	host string
	data string
}

func newWorld(t testing.TB) *world {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("making network namespaces needs root")
	}
	if _, err := os.Stat(pluginDir + "/bridge"); err != nil {
		t.Skip("no CNI plugins: install containernetworking-plugins")
	}
	w := &world{TB: t, data: t.TempDir()}
	w.host = w.namespace("host")
	return w
}

// namespace makes one as containerd does for a pod.
func (w *world) namespace(name string) string {
	w.Helper()
	name = fmt.Sprintf("nic%d-%s", os.Getpid(), name)
	for _, args := range [][]string{{"netns", "add", name}, {"-n", name, "link", "set", "lo", "up"}} {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			w.Fatalf("ip %v: %v: %s", args, err, out)
		}
	}
	w.Cleanup(func() {
		if out, err := exec.Command("ip", "netns", "del", name).CombinedOutput(); err != nil {
			w.Errorf("remove %s: %v: %s", name, err, out)
		}
	})
	return name
}

func path(namespace string) string { return "/run/netns/" + namespace }

func (w *world) cni(command, pod, device, conf string) {
	w.Helper()
	kind := "bridge"
	if conf == ptpConf {
		kind = "ptp"
	}
	cmd := exec.Command("ip", "netns", "exec", w.host, filepath.Join(pluginDir, kind))
	cmd.Env = append(os.Environ(), "CNI_COMMAND="+command, "CNI_CONTAINERID="+pod, "CNI_NETNS="+path(pod), "CNI_IFNAME="+device, "CNI_PATH="+pluginDir)
	cmd.Stdin = strings.NewReader(strings.ReplaceAll(conf, "DATA", w.data))
	if out, err := cmd.CombinedOutput(); err != nil {
		w.Fatalf("%s %s: %v: %s", kind, command, err, out)
	}
}

// in runs a command in a namespace.
func (w *world) in(namespace string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(w.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "ip", append([]string{"netns", "exec", namespace}, args...)...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// must runs a command and wants it to say something.
func (w *world) must(want, namespace string, args ...string) {
	w.Helper()
	if out, err := w.in(namespace, args...); err != nil || !strings.Contains(out, want) {
		w.Errorf("%s: %v\n%s\nwant %q", strings.Join(args, " "), err, out, want)
	}
}

// guests opens a driver for machines with this tree's agent, and a template.
func guests(t testing.TB) (*boot.Guest, *vm.Template) {
	t.Helper()
	if _, err := kernel.Find("/", kernel.Flavour); errors.Is(err, kernel.ErrMissing) {
		t.Skip(err)
	}
	dir := t.TempDir()
	agent := filepath.Join(dir, "hauberk-guest")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", agent, "hauberk.dev/cmd/hauberk-guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build hauberk-guest: %v: %s", err, out)
	}
	g, err := boot.Open(t.Context(), boot.Config{State: dir + "/s", Run: dir + "/r", User: user, Agent: agent})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	})
	template, err := g.Driver.Template(t.Context(), g.Template(160, 1, "test"), nil)
	if err != nil {
		t.Fatal(err)
	}
	return g, template
}

// image is a root file system of busybox.
func image(t testing.TB) *os.File {
	t.Helper()
	dir := t.TempDir()
	root := filepath.Join(dir, "root")
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skip("no busybox to put into the image: install busybox-static")
	}
	if err := errors.Join(os.MkdirAll(root+"/bin", 0o755), os.MkdirAll(root+"/proc", 0o755), os.WriteFile(root+"/bin/busybox", busybox, 0o755),
		pages(root, "www", "loop")); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.erofs", "--quiet", dir+"/image", root).CombinedOutput(); err != nil {
		t.Fatalf("make image: %v: %s", err, out)
	}
	f, err := os.Open(dir + "/image")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// pages makes a web site of each name, whose only page is the name.
func pages(dir string, names ...string) (err error) {
	for _, name := range names {
		err = errors.Join(err, os.MkdirAll(dir+"/"+name, 0o755), os.WriteFile(dir+"/"+name+"/index.html", []byte(name), 0o644))
	}
	return err
}

// pod is a running machine that took the place of a namespace.
type pod struct {
	*world
	channel   *vm.Channel
	container *vm.Process
}

// start joins a namespace and starts a machine in it, or puts one into it that
// was made before.
func (w *world) start(g *boot.Guest, template *vm.Template, root *os.File, name string, spare bool) *pod {
	w.Helper()
	ctx := w.Context()
	spec := vm.Spec{ID: name[strings.LastIndexByte(name, '-')+1:], Template: g.Template(160, 1, "test"), UID: user + 1, GID: user + 1,
		Disks: []vm.Disk{{File: root, Slot: vm.ReadOnlySlot(0)}}}
	o := netns.JoinOptions{Owner: user + 1}
	var j *netns.Joined
	var err error
	if !spare {
		if j, err = netns.Join(path(name), o); err != nil {
			w.Fatal(err)
		}
		defer j.Close()
		spec.Networks = nic.Networks(j)
	}
	m, err := g.Driver.Clone(ctx, template, spec)
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() {
		if err := m.Kill(context.WithoutCancel(ctx)); err != nil {
			w.Error(err)
		}
	})
	c, _, err := m.Channel(ctx, nil)
	if err != nil {
		w.Fatalf("%v; the guest printed: %s", err, m.Console())
	}
	w.Cleanup(func() { c.Close() })
	if err := c.Reseed(ctx, vm.NewSeed(spec.ID)); err != nil {
		w.Fatal(err)
	}
	if spare {
		for range 2 { // the second time changes nothing
			if err = nic.Enter(ctx, m, c, path(name), o); err != nil {
				break
			}
		}
	} else if err = c.Rescan(ctx); err == nil {
		var message guestproto.Network
		if message, err = nic.Message(j); err == nil {
			err = c.Network(ctx, message)
		}
	}
	if err != nil {
		w.Fatal(err)
	}
	if _, err := c.MountRoot(ctx, guestproto.MountRoot{Root: 0, Serial: string(vm.ReadOnlySlot(0)), UpperBytes: 16 << 20}); err != nil {
		w.Fatal(err)
	}
	p := &pod{world: w, channel: c}
	// 81 is bound to the loopback address.
	if p.container, err = c.Create(ctx, guestproto.Create{Root: 0, Program: guestproto.Program{Args: []string{"/bin/busybox", "sh", "-c",
		"busybox httpd -f -p 80 -h /www & busybox httpd -f -p 127.0.0.1:81 -h /loop & wait"}, Env: []string{"PATH=/bin"}}}); err != nil {
		w.Fatal(err)
	}
	if err := p.container.Start(ctx); err != nil {
		w.Fatal(err)
	}
	for _, port := range []int{80, 81} {
		for p.run(fetch("127.0.0.1", port)[1:]...) == "[0 <nil>]" { // not listening yet
			time.Sleep(20 * time.Millisecond)
		}
	}
	return p
}

// run runs busybox in the container.
func (p *pod) run(args ...string) string {
	p.Helper()
	x, err := p.channel.Exec(p.Context(), p.container, guestproto.Program{Args: append([]string{"/bin/busybox"}, args...)})
	if err != nil {
		p.Fatal(err)
	}
	go io.Copy(io.Discard, x.Stderr())
	out, err := io.ReadAll(x.Stdout())
	if err != nil {
		p.Error(err)
	}
	status, err := x.Wait(p.Context())
	return fmt.Sprintf("%s[%d %v]", bytes.TrimSpace(out), status.Code, err)
}

// TestGuestInNetwork runs machines in networks of CNI plugins: one made for two
// links, and one that was made before, as a pool does.
func TestGuestInNetwork(t *testing.T) {
	w := newWorld(t)
	g, template := guests(t)
	root := image(t)
	first, second := w.namespace("a"), w.namespace("b")
	w.cni("ADD", first, "eth0", bridgeConf)
	w.cni("ADD", first, "net1", ptpConf)
	w.cni("ADD", second, "eth0", bridgeConf)
	w.cni("ADD", second, "net1", ptpConf)
	a := w.start(g, template, root, first, false)
	b := w.start(g, template, root, second, true)

	if err := pages(w.data, "host"); err != nil {
		t.Fatal(err)
	}
	host := exec.Command("ip", "netns", "exec", w.host, "busybox", "httpd", "-f", "-p", "70", "-h", w.data+"/host")
	if err := host.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { host.Process.Kill(); host.Wait() }()
	for _, to := range []string{"10.71.0.2", "fd71::2", "10.72.0.2", "10.71.0.3", "10.72.0.3"} {
		kind := "ping"
		if strings.Contains(to, ":") {
			kind = "ping6"
		}
		w.must("1 packets received", w.host, "busybox", kind, "-c1", "-W5", to)
		w.must("www", w.host, fetch(to, 80)...)
	}
	w.must("1 packets received", w.host, "busybox", "ping", "-c1", "-W5", "-s1372", "10.71.0.2")
	for _, to := range []string{"10.71.0.1", "fd71::1", "10.72.0.1"} {
		if got := a.run(fetch(to, 70)[1:]...); got != "host[0 <nil>]" {
			t.Errorf("guest to host at %s: %s", to, got)
		}
	}
	// The second machine answers at the same bridge, and each to the other.
	for _, to := range []string{"10.71.0.3", "fd71::3"} {
		w.must("www", w.host, fetch(to, 80)...)
		if got := a.run(fetch(to, 80)[1:]...); got != "www[0 <nil>]" {
			t.Errorf("guest to guest at %s: %s", to, got)
		}
	}
	if got := b.run(fetch("10.71.0.2", 80)[1:]...); got != "www[0 <nil>]" {
		t.Errorf("guest back to guest: %s", got)
	}
	// Port-forward, as containerd does it.
	w.must("www", first, fetch("127.0.0.1", 80)...)
	w.must("loop", first, fetch("127.0.0.1", 81)...)
	w.must("loop", second, fetch("127.0.0.1", 81)...)
	testCounts(t, a)
	testCounts(t, b)
	testSpoof(t, b, path(second))
	for _, name := range []string{first, second} {
		if err := netns.Leave(path(name)); err != nil {
			t.Error(err)
		}
	}
	w.cni("DEL", first, "net1", ptpConf)
	w.cni("DEL", first, "eth0", bridgeConf)
	w.cni("DEL", second, "net1", ptpConf)
	w.cni("DEL", second, "eth0", bridgeConf)
	w.must("lo", first, "busybox", "ls", "/sys/class/net")
}

// testSpoof gives the guest an address that is not its own: it gets nowhere with
// it, and until then nothing that the machine sent was taken for such a thing.
func testSpoof(t *testing.T, p *pod, path string) {
	spoofed, rest, err := netns.Stopped(path)
	if err != nil || spoofed != 0 || rest != 0 {
		t.Errorf("%d frames had another sender, %d were of no known kind, %v", spoofed, rest, err)
	}
	list, err := p.channel.Interfaces(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	m := guestproto.Network{Interfaces: []guestproto.Interface{{Device: guestproto.DeviceMAC(0), Name: "eth0",
		MAC: list[0].MAC, Addresses: []guestproto.Address{{Prefix: guestproto.Prefix{IP: guestproto.IPOf([]byte{10, 79, 0, 9}), Bits: 24}}}}}}
	if err := p.channel.Network(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	p.run("ping", "-c1", "-W1", "10.79.0.1") // asks for it by ARP from there
	if spoofed, _, err = netns.Stopped(path); err != nil || spoofed == 0 {
		t.Errorf("%d frames had another sender, %v", spoofed, err)
	}
}

func testCounts(t *testing.T, p *pod) {
	list, err := p.channel.Interfaces(t.Context())
	if err != nil || len(list) != 2 || list[0].Name != "eth0" || list[1].Name != "net1" {
		t.Fatalf("interfaces %+v, %v", list, err)
	}
	if s := list[0]; s.MTU != 1400 || s.Received.Packets < 5 || s.Sent.Bytes < 500 {
		t.Errorf("interface %+v", s)
	}
	routes, err := p.channel.Routes(t.Context())
	if err != nil || len(routes) < 6 {
		t.Errorf("routes %+v, %v", routes, err)
	}
}

// fetch is a command that prints the page of a web site.
func fetch(host string, port int) []string {
	return []string{"busybox", "sh", "-c", fmt.Sprintf(`printf 'GET / HTTP/1.0\r\n\r\n' | busybox nc -w5 %s %d | busybox tail -n1`, host, port)}
}
