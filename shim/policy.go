package shim

import (
	"fmt"

	"hauberk.dev/api/node"
	"hauberk.dev/guard"
	"hauberk.dev/internal/strictjson"
)

// policyAnnotation holds the Guard's policies of a container, as the JSON of
// node.Guard. Without it the baseline holds. containerd hands on a pod's only
// if its configuration of the runtime names it.
const policyAnnotation = "hauberk.dev/guard-policy"

const maxPolicy = 1 << 20

// compilePolicy makes what the guest's agent puts in force.
func compilePolicy(annotations map[string]string) (guard.Compiled, error) {
	g := node.Guard{Generation: 1}
	if raw := annotations[policyAnnotation]; raw != "" {
		if err := strictjson.Decode([]byte(raw), maxPolicy, &g); err != nil {
			return guard.Compiled{}, fmt.Errorf("read annotation %s: %w", policyAnnotation, err)
		}
		// A machine that was kept ahead of demand has the baseline in force,
		// as the first generation.
		g.Generation = max(g.Generation, 2)
		if len(g.Policies) == 0 {
			return guard.Compiled{}, fmt.Errorf("read annotation %s: it holds no policy; leave it out for the baseline", policyAnnotation)
		}
	}
	return guard.Compile(g, guard.CompileFacts{})
}

// privilegedPolicy takes the baseline's place in a pod that gets a privileged
// container.
func privilegedPolicy() (guard.Compiled, error) {
	g := node.Guard{Generation: 2, Policies: []node.NamedGuardPolicy{{Name: "privileged", Spec: guard.Privileged()}}}
	return guard.Compile(g, guard.CompileFacts{})
}
