package node

import (
	"errors"
	"path/filepath"
)

// End ends every sandbox that an earlier process left, and forgets it. It
// needs no control plane; no other node may be using the same directories.
func End(c Config) error {
	j, err := openJournal(filepath.Join(c.State, "instances"))
	if err != nil {
		return err
	}
	left, err := j.all()
	if err != nil {
		return err
	}
	g := &guests{machines: filepath.Join(c.Run, "vm"), namespaces: filepath.Join(c.Run, "netns")}
	if err := g.sweep(nil); err != nil {
		return err // what could not be ended stays in the journal
	}
	var errs []error
	for _, e := range left {
		errs = append(errs, j.remove(e.Instance.ID))
	}
	return errors.Join(errs...)
}
