package sandbox

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"syscall"
	"time"

	"hauberk.dev/shim/client"
)

// Cmd is a process to be run in a sandbox beside its first.
type Cmd struct {
	Args []string
	// Env is added to that of the first process; Dir and User take the place
	// of its own.
	Env       []string
	Dir, User string

	Terminal   bool
	Rows, Cols uint16
	// Stdin keeps its input open; without, it sees the end at once.
	Stdin bool
	// Detached leaves it to itself: nobody reads what it writes.
	Detached bool
}

// Process runs in a sandbox.
type Process struct {
	*Stream // nil if it is detached
	box     *Sandbox
	shim    *client.Shim
	id      string
}

// execTime bounds how long a process may take to be started.
const execTime = 30 * time.Second

// Exec starts a process. It is Close's to be called when it is not needed any
// more, which does not end it. The error is a *ProgramError if its program
// could not be run.
func (b *Sandbox) Exec(ctx context.Context, c Cmd) (*Process, error) {
	if len(c.Args) == 0 {
		return nil, errors.New("exec: nothing to run is named")
	}
	r, err := b.read()
	if err != nil {
		return nil, err
	}
	p := r.Process
	p.Args, p.Env = c.Args, merge(p.Env, c.Env)
	if c.Terminal {
		p.Env = merge([]string{"TERM=xterm"}, p.Env)
	}
	if c.Dir != "" {
		p.Cwd = c.Dir
	}
	if c.User != "" {
		if err := b.as(&p, r, c.User); err != nil {
			return nil, fmt.Errorf("exec in %s: %w", b.id, err)
		}
	}
	spec, err := json.Marshal(p.oci(c.Terminal, c.Rows, c.Cols))
	if err != nil {
		return nil, fmt.Errorf("exec in %s: %w", b.id, err)
	}
	s, err := b.dial(ctx, "exec in")
	if err != nil {
		return nil, err
	}
	out := &Process{box: b, shim: s, id: "x" + rand.Text()[:12]}
	if err := out.start(ctx, spec, c); err != nil {
		_ = s.Close()
		if errors.Is(err, client.ErrNotFound) || errors.Is(err, client.ErrGone) {
			err = ErrNotRunning
		}
		return nil, fmt.Errorf("exec in %s: %w", b.id, err)
	}
	return out, nil
}

// as makes the process another user's, by the names in the image.
func (b *Sandbox) as(p *process, r record, user string) error {
	img, err := b.host.image(context.Background(), Options{Image: r.Options.Image, Pull: PullNever})
	if err != nil {
		return err
	}
	c, err := img.As(user)
	if err != nil {
		return err
	}
	p.UID, p.GID, p.Groups = c.UID, c.GID, c.Groups
	if c.Home != "" {
		p.Env = merge(p.Env, []string{"HOME=" + c.Home})
	}
	return nil
}

// start starts the process while its caller attaches, for which the shim waits.
func (p *Process) start(ctx context.Context, spec []byte, c Cmd) error {
	ctx, cancel := context.WithTimeoutCause(ctx, execTime, fmt.Errorf("it was not started within %v", execTime))
	defer cancel()
	socket := filepath.Join(p.box.run, p.id)
	var to client.Streams
	if !c.Detached {
		name := "attach://" + socket + "?wait=1"
		to = client.Streams{Stdout: name, Stderr: name, Terminal: c.Terminal}
		if c.Terminal {
			to.Stderr = ""
		}
		if c.Stdin {
			to.Stdin = name
		}
	}
	if err := p.shim.Exec(ctx, p.box.id, p.id, spec, to); err != nil {
		return err
	}
	started := make(chan error, 1)
	go func() {
		err := explain(ctx, p.shim, p.box.id, p.id, p.shim.Start(ctx, p.box.id, p.id))
		if err != nil {
			cancel()
		}
		started <- err
	}()
	if c.Detached {
		return <-started
	}
	s, err := client.Attach(ctx, socket, true)
	if startErr := <-started; startErr != nil {
		if s != nil {
			_ = s.Close()
		}
		_, _ = p.shim.Delete(context.WithoutCancel(ctx), p.box.id, p.id) // it is forgotten with the sandbox, too
		return startErr
	}
	if err != nil {
		return err
	}
	p.Stream = &Stream{s}
	return nil
}

// Wait waits for the end of the process and gives its code.
func (p *Process) Wait(ctx context.Context) (int, error) {
	e, err := p.shim.Wait(ctx, p.box.id, p.id)
	switch {
	case ctx.Err() != nil:
		return 0, context.Cause(ctx)
	case errors.Is(err, client.ErrGone), errors.Is(err, client.ErrNotFound):
		return 0, fmt.Errorf("wait in %s: %w any more", p.box.id, ErrNotRunning)
	case err != nil:
		return 0, fmt.Errorf("wait in %s: %w", p.box.id, err)
	}
	return e.Code, nil
}

// Kill signals the process.
func (p *Process) Kill(ctx context.Context, s syscall.Signal) error {
	return p.shim.Kill(ctx, p.box.id, p.id, s, false)
}

// Resize sets the size of its terminal.
func (p *Process) Resize(ctx context.Context, rows, cols uint16) error {
	return p.shim.Resize(ctx, p.box.id, p.id, rows, cols)
}

// Close lets go of the process: one that has ended is forgotten, one that runs
// goes on.
func (p *Process) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), execTime)
	defer cancel()
	_, err := p.shim.Delete(ctx, p.box.id, p.id)
	if errors.Is(err, client.ErrGone) || errors.Is(err, client.ErrNotFound) || errors.Is(err, client.ErrNotNow) {
		err = nil
	}
	if p.Stream != nil {
		err = errors.Join(err, p.Stream.Close())
	}
	return errors.Join(err, p.shim.Close())
}
