package main

import (
	"crypto/ed25519"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestSign(t *testing.T) {
	h, err := handler()
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(h)
	defer srv.Close()
	resp, err := http.Get(srv.URL + "/key")
	if err != nil {
		t.Fatal(err)
	}
	raw, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	block, _ := pem.Decode(raw)
	if block == nil {
		t.Fatalf("key is %q", raw)
	}
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	resp, err = http.Post(srv.URL+"/sign", "application/octet-stream", strings.NewReader("receipt"))
	if err != nil {
		t.Fatal(err)
	}
	var s Signature
	json.NewDecoder(resp.Body).Decode(&s)
	resp.Body.Close()
	if !ed25519.Verify(key.(ed25519.PublicKey), []byte("receipt"), s.Signature) || len(s.KeyID) != 64 {
		t.Errorf("signature is %+v", s)
	}
	for _, body := range []string{"", strings.Repeat("x", maxPayload+1)} {
		resp, err := http.Post(srv.URL+"/sign", "application/octet-stream", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusBadRequest {
			t.Errorf("%d bytes: %s", len(body), resp.Status)
		}
	}
}
