package node

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	wire "hauberk.dev/api/node"
)

const (
	maxBody    = 1 << 20  // of a reply
	maxDesired = 64 << 20 // of one line of the watch
	callTime   = 15 * time.Second
	// quietTime is how long the watch may be silent: the control plane sends
	// an empty line at least every five seconds.
	quietTime = 20 * time.Second
)

// uplink is the node's side of the protocol with the control plane.
type uplink struct {
	base string // https://host:port
	http *http.Client
	// quiet is how long the watch may be silent.
	quiet time.Duration
}

func newUplink(address string, conf *tls.Config) *uplink {
	return &uplink{
		base: "https://" + address, quiet: quietTime,
		http: &http.Client{Transport: &http.Transport{
			TLSClientConfig:     conf,
			MaxIdleConnsPerHost: 8,
			IdleConnTimeout:     time.Minute,
		}},
	}
}

// call posts in and decodes the answer into out, which may be nil.
func (u *uplink) call(ctx context.Context, path string, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	body, err := json.Marshal(in)
	if err != nil {
		return fmt.Errorf("call %s: %w", path, err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, u.base+path, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("call %s: %w", path, err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := u.http.Do(req)
	if err != nil {
		return fmt.Errorf("call %s: %w", path, err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if err != nil {
		return fmt.Errorf("call %s: read answer: %w", path, err)
	}
	if resp.StatusCode != http.StatusOK {
		return refusal(path, resp.StatusCode, answer)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(answer, out); err != nil {
		return fmt.Errorf("call %s: decode answer: %w", path, err)
	}
	return nil
}

// refusal reads an answer that is no success. Only what the control plane
// decided is a *wire.Error; what went wrong there may go well the next time.
func refusal(path string, status int, body []byte) error {
	var e wire.Error
	if status < http.StatusInternalServerError && json.Unmarshal(body, &e) == nil && e.Message != "" {
		return fmt.Errorf("call %s: %w", path, &e)
	}
	return fmt.Errorf("call %s: status %d: %.200q", path, status, body)
}

// watch holds the watch open and hands on every desired state until the
// connection ends or ctx does. It always returns an error.
func (u *uplink) watch(ctx context.Context, hello wire.Hello, handle func(wire.Desired)) error {
	if err := u.call(ctx, wire.PathHello, hello, nil); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.base+wire.PathWatch, nil)
	if err != nil {
		return fmt.Errorf("watch: %w", err)
	}
	quiet := time.AfterFunc(u.quiet, cancel) // a silent peer is a dead peer
	defer quiet.Stop()
	resp, err := u.http.Do(req)
	if err != nil {
		return fmt.Errorf("watch: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		body, _ := io.ReadAll(io.LimitReader(resp.Body, maxBody)) // the status says enough
		return refusal(wire.PathWatch, resp.StatusCode, body)
	}
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(make([]byte, 64<<10), maxDesired)
	for lines.Scan() {
		quiet.Reset(u.quiet)
		if len(lines.Bytes()) == 0 {
			continue
		}
		var d wire.Desired
		if err := json.Unmarshal(lines.Bytes(), &d); err != nil {
			return fmt.Errorf("watch: decode desired state: %w", err)
		}
		handle(d)
	}
	return fmt.Errorf("watch: %w", errors.Join(lines.Err(), io.ErrUnexpectedEOF))
}
