package command

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"

	"github.com/spf13/pflag"

	"hauberk.dev/api/admin"
	"hauberk.dev/cmd/hauberk/internal/supervise"
)

// installation is what the programs of this machine are started with. up takes
// it from people and hands it to the supervisor as the same flags.
type installation struct {
	programs     string
	api          string
	nodeListen   string
	door         string
	gateway      string
	trustDomain  string
	node         string
	controlUser  string
	meshUser     string
	withoutGuard bool
}

func (i *installation) flags(f *pflag.FlagSet) {
	i.programs = beside()
	f.Var(place{&i.programs}, "programs", "directory of the other programs")
	f.StringVar(&i.api, "api", "127.0.0.1:7443", "address of the Kubernetes-style API")
	f.StringVar(&i.nodeListen, "node-listen", "127.0.0.1:7444", "address on which the control plane waits for nodes")
	f.StringVar(&i.door, "door", "127.0.0.1:7445", "address on which the node waits for the control plane")
	f.StringVar(&i.gateway, "gateway", "127.0.0.1:15008", "address of the mesh between nodes (HBONE)")
	f.StringVar(&i.trustDomain, "trust-domain", "hauberk.local", "trust domain of every identity issued here")
	f.StringVar(&i.node, "node", "local", "name of this node")
	f.StringVar(&i.controlUser, "control-user", "hauberkd", "user of the control plane: a name, made if missing, or UID:GID")
	f.StringVar(&i.meshUser, "mesh-user", "hauberk-mesh", "user of the mesh: a name, made if missing, or UID:GID")
	f.BoolVar(&i.withoutGuard, "without-guard", false, "boot sandboxes without the Guard, to see the checks notice")
}

// arguments renders the flags for the supervisor.
func (i *installation) arguments() (args []string) {
	f := pflag.NewFlagSet("", pflag.ContinueOnError)
	given := *i // registering flags writes their defaults
	i.flags(f)
	*i = given
	f.VisitAll(func(f *pflag.Flag) { args = append(args, "--"+f.Name+"="+f.Value.String()) })
	return args
}

// beside is the directory of this program.
func beside() string {
	self, err := os.Executable()
	if err != nil {
		return "."
	}
	return filepath.Dir(self)
}

// list names the programs in the order of starting. The node comes last and is
// stopped first: it ends its sandboxes while the others can still record it.
func (i *installation) list(state, run string) ([]supervise.Program, error) {
	control, err := account(i.controlUser)
	if err != nil {
		return nil, err
	}
	mesh, err := account(i.meshUser)
	if err != nil {
		return nil, err
	}
	link, next := filepath.Join(run, "mesh", "link.sock"), filepath.Join(run, "mesh", "next.sock")
	node := []string{
		"--state=" + filepath.Join(state, "node"), "--run=" + filepath.Join(run, "node"),
		"--join=" + filepath.Join(run, "control", "admin.sock"), "--control=" + i.nodeListen,
		"--name=" + i.node, "--door=" + i.door, "--gateway=" + i.gateway, "--mesh-link=" + link,
		"--guest-agent=" + filepath.Join(i.programs, "hauberk-guest"),
	}
	daemon := []string{
		"--state=" + filepath.Join(state, "control"), "--run=" + filepath.Join(run, "control"),
		"--listen=" + i.api, "--node-listen=" + i.nodeListen, "--trust-domain=" + i.trustDomain,
	}
	if i.withoutGuard {
		node = append(node, "--without-guard")
		daemon = append(daemon, "--insecure-guard-off")
	}
	return []supervise.Program{
		{Name: "hauberkd", Path: filepath.Join(i.programs, "hauberkd"), User: &control, Args: daemon},
		{Name: "hauberk-mesh", Path: filepath.Join(i.programs, "hauberk-mesh"), User: &mesh, Args: []string{"--link=" + link, "--handover=" + next},
			TakeOver: []string{"--take-over=" + next}},
		// SIGTERM asks the node to end its sandboxes; killed, it leaves them
		// to be adopted by the next.
		{Name: "hauberk-node", Path: filepath.Join(i.programs, "hauberk-node"), Args: node, Leave: syscall.SIGKILL},
	}, nil
}

// account finds the user of a program.
func account(name string) (supervise.User, error) {
	if len(name) > 0 && name[0] >= '0' && name[0] <= '9' {
		return supervise.ParseUser(name)
	}
	u, _, err := supervise.SystemUser(name)
	return u, err
}

// prepare makes the directories, each owned by the program that writes there.
func (i *installation) prepare(state, run string) error {
	control, err := account(i.controlUser)
	if err != nil {
		return err
	}
	mesh, err := account(i.meshUser)
	if err != nil {
		return err
	}
	for _, d := range []struct {
		path  string
		mode  fs.FileMode
		owner *supervise.User
	}{
		{state, 0o755, nil},
		{filepath.Join(state, "log"), 0o750, nil},
		{filepath.Join(state, "accounts"), 0o700, nil},
		{filepath.Join(state, "control"), 0o700, &control},
		{filepath.Join(state, "node"), 0o700, nil},
		{run, 0o755, nil},
		{filepath.Join(run, "control"), 0o700, &control},
		{filepath.Join(run, "mesh"), 0o700, &mesh},
		{filepath.Join(run, "node"), 0o700, nil},
	} {
		if err := directory(d.path, d.mode, d.owner); err != nil {
			return err
		}
	}
	return nil
}

// directory makes a directory, or takes one that is there. One that is a link
// is refused: its target may be anybody's.
func directory(path string, mode fs.FileMode, owner *supervise.User) error {
	if err := os.MkdirAll(path, 0o755); err != nil {
		return err
	}
	fi, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if !fi.IsDir() {
		return fmt.Errorf("make directory %s: there is a %v in its place", path, fi.Mode().Type())
	}
	if owner != nil {
		if err := os.Lchown(path, int(owner.UID), int(owner.GID)); err != nil {
			return err
		}
	}
	return os.Chmod(path, mode)
}

// check finds, before anything is started, what would stop it.
func (i *installation) check() error {
	if os.Geteuid() != 0 {
		return &admin.Error{Message: "hauberk up needs root: it makes network namespaces and machines", Fix: "run it with sudo"}
	}
	for _, name := range []string{"hauberkd", "hauberk-mesh", "hauberk-node", "hauberk-guest"} {
		if _, err := os.Stat(filepath.Join(i.programs, name)); err != nil {
			return &admin.Error{Message: fmt.Sprintf("%s is not in %s", name, i.programs), Fix: "build it with make build, or name its directory with --programs"}
		}
	}
	var faults []error
	for _, l := range []struct{ flag, address string }{
		{"api", i.api}, {"node-listen", i.nodeListen}, {"door", i.door}, {"gateway", i.gateway},
	} {
		ln, err := net.Listen("tcp", l.address)
		if err != nil {
			faults = append(faults, fmt.Errorf("--%s %s: %w", l.flag, l.address, err))
			continue
		}
		ln.Close()
	}
	if err := errors.Join(faults...); err != nil {
		return &admin.Error{Message: err.Error(), Fix: "see who listens with: ss -ltnp; or choose another address with the flag named above"}
	}
	return nil
}
