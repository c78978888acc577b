// Package shim is containerd's door: a runtime shim that runs each pod in a
// machine of its own, with the Guard attached before the first process.
//
// containerd starts one process of it per pod. The process makes a machine,
// turns mounted snapshots into read-only images, and answers the task service
// for all containers of the pod, and the sandbox service for the pod; what it
// cannot do it refuses, naming the field of the OCI configuration, rather than
// run a container with less than was asked for.
//
// The package gives out no identity and knows no release; containers it runs
// are those that containerd was told to run. docs/containerd.md says how they
// differ from those of the host's kernel.
package shim

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"hauberk.dev/internal/version"
)

// Name of the runtime as containerd's users write it.
const Name = "io.containerd.hauberk.v2"

const (
	defaultState = "/var/lib/hauberk-shim"
	defaultRun   = "/run/hauberk-shim"
	defaultPool  = 1
	maxPool      = 64
	// cleanup bounds what a deletion may take.
	cleanup = 30 * time.Second
)

// config is where a shim keeps things.
type config struct {
	state string // kernel artefacts, images
	run   string // machines
	// cold machines come from no keeper; else it keeps pool of each size ahead.
	cold bool
	pool int
}

// parseStart reads how machines start: "pool", "pool:N", "clone" or "cold".
func (c *config) parseStart(text string) error {
	number, counted := strings.CutPrefix(text, "pool:")
	switch {
	case text == "" || text == "pool":
		c.pool = defaultPool
	case text == "cold":
		c.cold = true
	case text == "clone":
		c.pool = 0
	default:
		n, err := strconv.Atoi(number)
		if !counted || err != nil || n < 0 || n > maxPool {
			return fmt.Errorf("read HAUBERK_SHIM_START %q: want cold, clone, pool or pool:N with N up to %d", text, maxPool)
		}
		c.pool = n
	}
	return nil
}

// environment reads the configuration, which containerd hands on from its own
// environment.
func environment(lookup func(string) string) (config, error) {
	c := config{state: defaultState, run: defaultRun}
	if err := c.parseStart(lookup("HAUBERK_SHIM_START")); err != nil {
		return config{}, err
	}
	for _, v := range []struct {
		name string
		into *string
	}{{"HAUBERK_SHIM_STATE", &c.state}, {"HAUBERK_SHIM_RUN", &c.run}} {
		given := lookup(v.name)
		if given == "" {
			continue
		}
		if !filepath.IsAbs(given) || filepath.Clean(given) != given {
			return config{}, fmt.Errorf("read %s %q: want an absolute path in its shortest form", v.name, given)
		}
		*v.into = given
	}
	return c, nil
}

// arguments are what containerd says on the command line.
type arguments struct {
	action    string // start, delete or none: serve
	namespace string
	id        string
	address   string // of containerd
	bundle    string
	publish   string // program of containerd; unused, events go over ttrpc
	debug     bool
	info      bool
	version   bool
}

// identifier is what containerd takes for a name.
var identifier = regexp.MustCompile(`^[A-Za-z0-9]+([._-][A-Za-z0-9]+)*$`)

const maxIdentifier = 76

func parseArguments(args []string, stderr io.Writer) (arguments, error) {
	var a arguments
	var socket string
	f := flag.NewFlagSet("containerd-shim-hauberk-v2", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&a.namespace, "namespace", "", "containerd's namespace")
	f.StringVar(&a.id, "id", "", "the container")
	f.StringVar(&a.address, "address", "", "containerd's gRPC address")
	f.StringVar(&a.bundle, "bundle", "", "the container's bundle, if it is not the working directory")
	f.StringVar(&a.publish, "publish-binary", "", "taken for older callers; events go over ttrpc")
	f.StringVar(&socket, "socket", "", "taken for older callers; the socket is found")
	f.BoolVar(&a.debug, "debug", false, "log every call")
	f.BoolVar(&a.info, "info", false, "print what this shim is, as containerd reads it")
	f.BoolVar(&a.version, "v", false, "print the version")
	if err := f.Parse(args); err != nil {
		return a, err
	}
	if f.NArg() > 1 {
		return a, fmt.Errorf("read arguments: %q: one action is taken", f.Args())
	}
	a.action = f.Arg(0)
	if a.info || a.version {
		return a, nil
	}
	switch a.action {
	case "", "start", "delete":
	default:
		return a, fmt.Errorf("read arguments: action %q: want start or delete", a.action)
	}
	for _, v := range []struct{ flag, value string }{{"namespace", a.namespace}, {"id", a.id}} {
		if len(v.value) > maxIdentifier || !identifier.MatchString(v.value) {
			return a, fmt.Errorf("read arguments: -%s %q: want letters and digits, joined by one of . _ -, at most %d characters", v.flag, v.value, maxIdentifier)
		}
	}
	return a, nil
}

// Main is the program: containerd calls it to start a shim, to clean up after
// one that died, and, by itself, to serve. It ends when ctx does.
func Main(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	if len(args) > 0 && args[0] == keepAction {
		return keepMachines(ctx, args[1:], stderr)
	}
	a, err := parseArguments(args, stderr)
	if err != nil {
		return err
	}
	switch {
	case a.version:
		_, err := fmt.Fprintf(stdout, "%s:\n  Version:  %s\n", filepath.Base(os.Args[0]), version.String())
		return err
	case a.info:
		return reply(stdout, info())
	}
	c, err := environment(os.Getenv)
	if err != nil {
		return err
	}
	if a.bundle, err = filepath.Abs(a.bundle); err != nil { // none is the working directory
		return fmt.Errorf("find bundle: %w", err)
	}
	switch a.action {
	case "start":
		return start(ctx, a, c, stdin, stdout)
	case "delete":
		ctx, cancel := context.WithTimeout(ctx, cleanup)
		defer cancel()
		r, err := remove(ctx, a, c)
		if err != nil {
			return err
		}
		return reply(stdout, r)
	}
	return serve(ctx, a, c)
}

// reply prints a message as containerd reads it.
func reply(w io.Writer, m proto.Message) error {
	raw, err := proto.Marshal(m)
	if err == nil {
		_, err = w.Write(raw)
	}
	if err != nil {
		return fmt.Errorf("answer containerd: %w", err)
	}
	return nil
}

// readBounded reads a small file, or the start of a stream, whole.
func readBounded(r io.Reader, most int64) ([]byte, error) {
	raw, err := io.ReadAll(io.LimitReader(r, most+1))
	if err == nil && int64(len(raw)) > most {
		err = fmt.Errorf("it has more than %d bytes", most)
	}
	return raw, err
}

func readFile(name string, most int64) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	raw, err := readBounded(f, most)
	if err != nil {
		err = fmt.Errorf("read %s: %w", name, err)
	}
	return raw, errors.Join(err, f.Close())
}
