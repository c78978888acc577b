package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"sync"

	"hauberk.dev/internal/svidlink"
	"hauberk.dev/xds"
	"hauberk.dev/xds/envoy"
)

// keeper joins what a Workload API and a control plane say of certificates, and
// hands it to the proxy. Keys are here in memory alone.
type keeper struct {
	log *slog.Logger
	hub svidlink.Hub

	mu       sync.Mutex
	workload *svidlink.Set // nil: none is asked, or it has not answered
	secrets  *svidlink.Set
	taken    *svidlink.Set // the secrets that the proxies had last; nil: none
}

// takeWorkload takes what the Workload API says. The set is the keeper's.
func (k *keeper) takeWorkload(s *svidlink.Set) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.take(&k.workload, s); err != nil {
		k.log.Error("the proxy keeps what it had", "err", err)
	}
}

// takeEnvoy takes the control plane's secrets, and returns when the proxies that
// ask here have them: what needs them may then come into force. Secrets that are
// refused give way to those the proxies had, so that nothing else is held up.
func (k *keeper) takeEnvoy(ctx context.Context, all []*envoy.Secret) error {
	s := &svidlink.Set{}
	for _, e := range all {
		if e.Chain != nil {
			s.Identities = append(s.Identities, svidlink.Identity{Name: e.Name, Chain: e.Chain, Key: bytes.Clone(e.Key)})
			continue
		}
		s.Bundles = append(s.Bundles, svidlink.Bundle{Name: e.Name, DER: e.Authorities})
	}
	k.mu.Lock()
	err := k.take(&k.secrets, s)
	k.mu.Unlock()
	if err != nil {
		return &xds.Refusal{Why: err.Error()}
	}
	ctx, cancel := context.WithTimeout(ctx, proxyTimeout)
	defer cancel()
	err = k.hub.Taken(ctx)
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case err == nil:
		if k.taken != nil && k.taken != s {
			k.taken.Clear()
		}
		k.taken = s
	case errors.Is(err, svidlink.ErrRefused):
		if back := k.take(&k.secrets, k.taken); back != nil {
			k.log.Error("give the proxy back what it had", "err", back)
		}
		return &xds.Refusal{Why: err.Error()}
	}
	return err
}

// take puts a set in place, if it can be handed over with the other; else all is as
// it was. What it replaces, or the set, is cleared, but for what is to be given
// back. k.mu is held.
func (k *keeper) take(place **svidlink.Set, s *svidlink.Set) error {
	old := *place
	*place = s
	err := k.hub.Put(k.joined())
	if err != nil {
		*place, old = old, s
	}
	if old != nil && old != k.taken && old != *place {
		old.Clear()
	}
	return err
}

// joined is a copy of all there is.
func (k *keeper) joined() *svidlink.Set {
	all := &svidlink.Set{}
	names, bundles := map[string]bool{}, map[string]bool{}
	for _, from := range []*svidlink.Set{k.workload, k.secrets} {
		if from == nil {
			continue
		}
		if all.Why == "" {
			all.Why = from.Why
		}
		part := from.Clone()
		for i, d := range part.Identities {
			if from == k.secrets && names[d.Name] {
				k.log.Error("a secret has the name of an identity of the Workload API, which goes first", "name", d.Name)
				clear(part.Identities[i].Key)
				continue
			}
			names[d.Name] = true
			all.Identities = append(all.Identities, d)
		}
		for _, b := range part.Bundles {
			if !bundles[b.Name] {
				bundles[b.Name] = true
				all.Bundles = append(all.Bundles, b)
			}
		}
	}
	return all
}

// clear forgets every key.
func (k *keeper) clear() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, s := range []*svidlink.Set{k.workload, k.secrets, k.taken} {
		if s != nil {
			s.Clear()
		}
	}
	k.hub.Clear()
}
