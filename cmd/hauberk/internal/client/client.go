// Package client asks a control plane on its Unix socket, in the words of
// package admin.
//
// It knows no flags and prints nothing. Every answer is bounded, and every
// refusal comes back as the *admin.Error that the control plane wrote.
package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"syscall"

	"hauberk.dev/api/admin"
)

// maxAnswer bounds a JSON answer; tars and logs are streams without a bound.
const maxAnswer = 64 << 20

// ErrNotRunning means that nothing listens on the socket.
var ErrNotRunning = errors.New("no control plane is running")

// Client asks one control plane.
type Client struct {
	socket string
	http   *http.Client
}

// New returns a client of the control plane behind a socket. It dials nothing
// until asked.
func New(socket string) *Client {
	c := &Client{socket: socket}
	c.http = &http.Client{Transport: &http.Transport{
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return c.dial(ctx) },
		DisableKeepAlives: true, // one question each; nothing to close
	}}
	return c
}

func (c *Client) dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", c.socket)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("%w at %s", ErrNotRunning, c.socket)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("open %s: only root may: %w", c.socket, fs.ErrPermission)
	}
	return conn, err
}

// Status of the chain, link by link.
func (c *Client) Status(ctx context.Context) (s admin.Status, err error) {
	return s, c.get(ctx, admin.PathStatus, nil, &s)
}

// Instances of a namespace, or of all when it is empty.
func (c *Client) Instances(ctx context.Context, namespace string) (list []admin.Instance, err error) {
	return list, c.get(ctx, admin.PathInstances, query("namespace", namespace), &list)
}

// Incidents of a namespace, or of all when it is empty.
func (c *Client) Incidents(ctx context.Context, namespace string) (list []admin.Incident, err error) {
	return list, c.get(ctx, admin.PathIncidents, query("namespace", namespace), &list)
}

// Why tells the story of an incident, workload, instance, refusal or digest.
func (c *Client) Why(ctx context.Context, namespace, subject string) (s admin.Story, err error) {
	return s, c.get(ctx, admin.PathWhy, query("subject", subject, "namespace", namespace), &s)
}

// Apply creates or changes the resources in YAML documents.
func (c *Client) Apply(ctx context.Context, documents []byte) (list []admin.Applied, err error) {
	return list, c.post(ctx, admin.PathApply, nil, "application/yaml", bytes.NewReader(documents), &list)
}

// Delete removes the resources named in YAML documents.
func (c *Client) Delete(ctx context.Context, documents []byte) (list []admin.Applied, err error) {
	return list, c.post(ctx, admin.PathDelete, nil, "application/yaml", bytes.NewReader(documents), &list)
}

// Release submits a tar of an OCI layout with its evidence to the gate.
func (c *Client) Release(ctx context.Context, namespace, application, image string, layout io.Reader) (r admin.Released, err error) {
	q := query("namespace", namespace, "application", application, "image", image)
	return r, c.post(ctx, admin.PathRelease, q, "application/x-tar", layout, &r)
}

// Restart replaces every instance of a workload.
func (c *Client) Restart(ctx context.Context, namespace, workload string) error {
	return c.post(ctx, admin.PathRestart, query("namespace", namespace, "workload", workload), "", nil, nil)
}

// Guard returns what of the guard policies is in force, on its way or lowered.
func (c *Client) Guard(ctx context.Context) (g admin.GuardState, err error) {
	return g, c.get(ctx, admin.PathGuard, nil, &g)
}

// Proposal is what was learnt under a guard policy.
func (c *Client) Proposal(ctx context.Context, policy string) (p admin.Proposal, err error) {
	return p, c.get(ctx, admin.PathProposal, url.Values{"policy": {policy}}, &p)
}

// Promote makes what was learnt the policy.
func (c *Client) Promote(ctx context.Context, in admin.Promote) (p admin.GuardPolicy, err error) {
	return p, c.postJSON(ctx, admin.PathPromote, in, &p)
}

// Rollout does something about a change of a guard policy.
func (c *Client) Rollout(ctx context.Context, in admin.Rollout) (p admin.GuardPolicy, err error) {
	return p, c.postJSON(ctx, admin.PathRollout, in, &p)
}

// Degrade turns a switch, and returns those that are turned then.
func (c *Client) Degrade(ctx context.Context, in admin.Degrade) (list []admin.GuardSwitch, err error) {
	return list, c.postJSON(ctx, admin.PathDegrade, in, &list)
}

func (c *Client) postJSON(ctx context.Context, path string, in, into any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return fmt.Errorf("ask %s: %w", path, err)
	}
	return c.post(ctx, path, nil, "application/json", bytes.NewReader(body), into)
}

// Ledger reads at most limit entries from an index on.
func (c *Client) Ledger(ctx context.Context, from uint64, limit int) (list []admin.LedgerEntry, err error) {
	q := query("from", strconv.FormatUint(from, 10), "limit", strconv.Itoa(limit))
	return list, c.get(ctx, admin.PathLedger, q, &list)
}

// LedgerTar streams the whole log, and says the public key it is signed with;
// the caller closes the stream.
func (c *Client) LedgerTar(ctx context.Context) (tar io.ReadCloser, key string, err error) {
	resp, err := c.do(ctx, http.MethodGet, admin.PathLedgerTar, nil, "", nil)
	if err != nil {
		return nil, "", err
	}
	return resp.Body, resp.Header.Get("Hauberk-Verifier-Key"), nil
}

// Logs streams what a workload wrote; the caller closes it.
func (c *Client) Logs(ctx context.Context, namespace, workload, instance string, follow bool) (io.ReadCloser, error) {
	q := query("namespace", namespace, "workload", workload, "instance", instance)
	if follow {
		q.Set("follow", "true")
	}
	return c.stream(ctx, http.MethodGet, admin.PathLogs, q, "", nil)
}

// Events is what the Guard of an instance told, one record a line.
func (c *Client) Events(ctx context.Context, namespace, instance string, follow bool) (io.ReadCloser, error) {
	q := query("namespace", namespace, "instance", instance)
	if follow {
		q.Set("follow", "true")
	}
	return c.stream(ctx, http.MethodGet, admin.PathEvents, q, "", nil)
}

// Tap is the requests of an instance as they pass, one a line; the caller closes
// it, which ends the tap.
func (c *Client) Tap(ctx context.Context, namespace, instance string) (io.ReadCloser, error) {
	return c.stream(ctx, http.MethodGet, admin.PathTap, query("namespace", namespace, "instance", instance), "", nil)
}

func (c *Client) get(ctx context.Context, path string, q url.Values, into any) error {
	return c.ask(ctx, http.MethodGet, path, q, "", nil, into)
}

func (c *Client) post(ctx context.Context, path string, q url.Values, kind string, body io.Reader, into any) error {
	return c.ask(ctx, http.MethodPost, path, q, kind, body, into)
}

func (c *Client) ask(ctx context.Context, method, path string, q url.Values, kind string, body io.Reader, into any) error {
	answer, err := c.stream(ctx, method, path, q, kind, body)
	if err != nil {
		return err
	}
	defer answer.Close()
	if into == nil {
		return nil
	}
	data, err := io.ReadAll(io.LimitReader(answer, maxAnswer+1))
	switch {
	case err != nil:
		return fmt.Errorf("read answer to %s: %w", path, err)
	case len(data) > maxAnswer:
		return fmt.Errorf("read answer to %s: more than %d bytes", path, maxAnswer)
	}
	if err := json.Unmarshal(data, into); err != nil {
		return fmt.Errorf("read answer to %s: %w", path, err)
	}
	return nil
}

func (c *Client) stream(ctx context.Context, method, path string, q url.Values, kind string, body io.Reader) (io.ReadCloser, error) {
	resp, err := c.do(ctx, method, path, q, kind, body)
	if err != nil {
		return nil, err
	}
	return resp.Body, nil
}

// do sends a request and returns an answer that is no refusal.
func (c *Client) do(ctx context.Context, method, path string, q url.Values, kind string, body io.Reader) (*http.Response, error) {
	req, err := request(ctx, method, path, q, body)
	if err != nil {
		return nil, err
	}
	if kind != "" {
		req.Header.Set("Content-Type", kind)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		var u *url.Error // says the method and a host that does not exist
		if errors.As(err, &u) {
			err = u.Err
		}
		return nil, err
	}
	if resp.StatusCode/100 != 2 {
		defer resp.Body.Close()
		return nil, refusal(resp)
	}
	return resp, nil
}

// request addresses a host that exists only by name: the dialer knows one way.
func request(ctx context.Context, method, path string, q url.Values, body io.Reader) (*http.Request, error) {
	u := url.URL{Scheme: "http", Host: "hauberk", Path: path, RawQuery: q.Encode()}
	return http.NewRequestWithContext(ctx, method, u.String(), body)
}

// refusal reads the *admin.Error of an answer, or makes one of what it got.
func refusal(resp *http.Response) error {
	data, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	var e admin.Error
	kind, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if kind == "application/json" && json.Unmarshal(data, &e) == nil && e.Message != "" {
		return &e
	}
	return fmt.Errorf("the control plane answered %s: %q", resp.Status, bytes.TrimSpace(data[:min(len(data), 512)]))
}

// query takes names and values in turn and leaves out what is empty.
func query(pairs ...string) url.Values {
	q := url.Values{}
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			q.Set(pairs[i], pairs[i+1])
		}
	}
	return q
}
