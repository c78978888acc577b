package oci

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"hauberk.dev/api/guestproto"
)

type mount struct {
	Destination string      `json:"destination"`
	Type        string      `json:"type"`
	Source      string      `json:"source"`
	Options     []string    `json:"options"`
	UIDMappings []mappedIDs `json:"uidMappings"`
	GIDMappings []mappedIDs `json:"gidMappings"`
}

type mappedIDs struct {
	ContainerID uint32 `json:"containerID"`
	HostID      uint32 `json:"hostID"`
	Size        uint32 `json:"size"`
}

// mountPlan is one mount, of the guest or of a path of the host.
type mountPlan struct {
	guestproto.Mount
	host bool // Source is a path of the host
}

func (m mountPlan) readOnly() bool { return (m.Flags|m.Recursive)&unix.MS_RDONLY != 0 }

func (m mountPlan) readOnlyBelow() bool { return m.Recursive&unix.MS_RDONLY != 0 }

// later says whether what is mounted below the source later is to be seen.
func (m mountPlan) later() bool { return m.Propagation&unix.MS_SLAVE != 0 }

const flagRec = unix.MS_REC

const maxMounts = 1024

// option says which flags a mount option sets and clears.
type option struct{ set, clear uint32 }

// options of mounts. Those of access times are one of three, so each clears
// the others.
var options = map[string]option{
	"defaults": {}, "loud": {}, "silent": {}, "nomand": {}, "norelatime": {},
	"ro": {set: unix.MS_RDONLY}, "rw": {clear: unix.MS_RDONLY},
	"nosuid": {set: unix.MS_NOSUID}, "suid": {clear: unix.MS_NOSUID},
	"nodev": {set: unix.MS_NODEV}, "dev": {clear: unix.MS_NODEV},
	"noexec": {set: unix.MS_NOEXEC}, "exec": {clear: unix.MS_NOEXEC},
	"nosymfollow": {set: unix.MS_NOSYMFOLLOW}, "symfollow": {clear: unix.MS_NOSYMFOLLOW},
	"sync": {set: unix.MS_SYNCHRONOUS}, "async": {clear: unix.MS_SYNCHRONOUS},
	"dirsync":     {set: unix.MS_DIRSYNC},
	"noatime":     {unix.MS_NOATIME, unix.MS_RELATIME | unix.MS_STRICTATIME},
	"relatime":    {unix.MS_RELATIME, unix.MS_NOATIME | unix.MS_STRICTATIME},
	"strictatime": {unix.MS_STRICTATIME, unix.MS_NOATIME | unix.MS_RELATIME},
	"atime":       {clear: unix.MS_NOATIME}, "nostrictatime": {clear: unix.MS_STRICTATIME},
	"nodiratime": {set: unix.MS_NODIRATIME}, "diratime": {clear: unix.MS_NODIRATIME},
	"bind": {set: unix.MS_BIND}, "rbind": {set: unix.MS_BIND | unix.MS_REC},
}

// recursive are options that hold for the mounts below, too.
var recursive = map[string]option{
	"rro": {set: unix.MS_RDONLY}, "rrw": {clear: unix.MS_RDONLY},
	"rnosuid": {set: unix.MS_NOSUID}, "rsuid": {clear: unix.MS_NOSUID},
	"rnodev": {set: unix.MS_NODEV}, "rdev": {clear: unix.MS_NODEV},
	"rnoexec": {set: unix.MS_NOEXEC}, "rexec": {clear: unix.MS_NOEXEC},
	"rnosymfollow": {set: unix.MS_NOSYMFOLLOW}, "rsymfollow": {clear: unix.MS_NOSYMFOLLOW},
	"rnoatime": {set: unix.MS_NOATIME}, "ratime": {clear: unix.MS_NOATIME},
	"rrelatime": {set: unix.MS_RELATIME}, "rstrictatime": {set: unix.MS_STRICTATIME},
	"rnodiratime": {set: unix.MS_NODIRATIME}, "rdiratime": {clear: unix.MS_NODIRATIME},
}

// propagations by name. Of a path of the host, what is mounted below it later
// comes into the guest with slave; nothing of a guest gets out, so shared is refused.
var propagations = map[string]uint32{
	"": 0, "private": unix.MS_PRIVATE, "rprivate": unix.MS_PRIVATE | unix.MS_REC,
	"slave": unix.MS_SLAVE, "rslave": unix.MS_SLAVE | unix.MS_REC,
	"shared": unix.MS_SHARED, "rshared": unix.MS_SHARED | unix.MS_REC,
	"unbindable": unix.MS_UNBINDABLE, "runbindable": unix.MS_UNBINDABLE | unix.MS_REC,
}

// systems are the file systems of a guest's kernel that a container may mount,
// and the options that each understands beyond those above.
var systems = map[string][]string{
	"proc": {"hidepid", "subset", "gid"}, "sysfs": nil, "mqueue": nil, "cgroup2": {"nsdelegate", "memory_recursiveprot"},
	"tmpfs": {"size", "mode", "uid", "gid", "nr_inodes", "nr_blocks", "huge"}, "devpts": {"newinstance", "ptmxmode", "mode", "gid", "uid", "max"},
}

// plan understands all mounts of a container.
func plan(list []mount) (out []mountPlan, err error) {
	if len(list) > maxMounts {
		return nil, fmt.Errorf("mounts: %d are more than %d", len(list), maxMounts)
	}
	var errs []error
	for i, m := range list {
		p, err := m.plan()
		if err != nil {
			errs = append(errs, fmt.Errorf("mounts[%d].%w", i, err))
		}
		out = append(out, p)
	}
	return out, errors.Join(errs...)
}

func (m *mount) plan() (p mountPlan, err error) {
	p.Target = path.Clean(m.Destination)
	switch {
	case !path.IsAbs(m.Destination) || p.Target == "/" || !plain(m.Destination):
		return p, fmt.Errorf("destination %.256q: want an absolute path below /", m.Destination)
	case len(m.UIDMappings)+len(m.GIDMappings) > 0:
		return p, errors.New("uidMappings, gidMappings: a sandbox maps no users")
	}
	var data []string
	for i, o := range m.Options {
		if err := p.option(o, &data); err != nil {
			return p, fmt.Errorf("options[%d] %.128q: %w", i, o, err)
		}
	}
	if m.Type == "bind" || p.Flags&unix.MS_BIND != 0 {
		return p.bind(m, data)
	}
	p.FS = m.Type
	if m.Type == "cgroup" {
		p.FS = "cgroup2" // the one that guests have
	}
	known, ok := systems[p.FS]
	if !ok {
		return p, fmt.Errorf("type %.64q at %.256q: a sandbox mounts %s and paths of the host (bind)", m.Type, m.Destination, "proc, sysfs, tmpfs, devpts, mqueue, cgroup")
	}
	for _, d := range data {
		if name, _, _ := strings.Cut(d, "="); !slices.Contains(known, name) {
			return p, fmt.Errorf("options: %s does not understand %.128q", m.Type, d)
		}
	}
	p.Kind, p.Data = guestproto.MountFS, strings.Join(data, ",")
	return p, nil
}

// bind is a mount of a path of the host.
func (p mountPlan) bind(m *mount, data []string) (mountPlan, error) {
	switch {
	case len(data) > 0:
		return p, fmt.Errorf("options: a bind mount does not understand %.128q", data[0])
	case !path.IsAbs(m.Source) || !plain(m.Source):
		return p, fmt.Errorf("source %.256q: want an absolute path", m.Source)
	}
	switch {
	case p.Propagation&unix.MS_SHARED != 0:
		return p, errors.New("options: what a sandbox mounts does not come out of it: use rslave (HostToContainer) for what the host mounts")
	case p.later() && p.readOnlyBelow():
		return p, errors.New("options: what the host mounts later is not made read-only: leave out either the propagation or rro")
	}
	p.host, p.Source = true, path.Clean(m.Source)
	p.Flags |= unix.MS_BIND
	return p, nil
}

// plain says whether a path can be one.
func plain(p string) bool { return len(p) <= maxPath && !strings.ContainsRune(p, 0) }

func (p *mountPlan) option(name string, data *[]string) error {
	if o, ok := options[name]; ok {
		p.Flags = p.Flags&^o.clear | o.set
		return nil
	}
	if o, ok := recursive[name]; ok {
		p.Recursive = p.Recursive&^o.clear | o.set
		return nil
	}
	if flags, ok := propagations[name]; ok && name != "" {
		p.Propagation = flags
		return nil
	}
	switch {
	case name == "idmap" || name == "ridmap" || strings.HasPrefix(name, "idmap="):
		return errors.New("a sandbox maps no users: remove it")
	case name == "tmpcopyup":
		return errors.New("what lies below a mount is not copied up: remove it")
	case name == "mand" || name == "remount":
		return errors.New("not possible in a sandbox: remove it")
	case name == "" || !plain(name) || strings.ContainsRune(name, ','):
		return errors.New("want a mount option")
	}
	*data = append(*data, name)
	return nil
}
