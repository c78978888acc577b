package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
)

// part measures one thing alone, in one boot of each kernel.
func part(ctx context.Context, w io.Writer, what string, kernels []string) error {
	for _, series := range kernels {
		m, err := prepare(ctx, series)
		if err != nil {
			return err
		}
		err = m.part(ctx, w, what)
		m.close()
		if err != nil {
			return fmt.Errorf("kernel %s: %w", series, err)
		}
	}
	return nil
}

func (m *machine) part(ctx context.Context, w io.Writer, what string) error {
	fmt.Fprintf(w, "\nkernel %s\n", m.kernel.Release)
	switch what {
	case "load":
		return m.loading(ctx, w)
	case "costs":
		by := map[string]uint64{}
		if err := m.costs(ctx, by); err != nil {
			return err
		}
		return printCosts(w, by)
	}
	return fmt.Errorf("measure %q: want load or costs", what)
}

// verified is what the verifier said of a program.
type verified struct {
	name                                       string
	native, usec, instructions, states, atOnce int
}

// loading prints what it takes to load each program, the dearest first.
func (m *machine) loading(ctx context.Context, w io.Writer) error {
	console, err := m.boot(ctx, rung{lsm: true, attached: true}, []string{"verifier"})
	if err != nil {
		return err
	}
	var programs []verified
	var attach int
	sum := verified{name: "all"}
	for line := range strings.Lines(console) {
		if _, err := fmt.Sscanf(line, "ATTACHED %d", &attach); err == nil || !strings.HasPrefix(line, "LOADED ") {
			continue
		}
		v, err := readVerified(line)
		if err != nil {
			return err
		}
		programs = append(programs, v)
		sum.native, sum.usec, sum.instructions, sum.states, sum.atOnce =
			sum.native+v.native, sum.usec+v.usec, sum.instructions+v.instructions, sum.states+v.states, max(sum.atOnce, v.atOnce)
	}
	slices.SortFunc(programs, func(a, b verified) int { return cmp.Compare(b.instructions, a.instructions) })
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(t, "program\tinstructions\tstates\tat once\tmicroseconds\tmachine code\t\n")
	for _, v := range append(programs, sum) {
		fmt.Fprintf(t, "%s\t%d\t%d\t%d\t%d\t%d\t\n", v.name, v.instructions, v.states, v.atOnce, v.usec, v.native)
	}
	fmt.Fprintf(t, "%d programs loaded and attached in %d ms\t\n", len(programs), attach)
	return t.Flush()
}

// readVerified reads "LOADED name bytes" and the verifier's own words behind it.
func readVerified(line string) (v verified, err error) {
	f := strings.Fields(line)
	if len(f) < 3 {
		return v, fmt.Errorf("read %q: it is cut", line)
	}
	v.name = f[1]
	_, err = fmt.Sscan(f[2], &v.native)
	for i, word := range f[3:] {
		at := i + 3
		var to *int
		switch word {
		case "time":
			to = &v.usec
		case "processed":
			to = &v.instructions
		case "total_states":
			to = &v.states
		case "peak_states":
			to = &v.atOnce
		}
		if to != nil && at+1 < len(f) && err == nil {
			_, err = fmt.Sscan(f[at+1], to)
		}
	}
	if err == nil && v.instructions == 0 {
		err = fmt.Errorf("it has no instructions")
	}
	if err != nil {
		return v, fmt.Errorf("read %q: %w", line, err)
	}
	return v, nil
}
