package node

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"time"

	"hauberk.dev/api/admin"
	"hauberk.dev/id"
)

// joinTime bounds how long a node waits for the control plane to admit it.
const joinTime = 60 * time.Second

// credential is the node's own identity: a key that never leaves its folder
// and a certificate that is asked for again at half its life.
type credential struct {
	conf Config
	key  *ecdsa.PrivateKey

	mu      sync.Mutex
	current id.Credential
	pem     []byte // roots
	domain  string
	renewAt time.Time
}

// join makes or loads the key and asks to be admitted, waiting for a control
// plane that is not up yet.
func join(ctx context.Context, c Config) (*credential, error) {
	key, err := id.LoadOrCreateKey(filepath.Join(c.State, "node.key"))
	if err != nil {
		return nil, err
	}
	k := &credential{conf: c, key: key}
	ctx, cancel := context.WithTimeout(ctx, joinTime)
	defer cancel()
	for {
		if err = k.renew(ctx); err == nil {
			return k, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("join control plane at %s: waited %s: %w", c.Join, joinTime, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// renew asks for a certificate over the control plane's socket.
func (k *credential) renew(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, k.key)
	if err != nil {
		return fmt.Errorf("renew node certificate: %w", err)
	}
	body, err := json.Marshal(admin.Join{Node: k.conf.Name, Request: csr})
	if err != nil {
		return fmt.Errorf("renew node certificate: %w", err)
	}
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", k.conf.Join)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://hauberkd"+admin.PathJoin, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("renew node certificate: %w", err)
	}
	resp, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("renew node certificate: %w", err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if err != nil {
		return fmt.Errorf("renew node certificate: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		return refusal(admin.PathJoin, resp.StatusCode, answer)
	}
	var j admin.Joined
	if err := json.Unmarshal(answer, &j); err != nil {
		return fmt.Errorf("renew node certificate: %w", err)
	}
	return k.take(j)
}

func (k *credential) take(j admin.Joined) error {
	chain, err := id.ParseChain(j.Chain)
	if err != nil {
		return fmt.Errorf("renew node certificate: %w", err)
	}
	roots, err := id.ParsePool([]byte(j.Roots))
	if err != nil {
		return fmt.Errorf("renew node certificate: %w", err)
	}
	now := time.Now()
	k.mu.Lock()
	defer k.mu.Unlock()
	k.current = id.Credential{
		Certificate: tls.Certificate{Certificate: j.Chain, PrivateKey: k.key, Leaf: chain[0]},
		Roots:       roots,
	}
	k.pem, k.domain = []byte(j.Roots), j.TrustDomain
	k.renewAt = now.Add(j.NotAfter.Sub(now) / 2)
	return nil
}

func (k *credential) source() (id.Credential, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.current, nil
}

func (k *credential) trustDomain() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.domain
}

func (k *credential) roots() []byte {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.pem
}

// control expects the control plane at the other end.
func (k *credential) control(n id.Name) error {
	want, err := id.Control(k.trustDomain())
	if err != nil {
		return err
	}
	return id.Only(want)(n)
}

func (k *credential) clientTLS() *tls.Config { return id.ClientTLS(k.source, k.control) }

func (k *credential) serverTLS() *tls.Config { return id.ServerTLS(k.source, k.control) }

// renewLoop renews at half life and keeps trying until it works.
func (k *credential) renewLoop(ctx context.Context) error {
	for {
		k.mu.Lock()
		wait := time.Until(k.renewAt)
		k.mu.Unlock()
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(max(wait, time.Second)):
		}
		if err := k.renew(ctx); err != nil && ctx.Err() == nil {
			fmt.Fprintf(k.conf.Log, "%v; trying again\n", err)
		}
	}
}
