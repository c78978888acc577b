package main

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/internal/netns"
	"hauberk.dev/mesh/link"
	"hauberk.dev/plan"
)

// TestMain lets the test binary be the program.
func TestMain(m *testing.M) {
	if os.Getenv("HAUBERK_MESH_MAIN") != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

func program(args ...string) *exec.Cmd {
	c := exec.Command(os.Args[0], args...)
	c.Env = append(os.Environ(), "HAUBERK_MESH_MAIN=1")
	return c
}

func TestRefusals(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"--nonsense"}, "flag provided but not defined"},
		{[]string{"more"}, "unexpected argument"},
		{[]string{"--allow-root", "--link", "/nonexistent/mesh.sock"}, "listen on /nonexistent/mesh.sock"},
	} {
		out, err := program(c.args...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), c.want) {
			t.Errorf("%q: %v, %s", c.args, err, out)
		}
	}
	if os.Geteuid() == 0 {
		out, err := program("--link", filepath.Join(t.TempDir(), "s")).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "refuse to run as root") {
			t.Errorf("as root: %v, %s", err, out)
		}
	}
}

// As the unprivileged user it will be, the program serves the link, keeps its
// memory to itself and ends on SIGTERM.
func TestServes(t *testing.T) {
	dir, err := os.MkdirTemp("", "hauberk-mesh")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "mesh.sock")
	var out bytes.Buffer
	c := program("--link", path)
	c.Stdout, c.Stderr = &out, &out
	if os.Geteuid() == 0 {
		const nobody = 65534
		if err := os.Chown(dir, nobody, nobody); err != nil {
			t.Fatal(err)
		}
		exe := filepath.Join(dir, "exe") // where that user can read it
		raw, err := os.ReadFile(os.Args[0])
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(exe, raw, 0o755); err != nil {
			t.Fatal(err)
		}
		c.Path, c.Dir = exe, dir
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	var l *link.Link
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		l, err = link.Dial(context.Background(), path, link.Handlers{
			Sign:    func(context.Context, string, []byte) ([][]byte, []byte, error) { return nil, nil, nil },
			Sockets: func(string, int) ([]*os.File, error) { return nil, nil }, Event: func(api.Event) {}})
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			c.Process.Kill()
			t.Fatalf("%v\n%s", err, out.String())
		}
	}
	if err := l.Ping(context.Background()); err != nil || l.Process() != c.Process.Pid {
		t.Errorf("ping: %v, process %d", err, l.Process())
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	if os.Geteuid() == 0 {
		checkSandbox(t, l, dir)
	}
	// A process that is not dumpable belongs to root in /proc.
	if fi, err := os.Stat("/proc/" + strconv.Itoa(c.Process.Pid) + "/mem"); err != nil || fi.Sys().(*syscall.Stat_t).Uid != 0 {
		t.Errorf("the memory of the program is open to its user: %v", err)
	}
	c.Process.Signal(syscall.SIGTERM)
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("%v\n%s", err, out.String())
		}
	case <-time.After(10 * time.Second):
		c.Process.Kill()
		t.Error("SIGTERM did not end it")
	}
	l.Close()
}

// checkSandbox gives the program the sockets of a sandbox: it answers names and
// refuses connections in a namespace that it could not enter itself.
func checkSandbox(t *testing.T, l *link.Link, dir string) {
	t.Helper()
	box, err1 := netns.Create(dir+"/ns", "box")
	guest, err2 := netns.Create(dir+"/ns", "guest")
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	defer box.Delete()
	defer guest.Delete()
	address := netip.MustParseAddr("10.88.0.1")
	if err := box.Veth(netns.Guest{Address: address, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}}, guest); err != nil {
		t.Fatal(err)
	}
	tcp, err1 := box.ListenTransparent()
	udp, dns, err2 := box.ListenDNS()
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	defer udp.Close()
	defer dns.Close()
	ctx := context.Background()
	name := "spiffe://t.local/ns/bank/sa/web"
	sandbox := plan.Sandbox{Instance: "web-1", Address: address, Identity: name, Service: "web", Namespace: "bank"}
	if err := l.AddSandbox(ctx, sandbox, tcp, udp, dns); err != nil {
		t.Fatal(err)
	}
	vip := netip.MustParseAddr("10.99.0.1")
	if err := l.SetPlan(ctx, plan.Mesh{Generation: 1, TrustDomain: "t.local", Sandboxes: []plan.Sandbox{sandbox},
		Services: []plan.Service{{Name: "web", Namespace: "bank", Address: vip, Identity: name}}}); err != nil {
		t.Fatal(err)
	}
	dial := func(network, to string) (c net.Conn, err error) {
		err = guest.Do(func() (err error) { c, err = net.DialTimeout(network, to, 5*time.Second); return err })
		return c, err
	}
	r := &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) { return dial("udp4", "169.254.1.1:53") }}
	if got, err := r.LookupHost(ctx, "web.bank.svc.cluster.local."); err != nil || len(got) != 1 || got[0] != vip.String() {
		t.Errorf("web.bank is %v, %v", got, err)
	}
	c, err := dial("tcp4", "8.8.8.8:443")
	if err == nil {
		defer c.Close()
		c.SetDeadline(time.Now().Add(5 * time.Second))
		_, err = c.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a connection to nowhere: %v, want a reset", err)
	}
	if err := l.RemoveSandbox(ctx, "web-1"); err != nil {
		t.Error(err)
	}
}

// Alone, the program serves what a file says, takes up a changed one at SIGHUP,
// keeps serving after a wrong one, and ends at SIGTERM.
func TestAlone(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "proxy.yaml")
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := ln.Addr().String()
	ln.Close()
	write := func(version, body string) {
		t.Helper()
		text := "version: " + version + "\nlisteners: [{name: web, address: '" + address + "'}]\nhosts: [{names: ['*'], routes: [{respond: {status: 200, body: " + body + "}}]}]\n"
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("2", "bad")
	for _, args := range [][]string{{"check", path}, {"--allow-root", "-c", path}} {
		out, err := program(args...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "proxy.yaml:1: version: 2 is not known; write version: 1") {
			t.Errorf("%q: %v, %s", args, err, out)
		}
	}
	write("1", "first")
	if out, err := program("check", path).CombinedOutput(); err != nil {
		t.Errorf("%v, %s", err, out)
	}
	c := program("--allow-root", "-c", path)
	logFile, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer logFile.Close()
	c.Stdout, c.Stderr = logFile, logFile
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	defer c.Process.Kill()
	logged := func() string { b, _ := os.ReadFile(logFile.Name()); return string(b) }
	until := func(what string, ok func() bool) {
		t.Helper()
		for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s:\n%s", what, logged())
			}
		}
	}
	answers := func(want string) bool {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			return false
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		conn.Write([]byte("GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"))
		var b bytes.Buffer
		b.ReadFrom(conn)
		return strings.HasSuffix(b.String(), want)
	}
	until("does not serve", func() bool { return answers("first") })
	write("1", "second")
	c.Process.Signal(syscall.SIGHUP)
	until("does not take up the change", func() bool { return answers("second") })
	write("2", "third")
	c.Process.Signal(syscall.SIGHUP)
	until("says nothing of a wrong file", func() bool { return strings.Contains(logged(), "reload refused") })
	if !answers("second") {
		t.Error("a wrong file changed something")
	}
	c.Process.Signal(syscall.SIGTERM)
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("%v\n%s", err, logged())
		}
	case <-time.After(40 * time.Second):
		t.Error("SIGTERM did not end it")
	}
}

func TestConvert(t *testing.T) {
	path := filepath.Join(t.TempDir(), "nginx.conf")
	if err := os.WriteFile(path, []byte("http { server {\n return 200;\n perl x;\n} }"), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := program("convert", path).CombinedOutput(); err == nil || !strings.Contains(string(out), "line 3: perl is not converted") {
		t.Errorf("%v, %s", err, out)
	}
	if out, err := program("convert", "--partial", path).Output(); err != nil || !strings.Contains(string(out), "respond: {status: 200") {
		t.Errorf("%v, %s", err, out)
	}
}
