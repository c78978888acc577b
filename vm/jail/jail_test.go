package jail_test

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"

	"hauberk.dev/vm/jail"
)

// inside runs a shell script in a jail and returns what it prints.
func inside(t *testing.T, j *jail.Jail, script string, files ...*os.File) string {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p, err := j.Start(jail.Command{
		Path: "/usr/bin/sh", Args: []string{"-c", script}, Files: files, Output: w,
		UID: 65531, GID: 65531, Limits: jail.Limits{OpenFiles: 64, Processes: 32, FileSize: 4096},
	})
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	out, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	p.Wait()
	return strings.TrimSpace(string(out))
}

func open(t *testing.T) *jail.Jail {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("building a jail needs root")
	}
	j, err := jail.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	return j
}

func TestJailHoldsNothing(t *testing.T) {
	j := open(t)
	if err := os.WriteFile("/tmp/hauberk-jail-secret", []byte("secret"), 0o644); err != nil {
		t.Fatal(err)
	}
	defer os.Remove("/tmp/hauberk-jail-secret")
	for script, want := range map[string]string{
		"echo *": "bin dev etc lib lib64 proc usr",
		"cat /etc/passwd /tmp/hauberk-jail-secret /boot/* /root/* 2>/dev/null; echo none": "none",
		"echo /dev/*":         "/dev/null /dev/random /dev/urandom /dev/zero",
		"id -u; id -g; id -G": "65531\n65531\n65531",
		"touch /x /usr/x /dev/x /etc/x 2>/dev/null; echo $?":                                                      "1",
		"grep -hE '^(CapEff|CapPrm|CapBnd|CapInh|CapAmb)' /proc/self/status | tr -d '\t' | cut -d: -f2 | sort -u": "0000000000000000",
		"grep NoNewPrivs /proc/self/status | tr -d '\t'":                                                          "NoNewPrivs:1",
		"ls -d /proc/[0-9]* | wc -l":                                                                              "3", // sh, ls and wc
		"echo $$":                                                                                                 "1",
		"ls /proc/self/net/../ /proc/sys 2>/dev/null | grep -c kernel":                                            "0",
		"wc -l </proc/self/net/dev":                                                                               "3", // two lines of heading, lo
		"ls /proc/self/fd | wc -l":                                                                                "4", // 0, 1, 2 and the listing
		"ulimit -c; ulimit -n; ulimit -f":                                                                         "0\n64\n8",
	} {
		if got := inside(t, j, script); got != want {
			t.Errorf("%s: %q, want %q", script, got, want)
		}
	}
}

func TestJailPassesFiles(t *testing.T) {
	j := open(t)
	name := t.TempDir() + "/f"
	if err := os.WriteFile(name, []byte("passed"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if got := inside(t, j, "cat <&3", f); got != "passed" {
		t.Errorf("read %q from descriptor 3", got)
	}
}

func TestJailRefusesRoot(t *testing.T) {
	j := open(t)
	if _, err := j.Start(jail.Command{Path: "/usr/bin/true"}); err == nil || !strings.Contains(err.Error(), "as root") {
		t.Errorf("error %v", err)
	}
}

func TestJailLeavesTheProcessAlone(t *testing.T) {
	before, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	j, err := jail.Open()
	if err != nil {
		t.Fatal(err)
	}
	after, _ := os.ReadFile("/proc/self/mountinfo")
	if string(before) != string(after) {
		t.Errorf("mounts changed:\n%s", after)
	}
	if err := exec.Command("true").Run(); err != nil {
		t.Error(err)
	}
	if err := j.Close(); err != nil {
		t.Error(err)
	}
	if _, err := j.Start(jail.Command{Path: "/usr/bin/true", UID: 65531, GID: 65531}); !errors.Is(err, jail.ErrClosed) {
		t.Errorf("a closed jail started a program: %v", err)
	}
}
