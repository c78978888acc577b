package control

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"hauberk.dev/api/admin"
	"hauberk.dev/contain"
	"hauberk.dev/ledger"
)

// Kinds of ledger entry the control plane itself writes. The word before the
// dot chooses the link of the chain in a story.
const (
	kindApplication  = "own.application"
	kindTicket       = "launch.ticket"
	kindLaunchDenied = "launch.refused"
	kindBoot         = "boot.instance"
	kindNode         = "boot.node"
	kindDenial       = "guard.denial"
	kindAccess       = "mesh.denial"
	kindExec         = "launch.exec"
	kindTap          = "mesh.tap"
)

// links maps the room of an entry's kind to the link of the chain.
var links = map[string]string{
	"own": "own", "release": "release", "launch": "launch", "boot": "boot",
	"identity": "identity", "mesh": "talk", "guard": "break", "contain": "break",
}

// maxChapters bounds a story. The founding chapters and the newest stay.
const maxChapters = 120

// why tells the story of a subject: an incident, an instance, a workload, an
// application, a digest, an image, or the index of a ledger entry.
func (c *Control) why(namespace, subject string) (admin.Story, error) {
	subject = strings.TrimSpace(subject)
	if subject == "" {
		return admin.Story{}, &admin.Error{Reason: "NoSubject", Message: "why: no subject is given",
			Fix: "name an incident, instance, workload, application, digest or ledger index: hauberk why web"}
	}
	if n, err := strconv.ParseUint(subject, 10, 64); err == nil {
		return c.whyEntry(n)
	}
	about, err := c.about(namespace, subject)
	if err != nil {
		return admin.Story{}, fmt.Errorf("why %s: %w", subject, err)
	}
	if len(about) == 0 {
		return admin.Story{}, &admin.Error{Reason: "Unknown", Message: fmt.Sprintf("nothing is recorded of %q in namespace %q", subject, namespace),
			Fix: "`hauberk ps` and `hauberk incidents` list what there is; -n chooses the namespace"}
	}
	return admin.Story{Subject: subject, Answer: c.answer(namespace, subject, about), Chapter: chapters(about)}, nil
}

// whyEntry tells what led to one entry.
func (c *Control) whyEntry(n uint64) (admin.Story, error) {
	e, err := c.log.Read(n)
	if err != nil {
		return admin.Story{}, &admin.Error{Reason: "Unknown", Message: err.Error(), Fix: "`hauberk ledger show` lists the entries"}
	}
	about, err := c.about(e.Namespace, cmp.Or(e.Incident, e.Instance, e.Workload, e.Application, e.Digest, e.Subject))
	if err != nil {
		return admin.Story{}, fmt.Errorf("why entry %d: %w", n, err)
	}
	about = slices.DeleteFunc(about, func(o ledger.Record) bool { return o.Index > n })
	return admin.Story{Subject: fmt.Sprintf("entry %d", n), Answer: e.Text, Chapter: chapters(about)}, nil
}

// about collects the entries of a subject, and those of the instance, the
// workload, the image and the application behind it.
func (c *Control) about(namespace, subject string) ([]ledger.Record, error) {
	s := &collector{log: c.log, seen: map[uint64]ledger.Record{}}
	own := s.find(
		ledger.Query{Namespace: namespace, Incident: subject}, ledger.Query{Namespace: namespace, Instance: subject},
		ledger.Query{Namespace: namespace, Workload: subject}, ledger.Query{Namespace: namespace, Application: subject},
		ledger.Query{Digest: subject}, ledger.Query{Subject: subject})
	for _, r := range own {
		e := r.Entry
		if e.Incident == subject {
			s.find(ledger.Query{Namespace: e.Namespace, Instance: e.Instance})
		}
		if e.Instance == subject || e.Incident == subject {
			s.founding(e)
		}
		if e.Workload == subject {
			s.founding(e)
		}
	}
	return s.sorted(), s.err
}

// collector gathers entries once each.
type collector struct {
	log  *ledger.Log
	seen map[uint64]ledger.Record
	err  error
}

func (s *collector) find(queries ...ledger.Query) []ledger.Record {
	var out []ledger.Record
	for _, q := range queries {
		found, err := s.log.Find(q)
		if err != nil {
			s.err = err
			return nil
		}
		for _, r := range found {
			s.seen[r.Index] = r
		}
		out = append(out, found...)
	}
	return out
}

// founding adds what made an instance or workload possible: who owns the
// application, and how the image was released.
func (s *collector) founding(e ledger.Entry) {
	if e.Digest != "" {
		s.find(ledger.Query{Digest: e.Digest, Kind: "release.done"}, ledger.Query{Digest: e.Digest, Kind: "release.intent"})
	}
	if e.Application != "" {
		s.find(ledger.Query{Namespace: e.Namespace, Application: e.Application, Kind: kindApplication})
	}
}

func (s *collector) sorted() []ledger.Record {
	all := make([]ledger.Record, 0, len(s.seen))
	for _, r := range s.seen {
		all = append(all, r)
	}
	slices.SortFunc(all, func(a, b ledger.Record) int { return cmp.Compare(a.Index, b.Index) })
	return all
}

func chapters(about []ledger.Record) []admin.Chapter {
	if len(about) > maxChapters {
		about = append(slices.Clone(about[:maxChapters/4]), about[len(about)-3*maxChapters/4:]...)
	}
	out := make([]admin.Chapter, 0, len(about))
	for _, r := range about {
		room, _, _ := strings.Cut(r.Entry.Kind, ".")
		out = append(out, admin.Chapter{At: r.Entry.Time, Link: cmp.Or(links[room], room), Text: r.Entry.Text, Index: int64(r.Index)})
	}
	return out
}

// answer is the story in one sentence.
func (c *Control) answer(namespace, subject string, about []ledger.Record) string {
	for _, i := range c.book.Incidents() {
		if i.Namespace == namespace && (i.Name == subject || i.Spec.Instance == subject) {
			end := "containment is not complete yet"
			if i.State() == contain.Contained {
				end = fmt.Sprintf("it was contained %d ms later, confirmed by %d receipts", i.Elapsed().Milliseconds(), len(i.Receipts))
			}
			return fmt.Sprintf("%s broke rule %q (%s); %s.", i.Spec.Instance, i.Spec.Rule, i.Spec.Detail, end)
		}
	}
	if state, ok := c.standing(key{namespace, subject}); ok {
		return state
	}
	return about[len(about)-1].Entry.Text
}
