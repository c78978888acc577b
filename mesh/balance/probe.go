package balance

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http2/hpack"

	"hauberk.dev/mesh/h2frame"
)

// Dialer connects to an endpoint.
type Dialer func(ctx context.Context, network, address string) (net.Conn, error)

const maxAnswer = 64 << 10 // bytes read of what is probed

// ProbeTCP is well if a connection can be made.
func ProbeTCP(ctx context.Context, dial Dialer, address string) error {
	c, err := dial(ctx, "tcp", address)
	if err != nil {
		return err
	}
	return c.Close()
}

// talk runs f on a connection that ends with ctx.
func talk(ctx context.Context, dial Dialer, address string, f func(net.Conn) error) error {
	c, err := dial(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := f(c); err != nil {
		return errors.Join(err, ctx.Err())
	}
	return nil
}

// ProbeHTTP is well if GET of a path is answered with a status of 200 to 299.
func ProbeHTTP(ctx context.Context, dial Dialer, address, host, path string) error {
	if !strings.HasPrefix(path, "/") || strings.ContainsFunc(path+host, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return fmt.Errorf("probe host %q, path %q: not to be sent as HTTP", host, path)
	}
	return talk(ctx, dial, address, func(c net.Conn) error {
		if _, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: hauberk-mesh\r\nConnection: close\r\n\r\n", path, host); err != nil {
			return err
		}
		line, err := bufio.NewReaderSize(io.LimitReader(c, maxAnswer), 512).ReadSlice('\n')
		if err != nil {
			return fmt.Errorf("read status line: %w", err)
		}
		status, err := readStatus(line)
		if err != nil {
			return err
		}
		if status < 200 || status > 299 {
			return fmt.Errorf("status %d", status)
		}
		return nil
	})
}

// readStatus is the status of a status line.
func readStatus(line []byte) (int, error) {
	rest, ok := bytes.CutPrefix(line, []byte("HTTP/1."))
	if !ok || len(rest) < 6 || rest[1] != ' ' || rest[5] != ' ' && rest[5] != '\r' && rest[5] != '\n' {
		return 0, fmt.Errorf("status line %.64q", line)
	}
	n, err := strconv.ParseUint(string(rest[2:5]), 10, 16)
	if err != nil || n < 100 {
		return 0, fmt.Errorf("status line %.64q", line)
	}
	return int(n), nil
}

const maxProbeFrame = 16 << 10

// ProbeGRPC is well if the gRPC health service (grpc.health.v1) says that a
// service, or with "" the server, is serving. Connections of dial speak HTTP/2.
func ProbeGRPC(ctx context.Context, dial Dialer, address, authority, service string) error {
	if len(service) > 255 || len(authority) > 255 {
		return fmt.Errorf("probe service of %d bytes at an authority of %d; at most 255", len(service), len(authority))
	}
	return talk(ctx, dial, address, func(c net.Conn) error {
		if _, err := c.Write(healthRequest(authority, service)); err != nil {
			return err
		}
		a := &healthAnswer{}
		a.fields = hpack.NewDecoder(4096, a.field)
		a.fields.SetMaxStringLength(4096)
		if err := a.read(io.LimitReader(c, maxAnswer), c); err != nil {
			return err
		}
		return a.verdict()
	})
}

// healthRequest is a whole connection's worth of asking.
func healthRequest(authority, service string) []byte {
	var block bytes.Buffer
	e := hpack.NewEncoder(&block)
	for _, f := range [][2]string{{":method", "POST"}, {":scheme", "http"}, {":path", "/grpc.health.v1.Health/Check"},
		{":authority", authority}, {"content-type", "application/grpc"}, {"te", "trailers"}} {
		e.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}) // a buffer takes all
	}
	var message []byte // HealthCheckRequest: string service = 1
	if service != "" {
		message = append(binary.AppendUvarint([]byte{1<<3 | 2}, uint64(len(service))), service...)
	}
	body := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))), message...)
	b := h2frame.Append([]byte(h2frame.Preface), h2frame.Settings, 0, 0, nil)
	b = h2frame.Append(b, h2frame.Headers, h2frame.FlagEndHeaders, 1, block.Bytes())
	return h2frame.Append(b, h2frame.Data, h2frame.FlagEndStream, 1, body)
}

// healthAnswer is what has been read of the answer.
type healthAnswer struct {
	fields             *hpack.Decoder
	status, grpcStatus string
	grpcMessage        string
	body, block        []byte
	ended              bool // by the headers whose block is being read
}

func (a *healthAnswer) field(f hpack.HeaderField) {
	switch f.Name {
	case ":status":
		a.status = f.Value
	case "grpc-status":
		a.grpcStatus = f.Value
	case "grpc-message":
		a.grpcMessage = f.Value
	}
}

// read reads to the end of the stream.
func (a *healthAnswer) read(r io.Reader, w io.Writer) error {
	var head [h2frame.HeaderLen]byte
	buffer := make([]byte, maxProbeFrame)
	for {
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return fmt.Errorf("read frame: %w", err)
		}
		f := h2frame.Parse(head[:])
		if f.Length > maxProbeFrame {
			return fmt.Errorf("frame of %d bytes", f.Length)
		}
		payload := buffer[:f.Length]
		if _, err := io.ReadFull(r, payload); err != nil {
			return fmt.Errorf("read frame: %w", err)
		}
		end, err := a.frame(f, payload, w)
		if err != nil || end {
			return err
		}
	}
}

// frame takes one frame and tells whether it ends the stream.
func (a *healthAnswer) frame(f h2frame.Header, p []byte, w io.Writer) (end bool, err error) {
	switch f.Kind {
	case h2frame.Settings, h2frame.Ping:
		if f.Has(h2frame.FlagAck) {
			return false, nil
		}
		if f.Kind == h2frame.Settings {
			p = nil
		}
		_, err := w.Write(h2frame.Append(nil, f.Kind, h2frame.FlagAck, 0, p))
		return false, err
	case h2frame.GoAway:
		return false, fmt.Errorf("the server goes away: %.64x", p)
	}
	if f.Stream != 1 {
		return false, nil
	}
	switch f.Kind {
	case h2frame.Reset:
		return false, fmt.Errorf("the server resets the stream: %.8x", p)
	case h2frame.Data, h2frame.Headers:
		if p, _, err = h2frame.Unpad(f, p); err != nil {
			return false, err
		}
		if f.Kind == h2frame.Data {
			a.body = append(a.body, p...)
			return f.Has(h2frame.FlagEndStream), nil
		}
		a.ended = f.Has(h2frame.FlagEndStream)
	case h2frame.Continuation:
	default:
		return false, nil
	}
	a.block = append(a.block, p...)
	if !f.Has(h2frame.FlagEndHeaders) {
		return false, nil
	}
	if _, err := a.fields.Write(a.block); err != nil {
		return false, err
	}
	a.block = a.block[:0]
	return a.ended, a.fields.Close()
}

// verdict reads the message: HealthCheckResponse, ServingStatus status = 1.
func (a *healthAnswer) verdict() error {
	if a.status != "200" || a.grpcStatus != "0" {
		return fmt.Errorf("status %.16q, grpc-status %.16q: %.128q", a.status, a.grpcStatus, a.grpcMessage)
	}
	if len(a.body) < 5 || a.body[0] != 0 || int(binary.BigEndian.Uint32(a.body[1:])) != len(a.body)-5 {
		return errors.New("the answer is not one plain message")
	}
	m := a.body[5:]
	serving := uint64(0)
	for len(m) > 0 {
		tag, n := binary.Uvarint(m)
		if n <= 0 || tag&7 != 0 {
			return fmt.Errorf("the answer is no health: %.32x", a.body)
		}
		v, k := binary.Uvarint(m[n:])
		if k <= 0 {
			return fmt.Errorf("the answer is no health: %.32x", a.body)
		}
		if tag>>3 == 1 {
			serving = v
		}
		m = m[n+k:]
	}
	if serving != 1 {
		return fmt.Errorf("serving status %d", serving)
	}
	return nil
}
