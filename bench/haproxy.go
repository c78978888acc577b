package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"hauberk.dev/bench/loopback"
)

// haproxy is the rival of the mesh: one process, two threads, that takes plain
// TCP on one port, speaks mutual TLS 1.3 to another port of its own, and plain
// TCP to the callee.
type haproxy struct {
	process *exec.Cmd
	said    *beginning
	server  net.Listener
	held    *loopback.Held
	front   string
}

const haproxyConfig = `global
	nbthread 2
	ssl-default-bind-options ssl-min-ver TLSv1.3
	ssl-default-server-options ssl-min-ver TLSv1.3
defaults
	mode tcp
	timeout connect 5s
	timeout client 1m
	timeout server 1m
listen caller
	bind %s
	server callee %s ssl crt %s ca-file %s verify required verifyhost loopback
listen callee
	bind %s ssl crt %s ca-file %s verify required
	server workload %s
`

func openHAProxy(ctx context.Context, l *lab, ca *authority) (_ *haproxy, err error) {
	h := &haproxy{said: &beginning{}}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("open haproxy: %w: %s", err, h.said), h.Close())
		}
	}()
	dir := filepath.Join(l.dir, "haproxy")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	cert, key, err := ca.pair("loopback")
	if err != nil {
		return nil, err
	}
	roots, both, config := filepath.Join(dir, "roots.pem"), filepath.Join(dir, "both.pem"), filepath.Join(dir, "haproxy.cfg")
	if h.server, err = net.Listen("tcp4", "127.0.0.1:0"); err != nil {
		return nil, err
	}
	go echo(h.server)
	if h.held, err = loopback.Hold(2); err != nil {
		return nil, err
	}
	ports := h.held.Addresses
	h.front = ports[0]
	words := fmt.Sprintf(haproxyConfig, ports[0], ports[1], both, roots, ports[1], both, roots, h.server.Addr())
	for name, raw := range map[string][]byte{roots: ca.roots(), both: append(cert, key...), config: []byte(words)} {
		if err := os.WriteFile(name, raw, 0o600); err != nil {
			return nil, err
		}
	}
	h.process = exec.Command("haproxy", "-db", "-f", config)
	h.process.Stdout, h.process.Stderr = h.said, h.said
	h.process.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := h.process.Start(); err != nil {
		return nil, err
	}
	return h, h.wait(ctx)
}

func (h *haproxy) wait(ctx context.Context) error {
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		c, err := h.proxied()
		if err == nil {
			return c.Close()
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return err
		}
	}
}

func (h *haproxy) proxied() (net.Conn, error) { return net.DialTimeout("tcp4", h.front, 5*time.Second) }

func (h *haproxy) straight() (net.Conn, error) {
	return net.DialTimeout("tcp4", h.server.Addr().String(), 5*time.Second)
}

func (h *haproxy) Close() error {
	if h.process != nil && h.process.Process != nil {
		end(h.process)
	}
	var err error
	if h.held != nil {
		err = h.held.Close()
	}
	if h.server != nil {
		err = errors.Join(err, h.server.Close())
	}
	return err
}
