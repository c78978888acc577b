package kube

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"syscall"

	"k8s.io/client-go/kubernetes"
	restclient "k8s.io/client-go/rest"
)

// Options of a Server.
type Options struct {
	// Dir holds the objects. It is created with mode 0700; one server at a
	// time uses it.
	Dir string
	// Listener to serve on, or else Address to listen on: a loopback address
	// with a port, 127.0.0.1:6443 if empty, port 0 for any that is free.
	Listener net.Listener
	Address  string
	// Certificate and Key of the server, PEM. The certificate must name the
	// host that clients dial.
	Certificate, Key []byte
	// ClientRoots are the PEM certificates that accounts chain to. Prefer
	// roots that sign nothing else.
	ClientRoots []byte
	// Version of Hauberk, for the answer to /version.
	Version string
	// Log takes what goes wrong; nil drops it.
	Log *slog.Logger
}

// Server is the API server of embedded mode.
type Server struct {
	options  Options
	listener net.Listener
	serving  *serving
	ready    chan struct{}
	log      *slog.Logger
}

// Open takes the address and checks the options. The server answers once Run
// is called; call Close only if it never is.
func Open(o Options) (*Server, error) {
	if _, err := tls.X509KeyPair(o.Certificate, o.Key); err != nil {
		return nil, fmt.Errorf("open API server: read its certificate: %w", err)
	}
	if _, err := clientCertificates(o.ClientRoots); err != nil {
		return nil, fmt.Errorf("open API server: %w", err)
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Version == "" {
		o.Version = "dev"
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil || o.Dir == "" {
		return nil, fmt.Errorf("open API server: data folder %q: %w", o.Dir, errors.Join(err, errors.New("name a folder")))
	}
	o.Dir = dir
	if err := privateDir(dir); err != nil {
		return nil, fmt.Errorf("open API server: %w", err)
	}
	s := &Server{options: o, listener: o.Listener, serving: &serving{cert: o.Certificate, key: o.Key}, ready: make(chan struct{}), log: o.Log}
	if s.listener == nil {
		if s.listener, err = listen(o.Address); err != nil {
			return nil, fmt.Errorf("open API server: %w", err)
		}
	}
	return s, nil
}

func listen(address string) (net.Listener, error) {
	if address == "" {
		address = "127.0.0.1:6443"
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("listen on %q: %w: write host:port", address, err)
	}
	if ip := net.ParseIP(host); ip == nil || !ip.IsLoopback() {
		return nil, fmt.Errorf("listen on %q: the API is for this machine only: use a loopback address such as 127.0.0.1", address)
	}
	ln, err := net.Listen("tcp", address)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("listen on %s: another program uses this address: stop it (ss -ltnp shows it) or choose another port: %w", address, err)
	}
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", address, err)
	}
	return ln, nil
}

// URL that clients dial.
func (s *Server) URL() string { return "https://" + s.listener.Addr().String() }

// Ready is closed when every resource can be read and written.
func (s *Server) Ready() <-chan struct{} { return s.ready }

// Close lets go of the address of a server that never ran.
func (s *Server) Close() error { return s.listener.Close() }

// Run serves until ctx ends or a part fails. What a client was told is stored
// is on disk by then, however the process ends. A store that can no longer
// write, as on a full disk, says so in the log and ends the process: going on
// would be to promise what it cannot keep.
func (s *Server) Run(ctx context.Context) (err error) {
	defer func() {
		if closing := s.listener.Close(); !errors.Is(closing, net.ErrClosed) {
			err = errors.Join(err, closing)
		}
	}()
	store, err := openEtcd(ctx, s.options.Dir, s.log)
	if err != nil {
		return fmt.Errorf("run API server: %w", err)
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	serve, loopback, err := s.assemble(store.endpoint)
	if err != nil {
		return fmt.Errorf("run API server: %w", err)
	}
	if err := s.serve(ctx, store, serve, loopback); err != nil {
		return fmt.Errorf("run API server: %w", err)
	}
	return nil
}

// serve runs the assembled server and what belongs to it; the first to end
// ends the rest.
func (s *Server) serve(ctx context.Context, store *etcdStore, serve func(context.Context) error, loopback *restclient.Config) error {
	inner, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var parts sync.WaitGroup
	run := func(name string, f func(context.Context) error) {
		parts.Go(func() {
			err := f(inner)
			if ctx.Err() == nil {
				cancel(fmt.Errorf("%s ended: %w", name, errors.Join(err, errors.New("it should run on"))))
			}
		})
	}
	run("server", serve)
	run("store", func(ctx context.Context) error {
		select {
		case err := <-store.etcd.Err():
			return err
		case <-ctx.Done():
			return nil
		}
	})
	if err := s.prepare(inner, loopback); err == nil {
		close(s.ready)
		run("namespace controller", func(ctx context.Context) error {
			j, err := newJanitor(loopback, s.log)
			if err != nil {
				return err
			}
			return j.Run(ctx)
		})
	} else {
		cancel(err)
	}
	<-inner.Done()
	parts.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return context.Cause(inner)
}

// prepare waits for the server and gives it what every client expects.
func (s *Server) prepare(ctx context.Context, loopback *restclient.Config) error {
	client, err := kubernetes.NewForConfig(loopback)
	if err != nil {
		return err
	}
	err = await(ctx, "API server", func(ctx context.Context) error {
		return client.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
	})
	if err != nil {
		return err
	}
	if err := makeNamespaces(ctx, loopback); err != nil {
		return err
	}
	return installDefinitions(ctx, loopback)
}
