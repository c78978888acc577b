package keep

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"hauberk.dev/internal/atomicfile"
	"hauberk.dev/internal/flock"
	"hauberk.dev/internal/unixsock"
	"hauberk.dev/vm"
	"hauberk.dev/vm/boot"
	"hauberk.dev/vm/pool"
	"hauberk.dev/vm/qemu"
)

// maxAsking is how many may ask at a time; others wait in the socket's queue.
const maxAsking = 64

// Config is how a keeper is set up.
type Config struct {
	Place
	Link boot.Link
	// PerSize spare machines are kept of each of the Sizes asked for last, and
	// of as many the template.
	PerSize, Sizes int
	// Idle is how long nobody must have asked before the keeper ends.
	Idle time.Duration
	// DiskLimit bounds writable disks attached to machines of the pool.
	DiskLimit int64
	Prepare   pool.Prepare // may be nil
	// Tidy, if not nil, is called now and then: a keeper is what lives on when
	// all shims are dead.
	Tidy func(ctx context.Context)
	Log  *slog.Logger
}

// keeper is a keeper that runs.
type keeper struct {
	config Config
	dir    string
	guest  *boot.Guest
	pool   *pool.Pool

	mu    sync.Mutex
	open  int // connections
	asked time.Time
}

// Run keeps machines until ctx ends or nobody has asked for long, and leaves
// nothing that is its own. It returns at once, without an error, if another
// keeper does so already.
func Run(ctx context.Context, c Config) (err error) {
	dir, err := c.keeper()
	if err != nil {
		return err
	}
	release, err := hold(dir)
	if err != nil || release == nil {
		return err
	}
	defer release()
	if err := atomicfile.Write(filepath.Join(dir, pidName), []byte(strconv.Itoa(os.Getpid())), 0o600); err != nil {
		return fmt.Errorf("keep machines: %w", err)
	}
	if err := errors.Join(sweep(ctx, dir), c.sweepOthers(ctx, dir)); err != nil {
		c.Log.Error("sweep what dead keepers left", "err", err)
	}
	ln, err := listen(dir)
	if err != nil {
		return err
	}
	defer ln.Close()
	k := &keeper{config: c, dir: dir, asked: time.Now()}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	k.guest, err = boot.Open(ctx, boot.Config{
		State: c.State, Run: dir, User: FirstUser, Kernel: c.Kernel, Agent: c.Agent, Link: c.Link, Driver: qemu.Config{MaxTemplates: max(c.Sizes, 1)},
	})
	if err != nil {
		return fmt.Errorf("keep machines: %w", err)
	}
	debug.FreeOSMemory() // a kernel and its types were read, and will not be again
	k.pool = pool.New(pool.Config{Make: k.spare, PerSize: c.PerSize, Sizes: c.Sizes,
		Failed: func(err error) { c.Log.Error("make spare machine", "err", err) }})
	return k.run(ctx, cancel, ln)
}

// run serves until ctx ends, and ends what is kept.
func (k *keeper) run(ctx context.Context, cancel context.CancelFunc, ln *net.UnixListener) error {
	var tasks sync.WaitGroup
	var pooled error
	tasks.Go(func() { pooled = k.pool.Run(ctx) })
	tasks.Go(func() { k.awaitIdle(ctx); cancel() })
	tasks.Go(func() { k.tidy(ctx) })
	tasks.Go(func() { <-ctx.Done(); ln.Close() })
	err := k.accept(ctx, ln)
	cancel()
	tasks.Wait()
	clean, done := context.WithTimeout(context.WithoutCancel(ctx), workTime)
	defer done()
	return errors.Join(err, pooled, k.guest.Close(), sweep(clean, k.dir))
}

// hold takes the lock of a keeper's directory; nil if another has it.
func hold(dir string) (release func(), err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("hold keeper's directory: %w", err)
	}
	return flock.Try(filepath.Join(dir, lockName))
}

// listen opens the socket, which only root may connect to.
func listen(dir string) (*net.UnixListener, error) {
	d, err := vm.OpenRunDir(dir)
	if err != nil {
		return nil, fmt.Errorf("open keeper's socket: %w", err)
	}
	defer d.Close()
	if err := os.Remove(filepath.Join(dir, socketName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open keeper's socket: %w", err)
	}
	f, err := d.Listen(socketName)
	if err != nil {
		return nil, fmt.Errorf("open keeper's socket: %w", err)
	}
	defer f.Close()
	if err := os.Chmod(filepath.Join(dir, socketName), 0o600); err != nil {
		return nil, fmt.Errorf("open keeper's socket: %w", err)
	}
	ln, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("open keeper's socket: %w", err)
	}
	u := ln.(*net.UnixListener)
	u.SetUnlinkOnClose(false)
	return u, nil
}

// awaitIdle returns when nobody has asked for long, or nobody can ask any more:
// the directory was removed.
func (k *keeper) awaitIdle(ctx context.Context) {
	for {
		if _, err := os.Stat(filepath.Join(k.dir, socketName)); errors.Is(err, fs.ErrNotExist) {
			return
		}
		k.mu.Lock()
		left := k.config.Idle - time.Since(k.asked)
		if k.open > 0 {
			left = k.config.Idle
		}
		k.mu.Unlock()
		if left <= 0 || ctx.Err() != nil {
			return
		}
		select {
		case <-time.After(min(left, lookTime)):
		case <-ctx.Done():
		}
	}
}

// tidy bounds the keeper's log, and calls what puts away what others left, until
// ctx ends.
func (k *keeper) tidy(ctx context.Context) {
	for {
		if err := trim(filepath.Join(k.dir, logName)); err != nil {
			k.config.Log.Error("bound this log", "err", err)
		}
		if k.config.Tidy != nil {
			k.config.Tidy(ctx)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(tidyTime):
		}
	}
}

// trim empties a log that has become too long. Its writers append.
func trim(log string) error {
	fi, err := os.Stat(log)
	if errors.Is(err, fs.ErrNotExist) || err == nil && fi.Size() <= maxLog {
		return nil // nobody asked for one, or there is room
	}
	return errors.Join(err, os.Truncate(log, 0))
}

func (k *keeper) accept(ctx context.Context, ln *net.UnixListener) error {
	var askers sync.WaitGroup
	defer askers.Wait()
	slots := make(chan struct{}, maxAsking)
	for {
		conn, err := ln.AcceptUnix()
		if ctx.Err() != nil {
			return nil // the listener was closed
		}
		if err != nil {
			return fmt.Errorf("keep machines: %w", err)
		}
		slots <- struct{}{}
		k.count(1)
		askers.Go(func() {
			defer func() { conn.Close(); k.count(-1); <-slots }()
			if err := k.serve(ctx, conn); err != nil {
				k.config.Log.Error("give machine", "err", err)
			}
		})
	}
}

func (k *keeper) count(n int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.open += n
	k.asked = time.Now()
}

// serve answers one request.
func (k *keeper) serve(ctx context.Context, conn *net.UnixConn) error {
	if err := unixsock.OnlyRoot(conn); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, workTime)
	defer cancel()
	in := bufio.NewReaderSize(conn, maxLine)
	conn.SetDeadline(time.Now().Add(patience))
	line, err := in.ReadSlice('\n')
	if err != nil {
		return fmt.Errorf("read request: %w", err)
	}
	r, err := parseRequest(line)
	if err != nil {
		return errors.Join(err, say(conn, answer{Error: err.Error()}))
	}
	conn.SetDeadline(time.Now().Add(workTime + patience))
	m, how, err := k.machine(ctx, r, func(text string) { _ = say(conn, answer{Progress: text}) })
	if err != nil {
		return errors.Join(err, say(conn, answer{Error: err.Error()}))
	}
	return k.give(m, how, r, conn, in)
}

// give hands a machine over. Until the asker says that it has it, the machine is
// the keeper's to end.
func (k *keeper) give(m *vm.Machine, how string, r Request, conn *net.UnixConn, in *bufio.Reader) error {
	files, err := filesOf(m)
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	if err == nil {
		err = m.Become(k.config.Machines(), r.ID)
	}
	if err != nil {
		return errors.Join(err, say(conn, answer{Error: err.Error()}), end(m))
	}
	dir := m.Dir()
	if err := m.Release(); err != nil {
		k.config.Log.Error("let go of machine", "id", r.ID, "err", err)
	}
	conn.SetDeadline(time.Now().Add(patience))
	err = say(conn, answer{Dir: dir, How: how}, files...)
	var word string
	if err == nil {
		word, err = in.ReadString('\n')
	}
	if err == nil && word != taken {
		err = fmt.Errorf("it says %.32q", word)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("hand over machine %s: %w", r.ID, err), endIn(dir))
	}
	return nil
}

// machine finds or makes a machine.
func (k *keeper) machine(ctx context.Context, r Request, progress func(string)) (*vm.Machine, string, error) {
	mib, cpus := vm.SizeClass(r.MemoryMiB, r.CPUs)
	spec := k.guest.Template(mib, cpus, r.TrustDomain)
	if r.Shared { // none is kept: it has a copy of its template's memory
		m, err := k.clone(ctx, spec, true, progress)
		return m, FromTemplate, err
	}
	if m := k.pool.Take(spec); m != nil {
		if err := m.Resume(ctx); err != nil {
			return nil, "", errors.Join(err, end(m))
		}
		return m, FromPool, nil
	}
	m, err := k.clone(ctx, spec, false, progress)
	return m, FromTemplate, err
}

// clone makes a machine that is nobody's.
func (k *keeper) clone(ctx context.Context, spec vm.TemplateSpec, shared bool, progress func(string)) (*vm.Machine, error) {
	// Made before the lock is taken, which others need.
	if _, err := k.guest.Driver.Template(ctx, spec, progress); err != nil {
		return nil, err
	}
	user, release, err := k.config.User(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	return k.guest.Clone(ctx, vm.Spec{
		ID: "spare-" + strings.ToLower(rand.Text()[:12]), Spare: true, UID: user, GID: user,
		Template: spec, Shared: shared, DiskLimit: k.config.DiskLimit, Journaled: release,
	}, progress)
}

// spare makes a machine for the pool.
func (k *keeper) spare(ctx context.Context, spec vm.TemplateSpec) (*vm.Machine, error) {
	ctx, cancel := context.WithTimeout(ctx, workTime)
	defer cancel()
	m, err := k.clone(ctx, spec, false, nil)
	if err != nil {
		return nil, err
	}
	if err := pool.Ready(ctx, m, k.config.Prepare); err != nil {
		return nil, errors.Join(err, end(m))
	}
	return m, nil
}

// User gives a user that no machine has, and keeps others from choosing one
// until release is called, which may be called again.
func (p Place) User(ctx context.Context) (user uint32, release func(), err error) {
	unlock, err := flock.Take(ctx, p.userLock())
	if err != nil {
		return 0, nil, err
	}
	release = sync.OnceFunc(unlock)
	parents, err := p.parents()
	if err == nil {
		user, err = vm.FreeUser(FirstUser+1, CountUsers-1, parents...)
	}
	if err != nil {
		release()
		return 0, nil, err
	}
	return user, release, nil
}

// filesOf gives what a machine loses when it is let go of: its tap and, of one
// that waits, the line to its agent.
func filesOf(m *vm.Machine) (files []*os.File, err error) {
	tap, err := dup(m.Tap())
	if err != nil {
		return nil, err
	}
	files = append(files, tap)
	if line, ok := m.Line().(*net.UnixConn); ok {
		f, err := line.File()
		if err != nil {
			return files, err
		}
		files = append(files, f)
	}
	return files, nil
}

// say sends one answer, with files.
func say(conn *net.UnixConn, a answer, files ...*os.File) error {
	line, err := json.Marshal(a)
	if err != nil {
		return err
	}
	return unixsock.Send(conn, append(line, '\n'), files...)
}

// dup gives a file of its own on what f is.
func dup(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

func end(m *vm.Machine) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return m.Kill(ctx)
}

// endIn ends the machine of a run directory.
func endIn(dir string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return vm.OrphanIn(dir).End(ctx)
}
