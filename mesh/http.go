package mesh

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"hauberk.dev/mesh/http1"
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
	connection := ""
	if closing {
		connection = "Connection: close\r\n"
	}
	_, err = fmt.Fprintf(w, "HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%s\r\n%s",
		status, statusText[status], len(body), connection, body)
	return err
}

// refuseHTTP answers the first request of a connection that goes nowhere, and
// closes. A client that asks nothing gets no answer: it would take one for the
// answer to what it asks next.
func refuseHTTP(c *net.TCPConn, r refusal) {
	c.SetReadDeadline(time.Now().Add(askTime))
	client, two, err := opening(tcpSide{c})
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
	// dial connects to the server; it is called before the first request that
	// passes.
	dial func() (side, error)
	// judge returns status 0 if the request may pass, else what to answer.
	judge     func(*http1.Head) (status int, r refusal)
	malformed func(error)

	server  side
	waiting chan request
	out     *bufio.Writer // to the client
	settled sync.Cond     // under mu: under way has fallen, or over is set
	mu      sync.Mutex
	under   int // requests passed on whose responses are not complete
	over    bool
	left    atomic.Bool   // no more requests come, and none is under way
	tunnel  bool          // another protocol is spoken; for the responses' goroutine
	done    chan struct{} // the responses' goroutine has ended
}

// request is one under way.
type request struct {
	method  string
	upgrade chan bool // set for an upgrade: whether it was granted
}

var errOver = errors.New("exchange over")

// run serves the client to its end.
func (x *exchange) run() {
	x.settled.L = &x.mu
	x.waiting = make(chan request, maxPipeline)
	x.out = bufio.NewWriterSize(&counter{x.entry, x.client, &x.entry.sent}, 16<<10)
	err := x.requests()
	close(x.waiting)
	orderly := err == io.EOF || errors.Is(err, errOver)
	if !orderly {
		x.client.abort()
	}
	if x.server != nil {
		if orderly {
			x.settle()
			x.left.Store(true)
			x.server.finish() // who listens to it hears its end
		} else {
			x.server.abort() // the responses need not be waited for
		}
		<-x.done
	}
	if orderly {
		x.client.CloseWrite()
		x.drain()
		x.client.finish()
	}
}

// drain reads what the client still sends, for a moment, so that it gets to
// read the last answer.
func (x *exchange) drain() {
	t := time.AfterFunc(lingerTime, x.client.abort)
	defer t.Stop()
	io.CopyN(io.Discard, x.client, 256<<10)
}

// requests reads requests until there are no more. Whatever it returns has been
// answered, as far as it can be.
func (x *exchange) requests() error {
	in := http1.NewReader(&countingReader{x.entry, x.client, &x.entry.received})
	timer := time.AfterFunc(time.Hour, x.client.abort)
	timer.Stop()
	defer timer.Stop()
	for {
		if _, err := in.R.Peek(1); err != nil {
			return err
		}
		timer.Reset(headTimeout)
		h, err := in.Request()
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
		if err := x.one(in, h); err != nil {
			return err
		}
	}
}

// one passes one request on, or answers it.
func (x *exchange) one(in *http1.Reader, h *http1.Head) error {
	status, r := x.judge(h)
	if h.H2C {
		h.DropUpgrade() // what is asked in another protocol would not be judged
	}
	if status != 0 {
		return x.refused(h, status, r)
	}
	if x.server == nil {
		server, err := x.dial()
		if err != nil {
			r.Error, r.Reason = "unreachable", err.Error()
			return errors.Join(x.local(503, r, true), errOver)
		}
		x.server, x.done = server, make(chan struct{})
		go x.responses()
		if status, r := x.judge(h); status != 0 { // that took its time: there may be another plan
			return x.refused(h, status, r)
		}
	}
	req := request{method: h.Method}
	if h.Upgrade && h.Framing == http1.NoBody {
		req.upgrade = make(chan bool, 1)
	}
	if !x.begin(req) {
		return errOver
	}
	if err := in.Forward(x.server, h); err != nil {
		var syntax *http1.SyntaxError
		if errors.As(err, &syntax) {
			// The server has half a message: it must not wait for the rest.
			x.malformed(err)
		}
		x.server.abort()
		return err
	}
	if req.upgrade != nil {
		return x.upgraded(in, req)
	}
	if h.Close {
		x.settle()
		return errOver
	}
	return nil
}

// refused answers a request that does not pass.
func (x *exchange) refused(h *http1.Head, status int, r refusal) error {
	closing := h.Close || h.Framing != http1.NoBody
	if err := x.local(status, r, closing); err != nil || closing {
		return errors.Join(err, errOver)
	}
	return nil
}

// upgraded waits for the server's decision: nothing that follows may be taken
// for HTTP or not before it is known.
func (x *exchange) upgraded(in *http1.Reader, req request) error {
	granted := false
	select {
	case granted = <-req.upgrade:
	case <-x.done:
		return errOver
	}
	if !granted {
		return nil
	}
	if _, err := in.R.WriteTo(x.server); err != nil {
		return err
	}
	x.server.CloseWrite()
	<-x.done
	return errOver
}

// begin notes a request under way. It fails when there are no more responses.
func (x *exchange) begin(r request) bool {
	x.mu.Lock()
	if x.over {
		x.mu.Unlock()
		return false
	}
	x.under++
	x.mu.Unlock()
	select {
	case x.waiting <- r:
		return true
	case <-x.done:
		return false
	}
}

// settle waits for the responses under way.
func (x *exchange) settle() {
	x.mu.Lock()
	defer x.mu.Unlock()
	for x.under > 0 && !x.over {
		x.settled.Wait()
	}
}

// local gives the proxy's own answer, after the responses before it.
func (x *exchange) local(status int, r refusal, closing bool) error {
	x.settle()
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
	in := http1.NewReader(x.server)
	var err error
	last := false
	for served := 0; ; served++ {
		_, end := in.R.Peek(1)
		if x.unasked() {
			last = !x.left.Load()
			break
		}
		if ended := end == io.EOF; served > 0 && (ended || errors.Is(end, syscall.ECONNRESET)) {
			// As without a proxy, a client that asked meanwhile sees the end of a
			// connection that has served, and may ask again on another.
			if last = ended; !ended {
				err = end
			}
			break
		}
		if last, err = x.response(in, <-x.waiting); err != nil || last {
			break
		}
		x.mu.Lock()
		x.under--
		x.settled.Broadcast()
		x.mu.Unlock()
	}
	x.mu.Lock()
	x.over = true
	x.settled.Broadcast()
	x.mu.Unlock()
	defer close(x.done)
	switch {
	case err != nil:
		x.client.abort() // in the middle of a response
		x.server.abort()
	case x.tunnel:
		x.client.CloseWrite() // the other direction ends by itself
	case last:
		// The client may not know yet; what it sends now goes nowhere.
		x.client.CloseWrite()
		time.AfterFunc(lingerTime, x.client.abort)
		x.server.finish()
	}
}

// unasked tells whether nothing is under way, and if so that nothing will be:
// what a server says then, its end or worse an answer, must not become the
// answer to the next request.
func (x *exchange) unasked() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.over = x.under == 0
	return x.over
}

// response copies one response. last means that there are no more.
func (x *exchange) response(in *http1.Reader, req request) (last bool, err error) {
	for {
		h, err := in.Response(req.method)
		if err != nil {
			// Nothing of this response has been sent: say so properly.
			return true, x.badGateway(err)
		}
		switch {
		case h.Status == 101 && req.upgrade == nil:
			return true, x.badGateway(errors.New("the server changes protocols unasked"))
		case h.Status == 101:
			if err := in.Forward(x.out, h); err != nil {
				return true, err
			}
			x.tunnel = true
			req.upgrade <- true
			_, err := in.R.WriteTo(&counter{x.entry, x.client, &x.entry.sent})
			return true, err
		case h.Status < 200:
			if err := in.Forward(x.out, h); err != nil {
				return true, err
			}
			continue
		}
		if err := in.Forward(x.out, h); err != nil {
			return true, err
		}
		if req.upgrade != nil {
			req.upgrade <- false
		}
		return h.Close, nil
	}
}

func (x *exchange) badGateway(cause error) error {
	if err := respond(x.out, 502, refusal{Error: "bad gateway", Reason: "the server's answer: " + cause.Error()}, true); err != nil {
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
	return n, err
}
