package guard

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/guard/bpf"
)

// strictShared is the strict policy as a shared kernel can hold it.
func strictShared() spec.GuardPolicy {
	p := strict()
	p.Exec.Deny = []string{"/bin/curl"}
	p.Files = append(p.Files, spec.GuardFile{Path: "/mnt/kept", Deny: "w"})
	p.Net = &spec.GuardNet{Egress: []spec.GuardEgress{{CIDR: "192.0.2.0/24", Ports: []int32{80}}, {CIDR: "198.51.100.7/32"}}}
	return p
}

// apart are attempts of the guest's table that mean nothing here.
var apart = map[string]string{
	"exec=digest":  "the files of an image are not known on a node",
	"exec=digest2": "the files of an image are not known on a node",
	"open":         "the node has other disks than a guest",
	"open=2":       "its devices are made by the runtime",
	"umount":       "an attempt before it changed the mounts, which all of them share here",
	"chattr":       "its file lies where the runtime mounts an empty file system",
}

// TestPoliciesOfSharedKernels refuses by field what only a guest can hold.
func TestPoliciesOfSharedKernels(t *testing.T) {
	p := spec.GuardPolicy{
		Mode: "learn", Files: []spec.GuardFile{{Path: "/x", FIM: true}},
		Exec: &spec.GuardExec{Volumes: []string{"/plugins"}, Deny: []string{"sha256:" + digestForTest}},
		Net:  &spec.GuardNet{Egress: []spec.GuardEgress{{Service: "ledger"}, {Name: "example.org"}}, DNS: &spec.GuardDNS{}},
	}
	facts := CompileFacts{Gateway: netip.MustParseAddr("192.0.2.1"), Shared: true}
	_, err := Compile(node.Guard{Generation: 1, Policies: []node.NamedGuardPolicy{{Name: "web", Spec: p}}}, facts)
	if err == nil {
		t.Fatal("a policy that no shared kernel can hold was compiled")
	}
	for _, field := range []string{"mode ", "files[0].fim", "exec.volumes[0]", "exec.deny[0]", "net.egress[0].service", "net.egress[1].name", "net.dns.servers"} {
		if !strings.Contains(err.Error(), field) {
			t.Errorf("%v: want %s named", err, field)
		}
	}
	facts.Shared = false
	facts.FilesWith = filesForTest
	p.Files = nil
	if _, err := Compile(node.Guard{Generation: 1, Services: map[string]string{"ledger": "198.51.100.7"}, Policies: []node.NamedGuardPolicy{{Name: "web", Spec: p}}}, facts); err != nil {
		t.Errorf("the same in a guest: %v", err)
	}
	if _, err := Compile(node.Guard{Generation: SharedGeneration(64, 1), Policies: []node.NamedGuardPolicy{{Name: "web", Spec: strictShared()}}}, CompileFacts{Shared: true}); err != nil {
		t.Error(err)
	}
}

// said is what a machine that plays a node told.
type said struct {
	ran     map[string]string // by container and attack
	records []sharedRecord
}

type sharedRecord struct {
	Op, Verdict, RuleText string
	Series                uint64
	Process               struct{ Container string }
}

// A machine plays the node: its kernel is shared by containers of Debian's runc,
// one held to a strict policy, one to an open one and one to none, and by the
// node's own programs.
func TestSharedKernel(t *testing.T) {
	m, err := prepare()
	if err != nil {
		t.Fatal(err)
	}
	var tried []attempt
	for _, a := range attempts() {
		if apart[name(a.run)] == "" {
			tried = append(tried, a)
		}
	}
	s := playNode(t, m, sharedSteps(tried))
	for _, a := range tried {
		if got := s.ran["free/"+name(a.run)]; !strings.HasPrefix(got, "exit 0 ") {
			t.Errorf("%s in a container that is not bound: %s; want it to work, or it proves nothing", a.run, got)
		}
		if got := s.ran["strict/"+name(a.run)]; !strings.HasPrefix(got, "exit 10 ") {
			t.Errorf("%s in a bound container: %s; want it refused", a.run, got)
		}
		if !slices.ContainsFunc(s.records, func(r sharedRecord) bool {
			return r.Process.Container == "strict" && r.Verdict == "denied" && strings.Contains(r.RuleText, a.rule)
		}) {
			t.Errorf("%s: no record of a denial by rule %q in container strict", a.run, a.rule)
		}
	}
	for run, want := range map[string]string{
		// What is refused to one is not to its neighbour, whose policy lets it.
		"open/drop": "exit 0 ", "open/exec=1": "exit 0 ", "open/write": "exit 0 ", "open/connect": "exit 0 ",
		// But what holds for every bound container.
		"open/bpfmap": "exit 10 ", "open/newmodule": "exit 10 ", "open/setting": "exit 10 ",
		// Nor is a neighbour, or the loader, in its reach.
		"strict/exec": "exit 0 ", "strict/killagent": "exit 10 ",
		// By the runtime's own door.
		"open/nothing": "exit 0 ", "strict/write=50": "exit 10 ", "strict/drop=50": "exit 10 ",
		// What cannot be bound does not start, whatever is the reason.
		"runc/strict": "exit 0", "runc/open": "exit 0", "runc/free": "exit 0",
		"runc/unknown": "exit 1 ", "runc/unheld": "exit 1 ", "runc/late": "exit 1 ",
		// While there is no loader all stays in force.
		"strict/drop=60": "exit 10 ", "strict/write=60": "exit 10 ", "strict/exec=60": "exit 10 ", "strict/connect=60": "exit 10 ",
		// What two have rules for, only the first can have held; nobody else is.
		"strict/write=80": "exit 10 ", "open/write=80": "exit 0 ", "runc/same": "exit 1 ",
		"free/drop=60": "exit 0 ", "free/connect=60": "exit 0 ",
		// One that ended meanwhile is forgotten, and may come again.
		"guard/status-open": "exit 1 ", "open/bpfmap=70": "exit 10 ",
		// The next one takes over.
		"strict/drop=70": "exit 10 ", "guard/policy-strict-open": "exit 1 ", "guard/status-strict": "exit 1 ", "runc/after": "exit 0", "after/drop=70": "exit 10 ", "after/exec": "exit 0 ",
		"loader/capabilities": "000000c000001004",
	} {
		if got := s.ran[run]; !strings.HasPrefix(got, want) {
			t.Errorf("%s: %q; want %s", run, got, want)
		}
	}
	for run, want := range map[string]string{
		"guard/status-open": "not bound", "guard/status-strict": "not bound", "guard/policy-strict-open": "before the loader started",
		"runc/same": "busy", "runc/unheld": "exec.volumes[0]", "runc/unknown": "no such file", "runc/late": "ask the loader",
	} {
		if !strings.Contains(s.ran[run], want) {
			t.Errorf("%s: %q; want %q in it", run, s.ran[run], want)
		}
	}
	var runs, opens uint64
	if _, err := fmt.Sscanf(s.ran["strict/underfire"], "exit 10 refused: %d runs %d opens", &runs, &opens); err != nil || runs < 10 || opens < 10 {
		t.Errorf("while its policy was swapped: %q (%v); want every one of many tries refused", s.ran["strict/underfire"], err)
	}
	known := map[uint64]bool{} // series of records, which later ones only count up
	for _, r := range s.records {
		switch r.Process.Container {
		case "strict", "open", "after":
			known[r.Series] = true
		default:
			if r.Verdict == "denied" && !known[r.Series] {
				t.Errorf("%+v: a denial of what is not bound", r)
			}
		}
	}
}

func sharedSteps(tried []attempt) []string {
	steps := []string{
		"loader", "box strict strict bound", "box open open bound", "box free - free",
		"create strict", "create open", "create free",
		"run strict exec /bin/tool", "run strict mkdir /shm/a", // what the table expects
	}
	for _, a := range tried {
		steps = append(steps, "run strict "+a.run)
	}
	for _, run := range []string{"drop /tmp/x", "exec=1 /bin/curl", "write /etc/app/1", "connect 192.0.2.1:81", "bpfmap", "newmodule", "setting"} {
		steps = append(steps, "run open "+run)
	}
	steps = append(steps,
		"swap strict strict 5 underfire /shm/stop",
		"exec open nothing", "exec strict write=50 /etc/app/2", "exec strict drop=50 /tmp/x50",
		"run strict write=80 /mnt/kept", "run open write=80 /mnt/kept", "box same same bound", "create same",
		"box unknown missing bound", "create unknown", "box unheld unheld bound", "create unheld",
		"kill", "run strict drop=60 /tmp/x60", "run strict write=60 /etc/app/2", "run strict exec=60 /bin/curl", "run strict connect=60 192.0.2.1:81",
		"run free drop=60 /tmp/x60", "run free connect=60 192.0.2.1:81", "delete open", "box late - bound", "create late",
		"loader", "run strict drop=70 /tmp/x70", "guard policy strict open", "guard status open", "create open", "run open bpfmap=70", "box after - bound", "create after", "run after drop=70 /tmp/x70", "run after exec /bin/tool",
		"delete strict", "guard status strict", "delete open", "delete after", "run free mkdir /shm/a", "run free write /tmp/kept")
	for _, a := range tried {
		steps = append(steps, "run free "+a.run)
	}
	return steps
}

// playNode boots a machine with runc and the loader in its image.
func playNode(t *testing.T, m *machine, steps []string) said {
	t.Helper()
	files := nodeFiles(t, m)
	init := m.dir + "/node"
	build(t, init, "./testdata/node")
	initrd, err := m.kernel.Initrd(init, nil)
	if err != nil {
		t.Fatal(err)
	}
	image := buildImage(t, m, files, steps)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	qemu := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-M", "microvm,acpi=on,pcie=on", "-accel", "tcg,tb-size=96", "-cpu", "max", "-smp", "1", "-m", "384",
		"-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-serial", "stdio",
		"-kernel", m.kernel.Kernel, "-initrd", initrd.Path,
		"-append", "console=ttyS0 quiet reboot=t panic=-1 lsm=lockdown,capability,landlock,yama,bpf tsc_early_khz="+tscKHz(t)+
			" cryptomgr.notests random.trust_cpu=on audit=0 no_timer_check rcupdate.rcu_expedited=1 8250.nr_uarts=1",
		"-drive", "if=none,id=root,format=raw,read-only=on,file="+image, "-device", "virtio-blk-pci,drive=root")
	var console, errors bytes.Buffer
	qemu.Stdout, qemu.Stderr = &console, &errors
	start := time.Now()
	if err := qemu.Run(); err != nil {
		t.Fatalf("run machine: %v\n%s\n%s", err, &errors, &console)
	}
	t.Logf("machine ran %.1f s", time.Since(start).Seconds())
	return readSaid(t, console.String())
}

func readSaid(t *testing.T, console string) said {
	t.Helper()
	s := said{ran: map[string]string{}}
	for line := range strings.Lines(console) {
		word, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch word {
		case "RAN":
			run, how, _ := strings.Cut(rest, " ")
			s.ran[run] = how
		case "RECORD":
			var r sharedRecord
			if err := json.Unmarshal([]byte(rest), &r); err != nil {
				t.Errorf("record %q: %v", rest, err)
			}
			s.records = append(s.records, r)
		case "FATAL":
			t.Fatalf("machine: %s\n%s", rest, console)
		}
	}
	if !strings.Contains(console, "\nEND") {
		t.Fatalf("machine did not come to its end:\n%s", console)
	}
	if os.Getenv("HAUBERK_TEST_CONSOLE") != "" {
		t.Log(console)
	}
	return s
}

// nodeFiles are the programs and policies of the node.
func nodeFiles(t *testing.T, m *machine) map[string][]byte {
	t.Helper()
	files := imageFiles()
	loader := m.dir + "/hauberk-guard"
	build(t, loader, "hauberk.dev/cmd/hauberk-guard")
	for name, path := range map[string]string{
		"hauberk-guard": loader, "runc": "/usr/sbin/runc", "ld.so": "/lib64/ld-linux-x86-64.so.2",
		"libc.so.6": "/lib/x86_64-linux-gnu/libc.so.6", "libseccomp.so.2": "/lib/x86_64-linux-gnu/libseccomp.so.2",
	} {
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		files["node/"+name] = raw
	}
	types, err := os.Open(m.kernel.Types)
	if err != nil {
		t.Fatal(err)
	}
	defer types.Close()
	overlay, err := m.kernel.Module("overlay")
	if err != nil {
		t.Fatal(err)
	}
	if files["node/bundle"], err = bpf.LinkShared(types, bytes.NewReader(overlay), m.kernel.BuildID); err != nil {
		t.Fatal(err)
	}
	for name, p := range map[string]spec.GuardPolicy{
		"strict": strictShared(),
		"open":   {Exec: &spec.GuardExec{Origin: "any", AnonymousMemory: "allow", ShellOnSocket: "allow"}},
		"same":   {Files: []spec.GuardFile{{Path: "/mnt/kept", Deny: "w"}}},
		"unheld": {Exec: &spec.GuardExec{Volumes: []string{"/plugins"}}},
	} {
		raw, err := json.Marshal([]node.NamedGuardPolicy{{Name: name, Spec: p}})
		if err != nil {
			t.Fatal(err)
		}
		files["node/policies/"+name+".json"] = raw
	}
	return files
}

func build(t *testing.T, to, what string) {
	t.Helper()
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", to, what)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", what, err, out)
	}
}
