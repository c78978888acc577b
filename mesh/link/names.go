package link

import "sync"

// names is the set of instances the proxy may speak for.
type names struct {
	mu  sync.Mutex
	set map[string]bool
}

func (n *names) add(s string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.set == nil {
		n.set = map[string]bool{}
	}
	n.set[s] = true
}

func (n *names) remove(s string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.set, s)
}

func (n *names) has(s string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.set[s]
}
