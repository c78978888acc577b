package jwks

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"hauberk.dev/internal/token"
)

// keySet is a set of one key, named after id.
func keySet(t testing.TB, id string) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	b := base64.RawURLEncoding.EncodeToString
	return fmt.Sprintf(`{"keys": [{"kty": "EC", "crv": "P-256", "kid": %q, "x": %q, "y": %q}], "other": true}`, id, b(raw[1:33]), b(raw[33:]))
}

// server answers as answer says.
type server struct {
	*httptest.Server
	roots *x509.CertPool

	mu     sync.Mutex
	answer http.HandlerFunc
	asked  int
	unsent int // 304
}

func newServer(t *testing.T) *server {
	t.Helper()
	s := &server{roots: x509.NewCertPool()}
	s.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.asked++
		answer := s.answer
		s.mu.Unlock()
		answer(w, r)
	}))
	s.Config.ErrorLog = nil
	s.roots.AddCert(s.Certificate())
	t.Cleanup(s.Close)
	return s
}

func (s *server) say(h http.HandlerFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answer = h
}

func text(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status); w.Write([]byte(body)) }
}

func fetcher(t *testing.T, s *server, file string) *Fetcher {
	t.Helper()
	f, err := New(Options{URL: s.URL + "/jwks", Roots: s.roots, File: file, Refresh: time.Hour, MaxAge: 3 * time.Hour, retry: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// TestAnswers keeps the last good answer, whatever comes after it, and says why.
func TestAnswers(t *testing.T) {
	s, file := newServer(t), filepath.Join(t.TempDir(), "keys.json")
	f := fetcher(t, s, file)
	s.say(text(200, keySet(t, "one")))
	begin := time.Now()
	if err := f.once(context.Background()); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(file)
	if err != nil || !bytes.Contains(good, []byte(`"one"`)) || bytes.Contains(good, []byte("other")) {
		t.Fatalf("%s, %v", good, err)
	}
	keys, err := token.ParseKeys(good)
	if err != nil || keys.Len() != 1 || keys.Check(begin.Add(2*time.Hour)) != nil || keys.Check(time.Now().Add(4*time.Hour)) == nil {
		t.Errorf("%v: they hold until %v, %v", err, keys.Check(begin.Add(2*time.Hour)), keys.Check(time.Now().Add(4*time.Hour)))
	}
	elsewhere := newServer(t)
	elsewhere.say(text(200, keySet(t, "evil")))
	for why, answer := range map[string]http.HandlerFunc{
		"status 500":       text(500, keySet(t, "a")),
		"status 204":       text(204, ""),
		"status 304":       text(304, ""), // nothing was asked that it could answer
		"over 65408 bytes": text(200, strings.Repeat(" ", maxSet)+keySet(t, "a")),
		"read keys":        text(200, "<html>"),
		"none for":         text(200, `{"keys": []}`),
		"unexpected end":   text(200, `{"keys": [`),
		"is a secret":      text(200, `{"keys": [{"kty": "oct", "k": "AAAA"}]}`),
		"is not followed":  func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, elsewhere.URL, http.StatusFound) },
		"unexpected EOF": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			w.Write([]byte("{"))
		},
		"server response he": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X", strings.Repeat("x", 64<<10))
			w.Write([]byte(keySet(t, "a")))
		},
	} {
		s.say(answer)
		if err := f.once(context.Background()); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %v", why, err)
		}
		if now, err := os.ReadFile(file); err != nil || !bytes.Equal(now, good) {
			t.Errorf("%s: the file has changed: %s, %v", why, now, err)
		}
	}
	if elsewhere.asked > 0 {
		t.Error("a redirection was followed")
	}
	// One whose certificate nobody has vouched for.
	stranger := fetcher(t, s, file)
	stranger.client.Transport.(*http.Transport).TLSClientConfig.RootCAs = x509.NewCertPool()
	if err := stranger.once(context.Background()); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("an unknown server: %v", err)
	}
	// One that does not answer in time.
	f.client.Timeout = 20 * time.Millisecond
	s.say(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	if err := f.once(context.Background()); err == nil || !strings.Contains(err.Error(), "exceeded") {
		t.Errorf("a server that says nothing: %v", err)
	}
}

// TestUnchanged asks only whether the answer is another, and goes on believing it
// for as long again.
func TestUnchanged(t *testing.T) {
	s, file := newServer(t), filepath.Join(t.TempDir(), "keys.json")
	f := fetcher(t, s, file)
	set := keySet(t, "one")
	s.say(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("If-None-Match") == `"1"` {
			s.mu.Lock()
			s.unsent++
			s.mu.Unlock()
			w.WriteHeader(http.StatusNotModified)
			return
		}
		w.Header().Set("ETag", `"1"`)
		w.Write([]byte(set))
	})
	for range 2 {
		if err := f.once(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	first := f.Status().Until
	f.o.MaxAge = 5 * time.Hour
	if err := f.once(context.Background()); err != nil {
		t.Fatal(err)
	}
	if got := f.Status().Until; !got.After(first) || s.unsent != 2 {
		t.Errorf("until %v, then %v; %d answers without a body", first, got, s.unsent)
	}
}

// TestRun goes on after a server that fails, and ends when it is told to.
func TestRun(t *testing.T) {
	s, file := newServer(t), filepath.Join(t.TempDir(), "keys.json")
	f := fetcher(t, s, file)
	s.say(text(503, ""))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	until(t, "two failures", func() bool { return f.Status().Failed > 1 && strings.Contains(f.Status().Error, "503") })
	s.say(text(200, keySet(t, "late")))
	until(t, "an answer", func() bool { return f.Status().Fetched == 1 && f.Status().Keys == 1 && f.Status().Error == "" })
}

func until(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !cond(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

func TestOptions(t *testing.T) {
	good := Options{URL: "https://login.example/keys?x=1", File: "f"}
	if err := good.Check(); err != nil {
		t.Error(err)
	}
	for why, edit := range map[string]func(*Options){
		"https":   func(o *Options) { o.URL = "http://login.example/" },
		"user":    func(o *Options) { o.URL = "https://me:secret@login.example/" },
		"url":     func(o *Options) { o.URL = "" },
		"file":    func(o *Options) { o.File = "" },
		"refresh": func(o *Options) { o.Refresh = time.Second },
		"max_age": func(o *Options) { o.MaxAge = time.Minute },
	} {
		o := good
		edit(&o)
		if err := o.Check(); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %v", why, err)
		}
	}
}

// FuzzDocument proves that what is written is read, says until when it holds, and
// holds no secret.
func FuzzDocument(f *testing.F) {
	f.Add([]byte(keySet(f, "one")))
	f.Add([]byte(`{"keys": [{"kty": "oct", "k": "AAAA"}], "hauberk_until": 99999999999}`))
	f.Add([]byte(`{"KEYS": [], "keys": null}`))
	f.Fuzz(func(t *testing.T, set []byte) {
		if len(set) > maxSet {
			return
		}
		until := time.Unix(2_000_000_000, 0)
		b, n, err := Document(set, until)
		if err != nil {
			return
		}
		keys, err := token.ParseKeys(b)
		if err != nil || keys.Len() != n || n == 0 {
			t.Fatalf("%q was written as %q: %d keys, %v", set, b, keys.Len(), err)
		}
		if keys.Check(until.Add(-time.Second)) != nil || keys.Check(until) == nil {
			t.Errorf("%q was written as %q, which holds until another time", set, b)
		}
	})
}
