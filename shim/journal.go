package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/containerd/containerd/api/runtime/task/v2"

	"hauberk.dev/internal/atomicfile"
	"hauberk.dev/internal/strictjson"
	"hauberk.dev/vm"
)

const (
	journalName    = "hauberk.json"
	journalVersion = 1
	maxJournal     = 64 << 10
)

// journal is what a bundle says of its sandbox. It is written before the
// machine is, so that nothing is ever started and forgotten.
type journal struct {
	Version int    `json:"version"`
	ID      string `json:"id"`
	Machine string `json:"machine"`
	Run     string `json:"run"` // directory of the machines
}

func (j journal) write(bundle string) error {
	j.Version = journalVersion
	raw, err := json.MarshalIndent(j, "", "\t")
	if err == nil {
		err = atomicfile.Write(filepath.Join(bundle, journalName), append(raw, '\n'), 0o600)
	}
	if err != nil {
		return fmt.Errorf("write journal: %w", err)
	}
	return nil
}

func readJournal(bundle string) (journal, error) {
	raw, err := readFile(filepath.Join(bundle, journalName), maxJournal)
	if err != nil {
		return journal{}, fmt.Errorf("read journal: %w", err)
	}
	return parseJournal(raw)
}

func parseJournal(raw []byte) (journal, error) {
	var j journal
	if err := strictjson.Decode(raw, maxJournal, &j); err != nil {
		return journal{}, fmt.Errorf("read journal: %w", err)
	}
	switch {
	case j.Version != journalVersion:
		return journal{}, fmt.Errorf("read journal: version %d: want %d", j.Version, journalVersion)
	case !filepath.IsAbs(j.Run) || !identifier.MatchString(j.Machine):
		return journal{}, fmt.Errorf("read journal: machine %.64q in %.256q: want a name in a directory", j.Machine, j.Run)
	}
	return j, nil
}

// remove ends what a shim that died has left: its machine with the run
// directory, and its socket. It can be called again.
func remove(ctx context.Context, a arguments, c config) (*task.DeleteResponse, error) {
	j, err := readJournal(a.bundle)
	if errors.Is(err, fs.ErrNotExist) {
		// It died before it made anything; the name is known all the same.
		j, err = journal{Machine: machineID(a), Run: c.machines()}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("delete %s: %w", a.id, err)
	}
	r := &task.DeleteResponse{ExitStatus: 128 + 9, ExitedAt: timestamppb.Now()}
	found, err := vm.Orphans(j.Run)
	if err != nil {
		return nil, fmt.Errorf("delete %s: %w", a.id, err)
	}
	for _, o := range found {
		if o.ID != j.Machine {
			continue
		}
		r.Pid = uint32(o.Journal.PID)
		if err := o.End(ctx); err != nil {
			return nil, fmt.Errorf("delete %s: %w", a.id, err)
		}
	}
	if err := removeSocket(a.bundle); err != nil {
		return nil, fmt.Errorf("delete %s: %w", a.id, err)
	}
	if err := os.Remove(filepath.Join(a.bundle, journalName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("delete %s: %w", a.id, err)
	}
	return r, nil
}
