package flock_test

import (
	"context"
	"errors"
	"os"
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
