package node

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"time"

	api "hauberk.dev/api/mesh"
)

// tapEvery is how often the mesh is asked what has passed.
const tapEvery = 200 * time.Millisecond

// tapper is the mesh, as a tap needs it.
type tapper interface {
	Tap(ctx context.Context, instance string, tap uint64) (api.Tapped, error)
}

// tap writes the requests of an instance as they pass, until the person goes
// away. What a proxy says of them is only shown.
func (n *Node) tap(w http.ResponseWriter, r *http.Request) {
	instance := r.FormValue("instance")
	if _, ok := n.find(instance); !ok {
		refuse(w, http.StatusNotFound, "UnknownInstance", fmt.Errorf("instance %q does not run on %s", instance, n.conf.Name))
		return
	}
	n.mesh.mu.Lock()
	l := n.mesh.link
	n.mesh.mu.Unlock()
	if l == nil {
		refuse(w, http.StatusServiceUnavailable, "NoMesh", errNoMesh)
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	rc := http.NewResponseController(w)
	if err := follow(r.Context(), l, instance, w, rc.Flush); err != nil && r.Context().Err() == nil {
		n.note(err)
	}
}

// follow asks a proxy again and again.
func follow(ctx context.Context, t tapper, instance string, w io.Writer, flush func() error) error {
	id := rand.Uint64() | 1
	tick := time.NewTicker(tapEvery)
	defer tick.Stop()
	out := json.NewEncoder(w)
	for {
		passed, err := t.Tap(ctx, instance, id)
		if err != nil {
			return err
		}
		for i := range passed.Requests {
			if err := out.Encode(&passed.Requests[i]); err != nil {
				return fmt.Errorf("tap %s: %w", instance, err)
			}
		}
		if passed.Lost > 0 {
			if err := out.Encode(map[string]any{"instance": instance, "lost": passed.Lost}); err != nil {
				return fmt.Errorf("tap %s: %w", instance, err)
			}
		}
		if err := flush(); err != nil {
			return fmt.Errorf("tap %s: %w", instance, err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
