package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// cell is a root file system with nothing that protects it.
func cell(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a container of its own needs root")
	}
	root := t.TempDir()
	script := `set -e
cd "$1"; mkdir -p bin etc tmp var/tmp proc dev run lib64 usr/bin; chmod 1777 tmp var/tmp
echo root:x:0:0::/: >etc/passwd
cp /bin/busybox bin/busybox; ln -s busybox bin/sh; cp /bin/cat /bin/true bin/
for l in $(ldd /bin/cat /bin/true | grep -o '/[^ ]*'); do [ -f "$l" ] && mkdir -p ".$(dirname "$l")" && cp "$l" ".$l"; done
true`
	if out, err := exec.Command("bash", "-c", script, "sh", root).CombinedOutput(); err != nil {
		t.Fatalf("make root: %v: %s", err, out)
	}
	for program, to := range map[string]string{".": "usr/bin/attack", "../assistant": "usr/bin/assistant"} {
		build := exec.Command("go", "build", "-o", filepath.Join(root, to), program)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("build: %v: %s", err, out)
		}
	}
	return root
}

// attackIn runs an attack in namespaces of its own, with two addresses on its
// loopback where a program listens.
func attackIn(t *testing.T, root, before string, args ...string) Result {
	t.Helper()
	script := `mount --make-rprivate /; mount -t tmpfs none "$1/run"; mount -t proc none "$1/proc"
ip link set lo up; ip addr add 203.0.113.7/32 dev lo; ip addr add 10.88.0.9/32 dev lo
for a in 203.0.113.7:443 203.0.113.7:4444 10.88.0.9:8080; do LISTEN=$a chroot "$1" /usr/bin/assistant & done
root="$1"; shift; sleep 0.3; ` + before + ` chroot "$root" /usr/bin/attack "$@"`
	cmd := exec.Command("unshare", append([]string{"-mpnf", "--kill-child", "sh", "-c", script, "sh", root}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%q: %v: %s", args, err, out)
	}
	var r Result
	if err := json.Unmarshal(out, &r); err != nil || strings.Count(string(out), "\n") != 1 {
		t.Fatalf("%q printed %q: %v", args, out, err)
	}
	for _, s := range r.Steps {
		t.Logf("%-50s %v %s", s.Try, s.Reached, s.Seen)
	}
	return r
}

// TestUnprotected shows that each attack works where nothing stops it: one that
// fails here proves nothing when it fails elsewhere. unload-guard is not run
// as root, since its end is this machine's kernel.
func TestUnprotected(t *testing.T) {
	root := cell(t)
	for _, test := range []struct {
		args  []string
		steps int // that must have reached their end
	}{
		{[]string{"drop-and-execute"}, 6},
		{[]string{"memfd"}, 3},
		{[]string{"tmpfs-exec"}, 2},
		{[]string{"reverse-shell", "10.88.0.9:8080", "203.0.113.7:4444"}, 2},
		{[]string{"ld-preload"}, 2},
		{[]string{"write-protected", "/etc/passwd"}, 11},
		{[]string{"exfiltrate"}, 1},
		{[]string{"bypass", "10.88.0.9:8080"}, 2},
	} {
		t.Run(test.args[0], func(t *testing.T) {
			r := attackIn(t, root, "", test.args...)
			reached := 0
			for _, s := range r.Steps {
				if s.Reached {
					reached++
				}
			}
			if !r.Succeeded || reached != test.steps {
				t.Errorf("%d steps reached their end, want %d", reached, test.steps)
			}
		})
	}
}

// TestStopped shows that an attack that is stopped says so.
func TestStopped(t *testing.T) {
	root := cell(t)
	t.Run("unload-guard without powers", func(t *testing.T) {
		r := attackIn(t, root, "setpriv --bounding-set=-all,+sys_chroot --inh-caps=-all", "unload-guard")
		if r.Succeeded {
			t.Errorf("it says it worked: %s", r.Seen)
		}
	})
	t.Run("no network", func(t *testing.T) {
		if r := attackIn(t, root, "ip addr del 203.0.113.7/32 dev lo;", "exfiltrate"); r.Succeeded {
			t.Errorf("it says it worked: %s", r.Seen)
		}
	})
	t.Run("noexec", func(t *testing.T) {
		for _, name := range []string{"drop-and-execute", "ld-preload"} {
			before := `mount --rbind "$root" "$root"; mount -o remount,bind,ro "$root"
				for d in tmp var/tmp; do mount -t tmpfs -o noexec none "$root/$d"; done;`
			if r := attackIn(t, root, before, name); r.Succeeded {
				t.Errorf("it says it worked: %s", r.Seen)
			}
		}
	})
}

func TestSum(t *testing.T) {
	if r := sum("x", []Step{{Try: "a", Seen: "EPERM"}, {Try: "b", Reached: true, Seen: "done"}}); !r.Succeeded || r.Seen != "a: EPERM; b: done" {
		t.Errorf("got %+v", r)
	}
	if r := sum("x", nil); r.Succeeded || r.Seen == "" {
		t.Errorf("got %+v", r)
	}
}
