package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"hauberk.dev/api/admin"
	"hauberk.dev/kube"
	"hauberk.dev/ledger"
)

const (
	maxApply   = 4 << 20 // bytes of YAML
	maxPerPage = 1000
)

// desk is the HTTP server people's tools talk to, on a Unix socket. Whoever
// may open the socket and is root or the owner of this process is the
// administrator.
type desk struct{ c *Control }

func (d *desk) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+admin.PathStatus, d.answer(func(r *http.Request) (any, error) { return d.c.status(), nil }))
	mux.HandleFunc("GET "+admin.PathInstances, d.answer(func(r *http.Request) (any, error) {
		return d.c.instances(r.FormValue("namespace")), nil
	}))
	mux.HandleFunc("GET "+admin.PathIncidents, d.answer(func(r *http.Request) (any, error) {
		return d.c.incidents(r.FormValue("namespace")), nil
	}))
	mux.HandleFunc("GET "+admin.PathWhy, d.answer(func(r *http.Request) (any, error) {
		return d.c.why(namespaceOf(r), r.FormValue("subject"))
	}))
	mux.HandleFunc("GET "+admin.PathLedger, d.answer(d.ledgerPage))
	mux.HandleFunc("GET "+admin.PathLedgerTar, d.ledgerTar)
	mux.HandleFunc("POST "+admin.PathApply, d.answer(func(r *http.Request) (any, error) {
		return d.documents(r, d.c.store.Apply)
	}))
	mux.HandleFunc("POST "+admin.PathDelete, d.answer(func(r *http.Request) (any, error) {
		return d.documents(r, d.c.store.Remove)
	}))
	mux.HandleFunc("POST "+admin.PathRelease, d.answer(func(r *http.Request) (any, error) {
		return d.c.release(r.Context(), namespaceOf(r), r.FormValue("application"), r.FormValue("image"), r.Body)
	}))
	mux.HandleFunc("POST "+admin.PathRestart, d.answer(func(r *http.Request) (any, error) {
		return struct{}{}, d.c.restart(r.Context(), key{namespaceOf(r), r.FormValue("workload")})
	}))
	mux.HandleFunc("GET "+admin.PathGuard, d.answer(func(*http.Request) (any, error) { return d.c.guardState(), nil }))
	mux.HandleFunc("GET "+admin.PathProposal, d.answer(d.proposal))
	mux.HandleFunc("POST "+admin.PathPromote, d.answer(d.promote))
	mux.HandleFunc("POST "+admin.PathRollout, d.answer(d.rollout))
	mux.HandleFunc("POST "+admin.PathDegrade, d.answer(d.degrade))
	mux.HandleFunc("POST "+admin.PathJoin, d.answer(d.join))
	mux.HandleFunc("POST "+admin.PathExec, d.exec)
	mux.HandleFunc("GET "+admin.PathLogs, d.logs)
	mux.HandleFunc("GET "+admin.PathEvents, d.events)
	mux.HandleFunc("GET "+admin.PathTap, d.tap)
	return onlyOwner(mux)
}

func namespaceOf(r *http.Request) string { return orElse(r.FormValue("namespace"), "default") }

// answer encodes what f returns, or its refusal.
func (d *desk) answer(f func(*http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		out, err := f(r)
		if err != nil {
			refuseDesk(w, err)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(out) // a peer that went away is told nothing
	}
}

func refuseDesk(w http.ResponseWriter, err error) {
	e := &admin.Error{Reason: "Failed", Message: err.Error()}
	if own := (*admin.Error)(nil); errors.As(err, &own) {
		e = &admin.Error{Reason: own.Reason, Message: err.Error(), Fix: own.Fix}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusUnprocessableEntity)
	json.NewEncoder(w).Encode(e) // a peer that went away is told nothing
}

// documents reads YAML and does something with it.
func (d *desk) documents(r *http.Request, do func(context.Context, []byte) ([]kube.Applied, error)) (any, error) {
	yaml, err := io.ReadAll(io.LimitReader(r.Body, maxApply+1))
	if err != nil {
		return nil, fmt.Errorf("read documents: %w", err)
	}
	if len(yaml) > maxApply {
		return nil, &admin.Error{Reason: "TooLarge", Message: fmt.Sprintf("the documents are over %d bytes", maxApply), Fix: "apply them in several files"}
	}
	done, err := do(r.Context(), yaml)
	if fault := (*kube.DocumentError)(nil); errors.As(err, &fault) {
		return nil, &admin.Error{Reason: "Invalid", Message: err.Error(), Fix: "nothing was changed; correct the field and apply again"}
	}
	if err != nil {
		return nil, err
	}
	d.c.look()
	out := make([]admin.Applied, 0, len(done))
	for _, a := range done {
		out = append(out, admin.Applied{Kind: a.Kind, Namespace: a.Namespace, Name: a.Name, Result: a.Result})
	}
	return out, nil
}

func (d *desk) ledgerPage(r *http.Request) (any, error) {
	from, limit := uint64(0), 100
	for _, f := range []struct {
		name string
		set  func(uint64)
	}{{"from", func(n uint64) { from = n }}, {"limit", func(n uint64) { limit = int(min(max(n, 1), maxPerPage)) }}} {
		v := r.FormValue(f.name)
		if v == "" {
			continue
		}
		n, err := strconv.ParseUint(v, 10, 62)
		if err != nil {
			return nil, &admin.Error{Reason: "BadNumber", Message: fmt.Sprintf("%s: %q is not a number", f.name, v), Fix: "use digits only"}
		}
		f.set(n)
	}
	page := []admin.LedgerEntry{}
	err := d.c.log.Scan(from, func(at uint64, e ledger.Entry) error {
		raw, err := json.Marshal(e)
		if err != nil {
			return fmt.Errorf("encode entry %d: %w", at, err)
		}
		page = append(page, admin.LedgerEntry{Index: at, Entry: raw})
		if len(page) == limit {
			return errEnough
		}
		return nil
	})
	if err != nil && !errors.Is(err, errEnough) && !errors.Is(err, ledger.ErrRange) {
		return nil, err
	}
	return page, nil
}

var errEnough = errors.New("enough")

func (d *desk) ledgerTar(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/x-tar")
	w.Header().Set("Hauberk-Verifier-Key", d.c.log.VerifierKey())
	d.c.note(d.c.log.Archive(w))
}

// listenDesk opens the socket with a mode that lets nobody else in.
func listenDesk(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if c, err := net.Dial("unix", path); err == nil {
		c.Close()
		return nil, fmt.Errorf("listen on %s: another hauberkd answers there: stop it first, or choose another --run", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	old := syscall.Umask(0o177)
	defer syscall.Umask(old)
	ln, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return ln, nil
}

type peerKey struct{}

// withPeer remembers who connected, as the kernel says.
func withPeer(ctx context.Context, c net.Conn) context.Context {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return ctx
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return ctx
	}
	var cred *syscall.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, credErr = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	})
	if err != nil || credErr != nil {
		return ctx
	}
	return context.WithValue(ctx, peerKey{}, cred.Uid)
}

// onlyOwner lets in root and the user this process runs as.
func onlyOwner(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		uid, known := r.Context().Value(peerKey{}).(uint32)
		if !known || uid != 0 && uid != uint32(os.Geteuid()) {
			refuseDesk(w, &admin.Error{Reason: "NotAllowed", Message: fmt.Sprintf("user %d may not administer this control plane", uid), Fix: "run the command as root"})
			return
		}
		next.ServeHTTP(w, r)
	})
}
