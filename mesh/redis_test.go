package mesh

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/resp"
	"hauberk.dev/plan"
)

// redisCall is a request with arguments that words separates.
func redisCall(words string) []byte { return redisArgs(strings.Fields(words)...) }

func redisArgs(args ...string) []byte {
	b := fmt.Appendf(nil, "*%d\r\n", len(args))
	for _, a := range args {
		b = fmt.Appendf(b, "$%d\r\n%s\r\n", len(a), a)
	}
	return b
}

// readRedis reads one answer, elements of aggregates separated by blanks.
func readRedis(r *bufio.Reader) (string, error) {
	line, err := r.ReadString('\n')
	if err != nil {
		return "", err
	}
	line = strings.TrimSuffix(line, "\r\n")
	n := 0
	fmt.Sscan(line[1:], &n)
	switch line[0] {
	case '$', '=':
		if n < 0 {
			return "nil", nil
		}
		b := make([]byte, n+2)
		_, err := io.ReadFull(r, b)
		return string(b[:n]), err
	case '%':
		n *= 2
	case '*', '~', '>':
	default:
		return line, nil
	}
	all := []string{line[:1]}
	for range n {
		s, err := readRedis(r)
		if err != nil {
			return "", err
		}
		all = append(all, s)
	}
	return strings.Join(all, " "), nil
}

// redisFar is a server in memory that answers requests with their number.
type redisFar struct {
	mu     sync.Mutex
	change sync.Cond
	seen   []byte
	at     int // of seen, up to which it is answered
	n      int
	out    []byte
	step   int
	closed bool
}

func newRedisFar(step int) *redisFar {
	f := &redisFar{step: step}
	f.change.L = &f.mu
	return f
}

func (f *redisFar) Write(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.seen = append(f.seen, b...)
	for {
		c, err := resp.Begin(f.seen[f.at:])
		if err != nil || c.Size == 0 || f.at+c.Size > len(f.seen) {
			break
		}
		end := f.at + c.Size
		rest := c.Rest
		for ; rest > 0; rest-- {
			size, _, err := resp.Argument(f.seen[end:])
			if err != nil || size == 0 || end+size > len(f.seen) {
				break
			}
			end += size
		}
		if rest > 0 {
			break
		}
		f.at = end
		f.n++
		f.out = fmt.Appendf(f.out, "*2\r\n:%d\r\n$1\r\nx\r\n", f.n)
	}
	f.change.Broadcast()
	return len(b), nil
}

func (f *redisFar) Read(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for len(f.out) == 0 {
		if f.closed {
			return 0, io.EOF
		}
		f.change.Wait()
	}
	n := copy(b[:min(len(b), f.step)], f.out)
	f.out = f.out[n:]
	return n, nil
}

func (f *redisFar) CloseWrite() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	f.change.Broadcast()
	return nil
}
func (f *redisFar) abort()  { f.CloseWrite() }
func (f *redisFar) finish() {}

// passRedis runs an exchange over in, in pieces of step bytes, that refuses commands
// which begin with D, and returns what the server and the client see, and whether the
// order of the answers was lost.
func passRedis(in []byte, step int) (server, client []byte, disorder bool, err error) {
	far := newRedisFar(step)
	near := &loop{in: bytes.NewReader(in), step: step}
	x := &rpcExchange{
		entry: &entry{}, client: near, protocol: "redis", dial: func() (side, error) { return far, nil },
		deep: func() bool { return true }, maybe: func() bool { return true }, reserve: func(int) bool { return true },
		judge: func(c rpcCodec) (fault, string) {
			r, err := c.target()
			if err != nil || r.method[0] == 'D' {
				return faultDenied, "no"
			}
			return 0, ""
		},
		malformed: func(e error) { err = e },
	}
	x.run(nil)
	return far.seen, near.out.Bytes(), x.order.Disorder, err
}

// TestRedisSplits: however the bytes arrive, what passes passes unchanged, and what
// is refused is answered in its place.
func TestRedisSplits(t *testing.T) {
	long := strings.Repeat("v", 40_000)
	var in, want, told []byte
	n := 0
	for _, args := range [][]string{{"DEL", "a"}, {"get", "a"}, {"set", "a", long}, {"del", "a"}, {"DEL", long, long}, {"PING"}, {"config", "set", "a", "b"}, {"debug", long}, {"d"},
		{"get", "\r\n*1\r\n$3\r\nDEL\r\n"}, {"del"}, {"INCR", "n"}} {
		b := redisArgs(args...)
		in = append(in, b...)
		if args[0][0]|0x20 == 'd' {
			told = append(told, "-NOPERM no\r\n"...)
			continue
		}
		n++
		want = append(want, b...)
		told = fmt.Appendf(told, "*2\r\n:%d\r\n$1\r\nx\r\n", n)
	}
	for _, step := range []int{1, 2, 3, 7, 64, 1000, 4096, 16 << 10, 1 << 20} {
		server, client, _, err := passRedis(in, step)
		if err != nil || !bytes.Equal(server, want) || !bytes.Equal(client, told) {
			t.Errorf("in pieces of %d: the server has %d bytes of %d, the client is told %q, want %q; %v", step, len(server), len(want), client, told, err)
		}
	}
}

// FuzzRedisExchange: the server sees requests that were judged, or nothing, and the
// client its answers in the same order, however they arrive.
func FuzzRedisExchange(f *testing.F) {
	f.Add(slices.Concat(redisCall("GET a"), redisCall("DEL a"), redisCall("config get x"), redisCall("DEL b"), redisCall("PING")), uint16(3))
	f.Add(slices.Concat(redisCall("MULTI"), redisCall("SET a b"), redisCall("DEL a"), redisCall("EXEC")), uint16(9))
	f.Add(slices.Concat(redisCall("SUBSCRIBE a"), redisCall("DEL a"), redisCall("PING")), uint16(1))
	f.Add([]byte("*2\r\n$3\r\nDEL\r\n$-1\r\n"), uint16(1))
	f.Fuzz(func(t *testing.T, in []byte, step uint16) {
		whole, told, disorder, fault := passRedis(in, 1<<20)
		parts, again, _, second := passRedis(in, int(step)%1000+1)
		if (fault == nil) != (second == nil) {
			t.Fatalf("%v in one piece; %v in pieces", fault, second)
		}
		if fault != nil {
			return // how much had passed by then is a matter of pieces
		}
		if disorder {
			told, again = nil, nil // how many answers come before the end is a matter of time
		}
		if !bytes.Equal(whole, parts) || !bytes.Equal(told, again) {
			t.Fatalf("%q told %q in one piece; %q told %q in pieces", whole, told, parts, again)
		}
	})
}

// TestRedisNoAllocation: neither a command that passes nor its answer costs one.
func TestRedisNoAllocation(t *testing.T) {
	d, err := newDirectory(plan.Mesh{Generation: 1, TrustDomain: domain, Services: []plan.Service{{Name: "s", Namespace: "bank", Identity: spiffe("s"),
		Ports: []plan.Port{{Port: 1, Protocol: "redis"}},
		Deny:  []plan.Rule{{Name: "never", From: []string{"*"}, Methods: []string{"FLUSHALL"}}},
		Allow: []plan.Rule{{Name: "open", From: []string{"*"}, Methods: []string{"get", "config"}}}}}})
	if err != nil {
		t.Fatal(err)
	}
	a := &arrival{p: New(Options{}), port: 1, who: party{peerIdentity: spiffe("web")}}
	frame := slices.Concat(redisCall("GET key"), redisCall("config get save"))
	run := func(n int) func() {
		return func() {
			x := &rpcExchange{
				entry: &entry{}, client: &endless{frame: frame, left: n}, protocol: "redis", dial: func() (side, error) { return &endless{frame: []byte("*1\r\n$1\r\nx\r\n"), left: n}, nil },
				deep: func() bool { return true }, maybe: func() bool { return true }, reserve: a.p.reserve,
				judge:     func(c rpcCodec) (fault, string) { return a.judgeRPC(d.services["bank/s"], c) },
				malformed: func(err error) { t.Error(err) },
			}
			x.run(nil)
		}
	}
	few, many := testing.AllocsPerRun(10, run(10)), testing.AllocsPerRun(10, run(10_000))
	if many-few > 20 {
		t.Errorf("%v allocations for 10 commands, %v for 10,000", few, many)
	}
}

// TestRedisRules: rules name commands in whatever case, and one with services
// never allows, and denies.
func TestRedisRules(t *testing.T) {
	anyRule := []plan.Rule{{Name: "r", From: []string{"*"}}}
	decided := func(allow, deny []plan.Rule, method string) bool {
		d, err := newDirectory(plan.Mesh{Generation: 1, TrustDomain: domain, Services: []plan.Service{{Name: "s", Namespace: "bank", Identity: spiffe("s"),
			Ports: []plan.Port{{Port: 1, Protocol: "redis"}}, Allow: allow, Deny: deny}}})
		if err != nil {
			t.Fatal(err)
		}
		return decide(d.services["bank/s"], call{caller: spiffe("web"), port: 1, rpc: true, remote: remote{method: []byte(method), command: true}}).allowed
	}
	for _, c := range []struct {
		pattern, method string
		want            bool
	}{
		{"GET", "GET", true}, {"get", "GET", true}, {"GET", "GETEX", false}, {"GETEX", "GET", false}, {"CONFIG", "CONFIG|SET", true}, {"config|set", "CONFIG|SET", true},
		{"CONFIG|SET", "CONFIG|GET", false}, {"CONFIG|SET", "CONFIG", false}, {"CONFI", "CONFIG|SET", false}, {"CONFIG|S", "CONFIG|SET", false},
	} {
		rule := []plan.Rule{{Name: "r", From: []string{"*"}, Methods: []string{c.pattern}}}
		if got := decided(rule, nil, c.method); got != c.want {
			t.Errorf("allow %s: %s is %v", c.pattern, c.method, got)
		}
		if got := decided(anyRule, rule, c.method); got == c.want {
			t.Errorf("deny %s: %s is %v", c.pattern, c.method, got)
		}
	}
	services := []plan.Rule{{Name: "r", From: []string{"*"}, Services: []string{"*"}}}
	if decided(services, nil, "GET") || decided(anyRule, services, "GET") {
		t.Error("a rule with services allows a command")
	}
}

// serveRedis starts Redis, which the guest's port leads to.
func serveRedis(t *testing.T, ln net.Listener) {
	t.Helper()
	program, err := exec.LookPath("redis-server")
	if err != nil {
		t.Fatalf("redis is not here to speak to (apt-get install redis-server): %v", err)
	}
	dir, err := os.MkdirTemp("", "xredis")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "s")
	var said bytes.Buffer
	c := exec.Command(program, "--port", "0", "--unixsocket", socket, "--save", "", "--appendonly", "no", "--dir", dir)
	c.Stdout, c.Stderr = &said, &said
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Process.Kill()
		c.Wait()
		if t.Failed() {
			t.Logf("redis: %s", said.Bytes())
		}
	})
	for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		far, err := net.Dial("unix", socket)
		if err == nil {
			far.Close()
			break
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				far, err := net.Dial("unix", socket)
				if err != nil {
					return
				}
				defer far.Close()
				go func() {
					io.Copy(far, c)
					far.(*net.UnixConn).CloseWrite()
				}()
				io.Copy(c, far)
			}()
		}
	}()
}

// redisWorld has a client, and a Redis to which it may say anything but DEL, all of
// CONFIG and SCRIPT FLUSH.
func redisWorld(t *testing.T) (w *world, web *box) {
	w = newWorld(t)
	web = w.add("web", nil, nil, nil)
	b := w.add("store", []plan.Port{{Port: 6379, Protocol: "redis"}}, anyone(),
		[]plan.Rule{{Name: "store/never", From: []string{"*"}, Methods: []string{"del", "CONFIG", "SCRIPT|FLUSH"}}})
	w.apply()
	serveRedis(t, b.listen(t, 6379))
	return w, web
}

type redisClient struct {
	t *testing.T
	c *net.TCPConn
	r *bufio.Reader
}

func dialRedis(t *testing.T, web *box) *redisClient {
	c := web.mustDial(t, "10.99.0.2:6379")
	c.SetDeadline(time.Now().Add(2 * time.Minute))
	return &redisClient{t, c, bufio.NewReader(c)}
}

func (c *redisClient) send(calls ...string) {
	var b []byte
	for _, words := range calls {
		b = append(b, redisCall(words)...)
	}
	if _, err := c.c.Write(b); err != nil {
		c.t.Error(err)
	}
}

// want reads answers that begin so.
func (c *redisClient) want(answers ...string) {
	c.t.Helper()
	for _, want := range answers {
		got, err := readRedis(c.r)
		if err != nil || !strings.HasPrefix(got, want) {
			c.t.Errorf("answered %.200q, %v; want %q", got, err, want)
			return
		}
	}
}

func (c *redisClient) wantEnd() {
	c.t.Helper()
	if rest, err := io.ReadAll(c.r); err != nil || len(rest) > 0 {
		c.t.Errorf("%q, %v; want the end", rest, err)
	}
}

const noPerm = "-NOPERM access denied to "

// TestRedis has a real server judged command by command, and holds the proxy in
// every state in which a refusal may have to wait for its place.
func TestRedis(t *testing.T) {
	w, web := redisWorld(t)
	held := func() {
		t.Helper()
		for range 2 {
			load, err := w.proxy.hold()
			if err == nil {
				err = w.proxy.back(load)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	other := dialRedis(t, web)
	c := dialRedis(t, web)
	c.send("SET a 1", "DEL a", "GET a", "config get save", "INCR a", "script flush", "SCRIPT EXISTS x", "DEL a b")
	c.want("+OK", noPerm, "1", noPerm, ":2", noPerm, "* :0", noPerm)
	w.awaitEvent(api.EventAccessDenied, `command "DEL": denied by store/never`)
	w.awaitEvent(api.EventAccessDenied, `command "CONFIG|GET"`)

	// A string larger than any buffer, and half of one while the proxy is held.
	big := strings.Repeat("0123456789", 30_000)
	b := slices.Concat(redisArgs("SET", "big", big), redisCall("DEL big"), redisCall("GET big"), redisArgs("DEL", big), redisCall("PING"))
	c.c.Write(b[:100_000])
	held()
	c.c.Write(b[100_000:400_000])
	held()
	c.c.Write(b[400_000:])
	c.want("+OK", noPerm, big, noPerm, "+PONG")

	// Refusals wait for an answer that takes its time.
	c.send("BLPOP q 0", "DEL a", "GET a", "DEL a")
	held()
	c.send("PING")
	held()
	other.send("RPUSH q x")
	other.want(":1")
	c.want("* q x", noPerm, "2", noPerm, "+PONG")

	// What the server says unasked is no answer.
	c.send("HELLO 3", "CLIENT TRACKING ON", "GET a", "BLPOP q 0", "DEL a", "PING")
	c.want("%", "+OK", "2")
	held()
	other.send("SET a 7", "RPUSH q y")
	other.want("+OK", ":1")
	c.want("> invalidate * a", "* q y", noPerm, "+PONG")
	c.send("RESET", "PING")
	c.want("+RESET", "+PONG")

	// A transaction is carried out whole or not at all.
	c.send("MULTI", "SET t 1", "EXEC", "DEL t")
	c.want("+OK", "+QUEUED", "* +OK", noPerm)
	c.send("MULTI", "SET t 2")
	c.want("+OK", "+QUEUED")
	held()
	c.send("DEL t", "EXEC", "SET t 3")
	c.want(noPerm)
	c.wantEnd()
	other.send("GET t")
	other.want("1")
	c = dialRedis(t, web)
	c.send("BLPOP q 0", "MULTI", "DEL t", "EXEC")
	held()
	other.send("RPUSH q z")
	other.want(":1")
	c.want("* q z", "+OK", noPerm)
	held()
	c.wantEnd()

	// Nor can the place be known of what is refused to a subscriber.
	c = dialRedis(t, web)
	c.send("GET a", "SUBSCRIBE news")
	c.want("7", "* subscribe news :1")
	held()
	other.send("PUBLISH news hello")
	other.want(":1")
	c.want("* message news hello")
	c.send("DEL a", "PING")
	c.wantEnd()
	for _, first := range []string{"CLIENT REPLY OFF", "MONITOR"} {
		c = dialRedis(t, web)
		c.send(first, "DEL a", "PING")
		c.wantNoRefusal()
	}

	// A subscriber may ask in between, in RESP3. What it reads first then is no
	// refusal of what was carried out.
	c = dialRedis(t, web)
	c.send("HELLO 3", "SUBSCRIBE news")
	c.want("%", "> subscribe news :1")
	c.send("INCR n", "DEL a")
	c.wantNoRefusal()
}

// wantNoRefusal reads to the end, before which may stand what the server says.
func (c *redisClient) wantNoRefusal() {
	c.t.Helper()
	if all, err := io.ReadAll(c.r); err != nil || strings.Contains(string(all), "NOPERM") {
		c.t.Errorf("%q, %v", all, err)
	}
}

func TestRedisMalformed(t *testing.T) {
	w, web := redisWorld(t)
	for in, reason := range map[string]string{"PING\r\n": "inline commands", "*1\r\n$5\r\nPSYNC\r\n": "port with protocol tcp",
		"*1\r\n$6\r\nDEL\x00ab\r\n": "a zero byte in \"DEL", "*3\r\n$6\r\nCONFIG\r\n$4\r\nGET\x00\r\n$1\r\nx\r\n": "a zero byte in \"GET", "*2\r\n$4\r\nPING\r\n:1\r\n": "an argument that begins with"} {
		c := dialRedis(t, web)
		c.send("GET a")
		c.want("nil")
		c.c.Write([]byte(in))
		if rest, err := io.ReadAll(c.r); err == nil {
			t.Errorf("%q ended well after %q", in, rest)
		}
		w.awaitEvent(api.EventBadRequest, reason)
	}
	w.service("store").Endpoints = nil
	w.plan.Generation++
	w.apply()
	c := dialRedis(t, web)
	c.send("GET a", "MULTI", "PING")
	c.want("-ERR ", "-ERR ", "-ERR ")
}

// TestRedisHeld: no answer is lost, doubled or in another place while the proxy is
// held again and again under pipelines of many clients.
func TestRedisHeld(t *testing.T) {
	w, web := redisWorld(t)
	var clients sync.WaitGroup
	over, rounds := make(chan struct{}), make(chan struct{})
	for i := range 4 {
		c := dialRedis(t, web)
		clients.Go(func() {
			for r, round := rand.New(rand.NewPCG(uint64(i), 7)), 0; ; round++ {
				if err := pipeline(c, r, round); err != nil {
					t.Errorf("round %d: %v", round, err)
					return
				}
				select {
				case rounds <- struct{}{}:
				case <-over:
					return
				}
			}
		})
	}
	go func() { // takes what the clients say, and tells when they have all failed
		clients.Wait()
		close(rounds)
	}()
	for range 20 {
		for range 8 { // some of them in the middle of a round
			<-rounds
		}
		load, err := w.proxy.hold()
		if err == nil {
			err = w.proxy.back(load)
		}
		if err != nil {
			t.Error(err)
			break
		}
	}
	close(over)
	clients.Wait()
}

// pipeline sends commands at once, of which some are refused, and reads the answers.
func pipeline(c *redisClient, r *rand.Rand, round int) error {
	var b []byte
	var want []string
	for i := range 1 + r.IntN(40) {
		text := fmt.Sprint(round, "-", i, strings.Repeat("x", r.IntN(3000)))
		if r.IntN(3) == 0 {
			b, want = append(b, redisArgs("DEL", text)...), append(want, noPerm)
		} else {
			b, want = append(b, redisArgs("ECHO", text)...), append(want, text)
		}
	}
	sent := make(chan error, 1)
	go func() {
		for len(b) > 0 {
			n := min(len(b), 1+r.IntN(9000))
			if _, err := c.c.Write(b[:n]); err != nil {
				sent <- err
				return
			}
			b = b[n:]
		}
		sent <- nil
	}()
	for i, want := range want {
		got, err := readRedis(c.r)
		if err != nil || got != want && (want != noPerm || !strings.HasPrefix(got, want)) {
			return fmt.Errorf("answer %d: %.60q, %v; want %.60q", i, got, err, want)
		}
	}
	if err := <-sent; err != nil {
		return err
	}
	return nil
}

// TestRefusalsThatWaitAreBounded: a client that is refused without end while an
// answer keeps it waiting loses its connection.
func TestRefusalsThatWaitAreBounded(t *testing.T) {
	o := &order{codec: &redisCodec{}}
	o.passed()
	b := make([]byte, 1000)
	n := 0
	for ; !o.Closing && n < maxTurns; n++ {
		o.refused(b)
	}
	if n != maxTurns/len(b)+1 || o.state().check() != nil || o.ready() {
		t.Errorf("%d refusals wait: %v", n, o.state().check())
	}
	o.answered()
	if t1, ok := o.take(); !ok || t1.Last {
		t.Error("the first refusal is not told")
	}
	for _, bad := range []orderState{{Owed: -1}, {Turns: []turn{{After: -1}}}, {Turns: []turn{{Text: make([]byte, 3*maxTurns)}}}} {
		if bad.check() == nil {
			t.Errorf("taken over: %d owed, %d turns", bad.Owed, len(bad.Turns))
		}
	}
}

// A long answer that only passes takes no room that is meant for what waits to be
// judged.
func TestRedisAnswersReserveNothing(t *testing.T) {
	f := newFrames(strings.NewReader("$60000000\r\nabc"), &redisAnswers{}, func(n int) bool {
		t.Errorf("%d bytes are reserved", n)
		return true
	})
	defer f.free()
	f.blind = true
	if err := f.fill(); err != nil {
		t.Fatal(err)
	}
	if _, size, err := f.next(false); err != nil || size != len("$60000000\r\n")+60000000+2 {
		t.Errorf("size %d, %v", size, err)
	}
}
