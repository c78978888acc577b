// Command vault holds the key that signs the bank's receipts. The key is made
// when the vault starts and never leaves it.
package main

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"io"
	"net/http"

	"example.com/bank/run"
)

// maxPayload is the largest receipt that is signed.
const maxPayload = 4 << 10

func main() { run.Main("vault", serve) }

func serve(ctx context.Context) error {
	h, err := handler()
	if err != nil {
		return err
	}
	ln, err := run.Listen(":8200")
	if err != nil {
		return err
	}
	return run.HTTP(ctx, ln, h)
}

// Signature is the answer to POST /sign.
type Signature struct {
	Signature []byte `json:"signature"`
	KeyID     string `json:"keyId"`
}

func handler() (http.Handler, error) {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(der)
	id := hex.EncodeToString(sum[:])
	mux := http.NewServeMux()
	mux.HandleFunc("POST /sign", func(w http.ResponseWriter, r *http.Request) {
		payload, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxPayload))
		if err != nil || len(payload) == 0 {
			http.Error(w, "want 1 to 4096 bytes to sign", http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(Signature{Signature: ed25519.Sign(private, payload), KeyID: id})
	})
	mux.HandleFunc("GET /key", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/x-pem-file")
		pem.Encode(w, &pem.Block{Type: "PUBLIC KEY", Bytes: der})
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok\n") })
	return mux, nil
}
