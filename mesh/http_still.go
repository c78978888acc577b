package mesh

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"time"

	"hauberk.dev/mesh/http1"
)

// askingAt is where the requests of an exchange stand.
type askingAt struct {
	how   asking
	head  []byte // of a request of which it is not known yet where it goes
	close bool   // the request is the last
	req   request
}

type asking int

const (
	askingHead    asking = iota // between requests, or in the head of one
	askingBody                  // a body is being passed on
	askingUpgrade               // the server is to decide
	askingTunnel
	askingTunnelEnd // the client has ended its half
	askingEnded     // no more requests; responses are under way
	askingGone      // nor responses
)

// replyingAt is where the responses stand.
type replyingAt struct {
	how    replying
	req    request // the one that is being answered
	last   bool    // there are no more after this one
	served int
	status int    // of the answer whose body is under way
	before uint64 // bytes the client had been sent when that began
}

type replying int

const (
	replyingIdle replying = iota // between responses
	replyingHead                 // in the head of one
	replyingBody
	replyingTunnel
	replyingOver
	replyingFailed
)

// exchangeState is a frozen exchange as plain data.
type exchangeState struct {
	Asking  asking          `json:"asking,omitempty"`
	Close   bool            `json:"close,omitempty"`
	Request http1.Progress  `json:"request"`
	Client  []byte          `json:"client,omitempty"` // read of the client and not used
	Waiting []frozenRequest `json:"waiting,omitempty"`

	Reply    replying       `json:"reply,omitempty"`
	Last     bool           `json:"last,omitempty"`
	Served   int            `json:"served,omitempty"`
	Status   int            `json:"status,omitempty"`
	Before   uint64         `json:"before,omitempty"`
	Response http1.Progress `json:"response"`
	// Met tells that there is a server; Server is what was read of it.
	Met    bool   `json:"met,omitempty"`
	Server []byte `json:"server,omitempty"`
	Tunnel bool   `json:"tunnel,omitempty"`
	// Granted is what the tunnel was asked for by.
	Granted *frozenRequest `json:"granted,omitempty"`
}

type frozenRequest struct {
	Method  string     `json:"method"`
	Upgrade bool       `json:"upgrade,omitempty"`
	Note    *noteState `json:"note,omitempty"`
	// What rules may read of it, if the plan changes.
	Target string `json:"target,omitempty"`
	Host   string `json:"host,omitempty"`
	Head   []byte `json:"head,omitempty"`
	// Rules and Began as judged has them.
	Rules []byte    `json:"rules,omitempty"`
	Began time.Time `json:"began,omitzero"`
}

// judged adds what rules may read.
func (f *frozenRequest) judged(h *underWay) {
	f.Target, f.Host, f.Head, f.Rules, f.Began = h.Target, h.Host, h.Raw, []byte(h.rules), h.began
}

func (f *frozenRequest) way() underWay {
	return underWay{http1.Head{Method: f.Method, Target: f.Target, Host: f.Host, Raw: f.Head}, judged{string(f.Rules), f.Began}}
}

func frozenRequestOf(r request) frozenRequest {
	return frozenRequest{Method: r.method, Upgrade: r.upgrade != nil, Note: r.note.state()}
}

// check refuses what no exchange can have come to.
func (s *exchangeState) check() error {
	most := maxPipeline
	if s.Reply == replyingHead || s.Reply == replyingBody {
		most++
	}
	switch {
	case s.Asking < askingHead || s.Asking > askingGone || s.Reply < replyingIdle || s.Reply > replyingOver:
		return fmt.Errorf("exchange that asks %d and replies %d", s.Asking, s.Reply)
	case len(s.Waiting) > most:
		return fmt.Errorf("exchange with %d requests under way", len(s.Waiting))
	case len(s.Waiting) == 0 && (s.Reply == replyingHead || s.Reply == replyingBody):
		return errors.New("exchange that answers nothing")
	case !s.Met && (len(s.Waiting) > 0 || s.Asking == askingBody || s.Reply != replyingIdle && s.Reply != replyingOver):
		return errors.New("exchange with requests under way and no server")
	case s.Asking == askingUpgrade && (len(s.Waiting) == 0 || !s.Waiting[len(s.Waiting)-1].Upgrade):
		return errors.New("exchange that waits for an upgrade nobody asks for")
	case (s.Asking == askingTunnel || s.Asking == askingTunnelEnd) && !s.Met:
		return errors.New("tunnel to no server")
	}
	var p http1.Payload
	return errors.Join(p.Resume(s.Request), p.Resume(s.Response))
}

// freeze wakes whoever waits for something other than the connections, which
// are frozen by their owner after it.
func (x *exchange) freeze() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.still {
		return
	}
	x.still = true
	if x.farewell != nil {
		x.farewell.Stop()
	}
	x.settled.Broadcast()
	close(x.stop)
}

// frozen tells, once the responses' goroutine has ended, whether that was why.
func (x *exchange) frozen() bool {
	return x.replies.how != replyingOver && x.replies.how != replyingFailed
}

// state is where a frozen exchange stands, after both goroutines have ended.
func (x *exchange) state() *exchangeState {
	a, r := x.asking, x.replies
	if a.how == askingUpgrade {
		select {
		case granted := <-a.req.upgrade: // it has been decided at the same moment
			if a = (askingAt{}); granted {
				a.how = askingTunnel
			}
		default:
		}
	}
	if r.how == replyingOver && !x.tunnel && a.how != askingGone {
		a = askingAt{how: askingEnded} // what else is asked goes nowhere
	}
	s := &exchangeState{Asking: a.how, Close: a.close, Request: x.in.Body(), Client: append(bytes.Clone(a.head), x.in.Rest()...),
		Reply: r.how, Last: r.last, Served: r.served, Status: r.status, Before: r.before, Tunnel: x.tunnel}
	if a.how == askingGone || x.server == nil || r.how == replyingOver && !x.tunnel {
		return s
	}
	s.Met, s.Response, s.Server = true, x.answers.Body(), x.answers.Rest()
	if b, ok := x.server.(*begunSide); ok {
		s.Server = append(s.Server, b.begun...)
	}
	if r.how == replyingHead || r.how == replyingBody {
		s.Waiting = append(s.Waiting, frozenRequestOf(r.req))
	}
	for req := range x.waiting {
		s.Waiting = append(s.Waiting, frozenRequestOf(req))
	}
	for i := range min(len(s.Waiting), len(x.under)) { // in the same order
		s.Waiting[i].judged(&x.under[i])
	}
	if x.tunnel && len(x.under) > 0 {
		s.Granted = &frozenRequest{Method: x.under[0].Method}
		s.Granted.judged(&x.under[0])
	}
	return s
}

// resume puts an exchange where another stood. x.server is set, if it was met.
func (x *exchange) resume(s *exchangeState) {
	x.asking = askingAt{how: s.Asking, close: s.Close}
	x.in.Resume(s.Request)
	x.tunnel = s.Tunnel
	x.replies = replyingAt{how: s.Reply, last: s.Last, served: s.Served, status: s.Status, before: s.Before}
	if x.over = s.Reply == replyingOver; x.over && !s.Tunnel && s.Asking != askingGone {
		x.asking = askingAt{how: askingEnded} // what else is asked goes nowhere
	}
	if x.server == nil {
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if s.Granted != nil {
		x.under = append(x.under, s.Granted.way())
	}
	for i, w := range s.Waiting {
		req := request{method: w.Method, note: w.Note.note()}
		if w.Upgrade {
			req.upgrade = make(chan bool, 1)
			x.asking.req = req // of which there is one, the last
		}
		x.under = append(x.under, w.way())
		if i == 0 && (s.Reply == replyingHead || s.Reply == replyingBody) {
			x.replies.req = req
		} else {
			x.waiting <- req
		}
	}
	x.done = make(chan struct{})
	x.answers = http1.NewReader(x.server)
	x.answers.Resume(s.Response)
	if x.over {
		close(x.done)
		return
	}
	go x.responses()
}

// goOn finishes what the requests were at when the exchange was frozen.
func (x *exchange) goOn() error {
	switch x.asking.how {
	case askingBody:
		out := bufio.NewWriterSize(x.server, 16<<10)
		err := x.in.Continue(out)
		if ferr := out.Flush(); err == nil {
			err = ferr
		}
		return x.passed(err)
	case askingUpgrade:
		return x.upgraded()
	case askingTunnel:
		return x.tunnelled()
	case askingTunnelEnd:
		return x.awaitTunnel()
	case askingEnded, askingGone:
		return errOver
	}
	return nil
}
