package check

import (
	"hauberk.dev/cmd/hauberk/internal/client"
	"hauberk.dev/cmd/hauberk/internal/deploy"
)

// Target is what the checks look at and attack.
type Target struct {
	Client   *client.Client
	Deployer *deploy.Deployer
	Example  *deploy.Example
}

// Bank is the suite for examples/bank.
func Bank(t Target) Suite {
	return Suite{}
}
