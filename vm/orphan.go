package vm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"hauberk.dev/vm/cgroup"
)

// Orphan is a run directory found on disk.
type Orphan struct {
	ID  string
	Dir string
	// Journal is zero if there is none to read, and Err says why.
	Journal Journal
	Err     error
	// Alive says that the machine's process runs.
	Alive bool
}

// Adoptable says whether a driver's Adopt can take the machine up. What cannot
// be adopted is to be ended.
func (o Orphan) Adoptable() bool {
	return o.Err == nil && o.Alive && o.Journal.State == StateReady && !o.Journal.Scratch
}

// Orphans lists the run directories below parent, whoever made them.
func Orphans(parent string) ([]Orphan, error) {
	entries, err := os.ReadDir(parent)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list machines: %w", err)
	}
	var out []Orphan
	for _, e := range entries {
		if !e.IsDir() || !idPattern.MatchString(e.Name()) {
			continue
		}
		out = append(out, OrphanIn(filepath.Join(parent, e.Name())))
	}
	return out, nil
}

// OrphanIn reads one run directory.
func OrphanIn(dir string) Orphan {
	o := Orphan{ID: filepath.Base(dir), Dir: dir}
	if o.Journal, o.Err = ReadJournal(dir); o.Err == nil {
		pid, _, err := o.Journal.find()
		o.Alive, o.Err = pid != 0, err
	}
	return o
}

// End kills the orphan's process, if there is one, waits until it is gone, and
// removes the directory.
func (o Orphan) End(ctx context.Context) error {
	if err := o.kill(ctx); err != nil {
		return fmt.Errorf("end machine %s: %w", o.ID, err)
	}
	return errors.Join(cgroup.Remove(o.Journal.Cgroups), os.RemoveAll(o.Dir))
}

func (o Orphan) kill(ctx context.Context) error {
	if o.Journal.Mark == "" {
		// Nothing starts before its journal stands.
		return nil
	}
	pid, start, err := o.Journal.find()
	if err != nil || pid == 0 {
		return err
	}
	h, err := openHandle(pid, start, nil)
	if errors.Is(err, ErrGone) {
		return nil
	}
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { _, err := h.wait(); ended <- err }()
	defer h.close() // ends the wait
	if err := h.kill(); err != nil {
		return err
	}
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
