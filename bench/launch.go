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
// machine of a pool, in one cloned from a template, in one booted cold, and in a
// container of runc, turn by turn so that a neighbour disturbs all alike.
func launches(ctx context.Context, l *lab) ([]figure, error) {
	rival, err := openRunc(l)
	if err != nil {
		return nil, err
	}
	if s, err := l.launch(ctx, fromTemplate); err != nil { // warms the page cache
		return nil, err
	} else if err := s.stop(ctx); err != nil {
		return nil, err
	}
	kinds := map[how]*launched{fromPool: {}, fromTemplate: {}, fromKernel: {}}
	var runc []float64
	for i := range l.n {
		for _, h := range []how{fromPool, fromTemplate, fromKernel} {
			if h == fromKernel && i%3 != 0 {
				continue // a cold boot takes seconds
			}
			s, err := l.launch(ctx, h)
			if err != nil {
				return nil, err
			}
			kinds[h].note(s)
			if err := s.stop(ctx); err != nil {
				return nil, err
			}
		}
		word, err := rival.run(ctx)
		if err != nil {
			return nil, err
		}
		runc = append(runc, ms(word))
	}
	r := spread("runc run", "ms", "a container shares the host's kernel", runc)
	b := spread("cold boot to first word", "ms", "", kinds[fromKernel].total)
	out := []figure{b, r}
	for _, k := range []struct {
		how  how
		what string
	}{{fromTemplate, "template clone"}, {fromPool, "machine of the pool"}} {
		f := spread(k.what+" to first word", "ms", "", kinds[k.how].total)
		f.Note = f.ratio(b) + ", " + f.ratio(r)
		out = append(append(out, f), kinds[k.how].figures(k.what)...)
	}
	return out, nil
}

// launched is what launches of one kind took, step by step.
type launched struct {
	total, spent []float64
	order        []string
	took, cost   map[string][]float64
}

func (k *launched) note(s *sandbox) {
	if k.took == nil {
		k.took, k.cost = map[string][]float64{}, map[string][]float64{}
	}
	k.total, k.spent = append(k.total, ms(s.total())), append(k.spent, ms(s.spent))
	for _, lap := range s.laps {
		if len(k.took[lap.step]) == 0 {
			k.order = append(k.order, lap.step)
		}
		k.took[lap.step], k.cost[lap.step] = append(k.took[lap.step], ms(lap.took)), append(k.cost[lap.step], ms(lap.spent))
	}
}

func (k *launched) figures(what string) []figure {
	out := []figure{spread("processor time of the "+what, "ms", "what is left of the time if no neighbour takes any", k.spent)}
	for _, step := range k.order {
		note := fmt.Sprintf("of which %s ms processor time", number(spread("", "", "", k.cost[step]).P50))
		if step == stepNetwork {
			note = "before the clock starts"
		}
		out = append(out, spread(what+": "+step, "ms", note, k.took[step]))
	}
	return out
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
