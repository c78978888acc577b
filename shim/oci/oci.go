// Package oci reads OCI runtime configurations, as containerd and its like write
// them, and says what the agent of a guest must do for them.
//
// It opens nothing and talks to nobody: bytes in, messages of api/guestproto
// out. What a container asks for is done as asked or refused with the field's
// name, never half; docs/oci.md shows the table of fields, which is the one
// that decides. Where a container's files come from is not said here: Create
// leaves the mounts of the host's paths to whoever knows them (shim/volume).
package oci

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/internal/strictjson"
)

// MaxConfig is the most bytes a configuration may have.
const MaxConfig = 1 << 20

// Config is a configuration that a sandbox can honour.
type Config struct {
	spec    spec
	program guestproto.Program
	mounts  []mountPlan
}

// spec is what of a configuration means something here.
type spec struct {
	Process     *process          `json:"process"`
	Root        *root             `json:"root"`
	Hostname    string            `json:"hostname"`
	Domainname  string            `json:"domainname"`
	Mounts      []mount           `json:"mounts"`
	Annotations map[string]string `json:"annotations"`
	Linux       *linux            `json:"linux"`
}

type root struct {
	Path     string `json:"path"`
	Readonly bool   `json:"readonly"`
}

// Parse reads config.json and finds all that cannot be done.
func Parse(raw []byte) (*Config, error) {
	var c Config
	if err := survey(raw, ""); err != nil {
		return nil, fmt.Errorf("read config.json: %w", err)
	}
	if err := strictjson.DecodeLoose(raw, MaxConfig, &c.spec); err != nil {
		return nil, fmt.Errorf("read config.json: %w", err)
	}
	s := &c.spec
	if s.Process == nil || s.Linux == nil {
		return nil, errors.New("read config.json: it needs process and linux")
	}
	var errs []error
	errs = append(errs, s.faults()...)
	errs = append(errs, s.Linux.faults()...)
	program, err := s.Process.program()
	errs = append(errs, err)
	filter, err := s.filter()
	errs = append(errs, err)
	program.Seccomp = filter
	c.program = program
	c.mounts, err = plan(s.Mounts)
	errs = append(errs, err)
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("read config.json: %w", err)
	}
	return &c, nil
}

// maxName is the longest name of a host that the kernel keeps.
const maxName = 64

func (s *spec) faults() (errs []error) {
	for field, name := range map[string]string{"hostname": s.Hostname, "domainname": s.Domainname} {
		if len(name) > maxName || strings.ContainsRune(name, 0) {
			errs = append(errs, fmt.Errorf("%s %.128q: want at most %d bytes", field, name, maxName))
		}
	}
	if s.Root != nil && strings.ContainsRune(s.Root.Path, 0) {
		errs = append(errs, errors.New("root.path: it holds a NUL"))
	}
	return errs
}

// Exec reads the process of an exec in the container: rights, limits and user
// are the exec's own, the filter of system calls is the container's.
func (c *Config) Exec(raw []byte) (guestproto.Program, error) {
	p, err := ParseProcess(raw)
	p.Seccomp = c.program.Seccomp
	return p, err
}

// ParseProcess reads a process alone. It has no filter of system calls.
func ParseProcess(raw []byte) (guestproto.Program, error) {
	var p process
	if err := survey(raw, "process"); err != nil {
		return guestproto.Program{}, fmt.Errorf("read process: %w", err)
	}
	if err := strictjson.DecodeLoose(raw, MaxConfig, &p); err != nil {
		return guestproto.Program{}, fmt.Errorf("read process: %w", err)
	}
	program, err := p.program()
	if err != nil {
		return guestproto.Program{}, fmt.Errorf("read process: %w", err)
	}
	return program, nil
}

// Root is the directory of the root file system, for when containerd mounts
// none, and whether it is only read.
func (c *Config) Root(bundle string) (dir string, readOnly bool) {
	r := c.spec.Root
	if r == nil {
		r = &root{}
	}
	switch {
	case r.Path == "":
		return filepath.Join(bundle, "rootfs"), r.Readonly
	case filepath.IsAbs(r.Path):
		return r.Path, r.Readonly
	}
	return filepath.Join(bundle, r.Path), r.Readonly
}

// Hostname is the container's, or empty.
func (c *Config) Hostname() string { return c.spec.Hostname }

// Kind says what a container is to a pod.
type Kind string

// The kinds of containers.
const (
	KindAlone     Kind = ""          // nobody speaks of a pod
	KindSandbox   Kind = "sandbox"   // stands for a pod and runs nothing
	KindContainer Kind = "container" // one of a pod
)

// Pod is what the CRI says of a container's pod.
type Pod struct {
	Kind      Kind
	SandboxID string
	Name      string
	Namespace string
	UID       string
	Container string // its name in the pod
}

// What the CRI of containerd says in annotations.
const (
	cri              = "io.kubernetes.cri."
	annotationKind   = cri + "container-type"
	annotationID     = cri + "sandbox-id"
	annotationName   = cri + "sandbox-name"
	annotationSpace  = cri + "sandbox-namespace"
	annotationUID    = cri + "sandbox-uid"
	annotationInside = cri + "container-name"
)

// Pod says which pod the container belongs to.
func (c *Config) Pod() (Pod, error) {
	a := c.spec.Annotations
	p := Pod{Kind(a[annotationKind]), a[annotationID], a[annotationName], a[annotationSpace], a[annotationUID], a[annotationInside]}
	switch p.Kind {
	case KindAlone:
		return Pod{}, nil
	case KindSandbox, KindContainer:
		if p.SandboxID == "" {
			return Pod{}, fmt.Errorf("read config.json: annotations[%q]: the %s has no id of its sandbox", annotationID, p.Kind)
		}
		return p, nil
	}
	return Pod{}, fmt.Errorf("read config.json: annotations[%q] %.64q: want %s or %s", annotationKind, p.Kind, KindSandbox, KindContainer)
}

// Facts are what a configuration does not say.
type Facts struct {
	// Root is the number of the root file system that was mounted.
	Root uint8
	// PIDs says which container of the guest a process number of the host
	// stands for, by the id of its first process there; 0 is the pod itself.
	PIDs map[uint32]uint32
	// Network is the path of the pod's network namespace, if it has one: all
	// containers of a guest are in it.
	Network string
	// KeepLog lets the agent remember the last output.
	KeepLog bool
}

// Create is what the agent must make. The mounts and devices that the volumes
// name are the host's, and not complete until each has a source.
func (c *Config) Create(f Facts) (guestproto.Create, []Volume, error) {
	s := &c.spec
	out := guestproto.Create{
		Root: f.Root, Hostname: s.Hostname, Domainname: s.Domainname, KeepLog: f.KeepLog,
		Program: c.program, Resources: s.Linux.Resources.resources(),
		Masked: s.Linux.MaskedPaths, ReadOnly: s.Linux.ReadonlyPaths, Sysctls: s.Linux.sysctls(),
		ReadOnlyRoot: s.Root != nil && s.Root.Readonly, RootPropagation: propagations[s.Linux.RootfsPropagation],
	}
	var err error
	if out.PID, out.PIDOf, err = s.Linux.shared(f); err != nil {
		return guestproto.Create{}, nil, fmt.Errorf("read config.json: %w", err)
	}
	var volumes []Volume
	for i, m := range c.mounts {
		out.Mounts = append(out.Mounts, m.Mount)
		if m.host {
			volumes = append(volumes, Volume{
				Field: fmt.Sprintf("mounts[%d].source", i), Mount: i, Device: -1, Source: m.Source, Target: m.Target,
				ReadOnly: m.readOnly(), Recursive: m.Flags&flagRec != 0, Below: m.readOnlyBelow(), Later: m.later(),
			})
			out.Mounts[i].Source = ""
		}
	}
	devices, disks := s.Linux.deviceNodes()
	out.Devices = devices
	return out, append(volumes, disks...), nil
}

// Volume is something of the host that a container is to see. Exactly one of
// Mount and Device is not -1: the place in Create that needs a source.
type Volume struct {
	Field  string // names it in errors
	Mount  int    // of Create.Mounts
	Device int    // of Create.Devices
	// Source is a path of the host. A device has its number in Create.
	Source    string
	Target    string // in the container
	ReadOnly  bool
	Recursive bool // mounts below Source belong to it
	Below     bool // they are as read-only as it is
	Later     bool // and so do those that the host mounts there later
}
