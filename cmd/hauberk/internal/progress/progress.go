// Package progress tells a person what a long command is doing.
//
// It writes plain lines, the same to a terminal and to a file: one when a step
// begins and, if the step took long enough to be waited for, one when it ends.
package progress

import (
	"fmt"
	"io"
	"time"
)

// noticed is how long a step may take before its end is worth a line.
const noticed = time.Second

// Log writes steps. The zero value is silent.
type Log struct {
	w   io.Writer
	now func() time.Time
}

// New returns a log that writes to w.
func New(w io.Writer, now func() time.Time) *Log { return &Log{w, now} }

// Say writes one line.
func (l *Log) Say(format string, args ...any) {
	if l != nil && l.w != nil {
		fmt.Fprintf(l.w, format+"\n", args...)
	}
}

// Step begins a step and returns what ends it. The end of a step that failed
// says nothing: the error will.
func (l *Log) Step(format string, args ...any) (end func(error) error) {
	if l == nil || l.w == nil {
		return func(err error) error { return err }
	}
	name, began := fmt.Sprintf(format, args...), l.now()
	l.Say("%s", name)
	return func(err error) error {
		if took := l.now().Sub(began); err == nil && took >= noticed {
			l.Say("%s: done in %.1fs", name, took.Seconds())
		}
		return err
	}
}
