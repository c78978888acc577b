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

// Frames of HTTP/2, as far as a probe needs them (RFC 9113, section 6).
const (
	frameData         = 0
	frameHeaders      = 1
	frameReset        = 3
	frameSettings     = 4
	framePing         = 6
	frameGoAway       = 7
	frameContinuation = 9

	flagEnd        = 1 // of the stream; of settings and pings: an answer
	flagEndHeaders = 4
	flagPadded     = 8
	flagPriority   = 32

	maxProbeFrame = 16 << 10
	preface       = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
)

func appendFrame(b []byte, kind, flags byte, stream uint32, payload []byte) []byte {
	b = append(b, byte(len(payload)>>16), byte(len(payload)>>8), byte(len(payload)), kind, flags)
	return append(binary.BigEndian.AppendUint32(b, stream), payload...)
}

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
	b := appendFrame([]byte(preface), frameSettings, 0, 0, nil)
	b = appendFrame(b, frameHeaders, flagEndHeaders, 1, block.Bytes())
	return appendFrame(b, frameData, flagEnd, 1, body)
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
	var head [9]byte
	buffer := make([]byte, maxProbeFrame)
	for {
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return fmt.Errorf("read frame: %w", err)
		}
		length := int(head[0])<<16 | int(head[1])<<8 | int(head[2])
		if length > maxProbeFrame {
			return fmt.Errorf("frame of %d bytes", length)
		}
		payload := buffer[:length]
		if _, err := io.ReadFull(r, payload); err != nil {
			return fmt.Errorf("read frame: %w", err)
		}
		end, err := a.frame(head[3], head[4], binary.BigEndian.Uint32(head[5:])&^(1<<31), payload, w)
		if err != nil || end {
			return err
		}
	}
}

// frame takes one frame and tells whether it ends the stream.
func (a *healthAnswer) frame(kind, flags byte, stream uint32, p []byte, w io.Writer) (end bool, err error) {
	switch kind {
	case frameSettings, framePing:
		if flags&flagEnd != 0 {
			return false, nil
		}
		if kind == frameSettings {
			p = nil
		}
		_, err := w.Write(appendFrame(nil, kind, flagEnd, 0, p))
		return false, err
	case frameGoAway:
		return false, fmt.Errorf("the server goes away: %.64x", p)
	}
	if stream != 1 {
		return false, nil
	}
	switch kind {
	case frameReset:
		return false, fmt.Errorf("the server resets the stream: %.8x", p)
	case frameData, frameHeaders:
		if p, err = unpad(kind, flags, p); err != nil {
			return false, err
		}
		if kind == frameData {
			a.body = append(a.body, p...)
			return flags&flagEnd != 0, nil
		}
		a.ended = flags&flagEnd != 0
	case frameContinuation:
	default:
		return false, nil
	}
	a.block = append(a.block, p...)
	if flags&flagEndHeaders == 0 {
		return false, nil
	}
	if _, err := a.fields.Write(a.block); err != nil {
		return false, err
	}
	a.block = a.block[:0]
	return a.ended, a.fields.Close()
}

func unpad(kind, flags byte, p []byte) ([]byte, error) {
	pad := 0
	if flags&flagPadded != 0 {
		if len(p) == 0 {
			return nil, errors.New("padded frame without padding")
		}
		pad, p = int(p[0]), p[1:]
	}
	if kind == frameHeaders && flags&flagPriority != 0 {
		pad += 5
		if len(p) >= 5 {
			p, pad = p[5:], pad-5
		}
	}
	if pad > len(p) {
		return nil, errors.New("frame with more padding than bytes")
	}
	return p[:len(p)-pad], nil
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
