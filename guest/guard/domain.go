package guard

import "syscall"

const (
	sectionDomains = 48
	domainSize     = 256 // of struct domain's text
	maxDomains     = 4096
)

// domain is a name of a list, the wrong way round, and its number.
type domain struct {
	id   []byte
	text string
}

func (p *policy) parseDomains(data []byte) error {
	c := &cursor{b: data}
	for range c.count(c.u32(), maxDomains) {
		d := domain{c.take(8), c.text()}
		if len(d.text) == 0 || len(d.text) > domainSize {
			c.bad = true
		}
		if c.bad {
			break
		}
		p.domains = append(p.domains, d)
	}
	if c.bad || len(c.b) != 0 {
		return fail("read", "guard policy's names", syscall.EBADMSG)
	}
	return nil
}

func (n *next) fillDomains() (err error) {
	if n.inner.domains, err = n.create("domains", len(n.p.domains)); err != nil {
		return err
	}
	for _, d := range n.p.domains {
		var key [4 + domainSize]byte
		put32(key[:], uint32(8*len(d.text)))
		copy(key[4:], d.text)
		if err := updateMap(n.inner.domains, key[:], d.id); err != nil {
			return fail("allow", "name", err)
		}
	}
	return nil
}
