package guest

import (
	"syscall"

	"hauberk.dev/api/guestproto"
)

// maxErrands is how many verbs may be under way beside the loop.
const maxErrands = 4

// errand is a verb that may take long: a mount that waits for the host, memory
// that has to be reclaimed. It runs on a thread of its own, so that no signal
// waits for it; it has a copy of what it needs and touches nothing of the
// agent. What it found is taken up, and answered, by the loop.
type errand struct {
	request uint32
	session uint32 // that asked; a later one gets no answer
	work    func() error
	done    func(err error) error // in the loop; may append a reply to tx; nil: nothing is left to do
	err     error
}

// errands are those under way.
type errands struct {
	finished chan *errand
	wake     int // eventfd that is readable when one finished
	running  int
}

func (e *errands) open() (err error) {
	e.finished = make(chan *errand, maxErrands)
	if e.wake, err = eventFD(); err != nil {
		return fail("make", "event descriptor", err)
	}
	return nil
}

// send starts an errand.
func (a *agent) send(request uint32, work func() error, done func(err error) error) error {
	if a.errands.running == maxErrands {
		return fail("start", "errand beside the others", syscall.EAGAIN)
	}
	a.errands.running++
	e := &errand{request: request, session: a.sessions, work: work, done: done}
	go func() { // ends with the verb, which the kernel bounds
		e.err = e.work()
		a.errands.finished <- e // has room for all
		one := [8]byte{1}
		_, _ = syscall.Write(a.errands.wake, one[:])
	}()
	return nil
}

// errandsBack takes up what errands found.
func (a *agent) errandsBack() {
	var count [8]byte
	_, _ = syscall.Read(a.errands.wake, count[:])
	for a.room() >= reserve {
		select {
		case e := <-a.errands.finished:
			a.errands.running--
			a.errandBack(e)
			continue
		default:
		}
		return
	}
	// No room for more answers now: look again when there is.
	one := [8]byte{1}
	_, _ = syscall.Write(a.errands.wake, one[:])
}

func (a *agent) errandBack(e *errand) {
	start := len(a.tx)
	a.tx = guestproto.Begin(a.tx, e.request, guestproto.VerbReply)
	err := e.err
	if e.done != nil {
		err = e.done(err)
	}
	if err != nil || e.session != a.sessions || !a.session {
		a.tx = a.tx[:start]
		if err != nil && e.session == a.sessions && a.session {
			a.refuse(e.request, err)
		}
		return
	}
	guestproto.End(a.tx, start)
}
