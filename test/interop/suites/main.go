// Command suites has programs of others call through the mesh: gRPC's interop
// suite, dubbo-go, Istio's HBONE both ways, a WebSocket library, curl and h2load.
// Each is built in a module of its own below testdata, so that nothing of it
// reaches the tree; then the tests of mesh that are made for them run. It needs
// root and the network, so it is no part of make test.
package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

// peers are the programs: module, what is built, and its name for the tests.
var peers = []struct{ module, path, name string }{
	{"grpc", "google.golang.org/grpc/interop/client", "grpc-client"},
	{"grpc", "google.golang.org/grpc/interop/server", "grpc-server"},
	{"dubbogo", ".", "dubbogo"},
	{"hbone", ".", "hbone"},
	{"websocket", ".", "websocket"},
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "suites:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Minute)
	defer cancel()
	dir, err := os.MkdirTemp("", "peers")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	for _, p := range peers {
		build := exec.CommandContext(ctx, "go", "build", "-o", filepath.Join(dir, p.name), p.path)
		build.Dir, build.Stdout, build.Stderr = filepath.Join("test/interop/suites/testdata", p.module), os.Stderr, os.Stderr
		if err := build.Run(); err != nil {
			return fmt.Errorf("build %s: %w", p.name, err)
		}
	}
	test := exec.CommandContext(ctx, "go", "test", "-count=1", "-v", "-tags", "interop", "-run", "^TestSuites$", "hauberk.dev/mesh")
	test.Env = append(os.Environ(), "HAUBERK_PEERS="+dir)
	test.Stdout, test.Stderr = os.Stdout, os.Stderr
	return test.Run()
}
