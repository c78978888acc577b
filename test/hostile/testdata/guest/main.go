// Command guest is PID 1 of a machine that is out for its host: it plays one act
// after the other on the agent's port, prints without end, and in its last act
// has the kernel do its worst. It says which act it plays, for a host that is
// slow may have to greet it more than once.
package main

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"hauberk.dev/api/guestproto"
)

// acts is set by the linker: names from the table below, separated by commas.
// The last is played again and again.
var acts = "good"

func main() {
	if len(os.Args) > 1 {
		burn(os.Args[1])
	}
	for _, m := range []struct{ dir, kind string }{{"/proc", "proc"}, {"/sys", "sysfs"}, {"/dev", "devtmpfs"}} {
		os.MkdirAll(m.dir, 0o755)
		syscall.Mount(m.kind, m.dir, m.kind, 0, "")
	}
	order, _ := os.ReadFile("/modules/order")
	for _, name := range strings.Fields(string(order)) {
		load(name)
	}
	fmt.Println("the hostile guest has started")
	go print()
	port := open()
	all := strings.Split(acts, ",")
	s := &session{port: port, frames: make(chan heard, 1024)}
	go s.listen()
	for n := 0; ; {
		nonce, id := s.greeted()
		if s.act(all[n], nonce, id) {
			n = min(n+1, len(all)-1)
		}
	}
}

func load(name string) {
	f, err := os.Open("/modules/" + name)
	if err != nil {
		return
	}
	defer f.Close()
	params := []byte{0}
	const finitModule = 313
	syscall.Syscall(finitModule, f.Fd(), uintptr(unsafe.Pointer(&params[0])), 0)
}

// print writes to the console without end: text, control sequences, bytes.
func print() {
	noise := append([]byte("\x1b[2J\x1b]0;owned\x07\x00\xff\xfe endless "), bytes.Repeat([]byte("A"), 4000)...)
	for {
		os.Stdout.Write(noise)
	}
}

func open() int {
	for {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		if len(names) > 0 {
			fd, err := syscall.Open("/dev/"+filepath.Base(filepath.Dir(names[0])), syscall.O_RDWR, 0)
			if err == nil {
				return fd
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// session is what is heard of the host: its frames, read beside all that is
// written.
type session struct {
	port   int
	frames chan heard
	hello  *heard // met where something else was looked for
}

type heard struct {
	header  guestproto.Header
	payload []byte
}

// listen reads frames for ever. A host that leaves takes what it began with it.
func (s *session) listen() {
	var held []byte
	b := make([]byte, 64<<10)
	for {
		k, err := syscall.Read(s.port, b)
		if k <= 0 {
			if err != syscall.EINTR && err != syscall.EAGAIN {
				held = nil
			}
			time.Sleep(2 * time.Millisecond)
			continue
		}
		for held = append(held, b[:k]...); len(held) >= guestproto.HeaderSize; {
			h, err := guestproto.ParseHeader(held)
			if err != nil {
				held = nil
				break
			}
			n := guestproto.HeaderSize + h.Payload()
			if len(held) < n {
				break
			}
			s.frames <- heard{h, bytes.Clone(held[guestproto.HeaderSize:n])}
			held = held[n:]
		}
	}
}

// next takes a frame that is no credit; ok is false if the host greets anew.
func (s *session) next() (h guestproto.Header, ok bool) {
	for s.hello == nil {
		f := <-s.frames
		switch f.header.Verb {
		case guestproto.VerbHello:
			s.hello = &f
		case guestproto.VerbCredit:
		default:
			return f.header, true
		}
	}
	return h, false
}

// left says whether the host has greeted anew.
func (s *session) left() bool {
	for s.hello == nil {
		select {
		case f := <-s.frames:
			if f.header.Verb == guestproto.VerbHello {
				s.hello = &f
			}
		default:
			return false
		}
	}
	return true
}

// greeted waits for the host's hello.
func (s *session) greeted() (nonce []byte, id uint32) {
	for {
		if _, ok := s.next(); ok {
			continue
		}
		f := *s.hello
		s.hello = nil
		if m, err := guestproto.ParseHelloRequest(f.payload); err == nil {
			return m.Nonce[:], f.header.ID
		}
	}
}

// flood writes the same until the host has left and is back.
func (s *session) flood(b []byte) {
	for !s.left() {
		s.write(b)
	}
}

func (s *session) write(b []byte) {
	for len(b) > 0 {
		n, err := syscall.Write(s.port, b)
		if n > 0 {
			b = b[n:]
		} else if err != nil && err != syscall.EINTR {
			time.Sleep(time.Millisecond)
			return
		}
	}
}

func frame(id uint32, v guestproto.Verb, payload []byte) []byte {
	b := append(guestproto.Begin(nil, id, v), payload...)
	guestproto.End(b, 0)
	return b
}

func (s *session) greet(act string, nonce []byte, id uint32, version uint32) {
	hello := guestproto.Hello{Version: guestproto.Version, Release: act, Guard: guestproto.GuardAttached}
	b := hello.Append(nil)
	if version != guestproto.Version {
		hello.Version = version
		b = hello.Append(nil)
	}
	s.write(append(bytes.Clone(nonce), frame(id, guestproto.VerbReply, b)...))
}

// act plays one, and says whether it was played: those of a session are once the
// host has asked for something.
func (s *session) act(name string, nonce []byte, id uint32) bool {
	switch name {
	case "garbage":
		b := make([]byte, 64<<10)
		rand.Read(b)
		s.flood(b)
		return true
	case "silence":
		return true
	case "half":
		whole := frame(id, guestproto.VerbReply, (&guestproto.Hello{Version: guestproto.Version}).Append(nil))
		s.write(append(bytes.Clone(nonce), whole[:len(whole)-1]...))
		return true
	case "oversize":
		s.write(append(bytes.Clone(nonce), 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0x80))
		return true
	case "future":
		s.greet(name, nonce, id, 99)
		return true
	}
	s.greet(name, nonce, id, guestproto.Version)
	h, ok := s.next()
	if ok {
		s.misbehave(name, h)
	}
	return ok
}

// misbehave answers a question as an act has it.
func (s *session) misbehave(act string, h guestproto.Header) {
	switch act {
	case "good", "worst":
		if act == "worst" {
			burnAll()
		}
		s.write(frame(h.ID, guestproto.VerbReply, nil))
		s.obey()
	case "records":
		record := frame(0, guestproto.VerbGuardEvents, guestproto.AppendRecord(nil, make([]byte, 1000)))
		s.flood(bytes.Repeat(record, 16))
	case "output":
		m := guestproto.Output{Process: 1, Stream: guestproto.StreamStdout}
		s.flood(frame(0, guestproto.VerbOutput, append(m.AppendPrefix(nil), make([]byte, guestproto.MaxChunk)...)))
	case "wrong id":
		s.write(frame(h.ID+1, guestproto.VerbReply, nil))
	case "twice":
		// A good answer, so that nothing but the second is wrong.
		s.write(bytes.Repeat(frame(h.ID, guestproto.VerbReply, guestproto.AppendProcesses(nil, nil)), 2))
	case "list":
		s.write(frame(h.ID, guestproto.VerbReply, bytes.Repeat([]byte{0xff}, guestproto.MaxPayload)))
	case "never":
	case "dies":
		syscall.Reboot(syscall.LINUX_REBOOT_CMD_RESTART)
	case "panics":
		os.Exit(1)
	}
}

// obey answers everything with nothing until the host leaves.
func (s *session) obey() {
	for {
		h, ok := s.next()
		if !ok {
			return
		}
		s.write(frame(h.ID, guestproto.VerbReply, nil))
	}
}

// burnAll forks what forks without end, fills memory and disk, and spins.
func burnAll() {
	for _, what := range []string{"fork", "memory", "disk", "spin"} {
		exec.Command("/proc/self/exe", what).Start()
	}
}

func burn(what string) {
	switch what {
	case "fork":
		for {
			exec.Command("/proc/self/exe", "fork").Start()
		}
	case "memory":
		var all [][]byte
		for {
			b := make([]byte, 1<<20)
			for i := range b {
				b[i] = 1
			}
			all = append(all, b)
			time.Sleep(time.Millisecond)
		}
	case "disk":
		for i := 0; ; i++ {
			os.WriteFile(fmt.Sprintf("/fill-%d", i), make([]byte, 1<<20), 0o600)
			time.Sleep(time.Millisecond)
		}
	case "spin":
		for {
		}
	}
}
