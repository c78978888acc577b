// Command rpc has SOFARPC and Dubbo of others call through the mesh. It installs
// sofa-rpc-node, sofa-bolt-node and dubbo-remoting from npm into a directory of
// its own, and runs the tests of mesh that are built for them only. It needs
// root, Node.js and the network, so it is no part of make test.
package main

import (
	"context"
	"embed"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

//go:embed peer.js package.json
var peers embed.FS

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "rpc:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	dir, err := os.MkdirTemp("", "peers")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	for _, name := range []string{"peer.js", "package.json"} {
		b, err := peers.ReadFile(name)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			return err
		}
	}
	install := exec.CommandContext(ctx, "npm", "install", "--no-audit", "--no-fund", "--ignore-scripts")
	install.Dir, install.Stdout, install.Stderr = dir, os.Stderr, os.Stderr
	if err := install.Run(); err != nil {
		return fmt.Errorf("install peers: %w", err)
	}
	test := exec.CommandContext(ctx, "go", "test", "-count=1", "-v", "-tags", "interop", "-run", "^TestPeers$", "hauberk.dev/mesh", "hauberk.dev/mesh/alone")
	test.Env = append(os.Environ(), "HAUBERK_PEERS="+dir)
	test.Stdout, test.Stderr = os.Stdout, os.Stderr
	return test.Run()
}
