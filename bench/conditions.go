package main

import (
	"bufio"
	"bytes"
	"context"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// conditions are what a figure is worth nothing without.
type conditions struct {
	Date        string `json:"date"`
	Commit      string `json:"commit"`
	CPU         string `json:"cpu"`
	Cores       int    `json:"cores"`
	HostMiB     int    `json:"hostMiB"`
	Kernel      string `json:"kernel"`
	QEMU        string `json:"qemu"`
	Accelerator string `json:"accelerator"`
	GuestKernel string `json:"guestKernel"`
	GuestMiB    int    `json:"guestMiB"`
	Rivals      string `json:"rivals"`
	Load        string `json:"loadBefore"`
}

// surroundings are the conditions that ask for no machine of ours.
func surroundings(ctx context.Context) conditions {
	c := conditions{
		Date: time.Now().UTC().Format(time.RFC3339), Commit: first(ctx, "git", "describe", "--tags", "--always", "--dirty"),
		CPU: entry("/proc/cpuinfo", "model name"), Cores: runtime.NumCPU(), Load: load(),
		Kernel: strings.TrimSpace(text("/proc/sys/kernel/osrelease")),
		Rivals: first(ctx, "runc", "--version") + "; " + first(ctx, "haproxy", "-v"),
	}
	kb, _ := strconv.Atoi(strings.TrimSuffix(entry("/proc/meminfo", "MemTotal"), " kB")) // 0 says that it is not known
	c.HostMiB = kb >> 10
	return c
}

// load is the load average over one, five and fifteen minutes.
func load() string {
	f := strings.Fields(text("/proc/loadavg"))
	return strings.Join(f[:min(3, len(f))], " ")
}

func text(path string) string {
	raw, err := os.ReadFile(path)
	if err != nil {
		return "unknown"
	}
	return string(raw)
}

// entry is the first value of a name in a file of "name: value" lines.
func entry(path, name string) string {
	sc := bufio.NewScanner(strings.NewReader(text(path)))
	for sc.Scan() {
		if k, v, ok := strings.Cut(sc.Text(), ":"); ok && strings.TrimSpace(k) == name {
			return strings.TrimSpace(v)
		}
	}
	return "unknown"
}

// first is the first line a program prints; what cannot be asked is unknown.
func first(ctx context.Context, name string, args ...string) string {
	out, err := exec.CommandContext(ctx, name, args...).Output()
	if err != nil {
		return name + " unknown"
	}
	line, _, _ := bytes.Cut(out, []byte("\n"))
	return string(line)
}
