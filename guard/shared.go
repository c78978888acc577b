package guard

import (
	"fmt"

	"hauberk.dev/api/spec"
)

// SharedGeneration is the generation of the n-th policy of an owner on a kernel
// that others share: the kernel tells the marks of two owners apart by it.
func SharedGeneration(owner, n uint32) uint64 { return uint64(owner)<<32 | uint64(n) }

// shared refuses what only a guest of its own can hold.
func (c *compiler) shared(p spec.GuardPolicy) {
	if p.Mode == "learn" {
		c.fault("mode", p.Mode, "nothing gathers on a shared kernel what a container does: use audit")
	}
	for i, f := range p.Files {
		if f.FIM {
			c.fault(fmt.Sprintf("files[%d].fim", i), f.Path, "nobody on a shared kernel looks at what a change left: deny w")
		}
	}
	if p.Exec != nil {
		for i, v := range p.Exec.Volumes {
			c.fault(fmt.Sprintf("exec.volumes[%d]", i), v, "on a shared kernel a volume may be another container's too: put the program into the image")
		}
	}
	if p.Net == nil {
		return
	}
	for i, e := range p.Net.Egress {
		if e.Service != "" {
			c.fault(fmt.Sprintf("net.egress[%d].service", i), e.Service, "a node's own kernel knows no services: name a range of addresses")
		}
		if e.Name != "" {
			c.fault(fmt.Sprintf("net.egress[%d].name", i), e.Name, "names are learnt for a whole kernel, which others share: name a range of addresses")
		}
	}
	if d := p.Net.DNS; d != nil && len(d.Servers) == 0 {
		c.fault("net.dns.servers", "", "there is no name server of a sandbox's own: name some")
	}
}
