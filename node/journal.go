package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	wire "hauberk.dev/api/node"
	"hauberk.dev/internal/atomicfile"
)

// entry is what the journal remembers of an instance. It is on disk before
// the first thing is created for the instance and gone after the last is
// removed, so whatever a killed node leaves behind has an entry.
type entry struct {
	Instance  wire.Instance `json:"instance"`
	Phase     wire.Phase    `json:"phase"`
	Reason    string        `json:"reason,omitempty"`
	Message   string        `json:"message,omitempty"`
	StartedAt time.Time     `json:"startedAt,omitzero"`
	// Process of the workload in the guest, to wait for it after a restart.
	Process uint32 `json:"process,omitempty"`
	// Env of the workload, for what is executed beside it.
	Env         []string `json:"env,omitempty"`
	ReadyMillis int64    `json:"readyMillis,omitempty"`
	ExitCode    *int     `json:"exitCode,omitempty"`
	// Contained is set before an instance is frozen.
	Contained bool `json:"contained,omitempty"`
	// Boot is the machine boot the entry was written in: an older one means
	// that nothing of it can be running.
	Boot string `json:"boot"`
}

// journal is a folder with one file per instance.
type journal struct {
	dir  string
	boot string
}

func openJournal(dir string) (*journal, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open journal: %w", err)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("open journal: %w", err)
	}
	return &journal{dir: dir, boot: string(boot)}, nil
}

func (j *journal) path(id string) string { return filepath.Join(j.dir, id+".json") }

func (j *journal) put(e entry) error {
	if id := e.Instance.ID; id == "." || !filepath.IsLocal(id) || filepath.Base(id) != id {
		return fmt.Errorf("journal %q: not a name of an instance", id)
	}
	e.Boot = j.boot
	data, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("journal %s: %w", e.Instance.ID, err)
	}
	if err := atomicfile.Write(j.path(e.Instance.ID), data, 0o600); err != nil {
		return fmt.Errorf("journal %s: %w", e.Instance.ID, err)
	}
	return nil
}

func (j *journal) remove(id string) error {
	if err := os.Remove(j.path(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("journal %s: %w", id, err)
	}
	return nil
}

// all returns the entries left by an earlier node process. An unreadable
// entry is an error: guessing could leak a sandbox.
func (j *journal) all() ([]entry, error) {
	names, err := filepath.Glob(filepath.Join(j.dir, "*.json"))
	if err != nil {
		return nil, fmt.Errorf("read journal: %w", err)
	}
	var all []entry
	for _, name := range names {
		data, err := os.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("read journal: %w", err)
		}
		var e entry
		if err := json.Unmarshal(data, &e); err != nil {
			return nil, fmt.Errorf("read journal %s: %w: its sandbox is ended if you remove the file", name, err)
		}
		if j.path(e.Instance.ID) != name {
			return nil, fmt.Errorf("read journal %s: it is about instance %q: its sandbox is ended if you remove the file", name, e.Instance.ID)
		}
		all = append(all, e)
	}
	return all, nil
}
