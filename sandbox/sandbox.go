// Package sandbox runs containers in sandboxes by hand: without containerd,
// without a cluster, and without a daemon of its own.
//
//	host, err := sandbox.Open(sandbox.Config{})
//	box, err := host.Create(ctx, sandbox.Options{Image: "busybox", Args: []string{"sh"}})
//	err = box.Start(ctx)
//	p, err := box.Exec(ctx, sandbox.Cmd{Args: []string{"uname", "-a"}})
//	copies, err := box.Fork(ctx, 3)
//	err = box.Suspend(ctx, "/var/backups/box")
//	box, err = host.Restore(ctx, "/var/backups/box", sandbox.Options{})
//
// It plays containerd's part towards the shim: it packs an image, writes a
// bundle as docker would, and asks a shim for the rest. Everything it knows
// lies in files, so that any number of programs may use the same sandboxes, one
// after another or at once, and none of them is needed for a sandbox to go on.
// What a program that was killed left half done is listed, and can be removed.
//
// It gives no identity, knows no release and writes no ledger.
package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"hauberk.dev/internal/atomicfile"
	"hauberk.dev/internal/flock"
	"hauberk.dev/shim/client"
)

// Defaults of Config.
const (
	DefaultState = "/var/lib/hauberk/hand"
	DefaultRun   = "/run/hauberk/hand"
)

// What a caller may have to tell apart.
var (
	// ErrNotFound means that no sandbox has the name.
	ErrNotFound = errors.New("no such sandbox")
	// ErrTaken means that another sandbox has the name.
	ErrTaken = errors.New("the name is taken")
	// ErrNotRunning means that it must run for what was asked.
	ErrNotRunning = errors.New("it is not running")
	// ErrRunning means that it must not run for what was asked.
	ErrRunning = errors.New("it is running")
	// ErrDamaged means that a snapshot is not what was written.
	ErrDamaged = errors.New("snapshot is damaged")
)

// Config says where things are.
type Config struct {
	// State holds records, images and logs; Run holds sockets, and its name
	// must be short.
	State, Run string
	// Shim is the program containerd-shim-hauberk-v2, with hauberk-guest
	// beside it. The default is the one beside this program.
	Shim string
	// ShimState and ShimRun are the shim's own directories. The default is the
	// shim's, which it shares with those that containerd starts.
	ShimState, ShimRun string
	// Progress is told what is being done, a line each. Nil is nobody.
	Progress func(string)
}

// Host is this machine as a place for sandboxes.
type Host struct {
	conf Config
}

// maxRun is how long the name of Run may be: sockets in it add at most 68
// bytes, and have 106.
const maxRun = 38

// Open makes the directories that are missing. It needs root, like everything
// that makes machines.
func Open(c Config) (*Host, error) {
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("open sandboxes: %w: machines, namespaces and users are root's to make", fs.ErrPermission)
	}
	if c.State == "" {
		c.State = DefaultState
	}
	if c.Run == "" {
		c.Run = DefaultRun
	}
	if c.Shim == "" {
		self, err := os.Executable()
		if err != nil {
			return nil, fmt.Errorf("open sandboxes: %w", err)
		}
		c.Shim = filepath.Join(filepath.Dir(self), "containerd-shim-hauberk-v2")
	}
	if c.Progress == nil {
		c.Progress = func(string) {}
	}
	for _, dir := range []*string{&c.State, &c.Run, &c.Shim} {
		abs, err := filepath.Abs(*dir)
		if err != nil {
			return nil, fmt.Errorf("open sandboxes: %w", err)
		}
		*dir = abs
	}
	h := &Host{conf: c}
	for _, dir := range []string{h.boxes(), h.names(), h.refs(), h.forks(), h.sockets(), h.networks()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("open sandboxes: %w", err)
		}
	}
	return h, atomicfile.Sweep(h.refs())
}

// Directories of a host.
func (h *Host) boxes() string   { return filepath.Join(h.conf.State, "boxes") }
func (h *Host) names() string   { return filepath.Join(h.conf.State, "names") }
func (h *Host) refs() string    { return filepath.Join(h.conf.State, "refs") }
func (h *Host) cache() string   { return filepath.Join(h.conf.State, "images") }
func (h *Host) forks() string   { return filepath.Join(h.conf.State, "forks") }
func (h *Host) sockets() string { return filepath.Join(h.conf.Run, "s") }

var (
	validID   = regexp.MustCompile(`^[0-9a-f]{12}$`)
	validName = regexp.MustCompile(`^[A-Za-z0-9]+([._-][A-Za-z0-9]+)*$`)
)

const maxName = 63

// ID length, in characters.
const idLength = 12

// List gives all sandboxes, the newest first. What has ended since somebody
// last looked is noted, and removed if it is to be.
func (h *Host) List(ctx context.Context) ([]Info, error) {
	found, err := os.ReadDir(h.boxes())
	if err != nil {
		return nil, fmt.Errorf("list sandboxes: %w", err)
	}
	var out []Info
	for _, e := range found {
		if !validID.MatchString(e.Name()) {
			continue
		}
		i, err := h.box(e.Name()).Info(ctx)
		if errors.Is(err, ErrNotFound) {
			continue // removed meanwhile
		}
		if err != nil {
			i = Info{ID: e.Name(), Phase: Broken, Reason: err.Error()}
		}
		out = append(out, i)
	}
	slices.SortFunc(out, func(a, b Info) int { return b.Created.Compare(a.Created) })
	return out, nil
}

// Find gives the sandbox of a name, an ID or the beginning of one.
func (h *Host) Find(name string) (*Sandbox, error) {
	if id, err := os.Readlink(filepath.Join(h.names(), filepath.Base(name))); err == nil && validID.MatchString(id) && validName.MatchString(name) {
		if b := h.box(id); b.exists() {
			return b, nil
		}
	}
	if validID.MatchString(name) && h.box(name).exists() {
		return h.box(name), nil
	}
	found, err := os.ReadDir(h.boxes())
	if err != nil {
		return nil, fmt.Errorf("find sandbox: %w", err)
	}
	var ids []string
	for _, e := range found {
		if name != "" && validID.MatchString(e.Name()) && strings.HasPrefix(e.Name(), name) {
			ids = append(ids, e.Name())
		}
	}
	switch len(ids) {
	case 1:
		return h.box(ids[0]), nil
	case 0:
		return nil, fmt.Errorf("find %.128q: %w", name, ErrNotFound)
	}
	return nil, fmt.Errorf("find %.128q: %d sandboxes begin with it: %s", name, len(ids), strings.Join(ids, ", "))
}

func (h *Host) box(id string) *Sandbox {
	return &Sandbox{host: h, id: id, dir: filepath.Join(h.boxes(), id), run: filepath.Join(h.conf.Run, id)}
}

// lock is held while names are given and taken away.
func (h *Host) lock(ctx context.Context) (unlock func(), err error) {
	return flock.Take(ctx, filepath.Join(h.conf.State, ".lock"))
}

// Sandbox is one container in a machine of its own. It holds nothing open.
type Sandbox struct {
	host *Host
	id   string
	dir  string
	run  string
}

// ID of the sandbox, which never changes.
func (b *Sandbox) ID() string { return b.id }

// Files of a sandbox.
func (b *Sandbox) recordFile() string { return filepath.Join(b.dir, "sandbox.json") }
func (b *Sandbox) bundle() string     { return filepath.Join(b.dir, "bundle") }
func (b *Sandbox) log() string        { return filepath.Join(b.dir, "output.log") }
func (b *Sandbox) shimLog() string    { return filepath.Join(b.bundle(), "log") }
func (b *Sandbox) socket() string     { return filepath.Join(b.run, "io") }

func (b *Sandbox) exists() bool {
	_, err := os.Stat(b.dir)
	return err == nil
}

const lockName = ".lock"

// lock is held by who changes the sandbox; watch by who waits for its end and
// will settle it.
func (b *Sandbox) lock(ctx context.Context) (unlock func(), err error) {
	return b.flock(func(path string) (func(), error) { return flock.Take(ctx, path) }, lockName)
}

func (b *Sandbox) tryLock() (unlock func(), err error) { return b.flock(flock.Try, lockName) }

func (b *Sandbox) flock(take func(string) (func(), error), name string) (func(), error) {
	unlock, err := take(filepath.Join(b.dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w", b.id, ErrNotFound)
	}
	return unlock, err
}

// program is the sandbox's shim.
func (b *Sandbox) program() client.Program {
	c := b.host.conf
	var env []string
	if c.ShimState != "" {
		env = append(env, "HAUBERK_SHIM_STATE="+c.ShimState)
	}
	if c.ShimRun != "" {
		env = append(env, "HAUBERK_SHIM_RUN="+c.ShimRun)
	}
	return client.Program{
		Path: c.Shim, Namespace: "hand", ID: b.id, Owner: "hand:" + c.State, Bundle: b.bundle(), Sockets: b.host.sockets(), Env: env,
	}
}

// Phase of a sandbox.
type Phase string

// The phases. Broken is what a killed program left half done; it can only be
// removed.
const (
	Creating Phase = "creating"
	Created  Phase = "created"
	Running  Phase = "running"
	Paused   Phase = "paused"
	Exited   Phase = "exited"
	Broken   Phase = "broken"
)

// Info is what is known of a sandbox.
type Info struct {
	ID      string    `json:"id"`
	Name    string    `json:"name"`
	Image   string    `json:"image"`
	Digest  string    `json:"digest,omitempty"` // of the image's manifest
	Args    []string  `json:"args"`
	Policy  string    `json:"policy"`
	Created time.Time `json:"created"`
	Started time.Time `json:"started,omitzero"`
	Ended   time.Time `json:"ended,omitzero"`
	Phase   Phase     `json:"phase"`
	// PID of the machine's monitor on this host, while it runs.
	PID      int  `json:"pid,omitempty"`
	ExitCode *int `json:"exitCode,omitempty"`
	// Reason says why it ended, if not by itself, or is broken.
	Reason    string            `json:"reason,omitempty"`
	Terminal  bool              `json:"terminal,omitempty"`
	Stdin     bool              `json:"stdin,omitempty"`
	Remove    bool              `json:"removeAtEnd,omitempty"`
	MemoryMiB int               `json:"memoryMiB,omitempty"`
	CPUs      float64           `json:"cpus,omitempty"`
	Labels    map[string]string `json:"labels,omitempty"`
	// Ports that are published, as Options.Publish has them, with their numbers.
	Ports []string `json:"ports,omitempty"`
	// From is the ID of the sandbox that it was saved as, if it was.
	From string `json:"from,omitempty"`
}
