package command

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hauberk.dev/api/admin"
	"hauberk.dev/cmd/hauberk/internal/show"
	"hauberk.dev/sandbox"
)

// Where hauberk keeps things unless told otherwise.
const (
	defaultState = "/var/lib/hauberk"
	defaultRun   = "/run/hauberk"
)

// host opens the sandboxes of this machine.
func (s *session) host() (*sandbox.Host, error) {
	c := sandbox.Config{State: filepath.Join(s.state, "hand"), Run: filepath.Join(s.run, "hand"), Progress: s.steps()}
	// A place of its own is one whole: nothing of it is shared with others.
	if s.state != defaultState {
		c.ShimState = filepath.Join(s.state, "shim")
	}
	if s.run != defaultRun {
		c.ShimRun = filepath.Join(s.run, "shim")
	}
	h, err := sandbox.Open(c)
	if errors.Is(err, os.ErrPermission) {
		return nil, &admin.Error{Message: err.Error(), Fix: "run it with sudo"}
	}
	return h, err
}

// steps tells a person what is being done. What is quick is not worth a line,
// so the first one waits a moment.
func (s *session) steps() func(string) {
	return func(text string) { s.progress().Say("hauberk: %s", show.Clean(text)) }
}

// runOptions are the flags of run, as they are typed.
type runOptions struct {
	sandbox.Options
	detach, interactive bool
	memory              string
	envFiles            []string
	volumes, labels     []string
	policies            []string
	entrypoint          string
	detachKeys          string
	quiet               bool
}

func (s *session) runBox() *cobra.Command {
	var o runOptions
	c := &cobra.Command{
		Use:   "run [FLAGS] IMAGE [COMMAND [ARGS...]]",
		Short: "Run a command of an image in a sandbox of its own",
		Long: `Run starts a sandbox: a virtual machine with a kernel of its own, in which only
the image's own programs run, and in it a container of an image. It needs neither
containerd nor a cluster, and no daemon. What the container writes is gone when it
ends, but for volumes.

IMAGE is one of
  NAME[:TAG][@DIGEST]      from a registry, or from this machine if it was pulled
  oci:DIRECTORY[:NAME]     an OCI image layout
  oci-archive:FILE[:NAME]  a tar of one
  docker-archive:FILE      what docker save wrote

The exit code is the command's own; 125 if hauberk could not run it, 126 if the
command is there but cannot be run, 127 if it is not there, 128+N if signal N
ended it.

On a terminal (-it), ctrl-p ctrl-q leaves the sandbox running; come back to it
with hauberk attach.`,
		Example: `  hauberk run --rm -it busybox sh
  echo hello | hauberk run --rm -i busybox cat
  hauberk run -d --name web -p 8080:80 --mem 256m nginx
  hauberk run --rm -v $PWD:/src:ro --policy agent oci:build/agent /src/run.sh
  hauberk run --rm docker-archive:busybox.tar uname -a`,
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usage(c, errors.New("hauberk run needs an IMAGE"))
			}
			o.Image, o.Args = args[0], args[1:]
			if err := o.read(c); err != nil {
				return &exitError{exitExec, fmt.Errorf("%w (see %s --help)", err, c.CommandPath())}
			}
			return exited(s.runOne(c.Context(), &o))
		},
		ValidArgsFunction: s.completeImages,
	}
	o.flags(c)
	return c
}

func (o *runOptions) flags(c *cobra.Command) {
	f := c.Flags()
	f.SetInterspersed(false)
	f.BoolVarP(&o.interactive, "interactive", "i", false, "pass standard input on")
	f.BoolVarP(&o.Terminal, "tty", "t", false, "give the command a terminal")
	f.BoolVarP(&o.detach, "detach", "d", false, "leave it running and print its ID")
	f.BoolVar(&o.Remove, "rm", false, "remove the sandbox when it ends")
	f.StringVar(&o.Name, "name", "", "name of the sandbox (default: made up)")
	f.StringVarP(&o.memory, "mem", "m", "", "memory of the container, such as 256m or 1g (default: a small machine's)")
	f.StringVar(&o.memory, "memory", "", "the same as --mem")
	f.Float64Var(&o.CPUs, "cpus", 0, "processors, in whole ones rounded up (default: 1)")
	f.Int64Var(&o.Pids, "pids-limit", 0, "how many processes it may have")
	f.StringArrayVarP(&o.Env, "env", "e", nil, "variable NAME=VALUE, or NAME for that of this shell")
	f.StringArrayVar(&o.envFiles, "env-file", nil, "file of lines NAME=VALUE")
	f.StringVarP(&o.WorkingDir, "workdir", "w", "", "working directory (default: the image's)")
	f.StringVarP(&o.User, "user", "u", "", "user, or user:group, by name or number (default: the image's)")
	f.StringVar(&o.Hostname, "hostname", "", "name of the machine (default: the sandbox's ID)")
	f.StringVar(&o.entrypoint, "entrypoint", "", "program in place of the image's")
	f.StringArrayVarP(&o.volumes, "volume", "v", nil, "directory or file of this machine, SOURCE:TARGET[:ro]")
	f.StringArrayVar(&o.Egress, "egress", nil, "let it go to any, ADDRESS, ADDRESS/BITS or NAME, each with :PORT if need be (default: nowhere)")
	f.StringArrayVarP(&o.Publish, "publish", "p", nil, "lead a port of this machine into it, [ADDRESS:]PORT:PORT[/udp] (default address: 127.0.0.1)")
	f.StringArrayVar(&o.Tmpfs, "tmpfs", nil, "directory in memory that can be written")
	f.StringArrayVar(&o.CapAdd, "cap-add", nil, "capability that root has besides, such as NET_ADMIN")
	f.StringArrayVar(&o.CapDrop, "cap-drop", nil, "capability that root does not have, or ALL")
	f.BoolVar(&o.ReadOnly, "read-only", false, "let nothing be written to the root")
	f.StringArrayVarP(&o.labels, "label", "l", nil, "label NAME=VALUE, for hauberk ps")
	f.StringArrayVar(&o.policies, "policy", nil, "what may run, be touched and be reached: "+strings.Join(policyNames(), ", ")+", or a file of GuardPolicy documents (default: baseline)")
	f.StringVar((*string)(&o.Pull), "pull", string(sandbox.PullMissing), "when to ask the registry: always, missing or never")
	f.BoolVar(&o.PlainHTTP, "plain-http", false, "speak to the registry without TLS")
	f.StringVar(&o.detachKeys, "detach-keys", "ctrl-p,ctrl-q", "keys that leave the sandbox running; none turns it off")
	f.BoolVarP(&o.quiet, "quiet", "q", false, "do not tell what is being done")
	_ = f.MarkHidden("memory")
	_ = c.RegisterFlagCompletionFunc("policy", cobra.FixedCompletions(policyNames(), cobra.ShellCompDirectiveDefault))
	_ = c.RegisterFlagCompletionFunc("pull", cobra.FixedCompletions([]string{"always", "missing", "never"}, cobra.ShellCompDirectiveNoFileComp))
	for _, name := range []string{"name", "hostname", "mem", "cpus", "pids-limit", "user", "workdir", "env", "label", "egress", "publish"} {
		_ = c.RegisterFlagCompletionFunc(name, cobra.NoFileCompletions)
	}
}

// read turns what was typed into what is meant, and finds all that is wrong.
func (o *runOptions) read(c *cobra.Command) error {
	var errs []error
	fault := func(err error) {
		if err != nil {
			errs = append(errs, err)
		}
	}
	var err error
	if o.memory != "" {
		o.Memory, err = parseSize(o.memory)
		fault(wrap("--mem", err))
	}
	o.Env, err = environment(o.envFiles, o.Env, os.LookupEnv)
	fault(err)
	for _, v := range o.volumes {
		volume, err := parseVolume(v)
		fault(wrap("--volume", err))
		o.Volumes = append(o.Volumes, volume)
	}
	o.Labels, err = parseLabels(o.labels)
	fault(err)
	if c.Flags().Changed("entrypoint") {
		o.Entrypoint = &o.entrypoint
	}
	o.Policy, err = readPolicies(o.policies, len(o.Egress) > 0)
	fault(err)
	o.Stdin = o.interactive
	if o.detach && c.Flags().Changed("detach-keys") {
		fault(errors.New("--detach and --detach-keys: it is left already"))
	}
	_, err = parseKeys(o.detachKeys)
	fault(wrap("--detach-keys", err))
	return errors.Join(errs...)
}

// parseLabels reads labels; none is nil.
func parseLabels(list []string) (labels map[string]string, err error) {
	var errs []error
	for _, l := range list {
		name, value, _ := strings.Cut(l, "=")
		if name == "" {
			errs = append(errs, fmt.Errorf("--label %q: want NAME=VALUE", l))
			continue
		}
		if labels == nil {
			labels = map[string]string{}
		}
		labels[name] = value
	}
	return labels, errors.Join(errs...)
}

func wrap(flag string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", flag, err)
}

// exited turns what became of a command into this one's end.
func exited(code int, err error) error {
	var program *sandbox.ProgramError
	switch {
	case errors.As(err, &program):
		return &exitError{program.Code, err}
	case err != nil:
		return &exitError{exitExec, noImage(err)}
	case code != 0:
		return &exitError{code: code}
	}
	return nil
}

// noImage says how to run without a registry, if that is what is missing.
func noImage(err error) error {
	var missing *sandbox.NoImageError
	if !errors.As(err, &missing) {
		return err
	}
	return &admin.Error{Message: err.Error(), Fix: "without a registry, run oci:DIRECTORY, oci-archive:FILE or docker-archive:FILE; for one without TLS add --plain-http; hauberk images lists what is here"}
}

// runOne runs a sandbox and gives the exit code of its command.
func (s *session) runOne(ctx context.Context, o *runOptions) (int, error) {
	if o.quiet {
		quiet := *s
		quiet.Err = io.Discard
		return quiet.runLoud(ctx, o, s.Err)
	}
	return s.runLoud(ctx, o, s.Err)
}

func (s *session) runLoud(ctx context.Context, o *runOptions, errs io.Writer) (code int, err error) {
	var tty *terminal
	if o.Terminal && !o.detach {
		if tty, err = s.openTerminal(o.interactive); err != nil {
			return 0, err
		}
		o.Rows, o.Cols = tty.size()
	}
	h, err := s.host()
	if err != nil {
		return 0, err
	}
	b, err := h.Create(ctx, o.Options)
	if err != nil {
		return 0, err
	}
	if o.detach {
		if err := b.Start(ctx); err != nil {
			return 0, s.notStarted(b, o, err)
		}
		_, err := fmt.Fprintln(s.Out, b.ID())
		return 0, err
	}
	stream, err := b.Attach(ctx)
	if err == nil {
		if err = b.Start(ctx); err != nil {
			_ = stream.Close()
		}
	}
	if err != nil {
		return 0, s.notStarted(b, o, err)
	}
	return s.join(ctx, joined{
		stream: stream, tty: tty, input: o.interactive, keys: o.detachKeys, errs: errs, left: leftRunning(cmp.Or(o.Name, b.ID())),
		kill: b.Kill, resize: b.Resize,
		wait: func(ctx context.Context) (int, error) {
			e, err := b.Wait(ctx)
			if e.Reason != "" {
				err = errors.Join(err, fmt.Errorf("%s: %s", b.ID(), e.Reason))
			}
			return e.Code, err
		},
	})
}

func leftRunning(name string) string {
	return "left running; come back with: hauberk attach " + name
}

// notStarted removes a sandbox that could not be run. One whose program is at
// fault stays to be looked at, unless it is not to.
func (s *session) notStarted(b *sandbox.Sandbox, o *runOptions, err error) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var program *sandbox.ProgramError
	if errors.As(err, &program) && !o.Remove {
		_, waitErr := b.Wait(ctx)
		return errors.Join(err, waitErr)
	}
	return errors.Join(err, b.Remove(ctx, true))
}
