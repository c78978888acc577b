package flock_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"hauberk.dev/internal/flock"
)

func TestOneAtATime(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	release, err := flock.Take(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if second, err := flock.Try(path); second != nil || err != nil {
		t.Fatalf("a second holder: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if _, err := flock.Take(ctx, path); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("waiting for a held lock: %v", err)
	}
	got := make(chan error, 1)
	go func() {
		release, err := flock.Take(t.Context(), path)
		if err == nil {
			release()
		}
		got <- err
	}()
	release()
	if err := <-got; err != nil {
		t.Fatal(err)
	}
}

func TestNoLinkIsFollowed(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink("elsewhere", filepath.Join(dir, "lock")); err != nil {
		t.Fatal(err)
	}
	if _, err := flock.Try(filepath.Join(dir, "lock")); err == nil {
		t.Error("a symlink was locked")
	}
}

// TestHoldIsHandedOn has a process hold what its parent held, and let go.
func TestHoldIsHandedOn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	f, err := flock.Hold(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "60")
	cmd.ExtraFiles = []*os.File{f}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if release, err := flock.Try(path); err != nil || release != nil {
		t.Errorf("the lock is free while a process holds it: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := flock.Hold(ctx, path); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	if f, err = flock.Hold(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	f.Close()
}
