package mesh

import (
	"fmt"
	"slices"
	"strings"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/inspect"
)

// Bounds of what showing requests may cost.
const (
	maxTaps      = 16  // at once, over all
	maxTapped    = 256 // requests that wait for one tap
	tapPatience  = 5 * time.Second
	maxTapBytes  = 512 << 10 // of them; six times as many as JSON, which the link takes
	maxTapFields = 64
	maxTapName   = 128
	maxTapValue  = 256
)

// tapRing holds what one tap has not been told yet.
type tapRing struct {
	instance string
	asked    time.Time
	waiting  []api.Request
	bytes    int // of waiting
	lost     uint64
}

// tap begins or goes on with a tap.
func (p *Proxy) tap(instance string, id uint64) (*api.Tapped, error) {
	p.mu.Lock()
	known := p.sandboxes[instance] != nil
	p.mu.Unlock()
	if !known {
		return nil, fmt.Errorf("instance %q is not here", instance)
	}
	o := &p.observer
	now := time.Now()
	o.sweep(now)
	o.mu.Lock()
	defer o.mu.Unlock()
	r := o.rings[id]
	if r == nil {
		if len(o.rings) >= maxTaps {
			return nil, fmt.Errorf("%d taps are open already", maxTaps)
		}
		if o.rings == nil {
			o.rings = map[uint64]*tapRing{}
		}
		r = &tapRing{instance: instance}
		o.rings[id] = r
		o.taps.Add(1)
	}
	if r.instance != instance {
		return nil, fmt.Errorf("tap %d is of another instance", id)
	}
	t := &api.Tapped{Requests: r.waiting, Lost: r.lost}
	r.asked, r.waiting, r.bytes, r.lost = now, nil, 0, 0
	return t, nil
}

// sweep ends taps that nobody asks for any more.
func (o *observer) sweep(now time.Time) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for id, r := range o.rings {
		if now.Sub(r.asked) > o.patience {
			delete(o.rings, id)
			o.taps.Add(-1)
		}
	}
}

// tapped gives a request to who listens.
func (o *observer) tapped(r api.Request) {
	now, size := time.Now(), sizeOf(&r)
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, ring := range o.rings {
		switch {
		case ring.instance != r.Instance || now.Sub(ring.asked) > o.patience:
		case len(ring.waiting) >= maxTapped || ring.bytes+size > maxTapBytes:
			ring.lost++
		default:
			ring.waiting = append(ring.waiting, r)
			ring.bytes += size
		}
	}
}

// sizeOf is what a request takes of the room of a tap: its texts, and the words
// of JSON around them.
func sizeOf(r *api.Request) int {
	n := 512 + len(r.Instance) + len(r.Service) + len(r.Protocol) + len(r.Peer) + len(r.Source) + len(r.Method) + len(r.Path) + len(r.Rule) + len(r.Reason) + len(r.GRPC)
	for i := range r.Header {
		n += 24 + len(r.Header[i].Name) + len(r.Header[i].Value)
	}
	return n
}

// shown are the fields of a request as a tap may show them: copies, so that what
// was cut off does not wait too. Nobody gets to see a token of the service's own
// issuers, what has the name of a secret, or the query of an address.
func (s *sight) shown(l letter) (all []api.Header) {
	var tokens map[string]*issuer
	if of := s.a.service(); of != nil {
		tokens = of.issuers
	}
	l.each(func(name, value string) {
		if len(all) >= maxTapFields || strings.HasPrefix(name, ":") {
			return
		}
		secret := inspect.IsSecret(name)
		for _, i := range tokens {
			secret = secret || i != nil && i.Header == name
		}
		if secret {
			value = "(not shown)"
		} else if slices.Contains(addresses[:], name) {
			value = pathOf(value)
		}
		all = append(all, api.Header{Name: strings.Clone(name[:min(len(name), maxTapName)]), Value: strings.Clone(value[:min(len(value), maxTapValue)])})
	})
	return all
}

// addresses are fields whose values are addresses, which have queries.
var addresses = [...]string{"referer", "x-original-url", "x-original-uri", "x-rewrite-url", "x-forwarded-uri", "x-forwarded-url"}
