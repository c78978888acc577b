package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strconv"

	"hauberk.dev/cmd/hauberk/internal/check"
	"hauberk.dev/cmd/hauberk/internal/deploy"
	"hauberk.dev/cmd/hauberk/internal/show"
)

// example deploys a directory and, if asked, checks it.
func (s *session) example(ctx context.Context, dir string, set map[string]string, i *installation, checks bool) error {
	d := s.deployer(set)
	x, err := d.Open(dir)
	if err != nil {
		return err
	}
	if err := d.Deploy(ctx, x); err != nil {
		return err
	}
	if checks {
		return s.prove(ctx, d, x, i)
	}
	for _, door := range x.Doors() {
		s.progress().Say("%s is at %s", door.Workload, door.URL)
	}
	s.progress().Say("try: hauberk ps; hauberk why %s/WORKLOAD; hauberk up --check %s", x.Namespace(), dir)
	return nil
}

// prove runs the checks and prints their report. It fails if one of them does.
func (s *session) prove(ctx context.Context, d *deploy.Deployer, x *deploy.Example, i *installation) error {
	suite := check.Bank(check.Target{
		Client: s.client(), Deployer: d, Example: x, Gateway: i.gateway, TrustDomain: i.trustDomain,
		Kubeconfig: filepath.Join(s.run, "control", "kubeconfig"),
	})
	r := check.Run(ctx, suite, s.progress())
	if err := s.print(r, func(w io.Writer) error { return checkTable(w, r) }); err != nil {
		return err
	}
	if !r.OK {
		return &exitError{exitFailed, errors.New("a link is broken or an attack was not stopped")}
	}
	return nil
}

func checkTable(w io.Writer, r check.Report) error {
	rows := func(results []check.Result, good, bad string) (rows [][]string) {
		for _, c := range results {
			state := good
			if !c.OK {
				state = bad
			}
			rows = append(rows, []string{c.Name, state, strconv.FormatInt(c.Millis, 10) + "ms", c.Seen})
		}
		return rows
	}
	if err := show.Rows(w, []string{"LINK", "STATE", "TOOK", "SEEN"}, rows(r.Links, "ok", "BROKEN")); err != nil {
		return err
	}
	fmt.Fprintln(w)
	return show.Rows(w, []string{"ATTACK", "STATE", "TOOK", "SEEN"}, rows(r.Attacks, "stopped", "NOT STOPPED"))
}
