// Command critest runs the validation suite of Kubernetes' container runtime
// interface on a runtime, prints what came of it in plain numbers, and ends
// with an error if that is not what the list of exceptions says: a spec that
// fails without being listed, or one that is listed and passes.
package main

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"hauberk.dev/test/cri"
)

func main() {
	o := options{}
	flag.StringVar(&o.runtime, "runtime", "hauberk", "runtime handler to validate: hauberk or runc")
	flag.BoolVar(&o.noPause, "no-pause", false, "make pods by the Sandbox API, without a pause container")
	flag.BoolVar(&o.debian, "debian", false, "on Debian's containerd instead of the one of the module proxy")
	flag.StringVar(&o.focus, "focus", "", "only specs whose name this regular expression finds")
	flag.StringVar(&o.skip, "skip", "", "but not those that this one finds")
	flag.StringVar(&o.cache, "cache", "", "directory for what is built (default: hauberk/critest in the user's cache)")
	flag.StringVar(&o.keep, "keep", "", "directory for logs and the report (default: none are kept)")
	flag.DurationVar(&o.limit, "timeout", 50*time.Minute, "end the suite after so long")
	flag.Int64Var(&o.seed, "seed", 1, "order of the specs")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	code, err := run(ctx, o, flag.Args())
	if err != nil {
		fmt.Fprintln(os.Stderr, "critest:", err)
		code = 1
	}
	stop()
	os.Exit(code)
}

type options struct {
	runtime, focus, skip, cache, keep string
	noPause                           bool
	debian                            bool
	limit                             time.Duration
	seed                              int64
}

func say(format string, args ...any) { fmt.Printf("critest: "+format+"\n", args...) }

func run(ctx context.Context, o options, rest []string) (code int, err error) {
	switch {
	case len(rest) > 0:
		return 2, fmt.Errorf("unknown argument %q", rest[0])
	case o.runtime != "hauberk" && o.runtime != "runc":
		return 2, fmt.Errorf("unknown runtime %q: use hauberk or runc", o.runtime)
	}
	t, inside, code, err := cri.Enter(ctx, o.cache, o.debian, say)
	if !inside || err != nil {
		return code, err
	}
	return 0, o.validate(ctx, t)
}

// validate runs the suite inside the namespaces, and judges.
func (o options) validate(ctx context.Context, t cri.Tools) (err error) {
	list, err := readExceptions(o.list())
	if err != nil {
		return err
	}
	var replace map[string]string
	if o.noPause {
		replace = map[string]string{"sandboxer = 'podsandbox'": "sandboxer = 'shim'"}
	}
	server, err := t.Start(ctx, replace)
	if err != nil {
		return err
	}
	report := filepath.Join(t.Work, "report.json")
	began := time.Now()
	ran := o.suite(ctx, server, t, report)
	results, err := readReport(report)
	if err != nil {
		err = fmt.Errorf("%w (the suite: %v)", err, ran)
	}
	if stopped := server.Close(); err == nil {
		err = stopped
	}
	if o.keep != "" {
		if kept := keep(o.keep, server.Log(), report, filepath.Join(t.Work, "suite.log")); err == nil {
			err = kept
		}
	}
	o.print(results, time.Since(began))
	if err != nil {
		return err
	}
	faults := judge(list, results, o.focus == "" && o.skip == "")
	for _, f := range faults {
		fmt.Println("UNEXPECTED:", f)
	}
	if len(faults) > 0 {
		return fmt.Errorf("%d specs did not do what %s says", len(faults), o.list())
	}
	say("everything is as %s says", o.list())
	return nil
}

// list is the file of exceptions.
func (o options) list() string {
	name := "expected-" + o.runtime
	if o.debian {
		name += "-debian"
	}
	return filepath.Join("test/critest", name+".txt")
}

func (o options) print(results []result, took time.Duration) {
	count := map[outcome]int{}
	for _, r := range results {
		count[r.outcome]++
		if r.outcome != passes {
			fmt.Printf("%s: %s\n\t%s\n", r.outcome, r.spec, strings.ReplaceAll(shorten(r.detail), "\n", "\n\t"))
		}
	}
	say("%s: %d specs, %d passed, %d failed, %d skipped by the suite, in %v", o.runtime,
		len(results), count[passes], count[fails], count[skips], took.Round(time.Second))
}

func shorten(s string) string {
	const most = 600
	if s = strings.TrimSpace(s); len(s) > most {
		s = s[:most] + "..."
	}
	return s
}

// suite runs critest and tells of every spec as it ends.
func (o options) suite(ctx context.Context, server *cri.Server, t cri.Tools, report string) error {
	log, err := os.Create(filepath.Join(t.Work, "suite.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	args := []string{"-runtime-endpoint=" + server.Endpoint(), "-runtime-handler=" + o.runtime,
		"-runtime-service-timeout=2m", "-image-service-timeout=1m", "-config=" + filepath.Join(t.Work, "none.yaml"),
		"-test.timeout=0", "-ginkgo.timeout=" + o.limit.String(), fmt.Sprintf("-ginkgo.seed=%d", o.seed),
		"-ginkgo.v", "-ginkgo.no-color", "-ginkgo.json-report=" + report}
	if o.focus != "" {
		args = append(args, "-ginkgo.focus="+o.focus)
	}
	if o.skip != "" {
		args = append(args, "-ginkgo.skip="+o.skip)
	}
	ctx, cancel := context.WithTimeout(ctx, o.limit+2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(t.Suite, "critest"), args...)
	cmd.Dir = t.Work
	cmd.Env = append(os.Environ(), "TMPDIR="+filepath.Join(t.Work, "tmp"))
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) }
	cmd.WaitDelay = 20 * time.Second
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		return err
	}
	progress(io.TeeReader(pipe, log))
	return cmd.Wait()
}

// ended is the line with which ginkgo ends a spec.
var ended = regexp.MustCompile(`^[•SP]( \[[A-Z]+\])? \[([0-9.]+) seconds\]$`)

// progress prints one line per spec. Ginkgo rules off every spec, and begins
// with its name.
func progress(r io.Reader) {
	lines := bufio.NewReader(r)
	n, name, begins := 0, "", false
	for {
		line, err := lines.ReadString('\n')
		line = strings.TrimRight(line, "\n")
		m := ended.FindStringSubmatch(line)
		switch {
		case strings.HasPrefix(line, "----------"):
			begins = true
		case m != nil:
			n++
			state := strings.ToLower(strings.Trim(m[1], " []"))
			fmt.Printf("%3d %8ss %s%s\n", n, m[2], name, strings.TrimRight("  "+state, " "))
			begins = false
		case begins && line != "":
			name, begins = line, false
		}
		if err != nil {
			return
		}
	}
}

// keep copies files into a directory.
func keep(dir string, names ...string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, name := range names {
		raw, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(name)), raw, 0o644); err != nil {
			return err
		}
	}
	return nil
}
