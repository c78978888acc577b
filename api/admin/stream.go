package admin

import (
	"encoding/binary"
	"fmt"
	"io"
)

// MaxFrame is the largest payload of a stream frame, in bytes.
const MaxFrame = 64 << 10

// StreamProtocol is the Upgrade token of an exec stream.
const StreamProtocol = "hauberk-exec/1"

// WriteFrame writes one frame in a single call of w, so that frames of several
// writers under one lock never interleave.
func WriteFrame(w io.Writer, kind byte, payload []byte) error {
	if len(payload) > MaxFrame {
		return fmt.Errorf("write frame: %d bytes: at most %d", len(payload), MaxFrame)
	}
	frame := make([]byte, 5+len(payload))
	frame[0] = kind
	binary.BigEndian.PutUint32(frame[1:], uint32(len(payload)))
	copy(frame[5:], payload)
	if _, err := w.Write(frame); err != nil {
		return fmt.Errorf("write frame: %w", err)
	}
	return nil
}

// ReadFrame reads one frame. An oversized or unknown one is an error before
// anything of its payload is read; io.EOF means a clean end between frames.
func ReadFrame(r io.Reader) (kind byte, payload []byte, err error) {
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		if err == io.EOF {
			return 0, nil, io.EOF
		}
		return 0, nil, fmt.Errorf("read frame: %w", err)
	}
	n := binary.BigEndian.Uint32(head[1:])
	if head[0] > FrameError || n > MaxFrame {
		return 0, nil, fmt.Errorf("read frame: kind %d of %d bytes: not a frame of %s", head[0], n, StreamProtocol)
	}
	payload = make([]byte, n)
	if _, err := io.ReadFull(r, payload); err != nil {
		return 0, nil, fmt.Errorf("read frame: %w", err)
	}
	return head[0], payload, nil
}
