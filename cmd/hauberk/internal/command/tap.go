package command

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"hauberk.dev/api/admin"
	"hauberk.dev/api/mesh"
)

// maxTapLine bounds what is taken of one request, in bytes.
const maxTapLine = 256 << 10

// listening is what a person wants to see of the requests of a workload.
type listening struct {
	namespace, instance, format string
	filters                     []string
}

func (s *session) tap() *cobra.Command {
	var o listening
	c := &cobra.Command{
		Use: "tap WORKLOAD", Short: "Show requests to a workload as they pass",
		Long: `Tap shows the requests that arrive at a workload, live, as its proxy judges them:
who called, what was asked, whether a rule allowed it, how it was answered and
how long that took. It ends with you, and leaves a record in the ledger. Nothing
is slowed down for it: what you cannot take in time is dropped and counted.

Bodies are never shown, nor what stands after the ? of a path, nor the values of
fields that are secrets (authorization, cookie and their like). Requests of HTTP
are shown once they are answered, calls of bolt and Dubbo once they are judged,
without their answer; connections of other protocols are not requests.

A filter is FIELD=VALUE, FIELD!=VALUE, or FIELD~PART for what contains a part;
fields are peer, method, path, verdict, rule, status, grpc, protocol and trace.
A request is shown if all of them hold.`,
		Example: "  hauberk tap bank/ledger\n  hauberk tap ledger -n bank --filter verdict=denied\n  hauberk tap ledger -n bank --filter path~/accounts --filter status!=200 -o json",
		Args:    args(1, 1, ""), ValidArgsFunction: s.completeAll,
		RunE: func(c *cobra.Command, names []string) error {
			if o.format != "text" && o.format != "json" {
				return usage(c, fmt.Errorf("--output %q: want text or json", o.format))
			}
			wants, err := parseFilters(o.filters)
			if err != nil {
				return usage(c, err)
			}
			err = s.showRequests(c.Context(), o, names[0], wants)
			if c.Context().Err() != nil {
				return nil // an interrupt is how a tap ends
			}
			return err
		},
	}
	f := c.Flags()
	f.StringVarP(&o.namespace, "namespace", "n", "", "namespace of the workload")
	f.StringVarP(&o.instance, "instance", "i", "", "only this instance")
	f.StringArrayVar(&o.filters, "filter", nil, "only requests of which this holds, such as verdict=denied; may be repeated")
	f.StringVarP(&o.format, "output", "o", "text", "text or json, a request a line")
	return c
}

// filter tells whether a request is wanted.
type filter func(*mesh.Request) bool

// tapFields are what filters may ask for.
var tapFields = map[string]func(*mesh.Request) string{
	"peer": func(r *mesh.Request) string { return r.Peer }, "method": func(r *mesh.Request) string { return r.Method },
	"path": func(r *mesh.Request) string { return r.Path }, "verdict": func(r *mesh.Request) string { return r.Verdict },
	"rule": func(r *mesh.Request) string { return r.Rule }, "status": func(r *mesh.Request) string { return fmt.Sprint(r.Status) },
	"grpc": func(r *mesh.Request) string { return r.GRPC }, "protocol": func(r *mesh.Request) string { return r.Protocol },
	"trace": func(r *mesh.Request) string { return r.Trace },
}

func parseFilters(texts []string) (filter, error) {
	var all []filter
	for _, text := range texts {
		n := strings.IndexAny(text, "=!~")
		if n < 0 {
			return nil, fmt.Errorf("--filter %q: want FIELD=VALUE, FIELD!=VALUE or FIELD~PART", text)
		}
		field, rest := text[:n], text[n:]
		read := tapFields[field]
		if read == nil {
			return nil, fmt.Errorf("--filter %q: no field %q: want peer, method, path, verdict, rule, status, grpc, protocol or trace", text, field)
		}
		switch {
		case strings.HasPrefix(rest, "!="):
			all = append(all, func(r *mesh.Request) bool { return read(r) != rest[2:] })
		case rest[0] == '=':
			all = append(all, func(r *mesh.Request) bool { return read(r) == rest[1:] })
		case rest[0] == '~':
			all = append(all, func(r *mesh.Request) bool { return strings.Contains(read(r), rest[1:]) })
		default:
			return nil, fmt.Errorf("--filter %q: want FIELD=VALUE, FIELD!=VALUE or FIELD~PART", text)
		}
	}
	return func(r *mesh.Request) bool {
		for _, f := range all {
			if !f(r) {
				return false
			}
		}
		return true
	}, nil
}

// showRequests shows those of all instances that run now.
func (s *session) showRequests(ctx context.Context, o listening, name string, wants filter) error {
	if namespace, workload, ok := strings.Cut(name, "/"); ok {
		o.namespace, name = namespace, workload
	}
	o.namespace = cmp.Or(o.namespace, "default")
	list, err := s.client().Instances(ctx, o.namespace)
	if err != nil {
		return err
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	var errs []error
	found := 0
	for _, i := range list {
		if i.Workload != name && i.Name != name || o.instance != "" && i.Name != o.instance || i.Phase != "Running" {
			continue
		}
		found++
		wg.Go(func() {
			err := s.requestsOf(ctx, i, func(r *mesh.Request, line []byte) error {
				if r.Lost == 0 && !wants(r) {
					return nil
				}
				mu.Lock()
				defer mu.Unlock()
				return showRequest(s.Out, o.format, r, line)
			})
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, err)
		})
	}
	wg.Wait()
	if found == 0 {
		return &admin.Error{Message: fmt.Sprintf("no instance of %q runs in namespace %q", name, o.namespace), Fix: "hauberk ps lists what there is; -n chooses the namespace"}
	}
	return errors.Join(errs...)
}

func (s *session) requestsOf(ctx context.Context, i admin.Instance, each func(*mesh.Request, []byte) error) error {
	r, err := s.client().Tap(ctx, i.Namespace, i.Name)
	if err != nil {
		return err
	}
	defer r.Close()
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxTapLine)
	for lines.Scan() {
		var one mesh.Request
		if err := json.Unmarshal(lines.Bytes(), &one); err != nil {
			return fmt.Errorf("read requests of %s: %w", i.Name, err)
		}
		if err := each(&one, bytes.Clone(lines.Bytes())); err != nil {
			return err
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("read requests of %s: %w", i.Name, err)
	}
	return nil
}

// showRequest writes one request. What others chose is quoted.
func showRequest(w io.Writer, format string, r *mesh.Request, line []byte) error {
	if format == "json" {
		_, err := w.Write(append(line, '\n'))
		return err
	}
	if r.Lost > 0 {
		_, err := fmt.Fprintf(w, "%d requests of %s passed unseen\n", r.Lost, r.Instance)
		return err
	}
	answer := fmt.Sprint(r.Status)
	switch {
	case r.GRPC != "":
		answer = fmt.Sprintf("grpc %q", r.GRPC)
	case r.Status == 0:
		answer = "-"
	}
	text := fmt.Sprintf("%s %q %s %q %q: %s, %s, %v", r.At.Local().Format("15:04:05.000"), r.Instance, cmp.Or(r.Protocol, "-"), r.Method, r.Path, r.Verdict, answer, time.Duration(r.Micros)*time.Microsecond)
	text += fmt.Sprintf(", by %q", r.Peer)
	if r.Rule != "" {
		text += fmt.Sprintf(", rule %q", r.Rule)
	}
	if r.Reason != "" {
		text += fmt.Sprintf(": %q", r.Reason)
	}
	if r.Trace != "" {
		text += ", trace " + r.Trace
	}
	_, err := fmt.Fprintln(w, text)
	return err
}
