// Package cri runs a containerd with its CRI, for tests that speak as Kubernetes
// does: containerd 2 built from the module proxy or Debian's own, a registry
// with images made here, Debian's CNI plugins, everything in directories and
// namespaces of its own. It judges nothing; its users do.
package cri

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"hauberk.dev/registry"
)

// options say what shall run.
type options struct {
	dir      string          // for everything that is written
	programs string          // directory with containerd; empty for Debian's
	own      string          // directory with Hauberk's shim and guest
	shipped  []byte          // configuration with the runtime, as users get it
	images   *registry.Store // what can be pulled
}

// Server is a running containerd.
type Server struct {
	options options
	web     *http.Server
	address string // of the registry
	cmd     *exec.Cmd
	exited  chan struct{}
}

// subnet of the pods. It is the namespace's own, so it meets no other.
const subnet = "10.85.0.0/16"

// start starts containerd and waits until its CRI answers.
func start(ctx context.Context, o options) (*Server, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("start registry: %w", err)
	}
	s := &Server{options: o, address: l.Addr().String(), web: &http.Server{Handler: registry.Handler(o.images, nil)}}
	go s.web.Serve(l)
	if err := s.configure(); err != nil {
		s.web.Close()
		return nil, fmt.Errorf("configure containerd: %w", err)
	}
	if err := s.Restart(ctx); err != nil {
		s.web.Close()
		return nil, err
	}
	return s, nil
}

func (s *Server) path(elem ...string) string {
	return filepath.Join(append([]string{s.options.dir}, elem...)...)
}

// Endpoint is the address of the CRI.
func (s *Server) Endpoint() string { return "unix://" + s.path("c.sock") }

// Program is the path of one of containerd's programs.
func (s *Server) Program(name string) string { return filepath.Join(s.options.programs, name) }

// Log is the path of what containerd and its shims said.
func (s *Server) Log() string { return s.path("containerd.log") }

// Pid is containerd's process number.
func (s *Server) Pid() int { return s.cmd.Process.Pid }

// Kill ends containerd at once, as a crash would.
func (s *Server) Kill() {
	s.cmd.Process.Kill()
	<-s.exited
}

// Close ends containerd and the registry.
func (s *Server) Close() error {
	defer s.web.Close()
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop containerd: %w", err)
	}
	var err error
	select {
	case <-s.exited:
	case <-time.After(30 * time.Second):
		s.Kill()
		err = errors.New("stop containerd: it does not end by SIGTERM")
	}
	return errors.Join(err, s.EndKeeper())
}

// EndKeeper ends the keeper of machines, which serves all shims and outlives
// them. Without one it does nothing; the next shim starts another.
func (s *Server) EndKeeper() error {
	keeper := exec.Command(filepath.Join(s.options.own, "containerd-shim-hauberk-v2"), "keep", "-end", "-run", s.path("run"))
	if out, err := keeper.CombinedOutput(); err != nil {
		return fmt.Errorf("end keeper: %w: %s", err, out)
	}
	return nil
}

// Restart starts containerd, the first time or after Kill.
func (s *Server) Restart(ctx context.Context) error {
	log, err := os.OpenFile(s.Log(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	name := "containerd"
	if s.options.programs != "" {
		name = s.Program(name)
	}
	s.cmd = exec.Command(name, "-c", s.path("config.toml"))
	s.cmd.Stdout, s.cmd.Stderr = log, log
	path := s.options.own + ":" + s.options.programs + ":" + os.Getenv("PATH")
	s.cmd.Env = append(os.Environ(), "PATH="+path, "TMPDIR="+s.path("tmp"),
		"HAUBERK_SHIM_STATE="+s.path("shim"), "HAUBERK_SHIM_RUN="+s.path("run"))
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := s.cmd.Start(); err != nil {
		return fmt.Errorf("start containerd: %w", err)
	}
	exited := make(chan struct{})
	s.exited = exited
	go func(cmd *exec.Cmd) { cmd.Wait(); close(exited) }(s.cmd)
	return s.await(ctx)
}

// await asks until the CRI has been loaded, which is after ctr gets answers.
func (s *Server) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		out, err := s.Ctr(ctx, "plugins", "ls", "id==cri")
		if err == nil && strings.Contains(out, "ok") && strings.Contains(out, "grpc") {
			return nil
		}
		select {
		case <-s.exited:
			return fmt.Errorf("start containerd: it ended: %s", Tail(s.Log(), 2000))
		case <-ctx.Done():
			return fmt.Errorf("start containerd: %w: %w: %s%s", ctx.Err(), err, out, Tail(s.Log(), 2000))
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// Ctr calls containerd's client.
func (s *Server) Ctr(ctx context.Context, args ...string) (string, error) {
	name := "ctr"
	if s.options.programs != "" {
		name = s.Program(name)
	}
	out, err := command(ctx, "", name, append([]string{"-a", s.path("c.sock")}, args...)...)
	return string(out), err
}

// Tail is the end of a file.
func Tail(name string, most int) string {
	raw, err := os.ReadFile(name)
	if err != nil {
		return err.Error()
	}
	return string(raw[max(0, len(raw)-most):])
}

// configure writes the files that containerd and its CNI read.
func (s *Server) configure() error {
	files := map[string]string{"cni/10-bridge.conflist": s.network()}
	for _, host := range hosts {
		files["hosts/"+host+"/hosts.toml"] = fmt.Sprintf("server = \"http://%s\"\n[host.\"http://%[1]s\"]\ncapabilities = [\"pull\", \"resolve\"]\n", s.address)
	}
	files["config.toml"] = s.config(s.options.shipped)
	for name, text := range files {
		if err := os.MkdirAll(filepath.Dir(s.path(name)), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(s.path(name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	return os.MkdirAll(s.path("tmp"), 0o1777)
}

// network is what Kubernetes' documentation shows for the plugins of Debian.
func (s *Server) network() string {
	return fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "pods", "plugins": [
 {"type": "bridge", "bridge": "pods0", "isGateway": true, "ipMasq": true, "ipam": {"type": "host-local", "dataDir": %q,
  "ranges": [[{"subnet": %q}]], "routes": [{"dst": "0.0.0.0/0"}]}},
 {"type": "portmap", "capabilities": {"portMappings": true}}]}
`, s.path("ipam"), subnet)
}

// config appends to the shipped configuration what makes this containerd
// private and this machine bearable: it refuses negative values of
// oom_score_adj to roots without CAP_SYS_RESOURCE.
func (s *Server) config(shipped []byte) string {
	var b bytes.Buffer
	version, tables := split(string(shipped))
	runtime, images, streaming := "io.containerd.grpc.v1.cri", "io.containerd.grpc.v1.cri", "io.containerd.grpc.v1.cri"
	if version != "2" {
		runtime, images = "io.containerd.cri.v1.runtime", "io.containerd.cri.v1.images"
	}
	set := func(plugin, table, format string, args ...any) {
		if table != "" {
			table = "." + table
		}
		fmt.Fprintf(&b, "[plugins.%q%s]\n%s\n", plugin, table, fmt.Sprintf(format, args...))
	}
	fmt.Fprintf(&b, "version = %s\nroot = %q\nstate = %q\ndisabled_plugins = [\"io.containerd.internal.v1.opt\", \"io.containerd.nri.v1.nri\"]\n",
		version, s.path("root"), s.path("state"))
	fmt.Fprintf(&b, "[grpc]\naddress = %q\n[ttrpc]\naddress = %q\n", s.path("c.sock"), s.path("c.sock.ttrpc"))
	if version == "2" {
		set(runtime, "", "restrict_oom_score_adj = true\nnetns_mounts_under_state_dir = true\nsandbox_image = %q\nstream_server_port = \"0\"", sandboxImage)
		set(runtime, "cni", "bin_dir = %q\nconf_dir = %q", "/usr/lib/cni", s.path("cni"))
	} else {
		set(runtime, "", "restrict_oom_score_adj = true\nnetns_mounts_under_state_dir = true")
		set(runtime, "cni", "bin_dirs = [%q]\nconf_dir = %q", "/usr/lib/cni", s.path("cni"))
		set(images, "pinned_images", "sandbox = %q", sandboxImage)
		set(streaming, "", "stream_server_port = \"0\"")
	}
	set(images, "registry", "config_path = %q", s.path("hosts"))
	set(runtime, "containerd.runtimes.runc", "runtime_type = \"io.containerd.runc.v2\"")
	b.WriteString(tables)
	return b.String()
}

// split takes the version off a configuration.
func split(text string) (version, tables string) {
	for line := range strings.Lines(text) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "version ="); ok {
			version = strings.TrimSpace(v)
			continue
		}
		tables += line
	}
	return version, tables
}
