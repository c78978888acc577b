package share

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// PolicyAnnotation names, in a container's configuration, the policies that it
// is to be held to.
const PolicyAnnotation = "dev.hauberk.guard.policy"

const maxConfig = 4 << 20

// Hook is what a runtime calls for a container: by createRuntime to bind it, by
// poststop to let it go.
type Hook struct {
	Socket   string // of the loader
	Policies string // directory
}

// state is what a runtime tells its hooks.
type state struct {
	ID          string            `json:"id"`
	PID         int               `json:"pid"`
	Bundle      string            `json:"bundle"`
	Annotations map[string]string `json:"annotations"`
}

func readState(r io.Reader) (s state, err error) {
	raw, err := io.ReadAll(io.LimitReader(r, maxConfig))
	if err == nil {
		err = json.Unmarshal(raw, &s) // runtimes may say more
	}
	if err != nil {
		return s, fmt.Errorf("read the container's state: %w", err)
	}
	return s, nil
}

// Bind binds the container that a runtime is about to start. If it fails, so must
// the runtime.
func (h Hook) Bind(stdin io.Reader) (Answer, error) {
	s, err := readState(stdin)
	if err != nil {
		return Answer{}, err
	}
	if s.PID <= 0 || !filepath.IsAbs(s.Bundle) {
		return Answer{}, fmt.Errorf("bind container %q: process %d, bundle %q: call this as a createRuntime hook", s.ID, s.PID, s.Bundle)
	}
	c, err := readConfig(s.Bundle)
	if err != nil {
		return Answer{}, err
	}
	policies, err := ReadPolicies(h.Policies, s.Annotations[PolicyAnnotation])
	if err != nil {
		return Answer{}, err
	}
	root, err := openRoot(s.PID, c.root(s.Bundle))
	if err != nil {
		return Answer{}, err
	}
	defer root.Close()
	cgroup, err := openCgroup(s.PID)
	if err != nil {
		return Answer{}, err
	}
	defer cgroup.Close()
	return ask(h.Socket, request{Op: opBind, ID: s.ID, Policies: policies, Devices: c.devices()}, root, cgroup)
}

// Unbind lets a container go.
func (h Hook) Unbind(stdin io.Reader) error {
	s, err := readState(stdin)
	if err != nil {
		return err
	}
	_, err = ask(h.Socket, request{Op: opUnbind, ID: s.ID})
	return err
}

// Change puts other policies of a container that runs in force.
func (h Hook) Change(id, name string) (Answer, error) {
	policies, err := ReadPolicies(h.Policies, name)
	if err != nil {
		return Answer{}, err
	}
	return ask(h.Socket, request{Op: opPolicy, ID: id, Policies: policies})
}

// Status asks what holds a container.
func (h Hook) Status(id string) (Answer, error) {
	return ask(h.Socket, request{Op: opStatus, ID: id})
}

// config is what is read of a bundle's configuration.
type config struct {
	Root struct {
		Path string `json:"path"`
	} `json:"root"`
	Linux struct {
		Devices []struct {
			Type  string `json:"type"`
			Major int64  `json:"major"`
			Minor int64  `json:"minor"`
		} `json:"devices"`
	} `json:"linux"`
}

func readConfig(bundle string) (c config, err error) {
	f, err := os.Open(filepath.Join(bundle, "config.json"))
	if err != nil {
		return c, err
	}
	defer f.Close()
	if err := json.NewDecoder(io.LimitReader(f, maxConfig)).Decode(&c); err != nil {
		return c, fmt.Errorf("read the container's configuration: %w", err)
	}
	return c, nil
}

func (c *config) root(bundle string) string {
	if filepath.IsAbs(c.Root.Path) {
		return c.Root.Path
	}
	return filepath.Join(bundle, c.Root.Path)
}

// devices are those that the configuration gives the container.
func (c *config) devices() (out [][3]uint32) {
	for _, d := range c.Linux.Devices {
		switch d.Type {
		case "c", "u":
			out = append(out, [3]uint32{unix.S_IFCHR, uint32(d.Major), uint32(d.Minor)})
		case "b":
			out = append(out, [3]uint32{unix.S_IFBLK, uint32(d.Major), uint32(d.Minor)})
		}
	}
	return out
}

// openRoot opens what will be the container's root, in the mounts of its first
// process. That has not changed its root yet.
func openRoot(pid int, path string) (*os.File, error) {
	top, err := unix.Open(fmt.Sprintf("/proc/%d/root", pid), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("enter process %d: %w", pid, err)
	}
	defer unix.Close(top)
	// Links lead on in that process's world, not in ours.
	fd, err := unix.Openat2(top, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS})
	if err != nil {
		return nil, fmt.Errorf("open root %q of process %d: %w", path, pid, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// openCgroup opens the cgroup of a process.
func openCgroup(pid int) (*os.File, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return nil, err
	}
	path, err := cgroupPath(raw)
	if err != nil {
		return nil, fmt.Errorf("find cgroup of process %d: %w", pid, err)
	}
	f, err := os.Open("/sys/fs/cgroup" + path)
	if err != nil {
		return nil, err
	}
	return f, nil
}

var errNoCgroup = errors.New("it is in no cgroup of version 2 below the first")

// cgroupPath reads /proc/PID/cgroup.
func cgroupPath(raw []byte) (string, error) {
	for line := range bytes.Lines(raw) {
		path, ok := bytes.CutPrefix(bytes.TrimSuffix(line, []byte("\n")), []byte("0::"))
		if !ok {
			continue
		}
		p := string(path)
		if !strings.HasPrefix(p, "/") || p == "/" || filepath.Clean(p) != p {
			return "", errNoCgroup
		}
		return p, nil
	}
	return "", errNoCgroup
}
