package volume

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// mountLine is what a line of /proc/self/mountinfo says of a mount.
type mountLine struct {
	device, root, point string
	propagates          bool // it is shared, or a slave
}

// originOf says where else a path is that a bind mount shows: the path itself
// if none does.
func originOf(path string) (string, error) {
	lines, err := readMounts()
	if err != nil {
		return "", err
	}
	return origin(lines, path), nil
}

// mountsBelow says whether something is mounted below a path.
func mountsBelow(path string) (bool, error) {
	lines, err := readMounts()
	below := strings.TrimSuffix(path, "/") + "/"
	return slices.ContainsFunc(lines, func(l mountLine) bool { return strings.HasPrefix(l.point, below) }), err
}

func readMounts() ([]mountLine, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parseMounts(f)
}

func origin(lines []mountLine, path string) string {
	var here mountLine
	for _, l := range lines {
		if l.point == path {
			here = l // the last is on top
		}
	}
	if here.point == "" {
		return path
	}
	if kubeletVolume.MatchString(here.root) {
		return here.root
	}
	// The volume may be a file system of its own.
	for _, l := range lines {
		if l.device == here.device && l.root == "/" && kubeletVolume.MatchString(l.point) {
			return filepath.Join(l.point, here.root)
		}
	}
	return path
}

const (
	maxMountLine  = 64 << 10
	maxMountLines = 1 << 17
)

func parseMounts(r io.Reader) (lines []mountLine, err error) {
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, maxMountLine)
	for sc.Scan() {
		// 36 35 98:0 /root /point options … - type source options
		f := strings.Fields(sc.Text())
		if len(f) < 6 {
			return nil, fmt.Errorf("read mountinfo: line %.128q", sc.Text())
		}
		if len(lines) == maxMountLines {
			return nil, fmt.Errorf("read mountinfo: more than %d mounts", maxMountLines)
		}
		lines = append(lines, mountLine{f[2], unescape(f[3]), unescape(f[4]), propagates(f[6:])})
	}
	return lines, sc.Err()
}

// propagates reads the optional fields of a mount, which a dash ends.
func propagates(fields []string) bool {
	for _, f := range fields {
		if f == "-" {
			break
		}
		if strings.HasPrefix(f, "shared:") || strings.HasPrefix(f, "master:") {
			return true
		}
	}
	return false
}

// isShared says whether mounts of the host below a path reach a slave of the
// mount that the path lies on.
func isShared(path string) (bool, error) {
	lines, err := readMounts()
	if err != nil {
		return false, err
	}
	best := mountLine{}
	for _, l := range lines {
		below := path == l.point || strings.HasPrefix(path, strings.TrimSuffix(l.point, "/")+"/")
		if below && len(l.point) >= len(best.point) {
			best = l // the last is on top
		}
	}
	return best.propagates, nil
}

// unescape undoes \040 and the like.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) && digits(s[i+1:i+4]) {
			b.WriteByte((s[i+1]-'0')<<6 | (s[i+2]-'0')<<3 | s[i+3] - '0')
			i += 3
			continue
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func digits(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '7' {
			return false
		}
	}
	return true
}
