package kube_test

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"net/http"
	"testing"
	"time"

	"hauberk.dev/kube"
	"hauberk.dev/kube/kubetest"
)

// caller is an HTTP client with an account.
func caller(t *testing.T, a kube.Access) *http.Client {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(a.Roots)
	config := &tls.Config{RootCAs: roots}
	if a.Certificate != nil {
		pair, err := tls.X509KeyPair(a.Certificate, a.Key)
		if err != nil {
			t.Fatal(err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 10 * time.Second}
}

func get(t *testing.T, a kube.Access, path string) (int, string) {
	t.Helper()
	resp, err := caller(t, a).Get(a.Server + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func TestReady(t *testing.T) {
	start := time.Now()
	api := kubetest.Start(t)
	t.Logf("ready after %v", time.Since(start))
	for _, path := range []string{"/version", "/apis", "/openapi/v3", "/openapi/v3/apis/hauberk.dev/v1alpha1", "/openapi/v3/apis/coordination.k8s.io/v1", "/apis/hauberk.dev/v1alpha1/workloads", "/api/v1/namespaces", "/readyz"} {
		code, body := get(t, api.Admin(), path)
		t.Log(path, code, len(body), body[:min(300, len(body))])
	}
}
