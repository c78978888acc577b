package mesh

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"hauberk.dev/mesh/http2"
)

// exchange2State is a frozen exchange2 as plain data. The connections to the
// guest are those of the arrival, in the same order.
type exchange2State struct {
	Begun  []byte       `json:"begun,omitempty"`  // read of the client and not used
	HTTP2  *http2.State `json:"http2"`            // the client's connection first
	Server int          `json:"server,omitempty"` // which takes requests, from 1; 0 for none
}

type askedState struct {
	Method string       `json:"method"`
	Path   string       `json:"path"`
	GRPC   bool         `json:"grpc,omitempty"`
	Fields []fieldState `json:"fields,omitempty"`
	Note   *noteState   `json:"note,omitempty"`
	Rules  []byte       `json:"rules,omitempty"` // as judged has them
	Began  time.Time    `json:"began,omitzero"`
}

// fieldState is a field, whose bytes need not be text.
type fieldState struct {
	Name  []byte `json:"name"`
	Value []byte `json:"value,omitempty"`
}

func (d *dialled) freeze() {
	d.conn.Freeze()
	d.wire.Freeze()
}

// freeze stops the connections to the guest and the client's; that below the
// client's is frozen by its owner.
func (x *exchange2) freeze() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.still = true
	x.client.Freeze()
	for _, d := range x.dialled {
		d.freeze()
	}
}

// state is where a frozen exchange stands, after all that served it has ended.
// Connections to the guest that have ended have left their streams.
func (x *exchange2) state(client *begunSide) *exchange2State {
	conns := []*http2.Conn{x.client}
	s := &exchange2State{Begun: client.begun}
	x.a.others = nil
	for i, d := range x.dialled {
		conns = append(conns, d.conn)
		x.a.others = append(x.a.others, d.wire)
		if d.conn == x.server {
			s.Server = i + 1
		}
	}
	var err error
	if s.HTTP2, err = http2.Save(conns, func(s *http2.Stream) (json.RawMessage, error) {
		q := askedOf(s)
		kept := askedState{Method: q.method, Path: q.path, GRPC: q.grpc, Note: q.note.state(), Rules: []byte(q.rules), Began: q.began}
		for _, f := range q.fields {
			kept.Fields = append(kept.Fields, fieldState{[]byte(f.Name), []byte(f.Value)})
		}
		return json.Marshal(kept)
	}); err != nil {
		x.malformed(fmt.Errorf("hand the connection over: %w", err))
		x.a.cut()
		return nil
	}
	return s
}

// resume puts the exchange where another stood.
func (x *exchange2) resume(client http2.Transport, s *exchange2State) error {
	if s.HTTP2 == nil || s.Server < 0 || s.Server > len(x.a.others) {
		return errors.New("resume http/2: no state")
	}
	transports := []http2.Transport{client}
	for _, w := range x.a.others {
		transports = append(transports, toGuest(w))
		x.dialled = append(x.dialled, &dialled{wire: w})
	}
	conns, err := http2.Resume(s.HTTP2, transports, func(i int) http2.Options {
		if i == 0 {
			return x.clientOptions()
		}
		return x.serverOptions(x.dialled[i-1])
	}, func(b json.RawMessage) (any, error) {
		var kept askedState
		err := json.Unmarshal(b, &kept)
		q := &asked{method: kept.Method, path: kept.Path, grpc: kept.GRPC, note: kept.Note.note(), judged: judged{string(kept.Rules), kept.Began}}
		for _, f := range kept.Fields {
			q.fields = append(q.fields, http2.Field{Name: string(f.Name), Value: string(f.Value)})
		}
		return q, err
	})
	if err != nil {
		return err
	}
	x.client = conns[0]
	for i, d := range x.dialled {
		d.conn = conns[i+1]
		x.a.guest.Store(d.wire)
	}
	if s.Server > 0 {
		x.server = x.dialled[s.Server-1].conn
	}
	return nil
}
