package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

// period is how often the proxies are looked at.
const period = 5 * time.Second

// sample is what a proxy holds.
type sample struct{ memory, descriptors, goroutines int }

// watcher looks at the proxies from outside.
type watcher struct {
	world   *world
	names   []string
	samples map[string][]sample
	idle    map[string]sample // before the load
	after   map[string]sample // once it was gone
}

func (w *watcher) run(ctx context.Context) {
	w.samples, w.idle, w.after = map[string][]sample{}, map[string]sample{}, map[string]sample{}
	w.each(func(name string, s sample) { w.names = append(w.names, name); w.idle[name] = s })
	for began := time.Now(); pause(ctx, period) == nil; {
		w.each(func(name string, s sample) { w.samples[name] = append(w.samples[name], s) })
		if n := len(w.samples[w.names[0]]); n%24 == 0 {
			say("%v: %d served; %s", time.Since(began).Round(time.Second), w.world.ledger.Served.Load(), w.line())
		}
	}
}

func (w *watcher) line() (s string) {
	for _, name := range w.names {
		last := w.samples[name][len(w.samples[name])-1]
		s += fmt.Sprintf("%s %d KiB %d fds %d goroutines; ", name, last.memory, last.descriptors, last.goroutines)
	}
	return strings.TrimSuffix(s, "; ")
}

func (w *watcher) each(f func(string, sample)) {
	for _, n := range w.world.nodes {
		s := look(n.process)
		if stats, err := n.link.Stats(context.Background()); err == nil {
			s.goroutines = stats.Goroutines
		}
		f(n.name, s)
	}
	s := look(w.world.alone.process)
	s.goroutines = w.world.alone.goroutines()
	f("alone", s)
}

// look reads a process's memory, in KiB, and counts its descriptors.
func look(p *process) (s sample) {
	dir := fmt.Sprintf("/proc/%d", p.cmd.Process.Pid)
	text, _ := os.ReadFile(dir + "/status")
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			s.memory, _ = strconv.Atoi(strings.Fields(rest)[0])
		}
	}
	all, _ := os.ReadDir(dir + "/fd")
	s.descriptors = len(all)
	return s
}

// goroutines asks the admin socket.
func (a *alone) goroutines() int {
	c, err := net.Dial("unix", a.admin)
	if err != nil {
		return 0
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	fmt.Fprint(c, "GET /status HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return 0
	}
	defer resp.Body.Close()
	var status struct{ Goroutines int }
	json.NewDecoder(resp.Body).Decode(&status)
	return status.Goroutines
}

// settle waits until the proxies hold what they held before, or some minutes.
func (w *watcher) settle(ctx context.Context) {
	for deadline := time.Now().Add(3 * time.Minute); ; {
		over := false
		w.each(func(name string, s sample) {
			w.after[name] = s
			over = over || w.left(name)
		})
		if !over || time.Now().After(deadline) || pause(ctx, time.Second) != nil {
			return
		}
	}
}

// left says that something of the load has stayed. Connections between nodes are
// kept for five minutes, at most two for each pair of boxes and each certificate,
// and each box has a stock of sockets to its guest.
func (w *watcher) left(name string) bool {
	idle, now := w.idle[name], w.after[name]
	return now.goroutines > idle.goroutines+60 || now.descriptors > idle.descriptors+40+stock*w.boxes(name) || now.goroutines == 0
}

// stock is the most sockets a proxy keeps for a box.
const stock = 64

func (w *watcher) boxes(name string) int {
	for _, n := range w.world.nodes {
		if n.name == name {
			return len(n.boxes)
		}
	}
	return 0
}

// report prints what was held over time and says whether it is flat: the last
// quarter of the time against the second.
func (w *watcher) report() bool {
	fmt.Printf("\n%-8s %-12s %9s %9s %9s %9s %12s %9s\n", "proxy", "", "idle", "2nd qu.", "last qu.", "most", "an hour", "after")
	good := true
	for _, name := range w.names {
		all := w.samples[name]
		for _, k := range []struct {
			what  string
			slack int
			of    func(sample) int
		}{
			{"memory, KiB", 6 << 10, func(s sample) int { return s.memory }},
			{"descriptors", 96, func(s sample) int { return s.descriptors }},
			{"goroutines", 40, func(s sample) int { return s.goroutines }},
		} {
			var values []int
			for _, s := range all {
				values = append(values, k.of(s))
			}
			early, late := middle(values[len(values)/4:len(values)/2]), middle(values[len(values)*3/4:])
			verdict := ""
			if late > early+early/10+k.slack {
				verdict, good = "  GROWS", false
			}
			fmt.Printf("%-8s %-12s %9d %9d %9d %9d %+12.0f %9d%s\n", name, k.what, k.of(w.idle[name]), early, late, slices.Max(append(values, 0)), slope(values), k.of(w.after[name]), verdict)
		}
		if w.left(name) {
			fmt.Printf("%s keeps what it should not, after the load\n", name)
			good = false
		}
	}
	return good
}

func middle(v []int) int {
	if len(v) == 0 {
		return 0
	}
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}

// slope is by how much values rise in an hour, by least squares, without the
// first quarter: that is warming up.
func slope(v []int) float64 {
	v = v[len(v)/4:]
	n := float64(len(v))
	var x, y, xy, xx float64
	for i, value := range v {
		a, b := float64(i), float64(value)
		x, y, xy, xx = x+a, y+b, xy+a*b, xx+a*a
	}
	if d := n*xx - x*x; d != 0 {
		return (n*xy - x*y) / d * float64(time.Hour/period)
	}
	return 0
}
