package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"time"

	"hauberk.dev/api/admin"
	"hauberk.dev/bench/loopback"
)

const (
	example   = "examples/bank"
	victim    = "bank/assistant"
	upWithin  = 4 * time.Minute
	oneWithin = 30 * time.Second
)

// system brings a whole installation up with the bank in it, breaks a rule in
// one of its sandboxes again and again, and reads from the incidents how long
// each took to be contained, receipts included.
func system(ctx context.Context, l *lab) (_ []figure, err error) {
	in, err := l.installation()
	if err != nil {
		return nil, err
	}
	defer func() { err = in.down(ctx, err) }()
	up, cancel := context.WithTimeout(ctx, upWithin)
	defer cancel()
	began := time.Now()
	if _, err := in.hauberk(up, append([]string{"up", example}, in.up...)...); err != nil {
		return nil, err
	}
	out := []figure{single("hauberk up "+example+", all of it", "s", "builds, releases and starts six services", time.Since(began).Seconds())}
	var contained, alone []float64
	var last error
	for range l.n {
		var i admin.Incident
		if i, last = in.violate(ctx); last != nil {
			break
		}
		contained = append(contained, float64(i.ContainedMillis))
	}
	out = append(out, spread("violation seen to last receipt", "ms", "mesh cut and sandbox frozen, as the incidents say", contained))
	all, err := in.instances(ctx)
	if err != nil {
		return out, errors.Join(last, err)
	}
	var first []float64
	for _, i := range all {
		switch {
		case i.ReadyMillis == 0:
		case i.Workload == "assistant":
			alone = append(alone, float64(i.ReadyMillis))
		default:
			first = append(first, float64(i.ReadyMillis))
		}
	}
	return append(out,
		spread("clone to first process, one replaced", "ms", "as the node says, mesh included; the other five services run on", alone),
		spread("clone to first process, at up", "ms", "six at once on all cores, and what up does besides", first)), last
}

// installation is Hauberk run as people run it, in folders and on ports of its
// own.
type installation struct {
	held    *loopback.Held
	program string
	flags   []string // of every command
	up      []string
	seen    map[string]bool // incidents
}

func (l *lab) installation() (*installation, error) {
	held, err := loopback.Hold(5)
	if err != nil {
		return nil, err
	}
	ports := held.Addresses
	_, web, err := net.SplitHostPort(ports[4])
	if err != nil {
		return nil, errors.Join(err, held.Close())
	}
	return &installation{
		held:    held,
		program: filepath.Join(l.bin, "hauberk"), seen: map[string]bool{},
		flags: []string{"--state", filepath.Join(l.dir, "state"), "--run", filepath.Join(l.dir, "run")},
		up: []string{"--programs", l.bin, "--control-user", fmt.Sprintf("%d:%[1]d", firstUser+2<<16), "--mesh-user", fmt.Sprintf("%d:%[1]d", firstUser+3<<16),
			"--api", ports[0], "--node-listen", ports[1], "--door", ports[2], "--gateway", ports[3], "--set", "WEB_PORT=" + web},
	}, nil
}

// hauberk runs one command and returns what it printed.
func (in *installation) hauberk(ctx context.Context, args ...string) ([]byte, error) {
	c := exec.CommandContext(ctx, in.program, append(in.flags[:len(in.flags):len(in.flags)], args...)...)
	c.WaitDelay = time.Second
	var out, said bytes.Buffer
	c.Stdout, c.Stderr = &out, &said
	if err := c.Run(); err != nil {
		text := said.String()
		return out.Bytes(), fmt.Errorf("hauberk %s: %w: %s", args[0], err, text[max(0, len(text)-1024):])
	}
	return out.Bytes(), nil
}

func (in *installation) instances(ctx context.Context) (all []admin.Instance, err error) {
	return all, in.ask(ctx, &all, "ps")
}

func (in *installation) ask(ctx context.Context, into any, args ...string) error {
	raw, err := in.hauberk(ctx, append(args, "-o", "json")...)
	if err != nil {
		return err
	}
	return json.Unmarshal(raw, into)
}

// violate runs a program that the image did not bring, and waits until that is
// contained and until the victim has been replaced.
func (in *installation) violate(ctx context.Context) (admin.Incident, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, oneWithin, fmt.Errorf("no incident was contained and replaced within %v", oneWithin))
	defer cancel()
	for running := false; !running; {
		all, err := in.instances(ctx)
		if err != nil {
			return admin.Incident{}, err
		}
		for _, i := range all {
			running = running || i.Workload == "assistant" && i.Phase == "Running"
		}
		if !running {
			time.Sleep(100 * time.Millisecond)
		}
	}
	// The command ends with the sandbox it runs in, so its error says nothing.
	_, told := in.hauberk(ctx, "exec", victim, "--", "/usr/bin/attack", "drop-and-execute")
	for {
		var list []admin.Incident
		if err := in.ask(ctx, &list, "incidents"); err != nil {
			return admin.Incident{}, errors.Join(err, told, context.Cause(ctx))
		}
		for _, i := range list {
			if i.State == "Contained" && !in.seen[i.Name] {
				in.seen[i.Name] = true
				return i, nil
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
}
