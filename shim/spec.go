package shim

import (
	"errors"
	"fmt"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/internal/strictjson"
	"hauberk.dev/vm"
)

// configuration is what of an OCI runtime configuration means something here.
type configuration struct {
	Process  *process  `json:"process"`
	Root     *rootPath `json:"root"`
	Hostname string    `json:"hostname"`
	Mounts   []mount   `json:"mounts"`
	Linux    *linux    `json:"linux"`
	// Annotations say what the OCI has no field for.
	Annotations map[string]string `json:"annotations"`
}

type rootPath struct {
	Path string `json:"path"`
}

type process struct {
	Terminal    bool `json:"terminal"`
	ConsoleSize *struct {
		Height uint16 `json:"height"`
		Width  uint16 `json:"width"`
	} `json:"consoleSize"`
	User struct {
		UID            uint32   `json:"uid"`
		GID            uint32   `json:"gid"`
		Umask          *uint32  `json:"umask"`
		AdditionalGids []uint32 `json:"additionalGids"`
	} `json:"user"`
	Args         []string      `json:"args"`
	Env          []string      `json:"env"`
	Cwd          string        `json:"cwd"`
	Capabilities *capabilities `json:"capabilities"`
	Rlimits      []struct {
		Type string `json:"type"`
		Hard uint64 `json:"hard"`
		Soft uint64 `json:"soft"`
	} `json:"rlimits"`
}

type capabilities struct {
	Bounding    []string `json:"bounding"`
	Effective   []string `json:"effective"`
	Inheritable []string `json:"inheritable"`
	Permitted   []string `json:"permitted"`
	Ambient     []string `json:"ambient"`
}

type mount struct {
	Destination string   `json:"destination"`
	Type        string   `json:"type"`
	Source      string   `json:"source"`
	Options     []string `json:"options"`
}

type linux struct {
	Namespaces []struct {
		Type string `json:"type"`
		Path string `json:"path"`
	} `json:"namespaces"`
	Resources struct {
		Devices []deviceRule `json:"devices"`
		Memory  struct {
			Limit int64 `json:"limit"`
		} `json:"memory"`
		Pids struct {
			Limit int64 `json:"limit"`
		} `json:"pids"`
		CPU struct {
			Quota  int64  `json:"quota"`
			Period uint64 `json:"period"`
		} `json:"cpu"`
	} `json:"resources"`
	RootfsPropagation string   `json:"rootfsPropagation"`
	MaskedPaths       []string `json:"maskedPaths"`
	ReadonlyPaths     []string `json:"readonlyPaths"`
}

// deviceRule lets a container use a device, or not.
type deviceRule struct {
	Allow  bool   `json:"allow"`
	Type   string `json:"type"`
	Major  *int64 `json:"major"`
	Minor  *int64 `json:"minor"`
	Access string `json:"access"`
}

// ordinary says whether a rule allows one of the devices that every engine
// gives: null, zero, full, random, urandom, tty, console and terminals.
func (d deviceRule) ordinary() bool {
	if d.Type != "c" || d.Major == nil {
		return false
	}
	if *d.Major == 136 {
		return true
	}
	minors := map[int64][]int64{1: {3, 5, 7, 8, 9}, 5: {0, 1, 2}}[*d.Major]
	return d.Minor != nil && slices.Contains(minors, *d.Minor)
}

// parseConfiguration reads config.json and finds all that cannot be done.
func parseConfiguration(raw []byte) (configuration, error) {
	var c configuration
	if err := survey(raw, ""); err != nil {
		return c, fmt.Errorf("read config.json: %w", err)
	}
	if err := strictjson.DecodeLoose(raw, maxConfig, &c); err != nil {
		return c, fmt.Errorf("read config.json: %w", err)
	}
	if c.Process == nil || c.Linux == nil {
		return c, errors.New("read config.json: it needs process and linux")
	}
	errs := slices.Concat(c.Process.faults(), c.Linux.faults())
	for i, m := range c.Mounts {
		if err := m.fault(); err != nil {
			errs = append(errs, fmt.Errorf("mounts[%d]: %w", i, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return c, fmt.Errorf("read config.json: %w", err)
	}
	return c, nil
}

// parseProcess reads the process of an exec.
func parseProcess(raw []byte) (process, error) {
	var p process
	if err := survey(raw, "process"); err != nil {
		return p, fmt.Errorf("read process: %w", err)
	}
	if err := strictjson.DecodeLoose(raw, maxConfig, &p); err != nil {
		return p, fmt.Errorf("read process: %w", err)
	}
	if err := errors.Join(p.faults()...); err != nil {
		return p, fmt.Errorf("read process: %w", err)
	}
	return p, nil
}

// What a sandbox gives, whatever is asked: see package guest.
const (
	openFiles = 1 << 20
	umask     = 0o022
)

// rootHas is what root of a container is given; neverGiven is what everybody
// asks for and nobody gets.
var (
	rootHas    = strings.Fields("CAP_CHOWN CAP_DAC_OVERRIDE CAP_FOWNER CAP_FSETID CAP_KILL CAP_SETGID CAP_SETUID CAP_SETPCAP CAP_NET_BIND_SERVICE CAP_NET_RAW CAP_AUDIT_WRITE CAP_SETFCAP")
	neverGiven = strings.Fields("CAP_MKNOD CAP_SYS_CHROOT")
)

func (p *process) faults() (errs []error) {
	fault := func(format string, a ...any) { errs = append(errs, fmt.Errorf("process."+format, a...)) }
	switch {
	case len(p.Args) == 0:
		fault("args: nothing to run is named")
	case len(p.Args) > guestproto.MaxList || len(p.Env) > guestproto.MaxList || len(p.User.AdditionalGids) > guestproto.MaxList:
		fault("args, process.env, process.user.additionalGids: more than %d entries", guestproto.MaxList)
	}
	if !path.IsAbs(p.Cwd) || len(p.Cwd) > 4095 {
		fault("cwd %.256q: want an absolute path", p.Cwd)
	}
	if strings.ContainsRune(strings.Join(slices.Concat(p.Args, p.Env, []string{p.Cwd}), ""), 0) {
		fault("args, process.env, process.cwd: a value holds a NUL")
	}
	if u := p.User.Umask; u != nil && *u != umask {
		fault("user.umask %#o: only %#o is possible", *u, umask)
	}
	for i, r := range p.Rlimits {
		if r.Type != "RLIMIT_NOFILE" || r.Hard > openFiles {
			fault("rlimits[%d] %.64q %d: only RLIMIT_NOFILE up to %d is possible", i, r.Type, r.Hard, openFiles)
		}
	}
	return append(errs, p.capabilityFaults()...)
}

// capabilityFaults refuses both more and less than a sandbox gives: who drops a
// capability relies on it.
func (p *process) capabilityFaults() (errs []error) {
	c := p.Capabilities
	if c == nil {
		c = &capabilities{}
	}
	for _, set := range []struct {
		name string
		list []string
	}{
		{"bounding", c.Bounding}, {"effective", c.Effective}, {"permitted", c.Permitted},
		{"inheritable", c.Inheritable}, {"ambient", c.Ambient},
	} {
		for _, name := range set.list {
			if !slices.Contains(rootHas, name) && !slices.Contains(neverGiven, name) {
				errs = append(errs, fmt.Errorf("process.capabilities.%s: %.64q cannot be given", set.name, name))
			}
		}
	}
	if p.User.UID != 0 {
		if len(c.Ambient) > 0 {
			errs = append(errs, fmt.Errorf("process.capabilities.ambient %q: user %d can have none", c.Ambient, p.User.UID))
		}
		return errs // who is not root has none and can gain none
	}
	for _, name := range rootHas {
		if !slices.Contains(c.Bounding, name) {
			errs = append(errs, fmt.Errorf("process.capabilities.bounding: %s cannot be taken from root: run as another user", name))
		}
	}
	return errs
}

// own are a sandbox's mounts: asking for them is asking for what is there.
var own = map[string][]string{
	"/proc": {"proc"}, "/sys": {"sysfs"}, "/sys/fs/cgroup": {"cgroup", "cgroup2"}, "/dev": {"tmpfs"},
	"/dev/pts": {"devpts"}, "/dev/shm": {"tmpfs"}, "/dev/mqueue": {"mqueue"}, "/run": {"tmpfs"},
}

func (m mount) fault() error {
	to := path.Clean(m.Destination)
	if !slices.Contains(own[to], m.Type) {
		return fmt.Errorf("%.64q at %.256q: not possible in a sandbox yet", m.Type, m.Destination)
	}
	for _, o := range m.Options {
		if size, ok := strings.CutPrefix(o, "size="); ok && to == "/dev/shm" && size != "65536k" && size != "64m" {
			return fmt.Errorf("%q at /dev/shm: only 64 MiB are possible", o)
		}
	}
	return nil
}

func (l *linux) faults() (errs []error) {
	fault := func(format string, a ...any) { errs = append(errs, fmt.Errorf("linux."+format, a...)) }
	missing := map[string]string{"pid": "", "ipc": "", "uts": "", "mount": "", "network": ""}
	for i, n := range l.Namespaces {
		_, must := missing[n.Type]
		switch {
		case n.Path != "":
			fault("namespaces[%d].path %.256q: a sandbox cannot enter another's %.32q namespace", i, n.Path, n.Type)
		case !must && n.Type != "cgroup":
			fault("namespaces[%d].type %.64q: not possible in a sandbox", i, n.Type)
		}
		delete(missing, n.Type)
	}
	for _, name := range slices.Sorted(maps.Keys(missing)) {
		fault("namespaces: no %q: a sandbox cannot share the host's", name)
	}
	for i, d := range l.Resources.Devices {
		if d.Allow && !d.ordinary() {
			fault("resources.devices[%d].allow: a sandbox has no such device", i)
		}
	}
	if n := l.Resources.Memory.Limit; n != 0 && n != -1 && (n < 1<<20 || n > vm.MaxMemoryMiB<<19) {
		fault("resources.memory.limit %d: want 1 MiB to %d MiB", n, vm.MaxMemoryMiB/2)
	}
	if n := l.Resources.Pids.Limit; n < -1 || n > 1<<22 {
		fault("resources.pids.limit %d: want 1 to %d", n, 1<<22)
	}
	if q, p := l.Resources.CPU.Quota, l.Resources.CPU.Period; q > 0 && (p == 0 || p > 1<<40 || q > 1<<40) {
		fault("resources.cpu.period %d: want that of the quota", p)
	} else if processors(q, p) > vm.MaxCPUs {
		fault("resources.cpu.quota %d: it is more than %d processors", q, vm.MaxCPUs)
	}
	switch l.RootfsPropagation {
	case "", "private", "rprivate", "slave", "rslave":
	default:
		fault("rootfsPropagation %.64q: there is nothing to propagate to", l.RootfsPropagation)
	}
	for _, list := range []struct {
		name  string
		paths []string
	}{{"maskedPaths", l.MaskedPaths}, {"readonlyPaths", l.ReadonlyPaths}} {
		for _, p := range list.paths {
			if c := path.Clean(p); !strings.HasPrefix(c, "/proc/") && !strings.HasPrefix(c, "/sys/") {
				fault("%s %.256q: only what is below /proc and /sys is covered", list.name, p)
			}
		}
	}
	return errs
}

// processors is how many a quota comes to; 0 is no quota.
func processors(quota int64, period uint64) int {
	if quota <= 0 || period == 0 {
		return 0
	}
	return int((uint64(quota) + period - 1) / period)
}

// program is a process as the guest's agent takes it.
func (p *process) program() guestproto.Program {
	out := guestproto.Program{
		Args: p.Args, Env: p.Env, Cwd: p.Cwd, TTY: p.Terminal,
		UID: p.User.UID, GID: p.User.GID, Groups: p.User.AdditionalGids,
	}
	if s := p.ConsoleSize; s != nil {
		out.Rows, out.Cols = s.Height, s.Width
	}
	return out
}

// rootDirectory is the root file system if containerd mounts none.
func (c *configuration) rootDirectory(bundle string) string {
	if c.Root == nil || c.Root.Path == "" {
		return filepath.Join(bundle, "rootfs")
	}
	if filepath.IsAbs(c.Root.Path) {
		return c.Root.Path
	}
	return filepath.Join(bundle, c.Root.Path)
}
