package alone

import (
	"bytes"
	"encoding/binary"
	"time"

	"hauberk.dev/mesh/bolt"
	"hauberk.dev/mesh/dubbo"
)

// rpcKind is what a frame means to who passes it on.
type rpcKind uint8

const (
	rpcCall   rpcKind = iota
	rpcAlive          // asks for a sign of life
	rpcAnswer         // to a call
	rpcLiving         // the answer to rpcAlive
	rpcGoAway         // no more calls on this connection
	rpcOther          // nobody needs it
)

// rpcFault is why a call is answered here and not by its server.
type rpcFault uint8

const (
	rpcNoRoute  rpcFault = iota
	rpcNoServer          // none is up
	rpcTooMany           // calls, or bytes
	rpcLate
	rpcBroken  // the connection ended before the answer
	rpcUnclear // what it is for cannot be read
	rpcFailed  // the server did what it should not, or says that it failed
)

// How each protocol says it.
var (
	boltFaults  = [...]bolt.Status{rpcNoRoute: bolt.NoProcessor, rpcNoServer: bolt.NoProcessor, rpcTooMany: bolt.Busy, rpcLate: bolt.Timeout, rpcBroken: bolt.Closed, rpcUnclear: bolt.CodecFailed, rpcFailed: bolt.ServerException}
	dubboFaults = [...]dubbo.Status{rpcNoRoute: dubbo.ServiceNotFound, rpcNoServer: dubbo.ServerError, rpcTooMany: dubbo.Exhausted, rpcLate: dubbo.ServerTimeout, rpcBroken: dubbo.ServerError, rpcUnclear: dubbo.BadRequest, rpcFailed: dubbo.ServiceError}
)

// As HTTP would say it, for counters and the log.
var rpcStatuses = [...]int{rpcNoRoute: 404, rpcNoServer: 503, rpcTooMany: 429, rpcLate: 504, rpcBroken: 502, rpcUnclear: 400, rpcFailed: 500}

// rpcFrame is a whole frame of bolt or Dubbo.
type rpcFrame struct {
	kind    rpcKind
	oneWay  bool
	id      uint64
	timeout time.Duration // that a call of bolt names; 0 is none
	well    bool          // an answer that does not tell of a fault of the server
	ok      bool          // and is no error
	bolt    bolt.Frame
	dubbo   dubbo.Frame
}

// forgotten is what a refusal needs of a frame whose bytes are gone.
func (f *rpcFrame) forgotten() rpcFrame {
	k := *f
	k.bolt.Class, k.bolt.Header, k.bolt.Content, k.dubbo.Body = nil, nil, nil, nil
	return k
}

// wire reads and writes the frames of one protocol.
type wire struct {
	dubbo  bool
	extent bolt.Extent
	sum    bolt.Sum
	bolts  bolt.Reader
	dubbos dubbo.Reader
}

// size tells how long the frame is that begins with b; 0 means that more of b is
// needed to tell.
func (w *wire) size(b []byte) (n int, err error) {
	if w.dubbo {
		return dubbo.Size(b)
	}
	w.extent, err = bolt.Size(b)
	return w.extent.Len, err
}

// read reads the whole frame that size has seen.
func (w *wire) read(b []byte, f *rpcFrame) error {
	if w.dubbo {
		w.readDubbo(b, f)
		return nil
	}
	if w.extent.CRC {
		w.sum.Begin(w.extent)
		if err := w.sum.Add(b); err != nil {
			return err
		}
	}
	w.readBolt(b, f)
	return nil
}

// begin reads what the beginning of a frame tells that size has seen.
func (w *wire) begin(b []byte, f *rpcFrame) {
	if w.dubbo {
		w.readDubbo(b, f)
	} else {
		w.readBolt(b, f)
	}
}

func (w *wire) readBolt(b []byte, f *rpcFrame) {
	*f = rpcFrame{kind: rpcOther, bolt: bolt.Parse(b, w.extent)}
	p := &f.bolt
	f.id, f.oneWay = uint64(p.ID), p.Type == bolt.OneWay
	switch {
	case p.Command == bolt.GoAway:
		f.kind = rpcGoAway
	case p.Type == bolt.Response && p.Command == bolt.Heartbeat:
		f.kind = rpcLiving
	case p.Type == bolt.Response:
		f.kind, f.ok = rpcAnswer, p.Status == bolt.OK
		switch p.Status {
		case bolt.OK, bolt.CodecFailed, bolt.SerializeFailed, bolt.DeserializeFailed:
			f.well = true
		}
	case p.Kind() == bolt.KindAlive:
		f.kind = rpcAlive
	case p.Kind() == bolt.KindCall:
		f.kind = rpcCall
		if p.Timeout > 0 {
			f.timeout = time.Duration(p.Timeout) * time.Millisecond
		}
	}
}

// Flags of Dubbo's header.
const (
	dubboRequest = 0x80
	dubboEvent   = 0x20
)

func (w *wire) readDubbo(b []byte, f *rpcFrame) {
	*f = rpcFrame{kind: rpcOther, dubbo: dubbo.Parse(b, len(b))}
	p := &f.dubbo
	f.id, f.oneWay = p.ID, !p.TwoWay
	request, event := b[2]&dubboRequest != 0, b[2]&dubboEvent != 0
	switch {
	case p.Kind == dubbo.KindCall:
		f.kind = rpcCall
	case p.Kind == dubbo.KindAlive:
		f.kind = rpcAlive
	case event && request: // one way: the server says that it is read-only
		f.kind = rpcGoAway
	case event:
		f.kind = rpcLiving
	case !request:
		f.kind, f.ok = rpcAnswer, p.Status == dubbo.OK
		switch p.Status {
		case dubbo.OK, dubbo.BadRequest, dubbo.ServiceNotFound, dubbo.ServiceError, dubbo.ClientError, dubbo.ClientTimeout:
			f.well = true
		}
	}
}

// callTarget is what a call is for.
type callTarget struct {
	service, version, group, method []byte
	header                          bolt.Header
}

func (w *wire) target(f *rpcFrame) (callTarget, error) {
	if w.dubbo {
		t, err := w.dubbos.Target(&f.dubbo)
		return callTarget{service: t.Service, version: t.Version, group: t.Group, method: t.Method}, err
	}
	t, err := w.bolts.Target(&f.bolt)
	if err != nil {
		return callTarget{}, err
	}
	name, version, _ := bytes.Cut(t.Service, []byte(":"))
	return callTarget{service: name, version: version, method: t.Method, header: f.bolt.Header}, nil
}

// setID writes another id into the whole frame b.
func (w *wire) setID(b []byte, id uint64) {
	if w.dubbo {
		binary.BigEndian.PutUint64(b[4:], id)
		return
	}
	if x, err := bolt.Size(b); err == nil && x.Len > 0 {
		bolt.SetID(b, x, uint32(id))
	}
}

// appendFault appends the answer that refuses f.
func (w *wire) appendFault(b []byte, f *rpcFrame, why rpcFault, text string) []byte {
	if w.dubbo {
		return dubbo.AppendError(b, &f.dubbo, dubboFaults[why], text)
	}
	return bolt.AppendError(b, &f.bolt, boltFaults[why], text)
}

// appendLiving appends the answer to the heartbeat f.
func (w *wire) appendLiving(b []byte, f *rpcFrame) []byte {
	if w.dubbo {
		return dubbo.AppendAlive(b, &f.dubbo)
	}
	return bolt.AppendAlive(b, &f.bolt)
}

// beatTimeout is what a heartbeat of bolt says of its patience.
const beatTimeout = 3000 // milliseconds

// appendBeat appends a heartbeat of the proxy's own.
func (w *wire) appendBeat(b []byte, id uint64) []byte {
	if w.dubbo {
		b = append(b, 0xda, 0xbb, 0xe2, 0)
		b = binary.BigEndian.AppendUint64(b, id)
		return append(b, 0, 0, 0, 1, 'N')
	}
	b = append(b, 1, byte(bolt.Request), 0, byte(bolt.Heartbeat), 1)
	b = binary.BigEndian.AppendUint32(b, uint32(id))
	b = binary.BigEndian.AppendUint32(append(b, bolt.Hessian2), beatTimeout)
	return append(b, 0, 0, 0, 0, 0, 0, 0, 0)
}
