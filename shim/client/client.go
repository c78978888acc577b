// Package client asks a shim for what containerd would ask of it, in plain Go
// types: it starts the program, speaks the task service to it, and cleans up
// after one that died.
//
// It is for those who run containers in sandboxes without containerd. It links
// neither the shim nor anything that boots a machine.
package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	bootstrap "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runtimeoptions/v1"
	state "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/ttrpc"
)

// What a caller may have to tell apart.
var (
	// ErrGone means that no shim answers.
	ErrGone = errors.New("no shim answers")
	// ErrNotFound means that the shim does not know the container or process.
	ErrNotFound = errors.New("not found")
	// ErrNotNow means that it cannot be done in the state things are in.
	ErrNotNow = errors.New("not possible now")
	// ErrInvalid means that the shim refuses what it was asked for.
	ErrInvalid = errors.New("refused")
	// ErrDamaged means that a snapshot is not what was written.
	ErrDamaged = errors.New("damaged")
)

// Error is what a shim answers. It is one of the errors above as well.
type Error struct {
	Message string
	kind    error
}

func (e *Error) Error() string { return e.Message }
func (e *Error) Unwrap() error { return e.kind }

// Program is a shim that is, or is to be, started.
type Program struct {
	// Path of containerd-shim-hauberk-v2.
	Path string
	// Namespace, ID and Owner together name the sandbox on this machine.
	// Owner is who asks, where containerd gives its address.
	Namespace, ID, Owner string
	// Bundle holds config.json; Sockets is where the shim will listen, with a
	// short name.
	Bundle, Sockets string
	// Env is added to this process's own.
	Env   []string
	Debug bool
	// Held is open in what starts the shim until it has, however its caller
	// ends; the shim has it not.
	Held *os.File
}

const (
	addressFile = "address" // of a bundle; the shim writes it
	maxAnswer   = 64 << 10
	dialTime    = 5 * time.Second
)

func (p Program) command(ctx context.Context, action string) *exec.Cmd {
	args := []string{"-namespace", p.Namespace, "-id", p.ID, "-address", p.Owner, "-bundle", p.Bundle}
	if p.Debug {
		args = append(args, "-debug")
	}
	cmd := exec.CommandContext(ctx, p.Path, append(args, action)...)
	cmd.Dir = p.Bundle
	// Events have no listener here, whatever this process inherited.
	cmd.Env = append(os.Environ(), append([]string{"TTRPC_ADDRESS="}, p.Env...)...)
	return cmd
}

// Start starts the shim, or finds the one that serves, and connects to it.
func Start(ctx context.Context, p Program) (*Shim, error) {
	in, err := proto.Marshal(&bootstrap.BootstrapParams{InstanceID: p.ID, Namespace: p.Namespace, SocketDir: &p.Sockets})
	if err != nil {
		return nil, fmt.Errorf("start shim: %w", err)
	}
	cmd := p.command(ctx, "start")
	cmd.Stdin = bytes.NewReader(in)
	if p.Held != nil {
		cmd.ExtraFiles = []*os.File{p.Held}
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a terminal's Ctrl-C is not for it
	out, err := output(cmd)
	if err != nil {
		return nil, fmt.Errorf("start shim: %w", err)
	}
	var r bootstrap.BootstrapResult
	if err := proto.Unmarshal(out, &r); err != nil {
		return nil, fmt.Errorf("start shim: read answer: %w", err)
	}
	return dial(ctx, r.GetAddress())
}

// output runs a command and gives what it printed, bounded.
func output(cmd *exec.Cmd) ([]byte, error) {
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && said.Len() > 0:
		text := strings.TrimSpace(said.String())
		return nil, fmt.Errorf("%.4096s", strings.TrimPrefix(text, filepath.Base(cmd.Path)+": "))
	case err != nil:
		return nil, err
	case out.Len() > maxAnswer:
		return nil, fmt.Errorf("%s answered %d bytes", cmd.Path, out.Len())
	}
	return out.Bytes(), nil
}

// Dial connects to the shim that serves a bundle. The error is ErrGone if there
// is none.
func Dial(ctx context.Context, bundle string) (*Shim, error) {
	raw, err := os.ReadFile(filepath.Join(bundle, addressFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrGone
	}
	if err != nil {
		return nil, fmt.Errorf("find shim: %w", err)
	}
	return dial(ctx, strings.TrimSpace(string(raw)))
}

func dial(ctx context.Context, address string) (*Shim, error) {
	path, ok := strings.CutPrefix(address, "unix://")
	if !ok {
		return nil, fmt.Errorf("connect to shim: address %.256q: want a Unix socket", address)
	}
	ctx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, ErrGone
	}
	if err != nil {
		return nil, fmt.Errorf("connect to shim: %w", err)
	}
	c := ttrpc.NewClient(conn)
	return &Shim{conn: c, task: task.NewTTRPCTaskClient(c)}, nil
}

// Delete ends what a shim that died has left behind. It can be called again.
func Delete(ctx context.Context, p Program) error {
	if _, err := output(p.command(ctx, "delete")); err != nil {
		return fmt.Errorf("clean up after shim: %w", err)
	}
	return nil
}

// Shim is a connection to a shim. It may be used by several goroutines.
type Shim struct {
	conn *ttrpc.Client
	task task.TTRPCTaskService
}

// Close hangs up; the shim goes on.
func (s *Shim) Close() error { return s.conn.Close() }

// Streams name where a process's input and output go, in the words that the
// shim knows; none is no stream. With a terminal there is no Stderr.
type Streams struct {
	Stdin, Stdout, Stderr string
	Terminal              bool
}

// Mount is one of a container's root.
type Mount struct {
	Type, Source, Target string
	Options              []string
}

// Create is a container to be made of a bundle.
type Create struct {
	ID, Bundle string
	Root       []Mount // none: the root that config.json names
	Streams    Streams
	// Options of the runtime, as JSON; see docs/containerd.md.
	Options []byte
	// Snapshot is the directory of one that the container goes on from. It runs
	// when it is made.
	Snapshot string
}

// Create makes a container and its sandbox. It returns the process that stands
// for it on this machine.
func (s *Shim) Create(ctx context.Context, c Create) (pid int, err error) {
	q := &task.CreateTaskRequest{
		ID: c.ID, Bundle: c.Bundle, Checkpoint: c.Snapshot,
		Terminal: c.Streams.Terminal, Stdin: c.Streams.Stdin, Stdout: c.Streams.Stdout, Stderr: c.Streams.Stderr,
	}
	for _, m := range c.Root {
		q.Rootfs = append(q.Rootfs, &types.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options})
	}
	if len(c.Options) > 0 {
		raw, err := proto.Marshal(&runtimeoptions.Options{ConfigBody: c.Options})
		if err != nil {
			return 0, fmt.Errorf("create container: %w", err)
		}
		q.Options = &anypb.Any{TypeUrl: "runtimeoptions.v1.Options", Value: raw}
	}
	r, err := s.task.Create(ctx, q)
	if err != nil {
		return 0, said(err)
	}
	return int(r.GetPid()), nil
}

// Start starts a container's process, or one that Exec has noted.
func (s *Shim) Start(ctx context.Context, id, exec string) error {
	_, err := s.task.Start(ctx, &task.StartRequest{ID: id, ExecID: exec})
	return said(err)
}

// Exec notes a process, given as the OCI's process object in JSON, that is to
// be started in a container.
func (s *Shim) Exec(ctx context.Context, id, exec string, process []byte, to Streams) error {
	_, err := s.task.Exec(ctx, &task.ExecProcessRequest{
		ID: id, ExecID: exec, Terminal: to.Terminal, Stdin: to.Stdin, Stdout: to.Stdout, Stderr: to.Stderr,
		Spec: &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Process", Value: process},
	})
	return said(err)
}

// Exit is how a process ended.
type Exit struct {
	Code int
	At   time.Time
}

// Wait waits for the end of a process.
func (s *Shim) Wait(ctx context.Context, id, exec string) (Exit, error) {
	r, err := s.task.Wait(ctx, &task.WaitRequest{ID: id, ExecID: exec})
	if err != nil {
		return Exit{}, said(err)
	}
	return Exit{int(r.GetExitStatus()), r.GetExitedAt().AsTime()}, nil
}

// Delete forgets a process that has ended.
func (s *Shim) Delete(ctx context.Context, id, exec string) (Exit, error) {
	r, err := s.task.Delete(ctx, &task.DeleteRequest{ID: id, ExecID: exec})
	if err != nil {
		return Exit{}, said(err)
	}
	return Exit{int(r.GetExitStatus()), r.GetExitedAt().AsTime()}, nil
}

// Phase of a process.
type Phase string

// The phases.
const (
	Created Phase = "created"
	Running Phase = "running"
	Paused  Phase = "paused"
	Stopped Phase = "stopped"
)

// State is how a process is.
type State struct {
	Phase Phase
	PID   int // of what stands for the sandbox on this machine
	Exit  Exit
}

// State says how a process is.
func (s *Shim) State(ctx context.Context, id, exec string) (State, error) {
	r, err := s.task.State(ctx, &task.StateRequest{ID: id, ExecID: exec})
	if err != nil {
		return State{}, said(err)
	}
	out := State{PID: int(r.GetPid()), Exit: Exit{Code: int(r.GetExitStatus())}}
	switch r.GetStatus() {
	case state.Status_CREATED:
		out.Phase = Created
	case state.Status_RUNNING:
		out.Phase = Running
	case state.Status_PAUSED, state.Status_PAUSING:
		out.Phase = Paused
	case state.Status_STOPPED:
		out.Phase, out.Exit.At = Stopped, r.GetExitedAt().AsTime()
	default:
		return State{}, fmt.Errorf("read state of %q: the shim says %v", id, r.GetStatus())
	}
	return out, nil
}

// Kill signals a process, or all of a container.
func (s *Shim) Kill(ctx context.Context, id, exec string, signal syscall.Signal, all bool) error {
	_, err := s.task.Kill(ctx, &task.KillRequest{ID: id, ExecID: exec, Signal: uint32(signal), All: all})
	return said(err)
}

// Resize sets the size of a process's terminal.
func (s *Shim) Resize(ctx context.Context, id, exec string, rows, cols uint16) error {
	_, err := s.task.ResizePty(ctx, &task.ResizePtyRequest{ID: id, ExecID: exec, Height: uint32(rows), Width: uint32(cols)})
	return said(err)
}

// Pause freezes a container; Resume lets it go on.
func (s *Shim) Pause(ctx context.Context, id string) error {
	_, err := s.task.Pause(ctx, &task.PauseRequest{ID: id})
	return said(err)
}

// Resume is Pause's way back.
func (s *Shim) Resume(ctx context.Context, id string) error {
	_, err := s.task.Resume(ctx, &task.ResumeRequest{ID: id})
	return said(err)
}

// Shutdown ends a shim that has no container, or any if now is set. The answer
// may be lost with the shim.
func (s *Shim) Shutdown(ctx context.Context, id string, now bool) error {
	_, err := s.task.Shutdown(ctx, &task.ShutdownRequest{ID: id, Now: now})
	if err = said(err); errors.Is(err, ErrGone) {
		return nil
	}
	return err
}

// said turns the answer of a call into what callers branch on, without the
// words of the protocol.
func said(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, ttrpc.ErrClosed) {
		return ErrGone
	}
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	kind, known := map[codes.Code]error{
		codes.NotFound: ErrNotFound, codes.FailedPrecondition: ErrNotNow, codes.InvalidArgument: ErrInvalid,
		codes.AlreadyExists: ErrNotNow, codes.DataLoss: ErrDamaged, codes.Unimplemented: ErrInvalid,
		codes.DeadlineExceeded: context.DeadlineExceeded, codes.Canceled: context.Canceled,
	}[st.Code()]
	if !known {
		kind = nil
	}
	return &Error{Message: st.Message(), kind: kind}
}
