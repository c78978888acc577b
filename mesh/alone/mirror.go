package alone

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"time"

	"hauberk.dev/mesh/balance"
	"hauberk.dev/mesh/http1"
	"hauberk.dev/mesh/proxyproto"
)

// maxMirrors bounds the copies under way; more are dropped.
const maxMirrors = 64

// reflect sends a copy of the request whose answer nobody waits for. Requests
// whose body is not at hand are not copied.
func (s *session) reflect(a *action) {
	if rand.IntN(100) >= a.route.Mirror.Percent {
		return
	}
	p := s.p
	if !s.gathered() || p.mirrors.Add(1) > maxMirrors {
		if s.gathered() {
			p.mirrors.Add(-1)
		}
		p.stats.unmirrored.Add(1)
		return
	}
	b, err := s.appendHead(nil, a, a.mirror, true)
	if err != nil {
		p.mirrors.Add(-1)
		return
	}
	if s.req.Framing == http1.Length {
		b = append(b, s.in.waiting()[:s.req.Length]...)
	}
	method := string(s.req.Method)
	header := s.header()
	p.serving.Go(func() {
		defer p.mirrors.Add(-1)
		if copyTo(p.context(), a.mirror, header, method, b, nil) == nil {
			p.stats.mirrored.Add(1)
		} else {
			p.stats.unmirrored.Add(1)
		}
	})
}

// copyTo sends a request and reads its answer to the end. take, if there is one, gets
// the parts of its body, and last its head; but not of an answer that ends with
// trailers.
func copyTo(ctx context.Context, up *upstream, h proxyproto.Header, method string, request []byte, take func(data []byte, head *http1.Message)) error {
	at, err := up.pick(0, nil)
	if err != nil {
		return err
	}
	outcome := balance.Unreachable
	defer func() { at.Done(up.clock.Now(), outcome) }()
	srv, err := up.connect(ctx, at.e, h, false)
	if errors.Is(err, errBusy) {
		outcome = balance.Cancelled
	}
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { srv.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	srv.conn.SetDeadline(time.Now().Add(defaultTimeout))
	if _, err := srv.conn.Write(request); err != nil {
		srv.close()
		return err
	}
	var m http1.Message
	var body http1.Payload
	for interim := 0; m.Status < 200; interim++ {
		head, _, err := srv.in.head(maxHead)
		if err == nil {
			err = m.Response(head, []byte(method))
		}
		if err != nil || interim > maxInterim {
			srv.close()
			return errInterim
		}
	}
	for body.Start(m.Framing, m.Length); !body.Ended(); {
		data, n, err := body.Next(srv.in.waiting())
		srv.in.at += n
		if len(data) > 0 && take != nil {
			take(data, nil)
		}
		if err == nil && len(data) == 0 && !body.Ended() {
			if err = srv.in.fill(); err == io.EOF {
				err = body.End()
			}
		}
		if err != nil {
			srv.close()
			return err
		}
	}
	outcome = balance.Success
	if take != nil && srv.untrailed() {
		take(nil, &m)
	}
	if m.Close {
		srv.close()
	} else {
		srv.keep(time.Now())
	}
	return nil
}

// untrailed waits for the end of an answer whose body has come, and says whether no
// trailers were between.
func (srv *server) untrailed() bool {
	if srv.two == nil {
		return true
	}
	if srv.in.fill() != io.EOF { // also of one that has told its length
		return false
	}
	srv.two.mu.Lock()
	defer srv.two.mu.Unlock()
	return len(srv.two.trailers) == 0
}
