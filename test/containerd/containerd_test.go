package containerd_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	bootstrap "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/containerd/api/runtime/task/v2"
	taskv3 "github.com/containerd/containerd/api/runtime/task/v3"
	mount "github.com/containerd/containerd/api/types"
	types "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"hauberk.dev/internal/stage"
)

// TestContainerd is what a user of containerd does, in one containerd.
func TestContainerd(t *testing.T) {
	w := newWorld(t)
	t.Run("run", w.testRun)
	t.Run("input", w.testInput)
	t.Run("terminal", w.testTerminal)
	t.Run("detached", w.testDetached)
	t.Run("events", w.testEvents)
	t.Run("refused", w.testRefused)
	t.Run("not run", w.testNotRun)
	t.Run("limits", w.testLimits)
	t.Run("disk", w.testDisk)
	t.Run("service", w.testService)
	t.Run("shim killed", w.testShimKilled)
	t.Run("machine killed", w.testMachineKilled)
	t.Run("containerd killed", w.testContainerdKilled)
	t.Run("killed while created", w.testKilledWhileCreated)
	t.Run("newer caller", w.testNewerCaller)
	t.Run("pod", w.testPod)
}

func (w *world) testRun(t *testing.T) {
	began := time.Now()
	out, err := w.run(t, "", []string{"--rm", "--env", "COLOUR=red"}, "run", "sh", "-c", "echo $COLOUR; hostname; pwd; id -u; uname -r; echo wrong >&2; exit 7")
	var failed *ctrError
	if !errors.As(err, &failed) || code(err) != 7 || failed.said != "wrong\n" {
		t.Errorf("ended with %v, want exit code 7 and an error", err)
	}
	lines := strings.Split(out, "\n")
	if len(lines) != 6 || !slices.Equal(lines[:4], []string{"red", "run", "/", "0"}) || !strings.Contains(lines[4], "cloud") {
		t.Errorf("printed %q", out)
	}
	first := time.Since(began)
	began = time.Now()
	if _, err := w.run(t, "", []string{"--rm"}, "again", "true"); err != nil {
		t.Error(err)
	}
	t.Logf("ctr run took %v, and %v with everything prepared", first.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
	// More than all buffers on the way hold.
	out, err = w.run(t, "", []string{"--rm"}, "much", "sh", "-c", "head -c 3000000 /dev/zero | tr '\\0' x")
	if err != nil || len(out) != 3000000 {
		t.Errorf("%d bytes of 3000000, %v", len(out), err)
	}
}

func (w *world) testInput(t *testing.T) {
	text := strings.Repeat("0123456789\n", 30000)
	out, err := w.run(t, text, []string{"--rm"}, "input", "sh", "-c", "wc -c; echo end")
	if err != nil || strings.Fields(out)[0] != strconv.Itoa(len(text)) || !strings.HasSuffix(out, "end\n") {
		t.Errorf("printed %q, %v", out, err)
	}
}

func (w *world) testTerminal(t *testing.T) {
	script, err := exec.LookPath("script")
	if err != nil {
		t.Skip("script (bsdutils) makes the terminal: ", err)
	}
	line := "stty rows 33 cols 101; ctr -a " + w.path("c.sock") + " run --rm -t --runtime " + runtimeName + " " + imageName +
		" terminal sh -c 'tty; until stty size 2>/dev/null; do sleep 0.1; done; echo out >&2; exit 4'" // ctr gives the size after the start
	ctx, cancel := context.WithTimeout(t.Context(), callTime)
	defer cancel()
	out, err := exec.CommandContext(ctx, script, "-qec", line, os.DevNull).Output()
	if code(err) != 4 || !strings.Contains(strings.ReplaceAll(string(out), "\r", ""), "/dev/pts/0\n33 101\nout\n") {
		t.Errorf("printed %q, %v", out, err)
	}
}

func (w *world) testDetached(t *testing.T) {
	pid := w.detach(t, "stays", "sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.1; done")
	if line, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline"); err != nil || !strings.HasPrefix(string(line), "/usr/bin/qemu") {
		t.Errorf("process %d is %q, %v", pid, line, err)
	}
	inside := func(id string, args ...string) (string, error) {
		return w.ctr(t.Context(), "", append([]string{"task", "exec", "--exec-id", id, "stays"}, args...)...)
	}
	if out, err := inside("one", "sh", "-c", "hostname; cat /proc/1/comm; exit 5"); code(err) != 5 || out != "stays\nsh\n" {
		t.Errorf("exec printed %q, %v", out, err)
	}
	if out, err := w.ctr(t.Context(), "abc", "task", "exec", "--exec-id", "two", "stays", "cat"); err != nil || out != "abc" {
		t.Errorf("exec printed %q, %v", out, err)
	}
	// The Guard is there: what was written does not run.
	if out, err := inside("three", "sh", "-c", "cp /bin/busybox /tmp/x && /tmp/x echo ran"); code(err) != 126 || out != "" {
		t.Errorf("a written program: %q, %v, want exit code 126", out, err)
	}
	// Its device is on nothing: a pod without a network has loopback only.
	if out, err := inside("four", "sh", "-c", "ip -o addr | grep -w inet; ip route; ip -6 route | grep -v lo"); err != nil && code(err) != 1 ||
		strings.Count(out, "\n") != 1 || !strings.Contains(out, "127.0.0.1/8") {
		t.Errorf("addresses and routes: %q, %v", out, err)
	}
	out := w.must(t, "", "task", "metrics", "stays")
	for _, names := range [][2]string{{"pids.current"}, {"cpu.usage_usec", "cpuacct.usage "}, {"memory.usage ", "memory.usage_in_bytes"}} {
		_, rest, ok := strings.Cut(out, names[0])
		if !ok { // in the words of a host with cgroups of version 1
			_, rest, _ = strings.Cut(out, names[1])
		}
		if f := strings.Fields(rest); len(f) == 0 || f[0] == "0" {
			t.Errorf("no %s in %q", names[0], out)
		}
	}
	w.must(t, "", "task", "pause", "stays")
	w.becomes(t, "stays", "PAUSED")
	w.must(t, "", "task", "resume", "stays")
	w.becomes(t, "stays", "RUNNING")
	w.must(t, "", "task", "kill", "-s", "TERM", "stays")
	w.becomes(t, "stays", "STOPPED")
	if _, err := w.ctr(t.Context(), "", "task", "rm", "stays"); err != nil && !strings.Contains(err.Error(), "code 3") {
		t.Error(err)
	}
	w.must(t, "", "container", "rm", "stays")

	w.detach(t, "frozen", "sleep", "1000")
	w.must(t, "", "task", "pause", "frozen")
	w.discard(t, "frozen")
}

// listen collects the topics of a container's events until the last is heard.
func (w *world) listen(t *testing.T, id string) (until func(last string) []string) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	cmd := exec.CommandContext(ctx, "ctr", "-a", w.path("c.sock"), "events")
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	topics, listens := make(chan string, 1000), make(chan struct{})
	go func() {
		said := sync.OnceFunc(func() { close(listens) })
		for s := bufio.NewScanner(pipe); s.Scan(); said() {
			if _, rest, ok := strings.Cut(s.Text(), " /tasks/"); ok && strings.Contains(rest, `"`+id+`"`) {
				topics <- "/tasks/" + strings.Fields(rest)[0]
			}
		}
	}()
	t.Cleanup(func() { cancel(); cmd.Wait() })
	// ctr does not say when it listens: it hears of something then.
	w.await(t, "ctr events", w.server.exited, func(context.Context) error {
		w.must(t, "", "namespaces", "label", space, "heard="+strconv.FormatInt(time.Now().UnixNano(), 36))
		select {
		case <-listens:
			return nil
		case <-time.After(50 * time.Millisecond):
			return errors.New("it hears nothing")
		}
	})
	return func(last string) (heard []string) {
		t.Helper()
		late := time.After(callTime)
		for len(heard) == 0 || heard[len(heard)-1] != last {
			select {
			case topic := <-topics:
				heard = append(heard, topic)
			case <-late:
				t.Fatalf("heard only %q", heard)
			}
		}
		return heard
	}
}

// testEvents reads what containerd tells of one container's life.
func (w *world) testEvents(t *testing.T) {
	until := w.listen(t, "told")
	w.detach(t, "told", "sleep", "1000")
	w.must(t, "", "task", "exec", "--exec-id", "e", "told", "true")
	w.must(t, "", "task", "pause", "told")
	w.must(t, "", "task", "resume", "told")
	w.discard(t, "told")
	got := until("/tasks/delete")
	want := strings.Fields("/tasks/create /tasks/start /tasks/exec-added /tasks/exec-started /tasks/exit /tasks/paused /tasks/resumed /tasks/exit /tasks/delete")
	if !slices.Equal(got, want) {
		t.Errorf("heard %q, want %q", got, want)
	}
}

// testRefused asks for what a sandbox cannot do: the error names the field, and
// nothing is left.
func (w *world) testRefused(t *testing.T) {
	for want, flags := range map[string][]string{
		`linux.namespaces: no "network"`:                  {"--net-host"},
		`process.capabilities.bounding[14] "CAP_NOTHING"`: {"--cap-add", "CAP_NOTHING"},
		`linux.namespaces[1].path "/proc/1/ns/ipc"`:       {"--with-ns", "ipc:/proc/1/ns/ipc"},
		"the machine's own network":                       {"--with-ns", "network:/proc/self/ns/net"},
		"linux.resources.memory.limit 4096":               {"--memory-limit", "4096"},
		`process.apparmorProfile "unconfined-by-us"`:      {"--apparmor-profile", "unconfined-by-us"},
		`open output "binary:///bin/true?id=x"`:           {"--log-uri", "binary:///bin/true?id=x"},
		`mounts[7].source "/dev/log/no"`:                  {"--mount", "type=bind,src=/dev/log/no,dst=/x,options=rbind:ro"},
	} {
		_, err := w.run(t, "", append(flags, "-d"), "refused", "true")
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", flags, err, want)
		}
		w.ctr(t.Context(), "", "container", "rm", "refused") // ctr may have removed it
	}
	if left := w.machines(t); len(left) > 0 {
		t.Errorf("run directories: %q", left)
	}
}

func (w *world) testNotRun(t *testing.T) {
	_, err := w.run(t, "", []string{"-d"}, "nothing", "/no/such/program")
	if err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("a program that is not there: %v", err)
	}
	w.discard(t, "nothing")
}

func (w *world) testLimits(t *testing.T) {
	out, err := w.run(t, "", []string{"--rm", "--memory-limit", "67108864", "--cwd", "/srv/here"}, "limits", "sh", "-c", "pwd; grep MemTotal /proc/meminfo")
	f := strings.Fields(out)
	if err != nil || len(f) != 4 || f[0] != "/srv/here" {
		t.Fatalf("printed %q, %v", out, err)
	}
	if kb, err := strconv.Atoi(f[2]); err != nil || kb > 256<<10 || kb < 96<<10 {
		t.Errorf("the machine has %s kB", f[2])
	}
	until := w.listen(t, "greedy")
	_, err = w.run(t, "", []string{"--rm", "--memory-limit", "33554432"}, "greedy", "sh", "-c", "exec dd if=/dev/zero of=/dev/shm/x bs=64k")
	if code(err) != 137 {
		t.Errorf("more memory than allowed: %v, want exit code 137", err)
	}
	if heard := until("/tasks/delete"); !slices.Contains(heard, "/tasks/oom") {
		t.Errorf("heard %q, without /tasks/oom", heard)
	}
}

// testDisk gives a container a disk of the host and what a guest has of its own;
// another disk of the machine stays out of its reach.
func (w *world) testDisk(t *testing.T) {
	file := w.path("disk")
	if err := errors.Join(os.WriteFile(file, []byte("old"), 0o600), os.Truncate(file, 1<<20)); err != nil {
		t.Fatal(err)
	}
	found, err := exec.Command("losetup", "--find", "--show", file).Output()
	if err != nil {
		t.Skip("it gives a disk of the host, for which this machine has no loop devices: ", err)
	}
	disk := strings.TrimSpace(string(found))
	defer func() {
		if err := exec.Command("losetup", "--detach", disk).Run(); err != nil {
			t.Errorf("detach %s: %v", disk, err)
		}
	}()
	script := "head -c 3 $0; printf new | dd of=$0 conv=notrunc,fsync 2>/dev/null; : < /dev/fuse; set -- $(stat -c '0x%t 0x%T' $0); cat /sys/dev/block/$(($1)):$(($2))/size; mknod /dev/root b $(($1)) 0; head -c 4 /dev/root"
	out, err := w.run(t, "", []string{"--rm", "--device", disk, "--device", "/dev/fuse"}, "disk", "sh", "-c", script, disk)
	var failed *ctrError
	if out != "old2048\n" || !errors.As(err, &failed) || strings.Contains(failed.said, "fuse") || strings.Count(failed.said, "Operation not permitted") == 0 {
		t.Errorf("printed %q, %v", out, err)
	}
	if raw, err := os.ReadFile(file); err != nil || !strings.HasPrefix(string(raw), "new") || len(raw) != 1<<20 {
		t.Errorf("the disk begins with %.8q, %v", raw, err)
	}
}

// dial connects to the shim of a container as containerd does.
func (w *world) dial(t *testing.T, id string) *ttrpc.Client {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(w.bundle(id), "address"))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", strings.TrimPrefix(string(raw), "unix://"))
	if err != nil {
		t.Fatal(err)
	}
	c := ttrpc.NewClient(conn)
	t.Cleanup(func() { c.Close() })
	return c
}

func (w *world) bundle(id string) string {
	return filepath.Join(w.path("state"), "io.containerd.runtime.v2.task", space, id)
}

// testService speaks with a shim directly: both versions, a second create,
// calls beside one that waits.
func (w *world) testService(t *testing.T) {
	pid := w.detach(t, "spoken", "sleep", "1000")
	c := w.dial(t, "spoken")
	ctx, cancel := context.WithTimeout(t.Context(), callTime)
	defer cancel()
	const v2, v3 = "containerd.task.v2.Task", "containerd.task.v3.Task"
	ended := make(chan *task.WaitResponse, 1)
	go func() {
		var r task.WaitResponse
		if err := w.dial(t, "spoken").Call(ctx, v3, "Wait", &task.WaitRequest{ID: "spoken"}, &r); err != nil {
			t.Error(err)
		}
		ended <- &r
	}()
	var state task.StateResponse
	for _, version := range []string{v2, v3} {
		if err := c.Call(ctx, version, "State", &task.StateRequest{ID: "spoken"}, &state); err != nil || state.Status != types.Status_RUNNING || int(state.Pid) != pid {
			t.Errorf("%s: %v, %v", version, &state, err)
		}
	}
	again := &task.CreateTaskRequest{ID: "spoken", Bundle: state.Bundle, Stdin: state.Stdin, Stdout: state.Stdout, Stderr: state.Stderr}
	for range 2 {
		var r task.CreateTaskResponse
		if err := c.Call(ctx, v2, "Create", again, &r); err != nil || int(r.Pid) != pid {
			t.Errorf("create again: %v, %v", &r, err)
		}
	}
	for name, r := range map[string]*task.CreateTaskRequest{
		"AlreadyExists":      {ID: "spoken", Bundle: "/elsewhere"},
		"FailedPrecondition": {ID: "other", Bundle: state.Bundle},
	} {
		if err := c.Call(ctx, v2, "Create", r, &task.CreateTaskResponse{}); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("create %v: %v, want %s", r, err, name)
		}
	}
	// The machine runs where the container is to run.
	const resources = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
	pinned := &task.UpdateTaskRequest{ID: "spoken", Resources: &anypb.Any{TypeUrl: resources, Value: []byte(`{"cpu":{"cpus":"0"}}`)}}
	if err := c.Call(ctx, v2, "Update", pinned, &emptypb.Empty{}); err != nil {
		t.Errorf("update: %v", err)
	}
	if raw, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status"); err != nil || !strings.Contains(string(raw), "\nCpus_allowed_list:\t0\n") {
		t.Errorf("the machine runs elsewhere: %s, %v", raw, err)
	}
	if err := c.Call(ctx, v2, "Delete", &task.DeleteRequest{ID: "spoken"}, &task.DeleteResponse{}); err == nil || !strings.Contains(err.Error(), "has not ended") {
		t.Errorf("delete of what runs: %v", err)
	}
	if left := w.machines(t); len(left) != 1 {
		t.Errorf("%d machines: %q", len(left), left)
	}
	w.must(t, "", "task", "kill", "-s", "KILL", "spoken")
	if r := <-ended; r.ExitStatus != 137 || r.ExitedAt == nil {
		t.Errorf("wait: %v", r)
	}
	w.discard(t, "spoken")
}

// gone waits until processes have ended and no run directory is left.
func (w *world) gone(t *testing.T, pids ...int) {
	t.Helper()
	w.await(t, "the end of everything", w.server.exited, func(context.Context) error {
		for _, pid := range pids {
			if raw, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat"); err == nil && !strings.Contains(string(raw), ") Z ") {
				return errors.New("process " + strconv.Itoa(pid) + " lives")
			}
		}
		if left := w.machines(t); len(left) > 0 {
			return errors.New("run directories: " + strings.Join(left, " "))
		}
		return nil
	})
}

func (w *world) shim(t *testing.T, id string) int {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(w.bundle(id), "shim.pid"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(string(raw))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

func kill(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// testShimKilled: containerd calls the shim to delete, which ends the machine.
func (w *world) testShimKilled(t *testing.T) {
	machine := w.detach(t, "orphan", "sleep", "1000")
	address, err := os.ReadFile(filepath.Join(w.bundle("orphan"), "address"))
	if err != nil {
		t.Fatal(err)
	}
	shim := w.shim(t, "orphan")
	kill(t, shim)
	w.gone(t, shim, machine)
	w.becomes(t, "orphan", "")
	if _, err := os.Stat(strings.TrimPrefix(string(address), "unix://")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
	// The same container can be started anew.
	w.must(t, "", "task", "start", "-d", "orphan")
	w.becomes(t, "orphan", "RUNNING")
	w.machines(t)
	w.discard(t, "orphan")
}

// testMachineKilled: the shim tells of it as of any other end.
func (w *world) testMachineKilled(t *testing.T) {
	machine := w.detach(t, "crashed", "sleep", "1000")
	kill(t, machine)
	w.becomes(t, "crashed", "STOPPED")
	w.gone(t, machine)
	w.discard(t, "crashed")
}

// testContainerdKilled: containers go on, and the next containerd has them.
func (w *world) testContainerdKilled(t *testing.T) {
	pid := w.detach(t, "survives", "sleep", "1000")
	w.stop(t, syscall.SIGKILL)
	w.serve(t)
	w.becomes(t, "survives", "RUNNING")
	if now, _, err := w.status(t.Context(), "survives"); err != nil || now != pid {
		t.Errorf("process %d, %v, want %d", now, err, pid)
	}
	if out := w.must(t, "", "task", "exec", "--exec-id", "x", "survives", "echo", "here"); out != "here\n" {
		t.Errorf("printed %q", out)
	}
	w.discard(t, "survives")
}

// testKilledWhileCreated kills the shim at moments of a start; whatever was
// made by then goes.
func (w *world) testKilledWhileCreated(t *testing.T) {
	for _, after := range []time.Duration{20, 300, 800, 1300, 1800, 2300, 2800} {
		done := make(chan error, 1)
		go func() {
			_, err := w.run(t, "", []string{"-d"}, "cut", "sleep", "1000")
			done <- err
		}()
		pidFile := filepath.Join(w.bundle("cut"), "shim.pid")
		w.await(t, "the shim", w.server.exited, func(context.Context) error { _, err := os.Stat(pidFile); return err })
		time.Sleep(after * time.Millisecond)
		made := len(w.machines(t))
		shim := w.shim(t, "cut")
		kill(t, shim)
		err := <-done
		t.Logf("killed after %v ms, with %d machines: %v", int(after), made, err)
		w.gone(t, shim)
		w.becomes(t, "cut", "")
		w.ctr(t.Context(), "", "container", "rm", "cut") // ctr may have removed it
	}
}

// testNewerCaller starts a shim as containerd 2.4 does: parameters on standard
// input, version 3 of the service. The container is killed before it starts.
func (w *world) testNewerCaller(t *testing.T) {
	bundle := t.TempDir()
	raw, err := os.ReadFile("../../shim/testdata/ctr-run.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), raw, 0o600); err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(bundle, "files")
	if err := os.MkdirAll(filepath.Join(root, "bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("cp", stage.Busybox, filepath.Join(root, "bin/sleep")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	address := w.startNewer(t, bundle)
	conn, err := net.Dial("unix", strings.TrimPrefix(address, "unix://"))
	if err != nil {
		t.Fatal(err)
	}
	c := ttrpc.NewClient(conn)
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), callTime)
	defer cancel()
	call := func(verb string, request, reply any) {
		t.Helper()
		if err := c.Call(ctx, "containerd.task.v3.Task", verb, request, reply); err != nil {
			t.Fatalf("%s: %v", verb, err)
		}
	}
	mounts := []*mount.Mount{{Type: "bind", Source: root, Options: []string{"rbind", "ro"}}}
	var made taskv3.CreateTaskResponse
	call("Create", &taskv3.CreateTaskRequest{ID: "newer", Bundle: bundle, Rootfs: mounts}, &made)
	w.machines(t)
	var state taskv3.StateResponse
	call("State", &taskv3.StateRequest{ID: "newer"}, &state)
	if state.Status != types.Status_CREATED || state.Pid != made.Pid || made.Pid == 0 {
		t.Errorf("%v after %v", &state, &made)
	}
	call("Kill", &taskv3.KillRequest{ID: "newer", Signal: 9, All: true}, &emptypb.Empty{})
	var ended taskv3.WaitResponse
	call("Wait", &taskv3.WaitRequest{ID: "newer"}, &ended)
	var gone taskv3.DeleteResponse
	call("Delete", &taskv3.DeleteRequest{ID: "newer"}, &gone)
	if ended.ExitStatus != 137 || gone.ExitStatus != 137 {
		t.Errorf("%v, %v, want status 137", &ended, &gone)
	}
	var who taskv3.ConnectResponse
	call("Connect", &taskv3.ConnectRequest{ID: "newer"}, &who)
	call("Shutdown", &taskv3.ShutdownRequest{ID: "newer"}, &emptypb.Empty{})
	w.gone(t, int(who.ShimPid))
	if _, err := os.Stat(strings.TrimPrefix(address, "unix://")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
}

// startNewer starts a shim with parameters and gives its address.
func (w *world) startNewer(t *testing.T, bundle string) string {
	t.Helper()
	sockets := w.path("s")
	params, err := proto.Marshal(&bootstrap.BootstrapParams{InstanceID: "newer", Namespace: space, SocketDir: &sockets})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(w.path("bin/containerd-shim-hauberk-v2"), "-namespace", space, "-id", "newer", "-address", w.path("c.sock"), "start")
	cmd.Dir, cmd.Stdin = bundle, bytes.NewReader(params)
	cmd.Env = append(os.Environ(), "HAUBERK_SHIM_STATE="+w.path("shim"), "HAUBERK_SHIM_RUN="+w.path("run"))
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var result bootstrap.BootstrapResult
	if err := proto.Unmarshal(out, &result); err != nil || result.Version != 3 || result.Protocol != "ttrpc" || !strings.HasPrefix(result.Address, "unix://"+sockets+"/") {
		t.Fatalf("%v, %v", &result, err)
	}
	return result.Address
}

// join starts a container of a pod, or, with its id, what stands for the pod.
func (w *world) join(t *testing.T, pod, id string, args ...string) {
	t.Helper()
	kind := "container"
	if pod == id {
		kind = "sandbox"
	}
	flags := []string{"-d", "--annotation", "io.kubernetes.cri.container-type=" + kind, "--annotation", "io.kubernetes.cri.sandbox-id=" + pod}
	if _, err := w.run(t, "", flags, id, args...); err != nil {
		t.Fatal(err)
	}
	w.becomes(t, id, "RUNNING")
	w.machines(t)
}

// testPod runs several containers in one machine, as the CRI of containerd 1.6
// asks for them, kills containerd and then the shim.
func (w *world) testPod(t *testing.T) {
	inside := func(id, exec string, args ...string) string {
		t.Helper()
		return w.must(t, "", append([]string{"task", "exec", "--exec-id", exec, id}, args...)...)
	}
	w.join(t, "pod", "pod")
	w.join(t, "pod", "one", "sleep", "1000")
	w.join(t, "pod", "two", "sh", "-c", "httpd -f -p 127.0.0.1:80 -h /etc & sleep 1000")
	if left := w.machines(t); len(left) != 1 {
		t.Errorf("machines: %q", left)
	}
	if out := inside("one", "a", "sh", "-c", "hostname; until wget -qO- http://127.0.0.1/passwd; do sleep 0.1; done; ls -d /proc/[0-9]* | wc -l"); !strings.HasPrefix(out, "pod\nroot:x:0:0") {
		t.Errorf("printed %q", out)
	}
	for range 2 { // a container that fails is made anew
		w.discard(t, "one")
		w.join(t, "pod", "one", "sleep", "1000")
	}
	w.stop(t, syscall.SIGKILL)
	w.serve(t)
	for _, id := range []string{"pod", "one", "two"} {
		w.becomes(t, id, "RUNNING")
	}
	if out := inside("one", "b", "echo", "here"); out != "here\n" {
		t.Errorf("printed %q", out)
	}
	shim := w.shim(t, "pod")
	kill(t, shim)
	w.gone(t, shim)
	for _, id := range []string{"one", "two", "pod"} {
		w.becomes(t, id, "")
		w.must(t, "", "container", "rm", id)
	}
	// Without its pod a container does not start.
	if _, err := w.run(t, "", []string{"-d", "--annotation", "io.kubernetes.cri.container-type=container", "--annotation", "io.kubernetes.cri.sandbox-id=pod"}, "late", "true"); err == nil || !strings.Contains(err.Error(), "is not running") {
		t.Errorf("without a pod: %v", err)
	}
	w.ctr(t.Context(), "", "container", "rm", "late") // ctr may have removed it
}
