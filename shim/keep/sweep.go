package keep

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"hauberk.dev/internal/flock"
	"hauberk.dev/vm"
)

// Sweep ends what dead keepers have left. It disturbs none that lives, and costs
// next to nothing if there is nothing to do.
func (p Place) Sweep(ctx context.Context) error { return p.sweepOthers(ctx, "") }

// End ends all keepers of a place, and what they kept.
func (p Place) End(ctx context.Context) error {
	all, err := p.keepers()
	errs := []error{err}
	for _, dir := range all {
		if err := dismiss(ctx, dir); err != nil {
			errs = append(errs, fmt.Errorf("end keeper in %s: %w", dir, err))
		}
	}
	return errors.Join(append(errs, p.Sweep(ctx))...)
}

// dismiss tells a keeper to end and waits until it has.
func dismiss(ctx context.Context, dir string) error {
	raw, err := os.ReadFile(filepath.Join(dir, pidName))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(string(raw))
	if err != nil || pid < 2 {
		return fmt.Errorf("process %q: %w", raw, err)
	}
	process, err := os.FindProcess(pid) // holds it: the number cannot come to mean another
	if err != nil {
		return err
	}
	defer process.Release()
	lock := filepath.Join(dir, lockName)
	release, err := flock.Try(lock)
	if err == nil && release == nil { // the keeper has it, so the process is the keeper
		if err := process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return err
		}
		release, err = flock.Take(ctx, lock)
	}
	if err == nil {
		release()
	}
	return err
}

// sweepOthers sweeps all keepers' directories but one, and removes those that
// no program will use again.
func (p Place) sweepOthers(ctx context.Context, but string) error {
	all, err := p.keepers()
	errs := []error{err}
	for _, dir := range all {
		if dir == but {
			continue
		}
		release, err := flock.Try(filepath.Join(dir, lockName))
		if err != nil || release == nil {
			if !errors.Is(err, os.ErrNotExist) {
				errs = append(errs, err)
			}
			continue
		}
		errs = append(errs, sweep(ctx, dir))
		release()
	}
	return errors.Join(errs...)
}

// sweep ends all machines in a keeper's directory, whose lock the caller has.
func sweep(ctx context.Context, dir string) error {
	left, err := vm.Orphans(dir)
	errs := []error{err}
	for _, o := range left {
		errs = append(errs, o.End(ctx))
	}
	return errors.Join(errs...)
}
