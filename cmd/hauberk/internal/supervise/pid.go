package supervise

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"hauberk.dev/internal/atomicfile"
)

// identity names a process for good: a pid alone is given again.
type identity struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks after boot, from /proc/PID/stat
}

func writeIdentity(path string, pid int) error {
	start, err := startTime(pid)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	data, err := json.Marshal(identity{pid, start})
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return atomicfile.Write(path, append(data, '\n'), 0o644)
}

// startTime reads field 22 of /proc/PID/stat. The second field is the name of
// the program in parentheses and may hold anything.
func startTime(pid int) (uint64, error) {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, err
	}
	rest := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(rest) < 20 {
		return 0, fmt.Errorf("read /proc/%d/stat: %d fields after the name", pid, len(rest))
	}
	if rest[0] == "Z" || rest[0] == "X" {
		return 0, fs.ErrNotExist // has ended; nobody has asked how yet, or somebody just does
	}
	return strconv.ParseUint(rest[19], 10, 64)
}

// Find returns the process that a file in the run directory names, or nil if
// it does not run.
func Find(runDir, name string) (*os.Process, error) {
	path := filepath.Join(runDir, name+".pid")
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var id identity
	if err := json.Unmarshal(data, &id); err != nil || id.PID <= 1 {
		return nil, fmt.Errorf("read %s: %q names no process; remove the file", path, data[:min(len(data), 80)])
	}
	// The handle first, then the check: it stays with this process whatever
	// becomes of its pid.
	p, err := os.FindProcess(id.PID)
	if err != nil {
		return nil, nil
	}
	if start, err := startTime(id.PID); err != nil || start != id.Start {
		_ = p.Release()
		return nil, nil
	}
	return p, nil
}

// Stop ends the process that a file in the run directory names: it sends the
// signal, waits for at most the given time, then kills. It says whether there
// was one.
func Stop(ctx context.Context, runDir, name string, signal syscall.Signal, wait time.Duration) (bool, error) {
	p, err := Find(runDir, name)
	if p == nil || err != nil {
		return false, err
	}
	defer p.Release()
	if err := p.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return true, fmt.Errorf("stop %s: %w", name, err)
	}
	if err := gone(ctx, runDir, name, wait); err == nil || ctx.Err() != nil {
		return true, err
	}
	_ = p.Kill()
	return true, gone(ctx, runDir, name, 5*time.Second)
}

func gone(ctx context.Context, runDir, name string, wait time.Duration) error {
	deadline := time.Now().Add(wait)
	for {
		p, err := Find(runDir, name)
		if p == nil || err != nil {
			return err
		}
		_ = p.Release()
		if time.Now().After(deadline) {
			return fmt.Errorf("%s still runs after %v", name, wait)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Lock makes sure that one supervisor at a time serves a run directory.
func Lock(runDir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(runDir, "supervisor.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: another supervisor is running", runDir)
	}
	return f, nil
}
