package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"regexp"

	wire "hauberk.dev/api/node"
	"hauberk.dev/evidence"
	"hauberk.dev/id"
)

// maxRequest bounds the body of a node's call, in bytes.
const maxRequest = 1 << 20

// door is the HTTPS server that nodes talk to. Who calls is known from the
// certificate alone; a body that claims another node is refused.
type door struct {
	c        *Control
	registry http.Handler
}

func (d *door) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+wire.PathHello, handle(d.hello))
	mux.HandleFunc("POST "+wire.PathStatus, handle(d.status))
	mux.HandleFunc("POST "+wire.PathCSR, handle(d.csr))
	mux.HandleFunc("POST "+wire.PathReport, handle(d.report))
	mux.HandleFunc("POST "+wire.PathLearnt, handle(d.learnt))
	mux.HandleFunc("POST "+wire.PathReceipt, d.receipt)
	mux.HandleFunc("GET "+wire.PathWatch, d.watch)
	mux.Handle(wire.PathRegistry, d.registry)
	return d.afterFill(mux)
}

// afterFill lets calls wait until the control plane knows its instances:
// before that it would disown every one of them.
func (d *door) afterFill(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-d.c.filled:
			next.ServeHTTP(w, r)
		case <-r.Context().Done():
		}
	})
}

// none is the answer of a call that has nothing to say.
type none struct{}

// handle decodes a call strictly, names the calling node and encodes the
// answer or the refusal.
func handle[In, Out any](f func(ctx context.Context, node string, in In) (Out, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		node, err := caller(r)
		if err != nil {
			refuse(w, http.StatusForbidden, "NotANode", err)
			return
		}
		var in In
		d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequest))
		d.DisallowUnknownFields()
		if err := d.Decode(&in); err != nil {
			refuse(w, http.StatusBadRequest, "BadRequest", fmt.Errorf("decode %s: %w", r.URL.Path, err))
			return
		}
		out, err := f(r.Context(), node, in)
		if err != nil {
			// Only what was decided is a refusal. What went wrong here, such as
			// a full disk, the node must try again.
			status := http.StatusInternalServerError
			if own := (*wire.Error)(nil); errors.As(err, &own) {
				status = http.StatusConflict
			}
			refuse(w, status, "Failed", err)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(out) // a peer that went away is told nothing
	}
}

// caller is the node whose certificate the connection proved.
func caller(r *http.Request) (string, error) {
	if r.TLS == nil {
		return "", errors.New("name caller: the connection is not TLS")
	}
	name, err := id.PeerName(r.TLS)
	if err != nil {
		return "", fmt.Errorf("name caller: %w", err)
	}
	if name.Kind() != id.KindNode {
		return "", fmt.Errorf("name caller: %s is not a node", name)
	}
	return name.Node(), nil
}

// refuse answers with an error that people can act on. An error that carries
// its own reason keeps it.
func refuse(w http.ResponseWriter, status int, reason string, err error) {
	e := wire.Error{Reason: reason, Message: err.Error()}
	if own := (*wire.Error)(nil); errors.As(err, &own) {
		e.Reason = own.Reason
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(e) // a peer that went away is told nothing
}

func (d *door) hello(_ context.Context, node string, in wire.Hello) (none, error) {
	if err := d.c.hub.hello(node, in); err != nil {
		return none{}, &wire.Error{Reason: "HelloRefused", Message: err.Error()}
	}
	return none{}, nil
}

// maxMessage bounds what a node says of an instance, in bytes.
const maxMessage = 16 << 10

var reasonPattern = regexp.MustCompile(`^([A-Z][A-Za-z0-9]{0,62})?$`)

func (d *door) status(_ context.Context, node string, in wire.Status) (none, error) {
	for n, i := range in.Instances {
		switch i.Phase {
		case wire.PhasePending, wire.PhaseRunning, wire.PhaseRefused, wire.PhaseFailed, wire.PhaseExited, wire.PhaseContained:
		default:
			return none{}, &wire.Error{Reason: "StatusInvalid", Message: fmt.Sprintf("status of %s: instance %q: phase %.40q is unknown", node, i.ID, i.Phase)}
		}
		if !reasonPattern.MatchString(i.Reason) {
			return none{}, &wire.Error{Reason: "StatusInvalid", Message: fmt.Sprintf("status of %s: instance %q: reason %.80q is not one CamelCase word", node, i.ID, i.Reason)}
		}
		in.Instances[n].Message = clip(i.Message, maxMessage)
	}
	if s := in.Spares; s.Machines < 0 || s.MiB < 0 {
		return none{}, &wire.Error{Reason: "StatusInvalid", Message: fmt.Sprintf("status of %s: %d spare machines with %d MiB", node, s.Machines, s.MiB)}
	}
	d.c.hub.status(node, in)
	return none{}, nil
}

func (d *door) csr(ctx context.Context, node string, in wire.CSR) (wire.Certificate, error) {
	return d.c.issue(ctx, node, in)
}

func (d *door) report(ctx context.Context, node string, in wire.Report) (none, error) {
	return none{}, d.c.violation(ctx, node, in)
}

// receipt is checked against the key of this very connection's certificate,
// which is the node's own.
func (d *door) receipt(w http.ResponseWriter, r *http.Request) {
	handle(func(ctx context.Context, node string, in wire.Receipt) (none, error) {
		key, err := evidence.NewKey(r.TLS.PeerCertificates[0].PublicKey, "node "+node)
		if err != nil {
			return none{}, err
		}
		return none{}, d.c.receipt(ctx, node, in, key)
	})(w, r)
}

func (d *door) watch(w http.ResponseWriter, r *http.Request) {
	node, err := caller(r)
	if err != nil {
		refuse(w, http.StatusForbidden, "NotANode", err)
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	// The node reconnects when the watch ends, so its end is not an error here.
	d.c.note(d.c.hub.watch(r.Context(), node, w, http.NewResponseController(w).Flush))
}
