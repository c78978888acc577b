package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/ttrpc"

	"hauberk.dev/api/hand"
)

// services are the names of the task service. The messages of version 3 are
// those of version 2 with fields that nothing here uses.
var services = []string{"containerd.task.v2.Task", "containerd.task.v3.Task"}

// method makes a verb of the service callable.
func method[Q, A any](f func(context.Context, *Q) (A, error)) ttrpc.Method {
	return func(ctx context.Context, read func(any) error) (any, error) {
		q := new(Q)
		if err := read(q); err != nil {
			return nil, err
		}
		return f(ctx, q)
	}
}

func (s *service) methods() map[string]ttrpc.Method {
	var _ task.TTRPCTaskService = s // no verb is missing
	return map[string]ttrpc.Method{
		"State": method(s.State), "Create": method(s.Create), "Start": method(s.Start), "Delete": method(s.Delete),
		"Pids": method(s.Pids), "Pause": method(s.Pause), "Resume": method(s.Resume), "Checkpoint": method(s.Checkpoint),
		"Kill": method(s.Kill), "Exec": method(s.Exec), "ResizePty": method(s.ResizePty), "CloseIO": method(s.CloseIO),
		"Update": method(s.Update), "Wait": method(s.Wait), "Stats": method(s.Stats), "Connect": method(s.Connect),
		"Shutdown": method(s.Shutdown),
	}
}

// serve answers containerd on the socket that start opened, until it is told
// to end or ctx ends. Then nothing of the container is left.
func serve(ctx context.Context, a arguments, c config) error {
	log, closeLog := openLog(a)
	defer closeLog()
	ln, k, err := inherit(a, c)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	ready := prepare(ctx, c, log)
	release := ownSocket(ln.Addr().String())
	s := &service{
		args: a, conf: c, log: log, legacy: legacyHost() && os.Getenv(eventsAddress) != "", containers: map[string]*container{}, socket: ln.Addr().String(),
		// The socket goes before containerd hears that the shim does: it may
		// start another of the same name at once.
		stop:    func() { release(); stop() },
		release: release,
		claim:   k,
		events:  startPublisher(os.Getenv(eventsAddress), a.namespace, log),
		guests:  ready.wait,
	}
	var tasks sync.WaitGroup
	tasks.Go(func() { c.sweep(ctx, log) })
	tasks.Go(func() { s.awaitBundle(ctx) })
	err = s.serve(ctx, ln)
	stop()
	tasks.Wait()
	err = errors.Join(err, s.close(), ready.close())
	if err != nil {
		err = errors.Join(err, k.leave()) // who comes next settles it
	} else {
		err = k.drop()
	}
	s.events.Close()
	if err != nil {
		log.Error("end", "err", err)
	}
	return err
}

// inherit takes over the socket and the claim from who started this process.
func inherit(a arguments, c config) (net.Listener, *claim, error) {
	unix.CloseOnExec(4)
	k := &claim{path: filepath.Join(c.claims(), machineID(a)), file: os.NewFile(4, "claim")}
	if k.file == nil || !current(k.file, k.path) {
		return nil, nil, errors.New("serve: descriptor 4 is not this shim's claim")
	}
	given := os.NewFile(3, "socket")
	ln, err := net.FileListener(given)
	if err = errors.Join(err, given.Close()); err != nil { // no child shall have it
		return nil, nil, fmt.Errorf("serve: descriptor 3: %w", err)
	}
	if u, ok := ln.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false)
	}
	return ln, k, k.note(entry{PID: os.Getpid()})
}

// awaitBundle ends a shim whose bundle was removed: whoever was to call it has
// given it up, and cannot name it any more. containerd does so, without a word,
// if it was killed while it started the shim.
func (s *service) awaitBundle(ctx context.Context) {
	for missed := 0; missed < 3; {
		select {
		case <-ctx.Done():
			return
		case <-time.After(bundleTime):
		}
		if exists(s.args.bundle) {
			missed = 0
		} else {
			missed++
		}
	}
	s.log.Error("the bundle was removed: nobody will call any more", "bundle", s.args.bundle)
	s.stopped.Do(s.stop)
}

// bundleTime is between two looks at the bundle. Of an ordinary end the bundle may
// be gone some moments before the shim.
const bundleTime = time.Second

func (s *service) serve(ctx context.Context, ln net.Listener) error {
	server, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(s.logged))
	if err != nil {
		return fmt.Errorf("serve: %w", err)
	}
	for _, name := range services {
		server.RegisterService(name, &ttrpc.ServiceDesc{Methods: s.methods()})
	}
	server.RegisterService(hand.Service, &ttrpc.ServiceDesc{Methods: s.handMethods()})
	server.RegisterService(sandboxService, &ttrpc.ServiceDesc{Methods: s.sandboxMethods()})
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(context.WithoutCancel(ctx), ln) }()
	select {
	case err := <-ended:
		return fmt.Errorf("serve: %w", err)
	case <-ctx.Done():
	}
	s.release() // while the listener is open: its file cannot be another's
	// The answer to the call that ended us is on its way; others that wait
	// for what will not come are cut off.
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	_ = server.Shutdown(bounded)
	err = server.Close()
	<-ended
	return err
}

// logged writes down calls that fail, and all of them if asked to.
func (s *service) logged(ctx context.Context, read ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, m ttrpc.Method) (any, error) {
	began := time.Now()
	out, err := m(ctx, read)
	if err != nil {
		s.log.Error("call", "method", info.FullMethod, "took", time.Since(began), "err", err)
	} else {
		s.log.Debug("call", "method", info.FullMethod, "took", time.Since(began))
	}
	return out, err
}

// preparing is the work that needs no request: it goes on while containerd
// makes the container's files.
type preparing struct {
	done   chan struct{}
	guests *guests
	err    error
}

func prepare(ctx context.Context, c config, log *slog.Logger) *preparing {
	p := &preparing{done: make(chan struct{})}
	go func() {
		defer close(p.done)
		p.guests, p.err = openGuests(c, log)
	}()
	return p
}

func (p *preparing) wait(ctx context.Context) (booter, error) {
	select {
	case <-p.done:
		if p.err != nil {
			return nil, p.err
		}
		return p.guests, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (p *preparing) close() error {
	<-p.done
	if p.guests == nil {
		return nil
	}
	return p.guests.Close()
}

// openLog opens the fifo that containerd copies to its own log. Nothing waits
// for its reader: what does not fit is dropped.
func openLog(a arguments) (*slog.Logger, func()) {
	level := slog.LevelInfo
	if a.debug {
		level = slog.LevelDebug
	}
	var w io.Writer = io.Discard
	end := func() {}
	// Both ways, so that a reader that leaves and comes back finds it open.
	if fd, err := unix.Open(filepath.Join(a.bundle, "log"), unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err == nil {
		w, end = dropping(fd), func() { _ = unix.Close(fd) }
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level})).With("shim", a.id), end
}

// dropping is a descriptor that is never waited for.
type dropping int

func (d dropping) Write(b []byte) (int, error) {
	_, _ = unix.Write(int(d), b)
	return len(b), nil
}
