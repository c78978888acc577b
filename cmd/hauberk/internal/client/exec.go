package client

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"

	"hauberk.dev/api/admin"
)

// Stdio is what an exec reads and writes.
type Stdio struct {
	In       io.Reader // nil: the process sees the end of input at once
	Out, Err io.Writer
	// Resize delivers sizes of the terminal; nil without one.
	Resize <-chan Size
}

// Size of a terminal, in characters.
type Size struct{ Rows, Cols uint16 }

// Exec runs a process in a running instance and returns its exit code once it
// has ended. Reading In may go on for as long as In does not return.
func (c *Client) Exec(ctx context.Context, ask admin.Exec, stdio Stdio) (code int, err error) {
	conn, answers, err := c.upgrade(ctx, ask)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	out := &sender{w: conn}
	go out.input(stdio.In)
	ended := make(chan struct{})
	defer close(ended)
	go out.resizes(stdio.Resize, ended)
	code, err = receive(answers, stdio)
	if ctx.Err() != nil {
		return 0, ctx.Err()
	}
	return code, err
}

// upgrade asks for the stream and returns it with what was already read of it.
func (c *Client) upgrade(ctx context.Context, ask admin.Exec) (net.Conn, io.Reader, error) {
	body, err := json.Marshal(ask)
	if err != nil {
		return nil, nil, fmt.Errorf("encode exec: %w", err)
	}
	req, err := request(ctx, http.MethodPost, admin.PathExec, nil, bytes.NewReader(body))
	if err != nil {
		return nil, nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", admin.StreamProtocol)
	conn, err := c.dial(ctx)
	if err != nil {
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	answers := bufio.NewReader(conn)
	err = handshake(conn, answers, req)
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	return conn, answers, nil
}

func handshake(conn net.Conn, answers *bufio.Reader, req *http.Request) error {
	if err := req.Write(conn); err != nil {
		return fmt.Errorf("ask for a stream: %w", err)
	}
	resp, err := http.ReadResponse(answers, req)
	if err != nil {
		return fmt.Errorf("ask for a stream: %w", err)
	}
	if resp.StatusCode == http.StatusSwitchingProtocols {
		return nil
	}
	defer resp.Body.Close()
	return refusal(resp)
}

// sender writes whole frames from several goroutines.
type sender struct {
	mu sync.Mutex
	w  io.Writer
}

func (s *sender) frame(kind byte, payload []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return admin.WriteFrame(s.w, kind, payload)
}

// input sends standard input until it ends, then an empty frame for the end.
func (s *sender) input(in io.Reader) {
	buf := make([]byte, 32<<10)
	for in != nil {
		n, err := in.Read(buf)
		if n > 0 && s.frame(admin.FrameStdin, buf[:n]) != nil {
			return // the process has ended; receive knows
		}
		if err != nil {
			break
		}
	}
	_ = s.frame(admin.FrameStdin, nil)
}

func (s *sender) resizes(sizes <-chan Size, ended <-chan struct{}) {
	for {
		select {
		case <-ended:
			return
		case size, open := <-sizes:
			if !open {
				return
			}
			payload := binary.BigEndian.AppendUint16(nil, size.Rows)
			payload = binary.BigEndian.AppendUint16(payload, size.Cols)
			if s.frame(admin.FrameResize, payload) != nil {
				return
			}
		}
	}
}

// receive copies output until the frame that ends the stream.
func receive(answers io.Reader, stdio Stdio) (code int, err error) {
	for {
		kind, payload, err := admin.ReadFrame(answers)
		switch {
		case errors.Is(err, io.EOF):
			return 0, errors.New("the stream ended without an exit code: the sandbox or its node is gone")
		case err != nil:
			return 0, err
		}
		switch kind {
		case admin.FrameStdout:
			_, err = stdio.Out.Write(payload)
		case admin.FrameStderr:
			_, err = stdio.Err.Write(payload)
		case admin.FrameExit:
			if len(payload) != 4 {
				return 0, fmt.Errorf("read exit code: %d bytes, want 4", len(payload))
			}
			return int(int32(binary.BigEndian.Uint32(payload))), nil
		case admin.FrameError:
			return 0, streamError(payload)
		}
		if err != nil {
			return 0, fmt.Errorf("write output: %w", err)
		}
	}
}

func streamError(payload []byte) error {
	var e admin.Error
	if err := json.Unmarshal(payload, &e); err != nil || e.Message == "" {
		return fmt.Errorf("the stream ended with %q", payload[:min(len(payload), 512)])
	}
	return &e
}
