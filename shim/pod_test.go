package shim

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/containerd/api/runtime/task/v2"
	mount "github.com/containerd/containerd/api/types"
	types "github.com/containerd/containerd/api/types/task"

	"hauberk.dev/api/guestproto"
	"hauberk.dev/guard"
	"hauberk.dev/shim/oci"
	"hauberk.dev/vm"
)

// fakeMachine is a machine whose guest is a goroutine of the test: it runs
// nothing, and ends what it is told to kill.
type fakeMachine struct {
	t    testing.TB
	conn net.Conn // the guest's end
	far  net.Conn

	mu      sync.Mutex
	disks   map[vm.Slot]bool
	asked   []guestproto.Verb
	next    uint32 // process
	silent  map[guestproto.Verb]bool
	refuse  map[guestproto.Verb]syscall.Errno
	creates []guestproto.Create

	writing sync.Mutex
	once    sync.Once
	done    chan struct{}
}

func newFakeMachine(t testing.TB) *fakeMachine {
	here, there := net.Pipe()
	m := &fakeMachine{
		t: t, conn: there, far: here, disks: map[vm.Slot]bool{}, done: make(chan struct{}),
		silent: map[guestproto.Verb]bool{}, refuse: map[guestproto.Verb]syscall.Errno{},
	}
	go m.run()
	return m
}

func (m *fakeMachine) PID() int              { return 4242 }
func (m *fakeMachine) Done() <-chan struct{} { return m.done }
func (m *fakeMachine) Err() error            { return vm.ErrKilled }
func (m *fakeMachine) Console() string       { return `""` }

func (m *fakeMachine) Snapshot(context.Context, string, []byte) (vm.Snapshot, error) {
	return vm.Snapshot{}, errors.ErrUnsupported
}

func (m *fakeMachine) Kill(context.Context) error {
	m.once.Do(func() { m.conn.Close(); close(m.done) })
	return nil
}

func (m *fakeMachine) Attach(_ context.Context, d vm.Disk) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.disks[d.Slot] {
		return vm.ErrSlotTaken
	}
	m.disks[d.Slot] = true
	return nil
}

func (m *fakeMachine) Detach(_ context.Context, s vm.Slot) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.disks, s)
	return nil
}

func (m *fakeMachine) Channel(ctx context.Context, onRecord func([]byte)) (*vm.Channel, guestproto.Hello, error) {
	c := vm.NewChannel(m.far)
	c.Events(onRecord)
	hello, err := c.Hello(ctx)
	return c, hello, err
}

func (m *fakeMachine) say(id uint32, v guestproto.Verb, payload []byte) {
	b := append(guestproto.Begin(nil, id, v), payload...)
	guestproto.End(b, 0)
	m.writing.Lock()
	defer m.writing.Unlock()
	m.conn.Write(b) // fails once the host has hung up
}

// run is the guest.
func (m *fakeMachine) run() {
	for {
		var header [guestproto.HeaderSize]byte
		if _, err := io.ReadFull(m.conn, header[:]); err != nil {
			return
		}
		h, err := guestproto.ParseHeader(header[:])
		if err != nil {
			m.t.Error(err)
			return
		}
		b := make([]byte, h.Payload())
		if _, err := io.ReadFull(m.conn, b); err != nil {
			return
		}
		m.hear(h, b)
	}
}

func (m *fakeMachine) hear(h guestproto.Header, b []byte) {
	m.mu.Lock()
	m.asked = append(m.asked, h.Verb)
	silent, errno := m.silent[h.Verb], m.refuse[h.Verb]
	m.mu.Unlock()
	reply := func(payload []byte) { go m.say(h.ID, guestproto.VerbReply, payload) }
	switch {
	case h.Verb == guestproto.VerbCredit, silent:
		return
	case errno != 0:
		go m.say(h.ID, guestproto.VerbError, (&guestproto.Refusal{Errno: uint32(errno), Text: "no"}).Append(nil))
		return
	}
	switch h.Verb {
	case guestproto.VerbHello:
		q, err := guestproto.ParseHelloRequest(b)
		if err != nil {
			m.t.Error(err)
		}
		m.conn.Write(q.Nonce[:])
		m.say(h.ID, guestproto.VerbReply, (&guestproto.Hello{Version: guestproto.Version, Guard: guestproto.GuardAttached}).Append(nil))
	case guestproto.VerbGuardPolicy:
		p, err := guestproto.ParseGuardPolicy(b)
		if err != nil {
			m.t.Error(err)
		}
		reply(append(binary.LittleEndian.AppendUint64([]byte{2}, p.Generation), 0, 0, 0))
	case guestproto.VerbMountRoot:
		reply((&guestproto.MountedRoot{}).Append(nil))
	case guestproto.VerbCreate:
		c, err := guestproto.ParseCreate(b)
		if err != nil {
			m.t.Error(err)
		}
		m.mu.Lock()
		m.creates = append(m.creates, c)
		m.mu.Unlock()
		reply((&guestproto.ProcessID{Process: m.number()}).Append(nil))
	case guestproto.VerbExec:
		reply((&guestproto.ProcessID{Process: m.number()}).Append(nil))
	case guestproto.VerbSignal:
		s, err := guestproto.ParseSignal(b)
		if err != nil {
			m.t.Error(err)
		}
		go func() {
			m.say(h.ID, guestproto.VerbReply, nil)
			if s.Number == 9 || s.Number == 15 {
				m.exit(s.Process, 128+s.Number)
			}
		}()
	case guestproto.VerbStats:
		m.mu.Lock()
		st := guestproto.Stats{}
		for n := uint32(1); n <= m.next; n++ {
			st.Containers = append(st.Containers, guestproto.ContainerStats{Process: n, Memory: 1 << 20, CPU: 7, Pids: 1})
		}
		m.mu.Unlock()
		reply(st.Append(nil))
	default:
		reply(nil)
	}
}

func (m *fakeMachine) number() uint32 {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.next++
	return m.next
}

// exit ends a process of the guest, and its output before.
func (m *fakeMachine) exit(process uint32, code uint8) {
	for _, s := range []guestproto.Stream{guestproto.StreamStdout, guestproto.StreamStderr} {
		end := guestproto.Output{Process: process, Stream: s}
		m.say(0, guestproto.VerbOutput, end.AppendPrefix(nil))
	}
	m.say(0, guestproto.VerbExit, (&guestproto.Exit{Process: process, Code: code}).Append(nil))
}

func (m *fakeMachine) count(v guestproto.Verb) (n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, a := range m.asked {
		if a == v {
			n++
		}
	}
	return n
}

func (m *fakeMachine) taken() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.disks)
}

// fakeBooter boots fake machines.
type fakeBooter struct {
	t    testing.TB
	fail error
	mu   sync.Mutex
	made []*fakeMachine
}

func (f *fakeBooter) machine(context.Context, string, wish) (machine, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return nil, f.fail
	}
	m := newFakeMachine(f.t)
	f.made = append(f.made, m)
	return m, nil
}

// stand is a service whose machines are fakes, with one image for all.
type stand struct {
	*service
	t     *testing.T
	boots *fakeBooter
	heard *hearer
	dir   string
}

func newStand(t *testing.T, id string) *stand {
	h := &hearer{}
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	b := &fakeBooter{t: t}
	s := &service{
		args: arguments{id: id, namespace: "ns"}, conf: config{state: t.TempDir(), run: t.TempDir()}, log: log,
		events: startPublisher(scheme+listenEvents(t, h), "ns", log), containers: map[string]*container{},
		guests: func(context.Context) (booter, error) { return b, nil },
		stop:   func() {}, release: func() {},
	}
	t.Cleanup(func() {
		if err := s.close(); err != nil {
			t.Error(err)
		}
		s.events.Close()
	})
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "image"), []byte("image"), 0o600); err != nil {
		t.Fatal(err)
	}
	return &stand{s, t, b, h, dir}
}

// bundle writes the configuration of a container.
func (s *stand) bundle(id, kind, pod string) string {
	s.t.Helper()
	type object = map[string]any
	var namespaces []object
	for _, kind := range []string{"pid", "ipc", "uts", "mount", "network"} {
		namespaces = append(namespaces, object{"type": kind})
	}
	annotations := map[string]string{}
	if kind != "" {
		annotations = map[string]string{"io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": pod}
	}
	raw, err := json.Marshal(object{
		"ociVersion": "1.1.0", "annotations": annotations, "linux": object{"namespaces": namespaces},
		"process": object{"args": []string{"true"}, "cwd": "/"},
	})
	if err != nil {
		s.t.Fatal(err)
	}
	dir := filepath.Join(s.dir, id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), raw, 0o600); err != nil {
		s.t.Fatal(err)
	}
	return dir
}

const imageSum = "6105d6cc76af400325e94d588ce511be5bfdbb73b437dc51eca43917d7a43e3d" // of "image"

func (s *stand) request(id, kind, pod string) *task.CreateTaskRequest {
	s.t.Helper()
	return &task.CreateTaskRequest{ID: id, Bundle: s.bundle(id, kind, pod), Rootfs: []*mount.Mount{{
		Type: "erofs", Source: filepath.Join(s.dir, "image"), Options: []string{digestOption + imageSum},
	}}}
}

// run creates and starts a container.
func (s *stand) run(id, kind, pod string) {
	s.t.Helper()
	if _, err := s.Create(s.t.Context(), s.request(id, kind, pod)); err != nil {
		s.t.Fatal(err)
	}
	if _, err := s.Start(s.t.Context(), &task.StartRequest{ID: id}); err != nil {
		s.t.Fatal(err)
	}
}

// end kills, awaits and deletes a container.
func (s *stand) end(id string) *task.DeleteResponse {
	s.t.Helper()
	if _, err := s.Kill(s.t.Context(), &task.KillRequest{ID: id, Signal: 9, All: true}); err != nil {
		s.t.Fatal(err)
	}
	if _, err := s.Wait(s.t.Context(), &task.WaitRequest{ID: id}); err != nil {
		s.t.Fatal(err)
	}
	r, err := s.Delete(s.t.Context(), &task.DeleteRequest{ID: id})
	if err != nil {
		s.t.Fatal(err)
	}
	return r
}

func (s *stand) machine() *fakeMachine { return s.boots.made[len(s.boots.made)-1] }

func (s *stand) topics() []string {
	s.heard.mu.Lock()
	defer s.heard.mu.Unlock()
	var out []string
	for _, line := range s.heard.heard {
		out = append(out, strings.Fields(line)[1])
	}
	return out
}

// TestPod is the life of a pod of the CRI: containers come, go and come again
// on one machine, which ends with the pause container.
func TestPod(t *testing.T) {
	s := newStand(t, "pod")
	s.run("pod", "sandbox", "pod")
	for range 3 {
		s.run("one", "container", "pod")
		s.run("two", "container", "pod")
		if r := s.end("one"); r.ExitStatus != 137 {
			t.Errorf("deleted with %v", r)
		}
		s.run("one", "container", "pod")
		s.end("two")
		s.end("one")
	}
	m := s.machine()
	if len(s.boots.made) != 1 || m.taken() != 0 || m.count(guestproto.VerbUnmountRoot) != 9 || m.count(guestproto.VerbForget) != 9 {
		t.Errorf("%d machines, %d disks, %d roots unmounted, %d processes forgotten", len(s.boots.made), m.taken(),
			m.count(guestproto.VerbUnmountRoot), m.count(guestproto.VerbForget))
	}
	if c := m.creates[0]; c.Hostname != "pod" {
		t.Errorf("hostname %q", c.Hostname)
	}
	s.run("last", "container", "pod")
	if r := s.end("pod"); r.ExitStatus != 137 {
		t.Errorf("the pod was deleted with %v", r)
	}
	if st, err := s.Wait(t.Context(), &task.WaitRequest{ID: "last"}); err != nil || st.ExitStatus != 137 {
		t.Errorf("with the pod: %v, %v", st, err)
	}
	if _, err := s.Create(t.Context(), s.request("late", "container", "pod")); err == nil {
		t.Error("a container was made in a pod that has ended")
	}
	if _, err := s.Delete(t.Context(), &task.DeleteRequest{ID: "last"}); err != nil {
		t.Error(err)
	}
	if left, err := filepath.Glob(filepath.Join(s.dir, "*", journalName)); err != nil || len(left) > 0 {
		t.Errorf("journals: %q, %v", left, err)
	}
}

// TestPauseSignals: a pause container does with signals what the program does.
func TestPauseSignals(t *testing.T) {
	for signal, want := range map[syscall.Signal]uint32{syscall.SIGTERM: 0, syscall.SIGINT: 0, syscall.SIGKILL: 137} {
		s := newStand(t, "pod")
		s.run("pod", "sandbox", "pod")
		for _, nothing := range []syscall.Signal{0, syscall.SIGHUP, syscall.SIGUSR1} {
			if _, err := s.Kill(t.Context(), &task.KillRequest{ID: "pod", Signal: uint32(nothing)}); err != nil {
				t.Error(err)
			}
		}
		if st, err := s.State(t.Context(), &task.StateRequest{ID: "pod"}); err != nil || st.Status != types.Status_RUNNING {
			t.Fatalf("%v, %v", st, err)
		}
		if _, err := s.Kill(t.Context(), &task.KillRequest{ID: "pod", Signal: uint32(signal)}); err != nil {
			t.Error(err)
		}
		r, err := s.Wait(t.Context(), &task.WaitRequest{ID: "pod"})
		if err != nil || r.ExitStatus != want {
			t.Errorf("%v: %v, %v, want %d", signal, r, err, want)
		}
		if _, err := s.Exec(t.Context(), &task.ExecProcessRequest{ID: "pod", ExecID: "x"}); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("exec: %v", err)
		}
	}
}

// TestShares: a pod's machine is replaced for the first container that wants a
// directory of the host, and for no later one.
func TestShares(t *testing.T) {
	s := newStand(t, "pod")
	s.run("pod", "sandbox", "pod")
	wanted := []oci.Volume{{Field: "mounts[0].source", Device: -1, Source: t.TempDir(), Target: "/data"}}
	if _, err := s.pod.enter(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if _, err := s.pod.enter(t.Context(), wanted); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), shareAnnotation) {
		t.Errorf("after another: %v", err)
	}
	s.end("pod")
	s.run("pod", "sandbox", "pod")
	old := s.machine()
	for range 2 {
		b, err := s.pod.enter(t.Context(), wanted)
		if err != nil || !b.shared {
			t.Fatal(b, err)
		}
	}
	if len(s.boots.made) != 3 {
		t.Errorf("%d machines", len(s.boots.made))
	}
	<-old.done
	s.run("one", "container", "pod")
	if st, err := s.State(t.Context(), &task.StateRequest{ID: "pod"}); err != nil || st.Status != types.Status_RUNNING {
		t.Errorf("%v, %v", st, err)
	}
	s.end("one")
	s.end("pod")
	s.run("pod", "sandbox", "pod")
	s.boots.fail = errors.New("no machine today")
	if _, err := s.pod.enter(t.Context(), wanted); err == nil {
		t.Error("there was another machine")
	}
	if r, err := s.Wait(t.Context(), &task.WaitRequest{ID: "pod"}); err != nil || r.ExitStatus != 137 {
		t.Errorf("%v, %v", r, err)
	}
}

// TestPrivilegedContainer: with a privileged container a pod's policy becomes
// that of privileged ones, once, unless somebody chose its policy.
func TestPrivilegedContainer(t *testing.T) {
	admin := []string{"CAP_SYS_ADMIN"}
	put := func(s *stand, id string, change func(process, annotations map[string]any)) {
		t.Helper()
		r := s.request(id, "container", "pod")
		switch id {
		case "pod":
			r = s.request(id, "sandbox", "pod")
		case "lone":
			r = s.request(id, "", "")
		}
		name := filepath.Join(r.Bundle, "config.json")
		raw, err := os.ReadFile(name)
		var v map[string]any
		if err = errors.Join(err, json.Unmarshal(raw, &v)); err != nil {
			t.Fatal(err)
		}
		change(v["process"].(map[string]any), v["annotations"].(map[string]any))
		if raw, err = json.Marshal(v); err == nil {
			err = os.WriteFile(name, raw, 0o600)
		}
		if err == nil {
			_, err = s.Create(t.Context(), r)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	plain := func(process, annotations map[string]any) {}
	privileged := func(process, annotations map[string]any) {
		process["capabilities"] = map[string]any{"bounding": admin, "effective": admin, "permitted": admin}
	}
	judged := func(process, annotations map[string]any) {
		annotations[policyAnnotation] = `{"policies":[{"name":"own","spec":{"sys":{"deny":["mount"]}}}]}`
	}
	s := newStand(t, "pod")
	put(s, "pod", plain)
	put(s, "one", plain)
	if p := s.pod.inForce(); p.Generation != 1 || s.machine().count(guestproto.VerbGuardPolicy) != 1 {
		t.Errorf("generation %d after an ordinary container", p.Generation)
	}
	put(s, "two", privileged)
	put(s, "three", privileged)
	p := s.pod.inForce()
	if p.Generation != 2 || s.machine().count(guestproto.VerbGuardPolicy) != 2 || slices.ContainsFunc(p.Rules, func(r guard.Rule) bool { return strings.Contains(r.Text, "mounted") }) {
		t.Errorf("with a privileged one: generation %d, %d policies told, rules %v", p.Generation, s.machine().count(guestproto.VerbGuardPolicy), p.Rules)
	}
	for _, want := range []string{"programs and libraries of the image", "eBPF may not", "modules may not", "traced", "TCP, UDP", "device file", "io_uring", "user namespace"} {
		if !slices.ContainsFunc(p.Rules, func(r guard.Rule) bool { return strings.Contains(r.Text, want) && r.Policy == "privileged" }) {
			t.Errorf("no rule about %q", want)
		}
	}
	s.end("pod")

	s = newStand(t, "pod")
	put(s, "pod", judged)
	put(s, "two", privileged)
	if p := s.pod.inForce(); s.machine().count(guestproto.VerbGuardPolicy) != 1 || !slices.ContainsFunc(p.Rules, func(r guard.Rule) bool { return r.Policy == "own" }) {
		t.Errorf("a chosen policy gave way: %v", p.Rules)
	}
	s.end("pod")

	// One that is alone has it from the start: a machine that goes on from a
	// snapshot of it has no older one.
	s = newStand(t, "lone")
	put(s, "lone", privileged)
	if s.pod.policy.Generation != 2 || s.machine().count(guestproto.VerbGuardPolicy) != 1 {
		t.Errorf("alone: generation %d, %d policies told", s.pod.policy.Generation, s.machine().count(guestproto.VerbGuardPolicy))
	}
	s.end("lone")
}

// TestAlone: the machine of a container that is its own pod ends with it.
func TestAlone(t *testing.T) {
	s := newStand(t, "web")
	s.run("web", "", "")
	m := s.machine()
	m.exit(1, 3)
	if r, err := s.Wait(t.Context(), &task.WaitRequest{ID: "web"}); err != nil || r.ExitStatus != 3 {
		t.Errorf("%v, %v", r, err)
	}
	select {
	case <-m.done:
	case <-time.After(soon):
		t.Error("the machine goes on")
	}
	if _, err := s.Delete(t.Context(), &task.DeleteRequest{ID: "web"}); err != nil {
		t.Error(err)
	}
	s.run("web", "", "") // anew
	s.end("web")
	if len(s.boots.made) != 2 {
		t.Errorf("%d machines", len(s.boots.made))
	}
}

// TestCreateTwice: a second call waits for the first and answers the same.
func TestCreateTwice(t *testing.T) {
	s := newStand(t, "pod")
	q := s.request("pod", "sandbox", "pod")
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if r, err := s.Create(t.Context(), q); err != nil || r.Pid == 0 {
				t.Errorf("%v, %v", r, err)
			}
		})
	}
	wg.Wait()
	if len(s.boots.made) != 1 {
		t.Errorf("%d machines", len(s.boots.made))
	}
	if _, err := s.Create(t.Context(), &task.CreateTaskRequest{ID: "pod", Bundle: "/elsewhere"}); status.Code(err) != codes.AlreadyExists {
		t.Errorf("in another bundle: %v", err)
	}
	if _, err := s.Create(t.Context(), s.request("other", "container", "else")); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("of another pod: %v", err)
	}
}

// TestCreateFails at each step: nothing is left, and another try can succeed.
func TestCreateFails(t *testing.T) {
	s := newStand(t, "pod")
	s.boots.fail = errors.New("no machine today")
	if _, err := s.Create(t.Context(), s.request("pod", "sandbox", "pod")); err == nil {
		t.Fatal("a pod without a machine")
	}
	s.boots.fail = nil
	s.run("pod", "sandbox", "pod")
	m := s.machine()
	for _, v := range []guestproto.Verb{guestproto.VerbMountRoot, guestproto.VerbCreate} {
		m.mu.Lock()
		m.refuse = map[guestproto.Verb]syscall.Errno{v: syscall.EIO}
		m.mu.Unlock()
		for range guestproto.MaxRoots + 1 { // more often than there are slots
			if _, err := s.Create(t.Context(), s.request("one", "container", "pod")); err == nil {
				t.Fatalf("%v failed, and the container was made", v)
			}
		}
		if m.taken() != 0 {
			t.Errorf("%v: %d disks are left", v, m.taken())
		}
	}
	m.mu.Lock()
	m.refuse = nil
	m.mu.Unlock()
	s.run("one", "container", "pod")
	s.end("one")
}

// TestSlotsEnd: a pod has so many containers and no more.
func TestSlotsEnd(t *testing.T) {
	s := newStand(t, "pod")
	s.run("pod", "sandbox", "pod")
	names := strings.Fields("a b c d e f g h")
	for _, id := range names {
		s.run(id, "container", "pod")
	}
	if _, err := s.Create(t.Context(), s.request("i", "container", "pod")); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("one too many: %v", err)
	}
	s.end("d")
	s.run("i", "container", "pod")
	var roots []uint8
	for _, c := range s.machine().creates {
		roots = append(roots, c.Root)
	}
	if !slices.Equal(roots, []uint8{0, 1, 2, 3, 4, 5, 6, 7, 3}) {
		t.Errorf("roots %v", roots)
	}
}

// TestOutOfMemory: it is told, and the last figures still say so.
func TestOutOfMemory(t *testing.T) {
	s := newStand(t, "pod")
	s.run("pod", "sandbox", "pod")
	s.run("one", "container", "pod")
	m := s.machine()
	m.say(0, guestproto.VerbOOM, (&guestproto.OOM{Process: 1, Kills: 2}).Append(nil))
	m.exit(1, 137)
	if _, err := s.Wait(t.Context(), &task.WaitRequest{ID: "one"}); err != nil {
		t.Fatal(err)
	}
	r, err := s.Stats(t.Context(), &task.StatsRequest{ID: "one"})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]uint64{}
	flat(t, r.Stats.Value, map[string]bool{"8": true}, "", got)
	if got["8.5"] != 2 {
		t.Errorf("figures %v", got)
	}
	waitFor(t, func() bool { return slices.Contains(s.topics(), "/tasks/oom") })
}

// TestSignalIsNotStarved by statistics that never come.
func TestSignalIsNotStarved(t *testing.T) {
	s := newStand(t, "web")
	s.run("web", "", "")
	m := s.machine()
	m.mu.Lock()
	m.silent[guestproto.VerbStats] = true
	m.mu.Unlock()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if _, err := s.Stats(ctx, &task.StatsRequest{ID: "web"}); err == nil {
				t.Error("there were statistics")
			}
		})
	}
	waitFor(t, func() bool { return m.count(guestproto.VerbStats) == 50 })
	began := time.Now()
	s.end("web")
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("the end took %v", took)
	}
	cancel()
	wg.Wait()
}

// TestMachineLost: the containers of a pod end with it, execs first.
func TestMachineLost(t *testing.T) {
	s := newStand(t, "pod")
	s.run("pod", "sandbox", "pod")
	s.run("one", "container", "pod")
	spec, err := json.Marshal(map[string]any{"args": []string{"true"}, "cwd": "/"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Exec(t.Context(), &task.ExecProcessRequest{ID: "one", ExecID: "e", Spec: &anypb.Any{Value: spec}}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Start(t.Context(), &task.StartRequest{ID: "one", ExecID: "e"}); err != nil {
		t.Fatal(err)
	}
	s.machine().Kill(t.Context())
	for _, r := range []*task.WaitRequest{{ID: "one"}, {ID: "one", ExecID: "e"}, {ID: "pod"}} {
		if w, err := s.Wait(t.Context(), r); err != nil || w.ExitStatus != 137 {
			t.Errorf("%v: %v, %v", r, w, err)
		}
	}
	waitFor(t, func() bool { return len(s.topics()) == 9 })
	if got := s.topics(); !slices.Equal(got[:6], strings.Fields("/tasks/create /tasks/start /tasks/create /tasks/start /tasks/exec-added /tasks/exec-started")) {
		t.Errorf("heard %q", got)
	}
	s.Delete(t.Context(), &task.DeleteRequest{ID: "one"})
	s.Delete(t.Context(), &task.DeleteRequest{ID: "pod"})
}

// TestSandboxAPI makes a pod without a pause container, with the messages that
// containerd's package defines.
func TestSandboxAPI(t *testing.T) {
	s := newStand(t, "pod")
	bundle := filepath.Join(s.dir, "sandbox")
	if err := os.Mkdir(bundle, 0o700); err != nil {
		t.Fatal(err)
	}
	call := func(verb string, q, a proto.Message) error {
		out, err := s.sandboxMethods()[verb](t.Context(), func(m any) error {
			raw, err := proto.Marshal(q)
			if err != nil {
				return err
			}
			return proto.Unmarshal(raw, m.(proto.Message))
		})
		if err != nil {
			return err
		}
		raw, err := proto.Marshal(out.(proto.Message))
		if err != nil {
			return err
		}
		return proto.UnmarshalOptions{}.Unmarshal(raw, a)
	}
	must := func(verb string, q, a proto.Message) {
		t.Helper()
		if err := call(verb, q, a); err != nil {
			t.Fatalf("%s: %v", verb, err)
		}
	}
	for range 2 {
		must("CreateSandbox", &sandboxapi.CreateSandboxRequest{SandboxID: "pod", BundlePath: bundle, Annotations: map[string]string{"a": "b"}}, &sandboxapi.CreateSandboxResponse{})
	}
	var started sandboxapi.StartSandboxResponse
	must("StartSandbox", &sandboxapi.StartSandboxRequest{SandboxID: "pod"}, &started)
	if started.Pid == 0 || time.Since(started.CreatedAt.AsTime()) > time.Minute {
		t.Error(&started)
	}
	s.run("one", "container", "pod")
	if files := s.machine().creates[0].Files; len(files) != 2 || files[0].Path != "/etc/hostname" || string(files[0].Data) != "pod\n" {
		t.Errorf("files %v", files)
	}
	var platform sandboxapi.PlatformResponse
	must("Platform", &sandboxapi.PlatformRequest{SandboxID: "pod"}, &platform)
	if platform.Platform.GetOS() != "linux" || platform.Platform.GetArchitecture() != runtime.GOARCH {
		t.Error(&platform)
	}
	var figures sandboxapi.SandboxMetricsResponse
	must("SandboxMetrics", &sandboxapi.SandboxMetricsRequest{SandboxID: "pod"}, &figures)
	if figures.Metrics.GetID() != "pod" || figures.Metrics.GetData().GetTypeUrl() != metricsV2 {
		t.Error(&figures)
	}
	must("PingSandbox", &sandboxapi.PingRequest{SandboxID: "pod"}, &sandboxapi.PingResponse{})
	if err := call("SandboxStatus", &sandboxapi.SandboxStatusRequest{SandboxID: "other"}, nil); status.Code(err) != codes.NotFound {
		t.Errorf("another's: %v", err)
	}
	for said, want := range map[string]codes.Code{
		`{"Resources":{"memory_limit_in_bytes":104857600,"cpu_quota":50000,"cpu_period":100000,"memory_swap_limit_in_bytes":7},"Overhead":null}`: codes.OK,
		`{"Resources":null}`: codes.OK,
		`{"Resources":{"memory_limit_in_bytes":8589934592}}`: codes.FailedPrecondition,
		`{"Resources":`: codes.InvalidArgument,
	} {
		q := &sandboxapi.UpdateSandboxRequest{SandboxID: "pod", Fields: []string{"extensions"}, Sandbox: &mount.Sandbox{SandboxID: "pod", Extensions: map[string]*anypb.Any{
			"metadata": {Value: []byte("x")}, "updated-resources": {TypeUrl: "io.containerd.cri.v1/UpdatedResources", Value: []byte(said)},
		}}}
		if err := call("UpdateSandbox", q, &sandboxapi.UpdateSandboxResponse{}); status.Code(err) != want {
			t.Errorf("update to %s: %v, want %v", said, err, want)
		}
	}
	must("UpdateSandbox", &sandboxapi.UpdateSandboxRequest{SandboxID: "pod"}, &sandboxapi.UpdateSandboxResponse{})
	var is sandboxapi.SandboxStatusResponse
	must("SandboxStatus", &sandboxapi.SandboxStatusRequest{SandboxID: "pod", Verbose: true}, &is)
	if is.State != sandboxReady || is.SandboxID != "pod" || is.Pid != started.Pid || is.Info["machine"] == "" || is.ExitedAt != nil {
		t.Error(&is)
	}
	s.end("one")
	for range 2 {
		must("StopSandbox", &sandboxapi.StopSandboxRequest{SandboxID: "pod", TimeoutSecs: 3}, &sandboxapi.StopSandboxResponse{})
	}
	var ended sandboxapi.WaitSandboxResponse
	must("WaitSandbox", &sandboxapi.WaitSandboxRequest{SandboxID: "pod"}, &ended)
	must("SandboxStatus", &sandboxapi.SandboxStatusRequest{SandboxID: "pod"}, &is)
	if ended.ExitStatus != 137 || ended.ExitedAt == nil || is.State != sandboxNotReady || is.ExitedAt == nil || is.Info != nil {
		t.Error(&ended, &is)
	}
}

func FuzzSandboxCall(f *testing.F) {
	raw, err := proto.Marshal(&sandboxapi.CreateSandboxRequest{SandboxID: "pod", BundlePath: "/b", NetnsPath: "/n", Annotations: map[string]string{"a": "b"}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Fuzz(func(t *testing.T, raw []byte) {
		var mine sandboxCall
		var theirs sandboxapi.CreateSandboxRequest
		if proto.Unmarshal(raw, &theirs) != nil || len(theirs.ProtoReflect().GetUnknown()) > 0 {
			_ = mine.parse(raw) // must not panic
			_, _ = parsePodResources(raw)
			return
		}
		if err := mine.parse(raw); err != nil || mine.id != theirs.SandboxID || mine.bundle != theirs.BundlePath || mine.netns != theirs.NetnsPath || !maps.Equal(mine.annotations, theirs.Annotations) && len(theirs.Annotations) > 0 {
			t.Errorf("%q is %+v, %v, want %v", raw, mine, err, &theirs)
		}
	})
}

// TestStandIns: each container of a pod has a number, in a network namespace
// that is not the host's, by which another can ask for its processes.
func TestStandIns(t *testing.T) {
	needRoot(t)
	s := newStand(t, "pod")
	s.run("pod", "sandbox", "pod")
	s.run("one", "container", "pod")
	s.run("two", "container", "pod")
	pids := map[string]uint32{}
	for _, id := range []string{"pod", "one", "two"} {
		st, err := s.State(t.Context(), &task.StateRequest{ID: id})
		if err != nil {
			t.Fatal(err)
		}
		pids[id] = st.Pid
	}
	if pids["one"] == pids["two"] || pids["one"] == pids["pod"] {
		t.Errorf("numbers %v", pids)
	}
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	ns := "/proc/" + strconv.Itoa(int(pids["one"])) + "/ns/net"
	if its, err := os.Readlink(ns); err != nil || its == own {
		t.Errorf("its network namespace is %q, %v, ours %q", its, err, own)
	}
	f := s.facts(s.containers["two"])
	if f.PIDs[pids["pod"]] != 0 || f.PIDs[pids["one"]] != 1 || f.PIDs[pids["two"]] != 2 || len(f.PIDs) != 3 {
		t.Errorf("facts %v, numbers %v", f.PIDs, pids)
	}
	s.end("one")
	waitFor(t, func() bool { _, err := os.Readlink(ns); return err != nil })
}
