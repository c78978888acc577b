package gate

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

const (
	maxQuery   = 1232
	maxAnswers = 16
	maxKnown   = 4096             // addresses remembered for their names
	remember   = 30 * time.Minute // longer than programs keep an address
	ttl        = 30
	queries    = 64 // under way at once
	patience   = 10 * time.Second
	tcpIdle    = 10 * time.Second
)

// names answers what the guest asks of names that are on the list, with this
// machine's resolver, and remembers which addresses they led to.
type names struct {
	o   Options
	udp net.PacketConn
	tcp net.Listener
	// lookup finds the addresses of a name; tests replace it.
	lookup func(ctx context.Context, name string) ([]netip.Addr, error)
	busy   chan struct{}

	mu    sync.Mutex
	known map[netip.Addr]map[string]time.Time // names an address was given for, until when
}

func newNames(udp, tcp *os.File, o Options) (*names, error) {
	var r net.Resolver
	n := &names{o: o, busy: make(chan struct{}, queries), known: map[netip.Addr]map[string]time.Time{},
		lookup: func(ctx context.Context, name string) ([]netip.Addr, error) {
			return r.LookupNetIP(ctx, "ip4", name+".")
		}}
	defer udp.Close()
	var err1, err2 error
	n.udp, err1 = net.FilePacketConn(udp)
	n.tcp, err2 = listener(tcp)
	if err := errors.Join(err1, err2); err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

func (n *names) Close() error {
	var errs []error
	if n.udp != nil {
		errs = append(errs, n.udp.Close())
	}
	if n.tcp != nil {
		errs = append(errs, n.tcp.Close())
	}
	return errors.Join(errs...)
}

// allows says whether the guest may go to an address, by itself or because a
// name on the list led there.
func (n *names) allows(to netip.AddrPort) bool {
	now := time.Now()
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, d := range n.o.Egress {
		if d.address(to) {
			return true
		}
		if d.Name == "" || d.Port != 0 && d.Port != to.Port() {
			continue
		}
		for name, until := range n.known[to.Addr()] {
			if d.named(name) && now.Before(until) {
				return true
			}
		}
	}
	return false
}

// learn remembers where a name led. What is too much is not remembered, and so
// not allowed.
func (n *names) learn(name string, list []netip.Addr) {
	now := time.Now()
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, a := range list {
		if n.known[a] == nil {
			if len(n.known) >= maxKnown {
				n.forget(now)
			}
			if len(n.known) >= maxKnown {
				return
			}
			n.known[a] = map[string]time.Time{}
		}
		if _, ok := n.known[a][name]; ok || len(n.known[a]) < maxAnswers {
			n.known[a][name] = now.Add(remember)
		}
	}
}

func (n *names) forget(now time.Time) {
	for a, given := range n.known {
		for name, until := range given {
			if now.After(until) {
				delete(given, name)
			}
		}
		if len(given) == 0 {
			delete(n.known, a)
		}
	}
}

// answer answers one message, or returns nil if it deserves none.
func (n *names) answer(ctx context.Context, query []byte) []byte {
	var p dnsmessage.Parser
	h, err := p.Start(query)
	if err != nil || h.Response {
		return nil
	}
	reply := dnsmessage.Header{ID: h.ID, Response: true, OpCode: h.OpCode, RecursionDesired: h.RecursionDesired, RecursionAvailable: true}
	q, err := p.Question()
	if err == nil {
		if _, more := p.Question(); more != dnsmessage.ErrSectionDone {
			err = errors.New("more than one question")
		}
	}
	switch {
	case h.OpCode != 0:
		reply.RCode = dnsmessage.RCodeNotImplemented
		return build(reply, nil, nil)
	case err != nil:
		reply.RCode = dnsmessage.RCodeFormatError
		return build(reply, nil, nil)
	case q.Class != dnsmessage.ClassINET:
		reply.RCode = dnsmessage.RCodeRefused
		return build(reply, &q, nil)
	}
	name := strings.ToLower(strings.TrimSuffix(q.Name.String(), "."))
	if !slices.ContainsFunc(n.o.Egress, func(d Destination) bool { return d.named(name) }) || !nameRE.MatchString(name) {
		if n.o.Denied != nil {
			n.o.Denied(name)
		}
		reply.RCode = dnsmessage.RCodeNameError
		return build(reply, &q, nil)
	}
	if q.Type != dnsmessage.TypeA {
		return build(reply, &q, nil) // the guest speaks IPv4 only
	}
	list, err := n.lookup(ctx, name)
	var failed *net.DNSError
	switch {
	case errors.As(err, &failed) && failed.IsNotFound:
		reply.RCode = dnsmessage.RCodeNameError
	case err != nil:
		reply.RCode = dnsmessage.RCodeServerFailure
	}
	list = usable(list)
	n.learn(name, list)
	return build(reply, &q, list)
}

// usable leaves out what only this machine and its link can reach: whoever owns
// a name must not lead the guest there.
func usable(list []netip.Addr) (out []netip.Addr) {
	for _, a := range list {
		if a = a.Unmap(); a.Is4() && (Destination{Any: true}).address(netip.AddrPortFrom(a, 1)) && len(out) < maxAnswers {
			out = append(out, a)
		}
	}
	return out
}

func build(h dnsmessage.Header, q *dnsmessage.Question, list []netip.Addr) []byte {
	b := dnsmessage.NewBuilder(nil, h)
	b.EnableCompression()
	err := b.StartQuestions()
	if err == nil && q != nil {
		err = b.Question(*q)
	}
	if err == nil {
		err = b.StartAnswers()
	}
	for _, a := range list {
		if err == nil {
			err = b.AResource(dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: ttl}, dnsmessage.AResource{A: a.As4()})
		}
	}
	if err != nil {
		return nil
	}
	out, err := b.Finish()
	if err != nil {
		return nil
	}
	return out
}

func (n *names) serveUDP(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for {
		buf := make([]byte, maxQuery)
		size, from, err := n.udp.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		select {
		case n.busy <- struct{}{}:
		default:
			continue // the guest asks again
		}
		wg.Go(func() {
			defer func() { <-n.busy }()
			ctx, cancel := context.WithTimeout(ctx, patience)
			defer cancel()
			if reply := n.answer(ctx, buf[:size]); reply != nil {
				_, _ = n.udp.WriteTo(reply, from)
			}
		})
	}
}

func (n *names) serveTCP(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for {
		c, err := n.tcp.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		select {
		case n.busy <- struct{}{}:
		default:
			c.Close()
			continue
		}
		wg.Go(func() {
			defer func() { <-n.busy }()
			defer context.AfterFunc(ctx, func() { c.Close() })()
			defer c.Close()
			n.converse(ctx, c)
		})
	}
}

// converse answers messages that their length precedes.
func (n *names) converse(ctx context.Context, c net.Conn) {
	for {
		c.SetDeadline(time.Now().Add(tcpIdle))
		var size [2]byte
		if _, err := io.ReadFull(c, size[:]); err != nil {
			return
		}
		query := make([]byte, binary.BigEndian.Uint16(size[:]))
		if len(query) > maxQuery {
			return
		}
		if _, err := io.ReadFull(c, query); err != nil {
			return
		}
		reply := n.answer(ctx, query)
		if reply == nil {
			return
		}
		if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(reply))), reply...)); err != nil {
			return
		}
	}
}
