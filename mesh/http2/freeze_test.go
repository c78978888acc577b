package http2

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2/hpack"

	"hauberk.dev/mesh/h2frame"
	"hauberk.dev/mesh/wire"
)

// tape is a Transport whose peer is a test: it gives what was put on it, keeps
// what is written, and tells when the other end has read all and waits.
type tape struct {
	mu      sync.Mutex
	change  *sync.Cond
	in, out []byte
	over    bool // nothing more will be put
	waiting bool
	frozen  bool
	ended   bool // CloseWrite
	aborted bool
}

func newTape() *tape {
	p := &tape{}
	p.change = sync.NewCond(&p.mu)
	return p
}

func (p *tape) Read(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.in) == 0 || p.frozen {
		switch {
		case p.frozen:
			return 0, wire.ErrFrozen
		case p.aborted:
			return 0, io.ErrClosedPipe
		case p.over:
			return 0, io.EOF
		}
		p.waiting = true
		p.change.Broadcast()
		p.change.Wait()
	}
	n := copy(b, p.in)
	p.in = p.in[n:]
	return n, nil
}

func (p *tape) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.out = append(p.out, b...)
	p.change.Broadcast()
	return len(b), nil
}

// WriteNow takes half of what it is given, mostly.
func (p *tape) WriteNow(b []byte) int {
	if len(b)%3 > 0 {
		b = b[:len(b)/2]
	}
	n, _ := p.Write(b)
	return n
}

func (p *tape) set(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
	p.change.Broadcast()
}

func (p *tape) CloseWrite() error { p.set(func() { p.ended = true }); return nil }
func (p *tape) Abort()            { p.set(func() { p.aborted = true }) }
func (p *tape) Finish()           {}
func (p *tape) Freeze()           { p.set(func() { p.frozen = true }) }

// put gives the other end b and waits until it has read it.
func (p *tape) put(b []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.in = append(p.in, b...)
	p.waiting = false
	p.change.Broadcast()
	for !p.waiting && !p.aborted {
		p.change.Wait()
	}
}

// taped is a proxy of one client and one server, which can be moved.
type taped struct {
	t        *testing.T
	down, up *tape
	conns    []*Conn
	ran      sync.WaitGroup
	errs     []error
	faults   []string
}

func (w *taped) options(i int) Options {
	o := Options{Malformed: func(err error) { w.faults = append(w.faults, err.Error()) }}
	if i == 0 {
		o.Request = func(s *Stream, h *Head) {
			s.Value = h.Path
			if h.Path == "/own" {
				s.Answer([]Field{{Name: ":status", Value: "403"}, {Name: "odd", Value: "\xff\x80"}}, bytes.Repeat([]byte("own "), 20_000))
				return
			}
			if err := s.Forward(w.conns[1], h); err != nil {
				w.t.Error(err)
			}
		}
		o.Failed = func(s *Stream, err error) { w.t.Errorf("stream %d failed: %v", s.id, err) }
	}
	return o
}

func newTaped(t *testing.T) *taped {
	w := &taped{t: t, down: newTape(), up: newTape()}
	w.conns = []*Conn{Server(w.down, w.options(0)), Client(w.up, w.options(1))}
	w.run()
	return w
}

func (w *taped) run() {
	w.errs = make([]error, len(w.conns))
	for i, c := range w.conns {
		w.ran.Go(func() { w.errs[i] = c.Run() })
	}
}

// move freezes the proxy and goes on with another one made of its state.
func (w *taped) move() *State {
	w.t.Helper()
	for i, p := range []*tape{w.down, w.up} {
		w.conns[i].Freeze()
		p.Freeze()
	}
	w.ran.Wait()
	for i, err := range w.errs {
		if err != wire.ErrFrozen {
			w.t.Fatalf("connection %d ended: %v", i, err)
		}
	}
	held := []int64{w.conns[0].held, w.conns[1].held}
	s, err := Save(w.conns, func(s *Stream) (json.RawMessage, error) { return json.Marshal(s.Value) })
	if err != nil {
		w.t.Fatal(err)
	}
	s = throughJSON(w.t, s)
	conns, err := Resume(s, []Transport{w.down, w.up}, w.options, func(b json.RawMessage) (any, error) {
		var v string
		err := json.Unmarshal(b, &v)
		return v, err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	for i, c := range conns {
		if c.held != held[i] {
			w.t.Errorf("connection %d held %d bytes and holds %d", i, held[i], c.held)
		}
	}
	w.conns = conns
	for _, p := range []*tape{w.down, w.up} {
		p.set(func() { p.frozen = false })
	}
	w.run()
	return s
}

func throughJSON(t testing.TB, s *State) *State {
	t.Helper()
	b, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	again := &State{}
	if err := json.Unmarshal(b, again); err != nil {
		t.Fatal(err)
	}
	return again
}

// end lets both peers close.
func (w *taped) end() {
	w.down.set(func() { w.down.over = true })
	w.up.set(func() { w.up.over = true })
	w.ran.Wait()
}

// told is what was written, as its reader understands it: by stream, without
// what depends on time.
func told(t *testing.T, out []byte, preface int) string {
	t.Helper()
	out = out[preface:]
	dec := hpack.NewDecoder(h2frame.TableSize, nil)
	streams := map[uint32]string{}
	data := map[uint32]int{}
	for len(out) > 0 {
		f := h2frame.Parse(out)
		p := out[h2frame.HeaderLen : h2frame.HeaderLen+f.Length]
		out = out[h2frame.HeaderLen+f.Length:]
		id := f.Stream
		flush := func() {
			if data[id] > 0 {
				streams[id] += fmt.Sprintf(" data %d", data[id])
				data[id] = 0
			}
		}
		switch f.Kind {
		case h2frame.Data:
			for i, b := range p { // the tests send what counts up
				if b != byte(data[id]+i) && !bytes.Contains([]byte("own "), []byte{b}) {
					t.Fatalf("stream %d: byte %d is %d", id, data[id]+i, b)
				}
			}
			data[id] += f.Length
		case h2frame.Headers:
			flush()
			block := slices.Clone(p)
			for last := f; !last.Has(h2frame.FlagEndHeaders); {
				last = h2frame.Parse(out)
				block = append(block, out[h2frame.HeaderLen:h2frame.HeaderLen+last.Length]...)
				out = out[h2frame.HeaderLen+last.Length:]
			}
			fields, err := dec.DecodeFull(block)
			if err != nil {
				t.Fatalf("stream %d: a block that cannot be read: %v", id, err)
			}
			for _, h := range fields {
				streams[id] += fmt.Sprintf(" %q=%q", h.Name, h.Value)
			}
		case h2frame.Reset:
			flush()
			streams[id] += fmt.Sprintf(" reset % x", p)
		case h2frame.GoAway:
			streams[0] += fmt.Sprintf(" goaway % x", p)
		case h2frame.Ping:
			streams[0] += fmt.Sprintf(" ping % x", p)
		}
		if (f.Kind == h2frame.Headers || f.Kind == h2frame.Data) && f.Has(h2frame.FlagEndStream) {
			flush()
			streams[id] += " end"
		}
	}
	var b strings.Builder
	for id := uint32(0); id < 100; id++ {
		if s := streams[id]; s != "" {
			fmt.Fprintf(&b, "%d:%s\n", id, s)
		}
	}
	return b.String()
}

// script makes what a peer sends.
type script struct {
	bytes.Buffer
	block blockWriter
	enc   *hpack.Encoder
}

func newScript(client bool) *script {
	s := &script{}
	s.enc = hpack.NewEncoder(&s.block)
	if client {
		s.WriteString(h2frame.Preface)
	}
	return s
}

func (s *script) frame(kind, flags byte, stream uint32, p []byte) {
	s.Write(h2frame.Append(nil, kind, flags, stream, p))
}

// head sends fields in frames of so many bytes.
func (s *script) head(stream uint32, end bool, frame int, fields ...string) {
	s.block = s.block[:0]
	for i := 0; i < len(fields); i += 2 {
		s.enc.WriteField(Field{Name: fields[i], Value: fields[i+1], Sensitive: fields[i] == "secret"})
	}
	kind, flags := byte(h2frame.Headers), byte(0)
	if end {
		flags = h2frame.FlagEndStream
	}
	for b := []byte(s.block); ; {
		n := min(frame, len(b))
		if n == len(b) {
			flags |= h2frame.FlagEndHeaders
		}
		s.frame(kind, flags, stream, b[:n])
		if b = b[n:]; len(b) == 0 {
			return
		}
		kind, flags = h2frame.Continuation, 0
	}
}

func (s *script) data(stream uint32, end bool, from, n, pad int) {
	p := make([]byte, n, n+pad+1)
	for i := range p {
		p[i] = byte(from + i)
	}
	var flags byte
	if end {
		flags = h2frame.FlagEndStream
	}
	if pad > 0 {
		flags |= h2frame.FlagPadded
		p = append(slices.Insert(p, 0, byte(pad)), make([]byte, pad)...)
	}
	s.frame(h2frame.Data, flags, stream, p)
}

// piece is what one peer sends next.
type piece struct {
	up    bool
	b     []byte
	after uint32 // once the server has been asked for this stream
}

// scripts are a client and a server whose streams use all there is.
func scripts() []piece {
	c := newScript(true)
	c.frame(h2frame.Settings, 0, 0, h2frame.AppendSetting(nil, h2frame.SettingWindow, 40))
	c.head(1, false, 20, ":method", "POST", ":scheme", "http", ":path", "/a", ":authority", "a", "x-a", "one", "obs", "\xfe\xff", "secret", "s")
	c.data(1, false, 0, 30, 7)
	c.enc.SetMaxDynamicTableSize(100) // and the table is cut
	c.head(3, true, 1000, ":method", "GET", ":scheme", "http", ":path", "/b", ":authority", "a", "x-a", "one", "y", "two")
	c.frame(h2frame.Ping, 0, 0, []byte("12345678"))
	c.head(5, false, 1000, ":method", "POST", ":scheme", "http", ":path", "/own", ":authority", "a")
	c.data(1, false, 30, 10, 0)
	c.data(5, true, 0, 10, 3)
	c.head(1, true, 4, "tail", "t", "tail2", "t2")
	c.head(7, false, 1000, ":method", "POST", ":scheme", "http", ":path", "/c", ":authority", "a", "content-length", "5")
	c.data(7, true, 0, 6, 2) // malformed
	c.head(9, false, 1000, ":method", "POST", ":scheme", "http", ":path", "/d", ":authority", "a")
	c.data(9, false, 0, 0, 0)
	c.data(9, true, 0, 9, 0)
	c.Write(h2frame.AppendWord(nil, h2frame.Window, 3, 1000))
	c.Write(h2frame.AppendWord(nil, h2frame.Window, 5, 100_000))
	c.Write(h2frame.AppendWord(nil, h2frame.Window, 0, 100_000))
	c.frame(200, 0, 0, []byte("unknown"))

	s := newScript(false)
	s.frame(h2frame.Settings, 0, 0, append(h2frame.AppendSetting(nil, h2frame.SettingMaxStreams, 2), h2frame.AppendSetting(h2frame.AppendSetting(nil, h2frame.SettingWindow, 35), h2frame.SettingTableSize, 50)...))
	settings := bytes.Clone(s.Bytes())
	s.Reset()
	s.head(1, false, 1000, ":status", "103", "early", "hint")
	s.head(3, false, 7, ":status", "200", "y", "z", "trailer", "sum")
	s.data(3, false, 0, 100, 0)
	s.Write(h2frame.AppendWord(nil, h2frame.Window, 1, 1000))
	s.data(3, false, 100, 1, 200)
	s.head(3, true, 1, "sum", "4\xff")
	s.head(1, false, 1000, ":status", "200", "y", "z")
	s.data(1, true, 0, 10, 0)
	rest := bytes.Clone(s.Bytes())
	s.Reset()
	s.head(5, true, 1000, ":status", "204")
	s.frame(h2frame.Ping, 0, 0, []byte("abcdefgh"))
	return []piece{{true, settings, 0}, {false, c.Bytes(), 0}, {true, rest, 3}, {true, s.Bytes(), 5}}
}

// play has the peers say all, with a move before each byte that at picks, and
// returns what they are told.
func play(t *testing.T, at func(n int) bool, moved func(*State)) string {
	t.Helper()
	w := newTaped(t)
	n := 0
	for _, p := range scripts() {
		to := w.down
		if p.up {
			to = w.up
		}
		w.poll("a request", func() bool {
			c := w.conns[1]
			c.mu.Lock()
			defer c.mu.Unlock()
			return c.nextID > p.after
		})
		from := 0
		for i := range p.b {
			if at(n) {
				to.put(p.b[from:i])
				from = i
				moved(w.move())
			}
			n++
		}
		to.put(p.b[from:])
	}
	if at(n) {
		moved(w.move())
	}
	w.settle()
	w.end()
	return told(t, w.down.out, 0) + told(t, w.up.out, len(h2frame.Preface)) + strings.Join(w.faults, "\n")
}

// settle waits until all streams have ended and all is written.
func (w *taped) settle() {
	w.t.Helper()
	w.poll("the end of all streams", func() bool {
		left := 0
		for _, c := range w.conns {
			c.mu.Lock()
			left += len(c.streams) + len(c.out)
			c.mu.Unlock()
		}
		return left == 0
	})
}

func (w *taped) poll(what string, is func() bool) {
	w.t.Helper()
	for end := time.Now().Add(time.Minute); !is(); time.Sleep(20 * time.Microsecond) {
		if time.Now().After(end) {
			w.t.Fatalf("waited too long for %s", what)
		}
	}
}

// TestMovedAtEveryByte moves a proxy between any two bytes that its peers send,
// again and again and once: what they are told is the same.
func TestMovedAtEveryByte(t *testing.T) {
	total := 0
	want := play(t, func(n int) bool { total = n; return false }, nil)
	t.Logf("%d bytes say\n%s", total, want)
	seen := map[string]int{}
	look := func(s *State) {
		for i := range s.Conns {
			c := &s.Conns[i]
			for name, is := range map[string]bool{
				"data under way": c.Part != nil && c.Part.Data >= 0, "padding under way": c.Part != nil && c.Part.Data < 0 && c.Part.Skip > 0,
				"block under way": c.Part != nil && c.Part.Frames > 0, "read ahead": len(c.Unread) > 0,
				"waiting": len(c.Waiting) > 0, "table": len(c.Table) > 0, "small table": c.TableMax == 100 && i == 0, "small encoder": c.Encoder == 50,
				"not greeted": c.Begun == 0, "ended": len(c.Ended) > 0,
			} {
				if is {
					seen[name]++
				}
			}
		}
		for i := range s.Streams {
			t := &s.Streams[i]
			for name, is := range map[string]bool{"data held": len(t.Data) > 0, "trailers held": t.Trailers != nil, "head held": len(t.Heads) > 0, "over": t.Over, "value": t.Value != nil} {
				if is {
					seen[name]++
				}
			}
		}
	}
	for at := 0; at <= total+1; at += 3 {
		if got := play(t, func(n int) bool { return n == at }, look); got != want {
			t.Fatalf("moved at byte %d, they are told\n%s", at, got)
		}
	}
	for _, step := range []int{1, 7, 30} {
		if got := play(t, func(n int) bool { return n%step == 0 }, look); got != want {
			t.Fatalf("moved at each byte of %d, they are told\n%s", step, got)
		}
	}
	for _, name := range []string{"data under way", "padding under way", "block under way", "read ahead", "waiting", "table", "small table", "small encoder",
		"not greeted", "ended", "data held", "trailers held", "head held", "value"} {
		if seen[name] == 0 {
			t.Errorf("never moved with: %s", name)
		}
	}
	t.Log(seen)
}

// freeze stops both connections and returns what their Runs did.
func (w *taped) freeze() []error {
	for i, p := range []*tape{w.down, w.up} {
		w.conns[i].Freeze()
		p.Freeze()
	}
	w.ran.Wait()
	return w.errs
}

// again resumes connections of which there is a transport for each.
func again(t *testing.T, conns []*Conn, below ...*tape) []*Conn {
	t.Helper()
	s, err := Save(conns, func(*Stream) (json.RawMessage, error) { return nil, nil })
	if err != nil {
		t.Fatal(err)
	}
	transports := make([]Transport, len(below))
	for i, p := range below {
		p.set(func() { p.frozen = false })
		transports[i] = p
	}
	conns, err = Resume(throughJSON(t, s), transports, func(int) Options { return Options{} }, nil)
	if err != nil {
		t.Fatal(err)
	}
	return conns
}

// TestMovedWhileEnding: a connection that has ended in good order, or told its
// peer of a fault, goes on ending.
func TestMovedWhileEnding(t *testing.T) {
	for name, c := range map[string]struct {
		end  func(*taped)
		want error
		told string
	}{
		"drained": {func(w *taped) { w.conns[0].Drain() }, errDrained, "0: goaway 00 00 00 00 00 00 00 00\n"},
		"fault":   {func(w *taped) { w.down.put(h2frame.Append(nil, h2frame.Continuation, 0, 1, nil)) }, &h2frame.Error{Code: h2frame.CodeProtocol, Why: "CONTINUATION without HEADERS"}, "0: goaway 00 00 00 00 00 00 00 01\n"},
	} {
		w := newTaped(t)
		w.down.put(append([]byte(h2frame.Preface), h2frame.Append(nil, h2frame.Settings, 0, 0, nil)...))
		c.end(w)
		<-w.conns[0].Done()
		if errs := w.freeze(); errs[0] != wire.ErrFrozen || errs[1] != wire.ErrFrozen {
			t.Fatalf("%s: %v", name, errs)
		}
		conns := again(t, w.conns[:1], w.down)
		if err := conns[0].Err(); fmt.Sprint(err) != fmt.Sprint(c.want) {
			t.Errorf("%s: resumed it ends with %v", name, err)
		}
		w.down.set(func() { w.down.over = true })
		err := conns[0].Run()
		if name == "drained" && err != nil || name == "fault" && fmt.Sprint(err) != c.want.Error() {
			t.Errorf("%s: Run returns %v", name, err)
		}
		if got := told(t, w.down.out, 0); got != c.told || !w.down.ended {
			t.Errorf("%s: the peer is told %q, ended %v", name, got, w.down.ended)
		}
	}
}

// TestClosedWhileFrozen ends a connection when it is resumed.
func TestClosedWhileFrozen(t *testing.T) {
	w := newTaped(t)
	w.freeze()
	w.conns[0].Close()
	conns := again(t, w.conns, w.down, w.up)
	if err := conns[0].Run(); err != ErrClosed || !w.down.aborted {
		t.Errorf("%v, aborted %v", err, w.down.aborted)
	}
	conns[1].Close()
	if err := conns[1].Run(); err != ErrClosed {
		t.Error(err)
	}
}

// TestFrozenBeforeRun: what never ran says its greeting when it does, and once.
func TestFrozenBeforeRun(t *testing.T) {
	p := newTape()
	c := Client(p, Options{})
	for range 3 {
		c.Freeze()
		if err := c.Run(); err != wire.ErrFrozen {
			t.Fatal(err)
		}
		c = again(t, []*Conn{c}, p)[0]
	}
	p.set(func() { p.over = true })
	if err := c.Run(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(p.out, c.hello()) {
		t.Errorf("% x", p.out)
	}
}

// TestNotSaved: what has ended for good, still runs or has a part elsewhere is
// not saved.
func TestNotSaved(t *testing.T) {
	p := newTape()
	c := Server(p, Options{})
	if _, err := Save([]*Conn{c}, nil); err == nil {
		t.Error("saved without being frozen")
	}
	c.Close()
	c.Freeze()
	if _, err := Save([]*Conn{c}, nil); err == nil {
		t.Error("saved after its end")
	}
	w := newTaped(t)
	w.down.put(append([]byte(h2frame.Preface), h2frame.Append(nil, h2frame.Settings, 0, 0, nil)...))
	head := newScript(false)
	head.head(1, false, 1000, ":method", "POST", ":scheme", "http", ":path", "/a", ":authority", "a")
	w.down.put(head.Bytes())
	w.freeze()
	if _, err := Save(w.conns[:1], func(*Stream) (json.RawMessage, error) { return nil, nil }); err == nil {
		t.Error("saved without the mates")
	}
	if _, err := Save(w.conns, nil); err == nil {
		t.Error("saved without the values")
	}
	c = Client(newTape(), Options{})
	if _, err := c.Ask([]Field{{Name: ":method", Value: "GET"}}, true, nowhere{}); err != nil {
		t.Fatal(err)
	}
	c.Freeze()
	if _, err := Save([]*Conn{c}, nil); err == nil {
		t.Error("saved without who reads the answer")
	}
}

// nowhere is a Sink that nothing comes to.
type nowhere struct{ Sink }

// TestSlowAfterMove gives up a peer that does not end a frame it has begun.
func TestSlowAfterMove(t *testing.T) {
	w := newTaped(t)
	w.down.put(append([]byte(h2frame.Preface), h2frame.Append(nil, h2frame.Settings, 0, 0, nil)...))
	head := newScript(false)
	head.head(1, false, 1000, ":method", "POST", ":scheme", "http", ":path", "/a", ":authority", "a")
	head.data(1, true, 0, 100, 0)
	w.down.put(head.Bytes()[:head.Len()-1])
	w.freeze()
	conns := again(t, w.conns, w.down, w.up)
	conns[0].pulse = time.Millisecond
	if err := conns[0].Run(); err != errSlow {
		t.Error(err)
	}
}

// FuzzResume takes states in which two things are other than they were. They are
// refused, or go on without a panic and end.
func FuzzResume(f *testing.F) {
	var states [][]byte
	keep := func(s *State) {
		b, err := json.Marshal(s)
		if err != nil {
			f.Fatal(err)
		}
		states = append(states, b)
	}
	for at := 150; at < 1004; at += 50 {
		play(&testing.T{}, func(n int) bool { return n == at }, keep)
	}
	for i := range states {
		f.Add(uint8(i), uint16(0), int64(1), uint16(40*i), int64(i), []byte("\x00\x00\x04\x00\x01\x00\x00\x00\x01abcd"))
	}
	f.Fuzz(func(t *testing.T, which uint8, at uint16, v int64, at2 uint16, v2 int64, in []byte) {
		if len(in) > 1<<12 {
			return
		}
		var tree any
		if err := json.Unmarshal(states[int(which)%len(states)], &tree); err != nil {
			t.Fatal(err)
		}
		for at, v := range map[uint16]int64{at: v, at2: v2} {
			n := int(at)
			tree = changed(tree, &n, v)
		}
		b, err := json.Marshal(tree)
		if err != nil {
			t.Fatal(err)
		}
		s := &State{}
		if json.Unmarshal(b, s) == nil {
			resumeAny(t, s, in)
		}
	})
}

// changed is v with another n-th number, truth, text or length of a list.
func changed(v any, n *int, to int64) any {
	hit := *n == 0
	*n--
	switch x := v.(type) {
	case map[string]any:
		*n++
		for _, k := range slices.Sorted(maps.Keys(x)) {
			x[k] = changed(x[k], n, to)
		}
	case []any:
		if hit && len(x) > 0 {
			if at := int(uint64(to) % uint64(len(x))); to%2 == 0 {
				return slices.Delete(x, at, at+1)
			} else {
				return append(x, x[at])
			}
		}
		for i := range x {
			x[i] = changed(x[i], n, to)
		}
	case float64:
		if hit {
			return to
		}
	case bool:
		return x != hit
	case string:
		if hit {
			return x[:len(x)/8*4]
		}
	}
	return v
}

// resumeAny runs a state, if it can be, with peers that say in and close.
func resumeAny(t *testing.T, s *State, in []byte) {
	transports := make([]Transport, len(s.Conns))
	for i := range transports {
		transports[i] = &canned{Reader: bytes.NewReader(in)}
	}
	var conns []*Conn
	request := func(s *Stream, h *Head) {
		if to := conns[len(conns)-1]; to == s.c || !to.client || s.Forward(to, h) != nil {
			s.Reset(h2frame.CodeRefused)
		}
	}
	failed := func(s *Stream, err error) { s.Answer([]Field{{Name: ":status", Value: "502"}}, []byte("gone")) }
	conns, err := Resume(s, transports, func(int) Options { return Options{Request: request, Failed: failed} },
		func(json.RawMessage) (any, error) { return nil, nil })
	if err != nil {
		return
	}
	for _, c := range conns {
		c.Run()
		c.Close()
	}
	for _, c := range conns {
		if len(c.streams) > 0 || c.ready.first != nil || c.waiting.first != nil || c.blocked.first != nil {
			t.Error("streams are left over")
		}
	}
}
