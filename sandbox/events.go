package sandbox

import (
	"context"
	"fmt"
	"path/filepath"

	"hauberk.dev/guard/trail"
)

// Events hands what the Guard told of the sandbox to each, oldest first, and
// goes on with what comes if told to follow, until the sandbox is gone or ctx
// ends.
func (b *Sandbox) Events(ctx context.Context, follow bool, each func(trail.Record) error) error {
	if !b.exists() {
		return fmt.Errorf("read events of %s: %w", b.id, ErrNotFound)
	}
	if follow {
		ended := b.quiet(ctx)
		inner, cancel := context.WithCancel(ctx)
		defer cancel()
		go func() {
			select {
			case <-ended:
				cancel()
			case <-inner.Done():
			}
		}()
		ctx = inner
	}
	err := trail.Read(ctx, filepath.Join(b.bundle(), "events.jsonl"), follow, func(r trail.Record) error {
		r.Sandbox.ID = b.id
		return each(r)
	})
	if err != nil {
		return fmt.Errorf("read events of %s: %w", b.id, err)
	}
	return nil
}
