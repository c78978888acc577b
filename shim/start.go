package shim

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/protobuf/proto"

	bootstrap "github.com/containerd/containerd/api/runtime/bootstrap/v1"

	"hauberk.dev/internal/atomicfile"
)

const (
	defaultSockets = "/run/containerd/s"
	scheme         = "unix://"
	maxBootstrap   = 1 << 20
	// eventsAddress is the variable that names containerd's ttrpc socket.
	eventsAddress = "TTRPC_ADDRESS"
)

// readBootstrap reads what containerd says on standard input. Since 2.4 these
// are parameters that repeat the flags; before, nothing or the runtime's
// options, which a parser of protobuf may well take for parameters. So they
// count only if they say the same as the flags, and nil is an older caller.
func readBootstrap(stdin io.Reader, a arguments) (*bootstrap.BootstrapParams, error) {
	raw, err := readBounded(stdin, maxBootstrap)
	if err != nil {
		return nil, fmt.Errorf("read parameters: %w", err)
	}
	p := &bootstrap.BootstrapParams{}
	if proto.Unmarshal(raw, p) != nil || p.GetInstanceID() != a.id || p.GetNamespace() != a.namespace {
		return nil, nil
	}
	return p, nil
}

// socketPath is where the shim of a pod, which a names, listens: short, for a
// socket's name may have 108 bytes.
func socketPath(a arguments, p *bootstrap.BootstrapParams) (string, error) {
	dir := p.GetSocketDir()
	if dir == "" {
		dir = defaultSockets
	}
	if !filepath.IsAbs(dir) {
		return "", fmt.Errorf("read parameters: socket directory %q: want an absolute path", dir)
	}
	path := filepath.Join(dir, fmt.Sprintf("%x", sha256.Sum256([]byte(filepath.Join(a.address, a.namespace, a.id)))))
	if len(path) > 106 {
		return "", fmt.Errorf("read parameters: socket directory %q: sockets in it would have names of more than 106 bytes", dir)
	}
	return path, nil
}

// answer is what containerd reads on standard output.
func answer(p *bootstrap.BootstrapParams, socket string) ([]byte, error) {
	address := scheme + socket
	if p == nil {
		return []byte(address), nil
	}
	return proto.Marshal(&bootstrap.BootstrapResult{Version: 3, Address: address, Protocol: "ttrpc"})
}

// start starts the process that serves, and says where it listens. A container
// of a pod has that of its pod.
func start(ctx context.Context, a arguments, c config, stdin io.Reader, stdout io.Writer) error {
	p, err := readBootstrap(stdin, a)
	if err != nil {
		return err
	}
	b, err := readBundle(a.bundle, a.id)
	if err != nil {
		return fmt.Errorf("start shim: %w", err)
	}
	shim := a
	shim.id = b.pod
	socket, err := socketPath(shim, p)
	if err != nil {
		return err
	}
	if b.role == roleMember {
		err = join(a, socket)
	} else {
		err = found(ctx, a, c, p, socket)
	}
	if err != nil {
		return err
	}
	out, err := answer(p, socket)
	if err == nil {
		_, err = stdout.Write(out)
	}
	return err
}

// found starts the shim of a pod, unless it is there.
func found(ctx context.Context, a arguments, c config, p *bootstrap.BootstrapParams, socket string) error {
	k, err := c.succeed(ctx, a, socket)
	if err != nil || k == nil {
		return err
	}
	ln, err := listen(socket)
	if err != nil || ln == nil {
		return errors.Join(err, k.drop())
	}
	events := p.GetContainerdTtrpcAddress()
	if events == "" {
		events = os.Getenv(eventsAddress)
	}
	if err := spawn(a, socket, events, ln, k.file); err != nil {
		return errors.Join(err, os.Remove(socket), k.drop())
	}
	return k.leave() // the shim has it now
}

// succeed takes the claim of a new shim, and puts away what the last of its name
// left. It returns nil if that serves.
func (c config) succeed(ctx context.Context, a arguments, socket string) (*claim, error) {
	machine := machineID(a)
	for late := time.Now().Add(succession); ; time.Sleep(5 * time.Millisecond) {
		if served(socket) {
			return nil, nil
		}
		k, err := c.take(machine, true)
		if err != nil {
			return nil, fmt.Errorf("start shim: %w", err)
		}
		if k == nil {
			if time.Now().After(late) || ctx.Err() != nil {
				return nil, fmt.Errorf("start shim: the last one of %q does not end", a.id)
			}
			continue
		}
		if k.said != (entry{}) {
			if err := k.settle(ctx, c); err != nil {
				return nil, fmt.Errorf("start shim: put away what the last one left: %w", err)
			}
			continue
		}
		// The last one may have been killed in the middle of a line.
		if err := errors.Join(k.file.Truncate(0), k.note(entry{ID: a.id, Bundle: a.bundle, Socket: socket})); err != nil {
			return nil, errors.Join(err, k.drop())
		}
		return k, nil
	}
}

// join finds the shim of a container's pod.
func join(a arguments, socket string) error {
	if !served(socket) {
		return fmt.Errorf("start shim: the pod of container %q is not running", a.id)
	}
	if err := atomicfile.Write(filepath.Join(a.bundle, addressFile), []byte(scheme+socket), 0o644); err != nil {
		return fmt.Errorf("start shim: %w", err)
	}
	return nil
}

// served says whether a shim listens on a socket.
func served(socket string) bool {
	conn, err := net.Dial("unix", socket)
	if errors.Is(err, syscall.EAGAIN) {
		return true // so many ask that its queue is full
	}
	return err == nil && conn.Close() == nil
}

// listen opens the socket of a shim. It returns nil if a shim serves it: then
// containerd asks for the same one again.
func listen(socket string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(socket), 0o711); err != nil {
		return nil, fmt.Errorf("open socket: %w", err)
	}
	for range 2 {
		ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
		if err == nil {
			ln.SetUnlinkOnClose(false)
			if err := os.Chmod(socket, 0o600); err != nil {
				return nil, errors.Join(fmt.Errorf("open socket: %w", err), ln.Close())
			}
			f, err := ln.File()
			return f, errors.Join(err, ln.Close())
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			return nil, fmt.Errorf("open socket: %w", err)
		}
		if served(socket) {
			return nil, nil
		}
		// Nobody listens: its shim was killed.
		if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("open socket: %w", err)
		}
	}
	return nil, fmt.Errorf("open socket: %s is taken again and again", socket)
}

// spawn starts this program anew, to serve the socket, and leaves it to
// itself.
func spawn(a arguments, socket, events string, ln, claim *os.File) error {
	defer ln.Close()
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("start shim: %w", err)
	}
	args := []string{"-namespace", a.namespace, "-id", a.id, "-address", a.address, "-bundle", a.bundle}
	if a.debug {
		args = append(args, "-debug")
	}
	cmd := exec.Command(self, args...)
	cmd.Dir = a.bundle
	cmd.Env = append(os.Environ(), eventsAddress+"="+events)
	cmd.ExtraFiles = []*os.File{ln, claim}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start shim: %w", err)
	}
	err = errors.Join(
		atomicfile.Write(filepath.Join(a.bundle, "shim.pid"), []byte(strconv.Itoa(cmd.Process.Pid)), 0o644),
		atomicfile.Write(filepath.Join(a.bundle, addressFile), []byte(scheme+socket), 0o644))
	if err != nil {
		err = errors.Join(fmt.Errorf("start shim: %w", err), cmd.Process.Kill())
		_ = cmd.Wait() // it was killed
		return err
	}
	return cmd.Process.Release()
}

// ownSocket gives what removes the socket of this shim, once, and only while the
// name still means it: the next shim of the same container has the same name.
func ownSocket(path string) (release func()) {
	mine, err := os.Lstat(path)
	return sync.OnceFunc(func() {
		now, nowErr := os.Lstat(path)
		if err == nil && nowErr == nil && os.SameFile(mine, now) {
			_ = os.Remove(path) // at worst the next shim takes it over
		}
	})
}

// addressFile of a bundle says where its shim listens.
const addressFile = "address"

// readAddress gives the socket that a bundle names, or nothing.
func readAddress(bundle string) (socket string, err error) {
	raw, err := readFile(filepath.Join(bundle, addressFile), 4096)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	socket, ok := strings.CutPrefix(strings.TrimSpace(string(raw)), scheme)
	if fi, err := os.Lstat(socket); !ok || err != nil || fi.Mode().Type() != fs.ModeSocket {
		return "", nil // gone, or none of ours
	}
	return socket, nil
}

// removeSocket removes the socket of a dead shim. One that is served is
// another's.
func removeSocket(socket string) error {
	if fi, err := os.Lstat(socket); err != nil || fi.Mode().Type() != fs.ModeSocket || served(socket) {
		return nil // gone, none of ours, or alive
	}
	if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
