package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"hauberk.dev/internal/strictjson"
)

// treatment is what becomes of a field of an OCI configuration.
type treatment string

// The treatments.
const (
	honoured treatment = "honoured" // done as asked
	judged   treatment = "judged"   // honoured for some values, refused for others
	harmless treatment = "ignored"  // asking for it and not getting it hurts nobody
	refused  treatment = "refused"  // if it asks for anything
)

// field says what becomes of a field and all below it.
type field struct {
	path string
	treatment
	note string
}

// fields is the whole truth about OCI configurations: a field that is not here,
// nor below one that is, is refused. docs/containerd.md shows the same table.
var fields = []field{
	{"ociVersion", harmless, "fields decide, not the version"},
	{"annotations", harmless, "they speak to containerd and its plugins; but `hauberk.dev/guard-policy` holds the Guard's policies"},
	{"hostname", honoured, "the container's id if there is none"},
	{"domainname", refused, ""},
	{"hooks", refused, "nothing of the host is run in or for a sandbox"},
	{"root.path", honoured, "only if containerd mounts nothing; else the mounts are the root"},
	{"root.readonly", refused, "the root is always writable, in the sandbox's memory; nothing written can be run"},
	{"mounts", judged, "/proc, /sys, /sys/fs/cgroup, /dev, /dev/pts, /dev/shm, /dev/mqueue are the sandbox's own; /run is part of the root; no other is possible"},

	{"process.args", honoured, ""},
	{"process.env", honoured, ""},
	{"process.cwd", honoured, ""},
	{"process.terminal", honoured, ""},
	{"process.consoleSize", honoured, ""},
	{"process.user.uid", honoured, ""},
	{"process.user.gid", honoured, ""},
	{"process.user.additionalGids", honoured, ""},
	{"process.user.umask", judged, "always 0022"},
	{"process.user.username", refused, "it is for Windows"},
	{"process.commandLine", refused, "it is for Windows"},
	{"process.capabilities", judged, "root has a fixed set: asking for less of it, or for more than containerd's default, is refused; MKNOD and SYS_CHROOT are never given; other users have none"},
	{"process.rlimits", judged, "RLIMIT_NOFILE is always 1048576; no other can be set"},
	{"process.noNewPrivileges", harmless, "always on"},
	{"process.apparmorProfile", refused, "the guest's kernel has the Guard instead"},
	{"process.selinuxLabel", refused, "the guest's kernel has the Guard instead"},
	{"process.oomScoreAdj", harmless, "in the sandbox there is nobody else to be chosen"},
	{"process.scheduler", refused, ""},
	{"process.ioPriority", refused, ""},
	{"process.execCPUAffinity", refused, ""},

	{"linux.namespaces", judged, "pid, ipc, uts, mount and network must be new; cgroup may be; another's, the host's, user and time namespaces are refused"},
	{"linux.uidMappings", refused, ""},
	{"linux.gidMappings", refused, ""},
	{"linux.timeOffsets", refused, ""},
	{"linux.devices", refused, "a sandbox has null, zero, full, random, urandom, tty and terminals"},
	{"linux.netDevices", refused, "a sandbox has no network in this version"},
	{"linux.sysctl", refused, ""},
	{"linux.cgroupsPath", harmless, "the machine's size is the limit; its monitor is in the shim's cgroup"},
	{"linux.resources.devices", judged, "rules that deny are always in force; those that allow are for null, zero, full, random, urandom, tty, console and terminals, others are refused; there is no console"},
	{"linux.resources.memory.limit", honoured, "the machine gets 96 MiB more"},
	{"linux.resources.memory.swap", harmless, "a sandbox has no swap"},
	{"linux.resources.pids.limit", honoured, ""},
	{"linux.resources.cpu.shares", harmless, "a weight, not a limit"},
	{"linux.resources.cpu.quota", honoured, "as whole processors, rounded up"},
	{"linux.resources.cpu.period", honoured, ""},
	{"linux.rootfsPropagation", judged, "private, rprivate, slave and rslave: there is nothing to propagate"},
	{"linux.seccomp", refused, "the sandbox has a filter and the Guard of its own; a profile cannot be added yet"},
	{"linux.maskedPaths", judged, "below /proc and /sys: they show the sandbox's own kernel"},
	{"linux.readonlyPaths", judged, "below /proc and /sys: the sandbox's own kernel, whose settings the Guard protects"},
	{"linux.mountLabel", refused, ""},
	{"linux.intelRdt", refused, ""},
	{"linux.personality", refused, ""},
	{"linux.memoryPolicy", refused, ""},

	{"vm", refused, "which kernel boots is not the container's to say"},
	{"windows", refused, ""},
	{"solaris", refused, ""},
	{"zos", refused, ""},
	{"freebsd", refused, ""},
}

// survey finds what a configuration asks for and does not get. prefix is the
// place of raw in a configuration, for a process alone.
func survey(raw []byte, prefix string) error {
	var v any
	if err := strictjson.DecodeLoose(raw, maxConfig, &v); err != nil {
		return err
	}
	if _, ok := v.(map[string]any); !ok {
		return errors.New("it is no object")
	}
	return errors.Join(asked(v, prefix)...)
}

func asked(v any, path string) []error {
	if empty(v) {
		return nil
	}
	known := slices.IndexFunc(fields, func(f field) bool { return f.path == path })
	if known >= 0 && fields[known].treatment != refused {
		return nil
	}
	object, ok := v.(map[string]any)
	if known >= 0 || !ok || !below(path) {
		return []error{refusal(path, known, v)}
	}
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(object)) {
		at := name
		if path != "" {
			at = path + "." + name
		}
		errs = append(errs, asked(object[name], at)...)
	}
	return errs
}

// below says whether the table has fields below a path.
func below(path string) bool {
	return path == "" || slices.ContainsFunc(fields, func(f field) bool { return strings.HasPrefix(f.path, path+".") })
}

func refusal(path string, known int, v any) error {
	name := path
	if said, err := json.Marshal(v); err == nil && len(said) <= 128 {
		name += " " + string(said)
	}
	switch {
	case known < 0:
		return fmt.Errorf("%.256q: this shim does not know the field", name)
	case fields[known].note == "":
		return fmt.Errorf("%s: not possible in a sandbox", name)
	}
	return fmt.Errorf("%s: not possible in a sandbox: %s", name, fields[known].note)
}

// empty says whether a value asks for nothing.
func empty(v any) bool {
	switch v := v.(type) {
	case nil:
		return true
	case bool:
		return !v
	case string:
		return v == ""
	case float64:
		return v == 0
	case []any:
		return len(v) == 0
	case map[string]any:
		for _, inner := range v {
			if !empty(inner) {
				return false
			}
		}
		return true
	}
	return false
}
