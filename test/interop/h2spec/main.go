// The h2spec program runs h2spec's cases against the HTTP/2 engine of the mesh,
// with net/http's server behind it, against the proxy alone with -alone, or
// against the one at -address. Its module is its own, so that nothing of h2spec
// reaches the rest of the tree.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"time"

	"github.com/summerwind/h2spec"
	"github.com/summerwind/h2spec/config"

	"hauberk.dev/mesh/alone"
	"hauberk.dev/mesh/http2"
)

func main() {
	proxy := flag.String("alone", "", "test the proxy alone, in front of a server that speaks http or http2")
	address := flag.String("address", "", "of a proxy to test in place of one started here")
	strict := flag.Bool("strict", true, "run the strict cases as well")
	flag.Parse()
	ok, err := run(*address, *proxy, *strict)
	if err != nil {
		fmt.Fprintln(os.Stderr, "h2spec:", err)
	}
	if err != nil || !ok {
		os.Exit(1)
	}
}

func run(address, proxy string, strict bool) (bool, error) {
	switch {
	case address != "":
	case proxy != "":
		at, stop, err := startAlone(proxy)
		if err != nil {
			return false, err
		}
		defer stop()
		address = at
	default:
		ln, err := start()
		if err != nil {
			return false, err
		}
		defer ln.Close()
		address = ln.Addr().String()
	}
	host, number, err := net.SplitHostPort(address)
	if err != nil {
		return false, err
	}
	port, err := strconv.Atoi(number)
	if err != nil {
		return false, err
	}
	return h2spec.Run(&config.Config{Host: host, Port: port, Path: "/", Timeout: 10 * time.Second, MaxHeaderLen: 4000, Strict: strict})
}

// startAlone runs the proxy alone and the server behind it.
func startAlone(protocol string) (address string, stop func(), err error) {
	behind, err := listenBehind()
	if err != nil {
		return "", nil, err
	}
	c, err := alone.Parse("proxy.yaml", "/", fmt.Appendf(nil, `{version: 1, listeners: [{name: web, address: "127.0.0.1:0", http2: only}],
  hosts: [{names: ["*"], routes: [{prefix: /, upstream: up}]}],
  upstreams: [{name: up, protocol: %s, endpoints: [{address: %q}]}]}`, protocol, behind.Addr()))
	if err != nil {
		return "", nil, err
	}
	p, err := alone.Open(c, nil)
	if err != nil {
		return "", nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	return p.Address("web").String(), func() { cancel(); <-ended }, nil
}

// listenBehind runs the server.
func listenBehind() (net.Listener, error) {
	behind, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	srv := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		io.WriteString(w, "h2spec looks for a body of some length\n")
	})}
	srv.Protocols.SetHTTP1(true)
	srv.Protocols.SetUnencryptedHTTP2(true)
	go srv.Serve(behind)
	return behind, nil
}

// start runs a relay and the server behind it.
func start() (net.Listener, error) {
	behind, err := listenBehind()
	if err != nil {
		return nil, err
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go serve(c.(*net.TCPConn), behind.Addr().String())
		}
	}()
	return ln, nil
}

// tcp is a Transport.
type tcp struct{ *net.TCPConn }

func (c tcp) Abort()  { c.SetLinger(0); c.Close() }
func (c tcp) Finish() { c.Close() }

// serve passes one connection on.
func serve(client *net.TCPConn, behind string) {
	c, err := net.Dial("tcp", behind)
	if err != nil {
		client.Close()
		return
	}
	up := http2.Client(tcp{c.(*net.TCPConn)}, http2.Options{})
	go up.Run()
	defer up.Close()
	http2.Server(tcp{client}, http2.Options{
		Request: func(s *http2.Stream, h *http2.Head) {
			if s.Forward(up, h) != nil {
				s.Reset(http2.CodeRefused)
			}
		},
		Failed: func(s *http2.Stream, err error) {
			s.Answer([]http2.Field{{Name: ":status", Value: "502"}}, nil)
		},
	}).Run()
}
