// Package succession has processes take each other's place, as upgrades of a proxy
// do, some of which are killed on the way. Each is the test's own program.
//
// It knows no proxy and judges no connection: what a process does is the test's to
// say, and so is what must not be noticed of it.
package succession

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"
	"time"
)

// What tells the test's program which part it plays.
const (
	roleEnv = "HAUBERK_TEST_SUCCESSION" // "first" or "next"
	dirEnv  = "HAUBERK_TEST_SUCCESSION_DIR"
	diesEnv = "HAUBERK_TEST_SUCCESSION_DIES"
)

// Part is what one process plays.
type Part struct {
	First bool          // or else it takes the place of the one that is there
	Dir   string        // of all of them
	Dies  time.Duration // it is to be killed so long after Doom; 0 is not at all
}

// Doom has the process killed when it is time.
func (p Part) Doom() {
	time.AfterFunc(p.Dies, func() { syscall.Kill(os.Getpid(), syscall.SIGKILL) })
}

// Main is the TestMain of a package with successions: it runs the tests or, in a
// process that was started for it, a part. That prints a line once it serves, the
// same as its first did, and ends with the context.
func Main(m *testing.M, play func(ctx context.Context, p Part) error) {
	role := os.Getenv(roleEnv)
	if role == "" {
		os.Exit(m.Run())
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() { // with the test
		os.Stdin.Read(make([]byte, 1))
		cancel()
	}()
	dies, err := time.ParseDuration(os.Getenv(diesEnv))
	if err == nil {
		err = play(ctx, Part{First: role == "first", Dir: os.Getenv(dirEnv), Dies: dies})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, role, os.Getpid(), err)
		os.Exit(1)
	}
	os.Exit(0)
}

// Line is the processes that follow each other.
type Line struct {
	// Serves is the line that the first printed.
	Serves string

	t        testing.TB
	dir      string
	now      *exec.Cmd
	in, hold *os.File // the end of hold ends the processes

	mu   sync.Mutex
	logs bytes.Buffer
}

// Start starts the first process, which serves when it returns. End is to be called.
func Start(t testing.TB, dir string) *Line {
	t.Helper()
	l := &Line{t: t, dir: dir}
	var err error
	if l.in, l.hold, err = os.Pipe(); err != nil {
		t.Fatal(err)
	}
	if l.now, l.Serves, err = l.start("first", 0); err != nil {
		l.End()
		t.Fatalf("the first process does not serve: %v\n%s", err, l.Log())
	}
	return l
}

// start starts a process and waits for its line.
func (l *Line) start(role string, dies time.Duration) (c *exec.Cmd, line string, err error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, "", err
	}
	c = exec.Command(exe)
	c.Env = append(os.Environ(), roleEnv+"="+role, dirEnv+"="+l.dir, diesEnv+"="+dies.String())
	c.Stderr, c.Stdin = l, l.in
	out, err := c.StdoutPipe()
	if err != nil {
		return nil, "", err
	}
	if err := c.Start(); err != nil {
		return nil, "", err
	}
	line, err = bufio.NewReader(out).ReadString('\n')
	return c, line, err
}

// Next has a new process take the place of the one there is, which then ends.
func (l *Line) Next() {
	l.t.Helper()
	c, serves, err := l.start("next", 0)
	if err == nil && serves != l.Serves {
		err = fmt.Errorf("it says %q, and the first said %q", serves, l.Serves)
	}
	if err != nil {
		l.t.Fatalf("the next process does not serve: %v\n%s", err, l.Log())
	}
	before := l.now
	l.now = c
	if err := before.Wait(); err != nil {
		l.t.Errorf("the process before ended: %v", err)
	}
}

// Fail has a new process try, and be killed at some moment within a duration.
func (l *Line) Fail(within time.Duration) {
	l.t.Helper()
	c, _, err := l.start("next", time.Microsecond+rand.N(within))
	if err == nil {
		l.t.Fatal("a process that was to be killed serves")
	}
	if c == nil {
		l.t.Fatal(err)
	}
	if err := c.Wait(); err == nil || c.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		l.t.Errorf("a process that was to be killed ended with %v", err)
	}
}

// End ends the process there is, and shows what all have said if the test has failed.
func (l *Line) End() {
	l.hold.Close()
	if l.now != nil {
		if err := l.now.Wait(); err != nil {
			l.t.Errorf("the last process ended: %v", err)
		}
	}
	l.in.Close()
	if l.t.Failed() {
		l.t.Logf("processes:\n%s", l.Log())
	}
}

// Write takes what a process says.
func (l *Line) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.logs.Write(b)
}

// Log is what the processes have said.
func (l *Line) Log() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.logs.String()
}
