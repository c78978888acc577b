package share

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"hauberk.dev/api/node"
	"hauberk.dev/guard"
	"hauberk.dev/guard/trail"
	loader "hauberk.dev/guest/guard"
	"hauberk.dev/internal/unixsock"
)

// Options of a Loader.
type Options struct {
	Bundle []byte
	Pins   string // directory in a BPF file system
	State  string // directory of what is bound, for the loader after this one
	Node   string // its name in records
	// Records of what the Guard saw are written here, a line of JSON each.
	Records io.Writer
}

// Loader holds the Guard of this kernel. All of it is done by the first thread
// of the process.
type Loader struct {
	o         Options
	kernel    *loader.Shared
	bound     map[string]*container // by the runtime's name
	asks      chan question
	trail     trail.Trail
	compilers map[uint32]*container
}

// container is what is known of one that is bound.
type container struct {
	id       string
	owner    uint32
	turn     uint32 // of its policies
	compiled *guard.Compiled
}

// question is a request on its way to the first thread.
type question struct {
	r     request
	files []*os.File
	reply chan Answer
}

const (
	tick      = 10 * time.Second
	patience  = 30 * time.Second
	pollMilli = 500
)

// Open attaches the programs, or takes those over that are attached.
func Open(o Options) (*Loader, error) {
	if err := os.MkdirAll(o.Pins, 0o700); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(o.State, 0o700); err != nil {
		return nil, err
	}
	l := &Loader{o: o, bound: map[string]*container{}, compilers: map[uint32]*container{}, asks: make(chan question)}
	l.trail.Sandbox = trail.Sandbox{ID: o.Node, Node: o.Node}
	l.trail.Container = func(n uint32) string {
		if c := l.compilers[n]; c != nil {
			return c.id
		}
		return strconv.FormatUint(uint64(n), 10)
	}
	if err := l.remember(); err != nil {
		return nil, err
	}
	var err error
	if l.kernel, err = loader.AttachShared(o.Bundle, o.Pins); err != nil {
		return nil, err
	}
	// What ended while there was no loader, or never came to be.
	l.sweep()
	for _, c := range l.bound {
		if !l.kernel.Bound(c.owner) {
			l.remove(c)
		}
	}
	return l, nil
}

// remember reads who was bound before this process.
func (l *Loader) remember() error {
	names, err := os.ReadDir(l.o.State)
	if err != nil {
		return err
	}
	for _, n := range names {
		raw, err := os.ReadFile(filepath.Join(l.o.State, n.Name()))
		if err != nil {
			return err
		}
		owner, err := strconv.ParseUint(strings.TrimSpace(string(raw)), 10, 32)
		if err != nil || !containerID.MatchString(n.Name()) {
			return fmt.Errorf("read %s in %s: not a container that was bound: %w", n.Name(), l.o.State, err)
		}
		l.add(&container{id: n.Name(), owner: uint32(owner)})
	}
	return nil
}

func (l *Loader) add(c *container) {
	l.bound[c.id], l.compilers[c.owner] = c, c
}

func (l *Loader) remove(c *container) {
	delete(l.bound, c.id)
	delete(l.compilers, c.owner)
	_ = os.Remove(filepath.Join(l.o.State, c.id))
}

// Run serves a socket until ctx ends. What is bound stays bound.
func (l *Loader) Run(ctx context.Context, ln *net.UnixListener) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	served := make(chan error, 1)
	go func() { served <- l.accept(ctx, ln) }()
	rang := make(chan struct{})
	go l.wait(ctx, rang)
	recount := time.NewTicker(tick)
	defer recount.Stop()
	for {
		select {
		case a := <-l.asks:
			a.reply <- l.answer(a.r, a.files)
		case <-rang:
		case <-recount.C:
			l.kernel.Recount()
			l.sweep()
		case err := <-served:
			return err
		}
		l.drain()
	}
}

// wait says when there are records.
func (l *Loader) wait(ctx context.Context, rang chan<- struct{}) {
	for ctx.Err() == nil {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(l.kernel.Ring()), Events: unix.POLLIN}}, pollMilli)
		if err != nil && err != unix.EINTR {
			return
		}
		if n <= 0 {
			continue
		}
		select {
		case rang <- struct{}{}:
		case <-ctx.Done():
		}
	}
}

func (l *Loader) accept(ctx context.Context, ln *net.UnixListener) error {
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	for {
		conn, err := ln.AcceptUnix()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		go l.serve(ctx, conn)
	}
}

// serve hears one request and answers it.
func (l *Loader) serve(ctx context.Context, conn *net.UnixConn) {
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	a, err := l.hear(ctx, conn)
	if err != nil {
		a = Answer{Error: err.Error()}
	}
	if packet, err := json.Marshal(a); err == nil {
		_, _ = conn.Write(packet)
	}
}

func (l *Loader) hear(ctx context.Context, conn *net.UnixConn) (Answer, error) {
	if err := unixsock.OnlyRoot(conn); err != nil {
		return Answer{}, err
	}
	r, files, err := heard(conn)
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	if err != nil {
		return Answer{}, err
	}
	a := question{r, files, make(chan Answer, 1)}
	select {
	case l.asks <- a:
		return <-a.reply, nil
	case <-ctx.Done():
		return Answer{}, errors.New("the loader is ending")
	}
}

func (l *Loader) answer(r request, files []*os.File) Answer {
	a, err := l.do(r, files)
	if err != nil {
		a.Error = fmt.Sprintf("%s container %s: %v", r.Op, r.ID, err)
	}
	return a
}

func (l *Loader) do(r request, files []*os.File) (Answer, error) {
	if r.Op == opBind {
		return l.bind(r, files)
	}
	c := l.bound[r.ID]
	if c == nil {
		return Answer{}, errors.New("it is not bound")
	}
	switch r.Op {
	case opUnbind:
		l.remove(c)
		return Answer{Owner: c.owner}, l.kernel.Unbind(c.owner)
	case opPolicy:
		return l.change(c, r.Policies)
	case opStatus:
		return l.status(c)
	}
	return Answer{}, errors.New("no such request")
}

func (l *Loader) bind(r request, files []*os.File) (Answer, error) {
	if len(files) != maxFiles {
		return Answer{}, fmt.Errorf("it came with %d descriptors, not %d", len(files), maxFiles)
	}
	if l.bound[r.ID] != nil {
		return Answer{}, errors.New("it is bound already")
	}
	l.sweep()
	owner, err := l.kernel.Reserve()
	if err != nil {
		return Answer{}, err
	}
	c := &container{id: r.ID, owner: owner, turn: 1}
	compiled, err := compile(c, r.Policies)
	if err != nil {
		return Answer{}, err
	}
	// Known before it is in force: one that is bound and forgotten could not be
	// let go.
	if err := os.WriteFile(filepath.Join(l.o.State, c.id), fmt.Appendln(nil, owner), 0o600); err != nil {
		return Answer{}, err
	}
	w := loader.Workload{Devices: r.Devices}
	if w.Root, err = dup(files[0]); err == nil {
		if w.Cgroup, err = dup(files[1]); err != nil {
			unix.Close(w.Root)
		}
	}
	var reply []byte
	if err == nil {
		reply, err = l.kernel.Bind(owner, w, compiled.Generation, compiled.Blob)
	}
	a, err := l.applied(c, compiled, reply, err)
	if err != nil {
		_ = os.Remove(filepath.Join(l.o.State, c.id))
		return Answer{}, err
	}
	l.add(c)
	return a, nil
}

func compile(c *container, policies []node.NamedGuardPolicy) (*guard.Compiled, error) {
	compiled, err := guard.Compile(node.Guard{Generation: guard.SharedGeneration(c.owner, c.turn), Policies: policies}, guard.CompileFacts{Shared: true})
	return &compiled, err
}

// change puts other policies in force; if it fails, those before stay.
func (l *Loader) change(c *container, policies []node.NamedGuardPolicy) (Answer, error) {
	next := &container{id: c.id, owner: c.owner, turn: c.turn + 1}
	compiled, err := compile(next, policies)
	if err != nil {
		return Answer{}, err
	}
	reply, err := l.kernel.Policy(c.owner, compiled.Generation, compiled.Blob)
	return l.applied(c, compiled, reply, err)
}

// applied takes down what became of a policy.
func (l *Loader) applied(c *container, compiled *guard.Compiled, reply []byte, err error) (Answer, error) {
	if err != nil {
		return Answer{}, err
	}
	result, err := compiled.Applied(reply)
	if err != nil {
		return Answer{}, err
	}
	c.turn, c.compiled = uint32(compiled.Generation), compiled
	a := Answer{Owner: c.owner, Generation: c.turn, Digest: compiled.Digest}
	for _, id := range result.Absent {
		if rule, ok := compiled.Rule(id); ok {
			a.Absent = append(a.Absent, rule.Text)
		}
	}
	return a, nil
}

func (l *Loader) status(c *container) (Answer, error) {
	st, err := guard.DecodeStatus(l.kernel.Status(c.owner, nil))
	if err != nil {
		return Answer{}, err
	}
	return Answer{Owner: c.owner, Generation: uint32(st.Generation), Digest: st.Digest, Programs: int(st.Programs), Denied: st.Sequence}, nil
}

// sweep lets go of those whose cgroups are gone.
func (l *Loader) sweep() {
	for _, owner := range l.kernel.Sweep() {
		if c := l.compilers[owner]; c != nil {
			l.remove(c)
		}
	}
}

// drain writes down what the Guard saw.
func (l *Loader) drain() {
	l.kernel.Drain(func(record []byte) bool {
		e, err := guard.DecodeEvents(record)
		if err != nil {
			return true // what the kernel wrote is of this tree; there is nobody to tell
		}
		var policy trail.Policy
		digest := ""
		if c := l.compilers[e.Container]; c != nil && c.compiled != nil {
			policy, digest = c.compiled, c.compiled.Digest
		}
		_ = trail.Write(l.o.Records, trail.JSON, l.trail.Record(e, policy, digest, time.Now()))
		return true
	})
}

func dup(f *os.File) (int, error) {
	return unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
}
