// Package jwks keeps a file of an issuer's public keys true: it asks a URL for its
// JSON Web Key Set now and then, and writes what is good of it.
//
// Beside the keys the file says until when they hold. Who reads it takes no token
// after that: an issuer that cannot be asked for long is believed no more, even if
// the program that asks is gone as well. An answer that is late, too large, not a
// key set, or holds a secret changes nothing, and the reason is told.
package jwks

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/url"
	"sync"
	"time"

	"hauberk.dev/internal/atomicfile"
	"hauberk.dev/internal/token"
)

// Bounds.
const (
	DefaultRefresh = 5 * time.Minute
	DefaultMaxAge  = 24 * time.Hour
	MinRefresh     = 10 * time.Second
	maxSet         = token.MaxKeySet - 128 // with the moment the file holds until
	maxHeaders     = 16 << 10
	maxTag         = 1 << 10
	askTime        = 10 * time.Second
	retryMin       = time.Second
)

// Options of a Fetcher.
type Options struct {
	URL   string
	Roots *x509.CertPool // of the server; nil: those of the system
	File  string
	// Refresh is the time from one answer to the next question (0: DefaultRefresh),
	// MaxAge for how long an answer holds (0: DefaultMaxAge).
	Refresh, MaxAge time.Duration
	Log             *slog.Logger

	retry time.Duration // first wait after a failure; 0: retryMin
}

// Fetcher keeps one file.
type Fetcher struct {
	o      Options
	client *http.Client
	tag    string // of the answer in set
	set    []byte // the last good answer

	mu   sync.Mutex
	stat Status
}

// Status is what a fetcher knows of itself.
type Status struct {
	URL     string    `json:"url"`
	File    string    `json:"file"`
	Keys    int       `json:"keys"`
	Until   time.Time `json:"until,omitzero"` // the file holds
	Error   string    `json:"error,omitempty"`
	Fetched uint64    `json:"fetched"` // good answers
	Failed  uint64    `json:"failed"`
}

// Check says what is wrong with options.
func (o *Options) Check() error {
	u, err := url.Parse(o.URL)
	switch {
	case err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.Fragment != "":
		return fmt.Errorf("url: %q: want https:// without a user", o.URL)
	case o.File == "":
		return errors.New("file: is missing; the keys are kept there")
	case o.Refresh != 0 && o.Refresh < MinRefresh:
		return fmt.Errorf("refresh: %v is too often; want %v or more", o.Refresh, MinRefresh)
	case o.MaxAge < 0 || o.maxAge() < 2*o.refresh():
		return fmt.Errorf("max_age: %v: want twice refresh or more, or one late answer ends it", o.MaxAge)
	}
	return nil
}

func (o *Options) refresh() time.Duration {
	if o.Refresh == 0 {
		return DefaultRefresh
	}
	return o.Refresh
}

func (o *Options) maxAge() time.Duration {
	if o.MaxAge == 0 {
		return DefaultMaxAge
	}
	return o.MaxAge
}

// New makes a fetcher that does nothing yet.
func New(o Options) (*Fetcher, error) {
	if err := o.Check(); err != nil {
		return nil, fmt.Errorf("fetch keys: %w", err)
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.retry == 0 {
		o.retry = retryMin
	}
	return &Fetcher{o: o, stat: Status{URL: o.URL, File: o.File}, client: &http.Client{
		Timeout: askTime,
		Transport: &http.Transport{
			TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: o.Roots},
			MaxResponseHeaderBytes: maxHeaders, DisableKeepAlives: true, DisableCompression: true, ForceAttemptHTTP2: true,
		},
		// Keys come from whom they were asked of, and from nobody it names.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// Run asks until ctx ends.
func (f *Fetcher) Run(ctx context.Context) error {
	wait := f.o.retry
	for ctx.Err() == nil {
		err := f.once(ctx)
		if ctx.Err() != nil {
			return nil
		}
		pause := f.o.refresh()
		if err != nil {
			pause, wait = min(wait, pause), min(2*wait, pause)
			f.o.Log.Warn("keys of an issuer were not fetched; those there are hold until they are too old", "url", f.o.URL, "again in", pause, "err", err)
		} else {
			wait = f.o.retry
		}
		f.note(err)
		select {
		case <-ctx.Done():
		case <-time.After(pause - rand.N(pause/10+1)): // not all at the same time
		}
	}
	return nil
}

func (f *Fetcher) note(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.stat.Error = ""; err != nil {
		f.stat.Error = err.Error()
		f.stat.Failed++
		return
	}
	f.stat.Fetched++
}

// Status tells how things stand.
func (f *Fetcher) Status() Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.stat
}

// once asks, and writes the file if the answer is good.
func (f *Fetcher) once(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	asked := time.Now() // an answer is no younger than its question
	set, tag, err := f.ask(ctx)
	if err != nil {
		return err
	}
	until := asked.Add(f.o.maxAge())
	text, keys, err := Document(set, until)
	if err != nil {
		return err
	}
	if err := atomicfile.Write(f.o.File, text, 0o644); err != nil {
		return fmt.Errorf("keep keys: %w", err)
	}
	f.set, f.tag = set, tag
	f.mu.Lock()
	defer f.mu.Unlock()
	if keys != f.stat.Keys {
		f.o.Log.Info("keys of an issuer in force", "url", f.o.URL, "keys", keys, "until", until.UTC().Format(time.RFC3339))
	}
	f.stat.Keys, f.stat.Until = keys, until
	return nil
}

// ask is the server's answer, or the one before if it says that this still holds.
func (f *Fetcher) ask(ctx context.Context) (set []byte, tag string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, f.o.URL, nil)
	if err != nil {
		return nil, "", fmt.Errorf("ask for keys: %w", err)
	}
	req.Header.Set("Accept", "application/jwk-set+json, application/json")
	if f.tag != "" {
		req.Header.Set("If-None-Match", f.tag)
	}
	r, err := f.client.Do(req)
	if err != nil {
		return nil, "", fmt.Errorf("ask for keys: %w", err)
	}
	defer r.Body.Close()
	switch {
	case r.StatusCode == http.StatusNotModified && f.tag != "":
		return f.set, f.tag, nil
	case r.StatusCode >= 300 && r.StatusCode < 400:
		return nil, "", fmt.Errorf("ask for keys: status %d leads to %.200q, which is not followed", r.StatusCode, r.Header.Get("Location"))
	case r.StatusCode != http.StatusOK:
		return nil, "", fmt.Errorf("ask for keys: status %d", r.StatusCode)
	}
	if set, err = io.ReadAll(io.LimitReader(r.Body, maxSet+1)); err != nil {
		return nil, "", fmt.Errorf("ask for keys: %w", err)
	}
	if len(set) > maxSet {
		return nil, "", fmt.Errorf("ask for keys: over %d bytes", maxSet)
	}
	if tag = r.Header.Get("ETag"); len(tag) > maxTag {
		tag = ""
	}
	return set, tag, nil
}

// Document is the file for a key set: its keys, and until when they hold.
func Document(set []byte, until time.Time) (text []byte, keys int, err error) {
	var s struct {
		Keys  json.RawMessage `json:"keys"`
		Until int64           `json:"hauberk_until"`
	}
	if err := json.Unmarshal(set, &s); err != nil {
		return nil, 0, fmt.Errorf("read keys: %w", err)
	}
	s.Until = until.Unix()
	if text, err = json.Marshal(s); err != nil {
		return nil, 0, fmt.Errorf("read keys: %w", err)
	}
	// What the reader of the file will say of it.
	k, err := token.ParseKeys(append(text, '\n'))
	if err != nil {
		return nil, 0, err
	}
	return append(text, '\n'), k.Len(), nil
}
