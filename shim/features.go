package shim

import (
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/containerd/containerd/api/types"

	"hauberk.dev/internal/version"
)

// featuresURL is the type of the OCI's description of what a runtime can do.
const featuresURL = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"

// features are what containerd tells its clients of this runtime: docs/oci.md
// says more.
const features = `{
	"ociVersionMin": "1.0.0", "ociVersionMax": "1.2.1", "hooks": [],
	"mountOptions": ["bind", "rbind", "ro", "rw", "rro", "nosuid", "nodev", "noexec", "noatime", "relatime", "private", "rprivate", "slave", "rslave"],
	"linux": {
		"namespaces": ["cgroup", "ipc", "mount", "network", "pid", "uts"],
		"cgroup": {"v1": false, "v2": true, "systemd": false},
		"seccomp": {"enabled": true, "archs": ["SCMP_ARCH_X86", "SCMP_ARCH_X86_64"]},
		"apparmor": {"enabled": false}, "selinux": {"enabled": false}, "intelRdt": {"enabled": false},
		"mountExtensions": {"idmap": {"enabled": false}}
	}
}`

// info is what this shim says of itself.
func info() *types.RuntimeInfo {
	return &types.RuntimeInfo{
		Name: Name, Version: &types.RuntimeVersion{Version: version.String()},
		Features: &anypb.Any{TypeUrl: featuresURL, Value: []byte(features)},
	}
}
