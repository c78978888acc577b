// Command hbone is Istio's own client and server of HBONE: "call GATEWAY DIR NAME
// AUTHORITY" and "serve ADDRESS DIR". DIR holds cert.pem, key.pem and roots.pem.
// A client says of each case "ok" or "FAIL".
package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/net/http2"
	"istio.io/istio/pkg/hbone"
)

func main() {
	var err error
	if os.Args[1] == "serve" {
		err = serve(os.Args[2], os.Args[3])
	} else {
		err = call(os.Args[2], os.Args[3], os.Args[4], os.Args[5])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "hbone:", err)
		os.Exit(1)
	}
}

func config(dir string) (*tls.Config, error) {
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"))
	if err != nil {
		return nil, err
	}
	roots, err := os.ReadFile(filepath.Join(dir, "roots.pem"))
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(roots)
	return &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: pool, ClientCAs: pool, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13}, err
}

func serve(address, dir string) error {
	cfg, err := config(dir)
	if err != nil {
		return err
	}
	cfg.ClientAuth = tls.RequireAndVerifyClientCert
	srv := hbone.NewServer()
	if err := http2.ConfigureServer(srv, &http2.Server{}); err != nil {
		return err
	}
	ln, err := tls.Listen("tcp", address, cfg)
	if err != nil {
		return err
	}
	srv.Protocols = nil // HTTP/2 by ALPN
	fmt.Println("ready")
	return srv.Serve(ln)
}

func call(gateway, dir, name, authority string) error {
	cfg, err := config(dir)
	if err != nil {
		return err
	}
	// Names of the mesh are SPIFFE ids, which Go does not look for.
	cfg.InsecureSkipVerify, cfg.ServerName = true, name
	d := hbone.NewDialer(hbone.Config{ProxyAddress: gateway, TLS: cfg})
	failed := false
	for _, c := range []struct {
		name string
		run  func(hbone.Dialer, string) error
	}{{"echo", small}, {"1 MiB", large}, {"20 at once", many}, {"another port is refused", refused}} {
		if err := c.run(d, authority); err != nil {
			failed = true
			fmt.Printf("FAIL %s: %v\n", c.name, err)
		} else {
			fmt.Printf("ok %s\n", c.name)
		}
	}
	if failed {
		return errors.New("cases have failed")
	}
	return nil
}

func echo(d hbone.Dialer, authority string, b []byte) error {
	c, err := d.Dial("tcp", authority)
	if err != nil {
		return err
	}
	defer c.Close()
	sent := make(chan error, 1)
	go func() { _, err := c.Write(b); sent <- err }()
	got := make([]byte, len(b))
	_, err = io.ReadFull(c, got)
	if err = errors.Join(err, <-sent); err == nil && !bytes.Equal(got, b) {
		err = errors.New("other bytes came back")
	}
	return err
}

func small(d hbone.Dialer, a string) error { return echo(d, a, []byte("hello")) }
func large(d hbone.Dialer, a string) error {
	return echo(d, a, bytes.Repeat([]byte("0123456789abcdef"), 1<<16))
}

func many(d hbone.Dialer, a string) error {
	errs := make([]error, 20)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() { errs[i] = echo(d, a, bytes.Repeat([]byte{byte(i)}, 10_000)) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func refused(d hbone.Dialer, authority string) error {
	host, _, _ := net.SplitHostPort(authority)
	if c, err := d.Dial("tcp", host+":1"); err == nil {
		c.Close()
		return errors.New("a port that is not the service's was reached")
	}
	return nil
}
