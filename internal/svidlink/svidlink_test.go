package svidlink

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func sample(key string) *Set {
	return &Set{
		Identities: []Identity{
			{Name: "spiffe://example.org/web", Hint: "internal", Chain: []byte("chain"), Key: []byte(key)},
			{Name: "secret", Chain: []byte("other chain"), Key: []byte("other key")},
		},
		Bundles: []Bundle{{Name: "spiffe://example.org", DER: []byte("roots")}},
		Why:     "it is away",
	}
}

func TestRoundTrip(t *testing.T) {
	for _, s := range []*Set{{}, sample("key")} {
		b, err := s.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		if n := binary.BigEndian.Uint32(b); int(n) != len(b)-4 || cap(b) != len(b) {
			t.Errorf("%d announced, %d there, room for %d", n, len(b)-4, cap(b))
		}
		got, err := Parse(b[4:])
		if err != nil || fmt.Sprint(got) != fmt.Sprint(s) {
			t.Errorf("%+v, %v", got, err)
		}
		for n := range len(b) - 5 {
			if _, err := Parse(b[4 : 4+n]); err == nil {
				t.Errorf("the first %d bytes of %d were taken", n, len(b)-4)
			}
		}
		if _, err := Parse(append(b[4:], 0)); err == nil {
			t.Error("a byte too many was taken")
		}
		// Who clears the set clears the message.
		got.Clear()
		if bytes.Contains(b, []byte("other key")) {
			t.Error("a key is left in the message")
		}
	}
}

func TestBounds(t *testing.T) {
	long := strings.Repeat("x", maxText+1)
	for _, s := range []*Set{
		{Why: long},
		{Identities: []Identity{{Name: long}}},
		{Identities: []Identity{{Hint: long}}},
		{Identities: []Identity{{Key: make([]byte, maxKey+1)}}},
		{Identities: []Identity{{Chain: make([]byte, maxChain+1)}}},
		{Identities: make([]Identity, maxIdentities+1)},
		{Bundles: make([]Bundle, maxBundles+1)},
		{Bundles: []Bundle{{DER: make([]byte, maxBundle+1)}}},
	} {
		var h Hub
		if _, err := s.Marshal(); err == nil {
			t.Errorf("%.100v was written", s)
		}
		if err := h.Put(s); err == nil {
			t.Errorf("%.100v was put", s)
		}
	}
	if _, err := Parse([]byte{9, 0, 0, 0, 0, 0, 0}); err == nil || !strings.Contains(err.Error(), "version 9") {
		t.Error(err)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []*Set{{}, sample("key")} {
		b, err := s.Marshal()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b[4:])
	}
	f.Add([]byte{1, 0, 0, 0xff, 0xff, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := Parse(b)
		if err != nil {
			return
		}
		again, err := s.Marshal()
		if err != nil || !bytes.Equal(again[4:], b) {
			t.Fatalf("%x reads as %+v, which is written %x, %v", b, s, again, err)
		}
	})
}

// served is a hub on a socket.
func served(t *testing.T) (h *Hub, path string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "sl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path = filepath.Join(dir, "s")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	h = &Hub{}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.Serve(ctx, ln, slog.New(slog.DiscardHandler)) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return h, path
}

// taker follows a hub and keeps what it took.
type taker struct {
	mu     sync.Mutex
	got    []*Set
	refuse error
}

func (r *taker) take(s *Set) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.got = append(r.got, s.Clone())
	s.Clear()
	return r.refuse
}

func (r *taker) last() *Set {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.got) == 0 {
		return nil
	}
	return r.got[len(r.got)-1]
}

func following(t *testing.T, path string) *taker {
	t.Helper()
	r := &taker{}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); Follow(ctx, path, r.take, func(error) {}) }()
	t.Cleanup(func() { cancel(); <-done })
	return r
}

func until(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !cond(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// TestHandOver tells readers everything, again when it changes, and forgets the keys
// it replaces.
func TestHandOver(t *testing.T) {
	h, path := served(t)
	first := sample("key one")
	if err := h.Put(first); err != nil {
		t.Fatal(err)
	}
	over, end := context.WithCancel(context.Background())
	end()
	if err := h.Taken(over); err == nil || !strings.Contains(err.Error(), "nobody asks") {
		t.Errorf("taken by nobody: %v", err)
	}
	a, b := following(t, path), following(t, path)
	until(t, "both have the first", func() bool { return a.last() != nil && b.last() != nil })
	if want := sample("key one"); !reflect.DeepEqual(a.last(), want) {
		t.Errorf("%+v", a.last())
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := h.Put(sample("key two")); err != nil {
		t.Fatal(err)
	}
	if err := h.Taken(ctx); err != nil {
		t.Fatal(err)
	}
	for _, r := range []*taker{a, b} {
		if got := string(r.last().Identities[0].Key); got != "key two" {
			t.Errorf("taken, and has %q", got)
		}
	}
	if key := first.Identities[0].Key; !bytes.Equal(key, make([]byte, len(key))) {
		t.Errorf("the replaced key is still there: %q", key)
	}
	b.mu.Lock()
	b.refuse = errors.New("not as it should be")
	b.mu.Unlock()
	if err := h.Put(sample("key three")); err != nil {
		t.Fatal(err)
	}
	if err := h.Taken(ctx); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "not as it should be") {
		t.Error(err)
	}
}

// TestSilentReader has a process ask and never answer: it is left, so that what
// others have taken counts, and those that have answered are not.
func TestSilentReader(t *testing.T) {
	h, path := served(t)
	h.mu.Lock()
	h.answerTime = 3 * time.Second
	h.mu.Unlock()
	if err := h.Put(sample("key one")); err != nil {
		t.Fatal(err)
	}
	r := following(t, path)
	silent, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	if _, err := io.ReadFull(silent, make([]byte, 4)); err != nil {
		t.Fatal(err)
	}
	for i, key := range []string{"key two", "key three"} {
		if err := h.Put(sample(key)); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		if err := h.Taken(ctx); err != nil {
			t.Errorf("%s: %v", key, err)
		}
		cancel()
		r.mu.Lock()
		if n := len(r.got); n > i+2 {
			t.Errorf("%s: the reader that answers has been told %d times", key, n)
		}
		r.mu.Unlock()
	}
}

// TestIntruders sends what no reader says, and asks as more than may.
func TestIntruders(t *testing.T) {
	h, path := served(t)
	if err := h.Put(sample("key")); err != nil {
		t.Fatal(err)
	}
	for _, words := range []string{"\xff\xff garbage", "\x00\x00\x00\x00\x00\x00", "GET / HTTP/1.1\r\n\r\n"} {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		c.Write([]byte(words))
		c.SetDeadline(time.Now().Add(time.Minute))
		b := make([]byte, 1<<16)
		for err == nil {
			_, err = c.Read(b)
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%q: it is still served", words)
		}
		c.Close()
	}
	var all []net.Conn
	defer func() {
		for _, c := range all {
			c.Close()
		}
	}()
	for range maxReaders + 5 {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, c)
	}
	told := 0
	for _, c := range all {
		c.SetDeadline(time.Now().Add(time.Minute))
		if n, _ := c.Read(make([]byte, 1)); n == 1 {
			told++
		}
	}
	if told > maxReaders || told == 0 {
		t.Errorf("%d of %d were told", told, len(all))
	}
}

// TestFollowGarbage comes back from a source that says what cannot be.
func TestFollowGarbage(t *testing.T) {
	dir, err := os.MkdirTemp("", "sl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	good, err := sample("key").Marshal()
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for _, words := range [][]byte{{0xff, 0xff, 0xff, 0xff}, {0, 0, 0, 3, 7, 7, 7}, good[:len(good)-3], good} {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.Write(words)
			if len(words) != len(good) {
				c.Close()
			} else {
				defer c.Close()
			}
		}
	}()
	r := following(t, path)
	until(t, "the good one", func() bool { return r.last() != nil })
	if len(r.got) != 1 {
		t.Errorf("%d sets", len(r.got))
	}
}

// nobody runs f as another user, on this thread alone.
func nobody(t *testing.T, f func()) {
	t.Helper()
	const other, same = 65534, ^uintptr(0)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, same, other, same); errno != 0 {
		t.Fatal(errno)
	}
	defer func() {
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, same, 0, same); errno != 0 {
			panic(errno)
		}
	}()
	f()
}

// TestOtherUser hands nothing to a process of another user, and takes nothing from
// one, whatever the modes of the socket say.
func TestOtherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can be another user for a moment")
	}
	h, path := served(t)
	if err := h.Put(sample("key")); err != nil {
		t.Fatal(err)
	}
	for path, mode := range map[string]os.FileMode{filepath.Dir(path): 0o777, path: 0o666} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	var c net.Conn
	var ln *net.UnixListener
	var err, lerr error
	theirs := filepath.Join(filepath.Dir(path), "theirs")
	nobody(t, func() {
		c, err = net.Dial("unix", path)
		ln, lerr = net.ListenUnix("unix", &net.UnixAddr{Name: theirs, Net: "unix"})
	})
	if err != nil || lerr != nil {
		t.Fatal(err, lerr)
	}
	defer c.Close()
	defer ln.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	if b, err := io.ReadAll(c); len(b) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("told %q, %v", b, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	why := ""
	Follow(ctx, theirs, func(*Set) error { t.Error("a set was taken"); return nil }, func(err error) {
		if why == "" && err != nil {
			why = err.Error()
			cancel()
		}
	})
	if !strings.Contains(why, "user 65534 is there, and only user 0 may be") {
		t.Errorf("%q", why)
	}
}
