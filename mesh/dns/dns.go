// Package dns answers the name queries of one sandbox from what the mesh
// knows. It forwards nothing: a name that is not in the plan does not exist,
// so names cannot carry data out.
package dns

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

const (
	maxQuery = 1232
	ttl      = 5 // seconds: services move
	// TCP queries are rare; these bound what they may hold.
	maxTCP     = 32
	tcpIdle    = 10 * time.Second
	tcpPause   = 20 * time.Millisecond // after an error of accept
	clusterTop = "svc.cluster.local"
)

// Lookup returns the address of a service.
type Lookup func(service, namespace string) (netip.Addr, bool)

// Server answers one sandbox.
type Server struct {
	// Namespace of the sandbox, where single-label names are looked up. It is
	// asked at each query, as plans change.
	Namespace func() string
	Lookup    Lookup
}

// Answer answers one message, or returns nil if it deserves none.
func (s *Server) Answer(query []byte) []byte {
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
		return build(reply, nil, netip.Addr{})
	case err != nil:
		reply.RCode = dnsmessage.RCodeFormatError
		return build(reply, nil, netip.Addr{})
	case q.Class != dnsmessage.ClassINET:
		reply.RCode = dnsmessage.RCodeRefused
		return build(reply, &q, netip.Addr{})
	}
	reply.Authoritative = true
	address, ok := s.resolve(q.Name.String())
	if !ok {
		reply.RCode = dnsmessage.RCodeNameError
		return build(reply, &q, netip.Addr{})
	}
	if q.Type != dnsmessage.TypeA && q.Type != dnsmessage.TypeALL {
		address = netip.Addr{} // the name exists, but has no such record
	}
	return build(reply, &q, address)
}

// resolve understands web, web.bank, web.bank.svc and
// web.bank.svc.cluster.local.
func (s *Server) resolve(name string) (netip.Addr, bool) {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	for _, suffix := range []string{"." + clusterTop, ".svc"} {
		if rest, ok := strings.CutSuffix(name, suffix); ok {
			if strings.Count(rest, ".") != 1 {
				return netip.Addr{}, false
			}
			name = rest
			break
		}
	}
	service, namespace, ok := strings.Cut(name, ".")
	if !ok {
		namespace = s.Namespace()
	}
	if service == "" || namespace == "" || strings.Contains(namespace, ".") {
		return netip.Addr{}, false
	}
	return s.Lookup(service, namespace)
}

func build(h dnsmessage.Header, q *dnsmessage.Question, a netip.Addr) []byte {
	b := dnsmessage.NewBuilder(make([]byte, 0, 512), h)
	b.EnableCompression()
	if q != nil {
		if b.StartQuestions() != nil || b.Question(*q) != nil {
			return nil
		}
	}
	if a.Is4() {
		rh := dnsmessage.ResourceHeader{Name: q.Name, Class: dnsmessage.ClassINET, TTL: ttl}
		if b.StartAnswers() != nil || b.AResource(rh, dnsmessage.AResource{A: a.As4()}) != nil {
			return nil
		}
	}
	out, err := b.Finish()
	if err != nil {
		return nil
	}
	return out
}

// ServeUDP answers until the socket is closed. One at a time: an answer costs
// less than a goroutine.
func (s *Server) ServeUDP(c net.PacketConn) error {
	buf := make([]byte, maxQuery)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return nil
			}
			var ne net.Error
			if errors.As(err, &ne) {
				continue // an ICMP error of an earlier answer
			}
			return err
		}
		if reply := s.Answer(buf[:n]); reply != nil {
			c.WriteTo(reply, from)
		}
	}
}

// ServeTCP answers until the listener is closed.
func (s *Server) ServeTCP(ln net.Listener) error {
	slots := make(chan struct{}, maxTCP)
	for {
		c, err := ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil { // out of descriptors, most likely: let some be closed
			time.Sleep(tcpPause)
			continue
		}
		select {
		case slots <- struct{}{}:
			go func() {
				defer func() { c.Close(); <-slots }()
				s.serveConn(c)
			}()
		default:
			c.Close()
		}
	}
}

func (s *Server) serveConn(c net.Conn) {
	var size [2]byte
	for {
		c.SetDeadline(time.Now().Add(tcpIdle))
		if _, err := io.ReadFull(c, size[:]); err != nil {
			return
		}
		n := binary.BigEndian.Uint16(size[:])
		if n > maxQuery {
			return
		}
		query := make([]byte, n)
		if _, err := io.ReadFull(c, query); err != nil {
			return
		}
		reply := s.Answer(query)
		if reply == nil {
			return
		}
		if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(reply))), reply...)); err != nil {
			return
		}
	}
}
