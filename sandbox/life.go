package sandbox

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"hauberk.dev/internal/atomicfile"
	"hauberk.dev/internal/flock"
	"hauberk.dev/shim/client"
)

const (
	// cleanup bounds what removing may take.
	cleanup = 60 * time.Second
	// maxLog is how much of the output is kept, at least.
	maxLog = 16 << 20
)

// Create makes a sandbox and its container, ready to start. A Create that fails
// leaves nothing; one that is killed leaves what Remove removes.
func (h *Host) Create(ctx context.Context, o Options) (*Sandbox, error) {
	if err := o.check(); err != nil {
		return nil, fmt.Errorf("create sandbox: %w", err)
	}
	img, err := h.image(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("create sandbox: %w", err)
	}
	p, err := o.process(img)
	if err != nil {
		return nil, fmt.Errorf("create sandbox: %w", err)
	}
	b, err := h.create(ctx, o, img, p, origin{})
	if err != nil {
		return nil, fmt.Errorf("create sandbox: %w", err)
	}
	return b, nil
}

// origin is the snapshot that a sandbox goes on from, if any.
type origin struct {
	dir string
	id  string // of the sandbox that was saved
}

// create makes a sandbox, or leaves nothing.
func (h *Host) create(ctx context.Context, o Options, img Image, p process, from origin) (*Sandbox, error) {
	if len(h.conf.Run) > maxRun {
		return nil, fmt.Errorf("directory %s: its name has more than %d bytes, sockets in it would have none left", h.conf.Run, maxRun)
	}
	b, held, err := h.claim(ctx, &o, img, p, from)
	if err != nil {
		return nil, err
	}
	defer held.Close()
	if err := b.make(ctx, o, img, p, from, held); err != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanup)
		defer cancel()
		return nil, errors.Join(err, b.removeLocked(ctx))
	}
	return b, nil
}

// claim gives a sandbox its ID, its name and its record. Its lock is held by the
// file.
func (h *Host) claim(ctx context.Context, o *Options, img Image, p process, from origin) (_ *Sandbox, held *os.File, err error) {
	release, err := h.lock(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer release()
	var id [idLength / 2]byte
	rand.Read(id[:]) // never fails
	b := h.box(hex.EncodeToString(id[:]))
	if o.Name == "" {
		o.Name = h.freeName()
	}
	if err := h.free(o.Name); err != nil {
		return nil, nil, err
	}
	if err := os.Mkdir(b.dir, 0o700); err != nil {
		return nil, nil, err
	}
	if held, err = flock.Hold(ctx, filepath.Join(b.dir, lockName)); err == nil {
		i := o.info(img, p)
		i.ID, i.Created, i.From = b.id, time.Now(), from.id
		err = b.write(record{Options: *o, Info: i, Process: p, Image: img})
	}
	if err == nil {
		err = os.Symlink(b.id, filepath.Join(h.names(), o.Name))
	}
	if err != nil {
		if held != nil {
			_ = held.Close() // it was only locked
		}
		return nil, nil, errors.Join(err, os.RemoveAll(b.dir))
	}
	return b, held, nil
}

// free refuses a name that a sandbox has; a name without one is given up.
func (h *Host) free(name string) error {
	link := filepath.Join(h.names(), name)
	id, err := os.Readlink(link)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case validID.MatchString(id) && h.box(id).exists():
		return fmt.Errorf("name %q: %w: by %s; remove it with hauberk rm, or choose another", name, ErrTaken, id)
	}
	return os.Remove(link)
}

// make has the shim make the container. Who removes what a killed program left
// waits for the lock, and so until the shim that was being started says where
// it is.
func (b *Sandbox) make(ctx context.Context, o Options, img Image, p process, from origin, held *os.File) error {
	for _, dir := range []string{b.bundle(), b.run} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	net, ports, err := b.openNetwork(ctx, o)
	if err != nil {
		return err
	}
	config, err := o.configuration(b.id, p, net)
	if err != nil {
		return err
	}
	// The shim writes its log to what is there, and nothing if there is nothing.
	if err := errors.Join(
		atomicfile.Write(filepath.Join(b.bundle(), "config.json"), config, 0o600),
		atomicfile.Write(b.shimLog(), nil, 0o600),
	); err != nil {
		return err
	}
	slow := "making its machine; the first of a size takes longest, later ones are copies of it"
	if from.dir != "" {
		slow = "restoring its machine from " + from.dir
	}
	stop := b.tell(slow)
	defer stop()
	program := b.program()
	program.Held = held
	s, err := client.Start(ctx, program)
	if err != nil {
		return err
	}
	defer s.Close()
	if _, err := s.Create(ctx, client.Create{
		ID: b.id, Bundle: b.bundle(), Streams: b.streams(o), Snapshot: from.dir,
		Root: []client.Mount{{Type: "erofs", Source: img.Path, Options: []string{"ro", "hauberk.sha256=" + img.ErofsSHA256}}},
	}); err != nil {
		return err
	}
	r, err := b.read()
	if err != nil {
		return err
	}
	r.Made, r.Info.Ports = true, ports
	if from.dir != "" { // it runs already
		r.Info.Started = time.Now()
	}
	return b.write(r)
}

// streams of the first process: the shim serves and keeps them.
func (b *Sandbox) streams(o Options) client.Streams {
	name := "attach://" + b.socket() + fmt.Sprintf("?log=%s&size=%d", b.log(), maxLog)
	s := client.Streams{Stdout: name, Stderr: name, Terminal: o.Terminal}
	if o.Terminal {
		s.Stderr = ""
	}
	if o.Stdin {
		s.Stdin = name
	}
	return s
}

// dial connects to the shim of a sandbox that is there.
func (b *Sandbox) dial(ctx context.Context, what string) (*client.Shim, error) {
	if !b.exists() {
		return nil, fmt.Errorf("%s %s: %w", what, b.id, ErrNotFound)
	}
	s, err := client.Dial(ctx, b.bundle())
	if errors.Is(err, client.ErrGone) {
		return nil, fmt.Errorf("%s %s: %w", what, b.id, ErrNotRunning)
	}
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", what, b.id, err)
	}
	return s, nil
}

// with calls the shim.
func (b *Sandbox) with(ctx context.Context, what string, f func(*client.Shim) error) error {
	s, err := b.dial(ctx, what)
	if err != nil {
		return err
	}
	defer s.Close()
	switch err := f(s); {
	case errors.Is(err, client.ErrGone), errors.Is(err, client.ErrNotFound):
		return fmt.Errorf("%s %s: %w", what, b.id, ErrNotRunning)
	case err != nil:
		return fmt.Errorf("%s %s: %w", what, b.id, err)
	}
	return nil
}

// ProgramError says that a program could not be run.
type ProgramError struct {
	// Code is 127 if it is not there, 126 if it cannot be run.
	Code int
	Err  error
}

func (e *ProgramError) Error() string { return e.Err.Error() }
func (e *ProgramError) Unwrap() error { return e.Err }

// Start starts the container's process. The error is a *ProgramError if its
// program could not be run; then the sandbox has ended.
func (b *Sandbox) Start(ctx context.Context) error {
	unlock, err := b.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	r, err := b.read()
	if err != nil {
		return err
	}
	if r.Exit != nil || !r.Info.Started.IsZero() {
		return fmt.Errorf("start %s: it was started before: a sandbox runs once", b.id)
	}
	r.Info.Started = time.Now()
	if err := b.write(r); err != nil {
		return err
	}
	return b.with(ctx, "start", func(s *client.Shim) error {
		return explain(ctx, s, b.id, "", s.Start(ctx, b.id, ""))
	})
}

// lastWords bounds how long a process that could not be run takes to end.
const lastWords = 5 * time.Second

// explain says of a start that failed whether the program is to blame.
func explain(ctx context.Context, s *client.Shim, id, exec string, err error) error {
	if err == nil || errors.Is(err, client.ErrGone) || errors.Is(err, client.ErrNotFound) {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, lastWords)
	defer cancel()
	for {
		st, stateErr := s.State(ctx, id, exec)
		if stateErr != nil {
			return err
		}
		if st.Phase == client.Stopped {
			if c := st.Exit.Code; c == notFound || c == notRun {
				return &ProgramError{Code: c, Err: err}
			}
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Codes of programs that could not be run, as shells have them.
const (
	notRun   = 126
	notFound = 127
)

// Wait waits for the end of the container, and notes it.
func (b *Sandbox) Wait(ctx context.Context) (Exit, error) {
	watch, err := b.flock(flock.Try, ".watch")
	if err != nil {
		return Exit{}, err
	}
	if watch != nil {
		defer watch() // else somebody else settles it, and so do we
	}
	r, err := b.read()
	if err != nil || r.Exit != nil {
		return r.exit(), err
	}
	var code client.Exit
	err = b.with(ctx, "wait for", func(s *client.Shim) (err error) { code, err = s.Wait(ctx, b.id, ""); return err })
	if ctx.Err() != nil {
		return Exit{}, context.Cause(ctx)
	}
	if err != nil && !errors.Is(err, ErrNotRunning) {
		return Exit{}, err
	}
	unlock, lockErr := b.lock(ctx)
	if lockErr != nil {
		if err == nil && errors.Is(lockErr, ErrNotFound) { // removed by who saw its end as well
			return Exit{Code: code.Code, At: code.At}, nil
		}
		return Exit{}, lockErr
	}
	defer unlock()
	if r, err = b.read(); err == nil && r.Exit == nil {
		r, err = b.settle(ctx, r)
	}
	return r.exit(), err
}

func (r record) exit() Exit {
	if r.Exit == nil {
		return Exit{}
	}
	return *r.Exit
}

// settle notes the end of a container and ends its shim. The lock is held. A
// sandbox that is to be removed at its end is.
func (b *Sandbox) settle(ctx context.Context, r record) (record, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanup)
	defer cancel()
	e := Exit{Code: lost, At: time.Now(), Reason: "its shim or its machine was killed"}
	shim, err := b.process()
	if err != nil {
		return r, err
	}
	defer shim.close()
	err = b.with(ctx, "end", func(s *client.Shim) error {
		got, err := s.Delete(ctx, b.id, "")
		if err != nil {
			return err
		}
		e = Exit{Code: got.Code, At: got.At}
		return s.Shutdown(ctx, b.id, true)
	})
	if errors.Is(err, ErrNotRunning) {
		err = shim.kill(ctx) // it may have ended, or hang without its socket
		if err == nil {
			err = client.Delete(ctx, b.program())
		}
	}
	if err == nil {
		err = shim.wait(ctx)
	}
	if err == nil {
		err = b.closeNetwork(ctx)
	}
	if err != nil {
		return r, err
	}
	r.Exit = &e
	if err := b.write(r); err != nil {
		return r, err
	}
	if err := os.RemoveAll(b.run); err != nil {
		return r, fmt.Errorf("end %s: %w", b.id, err)
	}
	if r.Options.Remove {
		return r, b.removeLocked(ctx)
	}
	return r, nil
}

// Kill signals the container's first process.
func (b *Sandbox) Kill(ctx context.Context, s syscall.Signal) error {
	return b.with(ctx, "kill", func(c *client.Shim) error { return c.Kill(ctx, b.id, "", s, false) })
}

// Stop asks the container to end, by the signal its image names, and kills it
// after grace.
func (b *Sandbox) Stop(ctx context.Context, grace time.Duration) (Exit, error) {
	r, err := b.read()
	if err != nil || r.Exit != nil {
		return r.exit(), err
	}
	st, err := b.ask(ctx)
	if err == nil && st.Phase == client.Paused { // one that is frozen hears nothing
		if err := b.Resume(ctx); err != nil {
			return Exit{}, err
		}
	}
	if r.Info.Started.IsZero() {
		grace = 0
	}
	if grace > 0 {
		if err := b.Kill(ctx, r.Process.stopSignal()); err != nil && !errors.Is(err, ErrNotRunning) {
			return Exit{}, err
		}
		bounded, cancel := context.WithTimeout(ctx, grace)
		e, err := b.Wait(bounded)
		cancel()
		if err == nil || ctx.Err() != nil || bounded.Err() == nil {
			return e, err
		}
	}
	err = b.with(ctx, "kill", func(c *client.Shim) error { return c.Kill(ctx, b.id, "", syscall.SIGKILL, true) })
	if err != nil && !errors.Is(err, ErrNotRunning) {
		return Exit{}, err
	}
	return b.Wait(ctx)
}

// Pause freezes the sandbox whole; Resume lets it go on.
func (b *Sandbox) Pause(ctx context.Context) error {
	return b.with(ctx, "pause", func(s *client.Shim) error { return s.Pause(ctx, b.id) })
}

// Resume is Pause's way back.
func (b *Sandbox) Resume(ctx context.Context) error {
	return b.with(ctx, "resume", func(s *client.Shim) error { return s.Resume(ctx, b.id) })
}

// Stats are what a sandbox uses: by its guest's word, but for the last.
type Stats struct {
	CPUMicros   uint64 `json:"cpuMicros"`
	Memory      uint64 `json:"memory"` // bytes, of the container
	MemoryLimit uint64 `json:"memoryLimit,omitempty"`
	Pids        uint64 `json:"pids"`
	PidsLimit   uint64 `json:"pidsLimit,omitempty"`
	OOMKills    uint64 `json:"oomKills,omitempty"`
	// Host is what the machine's monitor takes of this host's memory, in
	// bytes: its share of what it shares.
	Host uint64 `json:"host"`
}

// Stats gives what a sandbox uses.
func (b *Sandbox) Stats(ctx context.Context) (out Stats, err error) {
	err = b.with(ctx, "read statistics of", func(s *client.Shim) error {
		g, err := s.Stats(ctx, b.id)
		if err != nil {
			return err
		}
		out = Stats{CPUMicros: g.CPUMicros, Memory: g.Memory, MemoryLimit: g.MemoryLimit, Pids: g.Pids, PidsLimit: g.PidsLimit, OOMKills: g.OOMKills}
		st, err := s.State(ctx, b.id, "")
		if err == nil {
			out.Host = share(st.PID)
		}
		return err
	})
	return out, err
}

// share is the proportional share of memory of a process, 0 if it cannot be
// read.
func share(pid int) uint64 {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0
	}
	for l := range strings.Lines(string(raw)) {
		var kb uint64
		if n, err := fmt.Sscanf(l, "Pss: %d kB", &kb); n == 1 && err == nil {
			return kb << 10
		}
	}
	return 0
}

// Remove removes a sandbox and all that is left of it. One that runs is only
// removed by force.
func (b *Sandbox) Remove(ctx context.Context, force bool) error {
	if i, err := b.Info(ctx); errors.Is(err, ErrNotFound) {
		return err
	} else if err == nil && !force {
		switch i.Phase {
		case Running, Paused, Creating:
			return fmt.Errorf("remove %s: %w: stop it first, or use force", i.Name, ErrRunning)
		}
	}
	unlock, err := b.lock(ctx)
	if errors.Is(err, ErrNotFound) {
		return nil // it was to be removed at its end, which we have seen
	}
	if err != nil {
		return err
	}
	defer unlock()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanup)
	defer cancel()
	return b.removeLocked(ctx)
}

// removeLocked ends the sandbox if it runs, and removes its files, its record
// last.
func (b *Sandbox) removeLocked(ctx context.Context) error {
	if err := b.end(ctx); err != nil {
		return fmt.Errorf("remove %s: %w", b.id, err)
	}
	unlock, err := b.host.lock(ctx)
	if err != nil {
		return fmt.Errorf("remove %s: %w", b.id, err)
	}
	defer unlock()
	var name string
	if r, err := b.read(); err == nil {
		name = r.Options.Name
	}
	if err := errors.Join(os.RemoveAll(b.run), os.RemoveAll(b.bundle())); err != nil {
		return fmt.Errorf("remove %s: %w", b.id, err)
	}
	link := filepath.Join(b.host.names(), name)
	if id, err := os.Readlink(link); err == nil && id == b.id {
		if err := os.Remove(link); err != nil {
			return fmt.Errorf("remove %s: %w", b.id, err)
		}
	}
	if err := os.RemoveAll(b.dir); err != nil {
		return fmt.Errorf("remove %s: %w", b.id, err)
	}
	return nil
}

// end ends what runs of a sandbox: by its shim, or after it.
func (b *Sandbox) end(ctx context.Context) error {
	if _, err := os.Stat(b.bundle()); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	shim, err := b.process()
	if err != nil {
		return err
	}
	defer shim.close()
	bounded, cancel := context.WithTimeout(ctx, cleanup/2)
	defer cancel()
	s, err := client.Dial(bounded, b.bundle())
	if err == nil {
		err = errors.Join(s.Shutdown(bounded, b.id, true), s.Close())
	}
	if err == nil {
		err = shim.wait(bounded)
	}
	if err != nil {
		if killErr := shim.kill(ctx); killErr != nil {
			return errors.Join(err, killErr)
		}
	}
	return errors.Join(client.Delete(ctx, b.program()), b.closeNetwork(ctx))
}

// patience is how long a sandbox may take to be made before that is explained.
const patience = 2 * time.Second

// tell hands on what the shim says of its progress, until it is stopped, and
// says why it takes long if it does.
func (b *Sandbox) tell(slow string) (stop func()) {
	var mu sync.Mutex
	say := func(text string) {
		mu.Lock()
		defer mu.Unlock()
		b.host.conf.Progress(text)
	}
	late := time.AfterFunc(patience, func() { say(slow) })
	end := follow(b.shimLog(), say)
	return func() {
		late.Stop()
		end()
	}
}
