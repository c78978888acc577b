package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// victim is a kind of process that is killed.
type victim struct {
	name string
	is   func(command []string) bool
}

// victims by what their command lines say. A keeper is a shim's program with
// another word.
var victims = []victim{
	{"shim", func(c []string) bool { return program(c, "containerd-shim-") && !slices.Contains(c, "keep") }},
	{"machine", func(c []string) bool { return program(c, "qemu-system-") }},
	{"keeper", func(c []string) bool { return program(c, "containerd-shim-hauberk-v2") && slices.Contains(c, "keep") }},
	{"virtiofsd", func(c []string) bool { return program(c, "virtiofsd") }},
	{"containerd", nil},
}

func program(command []string, prefix string) bool {
	return strings.HasPrefix(filepath.Base(command[0]), prefix)
}

var errNobody = errors.New("none there")

// strikeLater strikes after a delay, or as soon then as there is one of the
// kind, unless the life ends before.
func (s *soak) strikeLater(ctx, life context.Context, v victim, delay time.Duration, choice int) error {
	for {
		select {
		case <-life.Done():
			return errNobody
		case <-time.After(delay):
		}
		if err := s.strike(ctx, v, choice); !errors.Is(err, errNobody) {
			return err
		}
		delay = 10 * time.Millisecond
	}
}

// strike kills one of a kind. A killed containerd is started again.
func (s *soak) strike(ctx context.Context, v victim, choice int) error {
	if v.is == nil {
		s.server.Kill()
		return s.server.Restart(ctx)
	}
	var pids []int
	for pid, command := range processes() {
		if v.is(command) {
			pids = append(pids, pid)
		}
	}
	if len(pids) == 0 {
		return errNobody
	}
	slices.Sort(pids)
	if err := syscall.Kill(pids[choice%len(pids)], syscall.SIGKILL); err != nil {
		return errNobody // it has just ended
	}
	return nil
}

// processes of the namespace that have a command line and live.
func processes() map[int][]string {
	all := map[int][]string{}
	names, _ := filepath.Glob("/proc/[0-9]*")
	for _, name := range names {
		raw, err := os.ReadFile(filepath.Join(name, "cmdline"))
		pid, bad := strconv.Atoi(filepath.Base(name))
		if err == nil && bad == nil && len(raw) > 0 {
			all[pid] = strings.Split(string(bytes.TrimRight(raw, "\x00")), "\x00")
		}
	}
	return all
}
