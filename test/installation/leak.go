package installation

import (
	"bytes"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Kinds of things that an installation could leave behind.
const (
	Process   = "process"
	Tap       = "tap"
	Namespace = "namespace"
	Mount     = "mount"
	Socket    = "socket"
	Port      = "port"
	Cgroup    = "cgroup"
	File      = "file"
)

// Kinds lists them in the order of a table.
var Kinds = []string{Process, Tap, Namespace, Mount, Socket, Port, Cgroup, File}

// Leak is something that should not be there.
type Leak struct{ Kind, What string }

func (l Leak) String() string { return l.Kind + " " + l.What }

// Leaks lists what is there although nothing should run.
func (i *Installation) Leaks() (all []Leak) {
	now := i.inventory()
	for _, kind := range Kinds {
		for _, what := range now[kind] {
			if !slices.Contains(i.known[kind], what) {
				all = append(all, Leak{kind, what})
			}
		}
	}
	return all
}

// Ignore says that a port is in use by the test itself.
func (i *Installation) Ignore(address string) { i.known[Port] = append(i.known[Port], address) }

// inventory lists by kind what could belong to the installation.
type inventory map[string][]string

func (i *Installation) inventory() inventory {
	in := inventory{}
	for _, p := range i.processes() {
		in[Process] = append(in[Process], p.String())
	}
	in[Tap] = taps()
	in[Mount] = i.lines("/proc/self/mountinfo")
	in[Socket] = i.lines("/proc/net/unix")
	names, _ := os.ReadDir(filepath.Join(i.Run, "node", "netns"))
	for _, n := range names {
		in[Namespace] = append(in[Namespace], n.Name())
	}
	for _, address := range []string{i.API, i.NodeListen, i.Door, i.Gateway, i.Web} {
		if c, err := net.DialTimeout("tcp", address, time.Second); err == nil {
			c.Close()
			in[Port] = append(in[Port], address)
		}
	}
	in[Cgroup] = walk("/sys/fs/cgroup", func(path string, d fs.DirEntry) bool {
		return d.IsDir() && strings.Contains(d.Name(), "hauberk")
	})
	in[File] = append(walk(i.Run, i.leftInRun), walk(i.State, i.leftInState)...)
	return in
}

// leftInRun: the lock is empty and stays for the next supervisor.
func (i *Installation) leftInRun(path string, d fs.DirEntry) bool {
	switch rel, _ := filepath.Rel(i.Run, path); {
	case d.IsDir():
		return filepath.Dir(rel) == filepath.Join("node", "vm")
	default:
		return rel != "supervisor.lock"
	}
}

// leftInState finds halves of files, whose names begin with a dot, and journal
// entries of sandboxes.
func (i *Installation) leftInState(path string, d fs.DirEntry) bool {
	rel, _ := filepath.Rel(i.State, path)
	return strings.HasPrefix(d.Name(), ".") && d.Name() != ".lock" || !d.IsDir() && filepath.Dir(rel) == filepath.Join("node", "instances")
}

func walk(root string, found func(string, fs.DirEntry) bool) (all []string) {
	_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && found(path, d) {
			all = append(all, path)
		}
		return nil // what goes away while being listed is not left behind
	})
	return all
}

// taps of this machine. A sandbox's is in its namespace and goes with it.
func taps() (all []string) {
	names, _ := os.ReadDir("/sys/class/net")
	for _, n := range names {
		if _, err := os.Stat(filepath.Join("/sys/class/net", n.Name(), "tun_flags")); err == nil {
			all = append(all, n.Name())
		}
	}
	return all
}

// lines of a file of the kernel that name the installation's directory.
func (i *Installation) lines(file string) (all []string) {
	data, _ := os.ReadFile(file)
	for line := range strings.Lines(string(data)) {
		if strings.Contains(line, i.Root+"/") {
			all = append(all, strings.TrimSpace(line))
		}
	}
	return all
}

// process of the installation.
type process struct {
	pid, parent, session int
	state                byte
	name, command        string
}

func (p process) String() string { return fmt.Sprintf("%d %s %.160s", p.pid, p.name, p.command) }

// adoptOrphans makes this process the parent of every process of the
// installation whose own parent ends, so that none of them gets away unseen.
func (i *Installation) adoptOrphans() {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		i.t.Fatalf("become the parent of orphans: %v", err)
	}
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			i.reap()
			select {
			case <-end:
				i.reap()
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	}()
	i.t.Cleanup(func() { close(end); <-ended })
}

// reap takes note of orphans' deaths, as PID 1 would. Commands of the test are
// not among them: they are in its session.
func (i *Installation) reap() {
	for _, p := range i.descendants() {
		if p.state == 'Z' && p.parent == os.Getpid() {
			_, _ = syscall.Wait4(p.pid, nil, syscall.WNOHANG, nil)
		}
	}
}

// processes of the installation that live.
func (i *Installation) processes() []process {
	return slices.DeleteFunc(i.descendants(), func(p process) bool { return p.state == 'Z' || p.state == 'X' })
}

// descendants are the processes below this one that left its session, as the
// supervisor does and with it all it starts, and processes that name the
// installation's directory.
func (i *Installation) descendants() (all []process) {
	table := map[int]process{}
	names, _ := filepath.Glob("/proc/[0-9]*")
	for _, name := range names {
		if p, ok := readProcess(name); ok {
			table[p.pid] = p
		}
	}
	self := table[os.Getpid()]
	below := func(p process) bool {
		for ; p.pid != 0; p = table[p.parent] {
			if p.pid == self.pid {
				return true
			}
		}
		return false
	}
	for _, p := range table {
		if p.session != self.session && (below(p) || strings.Contains(p.command, i.Root+"/")) {
			all = append(all, p)
		}
	}
	slices.SortFunc(all, func(a, b process) int { return a.pid - b.pid })
	return all
}

// Lives says whether a process has not ended.
func (i *Installation) Lives(pid int) bool {
	p, ok := readProcess("/proc/" + strconv.Itoa(pid))
	return ok && p.state != 'Z' && p.state != 'X'
}

func readProcess(dir string) (p process, ok bool) {
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return p, false
	}
	open, end := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')')
	if open < 0 || end < open {
		return p, false
	}
	rest := strings.Fields(string(stat[end+1:]))
	if len(rest) < 4 {
		return p, false
	}
	p.pid, _ = strconv.Atoi(filepath.Base(dir))
	p.name, p.state = string(stat[open+1:end]), rest[0][0]
	p.parent, _ = strconv.Atoi(rest[1])
	p.session, _ = strconv.Atoi(rest[3])
	command, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
	p.command = strings.ReplaceAll(strings.TrimRight(string(command), "\x00"), "\x00", " ")
	return p, true
}

// killDescendants ends what should have ended by itself; the test has failed
// already.
func (i *Installation) killDescendants() {
	for _, p := range i.processes() {
		_ = syscall.Kill(p.pid, syscall.SIGKILL)
	}
}
