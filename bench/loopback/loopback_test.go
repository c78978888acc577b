package loopback

import (
	"net"
	"strconv"
	"syscall"
	"testing"
)

// What is held is given to nobody else, and a server that is started later listens
// there, more than once and with connections behind it.
func TestHold(t *testing.T) {
	const many = 200
	seen := map[string]bool{}
	for range 2 {
		h, err := Hold(many)
		if err != nil {
			t.Fatal(err)
		}
		defer h.Close()
		for _, a := range h.Addresses {
			if seen[a] {
				t.Fatalf("%s was given twice", a)
			}
			seen[a] = true
		}
	}
	if len(seen) != 2*many {
		t.Fatalf("%d addresses", len(seen))
	}
	for address := range seen {
		for range 2 {
			once(t, address)
		}
		port := portOf(t, address)
		if s, err := bind(port); err == nil {
			syscall.Close(s)
			t.Fatalf("%s is held, and was held again", address)
		}
		break
	}
}

func portOf(t *testing.T, address string) int {
	t.Helper()
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// once serves one connection and closes it first, so that it waits at this port.
func once(t *testing.T, address string) {
	t.Helper()
	ln, err := net.Listen("tcp4", address)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp4", address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
}

// A closed one is free again; a listener of another is not.
func TestBind(t *testing.T) {
	h, err := Hold(1)
	if err != nil {
		t.Fatal(err)
	}
	port := portOf(t, h.Addresses[0])
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp4", h.Addresses[0])
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if s, err := bind(port); err == nil {
		syscall.Close(s)
		t.Error("somebody listens, and the port was given")
	}
}

func TestTaken(t *testing.T) {
	for said, want := range map[string]bool{
		"nginx: [emerg] bind() to 127.0.0.1:80 failed (98: Address already in use)": true,
		"listen tcp 127.0.0.1:80: bind: address already in use":                     true,
		"permission denied": false,
	} {
		if Taken(said) != want {
			t.Errorf("%q: %v", said, !want)
		}
	}
}
