package oci

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"hauberk.dev/api/guestproto"
)

type device struct {
	Path     string  `json:"path"`
	Type     string  `json:"type"`
	Major    int64   `json:"major"`
	Minor    int64   `json:"minor"`
	FileMode *uint32 `json:"fileMode"`
	UID      uint32  `json:"uid"`
	GID      uint32  `json:"gid"`
}

// deviceRule lets a container use a device, or not.
type deviceRule struct {
	Allow  bool   `json:"allow"`
	Type   string `json:"type"`
	Major  *int64 `json:"major"`
	Minor  *int64 `json:"minor"`
	Access string `json:"access"`
}

// usual are the devices that every container has, by major and minor number;
// -1 is every minor. There is no console: the guest's is the machine's.
var usual = map[[2]int64]bool{
	{1, 3}: true, {1, 5}: true, {1, 7}: true, {1, 8}: true, {1, 9}: true, {5, 0}: true, {5, 2}: true, {136, -1}: true,
}

var usualPaths = strings.Fields("/dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty /dev/ptmx /dev/pts/ptmx")

func isUsual(kind string, major, minor int64) bool {
	return (kind == "c" || kind == "u") && (usual[[2]int64{major, minor}] || usual[[2]int64{major, -1}])
}

// inGuest are devices that a guest's kernel has of its own, which a container
// may ask for: /dev/fuse and /dev/net/tun.
var inGuest = map[[2]int64]bool{{10, 229}: true, {10, 200}: true}

// InGuest says whether a character device of the host, by its number, is one
// that a guest has of its own, too.
func InGuest(major, minor uint32) bool {
	n := [2]int64{int64(major), int64(minor)}
	return isUsual("c", n[0], n[1]) || inGuest[n]
}

const maxDevices = 256

func (l *linux) deviceFaults() (errs []error) {
	fault := func(format string, a ...any) { errs = append(errs, fmt.Errorf("linux."+format, a...)) }
	if len(l.Devices) > maxDevices {
		fault("devices: %d are more than %d", len(l.Devices), maxDevices)
		return errs
	}
	var foreign []string
	for i, d := range l.Devices {
		known := isUsual(d.Type, d.Major, d.Minor) || d.Type == "p" || d.Type == "b" || d.Type == "c" && inGuest[[2]int64{d.Major, d.Minor}]
		switch {
		case !path.IsAbs(d.Path) || path.Clean(d.Path) == "/" || !plain(d.Path):
			fault("devices[%d].path %.256q: want an absolute path below /", i, d.Path)
		case d.Major < 0 || d.Major > 1<<12-1 || d.Minor < 0 || d.Minor > 1<<20-1:
			fault("devices[%d] %d:%d: there is no device of that number", i, d.Major, d.Minor)
		case !known:
			foreign = append(foreign, fmt.Sprintf("%.64q", d.Path))
		}
	}
	if n := len(foreign); n > 0 { // a privileged container has all of the host
		fault("devices: a sandbox does not have the host's %s (%d in all): leave them out, or set privileged_without_host_devices for the runtime",
			strings.Join(foreign[:min(n, 3)], ", "), n)
	}
	// Rules that allow give nothing that the guest does not have. One that
	// denies is in force for what every sandbox has not; else it cannot be.
	for i, r := range l.Resources.Devices {
		if !r.Allow && r.Major != nil && r.Minor != nil && isUsual(r.Type, *r.Major, *r.Minor) {
			fault("resources.devices[%d] %d:%d: every container has this device, it cannot be denied", i, *r.Major, *r.Minor)
		}
	}
	return errs
}

// deviceNodes are a container's devices, and those of them that are disks of
// the host. The usual ones are there already, where they usually are.
func (l *linux) deviceNodes() (nodes []guestproto.Device, disks []Volume) {
	for i, d := range l.Devices {
		if isUsual(d.Type, d.Major, d.Minor) && slices.Contains(usualPaths, path.Clean(d.Path)) {
			continue // it is there
		}
		n := guestproto.Device{
			Path: path.Clean(d.Path), Kind: d.Type[0], Major: uint32(d.Major), Minor: uint32(d.Minor), Mode: 0o666, UID: d.UID, GID: d.GID,
		}
		if n.Kind == 'u' {
			n.Kind = 'c'
		}
		if d.FileMode != nil {
			n.Mode = *d.FileMode & 0o7777
		}
		if n.Kind == 'b' {
			disks = append(disks, Volume{
				Field: fmt.Sprintf("linux.devices[%d]", i), Mount: -1, Device: len(nodes), Target: n.Path, ReadOnly: !l.mayWrite(d),
			})
		}
		nodes = append(nodes, n)
	}
	return nodes, disks
}

// mayWrite says whether the rules let a container write to a device: the last
// that speaks of it decides.
func (l *linux) mayWrite(d device) bool {
	may := false
	for _, r := range l.Resources.Devices {
		kind := r.Type == "" || r.Type == "a" || r.Type == d.Type
		if !kind || r.Major != nil && *r.Major != -1 && *r.Major != d.Major || r.Minor != nil && *r.Minor != -1 && *r.Minor != d.Minor {
			continue
		}
		if r.Access == "" || slices.Contains([]byte(r.Access), 'w') {
			may = r.Allow
		}
	}
	return may
}
