// Package argv reads what a process was started with.
//
// A number may be another process's by the time it is asked about; who must know
// holds the process by a descriptor first.
package argv

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// patience bounds how long a process may take to be given its arguments.
	patience = 10 * time.Second
	again    = time.Millisecond
	// kernelThread is a flag of a process that has no arguments.
	kernelThread = 0x200000
)

// Of gives the arguments of a process. The error is fs.ErrNotExist if it has
// ended, or is the kernel's own.
//
// A program that is just being started has left its old arguments and not been
// given the new ones: the kernel shows none then, and Of waits.
func Of(pid int) ([]string, error) {
	dir := "/proc/" + strconv.Itoa(pid)
	for end := time.Now().Add(patience); ; time.Sleep(again) {
		line, err := os.ReadFile(dir + "/cmdline")
		if err == nil && len(line) > 0 {
			return strings.Split(string(bytes.TrimSuffix(line, []byte{0})), "\x00"), nil
		}
		if err == nil {
			err = runs(dir)
		}
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ESRCH):
			return nil, fmt.Errorf("read arguments of process %d: %w", pid, fs.ErrNotExist)
		case err != nil:
			return nil, fmt.Errorf("read arguments of process %d: %w", pid, err)
		case time.Now().After(end):
			return nil, fmt.Errorf("read arguments of process %d: it has none", pid)
		}
	}
}

// Has says whether a process was started with an argument.
func Has(pid int, arg string) (bool, error) {
	all, err := Of(pid)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return slices.Contains(all, arg), err
}

// runs is nil for a process that can yet be given arguments.
func runs(dir string) error {
	raw, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return err
	}
	// The name, in parentheses, may hold anything; fields are counted after it.
	fields := strings.Fields(string(raw[bytes.LastIndexByte(raw, ')')+1:]))
	if len(fields) < 7 {
		return fmt.Errorf("%q is no status line", raw)
	}
	flags, err := strconv.ParseUint(fields[6], 10, 64)
	if err != nil {
		return fmt.Errorf("%q is no status line", raw)
	}
	if fields[0] == "Z" || fields[0] == "X" || flags&kernelThread != 0 {
		return fs.ErrNotExist
	}
	return nil
}
