package shim

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/ttrpc"

	"hauberk.dev/internal/argv"
	"hauberk.dev/internal/strictjson"
)

// claim is what a shim wrote down in its run directory of what it makes elsewhere,
// before it made it. Its lock is held as long as the shim lives, by who starts it
// and then by itself, so whoever gets the lock knows that the shim is dead and can
// put away what it left. A bundle cannot tell: containerd removes one whose shim
// was killed while it started, and then calls nobody.
type claim struct {
	path string
	file *os.File // locked
	said entry
}

// entry is a line of a claim. Later lines add to it.
type entry struct {
	ID     string `json:"id,omitempty"` // of the pod
	Bundle string `json:"bundle,omitempty"`
	Socket string `json:"socket,omitempty"`
	// PID is the shim's, once it serves.
	PID int `json:"pid,omitempty"`
	// Network is the namespace that the pod joined.
	Network string `json:"network,omitempty"`
}

const (
	maxClaim = 16 << 10
	// succession is how long a shim that is ending may keep the next one of its
	// name, or who removes it, waiting.
	succession = 10 * time.Second
	// hung is how long a living shim may take to say that it is there.
	hung = 4 * time.Second
)

// claims is the directory of all claims of a run directory, by machine.
func (c config) claims() string { return filepath.Join(c.run, "shims") }

// take takes the claim of a machine's shim; nil if it is held by one that lives,
// or if there is none and none is to be made.
func (c config) take(machine string, create bool) (*claim, error) {
	flags := unix.O_RDWR | unix.O_APPEND | unix.O_NOFOLLOW
	if create {
		if err := os.MkdirAll(c.claims(), 0o700); err != nil {
			return nil, fmt.Errorf("take claim: %w", err)
		}
		flags |= unix.O_CREAT
	}
	k := &claim{path: filepath.Join(c.claims(), machine)}
	for {
		f, err := os.OpenFile(k.path, flags, 0o600)
		if errors.Is(err, fs.ErrNotExist) && !create {
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("take claim: %w", err)
		}
		switch err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); {
		case errors.Is(err, unix.EWOULDBLOCK):
			return nil, f.Close()
		case errors.Is(err, unix.EINTR):
			_ = f.Close() // and once more
			continue
		case err != nil:
			return nil, errors.Join(fmt.Errorf("take claim: %w", err), f.Close())
		}
		if !current(f, k.path) { // dropped since it was opened
			_ = f.Close()
			continue
		}
		k.file = f
		raw, err := io.ReadAll(io.LimitReader(f, maxClaim))
		if err != nil {
			return nil, errors.Join(fmt.Errorf("take claim: %w", err), f.Close())
		}
		k.said = parseClaim(raw)
		return k, nil
	}
}

// current says whether a path still names an open file.
func current(f *os.File, path string) bool {
	ours, err := f.Stat()
	named, errNamed := os.Lstat(path)
	return err == nil && errNamed == nil && os.SameFile(ours, named)
}

// parseClaim reads what a claim says. What was being written when its shim was
// killed has not happened.
func parseClaim(raw []byte) (said entry) {
	for {
		line, rest, whole := bytes.Cut(raw, []byte{'\n'})
		if !whole {
			return said
		}
		next := said
		if err := strictjson.Decode(line, maxClaim, &next); err != nil {
			return said
		}
		said, raw = next, rest
	}
}

// note writes one more line.
func (k *claim) note(e entry) error {
	raw, err := json.Marshal(e)
	if err == nil {
		_, err = k.file.Write(append(raw, '\n'))
	}
	if err != nil {
		return fmt.Errorf("write claim: %w", err)
	}
	return nil
}

// join notes the network of the pod, before it is joined. A pod that fails may be
// made again.
func (k *claim) join(network string) error {
	if network == k.said.Network {
		return nil
	}
	k.said.Network = network
	return k.note(entry{Network: network})
}

// drop gives up a claim of which nothing is left.
func (k *claim) drop() error {
	err := os.Remove(k.path)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return errors.Join(err, k.file.Close())
}

// leave lets go of a claim whose things are still there.
func (k *claim) leave() error { return k.file.Close() }

// await takes the claim of a shim that is ending.
func (c config) await(ctx context.Context, machine string, create bool) (*claim, error) {
	ctx, cancel := context.WithTimeout(ctx, succession)
	defer cancel()
	for {
		k, err := c.take(machine, create)
		if k != nil || err != nil {
			return k, err
		}
		select {
		case <-ctx.Done():
			return nil, nil
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// peek reads a claim that somebody holds.
func (c config) peek(machine string) entry {
	f, err := os.Open(filepath.Join(c.claims(), machine))
	if err != nil {
		return entry{}
	}
	defer f.Close()
	raw, _ := io.ReadAll(io.LimitReader(f, maxClaim)) // what cannot be read is not said
	return parseClaim(raw)
}

// ping asks a shim whether it is there. It needs neither guest nor lock for the
// answer. reached says that somebody listens.
func ping(ctx context.Context, socket, id string) (reached bool, err error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return false, err
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	_, err = task.NewTTRPCTaskClient(client).Connect(ctx, &task.ConnectRequest{ID: id})
	return true, err
}

// killHung kills a shim that listens and does not answer, and takes its claim;
// nil if it is not so.
func (c config) killHung(ctx context.Context, machine string) (*claim, error) {
	said := c.peek(machine)
	if said.PID < 2 || said.Socket == "" {
		return nil, nil
	}
	fd, err := unix.PidfdOpen(said.PID, 0)
	if err != nil {
		return nil, nil // it has just ended
	}
	defer unix.Close(fd)
	bounded, cancel := context.WithTimeout(ctx, hung)
	defer cancel()
	if reached, err := ping(bounded, said.Socket, said.ID); !reached || err == nil || bounded.Err() == nil || ctx.Err() != nil {
		return nil, nil
	}
	// While somebody holds the claim, the process it names is who does.
	ours, err := argv.Has(said.PID, said.ID)
	if err != nil || !ours {
		return nil, err
	}
	if k, err := c.take(machine, false); k != nil || err != nil {
		return k, err
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return nil, fmt.Errorf("kill shim %d of %q, which does not answer: %w", said.PID, said.ID, err)
	}
	return c.await(ctx, machine, true)
}

// sweep puts away what dead shims left whose bundle containerd has removed, so
// that nobody will ask for it. Of those that live it ends the ones that hang.
func (c config) sweep(ctx context.Context, log *slog.Logger) {
	found, err := os.ReadDir(c.claims())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.Warn("sweep", "err", err)
	}
	for _, e := range found {
		if ctx.Err() != nil {
			return
		}
		if err := c.sweepOne(ctx, e.Name()); err != nil {
			log.Warn("sweep what a shim left", "machine", e.Name(), "err", err)
		}
	}
}

func (c config) sweepOne(ctx context.Context, machine string) error {
	if !identifier.MatchString(machine) {
		return nil
	}
	said := c.peek(machine)
	if said.Bundle != "" && exists(said.Bundle) {
		return nil
	}
	k, err := c.take(machine, false)
	if err == nil && k == nil {
		k, err = c.killHung(ctx, machine)
	}
	if k == nil || err != nil {
		return err
	}
	if k.said.Bundle != "" && exists(k.said.Bundle) { // the next of its name
		return k.leave()
	}
	return k.settle(ctx, c)
}

// settle puts away what a dead shim left, and gives up its claim.
func (k *claim) settle(ctx context.Context, c config) error {
	j := journal{Machine: filepath.Base(k.path), Run: c.machines(), Socket: k.said.Socket, Network: k.said.Network}
	if _, err := removePod(ctx, j); err != nil {
		return errors.Join(err, k.leave())
	}
	return k.drop()
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
