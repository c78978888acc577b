package shim

import (
	"context"
	"runtime"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/ttrpc"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/shim/oci"
)

// sandboxService is containerd's Sandbox API: a pod without a pause container.
const sandboxService = "containerd.runtime.sandbox.v1.Sandbox"

// The states of a pod, in the words of the Sandbox API's callers.
const (
	sandboxReady    = "SANDBOX_READY"
	sandboxNotReady = "SANDBOX_NOTREADY"
)

func (s *service) sandboxMethods() map[string]ttrpc.Method {
	var _ sandboxapi.TTRPCSandboxService = s // no verb is missing
	return map[string]ttrpc.Method{
		"CreateSandbox": method(s.CreateSandbox), "StartSandbox": method(s.StartSandbox), "Platform": method(s.Platform),
		"StopSandbox": method(s.StopSandbox), "WaitSandbox": method(s.WaitSandbox), "SandboxStatus": method(s.SandboxStatus),
		"PingSandbox": method(s.PingSandbox), "ShutdownSandbox": method(s.ShutdownSandbox),
		"SandboxMetrics": method(s.SandboxMetrics), "UpdateSandbox": method(s.UpdateSandbox),
	}
}

// named refuses what is meant for another pod.
func (s *service) named(id string) error {
	if id != s.args.id {
		return status.Errorf(codes.NotFound, "pod %q is not here: this is %q", id, s.args.id)
	}
	return nil
}

// CreateSandbox makes a pod. Asked again, it answers as before.
func (s *service) CreateSandbox(ctx context.Context, r *sandboxapi.CreateSandboxRequest) (*sandboxapi.CreateSandboxResponse, error) {
	if err := s.named(r.GetSandboxID()); err != nil {
		return nil, err
	}
	w, err := sandboxWish(r)
	if err != nil {
		return nil, invalid(err)
	}
	if _, err := s.openPod(ctx, w); err != nil {
		return nil, err
	}
	return &sandboxapi.CreateSandboxResponse{}, nil
}

// sandboxWish is the pod that a caller of the Sandbox API asks for.
func sandboxWish(r *sandboxapi.CreateSandboxRequest) (wish, error) {
	given, err := parsePodConfig(r.GetOptions())
	if err != nil {
		return wish{}, err
	}
	conf, err := given.config(r.GetSandboxID())
	if err != nil {
		return wish{}, err
	}
	b := bundle{pod: r.GetSandboxID(), role: roleSandbox, annotations: r.GetAnnotations()}
	if len(b.annotations) == 0 {
		b.annotations = given.annotations
	}
	w, err := wishOf(conf, b, oci.Options{})
	if err != nil {
		return wish{}, err
	}
	w.id, w.bundle, w.netns = r.GetSandboxID(), r.GetBundlePath(), r.GetNetnsPath()
	w.files = given.files(w.hostname)
	return w, nil
}

// StartSandbox says that the pod may be used: it runs since it was made.
func (s *service) StartSandbox(_ context.Context, r *sandboxapi.StartSandboxRequest) (*sandboxapi.StartSandboxResponse, error) {
	if err := s.named(r.GetSandboxID()); err != nil {
		return nil, err
	}
	p, err := s.livingPod()
	if err != nil {
		return nil, err
	}
	return &sandboxapi.StartSandboxResponse{Pid: p.pid(), CreatedAt: timestamppb.New(p.created)}, nil
}

// Platform is what containers of the pod run on.
func (s *service) Platform(_ context.Context, r *sandboxapi.PlatformRequest) (*sandboxapi.PlatformResponse, error) {
	if err := s.named(r.GetSandboxID()); err != nil {
		return nil, err
	}
	return &sandboxapi.PlatformResponse{Platform: &types.Platform{OS: "linux", Architecture: runtime.GOARCH}}, nil
}

// StopSandbox ends the pod's machine, and with it what still runs.
func (s *service) StopSandbox(ctx context.Context, r *sandboxapi.StopSandboxRequest) (*sandboxapi.StopSandboxResponse, error) {
	if err := s.named(r.GetSandboxID()); err != nil {
		return nil, err
	}
	p, err := s.madePod(ctx)
	if err != nil {
		return nil, err
	}
	if err := p.end(); err != nil {
		return nil, err
	}
	return &sandboxapi.StopSandboxResponse{}, nil
}

// WaitSandbox waits for the end of the pod's machine.
func (s *service) WaitSandbox(ctx context.Context, r *sandboxapi.WaitSandboxRequest) (*sandboxapi.WaitSandboxResponse, error) {
	if err := s.named(r.GetSandboxID()); err != nil {
		return nil, err
	}
	p, err := s.madePod(ctx)
	if err != nil {
		return nil, err
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	return &sandboxapi.WaitSandboxResponse{ExitStatus: uint32(lostStatus), ExitedAt: timestamppb.New(p.gone)}, nil
}

// SandboxStatus says how the pod is.
func (s *service) SandboxStatus(ctx context.Context, r *sandboxapi.SandboxStatusRequest) (*sandboxapi.SandboxStatusResponse, error) {
	if err := s.named(r.GetSandboxID()); err != nil {
		return nil, err
	}
	p, err := s.madePod(ctx)
	if err != nil {
		return nil, err
	}
	out := &sandboxapi.SandboxStatusResponse{
		SandboxID: p.id, Pid: p.pid(), State: sandboxReady, CreatedAt: timestamppb.New(p.created),
	}
	select {
	case <-p.done:
		out.State, out.ExitedAt = sandboxNotReady, timestamppb.New(p.gone)
	default:
	}
	if r.GetVerbose() {
		out.Info = map[string]string{"machine": p.journal.Machine, "console": p.machine.Console()}
	}
	return out, nil
}

// PingSandbox asks the guest for a sign of life.
func (s *service) PingSandbox(ctx context.Context, r *sandboxapi.PingRequest) (*sandboxapi.PingResponse, error) {
	if err := s.named(r.GetSandboxID()); err != nil {
		return nil, err
	}
	p, err := s.livingPod()
	if err == nil {
		err = p.channel.Ping(ctx)
	}
	if err != nil {
		return nil, err
	}
	return &sandboxapi.PingResponse{}, nil
}

// ShutdownSandbox ends the pod and this process.
func (s *service) ShutdownSandbox(_ context.Context, r *sandboxapi.ShutdownSandboxRequest) (*sandboxapi.ShutdownSandboxResponse, error) {
	if err := s.named(r.GetSandboxID()); err != nil {
		return nil, err
	}
	time.AfterFunc(lastAnswer, func() { s.stopped.Do(s.stop) })
	return &sandboxapi.ShutdownSandboxResponse{}, nil
}

// SandboxMetrics is what the containers of the pod use together.
func (s *service) SandboxMetrics(ctx context.Context, r *sandboxapi.SandboxMetricsRequest) (*sandboxapi.SandboxMetricsResponse, error) {
	if err := s.named(r.GetSandboxID()); err != nil {
		return nil, err
	}
	p, err := s.livingPod()
	if err != nil {
		return nil, err
	}
	used, err := p.usage(ctx)
	if err != nil {
		return nil, err
	}
	return &sandboxapi.SandboxMetricsResponse{Metrics: &types.Metric{
		Timestamp: timestamppb.Now(), ID: p.id, Data: metrics(used, limits{}, s.legacy),
	}}, nil
}

// UpdateSandbox is not there: a machine's size is what it started with.
func (s *service) UpdateSandbox(context.Context, *sandboxapi.UpdateSandboxRequest) (*sandboxapi.UpdateSandboxResponse, error) {
	return nil, status.Error(codes.Unimplemented, "update pod: a machine's size is what it started with")
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

// usage is what the containers of a pod use together.
func (p *pod) usage(ctx context.Context) (used guestproto.ContainerStats, err error) {
	st, err := p.channel.Stats(ctx)
	for _, u := range st.Containers {
		used = together(used, u)
	}
	return used, err
}
