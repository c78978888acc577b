package vm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"hauberk.dev/internal/argv"
	"hauberk.dev/internal/atomicfile"
)

// State is how far the making of a machine came.
type State string

// The states. Starting is written before the process exists, so that nothing
// can be started and forgotten.
const (
	StateStarting State = "starting"
	StateReady    State = "ready"
)

const (
	journalName    = "machine.json"
	journalVersion = 1
	maxJournal     = 64 << 10
)

// Journal is what a run directory says of its machine.
type Journal struct {
	Version int    `json:"version"`
	ID      string `json:"id"`
	Driver  string `json:"driver"`
	State   State  `json:"state"`
	// Mark stands in the process' command line and nowhere else.
	Mark string `json:"mark"`
	UID  uint32 `json:"uid"`
	// PID, Start and BootID name the process for ever: a number alone would be
	// some other process one day.
	PID    int    `json:"pid,omitempty"`
	Start  uint64 `json:"start,omitempty"` // in clock ticks since boot
	BootID string `json:"bootID"`
	// Scratch marks a machine that is nobody's: the guest that becomes a
	// template, or one that waits for its owner. It is never adopted.
	Scratch bool `json:"scratch,omitempty"`
	// Cgroups are directories that bound the process, and go with the machine.
	Cgroups []string `json:"cgroups,omitempty"`
	// Key is a digest of everything that a saved state of the machine depends
	// on, and Memory how many bytes the guest has.
	Key    string `json:"key,omitempty"`
	Origin Origin `json:"origin,omitzero"`
	Memory int64  `json:"memory,omitempty"`
	// Template is the key of the template cloned, empty after a cold boot.
	Template string    `json:"template,omitempty"`
	Created  time.Time `json:"created"`
}

// NewJournal makes the journal of a machine that is about to start.
func NewJournal(id, driver, mark string, uid uint32) (Journal, error) {
	boot, err := bootID()
	return Journal{
		Version: journalVersion, ID: id, Driver: driver, State: StateStarting, Mark: mark, UID: uid,
		BootID: boot, Created: time.Now().UTC(),
	}, err
}

// Write replaces the journal of a run directory.
func (j Journal) Write(dir string) error {
	raw, err := json.MarshalIndent(j, "", "\t")
	if err != nil {
		return fmt.Errorf("write journal: %w", err)
	}
	return atomicfile.Write(filepath.Join(dir, journalName), append(raw, '\n'), 0o600)
}

// ReadJournal reads the journal of a run directory.
func ReadJournal(dir string) (Journal, error) {
	name := filepath.Join(dir, journalName)
	f, err := os.Open(name)
	if err != nil {
		return Journal{}, fmt.Errorf("read journal: %w", err)
	}
	defer f.Close()
	raw := make([]byte, maxJournal+1)
	n, err := readFull(f, raw)
	if err != nil {
		return Journal{}, fmt.Errorf("read journal %s: %w", name, err)
	}
	j, err := parseJournal(raw[:n])
	if err != nil {
		return Journal{}, fmt.Errorf("read journal %s: %w", name, err)
	}
	return j, nil
}

func parseJournal(raw []byte) (Journal, error) {
	var j Journal
	if len(raw) > maxJournal {
		return j, fmt.Errorf("more than %d bytes", maxJournal)
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	if err := d.Decode(&j); err != nil {
		return Journal{}, err
	}
	switch {
	case j.Version != journalVersion:
		return Journal{}, fmt.Errorf("version %d, this program knows %d", j.Version, journalVersion)
	case !idPattern.MatchString(j.ID):
		return Journal{}, fmt.Errorf("bad id %q", j.ID)
	case j.Mark == "" || j.UID == 0 || j.PID < 0 || j.PID == 1:
		return Journal{}, errors.New("it names no process a machine could have")
	case j.State == StateReady && j.PID == 0, j.State != StateReady && j.State != StateStarting:
		return Journal{}, fmt.Errorf("state %q with process %d", j.State, j.PID)
	}
	return j, nil
}

// find returns the process of a machine, or 0 if there is none. One that was
// never written down is found by its mark.
func (j Journal) find() (pid int, start uint64, err error) {
	boot, err := bootID()
	if err != nil || boot != j.BootID {
		return 0, 0, err
	}
	if j.PID != 0 {
		start, err := startTime(j.PID)
		if errors.Is(err, fs.ErrNotExist) || err == nil && start != j.Start {
			return 0, 0, nil
		}
		return j.PID, start, err
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0, 0, err
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		ours, err := j.marked(pid)
		if err != nil {
			return 0, 0, err
		}
		if !ours {
			continue
		}
		if start, err := startTime(pid); err == nil {
			if ours, err := j.marked(pid); ours || err != nil { // it was it all the time
				return pid, start, err
			}
		}
	}
	return 0, 0, nil
}

// marked says whether a process has the machine's user and mark.
func (j Journal) marked(pid int) (bool, error) {
	var st unix.Stat_t
	if unix.Stat("/proc/"+strconv.Itoa(pid), &st) != nil || st.Uid != j.UID {
		return false, nil
	}
	return argv.Has(pid, j.Mark)
}

func bootID() (string, error) {
	raw, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(raw)), err
}

// startTime reads when a process started. A zombie has ended.
func startTime(pid int) (uint64, error) {
	raw, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if errors.Is(err, unix.ESRCH) {
		err = fs.ErrNotExist
	}
	if err != nil {
		return 0, err
	}
	// The name, in parentheses, may hold anything; fields are counted after it.
	_, rest, ok := strings.Cut(string(raw[bytes.LastIndexByte(raw, ')')+1:]), " ")
	fields := strings.Fields(rest)
	if !ok || len(fields) < 20 {
		return 0, fmt.Errorf("read process %d: %q is no status line", pid, raw)
	}
	if fields[0] == "Z" || fields[0] == "X" {
		return 0, fs.ErrNotExist
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// Ready notes that a machine runs and which process it is.
func (j Journal) Ready(dir string, pid int) error {
	start, err := startTime(pid)
	if err != nil {
		return fmt.Errorf("write journal: process %d: %w", pid, err)
	}
	j.State, j.PID, j.Start = StateReady, pid, start
	return j.Write(dir)
}

// CheckAlive says whether the machine of a run directory was finished by a
// driver and still runs: nil, ErrUnfinished or ErrGone.
func CheckAlive(dir, driver string) error {
	j, err := ReadJournal(dir)
	if err != nil {
		return err
	}
	if j.Driver != driver {
		return fmt.Errorf("its driver is %q, not %q", j.Driver, driver)
	}
	if j.State != StateReady || j.Scratch {
		return ErrUnfinished
	}
	pid, _, err := j.find()
	if err == nil && pid == 0 {
		err = ErrGone
	}
	return err
}
