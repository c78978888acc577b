package oci

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
// nor below one that is, is refused. docs/oci.md shows the same table.
var fields = []field{
	{"ociVersion", harmless, "fields decide, not the version"},
	{"annotations", judged, "those of the CRI say what pod the container is of, and how large; others speak to containerd and its plugins"},
	{"hostname", honoured, "of all containers of the pod; the container's id if nobody gives one"},
	{"domainname", honoured, ""},
	{"hooks", refused, "they want processes and namespaces of the host, and what is inside a sandbox has none there"},
	{"root.path", honoured, "only if containerd mounts nothing; else the mounts are the root"},
	{"root.readonly", honoured, ""},
	{"mounts", judged, "proc, sysfs, tmpfs, devpts, mqueue and cgroup are the guest's; paths of the host come as docs/volumes.md says; of those rshared, and of all idmap, tmpcopyup, mand and other file systems are refused"},

	{"process.args", honoured, ""},
	{"process.env", honoured, ""},
	{"process.cwd", honoured, ""},
	{"process.terminal", honoured, ""},
	{"process.consoleSize", honoured, ""},
	{"process.user.uid", honoured, ""},
	{"process.user.gid", honoured, ""},
	{"process.user.additionalGids", honoured, ""},
	{"process.user.umask", honoured, ""},
	{"process.user.username", refused, "it is for Windows"},
	{"process.commandLine", refused, "it is for Windows"},
	{"process.capabilities", honoured, "in the guest; what the Guard refuses it refuses to every capability"},
	{"process.rlimits", honoured, ""},
	{"process.noNewPrivileges", honoured, ""},
	{"process.apparmorProfile", judged, "none, unconfined, and the profiles that engines give by default: the guest's kernel has the Guard instead"},
	{"process.selinuxLabel", refused, "the guest's kernel has the Guard instead"},
	{"process.oomScoreAdj", honoured, "among the processes of the guest"},
	{"process.scheduler", refused, ""},
	{"process.ioPriority", refused, ""},
	{"process.execCPUAffinity", refused, "the processors of a guest are not the host's"},

	{"linux.namespaces", judged, "mount and cgroup are new; network by its path, or new; ipc and uts are the pod's; pid is new, the pod's or that of a container of the pod; the host's, user and time namespaces are refused"},
	{"linux.uidMappings", refused, "root of a guest is nobody on the host"},
	{"linux.gidMappings", refused, "root of a guest is nobody on the host"},
	{"linux.timeOffsets", refused, "a guest has one clock"},
	{"linux.devices", judged, "the usual ones, FIFOs, /dev/fuse and /dev/net/tun, which a guest has of its own, and disks of the host; the Guard lets the container open these and no others; other devices of the host are not in a guest"},
	{"linux.netDevices", refused, "interfaces come with the network namespace"},
	{"linux.sysctl", judged, "those of a network or IPC namespace, and kernel.domainname; they are the pod's"},
	{"linux.cgroupsPath", harmless, "a container's cgroup is the guest's; the shim puts the machine into the pod's"},
	{"linux.resources.devices", judged, "rules that allow give nothing that a guest has not; the usual devices cannot be denied; whether a disk may be written is decided by them"},
	{"linux.resources.memory.limit", honoured, "in the guest; a machine alone gets 96 MiB more"},
	{"linux.resources.memory.reservation", honoured, "as memory.low"},
	{"linux.resources.memory.swap", harmless, "a guest has no swap"},
	{"linux.resources.memory.swappiness", harmless, "a guest has no swap"},
	{"linux.resources.memory.kernel", harmless, "the limit counts it"},
	{"linux.resources.memory.kernelTCP", harmless, "the limit counts it"},
	{"linux.resources.memory.useHierarchy", harmless, "cgroups always are"},
	{"linux.resources.memory.checkBeforeUpdate", harmless, "the kernel reclaims, then kills"},
	{"linux.resources.memory.disableOOMKiller", refused, "cgroups of a guest always have it"},
	{"linux.resources.pids.limit", honoured, ""},
	{"linux.resources.cpu.shares", honoured, "as a weight among the containers of the pod"},
	{"linux.resources.cpu.quota", honoured, "in the guest; and a machine alone has as many processors, rounded up"},
	{"linux.resources.cpu.period", honoured, ""},
	{"linux.resources.cpu.burst", honoured, ""},
	{"linux.resources.cpu.idle", honoured, ""},
	{"linux.resources.cpu.cpus", honoured, "the machine's threads run on the host's processors that the pod's containers name together; on any, while one of them names none; a machine alone has as many, if no quota says otherwise"},
	{"linux.resources.cpu.mems", refused, "they are the host's memory nodes, not the guest's"},
	{"linux.resources.cpu.realtimeRuntime", refused, ""},
	{"linux.resources.cpu.realtimePeriod", refused, ""},
	{"linux.resources.hugepageLimits", judged, "0: a guest has none"},
	{"linux.resources.blockIO", refused, "the devices it names are the host's"},
	{"linux.resources.network", refused, "classes and priorities are the host's"},
	{"linux.resources.rdma", refused, "a guest has none"},
	{"linux.resources.unified", honoured, "files of the memory, cpu, cpuset, pids and io controllers, in the guest"},
	{"linux.rootfsPropagation", honoured, "in the guest"},
	{"linux.seccomp", judged, "all but SCMP_ACT_TRACE, SCMP_ACT_NOTIFY and what belongs to it; calls of 32-bit programs are decided if the profile names their ABI"},
	{"linux.maskedPaths", honoured, ""},
	{"linux.readonlyPaths", honoured, ""},
	{"linux.mountLabel", refused, "the guest's kernel has the Guard instead"},
	{"linux.intelRdt", refused, "caches are the host's"},
	{"linux.personality", judged, "LINUX"},
	{"linux.memoryPolicy", refused, ""},

	{"vm", refused, "which kernel boots is not the container's to say"},
	{"windows", refused, ""},
	{"solaris", refused, ""},
	{"zos", refused, ""},
	{"freebsd", refused, ""},
}

// survey finds what a configuration asks for and does not get. prefix is the
// place of raw in a configuration, for a part alone.
func survey(raw []byte, prefix string) error {
	var v any
	if err := strictjson.DecodeLoose(raw, MaxConfig, &v); err != nil {
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
		return inner(v, path)
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

// parts are the fields of what stands in the lists and objects of fields that
// the table has as one: a name that is not here is asked for and not known.
var parts = map[string][]string{
	"mounts":                         {"destination", "type", "source", "options", "uidMappings", "gidMappings"},
	"process.consoleSize":            {"height", "width"},
	"process.capabilities":           {"bounding", "effective", "inheritable", "permitted", "ambient"},
	"process.rlimits":                {"type", "hard", "soft"},
	"linux.namespaces":               {"type", "path"},
	"linux.devices":                  {"path", "type", "major", "minor", "fileMode", "uid", "gid"},
	"linux.resources.devices":        {"allow", "type", "major", "minor", "access"},
	"linux.resources.hugepageLimits": {"pageSize", "limit"},
	"linux.personality":              {"domain", "flags"},
	"linux.seccomp":                  {"defaultAction", "defaultErrnoRet", "architectures", "flags", "listenerPath", "listenerMetadata", "syscalls"},
	"linux.seccomp.syscalls":         {"names", "action", "errnoRet", "args"},
	"linux.seccomp.syscalls.args":    {"index", "value", "valueTwo", "op"},
}

// inner looks into a field that the table has as one.
func inner(v any, path string) []error {
	names, ok := parts[path]
	if !ok {
		return nil
	}
	switch v := v.(type) {
	case []any:
		for _, element := range v {
			if errs := inner(element, path); len(errs) > 0 {
				return errs // the others would say the same
			}
		}
	case map[string]any:
		var errs []error
		for _, name := range slices.Sorted(maps.Keys(v)) {
			switch {
			case empty(v[name]):
			case !slices.Contains(names, name):
				errs = append(errs, refusal(path+"."+name, -1, v[name]))
			default:
				errs = append(errs, inner(v[name], path+"."+name)...)
			}
		}
		return errs
	}
	return nil
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
		return fmt.Errorf("%.256q: this runtime does not know the field", name)
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
