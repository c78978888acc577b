package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"
)

// launches times what it takes until a workload says its first word: in a
// machine cloned from a template, in one booted cold, and in a container of
// runc, turn by turn so that a neighbour disturbs all alike.
func launches(ctx context.Context, l *lab) ([]figure, error) {
	rival, err := openRunc(l)
	if err != nil {
		return nil, err
	}
	if s, err := l.launch(ctx, false); err != nil { // warms the page cache
		return nil, err
	} else if err := s.stop(ctx); err != nil {
		return nil, err
	}
	var clone, spent, cold, runc []float64
	took, cost := map[string][]float64{}, map[string][]float64{}
	var order []string
	var errs []error
	for i := range l.n {
		s, err := l.launch(ctx, false)
		if err != nil {
			errs = append(errs, err)
			break
		}
		clone, spent = append(clone, ms(s.total())), append(spent, ms(s.spent))
		for _, lap := range s.laps {
			if len(took[lap.step]) == 0 {
				order = append(order, lap.step)
			}
			took[lap.step], cost[lap.step] = append(took[lap.step], ms(lap.took)), append(cost[lap.step], ms(lap.spent))
		}
		errs = append(errs, s.stop(ctx))
		word, err := rival.run(ctx)
		if err != nil {
			errs = append(errs, err)
			break
		}
		runc = append(runc, ms(word))
		if i%3 != 0 {
			continue // a cold boot takes seconds
		}
		if s, err = l.launch(ctx, true); err != nil {
			errs = append(errs, err)
			break
		}
		cold = append(cold, ms(s.total()))
		errs = append(errs, s.stop(ctx))
	}
	r := spread("runc run", "ms", "a container shares the host's kernel", runc)
	b := spread("cold boot to first word", "ms", "", cold)
	c := spread("template clone to first word", "ms", "", clone)
	c.Note = c.ratio(b) + ", " + c.ratio(r)
	out := []figure{c, b, r,
		spread("processor time of the clone's machine", "ms", "what is left of the time if no neighbour takes any", spent),
		spread("before that: "+stepNetwork, "ms", "not in the sums above", took[stepNetwork])}
	for _, step := range order {
		if step != stepNetwork {
			note := fmt.Sprintf("of which %s ms processor time", number(spread("", "", "", cost[step]).P50))
			out = append(out, spread("of the clone: "+step, "ms", note, took[step]))
		}
	}
	return out, errors.Join(errs...)
}

// runc is the rival: the container runtime that most clusters start pods with,
// alone, without containerd before it.
type runc struct {
	bundle, state string
	n             int
}

// openRunc writes a bundle with the same busybox in it.
func openRunc(l *lab) (*runc, error) {
	r := &runc{bundle: filepath.Join(l.dir, "bundle"), state: filepath.Join(l.dir, "runc")}
	rootfs := filepath.Join(r.bundle, "rootfs")
	for _, dir := range []string{"bin", "proc", "sys", "dev", "etc"} {
		if err := os.MkdirAll(filepath.Join(rootfs, dir), 0o755); err != nil {
			return nil, err
		}
	}
	program, err := os.ReadFile(busybox)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(rootfs, "bin/busybox"), program, 0o755); err != nil {
		return nil, err
	}
	spec := exec.Command("runc", "spec")
	spec.Dir = r.bundle
	if out, err := spec.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("make runc's bundle: %w: %s", err, out)
	}
	return r, r.edit()
}

// edit gives the bundle our workload and no terminal.
func (r *runc) edit() error {
	path := filepath.Join(r.bundle, "config.json")
	raw, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var config map[string]any
	if err := json.Unmarshal(raw, &config); err != nil {
		return err
	}
	process, ok := config["process"].(map[string]any)
	if !ok {
		return errors.New("read what runc spec wrote: it has no process")
	}
	process["args"], process["terminal"] = workload, false
	if raw, err = json.Marshal(config); err != nil {
		return err
	}
	return os.WriteFile(path, raw, 0o644)
}

// run starts a container, waits for its first word and removes it.
func (r *runc) run(ctx context.Context) (took time.Duration, err error) {
	r.n++
	name := fmt.Sprintf("bench-%d-%d", os.Getpid(), r.n)
	c := exec.CommandContext(ctx, "runc", "--root", r.state, "run", "--bundle", r.bundle, name)
	word, out, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer word.Close()
	said := &beginning{}
	c.Stdout, c.Stderr = out, said
	began := time.Now()
	if err := c.Start(); err != nil {
		return 0, errors.Join(err, out.Close())
	}
	out.Close() // the container holds the other
	_, err = io.ReadFull(word, make([]byte, 1))
	took = time.Since(began)
	end := context.WithoutCancel(ctx)
	if gone, e := exec.CommandContext(end, "runc", "--root", r.state, "delete", "--force", name).CombinedOutput(); e != nil {
		err = errors.Join(err, fmt.Errorf("%w: %s", e, gone))
	}
	c.Wait() // ended by delete, so its error says nothing
	if err != nil {
		return 0, fmt.Errorf("run container: %w: %s", err, said)
	}
	return took, nil
}

// beginning keeps the first bytes of what a program says.
type beginning struct {
	mu sync.Mutex
	b  []byte
}

func (t *beginning) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p[:min(len(p), beginningBytes-len(t.b))]...)
	return len(p), nil
}

func (t *beginning) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.b)
}

const beginningBytes = 1024
