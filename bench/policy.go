package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strconv"
	"time"

	"hauberk.dev/api/admin"
)

const (
	fleet       = "bench/fleet"
	fleetWithin = 15 * time.Minute // fifty machines on emulated processors
	inForce     = 2 * time.Minute
)

// policies measures how long a change of a policy takes to be in force: from
// before it is given to the API until every guest has said that it holds it,
// with the pre-check, the ledger and the report back in it.
func policies(ctx context.Context, l *lab) (out []figure, err error) {
	in, err := l.installation()
	if err != nil {
		return nil, err
	}
	defer func() { err = in.down(ctx, err) }()
	up, cancel := context.WithTimeout(ctx, fleetWithin)
	defer cancel()
	if _, err := in.hauberk(up, append([]string{"up", fleet, "--set", "PODS=" + strconv.Itoa(l.pods)}, in.up...)...); err != nil {
		return nil, err
	}
	socket := filepath.Join(l.dir, "run", "control", "admin.sock")
	c := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	defer c.CloseIdleConnections()
	for _, of := range []struct {
		policy string
		pods   int
	}{{"one", 1}, {"many", l.pods}} {
		f := follower{client: c, policy: of.policy, pods: of.pods}
		if _, err := f.reach(up, 1); err != nil {
			return out, err
		}
		var samples []float64
		for i := range l.n {
			took, err := f.change(ctx, i)
			if err != nil {
				return out, err
			}
			samples = append(samples, ms(took))
		}
		out = append(out, spread(fmt.Sprintf("change of a policy, given to the API, to in force in %d of %d", of.pods, of.pods), "ms", "in one stage; ledger, pre-check and the guests' own word in it", samples))
		if err := in.denied(ctx, of.policy, l.n%2 == 0); err != nil {
			return out, err
		}
	}
	return out, nil
}

// down ends the installation, whatever became of the run.
func (in *installation) down(ctx context.Context, err error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Minute)
	defer cancel()
	_, down := in.hauberk(ctx, "down")
	return errors.Join(err, down, in.held.Close())
}

// denied makes sure that the last change means something: every other denies
// what the ones between allow.
func (in *installation) denied(ctx context.Context, workload string, allowed bool) error {
	out, err := in.hauberk(ctx, "exec", "fleet/"+workload, "--", "/bin/idle", "/opt/x")
	if (err == nil) != allowed {
		return fmt.Errorf("write in %s after the last change: want allowed %v: %v: %s", workload, allowed, err, out)
	}
	return nil
}

// follower changes one policy and watches it come into force.
type follower struct {
	client *http.Client
	policy string
	pods   int
}

func (f follower) change(ctx context.Context, i int) (time.Duration, error) {
	rules := []string{"files: [{path: /opt, deny: w}]", "files: [{path: /opt, deny: r, allow: r}]"}
	now, err := f.state(ctx)
	if err != nil {
		return 0, err
	}
	doc := "apiVersion: hauberk.dev/v1alpha1\nkind: GuardPolicy\nmetadata: {name: " + f.policy + ", namespace: fleet}\nspec:\n" +
		"  rollout: {stages: [100], soakSeconds: 0, denialsPerMinute: 100000}\n  exec: {origin: image}\n  " + rules[i%2] + "\n"
	began := time.Now()
	if err := f.ask(ctx, http.MethodPost, admin.PathApply, []byte(doc), nil); err != nil {
		return 0, err
	}
	took, err := f.reach(ctx, now.Generation+1)
	return took.Sub(began), err
}

// reach waits until every guest holds the policy's generation, or a later one.
func (f follower) reach(ctx context.Context, generation uint64) (time.Time, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, inForce, fmt.Errorf("policy %s: generation %d is not in force within %v", f.policy, generation, inForce))
	defer cancel()
	for {
		p, err := f.state(ctx)
		if err != nil {
			return time.Time{}, err
		}
		if p.Rollout == nil && p.Generation >= generation && p.Settled && p.Eligible == f.pods && p.Applied == f.pods {
			return time.Now(), nil
		}
		select {
		case <-ctx.Done():
			return time.Time{}, fmt.Errorf("%w: %+v", context.Cause(ctx), p)
		case <-time.After(2 * time.Millisecond):
		}
	}
}

func (f follower) state(ctx context.Context) (admin.GuardPolicy, error) {
	var s admin.GuardState
	if err := f.ask(ctx, http.MethodGet, admin.PathGuard, nil, &s); err != nil {
		return admin.GuardPolicy{}, err
	}
	for _, p := range s.Policies {
		if p.Name == "fleet/"+f.policy {
			return p, nil
		}
	}
	return admin.GuardPolicy{}, nil // not read yet
}

func (f follower) ask(ctx context.Context, method, path string, body []byte, into any) error {
	req, err := http.NewRequestWithContext(ctx, method, "http://hauberk"+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := f.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s: %s", path, resp.Status, raw)
	}
	if into == nil {
		return nil
	}
	return json.Unmarshal(raw, into)
}
