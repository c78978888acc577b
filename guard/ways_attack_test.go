package guard

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"

	"hauberk.dev/api/spec"
)

// ways are the ways to change a file or to come by a name: what is run on it, in
// a directory that a rule covers.
var ways = []struct {
	run   string // DIR stands for the directory
	items string
	only  string // where the file system knows it
}{
	{"tmplink DIR/../elsewhere DIR/tmplink", "P8 B10 T1565", "/shm"}, // not of an overlay
	{"byhandle DIR/byhandle", "P8 B5 T1565", "/shm"},
	{"splicein DIR/splicein", "P8 T1565", ""},
	{"copyrange DIR/copyrange", "P8 T1565", ""},
	{"sendfilein DIR/sendfilein", "P8 T1565", ""},
	{"fallocate DIR/fallocate", "P8 T1565", ""},
	{"mapstore DIR/mapstore", "P8 B24 T1565", ""},
	{"opentrunc DIR/opentrunc", "P8 T1565", ""},
	{"truncate DIR/truncate", "P8 T1565", ""},
	{"write DIR/write", "P8 T1565", ""},
	{"write=new DIR/new", "P8 T1565", ""},
	{"chmod DIR/chmod", "P8 T1222", ""},
	{"chown DIR/chown", "P8 T1222", ""},
	{"utimes DIR/utimes", "P8 T1070.006", ""},
	{"setxattr DIR/setxattr", "P8 T1564", ""},
	{"unlink DIR/unlink", "P8 T1070.004", ""},
	{"rename DIR/rename DIR/../elsewhere/renamed", "P8 B7 T1036.003", ""},
	{"overwith DIR/../elsewhere/mine DIR/overwith", "P8 B7 T1565", ""},
	{"exchange DIR/exchange DIR/../elsewhere/kept", "P8 B7 T1565", ""},
	{"whiteoutto DIR/whiteoutto DIR/../elsewhere/whiteout", "P8 B7 T1565", "/shm"},
	{"link DIR/link DIR/../elsewhere/linked", "P8 B3 T1565", ""},
	{"symlink DIR/symlink", "P8 B4 T1547", ""},
	{"mkdir DIR/mkdir", "P8 T1565", ""},
	{"mkfifo DIR/mkfifo", "P8 T1565", ""},
	{"socketat DIR/socketat", "P8 T1565", ""},
	{"bindwrite DIR/bindwrite", "P8 B3 T1565", ""},
	{"chroot DIR/chroot", "P8 B5 T1565", ""},
	{"write=root /proc/self/rootDIR/root", "P8 B5 T1565", ""},
	{"fdopen DIR/fdopen", "P8 B5 T1565", ""},
	{"mapfiles DIR/mapfiles", "P8 B5 B24 T1565", ""},
	{"uopen DIR/uopen", "P8 B1 T1565", ""},
	{"uwrite DIR/uwrite", "P8 B1 T1565", ""},
	{"urename DIR/urename DIR/../elsewhere/urenamed", "P8 B1 B7 T1565", ""},
	{"ulink DIR/ulink DIR/../elsewhere/ulinked", "P8 B1 B3 T1565", ""},
	{"uunlink DIR/uunlink", "P8 B1 T1070.004", ""},
	{"umkdir DIR/umkdir", "P8 B1 T1565", ""},
	{"usymlink DIR/usymlink", "P8 B1 B4 T1565", ""},
}

// waysScenario tries all of them in the root file system and in another that is
// mounted in the container; on names that do not exist yet; and on a file that
// had another name before the rule.
func waysScenario() scenario {
	s := scenario{name: "ways", policy: spec.GuardPolicy{}}
	for _, dir := range []string{"/srv/ways", "/shm/ways"} {
		s.before = append(s.before, "file "+dir[:4]+"/elsewhere/kept")
		s.policy.Files = append(s.policy.Files, spec.GuardFile{Path: dir, Deny: "w"})
		for _, w := range ways {
			if !strings.HasPrefix(dir, w.only) {
				continue
			}
			words := strings.Fields(strings.ReplaceAll(w.run, "DIR", dir))
			words[0] = strings.ReplaceAll(words[0], "=", "-")
			verb, _, _ := strings.Cut(words[0], "-")
			words[0] = verb + "=ways-" + strings.TrimPrefix(words[0], verb) + dir[1:4]
			for i := range words {
				words[i] = strings.ReplaceAll(words[i], "/ways/..", "")
			}
			s.attacks = append(s.attacks, attempt{strings.Join(words, " "), dir + " may not be changed", OpWrite, w.items})
		}
		for _, name := range waysFiles() {
			if dir == "/shm/ways" {
				s.before = append(s.before, "file "+dir+"/"+name)
			}
		}
	}
	for _, verb := range []string{"write", "mkdir", "symlink", "mkfifo", "socketat", "linkdrop", "over", "umkdir", "usymlink", "uopen"} {
		path := "/opt/later-" + verb
		s.policy.Files = append(s.policy.Files, spec.GuardFile{Path: path, Deny: "w"})
		s.attacks = append(s.attacks, attempt{verb + "=later " + path, "/opt/later-" + verb, OpWrite, "P8 T1565"})
	}
	s.before = append(s.before, "file /shm/linked/one", "link /shm/linked/one /shm/elsewhere/two", "file /srv/linked/one", "link /srv/linked/one /srv/elsewhere/two")
	for _, dir := range []string{"/srv", "/shm"} {
		s.policy.Files = append(s.policy.Files, spec.GuardFile{Path: dir + "/linked/one", Deny: "w"})
		s.attacks = append(s.attacks, attempt{"write=linked" + dir[1:] + " " + dir + "/elsewhere/two", dir + "/linked/one", OpWrite, "P8 B3 T1565"})
	}
	// Two policies about one file: each denies what the other lets.
	s.policy.Files = append(s.policy.Files, spec.GuardFile{Path: "/srv/both", By: []string{"/bin/tool"}, Allow: "rw"})
	s.also = []spec.GuardPolicy{{Files: []spec.GuardFile{{Path: "/srv/both", Deny: "w"}}}}
	s.attacks = append(s.attacks,
		attempt{"as=both1 /bin/tool write /srv/both/x", "/srv/both may not be changed", OpWrite, "P8"},
		attempt{"read=both2 /srv/both/x", "/srv/both may only be", OpRead, "P8"},
		attempt{"as=both3 /bin/curl write /srv/both/x", "/srv/both may", OpWrite, "P8 B7"})
	s.benign = []string{"as=both4 /bin/tool read /srv/both/x", "write=ways-beside /srv/elsewhere/new", "read=ways-kept /srv/ways/write"}
	return s
}

// waysFiles are the names in those directories that are there before.
func waysFiles() (names []string) {
	for _, w := range ways {
		verb, _, _ := strings.Cut(w.run, " ")
		if !strings.HasSuffix(verb, "=new") && !strings.Contains(verb, "tmplink") && verb != "symlink" && verb != "mkdir" && verb != "mkfifo" && verb != "socketat" && verb != "umkdir" && verb != "usymlink" {
			names = append(names, strings.TrimPrefix(verb, "write="))
		}
	}
	return names
}

// watchedAct is a change of what a rule watches: it works whatever the mode, and
// is told of.
type watchedAct struct {
	run  string
	why  uint8 // of the record that it was changed
	path string
	// What the file held before and after; none if no record tells.
	before, after string
}

func digestOf(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:])
}

const watchedText = "from the image"

// watchScenario says what is told of files that are watched.
func watchScenario() scenario {
	image, none := digestOf(watchedText), "(no file)"
	large := strings.Repeat("x", 1<<20+1)
	return scenario{
		name:   "watched",
		policy: spec.GuardPolicy{Files: []spec.GuardFile{{Path: "/srv/watched", FIM: true}, {Path: "/shm/watched", FIM: true}}},
		before: []string{"file /shm/watched/x", "file /srv/watched/older"},
		watched: []watchedAct{
			{"write=w1 /srv/watched/write", 2, "/srv/watched/write", image, digestOf(watchedText + "x")},
			{"write=w2 /srv/watched/write", 2, "/srv/watched/write", digestOf(watchedText + "x"), digestOf(watchedText + "xx")},
			{"write=w3 /srv/watched/new", 1, "/srv/watched/new", none, digestOf("x")},
			{"write=w4 /srv/watched/older", 2, "/srv/watched/older", "(not known)", digestOf("kept\nx")},
			{"write=w5 /shm/watched/x", 2, "/watched/x", "(not known)", "(in a volume)"},
			{"truncate=w6 /srv/watched/truncate", 3, "/srv/watched/truncate", image, digestOf("")},
			{"opentrunc=w7 /srv/watched/opentrunc", 3, "/srv/watched/opentrunc", image, digestOf("")},
			{"unlink=w8 /srv/watched/unlink", 4, "/srv/watched/unlink", image, none},
			{"over=w9 /srv/watched/over", 6, "/srv/watched/over", image, digestOf("mine")},
			{"linkdrop=w10 /srv/watched/linkdrop", 1, "/srv/watched/linkdrop", none, digestOf("mine")},
			{"rename=w11 /srv/watched/rename /srv/watched/renamed", 5, "/srv/watched/rename", "", ""},
			{"chmod=w12 /srv/watched/chmod", 8, "/srv/watched/chmod", "", ""},
			{"setxattr=w13 /srv/watched/setxattr", 9, "/srv/watched/setxattr", "", ""},
			{"mkdir=w14 /srv/watched/mkdir", 1, "/srv/watched/mkdir", "", ""},
			{"symlink=w15 /srv/watched/symlink", 1, "/srv/watched/symlink", "", ""},
			{"fallocate=w16 /srv/watched/fallocate", 2, "/srv/watched/fallocate", image, digestOf(watchedText + strings.Repeat("\x00", 8192-len(watchedText)))},
			{"mapstore=w17 /srv/watched/mapstore", 2, "/srv/watched/mapstore", image, ""},
			{"uwrite=w18 /srv/watched/uwrite", 2, "/srv/watched/uwrite", image, digestOf("mine" + watchedText[4:])},
			{"write=w19 /srv/watched/large", 2, "/srv/watched/large", "(more than 1 MiB)", "(more than 1 MiB)"},
		},
		image: map[string][]byte{"srv/watched/large": []byte(large)},
	}
}

// watched checks that a change worked and what was told of it.
func (r *report) watched(t *testing.T, mode string, s scenario, c *Compiled, w watchedAct, o outcome) {
	t.Helper()
	name, row := name(w.run), r.row(s, w.run, true)
	r.set(mode, row, "recorded")
	if got := o.ran[name]; !strings.HasPrefix(got, "exit 0 ") {
		t.Errorf("%s: %s; want it to work", w.run, got)
		r.set(mode, row, "FAILS")
	}
	var changed, content bool
	for _, e := range o.events[name] {
		rule, _ := c.Rule(e.Rule)
		if e.Verdict != Allowed || !strings.Contains(rule.Text, "is watched for changes") || e.Generation != c.Generation || !strings.HasSuffix(e.Path, w.path) {
			continue
		}
		changed = changed || e.Op == OpChanged && e.Why == w.why && e.Exe == "/attack" && e.PID != 0
		content = content || e.Op == OpContent && e.Before == w.before && (e.After == w.after || w.after == "" && len(e.After) == 2*sha256.Size && e.Why&contentMapped != 0)
	}
	if !changed || !content && w.before != "" {
		t.Errorf("%s: want a change of kind %d of %s, %s to %s, in %v", w.run, w.why, w.path, w.before, w.after, told(o.events[name]))
		r.set(mode, row, "FAILS")
	}
}

func told(events []Event) (lines []string) {
	for _, e := range events {
		lines = append(lines, fmt.Sprintf("%s (%s: %s)", e, e.Exe, e.Path))
	}
	return lines
}
