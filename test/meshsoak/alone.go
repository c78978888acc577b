package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"hauberk.dev/test/meshload"
)

// aloneFile is what the proxy alone serves. Its generation is said in an answer,
// so that a reload is seen to have been one.
const aloneFile = `version: 1
admin: ADMIN
listeners:
- {name: web, address: 'WEB'}
- {name: rpc, address: 'RPC'}
- {name: raw, address: 'RAW', protocol: tcp, upstream: raw}
- {name: bolt, address: 'BOLT', protocol: bolt, calls: [{upstream: bolt}]}
- {name: dubbo, address: 'DUBBO', protocol: dubbo, calls: [{upstream: dubbo}]}
hosts:
- names: ['*']
  listeners: [web]
  routes:
  - {path: /generation, respond: {status: 200, body: 'GENERATION'}}
  - {prefix: /, upstream: web}
- names: ['*']
  listeners: [rpc]
  routes: [{prefix: /, upstream: rpc}]
upstreams:
- {name: web, endpoints: [{address: 'WEB1'}, {address: 'WEB2'}]}
- {name: rpc, protocol: grpc, endpoints: [{address: 'RPC1'}, {address: 'RPC2'}]}
- {name: raw, endpoints: [{address: 'RAW1'}, {address: 'RAW2'}]}
- {name: bolt, protocol: bolt, endpoints: [{address: 'BOLT1'}, {address: 'BOLT2'}]}
- {name: dubbo, protocol: dubbo, endpoints: [{address: 'DUBBO1'}, {address: 'DUBBO2'}]}
`

// alone is the proxy that a file tells, with two servers of each kind.
type alone struct {
	*process
	path, text string
	admin      string
	generation int
	doors      map[string]string // by protocol
	servers    []*aloneServer
}

type aloneServer struct {
	protocol, address string
	ledger            *meshload.Ledger
	stop              func()
}

func (s *aloneServer) start() error {
	ln, err := net.Listen("tcp", s.address)
	if err != nil {
		return err
	}
	s.address = ln.Addr().String()
	s.stop = meshload.Serve(s.protocol, ln, s.ledger)
	return nil
}

func startAlone(program, dir string, l *meshload.Ledger) (*alone, error) {
	a := &alone{path: filepath.Join(dir, "proxy.yaml"), admin: filepath.Join(dir, "admin"), doors: map[string]string{}}
	words := []string{"ADMIN", a.admin}
	// Longer words first: a Replacer takes the first that matches.
	for _, s := range []struct{ word, protocol string }{{"WEB1", "http1"}, {"WEB2", "http1"}, {"RPC1", "grpc"}, {"RPC2", "grpc"}, {"RAW1", "tcp"}, {"RAW2", "tcp"},
		{"BOLT1", "bolt"}, {"BOLT2", "bolt"}, {"DUBBO1", "dubbo"}, {"DUBBO2", "dubbo"}} {
		up := &aloneServer{protocol: s.protocol, address: "127.0.0.1:0", ledger: l}
		if err := up.start(); err != nil {
			return nil, err
		}
		a.servers = append(a.servers, up)
		words = append(words, s.word, up.address)
	}
	for _, s := range []struct{ word, protocol string }{{"WEB", "http1"}, {"RPC", "grpc"}, {"RAW", "tcp"}, {"BOLT", "bolt"}, {"DUBBO", "dubbo"}} {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		a.doors[s.protocol] = ln.Addr().String()
		words = append(words, s.word, ln.Addr().String())
		ln.Close()
	}
	a.doors["http2"] = a.doors["http1"]
	a.text = strings.NewReplacer(words...).Replace(aloneFile)
	if err := a.write(); err != nil {
		return nil, err
	}
	var err error
	if a.process, err = start("alone", program, "--allow-root", "-c", a.path); err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(bootTime); ; time.Sleep(20 * time.Millisecond) {
		c, err := net.Dial("tcp", a.doors["tcp"])
		if err == nil {
			c.Close()
			return a, nil
		}
		if time.Now().After(deadline) {
			return a, fmt.Errorf("alone: %w\n%s", err, a.log.Bytes())
		}
	}
}

// write makes a new file in one step.
func (a *alone) write() error {
	a.generation++
	text := strings.Replace(a.text, "GENERATION", fmt.Sprint(a.generation), 1)
	if err := os.WriteFile(a.path+".new", []byte(text), 0o644); err != nil {
		return err
	}
	return os.Rename(a.path+".new", a.path)
}

// reload has the proxy read its file again.
func (a *alone) reload() error {
	if err := a.write(); err != nil {
		return err
	}
	return a.cmd.Process.Signal(syscall.SIGHUP)
}

func (a *alone) close() error {
	var err error
	if a.process != nil {
		err = a.stop()
	}
	for _, s := range a.servers {
		s.stop()
	}
	return err
}
