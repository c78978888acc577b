package shim

import (
	"fmt"
	"runtime"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/containerd/containerd/api/types/runtimeoptions/v1"

	"hauberk.dev/internal/strictjson"
	"hauberk.dev/vm"
)

const (
	defaultMemoryMiB = 256
	// ownMiB is what a guest's kernel and agent take beside the workload.
	ownMiB     = 96
	maxOptions = 64 << 10
)

// size of a machine.
type size struct {
	memoryMiB  int
	processors int
	limit      uint64 // of the container's memory in bytes; 0: none
	pids       uint32 // 0: none
}

// options are a runtime's, as config_body of runtimeoptions.v1.Options or the
// file that config_path names.
type options struct {
	Version    int `json:"version"`
	MemoryMiB  int `json:"memoryMiB"`
	Processors int `json:"processors"`
}

// optionsURL names the one type of options there is.
const optionsURL = "runtimeoptions.v1.Options"

func parseOptions(given *anypb.Any) (options, error) {
	if given == nil || given.GetTypeUrl() == "" && len(given.GetValue()) == 0 {
		return options{}, nil
	}
	if u := given.GetTypeUrl(); u != optionsURL && u != "type.googleapis.com/"+optionsURL {
		return options{}, fmt.Errorf("read runtime options: type %.128q: want %s", u, optionsURL)
	}
	var m runtimeoptions.Options
	if err := proto.Unmarshal(given.GetValue(), &m); err != nil {
		return options{}, fmt.Errorf("read runtime options: %w", err)
	}
	raw := m.GetConfigBody()
	if len(raw) == 0 && m.GetConfigPath() != "" {
		var err error
		if raw, err = readFile(m.GetConfigPath(), maxOptions); err != nil {
			return options{}, fmt.Errorf("read runtime options: config_path: %w", err)
		}
	}
	if len(raw) == 0 {
		return options{}, nil
	}
	return parseOptionsText(raw)
}

func parseOptionsText(raw []byte) (options, error) {
	var o options
	if err := strictjson.Decode(raw, maxOptions, &o); err != nil {
		return options{}, fmt.Errorf("read runtime options: want JSON such as {\"version\": 1, \"memoryMiB\": 256}: %w", err)
	}
	switch {
	case o.Version != 1:
		return options{}, fmt.Errorf("read runtime options: version %d: want 1", o.Version)
	case o.MemoryMiB != 0 && (o.MemoryMiB < vm.MinMemoryMiB || o.MemoryMiB > vm.MaxMemoryMiB):
		return options{}, fmt.Errorf("read runtime options: memoryMiB %d: want %d to %d", o.MemoryMiB, vm.MinMemoryMiB, vm.MaxMemoryMiB)
	case o.Processors < 0 || o.Processors > vm.MaxCPUs:
		return options{}, fmt.Errorf("read runtime options: processors %d: want 1 to %d", o.Processors, vm.MaxCPUs)
	}
	return o, nil
}

// sizeOf is what options and limits come to. A limit of memory is the
// container's; its machine needs more.
func sizeOf(o options, l *linux) size {
	s := size{memoryMiB: o.MemoryMiB, processors: o.Processors}
	if n := l.Resources.Memory.Limit; n > 0 {
		s.limit = uint64(n)
		if s.memoryMiB == 0 {
			s.memoryMiB = int((n+1<<20-1)>>20) + ownMiB
		}
	}
	if s.memoryMiB == 0 {
		s.memoryMiB = defaultMemoryMiB
	}
	if s.processors == 0 {
		s.processors = processors(l.Resources.CPU.Quota, l.Resources.CPU.Period)
	}
	s.processors = max(1, min(s.processors, runtime.NumCPU()))
	if n := l.Resources.Pids.Limit; n > 0 {
		s.pids = uint32(n)
	}
	return s
}
