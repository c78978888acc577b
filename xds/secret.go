package xds

import (
	"context"
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"

	"hauberk.dev/xds/envoy"
)

// referSecrets works out which secrets are wanted: what is there or in force names
// them, and the proxy has no file of them.
func (st *store) referSecrets() {
	if st.o.Secrets == nil {
		return
	}
	names := map[string]bool{}
	add := func(all []string) {
		for _, name := range all {
			if st.o.Local == nil || !st.o.Local(name) {
				names[name] = true
			}
		}
	}
	for _, r := range st.shelves[envoy.Clusters].have {
		add(r.value.(*envoy.Cluster).Secrets())
	}
	for _, r := range st.shelves[envoy.Listeners].have {
		add(r.value.(*envoy.Listener).Secrets())
	}
	for _, c := range st.force.clusters {
		add(c.from.Secrets())
	}
	for _, l := range st.force.listeners {
		add(l.from.Secrets())
	}
	st.want(envoy.Secrets, names)
}

// lacks names a secret that is wanted and has not come; "" if none. One that the
// server says does not exist is waited for as well: without it nothing is proved.
func (st *store) lacks(names []string) string {
	s := &st.shelves[envoy.Secrets]
	for _, name := range names {
		if s.wanted[name] && s.have[name] == nil {
			return fmt.Sprintf("secrets %q", name)
		}
	}
	return ""
}

// secrets are a copy of those there are, and of those of before whose names are
// free.
func (st *store) secrets(before map[string]*resource) map[string]*resource {
	all := maps.Clone(st.shelves[envoy.Secrets].have)
	for name, r := range before {
		if all[name] == nil {
			all[name] = r
		}
	}
	return all
}

// inOrder are secrets in order, and what tells them from others.
func inOrder(have map[string]*resource) (all []*envoy.Secret, sum [sha256.Size]byte) {
	h := sha256.New()
	for _, name := range slices.Sorted(maps.Keys(have)) {
		all = append(all, have[name].value.(*envoy.Secret))
		fmt.Fprintf(h, "%q %x\n", name, have[name].sum)
	}
	h.Sum(sum[:0])
	return all, sum
}

// hand gives secrets to who asked for them, if they are others than before.
func (c *Client) hand(ctx context.Context, secrets map[string]*resource) error {
	all, sum := inOrder(secrets)
	if c.o.Secrets == nil || c.handed && c.hands == sum || !c.handed && len(all) == 0 {
		return nil
	}
	if err := c.o.Secrets(ctx, all); err != nil {
		return err
	}
	c.handed, c.hands = true, sum
	return nil
}
