package outlog

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// look is how often a log that is followed is looked at.
const look = 50 * time.Millisecond

// maxLine bounds a line with all before its text.
const maxLine = maxText + 128

// Line is one of a log.
type Line struct {
	At     time.Time
	Stream string
	// Text as it was written, with the newline that ended it, if one did.
	Text []byte
}

// whole says whether a newline ended it.
func (l Line) whole() bool { return bytes.HasSuffix(l.Text, []byte("\n")) }

// Parse reads a line without its newline.
func Parse(raw []byte) (Line, error) {
	at, rest, ok1 := bytes.Cut(raw, []byte(" "))
	stream, rest, ok2 := bytes.Cut(rest, []byte(" "))
	tag, text, ok3 := bytes.Cut(rest, []byte(" "))
	if !ok1 || !ok2 || !ok3 {
		return Line{}, fmt.Errorf("read log: line %.64q: want TIME STREAM TAG TEXT", raw)
	}
	when, err := time.Parse(time.RFC3339Nano, string(at))
	if err != nil {
		return Line{}, fmt.Errorf("read log: time %.64q: want that of RFC 3339", at)
	}
	l := Line{At: when, Stream: string(stream), Text: bytes.Clone(text)}
	if l.Stream != Stdout && l.Stream != Stderr {
		return Line{}, fmt.Errorf("read log: stream %.64q: want %s or %s", stream, Stdout, Stderr)
	}
	switch string(tag) {
	case "F":
		l.Text = append(l.Text, '\n')
	case "P":
	default:
		return Line{}, fmt.Errorf("read log: tag %.64q: want F or P", tag)
	}
	return l, nil
}

// Options of reading.
type Options struct {
	// Tail is how many lines to begin with; negative is all.
	Tail int
	// Since leaves out what is older.
	Since time.Time
	// Follow goes on with what is written later, until Ended is closed.
	Follow bool
	Ended  <-chan struct{}
}

// Read gives the lines of a log in order. A log that is not there is empty. Who
// follows misses what was turned over twice between two looks.
func Read(ctx context.Context, path string, o Options, f func(Line) error) error {
	r := &reader{path: path, since: o.Since, give: f}
	defer r.close()
	if err := r.old(ctx, o.Tail); err != nil || !o.Follow {
		return err
	}
	ended := o.Ended
	for {
		last := false
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-ended:
			last = true // what is there now is all
		case <-time.After(look):
		}
		if err := r.more(); err != nil || last {
			return err
		}
	}
}

// reader reads one log.
type reader struct {
	path  string
	since time.Time
	give  func(Line) error

	file *os.File
	rest []byte // of a line that is being written
}

func (r *reader) close() {
	if r.file != nil {
		_ = r.file.Close() // it was only read
	}
}

// old gives what is there.
func (r *reader) old(ctx context.Context, tail int) error {
	give := r.give
	var kept []Line
	if tail >= 0 {
		r.give = func(l Line) error {
			kept = append(kept, l)
			kept = trim(kept, tail)
			return nil
		}
	}
	defer func() { r.give = give }()
	full, err := open(r.path + before)
	if err != nil {
		return err
	}
	r.file = full
	if err := r.more(); err != nil {
		return err
	}
	r.give = give
	for _, l := range kept {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := give(l); err != nil {
			return err
		}
	}
	return nil
}

// trim keeps the last n whole lines, and what follows them.
func trim(lines []Line, n int) []Line {
	count := 0
	for i := len(lines) - 1; i >= 0; i-- {
		if !lines[i].whole() && i < len(lines)-1 {
			continue // it is the beginning of one that is counted
		}
		if count == n {
			return lines[i+1:]
		}
		count++
	}
	return lines
}

// more gives what has been written since, through files that were turned over.
func (r *reader) more() error {
	for {
		if r.file != nil {
			if err := r.drain(); err != nil {
				return err
			}
		}
		next, err := open(r.path)
		if err != nil || next == nil {
			return err
		}
		if r.file != nil && same(r.file, next) {
			return next.Close()
		}
		// The file was full. What was written to it between the last look
		// and its end is still in it.
		if r.file != nil {
			if err := r.drain(); err != nil {
				return errors.Join(err, next.Close())
			}
			_ = r.file.Close() // it was only read
		}
		r.file, r.rest = next, nil
	}
}

func same(a, b *os.File) bool {
	x, errX := a.Stat()
	y, errY := b.Stat()
	return errX == nil && errY == nil && os.SameFile(x, y)
}

func open(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return f, err
}

// drain gives the lines from where the file stands to its end.
func (r *reader) drain() error {
	in := bufio.NewReaderSize(r.file, 64<<10)
	for {
		part, err := in.ReadSlice('\n')
		if len(r.rest)+len(part) > maxLine {
			return fmt.Errorf("read log %s: a line of more than %d bytes", r.path, maxLine)
		}
		r.rest = append(r.rest, part...)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read log: %w", err)
		}
		l, err := Parse(bytes.TrimSuffix(r.rest, []byte("\n")))
		r.rest = r.rest[:0]
		if err != nil {
			return err
		}
		if l.At.Before(r.since) {
			continue
		}
		if err := r.give(l); err != nil {
			return err
		}
	}
}
