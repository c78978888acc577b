package http2

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"hauberk.dev/mesh/h2frame"
)

// State is a group of frozen connections whose streams are each other's mates. It
// is plain data that goes through JSON and that only Resume reads.
type State struct {
	Conns   []connState   `json:"conns"`
	Streams []streamState `json:"streams,omitempty"`
}

// connState is one connection. Streams are named by their place in State.
type connState struct {
	Client  bool       `json:"client,omitempty"`
	Started bool       `json:"started,omitempty"` // Run has greeted the peer
	Begun   uint8      `json:"begun,omitempty"`
	Greeted bool       `json:"greeted,omitempty"`
	Unread  []byte     `json:"unread,omitempty"`
	Part    *partState `json:"part,omitempty"`
	Out     []byte     `json:"out,omitempty"`
	Answers int        `json:"answers,omitempty"`

	// The table of the decoder, oldest first, and how large it may be. That of
	// the encoder is not kept, as a decoder can be told to empty its own.
	Table    []h2frame.Field `json:"table,omitempty"`
	TableMax uint32          `json:"tableMax"`
	Encoder  uint32          `json:"encoder"`

	Cheap   allowanceState `json:"cheap"`
	Resets  allowanceState `json:"resets"`
	Updates allowanceState `json:"updates"`
	Frames  uint64         `json:"frames,omitempty"`
	Sent    uint64         `json:"sent,omitempty"`
	Paid    uint64         `json:"paid,omitempty"`
	Empty   int            `json:"empty,omitempty"`
	Well    int            `json:"well,omitempty"`

	Window  int64 `json:"window"`
	Credit  int64 `json:"credit"`
	Owed    int64 `json:"owed,omitempty"`
	Initial int64 `json:"initial"`
	Most    int   `json:"most"`

	NextID   uint32        `json:"nextID,omitempty"`
	LastID   uint32        `json:"lastID,omitempty"`
	Taken    uint32        `json:"taken,omitempty"`
	Draining bool          `json:"draining,omitempty"`
	Ended    []endingState `json:"ended,omitempty"` // oldest first

	Ready   []int `json:"ready,omitempty"`
	Waiting []int `json:"waiting,omitempty"`
	Blocked []int `json:"blocked,omitempty"`

	End     *endState `json:"end,omitempty"` // the peer has been told, and reads
	Closing bool      `json:"closing,omitempty"`
}

type partState struct {
	Data   int    `json:"data"` // -1 if it is none
	N      int    `json:"n,omitempty"`
	End    bool   `json:"end,omitempty"`
	Skip   int    `json:"skip,omitempty"`
	Stream uint32 `json:"stream,omitempty"`
	Flags  byte   `json:"flags,omitempty"`
	Self   bool   `json:"self,omitempty"`
	Frames int    `json:"frames,omitempty"`
	Block  []byte `json:"block,omitempty"`
}

// fieldState is a Field, whose bytes need not be text.
type fieldState struct {
	Name      []byte `json:"n"`
	Value     []byte `json:"v"`
	Sensitive bool   `json:"s,omitempty"`
}

type allowanceState struct {
	Left int           `json:"left"`
	Ago  time.Duration `json:"ago,omitempty"` // since it grew, 0 if it never had to
}

type endingState struct {
	ID  uint32  `json:"id"`
	How endKind `json:"how"`
}

// endState is why a connection has ended: a fault of the peer if Code is set.
type endState struct {
	Drained bool   `json:"drained,omitempty"`
	Code    Code   `json:"code,omitempty"`
	Why     string `json:"why,omitempty"`
	Shut    bool   `json:"shut,omitempty"`
}

type streamState struct {
	Conn  int             `json:"conn"` // -1 if that has ended
	ID    uint32          `json:"id,omitempty"`
	Mate  int             `json:"mate"` // -1 if it has none
	Value json.RawMessage `json:"value,omitempty"`

	Declared int64 `json:"declared"`
	Got      int64 `json:"got,omitempty"`
	Answered bool  `json:"answered,omitempty"`
	Bodyless bool  `json:"bodyless,omitempty"`
	IsHead   bool  `json:"isHead,omitempty"`

	Window    int64          `json:"window"`
	Credit    int64          `json:"credit"`
	Owed      int64          `json:"owed,omitempty"`
	Heads     [][]fieldState `json:"heads,omitempty"`
	Data      []byte         `json:"data,omitempty"`
	Trailers  []fieldState   `json:"trailers"` // nil and empty differ
	Begun     bool           `json:"begun,omitempty"`
	Finishing bool           `json:"finishing,omitempty"`
	Stopping  bool           `json:"stopping,omitempty"`
	StopCode  Code           `json:"stopCode,omitempty"`
	Ended     bool           `json:"ended,omitempty"`
	PeerEnded bool           `json:"peerEnded,omitempty"`
	Over      bool           `json:"over,omitempty"`
	HeadBytes int            `json:"headBytes,omitempty"`
}

// check finds what no connection could have been in. A State that passes is
// resumed without a panic, whatever it says.
func (s *State) check() error {
	for i := range s.Conns {
		if err := s.Conns[i].check(); err != nil {
			return fmt.Errorf("state of connection %d: %w", i, err)
		}
	}
	for i := range s.Streams {
		if t := &s.Streams[i]; !within(t.Conn, -1, len(s.Conns)-1) || !within(t.Mate, -1, len(s.Streams)-1) || t.Mate == i {
			return fmt.Errorf("state of stream %d: it belongs nowhere", t.ID)
		}
	}
	ids := make([]map[uint32]bool, len(s.Conns))
	for i := range ids {
		ids[i] = map[uint32]bool{}
	}
	for i := range s.Streams {
		t := &s.Streams[i]
		if err := s.checkStream(i); err != nil {
			return fmt.Errorf("state of stream %d: %w", t.ID, err)
		}
		if !t.Over && t.ID != 0 {
			if ids[t.Conn][t.ID] || len(ids[t.Conn]) == MaxStreams {
				return fmt.Errorf("state of stream %d: it is twice on a connection, or that has more than %d", t.ID, MaxStreams)
			}
			ids[t.Conn][t.ID] = true
		}
	}
	return s.checkLines()
}

func within[T int | int64 | uint32 | time.Duration](v, least, most T) bool {
	return least <= v && v <= most
}

func (s *connState) check() error {
	// Bounds that newConn sets.
	const mostCheap, mostResets, mostUpdates = 1000, 500, 2000
	table := 0
	for i := range s.Table {
		table += len(s.Table[i].Name) + len(s.Table[i].Value) + 32
	}
	switch {
	case s.Begun > begunSettings || s.Greeted && s.Begun == 0 && !s.Client:
		return errors.New("what has come of the greeting")
	case len(s.Unread) > readSize:
		return fmt.Errorf("%d bytes read ahead", len(s.Unread))
	case !within(s.Answers, 0, len(s.Out)):
		return fmt.Errorf("%d bytes of answers among %d", s.Answers, len(s.Out))
	case s.TableMax > h2frame.TableSize || s.Encoder > h2frame.TableSize || uint32(table) > s.TableMax:
		return fmt.Errorf("tables of %d, %d of %d bytes", s.Encoder, table, s.TableMax)
	case !s.Cheap.within(mostCheap) || !s.Resets.within(mostResets) || !s.Updates.within(mostUpdates):
		return errors.New("an allowance is out of its bounds")
	case s.Sent > s.Frames || s.Paid > s.Frames || !within(s.Empty, 0, maxEmptyData) || !within(s.Well, 0, mostResets):
		return errors.New("a count is out of its bounds")
	case !within(s.Window, 0, h2frame.MaxWindow) || !within(s.Initial, 0, h2frame.MaxWindow) || !within(s.Credit, 0, connWindow) || !within(s.Owed, 0, h2frame.MaxWindow):
		return errors.New("a window is out of its bounds")
	case !within(s.Most, 0, MaxStreams) || s.NextID%2 == 0 || s.NextID > lastStream+2 || s.LastID > lastStream || s.Taken > s.LastID:
		return errors.New("the number of a stream is out of its bounds")
	case len(s.Ended) > rememberEnded:
		return fmt.Errorf("%d ends of streams", len(s.Ended))
	}
	for _, e := range s.Ended {
		if e.ID == 0 || e.How > endOurs {
			return errors.New("the end of a stream that never was")
		}
	}
	if p := s.Part; p != nil {
		return p.check()
	}
	return nil
}

func (a allowanceState) within(most int) bool {
	return within(a.Left, 0, most) && within(a.Ago, 0, 1<<60)
}

func (p *partState) check() error {
	switch {
	case !within(p.Skip, 0, maxFrame) || p.Data < 0 && p.N != 0 || p.Data >= 0 && !within(p.N, 1, maxFrame):
		return fmt.Errorf("%d and %d bytes are left of a frame", p.N, p.Skip)
	case p.Frames != 0 && (p.Data >= 0 || p.Skip != 0 || !within(p.Frames, 1, maxContinuations+1) || len(p.Block) > maxBlock || p.Stream == 0 || p.Stream > lastStream):
		return fmt.Errorf("%d frames of a header block", p.Frames)
	}
	return nil
}

func (s *State) checkStream(i int) error {
	t := &s.Streams[i]
	switch {
	case t.Over && (len(t.Heads) > 0 || len(t.Data) > 0 || t.Trailers != nil || t.HeadBytes != 0):
		return errors.New("it is over and has something to send")
	case t.Conn < 0:
		if !t.Over {
			return errors.New("it goes on where its connection does not")
		}
		return nil
	case len(t.Heads) > maxInterim+1 || !within(t.HeadBytes, 0, maxHeadsHeld):
		return errors.New("too much waits to be sent")
	case !within(t.Window, -h2frame.MaxWindow, h2frame.MaxWindow) || !within(t.Credit, 0, streamWindow) || !within(t.Owed, 0, h2frame.MaxWindow):
		return errors.New("a window is out of its bounds")
	case t.Declared < -1 || t.Got < 0:
		return errors.New("a length is out of its bounds")
	}
	c := &s.Conns[t.Conn]
	switch {
	case t.Mate >= 0 && s.Streams[t.Mate].Conn >= 0 && s.Conns[s.Streams[t.Mate].Conn].Client == c.Client:
		return errors.New("its mate is on the same side")
	case t.Over:
		return nil
	case c.End != nil:
		return errors.New("it goes on where its connection does not")
	case t.ID == 0 && !c.Client:
		return errors.New("a client has opened it without a number")
	case t.ID != 0 && (t.ID%2 == 0 || c.Client && t.ID >= c.NextID || !c.Client && t.ID > c.LastID):
		return errors.New("it was never opened")
	}
	return nil
}

// checkLines checks that a stream waits in one line at most, of its connection,
// and that one without a number waits for it.
func (s *State) checkLines() error {
	in := make([]bool, len(s.Streams))
	for n := range s.Conns {
		c := &s.Conns[n]
		for _, l := range [][]int{c.Ready, c.Waiting, c.Blocked} {
			for _, i := range l {
				if i < 0 || i >= len(in) || in[i] || s.Streams[i].Conn != n || s.Streams[i].Over {
					return fmt.Errorf("state of connection %d: a line with a stream that cannot be in it", n)
				}
				in[i] = true
			}
		}
		if p := c.Part; p != nil && p.Data >= 0 && (p.Data >= len(in) || s.Streams[p.Data].Conn != n) {
			return fmt.Errorf("state of connection %d: a frame of a stream it does not have", n)
		}
	}
	for i := range s.Streams {
		if t := &s.Streams[i]; !t.Over && t.ID == 0 && !in[i] {
			return errors.New("state of a stream without a number: it waits for none")
		}
	}
	return nil
}
