package mesh

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// maxTurns is how many bytes of refusals may wait for the answers before them.
const maxTurns = 256 << 10

// effect is what a request that passes does to the order of what its server says.
type effect int

const (
	effectAnswer    effect = iota // one answer
	effectOpens                   // one answer; requests after it are carried out together, or not at all
	effectCloses                  // one answer; they no longer are
	effectDisorders               // from now on the order cannot be known
)

// orderedCodec reads requests of a protocol without ids: answers come in the order
// of the requests. Frames of a request may follow the one that is judged (rpcMore).
type orderedCodec interface {
	rpcCodec
	// skip is begin of a frame that does not pass.
	skip()
	// passes tells whether the request did of which the frame is a part.
	passes() bool
	// does tells what the request does that inspect has read.
	does() effect
	// answers reads what the server says.
	answers() answerCodec
}

// answerCodec reads answers, in one frame each or in many.
type answerCodec interface {
	rpcCodec
	// within tells whether frames of an answer are to come, asked whether a request
	// waits for the one that has begun last.
	within() bool
	asked() bool
}

// answersOnly is what is never asked of an answerCodec.
type answersOnly struct{}

func (answersOnly) inspect([]byte, int) (rpcKind, bool, error) { return rpcOther, false, nil }
func (answersOnly) asks([]byte) bool                           { return false }
func (answersOnly) target() (remote, error)                    { return remote{}, errors.New("an answer has no target") }
func (answersOnly) refuse(dst []byte, _ fault, _ string) []byte {
	return dst
}
func (answersOnly) alive(dst []byte) []byte { return dst }

// turn is a refusal that waits for the answers before it.
type turn struct {
	After int    `json:"after,omitempty"` // so many, since the turn before
	Text  []byte `json:"text"`            // none if nothing is said
	// Last ends the connection: what comes after it could not be told apart, or
	// would carry out a part of what belongs together.
	Last bool `json:"last,omitempty"`
}

// orderState is an order as plain data.
type orderState struct {
	Owed     int    `json:"owed,omitempty"` // answers, since the last turn
	Turns    []turn `json:"turns,omitempty"`
	Disorder bool   `json:"disorder,omitempty"`
	Group    bool   `json:"group,omitempty"`   // between effectOpens and effectCloses
	Closing  bool   `json:"closing,omitempty"` // the last refusal waits, or was told
	Said     bool   `json:"said,omitempty"`    // the last
}

func (s *orderState) check() error {
	if s == nil {
		return nil
	}
	n := 0
	for _, t := range s.Turns {
		if n += len(t.Text); t.After < 0 || n > 2*maxTurns {
			return fmt.Errorf("a refusal of %d bytes after %d answers, %d bytes wait", len(t.Text), t.After, n)
		}
	}
	if s.Owed < 0 {
		return fmt.Errorf("%d answers are owed", s.Owed)
	}
	return nil
}

// order puts refusals in their place among the answers of a server that come in
// the order of the requests.
type order struct {
	codec    orderedCodec
	farewell *time.Timer

	mu    sync.Mutex
	bytes int // of the turns
	orderState
}

func (o *order) resume(s *orderState) {
	if s == nil {
		return
	}
	o.orderState = *s
	for _, t := range o.Turns {
		o.bytes += len(t.Text)
	}
}

// hold takes the lock for responses that stopped in the middle of an answer, before
// a refusal can.
func (o *order) hold(x *rpcExchange) {
	answers := o.codec.answers()
	answers.resume(x.replying.Sum)
	if x.replying.Left > 0 || answers.within() {
		x.mu.Lock()
	}
}

// state is where the order stands. Nobody else uses it now.
func (o *order) state() *orderState {
	if o == nil {
		return nil
	}
	if o.farewell != nil {
		o.farewell.Stop()
	}
	s := o.orderState
	return &s
}

// passed counts a request that passes, before it does.
func (o *order) passed() {
	e := o.codec.does()
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.Disorder = o.Disorder || e == effectDisorders; !o.Disorder {
		o.Owed++
	}
	o.Group = e == effectOpens || o.Group && e != effectCloses
}

// refused has a refusal wait for its turn. Where the order is not known it would be
// read as the answer of another request, one that was carried out: nothing is said,
// and the connection ends.
func (o *order) refused(b []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	t := turn{After: o.Owed}
	if !o.Disorder {
		t.Text = bytes.Clone(b)
	}
	o.Owed = 0
	o.bytes += len(t.Text)
	t.Last = o.Disorder || o.Group || o.bytes > maxTurns
	o.Closing = t.Last
	o.Turns = append(o.Turns, t)
}

// answered counts an answer that a request waits for.
func (o *order) answered() {
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case len(o.Turns) > 0 && o.Turns[0].After > 0:
		o.Turns[0].After--
	case len(o.Turns) == 0 && o.Owed > 0:
		o.Owed--
	default: // a server that speaks unasked
		o.Disorder = true
	}
}

func (o *order) ready() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.Turns) > 0 && o.Turns[0].After == 0 && !o.Said
}

// take takes the refusal whose turn it is.
func (o *order) take() (t turn, ok bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.Turns) == 0 || o.Turns[0].After > 0 || o.Said {
		return t, false
	}
	t, o.Turns = o.Turns[0], o.Turns[1:]
	if len(o.Turns) == 0 {
		o.Turns = nil
	}
	o.bytes -= len(t.Text)
	o.Said = t.Last
	return t, true
}

func (o *order) said() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.Said
}

// settle tells the client what is due, or leaves that to who is telling it
// something now. It does not wait for that: a client may send all it has before it
// reads.
func (x *rpcExchange) settle() error {
	for x.order.ready() {
		if !x.mu.TryLock() {
			return nil
		}
		err := x.turns()
		x.mu.Unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

// turns tells the client what is due, between two answers, with the lock held.
func (x *rpcExchange) turns() error {
	for {
		t, ok := x.order.take()
		if !ok {
			return nil
		}
		if x.silent { // the client has been told that there is no more
			continue
		}
		if len(t.Text) > 0 {
			if _, err := x.client.Write(t.Text); err != nil {
				return err
			}
		}
		if t.Last {
			x.endAfter()
		}
	}
}

// endAfter ends the connection after the last refusal, and gives the client time
// to read it.
func (x *rpcExchange) endAfter() {
	x.client.CloseWrite()
	x.order.farewell = time.AfterFunc(lingerTime, x.client.abort)
}

// copyInOrder is copy with refusals between the answers.
func (x *rpcExchange) copyInOrder(in *frames, answers answerCodec, out io.Writer) error {
	held := in.left > 0 || answers.within() // the lock, since resume, in the middle of an answer
	defer func() {
		if held {
			x.mu.Unlock()
		}
	}()
	in.blind = true
	for {
		if !held {
			if err := x.settle(); err != nil {
				return err
			}
		}
		if err := in.fill(); err != nil {
			if err == io.EOF && answers.within() && !x.order.said() {
				return io.ErrUnexpectedEOF
			}
			return err
		}
		if !held {
			x.mu.Lock()
			held = true
		}
		if err := x.between(in, answers, out); err != nil {
			return err
		}
		if in.left == 0 && !answers.within() {
			x.mu.Unlock()
			held = false
		}
	}
}

// between passes what is there of answers, and refusals in their turn.
func (x *rpcExchange) between(in *frames, answers answerCodec, out io.Writer) error {
	for {
		under := in.left > 0
		_, size, err := in.next(false)
		if under && in.left == 0 {
			if err := x.frameEnds(in, answers, out); err != nil {
				return err
			}
		}
		if err == nil && size > 0 {
			if err = in.pass(size); err == nil && in.left == 0 {
				err = x.frameEnds(in, answers, out)
			}
		}
		if size == 0 || err != nil {
			return errors.Join(x.told(in, out), x.unclear(err))
		}
	}
}

// frameEnds counts an answer that is complete, and tells the client what is due
// after it.
func (x *rpcExchange) frameEnds(in *frames, answers answerCodec, out io.Writer) error {
	if answers.within() {
		return nil
	}
	if answers.asked() {
		x.order.answered()
	}
	if !x.order.ready() {
		return nil
	}
	if err := x.told(in, out); err != nil {
		return err
	}
	return x.turns()
}

// told sends what has passed; after the last refusal it goes nowhere.
func (x *rpcExchange) told(in *frames, out io.Writer) error {
	b := in.passed()
	if len(b) == 0 || x.order.said() {
		return nil
	}
	_, err := out.Write(b)
	return err
}

// unclear tells of an answer that cannot be read.
func (x *rpcExchange) unclear(err error) error {
	if err == nil {
		return nil
	}
	var cut *frameError
	if errors.As(err, &cut) {
		err = fmt.Errorf("the server's answer: %w", err)
		x.malformed(err)
	}
	return err
}
