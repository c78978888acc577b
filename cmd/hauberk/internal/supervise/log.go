package supervise

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"hauberk.dev/internal/atomicfile"
)

const (
	maxLog   = 16 << 20
	logCheck = 2 * time.Second
)

// openLog opens a program's log for appending. The program writes to the file
// itself, so its last words survive the supervisor.
func openLog(dir, name string) (*os.File, error) {
	return os.OpenFile(filepath.Join(dir, name+".log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
}

// boundLogs keeps every log in the directory to its bound until the context
// ends.
func (s *Supervisor) boundLogs(ctx context.Context) {
	tick := time.NewTicker(logCheck)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		logs, _ := filepath.Glob(filepath.Join(s.LogDir, "*.log"))
		for _, path := range logs {
			if err := bound(path, maxLog); err != nil {
				s.say("%v", err)
			}
		}
	}
}

// bound moves the content of a log that has outgrown its bound aside, in place
// of what was moved aside before. Writers append, so they go on at the start;
// what they write between the copy and the cut is lost.
func bound(path string, most int64) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("bound log: %w", err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || fi.Size() <= most {
		return err
	}
	err = atomicfile.WriteFrom(path+".1", 0o640, func(w io.Writer) error {
		// A log that ran far ahead keeps its end, which tells more.
		if over := fi.Size() - most; over > 0 {
			if _, err := f.Seek(over, io.SeekStart); err != nil {
				return err
			}
		}
		_, err := io.Copy(w, io.LimitReader(f, 2*most))
		return err
	})
	// Cut even if the copy failed: a full disk is why this must not go on.
	return errors.Join(err, f.Truncate(0))
}

// Tail returns the last lines of a program's log.
func Tail(dir, name string, lines int) string {
	f, err := os.Open(filepath.Join(dir, name+".log"))
	if err != nil {
		return ""
	}
	defer f.Close()
	const window = 32 << 10
	if fi, err := f.Stat(); err == nil && fi.Size() > window {
		if _, err := f.Seek(-window, io.SeekEnd); err != nil {
			return ""
		}
	}
	data, _ := io.ReadAll(io.LimitReader(f, window))
	return lastLines(string(data), lines)
}

func lastLines(text string, lines int) string {
	end := len(text)
	for end > 0 && text[end-1] == '\n' {
		end--
	}
	start := end
	for ; start > 0; start-- {
		if text[start-1] == '\n' {
			if lines--; lines == 0 {
				break
			}
		}
	}
	return text[start:end]
}
