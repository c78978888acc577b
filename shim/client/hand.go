package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"google.golang.org/protobuf/types/known/wrapperspb"

	"hauberk.dev/api/hand"
)

// say calls a method whose messages are JSON.
func (s *Shim) say(ctx context.Context, method string, q, a any) error {
	raw, err := json.Marshal(q)
	if err != nil {
		return err
	}
	var out wrapperspb.BytesValue
	if err := s.conn.Call(ctx, hand.Service, method, wrapperspb.Bytes(raw), &out); err != nil {
		return said(err)
	}
	return json.Unmarshal(out.GetValue(), a)
}

// Top lists what runs in a container.
func (s *Shim) Top(ctx context.Context, id string) ([]hand.Task, error) {
	var a hand.TopReply
	err := s.say(ctx, hand.MethodTop, hand.TopRequest{Container: id}, &a)
	return a.Tasks, err
}

// Snapshot saves a container with its machine into a directory, which is made,
// and lets it go on or ends it. The note is kept with it.
func (s *Shim) Snapshot(ctx context.Context, id, dir string, end bool, note []byte) (hand.SnapshotReply, error) {
	var a hand.SnapshotReply
	err := s.say(ctx, hand.MethodSnapshot, hand.SnapshotRequest{Container: id, Dir: dir, End: end, Note: note}, &a)
	return a, err
}

// CopyOut gives what a path of a container names as a tar stream. The socket is
// a name that is free, for as long as the copy takes.
func (s *Shim) CopyOut(ctx context.Context, id, path, socket string, files io.Writer) error {
	return s.copy(ctx, hand.CopyRequest{Container: id, Out: true, Path: path, Socket: socket}, func(c *net.UnixConn) error {
		_, err := io.Copy(files, c)
		return err
	})
}

// CopyIn puts the files of a tar stream below a directory of a container.
func (s *Shim) CopyIn(ctx context.Context, id, path, socket string, files io.Reader) error {
	return s.copy(ctx, hand.CopyRequest{Container: id, Path: path, Socket: socket}, func(c *net.UnixConn) error {
		_, err := io.Copy(c, files)
		return errors.Join(err, c.CloseWrite())
	})
}

// copy has the shim connect to a socket, over which f speaks.
func (s *Shim) copy(ctx context.Context, q hand.CopyRequest, f func(*net.UnixConn) error) error {
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: q.Socket, Net: "unix"})
	if err != nil {
		return fmt.Errorf("copy files: %w", err)
	}
	defer ln.Close()
	if err := os.Chmod(q.Socket, 0o600); err != nil {
		return fmt.Errorf("copy files: %w", err)
	}
	// A call that ends takes what waits for its files with it, and the other
	// way round.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	called := make(chan error, 1)
	go func() {
		err := s.say(ctx, hand.MethodCopy, q, &hand.Empty{})
		if err != nil {
			_ = ln.SetDeadline(time.Now())
		}
		called <- err
	}()
	conn, err := ln.AcceptUnix()
	if err != nil { // nobody came: the call says why
		return errors.Join(<-called, context.Cause(ctx))
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })
	defer stop()
	moved := f(conn)
	if moved != nil {
		_ = conn.Close()
		late := time.AfterFunc(lastReason, cancel)
		defer late.Stop()
	}
	if err := <-called; err != nil && !errors.Is(err, context.Canceled) {
		return err // what it says is why the stream broke
	}
	return moved
}

// lastReason is how long a shim has to say why it broke a copy off.
const lastReason = 2 * time.Second
