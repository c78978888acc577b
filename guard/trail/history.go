package trail

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"time"
)

// History keeps the records of a sandbox in a file, and one older file beside
// it, which together stay within a limit.
type History struct {
	path  string
	limit int64

	mu   sync.Mutex
	file *os.File
	size int64
}

// OpenHistory opens or makes a history of at most limit bytes.
func OpenHistory(path string, limit int64) (*History, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open history: %w", err)
	}
	h := &History{path: path, limit: limit, file: f}
	if h.size, err = f.Seek(0, io.SeekEnd); err == nil && h.size > 0 {
		var last [1]byte
		if _, err = f.ReadAt(last[:], h.size-1); err == nil && last[0] != '\n' {
			_, err = f.Write([]byte("\n")) // a line that a crash cut
			h.size++
		}
	}
	if err != nil {
		return nil, fmt.Errorf("open history: %w", errors.Join(err, f.Close()))
	}
	return h, nil
}

// Append adds a record. A disk that is full costs history and nothing else.
func (h *History) Append(r Record) error {
	line, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("keep record: %w", err)
	}
	line = append(line, '\n')
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.file == nil {
		return nil // closed
	}
	if h.size+int64(len(line)) > h.limit/2 {
		if err := h.turnLocked(); err != nil {
			return err
		}
	}
	n, err := h.file.Write(line)
	h.size += int64(n)
	if err != nil {
		return fmt.Errorf("keep record: %w", err)
	}
	return nil
}

func (h *History) turnLocked() error {
	if err := os.Rename(h.path, h.path+".1"); err != nil {
		return fmt.Errorf("turn history: %w", err)
	}
	f, err := os.OpenFile(h.path, os.O_CREATE|os.O_TRUNC|os.O_APPEND|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("turn history: %w", err)
	}
	h.file.Close()
	h.file, h.size = f, 0
	return nil
}

// Close ends it; what comes later is dropped.
func (h *History) Close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.file == nil {
		return nil
	}
	err := h.file.Close()
	h.file = nil
	return err
}

// followEvery is how often a history that is followed is looked at.
const followEvery = 200 * time.Millisecond

// Read hands the lines of a history to each, oldest first, and goes on with new
// ones if told to follow, until ctx ends. A history that was never written is
// empty. Lines that cannot be read are passed over.
func Read(ctx context.Context, path string, follow bool, each func(Record) error) error {
	if err := readWhole(path+".1", each); err != nil {
		return err
	}
	var f *os.File
	defer func() {
		if f != nil {
			f.Close()
		}
	}()
	var rest []byte
	for {
		if f == nil {
			var err error
			if f, err = os.Open(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("read history: %w", err)
			}
		}
		turned := f != nil && !same(f, path) // looked at first, so that all of the old is read
		if f != nil {
			if err := lines(f, &rest, each); err != nil {
				return err
			}
		}
		if turned {
			f.Close()
			f, rest = nil, nil
			continue
		}
		if !follow {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(followEvery):
		}
	}
}

func same(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return true
	}
	b, err := os.Stat(path)
	return err != nil || os.SameFile(a, b)
}

func readWhole(path string, each func(Record) error) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read history: %w", err)
	}
	defer f.Close()
	var rest []byte
	return lines(f, &rest, each)
}

// lines hands on whole lines and keeps what is not whole yet in rest.
func lines(r io.Reader, rest *[]byte, each func(Record) error) error {
	buf := make([]byte, 32<<10)
	for {
		n, err := r.Read(buf)
		*rest = append(*rest, buf[:n]...)
		for {
			i := bytes.IndexByte(*rest, '\n')
			if i < 0 {
				break
			}
			if record, err := Parse((*rest)[:i]); err == nil {
				if err := each(record); err != nil {
					return err
				}
			}
			*rest = (*rest)[i+1:]
		}
		if len(*rest) > maxLine {
			*rest = nil
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read history: %w", err)
		}
	}
}

// Scan hands the records of a stream of lines to each.
func Scan(r io.Reader, each func(Record) error) error {
	s := bufio.NewScanner(r)
	s.Buffer(make([]byte, 4<<10), maxLine)
	for s.Scan() {
		record, err := Parse(s.Bytes())
		if err == nil {
			err = each(record)
		}
		if err != nil {
			return err
		}
	}
	if err := s.Err(); err != nil {
		return fmt.Errorf("read records: %w", err)
	}
	return nil
}
