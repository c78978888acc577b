package vm

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
)

// Memory is what a machine's monitor, guest memory included, takes of the
// host, in bytes.
type Memory struct {
	Private      uint64 // its own pages
	Shared       uint64 // pages others map too: template, programs, kernel
	Proportional uint64 // private plus its part of the shared
	Resident     uint64
}

// readMemory reads what a process maps.
func readMemory(pid int) (Memory, error) {
	raw, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/smaps_rollup")
	if err != nil {
		return Memory{}, fmt.Errorf("read memory of process %d: %w", pid, err)
	}
	return parseRollup(raw)
}

func parseRollup(raw []byte) (Memory, error) {
	var m Memory
	into := map[string]*uint64{
		"Private_Clean": &m.Private, "Private_Dirty": &m.Private,
		"Shared_Clean": &m.Shared, "Shared_Dirty": &m.Shared,
		"Pss": &m.Proportional, "Rss": &m.Resident,
	}
	seen := 0
	sc := bufio.NewScanner(bytes.NewReader(raw))
	for sc.Scan() {
		name, rest, _ := strings.Cut(sc.Text(), ":")
		to := into[name]
		if to == nil {
			continue
		}
		kb, err := strconv.ParseUint(strings.TrimSpace(strings.TrimSuffix(rest, " kB")), 10, 44)
		if err != nil {
			return Memory{}, fmt.Errorf("read memory: %w", err)
		}
		*to += kb << 10
		seen++
	}
	if seen != len(into) {
		return Memory{}, fmt.Errorf("read memory: %d of %d fields are there", seen, len(into))
	}
	return m, nil
}

// readFull reads until b is full or r ends.
func readFull(r io.Reader, b []byte) (int, error) {
	n, err := io.ReadFull(r, b)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = nil
	}
	return n, err
}
