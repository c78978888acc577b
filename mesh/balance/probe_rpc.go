package balance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"

	"hauberk.dev/mesh/bolt"
	"hauberk.dev/mesh/dubbo"
)

// Heartbeats with id 1, as clients of these protocols send them.
const (
	boltHeartbeat  = "\x01\x01\x00\x00\x01\x00\x00\x00\x01\x01\x00\x00\x0b\xb8\x00\x00\x00\x00\x00\x00\x00\x00"
	dubboHeartbeat = "\xda\xbb\xe2\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x01N"
)

// ProbeBolt is well if a SOFABolt heartbeat is answered.
func ProbeBolt(ctx context.Context, dial Dialer, address string) error {
	return talk(ctx, dial, address, func(c net.Conn) error {
		b, err := askFrame(c, boltHeartbeat, func(b []byte) (int, error) {
			x, err := bolt.Size(b)
			return x.Len, err
		})
		if err != nil {
			return err
		}
		x, err := bolt.Size(b)
		if err != nil {
			return err
		}
		f := bolt.Parse(b, x)
		if f.Type != bolt.Response || f.Command != bolt.Heartbeat || f.ID != 1 || f.Status != bolt.OK {
			return fmt.Errorf("the answer to a heartbeat is type %d, command %d, id %d, status %d", f.Type, f.Command, f.ID, f.Status)
		}
		return nil
	})
}

// ProbeDubbo is well if a Dubbo heartbeat is answered.
func ProbeDubbo(ctx context.Context, dial Dialer, address string) error {
	return talk(ctx, dial, address, func(c net.Conn) error {
		b, err := askFrame(c, dubboHeartbeat, dubbo.Size)
		if err != nil {
			return err
		}
		const request, event, ok = 0x80, 0x20, 20
		f := dubbo.Parse(b, len(b))
		if flags := b[2]; flags&request != 0 || flags&event == 0 || f.ID != 1 || f.Status != ok {
			return fmt.Errorf("the answer to a heartbeat has flags %#x, id %d, status %d", flags, f.ID, f.Status)
		}
		return nil
	})
}

// askFrame writes a question and reads the first frame of the answer.
func askFrame(c net.Conn, question string, size func([]byte) (int, error)) ([]byte, error) {
	if _, err := io.WriteString(c, question); err != nil {
		return nil, err
	}
	var b []byte
	for {
		n, err := size(b)
		switch {
		case err != nil:
			return nil, err
		case n > maxAnswer:
			return nil, fmt.Errorf("an answer of %d bytes to a heartbeat", n)
		case n > 0 && len(b) >= n:
			return b[:n], nil
		case len(b) >= maxAnswer:
			return nil, errors.New("no end of the answer to a heartbeat")
		}
		var part [4096]byte
		k, err := c.Read(part[:])
		if b = append(b, part[:k]...); err != nil && k == 0 {
			return nil, fmt.Errorf("read answer: %w", err)
		}
	}
}
