package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"hauberk.dev/kube"
	"hauberk.dev/ledger"
)

const (
	entries = 300
	opens   = 3
)

// records times what every act waits for: an entry of the ledger on the disk;
// and what every start waits for: the API.
func records(ctx context.Context, l *lab) ([]figure, error) {
	written, err := appends(ctx, l)
	if err != nil {
		return nil, err
	}
	ready, err := opensAPI(ctx, l)
	if err != nil {
		return written, err
	}
	return append(written, spread("embedded API, open to ready", "ms", "a new store each time; the first also fills caches", ready)), nil
}

// appends writes entries, and beside each as many bytes to a plain file with
// fsync, which is what the disk makes of it.
func appends(ctx context.Context, l *lab) (_ []figure, err error) {
	signer, err := ledger.LoadOrCreateSigner(filepath.Join(l.dir, "ledger.key"), "bench.local/ledger")
	if err != nil {
		return nil, err
	}
	log, err := ledger.Open(filepath.Join(l.dir, "ledger"), "bench.local/ledger", signer)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	plain, err := os.Create(filepath.Join(l.dir, "plain"))
	if err != nil {
		return nil, err
	}
	defer plain.Close()
	entry := ledger.Entry{Kind: "bench.append", Actor: "bench", Subject: "spiffe://bench.local/ns/bench/sa/web", Workload: "web",
		Text: "an entry as long as those of a running system are, which is a few hundred bytes"}
	var ours, theirs []float64
	for i := range entries {
		entry.Time, entry.Instance = time.Now(), fmt.Sprintf("web-%d", i)
		began := time.Now()
		if _, err := log.Append(ctx, entry); err != nil {
			return nil, err
		}
		ours = append(ours, ms(time.Since(began)))
		began = time.Now()
		if _, err := plain.Write(make([]byte, 400)); err != nil {
			return nil, err
		}
		if err := plain.Sync(); err != nil {
			return nil, err
		}
		theirs = append(theirs, ms(time.Since(began)))
	}
	a, b := spread("ledger append, on the disk", "ms", "", ours), spread("400 bytes to a file, fsync", "ms", "", theirs)
	a.Note = a.ratio(b)
	return []figure{a, b}, nil
}

// opensAPI opens the embedded API server some times, each on an empty store.
func opensAPI(ctx context.Context, l *lab) (ready []float64, err error) {
	ca, err := newAuthority()
	if err != nil {
		return nil, err
	}
	cert, key, err := ca.pair("loopback")
	if err != nil {
		return nil, err
	}
	kube.SetLog(nil)
	for i := range opens {
		took, err := openAPI(ctx, kube.Options{Dir: filepath.Join(l.dir, fmt.Sprintf("api-%d", i)), Address: "127.0.0.1:0",
			Certificate: cert, Key: key, ClientRoots: ca.roots()})
		if err != nil {
			return ready, err
		}
		ready = append(ready, ms(took))
	}
	return ready, nil
}

func openAPI(ctx context.Context, o kube.Options) (took time.Duration, err error) {
	began := time.Now()
	server, err := kube.Open(o)
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx) }()
	select {
	case <-server.Ready():
		took = time.Since(began)
		cancel()
		err = <-done
	case err = <-done:
		err = fmt.Errorf("the API ended before it was ready: %w", err)
	}
	return took, err
}
