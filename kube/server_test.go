package kube_test

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"net/http"
	"os"
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

func TestMain(m *testing.M) {
	kube.SetLog(nil)
	os.Exit(m.Run())
}

// TestEmbedded runs the suite against the server of embedded mode.
func TestEmbedded(t *testing.T) {
	start := time.Now()
	api := kubetest.Start(t)
	t.Logf("ready after %v", time.Since(start))
	suite(t, api.Admin())
}
