// Package installation gives a test an installation of its own: the programs
// built from this tree, started by the command line as people start them, in
// directories and on ports that nobody else uses.
//
// It also counts what an installation leaves behind. Nothing here knows what
// the programs promise; that is for the tests.
package installation

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"hauberk.dev/api/admin"
)

// Installation is a set of programs and where they keep what is theirs.
type Installation struct {
	// Root holds everything; Programs, State and Run lie in it.
	Root, Programs, State, Run string
	// Tree is the source tree the programs were built from.
	Tree string
	// API, NodeListen, Door, Gateway and Web are host:port addresses.
	API, NodeListen, Door, Gateway, Web string

	t     testing.TB
	http  *http.Client
	known inventory // what was on the machine before
}

// New builds the programs and finds free ports; it starts nothing. When the
// test ends the installation is stopped and its directories are removed.
func New(t testing.TB) *Installation {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("tests of a whole installation need root: it makes network namespaces and machines")
	}
	// Not t.TempDir: a socket's path has 107 bytes, and two users must reach in.
	root, err := os.MkdirTemp("", "hb")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(root) })
	if err := os.Chmod(root, 0o755); err != nil {
		t.Fatal(err)
	}
	_, here, _, _ := runtime.Caller(0)
	i := &Installation{
		Root: root, Programs: filepath.Join(root, "bin"), State: filepath.Join(root, "s"), Run: filepath.Join(root, "r"),
		Tree: filepath.Join(filepath.Dir(here), "..", ".."), t: t,
	}
	free := ports(t, 5)
	i.API, i.NodeListen, i.Door, i.Gateway, i.Web = free[0], free[1], free[2], free[3], free[4]
	i.http = i.client()
	i.build()
	i.adoptOrphans()
	i.known = i.inventory()
	t.Cleanup(i.end)
	return i
}

// ports finds addresses that are free now. They are held until all are found.
func ports(t testing.TB, n int) (free []string) {
	for range n {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		free = append(free, ln.Addr().String())
	}
	return free
}

func (i *Installation) build() {
	i.t.Helper()
	cmd := exec.Command("go", "build", "-ldflags=-s -w", "-o", i.Programs+"/",
		"./cmd/hauberk", "./cmd/hauberkd", "./cmd/hauberk-node", "./cmd/hauberk-mesh", "./cmd/hauberk-guest")
	cmd.Dir = i.Tree
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false")
	if out, err := cmd.CombinedOutput(); err != nil {
		i.t.Fatalf("build the programs: %v\n%s", err, out)
	}
}

// end stops whatever still runs.
func (i *Installation) end() {
	if i.t.Failed() {
		i.logs()
	}
	if r := i.Hauberk(2*time.Minute, "down"); r.Code != 0 {
		i.t.Errorf("down: %s", r)
	}
	for _, l := range i.Leaks() {
		i.t.Errorf("left behind: %s", l)
	}
	i.killDescendants()
}

// logs puts the ends of the programs' logs into the test's.
func (i *Installation) logs() {
	files, _ := filepath.Glob(filepath.Join(i.State, "log", "*.log"))
	for _, name := range files {
		data, _ := os.ReadFile(name)
		const most = 6 << 10
		i.t.Logf("end of %s:\n%s", name, data[max(0, len(data)-most):])
	}
}

// Result of a command.
type Result struct {
	Args           []string
	Stdout, Stderr string
	Code           int
	Took           time.Duration
}

func (r Result) String() string {
	return fmt.Sprintf("hauberk %s: exit code %d after %v\n%s%s", strings.Join(r.Args, " "), r.Code, r.Took.Round(time.Millisecond), r.Stdout, r.Stderr)
}

// Hauberk runs the command line against this installation.
func (i *Installation) Hauberk(within time.Duration, args ...string) Result {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	args = append(args, "--state="+i.State, "--run="+i.Run)
	cmd := exec.CommandContext(ctx, filepath.Join(i.Programs, "hauberk"), args...)
	cmd.WaitDelay = 5 * time.Second
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	began := time.Now()
	err := cmd.Run()
	r := Result{Args: args, Stdout: out.String(), Stderr: errs.String(), Took: time.Since(began)}
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		r.Code = exit.ExitCode()
	case err != nil:
		r.Code, r.Stderr = -1, r.Stderr+err.Error()
	}
	return r
}

// Up runs hauberk up with the addresses and users of this installation.
func (i *Installation) Up(within time.Duration, args ...string) Result {
	return i.Hauberk(within, append([]string{"up", "--api=" + i.API, "--node-listen=" + i.NodeListen, "--door=" + i.Door,
		"--gateway=" + i.Gateway, "--control-user=61001:61001", "--mesh-user=61002:61002"}, args...)...)
}

// Bank brings examples/bank up. The flags, such as --check, come first.
func (i *Installation) Bank(within time.Duration, flags ...string) Result {
	_, port, err := net.SplitHostPort(i.Web)
	if err != nil {
		i.t.Fatal(err)
	}
	return i.Up(within, append(flags, "--set=WEB_PORT="+port, filepath.Join(i.Tree, "examples", "bank"))...)
}

// Kubeconfig is the file that up has written.
func (i *Installation) Kubeconfig() string { return filepath.Join(i.Run, "control", "kubeconfig") }

// client talks to the control plane's socket. Every question has a connection
// of its own, so that none outlives the program that answers.
func (i *Installation) client() *http.Client {
	socket := filepath.Join(i.Run, "control", "admin.sock")
	return &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}}
}

// Ask reads a path of the control plane's own protocol.
func (i *Installation) Ask(path string, q url.Values, into any) error {
	resp, err := i.http.Get("http://hauberkd" + path + "?" + q.Encode())
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s: %.300q", path, resp.Status, data)
	}
	return json.Unmarshal(data, into)
}

// Status of the installation.
func (i *Installation) Status() (s admin.Status, err error) {
	err = i.Ask(admin.PathStatus, nil, &s)
	return s, err
}

// Instances of a namespace.
func (i *Installation) Instances(namespace string) (list []admin.Instance, err error) {
	err = i.Ask(admin.PathInstances, url.Values{"namespace": {namespace}}, &list)
	return list, err
}

// Ledger returns all entries from an index on.
func (i *Installation) Ledger(from uint64) (all []admin.LedgerEntry, err error) {
	for {
		var page []admin.LedgerEntry
		q := url.Values{"from": {strconv.FormatUint(from, 10)}, "limit": {"1000"}}
		if err := i.Ask(admin.PathLedger, q, &page); err != nil || len(page) == 0 {
			return all, err
		}
		all = append(all, page...)
		from = page[len(page)-1].Index + 1
	}
}

// PID of a program, as the supervisor wrote it down: hauberkd, hauberk-node,
// hauberk-mesh or supervisor.
func (i *Installation) PID(program string) (int, error) {
	data, err := os.ReadFile(filepath.Join(i.Run, program+".pid"))
	if err != nil {
		return 0, err
	}
	var id struct{ PID int }
	if err := json.Unmarshal(data, &id); err != nil || id.PID <= 1 {
		return 0, fmt.Errorf("read pid of %s: %q names no process", program, data)
	}
	return id.PID, nil
}
