package sandbox

import (
	"encoding/json"
	"fmt"
	"strings"

	"hauberk.dev/api/node"
)

// The configuration of the OCI's runtime specification, as docker writes it,
// as far as it is written here.
type (
	configuration struct {
		Version     string            `json:"ociVersion"`
		Process     ociProcess        `json:"process"`
		Root        ociRoot           `json:"root"`
		Hostname    string            `json:"hostname,omitempty"`
		Mounts      []ociMount        `json:"mounts"`
		Annotations map[string]string `json:"annotations,omitempty"`
		Linux       ociLinux          `json:"linux"`
	}
	ociProcess struct {
		Terminal     bool            `json:"terminal,omitempty"`
		ConsoleSize  *ociSize        `json:"consoleSize,omitempty"`
		User         ociUser         `json:"user"`
		Args         []string        `json:"args"`
		Env          []string        `json:"env,omitempty"`
		Cwd          string          `json:"cwd"`
		Capabilities ociCapabilities `json:"capabilities"`
	}
	ociSize struct {
		Height uint16 `json:"height"`
		Width  uint16 `json:"width"`
	}
	ociUser struct {
		UID    uint32   `json:"uid"`
		GID    uint32   `json:"gid"`
		Groups []uint32 `json:"additionalGids,omitempty"`
	}
	ociCapabilities struct {
		Bounding  []string `json:"bounding"`
		Effective []string `json:"effective,omitempty"`
		Permitted []string `json:"permitted,omitempty"`
	}
	ociRoot struct {
		Path     string `json:"path"`
		ReadOnly bool   `json:"readonly,omitempty"`
	}
	ociMount struct {
		Destination string   `json:"destination"`
		Type        string   `json:"type"`
		Source      string   `json:"source"`
		Options     []string `json:"options,omitempty"`
	}
	ociLinux struct {
		Namespaces    []map[string]string `json:"namespaces"`
		Resources     map[string]any      `json:"resources,omitempty"`
		MaskedPaths   []string            `json:"maskedPaths"`
		ReadonlyPaths []string            `json:"readonlyPaths"`
	}
)

// capabilities that docker gives to root of a container.
var capabilities = strings.Fields("CAP_CHOWN CAP_DAC_OVERRIDE CAP_FSETID CAP_FOWNER CAP_MKNOD CAP_NET_RAW CAP_SETGID CAP_SETUID CAP_SETFCAP CAP_SETPCAP CAP_NET_BIND_SERVICE CAP_SYS_CHROOT CAP_KILL CAP_AUDIT_WRITE")

var (
	masked = strings.Fields("/proc/acpi /proc/asound /proc/kcore /proc/keys /proc/latency_stats /proc/timer_list /proc/timer_stats /proc/sched_debug /proc/scsi /sys/firmware /sys/devices/virtual/powercap")
	fixed  = strings.Fields("/proc/bus /proc/fs /proc/irq /proc/sys /proc/sysrq-trigger")
)

// mounts of every container.
func mounts() []ociMount {
	quiet := []string{"nosuid", "noexec", "nodev"}
	return []ociMount{
		{"/proc", "proc", "proc", quiet},
		{"/dev", "tmpfs", "tmpfs", []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{"/dev/pts", "devpts", "devpts", []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{"/sys", "sysfs", "sysfs", append([]string{"ro"}, quiet...)},
		{"/sys/fs/cgroup", "cgroup", "cgroup", append([]string{"ro"}, quiet...)},
		{"/dev/mqueue", "mqueue", "mqueue", quiet},
		{"/dev/shm", "tmpfs", "shm", append([]string{"mode=1777", "size=65536k"}, quiet...)},
	}
}

// policyAnnotation is how the shim is told of the Guard's policies.
const policyAnnotation = "hauberk.dev/guard-policy"

// policyGeneration comes after that of the baseline, which a machine that was
// kept ahead of demand has in force already.
const policyGeneration = 2

// cpuPeriod in microseconds, as docker has it.
const cpuPeriod = 100000

// configuration writes config.json.
func (o *Options) configuration(id string, p process, net network) ([]byte, error) {
	c := configuration{
		Version: "1.2.0", Process: p.oci(o.Terminal, o.Rows, o.Cols),
		Root: ociRoot{Path: "rootfs", ReadOnly: o.ReadOnly}, Hostname: o.Hostname, Mounts: mounts(),
		Linux: ociLinux{MaskedPaths: masked, ReadonlyPaths: fixed, Resources: o.resources()},
	}
	if c.Hostname == "" {
		c.Hostname = id
	}
	for _, n := range strings.Fields("pid network ipc uts mount cgroup") {
		c.Linux.Namespaces = append(c.Linux.Namespaces, map[string]string{"type": n})
		if n == "network" && net.path != "" {
			c.Linux.Namespaces[len(c.Linux.Namespaces)-1]["path"] = net.path
		}
	}
	for _, f := range []struct{ name, source string }{
		{"/etc/hosts", net.hosts}, {"/etc/hostname", net.hostname}, {"/etc/resolv.conf", net.resolv},
	} {
		if f.source != "" {
			c.Mounts = append(c.Mounts, ociMount{f.name, "bind", f.source, []string{"rbind", "rprivate", "ro"}})
		}
	}
	for _, t := range o.Tmpfs {
		c.Mounts = append(c.Mounts, ociMount{t, "tmpfs", "tmpfs", []string{"nosuid", "nodev", "noexec", "mode=1777"}})
	}
	for _, v := range o.Volumes {
		options := []string{"rbind", "rprivate"}
		if v.ReadOnly {
			options = append(options, "ro")
		}
		c.Mounts = append(c.Mounts, ociMount{v.Target, "bind", v.Source, options})
	}
	if len(o.Policy) > 0 {
		raw, err := json.Marshal(node.Guard{Generation: policyGeneration, Policies: o.Policy})
		if err != nil {
			return nil, fmt.Errorf("write policy: %w", err)
		}
		c.Annotations = map[string]string{policyAnnotation: string(raw)}
	}
	return json.MarshalIndent(c, "", "\t")
}

// oci is the process as the OCI has it.
func (p process) oci(terminal bool, rows, cols uint16) ociProcess {
	out := ociProcess{
		Terminal: terminal, User: ociUser{p.UID, p.GID, p.Groups}, Args: p.Args, Env: p.Env, Cwd: p.Cwd,
		Capabilities: ociCapabilities{Bounding: p.Capabilities, Effective: p.Capabilities, Permitted: p.Capabilities},
	}
	if p.UID != 0 { // who is not root has none, and can gain them from files
		out.Capabilities.Effective, out.Capabilities.Permitted = nil, nil
	}
	if terminal && rows > 0 && cols > 0 {
		out.ConsoleSize = &ociSize{rows, cols}
	}
	return out
}

func (o *Options) resources() map[string]any {
	out := map[string]any{}
	if o.Memory > 0 {
		out["memory"] = map[string]any{"limit": o.Memory}
	}
	if o.CPUs > 0 {
		out["cpu"] = map[string]any{"quota": int64(o.CPUs * cpuPeriod), "period": cpuPeriod}
	}
	if o.Pids > 0 {
		out["pids"] = map[string]any{"limit": o.Pids}
	}
	return out
}
