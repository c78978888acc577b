package keep

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"hauberk.dev/internal/flock"
	"hauberk.dev/internal/unixsock"
	"hauberk.dev/vm"
	"hauberk.dev/vm/qemu"
)

// Client asks a keeper for machines.
type Client struct {
	Place
	// Start is the command line of a keeper for the place, after the program
	// itself; it is run if there is none. Empty starts nothing.
	Start []string
}

// Given is a machine that a keeper gave.
type Given struct {
	Machine *vm.Machine
	How     string // FromPool or FromTemplate
}

// Machine asks for a machine and adopts it. Its guest runs, has no disk, and
// still has the names and the entropy of its template. It says how it goes to
// progress, which may be nil. After an error there is no machine of that name.
func (c Client) Machine(ctx context.Context, r Request, progress func(string)) (g Given, err error) {
	if progress == nil {
		progress = func(string) {}
	}
	r.Version = version
	dir := filepath.Join(c.Machines(), r.ID)
	if _, err := os.Lstat(dir); err == nil {
		return Given{}, fmt.Errorf("ask keeper for machine %s: %w", r.ID, os.ErrExist)
	}
	for again := false; ; again = true {
		g, err = c.ask(ctx, r, progress)
		if !errors.Is(err, errNoAnswer) {
			break
		}
		// What it may have made and not said is nobody's.
		if failed := endIn(dir); failed != nil || again || ctx.Err() != nil {
			err = errors.Join(err, failed)
			break
		}
	}
	if err != nil {
		if ctx.Err() != nil {
			err = errors.Join(context.Cause(ctx), err)
		}
		return Given{}, fmt.Errorf("ask keeper for machine %s: %w", r.ID, err)
	}
	return g, nil
}

// errNoAnswer says that a keeper went away, or that nobody waited for it.
var errNoAnswer = errors.New("keeper gave no answer")

func (c Client) ask(ctx context.Context, r Request, progress func(string)) (Given, error) {
	conn, err := c.connect(ctx)
	if err != nil {
		return Given{}, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	line, err := json.Marshal(r)
	if err != nil {
		return Given{}, err
	}
	if _, err := conn.Write(append(line, '\n')); err != nil {
		return Given{}, fmt.Errorf("%w: %w", errNoAnswer, err)
	}
	a, files, err := hear(conn, progress)
	if err != nil {
		return Given{}, errors.Join(fmt.Errorf("%w: %w", errNoAnswer, err), closeAll(files))
	}
	if a.Error != "" {
		return Given{}, errors.Join(errors.New(a.Error), closeAll(files))
	}
	if len(files) == 0 || a.Dir != filepath.Join(c.Machines(), r.ID) {
		return Given{}, errors.Join(fmt.Errorf("it gave %q with %d files", a.Dir, len(files)), closeAll(files))
	}
	m, err := qemu.Adopt(ctx, a.Dir)
	if err != nil {
		return Given{}, errors.Join(err, closeAll(files)) // the keeper ends it
	}
	m.SetTap(files[0])
	if len(files) > 1 {
		line, err := net.FileConn(files[1])
		if err := errors.Join(err, files[1].Close()); err != nil {
			return Given{}, errors.Join(err, end(m))
		}
		m.SetLine(line)
	}
	if _, err := conn.Write([]byte(taken)); err != nil {
		return Given{}, errors.Join(err, end(m))
	}
	return Given{Machine: m, How: a.How}, nil
}

// hear reads lines until the last, and gives the files that came along, also
// with an error.
func hear(conn *net.UnixConn, progress func(string)) (_ answer, files []*os.File, err error) {
	var have []byte
	in := unixsock.NewInbox(maxLine, maxFiles)
	for range maxAnswers {
		line, rest, whole := bytes.Cut(have, []byte{'\n'})
		for !whole {
			if len(have) > maxLine {
				return answer{}, files, errors.New("its line is too long")
			}
			part, more, err := in.Receive(conn)
			files = append(files, more...)
			switch {
			case err == io.EOF:
				err = errors.New("it hung up")
			case len(files) > maxFiles:
				err = errors.New("it sent too many files")
			}
			if err != nil {
				return answer{}, files, err
			}
			have = append(have, part...)
			line, rest, whole = bytes.Cut(have, []byte{'\n'})
		}
		a, err := parseAnswer(line)
		if err != nil || a.Progress == "" {
			return a, files, err
		}
		progress(a.Progress)
		have = bytes.Clone(rest)
	}
	return answer{}, files, errors.New("it talks without end")
}

func closeAll(files []*os.File) error {
	var errs []error
	for _, f := range files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// maxFiles is how many files an answer may carry: the tap and the line.
const maxFiles = 2

// connect connects to the keeper, which is started if it is not there.
func (c Client) connect(ctx context.Context) (*net.UnixConn, error) {
	dir, err := c.keeper()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, startTime, errors.New("no keeper came up in time"))
	defer cancel()
	started := false
	for {
		conn, err := dial(ctx, dir)
		if err == nil {
			return conn, nil
		}
		if !absent(err) || len(c.Start) == 0 {
			return nil, err
		}
		if !started {
			if err := c.start(ctx, dir); err != nil {
				return nil, err
			}
			started = true
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", context.Cause(ctx), err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// absent says whether an error means that nobody serves the socket.
func absent(err error) bool {
	return errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
}

func dial(ctx context.Context, dir string) (*net.UnixConn, error) {
	d, err := vm.OpenRunDir(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Dial(ctx, socketName)
}

// start starts a keeper. Of many that are started at once one stays.
func (c Client) start(ctx context.Context, dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	release, err := flock.Take(ctx, filepath.Join(dir, "start"))
	if err != nil {
		return err
	}
	defer release()
	if conn, err := dial(ctx, dir); err == nil {
		return conn.Close() // another was faster
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(dir, logName), os.O_CREATE|os.O_TRUNC|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(self, c.Start...)
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = "/", []string{"PATH=" + os.Getenv("PATH"), "HAUBERK_SHIM_RUN=" + c.Run}, log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start keeper: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // a child is waited for, or it stays a zombie
	for {
		if conn, err := dial(ctx, dir); err == nil {
			return conn.Close()
		}
		select {
		case err := <-ended:
			said, _ := os.ReadFile(log.Name())
			if err != nil {
				return fmt.Errorf("start keeper: %w: %.512q", err, said)
			}
			return nil // another serves
		case <-ctx.Done():
			return fmt.Errorf("start keeper: %w", context.Cause(ctx))
		case <-time.After(5 * time.Millisecond):
		}
	}
}
