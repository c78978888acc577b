package bolt

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"example.com/bank/call"
)

// Handler answers requests. An error becomes the Error of the response.
type Handler func(context.Context, Request) (any, error)

// maxConns is how many clients are served at a time.
const maxConns = 256

// Serve answers requests until the context ends, then closes every connection
// and returns when all handlers have.
func Serve(ctx context.Context, ln net.Listener, handle Handler) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	context.AfterFunc(ctx, func() { ln.Close() })
	slots := make(chan struct{}, maxConns)
	for {
		c, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		select {
		case slots <- struct{}{}:
		default:
			c.Close() // full
			continue
		}
		wg.Go(func() {
			defer func() { <-slots }()
			defer c.Close()
			stop := context.AfterFunc(ctx, func() { c.Close() })
			defer stop()
			serveConn(ctx, c, handle)
		})
	}
}

// serveConn answers one client. A client that breaks the protocol is dropped.
func serveConn(ctx context.Context, c net.Conn, handle Handler) {
	r := bufio.NewReader(c)
	for {
		c.SetReadDeadline(time.Now().Add(5 * time.Minute))
		f, err := readFrame(r)
		if err != nil || f.kind == typeResponse {
			return
		}
		reply := answer(ctx, f, handle)
		if f.kind == typeOneWay {
			continue
		}
		c.SetWriteDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Write(reply.append(nil)); err != nil {
			return
		}
	}
}

// answer makes the response to a request or a heartbeat.
func answer(ctx context.Context, f frame, handle Handler) frame {
	out := frame{kind: typeResponse, command: commandResponse, id: f.id}
	switch f.command {
	case commandHeartbeat:
		out.command = commandHeartbeat
		return out
	case commandRequest:
	default:
		out.status = StatusNoProcessor
		return out
	}
	req, err := parseRequest(f.content)
	if err != nil {
		out.status = StatusCodec
		return out
	}
	resp := Response{}
	if resp.Value, err = handle(ctx, req); err != nil {
		resp = Response{Error: err.Error()}
	}
	out.class = responseClass
	if out.content, err = appendResponse(nil, resp); err != nil {
		return frame{kind: typeResponse, command: commandResponse, id: f.id, status: StatusCodec}
	}
	return out
}

// Client calls a bolt server.
type Client struct {
	pool *call.Pool
	id   atomic.Uint32
}

// NewClient returns a client of the server at an address.
func NewClient(address string) *Client { return &Client{pool: call.New(address)} }

// Close closes idle connections.
func (c *Client) Close() { c.pool.Close() }

// Call makes a call, again if a connection breaks. An error of the service
// comes as *call.Refusal.
func (c *Client) Call(ctx context.Context, req Request) (any, error) {
	content, err := appendRequest(nil, req)
	if err != nil {
		return nil, err
	}
	var value any
	err = c.pool.Do(ctx, func(conn net.Conn) error {
		f := frame{
			kind: typeRequest, command: commandRequest, id: c.id.Add(1), timeout: 3000,
			class: requestClass, header: []pair{{"service", req.Service}}, content: content,
		}
		value, err = exchange(conn, f)
		return err
	})
	return value, err
}

func exchange(conn net.Conn, f frame) (any, error) {
	if _, err := conn.Write(f.append(nil)); err != nil {
		return nil, err
	}
	// Nothing is sent before the next request, so nothing read ahead is lost.
	reply, err := readFrame(bufio.NewReader(conn))
	switch {
	case err != nil:
		return nil, err
	case reply.kind != typeResponse || reply.id != f.id:
		return nil, errors.New("bolt: reply belongs to another request")
	case reply.status != StatusOK:
		return nil, fmt.Errorf("bolt: status %d", reply.status)
	}
	resp, err := parseResponse(reply.content)
	if err == nil && resp.Error != "" {
		err = &call.Refusal{Reason: resp.Error}
	}
	return resp.Value, err
}
