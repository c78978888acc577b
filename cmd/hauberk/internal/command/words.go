package command

import (
	"bufio"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"hauberk.dev/sandbox"
)

// parseSize reads a number of bytes, with b, k, m, g or t behind it.
func parseSize(s string) (uint64, error) {
	text := strings.TrimSuffix(strings.TrimSuffix(strings.ToLower(s), "b"), "i")
	shift := 0
	for i, unit := range []string{"k", "m", "g", "t"} {
		if rest, ok := strings.CutSuffix(text, unit); ok {
			text, shift = rest, 10*(i+1)
			break
		}
	}
	v, err := strconv.ParseFloat(text, 64)
	if err != nil || math.IsNaN(v) || v <= 0 || v*float64(uint64(1)<<shift) > 1<<50 {
		return 0, fmt.Errorf("size %q: want a number with k, m, g or t, such as 256m", s)
	}
	return uint64(v * float64(uint64(1)<<shift)), nil
}

// parseVolume reads SOURCE:TARGET[:OPTIONS].
func parseVolume(s string) (sandbox.Volume, error) {
	parts := strings.Split(s, ":")
	if len(parts) < 2 || len(parts) > 3 || parts[0] == "" || parts[1] == "" {
		return sandbox.Volume{}, fmt.Errorf("%q: want SOURCE:TARGET[:ro]", s)
	}
	source, err := filepath.Abs(parts[0])
	if err != nil {
		return sandbox.Volume{}, err
	}
	if _, err := os.Stat(source); err != nil {
		return sandbox.Volume{}, fmt.Errorf("%q: %w", s, err)
	}
	v := sandbox.Volume{Source: source, Target: parts[1]}
	if len(parts) == 3 {
		for o := range strings.SplitSeq(parts[2], ",") {
			switch o {
			case "ro":
				v.ReadOnly = true
			case "rw", "z", "Z": // the last two are for SELinux, which is not here
			default:
				return sandbox.Volume{}, fmt.Errorf("%q: option %q: want ro or rw", s, o)
			}
		}
	}
	return v, nil
}

// environment joins files and flags; a bare name is this shell's variable, if
// it has one.
func environment(files, flags []string, lookup func(string) (string, bool)) (out []string, err error) {
	add := func(line string) {
		if name, _, ok := strings.Cut(line, "="); ok {
			out = append(out, line)
		} else if value, ok := lookup(name); ok {
			out = append(out, name+"="+value)
		}
	}
	for _, name := range files {
		f, err := os.Open(name)
		if err != nil {
			return nil, fmt.Errorf("--env-file: %w", err)
		}
		in := bufio.NewScanner(f)
		for in.Scan() {
			line := strings.TrimLeft(in.Text(), " \t")
			if line == "" || line[0] == '#' {
				continue
			}
			add(line)
		}
		err = in.Err()
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("--env-file %s: %w", name, err)
		}
	}
	for _, line := range flags {
		if line == "" || line[0] == '=' {
			return nil, fmt.Errorf("--env %q: want NAME=VALUE", line)
		}
		add(line)
	}
	return out, nil
}
