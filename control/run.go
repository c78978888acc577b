package control

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"time"

	"hauberk.dev/id"
	"hauberk.dev/internal/run"
	"hauberk.dev/kube"
	"hauberk.dev/registry"
)

// AdminSocket is the name of the administrator's socket in Config.Run.
const AdminSocket = "admin.sock"

// shutdownGrace is how long open requests may take to end.
const shutdownGrace = 2 * time.Second

// Run serves until ctx ends or a part fails, then closes everything.
func (c *Control) Run(ctx context.Context) (err error) {
	defer func() { err = errors.Join(err, c.Close()) }()
	source, cert, key, err := c.serverCredential(ctx)
	if err != nil {
		return err
	}
	c.self = source
	if err := c.openAPI(cert, key); err != nil {
		return err
	}
	doorLn, err := net.Listen("tcp", c.conf.Door)
	if err != nil {
		return errors.Join(fmt.Errorf("open node door: %w: free the address or choose another --node-listen", err), c.api.Close())
	}
	deskLn, err := listenDesk(filepath.Join(c.conf.Run, AdminSocket))
	if err != nil {
		return errors.Join(err, doorLn.Close(), c.api.Close())
	}
	access, err := c.accounts(ctx)
	if err != nil {
		return errors.Join(err, doorLn.Close(), deskLn.Close(), c.api.Close())
	}
	return run.All(ctx,
		run.Task{Name: "api", Run: c.api.Run},
		run.Task{Name: "store", Run: func(ctx context.Context) error { return c.serveStore(ctx, access, doorLn, deskLn) }},
	)
}

// serveStore waits for the API, then runs all that needs it.
func (c *Control) serveStore(ctx context.Context, access kube.Access, doorLn, deskLn net.Listener) error {
	defer doorLn.Close()
	defer deskLn.Close()
	select {
	case <-c.api.Ready():
	case <-ctx.Done():
		return nil
	}
	var err error
	if c.store, err = kube.Connect(ctx, access); err != nil {
		return err
	}
	nodes := &door{c: c, registry: registry.Handler(c.content, c.gate)}
	people := &desk{c: c}
	return run.All(ctx,
		run.Task{Name: "store", Run: c.store.Run},
		run.Task{Name: "watch", Run: c.watchStore},
		run.Task{Name: "reconciler", Run: c.reconcileAfterFill},
		run.Task{Name: "renewal", Run: c.renewLoop},
		run.HTTP("door", server(nodes.handler()), tls.NewListener(doorLn, id.ServerTLS(c.self, id.AnyOf(id.KindNode, c.conf.TrustDomain))), shutdownGrace),
		run.HTTP("desk", withPeers(server(people.handler())), deskLn, shutdownGrace),
	)
}

func server(h http.Handler) *http.Server {
	return &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second, MaxHeaderBytes: 64 << 10}
}

func withPeers(s *http.Server) *http.Server {
	s.ConnContext = withPeer
	return s
}

func (c *Control) watchStore(ctx context.Context) error {
	return c.store.Watch(ctx, func(context.Context) { c.look() })
}

func (c *Control) reconcileAfterFill(ctx context.Context) error {
	if err := c.store.Filled(ctx); err != nil {
		return err
	}
	w, err := c.read(ctx)
	if err != nil {
		return err
	}
	c.publish(w)
	close(c.filled)
	c.slog.Info("control plane is up", "api", c.api.URL(), "door", c.conf.Door, "trustDomain", c.conf.TrustDomain)
	return c.reconcileLoop(ctx)
}

// renewLoop keeps the certificates of the control plane, of its API and of the
// administrator fresh.
func (c *Control) renewLoop(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Minute):
		}
		if err := c.renewOwn(ctx); err != nil {
			c.note(fmt.Errorf("renew the control plane's certificates: %w; trying again", err))
		}
	}
}

// renewOwn counts as done only once everything is renewed.
func (c *Control) renewOwn(ctx context.Context) error {
	if !c.renewing.due() {
		return nil
	}
	cert, err := c.renewing.issue()
	if err != nil {
		return err
	}
	key, err := id.MarshalKey(c.renewing.key)
	if err != nil {
		return err
	}
	if err := c.api.Renew(id.MarshalCertificates(cert.Chain...), key); err != nil {
		return err
	}
	if _, err := c.accounts(ctx); err != nil {
		return err
	}
	return c.renewing.take(cert)
}
