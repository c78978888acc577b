// Package check proves on a running example that every link of the chain
// holds: it sends real payments through it, attacks it, and says of each what
// was seen.
//
// It believes nothing the system says of itself where it can look: an attack
// counts as stopped only if it had no effect and if there is a record of it.
package check

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"hauberk.dev/cmd/hauberk/internal/progress"
)

// Check is one thing to prove. Run says what was seen; an error says that the
// link does not hold, or that the attack was not stopped.
type Check struct {
	Name string
	Run  func(context.Context) (seen string, err error)
}

// Result is what became of a check.
type Result struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Seen   string `json:"seen"`
	Millis int64  `json:"millis"`
}

// Report is what became of all of them.
type Report struct {
	OK      bool     `json:"ok"`
	Links   []Result `json:"links"`
	Attacks []Result `json:"attacks"`
}

// Suite is what to prove, in order: the links, then the attacks, then the
// links that only an attack can show.
type Suite struct {
	Links   []Check
	Attacks []Check
	After   []Check
	// Restore leaves things as they were found.
	Restore func(context.Context) error
}

// within bounds one check.
const within = 90 * time.Second

// Run runs a suite. A suite without links or attacks has proved nothing, so
// its report is not ok.
func Run(ctx context.Context, s Suite, log *progress.Log) Report {
	var r Report
	each := func(what string, checks []Check) (results []Result) {
		for _, c := range checks {
			results = append(results, c.run(ctx, what, log))
		}
		return results
	}
	r.Links = each("link", s.Links)
	r.Attacks = each("attack", s.Attacks)
	r.Links = append(r.Links, each("link", s.After)...)
	if s.Restore != nil {
		if err := s.Restore(context.WithoutCancel(ctx)); err != nil {
			log.Say("restore: %v", err)
		}
	}
	r.OK = len(r.Links) > 0 && len(r.Attacks) > 0
	for _, result := range append(r.Links[:len(r.Links):len(r.Links)], r.Attacks...) {
		r.OK = r.OK && result.OK
	}
	return r
}

func (c Check) run(ctx context.Context, what string, log *progress.Log) Result {
	end := log.Step("checking %s %s", what, c.Name)
	began := time.Now()
	ctx, cancel := context.WithTimeoutCause(ctx, within, fmt.Errorf("not done within %v", within))
	defer cancel()
	seen, err := c.Run(ctx)
	if err != nil {
		if ctx.Err() != nil && !errors.Is(err, context.Cause(ctx)) {
			err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
		if seen != "" {
			seen += "; "
		}
		seen += strings.ReplaceAll(err.Error(), "\n", "; ")
	}
	_ = end(err)
	return Result{Name: c.Name, OK: err == nil, Seen: seen, Millis: time.Since(began).Milliseconds()}
}
