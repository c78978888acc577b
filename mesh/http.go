package mesh

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"hauberk.dev/mesh/http1"
	"hauberk.dev/mesh/inspect"
	"hauberk.dev/mesh/wire"
)

const (
	headTimeout = 30 * time.Second // from the first byte of a head to its last
	askTime     = 5 * time.Second  // for a client that will be refused to ask
	lingerTime  = time.Second      // for a client to read a last answer
	maxPipeline = 16               // requests of one client under way
)

// refusal is the body of an answer the proxy gives itself.
type refusal struct {
	Error   string `json:"error"`
	Service string `json:"service"`
	Caller  string `json:"caller"`
	Method  string `json:"method,omitempty"`
	Path    string `json:"path,omitempty"`
	Rule    string `json:"rule,omitempty"`
	Reason  string `json:"reason"`
	Hint    string `json:"hint"` // the command that tells more

	retry int // seconds until asking again makes sense; 0 is unsaid
}

// statusText names the statuses the proxy itself answers with.
var statusText = map[int]string{400: "Bad Request", 403: "Forbidden", 405: "Method Not Allowed", 502: "Bad Gateway", 503: "Service Unavailable"}

// answer writes a whole response, after which the connection closes.
func answer(w io.Writer, status int, r refusal) error { return respond(w, status, r, true) }

func respond(w io.Writer, status int, r refusal, closing bool) error {
	body, err := json.Marshal(r)
	if err != nil {
		return err
	}
	body = append(body, '\n')
	length := len(body)
	if r.Method == "HEAD" { // a body would be read as the answer to what is asked next
		body = nil
	}
	connection := ""
	if closing {
		connection = "Connection: close\r\n"
	}
	if r.retry > 0 {
		connection += fmt.Sprintf("Retry-After: %d\r\n", r.retry)
	}
	_, err = fmt.Fprintf(w, "HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%s\r\n%s",
		status, statusText[status], length, connection, body)
	return err
}

// refuseHTTP answers the first request of a connection that goes nowhere, and
// closes. A client that asks nothing gets no answer: it would take one for the
// answer to what it asks next.
func refuseHTTP(c *net.TCPConn, r refusal) {
	c.SetReadDeadline(time.Now().Add(askTime))
	client, two, err := opening(tcpSide{wire.New(c)})
	if err != nil {
		abortTCP(c)
		return
	}
	if two {
		refuseHTTP2(c, client, r)
		return
	}
	c.SetDeadline(time.Now().Add(lingerTime))
	if answer(c, 503, r) != nil {
		abortTCP(c)
		return
	}
	linger(c)
}

// linger closes a connection so that a client that is still sending gets to
// read the last answer: a plain close would reset it.
func linger(c *net.TCPConn) {
	c.CloseWrite()
	c.SetReadDeadline(time.Now().Add(lingerTime))
	io.CopyN(io.Discard, c, 256<<10)
	c.Close()
}

// exchange passes HTTP/1 requests from a client to a server, judging each, and
// the responses back. Requests are read here while responses are copied in a
// second goroutine, so bodies may flow both ways at once; answers to refused
// requests wait for the responses before them.
type exchange struct {
	entry  *entry
	client side
	sight  *sight // nil notes nothing
	// dial connects to the server; it is called before the first request that
	// passes.
	dial func() (side, error)
	// judge returns status 0 if the request may pass, else what to answer.
	judge     func(*http1.Head) (status int, r refusal)
	malformed func(error)
	way       *way // nil judges nothing again

	server   side
	in       *http1.Reader // of the client
	answers  *http1.Reader // of the server
	waiting  chan request
	out      *bufio.Writer // to the client
	settled  sync.Cond     // under mu: under way has fallen, or over or still is set
	mu       sync.Mutex
	judged   judged     // the last request; for the requests' goroutine
	under    []underWay // requests passed on whose responses are not complete; a tunnel's stays
	over     bool
	still    bool // frozen
	stop     chan struct{}
	left     atomic.Bool   // no more requests come, and none is under way
	tunnel   bool          // another protocol is spoken; for the responses' goroutine
	done     chan struct{} // the responses' goroutine has ended
	farewell *time.Timer   // for a client that does not know yet that there is no more

	// Where the two goroutines stand.
	asking  askingAt
	replies replyingAt
}

// maxUnderWay bounds the heads that an exchange keeps of requests under way.
const maxUnderWay = 64 << 10

// underWay is what is kept of a request until its response is complete.
type underWay struct {
	http1.Head
	judged
}

// way judges requests under way anew.
type way struct {
	// stale tells whether there has been another plan since a request was judged.
	stale func() bool
	// allows tells whether the plan of the moment allows a request under way.
	allows func(*underWay) bool
}

// allowedStill tells whether all requests under way are allowed.
func (x *exchange) allowedStill() bool {
	if x.way == nil {
		return true
	}
	x.mu.Lock()
	all := slices.Clone(x.under)
	x.mu.Unlock()
	for i := range all {
		if all[i].Target != "" && !x.way.allows(&all[i]) { // a state of another version has no target
			return false
		}
	}
	return true
}

// keepLocked is what is kept of the head of a request under way. Fields that are
// too many to be kept are not there for a rule that a later plan has.
func (x *exchange) keepLocked(h *http1.Head) underWay {
	kept, size := underWay{*h, x.judged}, len(h.Raw)
	for i := range x.under {
		size += len(x.under[i].Raw)
	}
	if kept.Raw = nil; x.way != nil && size <= maxUnderWay {
		kept.Raw = bytes.Clone(h.Raw)
	}
	return kept
}

// request is one under way.
type request struct {
	method  string
	asked   inspect.Asked
	note    note
	upgrade chan bool // set for an upgrade: whether it was granted
}

var errOver = errors.New("exchange over")

// start readies the exchange, which may be frozen from then on.
func (x *exchange) start() {
	x.settled.L = &x.mu
	x.stop = make(chan struct{})
}

// run serves the client to its end. It returns where it stands if it was frozen.
// from is such a return: the exchange goes on there, with the server it had.
func (x *exchange) run(from *exchangeState) *exchangeState {
	x.waiting = make(chan request, maxPipeline)
	x.out = bufio.NewWriterSize(&counter{x.entry, x.client, &x.entry.sent}, 16<<10)
	x.in = http1.NewReader(&countingReader{x.entry, x.client, &x.entry.received})
	if from != nil {
		x.resume(from)
	}
	err := errForbidden
	if from == nil || x.allowedStill() { // by a plan that has come meanwhile
		err = x.requests()
	}
	if err == io.EOF || err == errOver {
		err = x.leave()
	} else if !errors.Is(err, wire.ErrFrozen) {
		x.client.abort()
		if x.server != nil {
			x.server.abort() // the responses need not be waited for
		}
	}
	close(x.waiting)
	if x.server != nil {
		<-x.done
	}
	if !errors.Is(err, wire.ErrFrozen) || x.replies.how == replyingFailed {
		return nil
	}
	return x.state()
}

// leave ends the exchange with a client that asks no more.
func (x *exchange) leave() error {
	if x.asking.how != askingGone {
		x.asking = askingAt{how: askingEnded}
		if !x.settle() {
			return wire.ErrFrozen
		}
		x.asking.how = askingGone
		x.left.Store(true)
		if x.server != nil {
			x.server.finish() // who listens to it hears its end
			<-x.done
		}
	}
	x.client.CloseWrite()
	if x.drain() {
		return wire.ErrFrozen
	}
	x.client.finish()
	return nil
}

// drain reads what the client still sends, for a moment, so that it gets to
// read the last answer.
func (x *exchange) drain() (frozen bool) {
	t := time.AfterFunc(lingerTime, x.client.abort)
	defer t.Stop()
	_, err := io.CopyN(io.Discard, x.client, 256<<10)
	return errors.Is(err, wire.ErrFrozen)
}

// requests reads requests until there are no more. Whatever it returns has been
// answered, as far as it can be.
func (x *exchange) requests() error {
	timer := time.AfterFunc(time.Hour, x.client.abort)
	timer.Stop()
	defer timer.Stop()
	if err := x.goOn(); err != nil {
		return err
	}
	for {
		x.asking = askingAt{}
		if _, err := x.in.R.Peek(1); err != nil {
			return err
		}
		timer.Reset(headTimeout)
		h, err := x.in.Request()
		timer.Stop()
		var syntax *http1.SyntaxError
		if errors.As(err, &syntax) {
			x.malformed(err)
			return x.local(400, refusal{Error: "bad request", Reason: err.Error()}, true)
		}
		if err != nil {
			return err
		}
		if x.entry.cut.Load() {
			return errCut
		}
		x.asking.head = h.Raw // until it is known where it goes
		if err := x.one(h); err != nil {
			return err
		}
	}
}

// one passes one request on, or answers it.
func (x *exchange) one(h *http1.Head) error {
	x.sight.begin(h)
	status, r := x.judge(h)
	if h.H2C {
		h.DropUpgrade() // what is asked in another protocol would not be judged
		x.asking.head = h.Raw
	}
	if status != 0 {
		return x.refused(h, status, r)
	}
	if x.server == nil {
		server, err := x.dial()
		if errors.Is(err, wire.ErrFrozen) {
			return err
		}
		if err != nil {
			r.Error, r.Reason = "unreachable", err.Error()
			x.sight.refused(503, &r)
			return x.local(503, r, true)
		}
		x.meet(server)
		if status, r := x.judge(h); status != 0 { // that took its time: there may be another plan
			return x.refused(h, status, r)
		}
	}
	req := request{method: h.Method}
	if status, req.asked = x.entry.watch.request(x, x.in, h, &r); status != 0 {
		return x.refused(h, status, r)
	}
	if x.entry.watch.stopped() {
		return wire.ErrFrozen // with its head: it is looked at anew
	}
	req.note = x.sight.passed(h)
	if h.Upgrade && h.Framing == http1.NoBody {
		req.upgrade = make(chan bool, 1)
	}
	if err := x.begin(req, h); err != nil {
		return err
	}
	if x.way != nil && x.way.stale() && !x.way.allows(&underWay{*h, x.judged}) { // whoever looked for it has not seen it
		return errForbidden
	}
	x.asking = askingAt{how: askingBody, close: h.Close, req: req}
	return x.passed(x.in.Forward(x.entry.watch.late(x.server, h, &req.asked), h))
}

// meet begins to listen to the server.
func (x *exchange) meet(server side) {
	x.server, x.done = server, make(chan struct{})
	x.answers = http1.NewReader(server)
	go x.responses()
}

// passed goes on after a request that was passed on, or its part, with err.
func (x *exchange) passed(err error) error {
	if errors.Is(err, wire.ErrFrozen) {
		return err
	}
	if err != nil {
		var syntax *http1.SyntaxError
		if errors.As(err, &syntax) {
			// The server has half a message: it must not wait for the rest.
			x.malformed(err)
		}
		x.client.abort() // first: it is not to be told that the server has failed
		x.server.abort()
		return err
	}
	if x.asking.req.upgrade != nil {
		x.asking.how = askingUpgrade
		return x.upgraded()
	}
	if x.asking.close {
		return errOver
	}
	return nil
}

// refused answers a request that does not pass.
func (x *exchange) refused(h *http1.Head, status int, r refusal) error {
	x.sight.refused(status, &r)
	return x.local(status, r, h.Close || h.Framing != http1.NoBody)
}

// upgraded waits for the server's decision: nothing that follows may be taken
// for HTTP or not before it is known.
func (x *exchange) upgraded() error {
	granted := false
	select {
	case granted = <-x.asking.req.upgrade:
	case <-x.done:
		select {
		case granted = <-x.asking.req.upgrade: // just before
		default:
			if x.frozen() {
				return wire.ErrFrozen
			}
			return errOver
		}
	case <-x.stop:
		return wire.ErrFrozen
	}
	if !granted {
		return nil
	}
	x.asking = askingAt{how: askingTunnel}
	return x.tunnelled()
}

// tunnelled passes what the client sends in another protocol.
func (x *exchange) tunnelled() error {
	if _, err := x.in.R.WriteTo(x.server); err != nil {
		return err
	}
	x.server.CloseWrite()
	x.asking.how = askingTunnelEnd
	return x.awaitTunnel()
}

func (x *exchange) awaitTunnel() error {
	<-x.done
	if x.replies.how != replyingOver && x.frozen() {
		return wire.ErrFrozen
	}
	return errOver
}

// begin notes a request under way. It fails when there are no more responses.
func (x *exchange) begin(r request, h *http1.Head) error {
	x.mu.Lock()
	if x.still || x.over {
		defer x.mu.Unlock()
		if x.still {
			return wire.ErrFrozen
		}
		return errOver
	}
	x.under = append(x.under, x.keepLocked(h))
	x.mu.Unlock()
	select {
	case x.waiting <- r:
		return nil
	case <-x.done:
	case <-x.stop:
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.under = x.under[:len(x.under)-1]
	if x.still {
		return wire.ErrFrozen
	}
	return errOver
}

// settle waits for the responses under way. It fails if the exchange is frozen
// before.
func (x *exchange) settle() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	for len(x.under) > 0 && !x.over && !x.still {
		x.settled.Wait()
	}
	return len(x.under) == 0 || x.over
}

// local gives the proxy's own answer, after the responses before it.
func (x *exchange) local(status int, r refusal, closing bool) error {
	if !x.settle() {
		return wire.ErrFrozen
	}
	x.mu.Lock()
	over := x.over
	x.mu.Unlock()
	if over {
		return errOver
	}
	if err := respond(x.out, status, r, closing); err != nil {
		return err
	}
	if err := x.out.Flush(); err != nil {
		return err
	}
	if closing {
		return errOver
	}
	return nil
}

// responses copies responses until one says it is the last, or the server ends
// the connection: it is listened to while nothing is asked, so that the client
// knows at once and does not ask on a connection that goes nowhere.
func (x *exchange) responses() {
	defer close(x.done)
	last, err := x.reply()
	if errors.Is(err, wire.ErrFrozen) {
		x.out.Flush() // what is decided on is sent, or kept
		return
	}
	x.mu.Lock()
	x.over = true
	x.settled.Broadcast()
	x.mu.Unlock()
	x.replies.how = replyingOver
	switch {
	case err != nil:
		x.replies.how = replyingFailed
		x.client.abort() // in the middle of a response
		x.server.abort()
	case x.tunnel:
		x.client.CloseWrite() // the other direction ends by itself
	case last:
		x.replies.last = true
		x.sayGoodbye()
	}
}

// sayGoodbye ends the connection of a client that may not know yet that there
// are no more responses; what it sends now goes nowhere.
func (x *exchange) sayGoodbye() {
	x.client.CloseWrite()
	x.mu.Lock()
	x.farewell = time.AfterFunc(lingerTime, x.client.abort)
	if x.still {
		x.farewell.Stop()
	}
	x.mu.Unlock()
	x.server.finish()
}

// reply copies responses until there are no more.
func (x *exchange) reply() (last bool, err error) {
	switch {
	case x.replies.how == replyingTunnel:
		return true, x.answerTunnel()
	case x.replies.how == replyingBody:
		if err := x.noteBody(); err != nil || x.replies.last {
			return true, err
		}
		x.complete()
		x.replies.served++
	case x.replies.how == replyingHead: // who asked for it does not wait any more
		if last, err := x.response(); err != nil || last {
			return last, err
		}
		x.complete()
		x.replies.served++
	}
	for ; ; x.replies.served++ {
		_, end := x.answers.R.Peek(1)
		if errors.Is(end, wire.ErrFrozen) {
			return false, end
		}
		if x.unasked() {
			return !x.left.Load(), nil
		}
		if ended := end == io.EOF; x.replies.served > 0 && (ended || errors.Is(end, syscall.ECONNRESET)) {
			// As without a proxy, a client that asked meanwhile sees the end of a
			// connection that has served, and may ask again on another.
			if !ended {
				return false, end
			}
			return true, nil
		}
		var asked bool
		if x.replies.req, asked = <-x.waiting; !asked {
			return false, wire.ErrFrozen // before it could be said what is asked
		}
		if last, err = x.response(); err != nil || last {
			return last, err
		}
		x.complete()
	}
}

// complete notes the end of a response.
func (x *exchange) complete() {
	x.replies = replyingAt{served: x.replies.served}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.under = slices.Delete(x.under, 0, 1)
	x.settled.Broadcast()
}

// unasked tells whether nothing is under way, and if so that nothing will be:
// what a server says then, its end or worse an answer, must not become the
// answer to the next request.
func (x *exchange) unasked() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.over = len(x.under) == 0
	return x.over
}

// response copies one response. last means that there are no more.
func (x *exchange) response() (last bool, err error) {
	req := x.replies.req
	for {
		h, err := x.answers.Response(req.method)
		if errors.Is(err, wire.ErrFrozen) {
			x.replies.how = replyingHead
			return false, err
		}
		if err != nil {
			// Nothing of this response has been sent: say so properly.
			x.sight.failed(&req.note, err)
			return true, x.badGateway(req, err)
		}
		switch {
		case h.Status == 101 && req.upgrade == nil:
			return true, x.badGateway(req, errors.New("the server changes protocols unasked"))
		case h.Status == 101:
			if err := x.answers.Forward(x.out, h); err != nil {
				return true, err
			}
			x.sight.ended(&req.note, 101, "", 0)
			req.upgrade <- true
			return true, x.answerTunnel()
		case h.Status < 200:
			if err := x.answers.Forward(x.out, h); err != nil {
				return true, err
			}
			continue
		}
		x.entry.watch.answered(&req.asked, h.Status)
		x.replies.how, x.replies.last = replyingBody, h.Close
		x.replies.status, x.replies.before = h.Status, x.entry.sent.Load()
		if _, err := x.out.Write(h.Raw); err != nil {
			return true, err
		}
		x.answers.Begin(h)
		return h.Close, x.noteBody()
	}
}

// noteBody copies the rest of a response's body and notes its end.
func (x *exchange) noteBody() error {
	err, r := x.replyBody(), &x.replies
	x.sight.replied(&r.req.note, r.status, x.entry.sent.Load()-r.before, err)
	return err
}

// replyBody copies the rest of a response's body.
func (x *exchange) replyBody() error {
	err := x.answers.Continue(x.out)
	if ferr := x.out.Flush(); err == nil {
		err = ferr
	}
	if err != nil {
		return err
	}
	if req := x.replies.req; req.upgrade != nil {
		req.upgrade <- false
	}
	return nil
}

// answerTunnel passes what the server sends in another protocol.
func (x *exchange) answerTunnel() error {
	x.tunnel = true
	x.replies.how = replyingTunnel
	_, err := x.answers.R.WriteTo(&counter{x.entry, x.client, &x.entry.sent})
	return err
}

func (x *exchange) badGateway(req request, cause error) error {
	if err := respond(x.out, 502, refusal{Error: "bad gateway", Method: req.method, Reason: "the server's answer: " + cause.Error()}, true); err != nil {
		return err
	}
	return x.out.Flush()
}

// countingReader counts what comes from the client, and ends with a cut.
type countingReader struct {
	e     *entry
	r     io.Reader
	count *atomic.Uint64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	if c.e.cut.Load() {
		return 0, errCut
	}
	c.count.Add(uint64(n))
	c.e.watch.mirror(p[:n])
	return n, err
}
