package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
)

// once are the runtimes whose way of starting makes no difference to what they
// do then.
var once = []runtimeUnderTest{underTest[1], underTest[3], underTest[4]}

// rates measures what a program gets done inside a container.
func rates(ctx context.Context, l *lab) (out []figure, err error) {
	for _, r := range once {
		e, err := openEngine(ctx, l, r)
		if err != nil {
			return out, err
		}
		f, err := e.rates(ctx)
		out = append(out, f...)
		if err := errors.Join(err, e.close(ctx)); err != nil {
			return out, err
		}
	}
	return out, nil
}

// roomy gives a container of ours the memory to hold what is written: the
// layer above the image lies there.
var roomy = []string{"--memory-limit", "402653184"}

func (e *engine) rates(ctx context.Context) ([]figure, error) {
	var write, reread, creates, execs []float64
	for range 3 {
		said, err := e.run(ctx, roomy, "/inside", "inside", "files")
		if err != nil {
			return nil, err
		}
		var r insideRates
		if err := json.Unmarshal([]byte(said), &r); err != nil {
			return nil, fmt.Errorf("%s says %.200q: %w", e.name, said, err)
		}
		write, reread = append(write, r.WriteMBs), append(reread, r.RereadMBs)
		creates, execs = append(creates, r.CreatesPerS), append(execs, r.ExecsPerS)
	}
	return []figure{
		spread(e.name+": write and sync 64 MB", "MB/s", "into the container's own layer", write),
		spread(e.name+": read it again", "MB/s", "", reread),
		spread(e.name+": create files of 4 KiB", "/s", "", creates),
		spread(e.name+": start programs", "/s", "busybox true, one after the other", execs),
	}, nil
}

// traffics measures a container's network: a pair of interfaces, one end in
// the container's namespace, the other in one of its peer.
func traffics(ctx context.Context, l *lab) (out []figure, err error) {
	pair := fmt.Sprintf("hb-bench-%d", os.Getpid())
	pod, peer := pair+"-a", pair+"-b"
	defer func() {
		for _, name := range []string{pod, peer} {
			exec.Command("ip", "netns", "del", name).Run() // may not be there
		}
	}()
	for _, line := range [][]string{
		{"netns", "add", pod}, {"netns", "add", peer},
		{"-n", pod, "link", "add", "eth0", "type", "veth", "peer", "name", "eth1", "netns", peer},
		{"-n", pod, "addr", "add", "198.51.100.2/24", "dev", "eth0"}, {"-n", peer, "addr", "add", "198.51.100.1/24", "dev", "eth1"},
		{"-n", pod, "link", "set", "eth0", "up"}, {"-n", peer, "link", "set", "eth1", "up"}, {"-n", pod, "link", "set", "lo", "up"},
	} {
		if said, err := exec.CommandContext(ctx, "ip", line...).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("ip %q: %w: %s", line, err, said)
		}
	}
	for _, r := range once {
		f, err := traffic1(ctx, l, r, pod, peer)
		out = append(out, f...)
		if err != nil {
			return out, err
		}
	}
	return out, nil
}

func traffic1(ctx context.Context, l *lab, r runtimeUnderTest, pod, peer string) (out []figure, err error) {
	e, err := openEngine(ctx, l, r)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, e.close(ctx)) }()
	id := e.id()
	if _, err := e.ctr(ctx, e.begin("-d", "--with-ns", "network:/var/run/netns/"+pod, engineImage, id, "/inside", "inside", "serve")...); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, e.end(ctx, id)) }()
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	said, err := exec.CommandContext(ctx, "ip", "netns", "exec", peer, self, "outside", "198.51.100.2:"+insidePort).Output()
	if err != nil {
		return nil, fmt.Errorf("talk to %s: %w: %s", e.name, err, said)
	}
	var t traffic
	if err := json.Unmarshal(said, &t); err != nil {
		return nil, fmt.Errorf("talk to %s: %w", e.name, err)
	}
	return []figure{
		single(e.name+": TCP into the container", "MB/s", "one connection", t.InMBs),
		single(e.name+": TCP out of the container", "MB/s", "one connection", t.OutMBs),
		spread(e.name+": round trip of a byte", "us", "", t.RoundTripUs),
	}, nil
}
