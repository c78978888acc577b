package shim

import (
	"context"
	"encoding/json"
	"fmt"
	"runtime"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"hauberk.dev/internal/protofields"
)

// resourcesExtension is where containerd's CRI keeps what a pod is to have from
// now on, as JSON.
const resourcesExtension = "updated-resources"

// podResources are the limits of a pod that mean something here.
type podResources struct {
	Resources struct {
		Memory int64 `json:"memory_limit_in_bytes"`
		Quota  int64 `json:"cpu_quota"`
		Period int64 `json:"cpu_period"`
	}
}

// updateSandbox agrees to limits that the pod's machine has room for: its size
// is what it started with, and within it the containers' limits change with
// their own updates. What it has no room for is refused, so that nobody takes
// it for done.
func (s *service) updateSandbox(_ context.Context, q sandboxCall) (answerOf, error) {
	p, err := s.livingPod()
	if err != nil {
		return nil, err
	}
	want, err := parsePodResources(q.raw)
	if err != nil {
		return nil, invalid(err)
	}
	r := want.Resources
	if err := p.size.Fits(r.Memory, r.Quota, r.Period, runtime.NumCPU()); err != nil {
		return nil, status.Errorf(codes.FailedPrecondition, "resize machine of pod %q: %v", q.id, err)
	}
	return nil, nil
}

// parsePodResources finds them in a request: in the extensions of the sandbox
// as containerd keeps it. Where nothing is said of them nothing is asked.
func parsePodResources(raw []byte) (out podResources, err error) {
	within := func(at protowire.Number, f func([]byte) error) func(protowire.Number, []byte, uint64) error {
		return func(n protowire.Number, inner []byte, _ uint64) error {
			if n != at {
				return nil
			}
			return f(inner)
		}
	}
	extension := func(entry []byte) error {
		var key string
		var value []byte
		err := protofields.Each(entry, func(n protowire.Number, inner []byte, _ uint64) error {
			switch n {
			case 1:
				key = string(inner)
			case 2:
				return protofields.Each(inner, within(2, func(b []byte) error { value = b; return nil }))
			}
			return nil
		})
		if err != nil || key != resourcesExtension {
			return err
		}
		if err := json.Unmarshal(value, &out); err != nil {
			return fmt.Errorf("%s: %w", resourcesExtension, err)
		}
		return nil
	}
	err = protofields.Each(raw, within(4, func(sandbox []byte) error {
		return protofields.Each(sandbox, within(7, extension))
	}))
	if err != nil {
		return podResources{}, fmt.Errorf("read pod's resources: %w", err)
	}
	return out, nil
}
