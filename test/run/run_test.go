// Package run_test runs sandboxes by hand as people do: with the programs, from
// pipes and on a terminal. What a sandbox is made of is tested where it is made.
package run_test

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestRun(t *testing.T) {
	w := newWorld(t)
	t.Run("codes", w.testCodes)
	t.Run("flags", w.testFlags)
	t.Run("outside", w.testOutside)
	t.Run("pipe", w.testPipe)
	t.Run("terminal", w.testTerminal)
	t.Run("background", w.testBackground)
	t.Run("signal", w.testSignal)
	t.Run("killed", w.testKilled)
	t.Run("images", w.testImages)
}

// run runs a command in a sandbox that goes with it.
func (w *world) run(t *testing.T, in string, flags []string, args ...string) result {
	t.Helper()
	return w.hauberk(t, in, slices.Concat([]string{"run", "--rm"}, flags, []string{w.image}, args)...)
}

func (w *world) testCodes(t *testing.T) {
	began := time.Now()
	r := w.run(t, "", nil, "sh", "-c", "echo out; echo wrong >&2; exit 7")
	// What is told of progress, and of accelerators, stands before.
	if r.code != 7 || r.out != "out\n" || !strings.HasSuffix(r.errs, "wrong\n") {
		t.Errorf("%+v", r)
	}
	first := time.Since(began)
	began = time.Now()
	if r := w.run(t, "", []string{"-q"}, "true"); r != (result{}) {
		t.Errorf("%+v", r)
	}
	t.Logf("the first run took %v, the second %v", first.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
	for name, test := range map[string]struct {
		r    result
		code int
		want string
	}{
		"no program":    {w.run(t, "", nil, "nosuch"), 127, "nosuch"},
		"no executable": {w.run(t, "", nil, "/etc/passwd"), 126, "permission denied"},
		"killed":        {w.run(t, "", nil, "sh", "-c", "kill -9 $$; sleep 9"), 0, ""},
		"no image":      {w.hauberk(t, "", "run", "127.0.0.1:1/none"), 125, "docker-archive:FILE"},
		"no file":       {w.hauberk(t, "", "run", "oci:/none"), 125, "no such file"},
		"no words":      {w.hauberk(t, "", "run"), 2, "needs an IMAGE"},
		"bad flag":      {w.hauberk(t, "", "run", "--frob"), 2, "--frob"},
		"bad value":     {w.hauberk(t, "", "run", "-m", "much", w.image), 125, "--mem"},
		"bad policy":    {w.hauberk(t, "", "run", "--policy", "no", w.image), 125, "ready are"},
		"no terminal":   {w.run(t, "", []string{"-it"}), 125, "leave -t out"},
	} {
		if name == "killed" {
			continue // process 1 cannot kill itself; exec's can, below
		}
		if test.r.code != test.code || !strings.Contains(test.r.errs, test.want) {
			t.Errorf("%s: %+v, want code %d and %q", name, test.r, test.code, test.want)
		}
	}
	if list := w.must(t, "ps", "-aq"); list != "" {
		t.Errorf("left: %q", list)
	}
}

func (w *world) testFlags(t *testing.T) {
	r := w.run(t, "", []string{"-q", "-e", "A=1", "-w", "/tmp", "-u", "app", "--hostname", "inside", "-m", "64m", "--pids-limit", "20", "--entrypoint", "sh"},
		"-c", "echo $A; pwd; id -u; id -g; hostname; cat /sys/fs/cgroup/memory.max 2>/dev/null || echo 67108864")
	if r.code != 0 || r.out != "1\n/tmp\n1000\n1001\ninside\n67108864\n" {
		t.Errorf("%+v", r)
	}
	written := []string{"sh", "-c", "cp /bin/busybox /tmp/busybox && /tmp/busybox echo ran"}
	if r := w.run(t, "", []string{"-q"}, written...); r.code != 126 || r.out != "" {
		t.Errorf("a written program, by the baseline: %+v", r)
	}
	if r := w.run(t, "", []string{"-q", "--policy", "dev"}, written...); r.code != 0 || r.out != "ran\n" {
		t.Errorf("a written program, by dev: %+v", r)
	}
	if r := w.run(t, "", []string{"-q", "--policy", "agent"}, "sh", "-c", "touch /etc/x; touch /tmp/x && echo wrote"); r.out != "wrote\n" || !strings.Contains(r.errs, "/etc/x") {
		t.Errorf("a file of the image, by agent: %+v", r)
	}
}

// testOutside gives sandboxes what is outside: files of this machine, and ports.
func (w *world) testOutside(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "in"), []byte("from here\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	r := w.run(t, "", []string{"-q", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "-v", dir + ":/rw", "-v", dir + ":/ro:ro"},
		"sh", "-c", "cat /ro/in; echo back >/rw/out; touch /ro/x /x; touch /tmp/x && echo wrote; grep CapEff /proc/self/status")
	if r.code != 0 || r.out != "from here\nwrote\nCapEff:\t0000000000000000\n" || strings.Count(r.errs, "Read-only") != 2 {
		t.Errorf("%+v", r)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "out")); err != nil || string(got) != "back\n" {
		t.Errorf("what the sandbox wrote is %q, %v", got, err)
	}
	w.must(t, "run", "-qd", "--name", "server", "-p", "0:8080", w.image, "sh", "-c", "mkdir /tmp/w; echo page >/tmp/w/index.html; exec httpd -f -p 8080 -h /tmp/w")
	defer w.must(t, "rm", "-f", "server")
	var list []struct{ Ports []string }
	if err := json.Unmarshal([]byte(w.must(t, "ps", "-o", "json")), &list); err != nil || len(list) != 1 || len(list[0].Ports) != 1 {
		t.Fatalf("%+v, %v", list, err)
	}
	address := strings.TrimSuffix(list[0].Ports[0], ":8080")
	var said string
	for began := time.Now(); time.Since(began) < callTime && said != "page\n"; time.Sleep(50 * time.Millisecond) {
		if resp, err := http.Get("http://" + address + "/"); err == nil {
			raw, _ := io.ReadAll(resp.Body)
			said = string(raw)
			resp.Body.Close()
		}
	}
	if said != "page\n" {
		t.Errorf("%s answers %q", address, said)
	}
}

func (w *world) testPipe(t *testing.T) {
	big := strings.Repeat("0123456789abcde\n", 1<<16)
	if r := w.run(t, big, []string{"-qi"}, "cat"); r.code != 0 || r.out != big {
		t.Errorf("%d bytes of %d, %d %s", len(r.out), len(big), r.code, r.errs)
	}
	if r := w.run(t, "typed", []string{"-q"}, "cat"); r.code != 0 || r.out != "" {
		t.Errorf("input that was not asked for: %+v", r)
	}
}

// testTerminal is what people do on a terminal; docs/run.md shows the same.
func (w *world) testTerminal(t *testing.T) {
	x := w.onTerminal(t, 24, 80, "run", "--rm", "-it", "--name", "demo", w.image, "sh")
	x.shows(t, "/ # ")
	x.types(t, "tty; stty size\r")
	x.shows(t, "/dev/pts/0\n24 80\n")
	x.resize(t, 40, 132)
	x.types(t, "sleep 0.5; stty size\r")
	x.shows(t, "\n40 132\n")
	x.types(t, "sh -c 'echo begin; exec sleep 1000'\r") // who says so has the terminal
	x.shows(t, "\nbegin\n")
	x.types(t, "\x03")
	x.shows(t, "^C")
	x.types(t, "echo interrupted $?\r")
	x.shows(t, "\ninterrupted 130\n")
	x.types(t, "\x10\x11") // ctrl-p ctrl-q
	x.shows(t, "left running")
	if code := x.ends(t); code != 0 {
		t.Errorf("who left ended with %d", code)
	}
	x = w.onTerminal(t, 24, 80, "exec", "-it", "demo", "sh", "-c", "tty; exit 4")
	x.shows(t, "/dev/pts/1\n")
	if code := x.ends(t); code != 4 {
		t.Errorf("exec ended with %d", code)
	}
	x = w.onTerminal(t, 30, 100, "attach", "demo")
	x.types(t, "stty size; exit 42\r")
	x.shows(t, "\n30 100\n")
	if code := x.ends(t); code != 42 {
		t.Errorf("ended with %d, want 42", code)
	}
	if list := w.must(t, "ps", "-aq"); list != "" {
		t.Errorf("left: %q", list)
	}
}

// testBackground is the life of one that runs by itself.
func (w *world) testBackground(t *testing.T) {
	id := strings.TrimSpace(w.must(t, "run", "-qd", "--name", "web", "-l", "a=b", w.image, "sh", "-c", "trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.1; done"))
	defer w.hauberk(t, "", "rm", "-f", "web")
	var list []struct{ From, ID, Name, Phase string }
	if err := json.Unmarshal([]byte(w.must(t, "ps", "-o", "json")), &list); err != nil || len(list) != 1 || list[0].From != "hand" || list[0].ID != id || list[0].Phase != "running" {
		t.Errorf("ps: %+v, %v", list, err)
	}
	if out := w.must(t, "ps"); !strings.Contains(out, "hand") || !strings.Contains(out, "web") {
		t.Errorf("ps: %s", out)
	}
	if r := w.hauberk(t, "", "exec", "web", "sh", "-c", "kill -9 $$"); r.code != 137 {
		t.Errorf("exec of what kills itself: %+v", r)
	}
	for code, program := range map[int]string{127: "nosuch", 126: "/etc/passwd"} {
		if r := w.hauberk(t, "", "exec", "web", program); r.code != code {
			t.Errorf("exec %s: %+v, want code %d", program, r, code)
		}
	}
	if r := w.hauberk(t, "in\n", "exec", "-i", "-e", "A=1", "-w", "/tmp", "-u", "1000", "hand/web", "sh", "-c", "cat; echo $A; pwd; id -u"); r.out != "in\n1\n/tmp\n1000\n" {
		t.Errorf("exec: %+v", r)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("from here\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	w.must(t, "cp", file, "web:/tmp")
	w.must(t, "cp", "hand/web:/tmp/file", file+".back")
	if got, err := os.ReadFile(file + ".back"); err != nil || string(got) != "from here\n" {
		t.Errorf("cp there and back: %q, %v", got, err)
	}
	if out := w.must(t, "cp", "web:/tmp/file", "-"); !strings.Contains(out, "from here") {
		t.Errorf("cp to a tar: %d bytes", len(out))
	}
	if r := w.hauberk(t, "", "cp", "web:/nosuch", file); r.code != 1 || !strings.Contains(r.errs, "no such file") {
		t.Errorf("cp of what is not there: %+v", r)
	}
	if r := w.hauberk(t, "", "cp", file, file); r.code != 2 {
		t.Errorf("cp without a sandbox: %+v", r)
	}
	if out := w.must(t, "top", "web"); !strings.Contains(out, "sleep") && !strings.Contains(out, "sh") {
		t.Errorf("top: %s", out)
	}
	var used []struct {
		Name   string
		Memory uint64
		Host   uint64
	}
	if err := json.Unmarshal([]byte(w.must(t, "stats", "--no-stream", "-o", "json", "web")), &used); err != nil || len(used) != 1 || used[0].Memory == 0 || used[0].Host == 0 {
		t.Errorf("stats: %+v, %v", used, err)
	}
	if r := w.hauberk(t, "", "run", "--name", "web", w.image); r.code != 125 || !strings.Contains(r.errs, "taken") {
		t.Errorf("a second of the name: %+v", r)
	}
	if r := w.hauberk(t, "", "rm", "web"); r.code != 1 || !strings.Contains(r.errs, "running") {
		t.Errorf("rm of one that runs: %+v", r)
	}
	w.must(t, "stop", "web")
	if out := w.must(t, "logs", "web"); out != "up\nbye\n" {
		t.Errorf("logs: %q", out)
	}
	if out := w.must(t, "wait", id[:4]); out != "3\n" {
		t.Errorf("wait: %q", out)
	}
	if out := w.must(t, "ps"); strings.Contains(out, "web") {
		t.Errorf("ps lists what has ended: %s", out)
	}
	if out := w.must(t, "ps", "-a"); !strings.Contains(out, "exit code 3") {
		t.Errorf("ps -a: %s", out)
	}
	w.must(t, "rm", "web")
	if r := w.hauberk(t, "", "logs", "hand/web"); r.code != 1 || !strings.Contains(r.errs, `no sandbox is called "web"`) {
		t.Errorf("logs of what is gone: %+v", r)
	}
}

// testSignal ends the command that waits: the sandbox hears it.
func (w *world) testSignal(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), callTime)
	defer cancel()
	cmd := w.command(ctx, "run", "-q", "--rm", w.image, "sh", "-c", "trap 'echo heard; exit 9' INT; echo up; while :; do sleep 0.1; done")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 64)
	n, err := out.Read(buf)
	if err != nil || string(buf[:n]) != "up\n" {
		t.Errorf("printed %q, %v", buf[:n], err)
	}
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	n, _ = out.Read(buf)
	if string(buf[:n]) != "heard\n" {
		t.Errorf("printed %q", buf[:n])
	}
	if c := code(t, cmd.Wait()); c != 9 {
		t.Errorf("ended with %d, want 9", c)
	}
}

// testKilled kills the command at many moments: what it leaves is listed, and
// removed, and nothing else is there.
func (w *world) testKilled(t *testing.T) {
	for _, after := range []time.Duration{0, 10, 30, 100, 200, 400, 700} {
		ctx, cancel := context.WithTimeout(t.Context(), callTime)
		cmd := w.command(ctx, "run", "-q", "--rm", "--name", "x", w.image, "sleep", "100")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(after * time.Millisecond)
		cmd.Process.Kill()
		cmd.Wait()
		cancel()
		if ids := strings.Fields(w.must(t, "ps", "-aq")); len(ids) > 1 {
			t.Errorf("killed after %d ms: %q are there", after, ids)
		} else if len(ids) == 1 {
			w.must(t, "rm", "-f", ids[0])
		}
		if left, err := os.ReadDir(w.dir + "/s/hand/boxes"); err != nil || len(left) > 0 {
			t.Errorf("killed after %d ms: left %v, %v", after, left, err)
		}
	}
}

func (w *world) testImages(t *testing.T) {
	if out := w.must(t, "images"); !strings.Contains(out, "image.tar") || strings.Count(out, "\n") != 2 {
		t.Errorf("images: %s", out)
	}
	digest := strings.TrimSpace(w.must(t, "pull", w.image))
	var list []struct{ Name, Digest string }
	if err := json.Unmarshal([]byte(w.must(t, "images", "-o", "json")), &list); err != nil || len(list) != 1 || list[0].Digest != digest {
		t.Errorf("images: %+v, %v, want %s", list, err, digest)
	}
	if out := w.must(t, "__complete", "run", ""); !strings.Contains(out, "image.tar") {
		t.Errorf("completion offers %q", out)
	}
	w.must(t, "rmi", w.image)
	if left, err := os.ReadDir(w.dir + "/s/hand/refs"); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
