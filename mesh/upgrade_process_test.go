package mesh

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"hauberk.dev/mesh/handover"
)

// roleEnv makes the test's program a proxy of its own: "first" or "next", which
// takes the place of the one that is there. dieEnv has it killed on the way.
const (
	roleEnv = "HAUBERK_TEST_PROXY"
	dirEnv  = "HAUBERK_TEST_PROXY_DIR"
	dieEnv  = "HAUBERK_TEST_PROXY_DIES"
)

func TestMain(m *testing.M) {
	if role := os.Getenv(roleEnv); role != "" {
		if err := proxyMain(role, os.Getenv(dirEnv), os.Getenv(dieEnv)); err != nil {
			fmt.Fprintln(os.Stderr, role, os.Getpid(), err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func meshSocket(dir string) string { return filepath.Join(dir, "mesh.sock") }
func doorSocket(dir string) string { return filepath.Join(dir, "next.sock") }

// proxyMain does what hauberk-mesh does.
func proxyMain(role, dir, dies string) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	p := New(Options{Log: log, Connections: 4096})
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() { // with the test
		os.Stdin.Read(make([]byte, 1))
		cancel()
	}()
	if role == "next" && dies != "" {
		return dieOnTheWay(ctx, p, dir, dies)
	}
	var nodes, door *net.UnixListener
	var err error
	if role == "next" {
		nodes, door, err = p.TakeOver(ctx, doorSocket(dir))
	} else {
		nodes, err = net.ListenUnix("unixpacket", &net.UnixAddr{Name: meshSocket(dir), Net: "unixpacket"})
		if err == nil {
			door, err = net.ListenUnix("unixpacket", &net.UnixAddr{Name: doorSocket(dir), Net: "unixpacket"})
		}
	}
	if err != nil {
		return err
	}
	fmt.Println("serving")
	given := make(chan error, 1)
	go func() { given <- p.GiveOver(ctx, door) }()
	return errors.Join(p.Run(ctx, nodes), <-given)
}

// dieOnTheWay takes over and kills itself so many microseconds after it has begun
// to ask, but before it has answered.
func dieOnTheWay(ctx context.Context, p *Proxy, dir, dies string) error {
	after, err := strconv.Atoi(dies)
	if err != nil {
		return err
	}
	kill := func() { syscall.Kill(os.Getpid(), syscall.SIGKILL) }
	p.mu.Lock()
	p.ctx = ctx
	p.mu.Unlock()
	time.AfterFunc(time.Duration(after)*time.Microsecond, kill)
	return handover.Take(ctx, doorSocket(dir), func(l *handover.Load) (func(), error) {
		_, err := p.build(l, true)
		fmt.Fprintln(os.Stderr, "built", len(l.Items), err)
		select {} // until it is killed
	})
}

// succession is the proxies that follow each other.
type succession struct {
	t    testing.TB
	dir  string
	now  *exec.Cmd
	hold *os.File // the end of which ends the proxies
	in   *os.File
	logs bytes.Buffer
	mu   sync.Mutex
}

func (s *succession) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.logs.Write(b)
}

// start starts a proxy and waits until it serves.
func (s *succession) start(role, dies string) (*exec.Cmd, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	c := exec.Command(exe)
	c.Env = append(os.Environ(), roleEnv+"="+role, dirEnv+"="+s.dir, dieEnv+"="+dies)
	c.Stderr, c.Stdin = s, s.in
	out, err := c.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := c.Start(); err != nil {
		return nil, err
	}
	_, err = out.Read(make([]byte, 16))
	return c, err
}

// next has a new proxy take the place of the one there is.
func (s *succession) next() {
	s.t.Helper()
	c, err := s.start("next", "")
	if err != nil {
		s.t.Fatalf("the next proxy does not serve: %v\n%s", err, s.logs.String())
	}
	if err := s.now.Wait(); err != nil {
		s.t.Errorf("the proxy before ended: %v", err)
	}
	s.now = c
}

// fail has a new proxy try, and die.
func (s *succession) fail() {
	s.t.Helper()
	c, err := s.start("next", strconv.Itoa(1+rand.IntN(60_000)))
	if err == nil {
		s.t.Fatal("a proxy that was to be killed serves")
	}
	if err := c.Wait(); err == nil || c.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		s.t.Errorf("a proxy that was to be killed ended with %v", err)
	}
}

func newSuccession(t testing.TB, dir string) *succession {
	s := &succession{t: t, dir: dir}
	var err error
	if s.in, s.hold, err = os.Pipe(); err != nil {
		t.Fatal(err)
	}
	if s.now, err = s.start("first", ""); err != nil {
		t.Fatalf("%v\n%s", err, s.logs.String())
	}
	return s
}

// told logs how long the hand-overs took, by the words of those who gave.
func (s *succession) told(t testing.TB) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []time.Duration
	for _, m := range regexp.MustCompile(`handed over" took=(\S+)`).FindAllStringSubmatch(s.logs.String(), -1) {
		d, err := time.ParseDuration(m[1])
		if err != nil {
			t.Error(err)
		}
		all = append(all, d)
	}
	if len(all) == 0 {
		t.Error("nobody says that he has handed over")
		return
	}
	slices.Sort(all)
	t.Logf("%d hand-overs took %v, median %v, at most %v", len(all), all[0].Round(time.Millisecond), all[len(all)/2].Round(time.Millisecond), all[len(all)-1].Round(time.Millisecond))
}

func (s *succession) end() {
	s.hold.Close()
	if err := s.now.Wait(); err != nil {
		s.t.Errorf("the last proxy ended: %v", err)
	}
	s.in.Close()
	if s.t.Failed() {
		s.t.Logf("proxies:\n%s", s.logs.String())
	}
}

// Nobody notices that the proxy is replaced, again and again, by another process,
// nor that some of those die before they have its place: no request fails and no
// connection is reset, counted by the callers.
//
// HAUBERK_TEST_UPGRADES=1000 has 1,000 connections and 20 upgrades, instead of
// fewer that take seconds.
func TestUpgrade(t *testing.T) {
	n, guests, upgrades, deaths := 10*len(protocols), 4*len(protocols), 4, 2
	if v := os.Getenv("HAUBERK_TEST_UPGRADES"); v != "" {
		all, err := strconv.Atoi(v)
		if err != nil {
			t.Fatal(err)
		}
		n, upgrades, deaths = all, 15, 5
	}
	w, bank, web := callWorldOf(t, n+guests, true)
	c := newCallers(t, w, bank, web, n, guests)
	c.progress(1)
	t.Logf("%d connections, %d requests and streams under way", c.open.Load(), c.flight.Load())
	turns := make([]bool, upgrades+deaths)
	for i := range deaths {
		turns[i] = true
	}
	rand.Shuffle(len(turns), func(i, j int) { turns[i], turns[j] = turns[j], turns[i] })
	for i, dies := range turns {
		began := time.Now()
		if dies {
			w.line.fail()
		} else {
			w.line.next()
			w.reconnect()
		}
		t.Logf("%d: dies %v, %v; %d connections, %d under way", i+1, dies, time.Since(began).Round(time.Millisecond), c.open.Load(), c.flight.Load())
		c.progress(1)
	}
	stats, err := w.link.Stats(t.Context())
	if err != nil || stats.Sandboxes["bank-1"].Total < uint64(n+guests) {
		t.Errorf("%d connections counted of %d, %v: counts have not gone along", stats.Sandboxes["bank-1"].Total, n+guests, err)
	}
	if failed, resets := c.end(); failed != 0 || resets != 0 {
		t.Errorf("%d requests failed, %d connections were reset", failed, resets)
	}
	w.line.told(t)
}
