package guard

import (
	"fmt"

	"hauberk.dev/api/spec"
)

// later refuses what a policy may say and the programs cannot hold yet. A field leaves this
// list with the commit that holds it.
func (c *compiler) later(p spec.GuardPolicy) {
	for i, f := range p.Files {
		if f.FIM {
			c.fault(fmt.Sprintf("files[%d].fim", i), "true", "changes are not recorded yet: deny w, or leave it out")
		}
	}
}
