package mesh

import (
	"bytes"
	"fmt"

	"hauberk.dev/mesh/bolt"
	"hauberk.dev/mesh/dubbo"
)

const (
	boltLook   = 32 << 10 // of a body, before which both names stand
	dubboLook  = 1 << 20  // of a body, all of which must be read
	thriftLook = 2 << 10  // of a message
)

// boltCodec reads frames of SOFABolt.
type boltCodec struct {
	frame  bolt.Frame
	extent bolt.Extent
	reader bolt.Reader
	sum    bolt.Sum
}

func (c *boltCodec) measure(b []byte, deep bool) (size, look int, err error) {
	if c.extent, err = bolt.Size(b); err != nil {
		return 0, 0, err
	}
	look = c.extent.Head
	if deep {
		look = min(look+boltLook, c.extent.Len)
	}
	return c.extent.Len, look, nil
}

func (c *boltCodec) inspect(b []byte, size int) (kind rpcKind, answer bool, err error) {
	c.frame = bolt.Parse(b, c.extent)
	switch c.frame.Kind() {
	case bolt.KindAlive:
		kind = rpcAlive
	case bolt.KindOther:
		kind = rpcOther
	}
	return kind, c.frame.Type == bolt.Request, nil
}

func (c *boltCodec) asks(b []byte) bool {
	if at := b[0]; bolt.Type(b[at]) == bolt.Response { // which stands after the version of protocol 2
		return false
	}
	f := bolt.Parse(b, c.extent)
	return f.Kind() == bolt.KindCall
}

func (c *boltCodec) target() (remote, error) {
	t, err := c.reader.Target(&c.frame)
	if err != nil {
		return remote{}, err
	}
	name, version, _ := bytes.Cut(t.Service, []byte(":"))
	return remote{service: name, version: version, method: t.Method}, nil
}

func (c *boltCodec) refuse(dst []byte, f fault, text string) []byte {
	status := bolt.ServerException
	if f == faultUnreachable {
		status = bolt.NoProcessor
	} else if f == faultShed {
		status = bolt.Busy
	}
	return bolt.AppendError(dst, &c.frame, status, text)
}

func (c *boltCodec) alive(dst []byte) []byte { return bolt.AppendAlive(dst, &c.frame) }

func (c *boltCodec) begin() { c.sum.Begin(c.extent) }

func (c *boltCodec) add(b []byte) error {
	if !c.extent.CRC {
		return nil
	}
	return c.sum.Add(b)
}

func (c *boltCodec) progress() (p [3]uint32) {
	if c.extent.CRC {
		p = c.sum.Progress()
	}
	return p
}

func (c *boltCodec) resume(p [3]uint32) {
	c.sum.Resume(p)
	c.extent.CRC = p != [3]uint32{}
}

// dubboCodec reads frames of Dubbo. What does not begin with its magic is
// malformed: a server takes it for commands to its console, and looks for the
// magic inside of it.
type dubboCodec struct {
	frame  dubbo.Frame
	size   int
	reader dubbo.Reader
}

func (c *dubboCodec) measure(b []byte, deep bool) (size, look int, err error) {
	if size, err = dubbo.Size(b); err != nil || size == 0 {
		return 0, 0, err
	}
	if deep && size <= dubbo.HeaderLen+dubboLook {
		return size, size, nil
	}
	return size, dubbo.HeaderLen, nil
}

func (c *dubboCodec) inspect(b []byte, size int) (kind rpcKind, answer bool, err error) {
	c.size = size
	c.frame = dubbo.Parse(b, size)
	return dubboKind(c.frame.Kind), c.frame.TwoWay, nil
}

func dubboKind(k dubbo.Kind) rpcKind {
	switch k {
	case dubbo.KindAlive:
		return rpcAlive
	case dubbo.KindOther:
		return rpcOther
	}
	return rpcCall
}

func (c *dubboCodec) asks(b []byte) bool {
	return dubbo.Parse(b, dubbo.HeaderLen).Kind == dubbo.KindCall
}

func (c *dubboCodec) target() (remote, error) {
	if n := dubbo.HeaderLen + len(c.frame.Body); n < c.size {
		return remote{}, fmt.Errorf("%d of its %d bytes are not enough; at most %d are read", n, c.size, dubboLook)
	}
	t, err := c.reader.Target(&c.frame)
	if err != nil {
		return remote{}, err
	}
	return remote{service: t.Service, version: t.Version, group: t.Group, method: t.Method}, nil
}

func (c *dubboCodec) refuse(dst []byte, f fault, text string) []byte {
	status := dubbo.ServiceError
	if f == faultUnreachable {
		status = dubbo.ServerError
	} else if f == faultShed {
		status = dubbo.Exhausted
	}
	return dubbo.AppendError(dst, &c.frame, status, text)
}

func (c *dubboCodec) alive(dst []byte) []byte { return dubbo.AppendAlive(dst, &c.frame) }

func (c *dubboCodec) begin() {}

func (c *dubboCodec) add([]byte) error { return nil }

func (c *dubboCodec) progress() (p [3]uint32) { return p }

func (c *dubboCodec) resume([3]uint32) {}

// thriftCodec reads frames of dubbo-thrift.
type thriftCodec struct {
	head    int
	frame   dubbo.ThriftFrame
	message dubbo.ThriftMessage
	unclear error
}

func (c *thriftCodec) measure(b []byte, _ bool) (size, look int, err error) {
	if size, c.head, err = dubbo.ThriftSize(b); err != nil {
		return 0, 0, err
	}
	return size, min(c.head+thriftLook, size), nil
}

func (c *thriftCodec) inspect(b []byte, size int) (kind rpcKind, answer bool, err error) {
	if c.frame, err = dubbo.ParseThrift(b, size, c.head); err != nil {
		return 0, false, err
	}
	if c.message, c.unclear = c.frame.Head(); c.unclear != nil {
		return rpcCall, true, nil
	}
	return dubboKind(c.message.Kind), c.message.TwoWay, nil
}

// asks is never so: no server of dubbo-thrift calls back.
func (c *thriftCodec) asks([]byte) bool { return false }

func (c *thriftCodec) target() (remote, error) {
	return remote{service: c.frame.Service, method: c.message.Method}, c.unclear
}

func (c *thriftCodec) refuse(dst []byte, _ fault, text string) []byte {
	return dubbo.AppendThriftError(dst, &c.frame, &c.message, text)
}

// alive is never asked for: the protocol has no heartbeat.
func (c *thriftCodec) alive(dst []byte) []byte { return dst }

func (c *thriftCodec) begin() {}

func (c *thriftCodec) add([]byte) error { return nil }

func (c *thriftCodec) progress() (p [3]uint32) { return p }

func (c *thriftCodec) resume([3]uint32) {}
