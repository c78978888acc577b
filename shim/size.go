package shim

import (
	"fmt"
	"runtime"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/containerd/containerd/api/types/runtimeoptions/v1"

	"hauberk.dev/shim/oci"
)

const maxOptions = 64 << 10

// optionsURL names the one type of options there is.
const optionsURL = "runtimeoptions.v1.Options"

// parseOptions reads a runtime's options: config_body of
// runtimeoptions.v1.Options or the file that config_path names.
func parseOptions(given *anypb.Any) (oci.Options, error) {
	if given == nil || given.GetTypeUrl() == "" && len(given.GetValue()) == 0 {
		return oci.Options{}, nil
	}
	if u := given.GetTypeUrl(); u != optionsURL && u != "type.googleapis.com/"+optionsURL {
		return oci.Options{}, fmt.Errorf("read runtime options: type %.128q: want %s", u, optionsURL)
	}
	var m runtimeoptions.Options
	if err := proto.Unmarshal(given.GetValue(), &m); err != nil {
		return oci.Options{}, fmt.Errorf("read runtime options: %w", err)
	}
	raw := m.GetConfigBody()
	if len(raw) == 0 && m.GetConfigPath() != "" {
		var err error
		if raw, err = readFile(m.GetConfigPath(), maxOptions); err != nil {
			return oci.Options{}, fmt.Errorf("read runtime options: config_path: %w", err)
		}
	}
	return oci.ParseOptions(raw)
}

// sizeOf is what options and limits come to on this host.
func sizeOf(c *oci.Config, o oci.Options) (oci.Size, error) { return c.Size(o, runtime.NumCPU()) }
