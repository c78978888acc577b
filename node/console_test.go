package node

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// shared is a buffer that two goroutines may use.
type shared struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *shared) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *shared) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func TestConsoleIsFollowedAcrossATurn(t *testing.T) {
	c, err := openConsole(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	c.Write([]byte("first\n"))
	var got shared
	done := make(chan error, 1)
	go func() { done <- c.copyTo(t.Context(), &got, true) }()
	await(t, func() bool { return strings.Contains(got.String(), "first") })
	c.Write(bytes.Repeat([]byte("x"), logLimit))
	c.Write([]byte("after the turn\n"))
	await(t, func() bool { return strings.HasSuffix(got.String(), "after the turn\n") })
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(c.path); err != nil || info.Size() > logLimit {
		t.Errorf("the log is %v bytes, limit %d: %v", info.Size(), logLimit, err)
	}
}

// TestConsoleIsFollowedThroughTurns turns the log as fast as it can under its
// readers: none may ever meet the moment at which there is no log.
func TestConsoleIsFollowedThroughTurns(t *testing.T) {
	c, err := openConsole(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 4)
	for i := range cap(done) {
		go func() {
			for range 50 {
				if err := c.copyTo(t.Context(), io.Discard, false); err != nil {
					done <- err
					return
				}
			}
			done <- c.copyTo(t.Context(), io.Discard, i > 0)
		}()
	}
	for range 500 {
		c.mu.Lock()
		c.turnLocked()
		c.mu.Unlock()
		c.Write([]byte("line\n"))
	}
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	for range cap(done) {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func TestFollowerLeaves(t *testing.T) {
	c, err := openConsole(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.copyTo(ctx, &bytes.Buffer{}, true); err != nil {
		t.Error(err)
	}
}

func await(t *testing.T, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("waited in vain")
		}
	}
}
