package main

import (
	"strings"
	"testing"
)

// Ratios are to nginx, to HAProxy where nginx is absent, and to nobody where both are.
func TestRowPrint(t *testing.T) {
	straight := cell{Name: "straight", P50: 20, P99: 40, P999: 60, PerSec: 1000, Requests: 7}
	ours := cell{Name: "hauberk-mesh", P50: 120, P99: 240, P999: 360, PerSec: 500, CPU: 12, Requests: 7}
	nginx := cell{Name: "nginx", P50: 70, P99: 140, P999: 60, PerSec: 1000, CPU: 10, Requests: 7}
	haproxy := nginx
	haproxy.Name, haproxy.CPU = "HAProxy", 24
	for name, c := range map[string]struct {
		ways []cell
		want string
	}{
		"nginx":   {[]cell{straight, haproxy, nginx, ours}, "hauberk-mesh|100|(2.00x)|200|(2.00x)|300||500|(0.50x)|12.0|(1.20x)|7"},
		"HAProxy": {[]cell{straight, ours, haproxy}, "hauberk-mesh|100|(2.00x)|200|(2.00x)|300||500|(0.50x)|12.0|(0.50x)|7"},
		"nobody":  {[]cell{straight, ours}, "hauberk-mesh|100||200||300||500||12.0||7"},
	} {
		var out strings.Builder
		row{Spoken: "http", KiB: 1, Ways: c.ways}.print(&out)
		if got := strings.ReplaceAll(out.String(), "\t", "|"); !strings.Contains(got, c.want+"\n") || !strings.Contains(got, "straight (whole)|20||40||60||1000||||7\n") {
			t.Errorf("%s: %s", name, got)
		}
	}
}

// Who failed is named in its row, the others have theirs, and the run has failed.
func TestFaultsAreNamed(t *testing.T) {
	straight, ours := cell{Name: "straight", P50: 20, Requests: 7}, cell{Name: "hauberk-mesh", P50: 120, CPU: 12, Requests: 7}
	dead := cell{Name: "nginx", Fault: "start\nit: address already in use"}
	r := report{Rows: []row{{Spoken: "mtls", KiB: 1, Rate: 1000, Ways: []cell{straight, ours, dead}}}, Faults: []string{"one thing"}}
	var out strings.Builder
	if err := (reports{r, r}).print(&out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"not measured: start; it: address already in use\n", "not measured: one thing\n", "hauberk-mesh       100 "} {
		if strings.Count(out.String(), want) != 2 {
			t.Errorf("no %q in %s", want, out.String())
		}
	}
	if err := (reports{r, r}).fault(); err == nil || !strings.HasPrefix(err.Error(), "2 faults") {
		t.Errorf("fault: %v", err)
	}
	if err := (reports{{Rows: r.Rows}}).fault(); err != nil {
		t.Errorf("fault without one: %v", err)
	}
	r.Rows[0].Ways[0].Fault = "gone"
	out.Reset()
	if err := r.print(&out); err != nil || strings.Count(out.String(), "not measured: nothing to subtract") != 1 || strings.Contains(out.String(), "met\n") {
		t.Errorf("without the straight way: %v, %s", err, out.String())
	}
}

// A bar is met, missed, or says why nothing can be said of it.
func TestBars(t *testing.T) {
	straight, nginx := cell{Name: "straight", P50: 20, P99: 40, Requests: 7}, cell{Name: "nginx", CPU: 10, Requests: 7}
	ours := cell{Name: "hauberk-mesh", P50: 219, P99: 541, CPU: 12.1, Requests: 7}
	r := report{Rows: []row{{Spoken: "mtls", KiB: 1, Rate: 1000, Ways: []cell{straight, ours}}, {Spoken: "http", KiB: 1, Ways: []cell{straight, ours, nginx}},
		{Spoken: "mtls", KiB: 1, Ways: []cell{straight, {Name: "hauberk-mesh", Fault: "x"}, nginx}}}}
	for i, want := range []string{"0.199: met", "0.501: MISSED", "1.210: MISSED", "was not measured"} {
		if got := bars[i].judge(r); got != want {
			t.Errorf("%s: %q, not %q", bars[i].what, got, want)
		}
	}
	r.Rows[0].Ways[0].P99, r.Rows[0].Ways[1].P99 = 501, 300
	if got := bars[1].judge(r); got != "cannot be told: 0.501 without a proxy" {
		t.Error(got)
	}
	if got := bars[0].judge(report{}); got != "was not asked" {
		t.Error(got)
	}
}

func TestTraefikVersion(t *testing.T) {
	for _, path := range []string{"/proc/self/exe", "/dev/null"} {
		if v, err := traefikVersion(path); err == nil {
			t.Errorf("%s is Traefik %s", path, v)
		}
	}
}
