package main

import (
	"context"
	"crypto/tls"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// stand is this program as a proxy that answers where its file says, or says why not.
const stand = "HAUBERK_BENCH_STAND"

func TestMain(m *testing.M) {
	file := os.Getenv(stand)
	if file == "" {
		os.Exit(m.Run())
	}
	address, err := os.ReadFile(file)
	if err != nil {
		panic(err)
	}
	ln, err := net.Listen("tcp4", string(address))
	if err != nil {
		println(err.Error())
		os.Exit(1)
	}
	for {
		c, err := ln.Accept()
		if err != nil {
			panic(err)
		}
		go answer(c, map[byte][]byte{'1': []byte("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")})
	}
}

// A proxy whose place was taken is started elsewhere; one that cannot start is a
// fault with its own words; and an ended one has let go of its port.
func TestBeginElsewhere(t *testing.T) {
	if _, err := exec.LookPath("taskset"); err != nil {
		t.Fatal(err) // Debian cannot be without it
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	speaks["stand"] = []string{"http"}
	defer delete(speaks, "stand")
	b := &bench{dir: t.TempDir(), cores: 1}
	t.Setenv(stand, b.path("stand"))
	p := &proxy{name: "stand", words: []string{self}, told: map[string]string{"stand": "{http}"}}
	if err := b.tell(p, nil); err != nil {
		t.Fatal(err)
	}
	defer p.close()
	first := p.ports["http"]
	thief, err := net.Listen("tcp4", first) // it does not ask who holds it
	if err != nil {
		t.Fatal(err)
	}
	defer thief.Close()
	go func() {
		for {
			c, err := thief.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	if err := b.begin(t.Context(), p, nil); err != nil {
		t.Fatal(err)
	}
	if p.ports["http"] == first {
		t.Fatal("it runs where another listens")
	}
	p.end()
	ln, err := net.Listen("tcp4", p.ports["http"])
	if err != nil {
		t.Fatalf("the port of what has ended: %v", err)
	}
	ln.Close()
	t.Setenv(stand, b.path("none"))
	if err := b.begin(t.Context(), p, nil); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Fatalf("a program that fails: %v", err)
	}
}

// One way that fails leaves the others of its row alone.
func TestRowGoesOn(t *testing.T) {
	o, err := openOrigin()
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead := ln.Addr().String()
	ln.Close()
	b := &bench{dir: t.TempDir(), turn: 50 * time.Millisecond, turns: 1, shown: tls.Certificate{}}
	r := b.row(context.Background(), part{"http", 1, 0}, map[string]*origin{"http": o}, []*proxy{{name: "dead", ports: map[string]string{"http": dead}}})
	straight, _ := r.named("straight")
	failed, found := r.named("dead")
	if straight.Fault != "" || straight.Requests == 0 || !found || failed.Fault == "" {
		t.Errorf("%+v", r)
	}
}
