package handover

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"hauberk.dev/mesh/wire"
)

// TestMain lets the test binary be the new process.
func TestMain(m *testing.M) {
	if path := os.Getenv("HANDOVER_PATH"); path != "" {
		if err := newProcess(path, os.Getenv("HANDOVER_AT"), os.Getenv("HANDOVER_DO")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// echoes are connections that give back what they get, in whichever process
// they are.
type echoes struct {
	mu    sync.Mutex
	all   []*wire.Conn
	users sync.WaitGroup
}

func (e *echoes) serve(c *wire.Conn) {
	e.mu.Lock()
	e.all = append(e.all, c)
	e.mu.Unlock()
	e.users.Go(func() {
		b := make([]byte, 8<<10)
		for {
			n, err := c.Read(b)
			if err == nil {
				_, err = c.Write(b[:n])
			}
			if err != nil {
				return // frozen, or the client has ended
			}
		}
	})
}

// hold freezes all of them.
func (e *echoes) hold(version int) (*Load, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, c := range e.all {
		c.Freeze()
	}
	e.users.Wait()
	load := &Load{Version: version}
	for _, c := range e.all {
		body, err1 := json.Marshal(c.State())
		f, err2 := c.TCP().File()
		if err := errors.Join(err1, err2); err != nil {
			return nil, err
		}
		load.Items = append(load.Items, Item{Kind: "echo", Body: body, Files: []*os.File{f}})
		c.Close()
	}
	e.all = nil
	return load, nil
}

// build makes connections of a load, here or in another process.
func (e *echoes) build(load *Load) (start func(), err error) {
	var made []*wire.Conn
	for _, i := range load.Items {
		var s wire.State
		if err := json.Unmarshal(i.Body, &s); err != nil {
			return nil, err
		}
		c, err := net.FileConn(i.Files[0])
		if err != nil {
			return nil, err
		}
		made = append(made, wire.Resume(c.(*net.TCPConn), s))
	}
	return func() {
		load.close()
		for _, c := range made {
			c.Thaw()
			e.serve(c)
		}
	}, nil
}

func (e *echoes) back(load *Load) error {
	start, err := e.build(load)
	if err == nil {
		start()
	}
	return err
}

// newProcess takes over, but for what it is to do at some word: it kills or
// stops itself, or refuses. Then it serves until its standard input ends.
func newProcess(path, at, do string) error {
	c, err := net.Dial("unixpacket", path)
	if err != nil {
		return err
	}
	var e echoes
	t := &taker{conn: newConn(context.Background(), c.(*net.UnixConn)), patience: patience}
	act := func(here string) {
		if here != at {
			return
		}
		switch do {
		case "kill":
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		case "stop":
			syscall.Kill(os.Getpid(), syscall.SIGSTOP)
			time.Sleep(10 * time.Millisecond) // the signal takes effect a moment later
		}
	}
	t.met = func(w word) { act(string(w)) }
	t.build = func(l *Load) (func(), error) {
		act("build")
		if at == "build" && do == "refuse" {
			return nil, errors.New("it does not suit me")
		}
		start, err := e.build(l)
		act("built")
		return start, err
	}
	if err := t.take(); err != nil {
		return err
	}
	fmt.Println("serving")
	io.Copy(io.Discard, os.Stdin)
	return nil
}

// client asks and checks the answers, again and again.
type client struct {
	c     net.Conn
	asked atomic.Int64
}

func (c *client) run(t *testing.T, stop <-chan struct{}) {
	b, got := make([]byte, 12<<10), make([]byte, 12<<10)
	for k := uint64(0); ; k++ {
		select {
		case <-stop:
			return
		case <-time.After(time.Duration(rand.IntN(4)) * time.Millisecond):
		}
		n := 8 + rand.IntN(len(b)-8)
		binary.BigEndian.PutUint64(b[n-8:], k)
		_, werr := c.c.Write(b[:n])
		_, rerr := io.ReadFull(c.c, got[:n])
		if err := errors.Join(werr, rerr); err != nil || string(got[:n]) != string(b[:n]) {
			t.Errorf("question %d of %d bytes: %v", k, n, err)
			return
		}
		c.asked.Add(1)
	}
}

// allAsk waits until each client has been answered n times more.
func allAsk(t *testing.T, all []*client, n int64) {
	t.Helper()
	for _, c := range all {
		goal := c.asked.Load() + n
		for end := time.Now().Add(60 * time.Second); c.asked.Load() < goal; time.Sleep(time.Millisecond) {
			if t.Failed() || time.Now().After(end) {
				t.Fatal("a client gets no answers")
			}
		}
	}
}

// The new process is killed, stopped and made to refuse at each step, while
// clients use all connections. Each time the old one goes on and no client
// notices; in the end another takes them over, and no client notices.
func TestFailureAtEachStep(t *testing.T) {
	ln, path := listen(t)
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	var old echoes
	var all []*client
	var clients sync.WaitGroup
	stop := make(chan struct{})
	for range 60 {
		c, err := net.Dial("tcp", tcp.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(3 * time.Minute))
		d, err := tcp.Accept()
		if err != nil {
			t.Fatal(err)
		}
		old.serve(wire.New(d.(*net.TCPConn)))
		one := &client{c: c}
		all = append(all, one)
		clients.Go(func() { one.run(t, stop) })
	}
	end := sync.OnceFunc(func() { close(stop); clients.Wait() })
	defer end()
	var steps [][2]string
	for _, at := range []string{"hello", "welcome", "items", "more", "end", "build", "built", "ready", "go", "going"} {
		steps = append(steps, [2]string{at, "kill"}, [2]string{at, "stop"})
	}
	steps = append(steps, [2]string{"build", "refuse"})
	for _, s := range steps {
		allAsk(t, all, 1)
		if err := failing(t, ln, path, &old, s[0], s[1]); err == nil {
			t.Fatalf("%s at %q: handed over", s[1], s[0])
		}
	}
	allAsk(t, all, 3)

	p := start(t, path, "", "")
	socket, err := ln.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	if err := Give(t.Context(), socket, old.hold, old.back, (*Load).close); err != nil {
		t.Fatal(err)
	}
	allAsk(t, all, 10)
	if len(old.all) != 0 {
		t.Errorf("%d connections are still here", len(old.all))
	}
	end()
	p.keys.Close()
	if err := p.Wait(); err != nil {
		t.Error(err, p.text)
	}
}

// failing is one attempt with a new process that does not come through it.
func failing(t *testing.T, ln *net.UnixListener, path string, old *echoes, at, do string) error {
	p := start(t, path, at, do)
	socket, err := ln.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	g := &giver{conn: newConn(t.Context(), socket), hold: old.hold, back: old.back, gone: (*Load).close, patience: patience}
	if do == "stop" {
		g.patience = 100 * time.Millisecond
	}
	err = g.give()
	if do == "stop" {
		// It wakes up again, and must see that nobody has waited for it.
		for awake := false; !awake; {
			p.Process.Signal(syscall.SIGCONT)
			select {
			case <-p.ended:
				awake = true
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	<-p.ended
	if strings.Contains(p.text.String(), "serving") {
		t.Errorf("%s at %q: the new process serves what the old one does", do, at)
	}
	return err
}

// process is a new process.
type process struct {
	*exec.Cmd
	keys  io.WriteCloser
	text  *strings.Builder // once it has ended
	ended chan struct{}
	err   error
}

func (p *process) Wait() error {
	<-p.ended
	return p.err
}

func start(t *testing.T, path, at, do string) *process {
	t.Helper()
	p := &process{Cmd: exec.Command(os.Args[0]), text: &strings.Builder{}, ended: make(chan struct{})}
	p.Env = append(os.Environ(), "HANDOVER_PATH="+path, "HANDOVER_AT="+at, "HANDOVER_DO="+do)
	p.Stdout, p.Stderr = p.text, p.text
	keys, err := p.StdinPipe()
	if err == nil {
		p.keys = keys
		err = p.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	go func() { p.err = p.Cmd.Wait(); close(p.ended) }()
	t.Cleanup(func() {
		p.Process.Kill()
		<-p.ended
	})
	return p
}

// Another user's process gets nothing, whatever the mode of the socket.
func TestOtherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can be somebody else; TestStrangers has the rule")
	}
	ln, path := listen(t)
	dir := path[:strings.LastIndex(path, "/")]
	exe, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(path, 0o666), os.WriteFile(dir+"/exe", exe, 0o755)); err != nil {
		t.Fatal(err)
	}
	p := &process{Cmd: exec.Command(dir + "/exe")}
	p.Dir, p.Env = dir, append(os.Environ(), "HANDOVER_PATH="+path)
	p.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		p.Process.Kill()
		p.Cmd.Wait()
	}()
	socket, err := ln.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	err = Give(t.Context(), socket, func(int) (*Load, error) { t.Error("held"); return nil, errors.New("held") }, nil, nil)
	if err == nil || !strings.Contains(err.Error(), "user 65534 is there") {
		t.Error(err)
	}
}
