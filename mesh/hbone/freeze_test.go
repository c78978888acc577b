package hbone

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2/hpack"

	"hauberk.dev/mesh/h2frame"
	"hauberk.dev/mesh/wire"
)

// side is one end of a connection whose process is replaced again and again.
// What its streams do (task) is plain data too: it stops at reads and at its own
// frozen, and goes on in the next process.
type side struct {
	t      *testing.T
	client bool
	random *rand.Rand // of whoever moves
	frozen atomic.Bool
	moves  int
	thaws  int
	read   atomic.Int64 // bytes of the connection
	met    map[string]int
	late   map[uint32]bool // streams of the last state that were ending

	mu    sync.Mutex
	conn  *Conn
	wire  *wire.Conn
	tasks map[uint32]*task
	begun sync.WaitGroup // goroutines of tasks the side started itself
	live  atomic.Int32   // tasks that are not over
}

// task is one stream's part at one side.
type task struct {
	spec
	id        uint32
	stream    *Stream
	opened    bool
	sent, got int
	sentAll   bool // and our half closed
	gotAll    bool // and the peer's end seen
	over      bool
	pace      *rand.Rand
}

// spec is what a stream does, written in its authority.
type spec struct {
	Kind     string // both, refuse, reset
	Up, Down int    // bytes
	Seed     uint64
}

// pattern is byte i of a stream of bytes.
func pattern(seed uint64, i int) byte { return byte(uint64(i)*(seed|1)>>3) ^ byte(i>>8) ^ byte(seed) }

func fill(b []byte, seed uint64, at int) {
	for i := range b {
		b[i] = pattern(seed, at+i)
	}
}

func (e *side) sends(t *task) (seed uint64, n int) {
	if e.client {
		return t.Seed, t.Up
	}
	return t.Seed + 1, t.Down
}

func (e *side) receives(t *task) (seed uint64, n int) {
	if e.client {
		return t.Seed + 1, t.Down
	}
	return t.Seed, t.Up
}

// send is half of an engine: what it would read from elsewhere stops too.
func (e *side) send(t *task) error {
	seed, all := e.sends(t)
	b := make([]byte, Headroom+40<<10)
	for t.sent < all {
		if e.frozen.Load() {
			return wire.ErrFrozen
		}
		n := min(1+t.pace.IntN(40<<10), all-t.sent)
		fill(b[Headroom:Headroom+n], seed, t.sent)
		k, err := t.stream.WriteFramed(b[:Headroom+n])
		if err == nil && k != n {
			err = fmt.Errorf("wrote %d of %d", k, n)
		}
		t.sent += k
		if err != nil {
			return err
		}
	}
	t.sentAll = true
	return t.stream.CloseWrite()
}

// checker takes what is received.
type checker struct {
	e *side
	t *task
}

func (c checker) Write(p []byte) (int, error) {
	seed, all := c.e.receives(c.t)
	for i, have := range p {
		if want := pattern(seed, c.t.got+i); have != want {
			return 0, fmt.Errorf("byte %d of %d is %d, want %d", c.t.got+i, all, have, want)
		}
	}
	c.t.got += len(p)
	if len(p) > 8<<10 && p[0]%16 == 0 {
		time.Sleep(50 * time.Microsecond) // a guest that is slow now and then
	}
	return len(p), nil
}

func (e *side) receive(t *task, wholesale bool) error {
	var err error
	if wholesale {
		_, err = t.stream.WriteTo(checker{e, t})
	} else {
		_, err = io.Copy(checker{e, t}, struct{ io.Reader }{t.stream})
	}
	if err != nil {
		return err
	}
	t.gotAll = true
	if _, all := e.receives(t); t.got != all {
		return fmt.Errorf("the end after %d of %d bytes", t.got, all)
	}
	return nil
}

// run does what is left of a task. It reports what should not be.
func (e *side) run(t *task) {
	switch {
	case t.Kind == "refuse" && !e.client:
		t.over = true
		t.stream.Refuse(418, "no")
		return
	case t.Kind == "reset" && !e.client:
		if !t.stream.Answered() {
			t.stream.Accept()
		}
		t.over = true
		t.stream.Reset(h2frame.CodeConnect)
		return
	case !e.client && !t.stream.Answered():
		t.stream.Accept()
	}
	var wg sync.WaitGroup
	var errs [2]error
	wholesale := t.pace.IntN(2) == 0
	if !t.sentAll {
		wg.Go(func() { errs[0] = e.send(t) })
	}
	if !t.gotAll {
		errs[1] = e.receive(t, wholesale)
	}
	wg.Wait()
	for _, err := range errs {
		switch {
		case err == nil || errors.Is(err, wire.ErrFrozen):
		case t.Kind == "reset":
			t.over = true
		default:
			e.t.Errorf("client %v, stream %d %+v: %v", e.client, t.id, t.spec, err)
			t.over = true
		}
	}
	if t.sentAll && t.gotAll {
		t.over = true
	}
	if t.over {
		t.stream.Reset(h2frame.CodeNone)
	}
}

// serve is the handler of a server.
func (e *side) serve(s *Stream) {
	t := &task{id: s.ID(), stream: s, opened: true, pace: rand.New(rand.NewPCG(uint64(s.ID()), 1))}
	if err := json.Unmarshal([]byte(s.Authority), &t.spec); err != nil {
		e.t.Errorf("authority %q: %v", s.Authority, err)
	}
	if s.Field("forwarded") != "for=me" {
		e.t.Errorf("fields %v", s.Fields)
	}
	e.mu.Lock()
	e.tasks[t.id] = t
	e.mu.Unlock()
	e.live.Add(1)
	e.attend(t)
}

// attend does what is left of a server's task.
func (e *side) attend(t *task) {
	if e.run(t); t.over {
		e.live.Add(-1)
	}
}

// launch starts a client's task.
func (e *side) launch(sp spec) {
	t := &task{spec: sp, pace: rand.New(rand.NewPCG(sp.Seed, 2))}
	e.live.Add(1)
	e.begun.Add(1)
	go e.visit(t)
}

// visit does what is left of a client's task, opening the stream first.
func (e *side) visit(t *task) {
	defer e.begun.Done()
	if !t.opened && !e.open(t) {
		return
	}
	e.run(t)
	if t.over {
		e.live.Add(-1)
	}
}

func (e *side) open(t *task) bool {
	var err error
	for t.stream == nil {
		authority, _ := json.Marshal(t.spec)
		e.mu.Lock()
		conn := e.conn
		e.mu.Unlock()
		s, oerr := conn.Open(context.Background(), string(authority), hpack.HeaderField{Name: "forwarded", Value: "for=me"})
		err = oerr
		if s != nil {
			t.stream, t.id = s, s.ID()
		}
		var status *StatusError
		if errors.Is(err, wire.ErrFrozen) || s != nil || errors.As(err, &status) || t.Kind == "reset" && !errors.Is(err, ErrBusy) {
			break
		}
		if !errors.Is(err, ErrBusy) {
			e.t.Errorf("open %+v: %v", t.spec, err)
			break
		}
		time.Sleep(time.Millisecond)
	}
	return e.answer(t, err)
}

// answer takes the answer to an Open. It tells whether the stream is open.
func (e *side) answer(t *task, err error) bool {
	var status *StatusError
	switch {
	case errors.Is(err, wire.ErrFrozen):
		e.mu.Lock()
		e.tasks[seat(t)] = t
		e.mu.Unlock()
		return false
	case err == nil && t.Kind != "refuse":
		t.opened = true
		e.mu.Lock()
		e.tasks[t.id] = t
		e.mu.Unlock()
		return true
	case errors.As(err, &status) && t.Kind == "refuse" && status.Status == 418 && status.Reason == "no":
	case err != nil && t.Kind == "reset":
	default:
		e.t.Errorf("open %+v: %v", t.spec, err)
	}
	t.over = true
	e.live.Add(-1)
	return false
}

// seat is where a task is kept that may have no stream yet.
func seat(t *task) uint32 {
	if t.stream == nil {
		return uint32(t.Seed)<<1 | 1<<31 // no stream's id
	}
	return t.id
}

// freeze stops the side and everything on it.
func (e *side) freeze() {
	e.conn.Freeze()
	e.frozen.Store(true)
	e.begun.Wait()
	<-e.conn.Stopped()
}

// move replaces the process: all there is goes through JSON and a copy of the
// descriptor. Now and then the side only goes on after all.
func (e *side) move() {
	e.t.Helper()
	e.freeze()
	e.moves++
	if e.random.IntN(4) == 0 {
		e.thaws++
		tasks := e.stopped()
		e.frozen.Store(false)
		e.wire.Thaw()
		e.conn.Thaw()
		go e.conn.Run()
		e.goOn(tasks, nil)
		return
	}
	st := e.conn.State()
	if st == nil {
		e.t.Fatalf("the connection has ended: %v", e.conn.Err())
	}
	if again := e.conn.Err(); !errors.Is(again, wire.ErrFrozen) {
		e.t.Errorf("what was given away says %v", again)
	}
	e.note(st)
	e.wire = movedWire(e.t, e.wire)
	var moved State
	through(e.t, st, &moved)
	var conn *Conn
	var streams map[uint32]*Stream
	var err error
	if e.client {
		conn, streams, err = ResumeClient(counted{e.wire, &e.read}, &moved)
	} else {
		conn, streams, err = ResumeServer(counted{e.wire, &e.read}, &moved, e.serve, nil)
	}
	if err != nil {
		e.t.Fatal(err)
	}
	e.mu.Lock()
	e.conn = conn
	e.mu.Unlock()
	tasks := e.stopped() // before streams that had not begun get theirs
	e.frozen.Store(false)
	e.wire.Thaw()
	conn.Thaw()
	e.goOn(tasks, streams)
	go conn.Run()
}

// note counts what states have held.
func (e *side) note(st *State) {
	add := func(what string, is bool) {
		if is {
			e.met[what]++
		}
	}
	clear(e.late)
	add("unread", len(st.Unread) > 0)
	add("control", len(st.Control) > 0)
	for _, s := range st.Open {
		add("stream unread", len(s.Unread) > 0)
		add("unsent", len(s.Unsent) > 0)
		add("ending", s.Ending)
		e.late[s.ID] = s.Ending
		add("past", s.Past)
		add("fresh", s.Fresh)
		add("half closed", s.OwnEnded != s.PeerEnded)
		add("to be answered", e.client && len(s.Status) == 0)
	}
}

// stopped are the tasks of a frozen side.
func (e *side) stopped() map[uint32]*task {
	e.mu.Lock()
	defer e.mu.Unlock()
	tasks := e.tasks
	e.tasks = map[uint32]*task{}
	for id, t := range tasks {
		if t.stream != nil && !t.over {
			e.tasks[id] = t
		}
	}
	return tasks
}

// goOn starts what was stopped, on new streams if there are some.
func (e *side) goOn(tasks map[uint32]*task, streams map[uint32]*Stream) {
	for id, t := range tasks {
		if streams != nil && t.stream != nil {
			s := streams[id]
			delete(streams, id)
			if s == nil && !t.over && t.Kind != "reset" {
				e.t.Errorf("client %v: stream %d %+v is lost: %d sent (all %v), %d received (all %v)", e.client, id, t.spec, t.sent, t.sentAll, t.got, t.gotAll)
			}
			if s == nil && !t.over { // reset, which it would have met next
				t.over = true
				e.live.Add(-1)
			}
			t.stream = s
		}
		if t.over {
			continue
		}
		if e.client {
			e.begun.Add(1)
			go func() {
				if t.stream != nil && !t.opened && !e.answer(t, t.stream.Await(context.Background())) {
					e.begun.Done()
					return
				}
				e.visit(t)
			}()
		} else {
			e.conn.Handle(t.stream, func(*Stream) { e.attend(t) })
		}
	}
	for id, s := range streams {
		if !e.late[id] { // its task is over but for what is to be sent
			e.t.Errorf("client %v: nobody knows stream %d", e.client, id)
		}
		s.Reset(CodeCancel)
	}
}

func through(t testing.TB, from, to any) {
	t.Helper()
	b, err := json.Marshal(from)
	if err == nil {
		err = json.Unmarshal(b, to)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func movedWire(t testing.TB, c *wire.Conn) *wire.Conn {
	t.Helper()
	var st wire.State
	through(t, c.State(), &st)
	if err := st.Check(); err != nil {
		t.Fatal(err)
	}
	f, err := c.TCP().File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	return wire.Resume(n.(*net.TCPConn), st)
}

// newSide is one end of c, which is wrapped.
func newSide(t *testing.T, c net.Conn, seed uint64) *side {
	return &side{t: t, random: rand.New(rand.NewPCG(seed, 3)), wire: wire.New(c.(*net.TCPConn)), tasks: map[uint32]*task{}, met: map[string]int{}, late: map[uint32]bool{}}
}

// newServer serves c until the first move.
func newServer(t *testing.T, c net.Conn) *side {
	e := newSide(t, c, 2)
	attached := make(chan struct{})
	go Serve(counted{e.wire, &e.read}, e.serve, func(c *Conn) { e.conn = c; close(attached) })
	<-attached
	return e
}

// sides joins a client and a server, each of which can be moved.
func sides(t *testing.T) (client, server *side) {
	a, b := loop(t)
	client, server = newSide(t, a, 1), newServer(t, b)
	client.client = true
	var err error
	if client.conn, err = Client(counted{client.wire, &client.read}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.conn.Close(); server.conn.Close() })
	return client, server
}

// TestFrozenAtAnyMoment replaces both ends' processes hundreds of times under
// streams that send both ways at once, end their halves in any order, are
// refused and reset. Each byte arrives once, and each end.
func TestFrozenAtAnyMoment(t *testing.T) {
	const moves, atOnce = 150, 40
	client, server := sides(t)
	pause := func(e *side) { time.Sleep(time.Duration(e.random.IntN(4000)) * time.Microsecond) }
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for open(done) {
			pause(server)
			server.move()
		}
	})
	r := rand.New(rand.NewPCG(5, 6))
	tasks := 0
	for client.moves < moves {
		for client.live.Load() < atOnce {
			sp := spec{Kind: "both", Up: r.IntN(1 << r.IntN(21)), Down: r.IntN(1 << r.IntN(21)), Seed: r.Uint64() >> 34 << 1}
			switch r.IntN(8) {
			case 0:
				sp.Kind = "refuse"
			case 1:
				sp.Kind = "reset"
			}
			client.launch(sp)
			tasks++
		}
		pause(client)
		client.move()
	}
	for client.live.Load()+server.live.Load() > 0 && !t.Failed() {
		pause(client)
		client.move()
	}
	close(done)
	wg.Wait()
	if t.Failed() { // so that nothing reports after the end
		client.conn.Close()
		server.conn.Close()
		client.begun.Wait()
		server.conn.Freeze()
		<-server.conn.Stopped()
	}
	for _, what := range []string{"control", "stream unread", "unsent", "ending", "half closed", "past", "fresh", "to be answered"} {
		if client.met[what]+server.met[what] == 0 {
			t.Errorf("no state had %s", what)
		}
	}
	t.Logf("%d streams; the client was frozen %d times and the server %d; %d and %d times it went on itself; met %v and %v",
		tasks, client.moves, server.moves, client.thaws, server.thaws, client.met, server.met)
}

// TestFrozenBetweenBytes replaces a server's process after each byte of a client
// that uses what a client may: the greeting, a block of fields over several
// frames, the table of fields, padding.
func TestFrozenBetweenBytes(t *testing.T) {
	a, b := loop(t)
	server := newServer(t, b)
	defer func() { server.conn.Close() }()
	var blocks bytes.Buffer
	encoder := hpack.NewEncoder(&blocks)
	sp := spec{Kind: "both", Up: 10, Down: 12, Seed: 42}
	authority, _ := json.Marshal(sp)
	head := func(id uint32, most int) (b []byte) {
		blocks.Reset()
		for _, f := range []hpack.HeaderField{{Name: ":method", Value: "CONNECT"}, {Name: ":authority", Value: string(authority)},
			{Name: "forwarded", Value: "for=me"}, {Name: "x-any", Value: "any byte: \xff"}} {
			encoder.WriteField(f)
		}
		kind, flags := byte(h2frame.Headers), byte(0)
		for first := true; first || blocks.Len() > 0; first = false {
			part := slices.Clip(blocks.Next(most))
			if first {
				part, flags = append([]byte{2}, append(part, 0, 0)...), h2frame.FlagPadded
			}
			if blocks.Len() == 0 {
				flags |= h2frame.FlagEndHeaders
			}
			b = h2frame.Append(b, kind, flags, id, part)
			kind, flags = h2frame.Continuation, 0
		}
		return b
	}
	data := make([]byte, sp.Up)
	fill(data, sp.Seed, 0)
	said := []byte(h2frame.Preface)
	said = h2frame.Append(said, h2frame.Settings, 0, 0, h2frame.AppendSetting(nil, h2frame.SettingWindow, 5)) // less than the answer
	for id := uint32(1); id < 6; id += 2 {
		said = append(said, head(id, int(7*id))...)
		said = h2frame.Append(said, h2frame.Data, h2frame.FlagPadded, id, append([]byte{3}, append(data[:6:6], 0, 0, 0)...))
		said = h2frame.Append(said, h2frame.Ping, 0, 0, make([]byte, 8))
		said = h2frame.Append(said, h2frame.Data, h2frame.FlagEndStream, id, data[6:])
	}
	said = h2frame.Append(said, h2frame.Settings, 0, 0, h2frame.AppendSetting(nil, h2frame.SettingWindow, 1000))

	heard := make(chan error, 1)
	go func() { heard <- hear(a, sp, 3) }()
	for i := range said {
		if _, err := a.Write(said[i : i+1]); err != nil {
			t.Fatal(err)
		}
		server.awaitRead(i + 1)
		server.move()
	}
	select {
	case err := <-heard:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Error("the answers do not come")
	}
}

// counted tells how much was read of a connection.
type counted struct {
	*wire.Conn
	bytes *atomic.Int64
}

func (c counted) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.bytes.Add(int64(n))
	return n, err
}

// awaitRead waits until the side has read n bytes.
func (e *side) awaitRead(n int) {
	e.t.Helper()
	for end := time.Now().Add(time.Minute); e.read.Load() < int64(n); runtime.Gosched() {
		if time.Now().After(end) {
			e.t.Fatalf("%d of %d bytes are read", e.read.Load(), n)
		}
	}
}

// hear reads what a server says until so many streams have been answered.
func hear(c net.Conn, sp spec, streams int) error {
	got := map[uint32][]byte{}
	pongs := 0
	for ended := 0; ended < streams || pongs < streams; {
		var head [h2frame.HeaderLen]byte
		if _, err := io.ReadFull(c, head[:]); err != nil {
			return err
		}
		f := h2frame.Parse(head[:])
		p := make([]byte, f.Length)
		if _, err := io.ReadFull(c, p); err != nil {
			return err
		}
		switch f.Kind {
		case h2frame.Ping:
			if f.Has(h2frame.FlagAck) {
				pongs++
			}
		case h2frame.GoAway, h2frame.Reset:
			return fmt.Errorf("frame of kind %d on stream %d: %x", f.Kind, f.Stream, p)
		case h2frame.Data:
			got[f.Stream] = append(got[f.Stream], p...)
			if !f.Has(h2frame.FlagEndStream) {
				continue
			}
			ended++
			want := make([]byte, sp.Down)
			fill(want, sp.Seed+1, 0)
			if !bytes.Equal(got[f.Stream], want) {
				return fmt.Errorf("stream %d: %x, want %x", f.Stream, got[f.Stream], want)
			}
		}
	}
	return nil
}

// FuzzResume resumes hostile states: an error, or a connection that ends.
func FuzzResume(f *testing.F) {
	f.Add([]byte(`{"prefaced":true,"settled":true,"nextID":2,"lastID":3,"send":65535,"initial":65535,"streams":100,`+
		`"tableMax":4096,"table":[{"n":"eA==","v":"eQ=="}],"unread":"AAAA","control":"AAAA","open":[`+
		`{"id":1,"window":9,"credit":100,"unread":"AAAA","unsent":"AAAA","ending":true,"peerEnded":true},`+
		`{"id":3,"window":-1,"credit":0,"fresh":true,"authority":"eA=="}]}`), false)
	f.Add([]byte(`{"prefaced":true,"nextID":7,"send":1,"initial":0,"streams":1,"open":[`+
		`{"id":5,"window":9,"credit":262144},{"id":3,"ownEnded":true,"peerEnded":true,"past":true,"unread":"AAAA"}]}`), true)
	f.Add([]byte(`{"nextID":2,"unread":"UFJJ"}`), false)
	f.Fuzz(func(t *testing.T, b []byte, client bool) {
		var st State
		if json.Unmarshal(b, &st) != nil {
			return
		}
		c := &script{r: bytes.NewReader(nil)}
		use := func(s *Stream) { s.Accept(); io.Copy(s, s); s.CloseWrite() }
		var h *Conn
		var streams map[uint32]*Stream
		var err error
		if client {
			h, streams, err = ResumeClient(c, &st)
		} else {
			h, streams, err = ResumeServer(c, &st, use, nil)
		}
		if err != nil {
			return
		}
		h.Thaw()
		for _, s := range streams {
			h.Handle(s, use)
		}
		if err := h.Run(); err == nil {
			t.Fatal("the end of input did not end the connection")
		}
		h.Freeze()
		<-h.Stopped()
		if h.State() != nil {
			t.Fatal("an ended connection has a state")
		}
	})
}

// TestNoAllocation: a message each way costs none, as long as nothing is frozen.
func TestNoAllocation(t *testing.T) {
	c := both(t, echo)
	s, err := c.Open(t.Context(), "x:1")
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, Headroom+1024)
	// A window is given back now and then; that is less than one in a message.
	if n := testing.AllocsPerRun(2000, func() {
		s.WriteFramed(buf)
		io.ReadFull(s, buf[Headroom:])
	}); n >= 1 {
		t.Errorf("%v allocations for a message each way", n)
	}
}

func open(done chan struct{}) bool {
	select {
	case <-done:
		return false
	default:
		return true
	}
}
