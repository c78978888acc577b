package sandbox

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"hauberk.dev/api/node"
)

// Options of a sandbox. The zero value of each is what the image says, or what
// docker would do.
type Options struct {
	// Name of the sandbox; made up if it is empty.
	Name string `json:"name"`
	// Image as image.ParseReference reads it, and when to look for it anew.
	Image string `json:"image"`
	Pull  Pull   `json:"pull,omitempty"`
	// PlainHTTP allows a registry without TLS.
	PlainHTTP bool `json:"plainHTTP,omitempty"`

	// Entrypoint takes the place of the image's; with it the image's command
	// counts no more. Args take the place of the image's command.
	Entrypoint *string  `json:"entrypoint,omitempty"`
	Args       []string `json:"args,omitempty"`
	Env        []string `json:"env,omitempty"` // NAME=value
	WorkingDir string   `json:"workingDir,omitempty"`
	User       string   `json:"user,omitempty"` // name or number, with :group if need be
	Hostname   string   `json:"hostname,omitempty"`

	// Terminal gives the process a terminal; Stdin keeps its input open.
	Terminal bool   `json:"terminal,omitempty"`
	Rows     uint16 `json:"rows,omitempty"`
	Cols     uint16 `json:"cols,omitempty"`
	Stdin    bool   `json:"stdin,omitempty"`
	// Remove removes the sandbox when somebody sees that it has ended.
	Remove bool `json:"remove,omitempty"`

	// Memory of the container in bytes, its processors, and how many processes
	// it may have.
	Memory uint64  `json:"memory,omitempty"`
	CPUs   float64 `json:"cpus,omitempty"`
	Pids   int64   `json:"pids,omitempty"`

	ReadOnly bool     `json:"readOnly,omitempty"`
	Volumes  []Volume `json:"volumes,omitempty"`
	// Tmpfs lists directories that lie in memory and can be written.
	Tmpfs []string `json:"tmpfs,omitempty"`
	// CapAdd and CapDrop change the capabilities that docker gives to root of a
	// container; ALL drops all. The Guard has its say besides.
	CapAdd  []string          `json:"capAdd,omitempty"`
	CapDrop []string          `json:"capDrop,omitempty"`
	Labels  map[string]string `json:"labels,omitempty"`

	// Egress lists where it may go: any, ADDRESS, ADDRESS/BITS or NAME, each with
	// :PORT if need be. Publish lists what of this machine leads into it:
	// [ADDRESS:]PORT:PORT[/udp]. Without either it has no network.
	Egress  []string `json:"egress,omitempty"`
	Publish []string `json:"publish,omitempty"`

	// Policy holds the Guard's policies; none is the baseline.
	Policy []node.NamedGuardPolicy `json:"policy,omitempty"`
}

// Volume is a directory or file of this host in a sandbox.
type Volume struct {
	Source   string `json:"source"`
	Target   string `json:"target"`
	ReadOnly bool   `json:"readOnly,omitempty"`
}

// Pull says when an image is looked for where it comes from.
type Pull string

// The answers. Files are always looked at.
const (
	PullMissing Pull = "missing" // if it is not here
	PullAlways  Pull = "always"
	PullNever   Pull = "never"
)

const (
	minMemory = 4 << 20
	maxCPUs   = 64
)

// check finds all that is wrong, before anything is made.
func (o *Options) check() error {
	var errs []error
	fault := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }
	if o.Name != "" && (len(o.Name) > maxName || !validName.MatchString(o.Name)) {
		fault("name %q: want letters and digits, joined by one of . _ -, at most %d", o.Name, maxName)
	}
	if validID.MatchString(o.Name) {
		fault("name %q: it looks like an ID", o.Name)
	}
	switch o.Pull {
	case "", PullMissing, PullAlways, PullNever:
	default:
		fault("pull %q: want %s, %s or %s", o.Pull, PullMissing, PullAlways, PullNever)
	}
	for _, e := range o.Env {
		if name, _, ok := strings.Cut(e, "="); !ok || name == "" {
			fault("environment %q: want NAME=value", e)
		}
	}
	if o.WorkingDir != "" && !path.IsAbs(o.WorkingDir) {
		fault("working directory %q: want an absolute path", o.WorkingDir)
	}
	if o.Memory != 0 && o.Memory < minMemory {
		fault("memory %d bytes: want at least %d", o.Memory, minMemory)
	}
	if o.CPUs < 0 || o.CPUs > maxCPUs || o.CPUs > 0 && o.CPUs < 0.01 {
		fault("%v processors: want 0.01 to %d", o.CPUs, maxCPUs)
	}
	if o.Pids < 0 {
		fault("%d processes: want a number", o.Pids)
	}
	if _, err := o.spec(); err != nil {
		fault("%w", err)
	}
	if len(o.Hostname) > 63 || strings.ContainsAny(o.Hostname, "/\x00 ") {
		fault("hostname %q: want a name of at most 63 characters", o.Hostname)
	}
	for _, v := range o.Volumes {
		if !path.IsAbs(v.Source) || !path.IsAbs(v.Target) || path.Clean(v.Target) == "/" {
			fault("volume %s:%s: want absolute paths, and not /", v.Source, v.Target)
		}
	}
	for _, t := range o.Tmpfs {
		if !path.IsAbs(t) || path.Clean(t) == "/" {
			fault("tmpfs %q: want an absolute path, and not /", t)
		}
	}
	for _, s := range slices.Concat(o.Args, o.Env, []string{o.WorkingDir, o.User}) {
		if strings.ContainsRune(s, 0) {
			fault("%q holds a zero byte", s)
		}
	}
	return errors.Join(errs...)
}

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// process is what an image and options come to; exec takes after it.
type process struct {
	Args       []string `json:"args"`
	Env        []string `json:"env"`
	Cwd        string   `json:"cwd"`
	UID        uint32   `json:"uid"`
	GID        uint32   `json:"gid"`
	Groups     []uint32 `json:"groups,omitempty"`
	StopSignal string   `json:"stopSignal,omitempty"`
	// Capabilities of the bounding set; those of root are the same.
	Capabilities []string `json:"capabilities,omitempty"`
}

func (o *Options) process(img Image) (process, error) {
	c, err := img.Config, error(nil)
	if o.User != "" {
		if c, err = img.As(o.User); err != nil {
			return process{}, err
		}
	}
	p := process{Capabilities: o.capabilities(), Cwd: c.WorkingDir, UID: c.UID, GID: c.GID, Groups: c.Groups, StopSignal: c.StopSignal}
	entry, args := c.Entrypoint, c.Cmd
	if o.Entrypoint != nil {
		entry, args = nil, nil
		if *o.Entrypoint != "" {
			entry = []string{*o.Entrypoint}
		}
	}
	if len(o.Args) > 0 {
		args = o.Args
	}
	if p.Args = slices.Concat(entry, args); len(p.Args) == 0 {
		return process{}, fmt.Errorf("image %s names nothing to run: give a command", img.Name)
	}
	if o.WorkingDir != "" {
		p.Cwd = o.WorkingDir
	}
	p.Env = merge([]string{"PATH=" + defaultPath}, c.Env, o.environment(c.Home), o.Env)
	return p, nil
}

// capabilities are docker's, changed as asked for.
func (o *Options) capabilities() []string {
	out := slices.Clone(capabilities)
	for _, name := range o.CapDrop {
		if strings.EqualFold(name, "ALL") {
			out = []string{}
			continue
		}
		out = slices.DeleteFunc(out, func(c string) bool { return c == capability(name) })
	}
	for _, name := range o.CapAdd {
		if c := capability(name); !slices.Contains(out, c) {
			out = append(out, c)
		}
	}
	return out
}

// capability is the whole name of one, which the shim judges.
func capability(name string) string {
	return "CAP_" + strings.TrimPrefix(strings.ToUpper(name), "CAP_")
}

// environment is what a process is given besides.
func (o *Options) environment(home string) []string {
	if home == "" {
		home = "/"
	}
	out := []string{"HOME=" + home}
	if o.Terminal {
		out = append(out, "TERM=xterm")
	}
	return out
}

// merge joins environments; the last to name a variable decides, and its place
// is where it was first named.
func merge(lists ...[]string) (out []string) {
	at := map[string]int{}
	for _, e := range slices.Concat(lists...) {
		name, _, _ := strings.Cut(e, "=")
		if i, ok := at[name]; ok {
			out[i] = e
			continue
		}
		at[name] = len(out)
		out = append(out, e)
	}
	return out
}

// stopSignal asks the process to end.
func (p process) stopSignal() syscall.Signal {
	if s, err := ParseSignal(p.StopSignal); err == nil {
		return s
	}
	return syscall.SIGTERM
}

var signals = map[string]syscall.Signal{
	"HUP": syscall.SIGHUP, "INT": syscall.SIGINT, "QUIT": syscall.SIGQUIT, "ILL": syscall.SIGILL, "TRAP": syscall.SIGTRAP,
	"ABRT": syscall.SIGABRT, "BUS": syscall.SIGBUS, "FPE": syscall.SIGFPE, "KILL": syscall.SIGKILL, "USR1": syscall.SIGUSR1,
	"SEGV": syscall.SIGSEGV, "USR2": syscall.SIGUSR2, "PIPE": syscall.SIGPIPE, "ALRM": syscall.SIGALRM, "TERM": syscall.SIGTERM,
	"CHLD": syscall.SIGCHLD, "CONT": syscall.SIGCONT, "STOP": syscall.SIGSTOP, "TSTP": syscall.SIGTSTP, "TTIN": syscall.SIGTTIN,
	"TTOU": syscall.SIGTTOU, "URG": syscall.SIGURG, "WINCH": syscall.SIGWINCH, "IO": syscall.SIGIO, "PWR": syscall.SIGPWR, "SYS": syscall.SIGSYS,
}

// ParseSignal reads a signal as people write it: TERM, SIGTERM or 15.
func ParseSignal(s string) (syscall.Signal, error) {
	if n, err := strconv.Atoi(s); err == nil && n > 0 && n <= 64 {
		return syscall.Signal(n), nil
	}
	if sig, ok := signals[strings.TrimPrefix(strings.ToUpper(s), "SIG")]; ok {
		return sig, nil
	}
	return 0, fmt.Errorf("parse signal %.32q: want a name such as TERM, or 1 to 64", s)
}

// info is what the options come to, for the record.
func (o *Options) info(img Image, p process) Info {
	names := make([]string, 0, len(o.Policy))
	for _, g := range o.Policy {
		names = append(names, g.Name)
	}
	if len(names) == 0 {
		names = []string{"baseline"}
	}
	return Info{
		Name: o.Name, Image: img.Name, Digest: img.Digest, Args: p.Args, Policy: strings.Join(names, "+"),
		Terminal: o.Terminal, Stdin: o.Stdin, Remove: o.Remove, MemoryMiB: int(o.Memory >> 20), CPUs: o.CPUs, Labels: o.Labels,
	}
}
