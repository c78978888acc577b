package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"hauberk.dev/test/cri"
)

const space = "k8s.io" // where the CRI has its images

// callTime bounds one call; a kill may cost containerd's own patience.
const callTime = 90 * time.Second

// lives are the ways in which a container is made, used and removed. Each ends
// with nothing left if nobody disturbs it.
func (s *soak) lives() []func(context.Context, string) error {
	return []func(context.Context, string) error{s.task, s.pod, s.pair}
}

var kindsOfLife = [...]string{"ctr", "pod", "pair"}

// prepare pulls the image.
func (s *soak) prepare(ctx context.Context) error {
	if err := os.WriteFile(filepath.Join(s.tools.Work, "crictl.yaml"), nil, 0o600); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(s.tools.Work, "volume"), 0o755); err != nil {
		return err
	}
	_, err := s.crictl(ctx, "pull", cri.Busybox)
	return err
}

// task runs a container as ctr does, without a pod.
func (s *soak) task(ctx context.Context, name string) error {
	out, err := s.ctr(ctx, "run", "--rm", "--runtime", "io.containerd."+s.runtime+".v2",
		cri.Busybox, name, "sh", "-c", "echo here; sleep 0.3")
	if err == nil && out != "here\n" {
		err = fmt.Errorf("run printed %q", out)
	}
	return err
}

// pod is a pod with one container.
func (s *soak) pod(ctx context.Context, name string) error { return s.inPod(ctx, name, 1) }

// pair is a pod with two, which share a directory of the host.
func (s *soak) pair(ctx context.Context, name string) error { return s.inPod(ctx, name, 2) }

func (s *soak) inPod(ctx context.Context, name string, containers int) error {
	config := s.file(name+".json", map[string]any{
		"metadata": map[string]any{"name": name, "namespace": "soak", "uid": name, "attempt": 1},
		"hostname": name, "log_directory": filepath.Join(s.tools.Work, "tmp"),
		"port_mappings": []any{map[string]any{"container_port": 80, "host_port": 18080}},
		"linux":         map[string]any{},
	})
	pod, err := s.crictl(ctx, "runp", "--runtime", s.runtime, config)
	if err != nil {
		return err
	}
	for i := range containers {
		mounts := []any{}
		if containers > 1 {
			mounts = append(mounts, map[string]any{"host_path": filepath.Join(s.tools.Work, "volume"), "container_path": "/volume"})
		}
		container := s.file(fmt.Sprintf("%s-%d.json", name, i), map[string]any{
			"metadata": map[string]any{"name": fmt.Sprint("c", i), "attempt": 1}, "image": map[string]any{"image": cri.Busybox},
			"command": []string{"sh", "-c", "echo started; sleep 1000"}, "log_path": fmt.Sprintf("%s-%d.log", name, i), "linux": map[string]any{}, "mounts": mounts,
		})
		id, err := s.crictl(ctx, "create", "--no-pull", pod, container, config)
		if err != nil {
			return err
		}
		if _, err := s.crictl(ctx, "start", id); err != nil {
			return err
		}
		if out, err := s.crictl(ctx, "exec", "--sync", id, "hostname"); err != nil || out != name {
			return fmt.Errorf("exec printed %q: %w", out, err)
		}
	}
	if _, err := s.crictl(ctx, "stopp", pod); err != nil {
		return err
	}
	_, err = s.crictl(ctx, "rmp", pod)
	return err
}

// file writes what crictl reads, and returns its path.
func (s *soak) file(name string, v any) string {
	raw, err := json.Marshal(v)
	path := filepath.Join(s.tools.Work, name)
	if err == nil {
		err = os.WriteFile(path, raw, 0o600)
	}
	if err != nil {
		return "/nonexistent: " + err.Error() // crictl says so
	}
	return path
}

// cleanse removes what a cycle left, as Kubernetes and users do: by asking until
// it is done.
func (s *soak) cleanse(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	for {
		err := errors.Join(s.cleansePods(ctx, name), s.cleanseTask(ctx, name))
		if err == nil {
			for _, old := range []string{name + ".json", name + "-0.json", name + "-1.json"} {
				os.Remove(filepath.Join(s.tools.Work, old))
				os.Remove(filepath.Join(s.tools.Work, "tmp", strings.Replace(old, ".json", ".log", 1)))
			}
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("clean up after %s: %w", name, err)
		case <-time.After(500 * time.Millisecond):
		}
	}
}

func (s *soak) cleansePods(ctx context.Context, name string) error {
	out, err := s.crictl(ctx, "pods", "-q", "--name", name)
	for id := range strings.FieldsSeq(out) {
		_, stopped := s.crictl(ctx, "stopp", id)
		_, removed := s.crictl(ctx, "rmp", id)
		err = errors.Join(err, stopped, removed)
	}
	return err
}

func (s *soak) cleanseTask(ctx context.Context, name string) error {
	out, err := s.ctr(ctx, "containers", "ls", "-q")
	if err != nil {
		return err
	}
	for id := range strings.FieldsSeq(out) {
		if id != name {
			continue
		}
		s.ctr(ctx, "tasks", "kill", "-s", "KILL", id)
		s.ctr(ctx, "tasks", "rm", "-f", id)
		if _, err := s.ctr(ctx, "containers", "rm", id); err != nil {
			return err
		}
	}
	// ctr names the snapshot after the container.
	if out, err = s.ctr(ctx, "snapshots", "ls"); err != nil {
		return err
	}
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) > 0 && f[0] == name {
			_, err = s.ctr(ctx, "snapshots", "rm", name)
		}
	}
	return err
}

func (s *soak) ctr(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	return s.server.Ctr(ctx, append([]string{"-n", space}, args...)...)
}

// crictl returns what it printed, without the space around it.
func (s *soak) crictl(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	all := append([]string{"--config", filepath.Join(s.tools.Work, "crictl.yaml"), "-r", s.server.Endpoint(), "-t", "80s"}, args...)
	cmd := exec.CommandContext(ctx, filepath.Join(s.tools.Suite, "crictl"), all...)
	var out, said strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		return strings.TrimSpace(out.String()), fmt.Errorf("crictl %s: %w: %s", args[0], err, strings.TrimSpace(said.String()))
	}
	return strings.TrimSpace(out.String()), nil
}
