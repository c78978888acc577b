package shim

import (
	"context"
	"runtime"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/ttrpc"

	"hauberk.dev/internal/protofields"
	"hauberk.dev/shim/oci"
)

// sandboxService is containerd's Sandbox API: a pod without a pause container.
// Its messages are few, and read and written here by hand: the package that
// defines them would bring a server of gRPC into each pod's shim.
const sandboxService = "containerd.runtime.sandbox.v1.Sandbox"

// The states of a pod, in the words of the Sandbox API's callers.
const (
	sandboxReady    = "SANDBOX_READY"
	sandboxNotReady = "SANDBOX_NOTREADY"
)

// sandboxCall is a request of the Sandbox API. All have the pod's id; the rest
// is of the one that creates, but for verbose.
type sandboxCall struct {
	id, bundle, netns string
	options           *anypb.Any
	annotations       map[string]string
	verbose           bool
	raw               []byte
}

func (q *sandboxCall) parse(raw []byte) error {
	q.annotations, q.raw = map[string]string{}, raw
	return protofields.Each(raw, func(n protowire.Number, inner []byte, v uint64) error {
		switch n {
		case 1:
			q.id = string(inner)
		case 2:
			q.bundle, q.verbose = string(inner), v == 1
		case 4:
			q.options = &anypb.Any{}
			return proto.Unmarshal(inner, q.options)
		case 5:
			q.netns = string(inner)
		case 6:
			return pair(inner, q.annotations)
		}
		return nil
	})
}

// answerOf builds an answer, field by field.
type answerOf []byte

func (a *answerOf) number(n protowire.Number, v uint64) {
	*a = protowire.AppendVarint(protowire.AppendTag(*a, n, protowire.VarintType), v)
}

func (a *answerOf) text(n protowire.Number, s string) { *a = within(*a, n, []byte(s)) }

func (a *answerOf) message(n protowire.Number, m proto.Message) error {
	raw, err := proto.Marshal(m)
	*a = within(*a, n, raw)
	return err
}

// sandboxMethods are the calls of the Sandbox API. An unknown call is refused by
// the server as one that is not implemented.
func (s *service) sandboxMethods() map[string]ttrpc.Method {
	methods := map[string]ttrpc.Method{}
	for name, f := range map[string]func(context.Context, sandboxCall) (answerOf, error){
		"CreateSandbox": s.createSandbox, "StartSandbox": s.startSandbox, "Platform": s.platform, "StopSandbox": s.stopSandbox,
		"WaitSandbox": s.waitSandbox, "SandboxStatus": s.sandboxStatus, "PingSandbox": s.pingSandbox,
		"ShutdownSandbox": s.shutdownSandbox, "SandboxMetrics": s.sandboxMetrics, "UpdateSandbox": s.updateSandbox,
	} {
		methods[name] = s.sandboxMethod(f)
	}
	return methods
}

func (s *service) sandboxMethod(f func(context.Context, sandboxCall) (answerOf, error)) ttrpc.Method {
	return func(ctx context.Context, read func(any) error) (any, error) {
		var request emptypb.Empty // keeps what it does not know, which is all
		if err := read(&request); err != nil {
			return nil, err
		}
		var q sandboxCall
		if err := q.parse(request.ProtoReflect().GetUnknown()); err != nil {
			return nil, invalid(err)
		}
		if q.id != s.args.id {
			return nil, status.Errorf(codes.NotFound, "pod %.128q is not here: this is %q", q.id, s.args.id)
		}
		a, err := f(ctx, q)
		if err != nil {
			return nil, err
		}
		answer := &emptypb.Empty{}
		answer.ProtoReflect().SetUnknown([]byte(a))
		return answer, nil
	}
}

// createSandbox makes a pod. Asked again, it answers as before.
func (s *service) createSandbox(ctx context.Context, q sandboxCall) (answerOf, error) {
	w, err := q.wish()
	if err != nil {
		return nil, invalid(err)
	}
	_, err = s.openPod(ctx, w)
	return nil, err
}

// wish is the pod that a caller of the Sandbox API asks for.
func (q sandboxCall) wish() (wish, error) {
	given, err := parsePodConfig(q.options)
	if err != nil {
		return wish{}, err
	}
	conf, err := given.config(q.id)
	if err != nil {
		return wish{}, err
	}
	b := bundle{pod: q.id, role: roleSandbox, annotations: q.annotations}
	if len(b.annotations) == 0 {
		b.annotations = given.annotations
	}
	w, err := wishOf(conf, b, oci.Options{})
	if err != nil {
		return wish{}, err
	}
	w.id, w.bundle, w.netns = q.id, q.bundle, q.netns
	w.several = true
	w.files = given.files(w.hostname)
	return w, nil
}

// startSandbox says that the pod may be used: it runs since it was made.
func (s *service) startSandbox(context.Context, sandboxCall) (a answerOf, err error) {
	p, err := s.livingPod()
	if err != nil {
		return nil, err
	}
	a.number(1, uint64(p.pid()))
	return a, a.message(2, timestamppb.New(p.created))
}

// platform is what containers of the pod run on.
func (s *service) platform(context.Context, sandboxCall) (a answerOf, err error) {
	return a, a.message(1, &types.Platform{OS: "linux", Architecture: runtime.GOARCH})
}

// stopSandbox ends the pod's machine, and with it what still runs.
func (s *service) stopSandbox(ctx context.Context, _ sandboxCall) (answerOf, error) {
	p, err := s.madePod(ctx)
	if err != nil {
		return nil, err
	}
	return nil, p.end()
}

// waitSandbox waits for the end of the pod's machine.
func (s *service) waitSandbox(ctx context.Context, _ sandboxCall) (a answerOf, err error) {
	p, err := s.madePod(ctx)
	if err != nil {
		return nil, err
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	a.number(1, uint64(lostStatus))
	return a, a.message(2, timestamppb.New(p.gone))
}

// sandboxStatus says how the pod is.
func (s *service) sandboxStatus(ctx context.Context, q sandboxCall) (a answerOf, err error) {
	p, err := s.madePod(ctx)
	if err != nil {
		return nil, err
	}
	state := sandboxReady
	var gone time.Time
	select {
	case <-p.done:
		state, gone = sandboxNotReady, p.gone
	default:
	}
	a.text(1, p.id)
	a.number(2, uint64(p.pid()))
	a.text(3, state)
	if q.verbose {
		for key, value := range map[string]string{"machine": p.journal.Machine, "console": p.box.Load().machine.Console()} {
			var entry answerOf
			entry.text(1, key)
			entry.text(2, value)
			a = within(a, 4, entry)
		}
	}
	if err := a.message(5, timestamppb.New(p.created)); err != nil || gone.IsZero() {
		return a, err
	}
	return a, a.message(6, timestamppb.New(gone))
}

// pingSandbox asks the guest for a sign of life.
func (s *service) pingSandbox(ctx context.Context, _ sandboxCall) (answerOf, error) {
	p, err := s.livingPod()
	if err != nil {
		return nil, err
	}
	return nil, p.box.Load().channel.Ping(ctx)
}

// shutdownSandbox ends the pod and this process.
func (s *service) shutdownSandbox(context.Context, sandboxCall) (answerOf, error) {
	time.AfterFunc(lastAnswer, func() { s.stopped.Do(s.stop) })
	return nil, nil
}

// sandboxMetrics is what the containers of the pod use together.
func (s *service) sandboxMetrics(ctx context.Context, _ sandboxCall) (a answerOf, err error) {
	p, err := s.livingPod()
	if err != nil {
		return nil, err
	}
	used, err := p.box.Load().usage(ctx)
	if err != nil {
		return nil, err
	}
	return a, a.message(1, &types.Metric{Timestamp: timestamppb.Now(), ID: p.id, Data: metrics(used, limits{}, s.legacy)})
}

// madePod is the pod of this shim, once it is made, dead or alive.
func (s *service) madePod(ctx context.Context) (*pod, error) {
	s.mu.Lock()
	p := s.pod
	s.mu.Unlock()
	if p == nil {
		return nil, status.Errorf(codes.NotFound, "pod %q is not here", s.args.id)
	}
	select {
	case <-p.made:
		return p, p.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}
