package guard

import (
	"fmt"

	"hauberk.dev/api/spec"
)

// later refuses what a policy may say and the programs cannot hold yet. A field
// leaves this list with the commit that holds it.
func (c *compiler) later(p spec.GuardPolicy) {
	said := map[string]bool{"mode learn": p.Mode == "learn"}
	for i, f := range p.Files {
		said[fmt.Sprintf("files[%d].fim", i)] = f.FIM
	}
	for field, is := range said {
		if is {
			c.faults = append(c.faults, fmt.Errorf("policy %q: %s: this is not held yet", c.name, field))
		}
	}
}
