package oci

import (
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/shim/seccomp"
)

type linux struct {
	Namespaces        []namespace       `json:"namespaces"`
	Devices           []device          `json:"devices"`
	Resources         resources         `json:"resources"`
	RootfsPropagation string            `json:"rootfsPropagation"`
	MaskedPaths       []string          `json:"maskedPaths"`
	ReadonlyPaths     []string          `json:"readonlyPaths"`
	Sysctl            map[string]string `json:"sysctl"`
	Seccomp           *seccomp.Profile  `json:"seccomp"`
	Personality       *struct {
		Domain string   `json:"domain"`
		Flags  []string `json:"flags"`
	} `json:"personality"`
}

type namespace struct {
	Type string `json:"type"`
	Path string `json:"path"`
}

func (l *linux) faults() (errs []error) {
	errs = append(errs, l.namespaceFaults()...)
	errs = append(errs, l.resourceFaults()...)
	errs = append(errs, l.deviceFaults()...)
	fault := func(format string, a ...any) { errs = append(errs, fmt.Errorf("linux."+format, a...)) }
	if _, ok := propagations[l.RootfsPropagation]; !ok {
		fault("rootfsPropagation %.64q: there is no such propagation", l.RootfsPropagation)
	}
	for _, list := range []struct {
		name  string
		paths []string
	}{{"maskedPaths", l.MaskedPaths}, {"readonlyPaths", l.ReadonlyPaths}} {
		if len(list.paths) > guestproto.MaxList {
			fault("%s: more than %d", list.name, guestproto.MaxList)
		}
		for i, p := range list.paths {
			if !path.IsAbs(p) || path.Clean(p) == "/" || !plain(p) {
				fault("%s[%d] %.256q: want an absolute path below /", list.name, i, p)
			}
		}
	}
	if p := l.Personality; p != nil && (p.Domain != "LINUX" || len(p.Flags) > 0) {
		fault("personality %.64q: only LINUX is possible", p.Domain)
	}
	for _, name := range slices.Sorted(maps.Keys(l.Sysctl)) {
		if err := sysctlFault(name, l.Sysctl[name]); err != nil {
			fault("sysctl[%.128q] %.128q: %w", name, l.Sysctl[name], err)
		}
	}
	return errs
}

// reasons say, for a namespace, why that of the host cannot be had.
var reasons = map[string]string{
	"pid":     "a sandbox cannot see the host's processes: do without hostPID",
	"network": "a sandbox cannot use the host's network interfaces: do without hostNetwork",
	"ipc":     "a sandbox cannot share the host's memory: do without hostIPC",
	"uts":     "a sandbox cannot have the host's name: do without hostNetwork",
	"mount":   "a sandbox cannot see the host's mounts",
}

// namespaceFaults refuses the host's namespaces and those that a guest, which
// is a kernel of its own, has no use for. Whose namespace a path names is
// judged where it is known.
func (l *linux) namespaceFaults() (errs []error) {
	fault := func(format string, a ...any) { errs = append(errs, fmt.Errorf("linux.namespaces"+format, a...)) }
	seen := map[string]bool{}
	for i, n := range l.Namespaces {
		switch {
		case n.Path != "" && (!path.IsAbs(n.Path) || !plain(n.Path)):
			fault("[%d].path %.256q: want an absolute path", i, n.Path)
		case n.Path != "" && (n.Type == "mount" || n.Type == "cgroup"):
			fault("[%d].path %.256q: a container has a %s namespace of its own: leave the path out", i, n.Path, n.Type)
		case n.Type == "user":
			fault("[%d].type %q: not needed: root of a guest is nobody on the host: do without hostUsers: false", i, n.Type)
		case n.Type == "time":
			fault("[%d].type %q: a guest has one clock", i, n.Type)
		case reasons[n.Type] == "" && n.Type != "cgroup":
			fault("[%d].type %.64q: there is no such namespace", i, n.Type)
		case seen[n.Type]:
			fault("[%d].type %q: it is there twice", i, n.Type)
		}
		seen[n.Type] = true
	}
	for _, name := range slices.Sorted(maps.Keys(reasons)) {
		if !seen[name] {
			fault(": no %q: %s", name, reasons[name])
		}
	}
	return errs
}

// Network is the path of the network namespace that a container is to be in,
// or empty if it is to be in none but its own.
func (c *Config) Network() string { return c.spec.Linux.path("network") }

func (l *linux) path(kind string) string {
	for _, n := range l.Namespaces {
		if n.Type == kind {
			return n.Path
		}
	}
	return ""
}

// shared finds the PID namespace of a container, and checks that the other
// namespaces it names are the pod's: all of a guest share them.
func (l *linux) shared(f Facts) (mode guestproto.PIDMode, of uint32, err error) {
	for i, n := range l.Namespaces {
		if n.Path == "" || n.Type == "network" && n.Path == f.Network {
			continue
		}
		target, ok := owner(n, f.PIDs)
		switch {
		case !ok:
			return 0, 0, fmt.Errorf("linux.namespaces[%d].path %.256q: it is not of this pod", i, n.Path)
		case n.Type == "pid" && target == 0:
			mode = guestproto.PIDPod
		case n.Type == "pid":
			mode, of = guestproto.PIDContainer, target
		}
	}
	return mode, of, nil
}

// owner finds whose namespace a path is: /proc/N/ns/KIND.
func owner(n namespace, known map[uint32]uint32) (uint32, bool) {
	rest, ok := strings.CutPrefix(n.Path, "/proc/")
	number, kind, ok2 := strings.Cut(rest, "/ns/")
	pid, err := strconv.ParseUint(number, 10, 32)
	if !ok || !ok2 || err != nil || kind != n.Type && (kind != "net" || n.Type != "network") {
		return 0, false
	}
	target, ok := known[uint32(pid)]
	return target, ok
}

// sysctlFault refuses settings that are not of a namespace: they would be those
// of the whole guest, and most are the Guard's to protect.
func sysctlFault(name, value string) error {
	dotted := strings.ReplaceAll(name, "/", ".")
	ok := strings.HasPrefix(dotted, "net.") || strings.HasPrefix(dotted, "fs.mqueue.") || slices.Contains(settings, dotted)
	switch {
	case dotted == "kernel.hostname":
		return errors.New("use hostname instead")
	case !ok:
		return errors.New("only settings of a network or IPC namespace, and kernel.domainname, can be made")
	case len(name) > 255 || len(value) > 4096 || strings.ContainsAny(name+value, "\x00\n") || strings.Contains(dotted, "..") || strings.HasSuffix(dotted, "."):
		return errors.New("want a name and a value of one line")
	}
	return nil
}

var settings = strings.Fields("kernel.msgmax kernel.msgmnb kernel.msgmni kernel.sem kernel.shmall kernel.shmmax kernel.shmmni kernel.shm_rmid_forced kernel.domainname")

func (l *linux) sysctls() (out []guestproto.Setting) {
	for _, name := range slices.Sorted(maps.Keys(l.Sysctl)) {
		out = append(out, guestproto.Setting{Name: name, Value: l.Sysctl[name]})
	}
	return out
}
